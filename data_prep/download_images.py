"""Downloads the pictures of a prepared dataset: from its items' URLs, or movie posters from TMDB.

  python -m data_prep.download_images --data_dir=data/shop
  TMDB_API_KEY=... python -m data_prep.download_images --data_dir=data/ml-1m --source=tmdb

The outcome of each item is one line of images/manifest.jsonl. The same command, started again,
continues where the last one stopped.
"""

import asyncio
import collections
import contextlib
import functools
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.flags import Parser
from data_prep.images import addresses, web
from data_prep.images.tmdb import Tmdb
from data_prep.images.web import UNANSWERED, NoPicture, Settings, Web
from data_prep.prepared import pictures
from ur4rec_jax import files
from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import read_info, read_items
from ur4rec_jax.errors import InputError, InterruptedBySignal, exit_on_reported_error, say

SOURCES = ('urls', 'tmdb')
_OUTCOMES = (item_pictures.FETCHED, item_pictures.MISSING, item_pictures.REJECTED, UNANSWERED)
_PLACEHOLDERS = 'placeholders'  # Folder of the cards among the pictures.
# Finds the URL of an item's picture; may add to the item's record in the manifest.
_Locate = Callable[[Web, dict[str, Any], dict[str, Any]], Awaitable[str]]


def download(data_dir: str | Path, settings: Settings = Settings()) -> dict[str, Any]:
  """Downloads the pictures that a prepared dataset lacks.

  Args:
    data_dir: folder of the dataset.
    settings: what to download and how patiently.

  Returns:
    Counts of items: all `items`, those with `pictures`, and those without by outcome (`missing`,
    `rejected`, `unanswered`, `not_asked`). Counts of this call: `asked`, `fetched` and
    `unanswered_now`. `reasons`: the first reason of each outcome.

  Raises:
    InputError: no picture can be downloaded at all.
  """
  if not addresses.HAS_HTTPX:
    raise InputError('httpx is not installed; pip install "httpx>=0.28"')
  data_dir = Path(data_dir)
  size = read_info(data_dir)['options']['image_size']
  items = read_items(data_dir)
  ids = [item['original_id'] for item in items]
  names = _file_names(data_dir, ids)
  locate, can_ask = _source(data_dir, items, size, settings)
  with files.disk_errors(data_dir), _manifest(data_dir) as note:
    found = item_pictures.find(data_dir)
    last = {
      record['item']: record
      for record in item_pictures.read_manifest(data_dir)
      if record.get('source') == settings.source
    }
    todo = [
      (item, name)
      for item, name, path in zip(items, names, found, strict=True)
      if path is None and can_ask(item) and _is_open(last.get(item['original_id']), settings)
    ]
    now: dict[str, dict[str, Any]] = {}
    done = collections.Counter(dict.fromkeys(_OUTCOMES, 0))
    with tqdm(total=len(todo), desc='pictures', unit='picture', disable=None) as bar:

      def keep(record: dict[str, Any]) -> None:
        note(record)
        now[record['item']] = record
        done[record['status']] += 1
        bar.set_postfix(done, refresh=False)
        bar.update()

      store = functools.partial(pictures.store, folder=data_dir, image_size=size)
      try:
        asyncio.run(_fetch_all(iter(todo), settings, locate, store, keep))
      except ExceptionGroup as errors:  # Every worker raises the same error.
        raise errors.exceptions[0] from None
    found = item_pictures.find(data_dir)
    for record in _update_placeholders(
      data_dir, items, names, found, size if settings.placeholders else None
    ):
      note(record)
  counts, reasons = _outcomes(ids, found, last | now)
  return {
    'items': len(items),
    **counts,
    'asked': len(now),
    'fetched': done[item_pictures.FETCHED],
    'unanswered_now': done[UNANSWERED],
    'reasons': reasons,
  }


def _file_names(data_dir: Path, ids: list[str]) -> list[str]:
  """Chooses names of picture files without suffix, of which none is that of another item's file.

  In a dataset that events were appended to, earlier items may have files called like their ids, and
  the names are numbers now because a later id is no safe name.
  """
  places = (
    (r['item'], Path(r['path'])) for r in item_pictures.read_manifest(data_dir) if 'path' in r
  )
  folders = (item_pictures.FOLDER, _PLACEHOLDERS)
  earlier = {item: path.stem for item, path in places if path.parent.name in folders}
  taken, names = set(earlier.values()), []
  for item, name in zip(ids, pictures.file_names(ids), strict=True):
    while item not in earlier and name in taken:
      name += '_'
    names.append(earlier.get(item, name))
  return names


def _source(
  data_dir: Path, items: list[dict[str, Any]], image_size: int, settings: Settings
) -> tuple[_Locate, Callable[[dict[str, Any]], bool]]:
  """Returns what finds an item's URL, and whether an item can have one."""
  if settings.source == 'tmdb':
    ids = [item['original_id'] for item in items]
    tmdb = Tmdb(ids, image_size, settings.links, settings.tmdb_url)
    return tmdb.locate, lambda item: bool(item['title'])
  is_url = lambda item: item['image'].startswith(('http://', 'https://'))
  if not any(map(is_url, items)):
    raise InputError(
      f'{data_dir}: no item has the URL of a picture; for movies pass --source=tmdb, or build the'
      ' dataset with an item table that has URLs'
    )
  return _own_url, is_url


async def _own_url(web: Web, item: dict[str, Any], record: dict[str, Any]) -> str:
  del web, record
  return item['image']


def _is_open(record: dict[str, Any] | None, settings: Settings) -> bool:
  """Whether to request the picture of an item that has none; final outcomes are not repeated."""
  final = (item_pictures.MISSING, item_pictures.REJECTED)
  return record is None or record['status'] not in final or settings.retry_failed


@contextlib.contextmanager
def _manifest(data_dir: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Gives a function that appends to the manifest, to one process at a time."""
  path = data_dir / item_pictures.MANIFEST
  path.parent.mkdir(exist_ok=True)
  taken = f'{data_dir}: another process is fetching pictures for it; wait until it ends, or stop it'
  lock = path.parent.with_name(f'{path.parent.name}.lock')
  with files.only_process(lock, taken), path.open('a+b') as file:
    for part in path.parent.rglob('*.incomplete-*'):  # Left by a killed program.
      part.unlink()
    if path.stat().st_size:
      file.seek(-1, os.SEEK_END)
      if file.read() != b'\n':  # The last line of a killed program is cut off.
        file.write(b'\n')

    def note(record: dict[str, Any]) -> None:
      file.write(pictures.manifest_line(record).encode())
      file.flush()

    yield note


async def _fetch_all(
  todo: Iterator[tuple[dict[str, Any], str]],
  settings: Settings,
  locate: _Locate,
  store: Callable[..., dict[str, Any]],
  keep: Callable[[dict[str, Any]], None],
) -> None:
  """Downloads and stores pictures, `settings.concurrency` at the same time.

  Args:
    todo: items and the names of their picture files.
    settings: limits of the downloads.
    locate: finds the URL of an item.
    store: writes a picture and returns its part of the record.
    keep: called with the record of each item.
  """

  async def work(client: Web) -> None:
    for item, name in todo:
      record = {'item': item['original_id'], 'source': settings.source}
      try:
        record['url'] = await locate(client, item, record)
        content = await client.get(record['url'])
        record |= await asyncio.to_thread(store, content, name=name)
      except NoPicture as outcome:
        record |= {'status': outcome.status, 'reason': str(outcome)}
      keep(record)

  async with web.connected(settings) as client, asyncio.TaskGroup() as workers:
    for _ in range(settings.concurrency):
      workers.create_task(work(client))


def _update_placeholders(
  data_dir: Path,
  items: list[dict[str, Any]],
  names: list[str],
  found: list[Path | None],
  image_size: int | None,
) -> Iterator[dict[str, Any]]:
  """Makes a card for each item without a picture and removes cards that are no longer needed.

  Args:
    data_dir: folder of the dataset.
    items: `[items]` records.
    names: `[items]` names of their files, without suffix.
    found: `[items]` pictures or None.
    image_size: short side of the cards in pixels; None makes no new cards.

  Yields:
    The manifest's record of each new card.
  """
  folder = data_dir / item_pictures.FOLDER / _PLACEHOLDERS
  if image_size is not None:
    folder.mkdir(exist_ok=True)
  for item, name, path in zip(items, names, found, strict=True):
    card = folder / f'{name}.jpg'
    if path is not None:
      card.unlink(missing_ok=True)
    elif image_size is not None and not card.exists():
      files.write_file(card, pictures.placeholder(item['title'] or name, image_size))
      place = str(card.relative_to(data_dir))
      yield {'item': item['original_id'], 'status': 'placeholder', 'path': place}


def _outcomes(
  ids: list[str], found: list[Path | None], records: dict[str, dict[str, Any]]
) -> tuple[dict[str, int], dict[str, str]]:
  """Counts the items by outcome; also returns the first reason of each outcome."""
  fields = ('pictures', item_pictures.MISSING, item_pictures.REJECTED, UNANSWERED, 'not_asked')
  counts = dict.fromkeys(fields, 0)
  reasons: dict[str, str] = {}
  for name, path in zip(ids, found, strict=True):
    if path is not None:
      counts['pictures'] += 1
      continue
    record = records.get(name, {'status': 'not_asked'})
    if record['status'] in counts:
      counts[record['status']] += 1
    reasons.setdefault(record['status'], f'item {name}: {record.get("reason")}')
  return counts, reasons


def summary(counts: dict[str, Any], data_dir: str | Path) -> str:
  """Formats the result of `download` for the user."""
  rows = [
    ('pictures', f'{counts["pictures"]:,} of {counts["items"]:,} items have one'),
    ('fetched', f'{counts["fetched"]:,} now'),
  ]
  ways_out = {
    item_pictures.MISSING: '--retry_failed asks again',
    item_pictures.REJECTED: '--retry_failed asks again',
    UNANSWERED: 'the same command asks again',
  }
  for outcome, way_out in ways_out.items():
    text = f'{counts[outcome]:,}'
    if counts[outcome]:
      text += f'; {way_out}; first {counts["reasons"][outcome]}'
    rows.append((outcome, text))
  rows += [
    ('not asked', f'{counts["not_asked"]:,}'),
    ('manifest', str(Path(data_dir) / item_pictures.MANIFEST)),
  ]
  return '\n'.join(f'{name:<14} {value}' for name, value in rows)


def _flags() -> Parser:
  parser = Parser(__doc__)
  default = Settings()
  add = parser.add_argument
  add('--data_dir', required=True, help='folder of the prepared dataset')
  add(
    '--source',
    default=default.source,
    choices=SOURCES,
    help="where the pictures come from: the items' own URLs, or TMDB",
  )
  add('--links', help="MovieLens' links.csv: look movies up at TMDB by id instead of by title")
  add('--concurrency', type=int, default=default.concurrency, help='downloads at the same time')
  add('--timeout', type=float, default=default.timeout, help='seconds to wait for the next bytes')
  add(
    '--deadline',
    type=float,
    default=default.deadline,
    help='seconds for one picture, all tries included',
  )
  add('--tries', type=int, default=default.tries, help='requests per picture')
  add(
    '--redirect_hosts',
    type=lambda value: tuple(host.strip().lower() for host in value.split(',')),
    default=default.redirect_hosts,
    help='other hosts that servers may redirect to, separated by commas; public: all public hosts',
  )
  add(
    '--allow_private',
    action='store_true',
    help='also connect to addresses outside the public internet, such as 127.0.0.1 and 10.0.0.7',
  )
  add('--retry_failed', action='store_true', help='request missing and rejected pictures again')
  add(
    '--placeholders',
    action='store_true',
    help='make a card with the title for items without a picture',
  )
  add('--tmdb_url', help="server to use instead of TMDB's, for tests")
  return parser


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, downloads the pictures and prints the summary."""
  values = vars(_flags().parse(argv))
  data_dir = values.pop('data_dir')
  settings = Settings(**values)
  if settings.links is not None and settings.source != 'tmdb':
    raise InputError('--links is about TMDB; pass it with --source=tmdb, or leave it out')
  for name in ('concurrency', 'timeout', 'deadline', 'tries'):
    if not values[name] > 0:
      raise InputError(f'--{name} must be more than 0, not {values[name]}')
  try:
    counts = download(data_dir, settings)
  except KeyboardInterrupt:
    raise InterruptedBySignal(
      'stopped; downloaded pictures are kept, and the same command continues', signal.SIGINT
    ) from None
  say(summary(counts, data_dir))
  if counts['asked'] and counts['asked'] == counts['unanswered_now']:
    raise InputError(
      f'no server answered ({counts["reasons"][UNANSWERED]}); check the network, and run the same'
      ' command again'
    )


if __name__ == '__main__':
  main()

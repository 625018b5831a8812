"""Fetches the pictures of a prepared dataset: those that its items' URLs name, or TMDB's posters.

  python -m data_prep.download_images --data_dir=data/shop
  TMDB_API_KEY=... python -m data_prep.download_images --data_dir=data/ml-1m --source=tmdb

What becomes of each item is a line of images/manifest.jsonl; the same command goes on from there.
"""

import argparse
import asyncio
import collections
import contextlib
import datetime
import email.utils
import fcntl
import functools
import ipaddress
import json
import os
import random
import re
import signal
import unicodedata
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_prep.prepared import pictures
from data_prep.sources import items as item_tables
from data_prep.sources import tables
from ur4rec_jax import files
from ur4rec_jax.data.dataset import read_info, read_items
from ur4rec_jax.errors import InputError, InterruptedBySignal, exit_on_reported_error

try:
  import httpx
except ImportError:  # an extra, which `download` asks for
  httpx = None

SOURCES = ('urls', 'tmdb')
KEY = 'TMDB_API_KEY'
UNANSWERED = 'unanswered'
_OUTCOMES = (pictures.FETCHED, pictures.MISSING, pictures.REJECTED, UNANSWERED)
_TMDB_API, _TMDB_IMAGES = 'https://api.themoviedb.org', 'https://image.tmdb.org'
_TMDB_WIDTHS = (185, 342, 500, 780)  # of posters; their width is the short side
_ARTICLES = "The|An?|Les?|La|L'|Il|Lo|Gli|I|El|Los|Las|Der|Die|Das|Un|Une|Det|Den"
_MAX_REDIRECTS = 5
_BACKOFF = 0.5  # seconds before the second try; doubles
_LONGEST_WAIT = 60  # seconds that a server may ask for
_SILENCE = 8  # unanswered pictures running, after which a host is left alone


class Settings(NamedTuple):
  """What to fetch and how, as the flags of the same names say; times in seconds."""

  source: str = 'urls'
  links: str | None = None
  concurrency: int = 8
  timeout: float = 20.0
  deadline: float = 120.0
  tries: int = 4
  redirect_hosts: tuple[str, ...] = ()
  retry_failed: bool = False
  placeholders: bool = False
  tmdb_url: str | None = None


class _NoPicture(Exception):
  """Why an item gets no picture; `status` is what the manifest calls it."""

  def __init__(self, status: str, reason: str, code: int | None = None):
    super().__init__(reason)
    self.status, self.code = status, code


class _TryAgain(Exception):
  """The server is there but busy; `wait` is what it asks for."""

  def __init__(self, reason: str, wait: float):
    super().__init__(reason)
    self.wait = wait


# Finds the URL of an item's picture and notes in the item's record how.
_Locate = Callable[['_Web', dict[str, Any], dict[str, Any]], Awaitable[str]]


def download(data_dir: str | Path, settings: Settings = Settings()) -> dict[str, Any]:
  """Fetches the pictures that a prepared dataset lacks.

  Args:
    data_dir: the dataset's folder.
    settings: what to fetch and how.

  Returns:
    Counts: all `items` and those that have one of the `pictures`; those without by outcome:
    `missing`, `rejected`, `unanswered`, `not_asked`; what happened now: `asked`, `fetched`,
    `unanswered_now`. And `reasons`: by outcome, the first one.

  Raises:
    InputError: nothing can be fetched at all.
  """
  if httpx is None:
    raise InputError('httpx is not installed; pip install "httpx>=0.28"')
  data_dir = Path(data_dir)
  size = read_info(data_dir)['options']['image_size']
  items = read_items(data_dir)
  ids = [item['original_id'] for item in items]
  is_url = lambda item: item['image'].startswith(('http://', 'https://'))
  if settings.source == 'tmdb':
    locate = functools.partial(_tmdb_poster, _tmdb(settings, size, ids))
    can_ask = lambda item: bool(item['title'])
  else:
    locate, can_ask = _own_url, is_url
    if not any(map(is_url, items)):
      raise InputError(
        f'{data_dir}: no item has the URL of a picture; for movies pass --source=tmdb, or build the'
        ' dataset with an item table that has URLs'
      )

  with files.disk_errors(data_dir), _manifest(data_dir) as note:
    found = pictures.find(data_dir)
    last = {
      record['item']: record
      for record in pictures.read_manifest(data_dir)
      if record.get('source') == settings.source
    }
    names = pictures.file_names(ids)
    todo = [
      (item, name)
      for item, name, path in zip(items, names, found, strict=True)
      if path is None and can_ask(item) and _is_open(last.get(item['original_id']), settings)
    ]
    now: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(todo), desc='pictures', unit='picture', disable=None) as bar:
      done = collections.Counter(dict.fromkeys(_OUTCOMES, 0))

      def keep(record: dict[str, Any]) -> None:
        note(record)
        now[record['item']] = record
        done[record['status']] += 1
        bar.set_postfix(done, refresh=False)
        bar.update()

      store = functools.partial(pictures.store, folder=data_dir, image_size=size)
      try:
        asyncio.run(_fetch_all(iter(todo), settings, locate, store, keep))
      except ExceptionGroup as errors:  # of the tasks; one says it all
        raise errors.exceptions[0] from None
    found = pictures.find(data_dir)
    _update_placeholders(
      data_dir, items, names, found, size if settings.placeholders else None, note
    )

  counts = collections.Counter()
  reasons: dict[str, str] = {}
  for name, path in zip(ids, found, strict=True):
    if path is not None:
      counts['pictures'] += 1
      continue
    record = now.get(name) or last.get(name) or {'status': 'not_asked'}
    counts[record['status']] += 1
    reasons.setdefault(record['status'], f'item {name}: {record.get("reason")}')
  fields = ('pictures', pictures.MISSING, pictures.REJECTED, UNANSWERED, 'not_asked')
  return {
    'items': len(items),
    **{field: counts[field] for field in fields},
    'asked': len(now),
    'fetched': done[pictures.FETCHED],
    'unanswered_now': done[UNANSWERED],
    'reasons': reasons,
  }


def _is_open(record: dict[str, Any] | None, settings: Settings) -> bool:
  """Whether an item without picture is to be asked for: answers stand unless told otherwise."""
  answered = (pictures.MISSING, pictures.REJECTED)
  return record is None or record['status'] not in answered or settings.retry_failed


@contextlib.contextmanager
def _manifest(data_dir: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Gives a function that adds a line; nobody else writes pictures meanwhile."""
  path = data_dir / pictures.MANIFEST
  path.parent.mkdir(exist_ok=True)
  with path.open('a+b') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f'{data_dir}: another process is fetching pictures for it; wait for it, or stop it'
      ) from error
    for part in path.parent.rglob('*.incomplete-*'):  # of a killed program
      part.unlink()
    if path.stat().st_size:
      file.seek(-1, os.SEEK_END)
      if file.read() != b'\n':  # a line that a killed program did not finish
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
  async def work(web: _Web) -> None:
    for item, name in todo:
      record = {'item': item['original_id'], 'source': settings.source}
      try:
        record['url'] = await locate(web, item, record)
        content = await web.get(record['url'])
        record |= await asyncio.to_thread(store, content, name=name)
      except _NoPicture as outcome:
        record |= {'status': outcome.status, 'reason': str(outcome)}
      keep(record)

  client = httpx.AsyncClient(
    timeout=settings.timeout,
    limits=httpx.Limits(max_connections=settings.concurrency),
    # Packed answers could swell while they are unpacked.
    headers={'Accept-Encoding': 'identity', 'User-Agent': 'ur4rec-jax'},
  )
  async with client, asyncio.TaskGroup() as workers:
    web = _Web(client, settings)
    for _ in range(settings.concurrency):
      workers.create_task(work(web))


class _Web:
  """Asks servers that may be slow, busy, broken or hostile."""

  def __init__(self, client: 'httpx.AsyncClient', settings: Settings):
    self._client = client
    self._settings = settings
    self._silent: collections.Counter[str] = collections.Counter()

  async def get(
    self, address: str, kind: str = 'image/', headers: dict[str, str] | None = None
  ) -> bytes:
    """Content of a URL.

    Args:
      address: the URL.
      kind: how its content type must begin.
      headers: further ones; with any, redirects are not followed.

    Raises:
      _NoPicture: there is none, and why.
    """
    url = _url(address)
    if self._silent[url.host] >= _SILENCE:
      raise _NoPicture(UNANSWERED, f'{url.host} gave no answer {_SILENCE} times running')
    try:
      async with asyncio.timeout(self._settings.deadline):
        content = await self._tried(url, kind, headers)
    except (_NoPicture, TimeoutError) as error:
      if isinstance(error, TimeoutError):
        error = _NoPicture(UNANSWERED, f'no whole answer in {self._settings.deadline:g} seconds')
      self._silent[url.host] = self._silent[url.host] + 1 if error.status == UNANSWERED else 0
      raise error from None
    self._silent[url.host] = 0
    return content

  async def _tried(self, url: 'httpx.URL', kind: str, headers: dict[str, str] | None) -> bytes:
    reason, wait = '', 0.0
    for attempt in range(self._settings.tries):
      if attempt:
        await asyncio.sleep(wait + _BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1))
      try:
        return await self._request(url, kind, headers)
      except _TryAgain as error:
        reason, wait = str(error), error.wait
      except httpx.TransportError as error:
        reason, wait = f'{type(error).__name__} {error}'.strip(), 0.0
    raise _NoPicture(UNANSWERED, reason)

  async def _request(self, url: 'httpx.URL', kind: str, headers: dict[str, str] | None) -> bytes:
    target = url
    for _ in range(_MAX_REDIRECTS + 1):
      async with self._client.stream('GET', target, headers=headers) as response:
        if headers or not response.has_redirect_location:
          return await _content(response, kind)
        target = _url(response.headers['location'], base=str(target))
      if not await self._may_follow(url, target):
        raise _NoPicture(
          pictures.REJECTED,
          f'redirected to another host; --redirect_hosts={target.host} would allow it',
        )
    raise _NoPicture(pictures.REJECTED, f'redirected more than {_MAX_REDIRECTS} times')

  async def _may_follow(self, url: 'httpx.URL', target: 'httpx.URL') -> bool:
    """Whether a server may send us there: it could be a machine that only we can reach."""
    if target.host == url.host and target.port in (url.port, None):
      return True
    allowed = self._settings.redirect_hosts
    return target.host in allowed or ('public' in allowed and await _is_public(target.host))


def _url(address: str, base: str = '') -> 'httpx.URL':
  try:
    url = httpx.URL(urllib.parse.urljoin(base, address))
    url.host.encode('idna')  # as the look-up of its address will
  except (httpx.InvalidURL, ValueError) as error:
    raise _NoPicture(pictures.REJECTED, f'no usable URL ({error})') from error
  if url.scheme not in ('http', 'https') or not url.host or (url.port or 0) > 65535:
    raise _NoPicture(pictures.REJECTED, f'no usable URL: {address[:200]!r}')
  return url


async def _is_public(host: str) -> bool:
  try:
    found = await asyncio.get_running_loop().getaddrinfo(host, None)
  except OSError:
    return False
  return all(ipaddress.ip_address(entry[4][0].partition('%')[0]).is_global for entry in found)


async def _content(response: 'httpx.Response', kind: str) -> bytes:
  """The body of an answer, given that it is what was asked for and not too long."""
  code, headers = response.status_code, response.headers
  if code in (408, 425, 429) or code >= 500:
    raise _TryAgain(f'the server answers {code}', _retry_after(headers.get('retry-after', '')))
  if code != 200:
    status = pictures.MISSING if code >= 400 else pictures.REJECTED
    raise _NoPicture(status, f'the server answers {code}', code)
  content_type = headers.get('content-type', 'none')
  if not content_type.lower().startswith(kind):
    raise _NoPicture(pictures.REJECTED, f'content type {content_type[:80]}, not {kind}')
  encoding = headers.get('content-encoding', 'identity')
  if encoding != 'identity':
    raise _NoPicture(
      pictures.REJECTED, f'content encoding {encoding[:80]}, which was not asked for'
    )
  limit = f'more than {pictures.MAX_BYTES:,} bytes'
  declared = headers.get('content-length', '')
  if declared.isdecimal() and int(declared) > pictures.MAX_BYTES:
    raise _NoPicture(pictures.REJECTED, f'{limit}: {int(declared):,} declared')
  content = bytearray()
  async for part in response.aiter_raw():
    content += part
    if len(content) > pictures.MAX_BYTES:
      raise _NoPicture(pictures.REJECTED, limit)
  return bytes(content)


def _retry_after(value: str) -> float:
  """Seconds that a server asks to wait, from a number or a date; 0 where it does not."""
  try:
    if value.strip().isdecimal():
      seconds = float(value)
    else:
      when = email.utils.parsedate_to_datetime(value)
      seconds = (when - datetime.datetime.now(datetime.UTC)).total_seconds()
  except (ValueError, TypeError):  # no date, or one without time zone
    return 0.0
  return min(max(seconds, 0.0), _LONGEST_WAIT)


async def _own_url(web: _Web, item: dict[str, Any], record: dict[str, Any]) -> str:
  del web, record
  return item['image']


class _Tmdb(NamedTuple):
  """Where and how to ask TMDB; `links`: item -> its id there and at IMDb, '' where unknown."""

  api: str
  posters: str
  key: str
  links: dict[str, tuple[str, str]]


def _tmdb(settings: Settings, image_size: int, ids: list[str]) -> _Tmdb:
  key = os.environ.get(KEY, '').strip()
  if not re.fullmatch(r'[!-~]+', key):
    raise InputError(
      f'{KEY} is {"no key" if key else "not set"}; put the "API Read Access Token" of your TMDB'
      ' account into this environment variable'
    )
  links = {} if settings.links is None else _read_links(Path(settings.links))
  if links and not links.keys() & set(ids):
    raise InputError(f'{settings.links}: none of its movies is an item of the dataset')
  width = next((f'w{width}' for width in _TMDB_WIDTHS if width >= image_size), 'original')
  api, images = settings.tmdb_url or _TMDB_API, settings.tmdb_url or _TMDB_IMAGES
  return _Tmdb(f'{api}/3', f'{images}/t/p/{width}', key, links)


def _read_links(path: Path) -> dict[str, tuple[str, str]]:
  """MovieLens' links.csv: a movie's ids at TMDB and IMDb."""
  file = tables.open_file(path)
  columns = ('movieId', 'tmdbId', 'imdbId')
  for column in columns:
    if column not in file.columns:
      raise InputError(f'{path}: no column {column!r}; it must have {", ".join(columns)}')
  links = {}
  for place, row in tables.records(file):
    movie, *others = (item_tables.text(row[column]) for column in columns)
    if not movie or not all(re.fullmatch(r'\d*', other, re.ASCII) for other in others):
      raise InputError(
        f'{path}, {place.unit} {place.number}: ids are whole numbers, not'
        f' {", ".join(map(repr, (movie, *others)))}; correct them'
      )
    links[movie] = tuple(others)
  return links


async def _tmdb_poster(tmdb: _Tmdb, web: _Web, item: dict[str, Any], record: dict[str, Any]) -> str:
  """URL of a movie's poster; notes which movie was taken for it."""
  try:
    movie = await _tmdb_movie(tmdb, web, item)
    if movie is None:
      raise _NoPicture(pictures.MISSING, 'TMDB knows no such movie with a poster')
    record['match'] = f'{movie["title"]} ({_tmdb_year(movie)}), TMDB {movie["id"]}'
    poster = movie['poster_path']
    if poster is None:
      raise _NoPicture(pictures.MISSING, 'TMDB has no poster of it')
    if not re.fullmatch(r'/[\w.-]+', poster, re.ASCII):
      raise ValueError(poster)
  except InputError:  # a wrong key
    raise
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise _NoPicture(pictures.REJECTED, 'TMDB answers otherwise than it should') from error
  return tmdb.posters + poster


async def _tmdb_movie(tmdb: _Tmdb, web: _Web, item: dict[str, Any]) -> dict[str, Any] | None:
  tmdb_id, imdb_id = tmdb.links.get(item['original_id'], ('', ''))
  if tmdb_id:
    return await _ask(tmdb, web, f'/movie/{tmdb_id}')
  if imdb_id:
    path = f'/find/tt{imdb_id:0>7}'
    answer = await _ask(tmdb, web, path, external_source='imdb_id')
    return next(iter(answer['movie_results']), None)
  title, year = _title_and_year(item['title'])
  # A year may be off by one; without its help only a movie of the very title will do.
  for query in ({'query': title, 'year': year}, {'query': title}):
    if 'year' in query and year is None:
      continue
    results = (await _ask(tmdb, web, '/search/movie', **query))['results']
    near = [
      movie
      for movie in results
      if movie.get('poster_path') and (year is None or abs(_tmdb_year(movie) - year) <= 1)
    ]
    wanted = _plain(title)
    same = [
      movie
      for movie in near
      if wanted in (_plain(movie['title']), _plain(movie.get('original_title') or ''))
    ]
    if found := same or ('year' in query and near):
      return found[0]
  return None


async def _ask(tmdb: _Tmdb, web: _Web, path: str, **query: Any) -> dict[str, Any]:
  address = f'{tmdb.api}{path}?{urllib.parse.urlencode(query)}'
  try:
    content = await web.get(address, 'application/json', {'Authorization': f'Bearer {tmdb.key}'})
  except _NoPicture as outcome:
    if outcome.code == 401:
      raise InputError(
        f'TMDB refuses the key in {KEY}; it must be the "API Read Access Token" of your account,'
        ' not the shorter "API Key"'
      ) from None
    raise
  return json.loads(content)


def _title_and_year(title: str) -> tuple[str, int | None]:
  """MovieLens' "Matrix, The (a.k.a. X) (1999)" as "The Matrix" and 1999."""
  years = re.findall(r'\((\d{4})\)', title)
  name = re.sub(r'\s+\([^()]*\)', '', title).strip()  # but not that of "(500) Days of Summer"
  if moved := re.fullmatch(rf'(.+), ({_ARTICLES})', name):
    name = moved[2] + ('' if moved[2].endswith("'") else ' ') + moved[1]
  return name or title, int(years[-1]) if years else None


def _tmdb_year(movie: dict[str, Any]) -> int:
  return int((movie.get('release_date') or '0')[:4])


def _plain(title: str) -> str:
  """Letters and digits of a title, without accents and case."""
  parts = unicodedata.normalize('NFKD', title.casefold())
  return ''.join(character for character in parts if character.isalnum())


def _update_placeholders(
  data_dir: Path,
  items: list[dict[str, Any]],
  names: list[str],
  found: list[Path | None],
  image_size: int | None,
  note: Callable[[dict[str, Any]], None],
) -> None:
  """Makes cards for items without picture if a size is given; removes those no longer needed."""
  folder = data_dir / pictures.FOLDER / 'placeholders'
  if image_size is not None:
    folder.mkdir(exist_ok=True)
  for item, name, path in zip(items, names, found, strict=True):
    card = folder / f'{name}.jpg'
    if path is not None:
      card.unlink(missing_ok=True)
    elif image_size is not None and not card.exists():
      files.write_file(card, pictures.placeholder(item['title'] or name, image_size))
      place = str(card.relative_to(data_dir))
      note({'item': item['original_id'], 'status': 'placeholder', 'path': place})


def summary(counts: dict[str, Any], data_dir: str | Path) -> str:
  """What the user reads at the end."""
  rows = [
    ('pictures', f'{counts["pictures"]:,} of {counts["items"]:,} items have one'),
    ('fetched', f'{counts["fetched"]:,} now'),
  ]
  ways_out = {
    pictures.MISSING: '--retry_failed asks again',
    pictures.REJECTED: '--retry_failed asks again',
    UNANSWERED: 'the same command asks again',
  }
  for outcome, way_out in ways_out.items():
    text = f'{counts[outcome]:,}'
    if counts[outcome]:
      text += f'; {way_out}; first {counts["reasons"][outcome]}'
    rows.append((outcome, text))
  rows += [
    ('not asked', f'{counts["not_asked"]:,}'),
    ('manifest', str(Path(data_dir) / pictures.MANIFEST)),
  ]
  return '\n'.join(f'{name:<14} {value}' for name, value in rows)


def _flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  default = Settings()
  add = parser.add_argument
  add('--data_dir', required=True, help='folder of the prepared dataset')
  add('--source', default=default.source, choices=SOURCES, help='where pictures come from')
  add('--links', help="MovieLens' links.csv: TMDB is asked by its ids instead of by title")
  add('--concurrency', type=int, default=default.concurrency, help='pictures at the same time')
  add('--timeout', type=float, default=default.timeout, help='seconds to wait for the next bytes')
  add(
    '--deadline', type=float, default=default.deadline, help='seconds for an answer, tries included'
  )
  add('--tries', type=int, default=default.tries, help='tries a picture')
  add(
    '--redirect_hosts',
    type=lambda value: tuple(value.split(',')),
    default=default.redirect_hosts,
    help='other hosts that servers may redirect to, by commas; public: all that are public',
  )
  add('--retry_failed', action='store_true', help='ask again for what was missing or rejected')
  add('--placeholders', action='store_true', help='make cards with the title where there is none')
  add('--tmdb_url', help="server to take for TMDB's, for tests")
  return parser


@exit_on_reported_error
def main() -> None:
  """Reads the flags, fetches and prints the summary."""
  values = vars(_flags().parse_args())
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
      'stopped; what was fetched is kept, and the same command goes on', signal.SIGINT
    ) from None
  print(summary(counts, data_dir), flush=True)
  if counts['asked'] and counts['asked'] == counts['unanswered_now']:
    raise InputError(
      f'no server answered ({counts["reasons"][UNANSWERED]}); check the network, and run the same'
      ' command again'
    )


if __name__ == '__main__':
  main()

"""Writes stored events and exposures into tables, and deletes what is stored about a user.

  python -m ur4rec_jax.feedback --events=events.db --out=log
  python -m ur4rec_jax.feedback --events=events.db --delete_user=u042 --export=shop-model
  python -m ur4rec_jax.feedback --events=events.db --delete_before_days=90

The service may run meanwhile. Whoever may run this command may write to the store anyway, so the
service itself deletes nobody. The first one writes log/events.csv, a source of
`data_prep.build_dataset`, and log/exposures.csv.
"""

import argparse
import collections
import csv
import pathlib
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence

from ur4rec_jax.errors import InputError, counted, exit_on_reported_error, say
from ur4rec_jax.files import disk_errors, expand_home
from ur4rec_jax.inference import exported
from ur4rec_jax.online.events import KINDS, Event, Exposure
from ur4rec_jax.online.feedback_store import FeedbackStore, open_store

# Proposed to the build: the kinds that count by default, those that cost more effort more.
_WEIGHTS = {'click': 1, 'cart': 3, 'buy': 5}
EVENTS, EXPOSURES = 'events.csv', 'exposures.csv'
_EVENT_COLUMNS = ('user', 'item', 'time', 'kind', 'value', 'id', 'request_id')
_EXPOSURE_COLUMNS = (
  'request_id', 'user', 'time', 'arm', 'model', 'item', 'position', 'score', 'propensity',
)  # fmt: skip


def write_tables(store: FeedbackStore, out: str | pathlib.Path) -> dict[str, int]:
  """Writes all events and all exposures, one row for each event and for each item shown.

  Args:
    store: the store.
    out: the folder; it is made if it is not there.

  Returns:
    The number of events of each kind, and of rows of exposures under ''.

  Raises:
    InputError: the folder cannot be written.
    StorageError: the store cannot be read.
  """
  out = pathlib.Path(out)
  counts: collections.Counter[str] = collections.Counter()
  with disk_errors(out, '--out'):
    out.mkdir(parents=True, exist_ok=True)
    _write(out / EVENTS, _EVENT_COLUMNS, _event_rows(store.events(), counts))
    _write(out / EXPOSURES, _EXPOSURE_COLUMNS, _exposure_rows(store.exposures(), counts))
  return dict(counts)


def _write(path: pathlib.Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
  """Writes a table row by row, as it may not fit into memory; it appears when it is whole."""
  draft = path.with_name(f'{path.name}.incomplete')
  try:
    with draft.open('w', encoding='utf-8', newline='') as file:
      writer = csv.writer(file)
      writer.writerow(columns)
      writer.writerows(rows)
    draft.replace(path)
  finally:
    draft.unlink(missing_ok=True)


def _event_rows(events: Iterable[Event], counts: collections.Counter) -> Iterator[Sequence]:
  for e in events:
    counts[e.kind] += 1
    value = '' if e.value is None else f'{e.value:g}'
    yield e.user, e.item, f'{e.time:.3f}', e.kind, value, e.id, e.request_id


def _exposure_rows(exposures: Iterable[Exposure], counts: collections.Counter) -> Iterator:
  for x in exposures:
    for position, shown in enumerate(x.items, 1):
      counts[''] += 1
      yield (*x[:2], f'{x.time:.3f}', x.arm, x.model, shown.item, position, *shown[1:])


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags and does one of the three things."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--events', required=True, help='the store: a SQLite file or redis://HOST:PORT/0')
  add('--out', help='folder to write events.csv and exposures.csv into')
  add('--delete_user', help='id of a user of whom nothing may stay in the store')
  add('--export', help='with --delete_user: exported folder that forgets the user, too')
  add('--delete_before_days', type=float, help='delete what is older than so many days')
  flags = parser.parse_args(expand_home(argv))
  given = [flags.out, flags.delete_user, flags.delete_before_days]
  if sum(value is not None for value in given) != 1:
    raise InputError('give one of --out, --delete_user and --delete_before_days')
  if flags.export and flags.delete_user is None:
    raise InputError('--export: is for --delete_user; leave it out')
  if '://' not in flags.events and not pathlib.Path(flags.events).is_file():
    raise InputError(f'--events={flags.events}: there is no such file')
  store = open_store(flags.events)
  if flags.out is not None:
    counts = write_tables(store, flags.out)
    shown = counts.pop('', 0)
    kinds = ', '.join(f'{kind} {counts[kind]:,}' for kind in KINDS if kind in counts)
    say(f'{flags.out}: {counted(sum(counts.values()), "event")} ({kinds or "none"})')
    say(f'{flags.out}: {counted(shown, "shown item")}')
    if weights := ','.join(f'{kind}={_WEIGHTS[kind]}' for kind in _WEIGHTS if kind in counts):
      say(
        f'next: python -m data_prep.build_dataset --source=interactions --data_dir=data/live'
        f' --raw_dir={shlex.quote(flags.out)}/{EVENTS} --event_column=kind'
        f' --event_weights={weights} --drop_duplicates'
      )
  elif flags.delete_user is not None:
    count = store.delete_user(flags.delete_user, time.time())
    say(f'deleted {counted(count, "event")} of the user, and what was shown to the user')
    if flags.export:
      with disk_errors(pathlib.Path(flags.export), '--export'):
        had = exported.forget_user(flags.export, flags.delete_user)
      say(f'{flags.export}: {"has forgotten the user" if had else "does not know the user"}')
  else:
    if not flags.delete_before_days > 0:
      raise InputError('--delete_before_days: must be more than 0')
    count = store.expire(time.time() - 86_400 * flags.delete_before_days)
    say(f'deleted {counted(count, "event")}')
  store.close()


if __name__ == '__main__':
  main()

"""Writes stored events and exposures into tables, reads events from Kafka, and deletes users.

  python -m ur4rec_jax.feedback --events=events.db --out=log
  python -m ur4rec_jax.feedback --events=events.db --consume=kafka://localhost:9092/clicks
  python -m ur4rec_jax.feedback --events=events.db --delete_user=u042 --export=shop-model
  python -m ur4rec_jax.feedback --events=events.db --delete_before_days=90

The service may run meanwhile. Users are deleted by this command and not by the service, because
whoever can run it can write to the store anyway. The first command writes log/exposures.csv and
log/events.csv, a source of `data_prep.build_dataset`. The second stores the events of a topic as
they come, until SIGTERM or Ctrl-C; started again, it goes on where it was.
"""

import argparse
import pathlib
import shlex
import signal
import time

from ur4rec_jax.errors import InputError, counted, exit_on_reported_error, refuse_idle_flags, say
from ur4rec_jax.files import disk_errors, expand_home
from ur4rec_jax.inference import exported
from ur4rec_jax.online.events import KINDS
from ur4rec_jax.online.feedback_store import FeedbackStore, open_store
from ur4rec_jax.online.tables import EVENTS, write_tables

# Weights that are proposed for the build: kinds that cost users more effort count more.
_WEIGHTS = {'click': 1, 'cart': 3, 'buy': 5}
_TASKS = ('out', 'consume', 'delete_user', 'delete_before_days')


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add(
    '--events', required=True, help='the store: a file, redis://HOST:PORT/0 or postgres://HOST/DB'
  )
  add('--out', help='folder to write events.csv and exposures.csv into')
  add('--consume', help='topic whose events are stored: kafka://HOST:PORT[,HOST:PORT]/TOPIC')
  add('--group', default='ur4rec', help='with --consume: consumers of one group share the messages')
  add('--kafka_config', help='with --consume: file of settings name=value, such as those of SASL')
  add(
    '--until_end',
    action='store_true',
    help='with --consume: stop when the messages that were there at the start are read',
  )
  add('--delete_user', help='id of a user of whom nothing may stay in the store')
  add('--export', help='with --delete_user: exported folder that forgets the user, too')
  add('--delete_before_days', type=float, help='delete what is older than so many days')
  flags = parser.parse_args(expand_home(argv))
  if sum(getattr(flags, task) is not None for task in _TASKS) != 1:
    raise InputError('give one of --out, --consume, --delete_user and --delete_before_days')
  if flags.delete_user == '':
    raise InputError('--delete_user: is empty; give the id of a user')
  if flags.export == '':
    raise InputError('--export: is empty; give the exported folder that forgets the user, too')
  refuse_idle_flags(parser, flags, 'delete_user', 'export')
  refuse_idle_flags(parser, flags, 'consume', 'group', 'kafka_config', 'until_end')
  is_file = '://' not in flags.events
  if flags.consume is None and is_file and not pathlib.Path(flags.events).is_file():
    raise InputError(f'--events={flags.events}: there is no such file')
  if flags.delete_before_days is not None and not flags.delete_before_days > 0:
    raise InputError('--delete_before_days: must be more than 0')
  return flags


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags and does one of the four things."""
  flags = _parse(argv)
  if flags.consume is not None:
    _consume(flags)
    return
  store = open_store(flags.events)
  if flags.out is not None:
    _write_tables(store, flags.out)
  elif flags.delete_user is not None:
    count = store.delete_user(flags.delete_user, time.time())
    say(f'deleted {counted(count, "event")} of the user, and what was shown to the user')
    if flags.export:
      with disk_errors(pathlib.Path(flags.export), '--export'):
        had = exported.forget_user(flags.export, flags.delete_user)
      say(f'{flags.export}: {"has forgotten the user" if had else "does not know the user"}')
  else:
    count = store.expire(time.time() - 86_400 * flags.delete_before_days)
    say(f'deleted {counted(count, "event")}')
  store.close()


def _write_tables(store: FeedbackStore, folder: str) -> None:
  counts = write_tables(store, folder)
  shown = counts.pop('', 0)
  kinds = ', '.join(f'{kind} {counts[kind]:,}' for kind in KINDS if kind in counts)
  say(f'{folder}: {counted(sum(counts.values()), "event")} ({kinds or "none"})')
  say(f'{folder}: {counted(shown, "shown item")}')
  if weights := ','.join(f'{kind}={_WEIGHTS[kind]}' for kind in _WEIGHTS if kind in counts):
    say(
      f'next: python -m data_prep.build_dataset --source=interactions --data_dir=data/live'
      f' --raw_dir={shlex.quote(folder)}/{EVENTS} --event_column=kind'
      f' --event_weights={weights} --drop_duplicates'
    )


def _consume(flags: argparse.Namespace) -> None:
  """Stores the events of a topic until SIGTERM or Ctrl-C."""
  try:
    from ur4rec_jax.online import kafka_source
  except ImportError as error:
    raise InputError(
      f"--consume: {error.name} is not installed; pip install 'ur4rec-jax[kafka]'"
    ) from error
  topic = kafka_source.parse_topic(flags.consume, flags.group, flags.kafka_config)
  store = open_store(flags.events)
  signals: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: signals.append(number))
  say(f'reading {flags.consume} as group {topic.group}; Ctrl-C ends it')
  counts = kafka_source.copy_events(topic, store, lambda: bool(signals), flags.until_end)
  store.close()
  say(kafka_source.summary(counts))


if __name__ == '__main__':
  main()

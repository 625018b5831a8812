"""Writes stored events and exposures into tables, and deletes what is stored about a user.

  python -m ur4rec_jax.feedback --events=events.db --out=log
  python -m ur4rec_jax.feedback --events=events.db --delete_user=u042 --export=shop-model
  python -m ur4rec_jax.feedback --events=events.db --delete_before_days=90

The service may run meanwhile. Users are deleted by this command and not by the service, because
whoever can run it can write to the store anyway. The first command writes log/exposures.csv and
log/events.csv, a source of `data_prep.build_dataset`.
"""

import argparse
import pathlib
import shlex
import time

from ur4rec_jax.errors import InputError, counted, exit_on_reported_error, say
from ur4rec_jax.files import disk_errors, expand_home
from ur4rec_jax.inference import exported
from ur4rec_jax.online.events import KINDS
from ur4rec_jax.online.feedback_store import open_store
from ur4rec_jax.online.tables import EVENTS, write_tables

# Weights that are proposed for the build: kinds that cost users more effort count more.
_WEIGHTS = {'click': 1, 'cart': 3, 'buy': 5}


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags and does one of the three things."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add(
    '--events', required=True, help='the store: a file, redis://HOST:PORT/0 or postgres://HOST/DB'
  )
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

"""Measures how long commands take to start: the first time, and every time after it.

  python -m benchmarks.speed.starts --workdir=quick-orders/runs/content \\
    --data_dir=quick-orders/data --add_items=new.csv --before=EARLIER_CHECKOUT --out=starts

Each start is a process. In a round all commands run one after the other, those of the earlier
checkout too, and a process that only imports jax. Other load on the machine therefore slows all of
them down alike, and ratios to that process compare machines. Work on copies of the run keeps the
given folder as it is.
"""

import argparse
import contextlib
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.speed import measure
from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.sharding import devices

BARE = 'import jax'
NOW, BEFORE = 'now', 'before'
_MADE_BY_STARTS = ('recommender', 'compiled')  # Folders in a run that starts leave.


def commands(run: pathlib.Path, export: pathlib.Path, flags: argparse.Namespace) -> dict[str, list]:
  """Returns the words of each command after `python`, by name.

  Args:
    run: the run.
    export: its export.
    flags: flags of this program.
  """
  recommend = ['-m', 'ur4rec_jax.recommend', f'--workdir={run}', f'--data_dir={flags.data_dir}']
  history = f'--history={flags.history}'
  found = {
    'recommend': [*recommend, history],
    'recommend --preference': [*recommend, '--preference=A small present.'],
    'recommend --add_items': [*recommend, history, f'--add_items={flags.add_items}'],
    'serve': ['-m', 'ur4rec_jax.serve', f'--export={export}', '--port=0'],
  }
  if flags.add_items is None:
    del found['recommend --add_items']
  return found


def start(words: Sequence[str], checkout: pathlib.Path) -> dict[str, float]:
  """Runs a command to its end, or a service until it is ready; returns what `Clock.read` does.

  Args:
    words: the command after `python`.
    checkout: the folder of the project whose program runs.

  Raises:
    InputError: the command fails.
  """
  began, busy = time.perf_counter(), _processor_seconds()
  environment = os.environ | {'PYTHONPATH': str(checkout)}
  process = subprocess.Popen(
    [sys.executable, *words],
    cwd=checkout,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  if 'ur4rec_jax.serve' in words:
    is_ready = process.stdout.readline().startswith('ready')
    seconds = time.perf_counter() - began
    process.kill()
    _, error = process.communicate()
  else:
    _, error = process.communicate()
    is_ready, seconds = process.returncode == 0, time.perf_counter() - began
  if not is_ready:
    raise InputError(f'{" ".join(words)}: ended with {process.returncode}; {error[-300:]}')
  return {
    'seconds': seconds,
    'processor_seconds': _processor_seconds() - busy,
  }


def _processor_seconds() -> float:
  """Returns the time that processes which ended have worked."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def summary(starts: Sequence[dict[str, float]]) -> dict[str, float]:
  """Returns the first start and the median of the others."""
  first, *others = starts
  return {
    'first_seconds': round(first['seconds'], 2),
    'seconds': round(statistics.median(x['seconds'] for x in others), 2),
    'processor_seconds': round(statistics.median(x['processor_seconds'] for x in others), 2),
  }


def table(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
  """Returns the lines of the table of `summary` by command and checkout."""
  lines = [f'{"command":<24}{"checkout":<9}{"first":>8}{"later":>8}{"processor":>11}']
  for name, by_checkout in found.items():
    for checkout, row in by_checkout.items():
      values = '{first_seconds:>8.1f}{seconds:>8.1f}{processor_seconds:>11.1f}'.format(**row)
      lines.append(f'{name:<24}{checkout:<9}{values}')
  return lines


@exit_on_reported_error
def main() -> None:
  """Times the commands and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--workdir', required=True, help='folder of a finished run that reads texts')
  add('--data_dir', required=True, help='its prepared data')
  add('--history', required=True, help='ids of items of the catalogue, with commas between them')
  add('--add_items', help='table of new items')
  add('--before', help='another checkout of this project, to compare with')
  add('--rounds', type=int, default=3, help='starts of each command after the first')
  measure.add_output_flags(parser)
  flags = parser.parse_args()
  for name in ('workdir', 'data_dir', 'add_items', 'before'):
    if getattr(flags, name) is not None:
      setattr(flags, name, os.path.abspath(getattr(flags, name)))
  checkouts = {NOW: measure.ROOT}
  if flags.before:
    checkouts[BEFORE] = pathlib.Path(flags.before)
  with tempfile.TemporaryDirectory() as scratch:
    works = {}
    for checkout, root in checkouts.items():
      folder = pathlib.Path(scratch) / checkout
      shutil.copytree(
        flags.workdir, folder / 'run', ignore=shutil.ignore_patterns(*_MADE_BY_STARTS)
      )
      data = f'--data_dir={flags.data_dir}'
      run = f'--workdir={folder / "run"}'
      start(['-m', 'ur4rec_jax.export', run, data, f'--out={folder / "export"}'], root)
      for name in _MADE_BY_STARTS:
        with contextlib.suppress(FileNotFoundError):
          shutil.rmtree(folder / 'run' / name)
      for name, words in commands(folder / 'run', folder / 'export', flags).items():
        works.setdefault(name, {})[checkout] = words
    works[BARE] = {NOW: ['-c', BARE]}
    starts = {(name, checkout): [] for name, by in works.items() for checkout in by}
    for _ in range(1 + flags.rounds):
      for (name, checkout), done in starts.items():
        done.append(start(works[name][checkout], checkouts[checkout]))
  found: dict[str, dict[str, dict[str, float]]] = {}
  for (name, checkout), done in starts.items():
    found.setdefault(name, {})[checkout] = summary(done)
  result = {
    'benchmark': 'starts',
    'commands': found,
    'rounds': flags.rounds,
    'device': devices.describe_devices(),
    **measure.machine(),
  }
  measure.report(flags, table(found), result)


if __name__ == '__main__':
  main()

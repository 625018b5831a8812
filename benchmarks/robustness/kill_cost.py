"""What kills cost a run in wall time: ten of them, against the same run left alone.

  python -m benchmarks.robustness.kill_cost --config=configs/movielens_100k.py:paper \
    --data_dir=data/movielens_100k --workdir=runs/kill-cost [--kills=10] [--seed=0]

Trains three times: for an epoch a stage, to compile its programs, left alone with them, and killed
by SIGKILL and SIGTERM in turn, each start after a random time, on average its share of the whole.
Ends with one line of JSON: seconds of both, their ratio, seconds a kill, which are those of a start
and of what was done since the last save, and seconds from the start to the first step with all to
compile, and with all compiled. Flags `--config.NAME=VALUE` are passed on.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from ur4rec_jax.errors import exit_on_reported_error


def start(command: Sequence[str], run: pathlib.Path) -> subprocess.Popen:
  """Starts the command with the workdir `run`; what it prints goes to a file `log` beside that."""
  with open(run.parent / 'log', 'ab') as log:
    return subprocess.Popen([*command, f'--workdir={run}'], stdout=log, stderr=log)


def finish(command: Sequence[str], run: pathlib.Path) -> tuple[float, float]:
  """Runs it to its end, or ends this process if it fails.

  Returns:
    Seconds until it reported its first step, and until its end.
  """
  began, metrics = time.monotonic(), run / 'metrics.jsonl'
  process = start(command, run)
  while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
    time.sleep(0.05)
  first_step = time.monotonic() - began
  if code := process.wait():
    sys.exit(f'{run}: exit code {code}, see {run.parent / "log"}')
  return first_step, time.monotonic() - began


@exit_on_reported_error
def main() -> None:
  """Reads the flags, trains and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--config', required=True, help='config file, or FILE:VARIANT')
  add('--data_dir', required=True, help='prepared data')
  add('--workdir', type=pathlib.Path, required=True, help='emptied if it exists')
  add('--kills', type=int, default=10)
  add('--seed', type=int, default=0)
  flags, overrides = parser.parse_known_args()
  workdir = flags.workdir.absolute()
  shutil.rmtree(workdir, ignore_errors=True)
  workdir.mkdir(parents=True)
  command = [sys.executable, '-m', 'ur4rec_jax.main', f'--config={flags.config}', *overrides]
  command += [f'--config.data_dir={flags.data_dir}']
  command += [f'--config.compilation_cache={workdir / "compiled"}']

  compiling, _ = finish([*command, '--config.num_epochs=1'], workdir / 'compiling')
  compiled, alone = finish(command, workdir / 'alone')
  print(f'left alone: {alone:.1f} s', flush=True)
  rng, began = random.Random(flags.seed), time.monotonic()
  for kill in range(flags.kills):
    process = start(command, workdir / 'killed')
    try:
      process.wait(rng.uniform(0, 2 * alone / (flags.kills + 1)))
      sys.exit(f'the run was over before kill {kill + 1}; choose another --seed')
    except subprocess.TimeoutExpired:
      process.send_signal([signal.SIGKILL, signal.SIGTERM][kill % 2])
    code = process.wait()
    print(f'kill {kill + 1} at {time.monotonic() - began:.1f} s: exit code {code}', flush=True)
  finish(command, workdir / 'killed')
  killed = time.monotonic() - began
  results = [(workdir / run / 'results.json').read_bytes() for run in ('alone', 'killed')]
  print(
    json.dumps(
      {
        'ratio': round(killed / alone, 3),
        'seconds_alone': round(alone, 1),
        'seconds_killed': round(killed, 1),
        'seconds_a_kill': round((killed - alone) / flags.kills, 1),
        'same_results': results[0] == results[1],
        'seconds_to_first_step': {'compiling': round(compiling, 1), 'compiled': round(compiled, 1)},
      }
    )
  )


if __name__ == '__main__':
  main()

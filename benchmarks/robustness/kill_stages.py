"""Kills runs through four stages at random moments; each must end as if it had been left alone.

  pip install -e '.[test]'
  python -m benchmarks.robustness.kill_stages --workdir=runs/kills [--kills=40] \
    [--kills_per_run=1] [--seed=0]

Builds small data with the built-in text encoder and trains once undisturbed. Then it starts runs of
the same command and kills each `kills_per_run` times, by SIGKILL or SIGTERM in turn: half the times
at an instant drawn uniformly over what such a start takes, half when something special is seen: the
first program is compiled, a stage begins, a validation or a save is going on. After the last kill
the run goes to its end, and final parameters, best parameters, optimizer state, metrics.jsonl,
results.json and test_ranks.npz are compared bit for bit. Ends with a table, and exit code 1 if any
run differs. All on the CPU. Flags `--config.NAME=VALUE` are passed on; with
`--config.data_in_memory=False` the runs read their batches from the disk.
"""

import argparse
import collections
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from benchmarks.robustness.kill_cost import finish, start
from benchmarks.robustness.small_runs import (
  DEFAULT,
  SMALL,
  TINY,
  assert_same_end,
  before_the_manifest,
  in_a_save,
  lines,
)

ROOT = pathlib.Path(__file__).parents[2]


def _in_first_compile(workdir: pathlib.Path) -> bool:
  return (workdir / 'checkpoints').exists() and not lines(workdir)


def _begun(stage: str):
  return lambda workdir: any(line['stage'] == stage for line in lines(workdir))


def _in_validation(workdir: pathlib.Path) -> bool:
  found = lines(workdir)
  return bool(found) and 'loss' in found[-1]


MOMENTS = {
  'first compile': _in_first_compile,
  **{f'border to {stage}': _begun(stage) for stage in DEFAULT[1:]},
  'validation': _in_validation,
  'save': in_a_save,
  'save, before its manifest': before_the_manifest,
}


def main(argv: list[str] | None = None) -> int:
  """Returns 0 if all runs end the same."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='emptied if it exists')
  parser.add_argument('--kills', type=int, default=40)
  parser.add_argument('--kills_per_run', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0)
  args, overrides = parser.parse_known_args(argv)
  shutil.rmtree(args.workdir, ignore_errors=True)
  workdir = args.workdir.absolute()
  data = _build_data(workdir / 'data')

  command, reference = [*_command(data), *overrides], workdir / 'reference'
  finish(command, reference)
  # With programs compiled, as in the runs that are killed.
  _, undisturbed = finish(command, workdir / 'again')
  assert_same_end(workdir / 'again', reference)
  print(f'undisturbed: {undisturbed:.1f} s', flush=True)

  rng = random.Random(args.seed)
  landed, exits, same, total, kills = collections.Counter(), collections.Counter(), 0, 0, 0
  while kills < args.kills:
    run, first = workdir / f'run-{total:03}', kills
    began = time.monotonic()
    while kills < min(first + args.kills_per_run, args.kills):
      where, code = _kill(command, run, kills, rng, undisturbed)
      if where is None:  # It came to its end before.
        break
      landed[where] += 1
      exits[code] += 1
      kills += 1
    finish(command, run)
    total += 1
    try:
      assert_same_end(run, reference)
      same += 1
      outcome = 'the same'
      shutil.rmtree(run)
    except AssertionError as error:
      outcome = f'DIFFERENT: {error}'
    seconds = time.monotonic() - began
    print(f'run {total}, {kills - first} kills: {outcome}, {seconds:.0f} s', flush=True)
  print(f'\n{same} of {total} runs with {kills} kills end the same; kills landed in')
  for where, count in sorted(landed.items()):
    print(f'  {where:<40}{count:>4}')
  print(f'exit codes: {dict(exits)}')
  return int(same < total)


def _build_data(folder: pathlib.Path) -> pathlib.Path:
  build = ['data_prep.build_dataset', '--source=synthetic', '--num_users=120', '--num_items=60']
  encode = ['data_prep.encode', '--modality=text', '--encoder=hashing', '--of=item', '--width=8']
  for command in (build, encode):
    subprocess.run(
      [sys.executable, '-m', *command, f'--data_dir={folder}'],
      check=True,
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
    )
  return folder


def _command(data: pathlib.Path) -> list[str]:
  config = ROOT / 'configs' / 'synthetic.py'
  command = [sys.executable, '-m', 'ur4rec_jax.main', f'--config={config}:text', *SMALL]
  command += [f'--config.data_dir={data}', *TINY]
  return [*command, f'--config.compilation_cache={data.parent / "compiled"}']


def _kill(
  command: list[str], run: pathlib.Path, number: int, rng: random.Random, undisturbed: float
) -> tuple[str | None, int]:
  """Starts the run and kills it; returns where it was, None if it was faster, and its exit code."""
  to_come = [name for name, moment in sorted(MOMENTS.items()) if not moment(run)]
  name = rng.choice(to_come)
  moment = MOMENTS[name]
  instant, delay = rng.uniform(0, undisturbed), rng.choice([0, rng.uniform(0, 0.5)])
  began, process = time.monotonic(), start(command, run)
  if number % 4 < 2:
    name = 'any instant'
    is_due = lambda: time.monotonic() > began + instant
  else:
    is_due = lambda: moment(run)
  while process.poll() is None and not is_due():
    time.sleep(0.0005)
  if name != 'any instant':
    time.sleep(delay)
  found = lines(run)
  where = f'{found[-1]["stage"] if found else "before any step"}, {name}'
  if process.poll() is not None:
    return None, process.returncode
  process.send_signal([signal.SIGKILL, signal.SIGTERM][number % 2])
  return where, process.wait()


if __name__ == '__main__':
  sys.exit(main())

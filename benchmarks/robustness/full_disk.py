"""A disk that another program fills at random moments of a run, and the run after room came back.

  python -m benchmarks.robustness.full_disk --workdir=runs/full-disk [--fills=20] [--seed=0]

Trains a small run undisturbed, then again and again in a file system of its own that is filled to
the last byte after a random number of its metrics. Each run must end with exit code 4 within 10
seconds, without a traceback. The space is freed, the same command starts again, and its end must be
that of the undisturbed run bit for bit: all arrays, results, ranks and metrics. Prints a line a
fill and one of JSON, and exits with 1 if a promise was broken. Needs Linux, and root for `mount`.
"""

import argparse
import contextlib
import json
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from benchmarks.robustness.small_runs import SMALL, assert_same_end, lines
from ur4rec_jax.errors import InputError, StorageError, exit_on_reported_error

LIMIT_SECONDS = 10
RUN = ('--config.num_epochs=60', '--config.patience=60', '--config.checkpoint.every_validations=5')
SIZE_MB = 6


@contextlib.contextmanager
def small_disk(folder: pathlib.Path) -> Iterator[None]:
  """Mounts a file system of `SIZE_MB` megabytes on a new folder."""
  folder.mkdir(parents=True, exist_ok=True)
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={SIZE_MB}m', 'tmpfs', str(folder)]
  done = subprocess.run(mount, capture_output=True, text=True, check=False)
  if done.returncode:
    raise InputError(f'--workdir={folder.parent}: cannot mount a tmpfs ({done.stderr.strip()})')
  try:
    yield
  finally:
    subprocess.run(['umount', '-l', str(folder)], check=True)


def fill(folder: pathlib.Path) -> pathlib.Path:
  """Writes a file until nothing more fits, in ever smaller pieces, and returns it."""
  path = folder / 'of-another-program'
  with open(path, 'wb', buffering=0) as file:
    for size in (2**16, 2**12, 1):
      with contextlib.suppress(OSError):
        while True:
          file.write(b'x' * size)
  return path


def start(command: Sequence[str], log: pathlib.Path) -> subprocess.Popen:
  with open(log, 'wb') as file:
    return subprocess.Popen(command, stdout=file, stderr=file)


def fill_once(
  command: Sequence[str], disk: pathlib.Path, log: pathlib.Path, reported: int
) -> tuple[int, float, str]:
  """Starts a run, fills its disk after so many metrics, and waits for its end.

  Returns:
    The exit code, the seconds that it took after the disk was full, and what it printed.
  """
  process = start(command, log)
  while process.poll() is None and len(lines(disk / 'run')) < reported:
    time.sleep(0.002)
  filler, full = fill(disk), time.monotonic()
  try:
    code = process.wait(60)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
    code = -1  # It hangs.
  seconds = time.monotonic() - full
  filler.unlink()
  return code, seconds, log.read_text()


@exit_on_reported_error
def main() -> None:
  """Reads the flags, fills and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='emptied if it exists')
  parser.add_argument('--fills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  flags = parser.parse_args()
  workdir = flags.workdir.absolute()
  shutil.rmtree(workdir, ignore_errors=True)
  workdir.mkdir(parents=True)
  build = [sys.executable, '-m', 'data_prep.build_dataset', '--source=synthetic']
  build += [f'--data_dir={workdir / "data"}', '--num_users=120', '--num_items=60']
  subprocess.run(build, check=True, capture_output=True)
  command = [sys.executable, '-m', 'ur4rec_jax.main', '--config=synthetic', *SMALL, *RUN]
  command += [f'--config.data_dir={workdir / "data"}']
  command += [f'--config.compilation_cache={workdir / "compiled"}']
  good = workdir / 'good'
  if code := start([*command, f'--workdir={good}'], workdir / 'log').wait():
    sys.exit(f'the undisturbed run ended with {code}, see {workdir / "log"}')
  total, rng, kept = len(lines(good)), random.Random(flags.seed), 0
  disk = workdir / 'disk'
  for number in range(1, flags.fills + 1):
    reported = rng.randrange(1, total)
    with small_disk(disk):
      of_disk = [*command, f'--workdir={disk / "run"}']
      code, seconds, printed = fill_once(of_disk, disk, workdir / 'log', reported)
      problems = [f'exit code {code}'] if code not in (0, StorageError.exit_code) else []
      problems += [f'{seconds:.1f} s'] if code and seconds > LIMIT_SECONDS else []
      problems += ['a traceback'] if 'Traceback' in printed else []
      if again := start(of_disk, workdir / 'log-again').wait():
        problems += [f'with room: exit code {again}']
      else:
        try:
          assert_same_end(disk / 'run', good)
        except AssertionError as error:
          problems += [f'another end: {str(error).strip().splitlines()[0]}']
    kept += not problems
    shown = (printed.strip().splitlines() or [''])[-1].replace(str(workdir), '')[:120]
    print(
      f'fill {number} after {reported} of {total} metrics: exit code {code} after {seconds:.1f} s, '
      f'{", ".join(problems) or "went on bit for bit"}: {shown}',
      flush=True,
    )
    if problems:
      shutil.copy(workdir / 'log', workdir / f'log-{number}')
  print(json.dumps({'fills': flags.fills, 'as_promised': kept}))
  sys.exit(kept < flags.fills)


if __name__ == '__main__':
  main()

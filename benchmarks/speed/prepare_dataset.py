"""Measures the time and the memory of `build_dataset` on a generated file of interactions.

  python -m benchmarks.speed.prepare_dataset --rows=20000000 --folder=/tmp/many --out=prepare-20m

The file is generated in the folder if it is missing: users, items and times in random order, with
skewed popularity, 144 rows a user. Rows are built with 5-core and without repeats. Seconds of the
processor are given beside the elapsed ones, because other programs may run at the same time. Memory
is that of the largest process. With `--master` Spark filters and sorts; of its processes only the
driver is counted, not the workers of a cluster.

With `--project` the build is that of another copy of the project, such as an earlier version.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from benchmarks.speed import measure

RESULTS = measure.ROOT / 'benchmarks' / 'results' / 'large_data'
_ROWS_AT_ONCE = 2_000_000


def generate(path: pathlib.Path, rows: int) -> None:
  """Writes a CSV file of random interactions."""
  rng = np.random.default_rng(0)
  users, items = max(10, rows // 144), max(10, min(27_000, rows // 740))
  draft = path.with_suffix('.draft')
  with draft.open('wb') as file:
    for start in range(0, rows, _ROWS_AT_ONCE):
      count = min(_ROWS_AT_ONCE, rows - start)
      table = pa.table(
        {
          'user': (users * rng.random(count) ** 2).astype(int) + 1,
          'item': (items * rng.random(count) ** 3).astype(int) + 1,
          'rating': rng.integers(1, 11, count) / 2,
          'timestamp': rng.integers(789_652_000, 1_427_784_000, count),
        }
      )
      options = csv.WriteOptions(include_header=start == 0, quoting_style='none')
      csv.write_csv(table, file, options)
  draft.rename(path)


def build(path: pathlib.Path, project: pathlib.Path, more: list[str]) -> dict[str, Any]:
  """Builds the file in a process of its own; returns seconds, memory and the hashes."""
  data_dir = path.with_suffix('.data')
  shutil.rmtree(data_dir, ignore_errors=True)
  command = [sys.executable, '-m', 'data_prep.build_dataset', '--source=interactions']
  command += [f'--raw_dir={path}', f'--data_dir={data_dir}', '--k_core=5', '--drop_duplicates']
  clock = time.perf_counter()
  subprocess.run(command + more, cwd=project, check=True, stdout=subprocess.DEVNULL)
  seconds = time.perf_counter() - clock
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  info = json.loads((data_dir / 'dataset.json').read_text())
  shutil.rmtree(data_dir)
  return {
    'seconds': round(seconds, 1),
    'processor_seconds': round(used.ru_utime + used.ru_stime, 1),
    'peak_mb': round(used.ru_maxrss / 1024),
    'counts': info['counts'],
    'hashes': {name: record['hash'] for name, record in info['splits'].items()},
  }


def main() -> None:
  """Generates the file if it is missing, builds it, and prints what that took."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--folder', required=True, type=pathlib.Path, help='folder for the file and the dataset')
  add('--rows', type=int, default=20_000_000, help='rows to generate')
  add('--project', type=pathlib.Path, default=measure.ROOT, help='copy of the project that builds')
  add('--memory_limit', help='flag of build_dataset, if it has the flag')
  add('--master', help='flag of build_dataset, with --engine=spark')
  measure.add_output_flags(parser, RESULTS)
  flags = parser.parse_args()
  flags.folder.mkdir(parents=True, exist_ok=True)
  path = flags.folder / f'{flags.rows}.csv'
  if not path.exists():
    generate(path, flags.rows)
  more = [f'--memory_limit={flags.memory_limit}'] if flags.memory_limit else []
  more += ['--engine=spark', f'--master={flags.master}'] if flags.master else []
  found = build(path, flags.project, more)
  lines = [
    f'{flags.rows:,} rows: {found["seconds"]:,} s, {found["processor_seconds"]:,} s of the'
    f' processor on {len(os.sched_getaffinity(0))} cores, {found["peak_mb"]:,} MB',
    f'split {found["hashes"]["leave_one_out"]}',
  ]
  result = {
    'benchmark': 'prepare_dataset',
    'rows': flags.rows,
    'memory_limit': flags.memory_limit,
    'master': flags.master,
    'cores': len(os.sched_getaffinity(0)),
    **found,
  }
  measure.report(flags, lines, {**result, **measure.machine()}, RESULTS)


if __name__ == '__main__':
  main()

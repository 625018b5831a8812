"""Measures the time and the memory that a prepared folder needs until training can begin.

  python -m benchmarks.speed.open_dataset --users=10000000 --folder=/tmp/many --out=open-10m
  python -m benchmarks.speed.open_dataset --users=100000 --folder=/tmp/few --decoded --out=open-100k

The first call generates the folder. Without `--decoded` it has flat arrays, but no TFDS data, which
take minutes to write for ten million users. With it the folder has both, and a second row shows how
long the same folder takes without the flat arrays.

Each row is a process of its own that does what training does before its first step: it imports the
program, opens the run, checks the data and plans the batches and the first epoch. The memory is
what the process has in RAM (`VmRSS`), the libraries and all touched pages of mapped files included.
The last row adds the copy of all training items, which goes to the device with the first step.
"""

import argparse
import json
import pathlib
import shutil
import time
from typing import Any

import numpy as np

from benchmarks.speed import measure

RESULTS = measure.ROOT / 'benchmarks' / 'results' / 'large_data'
ITEMS = 100_000
MEAN_LENGTH = 20
_USERS_AT_ONCE = 1 << 16
FLAT, DECODED = 'flat arrays', 'TFDS data decoded'


def generate(
  folder: pathlib.Path, users: int, with_records: bool, mean_length: int = MEAN_LENGTH
) -> None:
  """Writes a prepared folder of random histories: skewed popularity, lengths around the mean."""
  from data_prep.prepared import engine, prepare, tfds_writer
  from ur4rec_jax.data import dataset, flat_arrays

  draft = folder.with_name(f'{folder.name}.draft')
  shutil.rmtree(draft, ignore_errors=True)
  draft.mkdir(parents=True)
  scratch = folder.with_name(f'{folder.name}.columns')
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir()
  rng = np.random.default_rng(0)
  lengths = 3 + rng.geometric(1 / (mean_length - 3), users)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  # In files, because the columns may be larger than the memory.
  resources = engine.Resources(folder=scratch)
  kinds = {'item_ids': np.int32, 'timestamps': np.int64, 'ratings': np.float32}
  columns = {name: resources.column(name, int(offsets[-1]), kind) for name, kind in kinds.items()}
  for start in range(0, users, _USERS_AT_ONCE):
    bounds = offsets[start : start + _USERS_AT_ONCE + 1]
    here = slice(bounds[0], bounds[-1])
    items = ITEMS * rng.random(bounds[-1] - bounds[0], np.float32) ** 3
    columns['item_ids'][here] = np.minimum(items.astype(np.int32) + 1, ITEMS)
    first = rng.integers(1_500_000_000, 1_600_000_000, len(bounds) - 1)
    position = np.arange(*bounds[[0, -1]]) - np.repeat(bounds[:-1], np.diff(bounds))
    columns['timestamps'][here] = np.repeat(first, np.diff(bounds)) + 3600 * position
    columns['ratings'][here] = 1
    for column in columns.values():
      flat_arrays.release(column)
  names = [*map(str, range(1, users + 1))]
  item_ids, timestamps = columns['item_ids'], columns['timestamps']
  data = prepare.Prepared(
    user_names=names,
    item_names=[*map(str, range(1, ITEMS + 1))],
    items=[prepare.Item()] * ITEMS,
    offsets=offsets,
    **columns,
    has_timestamps=True,
    has_ratings=False,
    rows_read=int(offsets[-1]),
    dropped={},
    splits=prepare.make_splits(offsets, item_ids, timestamps, None, ITEMS),
  )
  origin = tfds_writer.Origin('generated', '', '', '')
  if with_records:
    tfds_writer.write(draft, data, origin, 'generated', {'options': {}})
  else:
    info = {
      'name': origin.name,
      'source': 'generated',
      'options': {},
      'counts': prepare.counts(data),
      'ids_sha256': {'users': '', 'items': ''},
      'splits': data.splits,
      'format_version': dataset.FORMAT_VERSION,
    }
    dataset.write_flat_arrays(draft, info, dataset.Interactions(names, offsets, **columns))
    (draft / dataset.METADATA).write_text(json.dumps(info))
  draft.rename(folder)
  shutil.rmtree(scratch)


def measure_one(folder: str) -> list[dict[str, Any]]:
  """Does in this process what training does before its first step, and measures after each part."""
  rows, clock = [], time.perf_counter()

  def note(name: str) -> None:
    nonlocal clock
    rows.append(
      {
        'after': name,
        'seconds': round(time.perf_counter() - clock, 2),
        **measure.memory(),
      }
    )
    clock = time.perf_counter()

  from configs import default
  from ur4rec_jax.data.dataset import load_dataset
  from ur4rec_jax.runs.open_run import open_run
  from ur4rec_jax.runs.train_loop import plan_batches

  note('the program is imported')
  load_dataset(folder)
  note('the dataset is open')
  config = default.get_config('sasrec')
  config.data_dir, config.max_length, config.batch_size = folder, 50, 1024
  run = open_run(config)
  run.check_targets()
  note('the run is open and checked')
  batches = plan_batches(run)
  note('the batches are planned')
  plan = batches.plan(0)
  plan.steps(0, min(64, batches.steps_per_epoch))
  note('the first epoch is planned')
  train_part = run.dataset.train_part()
  note('the training part is copied')
  assert train_part.num_users == run.dataset.num_users
  return rows


def run_one(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Does `measure_one` in a process of its own."""
  return measure.run_alone('benchmarks.speed.open_dataset', f'--folder={folder}', '--one')


def main() -> None:
  """Generates the folder if it is missing, measures, and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--folder', required=True, type=pathlib.Path, help='prepared folder; generated if missing')
  add('--users', type=int, default=10_000_000, help='users to generate')
  add('--decoded', action='store_true', help='also measure the folder without flat arrays')
  add('--one', action='store_true', help=argparse.SUPPRESS)
  measure.add_output_flags(parser, RESULTS)
  flags = parser.parse_args()
  if flags.one:
    print(json.dumps(measure_one(str(flags.folder))))
    return
  if not flags.folder.exists():
    generate(flags.folder, flags.users, flags.decoded)
  info = json.loads((flags.folder / 'dataset.json').read_text())
  found = {FLAT: run_one(flags.folder)}
  if flags.decoded:
    bare = flags.folder.with_name(f'{flags.folder.name}.bare')
    shutil.copytree(flags.folder, bare, ignore=shutil.ignore_patterns('flat'))
    found[DECODED] = run_one(bare)
    shutil.rmtree(bare)
  lines = []
  for name, rows in found.items():
    lines.append(f'{name:<36}{"seconds":>9}{"RSS MB":>9}{"peak MB":>9}{"of files":>9}')
    lines += [
      f'{row["after"]:<36}{row["seconds"]:>9.2f}{row["rss_mb"]:>9,.0f}{row["peak_mb"]:>9,.0f}'
      f'{row["of_files_mb"]:>9,.0f}'
      for row in rows
    ]
  result = {'benchmark': 'open_dataset', 'counts': info['counts'], 'rows': found}
  measure.report(flags, lines, {**result, **measure.machine()}, RESULTS)


if __name__ == '__main__':
  main()

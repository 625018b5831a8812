"""Compares training from the disk with training from memory: speed, and memory of the process.

  python -m benchmarks.speed.stream_batches --users=1000000 --folder=/tmp/large --out=stream-8gb

The first call generates the folder: random histories of 500 interactions on average, as flat arrays
without TFDS data. Each row is a process of its own that opens the run and trains a SASRec for some
dispatches after a first one, in which the step is compiled. Both rows take the same steps, and
reach the same loss if they have the same number of threads. Memory is that of the process in RAM.
Its part without the pages of mapped files is given too: pages of files are the first thing that the
system takes back.
"""

import argparse
import json
import pathlib
import tempfile
import time
from typing import Any

from benchmarks.speed import measure, open_dataset

RESULTS = measure.ROOT / 'benchmarks' / 'results' / 'large_data'
MEAN_LENGTH = 500
IN_MEMORY, STREAMED = 'in memory', 'from the disk'


def measure_one(folder: str, in_memory: bool, dispatches: int) -> dict[str, Any]:
  """Trains in this process and returns speed, memory and loss."""
  from configs import default
  from ur4rec_jax.runs import train_loop
  from ur4rec_jax.runs.checkpoint import Checkpointer
  from ur4rec_jax.runs.metric_writers import NullReporter
  from ur4rec_jax.runs.open_run import open_run

  config = default.get_config('sasrec')
  config.data_dir, config.data_in_memory = folder, in_memory
  config.loss.name, config.loss.num_negatives = 'sampled_softmax', 256
  config.optimizer.item_embeddings = 'touched'
  run = open_run(config)
  run.check_targets()
  batches = train_loop.plan_batches(run)
  losses = []
  reporter = NullReporter()
  reporter.trained = lambda step, values, speed: losses.append(values['loss'])
  with tempfile.TemporaryDirectory() as workdir:
    checkpointer = Checkpointer(workdir, 1)
    start = train_loop.restore_or_create(run, checkpointer)
    loop = train_loop.TrainLoop(run, batches, start, checkpointer, reporter)
    state, step, border = loop.state, 0, dispatches * config.steps_per_dispatch
    state, step = loop.dispatcher.run(state, step, border)
    loop.dispatcher.flush()
    first, clock, processor = step, time.perf_counter(), time.process_time()
    while step < border:
      state, step = loop.dispatcher.run(state, step, border)
    loop.dispatcher.flush()
    seconds, used = time.perf_counter() - clock, time.process_time() - processor
    loop.close()
    checkpointer.close()
  users = (step - first) * batches.users / batches.steps_per_epoch
  return {
    'sequences_per_second': round(users / seconds, 1),
    'sequences_per_processor_second': round(users / used, 1),
    'steps': step - first,
    'loss': losses[-1],
    **measure.memory(),
  }


def run_one(folder: pathlib.Path, in_memory: bool, dispatches: int) -> dict[str, Any]:
  """Does `measure_one` in a process of its own."""
  flags = f'--folder={folder}', f'--one={int(in_memory)}', f'--dispatches={dispatches}'
  return measure.run_alone('benchmarks.speed.stream_batches', *flags)


def main() -> None:
  """Generates the folder if it is missing, measures, and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--folder', required=True, type=pathlib.Path, help='prepared folder; generated if missing')
  add('--users', type=int, default=250_000, help='users to generate')
  add('--dispatches', type=int, default=12, help='dispatches to train, the first one included')
  add('--one', type=int, help=argparse.SUPPRESS)
  measure.add_output_flags(parser, RESULTS)
  flags = parser.parse_args()
  if flags.one is not None:
    print(json.dumps(measure_one(str(flags.folder), bool(flags.one), flags.dispatches)))
    return
  if not flags.folder.exists():
    open_dataset.generate(flags.folder, flags.users, False, MEAN_LENGTH)
  info = json.loads((flags.folder / 'dataset.json').read_text())
  size = sum(path.stat().st_size for path in (flags.folder / 'flat').iterdir())
  found = {
    name: run_one(flags.folder, name == IN_MEMORY, flags.dispatches)
    for name in (IN_MEMORY, STREAMED)
  }
  lines = [
    f'{"":<16}{"sequences/s":>12}{"per CPU s":>12}{"RSS MB":>9}{"peak MB":>9}{"of files":>9}'
  ]
  lines += [
    f'{name:<16}{row["sequences_per_second"]:>12,.1f}{row["sequences_per_processor_second"]:>12,.1f}'
    f'{row["rss_mb"]:>9,.0f}{row["peak_mb"]:>9,.0f}{row["of_files_mb"]:>9,.0f}'
    for name, row in found.items()
  ]
  lines.append(f'equal losses: {found[IN_MEMORY]["loss"] == found[STREAMED]["loss"]}')
  result = {
    'benchmark': 'stream_batches',
    'counts': info['counts'],
    'data_mb': round(size / 2**20),
    'rows': found,
  }
  measure.report(flags, lines, {**result, **measure.machine()}, RESULTS)


if __name__ == '__main__':
  main()

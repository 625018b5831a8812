"""Measures what each optimization of the training step is worth, by training without it.

  python -m benchmarks.speed.optimizations --data_dir=data/ml-1m-sequences --loss=softmax

Every row is a process that replaces one optimization by the plain way and times the program's
training loop. The first row has all optimizations, and so has the last one, as a check. The last
line is JSON; `--json` prints only that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from benchmarks.speed import measure, ur4rec_side
from ur4rec_jax.data import input_pipeline
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.models import attention, sasrec
from ur4rec_jax.training import catalogue_softmax

ALL = 'nothing'
STEPS = 8  # Timed together.


def one_user_a_row(histogram: np.ndarray) -> input_pipeline.Packing:
  """Replaces `input_pipeline.pack_histogram`: one user a row, with padding."""
  lengths = np.flatnonzero(histogram).astype(np.int32)
  return input_pipeline.Packing(lengths[:, None], histogram[lengths])


def plain_softmax(*arguments) -> jax.Array:
  """Replaces `catalogue_softmax.softmax`: all logits are in memory at once."""
  *arrays, _chunk_size, seen = arguments
  return catalogue_softmax.plain_softmax(*arrays, seen)


def plain_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, visible: attention.Visible, _window: int
) -> jax.Array:
  """Replaces `attention.causal_attention`: every query is compared with every key."""
  return attention.masked_attention(query, key, value, visible.mask(query.shape[1]))


# By optimization: the function, and the plain function that replaces it.
PLAIN = {
  'users packed into rows': (input_pipeline, 'pack_histogram', one_user_a_row),
  'softmax in chunks, its gradient formed with it': (catalogue_softmax, 'softmax', plain_softmax),
  'attention in causal blocks': (attention, 'causal_attention', plain_attention),
  'dropout by 8 random bits': (sasrec, 'Dropout', nn.Dropout),
}
FLAGS = {'several steps a dispatch': ('--config.steps_per_dispatch=1',)}
ROWS = (ALL, *PLAIN, *FLAGS, f'{ALL}, again')


def measure_one(name: str, settings: dict[str, Any], data: str, rounds: int) -> dict[str, float]:
  """Measures speed and memory without the optimization `name`, in a process of its own."""
  if name in PLAIN:
    setattr(*PLAIN[name])
  with np.load(data) as found:
    dataset = ur4rec_side.make_dataset(found['item_ids'], found['offsets'], int(found['num_items']))
  config = ur4rec_side.make_config(settings)
  with tempfile.TemporaryDirectory() as workdir:
    loop = ur4rec_side.make_loop(config, dataset, workdir)
    ur4rec_side.train(loop, STEPS)
    seconds = []
    for _ in range(rounds):
      clock = measure.Clock()
      ur4rec_side.train(loop, STEPS)
      seconds.append(clock.read()['seconds'])
  users = STEPS * loop.batches.users / loop.batches.steps_per_epoch
  return {
    'sequences_per_second': round(users / statistics.median(seconds), 1),
    'peak_mb': measure.memory_megabytes('VmHWM'),
    'steps_an_epoch': loop.batches.steps_per_epoch,
  }


def run_one(name: str, settings: dict[str, Any], data: str, rounds: int) -> dict[str, float]:
  """Does `measure_one` in a process of its own."""
  settings = {**settings, 'overrides': [*settings['overrides'], *FLAGS.get(name, ())]}
  command = [
    sys.executable,
    '-m',
    'benchmarks.speed.optimizations',
    '--one',
    json.dumps([name, settings, data]),
  ]
  command += [f'--rounds={rounds}', '--data_dir=']
  done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
  if done.returncode:
    sys.exit(done.stderr or f'without {name}: exit code {done.returncode}')
  return json.loads(done.stdout.splitlines()[-1])


@exit_on_reported_error
def main() -> None:
  """Measures every row and prints the table."""
  parser = measure.make_parser(__doc__, against_rectools=False)
  parser.add_argument('--rounds', type=int, default=5, help='times that 8 steps are timed')
  parser.add_argument('--one', help=argparse.SUPPRESS)
  flags, overrides = measure.parse(parser)
  if flags.one:
    print(json.dumps(measure_one(*json.loads(flags.one), flags.rounds)))
    return
  settings = measure.settings_of(flags, overrides)
  with measure.shared_data(flags) as (data, dataset):
    names = [name for name in ROWS if flags.loss == 'softmax' or 'softmax' not in name]
    rows = {name: run_one(name, settings, str(data), flags.rounds) for name in names}
  best = rows[ALL]['sequences_per_second']
  for row in rows.values():
    row['worth'] = round(best / row['sequences_per_second'], 3)
  lines = [f'{"without":<50}{"sequences/s":>12}{"worth":>8}{"peak MB":>9}']
  for name, row in rows.items():
    lines.append(
      f'{name:<50}{row["sequences_per_second"]:>12.1f}{row["worth"]:>8.2f}{row["peak_mb"]:>9,.0f}'
    )
  result = {
    'benchmark': 'tricks',
    'loss': flags.loss,
    'dataset': dataset,
    'settings': settings,
    'rows': rows,
    **measure.machine(),
  }
  measure.report(flags, lines, result)


if __name__ == '__main__':
  main()

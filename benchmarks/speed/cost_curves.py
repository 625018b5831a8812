"""What a training step and ranking cost as users, catalogue, history length and devices grow.

  python -m benchmarks.speed.cost_curves
  python -m benchmarks.speed.cost_curves --axes=items --values=10000,1000000 \
    --config.optimizer.item_embeddings=all

One thing grows at a time, the others stay as in `BASE`. Each point is a process of its own that
makes its data in memory and runs the program's training loop and, for some users, its evaluator:
milliseconds a step, microseconds a token, users ranked a second, peak memory. A step has about as
many tokens for any length. Devices are virtual ones of the same cores; the batch is the same for
any number of them. The last line is JSON; `--json` prints only that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.speed import measure
from ur4rec_jax.errors import exit_on_reported_error

AXES = {
  'users': (1_000, 10_000, 100_000, 1_000_000),
  'items': (1_000, 10_000, 100_000, 1_000_000),
  'length': (50, 100, 200, 500, 1_000),
  'devices': (1, 2, 4, 8),
}
BASE = {'users': 10_000, 'items': 10_000, 'length': 50, 'devices': 1}
SETTINGS = {**measure.SHAPES, 'loss': 'sampled_softmax'}
STEP_TOKENS = 6_400
RANKED_USERS, RANKINGS = 640, 3
OVERRIDES = ('--config.loss.num_negatives=1000', '--config.optimizer.item_embeddings=touched')


def make_histories(users: int, items: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Random item ids, popular ones more often, and offsets; `length` is a history's on average."""
  rng = np.random.default_rng(0)
  offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 2 * length - 2, users))])
  item_ids = rng.random(offsets[-1], np.float32)
  item_ids *= item_ids * item_ids * items  # In place: with many users this is most of the memory.
  return np.minimum(item_ids.astype(np.int32), items - 1) + 1, offsets


def measure_point(point: dict[str, Any]) -> dict[str, Any]:
  """Costs of a point; this is what its process does."""
  from benchmarks.speed import ur4rec_side  # What grows in the first process is not worth its time.

  loading = measure.Clock()
  item_ids, offsets = make_histories(point['users'], point['items'], point['length'])
  shapes = {'max_length': point['length'], 'batch_size': max(1, STEP_TOKENS // point['length'])}
  config = ur4rec_side.make_config({**SETTINGS, **shapes, 'overrides': point['overrides']})
  dataset = ur4rec_side.make_dataset(item_ids, offsets, point['items'])
  with tempfile.TemporaryDirectory() as workdir:
    loop = ur4rec_side.make_loop(config, dataset, workdir)
    prepare_seconds, compiling = loading.read()['seconds'], measure.Clock()
    steps = config.steps_per_dispatch
    ur4rec_side.train(loop, steps)
    first_seconds = compiling.read()['seconds']
    times = []
    for _ in range(point['rounds']):
      clock = measure.Clock()
      ur4rec_side.train(loop, steps)
      times.append(clock.read())
    end = offsets[: RANKED_USERS + 1]
    few = ur4rec_side.make_dataset(item_ids[: end[-1]], end, point['items'])
    rank = ur4rec_side.make_evaluator(loop, few, 'valid')
    rank()
    ranking = []
    for _ in range(RANKINGS):
      clock = measure.Clock()
      rank()
      ranking.append(clock.read()['seconds'])
  seconds, processor_seconds = ([x[name] / steps for x in times] for name in times[0])
  step = statistics.median(seconds)
  tokens = loop.batches.tokens / loop.batches.steps_per_epoch
  return {
    'step_ms': round(1e3 * step, 2),
    'step_ms_range': [round(1e3 * min(seconds), 2), round(1e3 * max(seconds), 2)],
    'processor_ms': round(1e3 * statistics.median(processor_seconds), 2),
    'tokens': round(tokens),
    'ranked_per_second': round((len(end) - 1) / statistics.median(ranking), 1),
    'us_a_token': round(1e6 * step / tokens, 3),
    'prepare_seconds': round(prepare_seconds, 2),
    'first_dispatch_seconds': round(first_seconds, 2),
    'peak_mb': measure.memory_megabytes('VmHWM'),
  }


def run_point(point: dict[str, Any], limit_seconds: float) -> dict[str, Any]:
  """Measures a point in its own process; `error` says why there is nothing."""
  command = [sys.executable, '-m', 'benchmarks.speed.cost_curves', f'--point={json.dumps(point)}']
  virtual = f'--xla_force_host_platform_device_count={point["devices"]}'
  env = {**os.environ, 'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {virtual}'}
  try:
    done = subprocess.run(
      command, cwd=measure.ROOT, env=env, capture_output=True, text=True, timeout=limit_seconds
    )
  except subprocess.TimeoutExpired:
    return {'error': f'not done in {limit_seconds:.0f} s'}
  if done.returncode:
    return {'error': (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}
  return json.loads(done.stdout.splitlines()[-1])


@exit_on_reported_error
def main() -> None:
  """Measures the curves, point by point."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  numbers = lambda text: [int(x) for x in text.split(',')]
  add('--axes', type=lambda text: text.split(','), default=[*AXES], help=f'of {", ".join(AXES)}')
  add('--values', type=numbers, help='other points than the usual ones, of a single axis')
  add('--rounds', type=int, default=5, help='dispatches that count')
  add('--limit_seconds', type=float, default=180, help='for a point')
  add('--point', help=argparse.SUPPRESS)
  measure.add_output_flags(parser)
  flags, overrides = measure.parse(parser)
  if flags.point:
    print(json.dumps(measure_point(json.loads(flags.point))))
    return
  if not set(flags.axes) <= AXES.keys() or (flags.values and len(flags.axes) > 1):
    parser.error(f'--axes: some of {", ".join(AXES)}; with --values one')
  curves, lines = {}, []
  for axis in flags.axes:
    curves[axis] = {}
    lines.append(f'{axis:>10}{"ms a step":>11}{"us a token":>12}{"ranked/s":>10}{"peak MB":>9}')
    for value in flags.values or AXES[axis]:
      point = {**BASE, axis: value, 'rounds': flags.rounds, 'overrides': [*OVERRIDES, *overrides]}
      found = curves[axis][str(value)] = run_point(point, flags.limit_seconds)
      row = '{step_ms:>11.1f}{us_a_token:>12.2f}{ranked_per_second:>10,.0f}{peak_mb:>9,.0f}'
      shown = f'  {found["error"]}' if 'error' in found else row.format(**found)
      lines.append(f'{value:>10,}{shown}')
      print(lines[-1], file=sys.stderr, flush=True)
  few, many = (curves.get('items', {}).get(str(value), {}) for value in (10_000, 1_000_000))
  has_both = 'step_ms' in few and 'step_ms' in many
  result = {
    'ratio': round(many['step_ms'] / few['step_ms'], 3) if has_both else None,
    'peak_mb': many.get('peak_mb'),
    'benchmark': 'cost_curves',
    'base': BASE,
    'settings': {**SETTINGS, 'overrides': [*OVERRIDES, *overrides]},
    'curves': curves,
    **measure.machine(),
  }
  measure.report(flags, lines, result)


if __name__ == '__main__':
  main()

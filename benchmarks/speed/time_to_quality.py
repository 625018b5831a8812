"""Time to a validation NDCG@10 beside RecTools, everything included.

  python -m benchmarks.speed.time_to_quality --data_dir=data/ml-1m-sequences --target=0.17 \
    --rectools_python=rectools/bin/python --limit_minutes=60

From the start of the process on: imports, compiling, training, and after each epoch a ranking of
all items for every validation user. One side runs after the other, each until the target or the
limit; `--config.FIELD=VALUE` changes our recipe, the other flags both. The last line is JSON;
`--json` prints only that. `ratio` is our time over theirs, at most that if only they met the limit.
"""

import argparse
import time
from typing import Any

from benchmarks.speed import measure
from ur4rec_jax.errors import exit_on_reported_error


def until_target(side: measure.Side, flags: argparse.Namespace, began: float) -> dict[str, Any]:
  """Trains and validates until the target or the limit; seconds, and the curve by epoch."""
  curve = []
  while True:
    epoch = side.ask('epoch')
    metrics = measure.metrics_of(side.ask('rank', part='valid'))
    seconds = time.perf_counter() - began
    curve.append([round(seconds, 1), metrics['ndcg@10']])
    if not flags.json:
      print(f'{side.name}: epoch {len(curve)}, {seconds:.0f} s, {metrics["ndcg@10"]}', flush=True)
    is_reached = metrics['ndcg@10'] >= flags.target
    if is_reached or seconds > 60 * flags.limit_minutes:
      return {
        'seconds': round(seconds, 1),
        'is_reached': is_reached,
        'curve': curve,
        'device': epoch['device'],
      }


@exit_on_reported_error
def main() -> None:
  """Runs one side after the other and prints both."""
  parser = measure.make_parser(__doc__)
  parser.add_argument('--target', type=float, default=0.17, help='validation NDCG@10')
  parser.add_argument('--limit_minutes', type=float, default=60, help='for each side')
  flags, overrides = measure.parse(parser)
  found = {}
  with measure.shared_data(flags) as (data, counts):
    for name in (measure.OWN, measure.RECTOOLS):
      began = time.perf_counter()
      with measure.start_side(name, flags, overrides, data) as side:
        found[name] = until_target(side, flags, began)
  own, rectools = found.values()
  ratio = round(own['seconds'] / rectools['seconds'], 3) if own['is_reached'] else None
  result = {
    'ratio': ratio,
    'is_bound': not rectools['is_reached'],
    'benchmark': 'time_to_quality',
    'target': flags.target,
    'dataset': counts,
    'settings': measure.settings_of(flags, overrides),
    **found,
    'device': own['device'],
    **measure.machine(),
  }
  lines = [
    f'{name}: {"reached" if x["is_reached"] else "not reached"} in {x["seconds"]:,.0f} s'
    for name, x in found.items()
  ]
  measure.report(flags, lines, result)


if __name__ == '__main__':
  main()

"""What each model variant costs: parameters, operations a user, time of a training step.

  python -m benchmarks.speed.cost --config=configs/movielens_1m.py --data_dir=data/movielens_1m \
    [--variants=sasrec,text] [--out=cost-ml-1m]

All parameters move, under all losses of the variant. The variants' steps take turns in one process,
so that whatever else the machine does falls on all of them alike; times are medians, and ratios
medians over the rounds of the time over that of the first variant in the same round. The last line
is JSON.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.speed import measure, ur4rec_side
from ur4rec_jax.data.features import load_with_features
from ur4rec_jax.data.input_pipeline import Batch, gather_preferences
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.runs.config_checks import check_config
from ur4rec_jax.runs.knobs import VARIANTS
from ur4rec_jax.sharding import devices


class Variant(NamedTuple):
  """A model that is ready to train.

  Attributes:
    parameters: their number.
    operations: floating-point operations to score the catalogue for a user with a full history,
      the items' side made before.
    step: trains one step and waits for it.
  """

  parameters: int
  operations: float
  step: Callable[[], None]


def prepare(config: ConfigDict, workdir: str) -> Variant:
  """Builds a config's model and its training loop."""
  config.stages = ('train',)
  config.steps_per_dispatch = 1
  check_config(config)
  dataset = load_with_features(config)
  loop = ur4rec_side.make_loop(config, dataset, workdir)
  model = create_model(config, dataset.num_items)
  params, tables = loop.state.params, loop.data.tables

  def score(params, items, preferences):
    ones = jnp.ones((1, config.max_length), jnp.int32)
    batch = Batch(ones, ones, ones, ones, jnp.zeros((1, 1), jnp.int32))
    apply = lambda *args, method: model.apply({'params': params}, *args, method=method)
    seen = gather_preferences(preferences, batch)
    users = apply(items, ones, ones, seen, method='encode_users')
    return apply({branch: x[:, -1] for branch, x in users.items()}, items, method='scores')

  items = model.apply({'params': params}, tables.items, method='encode_items')
  compiled = jax.jit(score).lower(params, items, tables.users).compile()
  number = sum(x.size for x in jax.tree.leaves(params))
  flops = compiled.cost_analysis()['flops']
  return Variant(number, flops, lambda: ur4rec_side.train(loop, 1))


@exit_on_reported_error
def main() -> None:
  """Times the variants and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--config', required=True, help='config file, without a variant')
  parser.add_argument('--data_dir', required=True, help='prepared data, with features')
  parser.add_argument('--variants', default=','.join(VARIANTS), help='the first is the base')
  parser.add_argument('--rounds', type=int, default=10)
  measure.add_output_flags(parser)
  flags = parser.parse_args()
  spec = importlib.util.spec_from_file_location('config', flags.config)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  variants = {}
  folder = tempfile.TemporaryDirectory()  # Goes with the process.
  for name in flags.variants.split(','):
    config = module.get_config(name)
    config.data_dir = flags.data_dir
    variants[name] = prepare(config, f'{folder.name}/{name}')
    variants[name].step()  # Compiles.
  seconds = {name: [] for name in variants}
  for _ in range(flags.rounds):
    for name, variant in variants.items():
      began = time.perf_counter()
      variant.step()
      seconds[name].append(time.perf_counter() - began)
  base = next(iter(seconds.values()))
  rows = {
    name: {
      'parameters': variant.parameters,
      'mflop_a_user': round(variant.operations / 1e6, 1),
      'step_ms': round(1000 * statistics.median(seconds[name]), 1),
      'ratio': round(statistics.median(a / b for a, b in zip(seconds[name], base, strict=True)), 3),
    }
    for name, variant in variants.items()
  }
  lines = [f'{"variant":<12}{"parameters":>12}{"MFLOP a user":>14}{"ms a step":>11}{"ratio":>7}']
  row = '{parameters:>12,}{mflop_a_user:>14.1f}{step_ms:>11.0f}{ratio:>7.2f}'
  lines += [f'{name:<12}{row.format(**found)}' for name, found in rows.items()]
  result = {
    'ratio': rows.get('multimodal', {}).get('ratio'),
    'benchmark': 'cost',
    'config': flags.config,
    'variants': rows,
    'device': devices.describe_devices(),
    **measure.machine(),
  }
  measure.report(flags, lines, result)


if __name__ == '__main__':
  main()

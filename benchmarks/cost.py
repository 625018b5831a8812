"""What each model variant costs: parameters, operations a user, time of a training step.

  python -m benchmarks.cost --config=configs/movielens_1m.py --data_dir=data/movielens_1m \
    --variants=sasrec,text,multimodal

All parameters move, under all losses of the variant. The variants' steps take turns in one process,
so that whatever else the machine does falls on all of them alike; times are medians, and ratios
medians over the rounds of the time over that of the first variant in the same round. The last line
is JSON.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax import optimizers, parallel, steps
from ur4rec_jax.config_checks import check_config
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.features import load_with_features, read_tables
from ur4rec_jax.input_pipeline import Batch, Plan, TrainBatches, gather_preferences
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.stages import make_stages, stage_numbers
from ur4rec_jax.train_state import create_train_state, parameter_shapes


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


def prepare(config: ConfigDict) -> Variant:
  """Builds a config's model, its training step, and places what that reads."""
  config.stages = ('train',)
  check_config(config)
  dataset = load_with_features(config)
  tables = read_tables(dataset, jnp.dtype(config.dtype))
  model = create_model(config, dataset.num_items)
  (stage,), labels = make_stages(
    config, lambda of: parameter_shapes(create_model(of, dataset.num_items), tables)
  )
  tx = optimizers.create_optimizer(config.optimizer, labels)
  train_part = dataset.train_part()
  batches = TrainBatches(
    train_part,
    max_length=config.max_length,
    batch_size=config.batch_size,
    crop=config.crop,
    seed=config.seed,
  )
  data = parallel.replicate(steps.make_train_data(train_part, tables))
  plan = Plan(*(x[:1] for x in batches.epoch(0)))
  arguments = (
    data,
    parallel.shard(parallel.split(plan, axis=1)),
    parallel.replicate(np.int32(1)),
    parallel.replicate(stage_numbers(stage, labels, batches.steps_per_epoch, 1)),
  )
  train_step = parallel.MAPPINGS[config.mapping](
    steps.make_train_step(model, tx, labels, stage.config, stage.moving),
    in_axes=(None, None, 0, None, None),
    donate_argnums=(0,),
  )
  state = parallel.replicate(create_train_state(model, tx, config.seed, tables))
  params = jax.tree.map(np.asarray, state.params)

  def step() -> None:
    nonlocal state
    state, metrics = train_step(state, *arguments)
    jax.block_until_ready(metrics)

  def score(params, items, preferences):
    ones = jnp.ones((1, config.max_length), jnp.int32)
    batch = Batch(ones, ones, ones, ones, jnp.zeros((1, 1), jnp.int32))
    apply = lambda *args, method: model.apply({'params': params}, *args, method=method)
    seen = gather_preferences(preferences, batch)
    users = apply(items, ones, ones, seen, method='user_side')
    return apply({path: x[:, -1] for path, x in users.items()}, items, method='scores')

  items = model.apply({'params': params}, tables.items, method='item_side')
  compiled = jax.jit(score).lower(params, items, tables.users).compile()
  number = sum(x.size for x in jax.tree.leaves(params))
  return Variant(number, compiled.cost_analysis()['flops'], step)


@exit_on_reported_error
def main() -> None:
  """Times the variants and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--config', required=True, help='config file, without a variant')
  parser.add_argument('--data_dir', required=True, help='prepared data, with features')
  parser.add_argument('--variants', default='sasrec,text,multimodal', help='the first is the base')
  parser.add_argument('--rounds', type=int, default=10)
  flags = parser.parse_args()
  spec = importlib.util.spec_from_file_location('config', flags.config)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  variants = {}
  for name in flags.variants.split(','):
    config = module.get_config(name)
    config.data_dir = flags.data_dir
    variants[name] = prepare(config)
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
      'operations_a_user': variant.operations,
      'step_seconds': statistics.median(seconds[name]),
      'ratio': statistics.median(a / b for a, b in zip(seconds[name], base, strict=True)),
    }
    for name, variant in variants.items()
  }
  print(f'{"variant":<12}{"parameters":>12}{"MFLOP a user":>14}{"ms a step":>11}{"ratio":>7}')
  for name, row in rows.items():
    print(
      f'{name:<12}{row["parameters"]:>12,}{row["operations_a_user"] / 1e6:>14.1f}'
      f'{1000 * row["step_seconds"]:>11.0f}{row["ratio"]:>7.2f}'
    )
  print(json.dumps({'device': parallel.describe_devices(), 'variants': rows}))


if __name__ == '__main__':
  main()

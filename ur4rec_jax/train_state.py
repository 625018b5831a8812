"""What a training step reads and returns."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from ur4rec_jax.features import Tables
from ur4rec_jax.input_pipeline import Batch, gather_preferences

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
  """Everything that changes from step to step, and the root of all randomness.

  Attributes:
    step: `[]` int32, optimizer steps taken.
    params: the model's parameters.
    opt_state: the optimizer's state.
    root_key: `[2]` uint32, never changes; step n uses `fold_in(root_key, n)`.
  """

  step: jax.Array
  params: PyTree
  opt_state: optax.OptState
  root_key: jax.Array


def create_train_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  seed: int,
  tables: Tables,
) -> TrainState:
  """Initialises parameters and optimizer, on the default device, from one seed.

  Args:
    model: has `encode`, see `UR4Rec`.
    tx: optimizer.
    seed: of parameters and of everything random in training.
    tables: tokens of items and users; only the width of the tokens matters.
  """

  @jax.jit
  def create() -> TrainState:
    one_row = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), tables)
    init_key, root_key = jax.random.split(jax.random.key(seed))
    ones, zeros = jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    preferences = gather_preferences(one_row.users, Batch(ones, ones, ones, ones, zeros))
    params = model.init(init_key, one_row.items, ones, ones, preferences, method='encode')['params']
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, tx.init(params), jax.random.key_data(root_key))

  return create()

"""What a training step reads and returns."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ur4rec_jax.features import TokenTable

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
  features: dict[str, TokenTable],
) -> TrainState:
  """Initialises parameters and optimizer, on the default device, from one seed.

  Args:
    model: has `encode(features, item_ids, segment_ids)`.
    tx: optimizer.
    seed: of parameters and of everything random in training.
    features: by modality; only the width of their tokens matters.
  """
  one_item = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), features)

  @jax.jit
  def create() -> TrainState:
    init_key, root_key = jax.random.split(jax.random.key(seed))
    ones = jnp.ones((1, 1), jnp.int32)
    params = model.init(init_key, one_item, ones, ones, method='encode')['params']
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, tx.init(params), jax.random.key_data(root_key))

  return create()

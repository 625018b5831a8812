"""AdamW with warmup, cosine decay and clipping, or plain SGD to compare devices with."""

import re

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

# Weight decay is for matrices that mix features, not for scales, offsets and lookup tables.
_NO_DECAY = re.compile(r'(bias|scale|embedding)$')


def decay_mask(params) -> dict:
  """Marks with True the parameters that weight decay applies to."""

  def decays(path, _):
    return not _NO_DECAY.search(jax.tree_util.keystr(path, simple=True, separator='/'))

  return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate_schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
  """Linear warmup over `warmup_steps`, then constant, or cosine down to zero at `total_steps`."""
  decay = {
    'constant': lambda progress: 1.0,
    'cosine': lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
  }[config.schedule]

  def schedule(step):
    warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.learning_rate * warmup * decay(jnp.clip(progress, 0.0, 1.0))

  return schedule


def create_optimizer(config: ConfigDict, total_steps: int) -> optax.GradientTransformation:
  """Builds the optimizer named by `config.name`, clipping by global norm first."""
  schedule = learning_rate_schedule(config, total_steps)
  if config.name == 'adamw':
    update = optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    )
  else:
    update = optax.sgd(schedule)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, update)

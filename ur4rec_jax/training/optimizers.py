"""AdamW, or SGD for comparison, with a separate optimizer for each group of parameters.

Only active groups change. An inactive group keeps its parameters, moments and counts, bit for bit.
A learning rate of 0 or zero gradients would not do this, as both let the moments decay, and
`optax.conditionally_mask` counts calls while it is off.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Array = jax.Array
PyTree = Any
# A parameter belongs to the first group whose pattern matches the beginning of its name.
GROUPS = {
  'sasrec': re.compile(r'sasrec/'),
  'user_tower': re.compile(r'retriever/(user_tower/|log_temperature$)'),
  'content_tower': re.compile(r'retriever/'),
  'fusion': re.compile(r'fusion/'),
  'loss': re.compile(r'log_temperature$|log_variance_|matching_(scale|bias)$'),
}
SCHEDULES = ('constant', 'cosine')
# Weight decay is for matrices that mix features, not for scales, offsets, learned tokens and lookup
# tables. It would pull a learned temperature or loss weight to 1.
_NO_DECAY = re.compile(r'(bias|scale|embedding|_query|proxies)$|(^|/)log_\w+$')


def by_name(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """Returns the leaves of a tree, such as parameters, by name: `a/b/c`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in leaves}


def group_of(name: str) -> str:
  """Returns the group of a parameter by its name, `a/b/c`.

  Raises:
    ValueError: the name matches no group in `GROUPS`.
  """
  for group, pattern in GROUPS.items():
    if pattern.match(name):
      return group
  raise ValueError(f'parameter {name} belongs to no group of {", ".join(GROUPS)}')


def decay_mask(params) -> dict:
  """Returns a tree with True for the parameters that weight decay applies to."""

  def decays(path, _):
    return not _NO_DECAY.search(jax.tree_util.keystr(path, simple=True, separator='/'))

  return jax.tree_util.tree_map_with_path(decays, params)


class RateSchedule(NamedTuple):
  """The numbers of a learning rate schedule.

  Attributes:
    peak: `[]` float32, learning rate after warmup.
    warmup_steps: `[]` int32.
    total_steps: `[]` int32, the step at which a cosine reaches zero.
    is_cosine: `[]` bool; False keeps the rate constant after warmup.
  """

  peak: Array
  warmup_steps: Array
  total_steps: Array
  is_cosine: Array


def learning_rate_at(step: Array, rate: RateSchedule) -> Array:
  """Returns the learning rate of a step: linear warmup, then constant or a cosine down to zero."""
  warmup = jnp.minimum(1.0, (step + 1) / jnp.maximum(rate.warmup_steps, 1))
  progress = (step - rate.warmup_steps) / jnp.maximum(rate.total_steps - rate.warmup_steps, 1)
  cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
  return rate.peak * warmup * jnp.where(rate.is_cosine, cosine, 1.0)


def create_optimizer(config: ConfigDict, labels: PyTree) -> optax.GradientTransformationExtraArgs:
  """Builds the optimizer named by `config.name`, one for all stages.

  Args:
    config: `config.optimizer`.
    labels: tree with the label of each parameter, from `stages.make_stages`. Parameters with the
      same label are trained together, and clipped together by their global norm.

  Returns:
    An optimizer whose `update` takes three more arguments: `learning_rate`; `active`, by label
    whether its parameters are trained; and `norm`, a function that returns the norm of gradients,
    because a device may hold only a part of them.
  """

  def of_label(label: str) -> optax.GradientTransformationExtraArgs:
    scale = config.learning_rate_scales[label.partition('-')[0]]
    parts = [_clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == 'adamw':
      parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2))
      parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    return _while_active(optax.chain(*parts, _scale_by_learning_rate(scale)), label)

  return optax.multi_transform(
    {label: of_label(label) for label in sorted(set(jax.tree.leaves(labels)))}, labels
  )


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """Clips like `optax.clip_by_global_norm`, but with the norm function passed to `update`."""

  def update(updates, state, params=None, *, norm=optax.tree.norm, **extra_args):
    length = norm(updates)
    clip = lambda g: jnp.where(length < max_norm, g, g / length.astype(g.dtype) * max_norm)
    return jax.tree.map(clip, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _scale_by_learning_rate(scale: float) -> optax.GradientTransformationExtraArgs:
  def update(updates, state, params=None, *, learning_rate, **extra_args):
    rate = -scale * learning_rate
    return jax.tree.map(lambda g: jnp.asarray(rate, g.dtype) * g, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _while_active(
  inner: optax.GradientTransformationExtraArgs, label: str
) -> optax.GradientTransformationExtraArgs:
  def update(updates, state, params=None, *, active, **extra_args):
    return jax.lax.cond(
      active[label],
      lambda: inner.update(updates, state, params, **extra_args),
      lambda: (jax.tree.map(jnp.zeros_like, updates), state),
    )

  return optax.GradientTransformationExtraArgs(inner.init, update)

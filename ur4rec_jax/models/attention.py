"""Attention: which keys a query may attend to, and the fastest way on each kind of device.

`masked_attention` is the definition. `self_attention` and `cross_attention` compute the same with
cuDNN on GPU where it can be used, and in one kernel on TPU (`attention_kernel.py`). On CPU,
self-attention is computed in causal blocks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ur4rec_jax.models.layers import take_positions
from ur4rec_jax.sharding import devices

Array = jax.Array
QUERY_BLOCK = 64  # Most queries of a block on CPU. A block skips the keys after its last query.


class Visible(NamedTuple):
  """A mask in compact form: a key is visible to queries at positions `since` to `until - 1`.

  Two numbers per key express every mask of this project, so no full mask is kept in memory: causal
  within a segment, without items that lack a modality, or a user's text for the user's positions.

  Attributes:
    since: `[batch, keys]` int32.
    until: `[batch, keys]` int32; a key with `until <= since` is visible to no query.
  """

  since: Array
  until: Array

  def mask(self, queries: int | Array) -> Array:
    """Returns True where a query may attend to a key.

    Args:
      queries: the number of positions, or `[batch, queries]` positions.

    Returns:
      `[batch, queries, keys]` bool.
    """
    if isinstance(queries, jax.Array):
      positions = queries[..., None]
    else:
      positions = jnp.arange(queries, dtype=jnp.int32)[None, :, None]
    return (self.since[:, None] <= positions) & (positions < self.until[:, None])

  def sees_any(self, queries: int | Array) -> Array:
    """Returns `[batch, queries]` bool: whether a query, given as in `mask`, sees a key."""
    return self.mask(queries).any(-1)


def visible_history(segment_ids: Array, window: int = 0) -> Visible:
  """Lets each position attend to itself and to earlier positions of its segment.

  Padding attends to padding, so that every query sees a key. These outputs are never used.

  Args:
    segment_ids: `[batch, length]`, equal along one user's contiguous tokens, 0 for padding.
    window: number of positions that a query sees, itself included; 0 for all of its segment.
  """
  position = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
  ends = segment_ends(segment_ids)
  return Visible(position, jnp.minimum(ends, position + window) if window else ends)


def segment_ends(segment_ids: Array) -> Array:
  """Returns for each token `[batch, length]` the position after the end of its segment."""
  length = segment_ids.shape[1]
  is_last = jnp.concatenate(
    [segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)], axis=1
  )
  after = jnp.arange(1, length + 1, dtype=jnp.int32)
  return jax.lax.cummin(jnp.where(is_last, after, length), axis=1, reverse=True)


def visible_memory(mask: Array, queries: int) -> Visible:
  """Lets all of `queries` queries attend to the keys whose `mask` `[batch, keys]` is True."""
  return Visible(jnp.zeros(mask.shape, jnp.int32), jnp.where(mask, queries, 0))


@jax.named_scope('attention')  # Profiles then tell it from the dense layer before it.
def self_attention(
  query_key_value: Array, visible: Visible, num_heads: int, window: int = 0
) -> Array:
  """Lets the tokens of each history attend to themselves and to earlier ones.

  Args:
    query_key_value: `[batch * length, 3 * dim]`, queries, keys and values side by side.
    visible: `[batch, length]`; each query sees itself, and no key that comes after it.
    num_heads: attention heads; divides `dim`.
    window: most positions that a query sees according to `visible`; 0 for no limit. On CPU, most
      scores outside the window are not computed.

  Returns:
    `[batch * length, dim]`.
  """
  batch, length = visible.since.shape
  if _has_kernel(visible):
    return _in_kernel([query_key_value], [visible], ((0,),), num_heads)[0]
  parts = query_key_value.reshape(batch, length, 3, num_heads, -1)
  query, key, value = jnp.moveaxis(parts, 2, 0)
  if _has_cudnn(query, key):
    mixed = _cudnn(query, key, value, visible.mask(length))
  else:
    mixed = causal_attention(query, key, value, visible, window)
  return mixed.reshape(batch * length, -1)


@jax.named_scope('attention')
def cross_attention(
  tokens: Mapping[str, Array],
  memory: Mapping[str, Array],
  visible: Mapping[str, Visible],
  num_heads: int,
  query_positions: Array | None = None,
) -> dict[str, Array]:
  """Lets the tokens of each modality attend to those of all other modalities and of the memory.

  Args:
    tokens: by modality `[batch * length, 3 * dim]`, queries, keys and values side by side.
    memory: by name `[batch * length, 2 * dim]`, keys and values side by side.
    visible: by name, for `tokens` and `memory`, `[batch, length]`.
    num_heads: attention heads; divides `dim`.
    query_positions: `[batch, queries]`, the query positions to compute; None for all.

  Returns:
    By modality `[batch * queries, dim]`, finite but meaningless for a query that sees nothing.
  """
  names = [*tokens, *memory]
  others = {name: [other for other in names if other != name] for name in tokens}
  lengths = {visible[name].since.shape[1] for name in tokens}
  if query_positions is None and len(lengths) == 1 and _has_kernel(*visible.values()):
    reads = tuple(tuple(names.index(other) for other in others[name]) for name in tokens)
    sources = [*tokens.values(), *memory.values()]
    mixed = _in_kernel(sources, [visible[name] for name in names], reads, num_heads)
    return dict(zip(tokens, mixed, strict=True))
  batch = visible[names[0]].since.shape[0]
  heads = lambda x: x.reshape(batch, -1, num_heads, x.shape[-1] // num_heads)
  queries, keys, values = {}, {}, {}
  for name, x in {**tokens, **memory}.items():
    *query, keys[name], values[name] = map(heads, jnp.split(x, 3 if name in tokens else 2, axis=-1))
    queries[name] = [take_positions(q, query_positions) for q in query]
  result = {}
  for name in tokens:
    (query,) = queries[name]
    key, value = (
      jnp.concatenate([parts[o] for o in others[name]], axis=1) for parts in (keys, values)
    )
    positions = query.shape[1] if query_positions is None else query_positions
    mask = jnp.concatenate([visible[o].mask(positions) for o in others[name]], axis=2)
    mix = _cudnn if _has_cudnn(query, key) else masked_attention
    mixed = mix(query, key, value, mask)
    result[name] = mixed.reshape(-1, tokens[name].shape[1] // 3)
  return result


def masked_attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), softmax in float32.

  Args:
    query: `[batch, queries, heads, width]`.
    key: `[batch, keys, heads, width]`.
    value: `[batch, keys, heads, width]`.
    mask: `[batch, queries, keys]`, True where query i may attend to key j.

  Returns:
    `[batch, queries, heads, width]` in the type of `value`. A query that may see nothing gets the
    average of all values.
  """
  return _joined(_attend(*map(_separate, (query, key, value)), mask), query.shape[2])


def causal_attention(
  query: Array, key: Array, value: Array, visible: Visible, window: int = 0
) -> Array:
  """Computes `masked_attention` for a causal mask, and skips most of the masked scores.

  Args:
    query: `[batch, length, heads, width]`.
    key: `[batch, length, heads, width]`.
    value: `[batch, length, heads, width]`.
    visible: `[batch, length]`; no query sees a later key.
    window: see `self_attention`.
  """
  length, num_heads = query.shape[1:3]
  mask = visible.mask(length)
  if not isinstance(length, int):  # Exported programs take any length, so blocks cannot be counted.
    return masked_attention(query, key, value, mask)
  query, key, value = map(_separate, (query, key, value))
  size = math.ceil(length / math.ceil(length / QUERY_BLOCK))
  blocks = []
  for start in range(0, length, size):
    end = start + size
    first = max(0, start + 1 - window) if window else 0
    blocks.append(
      _attend(
        query[:, start:end], key[:, first:end], value[:, first:end], mask[:, start:end, first:end]
      )
    )
  return _joined(jnp.concatenate(blocks, axis=1), num_heads)


def _separate(x: Array) -> Array:
  """Makes one sequence of each head: `[batch * heads, length, width]` of `[batch, length, ...]`."""
  return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])


def _joined(x: Array, num_heads: int) -> Array:
  """Undoes `_separate`."""
  return jnp.moveaxis(x.reshape(-1, num_heads, *x.shape[1:]), 1, 2)


@jax.custom_vjp
def _attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Computes `masked_attention` for separate heads.

  The gradient is written by hand: of the derived one, XLA on CPU computes some products twice, and
  transposes the weights for others. One axis for rows and heads is faster there than two.
  """
  return _attend_forward(query, key, value, mask)[0]


def _attend_forward(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, tuple]:
  # A finite number, so that a query without visible keys gives an average instead of NaN.
  scores = _products(query, key, 2, 2) * query.shape[-1] ** -0.5
  scores = _where_visible(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - scores.max(-1, keepdims=True))
  total = weights.sum(-1, keepdims=True)
  weights = weights.astype(value.dtype)
  # Normalised after the product, whose result is smaller than the weights.
  mixed = _products(weights, value, 2, 1) / total
  return mixed.astype(value.dtype), (query, key, value, mask, weights, total, mixed)


def _attend_backward(residuals: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
  query, key, value, mask, weights, total, mixed = residuals
  gradient = gradient / total
  along = (gradient * mixed).sum(-1, keepdims=True)
  gradient = gradient.astype(value.dtype)
  of_scores = weights * (_products(gradient, value, 2, 2) - along)
  # A query without visible keys has weights all the same, but they do not depend on its scores.
  of_scores = _where_visible(mask, of_scores, 0).astype(query.dtype)
  scale = query.shape[-1] ** -0.5
  return (
    (_products(of_scores, key, 2, 1) * scale).astype(query.dtype),
    (_products(of_scores, query, 1, 1) * scale).astype(key.dtype),
    _products(weights, gradient, 1, 1).astype(value.dtype),
    None,
  )


def _where_visible(mask: Array, scores: Array, other: float) -> Array:
  """Keeps the scores of separate heads where `mask` `[batch, queries, keys]` is True."""
  by_head = scores.reshape(mask.shape[0], -1, *scores.shape[1:])
  return jnp.where(mask[:, None], by_head, other).reshape(scores.shape)


def _products(left: Array, right: Array, of_left: int, of_right: int) -> Array:
  """Multiplies the matrices of each row, summed over one axis of each, in float32."""
  dimensions = ((of_left,), (of_right,)), ((0,), (0,))
  return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


_attend.defvjp(_attend_forward, _attend_backward)


def _has_kernel(*visible: Visible) -> bool:
  """Whether the TPU kernel can run; not in exported programs, whose lengths are symbolic."""
  sizes = [size for x in visible for size in x.since.shape]
  return devices.platform() == 'tpu' and all(isinstance(size, int) for size in sizes)


def _in_kernel(
  sources: Sequence[Array],
  visible: Sequence[Visible],
  reads: tuple[tuple[int, ...], ...],
  num_heads: int,
) -> list[Array]:
  from ur4rec_jax.models import attention_kernel  # Importing Pallas takes a second.

  mix = attention_kernel.Mix(
    reads, tuple(x.since.shape[1] for x in visible), sources[0].shape[1] // 3, num_heads
  )
  return attention_kernel.fused_attention(mix, [jnp.stack(x, axis=1) for x in visible], sources)


def _has_cudnn(query: Array, key: Array) -> bool:
  """Whether cuDNN's fused attention supports these shapes with a mask."""
  lengths = query.shape[1], key.shape[1]
  return (
    devices.platform() == 'gpu'
    and devices.compute_capability() >= 8
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and query.shape[3] % 8 == 0
    and query.shape[3] <= 128
    and all(isinstance(length, int) and length % 2 == 0 for length in lengths)
  )


def _cudnn(query: Array, key: Array, value: Array, mask: Array) -> Array:
  return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation='cudnn')

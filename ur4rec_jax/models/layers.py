"""Layers that several models share."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur4rec_jax.sharding import devices

Array = jax.Array


def take_positions(x: Array, query_positions: Array | None) -> Array:
  """Takes `query_positions` `[batch, queries]` of `x` `[batch, length, ...]`; None takes all."""
  if query_positions is None:
    return x
  return jnp.take_along_axis(
    x, query_positions.reshape(*query_positions.shape, *[1] * (x.ndim - 2)), axis=1
  )


@jax.custom_vjp
def take_rows(table: Array, ids: Array) -> Array:
  """Takes the rows `ids` `[...]` of `table` `[rows, ...]`; sums a row's gradients in float32.

  In bfloat16 a sum stops growing once it is 256 times as large as what is added.
  """
  # As one wide row: accelerators are slow at many narrow ones, and pad them to 128 values.
  wide = table.reshape(table.shape[0], math.prod(table.shape[1:]))
  return wide[ids].reshape(*ids.shape, *table.shape[1:])


def _take_rows_forward(table: Array, ids: Array) -> tuple[Array, tuple]:
  return take_rows(table, ids), (ids, jnp.zeros((table.shape[0], 0), table.dtype))


def _take_rows_backward(residuals: tuple, gradient: Array) -> tuple[Array, None]:
  ids, like = residuals
  shape = gradient.shape[ids.ndim :]
  wide = gradient.astype(jnp.float32).reshape(*ids.shape, math.prod(shape))
  total = jnp.zeros((like.shape[0], math.prod(shape)), jnp.float32).at[ids].add(wide)
  return total.astype(like.dtype).reshape(-1, *shape), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


class TokenProjection(nn.Module):
  """Projects frozen tokens to the width of the model: dense, layer norm, GELU, dropout.

  Attributes:
    dim: width of the output.
    dropout: rate.
    dtype: computation type; parameters and reductions stay float32.
  """

  dim: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: Array, *, deterministic: bool) -> Array:
    """Returns `[..., dim]` from `[..., width]`."""
    # Flattened, because XLA on CPU is slow at gradients of dense layers over [rows, tokens, width].
    flat = tokens.astype(self.dtype).reshape(-1, tokens.shape[-1])
    h = nn.LayerNorm(dtype=self.dtype, name='norm')(
      nn.Dense(self.dim, dtype=self.dtype, name='dense')(flat)
    )
    h = Dropout(self.dropout, deterministic=deterministic)(nn.gelu(h))
    return h.reshape(*tokens.shape[:-1], self.dim)


class Dropout(nn.Module):
  """Dropout (Srivastava et al. 2014) with 8 random bits per value; `nn.Dropout` draws 32.

  Attributes:
    rate: share of values set to zero, to the nearest 1/256.
    deterministic: True returns the input.
  """

  rate: float
  deterministic: bool | None = None

  @nn.compact
  def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
    """Sets values of `x` `[...]` to zero at random and scales up the others."""
    deterministic = nn.merge_param('deterministic', self.deterministic, deterministic)
    dropped = min(round(self.rate * 256), 255)
    if deterministic or not dropped:
      return x
    keep = _keep(self.make_rng('dropout'), x.shape, dropped)
    return jnp.where(keep, x * (256 / (256 - dropped)), 0).astype(x.dtype)


def _keep(key: Array, shape: tuple[int, ...], dropped: int) -> Array:
  """Returns `shape` bool, False with probability `dropped` / 256; one word decides four values."""
  if devices.platform() == 'cpu':
    words = jax.random.bits(key, (-(-math.prod(shape) // 4),), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)
    return draws[: math.prod(shape)].reshape(shape) >= dropped
  # A TPU stores arrays in tiles of 8 x 128 values. Four neighbours from one word would have to be
  # moved between tiles, so the four bytes of a word go to four different parts of the array.
  words = jax.random.bits(key, (-(-shape[0] // 4), *shape[1:]), jnp.uint32)
  parts = [(words >> shift & 255) >= dropped for shift in (0, 8, 16, 24)]
  return jnp.concatenate(parts)[: shape[0]]

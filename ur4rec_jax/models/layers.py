"""Layers that several models share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def take_positions(x: Array, query_positions: Array | None) -> Array:
  """Takes `query_positions` `[batch, queries]` of `x` `[batch, length, ...]`; None takes all."""
  if query_positions is None:
    return x
  return jnp.take_along_axis(
    x, query_positions.reshape(*query_positions.shape, *[1] * (x.ndim - 2)), axis=1
  )


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
  """Dropout (Srivastava et al. 2014) with 8 random bits a value instead of 32 as in `nn.Dropout`.

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
    words = jax.random.bits(self.make_rng('dropout'), (-(-x.size // 4),), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(draws >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)

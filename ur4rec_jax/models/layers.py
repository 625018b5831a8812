"""Layers that several models share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Dropout(nn.Module):
  """Dropout (Srivastava et al. 2014) on 16 random bits a value, half of what `nn.Dropout` draws.

  Attributes:
    rate: share of values set to zero, to the nearest 1/65536.
    deterministic: True returns the input.
  """

  rate: float
  deterministic: bool | None = None

  @nn.compact
  def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
    """Zeroes values of `x` `[...]` at random and scales up the others."""
    deterministic = nn.merge_param('deterministic', self.deterministic, deterministic)
    dropped = min(round(self.rate * 65536), 65535)
    if deterministic or not dropped:
      return x
    words = jax.random.bits(self.make_rng('dropout'), ((x.size + 1) // 2,), jnp.uint32)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16])[: x.size].reshape(x.shape)
    return jnp.where(halves >= dropped, x * (65536 / (65536 - dropped)), 0).astype(x.dtype)

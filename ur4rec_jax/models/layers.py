"""Layers that several models share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
QUERY_BLOCK = 64  # Queries that see keys up to the last of them.


def masked_attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), softmax in float32.

  Dividing after the value product instead of before halves the forward time on CPU: normalised
  weights are never written out.

  Args:
    query: `[batch, queries, heads, width]`; `key` and `value` alike with their own length.
    mask: `[batch, queries, keys]`, True where query i may see key j.

  Returns:
    `[batch, queries, heads, width]` in the type of `value`; an average of all values for a query
    that may see nothing.
  """
  scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32)
  # Finite, so that a row with nothing to see gives an average instead of NaN.
  scores = jnp.where(mask[:, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  total = weights.sum(-1)
  mixed = jnp.einsum(
    'bhqk,bkhd->bqhd', weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  return (mixed / total.transpose(0, 2, 1)[..., None]).astype(value.dtype)


def causal_attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Does what `masked_attention` does, without most of what a causal mask would only blank out.

  Args:
    query: `[batch, length, heads, width]`; `key` and `value` alike.
    mask: `[batch, length, length]`, False wherever a query comes before the key.
  """
  length = query.shape[1]
  if not isinstance(length, int):  # exported programs take any length: it has no blocks to count
    return masked_attention(query, key, value, mask)
  ends = range(QUERY_BLOCK, length + QUERY_BLOCK, QUERY_BLOCK)
  blocks = [
    masked_attention(
      query[:, end - QUERY_BLOCK : end],
      key[:, :end],
      value[:, :end],
      mask[:, end - QUERY_BLOCK : end, :end],
    )
    for end in ends
  ]
  return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def take_positions(x: Array, query_positions: Array | None) -> Array:
  """Takes `query_positions` `[batch, queries]` of `x` `[batch, length, ...]`; None takes all."""
  if query_positions is None:
    return x
  return jnp.take_along_axis(
    x, query_positions.reshape(*query_positions.shape, *[1] * (x.ndim - 2)), axis=1
  )


class TokenProjection(nn.Module):
  """Projects frozen tokens into the space of the model: dense, layer norm, GELU, dropout.

  Attributes:
    dim: width of the space.
    dropout: rate.
    dtype: computation type; parameters and reductions stay float32.
  """

  dim: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: Array, *, deterministic: bool) -> Array:
    """Returns `[..., dim]` from `[..., width]`."""
    # Flat, because XLA on CPU is slow at gradients of dense layers over [rows, tokens, width].
    flat = tokens.astype(self.dtype).reshape(-1, tokens.shape[-1])
    h = nn.LayerNorm(dtype=self.dtype, name='norm')(
      nn.Dense(self.dim, dtype=self.dtype, name='dense')(flat)
    )
    h = Dropout(self.dropout, deterministic=deterministic)(nn.gelu(h))
    return h.reshape(*tokens.shape[:-1], self.dim)


class Dropout(nn.Module):
  """Dropout (Srivastava et al. 2014) on 8 random bits a value; `nn.Dropout` draws 32.

  Attributes:
    rate: share of values set to zero, to the nearest 1/256.
    deterministic: True returns the input.
  """

  rate: float
  deterministic: bool | None = None

  @nn.compact
  def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
    """Zeroes values of `x` `[...]` at random and scales up the others."""
    deterministic = nn.merge_param('deterministic', self.deterministic, deterministic)
    dropped = min(round(self.rate * 256), 255)
    if deterministic or not dropped:
      return x
    words = jax.random.bits(self.make_rng('dropout'), (-(-x.size // 4),), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    return jnp.where(draws >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)

"""Layers that several models share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
QUERY_BLOCK = 64  # Queries in a block; they are compared only with keys up to the last of them.


def masked_attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), softmax in float32.

  The division by the total follows the product with the values. On CPU this halves the time of the
  forward pass, because normalised weights are never written to memory.

  Args:
    query: `[batch, queries, heads, width]`; `key` and `value` alike with their own length.
    mask: `[batch, queries, keys]`, True where query i may attend to key j.

  Returns:
    `[batch, queries, heads, width]` in the type of `value`. A query that may see nothing gets the
    average of all values.
  """
  scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32)
  # A finite number, so that a query without visible keys gives an average instead of NaN.
  scores = jnp.where(mask[:, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  total = weights.sum(-1)
  mixed = jnp.einsum(
    'bhqk,bkhd->bqhd', weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  return (mixed / total.transpose(0, 2, 1)[..., None]).astype(value.dtype)


def causal_attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Computes `masked_attention` for a causal mask, without most of the masked scores.

  Args:
    query: `[batch, length, heads, width]`; `key` and `value` alike.
    mask: `[batch, length, length]`, False wherever a query comes before the key.
  """
  length = query.shape[1]
  if not isinstance(length, int):  # Exported programs take any length, so blocks cannot be counted.
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

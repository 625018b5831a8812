"""Attention between the tokens of several modalities, and pooling of tokens into vectors."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from ur4rec_jax.models.attention import Visible, cross_attention
from ur4rec_jax.models.layers import Dropout, take_positions

Array = jax.Array


class CrossModalBlock(nn.Module):
  """Lets the tokens of every modality attend to those of all others; then a feed-forward network.

  Text attends to pictures and pictures to text (Lu et al., ViLBERT, NeurIPS 2019, here for any
  number of modalities). Both sublayers normalise their input and add their output to the tokens, so
  a token that may attend to nothing keeps its value.

  Attributes:
    num_heads: attention heads; divides the tokens' width.
    dropout: rate on the outputs of both sublayers.
    dtype: computation type; parameters and reductions stay float32.
  """

  num_heads: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    tokens: Mapping[str, Array],
    visible: Mapping[str, Visible],
    memory: Mapping[str, Array] = FrozenDict(),
    *,
    deterministic: bool,
    query_positions: Array | None = None,
  ) -> dict[str, Array]:
    """Returns the new tokens, in the shapes of `tokens`.

    Args:
      tokens: by modality, `[rows, tokens, dim]`; the number of tokens may differ.
      visible: by name, for `tokens` and `memory`, `[rows, tokens]`: which queries of other
        modalities may attend to each token.
      memory: by name, `[rows, tokens, dim]` tokens that are attended to and do not change.
      deterministic: False applies dropout, with the `dropout` key.
      query_positions: `[rows, queries]`, the tokens of each modality to return; None for all.
    """
    dropout = Dropout(self.dropout, deterministic=deterministic)

    dense = lambda x, width, name: nn.Dense(width, dtype=self.dtype, name=name)(x)
    norm = lambda x, name: nn.LayerNorm(dtype=self.dtype, name=name)(x)

    def projected(x: Array, name: str, *parts: str) -> Array:
      x = norm(x.reshape(-1, x.shape[-1]), f'{name}_attention_norm')
      return dense(x, len(parts) * x.shape[-1], f'{name}_{"_".join(parts)}')

    mixed = {}
    if len(tokens) + len(memory) > 1:
      mixed = cross_attention(
        {name: projected(x, name, 'query', 'key', 'value') for name, x in tokens.items()},
        {name: projected(x, name, 'key', 'value') for name, x in memory.items()},
        visible,
        self.num_heads,
        query_positions,
      )
    result = {}
    for name, x in tokens.items():
      x = take_positions(x, query_positions)
      shape, dim = x.shape, x.shape[-1]
      # Flattened, because XLA on CPU is slow at gradients of dense layers over [rows, tokens, dim],
      # and on TPU it would copy each array from one shape to the other.
      x = x.reshape(-1, dim)
      if mixed:
        change = dropout(dense(mixed[name], dim, f'{name}_attention_out'))
        positions = shape[1] if query_positions is None else query_positions
        sees = [visible[other].sees_any(positions) for other in visible if other != name]
        x = x + jnp.where(functools.reduce(jnp.logical_or, sees).reshape(-1, 1), change, 0)
      h = dense(norm(x, f'{name}_ffn_norm'), 2 * dim, f'{name}_ffn_in')
      x = x + dropout(dense(nn.gelu(h), dim, f'{name}_ffn_out'))
      result[name] = x.reshape(shape)
    return result


class AttentionPool(nn.Module):
  """Pools tokens into K vectors; each is an average weighted by its own softmax over the tokens.

  Attributes:
    num_vectors: K.
    dtype: computation type; the softmax is float32.
  """

  num_vectors: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: Array, mask: Array) -> Array:
    """Returns `[rows, num_vectors, dim]` from `[rows, tokens, dim]` and `[rows, tokens]`.

    A row whose tokens are all masked gives their average, which is finite; the caller ignores it.
    """
    rows, num_tokens, dim = tokens.shape
    logits = nn.Dense(self.num_vectors, dtype=self.dtype, name='logits')(tokens.reshape(-1, dim))
    logits = logits.reshape(rows, num_tokens, -1).astype(jnp.float32)
    logits = jnp.where(mask[..., None], logits, jnp.finfo(jnp.float32).min)
    weights = nn.softmax(logits, axis=1).astype(self.dtype)
    return jnp.einsum('rtk,rtd->rkd', weights, tokens)

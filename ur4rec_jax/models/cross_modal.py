"""Attention between the tokens of several modalities, and pooling of tokens into vectors."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from ur4rec_jax.models.layers import Dropout, masked_attention, take_positions

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
    visible: Mapping[str, Array],
    memory: Mapping[str, Array] = FrozenDict(),
    *,
    deterministic: bool,
    query_positions: Array | None = None,
  ) -> dict[str, Array]:
    """Returns the new tokens, in the shapes of `tokens`.

    Args:
      tokens: by modality, `[rows, tokens, dim]`; the number of tokens may differ.
      visible: by modality, also those in `memory`: which of its tokens other modalities may attend
        to, `[rows, tokens]` for all queries alike or `[rows, queries, tokens]`.
      memory: tokens of the same form, which are attended to and do not change.
      deterministic: False applies dropout, with the `dropout` key.
      query_positions: `[rows, queries]`, the tokens of each modality to return; None for all.
    """
    dropout = Dropout(self.dropout, deterministic=deterministic)

    def dense(x: Array, width: int, name: str) -> Array:
      # Flattened, because XLA on CPU is slow at gradients of dense layers over [rows, tokens, dim].
      flat = nn.Dense(width, dtype=self.dtype, name=name)(x.reshape(-1, x.shape[-1]))
      return flat.reshape(*x.shape[:-1], width)

    norm = lambda x, name: nn.LayerNorm(dtype=self.dtype, name=name)(x)
    heads = lambda x: x.reshape(*x.shape[:2], self.num_heads, -1)
    queries, keys, values = {}, {}, {}
    for name, x in {**tokens, **memory}.items():
      parts = ('query', 'key', 'value') if name in tokens else ('key', 'value')
      projected = dense(
        norm(x, f'{name}_attention_norm'), len(parts) * x.shape[-1], f'{name}_{"_".join(parts)}'
      )
      *query, keys[name], values[name] = map(heads, jnp.split(projected, len(parts), axis=-1))
      queries[name] = [take_positions(q, query_positions) for q in query]
    result = {}
    for name, x in tokens.items():
      x = take_positions(x, query_positions)
      others = [other for other in keys if other != name]
      if others:
        join = lambda parts, others=others: jnp.concatenate([parts[o] for o in others], axis=1)
        mask = jnp.concatenate(
          [
            jnp.broadcast_to(
              take_positions(visible[o], query_positions)
              if visible[o].ndim == 3
              else visible[o][:, None],
              (x.shape[0], x.shape[1], keys[o].shape[1]),
            )
            for o in others
          ],
          axis=2,
        )
        mixed = masked_attention(*queries[name], join(keys), join(values), mask).reshape(x.shape)
        mixed = dropout(dense(mixed, x.shape[-1], f'{name}_attention_out'))
        x = x + jnp.where(mask.any(-1, keepdims=True), mixed, 0)
      h = dense(norm(x, f'{name}_ffn_norm'), 2 * x.shape[-1], f'{name}_ffn_in')
      result[name] = x + dropout(dense(nn.gelu(h), x.shape[-1], f'{name}_ffn_out'))
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

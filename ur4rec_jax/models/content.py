"""Frozen token embeddings of items -> one content vector an item."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur4rec_jax.features import TokenTable
from ur4rec_jax.models.layers import Dropout

Array = jax.Array


class ContentEmbedding(nn.Module):
  """Projects each modality's tokens, pools them by attention, and adds the modalities up.

  An item without a modality gets nothing from it, and an item without any the zero vector.

  Attributes:
    dim: width of the result.
    hidden_dim: width in which tokens are compared.
    dropout: rate on hidden tokens.
    dtype: computation type; parameters and reductions stay float32.
  """

  dim: int
  hidden_dim: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, features: Mapping[str, TokenTable], *, deterministic: bool) -> Array:
    """Returns `[items + 1, dim]` from tables with `items + 1` rows each."""
    dense = lambda width, name, **kwargs: nn.Dense(width, dtype=self.dtype, name=name, **kwargs)
    small = nn.initializers.normal(0.02)  # As the item embeddings that this joins.
    total = 0.0
    for name, (tokens, mask) in sorted(features.items()):
      rows, num_tokens, width = tokens.shape
      # Flat, because XLA on CPU is slow at gradients of dense layers over [rows, tokens, width].
      flat = tokens.astype(self.dtype).reshape(-1, width)
      h = nn.LayerNorm(dtype=self.dtype, name=f'{name}_norm')(
        dense(self.hidden_dim, f'{name}_in')(flat)
      )
      h = Dropout(self.dropout)(nn.gelu(h), deterministic=deterministic)
      logits = dense(1, f'{name}_attention')(h).reshape(rows, num_tokens).astype(jnp.float32)
      # Finite, so that an item without tokens gives an average, which is then left out.
      weights = nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min))
      pooled = jnp.einsum('rt,rth->rh', weights.astype(self.dtype), h.reshape(rows, num_tokens, -1))
      out = dense(self.dim, f'{name}_out', kernel_init=small)(pooled)
      total += jnp.where(mask.any(1)[:, None], out, 0)
    return total

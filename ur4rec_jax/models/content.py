"""Frozen token embeddings of items -> content vectors."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur4rec_jax.data.features import TokenTable
from ur4rec_jax.models.cross_modal import AttentionPool, CrossModalBlock
from ur4rec_jax.models.fusion import ModalityFusion
from ur4rec_jax.models.layers import TokenProjection

Array = jax.Array


class Content(NamedTuple):
  """What is known of items from their texts, pictures, ...; modalities in the order of their names.

  Attributes:
    vectors: `[items + 1, dim]`, the modalities joined; zeros for an item without any.
    modalities: `[items + 1, modalities, dim]`, each alone; zeros where it is missing.
    present: `[items + 1, modalities]` bool.
    pooled: `[items + 1, modalities, pooled vectors, hidden_dim]`, before the last dense layer.
  """

  vectors: Array
  modalities: Array
  present: Array
  pooled: Array


class EncodedItems(NamedTuple):
  """A branch's side of all items, made once for all users.

  Attributes:
    vectors: `[items + 1, dim]`, row 0 for padding; what scores compare users with.
    content: what the vectors were made from; None if only from ids.
  """

  vectors: Array
  content: Content | None


def initial_item_embeddings(
  features: Mapping[str, TokenTable], dim: int, scale: float, whitening: float, key: Array
) -> Array:
  """Makes embeddings to begin with of what each item's first token, the one of the whole, says.

  They are the principal components of all modalities side by side, each centred and of the same
  mean square, whitened and turned at random. Items without content get normal random numbers. That
  ids learn better from there, Harte et al. found ("Leveraging Large Language Models for Sequential
  Recommendation", RecSys 2023, section 3.3); they do not whiten.

  Args:
    features: by modality, tables with `items + 1` rows, row 0 masked.
    dim: width.
    scale: root mean square of them all.
    whitening: 0 leaves components as large as they are, 1 makes all equally large: then what tells
      few items apart counts as much as what parts the catalogue in two.
    key: of what is random.

  Returns:
    `[items + 1, dim]` float32.
  """
  parts = []
  for name in sorted(features):
    tokens, mask = (jnp.asarray(x[:, 0]) for x in features[name])
    mask, tokens = mask[:, None], tokens.astype(jnp.float32)
    share = mask / jnp.maximum(mask.sum(), 1)
    centred = jnp.where(mask, tokens - (share * tokens).sum(0), 0)
    parts.append(centred * jax.lax.rsqrt(jnp.maximum((share * centred**2).sum(), 1e-12)))
  rows = jnp.concatenate(parts, axis=1)
  variances, directions = (x[..., -dim:] for x in jnp.linalg.eigh(rows.T @ rows))  # Ascending.
  directions *= jnp.maximum(variances, 1e-6 * variances[-1] + 1e-12) ** (-whitening / 2)
  turn_key, absent_key = jax.random.split(key)
  turn = nn.initializers.orthogonal()(turn_key, (directions.shape[1], dim))
  rows = rows @ directions @ turn
  is_there = rows.any(1, keepdims=True)
  mean_square = (rows**2).sum() / jnp.maximum(is_there.sum() * dim, 1)
  rows *= scale * jax.lax.rsqrt(jnp.maximum(mean_square, 1e-12))
  return jnp.where(is_there, rows, scale * jax.random.normal(absent_key, rows.shape))


class ContentTower(nn.Module):
  """Projects each modality's tokens, lets modalities attend to each other, pools and joins them.

  Attributes:
    dim: width of the vectors.
    hidden_dim: width in which tokens are compared.
    dropout: rate on hidden tokens.
    cross_modal_blocks: layers of attention between modalities; nothing where there is only one.
    num_heads: attention heads in them; divides `hidden_dim`.
    pooled_vectors: vectors that a modality's tokens are pooled into.
    fusion: `add`, `concat` or `gated`, see `ModalityFusion`.
    dtype: computation type; parameters and reductions stay float32.
  """

  dim: int
  hidden_dim: int = 128
  dropout: float = 0.2
  cross_modal_blocks: int = 0
  num_heads: int = 1
  pooled_vectors: int = 1
  fusion: str = 'add'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, features: Mapping[str, TokenTable], *, deterministic: bool) -> Content:
    """Returns the content of all items from tables with `items + 1` rows each."""
    names = sorted(features)
    masks = {name: features[name].mask for name in names}
    rows = len(masks[names[0]])
    project = lambda name: TokenProjection(
      self.hidden_dim, self.dropout, self.dtype, name=f'{name}_projection'
    )
    tokens = {
      name: project(name)(features[name].tokens, deterministic=deterministic) for name in names
    }
    if len(names) > 1:
      for i in range(self.cross_modal_blocks):
        block = CrossModalBlock(self.num_heads, self.dropout, self.dtype, name=f'cross_modal_{i}')
        tokens = block(tokens, masks, deterministic=deterministic)
    pool = lambda name: AttentionPool(self.pooled_vectors, self.dtype, name=f'{name}_attention')
    pooled = {name: pool(name)(tokens[name], masks[name]) for name in names}
    # As small as the item embeddings that these may join.
    small = nn.initializers.normal(0.02)
    vectors = jnp.stack(
      [
        nn.Dense(self.dim, dtype=self.dtype, kernel_init=small, name=f'{name}_out')(
          pooled[name].reshape(rows, -1)
        )
        for name in names
      ],
      axis=1,
    )
    present = jnp.stack([masks[name].any(1) for name in names], axis=1)
    vectors = jnp.where(present[..., None], vectors, 0)
    joined = ModalityFusion(self.fusion, tuple(names), self.dtype, name='fusion')(vectors, present)
    return Content(joined, vectors, present, jnp.stack([pooled[n] for n in names], axis=1))

"""Turns the frozen token embeddings of items into content vectors."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur4rec_jax.data.features import TokenTable
from ur4rec_jax.models.attention import visible_memory
from ur4rec_jax.models.cross_modal import AttentionPool, CrossModalBlock
from ur4rec_jax.models.fusion import ModalityFusion
from ur4rec_jax.models.layers import TokenProjection

Array = jax.Array


class Content(NamedTuple):
  """Item vectors made from texts, pictures and other modalities, in the order of their names.

  Attributes:
    vectors: `[items + 1, dim]`, all modalities joined; zeros for an item without any.
    modalities: `[items + 1, modalities, dim]`, each modality alone; zeros where it is missing.
    present: `[items + 1, modalities]` bool, whether the item has the modality.
    pooled: `[items + 1, modalities, pooled vectors, hidden_dim]`, before the last dense layer.
  """

  vectors: Array
  modalities: Array
  present: Array
  pooled: Array


class EncodedItems(NamedTuple):
  """All items, encoded by one branch once for all users.

  Attributes:
    vectors: `[items + 1, dim]`, row 0 for padding. A score is the inner product of a user's vector
      and an item's.
    content: the content that the vectors were made from; None if they were made from ids alone.
  """

  vectors: Array
  content: Content | None


def initial_item_embeddings(
  features: Mapping[str, TokenTable], dim: int, scale: float, whitening: float, key: Array
) -> Array:
  """Makes initial item embeddings from each item's first token, which stands for the whole content.

  They are the principal components of all modalities side by side, each modality centred and scaled
  to the same mean square, then whitened and rotated at random. Items without content get normal
  random numbers. Embeddings of ids learn better from such a start (Harte et al., "Leveraging Large
  Language Models for Sequential Recommendation", RecSys 2023, section 3.3, without whitening).

  Args:
    features: by modality, tables with `items + 1` rows, row 0 masked.
    dim: width of the embeddings.
    scale: root mean square of all values.
    whitening: 0 keeps the variances of the components, 1 makes them equal. Then a direction that
      tells a few items apart counts as much as one that splits the catalogue in two.
    key: random key.

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
  # At the usual precision of accelerators, the nearest neighbours of some items would be others.
  product = functools.partial(jnp.matmul, precision='highest')
  variances, directions = jnp.linalg.eigh(product(rows.T, rows))  # Ascending.
  variances, directions = variances[-dim:], directions[:, -dim:]
  directions *= jnp.maximum(variances, 1e-6 * variances[-1] + 1e-12) ** (-whitening / 2)
  rotation_key, absent_key = jax.random.split(key)
  rotation = nn.initializers.orthogonal()(rotation_key, (directions.shape[1], dim))
  rows = product(product(rows, directions), rotation)
  is_there = rows.any(1, keepdims=True)
  mean_square = (rows**2).sum() / jnp.maximum(is_there.sum() * dim, 1)
  rows *= scale * jax.lax.rsqrt(jnp.maximum(mean_square, 1e-12))
  return jnp.where(is_there, rows, scale * jax.random.normal(absent_key, rows.shape))


class ContentTower(nn.Module):
  """Encodes the content of items: project tokens, attend across modalities, pool, join.

  Attributes:
    dim: width of the vectors.
    hidden_dim: width in which tokens are compared.
    dropout: rate on hidden tokens.
    cross_modal_blocks: layers of attention between modalities; not used with one modality.
    num_heads: attention heads in them; divides `hidden_dim`.
    pooled_vectors: number of vectors into which the tokens of a modality are pooled.
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
    """Encodes all items from tables with `items + 1` rows each."""
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
      most = max(mask.shape[1] for mask in masks.values())
      visible = {name: visible_memory(mask, most) for name, mask in masks.items()}
      for i in range(self.cross_modal_blocks):
        block = CrossModalBlock(self.num_heads, self.dropout, self.dtype, name=f'cross_modal_{i}')
        tokens = block(tokens, visible, deterministic=deterministic)
    pool = lambda name: AttentionPool(self.pooled_vectors, self.dtype, name=f'{name}_attention')
    pooled = {name: pool(name)(tokens[name], masks[name]) for name in names}
    # These vectors may be added to item embeddings, so they start at the same scale.
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

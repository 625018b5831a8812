"""The multimodal preference retriever: what a user likes, against what items are about."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur4rec_jax.features import TokenTable
from ur4rec_jax.models.content import Content, ContentTower, ItemSide
from ur4rec_jax.models.cross_modal import CrossModalBlock
from ur4rec_jax.models.fusion import ModalityFusion
from ur4rec_jax.models.layers import Dropout
from ur4rec_jax.models.sasrec import Block, causal_mask, segment_positions

Array = jax.Array


def normalised(x: Array) -> Array:
  """Divides by the L2 norm over the last axis; zeros stay zeros, with finite gradients."""
  squares = jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True)
  return (x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))).astype(x.dtype)


class UserTower(nn.Module):
  """Encodes every prefix of a history from the content of its items.

  Per modality a causal transformer, then layers in which the modalities attend to each other, then
  one vector a position. A padded or modality-less item is seen by nobody but itself.

  Attributes: see `Retriever`.
  """

  max_length: int
  dim: int
  num_blocks: int
  num_heads: int
  ffn_dim: int
  dropout: float
  cross_modal_blocks: int
  fusion: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, content: Content, item_ids: Array, segment_ids: Array, *, deterministic: bool
  ) -> Array:
    """Returns `[batch, length, dim]` from `item_ids` and `segment_ids`, `[batch, length]` each."""
    batch, length = item_ids.shape
    flat_ids = item_ids.reshape(-1)
    position_embedding = self.param(
      'position_embedding', nn.initializers.normal(0.02), (self.max_length, self.dim)
    )
    positions = position_embedding[segment_positions(segment_ids).reshape(-1)]
    causal = causal_mask(segment_ids)
    present = content.present[item_ids]
    states, visible = {}, {}
    for i in range(present.shape[-1]):
      visible[i] = causal & present[:, None, :, i]
      x = (content.modalities[flat_ids, i] + positions).astype(self.dtype)
      x = Dropout(self.dropout)(x, deterministic=deterministic)
      for block in range(self.num_blocks):
        sizes = self.dim, self.num_heads, self.ffn_dim, self.dropout, 'pre', self.dtype
        x = Block(*sizes, name=f'modality_{i}_block_{block}')(
          x, visible[i] | jnp.eye(length, dtype=bool), deterministic=deterministic
        )
      states[i] = x.reshape(batch, length, self.dim)
    if len(states) > 1:
      for block in range(self.cross_modal_blocks):
        states = CrossModalBlock(
          self.num_heads, self.dropout, self.dtype, name=f'cross_modal_{block}'
        )(states, visible, deterministic=deterministic)
    norm = lambda i: nn.LayerNorm(dtype=self.dtype, name=f'modality_{i}_norm')
    states = jnp.stack([norm(i)(x).reshape(-1, self.dim) for i, x in states.items()], axis=1)
    has_seen = jnp.stack([mask.any(-1).reshape(-1) for mask in visible.values()], axis=1)
    joined = ModalityFusion(self.fusion, self.dtype, name='fusion')(states, has_seen)
    return joined.reshape(batch, length, self.dim)


class Retriever(nn.Module):
  """Scores items by the cosine of a user's and an item's vector over a learned temperature.

  An item is its content plus an embedding of its id; a user is what the content of the history
  tells.

  Attributes:
    num_items: catalogue size.
    max_length: longest history.
    content: makes item vectors, of width `dim`.
    dim: width of both sides' vectors.
    num_blocks: transformer blocks a modality.
    num_heads: attention heads; divides `dim`.
    ffn_dim: width of the hidden feed-forward layer.
    dropout: rate on history tokens and inside the blocks.
    cross_modal_blocks: layers in which the modalities of the history attend to each other.
    fusion: how a user's modalities are joined: `add`, `concat` or `gated`.
    item_id: whether items get an embedding of their id.
    temperature: what the learned temperature starts from.
    dtype: computation type; parameters and reductions stay float32.
  """

  num_items: int
  max_length: int
  content: ContentTower
  dim: int = 64
  num_blocks: int = 2
  num_heads: int = 1
  ffn_dim: int = 64
  dropout: float = 0.2
  cross_modal_blocks: int = 1
  fusion: str = 'gated'
  item_id: bool = True
  temperature: float = 0.1
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    if self.item_id:
      shape = self.num_items + 1, self.dim
      self.item_embedding = self.param('item_embedding', nn.initializers.normal(0.02), shape)
    self.log_temperature = self.param(
      'log_temperature', nn.initializers.constant(math.log(self.temperature)), ()
    )
    self.user_tower = UserTower(
      self.max_length,
      self.dim,
      self.num_blocks,
      self.num_heads,
      self.ffn_dim,
      self.dropout,
      self.cross_modal_blocks,
      self.fusion,
      self.dtype,
    )

  def item_side(
    self, features: Mapping[str, TokenTable], *, deterministic: bool = True
  ) -> ItemSide:
    """Makes every item's vector, of length 1, once for all users.

    Args:
      features: by modality, tables with `items + 1` rows.
      deterministic: False applies dropout, with the `dropout` key.
    """
    content = self.content(features, deterministic=deterministic)
    vectors = content.vectors
    if self.item_id:
      vectors = vectors + self.item_embedding
    return ItemSide(normalised(vectors), content)

  def user_side(
    self,
    items: ItemSide,
    item_ids: Array,
    segment_ids: Array,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Encodes every prefix of every history.

    Args:
      items: from `item_side`.
      item_ids: `[batch, length]` int32, oldest first, 0 where there is no item.
      segment_ids: `[batch, length]` int32, see `sasrec`.
      deterministic: False applies dropout, with the `dropout` key.

    Returns:
      `[batch, length, dim]`; the inner product with an item's vector is its score, in nats.
    """
    users = self.user_tower(items.content, item_ids, segment_ids, deterministic=deterministic)
    return normalised(users) * jnp.exp(-self.log_temperature).astype(users.dtype)

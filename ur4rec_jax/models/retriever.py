"""The multimodal preference retriever: compares users' preferences with the content of items."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur4rec_jax.data.features import Preferences, TokenTable
from ur4rec_jax.models.content import ContentTower, EncodedItems
from ur4rec_jax.models.user_tower import ProxyTower, UserTower

Array = jax.Array
QUERIES = ('user', 'proxies')


def normalised(x: Array) -> Array:
  """Divides by the L2 norm over the last axis; zeros stay zeros, with finite gradients."""
  squares = jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True)
  return (x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))).astype(x.dtype)


class Retriever(nn.Module):
  """Scores items by the cosine of a user's and an item's vector, over a learned temperature.

  An item's vector is made from its content and, optionally, an embedding of its id. A user's vector
  is made from the items of the history and from the user's own texts.

  Attributes:
    num_items: catalogue size.
    max_length: longest history.
    content: makes item vectors of width `dim`.
    dim: width of user and item vectors.
    query: the tower that reads the user's tokens: `user` for `UserTower`, `proxies` for
      `ProxyTower`.
    num_blocks: transformer blocks, in `UserTower` for each modality.
    num_heads: attention heads; divides `dim`.
    ffn_dim: width of the hidden feed-forward layer.
    dropout: rate on history tokens and inside the blocks.
    norm: `pre` or `post` normalisation in the blocks of `UserTower`.
    cross_modal_blocks: layers in which the modalities of the history attend to each other.
    fusion: how a user's modalities are joined: `add`, `concat` or `gated`.
    num_proxies: learned queries of `ProxyTower`.
    item_id: whether items have an embedding of their id, in histories too.
    temperature: initial value of the learned temperature.
    dtype: computation type; parameters and reductions stay float32.
  """

  num_items: int
  max_length: int
  content: ContentTower
  dim: int = 64
  query: str = 'user'
  num_blocks: int = 2
  num_heads: int = 1
  ffn_dim: int = 64
  dropout: float = 0.2
  norm: str = 'pre'
  cross_modal_blocks: int = 1
  fusion: str = 'gated'
  num_proxies: int = 4
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
    names = ('max_length', 'dim', 'num_blocks', 'num_heads', 'ffn_dim', 'dropout', 'dtype')
    if self.query == 'user':
      tower, names = UserTower, (*names, 'norm', 'cross_modal_blocks', 'fusion')
    else:
      tower, names = ProxyTower, (*names, 'num_proxies')
    self.user_tower = tower(**{name: getattr(self, name) for name in names})

  def encode_items(
    self, features: Mapping[str, TokenTable], *, deterministic: bool = True
  ) -> EncodedItems:
    """Encodes all items as vectors of length 1, once for all users.

    Args:
      features: by modality, tables with `items + 1` rows.
      deterministic: False applies dropout, with the `dropout` key.
    """
    content = self.content(features, deterministic=deterministic)
    vectors = content.vectors
    if self.item_id:
      vectors = vectors + self.item_embedding
    return EncodedItems(normalised(vectors).astype(self.dtype), content)

  def encode_users(
    self,
    items: EncodedItems,
    item_ids: Array,
    segment_ids: Array,
    preferences: Preferences | None = None,
    backbone: Array | None = None,
    *,
    deterministic: bool = True,
    query_positions: Array | None = None,
  ) -> tuple[Array, Array | None]:
    """Encodes every prefix of every history.

    Args:
      items: from `encode_items`.
      item_ids: `[batch, length]` int32, oldest first, 0 where there is no item.
      segment_ids: `[batch, length]` int32, see `sasrec`.
      preferences: tokens of the users' own texts, or None.
      backbone: `[batch, length, width]` states of the sequence branch, which `ProxyTower` reads;
        `[batch, queries, width]` with `query_positions`.
      deterministic: False applies dropout, with the `dropout` key.
      query_positions: `[batch, queries]` positions to encode, or None for all. The last layers
        compute nothing for the others.

    Returns:
      `[batch, length, dim]`, whose inner product with an item's vector is the score, in nats; and
      the vectors that the proxies retrieved, `[batch, length, proxies, dim]`, None without proxies.
    """
    content = items.content
    if self.item_id:
      content = content._replace(modalities=content.modalities + items.vectors[:, None])
    users, retrieved = self.user_tower(
      content,
      item_ids,
      segment_ids,
      preferences,
      backbone,
      deterministic=deterministic,
      query_positions=query_positions,
    )
    return normalised(users) * jnp.exp(-self.log_temperature).astype(users.dtype), retrieved

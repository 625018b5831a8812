"""Encodes a user's preferences from the content of the history and the user's own texts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur4rec_jax.data.features import Preferences
from ur4rec_jax.models.attention import Visible, masked_attention, visible_history
from ur4rec_jax.models.content import Content
from ur4rec_jax.models.cross_modal import CrossModalBlock
from ur4rec_jax.models.fusion import ModalityFusion
from ur4rec_jax.models.layers import Dropout, TokenProjection, take_positions, take_rows
from ur4rec_jax.models.sasrec import Block, segment_positions

Array = jax.Array


class HistoryTokens(nn.Module):
  """Turns a history into one token for each item and modality: content plus position.

  Attributes: see `Retriever`.
  """

  max_length: int
  dim: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, content: Content, item_ids: Array, segment_ids: Array, *, deterministic: bool
  ) -> tuple[dict[str, Array], dict[str, Visible]]:
    """Returns by modality tokens `[batch, length, dim]` and which positions may attend to them.

    No position attends to an item without the modality.
    """
    flat_ids = item_ids.reshape(-1)
    position_embedding = self.param(
      'position_embedding', nn.initializers.normal(0.02), (self.max_length, self.dim)
    )
    positions = position_embedding[segment_positions(segment_ids).reshape(-1)]
    since, until = visible_history(segment_ids)
    present = content.present[item_ids]
    modalities = take_rows(content.modalities, flat_ids)
    tokens, visible = {}, {}
    for i in range(present.shape[-1]):
      x = (modalities[:, i] + positions).astype(self.dtype)
      x = Dropout(self.dropout)(x, deterministic=deterministic)
      tokens[f'modality_{i}'] = x.reshape(*item_ids.shape, self.dim)
      visible[f'modality_{i}'] = Visible(since, jnp.where(present[..., i], until, 0))
    return tokens, visible


class PreferenceTokens(nn.Module):
  """Projects the tokens of the users' own texts to the width of the history's tokens.

  Attributes: see `Retriever`.
  """

  dim: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, preferences: Preferences | None, segment_ids: Array, *, deterministic: bool
  ) -> tuple[dict[str, Array], dict[str, Visible]]:
    """Returns by modality the tokens of all users in a row, and which positions may attend to them.

    The shapes are `[batch, segments * tokens, dim]` and `[batch, segments * tokens]`.
    """
    tokens, visible = {}, {}
    for name, (values, mask) in (preferences.tables if preferences else {}).items():
      project = TokenProjection(self.dim, self.dropout, self.dtype, name=name)
      batch, segments = mask.shape[:2]
      x = project(values, deterministic=deterministic)
      tokens[f'preference_{name}'] = x.reshape(batch, -1, self.dim)
      is_own = segment_ids[..., None] == jnp.arange(1, segments + 1)
      may_read = is_own & preferences.visible[..., None]
      position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[:, None]
      since = jnp.where(may_read, position, segment_ids.shape[1]).min(1)
      until = jnp.where(may_read, position + 1, 0).max(1)
      by_token = Visible(
        jnp.broadcast_to(since[..., None], mask.shape), jnp.where(mask, until[..., None], 0)
      )
      visible[f'preference_{name}'] = Visible(*(x.reshape(batch, -1) for x in by_token))
    return tokens, visible


class UserTower(nn.Module):
  """Encodes every prefix of a history from the content of its items and the user's own texts.

  A causal transformer reads each modality. Then the modalities attend to each other and to the
  user's texts, and each position's vectors are joined into one. The text tokens never attend to the
  history, because they would leak its later items to earlier positions.

  Attributes: see `Retriever`.
  """

  max_length: int
  dim: int
  num_blocks: int
  num_heads: int
  ffn_dim: int
  dropout: float
  dtype: jnp.dtype
  norm: str
  cross_modal_blocks: int
  fusion: str

  @nn.compact
  def __call__(
    self,
    content: Content,
    item_ids: Array,
    segment_ids: Array,
    preferences: Preferences | None,
    backbone: Array | None = None,
    *,
    deterministic: bool,
    query_positions: Array | None = None,
  ) -> tuple[Array, None]:
    """Returns `[batch, length, dim]`, and None; arguments as in `Retriever.encode_users`."""
    del backbone  # Only `ProxyTower` reads it.
    history = HistoryTokens(self.max_length, self.dim, self.dropout, self.dtype, name='history')
    states, visible = history(content, item_ids, segment_ids, deterministic=deterministic)
    texts = PreferenceTokens(self.dim, self.dropout, self.dtype, name='preferences')
    memory, memory_visible = texts(preferences, segment_ids, deterministic=deterministic)
    num_crossings = self.cross_modal_blocks if len(visible | memory_visible) > 1 else 0
    for name, x in states.items():
      flat = x.reshape(-1, self.dim)
      since, until = visible[name]
      with_itself = Visible(since, jnp.maximum(until, since + 1))
      for i in range(self.num_blocks):
        sizes = self.dim, self.num_heads, self.ffn_dim, self.dropout, self.norm, self.dtype
        cut = query_positions if not num_crossings and i == self.num_blocks - 1 else None
        block = Block(*sizes, name=f'{name}_block_{i}')
        flat = block(flat, with_itself, deterministic=deterministic, query_positions=cut)
      states[name] = flat.reshape(x.shape[0], -1, self.dim)
    visible |= memory_visible
    for i in range(num_crossings):
      block = CrossModalBlock(self.num_heads, self.dropout, self.dtype, name=f'cross_modal_{i}')
      cut = query_positions if i == num_crossings - 1 else None
      states = block(states, visible, memory, deterministic=deterministic, query_positions=cut)
    if not (num_crossings or self.num_blocks):
      states = {name: take_positions(x, query_positions) for name, x in states.items()}
    positions = next(iter(states.values())).shape[:2]
    queries = positions[1] if query_positions is None else query_positions
    masks = {name: x.mask(queries) for name, x in visible.items()}
    small = nn.initializers.normal(0.02)
    for name, tokens in memory.items():
      query = self.param(f'{name}_query', small, (self.dim,)).astype(self.dtype)
      query = jnp.broadcast_to(query, (*positions, 1, self.dim))
      tokens = tokens[:, :, None]
      states[name] = masked_attention(query, tokens, tokens, masks[name])
    norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=f'{name}_norm')
    side_by_side = jnp.stack(
      [norm(name)(x).reshape(-1, self.dim) for name, x in states.items()], axis=1
    )
    has_seen = jnp.stack([masks[name].any(-1).reshape(-1) for name in states], axis=1)
    join = ModalityFusion(self.fusion, tuple(states), self.dtype, name='fusion')
    return join(side_by_side, has_seen).reshape(*positions, self.dim), None


class ProxyBlock(nn.Module):
  """One layer of `ProxyTower`: self-attention, cross-attention and a feed-forward network.

  The queries of a position attend to each other, then to the user's tokens. Every sublayer
  normalises its input and adds its output.

  Attributes:
    dim: width of queries and tokens.
    num_heads: attention heads; divides `dim`.
    ffn_dim: width of the hidden feed-forward layer.
    dropout: rate on the outputs of the sublayers.
    dtype: computation type; parameters and reductions stay float32.
    num_queries: queries of each position.
  """

  dim: int
  num_heads: int
  ffn_dim: int
  dropout: float
  dtype: jnp.dtype
  num_queries: int

  @nn.compact
  def __call__(self, x: Array, memory: Array, visible: Array, *, deterministic: bool) -> Array:
    """Returns the new queries.

    Args:
      x: `[batch * length * queries, dim]`.
      memory: `[batch * tokens, dim]`, the users' tokens, normalised.
      visible: `[batch, length * queries, tokens]`, which tokens a query may attend to.
      deterministic: False applies dropout, with the `dropout` key.
    """
    dropout = Dropout(self.dropout, deterministic=deterministic)
    dense = lambda width, name: nn.Dense(width, dtype=self.dtype, name=name)
    norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
    heads = lambda x, rows: x.reshape(rows, -1, self.num_heads, self.dim // self.num_heads)
    batch, positions = visible.shape[0], x.shape[0] // self.num_queries

    own = dense(3 * self.dim, 'self_query_key_value')(norm('self_norm')(x))
    own = (heads(part, positions) for part in jnp.split(own, 3, axis=-1))
    together = jnp.ones((positions, self.num_queries, self.num_queries), bool)
    own = masked_attention(*own, together).reshape(x.shape)
    x = x + dropout(dense(self.dim, 'self_out')(own))

    query = dense(self.dim, 'cross_query')(norm('cross_norm')(x))
    keys = jnp.split(dense(2 * self.dim, 'cross_key_value')(memory), 2, axis=-1)
    found = masked_attention(heads(query, batch), *(heads(k, batch) for k in keys), visible)
    found = dropout(dense(self.dim, 'cross_out')(found.reshape(x.shape)))
    # A query without a visible token would get the average of all tokens.
    x = x + jnp.where(visible.any(-1).reshape(-1)[:, None], found, 0)

    h = dense(self.ffn_dim, 'ffn_in')(norm('ffn_norm')(x))
    return x + dropout(dense(self.dim, 'ffn_out')(nn.gelu(h)))


class ProxyTower(nn.Module):
  """Queries the user's tokens with learned proxies and the sequence branch's state (UR4Rec).

  K proxy tokens and one token made from the state attend to each other, then to the content of the
  history and the user's own texts, then pass a feed-forward network (Zhang, Zhu & Dou, COLING 2025,
  after BLIP-2's Q-Former, Li et al. 2023). In the paper the query is one of a few candidates to be
  reranked. Here it is the user's state, so that one vector scores the whole catalogue.

  Attributes: see `Retriever`.
  """

  max_length: int
  dim: int
  num_blocks: int
  num_heads: int
  ffn_dim: int
  dropout: float
  dtype: jnp.dtype
  num_proxies: int

  @nn.compact
  def __call__(
    self,
    content: Content,
    item_ids: Array,
    segment_ids: Array,
    preferences: Preferences | None,
    backbone: Array,
    *,
    deterministic: bool,
    query_positions: Array | None = None,
  ) -> tuple[Array, Array]:
    """Encodes every prefix; arguments as in `Retriever.encode_users`.

    Returns:
      `[batch, length, dim]`, and the vector that each proxy retrieved, `[batch, length, proxies,
      dim]`.
    """
    batch, length = backbone.shape[:2]
    dense = lambda width, name: nn.Dense(width, dtype=self.dtype, name=name)
    norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
    sizes = self.dim, self.dropout, self.dtype
    history = HistoryTokens(self.max_length, *sizes, name='history')
    memory, visible = history(content, item_ids, segment_ids, deterministic=deterministic)
    texts = PreferenceTokens(*sizes, name='preferences')(
      preferences, segment_ids, deterministic=deterministic
    )
    memory = jnp.concatenate([*memory.values(), *texts[0].values()], axis=1)
    memory = norm('memory_norm')(memory.reshape(-1, self.dim))
    queries = length if query_positions is None else query_positions
    visible = [x.mask(queries) for x in [*visible.values(), *texts[1].values()]]
    num_queries = self.num_proxies + 1
    # All queries of a position see the tokens that the position sees.
    visible = jnp.repeat(jnp.concatenate(visible, axis=2), num_queries, axis=1)

    proxies = self.param('proxies', nn.initializers.normal(0.02), (self.num_proxies, self.dim))
    state = dense(self.dim, 'backbone')(backbone.reshape(-1, backbone.shape[-1]))
    x = jnp.broadcast_to(proxies.astype(self.dtype), (batch * length, *proxies.shape))
    x = jnp.concatenate([x, state[:, None]], axis=1).reshape(-1, self.dim)
    for i in range(self.num_blocks):
      sizes = self.dim, self.num_heads, self.ffn_dim, self.dropout, self.dtype
      block = ProxyBlock(*sizes, num_queries, name=f'block_{i}')
      x = block(x, memory, visible, deterministic=deterministic)
    retrieved = norm('final_norm')(x).reshape(batch, length, num_queries, self.dim)[:, :, :-1]
    joined = dense(self.dim, 'joined')(retrieved.reshape(batch * length, -1))
    return joined.reshape(batch, length, self.dim), retrieved

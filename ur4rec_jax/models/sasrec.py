"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018).

A row of tokens may hold several users side by side, told apart by `segment_ids` (0 is padding).
Attention is causal and never crosses a segment, so a user gets the same hidden states in a packed,
a left-padded and a right-padded row.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from ur4rec_jax.data.features import TokenTable
from ur4rec_jax.models.attention import (
  Visible,
  masked_attention,
  segment_ends,
  self_attention,
  visible_history,
)
from ur4rec_jax.models.content import ContentTower, EncodedItems
from ur4rec_jax.models.gru4rec import GRUBlock
from ur4rec_jax.models.layers import Dropout, take_positions, take_rows

Array = jax.Array
ITEM_INPUTS = ('id', 'id_from_content', 'content', 'id+content')
OF_CONTENT = ('content', 'id+content')  # These read features whenever items are encoded.
NORMS = ('pre', 'post')
POSITIONS = ('absolute', 'rotary', 'none')
ACTIVATIONS = ('relu', 'gelu', 'swiglu')
ROTARY_BASE = 10_000.0  # Su et al. 2021, section 3.2.2.


def segment_positions(segment_ids: Array) -> Array:
  """Counts each token's position from the end of its segment: 0 is the newest item.

  Args:
    segment_ids: `[batch, length]`, equal along one user's contiguous tokens, 0 for padding.

  Returns:
    `[batch, length]` int32 distances to the last token of the segment.
  """
  index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  return segment_ends(segment_ids) - 1 - index


def rotated(x: Array) -> Array:
  """Rotates queries or keys by their position (rotary embedding: Su et al. 2021, eq. 34).

  The inner product of a rotated query and key depends on their distance, not on their positions.

  Args:
    x: `[batch, length, ..., width]`, where width is even.

  Returns:
    The same shape and type.
  """
  half = x.shape[-1] // 2
  rates = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates
  angles = angles.reshape(x.shape[1], *[1] * (x.ndim - 3), half)
  cosine, sine = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
  first, second = x[..., :half], x[..., half:]
  return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


class Attention(nn.Module):
  """Causal self-attention; queries, keys and values share one kernel `[dim, 3 * dim]`.

  Attributes:
    num_heads: attention heads; divides the width.
    dtype: computation type.
    rotary: whether queries and keys are rotated by their position.
    window: most positions that a query sees; 0 for no limit.
  """

  num_heads: int
  dtype: jnp.dtype
  rotary: bool = False
  window: int = 0

  @nn.compact
  def __call__(self, h: Array, visible: Visible, query_positions: Array | None = None) -> Array:
    """Lets each token of `h` `[batch * length, dim]` attend to the `visible` tokens.

    Returns:
      `[batch * length, dim]`, or `[batch * queries, dim]` for `query_positions` `[batch, queries]`.
    """
    dim = h.shape[1]
    heads = self.num_heads, dim // self.num_heads
    kernel = self.param('kernel', nn.initializers.lecun_normal(), (dim, 3 * dim))
    bias = self.param('bias', nn.initializers.zeros, (3 * dim,))
    h, kernel, bias = promote_dtype(h, kernel, bias, dtype=self.dtype)
    if self.rotary:
      batch = visible.since.shape[0]
      mixed = (h @ kernel + bias).reshape(batch, -1, 3, *heads)
      query_key, value = rotated(mixed[:, :, :2]), mixed[:, :, 2:]
      if query_positions is not None:
        query = take_positions(query_key[:, :, 0], query_positions)
        mask = visible.mask(query_positions)
        return masked_attention(query, query_key[:, :, 1], value[:, :, 0], mask).reshape(-1, dim)
      mixed = jnp.concatenate([query_key, value], axis=2).reshape(-1, 3 * dim)
      return self_attention(mixed, visible, self.num_heads, self.window)
    if query_positions is None:
      return self_attention(h @ kernel + bias, visible, self.num_heads, self.window)
    # q . (W_k x + b_k) = (W_k' q) . x, up to a term that is equal for all x, and a mean of
    # W_v x + b_v is W_v times the mean of x, plus b_v. A few queries then need two products each,
    # instead of two for every item.
    of_query, of_key, of_value = jnp.moveaxis(kernel.reshape(dim, 3, *heads), 1, 0)
    batch = query_positions.shape[0]
    h = h.reshape(batch, -1, dim)
    query = (
      take_positions(h, query_positions).reshape(-1, dim) @ of_query.reshape(dim, dim) + bias[:dim]
    )
    query = jnp.einsum('qhw,dhw->qhd', query.reshape(-1, *heads), of_key) * self.num_heads**0.5
    items = h[:, :, None]
    mask = jnp.repeat(visible.mask(query_positions), self.num_heads, axis=1)
    mixed = masked_attention(query.reshape(batch, -1, 1, dim), items, items, mask)
    mixed = jnp.einsum('qhd,dhw->qhw', mixed.reshape(-1, self.num_heads, dim), of_value)
    return mixed.reshape(-1, dim) + bias[2 * dim :]


class CausalFilter(nn.Module):
  """Sums the newest items of each history with a learned weight for each distance and channel.

  This is a causal depthwise convolution. It learns which frequencies of a history matter, as the
  filters of BSARec do (Shin et al., AAAI 2024, eq. 6). Theirs read the whole sequence and are not
  causal.

  Attributes:
    width: number of items that a position sees, itself included.
    dtype: computation type.
  """

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, h: Array, visible: Visible) -> Array:
    """Filters `h` `[batch * length, dim]`; each token sees only the `visible` tokens."""
    # The kernel starts at zero, so that a block starts as attention alone.
    kernel = self.param('kernel', nn.initializers.zeros, (self.width, h.shape[1]))
    h, kernel = promote_dtype(h, kernel, dtype=self.dtype)
    until = visible.until
    batch, length = until.shape
    h = h.reshape(batch, length, -1)
    position = jnp.arange(length, dtype=jnp.int32)
    total = h * kernel[0]
    for distance in range(1, self.width):
      older = lambda x, d=distance: jnp.pad(x, [(0, 0), (d, 0)] + [(0, 0)] * (x.ndim - 2))[
        :, :length
      ]
      is_visible = position < older(until)
      total += jnp.where(is_visible[..., None], older(h), 0) * kernel[distance]
    return total.reshape(batch * length, -1)


class Block(nn.Module):
  """One transformer block: causal self-attention and a position-wise feed-forward network.

  Attributes:
    dim: width of the residual stream.
    num_heads: attention heads; divides `dim`.
    ffn_dim: width of the hidden feed-forward layer.
    dropout: rate on the outputs of both sublayers and inside the feed-forward network.
    norm: `pre` normalises the input of each sublayer, `post` each sum.
    dtype: computation type; parameters and reductions stay float32.
    activation: see `SASRec`.
    rotary: see `Attention`.
    window: see `Attention`.
    filter_width: see `SASRec`.
  """

  dim: int
  num_heads: int
  ffn_dim: int
  dropout: float
  norm: str
  dtype: jnp.dtype
  activation: str = 'relu'
  rotary: bool = False
  window: int = 0
  filter_width: int = 0

  @nn.compact
  def __call__(
    self, x: Array, visible: Visible, *, deterministic: bool, query_positions: Array | None = None
  ) -> Array:
    """Transforms tokens `x` `[batch * length, dim]`; `visible` is `[batch, length]`.

    With `query_positions` `[batch, queries]`, returns those positions: `[batch * queries, dim]`.
    """
    dropout = Dropout(self.dropout, deterministic=deterministic)
    layer_norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
    dense = lambda width, name: nn.Dense(width, dtype=self.dtype, name=name)

    def attention(h: Array) -> Array:
      mix = Attention(self.num_heads, self.dtype, self.rotary, self.window, name='query_key_value')
      mixed = dense(self.dim, 'attention_out')(mix(h, visible, query_positions))
      if self.filter_width:
        filtered = CausalFilter(self.filter_width, self.dtype, name='filter')(h, visible)
        filtered = filtered.reshape(*visible.since.shape, self.dim)
        mixed += take_positions(filtered, query_positions).reshape(-1, self.dim)
      return mixed

    def feed_forward(h: Array) -> Array:
      if self.activation == 'swiglu':
        h = nn.silu(dense(self.ffn_dim, 'ffn_gate')(h)) * dense(self.ffn_dim, 'ffn_in')(h)
      else:
        h = getattr(nn, self.activation)(dense(self.ffn_dim, 'ffn_in')(h))
      return dense(self.dim, 'ffn_out')(dropout(h))

    for name, sublayer in (('attention', attention), ('ffn', feed_forward)):
      norm = layer_norm(f'{name}_norm')
      change = dropout(sublayer(norm(x) if self.norm == 'pre' else x))
      if query_positions is not None and name == 'attention':
        x = x.reshape(*visible.since.shape, self.dim)
        x = take_positions(x, query_positions).reshape(-1, self.dim)
      x = x + change if self.norm == 'pre' else norm(x + change)
    return x


class SASRec(nn.Module):
  """Encodes item sequences; scores are inner products with the same item embeddings.

  An item embedding is a row of a table, or is made from texts and pictures, or is the sum of both.
  The table begins at random or, with `id_from_content`, as `content.initial_item_embeddings`.

  Attributes:
    num_items: catalogue size; item ids are 1..num_items, 0 is padding.
    max_length: longest sequence, the number of position embeddings.
    dim: embedding and hidden width.
    num_blocks: transformer blocks or recurrent layers.
    num_heads: attention heads; divides `dim`.
    ffn_dim: width of the hidden feed-forward layer.
    dropout: rate on embeddings and inside the blocks.
    block: one of `BLOCKS`; recurrent layers use neither heads, feed-forward network nor window.
    norm: `pre` or `post` normalisation.
    activation: activation of the feed-forward network, one of `ACTIVATIONS`; `swiglu` has a gate
      (Shazeer 2020).
    positions: `absolute` adds an embedding of the distance from the end of the history; `rotary`
      rotates queries and keys; one of `POSITIONS`.
    window: most items that a position attends to, itself included; 0 for all.
    filter_width: items that the filter beside attention sums, see `CausalFilter`; 0 for none.
    input_norm: whether the sum of item and position embedding is normalised.
    item_input: one of `ITEM_INPUTS`.
    item_scale: root mean square of the table at the start.
    whitening: how the initial table of `id_from_content` is whitened, see
      `initial_item_embeddings`.
    content: makes vectors of width `dim` from features; None unless `item_input` is one of
      `OF_CONTENT`.
    dtype: computation type; parameters and reductions stay float32.
  """

  num_items: int
  max_length: int
  dim: int = 64
  num_blocks: int = 2
  num_heads: int = 1
  ffn_dim: int = 64
  dropout: float = 0.1
  block: str = 'transformer'
  norm: str = 'pre'
  activation: str = 'relu'
  positions: str = 'absolute'
  window: int = 0
  filter_width: int = 0
  input_norm: bool = False
  item_input: str = 'id'
  item_scale: float = 0.02
  whitening: float = 1.0
  content: ContentTower | None = None
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    normal = nn.initializers.normal
    if self.has_item_table:
      shape = self.num_items + 1, self.dim
      self.item_embedding = self.param('item_embedding', normal(self.item_scale), shape)
    if self.positions == 'absolute':
      shape = self.max_length, self.dim
      self.position_embedding = self.param('position_embedding', normal(0.02), shape)
    self.embedding_dropout = Dropout(self.dropout)
    if self.input_norm:
      self.embedding_norm = nn.LayerNorm(dtype=self.dtype)
    self.blocks = [BLOCKS[self.block](self) for _ in range(self.num_blocks)]
    self.final_norm = nn.LayerNorm(dtype=self.dtype)

  @property
  def has_item_table(self) -> bool:
    """Whether the branch has an embedding table with a row for each item."""
    return self.item_input != 'content'

  def encode_items(
    self, features: Mapping[str, TokenTable] | None = None, *, deterministic: bool = True
  ) -> EncodedItems:
    """Encodes all items, once for all users.

    Args:
      features: by modality, tables with `items + 1` rows; only read for `OF_CONTENT`.
      deterministic: False applies dropout, with the `dropout` key.
    """
    vectors, content = 0.0, None
    if self.has_item_table:
      vectors += self.item_embedding
    if self.content is not None:
      content = self.content(features, deterministic=deterministic)
      vectors += content.vectors
    return EncodedItems(vectors.astype(self.dtype), content)

  def encode_users(
    self,
    items: EncodedItems,
    item_ids: Array,
    segment_ids: Array,
    *,
    deterministic: bool = True,
    query_positions: Array | None = None,
  ) -> Array:
    """Encodes every prefix of every sequence.

    Args:
      items: from `encode_items`.
      item_ids: `[batch, length]` int32, oldest first, 0 where there is no item; `length` is at
        most `max_length`.
      segment_ids: `[batch, length]` int32, see the module's docstring.
      deterministic: False applies dropout, with the `dropout` key.
      query_positions: `[batch, queries]` positions to encode, or None for all. The last block
        computes nothing for the others.

    Returns:
      `[batch, length, dim]` hidden states, or `[batch, queries, dim]`; finite but meaningless where
      `segment_ids` is 0.
    """
    # Flattened, because XLA on CPU is slow at gradients of dense layers over [batch, length, dim].
    x = take_rows(items.vectors, item_ids.reshape(-1))
    if self.positions == 'absolute':
      x += self.position_embedding[segment_positions(segment_ids).reshape(-1)]
    x = x.astype(self.dtype)
    if self.input_norm:
      x = self.embedding_norm(x)
    x = self.embedding_dropout(x, deterministic=deterministic)
    is_transformer = self.block == 'transformer'
    history = visible_history(segment_ids, self.window) if is_transformer else segment_ids
    for i, block in enumerate(self.blocks, 1):
      cut = query_positions if i == len(self.blocks) else None
      x = block(x, history, deterministic=deterministic, query_positions=cut)
    return self.final_norm(x).reshape(item_ids.shape[0], -1, self.dim)


def _transformer_block(branch: SASRec) -> nn.Module:
  return Block(
    branch.dim,
    branch.num_heads,
    branch.ffn_dim,
    branch.dropout,
    branch.norm,
    branch.dtype,
    branch.activation,
    branch.positions == 'rotary',
    branch.window,
    branch.filter_width,
  )


# The kinds of layers that encode a history, by name. A function makes one layer for a branch: a
# module that is called like `gru4rec.GRUBlock`. Extensions may add entries.
BLOCKS: dict[str, Callable[[SASRec], nn.Module]] = {
  'transformer': _transformer_block,
  'gru': lambda branch: GRUBlock(branch.dim, branch.dropout, branch.dtype),
}

"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018).

The module sees token rows in which several users may stand side by side, told apart by
`segment_ids` (0 is padding). Attention is causal and never crosses a segment, so a packed row,
a left-padded row and a right-padded row give each user the same hidden states.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ur4rec_jax.features import TokenTable
from ur4rec_jax.models.content import ContentEmbedding
from ur4rec_jax.models.layers import Dropout

Array = jax.Array
ITEM_INPUTS = ('id', 'content', 'id+content')


def segment_positions(segment_ids: Array) -> Array:
  """Counts each token's place in its segment from the segment's end: 0 is the newest item.

  Args:
    segment_ids: `[batch, length]`, equal along one user's contiguous tokens, 0 for padding.

  Returns:
    `[batch, length]` int32 distances to the last token of the segment.
  """
  length = segment_ids.shape[1]
  index = jnp.arange(length, dtype=jnp.int32)
  last = jnp.concatenate(
    [segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)], axis=1
  )
  segment_end = jax.lax.cummin(jnp.where(last, index, length), axis=1, reverse=True)
  return segment_end - index


def masked_attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), softmax in float32.

  Dividing after the value product instead of before halves the forward time on CPU: normalised
  weights are never written out.

  Args:
    query: `[batch, length, heads, width]`; `key` and `value` alike.
    mask: `[batch, length, length]`, True where query i may see key j.

  Returns:
    `[batch, length, heads, width]` in the type of `value`.
  """
  scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32)
  # Finite, so that a row with nothing to see gives an average instead of NaN.
  scores = jnp.where(mask[:, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  total = weights.sum(-1)
  mixed = jnp.einsum(
    'bhqk,bkhd->bqhd', weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  return (mixed / total.transpose(0, 2, 1)[..., None]).astype(value.dtype)


class Block(nn.Module):
  """One transformer block: causal self-attention and a position-wise feed-forward network.

  Attributes:
    dim: width of the residual stream.
    num_heads: attention heads; divides `dim`.
    ffn_dim: width of the hidden feed-forward layer.
    dropout: rate on both branches' outputs and inside the feed-forward network.
    norm: `pre` normalises each branch's input, `post` each sum.
    dtype: computation type; parameters and reductions stay float32.
  """

  dim: int
  num_heads: int
  ffn_dim: int
  dropout: float
  norm: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, mask: Array, *, deterministic: bool) -> Array:
    """Maps tokens `x` `[batch * length, dim]` under `mask` `[batch, length, length]`."""
    dropout = Dropout(self.dropout, deterministic=deterministic)
    layer_norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
    dense = lambda width, name: nn.Dense(width, dtype=self.dtype, name=name)

    def attention(h: Array) -> Array:
      batch, length, _ = mask.shape
      heads = (batch, length, 3, self.num_heads, self.dim // self.num_heads)
      query, key, value = jnp.moveaxis(
        dense(3 * self.dim, 'query_key_value')(h).reshape(heads), 2, 0
      )
      mixed = masked_attention(query, key, value, mask)
      return dense(self.dim, 'attention_out')(mixed.reshape(h.shape))

    def feed_forward(h: Array) -> Array:
      h = dropout(nn.relu(dense(self.ffn_dim, 'ffn_in')(h)))
      return dense(self.dim, 'ffn_out')(h)

    for name, branch in (('attention', attention), ('ffn', feed_forward)):
      norm = layer_norm(f'{name}_norm')
      if self.norm == 'pre':
        x = x + dropout(branch(norm(x)))
      else:
        x = norm(x + dropout(branch(x)))
    return x


class SASRec(nn.Module):
  """Encodes item sequences; scores are inner products with the same item embeddings.

  An item's embedding is a table's row, is made from its texts and pictures, or is the sum of both.

  Attributes:
    num_items: catalogue size; item ids are 1..num_items, 0 is padding.
    max_length: longest sequence, the number of position embeddings.
    dim: embedding and hidden width.
    num_blocks: transformer blocks.
    num_heads: attention heads; divides `dim`.
    ffn_dim: width of the hidden feed-forward layer.
    dropout: rate on embeddings and inside the blocks.
    norm: `pre` or `post` normalisation.
    item_input: `id`, `content` or `id+content`.
    content_dim: hidden width of the content's projection.
    content_dropout: rate in it.
    dtype: computation type; parameters and reductions stay float32.
  """

  num_items: int
  max_length: int
  dim: int = 64
  num_blocks: int = 2
  num_heads: int = 1
  ffn_dim: int = 64
  dropout: float = 0.1
  norm: str = 'pre'
  item_input: str = 'id'
  content_dim: int = 128
  content_dropout: float = 0.2
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    init = nn.initializers.normal(0.02)
    if 'id' in self.item_input:
      self.item_embedding = self.param('item_embedding', init, (self.num_items + 1, self.dim))
    if 'content' in self.item_input:
      self.content = ContentEmbedding(self.dim, self.content_dim, self.content_dropout, self.dtype)
    self.position_embedding = self.param('position_embedding', init, (self.max_length, self.dim))
    self.embedding_dropout = Dropout(self.dropout)
    self.blocks = [
      Block(self.dim, self.num_heads, self.ffn_dim, self.dropout, self.norm, self.dtype)
      for _ in range(self.num_blocks)
    ]
    self.final_norm = nn.LayerNorm(dtype=self.dtype)

  def __call__(
    self,
    item_ids: Array,
    segment_ids: Array | None = None,
    item_table: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Encodes every prefix of every sequence.

    Args:
      item_ids: `[batch, length]` int32, oldest first, 0 where there is no item; `length` is at
        most `max_length`.
      segment_ids: `[batch, length]` int32, see the module's docstring; by default each row is one
        user, padded on either side.
      item_table: `[items + 1, dim]`, from `item_table`; may be left out where that needs no
        features.
      deterministic: False applies dropout, with the `dropout` key.

    Returns:
      `[batch, length, dim]` hidden states; finite but meaningless where `segment_ids` is 0.
    """
    if segment_ids is None:
      segment_ids = (item_ids > 0).astype(jnp.int32)
    if item_table is None:
      item_table = self.item_table()
    positions = segment_positions(segment_ids)
    # Flat, because XLA on CPU is slow at gradients of dense layers over [batch, length, dim].
    x = item_table[item_ids.reshape(-1)] + self.position_embedding[positions.reshape(-1)]
    x = self.embedding_dropout(x.astype(self.dtype), deterministic=deterministic)
    causal = jnp.tril(jnp.ones((item_ids.shape[1],) * 2, bool))
    # Padding attends to padding, so that no row of the softmax is empty; nothing reads it.
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & causal
    for block in self.blocks:
      x = block(x, mask, deterministic=deterministic)
    return self.final_norm(x).reshape(*item_ids.shape, self.dim)

  def item_table(
    self, features: Mapping[str, TokenTable] | None = None, *, deterministic: bool = True
  ) -> Array:
    """Makes every item's embedding, once for all users.

    Args:
      features: by modality, tables with `items + 1` rows; not needed for `item_input='id'`.
      deterministic: False applies dropout, with the `dropout` key.

    Returns:
      `[items + 1, dim]`, row 0 for padding; the rows of items are also what scores compare with.
    """
    parts = [self.item_embedding] if 'id' in self.item_input else []
    if 'content' in self.item_input:
      parts.append(self.content(features, deterministic=deterministic))
    return sum(parts)

  def encode(
    self,
    features: Mapping[str, TokenTable],
    item_ids: Array,
    segment_ids: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> tuple[Array, Array]:
    """Does both, sharing one item table.

    Returns:
      `[batch, length, dim]` hidden states and `[items, dim]` item vectors, row i of item i + 1.
    """
    item_table = self.item_table(features, deterministic=deterministic)
    hidden = self(item_ids, segment_ids, item_table, deterministic=deterministic)
    return hidden, item_table[1:].astype(hidden.dtype)


def create_model(config: ConfigDict, num_items: int) -> SASRec:
  """Builds the model that `config.model` and `config.max_length` describe."""
  fields = {**config.model, 'dtype': jnp.dtype(config.model.dtype)}
  return SASRec(num_items=num_items, max_length=config.max_length, **fields)

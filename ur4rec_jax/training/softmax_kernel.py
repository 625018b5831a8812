"""Cross-entropy over the catalogue or shared negatives in one TPU kernel, without logits in memory.

One pass over the tokens computes the loss and both gradients, as `catalogue_softmax.softmax` does
in chunks: while a block of tokens is in fast memory (VMEM), so are its logits over all items.
The catalogue and its gradient stay there from the first block to the last.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ur4rec_jax.models.attention_kernel import FAST_MEMORY, dot
from ur4rec_jax.training.losses import LOWEST
from ur4rec_jax.training.seen_items import BITS

Array = jax.Array
_TOKENS = 256  # Tokens in a block; half as many if the catalogue leaves no room.
_ITEMS = 512  # Items in a piece; the catalogue is read in pieces, in loops that compile fast.
_WORDS = _ITEMS // BITS  # Of `seen_items.packed`, for a piece.


def tokens_in_block(num_items: int, dim: int, itemsize: int) -> int:
  """Returns how many tokens a block may have; 0 if the catalogue is too large for the kernel.

  Args:
    num_items: size of the catalogue.
    dim: width of its vectors.
    itemsize: bytes of one value.
  """
  catalogue = num_items * (-(-dim // 128) * 128) * (itemsize + 4)
  left = 0.75 * FAST_MEMORY - catalogue
  return next((n for n in (_TOKENS, _TOKENS // 2) if 4 * n * num_items < left), 0)


class Sampled(NamedTuple):
  """Inputs that only a softmax over shared negatives has.

  Attributes:
    positive: `[tokens]` float32, logits of the targets.
    ids: `[negatives]` int32; a negative that is a token's target is left out of its sum.
    log_expected_count: `[negatives]` float32, subtracted from the logits.
  """

  positive: Array
  ids: Array
  log_expected_count: Array


class Gradients(NamedTuple):
  """The loss and its gradients.

  Attributes:
    loss: `[]`, the weighted sum over tokens.
    hidden: `[tokens, dim]`, gradient of the states, in their type.
    items: `[items, dim]` float32, gradient of the item vectors.
    positive: `[tokens]` float32, gradient of the targets' logits in a softmax over negatives; else
      None.
  """

  loss: Array
  hidden: Array
  items: Array
  positive: Array | None


def softmax_gradients(
  hidden: Array,
  item_vectors: Array,
  targets: Array,
  weights: Array,
  sampled: Sampled | None = None,
  seen: Array | None = None,
  *,
  interpret: bool = False,
) -> Gradients:
  """Computes the loss and its gradients.

  Args:
    hidden: `[tokens, dim]`.
    item_vectors: `[items, dim]`, the catalogue or the negatives.
    targets: `[tokens]` int32 rows of the catalogue; with negatives, numbers as in `sampled.ids`.
    weights: `[tokens]`.
    sampled: None for a softmax over the catalogue.
    seen: `[tokens, words]` int32 from `seen_items.packed`, items or negatives that are no candidate
      for a token, unless one is its target; None if all are candidates.
    interpret: whether to run as plain jax operations, on any device.
  """
  (tokens, dim), num_items = hidden.shape, item_vectors.shape[0]
  block = tokens_in_block(num_items, dim, hidden.dtype.itemsize)
  blocks = -(-tokens // block)
  in_blocks = lambda x: jnp.pad(x, (0, blocks * block - tokens)).reshape(blocks, 1, block)
  with_all_pieces = lambda x: jnp.pad(x, ((0, -num_items % _ITEMS), (0, 0)))
  items = with_all_pieces(item_vectors)
  whole = lambda x: pl.BlockSpec(x.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1))
  of_tokens = pl.BlockSpec((block, dim), lambda i: (i, 0))
  number = pl.BlockSpec((1, 1, block), lambda i: (i, 0, 0))
  numbers = jax.ShapeDtypeStruct((blocks, 1, block), jnp.float32)
  arrays = [hidden, items, in_blocks(targets), in_blocks(weights.astype(jnp.float32))]
  specs = [of_tokens, whole(items), number, number]
  if sampled is not None:
    of_negatives = [with_all_pieces(x[:, None]) for x in (sampled.ids, sampled.log_expected_count)]
    arrays += [in_blocks(sampled.positive), *of_negatives]
    specs += [number, *map(whole, of_negatives)]
  if seen is not None:
    words = len(items) // BITS
    padding = (0, words - seen.shape[1]), (0, blocks * block - tokens)
    arrays.append(jnp.pad(seen.T, padding))
    specs.append(pl.BlockSpec((words, block), lambda i: (0, i)))
  results = pl.pallas_call(
    functools.partial(_kernel, tokens, num_items, sampled is not None, seen is not None),
    grid=(blocks,),
    in_specs=specs,
    out_specs=[number, of_tokens, whole(items), number],
    out_shape=[
      numbers,
      jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
      jax.ShapeDtypeStruct(items.shape, jnp.float32),
      numbers,
    ],
    scratch_shapes=[pltpu.VMEM((len(items), block), jnp.float32)],
    cost_estimate=pl.CostEstimate(
      flops=6 * tokens * num_items * dim,
      transcendentals=tokens * num_items,
      bytes_accessed=2 * hidden.size * hidden.dtype.itemsize
      + items.size * (items.dtype.itemsize + 4)
      + 16 * tokens,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('arbitrary',), vmem_limit_bytes=FAST_MEMORY
    ),
    interpret=interpret,
    name='catalogue_softmax',
  )(*arrays)
  losses, hidden_gradient, item_gradient, positive_gradient = results
  positive_gradient = None if sampled is None else positive_gradient.reshape(-1)[:tokens]
  return Gradients(losses.sum(), hidden_gradient, item_gradient[:num_items], positive_gradient)


def _kernel(tokens: int, num_items: int, is_sampled: bool, leaves_out: bool, *refs) -> None:
  """Computes a block of tokens; logits are `[items, tokens]`, one column per token."""
  hidden, items, targets, weights = refs[:4]
  positive, ids, log_expected_count = refs[4:7] if is_sampled else (None,) * 3
  seen = refs[-6] if leaves_out else None
  losses, hidden_gradient, item_gradient, positive_gradient, logits = refs[-5:]
  step, block = pl.program_id(0), hidden.shape[0]

  @pl.when(step == 0)
  def _():
    item_gradient[...] = jnp.zeros_like(item_gradient)

  # Values past the last token are undefined and may be NaN, and zero times NaN is NaN.
  token = step * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
  states = jnp.where(token < tokens, hidden[...], 0).astype(hidden.dtype)

  def for_pieces(function, start):
    """Calls `function(slice of items, their rows, value)` on each piece and carries the value."""

    def piece(i, value):
      begin = pl.multiple_of(i * _ITEMS, _ITEMS)
      row = begin + jax.lax.broadcasted_iota(jnp.int32, (_ITEMS, 1), 0)
      return function(pl.ds(begin, _ITEMS), row, value)

    return jax.lax.fori_loop(0, items.shape[0] // _ITEMS, piece, start)

  def find_highest(piece, row, highest):
    values = dot(items[piece, :], states, 1, 1)
    counts = row < num_items
    if is_sampled:
      values -= log_expected_count[piece, :]
      counts &= ids[piece, :] != targets[0]
    if leaves_out:
      words = seen[pl.ds(pl.multiple_of(piece.start // BITS, _WORDS), _WORDS), :]
      words = jnp.broadcast_to(words[:, None], (_WORDS, BITS, block)).reshape(_ITEMS, block)
      is_unseen = (jnp.right_shift(words, row % BITS) & 1) == 0
      counts &= is_unseen if is_sampled else is_unseen | (row == targets[0])
    values = jnp.where(counts, values, LOWEST)
    logits[piece, :] = values
    return jnp.maximum(highest, values.max(0, keepdims=True))

  def add_up(piece, row, sums):
    total, target_logit = sums
    values = logits[piece, :] - highest
    exponentials = jnp.exp(values)
    logits[piece, :] = exponentials
    if not is_sampled:
      target_logit += jnp.where(row == targets[0], values, 0).sum(0, keepdims=True)
    return total + exponentials.sum(0, keepdims=True), target_logit

  def differentiate(piece, row, gradient):
    logit_gradient = logits[piece, :] * (weight / total)
    if not is_sampled:
      logit_gradient -= jnp.where(row == targets[0], weight, 0)
    logit_gradient = logit_gradient.astype(hidden.dtype)
    item_gradient[piece, :] += dot(logit_gradient, states, 1, 0)
    return gradient + dot(logit_gradient, items[piece, :], 0, 0)

  zeros = jnp.zeros((1, block), jnp.float32)
  highest = for_pieces(find_highest, positive[0] if is_sampled else zeros + LOWEST)
  target_logit = positive[0] - highest if is_sampled else zeros
  target_exponential = jnp.exp(target_logit) if is_sampled else zeros
  total, target_logit = for_pieces(add_up, (target_exponential, target_logit))
  weight = weights[0]
  losses[0] = (jnp.log(total) - target_logit) * weight
  positive_gradient[0] = weight * (target_exponential / total - 1)
  gradient = for_pieces(differentiate, jnp.zeros(hidden.shape, jnp.float32))
  hidden_gradient[...] = gradient.astype(hidden.dtype)

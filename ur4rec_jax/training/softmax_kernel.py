"""Cross-entropy over the whole catalogue in one TPU kernel, without logits in memory.

One pass over the tokens computes the loss and both gradients, as `catalogue_softmax.softmax` does
in chunks: while a block of tokens is in the chip's fast memory, so are its logits over all items.
The catalogue and its gradient stay there from the first block to the last.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
_TOKENS = 256  # In a block; half as many if the catalogue leaves no room.
_ITEMS = 512  # The catalogue is read in pieces of so many items, in loops that compile fast.
_FAST_MEMORY = 64 * 2**20  # Bytes; what the smallest of the TPUs since v5e has.
_LOWEST = jnp.finfo(jnp.float32).min


def tokens_in_block(num_items: int, dim: int, itemsize: int) -> int:
  """Returns how many tokens a block may have; 0 if the catalogue is too large for the kernel.

  Args:
    num_items: size of the catalogue.
    dim: width of its vectors.
    itemsize: bytes of a number of the vectors.
  """
  catalogue = num_items * (-(-dim // 128) * 128) * (itemsize + 4)
  left = 0.75 * _FAST_MEMORY - catalogue
  return next((n for n in (_TOKENS, _TOKENS // 2) if 4 * n * num_items < left), 0)


def softmax_gradients(
  hidden: Array, item_vectors: Array, targets: Array, weights: Array, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
  """Returns the weighted sum of the losses and its gradients; arguments as `softmax`.

  Returns:
    `[]`, and the gradients of `hidden` in its type and of `item_vectors` in float32.
  """
  (tokens, dim), num_items = hidden.shape, item_vectors.shape[0]
  block = tokens_in_block(num_items, dim, hidden.dtype.itemsize)
  blocks = -(-tokens // block)
  in_blocks = lambda x: jnp.pad(x, (0, blocks * block - tokens)).reshape(blocks, 1, block)
  items = jnp.pad(item_vectors, ((0, -num_items % _ITEMS), (0, 0)))
  whole = pl.BlockSpec(items.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1))
  of_tokens = pl.BlockSpec((block, dim), lambda i: (i, 0))
  number = pl.BlockSpec((1, 1, block), lambda i: (i, 0, 0))
  losses, hidden_gradient, item_gradient = pl.pallas_call(
    functools.partial(_kernel, tokens, num_items),
    grid=(blocks,),
    in_specs=[of_tokens, whole, number, number],
    out_specs=[number, of_tokens, whole],
    out_shape=[
      jax.ShapeDtypeStruct((blocks, 1, block), jnp.float32),
      jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
      jax.ShapeDtypeStruct(items.shape, jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((len(items), block), jnp.float32)],
    cost_estimate=pl.CostEstimate(
      flops=6 * tokens * num_items * dim,
      transcendentals=tokens * num_items,
      bytes_accessed=2 * hidden.size * hidden.dtype.itemsize
      + items.size * (items.dtype.itemsize + 4)
      + 12 * tokens,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('arbitrary',), vmem_limit_bytes=_FAST_MEMORY
    ),
    interpret=interpret,
    name='catalogue_softmax',
  )(hidden, items, in_blocks(targets), in_blocks(weights.astype(jnp.float32)))
  return losses.sum(), hidden_gradient, item_gradient[:num_items]


def _kernel(
  tokens: int,
  num_items: int,
  hidden,
  items,
  targets,
  weights,
  losses,
  hidden_gradient,
  item_gradient,
  logits,
) -> None:
  """Computes a block of tokens; logits are `[items, tokens]`, so that a number a token is a row."""
  step = pl.program_id(0)

  @pl.when(step == 0)
  def _():
    item_gradient[...] = jnp.zeros_like(item_gradient)

  block = hidden.shape[0]
  # What lies behind the last token is undefined, and zero times NaN is NaN.
  token = step * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
  states = jnp.where(token < tokens, hidden[...], 0).astype(hidden.dtype)

  def for_pieces(function, start):
    """Carries a value through `function(slice of the catalogue, its items from 0, value)`."""

    def piece(i, value):
      begin = pl.multiple_of(i * _ITEMS, _ITEMS)
      item = begin + jax.lax.broadcasted_iota(jnp.int32, (_ITEMS, 1), 0)
      return function(pl.ds(begin, _ITEMS), item, value)

    return jax.lax.fori_loop(0, items.shape[0] // _ITEMS, piece, start)

  def find_highest(piece, item, highest):
    values = _dot(items[piece, :], states, 1, 1)
    values = jnp.where(item < num_items, values, _LOWEST)
    logits[piece, :] = values
    return jnp.maximum(highest, values.max(0, keepdims=True))

  def add_up(piece, item, sums):
    total, of_target = sums
    values = logits[piece, :] - highest
    exponentials = jnp.exp(values)
    logits[piece, :] = exponentials
    of_target += jnp.where(item == targets[0], values, 0).sum(0, keepdims=True)
    return total + exponentials.sum(0, keepdims=True), of_target

  def differentiate(piece, item, gradient):
    change = logits[piece, :] * (weight / total) - jnp.where(item == targets[0], weight, 0)
    change = change.astype(hidden.dtype)
    item_gradient[piece, :] += _dot(change, states, 1, 0)
    return gradient + _dot(change, items[piece, :], 0, 0)

  zeros = jnp.zeros((1, block), jnp.float32)
  highest = for_pieces(find_highest, zeros + _LOWEST)
  total, target_logit = for_pieces(add_up, (zeros, zeros))
  weight = weights[0]
  losses[0] = (jnp.log(total) - target_logit) * weight
  gradient = for_pieces(differentiate, jnp.zeros(hidden.shape, jnp.float32))
  hidden_gradient[...] = gradient.astype(hidden.dtype)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
  """Multiplies matrices over one axis each, in float32."""
  dimensions = ((axis_a,), (axis_b,)), ((), ())
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

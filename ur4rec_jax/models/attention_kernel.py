"""Attention in one TPU kernel, which keeps the scores of a few histories in fast memory (VMEM).

XLA writes the scores `[batch, heads, queries, keys]` to memory and turns queries, keys and values
from `[tokens, heads, width]` into `[heads, tokens, width]` and back. This kernel reads the output
of a dense layer as it lies in memory and writes its result as the next dense layer reads it. The
backward pass computes the scores again (Dao et al., FlashAttention, NeurIPS 2022, section 3.1).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
_SUBLANES = 8  # The number of tokens in a block must be a multiple of this.
_WANTED_TOKENS = 128  # Short histories share a block, because the chip multiplies 128 x 128 values.
_MOST_TOKENS = 512
_QUERIES = 256  # Queries whose scores are in fast memory at once.
FAST_MEMORY = 64 * 2**20  # Bytes of VMEM; no TPU since v5e has less.
_LOWEST = jnp.finfo(jnp.float32).min


class Mix(NamedTuple):
  """The sources of one attention call, and which source attends to which.

  A source is an array `[batch * length, parts * dim]`: queries, keys and values side by side, or
  only keys and values. The sources with queries come first.

  Attributes:
    reads: for each source with queries, the indices of the sources that it attends to.
    lengths: tokens of each source in a row of the batch, equal for those with queries.
    dim: width of queries, keys and values.
    num_heads: attention heads; divides `dim`.
    interpret: whether to run as plain jax operations, on any device.
  """

  reads: tuple[tuple[int, ...], ...]
  lengths: tuple[int, ...]
  dim: int
  num_heads: int
  interpret: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_attention(mix: Mix, visible: Sequence[Array], sources: Sequence[Array]) -> list[Array]:
  """Mixes values as `masked_attention` does, for several sources and all heads at once.

  Args:
    mix: which source attends to which.
    visible: for each source `[batch, 2, length]` int32, `since` and `until` of its keys, see
      `attention.Visible`.
    sources: `[batch * length, parts * dim]` each.

  Returns:
    `[batch * length, dim]` for each source with queries.
  """
  return _forward(mix, visible, sources)[0]


def _forward(mix: Mix, visible, sources):
  arrays, rows = _in_blocks(mix, visible, sources)
  outputs = [_like(source, mix.dim) for source in arrays[1][: len(mix.reads)]]
  mixed = _call(_forward_kernel, mix, rows, arrays, outputs)
  tokens = [source.shape[0] for source in sources]
  return [x[:n] for x, n in zip(mixed, tokens, strict=False)], (visible, sources)


def _backward(mix: Mix, residuals, cotangents):
  visible, sources = residuals
  arrays, rows = _in_blocks(mix, visible, sources, cotangents)
  outputs = [_like(source, source.shape[1]) for source in arrays[1]]
  sums = [pltpu.VMEM((rows * length, 2 * mix.dim), jnp.float32) for length in mix.lengths]
  gradients = _call(_backward_kernel, mix, rows, arrays, outputs, sums)
  return None, [x[: len(source)] for x, source in zip(gradients, sources, strict=True)]


fused_attention.defvjp(_forward, _backward)


def _rows_in_block(batch: int, lengths: Sequence[int]) -> int:
  """Returns how many rows of the batch a block holds, a divisor of `batch` if there is one."""
  step = max(_SUBLANES // math.gcd(_SUBLANES, length) for length in lengths)
  longest = max(lengths)
  fewest = step * -(-_WANTED_TOKENS // (step * longest))
  choices = range(fewest, max(fewest, _MOST_TOKENS // longest) + 1, step)
  return next((rows for rows in choices if batch % rows == 0), fewest)


def _in_blocks(mix: Mix, visible, sources, cotangents=()):
  """Pads arrays to whole blocks, and shifts `visible` to positions counted from a block's start."""
  batch = visible[0].shape[0]
  rows = _rows_in_block(batch, mix.lengths)
  missing = -batch % rows
  add = lambda x, each: jnp.pad(x, [(0, missing * each)] + [(0, 0)] * (x.ndim - 1))
  queries = mix.lengths[0]

  def block_of(x: Array) -> Array:
    shift = queries * jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    x = add(x, 1).reshape(-1, rows, 2, x.shape[2]) + shift
    return x.swapaxes(1, 2).reshape(len(x), 2, -1)

  arrays = (
    [block_of(x) for x in visible],
    [add(x, length) for x, length in zip(sources, mix.lengths, strict=True)],
    [add(x, length) for x, length in zip(cotangents, mix.lengths, strict=False)],
  )
  return arrays, rows


def _like(x: Array, width: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((x.shape[0], width), x.dtype)


def _call(kernel, mix: Mix, rows: int, arrays, outputs, scratch=()) -> list[Array]:
  """Runs a kernel on blocks of `rows` rows of the batch."""
  blocks = arrays[0][0].shape[0]
  spec = lambda x: pl.BlockSpec((x.shape[0] // blocks, x.shape[1]), lambda i: (i, 0))
  of_visible = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0))
  arguments = [*arrays[0], *arrays[1], *arrays[2]]
  pairs = sum(rows * mix.lengths[0] * rows * mix.lengths[i] for reads in mix.reads for i in reads)
  products = 2 if kernel is _forward_kernel else 5
  return pl.pallas_call(
    functools.partial(kernel, mix),
    grid=(blocks,),
    in_specs=[*map(of_visible, arrays[0]), *map(spec, arrays[1]), *map(spec, arrays[2])],
    out_specs=[spec(x) for x in outputs],
    out_shape=outputs,
    scratch_shapes=scratch,
    cost_estimate=pl.CostEstimate(
      flops=2 * products * pairs * mix.dim * blocks,
      transcendentals=pairs * mix.num_heads * blocks,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in [*arguments, *outputs]),
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), vmem_limit_bytes=FAST_MEMORY
    ),
    interpret=mix.interpret,
    name=kernel.__name__.strip('_'),
  )(*arguments)


class _Read(NamedTuple):
  """The keys and values `[keys, width]` of a source and a mask `[queries, keys]`."""

  source: int
  key: Array
  value: Array
  mask: Array


def _forward_kernel(mix: Mix, *refs) -> None:
  visible, sources, outputs = _groups(refs, len(mix.lengths), len(mix.lengths))
  for index, output in enumerate(outputs):

    def mix_values(rows, index=index, output=output):
      for columns, query, reads in _heads(mix, visible, sources, index, rows):
        weights, total = _exponentials(query, reads)
        mixed = sum(
          dot(w.astype(x.value.dtype), x.value, 1, 0) for w, x in zip(weights, reads, strict=True)
        )
        output[rows, columns[0]] = (mixed / total).astype(output.dtype)

    _for_queries(output.shape[0], mix_values)


def _backward_kernel(mix: Mix, *refs) -> None:
  count = len(mix.lengths)
  visible, sources, cotangents, gradients, sums = _groups(refs, count, count, len(mix.reads), count)
  for total in sums:
    total[...] = jnp.zeros_like(total)
  for index, cotangent in enumerate(cotangents):

    def differentiate(rows, index=index, cotangent=cotangent):
      for columns, query, reads in _heads(mix, visible, sources, index, rows):
        weights, total = _exponentials(query, reads)
        weights = [w / total for w in weights]
        upstream = cotangent[rows, columns[0]]
        changes = [dot(upstream, x.value, 1, 1) for x in reads]
        mean = sum((w * c).sum(-1, keepdims=True) for w, c in zip(weights, changes, strict=True))
        of_query = 0.0
        for w, change, x in zip(weights, changes, reads, strict=True):
          of_score = w * (change - mean) * query.shape[1] ** -0.5
          of_score = jnp.where(x.mask, of_score, 0).astype(query.dtype)
          of_query += dot(of_score, x.key, 1, 0)
          sums[x.source][:, columns[0]] += dot(of_score, query, 0, 0)
          sums[x.source][:, columns[1]] += dot(w.astype(query.dtype), upstream, 0, 0)
        gradients[index][rows, columns[0]] = of_query.astype(query.dtype)

    _for_queries(cotangent.shape[0], differentiate)
  for gradient, total in zip(gradients, sums, strict=True):
    gradient[:, gradient.shape[1] - 2 * mix.dim :] = total[...].astype(gradient.dtype)


def _groups(refs: Sequence, *sizes: int) -> Iterator[Sequence]:
  """Yields `refs` in groups of these sizes, then the remaining ones."""
  for size in sizes:
    yield refs[:size]
    refs = refs[size:]
  yield refs


def _for_queries(tokens: int, function) -> None:
  """Calls `function` for slices of a block's tokens, in a loop that compiles in seconds."""
  whole = tokens // _QUERIES if tokens > 2 * _QUERIES else 0

  def slice_of(i, carry):
    function(pl.ds(pl.multiple_of(i * _QUERIES, _QUERIES), _QUERIES))
    return carry

  if whole:
    jax.lax.fori_loop(0, whole, slice_of, None)
  if left := tokens - whole * _QUERIES:
    function(pl.ds(whole * _QUERIES, left))


def _heads(
  mix: Mix, visible, sources, index: int, rows
) -> Iterator[tuple[list[slice], Array, list[_Read]]]:
  """Yields for each head its columns in all parts, its queries, and the sources they attend to."""
  positions = rows.start + jax.lax.broadcasted_iota(jnp.int32, (rows.size, 1), 0)
  masks = {
    i: (visible[i][0, 0:1] <= positions) & (positions < visible[i][0, 1:2])
    for i in mix.reads[index]
  }
  width = mix.dim // mix.num_heads
  for head in range(mix.num_heads):
    columns = [slice(first, first + width) for first in range(head * width, 3 * mix.dim, mix.dim)]
    reads = []
    for i, mask in masks.items():
      *_, of_key, of_value = columns[: sources[i].shape[1] // mix.dim]
      reads.append(_Read(i, sources[i][:, of_key], sources[i][:, of_value], mask))
    yield columns, sources[index][rows, columns[0]], reads


def _exponentials(query: Array, reads: Sequence[_Read]) -> tuple[list[Array], Array]:
  """Returns the weights before they are normalised `[queries, keys]`, and their sum."""
  scale = query.shape[1] ** -0.5
  scores = [jnp.where(x.mask, dot(query, x.key, 1, 1) * scale, _LOWEST) for x in reads]
  top = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores])
  weights = [jnp.exp(x - top) for x in scores]
  return weights, sum(x.sum(-1, keepdims=True) for x in weights)


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
  """Multiplies matrices over one axis each, in float32."""
  dimensions = ((axis_a,), (axis_b,)), ((), ())
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

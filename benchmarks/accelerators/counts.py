"""Counts what a compiled program does on one chip: FLOPs, bytes to main memory, bytes over links.

The rules, which docs/accelerators.md explains:

- A loop counts as often as it runs. If its number of runs is not in the program, once; the training
  step is such a loop over steps, so its counts are those of one step.
- FLOPs are those of matrix products and of kernels that state theirs.
- Bytes are what the instructions read and write, with the padding of their layouts, in whichever
  memory the arrays are. A fusion reads its operands and writes its results; what it only slices,
  gathers or updates in place counts with the part that it touches.
- Main-memory bytes are the part of them that is in the chip's main memory, and the copies between
  main memory and the memory on the chip that the compiler adds to have arrays at hand.
- Of two branches the one that moves more counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.accelerators import kernels
from benchmarks.accelerators.hlo import (
  HOST_MEMORY,
  MAIN_MEMORY,
  Array,
  Computation,
  Instruction,
  Module,
)

Measure = Callable[[Array], float]
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id',
  'replica-id', 'opt-barrier', 'domain', 'add-dependency',
}  # fmt: skip
# Custom calls that only tell the compiler something.
_FREE_CALLS = {
  'AllocateBuffer', 'AssumeGatherIndicesInBound', 'ConcatBitcast', 'Sharding',
  'SPMDFullToShardShape', 'SPMDShardToFullShape',
}  # fmt: skip
_VIEWS = {'bitcast', 'reshape', 'convert', 'copy', 'transpose'}
_SLICES = {'dynamic-slice', 'slice', 'gather'}
_COPIES = {'copy', 'copy-start', 'slice-start', 'transpose', 'reshape', 'bitcast-convert'}
_TRANSFERS = {'infeed', 'outfeed', 'send', 'recv'}
# Of each byte that a chip gives to a collective of n chips, how many go over its links.
_LINK_SHARE = {
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-gather': lambda n: n - 1,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'ragged-all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
  'collective-broadcast': lambda n: 1,
}


@dataclasses.dataclass
class Count:
  """What one instruction does in a step.

  Attributes:
    kind: of the instruction, such as `matrix product` or `copy`.
    op_name: of the source, see `short_name`.
    flops: of matrix products.
    bytes: read and written, in any memory.
    main_bytes: read from and written to main memory.
    link_bytes: sent over links, by collective.
    network_bytes: sent to other slices, by collective.
    times: how often it runs.
    instruction: its name in the program.
  """

  kind: str
  op_name: str
  flops: float
  bytes: float
  main_bytes: float
  link_bytes: dict[str, float]
  network_bytes: dict[str, float]
  times: int
  instruction: str


@dataclasses.dataclass
class Counts:
  """What a program does on one chip.

  Attributes:
    counts: of all instructions that do anything.
    unknown_loops: names of loops that were counted once.
    host_transfers: names of instructions that exchange data with the host.
    arrays: bytes of the arrays that are computed, by type and shape.
  """

  counts: list[Count]
  unknown_loops: list[str]
  host_transfers: list[str]
  arrays: dict[str, float] = dataclasses.field(default_factory=dict)

  def largest_arrays(self, number: int) -> dict[str, float]:
    """Returns the bytes of the largest arrays, by type and shape."""
    return dict(sorted(self.arrays.items(), key=lambda item: -item[1])[:number])

  @property
  def flops(self) -> float:
    """FLOPs of matrix products."""
    return sum(x.flops * x.times for x in self.counts)

  @property
  def bytes(self) -> float:
    """Bytes that instructions read and write, in any memory."""
    return sum(x.bytes * x.times for x in self.counts)

  @property
  def main_bytes(self) -> float:
    """Bytes to and from main memory."""
    return sum(x.main_bytes * x.times for x in self.counts)

  @functools.cached_property
  def link_bytes(self) -> dict[str, float]:
    """Bytes sent over links, by collective."""
    return self._sent('link_bytes')

  @functools.cached_property
  def network_bytes(self) -> dict[str, float]:
    """Bytes sent to other slices, by collective."""
    return self._sent('network_bytes')

  def _sent(self, field: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for x in self.counts:
      for name, sent in getattr(x, field).items():
        found[name] = found.get(name, 0) + sent * x.times
    return found

  def bytes_by(self, field: str) -> dict[str, float]:
    """Bytes read and written by `kind` or `op_name`, the most first."""
    found: dict[str, float] = {}
    for x in self.counts:
      key = getattr(x, field)
      found[key] = found.get(key, 0) + x.bytes * x.times
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def count(module: Module) -> Counts:
  """Counts a whole program, see the module's docstring."""
  counter = _Counter(module)
  counts = list(counter.walk(module.entry, 1, ()))
  return Counts(counts, counter.unknown_loops, counter.host_transfers, counter.arrays)


def short_name(op_name: str) -> str:
  """Shortens a source name: without the wrappers of the step, and alike for repeated layers."""
  name = re.sub(r'\bjit\((\w+)\)', r'\1', op_name)
  inner = re.sub(r'^(?:(?:share|step|shard_map|while|body)(?:/|$))+', '', name)
  return re.sub(r'_\d+(?=[/)]|$)', '_*', inner or name)


def _to_slices(x: Instruction) -> bool:
  """Tells whether an instruction sends to other slices or receives from them, over the network."""
  return '_xla_host_transfer_handler_name="xla_megascale_runtime"' in x.attributes


def _network_bytes(computation: Computation, x: Instruction) -> dict[str, float]:
  """Returns the bytes that an instruction sends to other slices, by collective."""
  if x.opcode != 'send' or not _to_slices(x):
    return {}
  kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes)[1]
  name = kind.lower().replace('_', '-')
  # Either the slices, or all devices by numbers of which the part above 100,000 is the slice.
  to = re.search(r'_xla_megascale_target=(?:"\{([\d,]+)\}|\{\{([\d,]+)\})', x.attributes)
  slices = set(to[1].split(',')) if to[1] else {int(n) // 100_000 for n in to[2].split(',')}
  return {name: _given(computation, x) * _LINK_SHARE.get(name, lambda n: 1)(len(slices))}


def _given(computation: Computation, x: Instruction) -> float:
  """Returns the bytes of an instruction's operands, without padding."""
  return sum(a.payload for name in x.operands for a in computation.instructions[name].arrays)


class _Counter:
  def __init__(self, module: Module):
    self.module = module
    self.unknown_loops: list[str] = []
    self.host_transfers: list[str] = []
    self.arrays: dict[str, float] = {}

  def called(self, x: Instruction) -> list[Computation]:
    return [self.module.computations[name] for name in x.called]

  def walk(self, computation: Computation, times: int, callers: tuple) -> Iterator[Count]:
    """Yields the counts of a computation that runs `times` times.

    Args:
      computation: whose instructions are counted.
      times: how often it runs.
      callers: the loops around it, outermost first: each its computation and instruction.
    """
    for x in computation:
      self._note_transfer(x)
      if x.opcode == 'while':
        body = self.module.computations[x.attribute('body').lstrip('%')]
        runs = self._runs(computation, x, callers)
        if runs is None:
          self.unknown_loops.append(x.name)
        yield from self.walk(
          body, times * (1 if runs is None else runs), (*callers, (computation, x))
        )
      elif x.opcode == 'conditional':
        branches = [list(self.walk(b, times, callers)) for b in self.called(x)]
        yield from max(branches, key=lambda b: sum(c.bytes * c.times for c in b))
      elif x.opcode in ('call', 'async-start'):
        for inner in self.called(x):
          yield from self.walk(inner, times, callers)
      elif (found := self._count(computation, x, times)) is not None:
        yield found

  def _note_transfer(self, x: Instruction) -> None:
    opcode = x.opcode.removesuffix('-start').removesuffix('-done')
    is_callback = x.opcode == 'custom-call' and re.search('callback|[Hh]ost', _target(x))
    is_transfer = opcode in _TRANSFERS and not _to_slices(x)
    if is_transfer or is_callback or any(a.space == HOST_MEMORY for a in x.arrays):
      self.host_transfers.append(x.name)

  def _count(self, computation: Computation, x: Instruction, times: int) -> Count | None:
    if x.opcode in _FREE or x.opcode.endswith(('-done', '-update')):
      return None
    if x.opcode == 'custom-call' and _target(x) in _FREE_CALLS:
      return None
    operands = [computation.instructions[name] for name in x.operands]
    moved, in_main = (
      self._read(x, operands, m) + self._written(x, operands, m) for m in (_bytes, _in_main)
    )
    if x.opcode in ('copy-start', 'slice-start') and len({a.space for a in x.arrays[:2]}) > 1:
      moved = 0.0  # The instruction that needs the copy reads it.
    if stated := kernels.stated_cost(x):  # A kernel may read a part of an operand several times.
      again = max(0.0, stated['bytes_accessed'] - moved)
      moved, in_main = moved + again, in_main + again
    self.arrays |= {str(a): a.bytes for a in kernels.results(x)}
    flops = self._flops(computation, x)
    link_bytes, network_bytes = self._link_bytes(computation, x), _network_bytes(computation, x)
    if not (moved or in_main or flops or link_bytes or network_bytes):
      return None
    name = short_name(x.op_name)
    if '/' not in x.op_name:  # The compiler added it.
      name = self._name_of_source(computation, x)
    kind = self._kind(x, link_bytes | network_bytes)
    return Count(kind, name, flops, moved, in_main, link_bytes, network_bytes, times, x.name)

  def _name_of_source(self, computation: Computation, x: Instruction) -> str:
    """Names an instruction that the compiler added after a named one that it reads or feeds."""
    before = lambda y: [computation.operand(y, 0)] if y.operands else []
    after = lambda y: computation.users[y.name][:1]
    for word, neighbours in (('copy of', before), ('copy for', after)):
      y = x
      for _ in range(8):
        if not (found := neighbours(y)):
          break
        y = found[0]
        if '/' in y.op_name and y.opcode != 'parameter':
          return f'{word} {short_name(y.op_name)}'
    return '(added by the compiler)'

  # Bytes. `measure` gives the bytes of an array that count.

  def _read(self, x: Instruction, operands: list[Instruction], measure: Measure) -> float:
    """Returns the bytes that an instruction reads."""
    if x.opcode == 'slice-start':
      source, cut = x.arrays[:2]
      return min(measure(source), cut.bytes)
    total = 0.0
    for i, operand in enumerate(operands):
      full = sum(map(measure, operand.arrays))
      if full and len(operand.arrays) == 1:
        full = min(full, self._touched(x, i, operand.arrays[0]))
      total += full
    return total

  def _touched(self, x: Instruction, i: int, array: Array) -> float:
    """Returns how many bytes of an operand an instruction reads."""
    if x.opcode in _SLICES and i == 0:
      return x.arrays[0].size * array.item_bytes
    if x.opcode == 'dynamic-update-slice' and i == 0:
      return 0
    if x.opcode == 'fusion':
      inner = self.called(x)[0]
      return self._touched_inside(inner, inner.parameters[i], array)
    return math.inf

  def _touched_inside(self, inner: Computation, x: Instruction, array: Array) -> float:
    total = 0.0
    for user in inner.users[x.name]:
      places = [i for i, name in enumerate(user.operands) if name == x.name]
      if user.opcode in _VIEWS:
        total += self._touched_inside(inner, user, array)
      elif user.opcode == 'scatter' and places == [0]:
        total += inner.operand(user, len(user.operands) - 1).arrays[0].size * array.item_bytes
      else:
        total += sum(self._touched(user, i, array) for i in places)
    # A view that is the result itself is read whole.
    return math.inf if x.is_root else total

  def _written(self, x: Instruction, operands: list[Instruction], measure: Measure) -> float:
    """Returns the bytes that an instruction writes."""
    if x.opcode == 'copy-start':
      return measure(x.arrays[0])
    if x.opcode == 'slice-start':
      return measure(x.arrays[1])
    if x.opcode.endswith('-start'):  # The results follow the operands in the tuple.
      return sum(map(measure, x.arrays[len(x.arrays) // 2 :]))
    arrays = kernels.results(x)
    parts = [math.inf] * len(arrays)
    if x.opcode == 'fusion':
      inner = self.called(x)[0]
      parts = self._updated(inner, inner.root)
    elif x.opcode == 'dynamic-update-slice':
      parts = [operands[1].arrays[0].size]
    return sum(
      min(measure(a), n * a.item_bytes) if a.size else 0.0
      for a, n in zip(arrays, parts, strict=True)
    )

  def _updated(self, inner: Computation, x: Instruction) -> list[float]:
    """Returns for each result of a fusion how many elements of it are written."""
    if x.opcode == 'tuple':
      return [n for i in range(len(x.operands)) for n in self._updated(inner, inner.operand(x, i))]
    if x.opcode in _VIEWS:
      return self._updated(inner, inner.operand(x, 0))
    if x.opcode == 'dynamic-update-slice':
      return [inner.operand(x, 1).arrays[0].size]
    if x.opcode == 'scatter' and len(x.arrays) == 1:
      return [inner.operand(x, 2).arrays[0].size]
    if x.opcode == 'fusion':
      nested = self.called(x)[0]
      return self._updated(nested, nested.root)
    return [math.inf] * len(x.arrays)

  # FLOPs.

  def _flops(self, computation: Computation, x: Instruction) -> float:
    if x.opcode == 'dot':
      return _dot_flops(x, computation.operand(x, 0).arrays[0])
    if x.opcode == 'convolution':
      arrays = [computation.operand(x, i).arrays[0] for i in (0, 1)]
      return _convolution_flops(x, *arrays)
    if x.opcode == 'fusion':
      return sum(self._flops(inner, y) for inner in self.called(x) for y in inner)
    if x.opcode == 'custom-call':
      return kernels.flops(x, [computation.instructions[o].arrays[0] for o in x.operands])
    return 0

  # Links.

  def _link_bytes(self, computation: Computation, x: Instruction) -> dict[str, float]:
    if x.opcode == 'fusion':  # Of a collective that was fused with its neighbours.
      found: dict[str, float] = {}
      for inner in self.called(x):
        for y in inner:
          for name, sent in self._link_bytes(inner, y).items():
            found[name] = found.get(name, 0) + sent
      return found
    name = x.opcode.removesuffix('-start')
    if name not in _LINK_SHARE:
      return {}
    size = self._group_size(x)
    return {name: _given(computation, x) * _LINK_SHARE[name](size)} if size > 1 else {}

  def _group_size(self, x: Instruction) -> int:
    """Returns how many devices take part in a collective together."""
    text = x.attributes
    if found := re.search(r'replica_groups=\[\d+,(\d+)\]', text):
      return int(found[1])
    if found := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
      return found[1].count(',') + 1
    return self.module.partitions

  def _kind(self, x: Instruction, link_bytes: dict[str, float]) -> str:
    if link_bytes:
      return 'collective'
    inside = {x.opcode}
    if x.opcode == 'fusion':
      inside = {y.opcode for inner in self.called(x) for y in inner}
      if 'fusion' in inside:
        nested = [c for inner in self.called(x) for y in inner for c in self.called(y)]
        inside |= {y.opcode for inner in nested for y in inner}
    if kernels.is_library_product(x):
      return 'matrix product'
    if x.opcode == 'custom-call':
      return f'kernel {_target(x)}'
    if inside & {'dot', 'convolution'}:
      return 'matrix product'
    if inside & {'scatter', 'gather', 'dynamic-update-slice', 'dynamic-slice'}:
      return 'gather, scatter and slice'
    if 'sort' in inside:
      return 'sort'
    if inside & {'reduce', 'reduce-window'}:
      return 'reduction'
    if inside <= _COPIES | _FREE:
      return 'copy and transpose'
    return 'elementwise'

  # Loops.

  def _runs(self, computation: Computation, x: Instruction, callers: tuple) -> int | None:
    """Returns how often the body of a loop runs, or None if the program does not say."""
    if found := re.search(r'known_trip_count\W+n\W+(\d+)', x.attributes):
      return int(found[1])
    condition = self.module.computations[x.attribute('condition').lstrip('%')]
    loops = (*callers, (computation, x))
    compare = self._comparison(condition)
    if compare is None:
      return None
    inside, place, limit = compare
    index = self._loop_variable(inside, place)
    limit = self._constant(inside, limit, loops)
    if index is None or limit is None:
      return None
    start = self._constant(
      computation, computation.operand(computation.operand(x, 0), index), callers
    )
    return max(0, limit - (start or 0))

  def _comparison(self, condition: Computation) -> tuple | None:
    """Finds `i < limit`, which a condition may hold in a fusion."""
    root = condition.root
    if root.opcode == 'fusion':
      inner = self.called(root)[0]
      if inner.root.opcode != 'compare' or 'direction=LT' not in inner.root.attributes:
        return None
      # Both sides as the condition passes them to the fusion.
      sides = [inner.operand(inner.root, i) for i in (0, 1)]
      outer = [
        condition.operand(root, int(s.literal)) if s.opcode == 'parameter' else s for s in sides
      ]
      return (condition, *outer)
    if root.opcode != 'compare' or 'direction=LT' not in root.attributes:
      return None
    return (condition, condition.operand(root, 0), condition.operand(root, 1))

  def _loop_variable(self, inside: Computation, x: Instruction) -> int | None:
    """Returns which variable of a loop an instruction of its condition reads."""
    while x.opcode in ('copy', 'bitcast'):
      x = inside.operand(x, 0)
    return int(x.attribute('index')) if x.opcode == 'get-tuple-element' else None

  def _constant(self, inside: Computation, x: Instruction, loops: tuple) -> int | None:
    """Follows an instruction to a whole number that the program states, through loops around it."""
    while x.opcode in ('copy', 'bitcast', 'copy-done', 'copy-start', 'convert'):
      x = inside.operand(x, 0)
    if x.opcode == 'constant':
      return int(x.literal) if re.fullmatch(r'-?\d+', x.literal) else None
    if x.opcode != 'get-tuple-element' or not loops or inside.operand(x, 0).opcode != 'parameter':
      return None
    computation, loop = loops[-1]
    given = computation.operand(loop, 0)
    if given.opcode != 'tuple':
      return None
    value = computation.operand(given, int(x.attribute('index')))
    return self._constant(computation, value, loops[:-1])


def _bytes(array: Array) -> float:
  return array.bytes


def _in_main(array: Array) -> float:
  return array.bytes if array.space == MAIN_MEMORY else 0.0


def _target(x: Instruction) -> str:
  return x.attribute('custom_call_target').strip('"')


def _dot_flops(x: Instruction, left: Array) -> float:
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', x.attributes)
  dims = [int(i) for i in contracted[1].split(',') if i] if contracted else []
  return 2 * x.arrays[0].size * math.prod(left.dims[i] for i in dims)


def _convolution_flops(x: Instruction, left: Array, kernel: Array) -> float:
  """Counts products of values that exist, as TPUs write batched products as sparse convolutions."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', x.attributes)
  of_left, of_kernel, of_out = labels.groups()
  found = re.search(r'window=\{([^}]*)\}', x.attributes)
  window = dict(part.split('=') for part in found[1].split()) if found else {}
  out = x.arrays[0]
  flops = 2.0 * out.dims[of_out.index('b')] * out.dims[of_out.index('f')]
  flops *= kernel.dims[of_kernel.index('i')]
  spatial = sorted(c for c in of_out if c.isdigit())
  numbers = lambda key, default: (
    [int(n) for n in window[key].split('x')] if key in window else ([default] * len(spatial))
  )
  pads = window.get('pad', 'x'.join(['0_0'] * len(spatial))).split('x')
  for d, c in enumerate(spatial):
    flops *= _pairs(
      left.dims[of_left.index(c)],
      kernel.dims[of_kernel.index(c)],
      out.dims[of_out.index(c)],
      numbers('stride', 1)[d],
      int(pads[d].split('_')[0]),
      numbers('lhs_dilate', 1)[d],
      numbers('rhs_dilate', 1)[d],
    )
  return flops


@functools.cache
def _pairs(size, kernel, out, stride, pad, left_dilation, kernel_dilation) -> int:
  """Counts the pairs of an output and a kernel position that meet a value of the input."""
  total = 0
  outputs = np.arange(out) * stride - pad
  for k in range(kernel):
    place = outputs + k * kernel_dilation
    is_value = (place >= 0) & (place <= (size - 1) * left_dilation) & (place % left_dilation == 0)
    total += int(is_value.sum())
  return total

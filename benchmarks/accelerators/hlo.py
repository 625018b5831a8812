"""Reads the text of a compiled XLA program: computations, instructions and the sizes of arrays."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 'token': 0, 'opaque': 0}
_LEAF = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_OPCODE = re.compile(r'\s*([a-z][\w\-]*)\(')
_COMMENT = re.compile(r'/\*.*?\*/')
# Where a layout puts an array: no number is the chip's main memory.
MAIN_MEMORY, HOST_MEMORY = 0, 5


@dataclasses.dataclass(frozen=True)
class Array:
  """The type of one array.

  Attributes:
    dtype: element type as XLA writes it, e.g. `bf16`.
    dims: its dimensions.
    layout: of the array in memory, as XLA writes it, e.g. `1,0:T(8,128)S(1)`.
  """

  dtype: str
  dims: tuple[int, ...]
  layout: str = ''

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @functools.cached_property
  def item_bytes(self) -> float:
    """Bytes of one element."""
    if self.dtype in _BITS:
      return _BITS[self.dtype] / 8
    found = re.search(r'\d+', self.dtype)
    return int(found[0]) / 8 if found else 0

  @property
  def payload(self) -> float:
    """Bytes of the elements alone."""
    return self.size * self.item_bytes

  @functools.cached_property
  def bytes(self) -> float:
    """Bytes in memory, with what the tiles of the layout add to the last dimensions."""
    order, _, tiles = self.layout.partition(':')
    tile = re.match(r'T\(([\d,]+)\)', tiles)
    if not tile or not self.dims:
      return self.payload
    physical = [self.dims[int(i)] for i in reversed(order.split(','))]
    sizes = [int(n) for n in tile[1].split(',')][-len(physical) :]
    for i, n in enumerate(sizes, len(physical) - len(sizes)):
      physical[i] = -(-physical[i] // n) * n
    return math.prod(physical) * self.item_bytes

  @functools.cached_property
  def space(self) -> int:
    """Number of the memory that the array is in, `MAIN_MEMORY` for that of the chip."""
    found = re.search(r'S\((\d+)\)', self.layout)
    return int(found[1]) if found else MAIN_MEMORY


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: its name, without `%`.
    opcode: e.g. `fusion`.
    arrays: types of the results, flattened.
    operands: names of the operands.
    literal: the text between the parentheses, which a constant or a parameter's number is.
    attributes: the text after the operands.
    is_root: whether it is the result of its computation.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str
  is_root: bool

  @functools.cached_property
  def op_name(self) -> str:
    """Name of the operation of the source that it was compiled from, or nothing."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found[1].replace("\\'", "'") if found else ''

  def attribute(self, name: str) -> str:
    """Returns the value of an attribute without spaces in it, or nothing."""
    found = re.search(rf'\b{name}=(\{{[^}}]*\}}|[^,\s]+)', self.attributes)
    return found[1] if found else ''

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it calls, without those applied to single elements."""
    keys = 'calls|body|condition|branch_computations|true_computation|false_computation'
    keys += '|to_apply' * (self.opcode in ('call', 'async-start'))
    found = re.findall(rf'\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)', self.attributes)
    return tuple(x.strip(' %') for group in found for x in group.strip('{}').split(','))


@dataclasses.dataclass
class Computation:
  """A function of the program.

  Attributes:
    name: its name.
    instructions: by name, in the order of the schedule.
  """

  name: str
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @functools.cached_property
  def root(self) -> Instruction:
    """The instruction whose result is that of the computation."""
    return next(x for x in self if x.is_root)

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    return {int(x.literal): x for x in self if x.opcode == 'parameter'}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """By name of an instruction, those that read its result."""
    found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for x in self:
      for operand in dict.fromkeys(x.operands):
        if operand in found:
          found[operand].append(x)
    return found

  def operand(self, x: Instruction, i: int) -> Instruction:
    """Returns the instruction that computes operand `i` of `x`."""
    return self.instructions[x.operands[i]]


@dataclasses.dataclass
class Module:
  """A compiled program.

  Attributes:
    computations: by name.
    entry: the one that is run.
    partitions: number of devices that run it together.
  """

  computations: dict[str, Computation]
  entry: Computation
  partitions: int


def parse(text: str) -> Module:
  """Parses what `Compiled.as_text()` returns.

  Raises:
    ValueError: it is no program, or a line is not understood.
  """
  computations, entry, partitions = {}, None, 1
  lines: list[tuple[Computation, str]] = []
  current = None
  for line in text.splitlines():
    if line.startswith('HloModule'):
      found = re.search(r'\b(?:num_partitions|replica_count)=(\d+)', line)
      partitions = int(found[1]) if found else 1
    elif found := _HEADER.match(line):
      current = computations[found[2]] = Computation(found[2])
      entry = current if found[1] else entry
    elif current is not None and _INSTRUCTION.match(line):
      lines.append((current, line))
    elif line == '}':
      current = None
    elif current is not None:  # The attributes of a kernel may go on in the next line.
      lines[-1] = (current, f'{lines[-1][1]} {line}')
  for computation, line in lines:
    x = _parse_instruction(line)
    computation.instructions[x.name] = x
  if entry is None:
    raise ValueError('the text has no ENTRY computation; it is not that of a compiled program')
  return Module(computations, entry, partitions)


def _parse_instruction(line: str) -> Instruction:
  found = _INSTRUCTION.match(line)
  is_root, name = bool(found[1]), found[2]
  text = _COMMENT.sub('', line[found.end() :])
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  opcode = _OPCODE.match(text, end)
  if not opcode:
    raise ValueError(f'cannot read the instruction {name} = {text[:200]}')
  close = _closing(text, opcode.end() - 1)
  inside, attributes = text[opcode.end() : close], text[close + 1 :]
  operands = () if opcode[1] in ('constant', 'parameter') else tuple(_NAME.findall(inside))
  arrays = parse_arrays(text[:end])
  return Instruction(name, opcode[1], arrays, operands, inside, attributes, is_root)


def parse_arrays(text: str) -> tuple[Array, ...]:
  """Parses a type, flattened if it is a tuple."""
  return tuple(
    Array(dtype, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n), layout)
    for dtype, dims, layout in _LEAF.findall(text)
  )


def _closing(text: str, start: int) -> int:
  """Returns where the parenthesis that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if not depth:
      return i
  raise ValueError(f'a parenthesis does not close: {text[:200]}')

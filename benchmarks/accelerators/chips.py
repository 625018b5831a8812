"""What accelerators can do at most, with the public page that says so."""

import dataclasses
import re

from ur4rec_jax.errors import InputError

_TPU = 'https://cloud.google.com/tpu/docs/'


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, or one GPU.

  Attributes:
    flops: FLOP/s of matrix products by type of the computation.
    memory: bytes of its main memory.
    bandwidth: bytes/s between main memory and the chip.
    link: bytes/s of one link to a neighbour, in one direction.
    links: number of links of a chip.
    torus: length of an axis from which on its ends are joined; 0 if there are no axes.
    source: where these numbers stand.
  """

  flops: dict[str, float]
  memory: float
  bandwidth: float
  link: float
  links: int
  torus: int
  source: str


def _tpu(bf16: float, memory: float, bandwidth: float, link: float, links: int, torus, page: str):
  # At jax's default precision a product of float32 is one pass in bfloat16.
  flops = {'bfloat16': bf16, 'float32': bf16}
  return Chip(flops, memory, bandwidth, link, links, torus, _TPU + page)


# Google gives the interconnect of a chip in both directions together, over all its links.
CHIPS = {
  'v5e': _tpu(197e12, 16 * 2**30, 819e9, 400e9 / 2 / 4, 4, 16, 'v5e'),
  'v5p': _tpu(459e12, 95 * 2**30, 2765e9, 1200e9 / 2 / 6, 6, 4, 'v5p'),
  'v6e': _tpu(918e12, 32 * 2**30, 1600e9, 800e9 / 2 / 4, 4, 16, 'v6e'),
  # The SXM module. Products of float32 use TensorFloat-32, without sparsity.
  'h100': Chip(
    {'bfloat16': 989e12, 'float32': 494e12},
    80e9,
    3.35e12,
    900e9 / 2,
    1,
    0,
    'https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet',
  ),
}


def of_device(kind: str) -> Chip | None:
  """Returns the chip that jax calls `kind`, e.g. `NVIDIA H100 80GB HBM3`; None if unknown."""
  words = kind.lower().replace('tpu v6 lite', 'v6e').replace('tpu v5 lite', 'v5e')
  words = words.replace('tpu v5', 'v5p').replace('h200', 'h100')  # Equal but for their memory.
  return next((chip for name, chip in CHIPS.items() if name in words), None)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips that are joined to one machine.

  Attributes:
    name: e.g. `v5e:2x2`, or `h100` for one GPU and `h100:8` for eight.
    chip_name: key of `CHIPS`.
    axes: number of chips along each axis.
  """

  name: str
  chip_name: str
  axes: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    """One of its chips."""
    return CHIPS[self.chip_name]

  @property
  def link_bandwidth(self) -> float:
    """Bytes/s that a chip can send over the links that lead to another chip of the topology."""
    chip = self.chip
    if not chip.torus:
      return chip.link * chip.links
    # An axis of two chips has one link, as has the end of an axis whose ends are not joined.
    used = sum((n > 1) + (n >= chip.torus) for n in self.axes)
    return chip.link * used

  @property
  def hops(self) -> float:
    """Links that a message passes on its way from one chip to another, on average."""
    torus = self.chip.torus
    if not torus:
      return 1.0
    distance = lambda n: n / 4 if n >= torus else (n * n - 1) / (3 * n)
    return max(1.0, sum(map(distance, self.axes)))


def parse_topology(name: str) -> Topology:
  """Reads a topology's name.

  Raises:
    InputError: no such topology is known.
  """
  found = re.fullmatch(r'([a-z]\w*)(?::(\d+(?:x\d+)*))?', name)
  if not found or found[1] not in CHIPS or (found[2] is None and CHIPS[found[1]].torus):
    raise InputError(
      f'--topology={name}: must be a chip of {", ".join(CHIPS)} and, for TPUs, the number of chips '
      'along each axis, e.g. v5e:2x2, v5p:2x2x1, v6e:16x16 or h100'
    )
  axes = tuple(int(n) for n in (found[2] or '1').split('x'))
  return Topology(name, found[1], axes)

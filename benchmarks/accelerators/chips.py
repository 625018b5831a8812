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
    network: bytes/s of a chip's share of the network between slices; 0 if it is not stated.
  """

  flops: dict[str, float]
  memory: float
  bandwidth: float
  link: float
  links: int
  torus: int
  source: str
  network: float = 0.0


def _tpu(
  page: str,
  bf16: float,
  memory: float,
  bandwidth: float,
  link: float,
  links: int,
  torus: int,
  network: float = 0.0,
) -> Chip:
  # At jax's default precision a product of float32 is one pass in bfloat16.
  flops = {'bfloat16': bf16, 'float32': bf16}
  return Chip(flops, memory, bandwidth, link, links, torus, _TPU + page, network)


# Google gives the interconnect of a chip in both directions together, over all its links, and the
# network between slices in bits for a pod of 256 chips.
CHIPS = {
  'v5e': _tpu('v5e', 197e12, 16 * 2**30, 819e9, 400e9 / 2 / 4, 4, 16, 6.4e12 / 8 / 256),
  'v5p': _tpu('v5p', 459e12, 95 * 2**30, 2765e9, 1200e9 / 2 / 6, 6, 4),
  'v6e': _tpu('v6e', 918e12, 32 * 2**30, 1600e9, 800e9 / 2 / 4, 4, 16, 25.6e12 / 8 / 256),
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
  """Chips that are joined to one machine, or to several that a network joins.

  Attributes:
    name: e.g. `v5e:2x2`, `v5e:2x2*3` for three slices, `h100` for one GPU and `h100:8` for eight.
    chip_name: key of `CHIPS`.
    axes: number of chips along each axis of a slice.
    slices: number of slices.
  """

  name: str
  chip_name: str
  axes: tuple[int, ...]
  slices: int = 1

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
  found = re.fullmatch(r'([a-z]\w*)(?::(\d+(?:x\d+)*)(?:\*([1-9]\d*))?)?', name)
  if not found or found[1] not in CHIPS or (found[2] is None and CHIPS[found[1]].torus):
    raise InputError(
      f'--topology={name}: must be a chip of {", ".join(CHIPS)} and, for TPUs, the number of chips '
      'along each axis and of slices, e.g. v5e:2x2, v5p:2x2x1, v6e:16x16*2 or h100'
    )
  axes, slices = tuple(int(n) for n in (found[2] or '1').split('x')), int(found[3] or 1)
  if slices > 1 and not CHIPS[found[1]].network:
    joined = ', '.join(chip for chip, values in CHIPS.items() if values.network)
    raise InputError(f'--topology={name}: slices are known of {joined}; leave *{slices} out')
  return Topology(name, found[1], axes, slices)

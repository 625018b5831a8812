"""FLOPs of hand-written kernels, which the compiler cannot see into.

A Pallas kernel that states its `cost_estimate` needs nothing here. For others, `FLOPS` has a
formula by the beginning of the kernel's name.
"""

import json
import math
import re
from collections.abc import Callable, Sequence

from benchmarks.accelerators.hlo import Array, Instruction


def stated_cost(kernel: Instruction) -> dict[str, float]:
  """Returns the cost that a kernel states: `flops` and `bytes_accessed`; or nothing."""
  found = re.search(r'"cost_estimate":(\{[^}]*\})', kernel.attributes)
  return {name: float(n) for name, n in json.loads(found[1]).items()} if found else {}


def flops(kernel: Instruction, operands: Sequence[Array]) -> float:
  """Returns the FLOPs of a custom call, 0 if nothing says how many it does.

  Args:
    kernel: the custom call.
    operands: types of its operands.
  """
  if stated := stated_cost(kernel):
    return stated['flops']
  if is_library_product(kernel):
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', kernel.attributes)
    dims = [operands[0].dims[int(i)] for i in re.findall(r'\d+', contracted[1])]
    return 2 * kernel.arrays[0].size * math.prod(dims)
  for name, formula in FLOPS.items():
    if kernel.name.startswith(name):
      return formula(operands)
  return 0


def is_library_product(kernel: Instruction) -> bool:
  """Tells whether a custom call is a matrix product of NVIDIA's cuBLAS."""
  return kernel.opcode == 'custom-call' and 'custom_call_target="__cublas' in kernel.attributes


def results(kernel: Instruction) -> tuple[Array, ...]:
  """Returns the results of an instruction, without the room that a library works in."""
  is_library = re.search(r'custom_call_target="__cu(?:blas|dnn)', kernel.attributes)
  if is_library and len(kernel.arrays) > 1 and kernel.arrays[-1].dtype in ('s8', 'u8'):
    return kernel.arrays[:-1]
  return kernel.arrays


def _splash_attention(products: int) -> Callable[[Sequence[Array]], float]:
  """Counts jax's splash attention under a causal mask, whose blocks above the diagonal are skipped.

  Args:
    products: of each pair of a block of queries and one of keys.
  """

  def formula(operands: Sequence[Array]) -> float:
    # The first operand lists the blocks of keys for each block of queries, `[1, blocks, blocks]`.
    blocks, query, key = operands[0].dims[-2], operands[2], operands[3]
    *batch, length, width = query.dims
    share = (blocks + 1) / (2 * blocks)
    return 2 * products * math.prod(batch) * length * key.dims[-2] * width * share

  return formula


FLOPS = {
  'splash_mha_fwd': _splash_attention(2),
  'splash_mha_dkv': _splash_attention(4),
  'splash_mha_dq': _splash_attention(3),
}

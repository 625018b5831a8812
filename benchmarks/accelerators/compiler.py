"""Compiles for a topology of accelerators without having one, and reports what was compiled."""

import contextlib
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks.accelerators import counts, hlo
from benchmarks.accelerators.chips import Topology
from ur4rec_jax.errors import InputError
from ur4rec_jax.sharding import devices

TOP = 20
# Without a GPU nothing can be timed, and the compiler finds no tiling for Triton's products.
GPU_OPTIONS = {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_autotune_level': 0}
# What the compiler must know of a GPU, from NVIDIA's guide to tuning for it.
GPUS = {
  'h100': """
    platform_name: "CUDA"
    device_description_str: "NVIDIA H100 80GB HBM3"
    dnn_version_info { major: 9 minor: 10 patch: 0 }
    gpu_device_info {
      cuda_compute_capability { major: 9 minor: 0 }
      core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
      device_memory_size: 80000000000 memory_bandwidth: 3350000000000 l2_cache_size: 52428800
      threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
      registers_per_block_limit: 65536 registers_per_core_limit: 65536
      shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
      shared_memory_per_core: 233472
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }""",
}
CUDA_PACKAGES = 'jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12'
_GB, _TERA = 1e9, 1e12


@contextlib.contextmanager
def compiling_for(topology: Topology) -> Iterator[None]:
  """Describes the devices of a topology to the program.

  Raises:
    InputError: the compiler for it is not installed, or knows no such topology.
  """
  with devices.compiling_for(describe(topology)):
    try:
      yield
    except RuntimeError as error:
      if 'cuDNN not found' in str(error):  # By JAX, when it traces attention.
        raise _lacks_compiler(topology, error) from error
      raise


def describe(topology: Topology) -> list[jax.Device]:
  """Returns the devices of a topology, which only the compiler knows; errors as above."""
  is_gpu = not topology.chip.torus
  # The compiler for TPUs otherwise asks the network which TPU this is, and allows one process.
  os.environ |= {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': f'{topology.chip_name}-{math.prod(topology.axes)}',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
  }
  try:
    if is_gpu:
      found = topologies.get_topology_desc(
        topology_name=topology.chip_name,
        platform='cuda',
        target_config=GPUS[topology.chip_name],
        topology=f'1x1x{math.prod(topology.axes)}',
      )
    else:
      name = topology.name.partition('*')[0]
      found = topologies.get_topology_desc(name, 'tpu', num_slices=topology.slices)
  except Exception as error:
    raise _lacks_compiler(topology, error) from error
  return list(found.devices)


def _lacks_compiler(topology: Topology, error: Exception) -> InputError:
  is_gpu = not topology.chip.torus
  packages = f'--no-deps {CUDA_PACKAGES}' if is_gpu else 'libtpu'
  problem = (str(error).splitlines() or [type(error).__name__])[0]
  return InputError(
    f'--topology={topology.name}: cannot be compiled for ({problem}); it needs the compiler: pip'
    f' install {packages}, of the versions that jax[{"cuda12" if is_gpu else "tpu"}] names'
  )


def report(
  lowered: jax.stages.Lowered, topology: Topology, dtype: str, text_file: str | None = None
) -> dict[str, Any]:
  """Compiles a program and returns what one chip does in a step.

  Args:
    lowered: the program.
    topology: that it was lowered for.
    dtype: type of the computation, on which the chip's peak depends.
    text_file: where to write the compiled program, or None.
  """
  started = time.monotonic()
  compiled = lowered.compile(None if topology.chip.torus else GPU_OPTIONS)
  seconds = time.monotonic() - started
  text = compiled.as_text()
  if text_file:
    pathlib.Path(text_file).write_text(text)
  return {
    **summary(counts.count(hlo.parse(text)), topology, dtype),
    'memory': memory(compiled, topology),
    'compile_seconds': round(seconds),
  }


def memory(compiled: jax.stages.Compiled, topology: Topology) -> dict[str, float]:
  """Returns the most gigabytes that the program needs on a chip, by what they hold."""
  found = compiled.memory_analysis()
  parts = {
    'arguments': found.argument_size_in_bytes,
    'results': found.output_size_in_bytes - found.alias_size_in_bytes,
    'temporary': found.temp_size_in_bytes,
    'program': found.generated_code_size_in_bytes,
  }
  parts = {name: size / _GB for name, size in parts.items()}
  parts |= {'peak': sum(parts.values()), 'of_chip': topology.chip.memory / _GB}
  return {name: round(size, 4) for name, size in parts.items()}


def summary(found: counts.Counts, topology: Topology, dtype: str) -> dict[str, Any]:
  """Returns counts and the time that they take at least, see docs/accelerators.md."""
  chip = topology.chip
  # Other collectives send to neighbours alone.
  hops = lambda name: topology.hops if 'all-to-all' in name else 1
  links = sum(sent * hops(name) for name, sent in found.link_bytes.items())
  milliseconds = {
    'flops': found.flops / chip.flops[dtype],
    'bytes': found.bytes / chip.bandwidth,
    'main_memory': found.main_bytes / chip.bandwidth,
    'links': links / topology.link_bandwidth if links else 0.0,
  }
  if found.network_bytes:
    milliseconds['network'] = sum(found.network_bytes.values()) / chip.network
  # An array in the memory on the chip could be anywhere else, too: the pessimistic bound counts it.
  bounds = {'by_bytes': 'bytes', 'by_main_memory': 'main_memory'}
  others = [milliseconds[name] for name in milliseconds if name not in bounds.values()]
  times = {name: max(milliseconds[memory], *others) for name, memory in bounds.items()}
  sent = lambda by_name: {name: round(n / _GB, 5) for name, n in by_name.items()}
  gigabytes = lambda field: {
    name: round(size / _GB, 4) for name, size in list(found.bytes_by(field).items())[:TOP]
  }
  return {
    'tflop': round(found.flops / _TERA, 4),
    'gb_moved': round(found.bytes / _GB, 4),
    'gb_main_memory': round(found.main_bytes / _GB, 4),
    'gb_over_links': sent(found.link_bytes),
    'gb_between_slices': sent(found.network_bytes),
    'ms': {name: round(1e3 * seconds, 3) for name, seconds in milliseconds.items()},
    'step_ms': {name: round(1e3 * seconds, 3) for name, seconds in times.items()},
    'mfu': {name: round(milliseconds['flops'] / t, 4) if t else 0.0 for name, t in times.items()},
    'gb_by_kind': gigabytes('kind'),
    'gb_by_op': gigabytes('op_name'),
    'gb_of_largest_arrays': {
      name: round(size / _GB, 4) for name, size in found.largest_arrays(TOP).items()
    },
    'loops_counted_once': found.unknown_loops,
    'host_transfers': found.host_transfers,
  }

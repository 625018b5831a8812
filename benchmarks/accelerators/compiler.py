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
_GB, _TERA = 1e9, 1e12


@contextlib.contextmanager
def compiling_for(topology: Topology) -> Iterator[None]:
  """Describes the devices of a topology to the program.

  Raises:
    InputError: the compiler for it is not installed, or knows no such topology.
  """
  with devices.compiling_for(describe(topology)):
    yield


def describe(topology: Topology) -> list[jax.Device]:
  """Returns the devices of a topology, which only the compiler knows; errors as above."""
  if not topology.chip.torus:
    raise InputError(f'--topology={topology.name}: only TPUs can be compiled for yet')
  # The compiler otherwise asks the network which TPU this machine is, and allows one process.
  os.environ |= {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': f'{topology.chip_name}-{math.prod(topology.axes)}',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  try:
    found = topologies.get_topology_desc(topology_name=topology.name, platform='tpu')
  except Exception as error:
    raise InputError(
      f'--topology={topology.name}: cannot be described ({str(error).splitlines()[0]}); '
      'it needs the compiler for TPUs: pip install libtpu'
    ) from error
  return list(found.devices)


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
  compiled = lowered.compile()
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
  links = sum(found.link_bytes.values())
  milliseconds = {
    'flops': found.flops / chip.flops[dtype],
    'bytes': found.bytes / chip.bandwidth,
    'main_memory': found.main_bytes / chip.bandwidth,
    'links': links / topology.link_bandwidth if links else 0.0,
  }
  # An array in the memory on the chip could be anywhere else, too: the pessimistic bound counts it.
  times = {
    'by_bytes': max(milliseconds['flops'], milliseconds['bytes'], milliseconds['links']),
    'by_main_memory': max(
      milliseconds['flops'], milliseconds['main_memory'], milliseconds['links']
    ),
  }
  gigabytes = lambda field: {
    name: round(size / _GB, 4) for name, size in list(found.bytes_by(field).items())[:TOP]
  }
  return {
    'tflop': round(found.flops / _TERA, 4),
    'gb_moved': round(found.bytes / _GB, 4),
    'gb_main_memory': round(found.main_bytes / _GB, 4),
    'gb_over_links': {name: round(n / _GB, 5) for name, n in found.link_bytes.items()},
    'ms': {name: round(1e3 * seconds, 3) for name, seconds in milliseconds.items()},
    'step_ms': {name: round(1e3 * seconds, 3) for name, seconds in times.items()},
    'mfu': {name: round(milliseconds['flops'] / t, 4) if t else 0.0 for name, t in times.items()},
    'gb_by_kind': gigabytes('kind'),
    'gb_by_op': gigabytes('op_name'),
    'loops_counted_once': found.unknown_loops,
    'host_transfers': found.host_transfers,
  }

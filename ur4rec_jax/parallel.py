"""The only file that knows devices: placement, the mapped step and its twin, several hosts.

A step is a pure function of one device's share that names its axis `AXIS`. All arrays given to a
mapped step and coming out of it live on this process's own devices.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = 'batch'
PyTree = Any


def start_processes() -> None:
  """Joins the other processes of a run, if `JAX_COORDINATOR_ADDRESS` says there are any.

  `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are read from the
  environment; on SLURM and Cloud TPU `JAX_COORDINATOR_ADDRESS=auto` lets jax find all three.
  """
  address = os.environ.get('JAX_COORDINATOR_ADDRESS')
  if not address:
    return
  if jax.config.jax_platforms == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  if address == 'auto':
    jax.distributed.initialize()
  else:
    jax.distributed.initialize(
      address, int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID'])
    )


def device_count() -> int:
  """Number of devices over all processes."""
  return jax.device_count()


def is_main_process() -> bool:
  """True in the one process that prints and writes files."""
  return jax.process_index() == 0


def describe_devices() -> str:
  """Devices for people, e.g. `8 x NVIDIA H100 in 2 processes`."""
  processes = jax.process_count()
  device = jax.devices()[0]
  cores = f' ({os.cpu_count()} cores)' if device.platform == 'cpu' else ''
  name = f'{jax.device_count()} x {device.device_kind}{cores}'
  return name + (f' in {processes} processes' if processes > 1 else '')


@functools.cache
def _local_mesh() -> Mesh:
  return Mesh(np.array(jax.local_devices()), (AXIS,))


@functools.cache
def _global_mesh() -> Mesh:
  by_process = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(by_process), (AXIS,))


def replicate(tree: PyTree) -> PyTree:
  """Copies every array of `tree` whole onto each local device."""
  return jax.device_put(tree, NamedSharding(_local_mesh(), PartitionSpec()))


def split(tree: PyTree, axis: int) -> PyTree:
  """Cuts dimension `axis` of every array into one equal share a device.

  Args:
    tree: NumPy arrays `[..., rows, ...]`; `rows` is a multiple of `device_count()`.
    axis: which dimension to cut.

  Returns:
    NumPy arrays `[devices, ..., rows / devices, ...]`.
  """
  return jax.tree.map(lambda x: np.stack(np.split(x, jax.device_count(), axis)), tree)


def shard(tree: PyTree) -> PyTree:
  """Places one leading slice of every array on each device, this process's on its own.

  Args:
    tree: NumPy arrays `[devices, ...]`, the same on every process.

  Returns:
    Arrays `[local devices, ...]`.
  """
  first = jax.process_index() * jax.local_device_count()
  local = jax.tree.map(lambda x: x[first : first + jax.local_device_count()], tree)
  return jax.device_put(local, NamedSharding(_local_mesh(), PartitionSpec(AXIS)))


def to_global(tree: PyTree) -> PyTree:
  """Views replicated local arrays as arrays over all processes, as a checkpoint needs them."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.host_local_array_to_global_array(tree, _global_mesh(), PartitionSpec())


def to_local(tree: PyTree) -> PyTree:
  """Undoes `to_global`."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.global_array_to_host_local_array(tree, _global_mesh(), PartitionSpec())


def replicated_sharding() -> NamedSharding:
  """Sharding of arrays over all processes that are whole on each device."""
  return NamedSharding(_global_mesh(), PartitionSpec())


def any_process(flag: bool) -> bool:
  """True in every process if `flag` is in any; a barrier when there are several."""
  if jax.process_count() == 1:
    return flag
  with jax.transfer_guard('allow'):
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def on_each_device(function: Callable) -> Callable:
  """Compiles a function of what `replicate` placed, to run whole on each local device."""
  return jax.jit(function, out_shardings=NamedSharding(_local_mesh(), PartitionSpec()))


def pmap(step: Callable, in_axes: Sequence[int | None], donate_argnums: Sequence[int]) -> Callable:
  """Maps `step` over all devices; what it returns must be equal on each.

  Args:
    step: pure function of one device's share, free to use `jax.lax` collectives over `AXIS`.
    in_axes: for each argument 0 if it comes from `shard`, None if from `replicate`.
    donate_argnums: arguments whose memory the outputs take over.

  Returns:
    The compiled function, giving replicated outputs.
  """
  return jax.pmap(
    step, AXIS, in_axes=tuple(in_axes), out_axes=None, donate_argnums=tuple(donate_argnums)
  )


def shard_map(
  step: Callable, in_axes: Sequence[int | None], donate_argnums: Sequence[int]
) -> Callable:
  """Does what `pmap` does, spelled with `jax.shard_map`; both give the same parameters.

  `check_vma=False` because with it a `pmean` of gradients is one sum too many.
  """
  specs = tuple(PartitionSpec() if axis is None else PartitionSpec(AXIS) for axis in in_axes)

  def share(*args):
    squeeze = lambda tree: jax.tree.map(lambda x: x[0], tree)
    return step(
      *(arg if axis is None else squeeze(arg) for arg, axis in zip(args, in_axes, strict=True))
    )

  mapped = jax.jit(
    jax.shard_map(
      share, mesh=_global_mesh(), in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    ),
    donate_argnums=tuple(donate_argnums),
  )
  if jax.process_count() == 1:
    return mapped

  def on_several_processes(*args):
    args = [
      multihost_utils.host_local_array_to_global_array(arg, _global_mesh(), spec)
      for arg, spec in zip(args, specs, strict=True)
    ]
    return to_local(mapped(*args))

  return on_several_processes


MAPPINGS = {'pmap': pmap, 'shard_map': shard_map}

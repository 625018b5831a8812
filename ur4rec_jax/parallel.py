"""The only file that knows devices: placement, the mapped step and its twin, several processes.

A step is a pure function of one device's share that names its axis `AXIS`. All arrays given to a
mapped step and coming out of it live on this process's own devices.
"""

import atexit
import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ur4rec_jax.errors import LostProcessError, ReportedError

AXIS = 'batch'
PyTree = Any
# Where a process does not notice in its next collective that another has died, as on GPUs and TPUs,
# jax ends it this long after the other's last heartbeat; its own default is 100.
_HEARTBEAT_SECONDS = 30
_LEAVE_SECONDS = 5
# What the errors of a collective, of the coordinator and of a barrier say when a process is gone.
_LOST = re.compile('Gloo|NCCL|coordination|heartbeat|barrier', re.IGNORECASE)


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
  """Joins the other processes of a run, if `JAX_COORDINATOR_ADDRESS` says there are any.

  `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are read from the
  environment; on SLURM and Cloud TPU `JAX_COORDINATOR_ADDRESS=auto` lets jax find all three.

  Raises:
    LostProcessError: another process has died, which none can go on without.
  """
  address = os.environ.get('JAX_COORDINATOR_ADDRESS')
  if not address:
    yield
    return
  if jax.config.jax_platforms == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  if address == 'auto':
    del os.environ['JAX_COORDINATOR_ADDRESS']  # Which jax would take for an address.
    found = ()
  else:
    found = (address, *(int(os.environ[f'JAX_{name}']) for name in ('NUM_PROCESSES', 'PROCESS_ID')))
  jax.distributed.initialize(*found, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
  try:
    yield
  except Exception as error:
    if signs := [str(e) for e in _causes(error) if _LOST.search(str(e))]:
      error = LostProcessError(
        'another process of this run has died; start the same command again in all of them to go '
        f'on from the last checkpoint ({signs[-1].splitlines()[0]})'
      )
    # At exit jax would wait for processes that may be gone, and then abort.
    atexit.register(_leave, error.exit_code if isinstance(error, ReportedError) else 1)
    raise error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """An error and what led to it, as far as it comes from elsewhere."""
  while error:
    if not isinstance(error, ReportedError):
      yield error
    error = error.__cause__ or error.__context__


def _leave(exit_code: int) -> None:
  """Ends this process when all have come here, or soon: the first takes the coordinator along."""
  with contextlib.suppress(Exception):
    client = jax._src.distributed.global_state.client
    client.wait_at_barrier('leave', timeout_in_ms=1000 * _LEAVE_SECONDS)
  sys.stdout.flush()
  os._exit(exit_code)


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

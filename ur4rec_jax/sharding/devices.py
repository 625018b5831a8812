"""Devices and processes: placement of arrays, `pmap` and its twin `shard_map`, joining processes.

Other files use devices only through this one, and through collectives over the axis `AXIS` inside
mapped functions. All inputs and outputs of a mapped function live on this process's own devices.
"""

import atexit
import contextlib
import functools
import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ur4rec_jax.errors import DeviceError, InputError, LostProcessError, ReportedError, as_reported

AXIS = 'batch'
PyTree = Any
# On GPUs and TPUs a collective does not always fail when another process has died. Then jax ends
# this process this long after the other's last heartbeat; the default of jax is 100.
_HEARTBEAT_SECONDS = 30
# At its end a process waits this long for the others. If one does not come, the first process waits
# a little longer, because its own end aborts the others.
_LEAVE_SECONDS = 5
_HEAD_START_SECONDS = 2
# Words in the errors of collectives, the coordinator and barriers after a process has died.
_LOST = re.compile('Gloo|NCCL|coordination|heartbeat|barrier', re.IGNORECASE)


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
  """Joins the other processes of a run, if `JAX_COORDINATOR_ADDRESS` says there are any.

  `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are read from the
  environment; on SLURM and Cloud TPU `JAX_COORDINATOR_ADDRESS=auto` lets jax find all three.

  Raises:
    InputError: an environment variable is wrong, or names a device that is not there.
    LostProcessError: another process has died.
  """
  _check_xla_flags()
  address = os.environ.get('JAX_COORDINATOR_ADDRESS')
  if not address:
    _check_devices()
    yield
    return
  if jax.config.jax_platforms == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  if address == 'auto':
    del os.environ['JAX_COORDINATOR_ADDRESS']  # jax would take the word for an address.
    found = ()
  else:
    found = _own_place(address)
  try:
    jax.distributed.initialize(*found, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
  except ValueError as error:  # With `auto`, if jax finds no scheduler.
    raise InputError(
      f'JAX_COORDINATOR_ADDRESS={address}: jax finds no other processes here ({error}); give '
      'host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave all three out for one process'
    ) from error
  try:
    _check_devices()
    yield
  except Exception as error:
    if signs := [str(e) for e in _causes(error) if _LOST.search(str(e))]:
      error = LostProcessError(
        'another process of this run has died; start the same command again in all of them to go '
        f'on from the last checkpoint ({signs[-1].splitlines()[0]})'
      )
    # At exit jax would wait for processes that may be gone, and then abort.
    atexit.register(_leave, (as_reported(error) or ReportedError()).exit_code)
    raise error


def _check_xla_flags() -> None:
  """Raises InputError if XLA does not know a flag, after which it would end this process."""
  if not (flags := os.environ.get('XLA_FLAGS')):
    return
  trial = 'from jaxlib import xla_client; xla_client.CompileOptions()'
  done = subprocess.run([sys.executable, '-c', trial], capture_output=True, text=True, check=False)
  if done.returncode:
    problem = (done.stderr.strip().splitlines() or ['it ends the program'])[-1]
    raise InputError(f'XLA_FLAGS={flags}: {problem.rpartition("] ")[2]}; remove or correct it')


def _own_place(address: str) -> tuple[str, int, int]:
  """Returns address, number of processes and own number from the environment, or InputError."""
  names = 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
  number, own = (os.environ.get(name, '') for name in names)
  if not re.fullmatch(r'.+:\d+', address):
    raise InputError(f'JAX_COORDINATOR_ADDRESS={address}: must be host:port, or auto')
  if not (number.isdecimal() and own.isdecimal() and int(own) < int(number)):
    raise InputError(
      f'JAX_NUM_PROCESSES={number} and JAX_PROCESS_ID={own}: with JAX_COORDINATOR_ADDRESS, set the '
      'number of processes and the number of this one, which counts from 0'
    )
  return address, int(number), int(own)


def _check_devices() -> None:
  """Finds the devices; raises InputError if there are none, DeviceError if they are in use."""
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:
    platforms = os.environ.get('JAX_PLATFORMS', '')
    problem = (str(error).splitlines() or ['there is no such device, or no driver for it'])[0]
    if re.search('ABORTED|UNAVAILABLE|in use|busy', problem):
      raise DeviceError(f'the devices cannot be used now: {problem}') from error
    raise InputError(
      f'JAX_PLATFORMS={platforms}: {problem}; install jax for the device (pip install '
      "'ur4rec-jax[cuda12]' or [tpu]), or leave JAX_PLATFORMS out to train on what there is"
    ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and its causes, without the errors that this project raises itself."""
  while error:
    if not isinstance(error, ReportedError):
      yield error
    error = error.__cause__ or error.__context__


def _leave(exit_code: int) -> None:
  """Ends this process; the first one, which is the coordinator, ends last."""
  try:
    client = jax._src.distributed.global_state.client
    client.wait_at_barrier('leave', timeout_in_ms=1000 * _LEAVE_SECONDS)
    jax.distributed.shutdown()
  except Exception:  # A process has died, so no barrier works; give the others a head start.
    if is_main_process():
      time.sleep(_HEAD_START_SECONDS)
  sys.stdout.flush()
  os._exit(exit_code)


# Devices of another machine to compile for; empty to use the devices of this one.
_described: tuple[jax.Device, ...] = ()


@contextlib.contextmanager
def compiling_for(devices: Sequence[jax.Device]) -> Iterator[None]:
  """Lets mapped functions be lowered for devices that this machine does not have, see `lower`.

  Args:
    devices: devices of a topology from `jax.experimental.topologies.get_topology_desc`.
  """
  global _described
  before, _described = _described, tuple(devices)
  _global_mesh.cache_clear()
  try:
    yield
  finally:
    _described = before
    _global_mesh.cache_clear()


def device_count() -> int:
  """Returns the number of devices of all processes."""
  return len(_described) or jax.device_count()


def platform() -> str:
  """Returns `cpu`, `gpu` or `tpu`, the kind of device that programs are compiled for."""
  kind = (_described or jax.local_devices())[0].platform
  return 'gpu' if kind in ('cuda', 'rocm') else kind


def compute_capability() -> float:
  """Returns the generation of an NVIDIA GPU, e.g. 9.0 for an H100; 0 for other devices."""
  device = (_described or jax.local_devices())[0]
  try:
    return float(getattr(device, 'compute_capability', None) or 0)
  except ValueError:  # AMD's have names, such as gfx90a.
    return 0.0


def compute_dtype(name: str) -> np.dtype:
  """Returns the type to compute in for `config.dtype`, which may leave it to the devices."""
  if name == 'auto':
    is_fast = platform() == 'tpu' or compute_capability() >= 8
    name = 'bfloat16' if is_fast else 'float32'
  return jnp.dtype(name)


def is_main_process() -> bool:
  """Returns True in the one process that prints and writes files."""
  return jax.process_index() == 0


def usable_cores() -> int:
  """Returns how many cores this process may use, which a container or scheduler may limit."""
  affinity = getattr(os, 'sched_getaffinity', None)  # Only Linux has it.
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def use_cpu_threads(number: int) -> None:
  """Sets the number of threads that XLA uses on CPU; call it before anything is computed.

  Args:
    number: number of threads; 0 for one per core that this process may use.
  """
  if number:
    os.environ['NPROC'] = str(number)  # XLA reads it when it opens the CPU.


def machine() -> dict[str, Any]:
  """Describes the devices and, on CPU, the usable cores and the threads.

  The last digits of a run's results depend on all of these except the cores.
  """
  device = jax.devices()[0]
  found = {'device': device.device_kind, 'devices': jax.device_count()}
  if device.platform != 'cpu':
    return found
  cores, threads = usable_cores(), os.environ.get('NPROC', '')
  return found | {'cores': cores, 'threads': int(threads) if threads.isdecimal() else cores}


def describe_devices() -> str:
  """Describes the devices, e.g. `8 x NVIDIA H100 in 2 processes`."""
  processes = jax.process_count()
  device = jax.devices()[0]
  cores = f' ({usable_cores()} cores)' if device.platform == 'cpu' else ''
  name = f'{jax.device_count()} x {device.device_kind}{cores}'
  return name + (f' in {processes} processes' if processes > 1 else '')


@functools.cache
def _local_mesh() -> Mesh:
  return Mesh(np.array(jax.local_devices()), (AXIS,))


@functools.cache
def _global_mesh() -> Mesh:
  by_process = sorted(_described or jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(by_process), (AXIS,))


def replicate(tree: PyTree) -> PyTree:
  """Copies every array of `tree` whole onto each local device."""
  return jax.device_put(tree, NamedSharding(_local_mesh(), PartitionSpec()))


def split(tree: PyTree, axis: int) -> PyTree:
  """Cuts dimension `axis` of every array into equal parts, one for each device.

  Args:
    tree: NumPy arrays `[..., rows, ...]`; `rows` is a multiple of `device_count()`.
    axis: which dimension to cut.

  Returns:
    NumPy arrays `[devices, ..., rows / devices, ...]`.
  """
  return jax.tree.map(lambda x: np.stack(np.split(x, device_count(), axis)), tree)


def deal(tree: PyTree) -> PyTree:
  """Cuts the rows of every array into parts as equal as can be, one for each device.

  Args:
    tree: NumPy arrays `[steps, rows, ...]`.

  Returns:
    NumPy arrays `[devices, steps, rows / devices rounded up, ...]`. If the devices cannot share the
    rows equally, the last devices have a row of zeros at their end.
  """

  def deal_one(x: np.ndarray) -> np.ndarray:
    parts = np.array_split(x, device_count(), 1)
    most, others = parts[0].shape[1], [(0, 0)] * (x.ndim - 2)
    return np.stack([np.pad(y, ((0, 0), (0, most - y.shape[1]), *others)) for y in parts])

  return jax.tree.map(deal_one, tree)


def shard(tree: PyTree) -> PyTree:
  """Places one slice of every array on each device of this process.

  Args:
    tree: NumPy arrays `[devices, ...]`, the same on every process.

  Returns:
    Arrays `[local devices, ...]`.
  """
  first = jax.process_index() * jax.local_device_count()
  local = jax.tree.map(lambda x: x[first : first + jax.local_device_count()], tree)
  return jax.device_put(local, NamedSharding(_local_mesh(), PartitionSpec(AXIS)))


def place(tree: PyTree, axes: PyTree) -> PyTree:
  """Places NumPy arrays: whole on each device if their entry in `axes` is None, cut if it is 0.

  Args:
    tree: arrays; those to be cut have a multiple of `device_count()` rows.
    axes: 0 or None for each array, or for all of a subtree.

  Returns:
    The arrays, or `[local devices, rows / devices, ...]`.
  """
  return _map_axes(
    lambda axis, x: replicate(x) if axis is None else shard(split(x, axis)), axes, tree
  )


def create(function: Callable[[], PyTree], axes: PyTree) -> PyTree:
  """Runs `function` compiled, so that each device computes only its part of the result.

  Args:
    function: pure, without arguments.
    axes: for each resulting array, or for a whole subtree: 0 if its rows are cut, whose number is a
      multiple of `device_count()`; None if it is whole on each device.

  Returns:
    The result, placed as by `place`.
  """
  return to_local(jax.jit(function, out_shardings=_map_axes(_sharding, axes))(), axes)


def to_global(tree: PyTree, axes: PyTree = None) -> PyTree:
  """Views local arrays as arrays over all processes, as a checkpoint needs them.

  Args:
    tree: arrays as mapped steps give them.
    axes: for each array, or for all of a subtree, None if it is whole on each device; or the
      dimension that counts local devices, `[..., local devices, rows / devices, ...]`, which is
      merged with the next one: `[..., rows, ...]`.
  """

  def merge(axis: int | None, x: PyTree) -> PyTree:
    if axis is None:
      return x
    return _reshape((*x.shape[:axis], -1, *x.shape[axis + 2 :]), axis)(x)

  return _map_axes(merge, axes, _over_processes(tree, axes))


def to_local(tree: PyTree, axes: PyTree = None) -> PyTree:
  """Undoes `to_global`."""

  def divide(axis: int | None, x: PyTree) -> PyTree:
    if axis is None:
      return x
    return _reshape((*x.shape[:axis], device_count(), -1, *x.shape[axis + 1 :]), axis)(x)

  return _of_this_process(_map_axes(divide, axes, tree), axes)


def with_shardings(tree: PyTree, axes: PyTree) -> PyTree:
  """Returns the shapes of a tree's arrays over all processes, cut along `axes` or whole."""

  def of(axis: int | None, subtree: PyTree) -> PyTree:
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(axis))
    return jax.tree.map(shape, subtree)

  return _map_axes(of, axes, tree)


def any_process(flag: bool) -> bool:
  """Returns True in every process if `flag` is True in any; a barrier between processes."""
  return _ask_processes(flag)()


def late_any_process() -> Callable[[bool], bool]:
  """Returns a function like `any_process`, for loops that keep the devices busy.

  The devices answer only after all work that they got before. So with several processes each call
  but the first one returns the answer to the call before, and the host can send more work while
  the devices still have some. It is for flags that stay True once they are.
  """
  before = None

  def ask(flag: bool) -> bool:
    nonlocal before
    now = _ask_processes(flag)
    answer = now if before is None or jax.process_count() == 1 else before
    before = now
    return answer()

  return ask


def _ask_processes(flag: bool) -> Callable[[], bool]:
  """Asks whether `flag` is True in any process; the returned function waits for the answer."""
  if jax.process_count() == 1:
    return lambda: flag
  with jax.transfer_guard('allow'):
    flags = _over_processes(np.full(jax.local_device_count(), flag), 0)
    found = _any()(flags)

  def answer() -> bool:
    with jax.transfer_guard('allow'):
      return bool(found)

  return answer


@functools.cache
def _any() -> Callable[[jax.Array], jax.Array]:
  return _one_at_a_time(jax.jit(lambda flags: flags.any(), out_shardings=_sharding(None)))


def on_each_device(function: Callable) -> Callable:
  """Compiles a function of replicated arrays, which runs whole on each local device."""
  return jax.jit(function, out_shardings=NamedSharding(_local_mesh(), PartitionSpec()))


def pmap(
  step: Callable, in_axes: Sequence[PyTree], donate_argnums: Sequence[int], out_axes: PyTree = None
) -> Callable:
  """Maps `step` over all devices.

  Args:
    step: pure function of one device's part, which may use `jax.lax` collectives over `AXIS`.
    in_axes: for each argument, or each array in it, 0 if it comes from `shard`, None if from
      `replicate`.
    donate_argnums: arguments whose memory the outputs take over.
    out_axes: for each output, None if it is equal on all devices, 0 if each device has its own.

  Returns:
    The compiled function, whose outputs are placed like its inputs.
  """
  # Flattened, because pmap over several processes hashes the axes, and dicts cannot be hashed.
  axes, structure = jax.tree.flatten(out_axes, is_leaf=lambda x: x is None)
  flat = lambda *args: tuple(structure.flatten_up_to(step(*args)))
  mapped = jax.pmap(
    flat, AXIS, in_axes=tuple(in_axes), out_axes=tuple(axes), donate_argnums=tuple(donate_argnums)
  )
  compiled = _one_at_a_time(lambda *args: structure.unflatten(mapped(*args)))
  # jax itself would keep the program and all that the step holds, such as the data of a run.
  weakref.finalize(compiled, _forget_mapped, flat).atexit = False
  return compiled


def _forget_mapped(function: Callable) -> None:
  """Frees the programs of a function that was given to `jax.pmap`."""
  with contextlib.suppress(ImportError, AttributeError):  # Another jax may keep nothing.
    from jax._src.pmap import _cached_shard_map

    _cached_shard_map.evict_function(function)


def shard_map(
  step: Callable, in_axes: Sequence[PyTree], donate_argnums: Sequence[int], out_axes: PyTree = None
) -> Callable:
  """Maps `step` like `pmap`, written with `jax.shard_map`; both give the same parameters.

  With `check_vma=True`, `pmean` of gradients would sum them over devices once more.
  """
  in_axes = tuple(in_axes)
  mapped = _jit_shard_map(step, in_axes, donate_argnums, out_axes)
  return _one_at_a_time(
    lambda *args: _of_this_process(mapped(*_over_processes(args, in_axes)), out_axes)
  )


# The mapped function that was started last gave it; None unless a CPU has several devices.
_last_output: jax.Array | None = None


def _one_at_a_time(function: Callable) -> Callable:
  """Lets a mapped function start when the one before has ended, on several CPU devices.

  These devices share the threads of the process. Two functions that run at once can hold all
  threads, each waiting in a collective for a device that gets none.

  Args:
    function: its last output is never donated, because the next function waits for it.
  """

  def start(*args):
    global _last_output
    if _last_output is not None:
      jax.block_until_ready(_last_output)
    outputs = function(*args)
    if platform() == 'cpu' and jax.local_device_count() > 1:
      _last_output = jax.tree.leaves(outputs)[-1]
    return outputs

  return start


def lower(
  step: Callable,
  in_axes: Sequence[PyTree],
  donate_argnums: Sequence[int],
  out_axes: PyTree,
  shapes: Sequence[PyTree],
) -> jax.stages.Lowered:
  """Lowers the function that `shard_map` would run; inside `compiling_for`, for other devices.

  Args:
    step: see `pmap`.
    in_axes: see `pmap`.
    donate_argnums: see `pmap`.
    out_axes: see `pmap`.
    shapes: for each argument, arrays or `jax.ShapeDtypeStruct`s; `[devices, ...]` where the axis
      is 0.
  """
  in_axes = tuple(in_axes)
  mapped = _jit_shard_map(step, in_axes, donate_argnums, out_axes)
  return mapped.lower(*with_shardings(tuple(shapes), in_axes))


def on_one_device(shapes: PyTree) -> PyTree:
  """Returns the shapes of arrays, placed on the first device that programs are compiled for."""
  where = SingleDeviceSharding((_described or jax.devices())[0])
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(place, shapes)


def _jit_shard_map(
  step: Callable, in_axes: tuple[PyTree, ...], donate_argnums: Sequence[int], out_axes: PyTree
) -> Callable:
  """Compiles `step` mapped over all devices, for arrays that are spread over them."""
  in_specs, out_specs = _map_axes(_spec, in_axes), _map_axes(_spec, out_axes)

  def share(*args):
    squeeze = lambda axis, tree: tree if axis is None else jax.tree.map(lambda x: x[0], tree)
    expand = lambda axis, tree: tree if axis is None else jax.tree.map(lambda x: x[None], tree)
    return _map_axes(expand, out_axes, step(*_map_axes(squeeze, in_axes, args)))

  return jax.jit(
    jax.shard_map(
      share, mesh=_global_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False
    ),
    donate_argnums=tuple(donate_argnums),
  )


MAPPINGS = {'pmap': pmap, 'shard_map': shard_map}


def _over_processes(tree: PyTree, axes: PyTree) -> PyTree:
  """Views local arrays, whose dimension in `axes` counts local devices, as counting all devices."""
  if jax.process_count() == 1:
    return tree
  view = multihost_utils.host_local_array_to_global_array
  return _map_axes(lambda axis, x: view(x, _global_mesh(), _spec(axis)), axes, tree)


def _of_this_process(tree: PyTree, axes: PyTree) -> PyTree:
  """Undoes `_over_processes`."""
  if jax.process_count() == 1:
    return tree
  view = multihost_utils.global_array_to_host_local_array
  return _map_axes(lambda axis, x: view(x, _global_mesh(), _spec(axis)), axes, tree)


def _sharding(axis: int | None) -> NamedSharding:
  return NamedSharding(_global_mesh(), _spec(axis))


def _spec(axis: int | None) -> PartitionSpec:
  return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)


def _map_axes(function: Callable, axes: PyTree, *trees: PyTree) -> PyTree:
  """Maps `function` over axes and the arrays or subtrees they belong to; None is a leaf, too."""
  return jax.tree.map(function, axes, *trees, is_leaf=lambda x: x is None)


@functools.cache
def _reshape(shape: tuple[int, ...], axis: int) -> Callable:
  return jax.jit(lambda x: x.reshape(shape), out_shardings=_sharding(axis))

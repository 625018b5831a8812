"""Checkpoints: Orbax saves them, a manifest of hashes proves them, damaged ones are set aside.

Orbax alone restores a file with a flipped byte without an error, and takes an empty step folder for
the latest step. Here a step counts only if its manifest, which is written last, matches every file.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from ur4rec_jax.errors import InputError, StorageError
from ur4rec_jax.files import write_file
from ur4rec_jax.runs.saved_steps import (
  MANIFEST,
  checkpoint_folder,
  find_damage,
  hashes,
  is_whole,
  saved_steps,
)
from ur4rec_jax.sharding import devices
from ur4rec_jax.training.optimizers import by_name

PyTree = Any


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each array by its name."""
  return {name: tuple(x.shape) for name, x in by_name(tree).items()}


def read_latest(workdir: str, tree: PyTree, axes: PyTree = None) -> tuple[PyTree, dict] | None:
  """Reads the newest complete step of a run that may be training at this moment.

  Nothing in the folder changes. A step that is being written or deleted does not count.

  Args:
    workdir: the run's folder.
    tree: arrays or shapes of the structure that was saved.
    axes: the dimension along which each array was sharded, or None, as for `Checkpointer.restore`.

  Returns:
    The arrays, whole on each device of this process, and the progress; None without a step.

  Raises:
    InputError: the step holds arrays of other names or shapes.
  """
  folder, tried = checkpoint_folder(workdir), None
  while (steps := saved_steps(workdir)) != tried:  # The run may have saved another one meanwhile.
    tried = steps
    for step in filter(lambda step: is_whole(folder / str(step)), steps):
      try:
        return _read_step(folder / str(step), tree, axes, whole=True)
      except Exception:  # Orbax raises any kind of error if the run deletes the step meanwhile.
        if is_whole(folder / str(step)):
          raise
  return None


def _read_step(
  folder: pathlib.Path, tree: PyTree, axes: PyTree, whole: bool = False
) -> tuple[PyTree, dict]:
  """Reads the arrays and the progress of one step.

  Args:
    folder: folder of the step.
    tree: see `Checkpointer.restore`.
    axes: see `Checkpointer.restore`. A sharded array may be stored with other padding than in
      `tree`, because padding depends on the number of devices.
    whole: whether to place all arrays whole on each device.
  """
  with _without_warnings(), ocp.Checkpointer(_array_handler()) as reader:
    _check_arrays(folder, _shapes(reader.metadata(folder / 'state').item_metadata.tree), tree, axes)
    placement = None if whole else axes
    template = devices.with_shardings(tree, placement)
    restore_args = jax.tree.map(
      lambda x: dataclasses.replace(x, strict=False),
      ocp.checkpoint_utils.construct_restore_args(template),
    )
    arrays = reader.restore(folder / 'state', ocp.args.PyTreeRestore(template, restore_args))
  with _without_warnings(), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    progress = reader.restore(folder / 'progress')
  return devices.to_local(arrays, placement), progress


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
  """Silences the warning of Orbax that a part of a step has no metadata of its own."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _check_arrays(
  folder: pathlib.Path, stored: dict[str, tuple[int, ...]], tree: PyTree, axes: PyTree
) -> None:
  """Raises InputError unless the stored arrays have the names and shapes of `tree`."""
  expected, cut = _shapes(tree), by_name(axes, is_leaf=lambda x: x is None)
  without_padding = lambda name, shape: [n for i, n in enumerate(shape) if i != cut.get(name)]
  differing = sorted(
    name
    for name in stored | expected
    if name not in stored
    or name not in expected
    or without_padding(name, stored[name]) != without_padding(name, expected[name])
  )
  if differing:
    name = differing[0]
    raise InputError(
      f'{folder}: holds arrays of another model: {name} is {stored.get(name, "missing")} there and '
      f'{expected.get(name, "missing")} here, as are {len(differing) - 1} others. Another version '
      'of the program wrote it, or files were exchanged; go on with that version, or train again '
      'in another --workdir'
    )


def _array_handler() -> ocp.PyTreeCheckpointHandler:
  """Makes one device write small arrays that all devices hold.

  By default each device writes a part of every array. Cutting each shape on each device has to be
  compiled, which takes seconds before the first save of a process.
  """
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _QuietLoop(asyncio.SelectorEventLoop):
  """An event loop that ignores writes that end after a failed write has closed it."""

  def call_soon_threadsafe(self, callback, *args, **kwargs):
    try:
      return super().call_soon_threadsafe(callback, *args, **kwargs)
    except RuntimeError:
      if not self.is_closed():
        raise


class _QuietPolicy(asyncio.DefaultEventLoopPolicy):
  """Makes the event loops in which Orbax waits for its writes."""

  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    return _QuietLoop()


class Checkpointer:
  """Saves and restores steps in `WORKDIR/checkpoints`, keeping the latest ones."""

  def __init__(self, workdir: str, max_to_keep: int):
    """Opens the folder to train in it; damaged newest steps are moved aside with a warning."""
    self.workdir, self._max_to_keep = workdir, max_to_keep
    self._folder = checkpoint_folder(workdir)
    self._damaged = self._folder.with_name('damaged_checkpoints')
    self._replaced = self._folder.with_name('replaced_checkpoints')
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise StorageError(f'cannot write to {self._folder}: {error.strerror}') from error
    if devices.is_main_process():
      self._put_replaced_back()
      self._set_damaged_aside()
    devices.any_process(False)  # A barrier: the other processes wait.
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
      ),
      item_handlers={'state': _array_handler(), 'progress': ocp.JsonCheckpointHandler()},
    )

  def _set_damaged_aside(self) -> None:
    """Moves steps away until the newest one is complete."""
    for step in saved_steps(self.workdir):
      folder = self._folder / str(step)
      damage = find_damage(folder)
      if damage is None:
        return
      self._damaged.mkdir(exist_ok=True)
      target = self._damaged / str(step)
      if target.is_dir():
        shutil.rmtree(target)
      folder.rename(target)
      print(
        f'warning: checkpoint of step {step} is damaged ({damage}); moved to {target}, '
        'going back to the one before',
        file=sys.stderr,
        flush=True,
      )

  def _set_replaced_aside(self, step: int) -> None:
    """Moves a step away until it is saved again: it may be the only one that the run has."""
    if devices.is_main_process():
      self._replaced.mkdir(exist_ok=True)
      (self._folder / str(step)).rename(self._replaced / str(step))
    devices.any_process(False)  # A barrier: the other processes wait.
    self._manager.reload()

  def _put_replaced_back(self) -> None:
    """Moves a step back if the process died before it was saved again."""
    for kept in self._replaced.glob('*'):
      target = self._folder / kept.name
      if not target.exists() or find_damage(target) is not None:
        shutil.rmtree(target, ignore_errors=True)
        kept.rename(target)
    shutil.rmtree(self._replaced, ignore_errors=True)

  @property
  def latest_step(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, tree: PyTree, progress: dict, axes: PyTree = None) -> None:
    """Writes a step; when it returns, the step is complete on disk.

    Args:
      step: number of optimizer steps taken; saving the same step again replaces it.
      tree: arrays, as mapped steps give them.
      progress: JSON-serialisable host state.
      axes: which arrays are sharded, see `devices.to_global`.

    Raises:
      StorageError: the disk is full or not writable; earlier steps stay good.
    """
    # The threads of Orbax would print tracebacks of errors that are raised here, too.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_QuietPolicy())
    try:
      self._reserve(sum(x.nbytes for x in jax.tree.leaves(tree)))
      if step in self._manager.all_steps():
        self._set_replaced_aside(step)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(devices.to_global(tree, axes)),
          progress=ocp.args.JsonSave(progress),
        ),
      )
      self._manager.wait_until_finished()
      if devices.is_main_process():
        folder = self._folder / str(step)
        write_file(folder / MANIFEST, json.dumps(hashes(folder), indent=1))
        shutil.rmtree(self._replaced, ignore_errors=True)
      # Orbax itself would delete them before the manifest makes the new step complete.
      for old in sorted(self._manager.all_steps())[: -self._max_to_keep]:
        self._manager.delete(old)
    except (OSError, ValueError) as error:
      reason = getattr(error, 'strerror', None) or (str(error).splitlines() or [''])[0]
      raise StorageError(
        f'checkpoint of step {step} could not be written to {self._folder}: {reason}\n'
        'make room or choose another --workdir; the same command goes on from the last good step'
      ) from error
    finally:
      asyncio.set_event_loop_policy(policy)
    # Not after an error, because closing Orbax would print it once more.
    logging.set_verbosity(verbosity)

  def _reserve(self, size: int) -> None:
    """Raises OSError if there is no room for arrays of `size` bytes.

    Orbax would fail too, but with tracebacks from several threads around the message.
    """
    path = self._folder / f'reserved.tmp-{os.getpid()}'
    try:
      with open(path, 'wb') as f:
        os.posix_fallocate(f.fileno(), 0, size + 2**20)  # A megabyte for metadata.
    finally:
      path.unlink(missing_ok=True)

  def restore(self, tree: PyTree, axes: PyTree = None) -> tuple[PyTree, dict] | None:
    """Reads the latest step.

    Args:
      tree: arrays or shapes of the structure that was saved, on any number of devices.
      axes: the dimension along which each array is sharded; None if it is whole on each device.

    Returns:
      The tree on this process's devices, see `devices.to_local`, and the progress; None if there is
      no step.

    Raises:
      InputError: the step holds arrays of other names or shapes.
    """
    step = self.latest_step
    return None if step is None else _read_step(self._folder / str(step), tree, axes)

  def close(self) -> None:
    """Finishes pending writes."""
    self._manager.close()

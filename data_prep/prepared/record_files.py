"""Writes files of encoded examples, several at the same time where there are several.

Worker processes import this module, which therefore needs neither TFDS nor the raw data.
"""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module

from data_prep.prepared import example_bytes
from ur4rec_jax import files
from ur4rec_jax.data import flat_arrays
from ur4rec_jax.data.dataset import Interactions
from ur4rec_jax.errors import InputError

SHARD_INTERACTIONS = 1 << 22  # Interactions of a file; the histories of a user are never divided.
_READ_AT_ONCE = 10_000  # Records that are read back at once.


class Written(NamedTuple):
  """The number of records of a file, and their bytes."""

  records: int
  size: int


def write(path: Path, records: Iterable[bytes]) -> Written:
  """Writes a file of records and reads it back, so that a failing disk cannot go unnoticed.

  Raises:
    InputError: the records read back differently.
    OSError: the disk is full.
  """
  count = size = 0
  written = hashlib.sha256()
  with _disk_full_as_os_error():
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
      writer.write(record)
      written.update(record)
      count, size = count + 1, size + len(record)
    writer.close()
  if _digest(path, count) != written.digest():
    raise InputError(f'{path}: what was written reads back differently; is the disk sound?')
  return Written(count, size)


def write_histories(paths: list[Path], data: Interactions, workers: int = 1) -> list[Written]:
  """Writes one example a user into the files of `shards`.

  Args:
    paths: one for each shard.
    data: the histories.
    workers: how many processes write; the bytes do not depend on it.
  """
  bounds = shards(data.offsets)
  parts = (
    (path, _part(data, *bound)) for path, bound in zip(paths, bounds, strict=True)
  )  # One after another, because each is a copy.
  if workers == 1 or len(paths) == 1:
    return [_write_part(*part) for part in parts]
  found: list[Written] = []
  with pool_of(min(workers, len(paths))) as pool:
    while some := [*itertools.islice(parts, workers)]:
      found += pool.map(_write_part, *zip(*some, strict=True))
  return found


def pool_of(workers: int) -> ProcessPoolExecutor:
  """Starts processes that end with this one, even if it is killed; they leave Ctrl-C to it."""
  # New processes: a copy of this one would have the locks of its threads, but not the threads.
  context = multiprocessing.get_context('spawn')
  return ProcessPoolExecutor(workers, context, initializer=_follow_parent)


def _follow_parent() -> None:
  def wait() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=wait, daemon=True).start()


def shards(offsets: np.ndarray) -> list[tuple[int, int]]:
  """Divides users into the files of a dataset, see `flat_arrays.user_blocks`."""
  return flat_arrays.user_blocks(offsets, SHARD_INTERACTIONS)


def _part(data: Interactions, start: int, stop: int) -> Interactions:
  first, last = data.offsets[start], data.offsets[stop]
  columns = (column[first:last] for column in (data.item_ids, data.timestamps, data.ratings))
  return Interactions(data.user_ids[start:stop], data.offsets[start : stop + 1] - first, *columns)


def _write_part(path: Path, part: Interactions) -> Written:
  return write(path, example_bytes.histories(*part))


def _digest(path: Path, count: int) -> bytes | None:
  """Hashes the stored records; None if they cannot be read."""
  found = hashlib.sha256()
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    for start in range(0, count, _READ_AT_ONCE):
      for record in reader.read([*range(start, min(start + _READ_AT_ONCE, count))]):
        found.update(record)
    return found.digest() if reader.num_records() == count else None
  except Exception:  # Damaged files make the reader raise any kind of error.
    return None


@contextlib.contextmanager
def _disk_full_as_os_error() -> Iterator[None]:
  try:
    yield
  except RuntimeError as error:  # The record writer raises this on a full disk.
    for code in files.DISK_FULL:
      if os.strerror(code) in str(error):
        raise OSError(code, os.strerror(code)) from error
    raise

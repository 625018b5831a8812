"""Flat arrays of a prepared folder: training maps them into memory instead of decoding TFDS data.

`data_prep.build_dataset` writes them beside the TFDS data. Each array is a `.npy` file. The file
`info.json` holds the SHA-256 of each, and the hashes of the interactions that they were made from.
"""

import json
import mmap
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ur4rec_jax.errors import InputError
from ur4rec_jax.files import sha256

FOLDER = 'flat'
_INFO = 'info.json'
_FORMAT_VERSION = 1
_AT_ONCE = 1 << 20  # Values that are handled at once, so that intermediate arrays stay small.


class FlatArrays:
  """The flat arrays of a prepared folder; a file is checked whenever its array is asked for."""

  def __init__(self, folder: pathlib.Path, records: Mapping[str, Any], way_out: str):
    """Opens nothing yet.

    Args:
      folder: folder of the arrays.
      records: by name of an array its `dtype`, `shape` and `sha256`.
      way_out: end of the message if a file is damaged.
    """
    self._folder, self._records, self._way_out = folder, records, way_out

  def __getitem__(self, name: str) -> np.ndarray:
    """Maps an array into memory, read only.

    The check reads the whole file, but keeps nothing of it in the memory of the process.

    Raises:
      InputError: the file is missing or damaged.
    """
    path = self._folder / _file_name(name)
    try:
      record = self._records[name]
      if sha256(path) != record['sha256']:
        raise ValueError('its content is not what was written')
      array = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, LookupError) as error:
      raise InputError(f'{path}: cannot be read ({error}); {self._way_out}') from error
    return array.view(np.ndarray)


def write(
  folder: pathlib.Path, arrays: Mapping[str, np.ndarray], belongs_to: Mapping[str, Any]
) -> None:
  """Writes flat arrays into an empty folder.

  Args:
    folder: existing, empty folder.
    arrays: by name.
    belongs_to: hashes and sizes of the data that the arrays were made from; `find` compares them.
  """
  records = {}
  for name, array in arrays.items():
    path = folder / _file_name(name)
    np.save(path, array, allow_pickle=False)
    records[name] = {
      'dtype': str(array.dtype),
      'shape': list(array.shape),
      'sha256': sha256(path),
    }
  info = {'format_version': _FORMAT_VERSION, 'belongs_to': belongs_to, 'arrays': records}
  (folder / _INFO).write_text(json.dumps(info, indent=2) + '\n', encoding='utf-8')


def find(
  data_dir: str | pathlib.Path, belongs_to: Mapping[str, Any], way_out: str
) -> FlatArrays | None:
  """Looks for the flat arrays of a prepared folder.

  Args:
    data_dir: the prepared folder.
    belongs_to: identity of the data that the arrays must have been made from, as in `write`.
    way_out: end of the message if they cannot be used.

  Returns:
    The arrays; None if the folder has none that this version reads.

  Raises:
    InputError: the arrays were made from other data, or are damaged.
  """
  folder = pathlib.Path(data_dir) / FOLDER
  if not folder.is_dir():
    return None
  way_out = f'delete {folder} to do without them, or {way_out}'
  try:
    info = json.loads((folder / _INFO).read_text(encoding='utf-8'))
    if info['format_version'] != _FORMAT_VERSION:
      return None
    found, records = info['belongs_to'], info['arrays']
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise InputError(f'{folder / _INFO}: cannot be read ({error!r}); {way_out}') from error
  if found != belongs_to:
    names = {name for name in (*found, *belongs_to) if found.get(name) != belongs_to.get(name)}
    raise InputError(
      f'{folder}: does not belong to this data: its interactions differ from dataset.json or the'
      f' TFDS data beside it ({", ".join(sorted(names))}); {way_out}'
    )
  return FlatArrays(folder, records, way_out)


def parts(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """Yields the start and the values of consecutive parts; releases their memory if mapped."""
  for start in range(0, len(array), _AT_ONCE):
    yield start, array[start : start + _AT_ONCE]
    release(array)


def user_blocks(offsets: np.ndarray, most: int) -> list[tuple[int, int]]:
  """Divides users into consecutive blocks of one user, or with at most so many interactions.

  Args:
    offsets: `[users + 1]`, user u owns the interactions `[offsets[u]:offsets[u + 1]]`.
    most: interactions of a block of several users.

  Returns:
    The first user of each block, and the one after its last.
  """
  blocks, start, users = [], 0, len(offsets) - 1
  while start < users:
    fitting = int(np.searchsorted(offsets, offsets[start] + most, 'right')) - 1
    stop = min(max(fitting, start + 1), users)
    blocks.append((start, stop))
    start = stop
  return blocks


def release(array: np.ndarray) -> None:
  """Releases the memory of a mapped array; later reads come from the file again."""
  _advise(array, mmap.MADV_DONTNEED)


def expect_random_reads(array: np.ndarray) -> None:
  """Tells the system not to read ahead in the file of a mapped array."""
  _advise(array, mmap.MADV_RANDOM)


def _advise(array: np.ndarray, advice: int) -> None:
  """Gives advice about the file of a mapped array; does nothing for an array in memory."""
  owner: Any = array
  while owner is not None and not isinstance(owner, mmap.mmap):
    owner = getattr(owner, 'base', None)
  if owner is not None:
    owner.madvise(advice)


def _file_name(name: str) -> str:
  return f'{name}.npy'

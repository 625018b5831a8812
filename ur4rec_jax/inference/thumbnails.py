"""Small pictures of the items of an exported folder: one packed file, and an index into it.

Writing needs Pillow. Reading needs only NumPy: it returns the stored bytes.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ur4rec_jax.errors import InputError

PACKED = 'pictures.bin'
MEDIA_TYPE = 'image/jpeg'
SIDE = 200  # Pixels of the longest side.
_DIGEST_BYTES = 8
_AT_ONCE = 1024  # Pictures that are in memory at the same time.


class Thumbnails:
  """The pictures of an exported folder.

  A picture whose bytes have changed since the export is treated as if it were missing.
  """

  def __init__(self, folder: str | pathlib.Path, index: Mapping[str, np.ndarray]):
    """Opens the packed file.

    Args:
      folder: the exported folder.
      index: the result of `pack`.

    Raises:
      InputError: the packed file is missing or has another size.
    """
    path = pathlib.Path(folder) / PACKED
    self._offsets, self._digests = index['offsets'], index['digests']
    try:
      self._file = path.open('rb')
      size = path.stat().st_size
    except OSError as error:
      raise InputError(f'{path}: cannot be read ({error.strerror}); export it again') from error
    if size != self._offsets[-1]:
      raise InputError(f'{path}: has changed since it was written; export it again')

  def __len__(self) -> int:
    """Returns the number of items that have a picture."""
    return int(np.count_nonzero(np.diff(self._offsets)))

  def version(self, item: int) -> str:
    """Returns a text that changes with the picture; '' for an item without one.

    Args:
      item: index of the item in the catalogue.
    """
    if self._offsets[item] == self._offsets[item + 1]:
      return ''
    return self._digests[item].tobytes().hex()

  def read(self, item: int) -> bytes | None:
    """Returns a JPEG file; None for an item without a picture.

    Args:
      item: index of the item in the catalogue.
    """
    start, end = map(int, self._offsets[item : item + 2])
    content = os.pread(self._file.fileno(), end - start, start) if end > start else b''
    return content if content and _digest(content) == self._digests[item].tobytes() else None


def pack(
  pictures: Sequence[pathlib.Path | None], folder: str | pathlib.Path
) -> dict[str, np.ndarray]:
  """Writes small copies of pictures into one file.

  Args:
    pictures: `[items]` picture files, None for items without one. A file that is no picture counts
      as none.
    folder: the folder that gets the packed file.

  Returns:
    The index: `offsets` `[items + 1]` int64 into the file, and `digests` `[items, 8]` uint8.
  """
  offsets = np.zeros(len(pictures) + 1, np.int64)
  digests = np.zeros((len(pictures), _DIGEST_BYTES), np.uint8)
  with (pathlib.Path(folder) / PACKED).open('wb') as file:
    for item, content in enumerate(_shrunk(pictures)):
      file.write(content)
      offsets[item + 1] = offsets[item] + len(content)
      if content:
        digests[item] = np.frombuffer(_digest(content), np.uint8)
    file.flush()
    os.fsync(file.fileno())
  return {'offsets': offsets, 'digests': digests}


def _shrunk(pictures: Sequence[pathlib.Path | None]) -> Iterator[bytes]:
  from ur4rec_jax.encoders.picture_files import BadPicture, thumbnail

  def shrink(path: pathlib.Path | None) -> bytes:
    try:
      return b'' if path is None else thumbnail(path.read_bytes(), SIDE)
    except (OSError, BadPicture):
      return b''

  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    for part in (pictures[i : i + _AT_ONCE] for i in range(0, len(pictures), _AT_ONCE)):
      yield from pool.map(shrink, part)


def _digest(content: bytes) -> bytes:
  return hashlib.sha256(content).digest()[:_DIGEST_BYTES]

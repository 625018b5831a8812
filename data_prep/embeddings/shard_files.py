"""The files of a shard of features: arrays are stored in a small dtype, with hashes."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data.features import decoded, file_name
from ur4rec_jax.errors import InputError
from ur4rec_jax.files import sha256

DTYPES = ('float16', 'float32', 'int8')
_LARGEST_FLOAT16 = 65504


class ShardFiles(NamedTuple):
  """A folder with the arrays of all shards.

  Attributes:
    folder: the folder.
    shards: their number.
    dtype: one of `DTYPES`.
    origin: name of encoder or file, for messages.
  """

  folder: Path
  shards: int
  dtype: str
  origin: str

  def write(
    self, number: int, tokens: np.ndarray, mask: np.ndarray, names: list[str]
  ) -> dict[str, Any]:
    """Writes the arrays of a shard.

    Args:
      number: of the shard, from 0.
      tokens: `[rows, tokens, width]` float32.
      mask: `[rows, tokens]` bool.
      names: `[rows]` ids, for messages.

    Returns:
      `filled` (number of tokens), `squares` (sums of squared errors and of squared values),
      `sha256` by kind of file, and `bytes`.

    Raises:
      InputError: a value is too large or too small for the dtype.
    """
    arrays = {'tokens': tokens, 'mask': mask}
    if self.dtype == 'int8':
      largest = np.abs(tokens).max(-1, initial=0)
      scale = np.minimum(largest / 127, _LARGEST_FLOAT16).astype(np.float16)
      steps = tokens / np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
      arrays |= {'tokens': np.clip(np.rint(steps), -127, 127).astype(np.int8), 'scale': scale}
      stored = decoded(arrays)
      is_lost = (largest / 127 > _LARGEST_FLOAT16) | (mask & ~stored.any(-1))
    else:
      with np.errstate(over='ignore'):
        arrays['tokens'] = stored = tokens.astype(self.dtype)
      is_lost = ~np.isfinite(stored).all(-1) | (mask & ~stored.any(-1))
    if is_lost.any():
      row, token = np.argwhere(is_lost)[0]
      raise InputError(
        f'{self.origin}: {names[row]!r}, token {token}: its values, of'
        f' {np.abs(tokens[row, token]).max():.3g} at most, do not fit into {self.dtype};'
        ' pass --dtype=float32 or --normalise'
      )
    squares = [
      float(np.einsum('ntd,ntd->', array, array, dtype=np.float64))
      for array in (tokens - stored, tokens)
    ]
    record: dict[str, Any] = {
      'filled': int(mask.sum()),
      'squares': squares,
      'sha256': {},
      'bytes': 0,
    }
    for kind, array in arrays.items():
      path = self._path(kind, number)
      with (part := path.with_suffix('.part')).open('wb') as file:
        np.save(file, array, allow_pickle=False)
      record['sha256'][kind] = sha256(part)
      record['bytes'] += part.stat().st_size
      part.rename(path)
    return record

  def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Opens tokens, memory-mapped, and mask of a shard."""
    return (
      np.load(self._path('tokens', number), mmap_mode='r'),
      np.load(self._path('mask', number)),
    )

  def is_sound(self, number: int, record: dict[str, Any]) -> bool:
    """Whether the files of a shard are those that `record`, the result of `write`, describes."""
    try:
      return all(
        sha256(self._path(kind, number)) == wanted for kind, wanted in record['sha256'].items()
      )
    except OSError:
      return False

  def _path(self, kind: str, number: int) -> Path:
    return self.folder / file_name(kind, number, self.shards)

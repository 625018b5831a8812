"""PCA and whitening of token embeddings, fitted in one pass over any number of them."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.errors import InputError

FILE = 'projection.npz'
_BLOCK = 8192  # Rows that are summed at once.
_NO_VARIANCE = 1e-10  # Variances below this share of the largest are rounding errors.


class Projection(NamedTuple):
  """`(token - mean) @ components`; the components of a whitening are scaled.

  Attributes:
    mean: `[full width]` float32.
    components: `[full width, width]` float32.
    info: its record in info.json, with its error on the tokens that it was fitted to.
  """

  mean: np.ndarray
  components: np.ndarray
  info: dict[str, Any]

  @property
  def width(self) -> int:
    return self.components.shape[1]

  @property
  def sha256(self) -> str:
    return hashlib.sha256(self.mean.tobytes() + self.components.tobytes()).hexdigest()

  def apply(self, tokens: np.ndarray) -> np.ndarray:
    """Projects `[n, full width]`."""
    return (tokens - self.mean) @ self.components

  def save(self, folder: Path) -> None:
    """Writes the arrays to `FILE`; info.json keeps the rest."""
    np.savez(folder / FILE, mean=self.mean, components=self.components)


def load(folder: Path, info: dict[str, Any]) -> Projection:
  """Reads a saved projection; InputError if it is missing or damaged."""
  try:
    with np.load(folder / FILE, allow_pickle=False) as file:
      return Projection(file['mean'], file['components'], info)
  except Exception as error:  # Damaged archives make the reader raise any kind of error.
    raise InputError(
      f'{folder / FILE}: cannot be read ({error}); encode the items again'
    ) from error


def apply_like(
  folder: Path, info: dict[str, Any], tokens: np.ndarray, mask: np.ndarray
) -> np.ndarray:
  """Normalises and projects new tokens as stored features were.

  Args:
    folder: folder of the features.
    info: their info.json.
    tokens: `[rows, tokens, full width]` float32 of the encoder.
    mask: `[rows, tokens]` bool, true for tokens that exist.

  Returns:
    `[rows, tokens, width]` float32, zeros where masked.
  """
  if info['is_normalised']:
    tokens = tokens / np.maximum(np.linalg.norm(tokens, axis=2, keepdims=True), 1e-9)
  if info['projection']:
    tokens = load(folder, info['projection']).apply(tokens)
  return tokens * mask[..., None]


class Moments:
  """Sums over tokens, from which the principal components are computed."""

  def __init__(self) -> None:
    self._count, self._sum, self._products = 0, 0.0, 0.0

  def add(self, tokens: np.ndarray, mask: np.ndarray) -> None:
    """Adds the tokens `[rows, tokens, width]` that are not masked."""
    for start in range(0, len(mask), _BLOCK):
      block = tokens[start : start + _BLOCK][mask[start : start + _BLOCK]].astype(np.float64)
      self._count += len(block)
      self._sum += block.sum(0)
      self._products += block.T @ block

  def projection(self, width: int | None, whiten: bool, name: str) -> Projection:
    """Computes the directions of largest variance.

    Args:
      width: number of directions; None for all.
      whiten: whether to scale each direction to variance 1.
      name: name of encoder or file, for messages.

    Raises:
      InputError: the tokens do not vary in so many directions.
    """
    mean = self._sum / max(self._count, 1)
    covariance = self._products / max(self._count, 1) - np.outer(mean, mean)
    variances, vectors = np.linalg.eigh(covariance)
    variances, vectors = np.maximum(variances[::-1], 0), vectors[:, ::-1]
    rank = int((variances > _NO_VARIANCE * variances[0]).sum())
    width = width or len(mean)
    if width > rank:
      way_out = f'pass --width={rank} or less' if rank else 'leave --width and --whiten out'
      raise InputError(
        f'{name}: {self._count:,} tokens vary in {rank} directions only, so that they cannot be'
        f' projected to {width}; {way_out}'
      )
    vectors = vectors[:, :width]
    # The sign of an eigenvector is arbitrary, so the largest value is made positive.
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    vectors = vectors * np.sign(largest)
    kept = float(variances[:width].sum() / variances.sum())
    info = {
      'fitted_to_tokens': self._count,
      'is_whitened': whiten,
      'explained_variance': kept,
      'reconstruction_error': max(1 - kept, 0.0),
    }
    if whiten:
      vectors = vectors / np.sqrt(variances[:width])
    return Projection(mean.astype(np.float32), vectors.astype(np.float32), info)

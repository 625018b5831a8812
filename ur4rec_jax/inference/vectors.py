"""Writes item and user vectors whose inner products are the scores, for vector search elsewhere.

faiss, usearch, pgvector and other programs find the items with the largest inner products. Vectors
of several branches are concatenated, because the score is the sum of their products. What followers
add to the scores is left out, because it is no inner product.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ur4rec_jax.errors import InputError, StorageError
from ur4rec_jax.files import new_file

if TYPE_CHECKING:
  from ur4rec_jax.inference.trained import TrainedRecommender

_AT_ONCE = 4096  # Users whose vectors are in memory at once.


def write_items(recommender: 'TrainedRecommender', path: str | pathlib.Path) -> int:
  """Writes the columns `item`, `title` and `vector` of the catalogue to a Parquet file.

  Args:
    recommender: the recommender.
    path: the file.

  Returns:
    The width of the vectors.

  Raises:
    InputError: scores of the model are no inner products.
    StorageError: the file cannot be written.
  """
  vectors = item_vectors(recommender)
  names = {'item': recommender.item_ids, 'title': recommender.titles}
  return _write(path, '--vectors', [(names, vectors)])


def write_users(recommender: 'TrainedRecommender', path: str | pathlib.Path) -> int:
  """Writes the columns `user` and `vector` of all users of the data, as `write_items` does."""
  _check(recommender)
  names = list(recommender.users)

  def parts() -> Iterable[tuple[Mapping[str, Any], np.ndarray]]:
    for start in range(0, len(names), _AT_ONCE):
      rows = range(start, min(start + _AT_ONCE, len(names)))
      histories = [recommender.history(names[row]) for row in rows]
      yield {'user': names[start : rows.stop]}, recommender.user_vectors(histories, rows)

  return _write(path, '--user_vectors', parts())


def item_vectors(recommender: 'TrainedRecommender') -> np.ndarray:
  """Returns `[items, width]` float32.

  Raises:
    InputError: scores of the model are no inner products.
  """
  _check(recommender)
  items = recommender.arrays['items']
  vectors = [items[branch]['vectors'] for branch in recommender.branches]
  return np.concatenate([np.asarray(x, np.float32)[1:] for x in vectors], axis=1)


def _check(recommender: 'TrainedRecommender') -> None:
  if recommender.compares_ranks:
    raise InputError(
      '--vectors: scores of this model are made of ranks, which are no inner products; train it'
      ' with --config.fusion.kind=weighted'
    )


def _write(
  path: str | pathlib.Path, flag: str, parts: Iterable[tuple[Mapping[str, Any], np.ndarray]]
) -> int:
  """Writes a Parquet file, which appears when it is complete; returns the width of the vectors."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  path = pathlib.Path(path)
  writer, width = None, 0
  try:
    with new_file(path) as draft:
      for names, vectors in parts:
        width = vectors.shape[1]
        flat = pa.array(np.ascontiguousarray(vectors).ravel())
        columns = {name: pa.array(values, 'string') for name, values in names.items()}
        columns['vector'] = pa.FixedSizeListArray.from_arrays(flat, width)
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(draft, table.schema)
        writer.write_table(table)
      writer.close()
  except OSError as error:
    raise StorageError(f'{flag}={path}: cannot be written ({error.strerror or error})') from error
  return width

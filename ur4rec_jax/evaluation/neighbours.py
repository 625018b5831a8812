"""Strong baselines without a neural network: next items, item-kNN and EASE.

Each is one matrix `[items + 1, items + 1]`. The score of an item is the sum of its column over the
items of a history, in which older items may count less. Settings are chosen by validation. Up to
1e-6 is added to a score by popularity, which orders the items that nothing else tells apart.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.evaluation.history_models import Histories, HistoryModel

NEIGHBOURS = 100  # Kept for each item.
MOST_ITEMS_OF_EASE = 5000  # EASE inverts a matrix of all items.
_DECAYS = (1.0, 0.8, 0.5, 0.2)  # Weight of a history item relative to the next newer one.
_PENALTIES = (1.0, 10.0, 100.0, 500.0)


def neighbour_models(train: Dataset) -> dict[str, Iterator[HistoryModel]]:
  """Returns, for `next item`, `item-kNN` and `EASE`, the models to choose from by validation.

  EASE is left out if there are more than `MOST_ITEMS_OF_EASE` items.

  Args:
    train: the training part of the data.
  """
  width = train.num_items + 1
  has = users_and_items(train)
  together = (has.T @ has).tocsr()
  counts = np.maximum(together.diagonal(), 1)
  scale = sp.diags(1 / np.sqrt(counts))
  nearest = _largest(scale @ together @ scale)
  owners = train.owners
  is_pair = owners[1:] == owners[:-1]
  ones = np.ones(int(is_pair.sum()), np.float32)
  pairs = (ones, (train.item_ids[:-1][is_pair], train.item_ids[1:][is_pair]))
  follow = _largest(sp.diags(1 / counts) @ sp.csr_matrix(pairs, (width, width)))
  last = _popularity_last(train)

  def with_decay(matrix: sp.csr_matrix) -> Iterator[HistoryModel]:
    return (HistoryModel(f'decay {x:g}', _product(matrix, x, last)) for x in _DECAYS)

  models = {'next item': with_decay(follow), 'item-kNN': with_decay(nearest)}
  if train.num_items <= MOST_ITEMS_OF_EASE:
    models['EASE'] = (
      HistoryModel(f'penalty {x:g}', _product(_ease(together, x), 1.0, last)) for x in _PENALTIES
    )
  return models


def users_and_items(train: Dataset) -> sp.csr_matrix:
  """Returns `[users, items + 1]`: 1 where a user had an item, however often."""
  ones = np.ones(len(train.item_ids), np.float32)
  shape = train.num_users, train.num_items + 1
  has = sp.csr_matrix((ones, (train.owners, train.item_ids)), shape)
  has.data[:] = 1
  return has


def _popularity_last(train: Dataset) -> np.ndarray:
  """Returns `[items + 1]` small scores that order by popularity the items without any other."""
  popularity = train.item_counts().astype(np.float32)
  popularity[0] = 0
  return popularity * (1e-6 / max(popularity.max(), 1))


def _product(matrix: Any, decay: float, last: np.ndarray) -> Callable[[Histories], np.ndarray]:
  """Returns a function that sums the rows of `matrix` for the items of a history.

  Args:
    matrix: `[items + 1, items + 1]`, dense or sparse.
    decay: weight of a history item relative to the next newer one.
    last: `[items + 1]`, added to all scores.
  """

  def score(histories: Histories) -> np.ndarray:
    weights = np.power(decay, histories.ages, dtype=np.float32)
    shape = len(histories.users), matrix.shape[0]
    scores = sp.csr_matrix((weights, (histories.owners, histories.items)), shape) @ matrix
    return (scores.toarray() if sp.issparse(scores) else scores) + last

  return score


def _largest(matrix: sp.csr_matrix) -> sp.csr_matrix:
  """Keeps the largest values of each row, without the diagonal."""
  matrix = matrix.tocsr()
  matrix.setdiag(0)
  matrix.eliminate_zeros()
  kept = np.ones(matrix.nnz, bool)
  for start, end in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
    if end - start > NEIGHBOURS:
      order = np.argpartition(-matrix.data[start:end], NEIGHBOURS)
      kept[start + order[NEIGHBOURS:]] = False
  matrix.data[~kept] = 0
  matrix.eliminate_zeros()
  return matrix.astype(np.float32)


def _ease(together: sp.csr_matrix, penalty: float) -> np.ndarray:
  """Returns the matrix of Steck (2019), "Embarrassingly Shallow Autoencoders for Sparse Data"."""
  gram = together.toarray().astype(np.float64)
  gram[np.diag_indices_from(gram)] += penalty
  inverse = np.linalg.inv(gram)
  matrix = inverse / -np.diag(inverse)
  np.fill_diagonal(matrix, 0)
  return matrix.astype(np.float32)

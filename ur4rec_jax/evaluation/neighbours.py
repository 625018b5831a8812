"""Strong baselines without a neural network: next items, item-kNN and EASE.

Each is one matrix `[items + 1, items + 1]`. The score of an item is the sum of its column over the
items of a history, in which older items may count less. Settings are chosen by validation, and the
items that the matrix does not know follow by popularity.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.evaluation import metrics
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import Queries, make_queries

NEIGHBOURS = 100  # Kept for each item.
MOST_ITEMS_OF_EASE = 5000  # EASE inverts a matrix of all items.
_DECAYS = (1.0, 0.8, 0.5, 0.2)  # Weight of an item of the history beside the one after it.
_PENALTIES = (1.0, 10.0, 100.0, 500.0)
_AT_ONCE = 1 << 22  # Scores in memory at once.


class _Model(NamedTuple):
  """A matrix of items, and how it is used.

  Attributes:
    setting: its settings in words.
    matrix: `[items + 1, items + 1]`, dense or sparse.
    decay: weight of an item of the history beside the one after it.
  """

  setting: str
  matrix: Any
  decay: float


def neighbour_metrics(dataset: Dataset, protocol: Protocol) -> dict[str, dict]:
  """Ranks the test items by next items, item-kNN and EASE, under the protocol of the models.

  Returns:
    The metrics by name, each with its `setting`. EASE is left out if there are more than
    `MOST_ITEMS_OF_EASE` items.
  """
  queries = {part: make_queries(dataset, part, protocol) for part in ('valid', 'test')}
  is_counted = {part: protocol.is_counted(dataset, part) for part in queries}
  train = dataset.train_part()
  popularity = train.item_counts().astype(np.float32)
  popularity[0] = 0
  popularity *= 1e-6 / max(popularity.max(), 1)

  def measure(model: _Model, part: str) -> dict[str, float]:
    ranks = _ranks(model, dataset, queries[part], popularity)
    return metrics.ranking_metrics(ranks[is_counted[part]])

  found = {}
  for name, models in _models(train).items():
    best = max(models, key=lambda model: measure(model, 'valid')['ndcg@10'])
    found[name] = measure(best, 'test') | {'setting': best.setting}
  return found


def _models(train: Dataset) -> dict[str, Iterator[_Model]]:
  width = train.num_items + 1
  users = np.repeat(np.arange(len(train.offsets) - 1), np.diff(train.offsets))
  ones = np.ones(len(users), np.float32)
  has = sp.csr_matrix((ones, (users, train.item_ids)), (len(train.offsets) - 1, width))
  has.data[:] = 1  # Users who had an item twice count once.
  together = (has.T @ has).tocsr()
  counts = np.maximum(together.diagonal(), 1)
  scale = sp.diags(1 / np.sqrt(counts))
  nearest = _largest(scale @ together @ scale)
  is_pair = users[1:] == users[:-1]
  pairs = (ones[1:][is_pair], (train.item_ids[:-1][is_pair], train.item_ids[1:][is_pair]))
  follow = _largest(sp.diags(1 / counts) @ sp.csr_matrix(pairs, (width, width)))
  with_decay = lambda matrix: (_Model(f'decay {decay}', matrix, decay) for decay in _DECAYS)
  models = {'next item': with_decay(follow), 'item-kNN': with_decay(nearest)}
  if train.num_items <= MOST_ITEMS_OF_EASE:
    models['EASE'] = (
      _Model(f'penalty {penalty:g}', _ease(together, penalty), 1.0) for penalty in _PENALTIES
    )
  return models


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


def _ranks(model: _Model, dataset: Dataset, queries: Queries, popularity: np.ndarray) -> np.ndarray:
  """Returns `[users]` ranks; ties count against the model."""
  ranks, width = np.zeros(len(queries.users), np.int64), dataset.num_items + 1
  step = max(1, _AT_ONCE // width)
  for first in range(0, len(ranks), step):
    rows = slice(first, first + step)
    starts, lengths = queries.starts[rows], queries.lengths[rows]
    users = np.repeat(np.arange(len(starts)), lengths)
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    items = dataset.item_ids[np.repeat(starts, lengths) + position]
    age = np.repeat(lengths, lengths) - position - 1
    weights = np.power(model.decay, age, dtype=np.float32)
    scores = sp.csr_matrix((weights, (users, items)), (len(starts), width)) @ model.matrix
    scores = np.asarray(scores.todense() if sp.issparse(scores) else scores) + popularity
    targets = queries.targets[rows]
    own = scores[np.arange(len(targets)), targets][:, None]
    if queries.candidates.shape[1]:
      drawn = queries.candidates[rows]
      is_rival = (drawn > 0) & (drawn != targets[:, None])
      better = np.take_along_axis(scores, drawn, axis=1) >= own
      ranks[rows] = 1 + (better & is_rival).sum(1)
      continue
    is_seen = position < np.repeat(queries.seen_lengths[rows], lengths)
    scores[users[is_seen], items[is_seen]] = -np.inf
    scores[np.arange(len(targets)), targets] = -np.inf
    ranks[rows] = 1 + (scores[:, 1:] >= own).sum(1)
  return ranks

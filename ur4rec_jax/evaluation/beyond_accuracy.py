"""Beyond-accuracy metrics of recommendation lists, such as coverage, novelty and diversity.

Definitions follow RecTools where it has the metric: `coverage` is CatalogCoverage, `novelty` is
MeanInvUserFreq, `serendipity` is Serendipity and `diversity` is IntraListDiversity.
"""

import numpy as np
import scipy.sparse as sp

_AT_ONCE = 1 << 12  # Users whose pairs of items are compared at once.


def list_metrics(
  lists: np.ndarray, targets: np.ndarray, together: sp.csr_matrix, num_users: int
) -> dict[str, float]:
  """Describes the lists of all users.

  Args:
    lists: `[users, k]` item ids, best first; 0 where a list is shorter.
    targets: `[users]` the held-out item of each user.
    together: `[items + 1, items + 1]`, number of training users who had both items; on the
      diagonal, who had the item.
    num_users: number of training users who had any item.

  Returns:
    By name:
    `coverage`: share of the catalogue that is in some list.
    `gini`: how unequally often items are listed, 0 for equally often, near 1 for few items.
    `novelty`: mean of -log2 of the share of the training users who had the item.
    `diversity`: mean of 1 - cosine over the pairs of a list, with items as vectors of users.
    `serendipity`: mean of how much higher the held-out item is ranked than by popularity; other
      items count as 0.
    `popularity`: mean of the share of the training users who had the item.
  """
  listed = lists > 0
  counts, num_items = together.diagonal(), together.shape[0] - 1
  times = np.sort(np.bincount(lists[listed], minlength=num_items + 1)[1:])
  gini = 2 * (np.arange(1, num_items + 1) * times).sum() / (num_items * times.sum())
  share = counts[lists] / num_users
  novelty = -np.log2(np.maximum(counts[lists], 1) / num_users)
  return {
    'coverage': float((times > 0).mean()),
    'gini': float(gini - (num_items + 1) / num_items),
    'novelty': _mean_of_lists(novelty, listed),
    'diversity': _mean_of_lists(*_distances(lists, together)),
    'serendipity': _mean_of_lists(_surprise(lists, targets, counts), listed),
    'popularity': _mean_of_lists(share, listed),
  }


def _mean_of_lists(values: np.ndarray, counts: np.ndarray) -> float:
  """Averages each user's entries that count, then the users who have any; 0 if nobody has."""
  number = counts.sum(1)
  if not number.any():
    return 0.0
  means = np.where(counts, values, 0).sum(1) / np.maximum(number, 1)
  return float(means[number > 0].mean())


def _surprise(lists: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Returns `[users, k]`: how many more items a hit outranks than by popularity, as a share."""
  num_items = len(counts) - 1
  levels = np.unique(counts[1:][counts[1:] > 0])[::-1]  # Equally popular items share a rank.
  rank = num_items + 1 - np.searchsorted(-levels, -counts)
  by_popularity = np.where(counts > 0, rank - 1, 0)
  by_model = num_items - np.arange(lists.shape[1])
  surprise = np.maximum(by_model - by_popularity[lists], 0) / num_items
  return np.where(lists == targets[:, None], surprise, 0)


def _distances(lists: np.ndarray, together: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
  """Returns `[users, pairs]`: 1 - cosine for each pair of a list, and whether both are there."""
  first, second = np.triu_indices(lists.shape[1], 1)
  length = np.sqrt(np.maximum(together.diagonal(), 1))
  distances = np.zeros((len(lists), len(first)), np.float32)
  for start in range(0, len(lists) if len(first) else 0, _AT_ONCE):
    part = lists[start : start + _AT_ONCE]
    a, b = part[:, first], part[:, second]
    both = np.asarray(together[a.reshape(-1), b.reshape(-1)]).reshape(a.shape)
    distances[start : start + _AT_ONCE] = 1 - both / (length[a] * length[b])
  return distances, (lists[:, first] > 0) & (lists[:, second] > 0)

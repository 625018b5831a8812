"""Ranking metrics from the ranks of the held-out items."""

import numpy as np

CUTOFFS = (5, 10, 20)
POPULARITY_GROUPS = ('head', 'torso', 'tail', 'cold')


def gains(ranks: np.ndarray, k: int) -> np.ndarray:
  """Returns each user's ndcg@k: 1 / log2(rank + 1) if rank <= k, else 0."""
  return np.where(ranks <= k, 1 / np.log2(ranks + 1.0), 0)


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
  """Averages hit@k, ndcg@k, mrr and mean rank over users.

  Each user has one relevant item: hit@k is 1 if rank <= k, ndcg@k comes from `gains`, and mrr is
  1 / rank over the full list.

  Args:
    ranks: `[users]` integers, 1 is the top.

  Returns:
    Metrics by name, and `users`, the number of users.

  Raises:
    ValueError: no users, or a rank below 1.
  """
  ranks = np.asarray(ranks, np.int64)
  if ranks.size == 0 or ranks.min() < 1:
    raise ValueError('ranks must be non-empty and at least 1')
  metrics = {f'hit@{k}': float((ranks <= k).mean()) for k in CUTOFFS}
  metrics |= {f'ndcg@{k}': float(gains(ranks, k).mean()) for k in CUTOFFS}
  metrics |= {'mrr': float((1 / ranks).mean()), 'mean_rank': float(ranks.mean())}
  return metrics | {'users': int(ranks.size)}


def metrics_by_target(
  ranks: np.ndarray, is_repeated: np.ndarray, is_counted: np.ndarray
) -> dict[str, dict[str, float]]:
  """Computes the metrics of held-out items that are new to their user, and of repeated ones.

  Args:
    ranks: `[counted users]`, see `ranking_metrics`.
    is_repeated: `[users]` bool, whether the user had the item before.
    is_counted: `[users]` bool, whose rank is in `ranks`.

  Returns:
    `ranking_metrics` of `new` and `repeated`; a kind without items is left out, and one without
    ranks has only the number of its `users`.
  """
  found = {}
  for name, is_kind in (('new', ~is_repeated), ('repeated', is_repeated)):
    if (is_kind & is_counted).any():
      found[name] = ranking_metrics(ranks[is_kind[is_counted]])
    elif is_kind.any():
      found[name] = {'users': int(is_kind.sum())}
  return found


def popularity_groups(counts: np.ndarray) -> np.ndarray:
  """Groups items by popularity.

  The most popular items, with a third of all interactions, are the head; the items with the next
  third are the torso, those with the last third the tail. Items without interactions are cold. An
  item across a border belongs to the more popular group. Of equally popular items the first counts
  as more popular.

  Args:
    counts: `[items]` training interactions of each item, not all 0. A row for padding may be among
      them, as it has none.

  Returns:
    `[items]` index into `POPULARITY_GROUPS`.
  """
  order = np.argsort(-counts, kind='stable')
  more_popular = np.cumsum(counts[order]) - counts[order]
  groups = np.empty(len(counts), np.int64)
  groups[order] = 3 * more_popular // counts.sum()  # Cold items get 3: all others come first.
  return groups


def metrics_by_group(ranks: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, float]]:
  """Computes the metrics of each popularity group of users.

  Args:
    ranks: `[users]`, see `ranking_metrics`.
    groups: `[users]` index into `POPULARITY_GROUPS`.

  Returns:
    `ranking_metrics` by group; groups without users are left out.
  """
  return {
    name: ranking_metrics(ranks[groups == i])
    for i, name in enumerate(POPULARITY_GROUPS)
    if (groups == i).any()
  }

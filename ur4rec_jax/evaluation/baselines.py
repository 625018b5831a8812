"""Baselines without training, ranked under the same protocol as the model."""

import numpy as np

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.evaluation import metrics
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import make_queries


def baseline_metrics(dataset: Dataset, part: str, protocol: Protocol) -> dict[str, dict]:
  """Ranks held-out items by training popularity, and in random order.

  Returns:
    `{'popularity': metrics, 'random': metrics}`.
  """
  ranks = baseline_ranks(dataset, part, protocol)
  return {name: metrics.ranking_metrics(found) for name, found in ranks.items()}


def baseline_ranks(dataset: Dataset, part: str, protocol: Protocol) -> dict[str, np.ndarray]:
  """Returns the ranks `[counted users]` of held-out items by `popularity` and in `random` order."""
  queries = make_queries(dataset, part, protocol)
  popularity = dataset.train_item_counts()
  popularity[0] = -1  # Below every item.
  sorted_popularity = np.sort(popularity[1:])
  rng = np.random.default_rng(protocol.seed)
  popularity_ranks, random_ranks = [], []
  for target, start, length, candidates in zip(
    queries.targets, queries.starts, queries.seen_lengths, queries.candidates, strict=True
  ):
    level = popularity[target]
    if candidates.size:
      rivals = candidates[(candidates > 0) & (candidates != target)]
      num_rivals, not_worse = len(rivals), int((popularity[rivals] >= level).sum())
    else:
      out = np.union1d(dataset.item_ids[start : start + length], target)
      num_rivals = dataset.num_items - len(out)
      not_worse = dataset.num_items - int(np.searchsorted(sorted_popularity, level))
      not_worse -= int((popularity[out] >= level).sum())
    popularity_ranks.append(1 + not_worse)
    # In a random order every rank of the target is equally likely.
    random_ranks.append(int(rng.integers(1, num_rivals + 2)))
  is_counted = protocol.is_counted(dataset, part)
  return {
    'popularity': np.array(popularity_ranks)[is_counted],
    'random': np.array(random_ranks)[is_counted],
  }

"""Ranking metrics from the ranks of the held-out items."""

import numpy as np

CUTOFFS = (5, 10, 20)


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
  """Averages hit@k, ndcg@k, mrr and mean rank over users.

  With one relevant item, hit@k is 1 if rank <= k, ndcg@k is 1 / log2(rank + 1) if rank <= k, the
  ideal gain being 1, and mrr is 1 / rank over the full list.

  Args:
    ranks: `[users]` integers, 1 is the top.

  Returns:
    Metric name to value, with `users`, their number.

  Raises:
    ValueError: no users, or a rank below 1.
  """
  ranks = np.asarray(ranks, np.int64)
  if ranks.size == 0 or ranks.min() < 1:
    raise ValueError('ranks must be non-empty and at least 1')
  metrics = {f'hit@{k}': float((ranks <= k).mean()) for k in CUTOFFS}
  gains = 1 / np.log2(ranks + 1.0)
  metrics |= {f'ndcg@{k}': float(np.where(ranks <= k, gains, 0).mean()) for k in CUTOFFS}
  metrics |= {'mrr': float((1 / ranks).mean()), 'mean_rank': float(ranks.mean())}
  return metrics | {'users': int(ranks.size)}

"""The simplest models: a random order, popularity, and recent popularity."""

from collections.abc import Iterator

import numpy as np

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.evaluation.history_models import HistoryModel

_LATE = (0.01, 0.05, 0.2)  # Shares of the training interactions to count, from the latest on.


def popularity_models(
  dataset: Dataset, timestamps: np.ndarray, seed: int
) -> dict[str, Iterator[HistoryModel]]:
  """Returns, for `random`, `popularity` and `recent popularity`, the models to choose from.

  Args:
    dataset: all interactions; the held-out ones are not counted.
    timestamps: `[interactions]` unix seconds.
    seed: seed of the random order.
  """
  width = dataset.num_items + 1
  random = np.random.default_rng(seed)
  order = lambda histories: random.random((len(histories.users), width), np.float32)
  items, times = dataset.item_ids[dataset.is_train], timestamps[dataset.is_train]
  newest_first = np.argsort(-times, kind='stable')

  def popularity_of(share: float) -> HistoryModel:
    latest = newest_first[: max(1, round(share * len(items)))]
    counts = np.bincount(items[latest], minlength=width).astype(np.float32)
    scores = lambda histories: np.broadcast_to(counts, (len(histories.users), width))
    return HistoryModel(f'the latest {share:.0%}', scores)

  return {
    'random': iter([HistoryModel('', order)]),
    'popularity': iter([popularity_of(1.0)._replace(setting='')]),
    'recent popularity': (popularity_of(share) for share in _LATE),
  }

"""Ranks held-out items by a function that scores histories with NumPy, and lists its best items."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.streaming import indices, ranges
from ur4rec_jax.evaluation import metrics
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import Queries, make_queries

_AT_ONCE = 1 << 22  # Scores in memory at once.


class Histories(NamedTuple):
  """The histories of some users, item by item.

  Attributes:
    users: `[users]` index of each user in the dataset.
    owners: `[items of histories]` index into `users`.
    items: `[items of histories]` item ids, oldest first for each user.
    ages: `[items of histories]` number of newer items in the same history.
  """

  users: np.ndarray
  owners: np.ndarray
  items: np.ndarray
  ages: np.ndarray


class HistoryModel(NamedTuple):
  """A model that scores histories with NumPy.

  Attributes:
    setting: its settings in words.
    score: `score(histories)` gives float scores `[users, items + 1]`; item 0 is padding.
  """

  setting: str
  score: Callable[[Histories], np.ndarray]


def tuned(models: Iterable[HistoryModel], dataset: Dataset, protocol: Protocol) -> HistoryModel:
  """Returns the model with the best NDCG@10 in validation; the first one if several tie."""
  models = list(models)
  if len(models) == 1:
    return models[0]
  is_counted = protocol.is_counted(dataset, 'valid')

  def ndcg(model: HistoryModel) -> float:
    ranks, _ = rank_and_list(model, dataset, 'valid', protocol)
    return float(metrics.gains(ranks[is_counted], 10).mean())

  return max(models, key=ndcg)


def rank_and_list(
  model: HistoryModel, dataset: Dataset, part: str, protocol: Protocol, k: int = 10
) -> tuple[np.ndarray, np.ndarray]:
  """Ranks the held-out items of one part, and lists the best items of each user.

  Args:
    model: the model.
    dataset: all interactions.
    part: `valid` or `test`.
    protocol: which items the held-out items are ranked against; ties count against the model.
    k: length of the lists, which come from the whole catalogue under every protocol.

  Returns:
    Ranks `[users]` and item ids `[users, k]`, best first, 0 after the last item that can be listed.
  """
  queries, width = make_queries(dataset, part, protocol), dataset.num_items + 1
  ranks = np.zeros(len(queries.users), np.int64)
  lists = np.zeros((len(queries.users), k), np.int32)
  step = max(1, _AT_ONCE // width)
  for first in range(0, len(ranks), step):
    of_batch = slice(first, first + step)
    batch = Queries(*(x[of_batch] for x in queries))
    histories = histories_of(dataset, batch)
    scores = np.array(model.score(histories), np.float32)
    own = scores[np.arange(len(batch.targets)), batch.targets][:, None]
    if batch.candidates.shape[1]:
      is_rival = (batch.candidates > 0) & (batch.candidates != batch.targets[:, None])
      better = np.take_along_axis(scores, batch.candidates, axis=1) >= own
      ranks[of_batch] = 1 + (better & is_rival).sum(1)
    is_left_out = _is_first(histories, batch.seen_lengths)
    scores[:, 0] = -np.inf
    scores[histories.owners[is_left_out], histories.items[is_left_out]] = -np.inf
    lists[of_batch] = _best(scores, k)
    if not batch.candidates.shape[1]:
      scores[np.arange(len(batch.targets)), batch.targets] = -np.inf
      ranks[of_batch] = 1 + (scores >= own).sum(1)
  return ranks, lists


def histories_of(dataset: Dataset, queries: Queries) -> Histories:
  """Returns the histories before the held-out items of some queries."""
  lengths = queries.lengths
  owners = np.repeat(np.arange(len(lengths)), lengths)
  items = dataset.item_ids[indices(queries.starts, lengths)]
  return Histories(queries.users, owners, items, lengths[owners] - ranges(lengths) - 1)


def _is_first(histories: Histories, counts: np.ndarray) -> np.ndarray:
  """Returns `[items of histories]` bool, True for the first `counts` items of each user."""
  lengths = np.bincount(histories.owners, minlength=len(counts))
  position = lengths[histories.owners] - 1 - histories.ages
  return position < counts[histories.owners]


def _best(scores: np.ndarray, k: int) -> np.ndarray:
  """Returns `[users, k]` columns of the highest finite scores, best first, padded with 0."""
  most = min(k, scores.shape[1] - 1)
  found = np.argpartition(-scores, most - 1, axis=1)[:, :most]
  values = np.take_along_axis(scores, found, axis=1)
  order = np.argsort(-values, axis=1, kind='stable')
  found = np.take_along_axis(found, order, axis=1)
  found[~np.isfinite(np.take_along_axis(values, order, axis=1))] = 0
  return np.pad(found, ((0, 0), (0, k - most)))

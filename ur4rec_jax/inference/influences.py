"""Measures how much each item of a history raises a recommendation, by leaving it out.

Attention weights would only say where a layer looks, not how that changes a score. This measure
means the same in every branch and fusion, and needs only the ranking of an exported model.
"""

from collections.abc import Sequence

import numpy as np

from ur4rec_jax.inference.query import CheckedQuery, switch_off_sequence

# A score alone says little, because leaving an item out may move all scores alike. Scores are
# therefore compared with the mean over this many items, evenly spaced in the catalogue.
REFERENCE = 80


def reference(num_items: int, is_whole: bool) -> np.ndarray:
  """Returns the numbers of the items whose mean score is the reference.

  Args:
    num_items: size of the catalogue.
    is_whole: whether to take the whole catalogue. Scores that are made of ranks need it.
  """
  count = num_items if is_whole else min(REFERENCE, num_items)
  return np.unique(np.linspace(1, num_items, count).round().astype(np.int32))


def leave_one_out(
  query: CheckedQuery,
  items: np.ndarray,
  compared: np.ndarray,
  num_items: int,
  branches: Sequence[str],
  most: int | None = None,
) -> CheckedQuery:
  """Returns the query of the whole history, then of the history without each of its items.

  Args:
    query: the query of a single user, with the items of the history that the model reads.
    items: numbers of the items whose scores are wanted.
    compared: from `reference`.
    num_items: size of the catalogue.
    branches: names of the model's branches.
    most: how many items are left out in turn, the latest ones; None for all.
  """
  (history,) = query.histories
  first = 0 if most is None else max(len(history) - most, 0)
  histories = [history, *(np.delete(history, i) for i in range(first, len(history)))]
  count = len(histories)
  chosen = np.union1d(items, compared)
  allowed = np.zeros(num_items + 1, bool)
  allowed[chosen] = True
  weights = np.ones((1, len(branches)), np.float32) if query.weights is None else query.weights
  weights = np.repeat(weights, count, axis=0)
  switch_off_sequence(weights, histories, branches)
  return CheckedQuery(
    histories,
    len(chosen),
    [history[:0]] * count,
    allowed,
    weights=weights,
    preferences={
      name: (np.repeat(tokens, count, axis=0), np.repeat(mask, count, axis=0))
      for name, (tokens, mask) in query.preferences.items()
    },
  )


def influences(
  ids: np.ndarray, scores: np.ndarray, items: np.ndarray, compared: np.ndarray
) -> np.ndarray:
  """Computes influences from the answers to `leave_one_out`.

  Args:
    ids: `[histories, k]` item numbers, the best first.
    scores: `[histories, k]` their scores.
    items: `[items]` numbers of the items whose scores are wanted.
    compared: from `reference`.

  Returns:
    `[left out, items]` float32: how much the score of an item, above the mean of the compared ones,
    falls without that item of the history.
  """
  chosen = np.union1d(items, compared)
  table = np.full((len(ids), len(chosen)), np.nan, np.float32)
  np.put_along_axis(table, np.searchsorted(chosen, ids), scores, axis=1)
  of = lambda numbers: table[:, np.searchsorted(chosen, numbers)]
  above = of(items) - of(compared).mean(1, keepdims=True)
  return above[0] - above[1:]

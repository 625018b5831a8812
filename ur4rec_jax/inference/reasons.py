"""Explains recommendations in words for customers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST = 3  # Items of the history that are named.
_ROUNDING = 1e-6  # Smaller influences are rounding errors.


def because(
  influences: np.ndarray, history: np.ndarray, ids: Sequence[str], titles: Sequence[str]
) -> list[dict[str, Any]]:
  """Names the items of a history without which the score of an item falls the most.

  Args:
    influences: `[history]`, from `Recommender.influences`, of one recommended item.
    history: `[history]` item numbers from 1.
    ids: ids of the catalogue.
    titles: its titles.

  Returns:
    `item`, `title` and `influence` of up to `MOST` items, each named once, the most important
    first. Items that lower the score are never named.
  """
  found: dict[int, dict[str, Any]] = {}
  for i in np.argsort(-influences, kind='stable'):
    index = int(history[i]) - 1
    if influences[i] > _ROUNDING and index not in found and len(found) < MOST:
      found[index] = {
        'item': ids[index],
        'title': titles[index],
        'influence': float(influences[i]),
      }
  return list(found.values())


def why(named: Sequence[Mapping[str, Any]]) -> str:
  """Returns a sentence that names the first two items of `because`, '' without any.

  Titles often have commas, so that a list of three would be hard to read.
  """
  titles = [item['title'] or item['item'] for item in named[:2]]
  return f'Because of {" and ".join(titles)}' if titles else ''

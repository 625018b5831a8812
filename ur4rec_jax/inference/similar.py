"""Items that are similar to others: by the model's vectors, or by the users they have in common."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ur4rec_jax.errors import InputError
from ur4rec_jax.inference.stored_format import Settings

SEQUENCE, CONTENT, BOTH, USERS = 'sequence', 'content', 'both', 'users'
KINDS = (SEQUENCE, CONTENT, BOTH, USERS)
_ID_SHARE = 'retriever_id'  # The share of the id embeddings, which are no content.


class ItemVectors:
  """Item vectors of length 1 by kind of similarity, from the arrays of a recommender.

  Attributes:
    vectors: `[items + 1, width]` float32 by `sequence` and `content`, as far as the model has them.
  """

  def __init__(self, items: Mapping[str, Mapping[str, Any]], settings: Settings):
    """Computes the vectors.

    Args:
      items: by branch, the result of `scoring.item_arrays`.
      settings: facts about the model.
    """
    self.vectors: dict[str, np.ndarray] = {}
    if 'sasrec' in items:
      self.vectors[SEQUENCE] = _unit(items['sasrec']['vectors'])
    if 'retriever' in items:
      self.vectors[CONTENT] = _unit(_content(items['retriever'], settings))

  def similarities(self, items: np.ndarray, by: str) -> np.ndarray:
    """Returns the mean cosine of every item with some items, `[items + 1]` float32.

    With `both`, the cosines of each kind are divided by their standard deviation, so that neither
    kind decides alone.

    Args:
      items: `[chosen]` item numbers.
      by: `sequence`, `content` or `both`.

    Raises:
      InputError: the model has no such vectors.
    """
    if by == BOTH:
      found = [self.similarities(items, kind) for kind in self.vectors]
      if len(found) == 1:
        return found[0]
      return np.mean([x / max(float(x[1:].std()), 1e-9) for x in found], axis=0)
    if by not in self.vectors:
      raise InputError(
        f'by={by}: this model has no such item vectors; it has {", ".join(self.vectors)}'
      )
    vectors = self.vectors[by]
    return vectors @ vectors[items].mean(0)


def _content(retriever: Mapping[str, Any], settings: Settings) -> np.ndarray:
  """Returns the item vectors of the retriever, without the part of the items' ids."""
  if 'parts' not in retriever:
    return np.asarray(retriever['vectors'], np.float32)
  parts = np.asarray(retriever['parts'], np.float32)
  if any(name.startswith('retriever_') for name in settings.share_names):
    has_id = _ID_SHARE in settings.share_names
  else:  # Scores that are no sums have no shares of parts.
    has_id = settings.about.get('config', {}).get('retriever', {}).get('item_id', True)
  return parts[:, : parts.shape[1] - has_id].sum(1)  # The id is the last part.


def _unit(vectors: Any) -> np.ndarray:
  vectors = np.asarray(vectors, np.float32)
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.maximum(lengths, 1e-9)


class SharedUsers:
  """The users of each item, to find items that the same users have."""

  def __init__(self, offsets: np.ndarray, items: np.ndarray, num_items: int):
    """Sorts the users by item.

    Args:
      offsets: `[users + 1]`, where the distinct items of each user begin in `items`.
      items: `[entries]` item numbers.
      num_items: size of the catalogue.
    """
    self._offsets, self._items, self._width = offsets, items, num_items + 1
    owners = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    self._users = owners[np.argsort(items, kind='stable')]
    self._counts = np.bincount(items, minlength=self._width)
    self._starts = np.concatenate([[0], np.cumsum(self._counts)])

  def similarities(self, items: np.ndarray) -> np.ndarray:
    """Returns the mean cosine of the users of every item with those of some items.

    Args:
      items: `[chosen]` item numbers.

    Returns:
      `[items + 1]` float32.
    """
    total = np.zeros(self._width, np.float32)
    for item in items:
      users = self._users[self._starts[item] : self._starts[item + 1]]
      starts, ends = self._offsets[users], self._offsets[users + 1]
      lengths = ends - starts
      at = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
      together = np.bincount(self._items[at], minlength=self._width)
      total += together / np.sqrt(np.maximum(self._counts * max(len(users), 1), 1))
    return total / max(len(items), 1)

"""Adds to the scores of a model what other users had after the items of a history.

Neural models generalise, and blur rare pairs of items. Counts of pairs are exact, but know nothing
of items that never met. Their sum ranks better than either. Language models gain in the same way
from their nearest neighbours (Khandelwal et al., "Generalization through memorization", ICLR 2020).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ur4rec_jax.data.followers import FollowerTable

Array = jax.Array
RECENT = 32  # Items of a history whose followers count.
FLOOR = 1e-4  # Shares of followers below this hardly count.


class Followers(NamedTuple):
  """How followers count in the scores of a model.

  Attributes:
    weight: factor of what they add.
    decay: weight of an item of the history relative to the next newer one.
  """

  weight: float
  decay: float


class FollowerScores(NamedTuple):
  """What followers add to the scores of some items; each item occurs once for a user.

  Attributes:
    items: `[users, followers]` int32 item ids, 0 for none.
    scores: `[users, followers]` float32, 0 for none.
  """

  items: Array
  scores: Array


def follower_scores(recent: Array, table: FollowerTable, followers: Followers) -> FollowerScores:
  """Computes weight * log(1 + p / FLOOR), where p is an item's share of all followers.

  Args:
    recent: `[users, recent]` latest items of each history, the newest first, 0 for none.
    table: followers of each item.
    followers: how they count.
  """
  users = recent.shape[0]
  ages = jnp.arange(recent.shape[1], dtype=jnp.float32)
  items = table.items[recent].reshape(users, -1)
  values = (table.values[recent] * (followers.decay**ages)[:, None]).reshape(users, -1)
  # An item may follow several items of the history. Sorted by id, its entries are neighbours.
  order = jnp.argsort(items, axis=1)
  items, values = (jnp.take_along_axis(x, order, axis=1) for x in (items, values))
  is_first = jnp.diff(items, axis=1, prepend=-1) != 0
  entry = jnp.cumsum(is_first, axis=1) - 1
  rows = jnp.arange(users)[:, None]
  sums = jnp.zeros_like(values).at[rows, entry].add(values)
  total = sums.sum(1, keepdims=True)
  shares = sums / jnp.where(total > 0, total, 1)
  return FollowerScores(
    jnp.zeros_like(items).at[rows, entry].set(items),
    followers.weight * jnp.log1p(shares / FLOOR),
  )


def with_follower_scores(scores: Array, columns: Array, added: FollowerScores) -> Array:
  """Adds what followers add.

  Args:
    scores: `[users, items]`.
    columns: `[users, followers]` int32, the column of each of `added.items`; one beyond the scores
      belongs to an item that is scored elsewhere.
    added: from `follower_scores`.
  """
  rows = jnp.arange(scores.shape[0])[:, None]
  return scores.at[rows, columns].add(added.scores, mode='drop')

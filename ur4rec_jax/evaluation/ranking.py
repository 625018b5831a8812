"""Ranks of target items among all items that a user may be recommended.

A rank is 1 + the number of other items that score as much or more, so ties count against the model.
Ranks are counted; nothing is sorted. Scores that are sums of inner products are computed for
`ITEMS_AT_ONCE` items at a time, and the catalogue may be spread over devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ur4rec_jax.models.followers import FollowerScores, with_follower_scores
from ur4rec_jax.models.fusion import inner_products
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import NOWHERE, ItemEmbeddings, index_from, renumber

Array = jax.Array
ITEMS_AT_ONCE = 16_384


class Seen(NamedTuple):
  """The interactions before the targets, as pairs of a user and an item.

  Attributes:
    users: `[pairs]` index of the user; a pair with an index beyond all users is ignored.
    items: `[pairs]` item ids.
  """

  users: Array
  items: Array


def rank_by_products(
  users: dict[str, Array],
  items: dict[str, Array],
  targets: Array,
  seen: Seen,
  embeddings: ItemEmbeddings,
  added: FollowerScores | None = None,
) -> tuple[Array, Array]:
  """Ranks targets among all items by the sum of the branches' inner products.

  Args:
    users: by branch, `[users, width]`; each device has its own.
    items: by branch, `[rows, width]`, row i of item i; if sharded, this device's rows.
    targets: `[users]` item ids.
    seen: left out of the ranking, except for the target itself.
    embeddings: which rows this device has. If they are sharded, each device ranks the users of all
      devices among its own rows.
    added: what followers add to the scores; None for nothing.

  Returns:
    `[users]` int32, and `[]` bool, whether all scores are finite.
  """
  rows = len(jax.tree.leaves(items)[0])
  first = embeddings.first_item(jax.tree.leaves(items)[0])
  seen = _among_all_queries(seen, len(targets), embeddings)
  users, targets, seen, added = embeddings.gather_queries((users, targets, seen, added))
  size = min(rows, max(ITEMS_AT_ONCE, len(targets)))
  everybody = jnp.arange(len(targets))

  def scores_of(vectors: dict[str, Array], columns: Array | None) -> Array:
    scores = sum(inner_products(users[branch], x) for branch, x in vectors.items())
    return scores if added is None else with_follower_scores(scores, columns, added)

  def added_columns(start: Array) -> Array | None:
    return None if added is None else index_from(first + start, added.items)

  def count(start: Array, scores: Array, target_scores: Array, counted: Array) -> Array:
    """Counts the rivals in the part that starts at row `start`, without rows below `counted`."""
    ids = first + start + jnp.arange(size)
    seen_columns, target_columns = index_from(ids[0], seen.items), index_from(ids[0], targets)
    scores = scores.at[seen.users, seen_columns].set(-jnp.inf, mode='drop')
    scores = scores.at[everybody, target_columns].set(-jnp.inf, mode='drop')
    is_rival = (ids >= first + counted) & (ids > 0) & (ids <= embeddings.num_items)
    return ((scores >= target_scores[:, None]) & is_rival).sum(-1, dtype=jnp.int32)

  # The target's score comes from the same product as the scores of its rivals, or from one of the
  # same shape in the same loop. Equal vectors then score the same to the last bit.
  if rows == size:
    scores = scores_of(items, added_columns(0))
    columns = index_from(first, targets)
    own = scores.at[everybody, columns].get(mode='fill', fill_value=0)  # 0 on other devices.
    counts = count(0, scores, embeddings.sum_parts(own), 0)
    return 1 + embeddings.sum_own_queries(counts), jnp.isfinite(scores).all()
  own_vectors = {branch: embeddings.take(x, targets) for branch, x in items.items()}
  own_vectors = jax.tree.map(lambda x: jnp.pad(x, ((0, size - len(x)), (0, 0))), own_vectors)
  own_columns = None  # Of a user's target, the column of the user.
  if added is not None:
    is_target = added.items == targets[:, None]
    own_columns = jnp.where(is_target, everybody[:, None], NOWHERE).astype(jnp.int32)

  def add_part(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    counts, target_scores, finite = carry
    start = jnp.clip(i * size, 0, rows - size)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
    scores = scores_of(
      *jax.lax.cond(
        i < 0,
        lambda: (own_vectors, own_columns),
        lambda: (jax.tree.map(cut, items), added_columns(start)),
      )
    )
    target_scores = jnp.where(i < 0, scores[everybody, everybody], target_scores)
    counts += jnp.where(i < 0, 0, count(start, scores, target_scores, i * size))
    return counts, target_scores, finite & jnp.isfinite(scores).all()

  # Round -1 scores the targets, so that they come from the same compiled product as their rivals.
  initial = jnp.zeros(len(targets), jnp.int32), jnp.zeros(len(targets)), jnp.array(True)
  counts, _, finite = jax.lax.fori_loop(-1, -(-rows // size), add_part, initial)
  return 1 + embeddings.sum_own_queries(counts), finite


def best_by_products(
  users: dict[str, Array],
  items: dict[str, Array],
  seen: Seen,
  count: int,
  embeddings: ItemEmbeddings,
  added: FollowerScores | None = None,
) -> Array:
  """Lists the items with the largest sums of the branches' inner products.

  Args:
    users: by branch, `[users, width]`; each device has its own.
    items: by branch, see `rank_by_products`.
    seen: left out of the lists.
    count: length of a list.
    embeddings: which rows this device has.
    added: see `rank_by_products`.

  Returns:
    `[users of all devices, count]` int32 item ids, the best first, 0 where no item is left.
  """
  rows = len(jax.tree.leaves(items)[0])
  first = embeddings.first_item(jax.tree.leaves(items)[0])
  seen = _among_all_queries(seen, len(jax.tree.leaves(users)[0]), embeddings)
  users, seen, added = embeddings.gather_queries((users, seen, added))
  scores = sum(inner_products(users[branch], x) for branch, x in items.items())
  if added is not None:
    scores = with_follower_scores(scores, index_from(first, added.items), added)
  scores = scores.at[seen.users, index_from(first, seen.items)].set(-jnp.inf, mode='drop')
  ids = first + jnp.arange(rows)
  scores = jnp.where((ids > 0) & (ids <= embeddings.num_items), scores, -jnp.inf)
  best, found = best_of(scores, ids, min(count, rows))
  if embeddings.is_sharded:  # Each device has the best of its own items for all users.
    best, found = jax.lax.all_gather((best, found), devices.AXIS, axis=1, tiled=True)
    _, found = best_of(best, found, min(count, best.shape[1]))
    return found
  return jax.lax.all_gather(found, devices.AXIS, tiled=True)


def best_of(scores: Array, ids: Array, count: int) -> tuple[Array, Array]:
  """Returns the largest scores of each row and their ids, 0 for a score of -inf.

  Args:
    scores: `[users, items]`.
    ids: `[items]` or `[users, items]` int32.
    count: how many to return.

  Returns:
    `[users, count]` each.
  """
  best, places = jax.lax.top_k(scores, count)
  found = jnp.take_along_axis(jnp.broadcast_to(ids, scores.shape), places, axis=1)
  return best, jnp.where(best > -jnp.inf, found, 0).astype(jnp.int32)


def _among_all_queries(seen: Seen, count: int, embeddings: ItemEmbeddings) -> Seen:
  """Shifts the users of a device's `count` queries to their index among those of all devices."""
  # A pair that belongs to no user must not become a pair of the next device's first user.
  is_pair = seen.users < count
  return seen._replace(
    users=jnp.where(is_pair, seen.users + embeddings.first_query(count), NOWHERE)
  )


def rank_among_candidates(
  users: dict[str, Array],
  items: dict[str, Array],
  targets: Array,
  candidates: Array,
  embeddings: ItemEmbeddings,
  added: FollowerScores | None = None,
) -> tuple[Array, Array]:
  """Ranks targets among drawn candidates, by the sum of the branches' inner products.

  Args:
    users: by branch, `[users, width]`; each device has its own.
    items: by branch, see `rank_by_products`.
    targets: `[users]` item ids.
    candidates: `[users, candidates]` item ids, 0 for none.
    embeddings: which rows this device has.
    added: see `rank_by_products`.

  Returns:
    `[users]` int32, and `[]` bool, whether all scores are finite.
  """
  ids = jnp.concatenate([targets[:, None], candidates], axis=1)
  more = 0.0
  if added is not None:
    of_all = jnp.zeros((len(ids), embeddings.num_items + 1))
    of_all = with_follower_scores(of_all, added.items, added)
    more = jnp.take_along_axis(of_all, ids, axis=1)
  if embeddings.is_sharded:
    read = embeddings.read(ids.reshape(-1))
    items = {branch: embeddings.take(x, read) for branch, x in items.items()}
    ids = renumber(ids, read)
  scores = sum(
    jnp.einsum('ud,ucd->uc', users[branch], x[ids], preferred_element_type=jnp.float32)
    for branch, x in items.items()
  )
  scores += more
  ranks = rank_candidates(scores[:, 0], scores[:, 1:], targets, candidates)
  return ranks, jnp.isfinite(scores).all()


def rank_candidates(
  target_scores: Array, candidate_scores: Array, targets: Array, candidates: Array
) -> Array:
  """Ranks targets among candidates; neither 0 nor the target itself counts as a candidate.

  Args:
    target_scores: `[users]`.
    candidate_scores: `[users, candidates]`.
    targets: `[users]` item ids.
    candidates: `[users, candidates]` item ids.

  Returns:
    `[users]` int32.
  """
  is_rival = (candidates > 0) & (candidates != targets[:, None])
  return 1 + (is_rival & (candidate_scores >= target_scores[:, None])).sum(-1, dtype=jnp.int32)


def leave_out_seen(scores: Array, targets: Array, seen: Seen) -> Array:
  """Sets the scores of items that a user has seen to -inf.

  Args:
    scores: `[users, num_items]`, column i is item id i + 1.
    targets: `[users]` item ids, which keep their scores even if they were seen.
    seen: the items that the users have seen.
  """
  users = jnp.arange(scores.shape[0])
  target_scores = scores[users, targets - 1]
  return without_seen(scores, seen).at[users, targets - 1].set(target_scores)


def without_seen(scores: Array, seen: Seen) -> Array:
  """Does the same as `leave_out_seen`, but a target that was seen is left out, too."""
  return scores.at[seen.users, seen.items - 1].set(-jnp.inf, mode='drop')


def rank_by_scores(scores: Array, targets: Array, candidates: Array) -> Array:
  """Ranks targets by scores of the whole catalogue that are not sums of inner products.

  Args:
    scores: `[users, num_items]`, column i is item id i + 1; -inf for items that are left out.
    targets: `[users]` item ids.
    candidates: `[users, candidates]` item ids to rank against, 0 for none; `[users, 0]` for all.

  Returns:
    `[users]` int32.
  """
  target_scores = jnp.take_along_axis(scores, targets[:, None] - 1, axis=1)
  if not candidates.shape[1]:
    return (scores >= target_scores).sum(-1, dtype=jnp.int32)  # The target is one of them.
  candidate_scores = jnp.take_along_axis(scores, candidates - 1, axis=1)
  return rank_candidates(target_scores[:, 0], candidate_scores, targets, candidates)

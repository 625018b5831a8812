"""Ranks of target items among all that a user may be recommended: counted, nothing is sorted.

A rank is 1 + the number of other items that score as much or more. Where scores are sums of inner
products, the catalogue is scored in parts of `ITEMS_AT_ONCE`, and may be spread over devices.
"""

import jax
import jax.numpy as jnp

from ur4rec_jax.models.fusion import inner_products
from ur4rec_jax.sharding.devices import AXIS
from ur4rec_jax.sharding.item_embeddings import NOBODY, find_rows, places_from, renumber, take_rows

Array = jax.Array
ITEMS_AT_ONCE = 16_384


def rank_by_products(
  users: dict[str, Array],
  items: dict[str, Array],
  targets: Array,
  seen_users: Array,
  seen_items: Array,
  num_items: int,
  item_rows: str,
) -> tuple[Array, Array]:
  """Ranks targets among all items by the sum of the branches' inner products.

  Args:
    users: by branch, `[users, width]`; each device has its own.
    items: by branch, `[rows, width]`, row i of item i; if sharded, this device's rows.
    targets: `[users]` item ids.
    seen_users: `[seen]` index of the user who already has
    seen_items: `[seen]` this item id, which is left out unless it is the target; users out of range
      are ignored.
    num_items: catalogue size; rows beyond are no items.
    item_rows: `sharded` if each device has its own rows, among which it ranks the users of all.

  Returns:
    `[users]` int32, and `[]` bool, whether all scores are finite.
  """
  is_sharded, rows, first = item_rows == 'sharded', len(jax.tree.leaves(items)[0]), 0
  if is_sharded:
    first = jax.lax.axis_index(AXIS) * rows
    earlier_users = jax.lax.axis_index(AXIS) * len(targets)
    # Who is nobody here must not become the next device's first user.
    seen_users = jnp.where(seen_users < len(targets), seen_users + earlier_users, NOBODY)
    users, targets, seen_users, seen_items = jax.lax.all_gather(
      (users, targets, seen_users, seen_items), AXIS, tiled=True
    )
  size = min(rows, max(ITEMS_AT_ONCE, len(targets)))
  everybody = jnp.arange(len(targets))

  def scores_of(vectors: dict[str, Array]) -> Array:
    return sum(inner_products(users[branch], x) for branch, x in vectors.items())

  def count(start: Array, scores: Array, target_scores: Array, counted: Array) -> Array:
    """Counts items of the part that begins at a row, but for rows before `counted`."""
    ids = first + start + jnp.arange(size)
    seen_places, places = places_from(ids[0], seen_items), places_from(ids[0], targets)
    scores = scores.at[seen_users, seen_places].set(-jnp.inf, mode='drop')
    scores = scores.at[everybody, places].set(-jnp.inf, mode='drop')
    is_rival = (ids >= first + counted) & (ids > 0) & (ids <= num_items)
    return ((scores >= target_scores[:, None]) & is_rival).sum(-1, dtype=jnp.int32)

  # A target's score is of the same product as its rivals', or of one of the same shape in the same
  # loop, so that equal vectors score the same to the last bit.
  if rows == size:
    scores = scores_of(items)
    places = places_from(first, targets)
    target_scores = scores.at[everybody, places].get(mode='fill', fill_value=0)  # 0 if elsewhere.
    target_scores = jax.lax.psum(target_scores, AXIS) if is_sharded else target_scores
    counts, finite = count(0, scores, target_scores, 0), jnp.isfinite(scores).all()
  else:
    of_targets = {branch: take_rows(x, targets, item_rows) for branch, x in items.items()}
    of_targets = jax.tree.map(lambda x: jnp.pad(x, ((0, size - len(x)), (0, 0))), of_targets)

    def add_part(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
      counts, target_scores, finite = carry
      start = jnp.clip(i * size, 0, rows - size)
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
      scores = scores_of(jax.lax.cond(i < 0, lambda: of_targets, lambda: jax.tree.map(cut, items)))
      target_scores = jnp.where(i < 0, scores[everybody, everybody], target_scores)
      counts += jnp.where(i < 0, 0, count(start, scores, target_scores, i * size))
      return counts, target_scores, finite & jnp.isfinite(scores).all()

    nothing = jnp.zeros(len(targets), jnp.int32), jnp.zeros(len(targets)), jnp.array(True)
    counts, _, finite = jax.lax.fori_loop(-1, -(-rows // size), add_part, nothing)
  if is_sharded:
    counts = jax.lax.psum_scatter(counts, AXIS, tiled=True)
  return 1 + counts, finite


def rank_among_candidates(
  users: dict[str, Array],
  items: dict[str, Array],
  targets: Array,
  candidates: Array,
  num_items: int,
  item_rows: str,
) -> tuple[Array, Array]:
  """Ranks targets among drawn items alone, by the sum of the branches' inner products.

  Args:
    users: by branch, `[users, width]`; each device has its own.
    items: as `rank_by_products`'s.
    targets: `[users]` item ids.
    candidates: `[users, candidates]` item ids, 0 for none.
    num_items: catalogue size.
    item_rows: as `rank_by_products`'s.

  Returns:
    `[users]` int32, and `[]` bool, whether all scores are finite.
  """
  ids = jnp.concatenate([targets[:, None], candidates], axis=1)
  if item_rows == 'sharded':
    rows = find_rows(ids.reshape(-1), num_items)
    items = {branch: take_rows(x, rows, item_rows) for branch, x in items.items()}
    ids = renumber(ids, rows)
  scores = sum(
    jnp.einsum('ud,ucd->uc', users[branch], x[ids], preferred_element_type=jnp.float32)
    for branch, x in items.items()
  )
  ranks = rank_candidates(scores[:, 0], scores[:, 1:], targets, candidates)
  return ranks, jnp.isfinite(scores).all()


def rank_candidates(
  target_scores: Array, rivals: Array, targets: Array, candidates: Array
) -> Array:
  """Ranks `[users]` int32 from scores `[users]` of targets and `[users, candidates]` of the rest.

  Neither a target among the candidates nor 0 is a rival.
  """
  is_rival = (candidates > 0) & (candidates != targets[:, None])
  return 1 + (is_rival & (rivals >= target_scores[:, None])).sum(-1, dtype=jnp.int32)


def leave_out_seen(scores: Array, targets: Array, seen_users: Array, seen_items: Array) -> Array:
  """Sets the scores of items that a user already has to -inf.

  Args:
    scores: `[users, num_items]`, column i is item id i + 1.
    targets: `[users]` item ids, which stay in even if listed.
    seen_users: `[seen]` row of `scores`; out of range is ignored.
    seen_items: `[seen]` item id the user already has.
  """
  rows = jnp.arange(scores.shape[0])
  target_scores = scores[rows, targets - 1]
  scores = scores.at[seen_users, seen_items - 1].set(-jnp.inf, mode='drop')
  return scores.at[rows, targets - 1].set(target_scores)


def rank_by_scores(scores: Array, targets: Array, candidates: Array) -> Array:
  """Ranks targets by scores of the whole catalogue, where they are no sums of inner products.

  Args:
    scores: `[users, num_items]`, column i is item id i + 1; -inf for what is left out.
    targets: `[users]` item ids.
    candidates: `[users, candidates]` item ids to rank against, 0 for none; `[users, 0]` for all.

  Returns:
    `[users]` int32.
  """
  target_scores = jnp.take_along_axis(scores, targets[:, None] - 1, axis=1)
  if not candidates.shape[1]:
    return (scores >= target_scores).sum(-1, dtype=jnp.int32)  # The target is one of them.
  rivals = jnp.take_along_axis(scores, candidates - 1, axis=1)
  return rank_candidates(target_scores[:, 0], rivals, targets, candidates)

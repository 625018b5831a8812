"""Which held-out items are ranked for which users, packed into equal batches for the devices.

Everything here is NumPy in host memory.
"""

from typing import NamedTuple

import jax
import numpy as np

from ur4rec_jax.data import flat_arrays
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.input_pipeline import Plan, assign, pack, plan_rows
from ur4rec_jax.data.streaming import indices
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.sharding import devices

Array = jax.Array


class Queries(NamedTuple):
  """Held-out items to rank, and the history before each. Arrays are `[users]` unless noted.

  Attributes:
    users: index of the user in the dataset.
    targets: the held-out item id.
    starts: index into `Dataset.item_ids` of the user's first interaction.
    lengths: interactions before the target.
    seen_lengths: leading interactions whose items are left out of the ranking: `lengths`, or 0 if
      seen items are kept.
    candidates: `[users, candidates]` item ids to rank against; `[users, 0]` for all items.
  """

  users: np.ndarray
  targets: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  seen_lengths: np.ndarray
  candidates: np.ndarray


class EvalBatch(NamedTuple):
  """The queries that one device ranks at once; empty users pad every batch to the same number.

  Attributes:
    plan: `[rows, slots]`, the users' latest interactions.
    slots: `[users]` index of the user's slot in the flattened rows.
    targets: `[users]` item ids, 0 for an empty user.
    seen_starts: `[users]` index of the user's first interaction.
    seen_lengths: `[users]`, see `Queries`.
    candidates: `[users, candidates]`, see `Queries`.
  """

  plan: Plan
  slots: np.ndarray | Array
  targets: np.ndarray | Array
  seen_starts: np.ndarray | Array
  seen_lengths: np.ndarray | Array
  candidates: np.ndarray | Array


def make_queries(dataset: Dataset, part: str, protocol: Protocol) -> Queries:
  """Lists the users to evaluate on `part` with their held-out item.

  Args:
    dataset: all interactions.
    part: `valid` or `test`.
    protocol: says whether candidates are drawn, and how.
  """
  users, targets = dataset.held_out(part)
  starts, lengths = dataset.offsets[users], dataset.split.held_out[part][users]
  candidates = np.zeros((len(users), 0), np.int32)
  if protocol.candidates != 'all':
    candidates = _draw_candidates(dataset, users, starts + lengths, protocol)
  seen_lengths = np.zeros_like(lengths) if protocol.keeps_seen else lengths
  return Queries(users, targets, starts, lengths, seen_lengths, candidates)


def _draw_candidates(
  dataset: Dataset, users: np.ndarray, places: np.ndarray, protocol: Protocol
) -> np.ndarray:
  """Draws distinct items the user never has, `[users, num_candidates]`, 0 where there are none.

  Args:
    dataset: all interactions.
    users: the users to draw for.
    places: `[users]` index into `Dataset.item_ids` of the target. If seen items are kept, items
      before it may be drawn, too.
    protocol: says how to draw.
  """
  rng = np.random.default_rng(protocol.seed)
  weights = np.ones(dataset.num_items)
  if protocol.candidates == 'popularity':
    weights = dataset.train_item_counts()[1:].astype(float)
  candidates = np.zeros((len(users), protocol.num_candidates), np.int32)
  with np.errstate(divide='ignore'):
    log_weights = np.log(weights)
  starts = places if protocol.keeps_seen else dataset.offsets[users]
  for row, start, end in zip(candidates, starts, dataset.offsets[users + 1], strict=True):
    # Gumbel top-k: a draw without replacement in proportion to the weights.
    keys = log_weights + rng.gumbel(size=dataset.num_items)
    keys[dataset.item_ids[start:end] - 1] = -np.inf
    best = np.argsort(-keys)[: protocol.num_candidates]
    best = best[np.isfinite(keys[best])]
    row[: len(best)] = best + 1
  return candidates


def pack_queries(
  queries: Queries, max_length: int, users_per_batch: int
) -> tuple[EvalBatch, np.ndarray]:
  """Packs the users into equal batches; their number is a multiple of the device count.

  Args:
    queries: the users to evaluate.
    max_length: tokens per row; longer histories lose their oldest interactions.
    users_per_batch: approximate number of users per batch.

  Returns:
    An `EvalBatch` whose arrays have a leading dimension `[batches]`, and `[batches, users]`, the
    index of each entry in `queries`, -1 if it is empty.
  """
  lengths = np.minimum(queries.lengths, max_length)
  slots = pack(lengths, max_length)
  users = assign(slots, lengths, np.arange(len(lengths)))
  # Spread rows with many users evenly; the order changes no rank.
  users = users[np.random.default_rng(0).permutation(len(users))]
  rows_per_batch = min(len(users), max(1, round(len(users) * users_per_batch / len(lengths))))
  num_batches = -(-len(users) // rows_per_batch)
  num_batches += -num_batches % devices.device_count()
  rows_per_batch = -(-len(users) // num_batches)  # Equal shares, so that no device ranks nobody.
  starts = queries.starts + queries.lengths - lengths
  plan = plan_rows(users, queries.users, starts, lengths, num_batches * rows_per_batch)
  by_batch = lambda x: x.reshape(num_batches, rows_per_batch, -1)
  users = by_batch(np.pad(users, ((0, len(plan.lengths) - len(users)), (0, 0)), constant_values=-1))
  capacity = int((users >= 0).sum((1, 2)).max())
  members = np.full((num_batches, capacity), -1, np.int64)
  slots_of = np.zeros((num_batches, capacity), np.int32)
  for batch in range(num_batches):
    filled = np.flatnonzero(users[batch] >= 0)
    members[batch, : len(filled)] = users[batch].flat[filled]
    slots_of[batch, : len(filled)] = filled
  lookup = lambda x: np.where(members >= 0, x[members], 0).astype(np.int32)
  batches = EvalBatch(
    Plan(*map(by_batch, plan)),
    slots_of,
    lookup(queries.targets),
    lookup(queries.starts),
    lookup(queries.seen_lengths),
    queries.candidates[members],
  )
  return batches, members


def count_own_items(batch: EvalBatch) -> int:
  """Counts the items that batches read."""
  return int(batch.plan.lengths.sum() + batch.seen_lengths.sum())


def with_own_items(
  item_ids: np.ndarray, batch: EvalBatch, capacity: int
) -> tuple[np.ndarray, EvalBatch]:
  """Copies the items that batches read, for devices that do not hold all interactions.

  Args:
    item_ids: `[interactions]`, which may be mapped from a file.
    batch: its arrays may have a leading dimension of devices.
    capacity: at least `count_own_items`.

  Returns:
    `[capacity]` items, and the batch with indices into these.
  """
  is_filled, has_seen = batch.plan.lengths > 0, batch.seen_lengths > 0
  starts, lengths = (
    np.concatenate([plan[is_filled], seen[has_seen]]).astype(np.int64)
    for plan, seen in (
      (batch.plan.starts, batch.seen_starts),
      (batch.plan.lengths, batch.seen_lengths),
    )
  )
  places = np.cumsum(lengths) - lengths
  own = np.zeros(capacity, np.int32)
  own[: lengths.sum()] = item_ids[indices(starts, lengths)]
  flat_arrays.release(item_ids)
  plan_starts, seen_starts = map(np.zeros_like, (batch.plan.starts, batch.seen_starts))
  plan_starts[is_filled] = places[: is_filled.sum()]
  seen_starts[has_seen] = places[is_filled.sum() :]
  plan = batch.plan._replace(starts=plan_starts)
  return own, batch._replace(plan=plan, seen_starts=seen_starts)

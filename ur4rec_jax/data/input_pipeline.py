"""Packs histories into batches with little padding; batch n is a pure function of (seed, n).

Histories are in memory as flat values and offsets. The plan of an epoch says which users are in
which row. The host computes it from (seed, epoch) alone; the device gathers the tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.data.features import Preferences, TokenTable
from ur4rec_jax.errors import InputError

Array = jax.Array
# The rows of a batch are a multiple of this, so that 1, 2, 4 and 8 devices get the same batches.
ROW_MULTIPLE = 8
_USERS_AT_ONCE = 1 << 20  # Users that are counted at once, so that intermediate arrays stay small.


class Plan(NamedTuple):
  """Positions of the tokens of packed rows, `[..., rows, slots]` int32; a slot holds one user.

  Attributes:
    starts: index into the flat `item_ids` of the slot's first token.
    lengths: tokens in the slot, 0 if it is empty; slots fill a row from the left.
    users: index of the slot's user in the dataset, 0 if it is empty.
  """

  starts: np.ndarray | Array
  lengths: np.ndarray | Array
  users: np.ndarray | Array


class ReadPlan(NamedTuple):
  """A plan with indices into the items of some steps, for devices that do not hold all items.

  Attributes:
    starts: see `Plan`, but an index into the items of these steps.
    lengths: see `Plan`.
    users: see `Plan`.
    shift: adding it to an index gives the index into all items, 0 if the slot is empty.
  """

  starts: np.ndarray | Array
  lengths: np.ndarray | Array
  users: np.ndarray | Array
  shift: np.ndarray | Array


class Batch(NamedTuple):
  """Packed rows of tokens, `[rows, length]` int32 unless noted.

  Attributes:
    item_ids: inputs, 0 is padding.
    targets: the next item, 0 for padding.
    segment_ids: slot number from 1, 0 is padding.
    target_index: index of the target in the flat `item_ids`, 0 for padding.
    users: `[rows, slots]` index of the slot's user in the dataset, 0 if it is empty.
  """

  item_ids: Array
  targets: Array
  segment_ids: Array
  target_index: Array
  users: Array


class Packing(NamedTuple):
  """Rows of slots, with equal rows next to each other.

  Attributes:
    patterns: `[patterns, slots]` lengths of the slots of a row, 0 for an empty slot.
    repeats: `[patterns]` how many rows have the pattern.
  """

  patterns: np.ndarray
  repeats: np.ndarray

  @property
  def slots(self) -> np.ndarray:
    """`[rows, slots]` lengths of all slots."""
    return np.repeat(self.patterns, self.repeats, axis=0)

  def filled_slots(self) -> np.ndarray:
    """Returns the lengths of all slots that are not empty, row by row."""
    rows = zip(self.patterns, self.repeats, strict=True)
    return np.concatenate([np.tile(row[row > 0], count) for row, count in rows])

  @property
  def num_rows(self) -> int:
    """Number of rows."""
    return int(self.repeats.sum())


def pack(lengths: np.ndarray, row_length: int) -> np.ndarray:
  """Packs users into rows, see `pack_histogram`.

  Args:
    lengths: `[users]` in 1..row_length.
    row_length: tokens per row.

  Returns:
    `[rows, slots]` lengths, 0 for an empty slot; the other values are those of `lengths`.
  """
  return pack_histogram(np.bincount(lengths, minlength=row_length + 1)).slots


def pack_histogram(histogram: np.ndarray) -> Packing:
  """Packs users into rows, by best fit decreasing.

  Every epoch has the same number of rows, because the result depends only on how often each length
  occurs. Time is O(row_length^2), independent of the number of users.

  Args:
    histogram: `[row_length + 1]` number of users with each length; nobody has length 0.
  """
  left, row_length = histogram.copy(), len(histogram) - 1
  patterns, counts = [], []
  while left.any():
    pattern, room, after = [], row_length, left.copy()
    while (fitting := np.flatnonzero(after[: room + 1])).size:
      longest = int(fitting[-1])
      pattern.append(longest)
      after[longest] -= 1
      room -= longest
    used = left - after
    repeats = int((left[used > 0] // used[used > 0]).min())
    patterns.append(pattern)
    counts.append(repeats)
    left -= repeats * used
  packed = np.zeros((len(patterns), max(map(len, patterns), default=0)), np.int32)
  for row, pattern in zip(packed, patterns, strict=True):
    row[: len(pattern)] = pattern
  return Packing(packed, np.array(counts, np.int64))


def assign(slots: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Assigns users to slots of their length, in the order of `order`.

  Args:
    slots: `[rows, slots]` from `pack(lengths, ...)`.
    lengths: `[users]`.
    order: `[users]` a permutation of the users.

  Returns:
    `[rows, slots]` user indices, -1 for an empty slot.
  """
  users = np.full(slots.shape, -1, np.int64)
  by_length = np.argsort(slots, axis=None, kind='stable')[slots.size - len(lengths) :]
  users.flat[by_length] = order[np.argsort(lengths[order], kind='stable')]
  return users


def plan_rows(
  assigned: np.ndarray, users: np.ndarray, starts: np.ndarray, lengths: np.ndarray, multiple: int
) -> Plan:
  """Looks up the positions of the tokens in each slot, and pads with empty rows.

  Args:
    assigned: `[rows, slots]` from `assign`, indices into the next three arguments.
    users: `[users]` index of the user in the dataset.
    starts: `[users]` index of the user's first token.
    lengths: `[users]` tokens.
    multiple: the number of rows is rounded up to this.

  Returns:
    `[rows rounded up, slots]`.
  """
  lookup = lambda x: np.where(assigned >= 0, x[assigned], 0).astype(np.int32)
  missing = ((0, -len(assigned) % multiple), (0, 0))
  return Plan(*(np.pad(lookup(x), missing) for x in (starts, lengths, users)))


class TrainBatches:
  """All training batches of a dataset, by epoch.

  Users are packed into rows of `max_length` tokens. A batch is a fixed number of rows that holds
  `batch_size` users on average.

  Attributes:
    rows: rows per batch, a multiple of `ROW_MULTIPLE`.
    steps_per_epoch: batches per epoch.
    users: number of users with an item to predict.
    tokens: predicted items per epoch.
  """

  def __init__(
    self,
    train_lengths: np.ndarray,
    *,
    max_length: int,
    batch_size: int,
    crop: str,
    seed: int,
    trains: np.ndarray | None = None,
  ):
    """Packs the users, which fixes the shapes of all batches.

    Args:
      train_lengths: `[users]` training interactions of each user, `Split.train_lengths`.
      max_length: tokens per row, and most tokens of a user per epoch.
      batch_size: average number of users per batch.
      crop: part of longer histories: the `last` tokens, or a `random` window in each epoch.
      seed: seed of the order of users and of random windows.
      trains: `[users]` bool, the users to train on; None for all.

    Raises:
      InputError: no user has two training interactions.
    """
    # No array with an entry per user is kept, because `train_lengths` may be mapped from a file.
    histogram = np.zeros(max_length + 1, np.int64)
    for start in range(0, len(train_lengths), _USERS_AT_ONCE):
      inputs = np.clip(train_lengths[start : start + _USERS_AT_ONCE] - 1, 0, max_length)
      if trains is not None:
        inputs = inputs * trains[start : start + _USERS_AT_ONCE]
      histogram += np.bincount(inputs, minlength=max_length + 1)
    histogram[0] = 0
    self.users = int(histogram.sum())
    if not self.users:
      raise InputError('no user has two training interactions; lower --min_rating or --k_core')
    self._train_lengths, self._trains = train_lengths, trains
    self._max_length = max_length
    self._random_crop = crop == 'random'
    self._seed = seed
    self._packing = pack_histogram(histogram)
    share = self._packing.num_rows * batch_size / self.users
    self.rows = ROW_MULTIPLE * max(1, round(share / ROW_MULTIPLE))
    self.steps_per_epoch = -(-self._packing.num_rows // self.rows)
    self.tokens = int(histogram @ np.arange(max_length + 1))

  def epoch(self, epoch: int) -> Plan:
    """Returns all batches of an epoch, `[steps_per_epoch, rows, slots]`."""
    return self.plan(epoch).steps(0, self.steps_per_epoch)

  def plan(self, epoch: int) -> 'EpochPlan':
    """Assigns the users to the rows of an epoch."""
    available = self._train_lengths - 1  # The last item of a user is a target, never an input.
    is_member = available > 0 if self._trains is None else (available > 0) & self._trains
    members = np.flatnonzero(is_member).astype(np.int32)
    starts = (np.cumsum(self._train_lengths, dtype=np.int64) - self._train_lengths)[members]
    # Sorting is several times faster with the smallest type.
    lengths = np.minimum(available[members], self._max_length)
    lengths = lengths.astype(np.min_scalar_type(self._max_length))
    spare = np.maximum(available[members] - self._max_length, 0)
    rng = np.random.default_rng((self._seed, epoch))
    order = rng.permutation(self.users).astype(np.int32)
    in_slots = np.empty_like(order)
    slots = self._packing.filled_slots().astype(lengths.dtype)
    in_slots[np.argsort(slots, kind='stable')] = order[np.argsort(lengths[order], kind='stable')]
    rows = rng.permutation(self._packing.num_rows).astype(np.int32)
    skip = rng.integers(0, spare.astype(np.int64) + 1) if self._random_crop else spare
    starts = (starts + skip).astype(np.int32)
    return EpochPlan(in_slots, rows, Plan(starts, lengths, members), self._packing, self.rows)


class EpochPlan:
  """The users in the rows of an epoch; `steps` looks up the positions of tokens for some steps.

  The plan of all rows, with their empty slots, would take several times as much memory.
  """

  def __init__(
    self, in_slots: np.ndarray, order: np.ndarray, users: Plan, packing: Packing, rows: int
  ):
    """Stores the arrays from which `steps` looks up.

    Args:
      in_slots: `[users]` index into `users` for each slot that is not empty, row by row.
      order: `[number of rows]` order of the rows in the epoch.
      users: `[users]` positions of the tokens of each user.
      packing: the rows.
      rows: rows per step.
    """
    self._in_slots, self._order, self._users, self._rows = in_slots, order, users, rows
    counts = np.count_nonzero(packing.patterns, axis=1).astype(np.int32)
    self._counts = np.repeat(counts, packing.repeats)
    self._ends = np.cumsum(self._counts, dtype=np.int32)
    self._slots = packing.patterns.shape[1]

  def steps(self, start: int, stop: int) -> Plan:
    """Returns the batches of some steps, `[stop - start, rows, slots]`."""
    rows = self._order[start * self._rows : stop * self._rows]
    slot = np.arange(self._slots)
    counts = self._counts[rows][:, None]
    is_filled = slot < counts
    place = np.where(is_filled, self._ends[rows][:, None] - counts + slot, 0)
    users = self._in_slots[place]
    missing = ((0, (stop - start) * self._rows - len(rows)), (0, 0))

    def lookup(x: np.ndarray | Array) -> np.ndarray:
      found = np.pad(np.where(is_filled, x[users], 0).astype(np.int32), missing)
      return found.reshape(stop - start, self._rows, self._slots)

    return Plan(*map(lookup, self._users))


def gather_batch(item_ids: Array, plan: Plan | ReadPlan, row_length: int) -> Batch:
  """Gathers the tokens of the rows of one device; runs on the device.

  Args:
    item_ids: `[interactions]`, see `Dataset`; with a `ReadPlan`, the items of its steps.
    plan: `[rows, slots]`.
    row_length: tokens per row.

  Returns:
    The batch, `[rows, row_length]`.
  """
  ends = jnp.cumsum(plan.lengths, axis=1)
  position = jnp.arange(row_length, dtype=jnp.int32)
  # A token's slot is the number of slots that end at or before it.
  slot = (position[None, :, None] >= ends[:, None, :]).sum(-1)
  filled = position < ends[:, -1:]
  slot = jnp.where(filled, slot, 0)
  shift = plan.starts - (ends - plan.lengths)
  index = jnp.where(filled, position + jnp.take_along_axis(shift, slot, axis=1), 0)
  zero_unless_filled = lambda x: jnp.where(filled, x, 0)
  # The last interaction has no next item; training never uses it as an input.
  target_index = jnp.minimum(index + 1, item_ids.size - 1)
  inputs, targets = item_ids[index], item_ids[target_index]
  if isinstance(plan, ReadPlan):
    target_index += jnp.take_along_axis(plan.shift, slot, axis=1)
  return Batch(
    zero_unless_filled(inputs),
    zero_unless_filled(targets),
    zero_unless_filled(slot + 1),
    zero_unless_filled(target_index),
    jnp.asarray(plan.users),
  )


def gather_preferences(
  tables: dict[str, TokenTable], batch: Batch, preference_starts: Array | None = None
) -> Preferences:
  """Gathers the preferences of the users of a batch; runs on the device.

  Args:
    tables: by modality, with `users` rows.
    batch: from `gather_batch`.
    preference_starts: `[users]` int32 from `features.preference_starts`: a token sees the text only
      if its target is later than the interactions that the text was written from. None if all
      tokens see it.
  """
  visible = batch.segment_ids > 0
  if preference_starts is not None:
    slot = jnp.maximum(batch.segment_ids - 1, 0)
    starts = jnp.take_along_axis(preference_starts[batch.users], slot, axis=1)
    visible &= batch.target_index >= starts
  return Preferences(jax.tree.map(lambda x: x[batch.users], tables), visible)

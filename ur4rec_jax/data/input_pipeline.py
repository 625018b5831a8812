"""Histories in memory -> batches without padding; batch n is a pure function of (seed, n).

Histories live in memory as flat values and offsets. An epoch is a plan: which users stand in which
row. The plan is made on the host from (seed, epoch) alone; the tokens are gathered on the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Preferences, TokenTable
from ur4rec_jax.errors import InputError

Array = jax.Array
# Rows a batch are rounded up to this, so that 1, 2, 4 and 8 devices get the same batches.
ROW_MULTIPLE = 8


class Plan(NamedTuple):
  """Where rows of tokens come from, `[..., rows, slots]` int32 each; a slot holds one user.

  Attributes:
    starts: index into the flat `item_ids` of the slot's first token.
    lengths: tokens in the slot, 0 if it is empty; slots stand side by side from the left.
    users: index of the slot's user in the dataset, 0 if it is empty.
  """

  starts: np.ndarray | Array
  lengths: np.ndarray | Array
  users: np.ndarray | Array


class Batch(NamedTuple):
  """Packed rows of tokens, `[rows, length]` int32 each, unless said.

  Attributes:
    item_ids: inputs, 0 is padding.
    targets: the item that followed, 0 where there is no token.
    segment_ids: slot number from 1, 0 is padding.
    target_index: index into the flat `item_ids` of the target, 0 where there is no token.
    users: `[rows, slots]` index of the slot's user in the dataset, 0 if it is empty.
  """

  item_ids: Array
  targets: Array
  segment_ids: Array
  target_index: Array
  users: Array


def pack(lengths: np.ndarray, row_length: int) -> np.ndarray:
  """Packs users into rows, best fit decreasing over the histogram of lengths.

  The shape of the result depends on the lengths alone, whoever has them, so every epoch has the
  same number of rows. Time is O(row_length^2), whatever the number of users.

  Args:
    lengths: `[users]` in 1..row_length.
    row_length: tokens a row.

  Returns:
    `[rows, slots]` lengths, 0 for an empty slot; its non-zero values are those of `lengths`.
  """
  left = np.bincount(lengths, minlength=row_length + 1)
  rows = []
  while left.any():
    pattern, room, after = [], row_length, left.copy()
    while (fitting := np.flatnonzero(after[: room + 1])).size:
      longest = int(fitting[-1])
      pattern.append(longest)
      after[longest] -= 1
      room -= longest
    used = left - after
    repeats = int((left[used > 0] // used[used > 0]).min())
    rows += [pattern] * repeats
    left -= repeats * used
  packed = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
  for row, pattern in zip(packed, rows, strict=True):
    row[: len(pattern)] = pattern
  return packed


def assign(slots: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Puts users into slots of their length, earlier in `order` first.

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
  """Looks up where each slot's tokens are, and adds empty rows.

  Args:
    assigned: `[rows, slots]` from `assign`, indices into the next three.
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
    rows: rows a batch, a multiple of `ROW_MULTIPLE`.
    steps_per_epoch: batches an epoch.
    users: number of users that have something to predict.
    tokens: predicted items an epoch.
  """

  def __init__(self, dataset: Dataset, *, max_length: int, batch_size: int, crop: str, seed: int):
    """Fixes the shapes.

    Args:
      dataset: interactions to train on, from `Dataset.train_part`.
      max_length: tokens a row, and at most as many a user and epoch.
      batch_size: users a batch, on average.
      crop: of longer histories take the `last` tokens, or each epoch a `random` window.
      seed: of users' order and of random windows.

    Raises:
      InputError: nobody has two training interactions.
    """
    available = dataset.lengths - 1  # A user's last item is only predicted.
    members = np.flatnonzero(available > 0)
    if not members.size:
      raise InputError('no user has two training interactions; lower --min_rating or --k_core')
    self._members = members
    self._starts = dataset.offsets[members]
    self._spare = np.maximum(available[members] - max_length, 0)
    self._lengths = np.minimum(available[members], max_length)
    self._random_crop = crop == 'random'
    self._seed = seed
    self._slots = pack(self._lengths, max_length)
    share = len(self._slots) * batch_size / len(members)
    self.rows = ROW_MULTIPLE * max(1, round(share / ROW_MULTIPLE))
    self.steps_per_epoch = -(-len(self._slots) // self.rows)
    self.users = len(members)
    self.tokens = int(self._lengths.sum())

  def epoch(self, epoch: int) -> Plan:
    """Returns the batches of an epoch, `[steps_per_epoch, rows, slots]`."""
    rng = np.random.default_rng((self._seed, epoch))
    assigned = assign(self._slots, self._lengths, rng.permutation(self.users))
    assigned = assigned[rng.permutation(len(assigned))]
    skip = self._spare
    if self._random_crop:
      skip = rng.integers(0, self._spare + 1)
    plan = plan_rows(assigned, self._members, self._starts + skip, self._lengths, self.rows)
    return Plan(*(x.reshape(self.steps_per_epoch, self.rows, -1) for x in plan))


def gather_batch(item_ids: Array, plan: Plan, row_length: int) -> Batch:
  """Fetches the tokens of one device's rows; runs on the device.

  Args:
    item_ids: `[interactions]`, see `Dataset`.
    plan: `[rows, slots]`.
    row_length: tokens a row.

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
  # Clamped at the very last interaction, which a training prefix never predicts.
  target_index = jnp.minimum(index + 1, item_ids.size - 1)
  return Batch(
    zero_unless_filled(item_ids[index]),
    zero_unless_filled(item_ids[target_index]),
    zero_unless_filled(slot + 1),
    zero_unless_filled(target_index),
    jnp.asarray(plan.users),
  )


def gather_preferences(
  tables: dict[str, TokenTable], batch: Batch, preference_starts: Array | None = None
) -> Preferences:
  """Fetches the preferences of a batch's users; runs on the device.

  Args:
    tables: by modality, with `users` rows.
    batch: from `gather_batch`.
    preference_starts: `[users]` int32, from `features.preference_starts`: only a token whose target
      comes after all that the text was written from may see it; None where no token's does not.
  """
  visible = batch.segment_ids > 0
  if preference_starts is not None:
    slot = jnp.maximum(batch.segment_ids - 1, 0)
    starts = jnp.take_along_axis(preference_starts[batch.users], slot, axis=1)
    visible &= batch.target_index >= starts
  return Preferences(jax.tree.map(lambda x: x[batch.users], tables), visible)

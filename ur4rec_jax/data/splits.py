"""Splits interactions into training, validation and test, and hashes the split; NumPy only."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data import flat_arrays

LEAVE_ONE_OUT = 'leave_one_out'
TIME = 'time'
NAMES = (LEAVE_ONE_OUT, TIME)
# Users with fewer interactions only train: they have no item left for validation and test.
MIN_EVALUATED_LENGTH = 3


class Split(NamedTuple):
  """Where each user's history is cut, `[users]` int32 each.

  Attributes:
    train_lengths: number of leading interactions to train on.
    held_out: for `valid` and `test`, the position in the history of the item to predict from all
      earlier ones; -1 if the user is not evaluated.
  """

  train_lengths: np.ndarray
  held_out: dict[str, np.ndarray]


def leave_one_out(lengths: np.ndarray) -> Split:
  """Holds out the last two interactions of every user who has at least three.

  Args:
    lengths: `[users]` history lengths.
  """
  lengths = lengths.astype(np.int32)
  is_evaluated = lengths >= MIN_EVALUATED_LENGTH
  position = lambda from_end: np.where(is_evaluated, lengths - from_end, -1)
  return Split(
    np.where(is_evaluated, lengths - 2, lengths), {'valid': position(2), 'test': position(1)}
  )


def by_time(offsets: np.ndarray, timestamps: np.ndarray, valid_from: int, test_from: int) -> Split:
  """Splits all users at the same two points in time.

  The model trains on interactions before `valid_from`. The validation item of a user is the first
  interaction from `valid_from` up to `test_from`, and the test item is the first from `test_from`
  on. Each is predicted from all interactions before its border.

  Args:
    offsets: `[users + 1]`, user u owns `timestamps[offsets[u]:offsets[u + 1]]`.
    timestamps: `[interactions]` unix seconds, ascending for each user.
    valid_from: unix seconds.
    test_from: unix seconds, later.
  """
  lengths = np.diff(offsets).astype(np.int32)

  def before(border: int) -> np.ndarray:
    counts = np.zeros(len(offsets), np.int64)  # Matching interactions before each offset.
    total = 0
    for start, part in flat_arrays.parts(timestamps):
      so_far = total + np.cumsum(part < border)
      first, last = np.searchsorted(offsets, [start + 1, start + len(part) + 1])
      counts[first:last] = so_far[offsets[first:last] - start - 1]
      total = so_far[-1]
    return np.diff(counts).astype(np.int32)

  train, seen = before(valid_from), before(test_from)
  return Split(
    train,
    {
      'valid': np.where((train > 0) & (train < seen), train, -1),
      'test': np.where((seen > 0) & (seen < lengths), seen, -1),
    },
  )


def written_from(train_lengths: np.ndarray, hold_back: float) -> np.ndarray:
  """Counts the leading interactions of each user that the user's text is written from.

  Training shows the text only for the later interactions. Otherwise the model would learn to copy
  items from the text, which does not help at validation and test.

  Args:
    train_lengths: `[users]` training interactions.
    hold_back: share of the latest interactions, in [0, 1], that the text is not written from; their
      number is rounded up.

  Returns:
    `[users]` int64.
  """
  return train_lengths - np.ceil(hold_back * train_lengths).astype(np.int64)


def make_split(
  name: str, record: Mapping[str, Any], offsets: np.ndarray, timestamps: np.ndarray | None
) -> Split:
  """Splits histories by the record of a split in dataset.json.

  Args:
    name: name of the split, one of `NAMES`.
    record: its record in dataset.json, with the borders of `time`.
    offsets: `[users + 1]`, user u owns `timestamps[offsets[u]:offsets[u + 1]]`.
    timestamps: `[interactions]` unix seconds, ascending for each user; None is enough for
      `leave_one_out`.
  """
  if name == LEAVE_ONE_OUT:
    return leave_one_out(np.diff(offsets))
  assert timestamps is not None
  return by_time(offsets, timestamps, record['valid_from'], record['test_from'])


def describe(name: str, record: Mapping[str, Any]) -> str:
  """Describes a split uniquely, in words."""
  if name == LEAVE_ONE_OUT:
    return name
  borders = (np.datetime64(record[part], 's') for part in ('valid_from', 'test_from'))
  return '{}: valid from {}, test from {}'.format(name, *borders)


def split_hash(
  name: str, offsets: np.ndarray, item_ids: np.ndarray, split: Split, num_items: int | None = None
) -> str:
  """Hashes a split: equal hashes mean the same histories, in order, the same cuts and catalogue.

  Args:
    name: name of the split, e.g. `leave_one_out`.
    offsets: `[users + 1]`, user u owns `item_ids[offsets[u]:offsets[u + 1]]`.
    item_ids: `[interactions]` item ids, 1-based, each user's in time order.
    split: the cuts.
    num_items: size of the catalogue; None if its last item has an interaction.

  Returns:
    16 hexadecimal digits.
  """
  digest = hashlib.sha256(name.encode())
  digest.update(np.ascontiguousarray(offsets, '<i8').data)
  digest.update(np.ascontiguousarray(item_ids, '<i4').data)
  if name != LEAVE_ONE_OUT:  # The cuts of leave-one-out follow from the lengths.
    for cuts in (split.train_lengths, split.held_out['valid'], split.held_out['test']):
      digest.update(np.ascontiguousarray(cuts, '<i8').data)
  # Items without interactions change the numbers of the others, unless they are the last ones.
  if num_items is not None and num_items > item_ids.max(initial=0):
    digest.update(str(num_items).encode())
  return digest.hexdigest()[:16]

"""Which interactions train, validate and test: rules and fingerprints, NumPy only."""

import hashlib

import numpy as np

LEAVE_ONE_OUT = 'leave_one_out'
# Shorter users cannot give a training, a validation and a test item: they only train.
MIN_EVALUATED_LENGTH = 3


def train_lengths(lengths: np.ndarray) -> np.ndarray:
  """Number of leading interactions a user trains on under leave-one-out.

  Args:
    lengths: `[users]` history lengths.

  Returns:
    `[users]`: all but the last two where the user is evaluated, all otherwise.
  """
  return np.where(lengths >= MIN_EVALUATED_LENGTH, lengths - 2, lengths)


def split_hash(split: str, offsets: np.ndarray, item_ids: np.ndarray) -> str:
  """Fingerprint of a split: equal if and only if every user's ordered items and the rule are.

  Args:
    split: name of the rule, e.g. `leave_one_out`.
    offsets: `[users + 1]`, user u owns `item_ids[offsets[u]:offsets[u + 1]]`.
    item_ids: `[interactions]` item ids, 1-based, each user's in time order.

  Returns:
    16 hexadecimal digits.
  """
  digest = hashlib.sha256(split.encode())
  digest.update(np.ascontiguousarray(offsets, '<i8').tobytes())
  digest.update(np.ascontiguousarray(item_ids, '<i4').tobytes())
  return digest.hexdigest()[:16]

import dataclasses

import numpy as np
import pytest

from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import make_queries

BORDERS = {'valid_from': 40, 'test_from': 70}
ALL_ITEMS = Protocol()


def random_interactions(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Offsets, item ids and times; some users are wholly on one side of a border, times repeat."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 15, 50)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  times = [np.sort(rng.integers(*rng.choice([[0, 101], [60, 101], [0, 45]]), n)) for n in lengths]
  return offsets, rng.integers(1, 20, offsets[-1]).astype(np.int32), np.concatenate(times)


def by_hand(times: np.ndarray, first: int, border: int, end: float) -> int:
  """Position of the first interaction from `border` on, -1 if there is none, or none before."""
  for position, time in enumerate(times):
    if border <= time < end:
      return position if position and times[0] < first else -1
  return -1


@pytest.mark.parametrize('seed', range(10))
def test_by_time_equals_a_plain_loop(seed):
  offsets, _, timestamps = random_interactions(seed)
  split = splits.by_time(offsets, timestamps, **BORDERS)
  for user, times in enumerate(np.split(timestamps, offsets[1:-1])):
    assert split.train_lengths[user] == (times < 40).sum()
    assert split.held_out['valid'][user] == by_hand(times, 40, 40, 70)
    assert split.held_out['test'][user] == by_hand(times, 70, 70, np.inf)


def test_nothing_from_a_border_on_is_trained_on_or_given_as_history():
  offsets, item_ids, timestamps = random_interactions(0)
  split = splits.by_time(offsets, timestamps, **BORDERS)
  dataset = Dataset({'counts': {'items': 20}}, 'time', split, item_ids, offsets)
  # Times instead of items show which interactions arrive.
  shown = dataclasses.replace(dataset, item_ids=timestamps)
  assert np.array_equal(np.sort(shown.train_part().item_ids), np.sort(timestamps[timestamps < 40]))
  for part, border in (('valid', 40), ('test', 70)):
    queries = make_queries(shown, part, ALL_ITEMS)
    assert len(queries.users) > 10
    assert (queries.targets >= border).all()
    for start, length in zip(queries.starts, queries.lengths, strict=True):
      assert (timestamps[start : start + length] < border).all()


def test_leave_one_out_spares_users_with_fewer_than_three():
  split = splits.leave_one_out(np.array([5, 1, 2, 3]))
  assert split.train_lengths.tolist() == [3, 1, 2, 1]
  assert split.held_out['valid'].tolist() == [3, -1, -1, 1]
  assert split.held_out['test'].tolist() == [4, -1, -1, 2]


def test_texts_are_written_from_all_but_the_share_that_is_held_back():
  lengths = np.array([0, 1, 2, 5, 6, 10, 11])
  for hold_back, expected in (
    (0.0, lengths),
    (0.2, [0, 0, 1, 4, 4, 8, 8]),
    (1e-9, [0, 0, 1, 4, 5, 9, 10]),
    (0.99, [0] * 7),
  ):
    found = splits.written_from(lengths, hold_back)
    assert found.tolist() == list(expected)
    assert found.dtype == np.int64


def test_hash_tells_rules_items_order_and_borders_apart():
  offsets, item_ids, timestamps = random_interactions(0)

  def hash_of(name='time', offsets=offsets, item_ids=item_ids, **borders):
    split = splits.make_split(name, BORDERS | borders, offsets, timestamps)
    return splits.split_hash(name, offsets, item_ids, split)

  moved = offsets.copy()
  moved[1] += 1
  hashes = [
    hash_of(),
    hash_of('leave_one_out'),
    hash_of(test_from=80),
    hash_of(offsets=moved),
    hash_of(item_ids=item_ids[::-1]),
  ]
  assert len(set(hashes)) == len(hashes)
  assert hash_of() == hashes[0]


def test_describe_names_the_borders():
  assert splits.describe('leave_one_out', {}) == 'leave_one_out'
  assert splits.describe('time', {'valid_from': 0, 'test_from': 86_400}) == (
    'time: valid from 1970-01-01T00:00:00, test from 1970-01-02T00:00:00'
  )


def test_a_border_cuts_histories_of_millions_of_interactions():
  rng = np.random.default_rng(0)
  lengths = rng.integers(0, 30, 100_000)
  lengths[5] = 1_100_000  # More than is counted at once.
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  users = np.repeat(np.arange(len(lengths)), lengths)
  timestamps = rng.integers(0, 1000, offsets[-1])
  timestamps = timestamps[np.lexsort((timestamps, users))]
  found = splits.by_time(offsets, timestamps, 600, 800)
  wanted = np.bincount(users[timestamps < 600], minlength=len(lengths))
  np.testing.assert_array_equal(found.train_lengths, wanted)

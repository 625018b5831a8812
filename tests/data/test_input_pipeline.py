import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from tests.helpers.runs import make_dataset
from ur4rec_jax.data.features import Features, preference_starts
from ur4rec_jax.data.input_pipeline import (
  ROW_MULTIPLE,
  Plan,
  TrainBatches,
  assign,
  gather_batch,
  gather_preferences,
  pack,
  plan_rows,
)
from ur4rec_jax.errors import InputError

MAX_LENGTH = 8


def unique_histories(lengths) -> list[list[int]]:
  """Histories in which no item occurs twice, so that an item id says whose it is and when."""
  ids = np.arange(1, sum(lengths) + 1)
  return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def random_lengths(seed: int) -> tuple[np.ndarray, int]:
  """Lengths of a random number of users, and the row length that bounds them."""
  rng = np.random.default_rng(seed)
  row_length = int(rng.integers(1, 40))
  lengths = rng.integers(1, row_length + 1, rng.integers(1, 80))
  if seed % 2:  # Many short or many long ones.
    lengths = np.clip((row_length * rng.beta(0.5, 0.5, len(lengths))).astype(int), 1, row_length)
  return lengths, row_length


def make_batches(histories, **options) -> TrainBatches:
  defaults = {'max_length': MAX_LENGTH, 'batch_size': 6, 'crop': 'last', 'seed': 3}
  lengths = make_dataset(histories).split.train_lengths
  return TrainBatches(lengths, **(defaults | options))


def windows(plan: Plan) -> list[tuple[int, int]]:
  """The (start, length) of every occupied slot."""
  starts, lengths = np.asarray(plan.starts).ravel(), np.asarray(plan.lengths).ravel()
  return [(int(s), int(n)) for s, n in zip(starts, lengths, strict=True) if n]


def gather(item_ids, plan: Plan, row_length: int = MAX_LENGTH):
  return jax.tree.map(
    np.asarray, jax.jit(gather_batch, static_argnums=2)(item_ids, plan, row_length)
  )


def mixed_histories() -> list[list[int]]:
  """60 users of 1 to 30 interactions, no item twice."""
  return unique_histories(np.random.default_rng(0).integers(1, 31, 60))


def test_train_part_keeps_all_but_the_last_two_of_evaluated_users():
  dataset = make_dataset([[1, 2, 3, 4, 5], [6], [7, 8], [9, 10, 11]])
  train = dataset.train_part()
  np.testing.assert_array_equal(train.item_ids, [1, 2, 3, 6, 7, 8, 9])
  np.testing.assert_array_equal(train.offsets, [0, 3, 4, 6, 7])
  np.testing.assert_array_equal(train.lengths, [3, 1, 2, 1])
  assert train.num_items == dataset.num_items == 11


@pytest.mark.parametrize('seed', range(40))
def test_pack_keeps_the_lengths_and_never_overflows_a_row(seed):
  lengths, row_length = random_lengths(seed)
  slots = pack(lengths, row_length)
  np.testing.assert_array_equal(np.sort(slots[slots > 0]), np.sort(lengths))
  totals = slots.sum(1)
  assert totals.max() <= row_length
  assert totals.min() >= 1
  # Empty slots stand at the right, and no row could take another row whole.
  assert all(not np.any(np.diff((row > 0).astype(int)) > 0) for row in slots)
  if len(totals) > 1:
    assert np.sort(totals)[:2].sum() > row_length


@pytest.mark.parametrize('seed', range(10))
def test_pack_depends_on_the_lengths_only(seed):
  lengths, row_length = random_lengths(seed)
  shuffled = np.random.default_rng(seed).permutation(lengths)
  np.testing.assert_array_equal(pack(lengths, row_length), pack(shuffled, row_length))


def test_pack_of_nobody_is_empty():
  assert pack(np.array([], int), 5).size == 0


@pytest.mark.parametrize('row_length', [50, 200])
def test_pack_fills_rows_of_lengths_like_those_of_movielens_1m(row_length):
  """6,040 users, log-normal lengths from 18 with a median near 95 and a mean near 165."""
  rng = np.random.default_rng(0)
  histories = 18 + rng.lognormal(np.log(77), 1.1, 6040).astype(int)
  assert 85 < np.median(histories) < 105
  lengths = np.minimum(histories, row_length)
  slots = pack(lengths, row_length)
  assert lengths.sum() / (len(slots) * row_length) >= 0.95


def test_pack_fills_rows_of_short_histories():
  lengths = np.minimum(np.random.default_rng(1).geometric(0.15, 2000) + 2, 50)
  slots = pack(lengths, 50)
  assert lengths.sum() / (len(slots) * 50) >= 0.95


@pytest.mark.parametrize('seed', range(20))
def test_assign_puts_every_user_once_into_a_slot_of_its_length(seed):
  lengths, row_length = random_lengths(seed)
  slots = pack(lengths, row_length)
  users = assign(slots, lengths, np.random.default_rng(seed).permutation(len(lengths)))
  assert users.shape == slots.shape
  np.testing.assert_array_equal(np.sort(users[users >= 0]), np.arange(len(lengths)))
  np.testing.assert_array_equal(users >= 0, slots > 0)
  np.testing.assert_array_equal(np.where(users >= 0, lengths[users], 0), slots)


def test_assign_gives_equal_slots_to_users_in_their_order():
  slots = np.array([[2, 2], [2, 1]])
  users = assign(slots, np.array([2, 1, 2, 2]), np.array([3, 1, 0, 2]))
  np.testing.assert_array_equal(users, [[3, 0], [2, 1]])


def test_plan_rows_looks_up_slots_and_adds_empty_rows():
  assigned = np.array([[2, 0], [1, -1], [3, -1]])
  users, starts, lengths = np.array([[5, 6, 8, 9], [0, 4, 6, 9], [4, 2, 3, 1]])
  plan = plan_rows(assigned, users, starts, lengths, 4)
  np.testing.assert_array_equal(plan.starts, [[6, 0], [4, 0], [9, 0], [0, 0]])
  np.testing.assert_array_equal(plan.lengths, [[3, 4], [2, 0], [1, 0], [0, 0]])
  np.testing.assert_array_equal(plan.users, [[8, 5], [6, 0], [9, 0], [0, 0]])
  assert {x.dtype for x in plan} == {np.dtype(np.int32)}


def test_gather_on_a_hand_worked_plan():
  item_ids = np.array([11, 12, 13, 14, 21, 22, 31, 32, 33], np.int32)
  starts, lengths, users = np.array(
    [[[0, 6], [4, 0], [0, 0]], [[3, 2], [1, 0], [0, 0]], [[1, 4], [2, 0], [0, 0]]]
  )
  plan = Plan(starts, lengths, users)
  batch = gather(item_ids, plan, 6)
  np.testing.assert_array_equal(
    batch.item_ids, [[11, 12, 13, 31, 32, 0], [21, 0, 0, 0, 0, 0], [0] * 6]
  )
  np.testing.assert_array_equal(
    batch.targets, [[12, 13, 14, 32, 33, 0], [22, 0, 0, 0, 0, 0], [0] * 6]
  )
  np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2, 2, 0], [1] + [0] * 5, [0] * 6])
  np.testing.assert_array_equal(batch.target_index, [[1, 2, 3, 7, 8, 0], [5] + [0] * 5, [0] * 6])
  np.testing.assert_array_equal(batch.users, users)


@pytest.mark.parametrize('crop', ['last', 'random'])
def test_gather_equals_a_plain_loop(crop):
  histories = mixed_histories()
  train = make_dataset(histories).train_part()
  plan = make_batches(histories, crop=crop).epoch(0)
  plan = Plan(*(x.reshape(-1, x.shape[-1]) for x in plan))
  expected = np.zeros((4, len(plan.starts), MAX_LENGTH), np.int32)
  for row, (starts, lengths, users) in enumerate(zip(*plan, strict=True)):
    column = 0
    for slot, (start, length, user) in enumerate(zip(starts, lengths, users, strict=True)):
      assert not length or train.offsets[user] <= start < train.offsets[user + 1]
      for token in range(start, start + length):
        values = train.item_ids[token], train.item_ids[token + 1], slot + 1, token + 1
        expected[:, row, column] = values
        column += 1
  for actual, wanted in zip(gather(train.item_ids, plan), [*expected, plan.users], strict=True):
    np.testing.assert_array_equal(actual, wanted)
    assert actual.dtype == np.int32


@pytest.mark.parametrize('crop', ['last', 'random'])
@pytest.mark.parametrize('hold_back', [0.0, 0.2, 0.5, 0.99])
def test_a_text_is_visible_where_the_target_comes_after_all_it_was_written_from(crop, hold_back):
  histories = mixed_histories()
  text = Features(None, {'hold_back': hold_back}, {})
  other = Features(None, {'hold_back': 0.999}, {})  # The text that knows most decides.
  dataset = dataclasses.replace(
    make_dataset(histories), user_features={'other': other, 'text': text}
  )
  starts = preference_starts(dataset.train_part())
  # No item occurs twice, so that an item id says whose it is and when.
  known = set()
  for history in histories:
    trained = history[:-2] if len(history) > 2 else history
    known |= set(trained[: len(trained) - math.ceil(hold_back * len(trained))])
  batches = make_batches(histories, crop=crop)
  slots, shown, hidden = 0, 0, 0
  for epoch in range(3):
    for plan in zip(*batches.epoch(epoch), strict=True):
      batch = gather(dataset.train_part().item_ids, Plan(*plan))
      slots = max(slots, batch.segment_ids.max())
      visible = np.asarray(jax.jit(gather_preferences)({}, batch, starts).visible)
      for target, is_visible in zip(batch.targets.ravel(), visible.ravel(), strict=True):
        assert is_visible == (target > 0 and target not in known)
      shown += visible.sum()
      hidden += (~visible & (batch.targets > 0)).sum()
  assert slots > 2
  assert (shown > 0) == (hold_back > 0)
  assert (hidden > 0) == (hold_back < 0.9)


def test_without_features_of_users_nothing_is_visible():
  train = make_dataset(mixed_histories()).train_part()
  np.testing.assert_array_equal(preference_starts(train), train.offsets[1:])


def test_shapes_and_counts():
  batches = make_batches(mixed_histories())
  trained = [len(h) - 2 if len(h) > 2 else len(h) for h in mixed_histories()]
  assert batches.users == sum(n > 1 for n in trained)
  assert batches.tokens == sum(min(n - 1, MAX_LENGTH) for n in trained)
  assert batches.rows % ROW_MULTIPLE == 0
  for plan in (batches.epoch(0), batches.epoch(7)):
    assert plan.starts.shape == plan.lengths.shape
    assert plan.starts.shape[:2] == (batches.steps_per_epoch, batches.rows)


@pytest.mark.parametrize('batch_size', [40, 100])
def test_a_batch_holds_about_batch_size_users(batch_size):
  lengths = np.random.default_rng(0).integers(4, 20, 2000)
  batches = make_batches(unique_histories(lengths), batch_size=batch_size)
  occupied = (batches.epoch(0).lengths > 0).sum((1, 2))[:-1]
  rows_each = batches.rows / occupied.mean()
  assert abs(occupied.mean() - batch_size) <= ROW_MULTIPLE / 2 / rows_each
  assert occupied.std() < 0.2 * batch_size


def test_an_epoch_is_a_pure_function_of_seed_and_number():
  histories = mixed_histories()
  batches = make_batches(histories, crop='random')
  first = batches.epoch(4)
  batches.epoch(5)
  for again in (batches.epoch(4), make_batches(histories, crop='random').epoch(4)):
    for one, other in zip(first, again, strict=True):
      np.testing.assert_array_equal(one, other)


def test_epochs_and_seeds_differ():
  histories = mixed_histories()
  plans = [make_batches(histories, seed=s).epoch(e) for s in (0, 1) for e in (0, 1)]
  for i, one in enumerate(plans):
    assert not any(np.array_equal(one.starts, other.starts) for other in plans[:i])


def test_every_user_is_trained_on_once_an_epoch_with_its_last_tokens():
  histories = mixed_histories()
  train = make_dataset(histories).train_part()
  expected = []
  for begin, end in zip(train.offsets[:-1], train.offsets[1:], strict=True):
    start = max(begin, end - 1 - MAX_LENGTH)
    if end - 1 > start:
      expected.append((start, end - 1 - start))
  batches = make_batches(histories)
  for epoch in range(3):
    assert sorted(windows(batches.epoch(epoch))) == expected


def test_random_crop_covers_every_window_and_stays_inside_the_users_training_part():
  lengths = [30, 9, 14, 11, 40, 3]
  train = make_dataset(unique_histories(lengths)).train_part()
  batches = make_batches(unique_histories(lengths), crop='random')
  seen = {user: set() for user in range(len(lengths))}
  for epoch in range(300):
    plan = windows(batches.epoch(epoch))
    users = np.searchsorted(train.offsets, [start for start, _ in plan], 'right') - 1
    assert sorted(users) == [0, 1, 2, 3, 4]  # The last one trains on one item: none to predict.
    for user, (start, length) in zip(users, plan, strict=True):
      available = train.lengths[user] - 1
      assert length == min(available, MAX_LENGTH)
      seen[user].add(int(start - train.offsets[user]))
  for user, found in seen.items():
    spare = max(train.lengths[user] - 1 - MAX_LENGTH, 0)
    assert found == (set(range(spare + 1)) if train.lengths[user] > 1 else set())


@pytest.mark.parametrize('crop', ['last', 'random'])
def test_held_out_items_never_reach_a_batch(crop):
  """Each evaluated user's last two items occur nowhere else: none may be an input or a target."""
  histories = mixed_histories()
  held_out = {item for h in histories if len(h) >= 3 for item in h[-2:]}
  train = make_dataset(histories).train_part()
  assert not held_out & set(train.item_ids.tolist())
  batches = make_batches(histories, crop=crop)
  used = set()
  for epoch in range(5):
    for plan in zip(*batches.epoch(epoch), strict=True):
      batch = gather(train.item_ids, Plan(*plan))
      used |= set(batch.item_ids.ravel().tolist()) | set(batch.targets.ravel().tolist())
  assert not held_out & used
  if crop == 'random':
    predictable = {item for h in histories if len(h) >= 4 for item in h[:-2]}
    assert len(predictable & used) > 0.8 * len(predictable)


def test_inputs_and_targets_are_neighbours_of_one_user():
  histories = mixed_histories()
  train = make_dataset(histories).train_part()
  follows = {a: b for h in histories for a, b in itertools.pairwise(h)}
  plan = make_batches(histories).epoch(0)
  for arrays in zip(*plan, strict=True):
    batch = gather(train.item_ids, Plan(*arrays))
    filled = batch.segment_ids > 0
    assert [follows[i] for i in batch.item_ids[filled].tolist()] == batch.targets[filled].tolist()
    assert not batch.item_ids[~filled].any()
    assert not batch.targets[~filled].any()


def test_users_without_two_training_items_are_left_out():
  histories = [[1], [2, 3, 4], [5, 6], [7, 8, 9, 10]]
  batches = make_batches(histories)
  assert (batches.users, batches.tokens) == (2, 2)
  train = make_dataset(histories).train_part()
  plan = windows(batches.epoch(0))
  assert sorted(train.item_ids[start] for start, _ in plan) == [5, 7]


def test_no_user_with_two_training_items_is_an_input_error():
  with pytest.raises(InputError, match='two training interactions'):
    make_batches([[1], [2, 3, 4]])

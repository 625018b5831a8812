"""Counts of followers against a count by plain loops."""

import collections
import dataclasses

import numpy as np

from ur4rec_jax.data.dataset import load_dataset
from ur4rec_jax.data.followers import count_followers


def counted_plainly(dataset, reach):
  """Returns by item a dict of its followers, as `count_followers` weighs them."""
  train = dataset.train_part()
  popularity, found = train.item_counts(), collections.defaultdict(collections.Counter)
  for start, end in zip(train.offsets[:-1], train.offsets[1:], strict=True):
    history = train.item_ids[start:end].tolist()
    for i, item in enumerate(history):
      for distance, other in enumerate(history[i + 1 : i + 1 + reach], 1):
        if other != item:
          found[item][other] += 1 / distance / np.sqrt(popularity[item] * popularity[other])
  return found


def test_followers_are_those_of_a_plain_count(data_dir):
  dataset = load_dataset(data_dir)
  expected = counted_plainly(dataset, reach=3)
  table = count_followers(dataset, count=5, reach=3)
  assert table.items.shape == table.values.shape == (dataset.num_items + 1, 5)
  assert not table.items[0].any()
  for item in range(1, dataset.num_items + 1):
    best = sorted(expected[item].values(), reverse=True)[:5]
    np.testing.assert_allclose(table.values[item], best + [0] * (5 - len(best)), rtol=1e-5)
    of_followers = [expected[item][follower] for follower in table.items[item].tolist()]
    np.testing.assert_allclose(table.values[item], of_followers, rtol=1e-5)


def test_items_are_counted_alike_in_blocks(data_dir, monkeypatch):
  dataset = load_dataset(data_dir)
  at_once = count_followers(dataset, 9, 4)
  monkeypatch.setattr('ur4rec_jax.data.followers._MOST_PAIRS', 200)
  in_blocks = count_followers(dataset, 9, 4)
  for expected, found in zip(at_once, in_blocks, strict=True):
    np.testing.assert_array_equal(found, expected)


def test_a_reach_beyond_the_longest_history_costs_nothing(data_dir):
  dataset = load_dataset(data_dir)
  longest = int(dataset.lengths.max())
  tables = (count_followers(dataset, 9, reach) for reach in (longest, 10**9))
  for one, other in zip(*tables, strict=True):
    np.testing.assert_array_equal(one, other)


def test_held_out_items_are_not_counted(data_dir):
  dataset = load_dataset(data_dir)
  other = np.where(dataset.is_train, dataset.item_ids, 1).astype(np.int32)
  changed = dataclasses.replace(dataset, item_ids=other)
  assert (other != dataset.item_ids).any()
  tables = count_followers(dataset, 9, 4), count_followers(changed, 9, 4)
  for before, after in zip(*tables, strict=True):
    np.testing.assert_array_equal(before, after)

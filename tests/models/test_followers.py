"""Scores of followers against a plain computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur4rec_jax.data.followers import FollowerTable
from ur4rec_jax.models.followers import (
  FLOOR,
  Followers,
  follower_scores,
  with_follower_scores,
)

ITEMS, COUNT = 30, 6
SETTINGS = Followers(weight=0.7, decay=0.5)


@pytest.fixture(scope='module')
def table() -> FollowerTable:
  rng = np.random.default_rng(0)
  items = np.stack([1 + rng.permutation(ITEMS)[:COUNT] for _ in range(ITEMS + 1)])
  values = rng.random(items.shape).astype(np.float32)
  items[:, 4:] *= rng.random((ITEMS + 1, 2)) < 0.5
  items[0] = 0
  return FollowerTable(items.astype(np.int32), values * (items > 0))


def plain(recent, table):
  total = np.zeros((len(recent), ITEMS + 1))
  for row, history in zip(total, recent, strict=True):
    for age, item in enumerate(history):
      for follower, value in zip(table.items[item], table.values[item], strict=True):
        row[follower] += value * SETTINGS.decay**age
  total /= np.maximum(total.sum(1, keepdims=True), 1e-12)
  return SETTINGS.weight * np.log1p(total / FLOOR)


def test_scores_are_those_of_a_plain_sum(table):
  recent = np.random.default_rng(1).integers(0, ITEMS + 1, (8, 5)).astype(np.int32)
  recent[0], recent[1, 1:], recent[2] = 0, 0, 7
  added = jax.jit(follower_scores, static_argnums=2)(recent, table, SETTINGS)
  found = with_follower_scores(jnp.zeros((8, ITEMS + 1)), added.items, added)
  np.testing.assert_allclose(found, plain(recent, table), rtol=1e-4, atol=1e-6)
  assert not found[0].any()  # An empty history.
  for row in added.items.tolist():
    named = [item for item in row if item]
    assert len(named) == len({*named})


def test_columns_beyond_the_scores_are_left_out(table):
  recent = np.array([[3, 5, 1]], np.int32)
  added = follower_scores(recent, table, SETTINGS)
  columns = jnp.where(added.items < 10, added.items, np.iinfo(np.int32).max)
  found = with_follower_scores(jnp.ones((1, 10)), columns, added)
  np.testing.assert_allclose(found, 1 + plain(recent, table)[:, :10], rtol=1e-4)

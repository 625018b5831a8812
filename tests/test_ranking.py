import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur4rec_jax import ranking


@pytest.mark.parametrize(
  ('target', 'seen', 'rank'),
  [
    (2, [], 1),
    (3, [], 4),  # Item 2 is better, 4 and 6 are equal.
    (3, [2], 3),
    (3, [2, 4, 6], 1),
    (3, [2, 2, 4, 2, 4], 2),
    (3, [3], 4),  # Seen before, but it is what is looked for.
    (3, [3, 3, 2], 3),
    (1, [], 6),
    (1, [2, 3, 4, 5, 6], 1),
    (5, [1], 5),
  ],
)
def test_rank_among_all_items(target, seen, rank):
  scores = jnp.array([[0.1, 0.9, 0.5, 0.5, 0.3, 0.5]])
  users = jnp.array([0] * len(seen) + [1, 1], jnp.int32)  # The last two belong to nobody.
  items = jnp.array([*seen, 4, 6], jnp.int32)
  no_candidates = jnp.zeros((1, 0), jnp.int32)
  targets = jnp.array([target])
  scores = ranking.leave_out_seen(scores, targets, users, items)
  ranks = ranking.rank_by_scores(scores, targets, no_candidates)
  np.testing.assert_array_equal(ranks, [rank])


@pytest.mark.parametrize(
  ('target', 'candidates', 'rank'),
  [
    (3, [2, 4, 1], 3),
    (3, [2, 0, 0], 2),
    (3, [0, 0, 0], 1),
    (3, [3, 2, 0], 2),  # The target is not its own rival.
    (1, [2, 4, 5], 4),
    (6, [3, 4, 0], 3),
  ],
)
def test_rank_among_candidates_leaves_out_fill_and_the_target(target, candidates, rank):
  scores = jnp.array([[0.1, 0.9, 0.5, 0.5, 0.3, 0.5]])
  ranks = ranking.rank_by_scores(scores, jnp.array([target]), jnp.array([candidates]))
  np.testing.assert_array_equal(ranks, [rank])


def test_each_users_own_seen_items_are_left_out():
  scores = jnp.tile(jnp.array([4.0, 3.0, 2.0, 1.0]), (3, 1))
  targets = jnp.array([4, 4, 3])
  seen_users, seen_items = jnp.array([0, 2, 2, 3]), jnp.array([1, 1, 2, 3])
  no_candidates = jnp.zeros((3, 0), jnp.int32)
  scores = ranking.leave_out_seen(scores, targets, seen_users, seen_items)
  ranks = ranking.rank_by_scores(scores, targets, no_candidates)
  np.testing.assert_array_equal(ranks, [3, 4, 1])


@pytest.mark.parametrize('at_once', [3, 7, 30, 1000])
def test_parts_of_the_catalogue_count_as_the_whole_does(at_once, monkeypatch):
  """Vectors come three times, so that a target has equals in other parts and its own."""
  monkeypatch.setattr(ranking, 'ITEMS_AT_ONCE', at_once)
  rng = np.random.default_rng(0)
  num_items, num_users = 60, 3
  vectors = np.tile(rng.normal(size=(num_items // 3, 64)), (3, 1))
  # Row 0 and the rows beyond the catalogue would be the best.
  rows = np.concatenate([np.full((1, 64), 9.0), vectors, np.full((3, 64), 9.0)])
  users = np.abs(rng.normal(size=(num_users, 64)))
  items = {'a': jnp.asarray(rows[:, :32], jnp.float32), 'b': jnp.asarray(rows[:, 32:], jnp.float32)}
  states = {
    'a': jnp.asarray(users[:, :32], jnp.float32),
    'b': jnp.asarray(users[:, 32:], jnp.float32),
  }
  targets = np.array([5, 33, 60])
  seen_users, seen_items = np.array([0, 0, 2, 1, 3, 3]), np.array([25, 5, 20, 7, 1, 2])
  rank = jax.jit(ranking.rank_by_products, static_argnames=('num_items', 'item_rows'))
  queries = map(jnp.asarray, (targets, seen_users, seen_items))
  ranks, finite = rank(states, items, *queries, num_items=num_items, item_rows='all')
  expected = []
  for user, target in enumerate(targets):
    seen = set(seen_items[seen_users == user].tolist()) | {target}
    # Rounded, so that equal vectors are equal.
    scores = np.round(vectors @ users[user], 9)
    rivals = [i for i in range(1, num_items + 1) if i not in seen]
    expected.append(1 + sum(scores[i - 1] >= scores[target - 1] for i in rivals))
  np.testing.assert_array_equal(ranks, expected)
  assert finite


@pytest.mark.parametrize('at_once', [7, 1000])
def test_a_score_that_is_not_finite_is_told(at_once, monkeypatch):
  monkeypatch.setattr(ranking, 'ITEMS_AT_ONCE', at_once)
  items = jnp.ones((21, 4)).at[15, 2].set(jnp.nan)
  nobody = jnp.array([5]), jnp.array([1])
  _, finite = ranking.rank_by_products(
    {'a': jnp.ones((2, 4))}, {'a': items}, jnp.array([3, 4]), *nobody, 20, 'all'
  )
  assert not finite

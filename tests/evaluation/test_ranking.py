import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur4rec_jax.evaluation import ranking
from ur4rec_jax.models.followers import FollowerScores
from ur4rec_jax.sharding.devices import AXIS
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings


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
  scores = ranking.leave_out_seen(scores, targets, ranking.Seen(users, items))
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
  seen = ranking.Seen(jnp.array([0, 2, 2, 3]), jnp.array([1, 1, 2, 3]))
  no_candidates = jnp.zeros((3, 0), jnp.int32)
  scores = ranking.leave_out_seen(scores, targets, seen)
  ranks = ranking.rank_by_scores(scores, targets, no_candidates)
  np.testing.assert_array_equal(ranks, [3, 4, 1])


def catalogue(num_users: int, num_items: int = 60, width: int = 64, added=None):
  """Users and items by branch (the last rows are not items), and the expected ranks.

  Vectors come three times, so that a target has equals in other parts and its own; row 0 and the
  rows beyond the catalogue would be the best.
  """
  rng = np.random.default_rng(0)
  vectors = np.tile(rng.normal(size=(num_items // 3, width)), (3, 1))
  no_items = lambda count: np.full((count, width), 9.0)
  rows = np.concatenate([no_items(1), vectors, no_items(5)])
  users = np.abs(rng.normal(size=(num_users, width)))
  targets = rng.integers(1, num_items + 1, num_users)
  seen = rng.integers(1, num_items + 1, (num_users, 4))
  seen[0, 0] = targets[0]
  ranks = []
  more = np.zeros((num_users, num_items + 1))
  if added is not None:
    np.put_along_axis(more, added.items, added.scores, axis=1)
  for user, target, had, of_user in zip(users, targets, seen, more, strict=True):
    scores = np.round(vectors @ user, 9) + of_user[1:]  # Equal vectors have equal products.
    rivals = set(range(1, num_items + 1)) - {target, *had}
    ranks.append(1 + sum(scores[i - 1] >= scores[target - 1] for i in rivals))
  halves = lambda x: {
    'a': jnp.asarray(x[:, : width // 2], jnp.float32),
    'b': jnp.asarray(x[:, width // 2 :], jnp.float32),
  }
  return halves(users), halves(rows), targets, seen, ranks


def listed(seen: np.ndarray) -> ranking.Seen:
  """The pairs for `rank_by_products`, and two pairs that belong to no user."""
  users = np.repeat(np.arange(len(seen) + 1), [*[seen.shape[1]] * len(seen), 2])
  items = np.append(seen.ravel(), [1, 2]).astype(np.int32)
  return ranking.Seen(users.astype(np.int32), items)


def drawn_followers(num_users: int, num_items: int = 60) -> FollowerScores:
  """Scores of a few distinct items of each user, large enough to change ranks; 0 is no item."""
  rng = np.random.default_rng(3)
  items = np.stack([1 + rng.permutation(num_items)[:20] for _ in range(num_users)])
  items[:, 15:] = 0
  return FollowerScores(items.astype(np.int32), 9 * rng.random(items.shape) * (items > 0))


@pytest.mark.parametrize('has_followers', [False, True])
@pytest.mark.parametrize('at_once', [7, 30, 1000])
def test_parts_of_the_catalogue_count_as_the_whole_does(at_once, has_followers, monkeypatch):
  monkeypatch.setattr(ranking, 'ITEMS_AT_ONCE', at_once)
  added = drawn_followers(5) if has_followers else None
  users, items, targets, seen, expected = catalogue(num_users=5, added=added)
  rank = jax.jit(functools.partial(ranking.rank_by_products, embeddings=ItemEmbeddings('all', 60)))
  ranks, finite = rank(
    users,
    items,
    jnp.asarray(targets),
    jax.tree.map(jnp.asarray, listed(seen)),
    added=jax.tree.map(jnp.asarray, added),
  )
  np.testing.assert_array_equal(ranks, expected)
  assert finite


@pytest.mark.parametrize('has_followers', [False, True])
@pytest.mark.parametrize('at_once', [7, 1000])
def test_devices_with_a_part_of_the_catalogue_each_rank_as_one_does(
  at_once, has_followers, monkeypatch
):
  """`vmap` stands for devices."""
  monkeypatch.setattr(ranking, 'ITEMS_AT_ONCE', at_once)
  added = drawn_followers(6) if has_followers else None
  users, items, targets, seen, expected = catalogue(num_users=6, added=added)
  by_device = lambda x: jnp.asarray(x).reshape(3, -1, *x.shape[1:])
  users, items, targets = jax.tree.map(by_device, (users, items, targets))
  seen = jax.tree.map(lambda *x: jnp.stack(x), *map(listed, seen.reshape(3, 2, -1)))
  embeddings = ItemEmbeddings('sharded', 60)
  rank = lambda *x: ranking.rank_by_products(*x[:4], embeddings, x[4])
  added = jax.tree.map(by_device, added)
  ranks, finite = jax.jit(jax.vmap(rank, axis_name=AXIS))(users, items, targets, seen, added)
  np.testing.assert_array_equal(ranks.ravel(), expected)
  assert finite.all()


@pytest.mark.parametrize('at_once', [7, 1000])
def test_a_score_that_is_not_finite_is_told(at_once, monkeypatch):
  monkeypatch.setattr(ranking, 'ITEMS_AT_ONCE', at_once)
  items = jnp.ones((21, 4)).at[15, 2].set(jnp.nan)
  nobody = ranking.Seen(jnp.array([5]), jnp.array([1]))
  _, finite = ranking.rank_by_products(
    {'a': jnp.ones((2, 4))}, {'a': items}, jnp.array([3, 4]), nobody, ItemEmbeddings('all', 20)
  )
  assert not finite


def best_of(users, items, seen, num_items: int, count: int) -> np.ndarray:
  """The best items by a plain sort of NumPy scores; equal scores by the smaller id."""
  joined = lambda x: np.concatenate([np.asarray(x['a']), np.asarray(x['b'])], axis=1)
  scores = np.round(joined(users) @ joined(items)[1 : num_items + 1].T, 4)
  for row, had in zip(scores, seen, strict=True):
    row[had - 1] = -np.inf
  return 1 + np.argsort(-scores, axis=1, kind='stable')[:, :count]


def test_the_best_items_are_those_of_a_plain_sort():
  users, items, _, seen, _ = catalogue(num_users=5)
  one = jax.tree.map(lambda x: jnp.asarray(x)[None], (users, items, listed(seen)))
  find = functools.partial(ranking.best_by_products, count=5, embeddings=ItemEmbeddings('all', 60))
  found = jax.vmap(find, axis_name=AXIS)(*one)[0]
  scores = lambda ids: np.take_along_axis(scored(users, items), np.asarray(ids), axis=1)
  expected = best_of(users, items, seen, 60, 5)
  np.testing.assert_allclose(scores(found), scores(expected), rtol=1e-5)  # Vectors come thrice.
  assert all(len({*row} - {*had}) == 5 for row, had in zip(found.tolist(), seen, strict=True))


def scored(users, items) -> np.ndarray:
  return sum(np.asarray(users[branch]) @ np.asarray(items[branch]).T for branch in users)


def test_devices_with_a_part_of_the_catalogue_find_the_same_best_items():
  """`vmap` stands for devices."""
  users, items, _, seen, _ = catalogue(num_users=6)
  expected = best_of(users, items, seen, 60, 4)
  by_device = lambda x: jnp.asarray(x).reshape(3, -1, *x.shape[1:])
  split_users, split_items = jax.tree.map(by_device, (users, items))
  split_seen = jax.tree.map(lambda *x: jnp.stack(x), *map(listed, seen.reshape(3, 2, -1)))
  find = functools.partial(
    ranking.best_by_products, count=4, embeddings=ItemEmbeddings('sharded', 60)
  )
  for found in jax.jit(jax.vmap(find, axis_name=AXIS))(split_users, split_items, split_seen):
    scores = lambda ids: np.take_along_axis(scored(users, items), np.asarray(ids), axis=1)
    np.testing.assert_allclose(scores(found), scores(expected), rtol=1e-5)


def test_a_list_of_the_best_ends_where_no_item_is_left():
  scores = jnp.array([[3.0, -jnp.inf, 1.0], [-jnp.inf, -jnp.inf, 2.0]])
  best, ids = ranking.best_of(scores, jnp.array([7, 8, 9]), 3)
  np.testing.assert_array_equal(ids, [[7, 9, 0], [9, 0, 0]])
  np.testing.assert_array_equal(best[0, :2], [3, 1])

import dataclasses
import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import runs
from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables
from ur4rec_jax.data.input_pipeline import gather_batch
from ur4rec_jax.errors import DivergenceError
from ur4rec_jax.evaluation import evaluate, ranking
from ur4rec_jax.evaluation.baselines import baseline_metrics
from ur4rec_jax.evaluation.metrics import metrics_by_target, ranking_metrics
from ur4rec_jax.evaluation.protocol import SEEN_ITEMS, Protocol
from ur4rec_jax.evaluation.queries import make_queries, pack_queries
from ur4rec_jax.models.content import EncodedItems
from ur4rec_jax.models.layers import take_positions
from ur4rec_jax.models.sasrec import SASRec
from ur4rec_jax.models.ur4rec import UR4Rec
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings

NUM_ITEMS = 25
MAX_LENGTH = 6
PARTS = ('valid', 'test')
make_dataset = functools.partial(runs.make_dataset, num_items=NUM_ITEMS)


def make_protocol(
  candidates: str = 'all', num_candidates: int = 7, seed: int = 0, seen_items: str = 'leave_out'
) -> Protocol:
  return Protocol(candidates, num_candidates, seed, seen_items)


@functools.cache
def mixed_dataset() -> Dataset:
  """Users of 1 to 14 interactions, items often again, and one who has nearly everything."""
  rng = np.random.default_rng(0)
  histories = [rng.integers(1, NUM_ITEMS + 1, n) for n in rng.integers(1, 15, 45)]
  histories.append(rng.permutation(np.arange(1, NUM_ITEMS - 1)))
  histories.append(np.array([4, 8, 4, 8, 4]))  # Both targets were seen before.
  return make_dataset(histories)


@functools.cache
def cycle_dataset() -> Dataset:
  """Everybody goes through the items in their order, from a place of their own."""
  histories = [(start + np.arange(3 + start % 5)) % NUM_ITEMS + 1 for start in range(40)]
  return make_dataset(histories)


def history(dataset: Dataset, user: int) -> np.ndarray:
  return dataset.item_ids[dataset.offsets[user] : dataset.offsets[user + 1]]


def run(model, dataset, part, protocol, params=None, mapping='pmap', users_per_batch=9, **options):
  item_ids, embeddings = devices.replicate(dataset.item_ids), ItemEmbeddings('all', NUM_ITEMS)
  data = evaluate.EvalData(
    dataset, protocol, users_per_batch, item_ids, Tables({}, {}), embeddings, mapping=mapping
  )
  evaluator = evaluate.make_evaluator(model, data, part)
  return evaluator(devices.replicate(params or {}), **options)


class Constant(nn.Module):
  """Gives every item the same score."""

  max_length: int = MAX_LENGTH
  num_items: int = NUM_ITEMS
  is_sum = True

  def encode_items(self, features):
    return {'branch': EncodedItems(self.item_vectors(), None)}

  def encode_users(self, items, item_ids, segment_ids, preferences, query_positions):
    return {'branch': self.states(take_positions(item_ids, query_positions))}

  def covariances(self, items):
    return {}

  def scaled_users(self, users, covariances):
    return users

  def item_vectors(self):
    return jnp.ones((self.num_items + 1, 1))

  def states(self, newest):
    return jnp.ones((*newest.shape, 1))


class Oracle(Constant):
  """Gives the item after the newest one the best score: the answer in `cycle_dataset`."""

  def states(self, newest):
    return jax.nn.one_hot(newest % self.num_items, self.num_items)

  def item_vectors(self):
    return jnp.eye(self.num_items + 1)[:, 1:]


class Poisoned(Oracle):
  """As `Oracle`, but `value` after item 7."""

  value: float = jnp.nan

  def states(self, newest):
    return jnp.where(newest[..., None] == 7, self.value, super().states(newest))


@pytest.mark.parametrize('part', PARTS)
def test_queries_hold_out_the_last_or_the_one_before(part):
  dataset = make_dataset([[1, 2, 3, 4], [5], [6, 7], [8, 9, 10]])
  queries = make_queries(dataset, part, make_protocol())
  np.testing.assert_array_equal(queries.users, [0, 3])
  np.testing.assert_array_equal(queries.targets, [4, 10] if part == 'test' else [3, 9])
  np.testing.assert_array_equal(queries.starts, [0, 7])
  np.testing.assert_array_equal(queries.lengths, [3, 2] if part == 'test' else [2, 1])
  assert queries.candidates.shape == (2, 0)


def test_held_out_items_of_a_split_that_leaves_users_out():
  dataset = make_dataset([[1, 2, 3, 4], [5], [6, 7, 8]])
  cuts = {'valid': np.array([-1, -1, 0]), 'test': np.array([1, 0, -1])}
  dataset = dataclasses.replace(dataset, split=splits.Split(np.array([1, 0, 0]), cuts))
  for part, users, items in (('valid', [2], [6]), ('test', [0, 1], [2, 5])):
    found = dataset.held_out(part)
    np.testing.assert_array_equal(found[0], users)
    np.testing.assert_array_equal(found[1], items)


@pytest.mark.parametrize('candidates', ['uniform', 'popularity'])
def test_candidates_are_distinct_items_the_user_never_has(candidates):
  dataset = mixed_dataset()
  train = set(dataset.train_part().item_ids.tolist())
  drawable = train if candidates == 'popularity' else set(range(1, NUM_ITEMS + 1))
  queries = make_queries(dataset, 'valid', make_protocol(candidates))
  assert queries.candidates.shape == (len(queries.users), 7)
  for user, row in zip(queries.users, queries.candidates, strict=True):
    free = drawable - set(history(dataset, user).tolist())
    drawn = row[row > 0].tolist()
    assert len(drawn) == len(set(drawn)) == min(7, len(free))
    assert set(drawn) <= free
  assert (queries.candidates == 0).any()  # For the user who has nearly everything.


@pytest.mark.parametrize('candidates', ['uniform', 'popularity'])
def test_candidates_follow_their_seed_and_not_the_part(candidates):
  def draw(part, seed):
    protocol = make_protocol(candidates, seed=seed)
    return make_queries(mixed_dataset(), part, protocol).candidates

  np.testing.assert_array_equal(draw('valid', 0), draw('valid', 0))
  np.testing.assert_array_equal(draw('valid', 0), draw('test', 0))
  assert (draw('valid', 0) != draw('valid', 1)).any()


@pytest.mark.parametrize(('candidates', 'share'), [('uniform', 0.5), ('popularity', 0.9)])
def test_candidates_are_drawn_evenly_or_by_training_popularity(candidates, share):
  """Everybody but one has item 1 only; item 2 is in training nine times as often as item 3."""
  histories = [[1, 1, 1]] * 2000 + [[2] * 9 + [3, 1, 1]]
  dataset = make_dataset(histories, num_items=3)
  queries = make_queries(dataset, 'test', make_protocol(candidates, num_candidates=1))
  drawn = queries.candidates[:2000]
  assert set(drawn.ravel().tolist()) == {2, 3}
  assert abs((drawn == 2).mean() - share) < 4 * np.sqrt(share * (1 - share) / 2000)


def test_protocol_names_what_a_number_depends_on():
  assert make_protocol().describe(cycle_dataset()) == {
    'split': 'leave_one_out',
    'candidates': 'all items',
    'seen_items': 'left out',
    'ties': 'against the model',
  }
  assert make_protocol().describe(mixed_dataset())['seen_items'] == 'left out, also as targets'
  kept = make_protocol(seen_items='keep')
  assert kept.describe(mixed_dataset())['seen_items'] == 'kept'
  sampled = make_protocol('popularity', num_candidates=99, seed=5).describe(mixed_dataset())
  assert sampled['candidates'] == 'target + 99 popularity (seed 5)'


def test_devices_share_the_users_of_one_batch():
  queries = make_queries(mixed_dataset(), 'test', make_protocol())
  with devices.compiling_for(jax.devices()[:1] * 3):
    batches, members = pack_queries(queries, MAX_LENGTH, users_per_batch=1000)
  assert len(members) == 3
  assert (members >= 0).any(1).all()
  rows = batches.plan.lengths.any(-1).sum(1)
  assert batches.plan.lengths.shape[1] == rows.max() <= rows.min() + 2


@pytest.mark.parametrize('users_per_batch', [1, 7, 1000])
def test_batches_hold_every_user_once_with_the_newest_token(users_per_batch):
  dataset = mixed_dataset()
  queries = make_queries(dataset, 'test', make_protocol('uniform'))
  batches, members = pack_queries(queries, MAX_LENGTH, users_per_batch)
  assert len(members) % devices.device_count() == 0
  np.testing.assert_array_equal(np.sort(members[members >= 0]), np.arange(len(queries.users)))
  for i, batch_members in enumerate(members):
    batch = jax.tree.map(lambda x, i=i: x[i], batches)
    rows = jax.tree.map(np.asarray, gather_batch(dataset.item_ids, batch.plan, MAX_LENGTH))
    for entry, query in enumerate(batch_members):
      if query < 0:
        assert batch.targets[entry] == batch.seen_lengths[entry] == 0
        continue
      seen = history(dataset, queries.users[query])[:-1]
      length = min(len(seen), MAX_LENGTH)
      row, slot = divmod(int(batch.slots[entry]), batch.plan.lengths.shape[1])
      tokens = rows.item_ids[row][rows.segment_ids[row] == slot + 1]
      np.testing.assert_array_equal(tokens, seen[-length:])
      assert rows.users[row, slot] == queries.users[query]
      assert batch.targets[entry] == queries.targets[query]
      assert (batch.seen_starts[entry], batch.seen_lengths[entry]) == (
        dataset.offsets[queries.users[query]],
        len(seen),
      )
      np.testing.assert_array_equal(batch.candidates[entry], queries.candidates[query])


@functools.cache
def sasrec():
  """A model whose scores differ widely, and its scores of the items after one history."""
  model = UR4Rec(SASRec(NUM_ITEMS, MAX_LENGTH, dim=8, num_blocks=1, num_heads=2, ffn_dim=8))
  ones = jnp.ones((1, 1), jnp.int32)
  init = functools.partial(model.init, method='encode')
  shapes = jax.eval_shape(init, jax.random.key(0), {}, ones, ones)['params']
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)

  @jax.jit
  def scores(item_ids):
    segments = (item_ids > 0).astype(jnp.int32)[None]
    encoded = model.apply({'params': params}, {}, item_ids[None], segments, method='encode')
    return encoded.items['sasrec'] @ encoded.users['sasrec'][0, -1]

  def score_all(before) -> np.ndarray:
    """Scores by item id; the user alone in a left-padded row."""
    latest = before[-MAX_LENGTH:]
    row = np.zeros(MAX_LENGTH, np.int32)
    row[MAX_LENGTH - len(latest) :] = latest
    return np.concatenate([[np.nan], scores(row)])

  return model, params, score_all


def plain_ranks(dataset, part, protocol, score_all) -> np.ndarray:
  """Full ranking as one would explain it, of the users whose rank counts."""
  keeps_seen = protocol.seen_items == 'keep'
  drawn = iter(make_queries(dataset, part, protocol).candidates.tolist())
  ranks = []
  for user in range(len(dataset.lengths)):
    items = history(dataset, user).tolist()
    if len(items) < 3:
      continue
    *before, target = items if part == 'test' else items[:-1]
    candidates = next(drawn)
    if target in before and not keeps_seen:
      continue
    if protocol.candidates == 'all':
      candidates = [i for i in range(1, NUM_ITEMS + 1) if keeps_seen or i not in before]
    scores = score_all(before)
    rank = 1
    for item in candidates:
      if item not in (0, target) and scores[item] >= scores[target]:
        rank += 1
    ranks.append(rank)
  return np.array(ranks)


@pytest.mark.parametrize('seen_items', SEEN_ITEMS)
@pytest.mark.parametrize('candidates', ['all', 'uniform', 'popularity'])
@pytest.mark.parametrize('part', PARTS)
def test_evaluator_equals_a_plain_loop_over_users(part, candidates, seen_items):
  dataset, protocol = mixed_dataset(), make_protocol(candidates, seen_items=seen_items)
  model, params, score_all = sasrec()
  expected = plain_ranks(dataset, part, protocol, score_all)
  repeated = dataset.is_repeated(part).sum()
  assert repeated > 2
  left_out = 0 if seen_items == 'keep' else repeated
  assert len(expected) == (dataset.lengths >= 3).sum() - left_out
  np.testing.assert_array_equal(run(model, dataset, part, protocol, params), expected)


@pytest.mark.parametrize('batch_size', [1, 1000])
def test_batch_size_changes_no_rank(batch_size):
  dataset, protocol = mixed_dataset(), make_protocol()
  model, params, score_all = sasrec()
  expected = plain_ranks(dataset, 'test', protocol, score_all)
  np.testing.assert_array_equal(
    run(model, dataset, 'test', protocol, params, users_per_batch=batch_size), expected
  )


def test_a_catalogue_in_parts_gives_the_same_ranks(monkeypatch):
  """In four parts, of which the last overlaps the third."""
  dataset, protocol = mixed_dataset(), make_protocol()
  model, params, score_all = sasrec()
  monkeypatch.setattr(ranking, 'ITEMS_AT_ONCE', 8)
  expected = plain_ranks(dataset, 'test', protocol, score_all)
  np.testing.assert_array_equal(
    run(model, dataset, 'test', protocol, params, users_per_batch=2), expected
  )


def test_shard_map_gives_the_same_ranks():
  dataset, protocol = mixed_dataset(), make_protocol()
  model, params, score_all = sasrec()
  expected = plain_ranks(dataset, 'valid', protocol, score_all)
  ranks = run(model, dataset, 'valid', protocol, params, mapping='shard_map')
  np.testing.assert_array_equal(ranks, expected)


@pytest.mark.parametrize('part', PARTS)
def test_equal_scores_give_the_worst_rank(part):
  dataset = cycle_dataset()
  ranks = run(Constant(), dataset, part, make_protocol())
  seen = dataset.lengths - (1 if part == 'test' else 2)
  np.testing.assert_array_equal(ranks, NUM_ITEMS - seen)


def test_equal_scores_give_the_worst_rank_among_candidates():
  ranks = run(Constant(), cycle_dataset(), 'test', make_protocol('uniform', num_candidates=12))
  np.testing.assert_array_equal(ranks, np.full(40, 13))


@pytest.mark.parametrize('candidates', ['all', 'uniform'])
@pytest.mark.parametrize('part', PARTS)
def test_a_model_that_knows_the_answer_ranks_it_first(part, candidates):
  ranks = run(Oracle(), cycle_dataset(), part, make_protocol(candidates))
  np.testing.assert_array_equal(ranks, np.ones(40))


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error(value):
  """Item 7 is the newest of some users only."""
  with pytest.raises(DivergenceError, match='not finite in the evaluation on valid'):
    run(Poisoned(value=value), cycle_dataset(), 'valid', make_protocol())


def test_only_the_newest_state_is_scored():
  dataset = make_dataset([[7, 7, 1, 2, 3], [3, 7, 4, 5], [1, 2, 7, 3, 4, 5, 6]])
  np.testing.assert_array_equal(run(Poisoned(), dataset, 'test', make_protocol()), [1, 1, 1])


def test_interruption_ends_the_evaluation():
  rank = functools.partial(run, Oracle(), cycle_dataset(), 'test', make_protocol())
  rank = functools.partial(rank, users_per_batch=1)
  assert rank(interrupted=lambda: True) is None
  asked = []

  def after_the_first():
    asked.append(len(asked))
    return len(asked) > 1

  assert rank(interrupted=after_the_first) is None
  assert len(asked) == 2
  assert (rank(interrupted=lambda: False) == 1).all()


@pytest.mark.parametrize('seen_items', SEEN_ITEMS)
@pytest.mark.parametrize('candidates', ['all', 'uniform', 'popularity'])
@pytest.mark.parametrize('part', PARTS)
def test_popularity_baseline_equals_a_plain_loop(part, candidates, seen_items):
  dataset, protocol = mixed_dataset(), make_protocol(candidates, seen_items=seen_items)
  counts = np.zeros(NUM_ITEMS + 1)
  for user in range(len(dataset.lengths)):
    items = history(dataset, user)
    for item in items[:-2] if len(items) >= 3 else items:
      counts[item] += 1
  ranks = plain_ranks(dataset, part, protocol, lambda before: counts)
  popularity = baseline_metrics(dataset, part, protocol)['popularity']
  assert popularity == ranking_metrics(ranks)


def test_random_baseline_is_near_chance():
  """Among 60 items, of which 4 were seen before the target: ranks 1 to 56, all equally likely."""
  rng = np.random.default_rng(0)
  users = 4000
  dataset = make_dataset([rng.permutation(60)[:5] + 1 for _ in range(users)], num_items=60)
  chance = baseline_metrics(dataset, 'test', make_protocol())['random']
  assert abs(chance['mean_rank'] - 57 / 2) < 4 * np.sqrt((56**2 - 1) / 12 / users)
  assert abs(chance['hit@10'] - 10 / 56) < 4 * np.sqrt(10 / 56 * 46 / 56 / users)
  protocol = make_protocol('uniform', num_candidates=9)
  chance = baseline_metrics(dataset, 'test', protocol)['random']
  assert abs(chance['mean_rank'] - 5.5) < 4 * np.sqrt((10**2 - 1) / 12 / users)
  assert chance['hit@10'] == 1


histories = st.lists(
  st.lists(st.integers(1, NUM_ITEMS), min_size=3, max_size=9), min_size=1, max_size=6
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(histories=histories, seen_items=st.sampled_from(SEEN_ITEMS))
def test_metrics_of_new_and_repeated_items_equal_a_plain_loop(histories, seen_items):
  dataset, protocol = make_dataset(histories), make_protocol(seen_items=seen_items)
  counts = np.bincount([i for h in histories for i in h[:-2]], minlength=NUM_ITEMS + 1)
  repeated = [items[-1] in items[:-1] for items in histories]
  np.testing.assert_array_equal(dataset.is_repeated('test'), repeated)
  is_counted = protocol.is_counted(dataset, 'test')
  assert is_counted.tolist() == [seen_items == 'keep' or not again for again in repeated]
  ranks = plain_ranks(dataset, 'test', protocol, lambda before: counts)
  if is_counted.any():
    found = baseline_metrics(dataset, 'test', protocol)
    assert found['popularity'] == ranking_metrics(ranks)
    assert found['random']['users'] == sum(is_counted)
  by_target = metrics_by_target(ranks, dataset.is_repeated('test'), is_counted)
  for name, is_kind in (('new', False), ('repeated', True)):
    users = [user for user, again in enumerate(repeated) if again == is_kind]
    assert by_target.get(name, {'users': 0})['users'] == len(users)
    of_kind = [
      r for r, again in zip(ranks, np.array(repeated)[is_counted], strict=True) if again == is_kind
    ]
    assert ('mrr' in by_target.get(name, {})) == bool(of_kind)
    if of_kind:
      assert by_target[name] == ranking_metrics(np.array(of_kind))


def test_random_baseline_follows_its_seed():
  def random(seed):
    return baseline_metrics(mixed_dataset(), 'test', make_protocol(seed=seed))['random']

  assert random(0) == random(0)
  assert random(0) != random(1)

"""The simple models, against computations by hand."""

import numpy as np
import pytest

from tests.helpers.runs import make_dataset
from ur4rec_jax.evaluation import history_models, neighbours
from ur4rec_jax.evaluation.baselines import baseline_metrics, baseline_ranks
from ur4rec_jax.evaluation.factors import factor_models
from ur4rec_jax.evaluation.history_models import rank_and_list, tuned
from ur4rec_jax.evaluation.metrics import ranking_metrics
from ur4rec_jax.evaluation.neighbours import neighbour_models
from ur4rec_jax.evaluation.popularity import popularity_models
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import make_queries


def chains(users=60, items=12):
  """Histories in which the next item is always the following number."""
  rng = np.random.default_rng(0)
  starts = rng.integers(0, items, users)
  return [[(start + i) % items + 1 for i in range(6)] for start in starts]


def measured(models, dataset):
  """Returns by name the test metrics of the setting that validation chooses, and the setting."""
  found = {}
  for name, settings in models.items():
    model = tuned(settings, dataset, Protocol())
    ranks, _ = rank_and_list(model, dataset, 'test', Protocol())
    found[name] = ranking_metrics(ranks) | {'setting': model.setting}
  return found


def test_next_item_knows_chains_and_popularity_does_not():
  dataset = make_dataset(chains())
  found = measured(neighbour_models(dataset.train_part()), dataset)
  assert found['next item']['ndcg@10'] == 1
  assert set(found) == {'next item', 'item-kNN', 'EASE'}
  popularity = baseline_metrics(dataset, 'test', Protocol())['popularity']
  for values in found.values():
    assert values['ndcg@10'] > popularity['ndcg@10']
    assert values['users'] == 60
    assert values['setting'].split()[0] in ('decay', 'penalty')


def test_factors_know_who_likes_what():
  """Two kinds of users with a half of the catalogue each."""
  rng = np.random.default_rng(0)
  halves = [rng.permutation(np.arange(1, 13) + 12 * (user % 2))[:8].tolist() for user in range(80)]
  dataset = make_dataset(halves, 24)
  models = factor_models(dataset.train_part(), seed=0)
  found = measured(models, dataset)
  assert set(found) == {'ALS', 'BPR-MF'}
  for values in found.values():  # A random order has 5 of 17 items in the first 5.
    assert values['hit@5'] > 0.75
  again = measured(factor_models(dataset.train_part(), seed=0), dataset)
  assert again == found


def test_popularity_of_late_counts_the_newest_interactions_of_training_alone():
  histories = [[1, 2, 3, 4], [1, 2, 5, 6], [2, 1, 5, 6]]
  dataset = make_dataset(histories, 6)
  times = np.array([0, 1, 98, 99, 0, 2, 98, 99, 100, 0, 98, 99])
  models = popularity_models(dataset, times, seed=0)
  (popularity,), late = list(models['popularity']), list(models['recent popularity'])
  queries = make_queries(dataset, 'test', Protocol())
  scores = lambda model: model.score(history_models.histories_of(dataset, queries))
  assert scores(popularity)[0].tolist() == [0, 3, 3, 0, 0, 0, 0]
  # Of 6 training interactions the latest is item 2 of the third user, at time 100.
  assert [model.setting for model in late] == ['the latest 1%', 'the latest 5%', 'the latest 20%']
  assert scores(late[0])[0].tolist() == [0, 0, 1, 0, 0, 0, 0]
  assert scores(late[2])[0].tolist() == [0, 0, 1, 0, 0, 0, 0]


def test_popularity_ranks_as_it_does_beside_a_training_run():
  rng = np.random.default_rng(1)
  dataset = make_dataset([rng.permutation(15)[:7] + 1 for _ in range(40)], 15)
  for protocol in (Protocol(), Protocol(seen_items='keep'), Protocol('uniform', 5)):
    (popularity,) = popularity_models(dataset, np.arange(280), seed=0)['popularity']
    ranks, _ = rank_and_list(popularity, dataset, 'test', protocol)
    assert ranks.tolist() == baseline_ranks(dataset, 'test', protocol)['popularity'].tolist()


@pytest.mark.parametrize('seen_items', ['leave_out', 'keep'])
def test_lists_are_the_best_items_that_may_be_recommended(seen_items):
  rng = np.random.default_rng(2)
  dataset = make_dataset([rng.permutation(12)[: 4 + user % 5] + 1 for user in range(20)], 12)
  scores = rng.random((20, 13)).astype(np.float32)
  model = history_models.HistoryModel('', lambda histories: scores[histories.users])
  protocol = Protocol(seen_items=seen_items)
  ranks, lists = rank_and_list(model, dataset, 'test', protocol, k=9)
  queries = make_queries(dataset, 'test', protocol)
  for user, (rank, items) in enumerate(zip(ranks, lists, strict=True)):
    start, length = queries.starts[user], queries.seen_lengths[user]
    rest = set(range(1, 13)) - set(dataset.item_ids[start : start + length].tolist())
    best = sorted(rest, key=lambda item: -scores[user, item])[:9]
    assert items.tolist() == best + [0] * (9 - len(best))
    if rank <= 9:
      assert items[rank - 1] == queries.targets[user]


@pytest.mark.parametrize('seen_items', ['leave_out', 'keep'])
@pytest.mark.parametrize('candidates', ['all', 'uniform'])
def test_ranks_are_those_of_a_plain_loop(seen_items, candidates):
  rng = np.random.default_rng(1)
  dataset = make_dataset([rng.integers(1, 16, rng.integers(3, 9)).tolist() for _ in range(40)], 15)
  protocol = Protocol(candidates, 5, seen_items=seen_items)
  train = dataset.train_part()
  has = np.zeros((40, 16))
  for user in range(40):
    has[user, train.item_ids[train.offsets[user] : train.offsets[user + 1]]] = 1
  together = has.T @ has
  counts = np.maximum(together.diagonal(), 1)
  cosines = together / np.sqrt(np.outer(counts, counts))
  np.fill_diagonal(cosines, 0)
  queries = make_queries(dataset, 'test', protocol)
  popularity = train.item_counts() * (1e-6 / train.item_counts().max())
  (model,) = (m for m in neighbour_models(train)['item-kNN'] if m.setting == 'decay 0.5')
  ranks, _ = rank_and_list(model, dataset, 'test', protocol)
  for row, user in enumerate(queries.users):
    target = queries.targets[row]
    history = dataset.item_ids[dataset.offsets[user] :][: queries.lengths[row]]
    weights = 0.5 ** np.arange(len(history))[::-1]
    scores = (weights @ cosines[history]).astype(np.float32) + popularity
    rivals = set(range(1, 16)) - {target}
    if candidates == 'uniform':
      rivals &= set(queries.candidates[row].tolist())
    elif seen_items == 'leave_out':
      rivals -= set(history.tolist())
    # Scores that differ by rounding alone may come in either order.
    better = sum(scores[i] > scores[target] + 1e-6 for i in rivals)
    alike = sum(abs(scores[i] - scores[target]) <= 1e-6 for i in rivals)
    assert 1 + better <= ranks[row] <= 1 + better + alike


def test_ease_has_no_item_recommend_itself_and_is_left_out_of_large_catalogues(monkeypatch):
  together = make_dataset(chains()).item_counts()
  matrix = neighbours._ease(neighbours.sp.csr_matrix(np.outer(together, together)), 10.0)
  assert np.isfinite(matrix).all()
  assert not matrix.diagonal().any()
  monkeypatch.setattr(neighbours, 'MOST_ITEMS_OF_EASE', 11)
  assert 'EASE' not in neighbour_models(make_dataset(chains()).train_part())


def test_only_the_nearest_neighbours_are_kept(monkeypatch):
  monkeypatch.setattr(neighbours, 'NEIGHBOURS', 3)
  values = np.random.default_rng(0).random((9, 9))
  kept = neighbours._largest(neighbours.sp.csr_matrix(values)).toarray()
  np.fill_diagonal(values, 0)
  for row, of in zip(kept, values, strict=True):
    assert sorted(row[row > 0]) == pytest.approx(sorted(of)[-3:])

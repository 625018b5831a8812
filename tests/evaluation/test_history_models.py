"""The baselines that look at pairs of items, against computations by hand."""

import numpy as np
import pytest

from tests.helpers.runs import make_dataset
from ur4rec_jax.evaluation import neighbours
from ur4rec_jax.evaluation.baselines import baseline_metrics
from ur4rec_jax.evaluation.neighbours import neighbour_metrics
from ur4rec_jax.evaluation.protocol import Protocol


def chains(users=60, items=12):
  """Histories in which the next item is always the following number."""
  rng = np.random.default_rng(0)
  starts = rng.integers(0, items, users)
  return [[(start + i) % items + 1 for i in range(6)] for start in starts]


def test_next_item_knows_chains_and_popularity_does_not():
  dataset = make_dataset(chains())
  found = neighbour_metrics(dataset, Protocol())
  assert found['next item']['ndcg@10'] == 1
  assert set(found) == {'next item', 'item-kNN', 'EASE'}
  popularity = baseline_metrics(dataset, 'test', Protocol())['popularity']
  for values in found.values():
    assert values['ndcg@10'] > popularity['ndcg@10']
    assert values['users'] == 60
    assert values['setting'].split()[0] in ('decay', 'penalty')


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
  queries = neighbours.make_queries(dataset, 'test', protocol)
  popularity = np.linspace(0, 1e-7, 16).astype(np.float32)
  (model,) = (m for m in neighbours._models(train)['item-kNN'] if m.decay == 0.5)
  ranks = neighbours._ranks(model, dataset, queries, popularity)
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
  assert 'EASE' not in neighbour_metrics(make_dataset(chains()), Protocol())


def test_only_the_nearest_neighbours_are_kept(monkeypatch):
  monkeypatch.setattr(neighbours, 'NEIGHBOURS', 3)
  values = np.random.default_rng(0).random((9, 9))
  kept = neighbours._largest(neighbours.sp.csr_matrix(values)).toarray()
  np.fill_diagonal(values, 0)
  for row, of in zip(kept, values, strict=True):
    assert sorted(row[row > 0]) == pytest.approx(sorted(of)[-3:])

import numpy as np
import pytest

from ur4rec_jax.evaluation.metrics import metrics_by_group, popularity_groups, ranking_metrics


def test_hand_worked_ranks():
  metrics = ranking_metrics(np.array([1, 3, 5, 6, 10, 11, 20, 21]))
  gain = {1: 1.0, 3: 0.5, 5: 0.38685281, 6: 0.35620719, 10: 0.28906483, 11: 0.27894295}
  gain[20] = 0.22767025
  up_to = {k: sum(g for rank, g in gain.items() if rank <= k) / 8 for k in (5, 10, 20)}
  assert metrics == pytest.approx(
    {
      'hit@5': 3 / 8,
      'hit@10': 5 / 8,
      'hit@20': 7 / 8,
      'ndcg@5': up_to[5],
      'ndcg@10': up_to[10],
      'ndcg@20': up_to[20],
      'mrr': (1 + 1 / 3 + 1 / 5 + 1 / 6 + 1 / 10 + 1 / 11 + 1 / 20 + 1 / 21) / 8,
      'mean_rank': 77 / 8,
      'users': 8,
    }
  )


def test_a_perfect_ranking_scores_one_everywhere():
  metrics = ranking_metrics(np.ones(3, np.int32))
  assert metrics.pop('users') == 3
  assert set(metrics.values()) == {1.0}


def test_a_hopeless_ranking_scores_zero_within_the_cutoffs():
  metrics = ranking_metrics(np.array([21, 1000]))
  assert [metrics[f'{name}@{k}'] for name in ('hit', 'ndcg') for k in (5, 10, 20)] == [0.0] * 6
  assert metrics['mrr'] == pytest.approx((1 / 21 + 1 / 1000) / 2)


def test_values_are_plain_numbers():
  assert {type(x) for x in ranking_metrics(np.array([2, 4])).values()} == {float, int}


def test_order_does_not_matter():
  ranks = np.random.default_rng(0).integers(1, 40, 50)
  assert ranking_metrics(ranks) == pytest.approx(ranking_metrics(ranks[::-1]))


@pytest.mark.parametrize('ranks', [[], [0], [3, 0, 1], [-1]])
def test_no_ranks_or_a_rank_below_one_is_an_error(ranks):
  with pytest.raises(ValueError, match='at least 1'):
    ranking_metrics(np.array(ranks, int))


HEAD, TORSO, TAIL, COLD = range(4)


@pytest.mark.parametrize(
  ('counts', 'groups'),
  [
    # 30 interactions, so 10 a group: 12 is the head though it is more than a third.
    ([3, 12, 5, 4, 1, 5, 0], [TAIL, HEAD, TORSO, TAIL, TAIL, TORSO, COLD]),
    # Borders between items: 6, 4 + 2, 2 + 2 + 2.
    ([2, 4, 6, 2, 2, 2], [TORSO, TORSO, HEAD, TAIL, TAIL, TAIL]),
    # Equally popular: by item id.
    ([1, 1, 1, 1, 1, 1], [HEAD, HEAD, TORSO, TORSO, TAIL, TAIL]),
    ([0, 1, 1, 0, 1, 1], [COLD, HEAD, HEAD, COLD, TORSO, TAIL]),
    # One item has more than two thirds: nobody is torso.
    ([1, 8, 1, 0], [TAIL, HEAD, TAIL, COLD]),
    ([7], [HEAD]),
  ],
)
def test_groups_have_a_third_of_the_interactions_each(counts, groups):
  np.testing.assert_array_equal(popularity_groups(np.array(counts)), groups)


def test_metrics_of_a_group_are_those_of_its_users():
  ranks = np.array([1, 7, 30, 2, 9])
  by_group = metrics_by_group(ranks, np.array([HEAD, COLD, HEAD, HEAD, COLD]))
  assert by_group == {
    'head': ranking_metrics(np.array([1, 30, 2])),
    'cold': ranking_metrics(np.array([7, 9])),
  }

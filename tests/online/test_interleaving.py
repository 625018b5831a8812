"""Interleaved lists, credit for clicks and the tests over users."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.live_logs import table_of
from ur4rec_jax.errors import InputError
from ur4rec_jax.online import experiment_report, interleaving
from ur4rec_jax.online.logs import read_logs

RANKINGS = st.lists(st.integers(0, 12), unique=True, max_size=10)


@settings(max_examples=60)
@given(RANKINGS, RANKINGS, st.integers(0, 12), st.integers(0, 9))
def test_team_draft_takes_the_best_of_each_team_in_turn(first, second, length, seed):
  items, teams = interleaving.team_draft(first, second, length, np.random.default_rng(seed))
  assert len(items) == len(teams) == min(length, len({*first, *second}))
  assert len({*items}) == len(items)
  for i, (item, team) in enumerate(zip(items, teams, strict=True)):
    ranking = (first, second)[team]
    assert item == next(x for x in ranking if x not in items[:i])
    other_is_open = any(x not in items[:i] for x in (first, second)[1 - team])
    picks = Counter(teams[:i])
    assert not other_is_open or picks[team] <= picks[1 - team]


@settings(max_examples=60)
@given(RANKINGS, RANKINGS, st.integers(0, 12), st.integers(0, 9))
def test_each_prefix_of_a_balanced_list_is_the_union_of_two_tops(first, second, length, seed):
  items = interleaving.balanced(first, second, length, np.random.default_rng(seed))
  assert len(items) == min(length, len({*first, *second}))
  for end in range(len(items) + 1):
    tops = [
      {*first[:a], *second[:b]}
      for a, b in itertools.product(range(len(first) + 1), range(len(second) + 1))
      if abs(a - b) <= 1 or min(a, b) == len((first, second)[a > b])
    ]
    assert {*items[:end]} in tops


def test_both_teams_begin_equally_often():
  rng = np.random.default_rng(0)
  begins = sum(interleaving.team_draft('abc', 'xyz', 3, rng)[1][0] for _ in range(2000))
  assert abs(begins / 2000 - 0.5) < 0.05


def test_balanced_credit():
  # The lowest click is on c, third in both; only b is higher in the second ranking's top.
  credit = interleaving.balanced_credit
  assert credit(['a', 'b'], [True, False], ['a', 'b'], ['b', 'a']) == -1
  assert credit(['a', 'b'], [False, True], ['a', 'b'], ['b', 'a']) == 1
  assert credit(['a', 'b'], [True, True], ['a', 'b'], ['b', 'a']) == 0
  assert credit(['a', 'b'], [False, False], ['a', 'b'], ['b', 'a']) == 0


def test_random_clicks_prefer_nobody_and_true_preferences_are_found():
  rng = np.random.default_rng(0)
  below = 0
  for _ in range(200):
    scores = rng.integers(-3, 4, 60)
    below += interleaving.prefer(scores, ('a', 'b')).p_permutation < 0.05
  assert below / 200 < 0.1
  found = interleaving.prefer(rng.integers(-2, 4, 500), ('a', 'b'))
  assert found.p_permutation < 0.001
  assert found.p_sign < 0.001
  assert found.interval[0] > 0
  assert found.wins[1] > found.wins[0]
  assert sum(found.wins) + found.ties == 500


def test_few_flips_are_those_of_all_sign_patterns():
  scores = np.array([1, 2, 2, 3, -1])
  sums = [abs((scores * signs).sum()) for signs in itertools.product((-1, 1), repeat=5)]
  exact = np.mean(np.array(sums) >= abs(scores.sum()))
  assert interleaving.prefer(scores, ('a', 'b')).p_permutation == pytest.approx(exact, abs=0.015)


def test_a_few_users_with_high_scores_do_not_turn_the_verdict_around():
  scores = np.array([-1] * 100 + [30] * 10)  # Most prefer the first, the sum the second.
  found = interleaving.prefer(scores, ('a', 'b'))
  assert found.p_permutation < 0.05
  assert found.advantage < 0 < found.net
  assert 'no preference shown' in experiment_report.preference_text(found)
  clear = interleaving.prefer(-scores[:100], ('a', 'b'))
  assert 'users prefer b' in experiment_report.preference_text(clear)


def test_scores_of_a_log(tmp_path):
  shown = """
  request_id,user,time,arm,team,item
  r1,u1,2026-01-01,x,old,a
  r1,u1,2026-01-01,x,new,b
  r2,u1,2026-01-02,x,new,a
  r2,u1,2026-01-02,x,old,b
  r3,u2,2026-01-02,x,new,a
  r4,u3,2026-01-02,x,old,a
  """
  done = """
  id,user,item,kind,time,request_id
  e1,u1,b,click,2026-01-01T00:01:00,r1
  e2,u1,a,click,2026-01-02T00:01:00,r2
  e3,u1,a,click,2026-01-02T00:02:00,r2
  e4,u3,a,click,2026-01-02T00:01:00,r4
  """
  paths = table_of(tmp_path / 'a.csv', shown), table_of(tmp_path / 'b.csv', done)
  logs = read_logs(*paths, by_item=True)
  assert logs.arms == ('new', 'old')
  by_user = dict(
    zip(logs.users.to_pylist(), interleaving.scores_of(logs, 'click').tolist(), strict=True)
  )
  assert by_user == {'u1': -2, 'u2': 0, 'u3': 1}
  with pytest.raises(InputError, match=r"no events of the kind 'buy'; kinds are click"):
    interleaving.scores_of(logs, 'buy')
  one_team = table_of(tmp_path / 'c.csv', shown.replace('new', 'old'))
  with pytest.raises(InputError, match='needs two teams, found old'):
    interleaving.scores_of(read_logs(one_team, paths[1], by_item=True), 'click')

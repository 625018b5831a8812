"""Exploration: lists of chance whose probabilities are known."""

import itertools
import pathlib
import time

import numpy as np
import pytest

from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import rules
from ur4rec_jax.inference.exploration import Exploration, position_probabilities
from ur4rec_jax.online import off_policy

SCORES = np.array([2.0, 1.7, 1.1, 0.4, -0.5])


def enumerated(weights):
  """`[items, positions]` probabilities of Plackett-Luce, from all orders."""
  found = np.zeros((len(weights),) * 2)
  for order in itertools.permutations(range(len(weights))):
    left = weights[list(order)][::-1].cumsum()[::-1]
    found[order, range(len(order))] += np.prod(weights[list(order)] / left)
  return found


@pytest.mark.parametrize('spread', [0.0, 1.0, 12.0])
def test_position_probabilities_are_those_of_all_orders(spread):
  weights = np.exp(-spread * np.arange(5))
  expected = enumerated(weights)
  for order in itertools.permutations(range(5), 3):
    found = position_probabilities(weights, np.array(order))
    np.testing.assert_allclose(found, expected[order, range(3)], atol=1e-6)


def test_a_list_with_many_items_adds_up():
  weights = np.exp(np.random.default_rng(0).normal(0, 2, 30))
  probability = np.stack(
    [position_probabilities(weights, np.roll(np.arange(30), -shift)) for shift in range(30)]
  )
  np.testing.assert_allclose(probability.sum(0), 1, atol=1e-6)  # Over the items of each position.


def test_a_long_list_takes_no_seconds():
  exploration, start = Exploration(0.1, items=100), time.thread_time()
  exploration.draw(np.linspace(3, -3, 100), 100)  # Other requests wait for it.
  assert time.thread_time() - start < 1


def test_lists_come_as_often_as_they_say():
  exploration = Exploration(0.4, 0.8, items=4, rng=np.random.default_rng(1))
  weights = exploration.weights(SCORES[:4])
  true = 0.4 * enumerated(weights)[:, :3] + 0.6 * np.eye(4)[:, :3]
  counts, rounds, drawn = np.zeros((4, 3)), 4000, 0
  for _ in range(rounds):
    order, propensity, is_drawn = exploration.draw(SCORES, 3)
    np.testing.assert_allclose(propensity, true[order, range(3)], atol=1e-6)
    counts[order, range(3)] += 1
    drawn += is_drawn
  error = np.sqrt(true * (1 - true) / rounds)
  assert (np.abs(counts / rounds - true) < 4.5 * error + 1e-9).all()
  assert abs(drawn / rounds - 0.4) < 4.5 * np.sqrt(0.24 / rounds)


def test_places_behind_the_drawn_items_keep_their_order():
  exploration = Exploration(1.0, 1.0, items=3, rng=np.random.default_rng(0))
  order, propensity, is_drawn = exploration.draw(SCORES, 9)
  assert is_drawn
  assert sorted(order[:3].tolist()) == [0, 1, 2]
  assert order[3:].tolist() == [3, 4]
  assert propensity[3:].tolist() == [1, 1]
  assert exploration.draw(SCORES[:0], 9)[0].size == 0


def test_estimates_from_explored_logs_hold_the_truth():
  """A world of five items and three positions, where clicks depend on item and position."""
  rng = np.random.default_rng(5)
  liking, bias = np.array([0.1, 0.5, 0.2, 0.6, 0.3]), np.array([1.0, 0.6, 0.4])
  logged = Exploration(0.5, 1.5, items=5, rng=rng)
  target = Exploration(1.0, 0.5, items=5)
  by_target = enumerated(target.weights(SCORES[::-1].copy())[::-1])  # It likes the last items most.
  truth = float((by_target[:, :3] * liking[:, None] * bias).sum())
  held = {'IPS': 0, 'SNIPS': 0}
  logs, requests = 60, 400
  for _ in range(logs):
    rows = [logged.draw(SCORES, 3)[:2] for _ in range(requests)]
    order, propensity = (np.stack(part) for part in zip(*rows, strict=True))
    reward = rng.random(order.shape) < liking[order] * bias
    found = off_policy.evaluate(
      off_policy.Trials(
        np.repeat(np.arange(requests), 3),
        reward.ravel().astype(float),
        (by_target[order, np.arange(3)] / propensity).ravel(),
        np.arange(requests),
      )
    )
    assert abs(found.mean_weight - 1) < 0.5
    for estimate in found.estimates:
      if estimate.method in held:
        held[estimate.method] += estimate.low <= truth <= estimate.high
  assert min(held.values()) >= 50, held  # 57 of 60 are expected.


def load(tmp_path, text):
  path = pathlib.Path(tmp_path / 'rules.toml')
  path.write_text(text)
  return rules.load(path, [f'i{n}' for n in range(9)])


def test_rules_explore(tmp_path):
  found = load(tmp_path, '[exploration]\nshare = 1\nitems = 4')
  items, scores = np.arange(1, 9), np.linspace(1, 0, 8)
  lists = set()
  for _ in range(500):  # In 50 draws there are five lists or fewer with a probability of 0.19.
    choice = found.choose(items, scores, 5, lambda item: True)
    lists.add(tuple(pick.item for pick in choice.picks))
    assert len(choice.picks) == len({pick.item for pick in choice.picks}) == 5
    assert choice.picks[4].item == 5
    assert {pick.item for pick in choice.picks[:4]} == {1, 2, 3, 4}
    assert all(0 < pick.propensity <= 1 for pick in choice.picks)
    assert choice.picks[0].reasons == ['drawn']
    assert choice.is_final
  assert len(lists) > 5
  short = found.choose(items[:2], scores[:2], 5, lambda item: True)
  assert [len(short.picks), len(short.notes)] == [2, 1]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('[exploration]\n', 'exploration needs the field share'),
    ('[exploration]\nshare = 0', 'share=0 must be above 0 and at most 1'),
    ('[exploration]\nshare = 0.1\ntemperature = 0', 'temperature=0 must be above 0'),
    ('[exploration]\nshare = 0.1\nitems = 1', 'items=1 must be from 2 to 128'),
    ('[exploration]\nshare = 0.1\nepsilon = 1', 'has no field epsilon'),
    ('[exploration]\nshare = 0.1\n[diversity]\nstrength = 0.5', 'goes with filters, boosts and'),
  ],
)
def test_wrong_rules(tmp_path, text, message):
  with pytest.raises(InputError) as error:
    load(tmp_path, text)
  assert message in str(error.value)

"""Off-policy estimates: right on average, honest about too little overlap."""

import numpy as np
import pytest

from tests.helpers.live_logs import table_of
from ur4rec_jax.errors import InputError
from ur4rec_jax.online import off_policy
from ur4rec_jax.online.logs import read_logs
from ur4rec_jax.online.off_policy import Trials, evaluate

SHOWN = """
request_id,user,time,item,propensity
r1,u1,2026-01-01,a,0.5
r2,u2,2026-01-01,b,0.25
r3,u3,2026-01-01,a,0.5
"""
DONE = """
id,user,item,kind,time,request_id
e1,u1,a,click,2026-01-01T00:01:00,r1
"""
TARGET = """
request_id,item,propensity,predicted
r1,a,1.0,0.6
r2,a,0.5,0.4
r2,b,0.5,0.2
r3,a,0.25,0.5
r3,b,0.75,0.1
"""


def trials(requests=4000, seed=0, slots=1):
  """Random lists over two items; the new policy shows item 1 with probability .8."""
  rng = np.random.default_rng(seed)
  action = rng.integers(0, 2, requests * slots)
  rate = np.array([0.1, 0.3])
  reward = (rng.random(requests * slots) < rate[action]).astype(float)
  weight = np.array([0.2, 0.8])[action] / 0.5
  request = np.repeat(np.arange(requests), slots)
  guess = np.array([0.2, 0.2])  # A wrong model.
  return Trials(
    request, reward, weight, np.arange(requests), guess[action], np.full(requests, 0.2 * slots)
  )


@pytest.mark.parametrize('slots', [1, 3])
def test_estimates_are_right_on_average(slots):
  true = slots * (0.2 * 0.1 + 0.8 * 0.3)
  found = [evaluate(trials(400, seed, slots)).estimates for seed in range(200)]
  for i, method in enumerate(('logged', 'IPS', 'SNIPS', 'DR')):
    assert found[0][i].method == method
    values = [estimates[i].value for estimates in found]
    expected = 0.2 * slots if method == 'logged' else true
    assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / len(values) ** 0.5)
    held = np.mean([e[i].low <= expected <= e[i].high for e in found])
    assert 0.9 < held < 0.99


def test_a_good_model_narrows_the_interval():
  log = trials()
  rate = np.array([0.1, 0.3])
  exact = log._replace(
    predicted=rate[(log.weight > 1).astype(int)], expected=np.full(4000, 0.2 * 0.1 + 0.8 * 0.3)
  )
  by_method = {e.method: e.high - e.low for e in evaluate(exact).estimates}
  assert by_method['DR'] < by_method['IPS']


def test_requests_of_one_user_count_as_one():
  log = trials(1000)
  copies = Trials(
    np.arange(4000), np.tile(log.reward, 4), np.tile(log.weight, 4), np.tile(np.arange(1000), 4)
  )
  alone, copied = (
    {e.method: e for e in evaluate(t._replace(predicted=None)).estimates} for t in (log, copies)
  )
  for method in alone:
    assert copied[method].value == pytest.approx(alone[method].value)
    assert copied[method].low == pytest.approx(alone[method].low)


def test_the_policy_that_was_logged_is_estimated_by_its_mean():
  log = trials()._replace(weight=np.ones(4000))
  found = evaluate(log)
  assert found.effective == pytest.approx(4000)
  assert {round(e.value, 9) for e in found.estimates} == {round(log.reward.mean(), 9)}
  assert found.warnings == ()


def test_the_interval_of_the_logged_policy_holds_for_lists_of_different_lengths():
  rng = np.random.default_rng(0)
  lengths = rng.choice([1, 20], 500)
  request = np.repeat(np.arange(500), lengths)
  reward = (rng.random(len(request)) < 0.3).astype(float)
  found = evaluate(Trials(request, reward, np.ones(len(request)), np.arange(500)))
  logged, _, snips = found.estimates
  assert snips[1:] == pytest.approx(logged[1:])


def test_the_mean_weight_is_judged_by_users():
  alarms = 0
  for seed in range(40):
    weight = np.repeat(np.random.default_rng(seed).choice([0.4, 1.6], 300), 50)  # One draw a user.
    count = len(weight)
    log = Trials(np.arange(count), np.ones(count), weight, np.repeat(np.arange(300), 50))
    alarms += any('have the mean' in text for text in evaluate(log).warnings)
  assert alarms == 0


def test_little_overlap_is_warned_of():
  weight = np.zeros(4000)
  weight[:40] = 100.0
  (text,) = evaluate(trials()._replace(weight=weight)).warnings
  assert text.startswith('too little overlap: 4,000 exposures are worth 40')
  (text,) = evaluate(trials()._replace(weight=np.full(4000, 0.6))).warnings
  assert 'the weights have the mean 0.600, not 1' in text
  with pytest.raises(InputError, match='shows none of the logged items'):
    evaluate(trials()._replace(weight=np.zeros(4000)))
  with pytest.raises(InputError, match='two users or more'):
    evaluate(trials()._replace(user=np.zeros(4000, int)))


def read(tmp_path, target=TARGET, shown=SHOWN, event='click'):
  paths = [
    table_of(tmp_path / name, text)
    for name, text in (('shown.csv', shown), ('done.csv', DONE), ('new.csv', target))
  ]
  return off_policy.trials_of(read_logs(*paths[:2], needs=['propensity']), paths[2], event)


def test_logs_and_target_are_joined(tmp_path):
  found, warnings = read(tmp_path)
  assert found.reward.tolist() == [1, 0, 0]
  assert found.weight.tolist() == [2, 2, 0.5]
  assert found.predicted.tolist() == [0.6, 0.2, 0.5]
  assert found.expected.tolist() == pytest.approx([0.6, 0.3, 0.2])
  assert warnings == []
  estimates = {e.method: e.value for e in evaluate(found).estimates}
  assert estimates['IPS'] == pytest.approx(2 / 3)
  assert estimates['SNIPS'] == pytest.approx(2 / 4.5)
  assert estimates['DR'] == pytest.approx((0.6 + 0.8 + 0.3 - 0.4 + 0.2 - 0.25) / 3)


def test_items_that_the_target_does_not_list_have_no_weight(tmp_path):
  lines = [line.rsplit(',', 1)[0] for line in TARGET.strip().split('\n')]
  target = '\n'.join(line for line in lines if not line.startswith('r3,a'))
  found, (warning,) = read(tmp_path, target)
  assert found.weight.tolist() == [2, 2, 0]
  assert found.predicted is None
  assert warning.startswith('1 exposure of 3 not listed')


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('r1,a,1.0', 'r1,a,1.5', 'line 2: propensity must be from 0 to 1, not 1.5'),
    ('r2,b,0.5', 'r2,a,0.5', 'line 4: the item of this request is listed twice'),
    ('r2,b,0.5', 'r2,b,0.1', "request 'r2' add up to 0.600, but it shows 1 item"),
    ('item,propensity', 'item,chance', "has no column 'propensity'"),
    ('r', 'q', 'none of its requests is in'),
  ],
)
def test_wrong_targets_are_refused(tmp_path, old, new, message):
  lines = TARGET.strip().split('\n')
  target = '\n'.join(
    line.replace(old, new) if len(old) > 1 or i else line for i, line in enumerate(lines)
  )
  with pytest.raises(InputError) as refused:
    read(tmp_path, target)
  assert message in str(refused.value)


def test_logs_without_propensities_or_events_are_refused(tmp_path):
  with pytest.raises(InputError, match="has no column 'propensity'"):
    read(tmp_path, shown=SHOWN.replace('propensity', 'chance'))
  with pytest.raises(InputError, match=r"no events of the kind 'buy'; kinds are click"):
    read(tmp_path, event='buy')

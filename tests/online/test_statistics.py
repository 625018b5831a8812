"""Moments, intervals and p values against direct computations and simulations."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_ind

from ur4rec_jax.errors import InputError
from ur4rec_jax.online import statistics


def users(count, seed, gain=1.0):
  rng = np.random.default_rng(seed)
  taste = rng.gamma(4, 0.25, count)
  shown = 1.0 + rng.poisson(5, count)
  clicks = rng.binomial(shown.astype(int), np.minimum(0.1 * taste * gain, 1)).astype(float)
  return np.stack([clicks, shown, rng.poisson(3 * taste).astype(float)], -1)


def test_moments_of_every_prefix():
  values = users(50, 0) + np.array(
    [1e6, 0, 0]
  )  # A large mean must not cost the digits of the variance.
  ends = [2, 3, 50]
  found = statistics.moments(values, ends)
  for i, end in enumerate(ends):
    assert np.allclose(found.mean[i], values[:end].mean(0), rtol=1e-12)
    assert np.allclose(found.cov[i], np.cov(values[:end].T), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('value', [19.99, 0.1, 1 / 3])
def test_what_all_users_have_in_common_has_no_variance(value):
  values = users(200, 0)
  values[:150, 0] = value
  same, *_, end = statistics.moments(values, [50, 150, 200])[2]
  assert (same[0] == 0).all()
  assert same[1, 1] > 0
  assert end[0, 0] > 0
  assert statistics.moments(values, [50]).mean[0, 0] == value
  values[:, 0] = value
  whole = statistics.moments(values).last()
  assert (whole.mean[0], *whole.cov[0]) == (value, 0, 0, 0)


def test_equal_prices_are_no_difference():
  pytest.importorskip('tea_tasting')
  rng = np.random.default_rng(0)
  for _ in range(20):
    arms = [
      np.stack([np.full(n, 19.99), np.ones(n), np.zeros(n)], -1) for n in rng.integers(50, 900, 2)
    ]
    fixed = statistics.compare(*(statistics.moments(x).last() for x in arms), 0.05, False)
    assert (fixed.p, fixed.difference) == (None, 0)
    looks = statistics.sequential(*(statistics.moments(x, [9, len(x)]) for x in arms), 0.05, 900)
    assert looks.p.tolist() == [1, 1]


def test_no_users_have_no_moments():
  found = statistics.moments(np.zeros((0, 3)), [0])
  assert found.count.tolist() == [0]
  assert np.isfinite(found.mean).all()


def test_a_mean_is_tested_as_scipy_does():
  pytest.importorskip('tea_tasting')
  a, b = users(300, 1), users(400, 2)
  a[:, 1] = b[:, 1] = 1
  found = statistics.compare(
    statistics.moments(a).last(), statistics.moments(b).last(), 0.05, False
  )
  expected = ttest_ind(b[:, 0], a[:, 0], equal_var=False)
  assert found.p == pytest.approx(expected.pvalue)
  assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
  assert found.control == pytest.approx(a[:, 0].mean())


def test_the_delta_method_has_the_variance_of_the_ratio():
  ratios = [users(400, seed)[:, :2].sum(0) for seed in range(2000)]
  true = np.std([clicks / shown for clicks, shown in ratios])
  a, b = (statistics.moments(users(400, seed), [400]) for seed in (5001, 5002))
  assert statistics.sequential(a, b, 0.05, 800).error[-1] == pytest.approx(
    true * math.sqrt(2), rel=0.15
  )


def test_the_sequence_ends_where_the_fixed_test_does():
  pytest.importorskip('tea_tasting')
  a, b = (statistics.moments(users(500, seed), [500]) for seed in (1, 2))
  looks = statistics.sequential(a, b, 0.05, 1000)
  fixed = statistics.compare(a.last(), b.last(), 0.05, True)
  assert looks.difference[-1] == pytest.approx(fixed.difference, rel=0.02, abs=1e-4)
  width = (fixed.interval[1] - fixed.interval[0]) / 2
  assert looks.error[-1] * 1.96 == pytest.approx(width, rel=0.02)
  assert looks.half_width[-1] > width


def test_cuped_narrows_the_interval_and_keeps_the_difference():
  pytest.importorskip('tea_tasting')
  rng = np.random.default_rng(0)
  plain, adjusted = [], []
  for _ in range(100):
    before = rng.normal(10, 2, (2, 300))
    after = before + rng.normal(0, 1, (2, 300)) + np.array([[0], [0.3]])
    arms = [
      statistics.moments(np.stack([after[i], np.ones(300), before[i]], -1)).last() for i in (0, 1)
    ]
    plain.append(statistics.compare(*arms, 0.05, False))
    adjusted.append(statistics.compare(*arms, 0.05, True))
  width = lambda found: np.mean([c.interval[1] - c.interval[0] for c in found])
  assert width(adjusted) < 0.55 * width(plain)  # The correlation is .89, so by half.
  assert np.mean([c.difference for c in adjusted]) == pytest.approx(0.3, abs=0.03)
  held = np.mean([c.interval[0] <= 0.3 <= c.interval[1] for c in adjusted])
  assert held > 0.9


def test_always_valid_intervals_hold_at_all_looks_and_fixed_ones_do_not():
  rng = np.random.default_rng(0)
  crossed = peeked = 0
  ends = np.arange(10, 1001, 10)
  for _ in range(300):
    arms = [
      statistics.moments(np.stack([rng.exponential(size=1000), *np.ones((2, 1000))], -1), ends)
      for _ in range(2)
    ]
    looks = statistics.sequential(*arms, 0.05, 2000)
    crossed += (np.abs(looks.difference) > looks.half_width).any()
    peeked += (np.abs(looks.difference) > 1.96 * looks.error).any()
    # The p value is below the level exactly if an interval has excluded zero.
    assert (looks.p[-1] < 0.05) == (np.abs(looks.difference) > looks.half_width).any()
    assert (np.diff(looks.p) <= 0).all()
  assert crossed / 300 <= 0.05
  assert peeked / 300 > 0.2


def test_an_arm_in_which_nothing_happens_any_more_is_found():
  rng, ends = np.random.default_rng(0), np.arange(0, 2001, 50)
  buys = np.stack([rng.random(2000) < 0.1, np.ones(2000), np.zeros(2000)], -1)
  never = statistics.moments(buys * [0, 1, 1], ends)
  looks = statistics.sequential(statistics.moments(buys, ends), never, 0.01, 4000)
  assert looks.difference[-1] + looks.half_width[-1] < 0
  assert looks.p[-1] < 0.01
  assert looks.p[1] > 0.1  # A few purchases are not enough.


def test_rare_events_that_one_arm_lacks_at_first_are_no_false_alarm():
  rng, ends, alarms = np.random.default_rng(1), np.arange(0, 1001, 20), 0
  for _ in range(300):
    arms = [
      statistics.moments(
        np.stack([rng.random(1000) < 0.01, np.ones(1000), np.zeros(1000)], -1), ends
      )
      for _ in range(2)
    ]
    alarms += statistics.sequential(*arms, 0.05, 2000).p[-1] < 0.05
  assert alarms / 300 <= 0.05


def test_a_small_arm_that_lacks_the_few_who_pay_most_is_no_false_alarm():
  rng, alarms = np.random.default_rng(2), 0
  ends = np.arange(0, 2001, 20)
  for _ in range(300):
    paid = (rng.random(2000) < 0.12) * rng.lognormal(3.0, 1.0, 2000)
    values = np.stack([paid, np.ones(2000), np.zeros(2000)], -1)
    in_arm = rng.random(2000) < 0.05
    of_arm = np.concatenate([[0], np.cumsum(in_arm)])[ends]
    control = statistics.moments(values[~in_arm], ends - of_arm)
    treatment = statistics.moments(values[in_arm], of_arm)
    alarms += statistics.sequential(control, treatment, 0.05, 2000).p[-1] < 0.05
  assert alarms / 300 <= 0.05


def test_two_arms_without_variance_prove_nothing():
  same = statistics.moments(np.ones((10, 3)), [10])
  other = statistics.moments(np.stack([np.zeros(10), np.ones(10), np.zeros(10)], -1), [10])
  looks = statistics.sequential(same, other, 0.05, 20)
  assert looks.half_width.tolist() == [np.inf]
  assert looks.p.tolist() == [1]


def test_a_metric_that_never_happens_has_no_p_value():
  pytest.importorskip('tea_tasting')
  never = statistics.moments(users(50, 0) * [0, 1, 1]).last()
  found = statistics.compare(never, never, 0.05, False)
  assert found.p is None
  assert (found.control, found.treatment, found.difference) == (0, 0, 0)


@pytest.mark.filterwarnings('error')
def test_a_control_without_events_has_a_difference_but_no_relative_one():
  pytest.importorskip('tea_tasting')
  never = statistics.moments(users(200, 0) * [0, 1, 1]).last()
  found = statistics.compare(never, statistics.moments(users(200, 1)).last(), 0.05, False)
  assert found.p < 0.001
  assert found.interval[0] > 0
  assert not np.isfinite(found.relative)


def test_the_interval_is_narrowest_near_the_planned_users():
  count = np.arange(100, 20001, 100)
  cov = np.broadcast_to(np.diag([1.0, 0, 0]), (len(count), 3, 3))
  mean = np.broadcast_to([0.0, 1.0, 0.0], (len(count), 3))
  arm = statistics.Moments(count, mean, cov)
  widths = {
    planned: statistics.sequential(arm, arm, 0.05, planned).half_width
    for planned in (1000, 4000, 16000)
  }
  for planned, ours in widths.items():
    at = np.searchsorted(2 * count, planned)
    # The formula for the best tuning is approximate.
    assert ours[at] <= 1.01 * min(other[at] for other in widths.values())


def test_the_users_needed_are_those_of_the_textbook():
  pytest.importorskip('tea_tasting')
  p = 0.1
  baseline = statistics.Moments(
    np.array(10_000), np.array([p, 1, 0.0]), np.diag([p * (1 - p), 0, 0])
  )
  found = statistics.users_needed(baseline, [0.05, 0.1], 0.05, 0.8)
  expected = [2 * 2 * 2.8016**2 * p * (1 - p) / (effect * p) ** 2 for effect in (0.05, 0.1)]
  assert found == pytest.approx(expected, rel=1e-3)
  assert statistics.sequential_factor(0.05, 0.8) == pytest.approx(1.91, abs=0.05)


@pytest.mark.parametrize(
  ('effect', 'power', 'message'),
  [
    (1000, 0.8, r'effects: three users would show one of 1000; give smaller ones'),
    (1e-160, 0.8, r'effects: no number of users shows one of 1e-160; give larger ones'),
    (0.05, 0.01, r'power=0\.01: must be more than the level 0\.05'),
    (0.05, 0.05, r'power=0\.05: must be more than the level 0\.05'),
  ],
)
def test_what_no_number_of_users_fits_is_one_message(effect, power, message):
  pytest.importorskip('tea_tasting')
  baseline = statistics.moments(users(100, 0)).last()
  with pytest.raises(InputError, match=message):
    statistics.users_needed(baseline, [0.05, effect], 0.05, power)


def test_the_sample_ratio():
  assert statistics.share_p([5000, 5000], [0.5, 0.5]) == pytest.approx(1)
  assert statistics.share_p([5200, 4800], [0.5, 0.5]) == pytest.approx(6.334e-5, rel=1e-3)
  assert statistics.share_p([1000, 2000, 7000], [0.1, 0.2, 0.7]) == pytest.approx(1)


def test_without_the_library_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'tea_tasting', None)
  monkeypatch.setitem(__import__('sys').modules, 'tea_tasting.metrics', None)
  m = statistics.moments(users(10, 0)).last()
  with pytest.raises(InputError, match=r'ur4rec-jax\[experiments\]'):
    statistics.compare(m, m, 0.05, False)

"""Short versions of the simulations of experiments, and what the stored results must show."""

import json

import pytest

from benchmarks.quality import experiments

pytest.importorskip('tea_tasting')


def test_null_tests():
  found = experiments.null_tests(tests=60, users=600, seed=1)
  for metric in experiments.METRICS:
    assert found['below .05 at the end'][metric] <= 0.15
    assert found['always-valid intervals that ever cross'][metric] <= 0.05
  assert max(found['p values below .05 at any look'].values()) > 0.15


def test_off_policy():
  found = experiments.off_policy_tests(logs=40, requests=600, seed=1, chunks=1)
  assert min(found['intervals that hold the truth'].values()) >= 0.85


def test_interleaving():
  found = experiments.interleaving_tests(tests=30, pool=1500, seed=1)
  assert found['ratio'] >= 3
  assert found['found']['interleaving'] > 0.5
  assert found['found']['equal rankers, interleaving'] <= 0.25


def test_the_stored_results_keep_what_the_docs_promise():
  stored = json.loads(experiments.RESULTS.read_text())
  null, power = stored['A/A'], stored['A/B']
  assert null['tests'] >= 2000
  assert all(0.04 <= share <= 0.06 for share in null['below .05 at the end'].values())
  assert all(share <= 0.05 for share in null['always-valid intervals that ever cross'].values())
  for metric in ('conversion', 'click-through'):
    assert abs(power[metric]['found'] - power[metric]['by calculation']) <= 0.03
  assert stored['interleaving']['ratio'] >= 5
  assert abs(stored['interleaving']['found']['A/B'] - 0.8) <= 0.03
  assert abs(stored['interleaving']['found']['interleaving'] - 0.8) <= 0.03
  off_policy = stored['off-policy']
  assert off_policy['logs'] >= 1000
  assert all(
    0.93 <= share <= 0.97 for share in off_policy['intervals that hold the truth'].values()
  )

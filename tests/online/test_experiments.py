"""The file of an experiment and the assignment of users."""

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from tests.helpers.live_logs import FILE
from ur4rec_jax.errors import InputError
from ur4rec_jax.online import experiments
from ur4rec_jax.online.experiments import Arm, Experiment, Metric, Step, assign, check, position

METRICS = (Metric('conversion', 'conversion', 'buy'),)
USERS = [f'u{i}' for i in range(5000)]


def experiment(*shares: float, ramp: tuple[Step, ...] = (), salt: str = 'salt') -> Experiment:
  arms = tuple(Arm(f'arm{i}', share) for i, share in enumerate(shares))
  return check(Experiment('exp.toml', 'name', salt, arms, METRICS, ramp))


def test_the_file_is_read(tmp_path):
  path = tmp_path / 'exp.toml'
  path.write_text(FILE + '[[ramp]]\nfrom = 2026-11-01\nshare = 0.0\n')
  found = experiments.read(path)
  assert found.arms[1].settings == {'weights': {'sasrec': 0.5, 'retriever': 0.5}}
  assert [metric.kind for metric in found.metrics] == ['conversion', 'rate', 'sum']
  assert found.guard == experiments.Guard('conversion')
  assert found.ramp == (Step(datetime(2026, 11, 1, tzinfo=UTC).timestamp(), 0.0),)


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('name = "fusion"', 'name = 7', 'name must be a text, not 7'),
    ('name = "fusion"', '', 'name must be a text, it is missing'),
    ('share = 0.5', 'share = 0.4', 'add up to 0.8, not 1'),
    ('share = 0.5', 'share = -0.5', 'share must be a number above 0 and at most 1, not -0.5'),
    ('share = 0.5', 'share = nan', 'share must be a number above 0'),
    ('share = 0.5', 'share = true', 'share must be a number above 0'),
    ('name = "new"', 'name = "old"', "two arms are called 'old'"),
    ('window_days = 1', 'window_day = 1', 'did you mean window_days?'),
    ('window_days = 1', 'window_days = 0', 'window_days must be a number above 0'),
    ('planned_users = 1000', 'planned_users = 1e3', 'planned_users must be a whole number'),
    ('kind = "rate"', 'kind = "ratio"', 'kind must be one of conversion, count, rate, sum'),
    ('metric = "conversion"', 'metric = "sales"', "metric 'sales' is none of the metrics"),
    ('[guard]', '[[guard]]', 'guard must be a table [guard]'),
    ('[[arms]]\nname = "old"\nshare = 0.5', '', 'needs two arms or more'),
    ('cuped = true', 'cuped = "yes"', 'cuped must be true or false'),
    ('weights = {sasrec = 0.5, retriever = 0.5}', 'weights = 3', 'weights must be a table'),
    ('name = "old"', 'name = "old"\nstopped = true', 'is the control and cannot be stopped'),
    ('[guard]', '[guard', 'is no TOML'),
    ('planned_users = 1000', f'planned_users = {"9" * 5000}', 'is no TOML'),
    ('planned_users = 1000', f'planned_users = {"9" * 400}', 'must be a whole number'),
    (
      'planned_users = 1000',
      f'history_days = {"9" * 400}',
      'history_days must be a number above 0',
    ),
    ('[guard]', '[[ramp]]\nfrom = "monday"\nshare = 0.1\n[guard]', 'from must be a date'),
    ('[guard]', '[[ramp]]\nfrom = 2026-11-01\n[guard]', 'share must be a number of 0 or more'),
    (
      '[guard]',
      '[[ramp]]\nfrom=2026-11-01\nshare=0.5\n[[ramp]]\nfrom=2026-11-02\nshare=0.4\n[guard]',
      'falls from 0.5 to 0.4',
    ),
    (
      '[guard]',
      '[[ramp]]\nfrom=2026-11-02\nshare=0.1\n[[ramp]]\nfrom=2026-11-01\nshare=0.4\n[guard]',
      'order of their times',
    ),
  ],
)
def test_wrong_files_are_refused_with_their_name(tmp_path, old, new, message):
  path = tmp_path / 'exp.toml'
  assert old in FILE
  path.write_text(FILE.replace(old, new))
  with pytest.raises(InputError) as refused:
    experiments.read(path)
  assert message in str(refused.value)
  assert str(refused.value).startswith(str(path))


def test_a_missing_file(tmp_path):
  with pytest.raises(InputError, match='no such file'):
    experiments.read(tmp_path / 'none.toml')


@pytest.mark.parametrize('error', [PermissionError(13, 'Permission denied'), OSError(5, 'no disk')])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, error):
  path = tmp_path / 'exp.toml'
  path.write_text(FILE)
  monkeypatch.setattr(type(path), 'read_bytes', lambda _: (_ for _ in ()).throw(error))
  with pytest.raises(InputError, match=r'exp\.toml: cannot be read \((Permission|no disk)'):
    experiments.read(path)


def test_positions_are_uniform_and_independent_between_salts():
  first, second = (np.array([position(salt, user) for user in USERS]) for salt in ('a', 'b'))
  assert kstest(first, 'uniform').pvalue > 0.001
  assert abs(np.corrcoef(first, second)[0, 1]) < 4 / len(USERS) ** 0.5
  # Users of one arm of the first experiment are spread over the arms of the second.
  assert kstest(second[first < 0.5], 'uniform').pvalue > 0.001


def test_neighbouring_texts_do_not_share_a_position():
  assert position('ab', 'c') != position('a', 'bc')
  assert position('1:a', 'b') != position('1', ':ab')


def test_arms_get_their_shares():
  three = experiment(0.2, 0.3, 0.5)
  counts = np.zeros(3)
  for user in USERS:
    counts[three.arms.index(assign(three, user, 0))] += 1
  assert np.abs(counts / len(USERS) - [0.2, 0.3, 0.5]).max() < 4 * 0.5 / len(USERS) ** 0.5


@settings(max_examples=25)
@given(
  st.lists(st.integers(1, 20), min_size=2, max_size=5),
  st.lists(st.floats(0, 1), min_size=2, max_size=4),
  st.text(max_size=5),
)
def test_a_ramp_that_grows_moves_nobody(weights, steps, salt):
  shares = [weight / sum(weights) for weight in weights]
  ramp = tuple(Step(float(i), share) for i, share in enumerate(sorted(steps)))
  found = experiment(*shares, ramp=ramp, salt=salt)
  for user in USERS[:200]:
    assert assign(found, user, -1.0) is None
    arms = [assign(found, user, float(i)) for i in range(len(ramp))]
    first = next((i for i, arm in enumerate(arms) if arm), len(arms))
    assert len({arm.name for arm in arms[first:]}) <= 1
    assert None not in arms[first:]


def test_a_ramp_keeps_the_ratio_of_the_arms():
  found = experiment(0.25, 0.75, ramp=(Step(0.0, 0.4),))
  arms = [assign(found, user, 1.0) for user in USERS]
  shares = [
    np.mean([arm is not None and arm.name == name for arm in arms]) for name in ('arm0', 'arm1')
  ]
  assert np.abs(np.array(shares) - [0.1, 0.3]).max() < 0.03


def test_users_of_a_stopped_arm_leave_and_the_others_stay():
  found = experiment(0.5, 0.5)
  stopped = found._replace(arms=(found.arms[0], found.arms[1]._replace(stopped=True)))
  for user in USERS[:300]:
    before = assign(found, user, 0)
    after = None if before.name == 'arm1' else before
    assert assign(stopped, user, 0) == assign(found, user, 0, stopped=['arm1']) == after

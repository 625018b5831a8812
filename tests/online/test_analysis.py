"""From the logs to comparisons, the guard and the plan of an experiment."""

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.quality.experiments import START, simulated_tables
from tests.helpers import live_logs
from ur4rec_jax.errors import InputError
from ur4rec_jax.online import analysis, experiment_report, experiments
from ur4rec_jax.online.experiments import Arm, Experiment, Guard, Metric, check
from ur4rec_jax.online.logs import read_logs

pytest.importorskip('tea_tasting')

METRICS = (
  Metric('conversion', 'conversion', 'buy'),
  Metric('buys', 'count', 'buy', cuped=True),
  Metric('click-through', 'rate', 'click'),
  Metric('revenue', 'sum', 'buy'),
)
DAY = 86_400


def experiment(**fields) -> Experiment:
  arms = (Arm('old', 0.5), Arm('new', 0.5))
  return check(
    Experiment('exp.toml', 'name', 'demo', arms, METRICS, window_days=1)._replace(**fields)
  )


def logs_of(tmp_path, shown, done, arms=('old', 'new')):
  """Reads rows (user, arm, day, item) and (user, item, kind, day, value)."""
  exposures, events = tmp_path / 'shown.csv', tmp_path / 'done.csv'
  rows = [
    {'request_id': f'r{i}', 'user': u, 'time': START + d * DAY, 'arm': a, 'item': item}
    for i, (u, a, d, item) in enumerate(shown)
  ]
  live_logs.write_table(pa.Table.from_pylist(rows), exposures)
  rows = [
    {'id': i, 'user': u, 'item': item, 'kind': k, 'time': START + d * DAY, 'value': v}
    for i, (u, item, k, d, v) in enumerate(done)
  ]
  live_logs.write_table(pa.Table.from_pylist(rows), events)
  return read_logs(exposures, events, arms)


def test_users_are_measured_within_their_window(tmp_path):
  shown = [
    ('u1', 'old', 10, 'a'),
    ('u1', 'old', 10.5, 'b'),
    ('u1', 'old', 11.5, 'c'),
    ('u2', 'new', 10.2, 'a'),
    ('u3', 'new', 11.8, 'a'),
  ]
  done = [
    ('u1', 'b', 'click', 10.6, 0),
    ('u1', 'c', 'click', 11.6, 0),
    ('u1', 'b', 'buy', 10.7, 5.0),
    ('u1', 'b', 'buy', 10.8, 2.0),
    ('u1', 'b', 'buy', 11.2, 9.0),
    ('u1', 'z', 'buy', 3, 7.0),
    ('u1', 'z', 'buy', -25, 7.0),
    ('u2', 'a', 'view', 12, 0),
  ]
  found = analysis.measure(experiment(assignment='other'), logs_of(tmp_path, shown, done))
  assert found.arm.tolist() == [0, 1]
  assert found.unfinished == 1
  assert found.values['conversion'].tolist() == [[1, 1, 0], [0, 1, 0]]
  assert found.values['buys'].tolist() == [[2, 1, 1], [0, 1, 0]]
  assert found.values['click-through'].tolist() == [[1, 2, 0], [0, 1, 0]]
  assert found.values['revenue'].tolist() == [[7, 1, 0], [0, 1, 0]]


def test_an_event_of_a_fast_clock_finishes_no_window(tmp_path, monkeypatch):
  monkeypatch.setattr(analysis.time, 'time', lambda: START + 11.5 * DAY)
  shown = [('u1', 'old', 10, 'a'), ('u2', 'new', 11, 'a')]
  done = [('u1', 'a', 'click', 12.3, 0)]  # Dated tomorrow.
  found = analysis.measure(experiment(assignment='other'), logs_of(tmp_path, shown, done))
  assert (found.arm.tolist(), found.unfinished) == ([0], 1)


def test_a_gain_is_found_and_equal_arms_are_left_open(tmp_path):
  for lift, verdict in ((0.0, 'open'), (0.6, 'better'), (-0.6, 'worse')):
    files = live_logs.write(tmp_path, users=1500, seed=1, lift=lift)
    found = experiments.read(files.config)
    result = analysis.analyze(found, read_logs(files.exposures, files.events, ('old', 'new')))
    row = next(row for row in result.rows if row.metric.name == 'click-through')
    assert result.is_over
    assert row.verdict(0.05, True) == row.verdict(0.05, False) == verdict
    assert bool(result.stopped) == (verdict == 'worse')
    assert result.share_p > 0.01
    assert result.warnings == ()
    low, high = row.fixed.relative_interval
    assert low < lift < high
    assert experiment_report.always_valid(row)[0] < row.fixed.interval[0]


def test_less_can_be_better():
  row = analysis.Row(
    METRICS[0]._replace(more_is_better=False),
    Arm('new', 0.5),
    analysis.Comparison(0.1, 0.2, 0.1, (0.05, 0.15), 1.0, (0.5, 1.5), 0.001),
    analysis.Sequential(*np.ones((6, 1))),
  )
  assert row.verdict(0.05, True) == 'worse'
  assert row.verdict(0.05, False) == 'open'


def test_before_the_end_a_verdict_has_the_sign_of_the_look_that_decided():
  looks = analysis.Sequential(
    users=np.array([100, 1000]),
    control=np.array([0.1, 0.1]),
    difference=np.array([-0.05, 0.001]),
    error=np.array([0.01, 0.01]),
    half_width=np.array([0.04, 0.03]),
    p=np.array([0.01, 0.01]),  # The smallest so far.
  )
  fixed = analysis.Comparison(0.1, 0.101, 0.001, (-0.02, 0.02), 0.01, (-0.2, 0.2), 0.9)
  assert analysis.Row(METRICS[0], Arm('new', 0.5), fixed, looks).verdict(0.05, False) == 'worse'


def measured(gain, seed, users=3000):
  rng = np.random.default_rng(seed)
  arm = rng.integers(0, 2, users)
  hit = (rng.random(users) < 0.2 * (1 + gain * arm)).astype(float)
  values = np.stack([hit, np.ones(users), np.zeros(users)], -1)
  return analysis.Measured(arm, np.arange(users), {'conversion': values}, 0, ())


def test_the_guard_stops_a_bad_arm_early_and_no_other():
  found = experiment(guard=Guard('conversion', level=0.05), planned_users=3000)
  (reason,) = analysis.guard(found, measured(-0.6, 0)).values()
  assert reason.startswith('conversion is worse than in old since ')
  assert int(reason.split()[7].replace(',', '')) < 2000
  stopped = [bool(analysis.guard(found, measured(gain, s))) for s in range(60) for gain in (0, 0.5)]
  assert np.mean(stopped) <= 0.05
  assert not analysis.guard(experiment(), measured(-0.6, 0))


def test_the_guard_accepts_the_loss_it_is_told_to():
  found = experiment(guard=Guard('conversion', worse_by=0.5), planned_users=3000)
  assert not analysis.guard(found, measured(-0.45, 0))
  assert analysis.guard(found, measured(-0.9, 0))


def test_a_guard_may_watch_what_should_be_small():
  metric = METRICS[0]._replace(more_is_better=False)
  found = experiment(metrics=(metric,), guard=Guard('conversion'), planned_users=3000)
  assert analysis.guard(found, measured(0.8, 0))
  assert not analysis.guard(found, measured(-0.6, 0))


def test_users_beyond_the_planned_ones_do_not_change_the_fixed_horizon():
  found, users = experiment(planned_users=1000), measured(0.3, 1)
  fixed, looks = analysis._compared(found, users, METRICS[0], 1)
  assert fixed == analysis._compared(found, users.first(1000), METRICS[0], 1)[0]
  assert fixed != analysis._compared(found, users.first(900), METRICS[0], 1)[0]
  assert looks.users[-1] == 3000


@pytest.mark.parametrize('few', [0, 1])
def test_planned_users_of_whom_an_arm_has_almost_none_give_no_verdict(tmp_path, few):
  shown = people(few, 'new') + people(60 - few, 'old', few)
  shown += [(f'late{i}', 'new', 3 + i, 'a') for i in range(30)]
  done = [(f'u{i}', 'a', 'buy', 1.8, 3.0) for i in range(0, 60, 3)] + DONE
  found = experiment(assignment='other', planned_users=20)
  result = analysis.analyze(found, logs_of(tmp_path, shown, done))
  assert result.is_over
  assert {row.fixed.p for row in result.rows} == {None}
  assert {row.verdict(0.05, True) for row in result.rows} == {'open'}
  assert "arm 'new' has fewer than two of the first 20 users" in ' '.join(result.warnings)
  assert 'have the same value' not in ' '.join(result.warnings)
  experiment_report.page(result)
  experiment_report.summary(result)
  row = result.rows[0]
  assert row._replace(fixed=row.fixed._replace(p=np.nan)).verdict(0.05, True) == 'open'


def people(count, arm, first=0):
  return [(f'u{i}', arm, 1 + (i % 7) / 10, 'a') for i in range(first, first + count)]


DONE = [('u0', 'a', 'buy', 1.2, 3.0), ('u205', 'a', 'click', 20, 0)]


def test_a_wrong_sample_ratio_is_the_first_warning(tmp_path):
  logs = logs_of(tmp_path, people(200, 'old') + people(120, 'new', 200), DONE)
  result = analysis.analyze(experiment(assignment='other'), logs)
  assert result.share_p < 0.001
  assert result.warnings[0].startswith('sample-ratio mismatch (p')
  assert '200, 120 users' in result.warnings[0]


def test_users_who_came_after_an_arm_was_stopped_are_not_compared_with_it(tmp_path):
  shown = people(200, 'old') + people(200, 'new', 200)
  # Later only the control is served, to people who buy more, as before holidays.
  later = [(f'v{i}', 'old', 10, 'a') for i in range(400)]
  done = [(user, 'a', 'buy', day + 0.1, 1.0) for user, _, day, _ in [*shown[::10], *later]]
  logs = logs_of(tmp_path, shown + later, [*done, ('u0', 'a', 'click', 20, 0)])
  arms = (Arm('old', 0.5), Arm('new', 0.5, stopped=True))
  found = experiment(assignment='other', arms=arms, metrics=METRICS[:1])
  result = analysis.analyze(found, logs)
  assert result.warnings == ()
  assert result.share_p == 1.0
  assert result.rows[0].fixed.control == result.rows[0].fixed.treatment == 0.1
  assert result.users == {'old': 600, 'new': 200}
  # Nor does the guard compare them.
  guarded = found._replace(guard=Guard('conversion', level=0.5), planned_users=1000)
  assert analysis.guard(guarded, analysis.measure(guarded, logs)) == {}
  running = guarded._replace(arms=experiment().arms)
  assert [*analysis.guard(running, analysis.measure(running, logs))] == ['new']


def test_an_arm_that_was_stopped_early_is_decided_by_the_always_valid_columns(tmp_path):
  shown = people(200, 'old') + people(200, 'new', 200)
  later = [(f'v{i}', 'old', 10, 'a') for i in range(400)]
  buyers = [*shown[:200:10], *shown[200::20]]
  done = [(user, 'a', 'buy', day + 0.1, 1.0) for user, _, day, _ in buyers]
  logs = logs_of(tmp_path, shown + later, [*done, ('u0', 'a', 'click', 20, 0)])
  arms = (Arm('old', 0.5), Arm('new', 0.5, stopped=True))
  found = experiment(assignment='other', arms=arms, metrics=METRICS[:1], level=0.1)
  for planned, verdict in ((800, 'open'), (400, 'worse')):
    result = analysis.analyze(found._replace(planned_users=planned), logs)
    assert result.is_over
    assert result.rows[0].fixed.p < 0.1 < result.rows[0].looks.p[-1]
    assert result.verdict(result.rows[0]) == verdict
    said = experiment_report.how_to_read(result)
    assert ('of a stopped arm, the always-valid columns' in said) == (verdict == 'open')


def test_logs_that_disagree_with_the_hash_are_warned_of(tmp_path):
  logs = logs_of(
    tmp_path,
    people(100, 'old') + people(100, 'new', 100),
    [*DONE[:1], ('u105', 'a', 'click', 20, 0)],
  )
  (text,) = (
    t for t in analysis.analyze(experiment(), logs).warnings if 'another arm than the file' in t
  )
  assert 60 < int(text.split()[0]) < 140


def test_a_few_users_in_two_arms_are_left_out_and_many_refused(tmp_path):
  shown = people(150, 'old') + people(150, 'new', 150)
  logs = logs_of(tmp_path, [*shown, ('u0', 'new', 1.5, 'b')], DONE)
  result = analysis.analyze(experiment(assignment='other'), logs)
  assert result.users == {'old': 149, 'new': 150}
  assert "1 user of 300 in two arms, such as 'u0': left out" in result.warnings
  mixed = [(f'u{i}', 'new', 1.5, 'b') for i in range(20)]
  with pytest.raises(InputError, match=r'20 users of 300 in two arms.*an arm must stay'):
    analysis.analyze(experiment(assignment='other'), logs_of(tmp_path, shown + mixed, DONE))


def test_an_arm_with_one_user_and_windows_that_have_not_ended(tmp_path):
  shown = people(5, 'old') + people(1, 'new', 5)
  done = [('u0', 'a', 'buy', 20, 1.0)]
  with pytest.raises(InputError, match="arm 'new' has 1 user whose window of 1 days has ended"):
    analysis.analyze(experiment(assignment='other'), logs_of(tmp_path, shown, done))
  with pytest.raises(InputError, match='no user has finished the window of 30 days'):
    analysis.measure(experiment(window_days=30), logs_of(tmp_path, shown, done))


def test_missing_kinds_values_and_history_are_named(tmp_path):
  shown = people(20, 'old') + people(20, 'new', 20)
  logs = logs_of(tmp_path, shown, [('u0', 'a', 'view', 20, 0)])
  result = analysis.analyze(experiment(assignment='other'), logs)
  text = '\n'.join(result.warnings)
  assert "metric conversion: the events have no kind 'buy'" in text
  assert 'metric buys: cuped has nothing to use' in text
  assert 'metric conversion: all users of old have the same value, and so have all of new' in text
  assert all(row.verdict(0.05, over) == 'open' for row in result.rows for over in (True, False))
  experiment_report.summary(result)
  experiment_report.page(result)
  without = logs._replace(events=logs.events._replace(value=None))
  with pytest.raises(InputError, match="metric 'revenue' needs a column value"):
    analysis.measure(experiment(), without)


def test_three_arms_have_a_guard_level_each_and_a_row_each(tmp_path):
  arms = (Arm('a', 0.4), Arm('b', 0.3), Arm('c', 0.3))
  shown = people(40, 'a') + people(30, 'b', 40) + people(30, 'c', 70)
  done = [*DONE[:1], ('u50', 'a', 'buy', 1.9, 1.0), ('u1', 'a', 'view', 20, 0)]
  logs = logs_of(tmp_path, shown, done, ('a', 'b', 'c'))
  result = analysis.analyze(experiment(arms=arms, assignment='other'), logs)
  assert [(r.metric.name, r.arm.name) for r in result.rows[:2]] == [
    ('conversion', 'b'),
    ('conversion', 'c'),
  ]
  assert result.share_p == pytest.approx(1)
  assert experiment_report.column_names(result)[:4] == ('metric', 'arm', 'a', 'arm has')
  assert len(experiment_report.cells(result.rows[0], result)) == 10


def test_power_scales_with_the_effect_and_the_days_with_the_users(tmp_path):
  exposures, events = tmp_path / 'a.csv', tmp_path / 'b.csv'
  for table, path in zip(simulated_tables(1000, 3), (exposures, events), strict=True):
    live_logs.write_table(table, path)
  logs = read_logs(exposures, events)
  found = analysis.power(experiment(), logs, (0.05, 0.1), 0.8)
  by_metric = {m.name: [e for e in found if e['metric'] == m.name] for m in METRICS}
  for name, (small, large) in by_metric.items():
    assert small['users'] / large['users'] == pytest.approx(4, rel=0.05), name
    assert small['users_always_valid'] > small['users']
    assert small['days'] == pytest.approx(small['users'] / 50 + 1, rel=0.05)
  twice = analysis.power(experiment(), logs, (0.05,), 0.8, daily_users=100)
  assert twice[0]['days'] == pytest.approx(twice[0]['users'] / 100 + 1)
  rare = experiment(metrics=(Metric('returns', 'conversion', 'return'),))
  with pytest.raises(InputError, match=r"'returns' is 0 for every user.*'return' is logged"):
    analysis.power(rare, logs, (0.05,), 0.8)

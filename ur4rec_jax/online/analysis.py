"""Measures the users of an experiment and compares its arms."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data.raw import texts
from ur4rec_jax.errors import InputError, counted
from ur4rec_jax.online import statistics
from ur4rec_jax.online.experiments import Arm, Experiment, Metric, assign
from ur4rec_jax.online.logs import Logs, reacted
from ur4rec_jax.online.statistics import Comparison, Sequential

DAY = 86_400.0
LOOKS = 100
_MOST_IN_TWO_ARMS = 0.01


class Measured(NamedTuple):
  """The values of the metrics for each user, in the order of the first exposures.

  Attributes:
    arm: `[users]` number of the arm.
    start: `[users]` time of the first exposure, seconds since 1970.
    values: for each metric `[users, 3]`: numerator, denominator, covariate.
    unfinished: number of users whose window has not ended, who are left out.
    warnings: possible faults of the logs.
  """

  arm: np.ndarray
  start: np.ndarray
  values: dict[str, np.ndarray]
  unfinished: int
  warnings: tuple[str, ...]

  def of(self, arm: int, metric: str) -> np.ndarray:
    """Returns `[users, 3]` the numbers of the users of one arm."""
    return self.values[metric][self.arm == arm]

  def until(self, time: float) -> 'Measured':
    """Returns the users whose first exposure came up to a time."""
    return self.first(int(np.searchsorted(self.start, time, side='right')))

  def first(self, users: int) -> 'Measured':
    """Returns the users who came first, `users` at most."""
    values = {name: found[:users] for name, found in self.values.items()}
    return self._replace(arm=self.arm[:users], start=self.start[:users], values=values)


class Row(NamedTuple):
  """One arm against the control in one metric, for the planned users and at every look.

  Attributes:
    metric: the metric.
    arm: the arm.
    fixed: the comparison for the planned users.
    looks: the comparison at every look.
    is_cut: whether the arm was stopped before the planned users had come. Its end followed from its
      numbers, so the p value of a fixed horizon does not hold.
  """

  metric: Metric
  arm: Arm
  fixed: Comparison
  looks: Sequential
  is_cut: bool = False

  def verdict(self, level: float, is_over: bool) -> str:
    """Returns `better`, `worse` or `open`.

    Args:
      level: accepted probability of a false alarm.
      is_over: whether all planned users have finished, so that the fixed horizon decides.
    """
    p, difference = self.fixed.p, self.fixed.difference
    if not is_over or self.is_cut:
      # The smallest p value so far says nothing about a later change of sign.
      at = int(np.argmin(self.looks.p))
      p, difference = float(self.looks.p[at]), self.looks.difference[at]
    if p is None or not p < level:  # NaN decides nothing.
      return 'open'
    return 'better' if (difference > 0) == self.metric.more_is_better else 'worse'


class Result(NamedTuple):
  """An analysed experiment.

  Attributes:
    experiment: the experiment.
    users: number of finished users by arm.
    unfinished: number of users whose window has not ended yet.
    share_p: p value of the numbers of users by arm, before any arm was stopped.
    rows: one for each metric and each arm but the control.
    stopped: reason for each arm that the guard stops.
    warnings: possible faults of the logs or the experiment.
    starts: sorted times of first exposures by arm, for the plot.
  """

  experiment: Experiment
  users: dict[str, int]
  unfinished: int
  share_p: float
  rows: tuple[Row, ...]
  stopped: dict[str, str]
  warnings: tuple[str, ...]
  starts: dict[str, np.ndarray]

  @property
  def is_over(self) -> bool:
    """Whether as many users have finished as were planned."""
    return sum(self.users.values()) >= self.experiment.planned_users

  def verdict(self, row: Row) -> str:
    """Returns the verdict of a row, see `Row.verdict`."""
    return row.verdict(self.experiment.level, self.is_over)


def measure(experiment: Experiment, logs: Logs) -> Measured:
  """Measures each user within the window after the first exposure.

  Raises:
    InputError: more than one percent of the users are in two arms, no window has ended, or a metric
      needs values that the events lack.
  """
  shown, events = logs.exposures, logs.events
  count = len(logs.users)
  first = np.full(count, len(shown.user))
  np.minimum.at(first, shown.user, np.arange(len(shown.user)))  # Exposures are in order of time.
  arm, start = shown.arm[first], shown.time[first]
  warnings = list(logs.warnings)
  is_mixed = np.zeros(count, bool)
  is_mixed[shown.user[shown.arm != arm[shown.user]]] = True
  _check_mixed(logs, is_mixed, warnings)
  window = experiment.window_days * DAY
  end = max(shown.time[-1], events.time[-1] if len(events.time) else -np.inf)
  end = min(end, time.time())  # An event that a fast clock dates tomorrow finishes no window.
  is_finished = start + window <= end
  kept = np.flatnonzero(is_finished & ~is_mixed)
  if not len(kept):
    raise InputError(
      f'{experiment.path}: no user has finished the window of {experiment.window_days:g} days after'
      f' the first exposure, as the logs span {(end - shown.time[0]) / DAY:.1f} days; wait, or make'
      ' window_days smaller before the experiment starts'
    )
  kept = kept[np.argsort(start[kept], kind='stable')]
  if experiment.assignment == 'hash':
    users = logs.users.take(kept).to_pylist()
    warnings += _wrong_arms(experiment, users, arm[kept], start[kept])
  values = {}
  for metric in experiment.metrics:
    values[metric.name] = _numbers(experiment, metric, logs, start)[kept]
    if metric.event not in logs.kinds:
      warnings.append(f'metric {metric.name}: the events have no kind {metric.event!r}')
    if metric.cuped and not values[metric.name][:, 2].any():
      warnings.append(
        f'metric {metric.name}: cuped has nothing to use, as no {metric.event!r} event lies in the'
        f' {experiment.history_days:g} days before a first exposure; add earlier events'
      )
  return Measured(
    arm[kept], start[kept], values, int((~is_finished & ~is_mixed).sum()), tuple(warnings)
  )


def _numbers(experiment: Experiment, metric: Metric, logs: Logs, start: np.ndarray) -> np.ndarray:
  """Returns `[users, 3]` numerator, denominator and covariate of one metric.

  Args:
    experiment: has the lengths of the window and of the history.
    metric: the metric.
    logs: exposures and events.
    start: `[users]` time of the first exposure.

  Raises:
    InputError: the metric needs values that the events lack.
  """
  shown, events, count = logs.exposures, logs.events, len(start)
  window, history = experiment.window_days * DAY, experiment.history_days * DAY
  if metric.kind == 'sum' and events.value is None:
    raise InputError(
      f'{logs.paths[1]}: metric {metric.name!r} needs a column value; add it, or count events'
    )
  kind = logs.kinds.index(metric.event) if metric.event in logs.kinds else -1
  chosen = np.flatnonzero((events.kind == kind) & (events.user >= 0))
  user = events.user[chosen]
  since = events.time[chosen] - start[user]
  worth = events.value[chosen] if metric.kind == 'sum' else np.ones(len(chosen))
  total = lambda rows: np.bincount(user[rows], worth[rows], count)
  denominator, covariate = np.ones(count), np.zeros(count)
  if metric.kind == 'rate':
    is_shown = shown.time < start[shown.user] + window
    is_hit = is_shown & (reacted(logs, metric.event) < start[shown.user] + window)
    numerator = np.bincount(shown.user, is_hit, count)
    denominator = np.bincount(shown.user, is_shown, count)
  else:
    numerator = total((since >= 0) & (since < window))
  if metric.kind == 'conversion':
    numerator = (numerator > 0).astype(float)
  if metric.cuped:
    covariate = total((since < 0) & (since >= -history))
  return np.stack([numerator, denominator, covariate], -1)


def _check_mixed(logs: Logs, is_mixed: np.ndarray, warnings: list[str]) -> None:
  mixed = int(is_mixed.sum())
  if not mixed:
    return
  example = texts.shown(logs.users[int(np.argmax(is_mixed))].as_py())
  found = f'{counted(mixed, "user")} of {len(is_mixed):,} in two arms, such as {example}'
  if mixed > _MOST_IN_TWO_ARMS * len(is_mixed):
    raise InputError(
      f'{logs.paths[0]}: {found}; an arm must stay with its user. Was the salt or the order of the'
      ' arms changed, or do two experiments share the table?'
    )
  warnings.append(f'{found}: left out')


def _wrong_arms(
  experiment: Experiment, users: Sequence[str], arm: np.ndarray, start: np.ndarray
) -> list[str]:
  """Returns a warning if the logs disagree with the hash of salt and user."""
  running = experiment._replace(arms=tuple(a._replace(stopped=False) for a in experiment.arms))
  wrong = sum(
    assign(running, user, time) != running.arms[number]
    for user, number, time in zip(users, arm.tolist(), start.tolist(), strict=True)
  )
  if not wrong:
    return []
  return [
    f'{counted(wrong, "user")} of {len(users):,} had another arm than the file gives them, or were'
    ' not yet in the ramp; if another program assigns the arms, set assignment = "other"'
  ]


def analyze(experiment: Experiment, logs: Logs) -> Result:
  """Compares each arm with the control in each metric, a stopped arm as long as it ran.

  Raises:
    InputError: an arm has fewer than two finished users, or `measure` refuses the logs.
  """
  measured = measure(experiment, logs)
  arms = experiment.arms
  first_end = min(_last_start(measured, number, arm) for number, arm in enumerate(arms))
  counts, together = (
    np.bincount(found.arm, minlength=len(arms)) for found in (measured, measured.until(first_end))
  )
  for arm, number in (*zip(arms, counts, strict=True), *zip(arms, together, strict=True)):
    if number < 2:
      raise InputError(
        f'{logs.paths[0]}: arm {arm.name!r} has {counted(int(number), "user")} whose window of'
        f' {experiment.window_days:g} days has ended; each arm needs two or more'
      )
  rows = [
    _row(experiment, measured, metric, number)
    for metric in experiment.metrics
    for number in range(1, len(arms))
  ]
  p = statistics.share_p(together, [arm.share for arm in arms])
  warnings = list(measured.warnings)
  if p < statistics.LEAST_SHARE_P:
    warnings.insert(
      0,
      f'sample-ratio mismatch (p {p:.1g}): the arms have'
      f' {", ".join(f"{n:,}" for n in together)} users, which their shares do not explain. Users'
      ' are lost or logged wrongly in some arm, and no other number of this page can be trusted',
    )
  planned = np.bincount(measured.first(experiment.planned_users).arm, minlength=len(arms))
  few = [arm.name for arm, number in zip(arms, planned, strict=True) if number < 2]
  warnings += [
    f'arm {name!r} has fewer than two of the first {experiment.planned_users:,} users, so the fixed'
    ' horizon says nothing; plan more users'
    for name in few
  ]
  for row in rows:
    if row.fixed.p is None and not {arms[0].name, row.arm.name} & {*few}:
      warnings.append(
        f'metric {row.metric.name}: all users of {arms[0].name} have the same value, and so have'
        f' all of {row.arm.name}, so there is nothing to test'
      )
  return Result(
    experiment,
    {arm.name: int(n) for arm, n in zip(arms, counts, strict=True)},
    measured.unfinished,
    p,
    tuple(rows),
    guard(experiment, measured),
    tuple(warnings),
    {arm.name: measured.start[measured.arm == i] for i, arm in enumerate(arms)},
  )


def _last_start(measured: Measured, number: int, arm: Arm) -> float:
  """Returns the time of a stopped arm's last user, infinity for an arm that goes on.

  Users who came later came on other days than the arm's own, so they are not compared with it.
  """
  return measured.start[measured.arm == number].max(initial=-np.inf) if arm.stopped else np.inf


def guard(experiment: Experiment, measured: Measured) -> dict[str, str]:
  """Returns the arms that are clearly worse than the control, with the reason.

  A stopped arm is judged as long as it ran. The guard may look as often as it likes: with
  probability `1 - level` it stops no arm that loses at most `worse_by`.

  Args:
    experiment: the experiment; without a guard nothing is stopped.
    measured: the users so far.
  """
  rule = experiment.guard
  if rule is None:
    return {}
  metric = next(metric for metric in experiment.metrics if metric.name == rule.metric)
  stopped = {}
  for number, arm in enumerate(experiment.arms[1:], 1):
    level = rule.level / (len(experiment.arms) - 1)
    while_it_ran = measured.until(_last_start(measured, number, arm))
    looks = _looks(experiment, while_it_ran, metric, number, level)
    gain = looks.difference if metric.more_is_better else -looks.difference
    is_worse = gain + looks.half_width < -rule.worse_by * np.abs(looks.control)
    if is_worse.any():
      at = int(np.argmax(is_worse))
      loss = -gain[at] / abs(looks.control[at]) if looks.control[at] else np.inf
      stopped[arm.name] = (
        f'{metric.name} is worse than in {experiment.arms[0].name} since'
        f' {int(looks.users[at]):,} users ({loss:.1%} then)'
      )
  return stopped


def _row(experiment: Experiment, measured: Measured, metric: Metric, number: int) -> Row:
  arm = experiment.arms[number]
  found = measured.until(_last_start(measured, number, arm))
  is_cut = arm.stopped and len(found.arm) < experiment.planned_users
  return Row(metric, arm, *_compared(experiment, found, metric, number), is_cut)


def _compared(
  experiment: Experiment, measured: Measured, metric: Metric, arm: int
) -> tuple[Comparison, Sequential]:
  # Later users would be further looks, for which the p value of a fixed horizon does not hold.
  planned = measured.first(experiment.planned_users)
  control, treatment = (
    statistics.moments(planned.of(number, metric.name)).last() for number in (0, arm)
  )
  fixed = statistics.compare(control, treatment, experiment.level, metric.cuped)
  return fixed, _looks(experiment, measured, metric, arm, experiment.level)


def _looks(
  experiment: Experiment, measured: Measured, metric: Metric, arm: int, level: float
) -> Sequential:
  """Compares an arm with the control after each of `LOOKS` equal parts of the users."""
  of_both = measured.arm[(measured.arm == 0) | (measured.arm == arm)]
  ends = np.unique(np.linspace(0, len(of_both), LOOKS + 1)[1:].astype(int))
  of_arm = np.concatenate([[0], np.cumsum(of_both == arm)])[ends]
  control, treatment = (
    statistics.moments(measured.of(number, metric.name), counts)
    for number, counts in ((0, ends - of_arm), (arm, of_arm))
  )
  shares = [a.share for a in experiment.arms]
  planned = experiment.planned_users * (shares[0] + shares[arm])
  return statistics.sequential(control, treatment, level, planned)


def power(
  experiment: Experiment,
  logs: Logs,
  effects: tuple[float, ...],
  wanted: float,
  daily_users: float | None = None,
) -> list[dict[str, Any]]:
  """Computes for each metric and effect how many users and days the experiment needs.

  Args:
    experiment: the experiment; its first two arms are compared.
    logs: what users did without the change; arms are ignored.
    effects: relative differences, such as 0.05.
    wanted: probability of finding the effect.
    daily_users: new users per day in the experiment; None takes the rate of the logs.

  Returns:
    Records with `metric`, `value`, `effect`, `users` (in all arms), `users_always_valid`, `days`.

  Raises:
    InputError: too few users, or `measure` refuses the logs.
  """
  shown = logs.exposures
  everyone = logs._replace(exposures=shown._replace(arm=np.zeros_like(shown.arm)))
  measured = measure(experiment._replace(assignment='other'), everyone)
  if len(measured.arm) < 2:
    raise InputError(f'{logs.paths[0]}: power needs two users or more whose window has ended')
  if daily_users is None:
    daily_users = len(measured.arm) / max((measured.start[-1] - measured.start[0]) / DAY, 1.0)
  shares = [arm.share for arm in experiment.arms]
  of_all = 1 / (shares[0] + shares[1])
  factor = statistics.sequential_factor(experiment.level, wanted)
  found = []
  for metric in experiment.metrics:
    baseline = statistics.moments(measured.values[metric.name]).last()
    value = float(statistics.ratio_or_zero(baseline))
    if not value or not statistics.has_variance(baseline):
      raise InputError(
        f'{logs.paths[1]}: metric {metric.name!r} is {value:g} for every user, so no effect can be'
        f' planned; check that its event {metric.event!r} is logged'
      )
    needed = statistics.users_needed(
      baseline, effects, experiment.level, wanted, shares[1] / shares[0], metric.cuped
    )
    for effect, users in zip(effects, needed, strict=True):
      users = int(np.ceil(users * of_all))
      found.append(
        {
          'metric': metric.name,
          'value': value,
          'effect': effect,
          'users': users,
          'users_always_valid': int(np.ceil(users * factor)),
          'days': users / daily_users + experiment.window_days,
        }
      )
  return found

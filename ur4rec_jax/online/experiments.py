"""Reads the file of an experiment, and assigns users to arms.

A user's arm depends only on salt, user and time. So no server has to remember it, and all servers
agree.
"""

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ur4rec_jax.errors import InputError

METRIC_KINDS = ('conversion', 'count', 'rate', 'sum')
_TOLERANCE = 1e-9  # Shares such as 0.1 are not exact in binary.
_LARGEST = 10**15  # Larger numbers are typing errors, and whole ones may not even fit a float.


class Arm(NamedTuple):
  """One of the versions that are compared.

  Attributes:
    name: its name in the logs.
    share: its share of the users in the experiment; the shares of all arms add up to 1.
    stopped: whether its users leave the experiment and get the default again.
    settings: settings of the service in this arm: `export`, `weights` and `rules`, as in the file.
  """

  name: str
  share: float
  stopped: bool = False
  settings: Mapping[str, Any] = {}


class Step(NamedTuple):
  """A step of the ramp: from `start` (UTC seconds since 1970), `share` of all users take part."""

  start: float
  share: float


class Metric(NamedTuple):
  """A metric of each user, within the window that begins with the first exposure.

  Attributes:
    name: its name in the report.
    kind: `conversion`: whether the user has an event; `count`: number of events; `sum`: sum of
      the events' values; `rate`: shown items that got an event, by all shown items.
    event: kind of the events.
    more_is_better: whether a larger number is an improvement.
    cuped: whether earlier events of the user explain a part of the variance.
  """

  name: str
  kind: str
  event: str
  more_is_better: bool = True
  cuped: bool = False


class Guard(NamedTuple):
  """The rule that stops an arm.

  Attributes:
    metric: name of the metric.
    level: accepted probability of stopping any arm that is not worse.
    worse_by: accepted loss relative to the control.
  """

  metric: str
  level: float = 0.01
  worse_by: float = 0.0


class Experiment(NamedTuple):
  """An experiment as its file defines it.

  Attributes:
    path: the file, for messages.
    name: name of the experiment.
    salt: text that makes the assignment independent of other experiments.
    arms: the arms; the first one is the control.
    metrics: the metrics; the first one decides.
    ramp: shares of all users over time; empty if all users take part from the start.
    window_days: days after the first exposure in which a user is measured.
    history_days: days before the first exposure whose events CUPED uses.
    level: accepted probability of a false alarm.
    planned_users: number of users, in all arms, whose p value decides. Always-valid intervals are
      narrowest near it.
    assignment: `hash`: `assign` chooses the arms, and the logs must agree; `other`: another
      program chooses them.
    guard: the rule that stops arms, or None.
  """

  path: str
  name: str
  salt: str
  arms: tuple[Arm, ...]
  metrics: tuple[Metric, ...]
  ramp: tuple[Step, ...] = ()
  window_days: float = 7
  history_days: float = 30
  level: float = 0.05
  planned_users: int = 10_000
  assignment: str = 'hash'
  guard: Guard | None = None


def read(path: str | Path) -> Experiment:
  """Reads and checks the file of an experiment.

  Args:
    path: a TOML file; docs/experiments.md describes its fields.

  Raises:
    InputError: the file cannot be read, is no TOML, or a field is wrong.
  """
  path = Path(path)
  try:
    fields = tomllib.loads(path.read_bytes().decode('utf-8-sig'))
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
    raise InputError(f'{path}: no such file; docs/experiments.md shows how to write one') from error
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); make it readable') from error
  except (ValueError, RecursionError) as error:  # Also a number of more than 4,300 digits.
    raise InputError(f'{path}: is no TOML: {error}') from error
  top = _Fields(str(path), fields)
  name = top.text('name')
  arms = tuple(_arm(table) for table in top.tables('arms'))
  metrics = tuple(_metric(table) for table in top.tables('metrics'))
  guard = top.table('guard')
  experiment = Experiment(
    path=str(path),
    name=name,
    salt=top.text('salt', name),
    arms=arms,
    metrics=metrics,
    ramp=tuple(_step(table) for table in top.tables('ramp')),
    window_days=top.number('window_days', Experiment._field_defaults['window_days']),
    history_days=top.number('history_days', Experiment._field_defaults['history_days']),
    level=top.number('level', Experiment._field_defaults['level'], most=0.5),
    planned_users=top.whole('planned_users', Experiment._field_defaults['planned_users']),
    assignment=top.choice('assignment', ('hash', 'other'), 'hash'),
    guard=None if guard is None else _guard(guard),
  )
  top.done()
  return check(experiment)


def check(experiment: Experiment) -> Experiment:
  """Returns the experiment if its arms, metrics, ramp and guard fit together.

  Raises:
    InputError: they do not.
  """
  where = experiment.path
  names = [arm.name for arm in experiment.arms]
  _no_repeats(where, 'arms', names)
  _no_repeats(where, 'metrics', [metric.name for metric in experiment.metrics])
  if len(names) < 2:
    raise InputError(f'{where}: an experiment needs two arms or more, found {len(names)}')
  if not experiment.metrics:
    raise InputError(f'{where}: no [[metrics]]; add what the arms are compared by')
  total = sum(arm.share for arm in experiment.arms)
  if abs(total - 1) > _TOLERANCE:
    raise InputError(
      f'{where}: the shares of the arms add up to {total:g}, not 1; to give the experiment to a'
      ' part of the users, use [[ramp]]'
    )
  for before, after in zip(experiment.ramp, experiment.ramp[1:], strict=False):
    if after.start <= before.start:
      raise InputError(f'{where}: the steps of [[ramp]] must be in the order of their times')
    if after.share < before.share:
      raise InputError(
        f'{where}: the share of [[ramp]] falls from {before.share:g} to {after.share:g}; users'
        ' would leave the experiment, so let it grow only'
      )
  if experiment.arms[0].stopped:
    raise InputError(f'{where}: {names[0]!r} is the control and cannot be stopped')
  guarded = experiment.guard and experiment.guard.metric
  if guarded and guarded not in [metric.name for metric in experiment.metrics]:
    raise InputError(
      f'{where}: [guard] metric {guarded!r} is none of the metrics'
      f' {", ".join(metric.name for metric in experiment.metrics)}'
    )
  return experiment


def stopped_file(path: str | Path) -> Path:
  """Returns the file beside an experiment's file that names the arms the guard has stopped."""
  return Path(path).with_suffix('.stopped.json')


def read_stopped(experiment: Experiment) -> dict[str, str]:
  """Reads the arms that the guard has stopped, with its reasons; none if there is no file.

  Raises:
    InputError: the file is damaged, or names something that is no arm or is the control.
  """
  path = stopped_file(experiment.path)
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(found, dict):
      raise ValueError('it must be an object of arms and reasons')
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path}: is damaged ({error}); correct or remove it') from error
  names = [arm.name for arm in experiment.arms[1:]]
  for name in found:
    if name not in names:
      raise InputError(f'{path}: {name!r} is none of the arms that can stop: {", ".join(names)}')
  return {name: str(reason) for name, reason in found.items()}


def with_stopped(experiment: Experiment, names: Collection[str]) -> Experiment:
  """Returns an experiment some of whose arms are stopped, beside those that its file stops."""
  arms = (arm._replace(stopped=arm.stopped or arm.name in names) for arm in experiment.arms)
  return experiment._replace(arms=tuple(arms))


def position(salt: str, user: str) -> float:
  """Returns a number in [0, 1) that is uniform over users and independent between salts."""
  # With the length, different pairs never give the same text.
  digest = hashlib.blake2b(f'{len(salt)}:{salt}{user}'.encode(), digest_size=8).digest()
  return (int.from_bytes(digest, 'big') >> 11) / 2**53


def assign(
  experiment: Experiment, user: str, time: float, stopped: Collection[str] = ()
) -> Arm | None:
  """Returns the arm of a user, or None if the user is not in the experiment.

  Each arm owns a stretch of [0, 1) of the length of its share. The ramp opens every stretch from
  its left end, so a growing ramp adds users and moves nobody.

  Args:
    experiment: the experiment.
    user: id of the user.
    time: UTC seconds since 1970.
    stopped: names of arms that the guard has stopped.
  """
  share = 1.0
  if experiment.ramp:
    share = max((step.share for step in experiment.ramp if step.start <= time), default=0.0)
  at, left = position(experiment.salt, user), 0.0
  for number, arm in enumerate(experiment.arms, 1):
    # The sum of all shares may be a little below 1, and nobody may fall through.
    right = left + arm.share if number < len(experiment.arms) else 1.0
    if at < right:
      is_in = (at - left) < share * (right - left) and not (arm.stopped or arm.name in stopped)
      return arm if is_in else None
    left = right
  raise AssertionError('the last stretch ends at 1')


def seconds(text: str, name: str) -> float:
  """Reads a moment such as `2026-11-01T08:00:00Z`; one without a zone is in UTC.

  Args:
    text: the moment in ISO 8601.
    name: name of the flag or field, for the message.

  Raises:
    InputError: it is no moment.
  """
  try:
    return _moment(datetime.fromisoformat(text))
  except ValueError as error:
    raise InputError(f'{name}={text}: must be a time such as 2026-11-01T08:00:00Z') from error


def _moment(time: datetime) -> float:
  # A time without a zone would mean another moment on every server.
  return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


class _Fields:
  """Takes fields out of a table of the file and checks them; remaining fields are unknown ones."""

  def __init__(self, where: str, fields: dict[str, Any]):
    self.where = where
    self.left = dict(fields)
    self.known: list[str] = []

  def take(self, name: str, default: Any = None) -> Any:
    self.known.append(name)
    return self.left.pop(name, default)

  def text(self, name: str, default: str | None = None) -> str:
    value = self.take(name, default)
    if not isinstance(value, str) or not value.strip():
      raise InputError(f'{self.where}: {name} must be a text, {_found(value)}')
    return value.strip()  # Tables ignore blanks around names, too.

  def choice(self, name: str, choices: Collection[str], default: str | None = None) -> str:
    value = self.text(name, default)
    if value not in choices:
      raise InputError(f'{self.where}: {name} must be one of {", ".join(choices)}, not {value!r}')
    return value

  def flag(self, name: str) -> bool:
    value = self.take(name, False)
    if not isinstance(value, bool):
      raise InputError(f'{self.where}: {name} must be true or false, {_found(value)}')
    return value

  def number(
    self, name: str, default: float | None = None, most: float = math.inf, with_zero: bool = False
  ) -> float:
    value = self.take(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_inside = is_number and (0 < value <= most or (with_zero and value == 0))
    if not is_inside or value >= _LARGEST:
      limits = 'of 0 or more' if with_zero else 'above 0'
      limits += f' and at most {most:g}' if most < math.inf else ''
      raise InputError(f'{self.where}: {name} must be a number {limits}, {_found(value)}')
    return float(value)

  def whole(self, name: str, default: int) -> int:
    value = self.take(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value < _LARGEST:
      raise InputError(f'{self.where}: {name} must be a whole number of 2 or more, {_found(value)}')
    return value

  def table(self, name: str) -> '_Fields | None':
    value = self.take(name)
    if value is None:
      return None
    if not isinstance(value, dict):
      raise InputError(f'{self.where}: {name} must be a table [{name}], {_found(value)}')
    return _Fields(f'{self.where}, [{name}]', value)

  def tables(self, name: str) -> list['_Fields']:
    value = self.take(name, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
      raise InputError(f'{self.where}: {name} must be tables [[{name}]], {_found(value)}')
    return [_Fields(f'{self.where}, [[{name}]] {i}', entry) for i, entry in enumerate(value, 1)]

  def done(self) -> None:
    for name in self.left:
      nearest = difflib.get_close_matches(name, self.known, n=1)
      hint = f'did you mean {nearest[0]}?' if nearest else f'known are {", ".join(self.known)}'
      raise InputError(f'{self.where}: no field is called {name!r}; {hint}')


def _found(value: Any) -> str:
  return 'it is missing' if value is None else f'not {value!r}'


def _no_repeats(where: str, what: str, names: list[str]) -> None:
  for name in names:
    if names.count(name) > 1:
      raise InputError(f'{where}: two {what} are called {name!r}; rename one')


def _arm(fields: _Fields) -> Arm:
  settings = {}
  for name, kind in (('export', str), ('weights', dict), ('rules', str | dict)):
    value = fields.take(name)
    if value is not None and not isinstance(value, kind):
      expected = {str: 'a text', dict: 'a table'}.get(kind, 'a table or the name of a file')
      raise InputError(f'{fields.where}: {name} must be {expected}, {_found(value)}')
    if value is not None:
      settings[name] = value
  arm = Arm(fields.text('name'), fields.number('share', most=1), fields.flag('stopped'), settings)
  fields.done()
  return arm


def _metric(fields: _Fields) -> Metric:
  metric = Metric(
    fields.text('name'),
    fields.choice('kind', METRIC_KINDS),
    fields.text('event'),
    fields.choice('better', ('more', 'less'), 'more') == 'more',
    fields.flag('cuped'),
  )
  fields.done()
  return metric


def _guard(fields: _Fields) -> Guard:
  guard = Guard(
    fields.text('metric'),
    fields.number('level', Guard._field_defaults['level'], most=0.5),
    fields.number('worse_by', Guard._field_defaults['worse_by'], most=1, with_zero=True),
  )
  fields.done()
  return guard


def _step(fields: _Fields) -> Step:
  start = fields.take('from')
  if isinstance(start, datetime):
    moment = _moment(start)
  elif isinstance(start, date):
    moment = _moment(datetime(start.year, start.month, start.day))
  else:
    raise InputError(
      f'{fields.where}: from must be a date such as 2026-11-01 or a time such as'
      f' 2026-11-01T08:00:00Z, {_found(start)}'
    )
  step = Step(moment, fields.number('share', most=1, with_zero=True))
  fields.done()
  return step

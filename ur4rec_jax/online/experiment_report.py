"""Shows an analysed experiment: a table for the terminal, one JSON object, and a page."""

from pathlib import Path
from typing import Any

import numpy as np

from ur4rec_jax.errors import counted
from ur4rec_jax.online.analysis import DAY, Result, Row
from ur4rec_jax.online.experiments import Metric
from ur4rec_jax.online.interleaving import Preference
from ur4rec_jax.online.off_policy import Evaluation
from ur4rec_jax.page import WIDTH, Curve, aligned, p_text, plot, render, round_ticks

_TEMPLATE = Path(__file__).with_name('experiment.html')
_VERDICTS = {'better': 'better', 'worse': 'worse', 'open': 'not decided'}
_ROW = 46  # Height of a line of the intervals, with its text.
_MOST_PLOTS = 12
_WIDEST = 4.0  # Intervals wider than this many times the last one are not drawn.


def as_json(result: Result) -> dict[str, Any]:
  """Returns all numbers of the page, for other programs."""
  experiment = result.experiment
  return {
    'name': experiment.name,
    'control': experiment.arms[0].name,
    'users': result.users,
    'unfinished': result.unfinished,
    'planned_users': experiment.planned_users,
    'is_over': result.is_over,
    'level': experiment.level,
    'sample_ratio_p': result.share_p,
    'comparisons': [
      {
        'metric': row.metric.name,
        'arm': row.arm.name,
        'verdict': result.verdict(row),
        **{
          name: None if isinstance(value, float) and not np.isfinite(value) else value
          for name, value in row.fixed._asdict().items()
          if 'interval' not in name
        },
        'interval': _finite(row.fixed.interval),
        'relative_interval': _finite(row.fixed.relative_interval),
        'always_valid_interval': _finite(always_valid(row)),
        'always_valid_p': float(row.looks.p[-1]),
      }
      for row in result.rows
    ],
    'stopped': result.stopped,
    'warnings': [*result.warnings],
  }


def _finite(interval: tuple[float, float]) -> list[float | None]:
  return [float(end) if np.isfinite(end) else None for end in interval]


def always_valid(row: Row) -> tuple[float, float]:
  """Returns the always-valid interval of the difference at the last look."""
  at, half = float(row.looks.difference[-1]), float(row.looks.half_width[-1])
  return at - half, at + half


def summary(result: Result) -> str:
  """Formats the result as a table for the terminal."""
  rows = [column_names(result), *(cells(row, result) for row in result.rows)]
  lines = [headline(result), '', *aligned(rows)]
  lines += ['', how_to_read(result)]
  lines += [f'stop {arm}: {reason}' for arm, reason in result.stopped.items()]
  lines += [f'warning: {text}' for text in result.warnings]
  return '\n'.join(lines)


def headline(result: Result) -> str:
  """Returns the numbers of users in one line."""
  users = ', '.join(f'{name} {count:,}' for name, count in result.users.items())
  waiting = f'; {result.unfinished:,} still in their window' if result.unfinished else ''
  return (
    f'{result.experiment.name}: users {users}{waiting}; sample ratio p {p_text(result.share_p)}'
  )


def how_to_read(result: Result) -> str:
  """Returns a sentence that says which of the two kinds of intervals decides now."""
  users, planned = sum(result.users.values()), result.experiment.planned_users
  is_cut = any(row.is_cut for row in result.rows)
  if result.is_over:
    return (
      f'the planned {planned:,} users are there: the interval and p value of the fixed horizon'
      ' decide' + ('; of a stopped arm, the always-valid columns' if is_cut else '')
    )
  return (
    f'{users:,} of {planned:,} planned users are there: only the always-valid columns decide,'
    ' the others hold for one look at the end'
  )


def column_names(result: Result) -> tuple[str, ...]:
  """Returns the names of the columns of `cells`."""
  level = f'{1 - result.experiment.level:.0%}'
  arms = [arm.name for arm in result.experiment.arms]
  names = [f'{level} interval', 'p', f'{level} always valid', 'p, always valid', 'verdict']
  if len(arms) == 2:
    return ('metric', *arms, 'change', *names)
  return ('metric', 'arm', arms[0], 'arm has', 'change', *names)


def cells(row: Row, result: Result) -> tuple[str, ...]:
  """Returns the cells of one comparison."""
  fixed, looks = row.fixed, row.looks
  scale = abs(fixed.control) or 1.0
  low, high = (end / scale for end in always_valid(row))
  return (
    row.metric.name,
    *([row.arm.name] if len(result.users) > 2 else []),
    value_text(row.metric, fixed.control),
    value_text(row.metric, fixed.treatment),
    _percent(fixed.relative),
    _interval(*fixed.relative_interval),
    '-' if fixed.p is None else p_text(fixed.p),
    _interval(low, high),
    p_text(float(looks.p[-1])),
    _VERDICTS[result.verdict(row)],
  )


def value_text(metric: Metric, value: float) -> str:
  """Formats a metric: shares in percent, others as numbers."""
  if metric.kind in ('conversion', 'rate'):
    return f'{value:.2%}'
  return f'{value:,.4g}'


def _percent(share: float) -> str:
  return f'{share:+.1%}' if np.isfinite(share) else '-'


def _plain_percent(share: float) -> str:
  return '0' if abs(share) < 1e-9 else f'{100 * share:+g}'


def _interval(low: float, high: float) -> str:
  if not (np.isfinite(low) and np.isfinite(high)):
    return '-'
  return f'{low:+.1%} to {high:+.1%}'


def page(result: Result) -> str:
  """Makes the page of an experiment."""
  experiment = result.experiment
  first = result.rows[0]
  users = sum(result.users.values())
  days = (max(t[-1] for t in result.starts.values()) - _start(result)) / DAY
  names = [arm.name for arm in experiment.arms]
  by_arm = (f'{arm.name} {arm.share:.0%}: {result.users[arm.name]:,}' for arm in experiment.arms)
  return render(
    _TEMPLATE,
    name=experiment.name,
    subtitle=f'{" and ".join(names[1:])} against {names[0]}, the control',
    headlines=[
      (f'{first.metric.name}, {first.arm.name}', _percent(first.fixed.relative)),
      ('verdict', _VERDICTS[result.verdict(first)]),
      ('finished users', f'{users:,}'),
      ('of planned users', f'{users / experiment.planned_users:.0%}'),
      ('sample ratio p', p_text(result.share_p)),
      ('days of first exposures', f'{days:,.1f}'),
    ],
    warnings=[
      *(f'stop {arm}: {reason}' for arm, reason in result.stopped.items()),
      *result.warnings,
    ],
    how_to_read=how_to_read(result),
    level=f'{1 - experiment.level:.0%}'.replace('%', '\xa0%'),
    names=column_names(result),
    rows=[(cells(row, result), result.verdict(row)) for row in result.rows],
    forest=_forest(result),
    first_plot=_over_users(first),
    plots=[*(_over_users(row) for row in result.rows[1:_MOST_PLOTS]), _arrivals(result)],
    details=[
      ('window', f'{experiment.window_days:g} x 24 hours after the first exposure'),
      (
        'left out',
        f'{counted(result.unfinished, "user")} whose window has not ended',
      ),
      ('users by arm', ', '.join(by_arm)),
      *((metric.name, _meaning(metric)) for metric in experiment.metrics),
      ('guard', _guard_text(result)),
      ('salt', experiment.salt),
    ],
  )


def _start(result: Result) -> float:
  return min(times[0] for times in result.starts.values())


def _meaning(metric: Metric) -> str:
  text = {
    'conversion': f'share of users with a {metric.event}',
    'count': f'number of {metric.event} events of a user',
    'sum': f'sum of the values of the {metric.event} events of a user',
    'rate': f'items with a {metric.event}, by all items shown (delta method)',
  }[metric.kind]
  better = 'more is better' if metric.more_is_better else 'less is better'
  return f'{text}; {better}' + ('; adjusted by earlier events (CUPED)' if metric.cuped else '')


def _guard_text(result: Result) -> str:
  rule = result.experiment.guard
  if rule is None:
    return 'none'
  return (
    f'stops an arm whose {rule.metric} is more than {rule.worse_by:.0%} worse, at level'
    f' {rule.level:g}'
  )


def _forest(result: Result) -> dict[str, Any]:
  """Places the intervals of all comparisons on one axis, relative to the control."""
  found = []
  for row in result.rows:
    scale = abs(row.fixed.control) or 1.0
    always = tuple(end / scale for end in always_valid(row))
    found.append((row, row.fixed.relative, row.fixed.relative_interval, always))
  ends = [end for _, at, fixed, _ in found for end in (at, *fixed) if np.isfinite(end)] or [0.0]
  reach = max(max(map(abs, ends)) * 1.6, 1e-2)
  # An always-valid interval of a young experiment is many times wider than the fixed one.
  x = lambda value: round(WIDTH / 2 + (WIDTH / 2 - 12) * float(np.clip(value / reach, -1, 1)), 1)
  lines = []
  for i, (row, at, fixed, always) in enumerate(found):
    if not np.isfinite([at, *fixed]).all():
      continue
    lines.append(
      {
        'y': 22 + _ROW * i,
        'text': f'{row.metric.name}, {row.arm.name}' if len(result.users) > 2 else row.metric.name,
        'change': _percent(at),
        'verdict': result.verdict(row),
        'at': x(at),
        'fixed': [x(end) for end in fixed],
        'always': [x(end) for end in always] if np.isfinite(always).all() else None,
      }
    )
  height = 22 + _ROW * len(found)
  ticks = [(x(at), f'{_plain_percent(at)}%') for at, _ in round_ticks(-reach, reach, 5, 1e-3)]
  return {'lines': lines, 'ticks': ticks, 'zero': x(0), 'width': WIDTH, 'height': height}


def _over_users(row: Row) -> dict[str, Any]:
  """Plots the difference and its always-valid interval over the users so far."""
  looks = row.looks
  scale = abs(row.fixed.control) or 1.0
  users, at, half = looks.users, looks.difference / scale, looks.half_width / scale
  drawn = np.isfinite(half)
  drawn &= half <= _WIDEST * half[-1] if np.isfinite(half[-1]) else drawn
  title = f'{row.metric.name}: {row.arm.name} against the control'
  if not drawn.any():
    drawn[-1:] = True
    half = np.zeros_like(half)
  line = lambda values: [*zip(users[drawn].tolist(), values[drawn].tolist(), strict=True)]
  low, high = float((at - half)[drawn].min()), float((at + half)[drawn].max())
  low, high = min(low, 0.0), max(high, 0.0)
  margin = 0.04 * ((high - low) or 1.0)
  start, end = int(users[drawn][0]), int(users[-1])
  dots = [(end, float(at[-1]), f'{_percent(float(at[-1]))} at {end:,} users')]
  return plot(
    title,
    'change relative to the control, with the always-valid interval, over the users who have'
    ' finished their window',
    x_label='users',
    x_ticks=[(t, text) for t, text in round_ticks(start, end, 4) if start <= t <= end],
    y_label='%',
    y_ticks=[(t, _plain_percent(t)) for t, _ in round_ticks(low - margin, high + margin, 5, 1e-3)],
    low=low - margin,
    curves=[
      Curve('change', [line(at)]),
      Curve('always-valid interval', [line(at - half), line(at + half)]),
      Curve('no change', [[(start, 0.0), (end, 0.0)]]),
    ],
    dots=dots,
  )


def _arrivals(result: Result) -> dict[str, Any]:
  """Plots how many users each arm has over the days."""
  start = _start(result)
  curves = []
  for name, times in result.starts.items():
    picked = np.unique(np.linspace(0, len(times) - 1, 120).astype(int))
    days = ((times[picked] - start) / DAY).tolist()
    curves.append(Curve(name, [[*zip(days, (picked + 1).tolist(), strict=True)]]))
  last = max(x for curve in curves for x, _ in curve.lines[0])
  return plot(
    'Users by arm',
    f'first exposures of the users who count; the ratio of the arms has p {p_text(result.share_p)}',
    x_label='day',
    x_ticks=round_ticks(0, max(last, 1e-3), 6, 1 if last >= 2 else 1e-3),
    y_label='users',
    curves=curves,
  )


def preference_text(found: Preference, level: float = 0.05) -> str:
  """Formats the result of interleaving for the terminal."""
  first, second = found.teams
  low, high = found.interval
  p = found.p_permutation
  lead = second if found.advantage > 0 else first
  # If few users with high scores outweigh the many others, the test is not about what most prefer.
  is_clear = p < level and found.advantage * found.net > 0
  verdict = f'users prefer {lead}' if is_clear else 'no preference shown'
  return '\n'.join(
    [
      f'users: {found.wins[0]:,} prefer {first}, {found.wins[1]:,} prefer {second},'
      f' {found.ties:,} ties',
      f'advantage of {second}: {found.advantage:+.2%} of users ({1 - level:.0%}: {low:+.2%} to'
      f' {high:+.2%})',
      f'sign test p {p_text(found.p_sign)}, permutation test p {p_text(p)}: {verdict}',
    ]
  )


def evaluation_text(found: Evaluation, level: float = 0.05) -> str:
  """Formats off-policy estimates for the terminal."""
  rows = [('method', 'reward a request', f'{1 - level:.0%} interval')]
  rows += [(e.method, f'{e.value:.5f}', f'{e.low:.5f} to {e.high:.5f}') for e in found.estimates]
  return '\n'.join(
    [
      *aligned(rows),
      f'{found.exposures:,} exposures are worth {found.effective:,.0f} under the new policy; mean'
      f' weight {found.mean_weight:.3f}',
      *(f'warning: {text}' for text in found.warnings),
    ]
  )

"""Makes the page of a sweep or a search: a table and plots of all trials, and parameter importance.

A trial is a dict with `overrides` (the fields that it changes), `parameters` (values whose
influence is plotted), `state` (`complete` or `pruned`), `valid` (its validation NDCG@10) and
`number` (its place in the order of starting, from 1).
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax import page

_TEMPLATE = pathlib.Path(__file__).with_name('trials.html')
_METRIC = 'NDCG@10'
_LEAST_STEP = 0.0001  # Of the ticks.

Trial = dict[str, Any]


class Table(NamedTuple):
  """A table of a page.

  Attributes:
    title: its heading.
    columns: names of the columns.
    rows: `[rows, columns]` texts.
    note: a sentence below it.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str


def trials_page(
  title: str,
  about: str,
  trials: Sequence[Trial],
  importance: tuple[dict[str, float], str],
  tables: Sequence[Table],
) -> str:
  """Makes the page.

  Args:
    title: its heading.
    about: a line that describes the trials.
    trials: in any order.
    importance: the share of each parameter in the differences between trials, and a sentence that
      says how it was measured.
    tables: tables of the page.
  """
  shares, how = importance
  names = list(trials[0]['parameters']) if trials else []
  names.sort(key=lambda name: -shares.get(name, 0))
  plots = [in_turn_plot(trials)] if len(trials) > 1 else []
  plots += [plot for name in names if (plot := parameter_plot(name, trials))]
  return page.render(
    _TEMPLATE,
    title=title,
    about=about,
    importance=shares,
    how=how,
    plots=plots,
    tables=tables,
  )


def variance_shares(trials: Sequence[Trial]) -> dict[str, float]:
  """Computes the share of the variance in validation that each parameter explains by itself.

  Args:
    trials: each with the same `parameters`.

  Returns:
    The shares, the largest first, by parameter; under `seed` that of trials that differ in nothing
    else. Empty if no parameter has two values, or if all trials are alike.
  """
  scores = np.array([trial['valid'] for trial in trials])
  total = ((scores - scores.mean()) ** 2).sum() if trials else 0
  if not total:
    return {}

  def between(keys: Sequence[str]) -> float:
    """Returns the share of the variance that lies between groups of trials with equal keys."""
    groups = [scores[[key == other for other in keys]] for key in set(keys)]
    return float(sum(len(x) * (x.mean() - scores.mean()) ** 2 for x in groups) / total)

  values = {name: [str(t['parameters'][name]) for t in trials] for name in trials[0]['parameters']}
  shares = {name: between(keys) for name, keys in values.items() if len(set(keys)) > 1}
  variants = [str(trial['parameters']) for trial in trials]
  if shares and len(set(variants)) < len(trials):
    shares['seed'] = 1 - between(variants)
  return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def value_text(value: Any) -> str:
  """Formats a value of a parameter."""
  return f'{value:.3g}' if isinstance(value, float) else str(value)


def settings_text(trial: Trial) -> str:
  """Formats the settings of a trial."""
  return ', '.join(f'{name}={value_text(value)}' for name, value in trial['overrides'].items())


def in_turn_plot(trials: Sequence[Trial]) -> dict[str, Any]:
  """Draws the validation of the trials in the order of starting, and the best so far as a line."""
  points = sorted((trial['number'], trial['valid'], settings_text(trial)) for trial in trials)
  numbers, scores = [x for x, *_ in points], [y for _, y, _ in points]
  best = np.maximum.accumulate(scores).tolist()
  return page.plot(
    'In turn',
    'Each point is a trial; the line is the best so far.',
    x_label='trial',
    x_ticks=page.round_ticks(numbers[0], numbers[-1], 4),
    y_label=f'validation {_METRIC}',
    least_y_step=_LEAST_STEP,
    low=_low(scores),
    curves=[page.Curve('best so far', [list(zip(numbers, best, strict=True))])],
    dots=[(x, y, f'{x}: {y:.4f}, {text}') for x, y, text in points],
  )


def parameter_plot(name: str, trials: Sequence[Trial]) -> dict[str, Any] | None:
  """Draws the validation of all trials over one parameter; None if they have a single value."""
  points = [(trial['parameters'][name], trial) for trial in trials if name in trial['parameters']]
  values = [value for value, _ in points]
  if len({str(value) for value in values}) < 2:
    return None
  is_number = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
  if is_number and min(values) > 0 and max(values) > 20 * min(values):
    at, label = math.log10, f'{name} (logarithmic)'
  elif is_number:
    at, label = float, name
  else:
    order = sorted({str(value) for value in values})
    at, label = (lambda value: float(order.index(str(value)))), name
  if is_number:
    ticks = [(at(value), value_text(value)) for value in (min(values), max(values))]
  else:
    ticks = [(float(i), text) for i, text in enumerate(order)]
  dots = [
    (at(value), trial['valid'], f'{value_text(value)}: {trial["valid"]:.4f}')
    for value, trial in points
  ]
  return page.plot(
    name,
    'Each point is a trial'
    + ('; those that ended early are drawn at their last validation.' * _has_early(trials) or '.'),
    x_label=label,
    x_ticks=ticks,
    y_label=f'validation {_METRIC}',
    least_y_step=_LEAST_STEP,
    low=_low([trial['valid'] for trial in trials]),
    dots=dots,
  )


def _has_early(trials: Sequence[Trial]) -> bool:
  return any(trial['state'] == 'pruned' for trial in trials)


def _low(scores: Sequence[float]) -> float:
  # At least one step of the ticks lower: equal scores would leave the axis without a tick.
  return max(0, min(scores) - max(0.2 * (max(scores) - min(scores)), _LEAST_STEP))

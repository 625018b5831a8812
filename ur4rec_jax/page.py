"""Plots and pages that need nothing but themselves: numbers -> coordinates -> one HTML file.

page.html is what pages have in common, plot.html draws a plot; both escape what is put into them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

# Of the plots, in units of the picture.
WIDTH, HEIGHT = 480, 280
CHARACTER = 9  # width, at the size that phones show
_ROW = 20  # height of a line of text

Ticks = list[tuple[float, str]]


class Bar(NamedTuple):
  """A bar from `left` to `right`, in units of its axis; `text` shows under the pointer."""

  left: float
  right: float
  height: float
  text: str
  is_rest: bool = False


class Curve(NamedTuple):
  """Points `(x, y)` of one colour, in lines that are not joined."""

  name: str
  lines: Sequence[Sequence[tuple[float, float]]]


def render(template: Path, **values: Any) -> str:
  """Fills a template that extends page.html."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(template.name).render(values)


def plot(
  title: str,
  caption: str,
  *,
  x_label: str,
  x_ticks: Ticks,
  y_label: str,
  y_ticks: Ticks | None = None,
  least_y_step: float = 1,
  bars: Sequence[Bar] = (),
  low: float = 0,
  curves: Sequence[Curve] = (),
  dots: Sequence[tuple[float, float, str]] = (),
  marks: Sequence[tuple[float, str]] = (),
  bands: Sequence[tuple[float, float, str, str]] = (),
) -> dict[str, Any]:
  """Turns units of the axes into units of the picture, for the macro in plot.html.

  Args:
    title: of the plot.
    caption: a sentence below it.
    x_label: what the x axis counts.
    x_ticks: its ticks.
    y_label: what the y axis counts.
    y_ticks: its ticks; None: round numbers at least `least_y_step` apart.
    least_y_step: see there.
    bars: a histogram.
    low: where the y axis begins.
    curves: or curves.
    dots: points on them, each with a text that shows under the pointer.
    marks: vertical lines with a text above, from left to right.
    bands: stretches of the x axis, each with the name of its colour and a text inside.
  """
  points = [point for curve in curves for line in curve.lines for point in line]
  xs = [x for bar in bars for x in (bar.left, bar.right)] + [x for x, _ in points]
  xs += [x for left, right, *_ in bands for x in (left, right)] if curves else []
  top = max([bar.height for bar in bars] + [y for _, y in points])
  start, end = min(xs), max(max(xs), min(xs) + 1e-9)
  top = low + max(top - low, 1e-9) * 1.04
  if y_ticks is None:
    y_ticks = round_ticks(low, top, 4, least_y_step)
  box = {
    'left': 12 + CHARACTER * max(len(text) for _, text in y_ticks),
    'right': WIDTH - 12,
    'top': 10 + _ROW * (1 + len(marks)),
    'bottom': HEIGHT - 10 - 2 * _ROW,
  }
  across, up = box['right'] - box['left'], box['bottom'] - box['top']
  x = lambda value: round(box['left'] + across * (value - start) / (end - start), 1)
  y = lambda value: round(box['bottom'] - up * (value - low) / (top - low), 1)

  def anchor(at: float, text: str) -> str:
    half = CHARACTER * len(text) / 2
    return 'end' if at + half > WIDTH else 'start' if at < half else 'middle'

  drawn = []
  for bar in bars:
    left, right = x(bar.left), x(bar.right)
    gap = min(1.5, 0.2 * (right - left))
    height = max(box['bottom'] - y(bar.height), 1) if bar.height else 0
    drawn.append((left, box['bottom'] - height, right - left - gap, height, bar))
  return {
    'title': title,
    'caption': caption.replace(' %', '\xa0%'),
    'width': WIDTH,
    'height': HEIGHT,
    'box': box,
    'x_label': x_label,
    'y_label': y_label,
    'x_ticks': [(x(at), text, anchor(x(at), text)) for at, text in x_ticks],
    'y_ticks': [(y(at), text) for at, text in y_ticks],
    'bars': drawn,
    'curves': [
      (curve.name, [' '.join(f'{x(a)},{y(b)}' for a, b in line) for line in curve.lines])
      for curve in curves
    ],
    'dots': [(x(a), y(b), text) for a, b, text in dots],
    'marks': [
      (x(at), text, 'end' if x(at) > WIDTH / 2 else 'start', 10 + _ROW * (i + 2) - 6)
      for i, (at, text) in enumerate(reversed(marks))
    ],
    'bands': [(x(left), x(right) - x(left), kind, text) for left, right, kind, text in bands],
  }


def round_ticks(low: float, high: float, at_most: int, least_step: float = 1) -> Ticks:
  """Round numbers from `low` to `high`."""
  step = max((high - low) / at_most, least_step)
  power = 10.0 ** np.floor(np.log10(step))
  step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
  values = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
  return [(value, f'{value:,.0f}' if step >= 1 else f'{value:g}') for value in values.tolist()]

"""Draws plots and pages: numbers become coordinates, and coordinates one HTML file.

The pages load nothing from elsewhere. page.html is the frame of every page, and plot.html draws a
plot. Both escape the values that they are given. Results as text share `aligned` and `p_text`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

# Sizes of a plot in units of the picture.
WIDTH, HEIGHT = 480, 280
CHARACTER = 9  # Width of a character at the font size of phones.
_ROW = 20  # Height of a line of text.

Ticks = list[tuple[float, str]]


class Bar(NamedTuple):
  """A bar of a histogram.

  Attributes:
    left: where the bar begins on the x axis.
    right: where it ends.
    height: its height on the y axis.
    text: text that the pointer shows.
    is_rest: whether the bar stands for all values beyond the axis.
  """

  left: float
  right: float
  height: float
  text: str
  is_rest: bool = False


class Curve(NamedTuple):
  """A curve of one colour.

  Attributes:
    name: name in the legend.
    lines: lines of points `(x, y)`. The lines are not joined to each other.
  """

  name: str
  lines: Sequence[Sequence[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Plot:
  """A histogram or curves, in units of the axes.

  Attributes:
    title: title of the plot.
    caption: a sentence below the plot.
    x_label: label of the x axis.
    x_ticks: ticks of the x axis.
    y_label: label of the y axis.
    y_ticks: ticks of the y axis; None for round numbers.
    least_y_step: the smallest distance of these round numbers.
    bars: bars of a histogram.
    low: where the y axis begins.
    curves: curves.
    dots: points `(x, y, text)`; the pointer shows the text.
    marks: vertical lines `(x, text)` from left to right, with the text above.
    bands: stretches `(left, right, colour, text)` of the x axis; page.html defines the colours.
  """

  title: str
  caption: str
  x_label: str
  x_ticks: Ticks
  y_label: str
  y_ticks: Ticks | None = None
  least_y_step: float = 1
  bars: Sequence[Bar] = ()
  low: float = 0
  curves: Sequence[Curve] = ()
  dots: Sequence[tuple[float, float, str]] = ()
  marks: Sequence[tuple[float, str]] = ()
  bands: Sequence[tuple[float, float, str, str]] = ()


def render(template: Path, **values: Any) -> str:
  """Fills a template that extends page.html.

  Args:
    template: file of the template.
    **values: variables of the template.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(template.name).render(values)


def plot(title: str, caption: str, **fields: Any) -> dict[str, Any]:
  """Turns a plot into units of the picture, as the macro in plot.html needs it.

  Args:
    title: title of the plot.
    caption: a sentence below the plot.
    **fields: the other fields of `Plot`.
  """
  p = Plot(title, caption, **fields)
  points = [point for curve in p.curves for line in curve.lines for point in line]
  points += [(x, y) for x, y, _ in p.dots]
  xs = [x for bar in p.bars for x in (bar.left, bar.right)] + [x for x, _ in points]
  xs += [x for left, right, *_ in p.bands for x in (left, right)] if p.curves else []
  start, end = min(xs), max(max(xs), min(xs) + 1e-9)
  top = max([bar.height for bar in p.bars] + [y for _, y in points])
  top = p.low + max(top - p.low, 1e-9) * 1.04
  y_ticks = p.y_ticks
  if y_ticks is None:
    y_ticks = round_ticks(p.low, top, 4, p.least_y_step)
  box = {
    'left': 12 + CHARACTER * max(len(text) for _, text in y_ticks),
    'right': WIDTH - 12,
    'top': 10 + _ROW * (1 + len(p.marks)),
    'bottom': HEIGHT - 10 - 2 * _ROW,
  }
  across, up = box['right'] - box['left'], box['bottom'] - box['top']
  x = lambda value: round(box['left'] + across * (value - start) / (end - start), 1)
  y = lambda value: round(box['bottom'] - up * (value - p.low) / (top - p.low), 1)
  return {
    'title': p.title,
    'caption': p.caption.replace(' %', '\xa0%'),
    'width': WIDTH,
    'height': HEIGHT,
    'box': box,
    'x_label': p.x_label,
    'y_label': p.y_label,
    'x_ticks': [(x(at), text, _anchor(x(at), text)) for at, text in p.x_ticks],
    'y_ticks': [(y(at), text) for at, text in y_ticks],
    'bars': [_drawn(bar, x, y, box['bottom']) for bar in p.bars],
    'curves': [
      (curve.name, [' '.join(f'{x(a)},{y(b)}' for a, b in line) for line in curve.lines])
      for curve in p.curves
    ],
    'dots': [(x(a), y(b), text) for a, b, text in p.dots],
    'marks': [
      (x(at), text, 'end' if x(at) > WIDTH / 2 else 'start', 10 + _ROW * (i + 2) - 6)
      for i, (at, text) in enumerate(reversed(p.marks))
    ],
    'bands': [(x(left), x(right) - x(left), kind, text) for left, right, kind, text in p.bands],
  }


def _anchor(at: float, text: str) -> str:
  """Chooses how to align a text below `at` so that it stays inside the picture."""
  half = CHARACTER * len(text) / 2
  return 'end' if at + half > WIDTH else 'start' if at < half else 'middle'


def _drawn(bar: Bar, x: Callable, y: Callable, bottom: float) -> tuple:
  """Returns left edge, top, width and height of a bar in units of the picture, and the bar."""
  left, right = x(bar.left), x(bar.right)
  gap = min(1.5, 0.2 * (right - left))
  height = max(bottom - y(bar.height), 1) if bar.height else 0
  return left, bottom - height, right - left - gap, height, bar


def round_ticks(low: float, high: float, at_most: int, least_step: float = 1) -> Ticks:
  """Returns ticks at round numbers.

  Args:
    low: start of the axis.
    high: end of the axis.
    at_most: the most steps between ticks.
    least_step: the smallest distance of two ticks.
  """
  step = max((high - low) / at_most, least_step)
  power = 10.0 ** np.floor(np.log10(step))
  step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
  values = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
  return [(value, f'{value:,.0f}' if step >= 1 else f'{value:g}') for value in values.tolist()]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Pads the cells of a table so that its columns line up."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]


def p_text(p: float) -> str:
  """Formats a p value."""
  return '< 0.001' if p < 0.001 else f'{p:.3f}'

"""Renders the statistics of a dataset as one self-contained HTML page.

This module computes coordinates and encodes pictures; the template describe.html holds the page and
escapes all values.
"""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ur4rec_jax import page
from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Interactions
from ur4rec_jax.errors import counted
from ur4rec_jax.page import CHARACTER, WIDTH, Bar, Curve, Ticks, plot, round_ticks

_TEMPLATE = Path(__file__).with_name('describe.html')
_MAX_LENGTH_BARS = 40
_RATING_BARS = 20
_MAX_TIME_BARS = 150
_TIME_UNITS = {'h': 'hour', 'D': 'day', 'W': 'week', 'M': 'month', 'Y': 'year'}
_TIME_TICKS = (
  *(('D', 1), ('D', 2), ('D', 7), ('M', 1), ('M', 2), ('M', 3), ('M', 6)),
  *(('Y', 1), ('Y', 2), ('Y', 5), ('Y', 10), ('Y', 50)),
)
_CURVE_POINTS = 200
_CARDS = 8  # Items per group.
_PICTURE_SIZE = (160, 240)
_TITLE_LENGTH, _TEXT_LENGTH, _MAX_GENRES = 120, 180, 3

# What dataset.json counts of a split.
_SPLIT_COUNTS = {
  'train_interactions': 'training interactions',
  'valid_users': 'validation users',
  'test_users': 'test users',
  'train_only_users': 'users only in training',
  'unused_users': 'unused users',
  'items_without_training': 'items never in training',
}


class Prepared(NamedTuple):
  """A prepared folder, as far as the page shows it.

  Attributes:
    folder: its name.
    info: content of dataset.json.
    histories: all interactions.
    items: `[items]` metadata.
    pictures: `[items]` picture files or None.
  """

  folder: str
  info: dict[str, Any]
  histories: Interactions
  items: Sequence[dict[str, Any]]
  pictures: Sequence[Path | None]


def item_count(counts: Mapping[str, Any]) -> str:
  """Formats the number of items; those that nobody has had yet are counted apart."""
  cold = counts.get('items_without_interactions', 0)
  return f'{counts["items"]:,}' + (f', {cold:,} of them without interactions' if cold else '')


def split_counts(record: Mapping[str, Any]) -> str:
  """Formats the counts of a split that are not zero."""
  shown = {what: record[field] for field, what in _SPLIT_COUNTS.items()}
  return ', '.join(f'{count:,} {what}' for what, count in shown.items() if count)


def percent(share: float) -> str:
  """Formats a share with three digits; only a complete share is shown as 100 %."""
  text = f'{100 * share:.3g}'
  return f'{"99.9" if text == "100" and share < 1 else text} %'


def date(seconds: int) -> str:
  """Formats unix seconds as a date."""
  return str(np.datetime64(seconds, 's').astype('M8[D]'))


def render(prepared: Prepared, figures: dict[str, Any], facts: Sequence[tuple[str, str]]) -> str:
  """Renders the page.

  Args:
    prepared: what the page is about.
    figures: see `describe.measure`.
    facts: see `describe.facts`.
  """
  folder, info, histories, items, pictures = prepared
  counts = info['counts']
  words = dict(facts)
  item_counts = np.bincount(histories.item_ids, minlength=len(items) + 1)[1:]
  plots = [
    length_plot(np.diff(histories.offsets), words['history']),
    popularity_plot(item_counts, words['popularity']),
  ]
  if info['has_timestamps']:
    plots.append(time_plot(histories.timestamps, info['splits'].get(splits.TIME), words['dates']))
  if figures['ratings']:
    plots.append(rating_plot(histories.ratings, words['ratings']))
  groups = sample_cards(items, item_counts, pictures)
  return page.render(
    _TEMPLATE,
    name=info['name'],
    folder=folder,
    dates=words['dates'],
    headlines=[
      ('users', f'{counts["users"]:,}'),
      ('items', f'{counts["items"]:,}'),
      ('interactions', f'{counts["interactions"]:,}'),
      ('density', percent(figures['density'])),
      ('median history', f'{figures["lengths"]["median"]:,g}'),
      ('popularity Gini', f'{figures["popularity"]["gini"]:.2f}'),
    ],
    warnings=figures['warnings'],
    plots=plots,
    coverage=[
      (what, f'{number:,}', percent(number / len(items)), round(100 * number / len(items), 1))
      for what, number in figures['known'].items()
    ],
    splits=list(info['splits']),
    split_rows=_split_rows([*info['splits'].values()]),
    details=[
      *((what, text) for what, text in facts if what in ('dropped', 'note', 'licence')),
      *((what, info[what]) for what in ('citation', 'url') if info[what]),
    ],
    groups=groups,
    has_pictures=any(path is not None for path in pictures),
  )


def _split_rows(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
  """Returns the rows of a table with one column per split."""
  borders = {'valid_from': 'validation from', 'test_from': 'test from'}
  rows = [
    (what, [date(record[field]) if field in record else '' for record in records])
    for field, what in borders.items()
    if any(field in record for record in records)
  ]
  rows += [
    (what, [f'{record[field]:,}' for record in records]) for field, what in _SPLIT_COUNTS.items()
  ]
  return [*rows, ('hash', [record['hash'] for record in records])]


def length_plot(lengths: np.ndarray, caption: str) -> dict[str, Any]:
  """Plots a histogram of `[users]` history lengths; the longest 1 % share one bar."""
  low, high = int(lengths.min()), int(np.ceil(np.quantile(lengths, 0.99)))
  width = -(-(high - low + 1) // _MAX_LENGTH_BARS)
  numbers = np.bincount((lengths - low) // width)
  shown = -(-(high - low + 1) // width)
  bars, ticks = [], round_ticks(low, high, 5)
  for i, number in enumerate(numbers[:shown].tolist()):
    first, last = low + i * width, low + (i + 1) * width - 1
    span = f'{first:,}' if width == 1 else f'{first:,} to {last:,}'
    bars.append(
      Bar(first - 0.5, last + 0.5, number, f'{span} interactions: {counted(number, "user")}')
    )
  if rest := int(numbers[shown:].sum()):
    end = bars[-1].right
    name = f'{int(end + 0.5):,}'
    more = f'{name} interactions or more: {counted(rest, "user")}'
    bars.append(Bar(end + width, end + 3 * width, rest, more, is_rest=True))
    # No other label may overlap that of the last bar.
    ticks = [tick for tick in ticks if tick[0] < low + 0.85 * (end - low)]
    ticks.append((end + 2 * width, f'≥ {name}'))
  median = float(np.median(lengths))
  return plot(
    'Length of the histories',
    caption,
    bars=bars,
    x_label='interactions of a user',
    x_ticks=ticks,
    y_label='users',
    marks=[(median, f'median {median:,g}')],
  )


def popularity_plot(counts: np.ndarray, caption: str) -> dict[str, Any]:
  """Plots interactions per item over its rank, both logarithmic, for a sample of `[items]`."""
  ordered = np.sort(counts[counts > 0])[::-1]  # Zero has no logarithm.
  ranks = np.unique(np.geomspace(1, len(ordered), _CURVE_POINTS).round().astype(int))
  points = np.log10(np.stack([ranks, ordered[ranks - 1]], axis=1))
  tops = [(share, np.log10(share * len(ordered))) for share in (0.01, 0.1)]
  return plot(
    'Popularity of the items',
    caption,
    curves=[Curve('', [points.tolist()])],
    x_label='rank of the item (logarithmic)',
    x_ticks=_log_ticks(points[-1, 0]),
    y_label='interactions (logarithmic)',
    y_ticks=_log_ticks(points[0, 1]),
    marks=[(at, f'top {share:.0%}'.replace('%', ' %')) for share, at in tops if at > 0],
  )


def time_plot(times: np.ndarray, split: dict[str, Any] | None, caption: str) -> dict[str, Any]:
  """Plots a histogram of `[interactions]` unix seconds and the borders of the split by time."""
  ends = np.array([times.min(), times.max()]).astype('M8[s]')
  for unit, name in _TIME_UNITS.items():  # noqa: B007 the last one serves if all are too fine
    first, last = ends.astype(f'M8[{unit}]').astype(np.int64)
    if last - first < _MAX_TIME_BARS:
      break
  numbers = np.bincount(times.astype('M8[s]').astype(f'M8[{unit}]').astype(np.int64) - first)
  edges = np.arange(first, last + 2).astype(f'M8[{unit}]')
  seconds = edges.astype('M8[s]').astype(np.int64).tolist()
  bars = [
    Bar(*span, number, f'{name} of {edge}: {counted(number, "interaction")}')
    for span, number, edge in zip(
      itertools.pairwise(seconds), numbers.tolist(), edges[:-1], strict=True
    )
  ]
  marks, bands = [], []
  if split:
    borders = (split['valid_from'], split['test_from'], seconds[-1])
    bands = [(*borders[:2], 'valid', ''), (*borders[1:], 'test', '')]
    marks = [(split['valid_from'], f'validation from {date(split["valid_from"])}')]
    marks += [(split['test_from'], f'test from {date(split["test_from"])}')]
  return plot(
    'Interactions over time',
    caption + ('; shaded: validation and test of the split by time' if split else ''),
    bars=bars,
    x_label='date (UTC)',
    x_ticks=_time_ticks(seconds[0], seconds[-1]),
    y_label=f'interactions per {name}',
    marks=marks,
    bands=bands,
  )


def rating_plot(ratings: np.ndarray, caption: str) -> dict[str, Any]:
  """Plots one bar per distinct value of `[interactions]` ratings, or a histogram of many."""
  values, numbers = np.unique(ratings, return_counts=True)
  if len(values) <= _RATING_BARS:
    names = [f'{value:g}' for value in values]
    edges = [(i - 0.4, i + 0.4) for i in range(len(names))]
    ticks: Ticks = [*enumerate(names)]
  else:
    numbers, borders = np.histogram(ratings, _RATING_BARS)
    edges = [*itertools.pairwise(borders.tolist())]
    names = [f'{left:,g} to {right:,g}' for left, right in edges]
    ticks = round_ticks(borders[0], borders[-1], 5, least_step=0)
  bars = [
    Bar(left, right, number, f'{name}: {counted(number, "interaction")}')
    for (left, right), number, name in zip(edges, numbers.tolist(), names, strict=True)
  ]
  return plot(
    'Ratings', caption, bars=bars, x_label='rating', x_ticks=ticks, y_label='interactions'
  )


def _log_ticks(high: float) -> Ticks:
  """Returns powers of ten up to an exponent, on short axes also 2 and 5 times these."""
  exponents = range(int(high) + 1)
  if len(exponents) > 2:
    return [(k, f'{10**k:,}') for k in exponents[:: 1 + len(exponents) // 6]]
  values = [factor * 10**k for k in exponents for factor in (1, 2, 5)]
  return [(float(np.log10(x)), f'{x:,}') for x in values if np.log10(x) <= high]


def _time_ticks(first: int, last: int) -> Ticks:
  """Chooses ticks at days, months or years, as many as fit."""
  for unit, step in _TIME_TICKS:
    dates = np.array([first - 1, last]).astype('M8[s]').astype(f'M8[{unit}]')
    low, high = dates.astype(np.int64) + (1970 if unit == 'Y' else 0)
    numbers = np.arange(low + 1, high + 1)
    numbers = numbers[numbers % step == 0] - (1970 if unit == 'Y' else 0)
    if len(numbers) * CHARACTER * (len(str(dates[0])) + 2) <= WIDTH - 60:
      break
  if not len(numbers):  # All interactions are on one day.
    return [((first + last) / 2, date(first))]
  dates = numbers.astype(f'M8[{unit}]')
  return [(int(at.astype('M8[s]').astype(np.int64)), str(at)) for at in dates]


def sample_cards(
  items: Sequence[dict[str, Any]], counts: np.ndarray, pictures: Sequence[Path | None]
) -> list[dict[str, Any]]:
  """Chooses popular, medium, rare and cold items, always the same; those with pictures come first.

  Args:
    items: `[items]` metadata.
    counts: `[items]` interactions.
    pictures: `[items]` picture files or None.

  Returns:
    Groups with a `name`, the range of interactions `span`, and `cards`.
  """
  ranked = np.argsort(-counts, kind='stable')
  number = int((counts > 0).sum())
  popular, middle, rare = np.array_split(ranked[:number], 3)
  from_centre = np.argsort(np.abs(np.arange(len(middle)) - len(middle) // 2), kind='stable')
  ordered = {
    'Popular': popular,
    'In the middle': middle[from_centre],
    'Rare': rare[::-1],
    'Without interactions': ranked[number:],
  }
  groups = []
  for name, candidates in ordered.items():
    candidates = candidates[: max(_CARDS, len(items) // 10)].tolist()
    chosen = sorted(candidates, key=lambda i: pictures[i] is None)[:_CARDS]
    if chosen:
      most, least = int(counts[chosen].max()), int(counts[chosen].min())
      span = counted(least, 'interaction')
      span = span if most == least else f'{most:,} to {span}'
      cards = [_card(items[i], int(counts[i]), pictures[i]) for i in chosen]
      groups.append({'name': name, 'span': span, 'cards': cards})
  return groups


def _card(item: dict[str, Any], count: int, path: Path | None) -> dict[str, Any]:
  picture = None if path is None else _small_picture(path)
  if path is not None:
    absence = 'picture cannot be read'
  else:
    absence = 'picture not fetched' if '://' in item['image'] else 'no picture'
  return {
    'title': _excerpt(item['title'], _TITLE_LENGTH)
    or f'Item {item["original_id"][:_TITLE_LENGTH]}',
    'genres': ' · '.join(_excerpt(genre, _TITLE_LENGTH) for genre in item['genres'][:_MAX_GENRES]),
    'text': _excerpt(item['description'], _TEXT_LENGTH),
    'count': counted(count, 'interaction'),
    'picture': picture,
    'absence': absence,
  }


def _excerpt(text: str, length: int) -> str:
  text = ' '.join(text[: 10 * length].split())
  # textwrap.shorten would remove a text without blanks, such as Chinese, completely.
  return text if len(text) <= length else text[:length].rsplit(' ', 1)[0].rstrip('.,;: ') + '…'


def _small_picture(path: Path) -> str | None:
  """Encodes a picture as a data URL; None if it is damaged."""
  try:
    with Image.open(path, formats=('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')) as image:
      image.draft('RGB', (2 * _PICTURE_SIZE[0], 2 * _PICTURE_SIZE[1]))
      small = ImageOps.exif_transpose(image).convert('RGBA')
    small.thumbnail(_PICTURE_SIZE)
    shown = Image.alpha_composite(Image.new('RGBA', small.size, 'white'), small).convert('RGB')
    shown.save(file := io.BytesIO(), 'JPEG', quality=80)
  except Exception:  # Damaged files make decoders raise any kind of error.
    return None
  return f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'

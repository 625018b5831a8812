"""Prints a summary of a prepared folder and writes an HTML page about it.

  python -m data_prep.describe --data_dir=data/ml-1m

The page is one file without scripts and external links. It shows plots, splits, warnings and some
items with picture and text. It is written to describe.html in the folder, or to --out.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import describe_page
from data_prep.describe_page import Prepared, percent
from data_prep.flags import Parser
from ur4rec_jax import files
from ur4rec_jax.data import item_pictures, splits
from ur4rec_jax.data.dataset import Dataset, Interactions, read_info, read_interactions, read_items
from ur4rec_jax.errors import InputError, exit_on_reported_error, say

PAGE = 'describe.html'
FEW = 5  # An item with fewer interactions counts as rare.
_MAX_LISTED_RATINGS = 12  # If there are more distinct ratings, only their range is shown.
_DAY = 86_400  # Seconds.


def describe(data_dir: str | Path, out: str | Path | None = None) -> str:
  """Writes the page of a prepared folder.

  Args:
    data_dir: prepared folder.
    out: HTML file to write or replace; None for `PAGE` in the folder.

  Returns:
    The summary to print.

  Raises:
    InputError: the folder is no prepared dataset, or the page cannot be written.
  """
  info = read_info(data_dir)
  out = Path(os.path.realpath(out or Path(data_dir) / PAGE))
  if out.suffix.lower() not in ('.html', '.htm'):
    raise InputError(f'--out={out}: must end in .html, so that no other file is replaced')
  if out.is_dir() or not out.parent.is_dir():
    what = 'is a folder' if out.is_dir() else f'there is no folder {out.parent}'
    raise InputError(f'--out={out}: {what}; give the name of a file in a folder that exists')
  prepared = Prepared(
    Path(data_dir).resolve().name,
    info,
    read_interactions(data_dir),
    read_items(data_dir),
    item_pictures.find(data_dir),
  )
  figures = measure(prepared)
  shown = facts(info, figures)
  page = describe_page.render(prepared, figures, shown)
  with files.disk_errors(out, '--out'):
    files.write_file(out, page)
  rows = [
    ('dataset', f'{info["name"]}, in {data_dir}'),
    *shown,
    *(('warning', warning) for warning in figures['warnings']),
    ('page', str(out)),
  ]
  return '\n'.join(f'{name:<14} {value}' for name, value in rows)


def measure(prepared: Prepared) -> dict[str, Any]:
  """Computes statistics that dataset.json does not contain.

  Returns:
    `density`; `lengths` of the histories; `popularity`; `ratings`, None without ratings; `known`:
    number of items with each kind of metadata; `warnings`.
  """
  _, info, histories, items, pictures = prepared
  lengths = np.diff(histories.offsets)
  names = ('min', 'q1', 'median', 'q3', 'max')
  known = {name: sum(bool(item[name]) for item in items) for name in ('title', 'genres')}
  columns = [name.strip() for name in (info['options'].get('text_columns') or '').split(',')]
  columns = [name for name in columns if name]
  own = sum(bool(_own_description(item['description'], columns)) for item in items)
  known['description'] = own
  if columns:
    added = sum(
      item['description'] != _own_description(item['description'], columns) for item in items
    )
    known['text columns'] = added
  known['picture'] = sum(path is not None for path in pictures)
  absent = [item['image'] for item, path in zip(items, pictures, strict=True) if not path]
  urls = sum('://' in image for image in absent)
  if urls:
    known['picture URL'] = urls
  lost = sum(map(bool, absent)) - urls
  return {
    'density': len(histories.item_ids) / (len(lengths) * len(items)),
    'lengths': {
      **dict(zip(names, np.quantile(lengths, (0, 0.25, 0.5, 0.75, 1)).tolist(), strict=True)),
      'mean': float(lengths.mean()),
    },
    'popularity': _popularity(np.bincount(histories.item_ids, minlength=len(items) + 1)[1:]),
    'ratings': _ratings(histories.ratings) if info['has_ratings'] else None,
    'known': known,
    'warnings': [
      *_order_warnings(info, histories),
      *_repeat_warnings(histories),
      *_unseen_warnings(info, histories),
      *([f'picture files that items name and that are lost or damaged: {lost:,}'] if lost else []),
    ],
  }


def _own_description(description: str, columns: Sequence[str]) -> str:
  """Returns a description without the columns that the build appended to it, as `brand: Acme`."""
  if not columns:
    return description
  names = '|'.join(map(re.escape, columns))
  return re.split(rf'(?m)^(?:{names}): ', description, maxsplit=1)[0].strip()


def _popularity(counts: np.ndarray) -> dict[str, float]:
  ordered = np.sort(counts)
  number, total = len(ordered), ordered.sum()
  # Whole numbers, because 0.01 * 700 in floats is more than 7.
  top = lambda percents: float(ordered[-number * percents // 100 :].sum() / total)
  ranks = np.arange(1, number + 1)
  return {
    'top_1_percent': top(1),
    'top_10_percent': top(10),
    'gini': float(2 * (ranks * ordered).sum() / (number * total) - (number + 1) / number),
    'items_with_few': int((counts < FEW).sum()),
  }


def _ratings(ratings: np.ndarray) -> dict[str, Any]:
  values, numbers = np.unique(ratings, return_counts=True)
  shares = None
  if len(values) <= _MAX_LISTED_RATINGS:
    shares = dict(zip(values.tolist(), (numbers / len(ratings)).tolist(), strict=True))
  ends = {'min': float(values[0]), 'max': float(values[-1])}
  return {**ends, 'mean': float(ratings.mean(dtype=np.float64)), 'shares': shares}


def _order_warnings(info: dict[str, Any], histories: Interactions) -> list[str]:
  if not info['has_timestamps']:
    return ['no times: the order of the raw file is all there is']
  warnings = []
  times, ends = histories.timestamps, histories.offsets[1:]
  ends = ends[np.diff(histories.offsets) >= splits.MIN_EVALUATED_LENGTH]
  if equal := int((times[ends - 1] == times[ends - 2]).sum()):
    warnings.append(
      f'{_part(equal, len(ends))} evaluated users have their last two interactions at one time:'
      ' the order of the raw file decides which one is the test item'
    )
  if not (times % _DAY).any():
    warnings.append('all times are whole days: within a day the order is that of the raw file')
  return warnings


def _repeat_warnings(histories: Interactions) -> list[str]:
  lengths = np.diff(histories.offsets)
  # Each (user, item) pair becomes one number.
  pairs = np.repeat(np.arange(len(lengths)) << 32, lengths) + histories.item_ids
  pairs.sort()
  repeats = int((pairs[1:] == pairs[:-1]).sum())
  if not repeats:
    return []
  return [f'{_part(repeats, len(pairs))} interactions repeat an item that the user had before']


def _unseen_warnings(info: dict[str, Any], histories: Interactions) -> list[str]:
  warnings = []
  for name, record in info['splits'].items():
    split = splits.make_split(name, record, histories.offsets, histories.timestamps)
    data = Dataset(info, name, split, histories.item_ids, histories.offsets)
    unseen = {part: data.is_untrained(part) for part in split.held_out}
    shares = {part: _part(int(found.sum()), len(found)) for part, found in unseen.items()}
    if any(found.any() for found in unseen.values()):
      warnings.append(
        f'{name}: {shares["valid"]} validation items and {shares["test"]} test items never occur in'
        ' training, and ids alone cannot find them'
      )
  return warnings


def facts(info: dict[str, Any], figures: dict[str, Any]) -> list[tuple[str, str]]:
  """Describes a dataset in rows of (name, text)."""
  counts, known = info['counts'], figures['known']
  lengths, popularity = figures['lengths'], figures['popularity']
  few = popularity['items_with_few']
  rows = [
    ('users', f'{counts["users"]:,}'),
    ('items', describe_page.item_count(counts)),
    ('interactions', f'{counts["interactions"]:,}, density {percent(figures["density"])}'),
    (
      'dates',
      ' to '.join(map(describe_page.date, info['time_range'] or ()))
      or 'none; the order of the file',
    ),
    (
      'history',
      '{min:,g} to {max:,g} interactions a user, quartiles {q1:,g}, {median:,g}, {q3:,g},'
      ' mean {mean:,.1f}'.format(**lengths),
    ),
    (
      'popularity',
      f'the top 1 % of the items have {percent(popularity["top_1_percent"])} of the interactions,'
      f' the top 10 % {percent(popularity["top_10_percent"])}; Gini {popularity["gini"]:.2f};'
      f' {few:,} items ({percent(few / counts["items"])}) have fewer than {FEW}',
    ),
  ]
  rows += [
    (what, f'{number:,} items ({percent(number / counts["items"])})')
    for what, number in known.items()
  ]
  if ratings := figures['ratings']:
    shares = [f'{value:g}: {percent(share)}' for value, share in (ratings['shares'] or {}).items()]
    span = ', '.join(shares) or '{min:,g} to {max:,g}'.format(**ratings)
    rows.append(('ratings', f'{span}; mean {ratings["mean"]:,.2f}'))
  for name, record in info['splits'].items():
    rows.append(('split', f'{splits.describe(name, record)} {record["hash"]}'))
    rows.append(('-', describe_page.split_counts(record)))
  for what, reasons in info['dropped'].items():
    if reasons:
      lost = ', '.join(f'{reason} {number:,}' for reason, number in reasons.items())
      rows.append(('dropped', f'{what}: {lost}'))
  rows += [('note', note) for note in info.get('notes', [])]
  return [*rows, ('licence', info['licence'])]


def _part(number: int, total: int) -> str:
  return f'{number:,} of {total:,} ({percent(number / total)})'


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, writes the page and prints the summary."""
  parser = Parser(__doc__)
  parser.add_argument('--data_dir', required=True, help='prepared folder to describe')
  parser.add_argument(
    '--out', help=f'HTML file to write or replace; without it {PAGE} in the prepared folder'
  )
  say(describe(**vars(parser.parse(argv))))


if __name__ == '__main__':
  main()

"""Reads tables for recommending: interactions of customers, and new goods.

The same readers read the files of a build, so a table gives the same ids, times and rows here.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ur4rec_jax.data import column_names, conditions
from ur4rec_jax.data.raw import ids, interactions, items, tables
from ur4rec_jax.data.raw.records import Item, Raw
from ur4rec_jax.errors import InputError


class Customers(NamedTuple):
  """The customers of a table of interactions.

  Attributes:
    names: `[users]` original ids, in the order of the table.
    offsets: `[users + 1]`, where the history of each customer begins in `codes`.
    codes: `[interactions]` indices into `items`, the oldest interaction of each customer first.
    items: distinct original ids of items.
    incomplete: number of rows without a customer or an item, which were left out.
    dropped: by flag of the build, the number of rows that it would have left out.
    dropped_users: by flag of the build, the customers whose rows it left out completely.
    notes: how the table was read, and which flags of the build it has no column for.
  """

  names: list[str]
  offsets: np.ndarray
  codes: np.ndarray
  items: list[str]
  incomplete: int
  dropped: Mapping[str, int]
  dropped_users: Mapping[str, Sequence[str]]
  notes: Sequence[str]

  def history(self, user: int) -> list[str]:
    """Returns the original ids of a customer's items, the oldest first."""
    return [self.items[code] for code in self.codes[self.offsets[user] : self.offsets[user + 1]]]


def is_table(path: pathlib.Path) -> bool:
  """Tells whether the name of a file is that of a table that can be read."""
  return tables.kind(path) in tables.KINDS


def read_customers(path: str | pathlib.Path, options: Mapping[str, Any]) -> Customers:
  """Reads the histories of all customers of a table.

  Args:
    path: a CSV, TSV, Parquet or JSON lines file with one row per interaction, or a folder of such
      parts.
    options: the options of the prepared folder. The columns that were named there are used here
      too, and the rows that the build left out are left out.

  Raises:
    InputError: the file cannot be read, a column is missing, or a value is wrong.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    _check_kind(path, '--histories')
  try:
    raw, notes = _read_rows(path, options)
  except InputError as error:
    raise InputError(str(error).replace('--raw_dir', '--histories')) from error
  rows, dropped = _rows_of_build(raw, options, notes)
  if not len(rows):
    raise InputError(f'{path}: the flags of the build leave out all rows; correct the table')
  users, user_names = _compact(np.asarray(raw.users.indices)[rows], raw.users.dictionary)
  codes, item_names = _compact(np.asarray(raw.items.indices)[rows], raw.items.dictionary)
  keys = (users,) if raw.timestamps is None else (raw.timestamps[rows], users)
  order = np.lexsort(keys)  # Stable: rows with equal times keep the order of the file.
  dropped = {**raw.dropped, **dropped}
  return Customers(
    names=user_names,
    offsets=np.searchsorted(users[order], np.arange(len(user_names) + 1)),
    codes=codes[order],
    items=item_names,
    incomplete=dropped.pop('clean_ids', 0),
    dropped=dropped,
    dropped_users={reason: names for reason, names in raw.dropped_users.items() if names},
    notes=notes,
  )


def _read_rows(path: pathlib.Path, options: Mapping[str, Any]) -> tuple[Raw, list[str]]:
  """Reads the rows that the build would have kept, and notes about them."""
  delimiter = interactions.parse_delimiter(options.get('delimiter'))
  files = interactions.find(path, {})
  first = tables.open_file(files[0], delimiter, options.get('quoting'), '--quoting')
  settings, notes = _settings_of_build([*first.columns, *first.folders], options)
  raw = interactions.read_files(files, settings, every_kind=False)
  return raw, [*raw.notes, *notes]


def _settings_of_build(
  names: Sequence[str], options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Returns the flags of the build that a table with these columns can follow.

  Rows without a customer or an item are left out, whatever the build did with them.
  """
  settings, notes = dict(interactions.PARAMETERS), []
  for role in column_names.INTERACTIONS:
    wanted = options.get(f'{role}_column')
    settings[f'{role}_column'] = wanted if wanted in (*names, interactions.NONE) else None
  for name in ('delimiter', 'quoting'):
    settings[name] = options.get(name)
  cleanings = {*ids.parse_cleanings(options.get('clean_ids')), ids.EMPTY}
  settings['clean_ids'] = ','.join(sorted(cleanings))
  lacking = [c.column for c in conditions.parse(options.get('where')) if c.column not in names]
  if lacking:
    notes.append(_not_followed('where', options, lacking[0]))
  else:
    settings['where'] = options.get('where')
  if options.get('event_column') in names:
    settings['event_weights'] = options.get('event_weights')
  elif options.get('event_weights') is not None:
    notes.append(_not_followed('event_weights', options, options['event_column']))
  return settings, notes


def _not_followed(flag: str, options: Mapping[str, Any], column: str) -> str:
  return (
    f'warning: the build left rows out by --{flag}={options[flag]}, but this table has no column'
    f' {column}, so all of its rows count; add the column, or leave the same rows out'
  )


def _rows_of_build(
  raw: Raw, options: Mapping[str, Any], notes: list[str]
) -> tuple[np.ndarray, dict[str, int]]:
  """Returns the rows that the filters of single rows keep, and the number of the others."""
  rows, dropped = np.arange(len(raw.users)), {}
  if options.get('drop_duplicates') and raw.timestamps is not None:
    keys = np.stack([raw.users.indices, raw.items.indices, raw.timestamps])
    _, first = np.unique(keys, axis=1, return_index=True)
    rows, dropped['drop_duplicates'] = np.sort(first), len(rows) - len(first)
  least = options.get('min_rating')
  if least is not None and raw.ratings is None:
    notes.append(
      f'warning: the build left rows out by --min_rating={least:g}, but this table has no ratings,'
      ' so all of its rows count'
    )
  elif least is not None:
    is_kept = raw.ratings[rows] >= least
    rows, dropped['min_rating'] = rows[is_kept], int((~is_kept).sum())
  return rows, {reason: count for reason, count in dropped.items() if count}


def _compact(codes: np.ndarray, names: pa.Array) -> tuple[np.ndarray, list[str]]:
  """Removes the names that no row has."""
  encoded = ids.compact(pa.DictionaryArray.from_arrays(pa.array(codes), names))
  return np.asarray(encoded.indices).astype(np.int64), encoded.dictionary.to_pylist()


def read_goods(path: str | pathlib.Path, options: Mapping[str, Any]) -> dict[str, Item]:
  """Reads a table of goods: its items by original id, with the names of picture files as text.

  Args:
    path: a CSV, TSV, Parquet or JSON lines file with one row per item.
    options: the options of the prepared folder; columns that were named there are used here too.

  Raises:
    InputError: the file cannot be read, an id is missing or there twice, or no column has ids.
  """
  path = pathlib.Path(path)
  _check_kind(path, '--add_items')
  table = items.open_table(path, options.get('items_quoting'))
  settings = dict.fromkeys(items.PARAMETERS)
  for role in column_names.ITEMS:
    wanted = options.get(f'{role}_column')
    settings[f'{role}_column'] = wanted if wanted in (*table.columns, 'none') else None
  texts = (options.get('text_columns') or '').split(',')
  settings['text_columns'] = ','.join(x for x in map(str.strip, texts) if x in table.columns)
  cleanings = ids.parse_cleanings(options.get('clean_ids'))
  return items.from_table(table, lambda value, *_: items.text(value), cleanings, **settings)[0]


def _check_kind(path: pathlib.Path, flag: str) -> None:
  if not path.is_file():
    raise InputError(f'{flag}={path}: no such file')
  if not is_table(path):
    raise InputError(f'{flag}={path}: must be a file ending in {", ".join(tables.KINDS)}')

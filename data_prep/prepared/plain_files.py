"""Reads plain files of interactions by the engine's own parser, without their rows in memory.

Plain are unpacked text files without double quotes below the first line and with equally many
columns in all lines, of which all rows are wanted, with ids that need no cleaning, unix times as
whole numbers, and numbers as ratings. All other files are left to `interactions.read_layout`,
which reads all forms and names a wrong line.
"""

import glob
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from ur4rec_jax.data.raw import ids, tables, times
from ur4rec_jax.data.raw.interactions import Layout
from ur4rec_jax.data.raw.records import Place, Raw
from ur4rec_jax.errors import InputError

_SNIFFED = 1000  # Lines that tell whether ids are whole numbers.
_LONGEST_TIME = 10**18  # Times with more digits are left to the other reader.
_WHOLE_NUMBER = re.compile(rb'0|-?[1-9]\d{0,17}')
_NOT_PLAIN = 'not plain'
# Whole numbers in their only spelling, so that the number tells the text.
_WHOLE = 'CAST(TRY_CAST("{0}" AS BIGINT) AS VARCHAR) = "{0}"'
_NUMBER = f'CASE WHEN {_WHOLE} THEN TRY_CAST("{{0}}" AS BIGINT) ELSE error(\'{_NOT_PLAIN}\') END'
_COLUMNS = {
  'text': f'coalesce("{{0}}", error(\'{_NOT_PLAIN}\'))',
  'number': _NUMBER,
  'time': _NUMBER,
  # The engine also reads 1_000, inf and nan.
  'rating': (
    'CASE WHEN NOT contains("{0}", \'_\') AND isfinite(TRY_CAST("{0}" AS FLOAT))'
    f' THEN TRY_CAST("{{0}}" AS FLOAT) ELSE error(\'{_NOT_PLAIN}\') END'
  ),
}


class Loaded(NamedTuple):
  """Rows that are in the table `loaded` of the engine, in the order of the files.

  Attributes:
    raw: the rows without a column; its ids have no rows, but all different ids.
    ids: `[users]` and `[items]` different ids as the table has them, in the order of `raw`.
    columns: names of the columns beside the ids.
  """

  raw: Raw
  ids: Mapping[str, pa.Array]
  columns: tuple[str, ...]


def load(database: duckdb.DuckDBPyConnection, layout: Layout) -> Loaded | None:
  """Reads the files of a layout into the engine; None if they are not plain.

  Args:
    database: see `engine.connected`.
    layout: the files and their columns.

  Raises:
    InputError: a file cannot be read.
  """
  names = tuple(layout.columns.values())
  if not layout.selection.takes_all or not all(_is_plain(file, names) for file in layout.files):
    return None
  sniffed = {role: _sniff(layout, role) for role in ('user', 'item')}
  for kinds in (sniffed, dict.fromkeys(sniffed, 'text')):
    ends = _insert(database, layout, kinds)
    if ends is not None:
      break
  else:
    return None
  ticks = _ticks_per_second(database) if 'time' in layout.columns else 1
  if ticks is None:
    return None
  found = {role: _distinct(database, role) for role in kinds}
  texts = {role: values.cast(pa.string()) for role, values in found.items()}
  if not all(ids.are_sound(texts[role]) for role in kinds if kinds[role] == 'text'):
    return None
  no_rows = pa.array([], pa.int32())
  users, items = (pa.DictionaryArray.from_arrays(no_rows, texts[role]) for role in kinds)

  def locate(row: int) -> Place:
    at = int(np.searchsorted(ends, row, side='right'))
    return tables.place(layout.files[at], row - (ends[at - 1] if at else 0))

  raw = Raw(layout.path, users, items, None, None, locate, ticks_per_second=ticks)
  return Loaded(raw, found, tuple(role for role in ('time', 'rating') if role in layout.columns))


def number(
  database: duckdb.DuckDBPyConnection, loaded: Loaded, numbers: Mapping[str, np.ndarray]
) -> None:
  """Creates the table `rows_0` of `rows.Rows`, with numbers in place of ids.

  Args:
    database: has the table `loaded`, which is dropped.
    loaded: the rows.
    numbers: for `user` and `item` the number of each of `loaded.ids`.
  """
  for role, values in loaded.ids.items():
    database.register(f'{role}s', pa.table({'id': values, 'number': numbers[role]}))
  more = ''.join(f', "{name}"' for name in loaded.columns)
  database.execute(
    'CREATE TABLE rows_0 AS SELECT a.rowid AS "row", u.number AS "user", i.number AS item'
    f'{more} FROM loaded AS a JOIN users AS u ON a."user" = u.id JOIN items AS i ON a.item = i.id'
  )
  for role in loaded.ids:
    database.unregister(f'{role}s')
  database.execute('DROP TABLE loaded')


def _is_plain(file: tables.File, names: tuple[str, ...]) -> bool:
  is_packed = file.path.suffix.lower() in ('.gz', '.tgz')
  return file.is_plain and not is_packed and all(file.columns.count(name) == 1 for name in names)


def _pattern(file: tables.File) -> str:
  """Returns the path as a pattern that matches nothing else: the engine takes * and ? as such."""
  return glob.escape(str(file.path))


def _delimiter(file: tables.File) -> str:
  """Returns the character between columns, which plain files have."""
  assert file.delimiter is not None
  return file.delimiter


def _scan(file: tables.File) -> str:
  """Returns the table function that reads a file; its columns are called `0`, `1` and so on."""
  columns = ', '.join(f"'{i}': 'VARCHAR'" for i in range(len(file.columns)))
  quoted = lambda text: "'" + text.replace("'", "''") + "'"
  return (
    f'read_csv({quoted(_pattern(file))}, delim={quoted(_delimiter(file))}, columns={{{columns}}},'
    " skip=1, header=false, auto_detect=false, quote='', escape='', comment='')"
  )


def _sniff(layout: Layout, role: str) -> str:
  """Guesses from the first rows whether ids are whole numbers in their only spelling."""
  file = layout.files[0]
  column = file.columns.index(layout.columns[role])
  with file.path.open('rb') as content:
    lines = itertools.islice(content, 1, _SNIFFED)
    rows = (line.rstrip(b'\r\n').split(_delimiter(file).encode()) for line in lines)
    are_whole = all(len(row) > column and _WHOLE_NUMBER.fullmatch(row[column]) for row in rows)
  return 'number' if are_whole else 'text'


def _insert(
  database: duckdb.DuckDBPyConnection, layout: Layout, kinds: Mapping[str, str]
) -> np.ndarray | None:
  """Creates the table `loaded`; returns the number of its rows after each file, if all is plain."""
  types = {'text': 'VARCHAR', 'number': 'BIGINT', 'time': 'BIGINT', 'rating': 'FLOAT'}
  of = {role: kinds.get(role, role) for role in layout.columns}
  columns = ', '.join(f'"{role}" {types[kind]}' for role, kind in of.items())
  database.execute(f'CREATE OR REPLACE TABLE loaded ({columns})')
  counts: list[int] = []
  try:
    # The number of a row is its place, so the rows have to stay in order.
    database.execute('SET preserve_insertion_order = true')
    for file in layout.files:
      values = ', '.join(
        _COLUMNS[kind].format(file.columns.index(layout.columns[role])) for role, kind in of.items()
      )
      counts += _row(database, f'INSERT INTO loaded SELECT {values} FROM {_scan(file)}')
      if not _has_delimiters_of(file, counts[-1]):
        return None
  except duckdb.OutOfMemoryException:
    raise
  except duckdb.IOException as error:
    # The message names the file; otherwise it is about what the engine writes.
    if any(path in str(error) for path in (str(file.path), _pattern(file))):
      reason = str(error).partition('\n')[0]
      raise InputError(f'{file.path}: cannot be read ({reason}); make it readable') from error
    raise
  except (duckdb.InvalidInputException, duckdb.ConversionException):
    return None
  finally:
    database.execute('SET preserve_insertion_order = false')
  return np.cumsum(counts) if all(counts) else None


def _has_delimiters_of(file: tables.File, rows: int) -> bool:
  """Whether a file has just the delimiters of its rows: the engine overlooks some at a line's end.

  Such a line may be shifted, for example by a comma within a text.
  """
  delimiter = _delimiter(file)
  wanted = (1 + rows) * (len(file.columns) - 1) + sum(n.count(delimiter) for n in file.columns)
  with file.path.open('rb') as content:
    blocks = iter(lambda: content.read(1 << 20), b'')
    return sum(block.count(delimiter.encode()) for block in blocks) == wanted


def _ticks_per_second(database: duckdb.DuckDBPyConnection) -> int | None:
  """Returns the unit of the times; None if the other reader has something to say about them."""
  least, most, largest, are_rounded = _row(
    database,
    'SELECT min("time"), max("time"), max(abs("time")),'
    ' bool_and(CAST(CAST("time" AS FLOAT) AS BIGINT) = "time") FROM loaded',
  )
  if largest >= _LONGEST_TIME or are_rounded:
    return None
  smallest = 0 if least <= 0 <= most else min(abs(least), abs(most))
  return times.plain_unit(smallest, largest)


def _row(database: duckdb.DuckDBPyConnection, question: str) -> tuple[Any, ...]:
  """Returns the only row of an answer."""
  [row] = database.execute(question).fetchall()
  return row


def _distinct(database: duckdb.DuckDBPyConnection, role: str) -> pa.Array:
  """Returns the different ids, in the order in which they are first seen."""
  found = database.execute(
    f'SELECT "{role}" FROM (SELECT "{role}", min(rowid) AS first FROM loaded GROUP BY "{role}")'
    ' ORDER BY first'
  ).to_arrow_table()
  return pa.concat_arrays(found[role].chunks)

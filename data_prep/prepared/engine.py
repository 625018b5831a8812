"""The relational engine of a build: filters, counts and sorts rows, in memory or on the disk.

Questions are plain SQL, but for the hash that finds repeated rows. DuckDB answers them within a
limit of memory, and moves to a folder on the disk what does not fit.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from ur4rec_jax import files
from ur4rec_jax.errors import InputError

MEMORY_LIMIT = '1GB'
_LEAST_MEGABYTES = 100
_ROWS_IN_MEMORY = 1 << 24
_HASHES_AT_ONCE = 1 << 25
_HASH = 'hash("user", item, "time")'
_ROWS_AT_ONCE = 1 << 20  # Rows that pass between NumPy and the engine at once.


class Resources(NamedTuple):
  """How much of the machine a build may use.

  Attributes:
    memory_limit: memory for filtering and sorting, such as `1GB`.
    folder: empty folder for what does not fit; None makes one among the system's temporary files.
    workers: processes that write the interactions.
  """

  memory_limit: str = MEMORY_LIMIT
  folder: Path | None = None
  workers: int = 1

  def column(self, name: str, rows: int, kind: Any) -> np.ndarray:
    """Makes an array `[rows]`: in memory, or if it is large in a file of `folder`."""
    if self.folder is None or rows <= _ROWS_IN_MEMORY:
      return np.empty(rows, kind)
    path = self.folder / f'{name}.column'
    with path.open('wb') as file:  # Writing to a mapped file of a full disk would end the process.
      os.posix_fallocate(file.fileno(), 0, rows * np.dtype(kind).itemsize)
    return np.memmap(path, kind, 'r+', shape=rows).view(np.ndarray)


def check_memory_limit(value: str) -> None:
  """Raises InputError if a value of `--memory_limit` is no size, or too small to work with."""
  match = re.fullmatch(r'(\d+(?:\.\d+)?)(MB|GB|TB)', value)
  megabytes = float(match[1]) * {'MB': 1, 'GB': 1e3, 'TB': 1e6}[match[2]] if match else 0
  if megabytes < _LEAST_MEGABYTES:
    raise InputError(
      f'--memory_limit={value}: must be a size such as {MEMORY_LIMIT}, {_LEAST_MEGABYTES}MB or more'
    )


@contextlib.contextmanager
def connected(resources: Resources) -> Iterator[duckdb.DuckDBPyConnection]:
  """Starts the engine; its files are removed at the end.

  Raises:
    InputError: the limit of memory is too low for the data.
    OSError: the disk is full.
  """
  with contextlib.ExitStack() as stack:
    folder = resources.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix='ur4rec-'))
    database = duckdb.connect(
      config={
        'memory_limit': resources.memory_limit,
        'temp_directory': str(Path(folder) / 'spilled'),
        'preserve_insertion_order': False,
      }
    )
    stack.callback(database.close)
    try:
      yield database
    except duckdb.OutOfMemoryException as error:
      raise InputError(
        f'--memory_limit={resources.memory_limit}: is too low for these data'
        f' ({_first_line(error)}); raise it'
      ) from error
    except duckdb.IOException as error:
      code = next((code for code in files.DISK_FULL if os.strerror(code) in str(error)), None)
      raise OSError(code, _first_line(error)) from error


def _first_line(error: Exception) -> str:
  return str(error).partition('\n')[0]


class Repeat(NamedTuple):
  """A row with the user, item and time of an earlier one; `first` and `row` are row numbers."""

  first: int
  row: int
  user: int
  item: int
  time: int


class Rows:
  """Rows of a build that are left after the filters so far.

  The columns are `row` (the position in the raw data), `user`, `item`, and `time` and `rating` if
  the data have them.
  """

  def __init__(self, database: duckdb.DuckDBPyConnection, sizes: Mapping[str, int]):
    """Takes the rows of the table `rows_0`, see `store`.

    Args:
      database: see `connected`.
      sizes: number of users and of items; those of the rows are numbers below.
    """
    self._database, self._sizes = database, sizes
    self._version = 0
    self._counts: dict[str, np.ndarray] = {}

  @property
  def _table(self) -> str:
    return f'rows_{self._version}'

  def _keep(self, wanted: str) -> None:
    """Replaces the rows by those of a query."""
    old, self._version = self._table, self._version + 1
    self._database.execute(f'CREATE TABLE {self._table} AS {wanted}')
    self._database.execute(f'DROP TABLE {old}')
    self._counts = {}

  def counts(self, column: str) -> np.ndarray:
    """Counts the rows of each `user` or `item`, `[users or items]`."""
    if column not in self._counts:
      found = self._database.execute(
        f'SELECT "{column}", count(*) AS size FROM {self._table} GROUP BY "{column}"'
      ).fetchnumpy()
      self._counts[column] = np.zeros(self._sizes[column], np.int64)
      self._counts[column][found[column]] = found['size']
    return self._counts[column]

  def first_with(self, column: str, values: np.ndarray) -> tuple[int, int]:
    """Finds the first row whose `user` or `item` is one of the values, and which one it is."""
    found = self._database.execute(
      f'SELECT "{column}", min("row") AS first FROM {self._table} GROUP BY "{column}"'
    ).fetchnumpy()
    is_wanted = np.isin(found[column], values)
    rows, wanted = found['first'][is_wanted], found[column][is_wanted]
    at = int(rows.argmin())
    return int(rows[at]), int(wanted[at])

  def __len__(self) -> int:
    return int(self.counts('user').sum())

  def keep_frequent(self, column: str, least: int) -> None:
    """Keeps the rows whose `user` or `item` has at least so many rows."""
    counts = self.counts(column)
    if ((counts > 0) & (counts < least)).any():
      frequent = (
        f'SELECT "{column}" FROM {self._table} GROUP BY "{column}" HAVING count(*) >= {least}'
      )
      self._keep(f'SELECT * FROM {self._table} WHERE "{column}" IN ({frequent})')

  def keep_rated(self, least: float) -> None:
    """Keeps the rows with at least this rating."""
    # Ratings have single precision, and so has the number that they are compared with.
    self._keep(f"SELECT * FROM {self._table} WHERE rating >= CAST('{least}' AS FLOAT)")

  def find_repeats(self) -> tuple[int, Repeat | None]:
    """Looks for rows that have an earlier row of the same user, item and time.

    Returns:
      Their number, and the first of them in the order of the data.
    """
    suspects = self._equal_hashes()
    if not len(suspects):
      return 0, None
    self._database.register('suspects', pa.table({'hash': suspects}))
    self._database.execute(
      'CREATE OR REPLACE TABLE repeated AS'
      ' SELECT "user", item, "time", min("row") AS first, count(*) AS size'
      f' FROM {self._table} WHERE {_HASH} IN (SELECT hash FROM suspects)'
      ' GROUP BY "user", item, "time" HAVING count(*) > 1'
    )
    self._database.unregister('suspects')
    count = self._database.execute('SELECT sum(size - 1) FROM repeated').fetchall()[0][0]
    if not count:
      return 0, None
    found = self._database.execute(
      'SELECT first, a."row", a."user", a.item, a."time"'
      f' FROM {self._table} AS a JOIN repeated AS b'
      ' ON a."user" = b."user" AND a.item = b.item AND a."time" = b."time" AND a."row" > b.first'
      ' ORDER BY a."row" LIMIT 1'
    ).fetchall()
    return int(count), Repeat(*found[0])

  def _equal_hashes(self) -> np.ndarray:
    """Returns the hashes of user, item and time that several rows have.

    Sorting hashes takes a small part of the time and memory of grouping rows by three columns.
    """
    parts = -(-len(self) // _HASHES_AT_ONCE)
    found = [np.zeros(0, np.uint64)]
    for part in range(parts):
      hashes = self._database.execute(
        f'SELECT {_HASH} AS hash FROM {self._table}'
        + (f' WHERE {_HASH} % {parts} = {part}' if parts > 1 else '')
      ).fetchnumpy()['hash']
      hashes.sort()
      found.append(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
    return np.concatenate(found)

  def drop_repeats(self) -> None:
    """Leaves out the rows that `find_repeats` has found."""
    self._keep(
      f'SELECT a.* FROM {self._table} AS a LEFT JOIN repeated AS b'
      ' ON a."user" = b."user" AND a.item = b.item AND a."time" = b."time"'
      ' WHERE b.first IS NULL OR a."row" = b.first'
    )

  def ordered(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yields some columns of all rows, sorted by `keys`, in consecutive parts."""
    quoted = lambda names: ', '.join(f'"{name}"' for name in names)
    question = f'SELECT {quoted(columns)} FROM {self._table} ORDER BY {quoted(keys)}'
    for batch in self._database.sql(question).to_arrow_reader(_ROWS_AT_ONCE):
      yield {name: batch[name].to_numpy() for name in columns}


def store(database: duckdb.DuckDBPyConnection, columns: Mapping[str, np.ndarray]) -> None:
  """Creates the table `rows_0` of `Rows`.

  Args:
    database: see `connected`.
    columns: `[rows]` arrays by name, without `row`.
  """
  for number, part in enumerate(_parts(columns)):
    database.register('part', part)
    verb = 'INSERT INTO rows_0' if number else 'CREATE TABLE rows_0 AS'
    database.execute(f'{verb} SELECT * FROM part')
    database.unregister('part')


def _parts(columns: Mapping[str, np.ndarray]) -> Iterator[pa.Table]:
  """Yields consecutive rows, numbered in the column `row`."""
  rows = len(next(iter(columns.values())))
  for start in range(0, max(rows, 1), _ROWS_AT_ONCE):
    end = min(start + _ROWS_AT_ONCE, rows)
    part = {name: values[start:end] for name, values in columns.items()}
    yield pa.table({'row': np.arange(start, end), **part})

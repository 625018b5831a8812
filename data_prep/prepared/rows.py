"""The rows of a build: which are left after each filter, how many, and in which order.

All of it is asked in SQL that DuckDB and Spark share, so that either engine gives the same answers.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import duckdb
import numpy as np

from data_prep.prepared import engine, spark


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
  the data have them. None of them has missing values.
  """

  def __init__(self, tables: engine.Tables | spark.Tables, sizes: Mapping[str, int]):
    """Takes the rows of the table `rows_0`.

    Args:
      tables: those of the engine.
      sizes: number of users and of items; those of the rows are numbers below.
    """
    self._tables, self._sizes = tables, sizes
    self._version = 0
    self._counts: dict[str, np.ndarray] = {}

  @property
  def _table(self) -> str:
    return f'rows_{self._version}'

  def _keep(self, wanted: str) -> None:
    """Replaces the rows by those of a query."""
    old, self._version = self._table, self._version + 1
    self._tables.create(self._table, wanted)
    self._tables.drop(old)
    self._counts = {}

  def counts(self, column: str) -> np.ndarray:
    """Counts the rows of each `user` or `item`, `[users or items]`."""
    if column not in self._counts:
      found = self._tables.answer(
        f'SELECT "{column}", count(*) AS size FROM {self._table} GROUP BY "{column}"'
      )
      self._counts[column] = np.zeros(self._sizes[column], np.int64)
      self._counts[column][found[column]] = found['size']
    return self._counts[column]

  def first_with(self, column: str, values: np.ndarray) -> tuple[int, int]:
    """Finds the first row whose `user` or `item` is one of the values, and which one it is."""
    found = self._tables.answer(
      f'SELECT "{column}", min("row") AS first FROM {self._table} GROUP BY "{column}"'
    )
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
    suspects = self._tables.suspects(self._table, len(self))
    if suspects is None:
      return 0, None
    self._tables.create(
      'repeated',
      'SELECT "user", item, "time", min("row") AS first, count(*) AS size'
      f' FROM {suspects} GROUP BY "user", item, "time" HAVING count(*) > 1',
    )
    found = self._tables.answer(
      'SELECT first, a."row", a."user", a.item, a."time"'
      f' FROM {self._table} AS a JOIN repeated AS b'
      ' ON a."user" = b."user" AND a.item = b.item AND a."time" = b."time" AND a."row" > b.first'
      ' ORDER BY a."row" LIMIT 1'
    )
    if not len(found['row']):
      return 0, None
    more = self._tables.answer('SELECT CAST(sum(size - 1) AS BIGINT) AS size FROM repeated')
    return int(more['size'][0]), Repeat(*(int(found[name][0]) for name in Repeat._fields))

  def drop_repeats(self) -> None:
    """Leaves out the rows that `find_repeats` has found."""
    self._keep(
      f'SELECT a.* FROM {self._table} AS a LEFT JOIN repeated AS b'
      ' ON a."user" = b."user" AND a.item = b.item AND a."time" = b."time"'
      ' WHERE b.first IS NULL OR a."row" = b.first'
    )

  def ordered(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yields some columns of all rows, sorted by `keys`, in consecutive parts."""
    # Spark sorts by a function of the name "user", if no table is named and it is not selected.
    named = lambda names: ', '.join(f'a."{name}"' for name in names)
    return self._tables.parts(
      f'SELECT {named(columns)} FROM {self._table} AS a ORDER BY {named(keys)}'
    )


@contextlib.contextmanager
def open_rows(
  database: duckdb.DuckDBPyConnection, resources: engine.Resources, sizes: Mapping[str, int]
) -> Iterator[Rows]:
  """Gives the rows of the table `rows_0` of DuckDB to the engine that filters and sorts them.

  Args:
    database: see `engine.connected`.
    resources: say which engine it is.
    sizes: see `Rows`.

  Raises:
    InputError: Spark does not start, or has too little memory.
    LostProcessError: the connection to Spark was lost.
  """
  if resources.master is None:
    yield Rows(engine.Tables(database), sizes)
    return
  with spark.moved(database, resources, resources.master) as tables:
    yield Rows(tables, sizes)

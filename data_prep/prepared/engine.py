"""DuckDB, the engine of a build: holds rows, and answers the questions of `rows` about them.

It works within a limit of memory, and moves to a folder on the disk what does not fit.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
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
ROWS_AT_ONCE = 1 << 20  # Rows that pass between NumPy and the engine at once.


class Resources(NamedTuple):
  """How much of the machine a build may use.

  Attributes:
    memory_limit: memory for filtering and sorting, such as `1GB`.
    folder: empty folder for what does not fit; None makes one among the system's temporary files.
    workers: processes that write the interactions.
    master: the Spark that filters and sorts, such as `spark://HOST:PORT`; None: DuckDB does.
  """

  memory_limit: str = MEMORY_LIMIT
  folder: Path | None = None
  workers: int = 1
  master: str | None = None

  @contextlib.contextmanager
  def scratch(self) -> Iterator[Path]:
    """Gives the folder for what does not fit."""
    if self.folder is not None:
      yield self.folder
      return
    with tempfile.TemporaryDirectory(prefix='ur4rec-') as folder:
      yield Path(folder)

  def column(self, name: str, rows: int, kind: Any) -> np.ndarray:
    """Makes an array `[rows]`: in memory, or if it is large in a file of `folder`."""
    if self.folder is None or rows <= _ROWS_IN_MEMORY:
      return np.empty(rows, kind)
    path = self.folder / f'{name}.column'
    with path.open('wb') as file:  # Writing to a mapped file of a full disk would end the process.
      os.posix_fallocate(file.fileno(), 0, rows * np.dtype(kind).itemsize)
    return np.memmap(path, kind, 'r+', shape=rows).view(np.ndarray)


def megabytes(memory_limit: str, least: int = _LEAST_MEGABYTES) -> int:
  """Reads a value of `--memory_limit`; InputError if it is no size, or too small to work with."""
  match = re.fullmatch(r'(\d+(?:\.\d+)?)(MB|GB|TB)', memory_limit)
  found = float(match[1]) * {'MB': 1, 'GB': 1e3, 'TB': 1e6}[match[2]] if match else 0
  if found < least:
    raise InputError(
      f'--memory_limit={memory_limit}: must be a size such as {MEMORY_LIMIT}, {least}MB or more'
    )
  return int(found)


@contextlib.contextmanager
def connected(resources: Resources) -> Iterator[duckdb.DuckDBPyConnection]:
  """Starts the engine; its files are removed at the end.

  Raises:
    InputError: the limit of memory is too low for the data.
    OSError: the disk is full.
  """
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(resources.scratch())
    database = duckdb.connect(
      config={
        'memory_limit': resources.memory_limit,
        'temp_directory': str(folder / 'spilled'),
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


class Tables:
  """The tables of DuckDB, which `rows.Rows` asks."""

  def __init__(self, database: duckdb.DuckDBPyConnection):
    """Takes the tables as they are; `database` is that of `connected`."""
    self._database = database

  def create(self, table: str, question: str) -> None:
    """Stores the answer to a question as a table."""
    self._database.execute(f'CREATE OR REPLACE TABLE {table} AS {question}')

  def drop(self, table: str) -> None:
    """Removes a table."""
    self._database.execute(f'DROP TABLE {table}')

  def answer(self, question: str) -> dict[str, np.ndarray]:
    """Returns the columns of an answer by name; no value may be missing."""
    return self._database.execute(question).fetchnumpy()

  def parts(self, question: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of an answer in consecutive parts, in its order."""
    for batch in self._database.sql(question).to_arrow_reader(ROWS_AT_ONCE):
      yield {name: batch[name].to_numpy() for name in batch.schema.names}

  def suspects(self, table: str, rows: int) -> str | None:
    """Names rows among which are all with an equal user, item and time; None if there are none.

    Sorting hashes takes a small part of the time and memory of grouping rows by three columns.

    Args:
      table: the table of the rows.
      rows: their number.
    """
    hashes = pa.table({'hash': self._equal_hashes(table, rows)})
    if not hashes.num_rows:
      return None
    self._database.register('equal_hashes', hashes)
    return f'{table} WHERE {_HASH} IN (SELECT hash FROM equal_hashes)'

  def _equal_hashes(self, table: str, rows: int) -> np.ndarray:
    """Returns the hashes of user, item and time that several rows have."""
    parts = -(-rows // _HASHES_AT_ONCE)
    found = [np.zeros(0, np.uint64)]
    for part in range(parts):
      question = f'SELECT {_HASH} AS hash FROM {table}'
      if parts > 1:
        question += f' WHERE {_HASH} % {parts} = {part}'
      hashes = self.answer(question)['hash']
      hashes.sort()
      found.append(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
    return np.concatenate(found)


def store(database: duckdb.DuckDBPyConnection, columns: Mapping[str, np.ndarray]) -> None:
  """Creates the table `rows_0` of `rows.Rows`.

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
  for start in range(0, max(rows, 1), ROWS_AT_ONCE):
    end = min(start + ROWS_AT_ONCE, rows)
    part = {name: values[start:end] for name, values in columns.items()}
    yield pa.table({'row': np.arange(start, end), **part})

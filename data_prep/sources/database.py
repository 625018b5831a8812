"""Reads interactions from a table of a database.

  python -m data_prep.build_dataset --source=table --connect=duckdb://shop.duckdb --table=orders \
    --data_dir=data/shop
  PGPASSWORD=... python -m data_prep.build_dataset --source=table \
    --connect=postgres://reader@db.example.com/shop --table=sales.orders --data_dir=data/shop

A table has no order. Its rows are read in the order of user, time, item and the other columns, so
that the same rows give the same dataset. Row numbers in messages count in that order.
"""

import contextlib
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ur4rec_jax.data.raw import interactions
from ur4rec_jax.data.raw.records import Raw
from ur4rec_jax.data.raw.selection import Selection
from ur4rec_jax.data.raw.texts import listed
from ur4rec_jax.errors import InputError, StorageError

_OF_FILES = ('delimiter', 'quoting')
PARAMETERS: Mapping[str, Any] = {
  'connect': None,
  'table': None,
  **{k: v for k, v in interactions.PARAMETERS.items() if k not in _OF_FILES},
}
_ROWS_AT_ONCE = 1 << 17  # Postgres gives Python objects, which take much memory.
_INSTALL = "pip install 'ur4rec-jax[tables]'"


def read(**parameters: Any) -> Raw:
  """Reads a table of a database, with the parameters `PARAMETERS`.

  Raises:
    InputError: the database, the table or a column does not exist or cannot be read.
    StorageError: the connection was lost.
  """
  options = {**interactions.PARAMETERS, **parameters}
  url, table = options.pop('connect'), options.pop('table')
  for name, value in (('connect', url), ('table', table)):
    if not value:
      raise InputError(f'--{name} is missing: --source=table reads a table of a database')
  name = f'{_without_secrets(url)} {table}'
  with _messages(url, name, 'correct --connect', is_connected=False):
    database = _open(url)
  try:
    with _messages(url, name, 'correct --table, or give the user the right to read it'):
      *schema, plain = table.rsplit('.', 1)
      _check_table(database, name, schema, plain)
      rows = database.table(plain, database=schema[0] if schema else None)
    names = tuple(rows.columns)

    def select(selection: Selection) -> Iterator[pa.Table]:
      roles = [selection.columns.get(role) for role in ('user', 'time', 'item', 'rating')]
      if roles[1] is None:
        raise InputError(
          f'{name}: a table has no order, so a column of times is needed; pass --time_column=NAME'
        )
      uses = list(selection.uses)
      keys = [*(role for role in roles if role in uses), *(x for x in uses if x not in roles)]
      wanted = rows.select(*uses).order_by(keys)
      with _messages(url, name, 'give the user the right to read it, or convert its columns'):
        batches = database.to_pyarrow_batches(wanted, chunk_size=_ROWS_AT_ONCE)
        for batch in batches:
          yield pa.Table.from_batches([batch])

    return interactions.read_parts(name, names, select, options)
  finally:
    with contextlib.suppress(Exception):  # Of a connection that is lost already.
      database.disconnect()


def _open(url: str) -> Any:
  import ibis  # An extra, and slow to import.

  scheme, _, rest = url.partition('://')
  if scheme != 'duckdb':
    return ibis.connect(url)
  if not Path(rest).is_file():
    raise InputError(f'{rest}: no such file; correct --connect')
  return ibis.duckdb.connect(rest, read_only=True)


def _check_table(database: Any, name: str, schema: list[str], table: str) -> None:
  there = database.list_tables(database=schema[0] if schema else None)
  if table not in there:
    raise InputError(f'{name}: no such table; there are {listed(sorted(there)) or "none"}')


def _without_secrets(url: str) -> str:
  try:
    parts = urllib.parse.urlsplit(url)
    if not parts.scheme:
      raise ValueError
  except ValueError:  # No `from`: the error would show the URL, which may hold a password.
    raise InputError(
      '--connect: must be like duckdb://FILE or postgres://USER@HOST/DATABASE'
    ) from None
  host = parts.netloc.rpartition('@')[2]
  return f'{parts.scheme}://{host}{parts.path}'


@contextlib.contextmanager
def _messages(url: str, name: str, way_out: str, is_connected: bool = True) -> Iterator[None]:
  """Turns the errors of any database into messages without the password."""
  try:
    yield
  except (InputError, StorageError, GeneratorExit):
    raise
  except ImportError as error:
    raise InputError(f'{error.name} is not installed; {_INSTALL}') from error
  except Exception as error:  # Each database has its own errors.
    reason = ' '.join(str(error).split()) or type(error).__name__
    for secret in filter(None, (url, urllib.parse.urlsplit(url).password)):
      reason = reason.replace(secret, '***').replace(urllib.parse.unquote(secret), '***')
    if is_connected and _is_lost(error):
      raise StorageError(
        f'{name}: the connection was lost ({reason}); start the command again when the database'
        ' answers'
      ) from error
    raise InputError(f'{name}: cannot be read ({reason}); {way_out}') from error


def _is_lost(error: Exception) -> bool:
  """Whether an error is of the connection; DB-API names such errors alike in all drivers."""
  return any(kind.__name__ in ('OperationalError', 'InterfaceError') for kind in type(error).mro())

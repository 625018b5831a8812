"""Reads tables that people give when they recommend: interactions of customers, and new goods."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from ur4rec_jax.data import column_names
from ur4rec_jax.errors import InputError

_OF_CUSTOMERS = ('user', 'item', 'time')
_NEEDED = ('user', 'item', 'item_id')
_KINDS = ('.csv', '.tsv', '.parquet', '.jsonl')


class Customers(NamedTuple):
  """The customers of a table of interactions.

  Attributes:
    names: `[users]` original ids, in the order of the table.
    offsets: `[users + 1]`, where the history of each customer begins in `codes`.
    codes: `[interactions]` indices into `items`, the oldest interaction of each customer first.
    items: distinct original ids of items.
    incomplete: number of rows without a customer or an item, which were left out.
  """

  names: list[str]
  offsets: np.ndarray
  codes: np.ndarray
  items: list[str]
  incomplete: int

  def history(self, user: int) -> list[str]:
    """Returns the original ids of a customer's items, the oldest first."""
    return [self.items[code] for code in self.codes[self.offsets[user] : self.offsets[user + 1]]]


class Good(NamedTuple):
  """One item of a table of goods.

  Attributes:
    name: original id.
    title: its title, '' without one.
    genres: its genres.
    description: its description, '' without one.
    image: file name or URL of its picture, '' without one.
  """

  name: str
  title: str
  genres: list[str]
  description: str
  image: str


def is_table(path: pathlib.Path) -> bool:
  """Tells whether the name of a file is that of a table that can be read."""
  return path.suffix.lower() in _KINDS


def read_customers(path: str | pathlib.Path, options: Mapping[str, Any]) -> Customers:
  """Reads the histories of all customers of a table.

  Args:
    path: a CSV, TSV, Parquet or JSON lines file with one row per interaction.
    options: the options of the prepared folder; columns that were named there are used here too.

  Raises:
    InputError: the file cannot be read, a column is missing, or the times have no order.
  """
  path = pathlib.Path(path)
  table = _read(path, '--histories', options.get('delimiter'))
  wanted = {role: options.get(f'{role}_column') for role in _OF_CUSTOMERS}
  columns = _columns(path, table.column_names, wanted)
  users, items = (_ids(path, table, columns[role]) for role in ('user', 'item'))
  is_whole = pc.and_(pc.is_valid(users), pc.is_valid(items))
  rows = np.flatnonzero(is_whole.to_numpy(zero_copy_only=False))
  if not len(rows):
    raise InputError(f'{path}: no row has both a customer and an item')
  user_names, user_codes = _codes(users.take(rows))
  item_names, item_codes = _codes(items.take(rows))
  keys = (user_codes,)
  if 'time' in columns:
    keys = _times(path, columns['time'], table[columns['time']].take(rows)), user_codes
  order = np.lexsort(keys)  # Stable: rows with equal times keep the order of the file.
  offsets = np.searchsorted(user_codes[order], np.arange(len(user_names) + 1))
  return Customers(user_names, offsets, item_codes[order], item_names, len(table) - len(rows))


def read_goods(path: str | pathlib.Path, options: Mapping[str, Any]) -> list[Good]:
  """Reads a table of goods.

  Args:
    path: a CSV, TSV, Parquet or JSON lines file with one row per item.
    options: the options of the prepared folder; columns that were named there are used here too.

  Raises:
    InputError: the file cannot be read, an id is missing or there twice, or no column has ids.
  """
  path = pathlib.Path(path)
  table = _read(path, '--add_items', None)
  wanted = {role: options.get(f'{role}_column') for role in column_names.ITEMS}
  columns = _columns(path, table.column_names, wanted)
  found = {role: _texts(table[name]) for role, name in columns.items()}
  ids = found.pop('item_id')
  if len(set(ids)) < len(ids) or not all(ids):
    twice = next((name for at, name in enumerate(ids) if not name or name in ids[:at]), '')
    raise InputError(f'{path}: an item has no id, or two have the same ({twice!r}); correct it')
  # The build stores these columns behind the description, each with its name before it.
  extra = [name for name in (options.get('text_columns') or '').split(',') if name]
  more = {name: _texts(table[name]) for name in extra if name in table.column_names}
  value = lambda role, at: found[role][at] if role in found else ''
  return [
    Good(
      name,
      value('title', at),
      [part.strip() for part in value('genres', at).split('|') if part.strip()],
      '\n'.join(
        filter(
          None,
          [value('description', at), *(f'{key}: {x[at]}' for key, x in more.items() if x[at])],
        )
      ),
      value('image', at),
    )
    for at, name in enumerate(ids)
  ]


def _read(path: pathlib.Path, flag: str, delimiter: str | None) -> pa.Table:
  if not path.is_file():
    raise InputError(f'{flag}={path}: no such file')
  kind = path.suffix.lower()
  try:
    if kind == '.parquet':
      return pq.read_table(path)
    if kind == '.jsonl':
      return pyarrow.json.read_json(path)
    if kind in ('.csv', '.tsv'):
      return _read_delimited(path, delimiter)
  except (pa.ArrowException, OSError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise InputError(f'{flag}={path}: cannot be read ({reason}); write it again') from error
  raise InputError(f'{flag}={path}: must be a file ending in {", ".join(_KINDS)}')


def _read_delimited(path: pathlib.Path, delimiter: str | None) -> pa.Table:
  """Reads all columns as text, so that ids such as 007 stay as they are."""
  with path.open(encoding='utf-8-sig') as file:
    header = file.readline()
  if delimiter is None:
    is_tsv = path.suffix.lower() == '.tsv'
    delimiter = '\t' if is_tsv else max(',;\t|', key=header.count)
  # TSV files are written without quotes, so that a quote in them is an ordinary character.
  quote = False if delimiter == '\t' else '"'
  parse = pyarrow.csv.ParseOptions(
    delimiter=delimiter, quote_char=quote, newlines_in_values=quote is not False
  )
  with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
    names = reader.schema.names
  convert = pyarrow.csv.ConvertOptions(
    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=['']
  )
  return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)


def _columns(
  path: pathlib.Path, present: Sequence[str], wanted: Mapping[str, str | None]
) -> dict[str, str]:
  """Returns the column of each role: the one that the build was told, else one of a usual name."""
  chosen: dict[str, str] = {}
  for role, name in wanted.items():
    if name in present or name == 'none':
      found = [name] if name in present else []
    else:
      found = column_names.find(role, [x for x in present if x not in chosen.values()])
    if len(found) > 1:
      raise InputError(f'{path}: {" and ".join(found)} may each be the {role}; leave one out')
    if found:
      chosen[role] = found[0]
    elif role in _NEEDED:
      raise InputError(
        f'{path}: no column is recognised as the {role}; its columns are {", ".join(present)};'
        f' rename one to {role}'
      )
  return chosen


def _ids(path: pathlib.Path, table: pa.Table, column: str) -> pa.Array:
  """Returns ids as text, null for a missing one."""
  try:
    ids = table[column].combine_chunks().cast(pa.string())
  except pa.ArrowException as error:
    kind = table[column].type
    raise InputError(f'{path}: {column} holds {kind}; ids are text or whole numbers') from error
  return pc.if_else(pc.equal(pc.utf8_trim_whitespace(ids), ''), None, ids)


def _codes(values: pa.Array) -> tuple[list[str], np.ndarray]:
  """Returns the distinct values, and the index of each value among them."""
  encoded = values.dictionary_encode()
  return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _times(path: pathlib.Path, column: str, values: pa.ChunkedArray) -> np.ndarray:
  """Returns numbers whose order is that of the times."""
  for kind in (pa.int64(), pa.float64(), pa.timestamp('us'), pa.timestamp('us', 'UTC')):
    try:
      times = values.cast(kind)
    except pa.ArrowException:
      continue
    if times.null_count:
      break
    return times.cast(pa.float64() if kind == pa.float64() else pa.int64()).to_numpy()
  raise InputError(
    f'{path}: {column} must hold a number or a date such as 2024-05-31 18:00:00 in every row;'
    ' correct it, or sort the rows by time and leave the column out'
  )


def _texts(column: pa.ChunkedArray) -> list[str]:
  """Returns the values as text, '' for none; the parts of a list are joined."""

  def text(value: Any) -> str:
    if isinstance(value, list):
      return '|'.join(filter(None, map(text, value)))
    return '' if value is None or value != value else str(value).strip()

  return [text(value) for value in column.to_pylist()]

"""Brings columns of any Arrow or pandas type to the few types that the readers work with."""

import datetime
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data.raw import tables
from ur4rec_jax.errors import InputError

_IDS = ('user', 'item')
# The texts that are plain numbers, and the type that keeps all of them.
_PLAIN = {
  'time': (r'^(0|-?[1-9]\d{0,17})$', pa.int64()),
  'rating': (r'^\d{1,4}(\.\d{1,2})?$', pa.float32()),
}


class Memory(NamedTuple):
  """A table in memory; `column` converts one of its columns."""

  name: str
  columns: Sequence[str]
  column: Callable[[str], pa.ChunkedArray]

  def select(self, columns: Sequence[str], optional: Collection[str] = ()) -> pa.Table:
    """Converts some columns.

    Args:
      columns: names of the columns.
      optional: names of those that are empty instead if Arrow cannot hold them.

    Raises:
      InputError: Arrow cannot hold a column, or its name is that of two columns.
    """
    tables.check_names(self.name, self.columns, columns)
    found = {}
    for name in columns:
      try:
        found[name] = self.column(name)
      except (pa.ArrowException, ValueError, TypeError) as error:
        if name in optional:
          continue
        if isinstance(error, InputError):  # It is a ValueError that has its message.
          raise
        raise _unusable(f'{self.name}: {name}', error) from error
    rows = len(next(iter(found.values()), ()))
    empty = pa.chunked_array([pa.nulls(rows)])
    return pa.table([found.get(name, empty) for name in columns], list(columns))


def in_memory(data: Any, name: str) -> Memory:
  """Opens any kind of table in memory; only the columns that are selected later are converted.

  Args:
    data: a pandas, Polars or Arrow table, or a HuggingFace `Dataset`.
    name: how messages call it.

  Raises:
    InputError: `data` is no table.
  """
  library = type(data).__module__.partition('.')[0]
  if library == 'pandas' and hasattr(data, 'iloc'):
    names = [str(column) for column in data.columns]
    column = lambda column: _of_pandas(data.iloc[:, names.index(column)], column, name)
    return Memory(name, names, column)
  if hasattr(data, 'with_format') and hasattr(data, 'features'):  # A HuggingFace dataset.
    return in_memory(data.with_format('arrow')[:], name)
  if library == 'polars' and hasattr(data, 'collect'):  # A query whose rows are not there yet.
    data = data.collect()
  if library == 'polars' and hasattr(data, 'select'):
    return Memory(name, data.columns, lambda column: pa.table(data.select(column))[0])
  if not hasattr(data, '__arrow_c_stream__'):
    raise InputError(
      f'{name} is of type {type(data).__name__}; pass a pandas DataFrame, a Polars or Arrow'
      ' table or a HuggingFace Dataset'
    )
  try:
    table = pa.table(data)
  except (pa.ArrowException, ValueError, TypeError) as error:
    raise _unusable(name, error) from error
  return Memory(name, table.column_names, table.column)


def _unusable(name: str, error: Exception) -> InputError:
  return InputError(f'{name}: cannot be read ({" ".join(str(error).split())}); convert it')


def _of_pandas(series: Any, column: str, name: str) -> pa.ChunkedArray:
  try:
    array = pa.array(series, from_pandas=True)
  except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
    values = series.astype(object).where(series.notna(), None).tolist()
    # Text and whole numbers side by side, as pandas reads some columns of ids and titles.
    if all(v is None or (isinstance(v, str | int) and not isinstance(v, bool)) for v in values):
      return pa.chunked_array([[None if v is None else str(v) for v in values]], pa.string())
    kinds = list(dict.fromkeys(type(v).__name__ for v in values if v is not None))
    if len(kinds) < 2:
      raise InputError(
        f'{name}: {column} holds values of type {kinds[0] if kinds else "none"}, which cannot be'
        f' read ({" ".join(str(error).split())}); convert the column'
      ) from error
    row = next(i for i, v in enumerate(values) if type(v).__name__ == kinds[1])
    raise InputError(
      f'{name}, row {row + 1}: {column} is a {kinds[1]}, other rows hold a {kinds[0]}; convert the'
      ' column to one type'
    ) from error
  if series.dtype == object and (pa.types.is_timestamp(array.type) or pa.types.is_date(array.type)):
    _check_moments(series.tolist(), column, name)
  return array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])


def _check_moments(values: Sequence[Any], column: str, name: str) -> None:
  """Refuses dates and times of several kinds, which Arrow reads as the kind of the first."""
  first = None
  for row, value in enumerate(values, 1):
    if not isinstance(value, datetime.date) or value != value:  # The latter is pandas' NaT.
      continue
    kind = 'a date'
    if isinstance(value, datetime.datetime):
      kind = 'a time with a zone' if value.tzinfo else 'a time without a zone'
    first = first or kind
    if kind != first:
      raise InputError(
        f'{name}, row {row}: {column} is {kind}, but {first} in other rows; convert the column to'
        ' one of them'
      )


def simplified(table: pa.Table, path: str, optional: Collection[str] = ()) -> pa.Table:
  """Decodes columns that are stored to save memory, and writes bytes and UUIDs as text.

  Args:
    table: columns in use.
    path: the file or table, for messages.
    optional: names of columns that are empty instead if they cannot be read.

  Raises:
    InputError: a column is of a type that cannot be read, such as lists.
  """
  found = []
  for name in table.column_names:
    try:
      found.append(_values(table[name], name, path))
    except InputError:
      if name not in optional:
        raise
      found.append(pa.chunked_array([pa.nulls(table.num_rows)]))
  return pa.table(found, table.column_names)


def encoded(table: pa.Table, columns: Mapping[str, str], path: str) -> pa.Table:
  """Renames the columns to their roles and brings them to few types.

  Users and items are dictionary-encoded, which stores each id once instead of once per row.

  Args:
    table: has the columns.
    columns: name of the column of each role.
    path: the file or table, for messages.

  Raises:
    InputError: a column is of a type that its role cannot have.
  """
  return pa.table(
    [
      (_ids if role in _IDS else _numbers)(table[name], name, path)
      for role, name in columns.items()
    ],
    list(columns),
  )


def _ids(column: pa.ChunkedArray, name: str, path: str) -> pa.ChunkedArray:
  column = _values(column, name, path)
  kind = column.type
  if pa.types.is_null(kind) or (pa.types.is_decimal(kind) and kind.scale <= 0):
    column = column.cast(pa.string())
  readable = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
  # Other numbers are encoded too, so that the check of the ids can name their row.
  others = (pa.types.is_floating, pa.types.is_boolean)
  if not any(fits(column.type) for fits in (*readable, *others)):
    raise InputError(
      f'{path}: {name} is of type {kind}; ids are text or whole numbers: convert the column'
    )
  return column.dictionary_encode()


def _numbers(column: pa.ChunkedArray, name: str, path: str) -> pa.ChunkedArray:
  column = _values(column, name, path)
  if not pa.types.is_decimal(column.type):
    return column
  try:
    return column.cast(pa.int64() if column.type.scale <= 0 else pa.float64())
  except pa.ArrowException as error:
    raise _unusable(f'{path}: {name}', error) from error


def _values(column: pa.ChunkedArray, name: str, path: str) -> pa.ChunkedArray:
  try:
    column = _decoded(column)
  except pa.ArrowException as error:
    raise _unusable(f'{path}: {name}', error) from error
  if pa.types.is_struct(column.type) and column.type.num_fields:
    fields = [field.name for field in column.type]
    raise InputError(
      f'{path}: {name} has records of {", ".join(fields)}; make columns of them, as flatten() of an'
      f' Arrow table does, and name one, such as {name}.{fields[0]}'
    )
  if pa.types.is_nested(column.type):
    raise InputError(
      f'{path}: {name} is of type {column.type}; write one row an interaction, with one value in'
      ' each column, not lists or records'
    )
  if isinstance(column.type, pa.BaseExtensionType) or pa.types.is_interval(column.type):
    raise InputError(
      f'{path}: {name} is of type {column.type}, which cannot be read; convert the column'
    )
  return column


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
  if not column.num_chunks and (
    pa.types.is_dictionary(column.type) or pa.types.is_run_end_encoded(column.type)
  ):
    column = pa.chunked_array([], column.type.value_type)
  if pa.types.is_dictionary(column.type):
    # Ids are encoded anew later, because categories of pandas may be in use nowhere.
    chunks: list[pa.Array] = []
    for chunk in column.chunks:
      values = _decoded(pa.chunked_array([chunk.dictionary]))
      if pa.types.is_string(values.type):
        values = values.cast(pa.large_string())  # All rows together may exceed 2 GiB.
      chunks += values.take(chunk.indices).chunks or [pa.array([], values.type)]
    return pa.chunked_array(chunks)
  if pa.types.is_run_end_encoded(column.type):
    column = pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks])
  kind = column.type
  if pa.types.is_string_view(kind):  # Polars gives this type.
    return column.cast(pa.large_string())
  if kind == pa.uuid():
    texts = [None if value is None else str(value) for value in column.to_pylist()]
    return pa.chunked_array([texts], pa.string())
  if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
    return column.cast(pa.decimal128(kind.precision, kind.scale))  # Arrow counts only wide ones.
  binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
  if pa.types.is_fixed_size_binary(kind) or any(fits(kind) for fits in binary):
    return column.cast(pa.large_binary()).cast(pa.large_string())  # Refused unless it is UTF-8.
  return column


def shortened(table: pa.Table) -> pa.Table:
  """Stores times and ratings as numbers where each of them is written in the plainest way.

  Numbers take less memory than texts, and tell the texts: `alike` restores them.

  Args:
    table: a table of `encoded` whose other columns than ids are texts.
  """
  for at, role in enumerate(table.column_names):
    column, (pattern, kind) = table[role], _PLAIN.get(role, ('', None))
    if kind is None or column.null_count or not pa.types.is_string(column.type):
      continue
    if pc.all(pc.match_substring_regex(column, pattern)).as_py():
      table = table.set_column(at, role, column.cast(kind))
  return table


def alike(parts: list[pa.Table]) -> list[pa.Table]:
  """Restores the texts of a column that is not `shortened` in all parts."""
  for role in _PLAIN.keys() & set(parts[0].column_names):
    if len({part[role].type for part in parts}) > 1:
      at = parts[0].column_names.index(role)
      parts = [part.set_column(at, role, part[role].cast(pa.string())) for part in parts]
  return parts


def joined(parts: list[pa.Table], paths: list[str]) -> pa.Table:
  """Joins encoded tables; a column gets the widest of its types.

  Args:
    parts: tables of `encoded`.
    paths: file of each part, for messages.

  Raises:
    InputError: the types of a column do not go together, such as text and numbers of times.
  """
  whole = [_joined([part[role] for part in parts], role, paths) for role in parts[0].column_names]
  return pa.table(whole, parts[0].column_names).unify_dictionaries()


def _joined(columns: list[pa.ChunkedArray], role: str, paths: list[str]) -> pa.ChunkedArray:
  types = [_value_type(column.type) for column in columns]
  chunks: list[pa.Array] = []
  at, kind = 0, types[0]
  try:
    for at in range(len(types)):
      kind = _common(kind, types[at], role)
    for at in range(len(types)):
      chunks += _cast(columns[at], kind).chunks
  except pa.ArrowException as error:
    raise InputError(
      f'{paths[at]}: the {role} is of type {types[at]}, but {types[0]} in {paths[0]}; export all'
      ' files with one type'
    ) from error
  is_encoded = pa.types.is_dictionary(columns[0].type)
  return pa.chunked_array(chunks, pa.dictionary(pa.int32(), kind) if is_encoded else kind)


def _value_type(kind: pa.DataType) -> pa.DataType:
  return kind.value_type if pa.types.is_dictionary(kind) else kind


def _common(one: pa.DataType, other: pa.DataType, role: str) -> pa.DataType:
  """Returns a type for the values of both; ArrowException if there is none."""
  kinds = {one, other}
  if len(kinds) == 1:
    return one
  is_text = lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)
  if role in _IDS and all(is_text(kind) or pa.types.is_integer(kind) for kind in kinds):
    return pa.large_string()  # All ids end as text.
  if pa.date32() in kinds or pa.date64() in kinds:
    # Arrow does not merge dates with timestamps; a date is midnight of its day.
    one, other = (pa.timestamp('s') if pa.types.is_date(kind) else kind for kind in (one, other))
  schemas = [pa.schema([(role, kind)]) for kind in (one, other)]
  return pa.unify_schemas(schemas, promote_options='permissive').field(0).type


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
  """Casts the values of a column, dictionary-encoded or not; ArrowException if one does not fit."""
  if not pa.types.is_dictionary(column.type):
    return column.cast(kind)
  chunks = [
    pa.DictionaryArray.from_arrays(chunk.indices, chunk.dictionary.cast(kind))
    for chunk in column.chunks
  ]
  return pa.chunked_array(chunks, pa.dictionary(column.type.index_type, kind))

"""Applies conditions, such as `quantity > 0 and status == 'paid'`, to the rows of a table."""

import contextlib
import datetime
import difflib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data.conditions import Comparison
from ur4rec_jax.data.raw import times
from ur4rec_jax.data.raw.records import Where
from ur4rec_jax.data.raw.tables import first_true, plain_numbers
from ur4rec_jax.data.raw.texts import listed
from ur4rec_jax.errors import InputError

_OPERATORS = {
  '==': pc.equal,
  '=': pc.equal,
  '!=': pc.not_equal,
  '<>': pc.not_equal,
  '<': pc.less,
  '<=': pc.less_equal,
  '>': pc.greater,
  '>=': pc.greater_equal,
}
NUMBER = r'^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$'
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def check_columns(comparisons: Sequence[Comparison], names: Sequence[str], path: str) -> None:
  """Raises an InputError if a comparison names a column that is not one of `names`."""
  for comparison in comparisons:
    if comparison.column not in names:
      near = difflib.get_close_matches(comparison.column, names, n=1)
      hint = f'; did you mean {near[0]}?' if near else f'; its columns are {listed(names)}'
      raise InputError(f'{path}: no column {comparison.column!r} (--where){hint}')


def holds(comparisons: Sequence[Comparison], table: pa.Table, where: Where) -> np.ndarray:
  """Tells which rows meet all comparisons; an empty value meets none.

  Args:
    comparisons: the condition.
    table: has the columns of all comparisons.
    where: returns the position of a row, for messages.

  Returns:
    `[rows]` bool.

  Raises:
    InputError: a value cannot be compared, e.g. a text with a number.
  """
  found = np.ones(table.num_rows, bool)
  for comparison in comparisons:
    column, value = _comparable(table[comparison.column], comparison, where)
    is_met = _OPERATORS[comparison.operator](column, value)
    found &= is_met.fill_null(False).to_numpy().astype(bool)
  return found


def as_numbers(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, int | None]:
  """Converts a column to numbers, null where it is empty; and the first row without a number."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if is_text(column.type):
    trimmed = _filled(column)
    odd = first_true(pc.invert(pc.match_substring_regex(trimmed, NUMBER)).fill_null(False))
    return (trimmed, odd) if odd is not None else (trimmed.cast(pa.float64()), None)
  if pa.types.is_floating(column.type):
    column = column.cast(pa.float64())
    return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column), None
  if pa.types.is_integer(column.type) or pa.types.is_null(column.type):
    return column.cast(pa.float64(), safe=False), None
  return (column.cast(pa.float64()), None) if pa.types.is_decimal(column.type) else (column, 0)


def _filled(column: pa.ChunkedArray) -> pa.ChunkedArray:
  """Spells the numbers of a column of texts as Arrow reads them, null where it is empty."""
  trimmed = plain_numbers(column)
  return pc.if_else(pc.equal(trimmed, ''), pa.scalar(None, trimmed.type), trimmed)


def is_text(kind: pa.DataType) -> bool:
  """Tells whether a type is one of Arrow's text types."""
  return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _comparable(
  column: pa.ChunkedArray, comparison: Comparison, where: Where
) -> tuple[pa.ChunkedArray, pa.Scalar]:
  """Converts a column and the value that it is compared with to one type."""
  name, _, value = comparison
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  kind = column.type
  if not isinstance(value, str):
    if pa.types.is_signed_integer(kind) and isinstance(value, int) and abs(value) < 2**63:
      return column.cast(pa.int64()), pa.scalar(value, pa.int64())
    numbers, odd = as_numbers(column)
    if odd is not None:
      raise InputError(
        f'{where(odd)}: {name} is {column[odd].as_py()!r}, which --where compares with the number'
        f' {value}; write decimals with a point, correct the row, or compare with a text in quotes'
      )
    if isinstance(value, int) and 2**53 <= abs(value) < 2**63:  # Floats round such ids.
      with contextlib.suppress(pa.ArrowInvalid):  # Not all numbers are integers of 64 bits.
        whole = (_filled(column) if is_text(kind) else column).cast(pa.int64())
        return whole, pa.scalar(value, pa.int64())
    return numbers, pa.scalar(float(value))
  if is_text(kind):
    column, wanted = column.cast(pa.large_string()), pa.scalar(value, pa.large_string())
    if times.is_date(value):
      return times.year_first(column), times.year_first(wanted)
    return column, wanted
  if pa.types.is_boolean(kind) and value.lower() in ('true', 'false'):
    return column, pa.scalar(value.lower() == 'true')
  if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
    try:
      at = datetime.datetime.fromisoformat(value)
    except ValueError as error:
      raise InputError(f'--where: {value!r} is no date like 2024-05-31; correct it') from error
    at = at if at.tzinfo else at.replace(tzinfo=datetime.UTC)
    ticks = (at - _EPOCH) // datetime.timedelta(microseconds=1)
    zone = kind.tz if pa.types.is_timestamp(kind) else None
    column = column.cast(pa.timestamp('us', zone), safe=False)
    return column.cast(pa.int64()), pa.scalar(ticks)
  raise InputError(
    f'{where(0)}: {name} is of type {kind}, which --where cannot compare with {value!r}; compare it'
    ' with a number, or convert the column'
  )

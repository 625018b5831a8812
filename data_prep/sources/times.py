"""Converts a column of times in any usual form to whole ticks."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.sources.tables import first_true
from ur4rec_jax.errors import InputError

# Unix times by their size: seconds reach 10^11 in the year 5138, milliseconds in 1973.
_UNITS = ((1, 'seconds'), (10**3, 'milliseconds'), (10**6, 'microseconds'), (10**9, 'nanoseconds'))
_LIMITS = np.array([10**11, 10**14, 10**17])
_NUMBER = r'^\s*[+-]?\d{1,19}\s*$'
_DECIMAL = r'^\s*[+-]?\d{1,11}\.\d*\s*$'
_DATE = r'^\d{4}-\d{2}-\d{2}'
_ZONE = r'[T ]\d{2}.*([Zz]|[+-]\d{2}(:?\d{2})?)$'
_FORMS = 'unix seconds, unix milliseconds, or ISO 8601 like 2024-05-31 or 2024-05-31T18:20:00Z'

Where = Callable[[int], str]


def parse(column: pa.ChunkedArray, name: str, where: Where) -> tuple[np.ndarray, int]:
  """Reads times.

  Args:
    column: text, numbers, dates or timestamps.
    name: of the column, for messages.
    where: tells the place of a row.

  Returns:
    `[rows]` int64 ticks since 1970 and how many of them are a second.

  Raises:
    InputError: a time is missing or cannot be read, or the column mixes units.
  """
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if column.null_count:
    row = first_true(pc.is_null(column))
    raise InputError(f'{where(row)}: {name} is empty; fill it in or remove the row')
  if pa.types.is_timestamp(column.type):
    ticks = {'s': 1, 'ms': 10**3, 'us': 10**6, 'ns': 10**9}[column.type.unit]
    return column.cast(pa.int64()).to_numpy(), ticks
  if pa.types.is_date(column.type):
    return column.cast(pa.timestamp('s')).cast(pa.int64()).to_numpy(), 1
  if pa.types.is_integer(column.type):
    return _unix(column.cast(pa.int64(), safe=False).to_numpy(), name, where)
  if pa.types.is_floating(column.type):
    return _decimal(column.to_numpy(), name, where)
  if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
    raise InputError(f'{where(0)}: {name} is of type {column.type}; times are {_FORMS}')
  return _text(column, name, where)


def _text(column: pa.ChunkedArray, name: str, where: Where) -> tuple[np.ndarray, int]:
  first = column[0].as_py()
  for pattern, type_, read in ((_NUMBER, pa.int64(), _unix), (_DECIMAL, pa.float64(), _decimal)):
    if pc.match_substring_regex(pa.scalar(first), pattern).as_py():
      both = pattern if read is _unix else f'{_NUMBER}|{_DECIMAL}'
      odd = first_true(pc.invert(pc.match_substring_regex(column, both)))
      if odd is not None and pc.match_substring_regex(column[odd], _DECIMAL).as_py():
        both, type_, read = f'{_NUMBER}|{_DECIMAL}', pa.float64(), _decimal
        odd = first_true(pc.invert(pc.match_substring_regex(column, both)))
      if odd is not None:
        raise _unlike(column, odd, name, where)
      try:
        values = pc.utf8_trim_whitespace(column).cast(type_).to_numpy()
      except pa.ArrowInvalid as error:  # The number does not fit in 64 bits.
        odd = next(row for row in range(len(column)) if abs(int(column[row].as_py())) >= 2**63)
        raise _unlike(column, odd, name, where) from error
      return read(values, name, where)
  odd = first_true(pc.invert(pc.match_substring_regex(column, _DATE)))
  if odd is not None:
    raise _unlike(column, odd, name, where)
  zoned = pc.match_substring_regex(column, _ZONE)
  has_zone = zoned[0].as_py()
  odd = first_true(pc.invert(zoned) if has_zone else zoned)
  if odd is not None:
    raise InputError(
      f'{where(odd)}: {name} is {column[odd].as_py()!r}, but {first!r} in {where(0)}: only one of'
      ' them has a time zone; write all times with their zone, or none'
    )
  try:
    parsed = column.cast(pa.timestamp('us', 'UTC' if has_zone else None))
  except pa.ArrowInvalid as error:
    odd = next(row for row in range(len(column)) if not _is_time(column[row], has_zone))
    raise _unlike(column, odd, name, where) from error
  ticks = parsed.cast(pa.int64()).to_numpy()
  if not (ticks % 10**6).any():
    return ticks // 10**6, 1
  return ticks, 10**6


def _is_time(value: pa.Scalar, has_zone: bool) -> bool:
  try:
    value.cast(pa.timestamp('us', 'UTC' if has_zone else None))
  except pa.ArrowInvalid:
    return False
  return True


def _unlike(column: pa.ChunkedArray, row: int, name: str, where: Where) -> InputError:
  value = column[row].as_py()
  if not value.strip():
    return InputError(f'{where(row)}: {name} is empty; fill it in or remove the row')
  also = f', unlike {column[0].as_py()!r} in {where(0)}' if row else ''
  return InputError(
    f'{where(row)}: {name} is {value!r}{also}; write all times of the column as one of {_FORMS}'
  )


def _unix(values: np.ndarray, name: str, where: Where) -> tuple[np.ndarray, int]:
  units = np.searchsorted(_LIMITS, np.abs(values), side='right')
  odd = np.flatnonzero(units != units[0])
  if odd.size:
    a, b = (f'{values[row]} ({_UNITS[units[row]][1]}?) in {where(row)}' for row in (0, odd[0]))
    raise InputError(f'{where(odd[0])}: {name} mixes units: {a}, {b}; write all times in one unit')
  if units[0] == 0 and _are_dates(values):
    raise InputError(
      f'{where(0)}: {name} is {values[0]}, which as unix time is in 1970, and looks like a date;'
      ' write it as YYYY-MM-DD'
    )
  return values, _UNITS[units[0]][0]


def _are_dates(values: np.ndarray) -> bool:
  """Whether all values are dates of eight digits, YYYYMMDD."""
  day, month, year = values % 100, values // 100 % 100, values // 10_000
  is_date = (day >= 1) & (day <= 31) & (month >= 1) & (month <= 12)
  return bool((is_date & (year >= 1900) & (year <= 2100)).all())


def _decimal(values: np.ndarray, name: str, where: Where) -> tuple[np.ndarray, int]:
  if not np.isfinite(values).all():
    row = int(np.argmin(np.isfinite(values)))
    raise InputError(f'{where(row)}: {name} is {values[row]}; fill it in or remove the row')
  whole = np.round(values)
  if (whole == values).all() and np.abs(values).max() < 2**53:
    return _unix(whole.astype(np.int64), name, where)
  if np.abs(values).max() >= _LIMITS[0]:
    row = int(np.argmax(np.abs(values) >= _LIMITS[0]))
    raise InputError(
      f'{where(row)}: {name} is {values[row]!r}: fractions are read with unix seconds only; write'
      ' all times in one unit, without fractions'
    )
  return np.round(values * 10**6).astype(np.int64), 10**6

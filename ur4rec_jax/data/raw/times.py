"""Converts a column of times in any usual form to whole ticks."""

import datetime
import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data.raw.records import Where
from ur4rec_jax.data.raw.tables import first_true, plain_numbers
from ur4rec_jax.errors import InputError

# Unix times by their size: seconds reach 10^11 in the year 5138, milliseconds in 1973.
_UNITS = ((1, 'seconds'), (10**3, 'milliseconds'), (10**6, 'microseconds'), (10**9, 'nanoseconds'))
_LIMITS = np.array([10**11, 10**14, 10**17])
# What follows the day in dates written as one number: nothing, hhmm, hhmmss, or also milliseconds.
_AFTER_DAY = {1: '', 10**4: ' hh:mm', 10**6: ' hh:mm:ss', 10**9: ' hh:mm:ss.sss'}
_NUMBER = r'^\s*[+-]?\d{1,19}\s*$'
_DECIMAL = r'^\s*[+-]?\d{1,11}\.\d*\s*$'
_DATE = r'^\d{4}-\d{2}-\d{2}'
# As in 31.12.2025 14:05. Between points the day always comes first; between slashes it may not.
DAY_FIRST = r'\d{1,2}\.\d{1,2}\.\d{4}(?:\D|$)'
_YEAR_FIRST = (
  (r'^(\d)\.', r'0\1.'),
  (r'^(\d{2}\.)(\d)\.', r'\10\2.'),
  (r'^(\d{2})\.(\d{2})\.(\d{4})(\D|$)', r'\3-\2-\1\4'),
  (r'^(\d{4}-\d{2}-\d{2} )(\d:)', r'\10\2'),
)
_ZONE = r'[T ]\d{2}.*([Zz]|[+-]\d{2}(:?\d{2})?)$'
# How databases write ISO 8601, and how Arrow reads it. Arrow knows nine digits of a fraction.
_SPELLINGS = (
  (r'(:\d{2}),(\d+)', r'\1.\2'),
  (r'(?i)(:\d{2}(?:\.\d+)?)\s*(?:UTC|GMT|Z)$', r'\1Z'),
  (r'(:\d{2}(?:\.\d+)?)\s+([+-]\d{2}(?::?\d{2})?)$', r'\1\2'),
  (r'(\.\d{9})\d+', r'\1'),
)
_NANOSECONDS = r'\.\d{7,9}(\D|$)'
_FORMS = (
  'unix seconds, unix milliseconds, ISO 8601 like 2024-05-31 or 2024-05-31T18:20:00Z, or days first'
  ' with points like 31.05.2024 18:20'
)
_WAY_OUT = 'fill it in, remove the row, or leave such rows out with --where'
_FEW, _MANY = 10, 10_000  # Fewer different times may be round by chance; more rows are not needed.
_FIRST_DATE, _LAST_DATE = 19_000_101, 21_001_231
_FIRST_UNIX = 10**8  # Seconds until March 1973; smaller numbers hardly are unix times.
_SERIALS = (32_874, 54_788)  # Days since 1899-12-30, as spreadsheets count: years 1990 to 2049.


class Times(NamedTuple):
  """A column of times.

  Attributes:
    ticks: `[rows]` int64 since 1970.
    ticks_per_second: unit of the ticks.
    hint: what may be wrong with the times, or None.
  """

  ticks: np.ndarray
  ticks_per_second: int
  hint: str | None = None


def parse(column: pa.ChunkedArray, name: str, where: Where) -> Times:
  """Reads times.

  Args:
    column: text, numbers, dates or timestamps.
    name: name of the column, for messages.
    where: returns the position of a row, for messages.

  Raises:
    InputError: a time is missing or cannot be read, the column mixes units, or its type holds no
      whole seconds.
  """
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if column.null_count:
    row = first_true(pc.is_null(column))
    raise InputError(f'{where(row)}: {name} is empty; {_WAY_OUT}')
  if pa.types.is_timestamp(column.type):
    ticks = {'s': 1, 'ms': 10**3, 'us': 10**6, 'ns': 10**9}[column.type.unit]
    return Times(column.cast(pa.int64()).to_numpy(), ticks)
  if pa.types.is_date(column.type):
    return Times(column.cast(pa.timestamp('s')).cast(pa.int64()).to_numpy(), 1)
  if pa.types.is_integer(column.type):
    times = _unix(column.cast(pa.int64(), safe=False).to_numpy(), name, where)
  elif pa.types.is_floating(column.type):
    values = column.to_numpy()
    _check_precision(values, name, where)
    times = _decimal(values.astype(np.float64), name, where)
  elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
    times = _text(column, name, where)
  else:
    raise InputError(f'{where(0)}: {name} is of type {column.type}; times are {_FORMS}')
  hint = _hint_about_serials(*times, name) or _hint_about_precision(*times, name)
  is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
  if is_number or re.match(f'{_NUMBER}|{_DECIMAL}', column[0].as_py()):
    hint = hint or _hint_about_size(*times, name)
  return Times(*times, hint)


def is_date(value: object) -> bool:
  """Whether a value is a date or a datetime, by its type or as a text that `parse` reads."""
  return isinstance(value, datetime.date) or (
    isinstance(value, str) and bool(re.match(f'{_DATE}|{DAY_FIRST}', value.strip()))
  )


def year_first(texts: pa.ChunkedArray | pa.Scalar) -> pa.ChunkedArray | pa.Scalar:
  """Writes dates such as 31.12.2025 as 2025-12-31, so that their order is that of the texts."""
  for pattern, replacement in _YEAR_FIRST:
    texts = pc.replace_substring_regex(texts, pattern, replacement)
  return texts


def plain_unit(smallest: int, largest: int) -> int | None:
  """Returns the ticks per second of unix times that are whole numbers, if they raise no question.

  Args:
    smallest: the smallest of their absolute values.
    largest: the largest one.

  Returns:
    None if they may have several units, or may be dates written as numbers.
  """
  units = np.searchsorted(_LIMITS, [smallest, largest], side='right')
  may_be_dates = any(
    smallest // after <= _LAST_DATE and largest // after >= _FIRST_DATE for after in _AFTER_DAY
  )
  are_small = smallest > 1 and largest < _FIRST_UNIX
  if units[0] != units[1] or may_be_dates or are_small:
    return None
  return _UNITS[units[0]][0]


def _check_precision(values: np.ndarray, name: str, where: Where) -> None:
  """Refuses types whose numbers are too far apart to tell such times apart."""
  bits = np.finfo(values.dtype).nmant + 1
  most = float(np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max())
  if bits > 32 or most < 2**bits:
    return
  kind = {2: 'float16 (half precision)', 4: 'float32 (single precision)'}[values.itemsize]
  step = float(np.spacing(values.dtype.type(most)))
  row = int(np.argmax(np.abs(values)))
  raise InputError(
    f'{where(row)}: {name} is of type {kind}, whose numbers are {step:,g} apart at {most:.0f}, so'
    ' the order of the rows is lost; export the column again as whole numbers (int64) or float64'
  )


def _hint_about_precision(ticks: np.ndarray, ticks_per_second: int, name: str) -> str | None:
  """Tells whether all times look as if they had been single-precision numbers on their way."""
  if np.abs(ticks).max() < 2**24 or not np.array_equal(
    ticks.astype(np.float32).astype(np.int64), ticks
  ):
    return None
  # Whole days in seconds are such numbers, too, in any time zone.
  is_whole_days = ticks_per_second == 1 and not np.diff(ticks[:_MANY] % 86_400).any()
  if is_whole_days or len(np.unique(ticks[:_MANY])) < _FEW:
    return None
  return (
    f'all values of {name} are numbers that float32 (single precision) can hold, such as'
    f' {ticks[0]}; if the column was float32 once, the order of near rows is lost: export it again'
    ' as whole numbers'
  )


def _hint_about_serials(ticks: np.ndarray, ticks_per_second: int, name: str) -> str | None:
  """Tells whether all times look like the days that spreadsheets store as dates."""
  first, last = (value * ticks_per_second for value in _SERIALS)
  if ticks.min() < first or ticks.max() >= last + ticks_per_second:
    return None
  number = int(ticks[0]) / ticks_per_second
  day = np.datetime64('1899-12-30') + int(number)
  return (
    f'all values of {name} are numbers such as {number:.12g}, which as unix time is in 1970, and as'
    f' a date of a spreadsheet is {day}; if it is that, the order is right, but the dates are not:'
    ' format the column as YYYY-MM-DD hh:mm:ss and export it again'
  )


def _hint_about_size(ticks: np.ndarray, ticks_per_second: int, name: str) -> str | None:
  """Tells whether the numbers are too small for unix times, and do not count from 0 or 1."""
  last = int(ticks.max())
  if ticks.min() <= ticks_per_second or last >= _FIRST_UNIX * ticks_per_second:
    return None
  return (
    f'no value of {name} is above {last / ticks_per_second:.12g}, which as unix time is in'
    f' {np.datetime64(last // ticks_per_second, "s").astype("datetime64[Y]")}; if the numbers are'
    ' something else, such as days or seconds since a start, or a month and a day, the dates are'
    ' wrong: choose another column, or write the times as YYYY-MM-DD hh:mm:ss'
  )


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
        # One chunk at a time, because the copies of all texts would take much memory.
        chunks = [plain_numbers(chunk).cast(type_) for chunk in column.chunks]
        values = pa.chunked_array(chunks, type_).to_numpy()
      except pa.ArrowInvalid as error:  # The number does not fit in 64 bits.
        fits = lambda row: -(2**63) <= float(column[row].as_py()) < 2**63
        odd = next((row for row in range(len(column)) if not fits(row)), 0)
        raise _unlike(column, odd, name, where) from error
      return read(values, name, where)
  return _iso(column, name, where)


def _iso(column: pa.ChunkedArray, name: str, where: Where) -> tuple[np.ndarray, int]:
  texts = pc.utf8_trim_whitespace(column)
  is_day_first = bool(re.match(DAY_FIRST, texts[0].as_py()))
  date = f'^{DAY_FIRST}' if is_day_first else _DATE
  odd = first_true(pc.invert(pc.match_substring_regex(texts, date)))
  if odd is not None:
    raise _unlike(column, odd, name, where)
  if is_day_first:
    texts = year_first(texts)
  for pattern, replacement in _SPELLINGS:
    texts = pc.replace_substring_regex(texts, pattern, replacement)
  zoned = pc.match_substring_regex(texts, _ZONE)
  has_zone = zoned[0].as_py()
  odd = first_true(pc.invert(zoned) if has_zone else zoned)
  if odd is not None:
    raise InputError(
      f'{where(odd)}: {name} is {column[odd].as_py()!r}, but {column[0].as_py()!r} in {where(0)}:'
      ' only one of them has a time zone; write all times with their zone, or none'
    )
  has_nanoseconds = pc.any(pc.match_substring_regex(texts, _NANOSECONDS)).as_py()
  unit, per_second = ('ns', 10**9) if has_nanoseconds else ('us', 10**6)
  kind = pa.timestamp(unit, 'UTC' if has_zone else None)
  try:
    ticks = texts.cast(kind).cast(pa.int64()).to_numpy()
  except pa.ArrowInvalid as error:
    odd = next(row for row in range(len(texts)) if not _is_time(texts[row], kind))
    raise _unlike(column, odd, name, where) from error
  if not (ticks % per_second).any():
    return ticks // per_second, 1
  return ticks, per_second


def _is_time(value: pa.Scalar, kind: pa.DataType) -> bool:
  try:
    value.cast(kind)
  except pa.ArrowInvalid:
    return False
  return True


def _unlike(column: pa.ChunkedArray, row: int, name: str, where: Where) -> InputError:
  value = column[row].as_py()
  if not value.strip():
    return InputError(f'{where(row)}: {name} is empty; {_WAY_OUT}')
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
  per_second = _UNITS[units[0]][0]
  for after, more in _AFTER_DAY.items():
    # Not all of them, because some programs write 0 for a date that they do not have.
    are_dates = _are_dates(values[:_MANY] // after)
    if are_dates.mean() >= 0.5:
      row = int(np.argmax(are_dates))
      year = np.datetime64(int(values[row]) // per_second, 's').astype('datetime64[Y]')
      raise InputError(
        f'{where(row)}: {name} is {values[row]}, which as unix time is in {year}, and looks like a'
        f' date; write it as YYYY-MM-DD{more}'
      )
  return values, per_second


def _are_dates(values: np.ndarray) -> np.ndarray:
  """Tells which values are dates of eight digits, YYYYMMDD: `[values]` bool."""
  day, month = values % 100, values // 100 % 100
  is_date = (day >= 1) & (day <= 31) & (month >= 1) & (month <= 12)
  return is_date & (values >= _FIRST_DATE) & (values <= _LAST_DATE)


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

"""Reads ids, and says which of them were probably damaged on their way into the file."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data.raw.records import Where
from ur4rec_jax.data.raw.texts import shown
from ur4rec_jax.errors import InputError

# Values of --clean_ids. Each one undoes one kind of damage.
BLANKS, DECIMALS, MISSING, EMPTY = CLEANINGS = ('blanks', 'decimals', 'missing', 'empty')
ALL = 'all'
ROUNDED, LISTS = 'rounded', 'lists'  # Other damages, which nothing undoes.
# What programs write for a value that they do not have, in lower case.
_NO_ID = r'^(null|nan|none|nil|nat|n/a|na|#n/a|<na>|\(null\)|undefined|\\n)$'
_DECIMAL = r'^([+-]?\d+)\.0+$'
_EXPONENT = r'^[+-]?\d([.,]\d*)?[eE]\+\d+$'  # Spreadsheets write 4006381333931 as 4.00638E+12.
# Several codes in one field, such as [12, 7] or N55189 N42782.
LIST = r'^[\[("]*[^\s,;|]*\d[^\s,;|]*([\s,;|]+[^\s,;|]*\d[^\s,;|]*)+$'
_NULL = pa.nulls(1, pa.string())[0]  # `pa.scalar(None)` would import pandas.
_CONTROL = r'[\x00-\x1f\x7f]'


class Ids(NamedTuple):
  """The ids of one column.

  Attributes:
    ids: `[rows]` dictionary-encoded, null where there is no id; no entry of the dictionary is
      double.
    is_missing: `[rows]` bool, rows without an id.
    found: what the ids look like before they are cleaned: for each of `CLEANINGS`, `ROUNDED` and
      `LISTS`, in words.
  """

  ids: pa.DictionaryArray
  is_missing: np.ndarray
  found: dict[str, str]


class _Column(NamedTuple):
  """The rows of a column whose ids are in a dictionary.

  Attributes:
    name: name of the column, for messages.
    where: returns the position of a row, for messages.
    indices: `[rows]` entry of the dictionary, 0 for a row without an id.
    is_present: `[rows]` bool, rows with an id.
  """

  name: str
  where: Where
  indices: np.ndarray
  is_present: np.ndarray

  def first_with(self, is_wanted: np.ndarray) -> int | None:
    """Returns the first row with one of the entries `[dictionary]`, or None."""
    if not is_wanted.any():
      return None
    rows = np.flatnonzero(self.is_present & is_wanted[self.indices])
    return int(rows[0]) if rows.size else None


def parse_cleanings(value: str | None) -> frozenset[str]:
  """Reads `--clean_ids`: some of `CLEANINGS`, separated by commas, or `all`."""
  wanted = [name.strip() for name in (value or '').split(',') if name.strip()]
  if wanted == [ALL]:
    return frozenset(CLEANINGS)
  for name in wanted:
    if name not in CLEANINGS:
      raise InputError(
        f'--clean_ids={value}: {name!r} is none of {", ".join(CLEANINGS)}; give some of them with'
        f' commas between them, or {ALL}'
      )
  return frozenset(wanted)


def clean(names: pa.Array, cleanings: Collection[str]) -> pa.Array:
  """Cleans ids; an id that says that there is none becomes null.

  Args:
    names: `[names]` text.
    cleanings: some of `CLEANINGS`.
  """
  if BLANKS in cleanings:
    names = pc.utf8_trim_whitespace(names)
  if DECIMALS in cleanings:
    names = pc.replace_substring_regex(names, _DECIMAL, r'\1')
  if MISSING in cleanings:
    names = pc.if_else(_says_missing(names), _NULL, names)
  if MISSING in cleanings or EMPTY in cleanings:
    names = pc.if_else(_is_blank(names), _NULL, names)
  return names


def clean_table(table: Mapping[str, object], cleanings: Collection[str]) -> dict[str, object]:
  """Cleans the ids of an item table; rows without an id are left out.

  Raises:
    InputError: two items have the same id after that.
  """
  cleaned: dict[str, object] = {}
  before: dict[str, str] = {}
  names = clean(pa.array(list(table), pa.string()), cleanings).to_pylist()
  for (old, item), name in zip(table.items(), names, strict=True):
    if name is None:
      continue
    if name in cleaned:
      raise InputError(
        f'the item table has {before[name]!r} and {old!r}, which --clean_ids makes one item; remove'
        ' one of the two'
      )
    cleaned[name], before[name] = item, old
  return cleaned


def read(column: pa.ChunkedArray, name: str, where: Where, cleanings: Collection[str]) -> Ids:
  """Checks and cleans ids: text or whole numbers, none empty.

  Args:
    column: `[rows]` dictionary-encoded.
    name: name of the column, for messages.
    where: returns the position of a row, for messages.
    cleanings: some of `CLEANINGS`.

  Raises:
    InputError: the column is of another type, or an id is empty or no text on one line.
  """
  encoded = column.combine_chunks()
  if isinstance(encoded, pa.ChunkedArray):
    encoded = encoded.chunk(0)
  present = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
  indices = np.asarray(encoded.indices.fill_null(0))
  rows_of = _Column(name, where, indices, present)
  names = _as_text(encoded.dictionary, rows_of, cleanings)
  # A null in the dictionary is a missing id as well as a null in the column.
  present &= names.is_valid().to_numpy(zero_copy_only=False)[indices] if len(names) else False
  names = names.fill_null('')
  is_blank = _is_blank(names)
  if MISSING not in cleanings and EMPTY not in cleanings:
    if not present.all():
      raise InputError(f'{where(int(np.argmin(present)))}: {name} is empty; {_WAY_OUT}')
    _refuse(names, is_blank, rows_of, 'is empty', _WAY_OUT)
  is_broken = pc.and_not(pc.match_substring_regex(names, _CONTROL), is_blank)
  _refuse(names, is_broken, rows_of, 'is no text on one line', 'correct it or remove the row')
  found = _describe(names, np.bincount(indices[present], minlength=len(names)))
  cleaned = clean(names, cleanings)
  unique = cleaned.dictionary_encode()
  new = np.asarray(unique.indices.fill_null(-1))
  rows = np.full(len(present), -1, np.int32)
  if len(new):
    rows[present] = new[indices[present]]
  is_missing = rows < 0
  encoded = pa.DictionaryArray.from_arrays(
    pa.array(rows, pa.int32(), mask=is_missing), unique.dictionary
  )
  return Ids(encoded, is_missing, found)


def are_sound(names: pa.Array) -> bool:
  """Whether distinct ids, as text, need no cleaning, and none of them is empty or no text."""
  is_bad = pc.or_(_is_blank(names), pc.match_substring_regex(names, _CONTROL))
  return not pc.any(is_bad).as_py() and not _describe(names, np.ones(len(names), np.int64))


def compact(ids: pa.DictionaryArray) -> pa.DictionaryArray:
  """Leaves out the entries of a dictionary that no row has; no row may be null."""
  indices = np.asarray(ids.indices)
  used = np.flatnonzero(np.bincount(indices, minlength=len(ids.dictionary)))
  if len(used) == len(ids.dictionary):
    return ids
  new = np.zeros(len(ids.dictionary), np.int32)
  new[used] = np.arange(len(used))
  return pa.DictionaryArray.from_arrays(pa.array(new[indices]), ids.dictionary.take(pa.array(used)))


_WAY_OUT = f'fill it in, remove the row, or leave such rows out with --clean_ids={MISSING}'


def _as_text(names: pa.Array, column: _Column, cleanings: Collection[str]) -> pa.Array:
  """Writes the entries of a dictionary as text; InputError if they are no ids."""
  kind = names.type
  is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
  if pa.types.is_integer(kind) or is_text or pa.types.is_null(kind):
    return names.cast(pa.string())
  if not pa.types.is_floating(kind) or DECIMALS not in cleanings:
    way_out = 'convert the column'
    if pa.types.is_floating(kind):
      way_out += f', or pass --clean_ids={DECIMALS} if all of them are whole numbers'
    raise InputError(
      f'{column.where(0)}: {column.name} is of type {kind}; ids are text or whole numbers:'
      f' {way_out}'
    )
  # pandas makes whole numbers floats where one of them is missing.
  values = names.to_numpy(zero_copy_only=False).astype(np.float64)
  exact = 2 ** (np.finfo(kind.to_pandas_dtype()).nmant + 1)
  odd = ~np.isnan(values) & ((values != np.round(values)) | (np.abs(values) >= exact))
  if (row := column.first_with(odd)) is not None:
    value = float(values[column.indices[row]])
    raise InputError(
      f'{column.where(row)}: {column.name} is {value!r}, and {kind} holds no such id exactly; ids'
      ' are text or whole numbers: convert the column'
    )
  whole = pa.array(np.nan_to_num(values).astype(np.int64)).cast(pa.string())
  return pc.if_else(pa.array(np.isnan(values)), _NULL, whole)


def _refuse(names: pa.Array, is_bad: pa.Array, column: _Column, fault: str, way_out: str) -> None:
  """Raises InputError for the first row whose id is bad."""
  row = column.first_with(is_bad.to_numpy(zero_copy_only=False))
  if row is not None:
    value = names[int(column.indices[row])].as_py()
    example = f': {shown(value)}' if value else ''
    raise InputError(f'{column.where(row)}: {column.name} {fault}{example}; {way_out}')


def _is_blank(names: pa.Array) -> pa.Array:
  return pc.equal(pc.utf8_trim_whitespace(names), '')


def _says_missing(names: pa.Array) -> pa.Array:
  return pc.match_substring_regex(pc.utf8_lower(pc.utf8_trim_whitespace(names)), _NO_ID)


def _describe(names: pa.Array, counts: np.ndarray) -> dict[str, str]:
  """Describes ids that look damaged, with their number and an example."""
  is_used = pa.array(counts > 0)
  select = lambda mask: np.flatnonzero(pc.and_(mask, is_used).to_numpy(zero_copy_only=False))
  example = lambda at: shown(names[int(at[0])].as_py())
  found = {}
  trimmed = pc.utf8_trim_whitespace(names)
  if (at := select(pc.not_equal(trimmed, names))).size:
    found[BLANKS] = f'{at.size:,} such as {example(at)}'
  if (at := select(pc.match_substring_regex(trimmed, _DECIMAL))).size:
    plain = pc.replace_substring_regex(trimmed.take(pa.array(at)), _DECIMAL, r'\1')
    both = pc.sum(pc.is_in(plain, names.filter(is_used))).as_py()
    found[DECIMALS] = f'{at.size:,} such as {example(at)}, {both:,} of them also without .0'
  if (at := select(_says_missing(names))).size:
    found[MISSING] = f'{example(at)} in {int(counts[at].sum()):,} rows'
  if (at := select(pc.match_substring_regex(trimmed, _EXPONENT))).size:
    found[ROUNDED] = f'{example(at)} in {int(counts[at].sum()):,} rows'
  at = select(pc.match_substring_regex(trimmed, LIST))
  if 2 * at.size > np.count_nonzero(counts):
    found[LISTS] = f'{at.size:,} such as {example(at)}'
  return found

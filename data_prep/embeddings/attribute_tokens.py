"""Encodes columns of an item table, names and numbers, into one token per item.

Sentence encoders say little about names: two films with the same actor, or two products of one
brand, get hardly more similar vectors than others. Here every name has its own direction.
"""

import collections
import contextlib
import datetime
import functools
import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.embeddings.feature_files import Row, Source
from data_prep.embeddings.imported_tokens import original_ids
from ur4rec_jax.data.raw import items
from ur4rec_jax.data.raw.texts import shown
from ur4rec_jax.errors import InputError, say

NAME_WIDTH = 96  # Random sign vectors of this width are almost orthogonal.
_BUMPS = 9  # Reference points that a number is compared with.
_LIKE_NUMBER = re.compile(r'\W{0,3}\d[\d.,]*\W{0,3}[A-Za-z]{0,3}')  # With a comma, or a currency.


def source(
  data_dir: str | Path, of: str, path: str | Path, columns: Sequence[str], id_column: str | None
) -> tuple[Source, int]:
  """Reads columns of a table and joins them with a prepared folder.

  A column of numbers or dates is encoded by rank: nine values tell how close the rank is to nine
  reference points. Every other column holds names: a list, nested or not, or a text separated by
  `|`, or by commas followed by a blank. Each name has random signs that depend only on column and
  name. The names of a row are summed, rare names with more weight, and scaled to length 1.

  Args:
    data_dir: prepared folder.
    of: `item` or `user`.
    path: table in CSV, TSV, Parquet or JSON lines.
    columns: columns to encode.
    id_column: column of original ids; None recognises it by name.

  Returns:
    The rows to encode, and the number of ids that are not in the dataset.

  Raises:
    InputError: the table cannot be read, or a value in it is wrong.
  """
  path = Path(path)
  values = _read(path, columns, id_column)
  names = original_ids(data_dir, of)
  known = sum(name in values for name in names)
  if not known:
    raise InputError(
      f'{path}: none of its {len(values):,} ids, first {next(iter(values))!r}, is one of the {of}s'
      f' of {data_dir}, first {names[0]!r}; give attributes by the ids of the raw data'
    )
  # Rows of unknown items are left out, so that a larger table gives the same vectors.
  found = [values.get(name, [None] * len(columns)) for name in names]
  parts = [_column(column, [row[at] for row in found], path) for at, column in enumerate(columns)]
  vectors = np.concatenate(parts, axis=1)

  def rows() -> Iterator[Row]:
    for name, vector in zip(names, vectors, strict=True):
      if name not in values:
        yield Row(name, None, reason=f'not in {path.name}')
      elif not vector.any():
        yield Row(name, None, reason=f'nothing in {", ".join(columns)}')
      else:
        # The weight of a name depends on all rows, so the key has to cover the whole vector.
        yield Row(name, vector, vector.tobytes())

  info = {
    'encoder': {
      'name': f'attributes {", ".join(columns)} of {path.name}',
      'is_builtin': False,
      'columns': list(columns),
      'widths': [part.shape[1] for part in parts],
    },
    'is_mock': False,
    'token_meaning': {'0': 'the columns side by side'},
  }
  width = vectors.shape[1]
  encode = functools.partial(_encode, width)
  return Source(str(path), info, len(names), 1, width, rows, encode), len(values) - known


def _encode(
  width: int, rows: list[Row], advance: Callable[[float], object]
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  mask = np.array([[row.content is not None] for row in rows])
  tokens = np.zeros((len(rows), 1, width), np.float32)
  for at in np.flatnonzero(mask):
    tokens[at, 0] = rows[at].content
  advance(len(rows))
  return tokens, mask, {}


def _read(path: Path, columns: Sequence[str], id_column: str | None) -> dict[str, list[Any]]:
  """Reads the values of the columns by original id."""
  table = items.open_table(path)
  for name in columns:
    if name not in table.columns:
      raise InputError(f'{path}: no column {name!r} (--columns); it has {", ".join(table.columns)}')
  id_column = items.id_column(path, table.columns, id_column)
  values: dict[str, list[Any]] = {}
  for place, row in table.rows([id_column, *columns]):
    where = str(place)
    name = items.original_id(row.get(id_column), id_column, where)
    if name in values:
      raise InputError(f'{where}: {name!r} is in the table twice; remove one of the two')
    values[name] = [row.get(column) for column in columns]
  if not values:
    raise InputError(f'{path}: no rows in the table; export it again')
  return values


def _column(column: str, values: list[Any], path: Path) -> np.ndarray:
  """`[rows, width]` float32 of one column, zeros where it is empty."""
  numbers = _numbers(values)
  if numbers is not None:
    return _places(numbers)
  _tell_numbers(column, values, path)
  found = [names_of(value) for value in values]
  count = collections.Counter(name for row in found for name in row)
  if not count:
    raise InputError(f'{path}: {column!r} says nothing of any item; leave it out of --columns')
  signs = {name: _signs(column, name) for name in count}
  vectors = np.zeros((len(values), NAME_WIDTH), np.float32)
  for vector, row in zip(vectors, found, strict=True):
    for name in row:
      vector += math.log(1 + len(values) / count[name]) * signs[name]
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _tell_numbers(column: str, values: list[Any], path: Path) -> None:
  """Prints a note if most values of a column of names look like numbers."""
  texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
  like_numbers = [value for value in texts if _LIKE_NUMBER.fullmatch(value)]
  odd = next((value for value in texts if _numbers([value]) is None), None)
  if odd and 2 * len(like_numbers) > len(texts):
    say(
      f'note: {path}: {column} counts as names, not as numbers, because {shown(odd)} is no number;'
      ' if it should be, write all numbers like 3.50, and leave unknown ones empty',
      sys.stderr,
    )


def names_of(value: Any) -> list[str]:
  """Returns the distinct names in a cell, in lower case."""
  if isinstance(value, list | tuple):
    found: Iterable[str] = (name for part in value for name in names_of(part))
  else:
    found = (' '.join(part.split()).casefold() for part in re.split(r'\||,\s', items.text(value)))
  return list(dict.fromkeys(filter(None, found)))


def _numbers(values: list[Any]) -> np.ndarray | None:
  """`[rows]` float64, NaN where there is none; None if anything is no number and no date."""
  numbers = np.full(len(values), np.nan)
  if any(isinstance(value, bool | list | tuple | dict) for value in values):
    return None
  texts = [items.text(value) for value in values]
  for read in (_day, float):  # A value that fits both, such as 20240531, is a number.
    with contextlib.suppress(ValueError):
      numbers[:] = [read(text) if text else np.nan for text in texts]
  numbers[np.isinf(numbers)] = np.nan
  return numbers if np.isfinite(numbers).any() else None


def _day(text: str) -> int:
  """Converts a date (1995-01-31, or 31-Jan-1995 as in MovieLens) to days; else ValueError."""
  try:
    return datetime.date.fromisoformat(text[:10]).toordinal()
  except ValueError:
    return datetime.datetime.strptime(text, '%d-%b-%Y').toordinal()


def _places(numbers: np.ndarray) -> np.ndarray:
  """How near numbers are to some, in order: `[rows, bumps]` float32 of length 1, zeros for NaN."""
  is_there = np.isfinite(numbers)
  known = np.sort(numbers[is_there])
  ends = [np.searchsorted(known, numbers, side) for side in ('left', 'right')]
  place = (ends[0] + ends[1]) / 2 / len(known)  # Equal numbers get the same rank.
  bumps = np.exp(-0.5 * ((place[:, None] - np.linspace(0, 1, _BUMPS)) * (_BUMPS - 1)) ** 2)
  bumps /= np.linalg.norm(bumps, axis=1, keepdims=True)
  return np.where(is_there[:, None], bumps, 0).astype(np.float32)


def _signs(column: str, name: str) -> np.ndarray:
  """`[NAME_WIDTH]` of length 1, the same in every run."""
  digest = hashlib.shake_256(f'{column}\0{name}'.encode()).digest(NAME_WIDTH // 8)
  bits = np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32)
  return (2 * bits - 1) / math.sqrt(NAME_WIDTH)

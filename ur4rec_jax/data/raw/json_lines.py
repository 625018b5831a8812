"""Reads files with one JSON object a line, as Python objects or as Arrow columns of text.

Arrow's own parser is not used, because it rounds large numbers and gives a column one type.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ur4rec_jax.data.raw.records import Place
from ur4rec_jax.data.raw.texts import shown, utf8_lines
from ur4rec_jax.errors import InputError

KINDS = ('.jsonl', '.ndjson', '.json')
_DEEPEST = 50  # Levels of lists and objects in a line.
# Limits of a batch; whichever is reached first ends it.
_BATCH_ROWS, _BATCH_CHARACTERS = 1 << 14, 1 << 24
_AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
_WORDS = {None: '', True: 'true', False: 'false'}
_NESTED = {list: pa.list_(pa.string()), dict: pa.struct([])}
# With more keys than this, objects map ids to values, and the keys in them are no columns.
_MOST_COLUMNS = 1000
_LONGEST_NAME = 200  # Characters of the name of a key in an object, such as `user.address.city`.


def read(path: Path, as_written: bool = False) -> Iterator[tuple[Place, dict[str, Any]]]:
  """Yields the objects of a file with their positions.

  Args:
    path: the file, `.gz` or not.
    as_written: whether numbers are texts, as they are written in the file.

  Raises:
    InputError: a line is no JSON object.
  """
  decode = _AS_WRITTEN.decode if as_written else json.loads
  for number, line in utf8_lines(path):
    try:
      row = decode(line)
      if not as_written:
        _check_depth(row)
    except (ValueError, RecursionError) as error:
      raise _fault(path, number, line, f'is no JSON ({error})') from error
    if not isinstance(row, dict):
      raise _fault(path, number, line, 'is no JSON object')
    yield Place(str(path), number), row


def columns(path: Path) -> dict[str, pa.DataType]:
  """Returns the keys of all objects of a file with their types; one nested value makes it nested.

  A key that has objects alone is replaced by the keys in them, with names such as `user.id`.

  Raises:
    InputError: a line is no JSON object.
  """
  kinds: dict[str, set[type]] = {}
  own: dict[str, None] = {}
  for _, row in read(path, as_written=True):
    own.update(dict.fromkeys(row))
    # They are counted line by line, so that maps with ever new keys take no memory.
    for name, value in _keys(row) if len(kinds) <= _MOST_COLUMNS else row.items():
      kinds.setdefault(name, set()).add(type(value))
  if len(kinds) > _MOST_COLUMNS:
    kinds = {name: kinds[name] for name in own}
  else:
    kinds = {name: found for name, found in kinds.items() if found - {type(None)} != {dict}}
  return {
    encodable(name): next((_NESTED[kind] for kind in _NESTED if kind in found), pa.string())
    for name, found in kinds.items()
  }


def _keys(row: Mapping[str, Any], before: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the keys of an object, and those of the objects in it, with their values."""
  for key, value in row.items():
    name = before + key
    yield name, value
    if isinstance(value, dict) and '.' not in key and len(name) < _LONGEST_NAME:
      yield from _keys(value, f'{name}.')


def _value(row: Mapping[str, Any], name: str) -> Any:
  """Returns the value of a key as `columns` names it, None if the object lacks it."""
  if name in row or '.' not in name:
    return row.get(name)
  value: Any = row
  for key in name.split('.'):
    value = value.get(key) if isinstance(value, dict) else None
  return value


def rows(path: Path, names: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
  """Yields the values of some columns as Python objects, None for what is missing."""
  for place, row in read(path):
    yield place, {name: _value(row, name) for name in names}


def batches(
  path: Path, names: list[str], nested: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
  """Reads some columns as text, many rows at a time; what is missing or null is empty.

  Args:
    path: the file.
    names: names of the columns.
    nested: types of the columns with lists or objects, whose values are left out.
  """
  found: dict[str, list[str]] = {name: [] for name in names if name not in nested}
  rows = size = 0
  for _, row in read(path, as_written=True):
    for name, values in found.items():
      value = _value(row, name)
      values.append(value if isinstance(value, str) else _WORDS[value])
      size += len(values[-1])
    rows += 1
    if rows == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
      yield _batch(names, found, nested, rows)
      found, rows, size = {name: [] for name in found}, 0, 0
  if rows:
    yield _batch(names, found, nested, rows)


def _batch(
  names: list[str], found: dict[str, list[str]], nested: Mapping[str, pa.DataType], rows: int
) -> pa.RecordBatch:
  arrays = [
    _texts(found[name]) if name in found else pa.nulls(rows, nested[name]) for name in names
  ]
  return pa.record_batch(arrays, names)


def _texts(values: list[str]) -> pa.Array:
  try:
    return pa.array(values, pa.string())
  except UnicodeEncodeError:
    return pa.array(map(encodable, values), pa.string())


def encodable(text: str) -> str:
  r"""Writes half characters, such as \ud83d of a picture that was cut off, as the file does."""
  return text.encode(errors='backslashreplace').decode()


def _check_depth(value: Any, depth: int = 0) -> None:
  """Raises a RecursionError for a value that is nested too deeply for all its readers."""
  if depth > _DEEPEST:
    raise RecursionError(f'more than {_DEEPEST} levels of lists and objects')
  if isinstance(value, list | dict):
    for part in value.values() if isinstance(value, dict) else value:
      _check_depth(part, depth + 1)


def _fault(path: Path, number: int, line: str, fault: str) -> InputError:
  """Creates the error for a line; it says how other files become ones with an object a line."""
  rows = None
  if number == 1 and line.startswith('['):  # The whole file is one array.
    rows = 'json.load(sys.stdin)'
  elif re.match(r"\{\s*u?'", line):  # Python wrote some old datasets so.
    rows = 'map(ast.literal_eval, sys.stdin)'
  way_out = 'write one object a line'
  if rows is not None:
    code = f'import ast, json, sys; sys.stdout.writelines(json.dumps(x) + "\\n" for x in {rows})'
    program = 'zcat' if path.name.lower().endswith('.gz') else 'cat'
    # Another extension than that of the file, which the command must not write over.
    kind = '.ndjson' if '.jsonl' in path.name.lower() else '.jsonl'
    new = shlex.quote(path.name.partition('.')[0] + kind)
    way_out += f': {program} {shlex.quote(str(path))} | python -c {shlex.quote(code)} > {new}'
  return InputError(f'{path}, line {number}: {fault}: {shown(line)}; {way_out}')

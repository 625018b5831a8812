"""Reads files with one JSON object a line, as Python objects or as Arrow columns of text.

Arrow's own parser is not used, because it rounds large numbers and gives a column one type.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
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

  Raises:
    InputError: a line is no JSON object.
  """
  found: dict[str, pa.DataType] = {}
  for _, row in read(path, as_written=True):
    for name, value in row.items():
      if name not in found or type(value) in _NESTED:
        found[name] = _NESTED.get(type(value), pa.string())
  return {_encodable(name): kind for name, kind in found.items()}


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
      value = row.get(name)
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
    return pa.array(map(_encodable, values), pa.string())


def _encodable(text: str) -> str:
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

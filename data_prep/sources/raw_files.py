"""Finds raw files and reads text files; every error names file, line and field."""

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from ur4rec_jax.data.raw import archives
from ur4rec_jax.data.raw.texts import shown
from ur4rec_jax.errors import InputError

_INT64 = np.iinfo(np.int64)


Patterns = tuple[str | tuple[str, ...], ...]


def alternatives(patterns: Patterns) -> list[tuple[str, ...]]:
  """Returns the possible names of each file."""
  return [(pattern,) if isinstance(pattern, str) else pattern for pattern in patterns]


def described(patterns: Patterns) -> str:
  """Describes the files that match patterns, for messages."""
  return ', '.join(' or '.join(names) for names in alternatives(patterns))


def find_files(patterns: Patterns, raw_dir: Path) -> list[Path]:
  """Finds exactly one file per pattern, with or without `.gz`.

  Args:
    patterns: one pattern per file; a tuple lists alternative names of a file.
    raw_dir: folder of the files, or the file itself if there is only one.
  """
  wanted = described(patterns)
  try:
    if len(patterns) == 1 and raw_dir.is_file():
      return [raw_dir]
    there = sorted(path.name for path in raw_dir.iterdir() if path.is_file())
  except OSError as error:
    raise InputError(
      f'{raw_dir}: cannot be read ({error.strerror}); --raw_dir must be the folder that holds'
      f' {wanted}'
    ) from error
  if not there:
    raise InputError(f'{raw_dir}: no files in it; --raw_dir must be the folder that holds {wanted}')
  found = []
  for names in alternatives(patterns):
    matches = [
      name for name in there if any(fnmatch.fnmatch(name.removesuffix('.gz'), n) for n in names)
    ]
    if not matches:
      raise InputError(
        f'{raw_dir}: no {" or ".join(names)} in it (it holds {", ".join(there[:8])}); it must hold'
        f' {wanted}'
      )
    if len(matches) > 1:
      raise InputError(
        f'{raw_dir}: {len(matches)} files match {" or ".join(names)} ({", ".join(matches[:8])});'
        ' leave only the one meant, or give it to --raw_dir'
      )
    found.append(raw_dir / matches[0])
  return found


def read_columns(
  path: Path, delimiter: str, columns: dict[str, pa.DataType]
) -> tuple[pa.Table, np.ndarray]:
  """Parses a file without a header line, without a Python loop; also returns line numbers.

  If a line does not parse, the file is read again, line by line, to name that line.
  """
  raw = read_bytes(path)
  single = delimiter
  text = raw
  if delimiter == ' ':
    # Fields are separated by any number of blanks; most files need no rewriting.
    if b'\t' in raw or b'  ' in raw or re.search(rb'^ | \r?$', raw, re.MULTILINE):
      text = re.sub(rb'[ \t]+', b' ', raw)
      text = re.sub(rb'^ | (?=\r?$)', b'', text, flags=re.MULTILINE)
  elif len(delimiter) > 1:
    # The parser supports one-byte delimiters only, so the delimiter becomes a tab.
    if b'\t' in raw:
      raise _bad_line(path, raw, delimiter, columns, 'a tab in the file')
    single, text = '\t', raw.replace(delimiter.encode(), b'\t')
  try:
    table = csv.read_csv(
      pa.BufferReader(text),
      read_options=csv.ReadOptions(column_names=list(columns)),
      parse_options=csv.ParseOptions(delimiter=single, quote_char=False),
      convert_options=csv.ConvertOptions(
        column_types=columns, null_values=[], strings_can_be_null=False
      ),
    )
  except pa.ArrowInvalid as error:
    raise _bad_line(path, raw, delimiter, columns, str(error)) from error
  for name, kind in columns.items():
    if pa.types.is_string(kind):
      broken = '' in table[name].unique().to_pylist() or b'\0' in raw
    else:
      broken = not np.isfinite(table[name].to_numpy()).all()
    if broken:
      raise _bad_line(path, raw, delimiter, columns, f'a bad {name}')
  lines = np.arange(1, table.num_rows + 1)
  # The parser skips empty lines.
  if raw.count(b'\n') + (not raw.endswith(b'\n')) != table.num_rows:
    lines = np.flatnonzero([bool(line.strip()) for line in raw.splitlines()]) + 1
  return table, lines


def _bad_line(
  path: Path, raw: bytes, delimiter: str, columns: dict[str, pa.DataType], reason: str
) -> InputError:
  """Raises an error for the first line that breaks the format."""
  separator = {'\t': 'a tab', ' ': 'blanks'}.get(delimiter, repr(delimiter))
  expected = f'{len(columns)} columns separated by {separator} ({", ".join(columns)})'
  for number, data in enumerate(raw.splitlines(), 1):
    where = f'{path}, line {number}'
    if not (data.strip() if delimiter == ' ' else data):
      continue
    try:
      line = data.decode()
    except UnicodeDecodeError:
      return InputError(
        f'{where}: bytes that are not UTF-8: {shown(data.decode("latin-1"))};'
        ' save the file as UTF-8'
      )
    if '\0' in line:
      return InputError(f'{where}: a NUL byte: {shown(line)}; the file is damaged, get it again')
    fields = line.split() if delimiter == ' ' else line.split(delimiter)
    if len(fields) != len(columns):
      return InputError(
        f'{where}: expected {expected}, found {len(fields)}: {shown(line)};'
        ' correct the line, or choose the --source that has this format'
      )
    for (name, kind), value in zip(columns.items(), fields, strict=True):
      if fault := _fault(value.strip(), kind):
        return InputError(
          f'{where}: {name} is {fault}: {value!r} in {shown(line)}; correct the line'
        )
  return InputError(f'{path}: expected {expected}; cannot be read: {reason}')


def _fault(value: str, kind: pa.DataType) -> str:
  """Describes what is wrong with a field; '' if nothing."""
  if pa.types.is_string(kind):
    return '' if value else 'empty'
  if pa.types.is_integer(kind):
    if not re.fullmatch(r'-?\d+', value, re.ASCII):
      return 'not a whole number'
    return '' if _INT64.min <= int(value) <= _INT64.max else 'out of range'
  try:
    return '' if np.isfinite(np.float32(float(value))) else 'not a finite number'
  except ValueError:
    return 'not a number'


def read_bytes(path: Path) -> bytes:
  try:
    with archives.open_file(path) as file:
      raw = file.read()
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); make it readable') from error
  raw = raw.removeprefix(b'\xef\xbb\xbf')
  if not raw.strip():
    raise InputError(f'{path}: the file is empty; download or export it again')
  return raw


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
  """Yields numbered non-empty lines of a text file in UTF-8, or else in Latin-1."""
  raw = read_bytes(path)
  try:
    text = raw.decode()
  except UnicodeDecodeError:
    text = raw.decode('latin-1')
  for number, line in enumerate(re.split(r'\r\n|\r|\n', text), 1):
    # Latin-1 accepts every byte, but control characters never belong in a title.
    if control := re.search(r'[\x00-\x08\x0a-\x1f\x7f-\x9f]', line):
      raise InputError(
        f'{path}, line {number}: byte 0x{ord(control[0]):02x} is no text, neither in UTF-8 nor in'
        f' latin-1: {shown(line)}; save the file in one of the two'
      )
    if line.strip():
      yield number, line

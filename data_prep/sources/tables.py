"""Reads CSV, TSV and Parquet files into Arrow columns, without a Python loop over rows.

Only when something is wrong is a file gone through again, row by row, to name the place.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv

from data_prep.prepared.prepare import Place
from data_prep.sources import archives
from data_prep.sources.raw_files import shown
from ur4rec_jax.errors import InputError

DELIMITERS = {'.csv': ',', '.tsv': '\t', '.tab': '\t'}
PARQUET = ('.parquet', '.pq')
# A row of these goes after the last one: a quote that is never closed swallows it.
_END = '\x1eend'
DELIMITER_NAMES = {'\t': 'tab', ' ': 'space'}


class File(NamedTuple):
  """A file of named columns; `delimiter` is None for Parquet."""

  path: Path
  delimiter: str | None
  columns: tuple[str, ...]


def kind(path: Path) -> str:
  """Returns the extension that tells the format, in lower case and without `.gz`."""
  name = path.name.lower().removesuffix('.gz')
  return Path(name).suffix


def open_file(path: Path, delimiter: str | None = None) -> File:
  """Detects the format of a file and its column names.

  Args:
    path: a `.parquet`, `.csv` or `.tsv` file, the last two also with `.gz`; or any text file, if
      there is a delimiter.
    delimiter: one character; None takes that of the extension.
  """
  try:
    if path.stat().st_size == 0:
      raise InputError(f'{path}: the file is empty; export it again')
    if kind(path) in PARQUET:
      if delimiter is not None:
        raise InputError(f'{path}: a Parquet file has no delimiter; leave --delimiter out')
      return File(path, None, tuple(pq.read_schema(path).names))
    delimiter = delimiter or DELIMITERS.get(kind(path))
    if delimiter is None:
      raise InputError(
        f'{path}: its extension is none of .csv, .tsv, .parquet (.csv and .tsv also with .gz);'
        ' rename it, or pass --delimiter'
      )
    header = next(_rows(path, delimiter), None)
  except OSError as error:
    raise _unreadable(path, error) from error
  except pa.ArrowInvalid as error:
    raise InputError(f'{path}: is no Parquet file ({error}); export it again') from error
  if header is None or header[1] == [_END]:
    raise InputError(f'{path}: the file is empty; export it again')
  _check_text(path, *header)
  return File(path, delimiter, tuple(name.strip() for name in header[1]))


def read(file: File, columns: list[str]) -> pa.Table:
  """Reads some columns; columns of text files are unchanged strings.

  Raises:
    InputError: the file is damaged or has no rows.
  """
  for name in columns:
    if file.columns.count(name) > 1:
      raise InputError(f'{file.path}: {name!r} is the name of two columns; rename one')
  try:
    if file.delimiter is None:
      table = pq.read_table(file.path, columns=columns)
    else:
      table = _read_text(file, columns)
  except OSError as error:
    raise _unreadable(file.path, error) from error
  except pa.ArrowInvalid as error:
    if file.delimiter is not None:
      check_rows(file)
    raise InputError(f'{file.path}: cannot be read ({error}); export it again') from error
  if not table.num_rows:
    raise InputError(f'{file.path}: no rows below the column names; export it again')
  return table


def place(file: File, row: int) -> Place:
  """Returns the position of a row (from 0) in its file, for messages."""
  if file.delimiter is None:
    return Place(str(file.path), row + 1, 'row')
  for index, (line, _) in enumerate(_rows(file.path, file.delimiter)):
    if index == row + 1:
      return Place(str(file.path), line)
  raise IndexError(row)


def check_rows(file: File) -> None:
  """Reads a text file row by row and raises an error for the first wrong row."""
  line, fields = 0, []
  width = len(file.columns)
  for line, fields in _rows(file.path, file.delimiter):
    if fields == [_END] * width:
      return
    if _END in fields[-1]:
      break
    _check_text(file.path, line, fields)
    if len(fields) != width:
      separator = DELIMITER_NAMES.get(file.delimiter, repr(file.delimiter))
      raise InputError(
        f'{file.path}, line {line}: expected {width} columns separated by {separator}'
        f' ({", ".join(file.columns[:8])}), found {len(fields)}:'
        f' {shown(file.delimiter.join(fields))}; correct the line, quote what contains the'
        ' delimiter, or pass --delimiter'
      )
  text = file.delimiter.join(fields).partition(_END)[0].rstrip('\n')
  raise InputError(
    f'{file.path}, line {line}: a quote is opened and never closed: {shown(text)}; close'
    ' it, or double the quotes inside a text'
  )


def records(file: File) -> Iterator[tuple[Place, dict[str, object]]]:
  """Yields rows one by one, for tables that become Python objects anyway."""
  if file.delimiter is None:
    number = 0
    for batch in pq.ParquetFile(file.path).iter_batches():
      for row in batch.to_pylist():
        number += 1
        yield Place(str(file.path), number, 'row'), row
    return
  check_rows(file)
  for line, fields in _rows(file.path, file.delimiter, skip=1):
    if fields != [_END] * len(file.columns):
      yield Place(str(file.path), line), dict(zip(file.columns, fields, strict=True))


def _read_text(file: File, columns: list[str]) -> pa.Table:
  with archives.open_file(file.path) as content:
    table = arrow_csv.read_csv(
      _WithEnd(content, _end_row(file.delimiter, len(file.columns))),
      read_options=arrow_csv.ReadOptions(
        column_names=[str(i) for i in range(len(file.columns))], block_size=1 << 22
      ),
      parse_options=arrow_csv.ParseOptions(delimiter=file.delimiter, newlines_in_values=True),
      convert_options=arrow_csv.ConvertOptions(
        # Columns go by position, because names in the file may have blanks around them.
        column_types={str(file.columns.index(name)): pa.string() for name in columns},
        include_columns=[str(file.columns.index(name)) for name in columns],
        null_values=[],
        strings_can_be_null=False,
      ),
    )
  last = {value.as_py() for value in (column[-1] for column in table.columns)}
  if last != {_END}:
    raise pa.ArrowInvalid('an unclosed quote')
  return table.slice(1, table.num_rows - 2).rename_columns(columns)


def _end_row(delimiter: str, width: int) -> bytes:
  return f'\n{delimiter.join([_END] * width)}\n'.encode()


class _WithEnd(io.RawIOBase):
  """A file without its byte order mark, with some bytes appended."""

  def __init__(self, file: IO[bytes], end: bytes):
    self._file, self._end = file, end
    self._start = file.read(3).removeprefix(b'\xef\xbb\xbf')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    data = self.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)

  def read(self, size: int = -1) -> bytes:
    if self._start:
      data, self._start = self._start, b''
      return data
    data = self._file.read(size)
    if not data:
      data, self._end = self._end, b''
    return data


def _rows(path: Path, delimiter: str, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
  """Yields non-empty rows with their first line; the last one is the end row, if reached."""
  # The end row is as wide as the header, so its width needs no row of the file.
  with archives.open_file(path) as content:
    header = content.readline().decode('utf-8', 'surrogateescape')
  with archives.open_file(path) as content:
    width = len(next(csv.reader([header], delimiter=delimiter), ''))
    data = io.BufferedReader(_WithEnd(content, _end_row(delimiter, width)))
    text = io.TextIOWrapper(data, 'utf-8', 'surrogateescape', newline='')
    reader = csv.reader(text, delimiter=delimiter)
    while True:
      line = reader.line_num + 1
      try:
        fields = next(reader)
      except StopIteration:
        return
      except csv.Error as error:
        raise InputError(
          f'{path}, line {line}: {error}; if a text opens a quote there, close it'
        ) from error
      if fields:
        if skip:
          skip -= 1
          continue
        yield line, fields


def _check_text(path: Path, line: int, fields: list[str]) -> None:
  text = ' '.join(fields)
  if not text.isascii() and any('\udc80' <= letter <= '\udcff' for letter in text):
    readable = text.encode('utf-8', 'surrogateescape').decode('latin-1')
    raise InputError(
      f'{path}, line {line}: bytes that are not UTF-8: {shown(readable)}; save the file as UTF-8'
    )


def _unreadable(path: Path, error: OSError) -> InputError:
  return InputError(f'{path}: cannot be read ({error.strerror or error}); make it readable')


def first_true(mask: pa.ChunkedArray | pa.Array) -> int | None:
  """Returns the index of the first true or null value; None if there is none."""
  chunks = mask.chunks if isinstance(mask, pa.ChunkedArray) else [mask]
  start = 0
  for chunk in chunks:
    found = np.flatnonzero(chunk.fill_null(True).to_numpy(zero_copy_only=False))
    if found.size:
      return start + int(found[0])
    start += len(chunk)
  return None

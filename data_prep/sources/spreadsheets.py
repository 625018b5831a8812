"""Reads the first sheet of an Excel file, or a CSV file with an Excel extension."""

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources import raw_files
from ur4rec_jax.data.raw import archives, tables
from ur4rec_jax.errors import InputError

# Excel's own limit of rows. Numbers of rows and columns beyond these come from damaged files, and
# readers would fill the gap with empty cells.
_MOST_ROWS, _MOST_COLUMNS = 1 << 20, 256
_LONGEST_GAP = 10_000  # Empty rows between two others.
_ENCODINGS = ('utf-8', 'utf-16-le', 'utf-16-be')  # Those of XML that may not be ASCII.
_XLS, _XLSX = b'\xd0\xcf\x11\xe0', b'PK\x03\x04'


def rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
  """Yields rows with their numbers from 1; values are text, numbers or None."""
  raw = raw_files.read_bytes(path)
  read = {_XLS: _xls, _XLSX: _xlsx}.get(raw[:4], _csv)
  return enumerate(read(path, raw), 1)


def _xls(path: Path, raw: bytes) -> Iterator[list[Any]]:
  import xlrd  # Imported here, because only these functions need it.

  try:
    # Its own warnings about damage would end up between the lines of the summary.
    with xlrd.open_workbook(file_contents=raw, logfile=io.StringIO()) as book:
      sheet = book.sheet_by_index(0)
      yield from (sheet.row_values(row) for row in range(sheet.nrows))
  except Exception as error:  # Damaged files make the reader raise any kind of error.
    raise _damaged(path, error) from error


def _xlsx(path: Path, raw: bytes) -> Iterator[list[Any]]:
  import openpyxl

  try:
    archives.check_zip(path, io.BytesIO(raw))
    _check_prologs(path, raw)
    book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
    sheet = book.worksheets[0]
    empty = 0
    rows = sheet.iter_rows(max_row=_MOST_ROWS, max_col=_MOST_COLUMNS, values_only=True)
    for number, row in enumerate(rows, 1):
      if row.count(None) == len(row):
        empty += 1
        continue
      if empty > _LONGEST_GAP:
        raise InputError(
          f'{path}, row {number}: {empty:,} empty rows are above it; delete them and save it again'
        )
      yield from ([] for _ in range(empty))
      empty = 0
      width = next(at for at in range(len(row), 0, -1) if row[at - 1] is not None)
      yield list(row[:width])
  except InputError:
    raise
  except Exception as error:  # Damaged files make the reader raise any kind of error.
    raise _damaged(path, error) from error


def _check_prologs(path: Path, raw: bytes) -> None:
  """Refuses XML that defines entities: a few bytes of them expand to gigabytes.

  Programs that write spreadsheets define none.
  """
  signs = [text.encode(code) for text in ('<!DOCTYPE', '<!ENTITY') for code in _ENCODINGS]
  with zipfile.ZipFile(io.BytesIO(raw)) as archive:
    for name in archive.namelist():
      tail = b''
      with archive.open(name) as member:
        while data := member.read(1 << 20):
          if any(sign in tail + data for sign in signs):
            raise InputError(f'{path}: {name!r} in it defines XML entities; save the file again')
          tail = data[-32:]


def _csv(path: Path, raw: bytes) -> Iterator[list[Any]]:
  try:
    text = raw.decode()
  except UnicodeDecodeError as error:
    line = raw[: error.start].count(b'\n') + 1
    raise InputError(
      f'{path}, line {line}: is no Excel file, and bytes are not UTF-8: save it as .xlsx, or as CSV'
      ' in UTF-8'
    ) from error
  try:
    yield from tables.reader_of(io.StringIO(text, newline=''), ',', quoted=True)
  except csv.Error as error:
    raise InputError(
      f'{path}: is neither an Excel nor a CSV file ({error}); save it again'
    ) from error


def _damaged(path: Path, error: Exception) -> InputError:
  reason = ' '.join(str(error).split()) or type(error).__name__
  return InputError(f'{path}: the Excel file cannot be read ({reason}); save or download it again')

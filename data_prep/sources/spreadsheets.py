"""Reads the first sheet of an Excel file, or a CSV file with an Excel extension."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources import archives, raw_files, tables
from ur4rec_jax.errors import InputError

# Excel's own limit of rows. Numbers of rows and columns beyond these come from damaged files, and
# readers would fill the gap with empty cells.
_MOST_ROWS, _MOST_COLUMNS = 1 << 20, 256
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
    book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
    sheet = book.worksheets[0]
    for row in sheet.iter_rows(max_row=_MOST_ROWS, max_col=_MOST_COLUMNS, values_only=True):
      width = max((at for at, value in enumerate(row, 1) if value is not None), default=0)
      yield list(row[:width])
  except InputError:
    raise
  except Exception as error:  # Damaged files make the reader raise any kind of error.
    raise _damaged(path, error) from error


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

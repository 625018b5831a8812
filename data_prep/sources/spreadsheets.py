"""Reads the first sheet of an Excel file, or a CSV file with an Excel extension."""

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources import raw_files
from ur4rec_jax.errors import InputError

_XLS, _XLSX = b'\xd0\xcf\x11\xe0', b'PK\x03\x04'


def rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
  """Yields rows with their numbers from 1; values are text, numbers or None."""
  raw = raw_files.read_bytes(path)
  read = {_XLS: _xls, _XLSX: _xlsx}.get(raw[:4], _csv)
  return enumerate(read(path, raw), 1)


def _xls(path: Path, raw: bytes) -> Iterator[list[Any]]:
  import xlrd  # Imported here, because only these functions need it.

  try:
    with xlrd.open_workbook(file_contents=raw) as book:
      sheet = book.sheet_by_index(0)
      yield from (sheet.row_values(row) for row in range(sheet.nrows))
  except (
    xlrd.XLRDError,
    xlrd.compdoc.CompDocError,
    IndexError,
    ValueError,
    AssertionError,
  ) as error:
    raise _damaged(path, error) from error


def _xlsx(path: Path, raw: bytes) -> Iterator[list[Any]]:
  import openpyxl

  try:
    book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
    yield from (list(row) for row in book.worksheets[0].iter_rows(values_only=True))
  except (zipfile.BadZipFile, KeyError, IndexError, ValueError, OSError) as error:
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
    yield from csv.reader(io.StringIO(text, newline=''), strict=True)
  except csv.Error as error:
    raise InputError(
      f'{path}: is neither an Excel nor a CSV file ({error}); save it again'
    ) from error


def _damaged(path: Path, error: Exception) -> InputError:
  return InputError(f'{path}: the Excel file cannot be read ({error}); save or download it again')

"""Reads CSV, TSV, Parquet and JSON lines files into Arrow columns.

JSON lines are left to `json_lines`; the rows of other files need no Python loop. But Arrow's parser
of text forgives misplaced quotes and then merges rows. So a text file that has quotes is first read
row by row with Python's strict parser, which finds the first misplaced quote and counts the rows. A
file whose row is wrong in another way is read again, row by row, to name that row.
"""

import codecs
import contextlib
import csv
import io
import itertools
import re
import shlex
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv

from ur4rec_jax.data import column_names
from ur4rec_jax.data.raw import archives, json_lines
from ur4rec_jax.data.raw.records import NoRows, Place
from ur4rec_jax.data.raw.texts import listed, refuse_utf16, shown, utf8_lines
from ur4rec_jax.errors import InputError

DELIMITERS = {'.csv': ',', '.tsv': '\t', '.tab': '\t'}
PARQUET = ('.parquet', '.pq')
DELIMITER_NAMES = {'\t': 'tab', ' ': 'space'}
KINDS = (*DELIMITERS, *PARQUET, *json_lines.KINDS)
_EXCEL = ('.xlsx', '.xls')
# What is a value rather than the name of a column.
_VALUE = r'-?\d+(\.\d+)?$|https?://|\d{4}-\d{2}-\d{2}|\d{1,2}\.\d{1,2}\.\d{4}'
QUOTING = ('auto', 'none', 'standard')
# Spark writes this for an empty value of the column that names the folders.
_NO_VALUE = '__HIVE_DEFAULT_PARTITION__'
# Arrow must hold the longest row in one block; most files need only the first size.
_BLOCKS = (1 << 22, 1 << 26, 1 << 30)
_SURVEYED = 1 << 20  # Bytes that are searched for quotes at once.
_BATCH_ROWS = 1 << 14  # Rows of Parquet that are unpacked at once.
_FIRST_ROWS = 100  # Rows that tell what a column holds.
_TABLE_ROWS = 1 << 20  # Rows of the tables of `batches`, the last one aside.
# Types of texts that Parquet may store dictionary-encoded, and those that they are read as.
_TEXTS = {
  pa.string(): pa.string(),
  pa.large_string(): pa.large_string(),
  pa.string_view(): pa.large_string(),
  pa.binary(): pa.binary(),
  pa.large_binary(): pa.large_binary(),
  pa.binary_view(): pa.large_binary(),
}
_LONGEST_FIELD = 2**31 - 1  # The parser's own limit is 131,072 characters.


class File(NamedTuple):
  """A file of named columns.

  Attributes:
    path: the file.
    delimiter: character between columns; None for Parquet and JSON lines.
    columns: names of the columns in the file.
    quoted: whether double quotes enclose fields; otherwise they are ordinary characters.
    rows: number of rows below the names, if they were counted.
    is_plain: whether the first line has the names, and no line below it has a double quote.
    notes: notes for the user about how the rows were read.
    folders: columns that the names of the folders hold, as in `day=2024-05-31/part-0.parquet`.
    nested: types of the columns of JSON lines that hold lists or objects.
  """

  path: Path
  delimiter: str | None
  columns: tuple[str, ...]
  quoted: bool = False
  rows: int | None = None
  is_plain: bool = False
  notes: tuple[str, ...] = ()
  folders: Mapping[str, str | None] = MappingProxyType({})
  nested: Mapping[str, pa.DataType] = MappingProxyType({})

  @property
  def is_text(self) -> bool:
    """Whether the values of all columns are texts, as in all files but Parquet."""
    return kind(self.path) not in PARQUET


def kind(path: Path) -> str:
  """Returns the extension that tells the format, in lower case and without `.gz`."""
  name = path.name.lower().removesuffix('.gz')
  return Path(name).suffix


def folder_columns(path: Path) -> dict[str, str | None]:
  """Returns the columns that the folders right above a file hold, as in `day=2024-05-31/`."""
  found: dict[str, str | None] = {}
  for folder in path.parent.parts[::-1]:
    name, equals, value = folder.partition('=')
    if not name or not equals:
      break
    value = urllib.parse.unquote(value)
    found[urllib.parse.unquote(name)] = None if value == _NO_VALUE else value
  return dict(reversed(found.items()))


def is_empty(path: Path) -> bool:
  """Whether a part of a table has no rows: no bytes, only column names, or no row or line."""
  with _readable(path):
    if path.stat().st_size == 0:
      return True
    if kind(path) in PARQUET:
      return pq.read_metadata(path).num_rows == 0
    if kind(path) in json_lines.KINDS:
      return next(utf8_lines(path), None) is None
    with archives.open_file(path) as content:
      start = content.read(1 << 20)
    return len(start) < 1 << 20 and len(start.strip().splitlines()) <= 1


def open_file(
  path: Path, delimiter: str | None = None, quoting: str | None = None, flag: str = ''
) -> File:
  """Detects the format of a file and its column names.

  Args:
    path: `.parquet`, `.csv`, `.tsv` or `.jsonl` file, the last three also with `.gz`; any text file
      with a delimiter.
    delimiter: one character; None chooses it by the extension and the first line. JSON lines need
      none.
    quoting: `standard`: double quotes enclose fields; `none`: they are ordinary characters;
      `auto` or None: standard, but none in a tab-separated file whose lines are whole rows and
      whose quotes do not enclose fields.
    flag: name of the flag of `quoting`, for messages.

  Raises:
    NoRows: a JSON lines file has no lines.
    InputError: the file is no table, or a quote in it is misplaced.
  """
  if quoting not in (None, *QUOTING):
    raise InputError(f'{flag} must be one of {", ".join(QUOTING)}, not {quoting!r}')
  with _readable(path):
    if kind(path) in json_lines.KINDS:
      file = _open_json(path)
    elif path.stat().st_size == 0:
      raise InputError(f'{path}: the file is empty; export it again')
    elif kind(path) not in PARQUET:
      file = _open_text(path, delimiter, quoting or 'auto', flag)
    elif delimiter is not None:
      raise InputError(f'{path}: a Parquet file has no delimiter; leave --delimiter out')
    else:
      file = File(path, None, tuple(pq.read_schema(path).names))
  return file._replace(folders=folder_columns(path))


def _open_json(path: Path) -> File:
  columns = json_lines.columns(path)
  if not columns:
    raise NoRows(f'{path}: the file is empty; export it again')
  nested = {name: kind for name, kind in columns.items() if pa.types.is_nested(kind)}
  return File(path, None, tuple(columns), nested=nested)


def _open_text(path: Path, delimiter: str | None, quoting: str, flag: str) -> File:
  notes: tuple[str, ...] = ()
  if delimiter is None:
    delimiter = _delimiter(path)
    if delimiter != DELIMITERS[kind(path)]:
      name = DELIMITER_NAMES.get(delimiter, repr(delimiter))
      notes = (f'{path.name}: the columns are separated by {name}',)
  refuse_utf16(path, next(_lines(path), ''))
  quotes, has_quotes = None, quoting != 'none' and _has_quotes(path)
  if has_quotes:
    quotes = _survey(path, delimiter, flag)
    misfit = quotes.spans or quotes.fault
    if quoting == 'auto' and delimiter == '\t' and misfit and _lines_are_rows(path, delimiter):
      quotes = None
      notes += (f'{path.name}: quotes are ordinary characters, because they do not enclose fields',)
    elif quotes.fault is not None:
      raise quotes.fault
    elif quoting == 'auto' and quotes.look_merged:
      raise _merged(path, quotes.spans, flag)
    elif quotes.spans:
      count, (first, last) = len(quotes.spans), quotes.spans[0]
      notes += (
        f'{path.name}: {count:,} {"rows span" if count > 1 else "row spans"} several lines, the'
        f' first one lines {first} to {last}; quotes enclose the line ends',
      )
  header = next(_rows(path, delimiter, quotes is not None), None)
  if header is None:
    raise InputError(f'{path}: the file is empty; export it again')
  _check_text(path, *header)
  columns = tuple(name.strip() for name in header[1])
  is_plain = header[0] == 1 and (not has_quotes or (quotes is not None and quotes.only_first))
  file = File(path, delimiter, columns, is_plain=is_plain, notes=notes)
  return file if quotes is None else file._replace(quoted=True, rows=quotes.rows - 1)


def _delimiter(path: Path) -> str:
  """Returns the delimiter of the extension, or the one that the first line has instead."""
  usual = DELIMITERS.get(kind(path))
  if usual is None:
    raise InputError(
      f'{path}: its extension is none of .csv, .tsv, .jsonl, .parquet (all but the last also with'
      f' .gz); {_way_to_a_table(path)}'
    )
  names = next((line for line in _lines(path) if line.strip()), '')
  return column_names.delimiter_of(names, usual)


def _way_to_a_table(path: Path) -> str:
  """Says how a file with another extension becomes a table that can be read."""
  if kind(path) in _EXCEL:
    return 'save the table as one of them, each sheet as a CSV file in UTF-8'
  return (
    'save the table as one of them, or rename it if it is a text file, or pass --delimiter, such as'
    ' --delimiter=tab'
  )


def looks_like_a_row(names: Iterable[str]) -> bool:
  """Whether the first line of a file seems to be a row, because it has numbers, times or URLs."""
  return any(re.match(_VALUE, name) for name in names)


def way_to_names(
  path: str | Path, width: int, delimiter: str, first: Sequence[str] = ('user', 'item')
) -> str:
  """Says how a file whose first line is a row gets names of columns."""
  program = 'zcat' if str(path).lower().endswith('.gz') else 'cat'
  between, kind = ('\\t', 'tsv') if delimiter == '\t' else (delimiter, 'csv')
  names = between.join((*first, '...'))
  return (
    f'that looks like a row: write a name for each of the {width} columns above it, as in'
    f" (printf '{names}\\n'; {program} {shlex.quote(str(path))}) > named.{kind}"
  )


def read(file: File, columns: list[str]) -> pa.Table:
  """Reads some columns whole, see `batches`."""
  return pa.concat_tables(batches(file, columns))


def batches(file: File, columns: list[str]) -> Iterator[pa.Table]:
  """Reads some columns, many rows at a time; columns of text files are unchanged strings.

  Raises:
    NoRows: the file has no rows.
    InputError: the file is damaged, or lacks a column.
  """
  check_names(str(file.path), file.columns, columns)
  if missing := [name for name in columns if name not in (*file.columns, *file.folders)]:
    raise InputError(
      f'{file.path}: no column {missing[0]!r}; its columns are {listed(file.columns)}'
    )
  inside = [name for name in columns if name in file.columns]
  rows = 0
  with _readable(file.path):
    try:
      for table in _grouped(record_batches(file, inside)):
        rows += table.num_rows
        for name in columns:
          if name not in inside:
            value = pa.scalar(file.folders[name], pa.string())
            table = table.append_column(name, pa.repeat(value, table.num_rows))
        yield table.select(columns)
    except pa.ArrowException as error:
      if file.delimiter is not None:
        check_rows(file)
      raise _damaged(file.path, error) from error
  if not rows:
    raise no_rows(file.path)
  if file.rows is not None and rows != file.rows:
    check_rows(file)
    raise InputError(
      f'{file.path}: two parsers find {file.rows:,} and {rows:,} rows; export it again'
    )


def start(file: File, columns: list[str]) -> dict[str, list[Any]]:
  """Returns the first values of some columns; none of a damaged file, which `batches` names."""
  if not columns:
    return {}
  try:
    return next(record_batches(file, columns)).slice(0, _FIRST_ROWS).to_pydict()
  except (OSError, pa.ArrowException, InputError, StopIteration):
    return {}


def record_batches(file: File, columns: list[str]) -> Iterator[pa.RecordBatch]:
  """Reads some columns of the file itself in small parts, without the checks of `batches`."""
  if kind(file.path) in PARQUET:
    return parquet_batches(file.path, columns)
  if kind(file.path) in json_lines.KINDS:
    return json_lines.batches(file.path, columns, file.nested)
  return _text_batches(file, columns)


def _grouped(parts: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
  """Joins small parts to tables of `_TABLE_ROWS` or more, because each table has fixed costs."""
  waiting: list[pa.RecordBatch] = []
  for part in parts:
    waiting.append(part)
    if sum(map(len, waiting)) >= _TABLE_ROWS:
      yield pa.Table.from_batches(waiting)
      waiting = []
  if waiting:
    yield pa.Table.from_batches(waiting)


def check_names(path: str, names: Iterable[str], columns: Iterable[str]) -> None:
  """Raises an error if one of the columns in use shares its name with another column."""
  names = list(names)
  for name in columns:
    if names.count(name) > 1:
      raise InputError(f'{path}: {name!r} is the name of two columns; rename one')


def place(file: File, row: int) -> Place:
  """Returns the position of a row (from 0) in its file, for messages."""
  if kind(file.path) in PARQUET:
    return Place(str(file.path), row + 1, 'row')
  if kind(file.path) in json_lines.KINDS:
    return Place(str(file.path), next(itertools.islice(utf8_lines(file.path), row, None))[0])
  rows = itertools.islice(_rows(file.path, file.delimiter, file.quoted), row + 1, None)
  return Place(str(file.path), next(rows)[0])


def check_rows(file: File) -> None:
  """Reads a text file row by row and raises an error for the first wrong row."""
  width = len(file.columns)
  for line, fields in _rows(file.path, file.delimiter, file.quoted):
    _check_text(file.path, line, fields)
    if len(fields) != width:
      separator = DELIMITER_NAMES.get(file.delimiter, repr(file.delimiter))
      raise InputError(
        f'{file.path}, line {line}: expected {width} columns separated by {separator}'
        f' ({", ".join(file.columns[:8])}), found {len(fields)}:'
        f' {shown(file.delimiter.join(fields))}; correct the line, quote what contains the'
        ' delimiter, or pass --delimiter'
      )


def records(file: File, columns: list[str]) -> Iterator[tuple[Place, dict[str, object]]]:
  """Yields some columns row by row, for tables that become Python objects anyway."""
  check_names(str(file.path), file.columns, columns)
  if file.delimiter is None:
    number = 0
    with _readable(file.path):
      for batch in record_batches(file, columns):
        for row in batch.to_pylist():
          number += 1
          yield Place(str(file.path), number, 'row'), row
    return
  check_rows(file)
  at = {name: file.columns.index(name) for name in columns}
  rows = _rows(file.path, file.delimiter, file.quoted)
  for line, fields in itertools.islice(rows, 1, None):
    yield Place(str(file.path), line), {name: fields[i] for name, i in at.items()}


def parquet_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
  """Reads some columns in batches, within the limits of packed files.

  A few kilobytes may hold the same long text a million times. Texts stay dictionary-encoded until
  their size is known.

  Raises:
    InputError: the columns take too much memory.
    pa.ArrowException: the file is damaged.
  """
  schema = pq.read_schema(path)
  texts = [field.name for field in schema if field.type in _TEXTS]
  content = pq.ParquetFile(path, read_dictionary=texts)
  names = {field.name: field.type for field in schema}
  # Of groups, not of their columns: pyarrow ends the process where those are damaged.
  groups = map(content.metadata.row_group, range(content.num_row_groups))
  archives.check_size(path, sum(max(group.total_byte_size, group.num_rows) for group in groups))
  size = 0
  for batch in content.iter_batches(columns=columns, batch_size=_BATCH_ROWS):
    found = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
      if pa.types.is_dictionary(column.type) and not pa.types.is_dictionary(names[name]):
        column.dictionary.validate(full=True)  # Texts of a damaged file may be no UTF-8.
        lengths = pc.binary_length(column.dictionary).take(column.indices)
        size += pc.sum(lengths.cast(pa.int64())).as_py() or 0
        archives.check_size(path, size)
        column = column.dictionary.cast(_TEXTS[names[name]]).take(column.indices)
      else:
        size += column.nbytes
        archives.check_size(path, size)
      found.append(column)
    yield pa.record_batch(found, batch.schema.names)


def _text_batches(file: File, columns: list[str]) -> Iterator[pa.RecordBatch]:
  done = 1  # Rows that need not be read again with larger blocks; the first one has the names.
  for size in _BLOCKS:
    try:
      with archives.open_file(file.path) as content:
        skipped = 0
        for batch in _open_csv(file, columns, content, size):
          fresh = batch.slice(min(done - skipped, len(batch)))
          skipped += len(batch) - len(fresh)
          done, skipped = done + len(fresh), skipped + len(fresh)
          if len(fresh):
            yield fresh.rename_columns(columns)
      return
    except pa.ArrowInvalid as error:
      if size == _BLOCKS[-1] or 'block size' not in str(error):
        raise


def _open_csv(
  file: File, columns: list[str], content: Any, block_size: int
) -> arrow_csv.CSVStreamingReader:
  # Columns go by position, because names in the file may have blanks around them.
  places = [str(file.columns.index(name)) for name in columns]
  return arrow_csv.open_csv(
    content,
    read_options=arrow_csv.ReadOptions(
      column_names=[str(i) for i in range(len(file.columns))], block_size=block_size
    ),
    parse_options=arrow_csv.ParseOptions(
      delimiter=file.delimiter,
      quote_char='"' if file.quoted else False,
      newlines_in_values=file.quoted,
    ),
    convert_options=arrow_csv.ConvertOptions(
      column_types=dict.fromkeys(places, pa.string()),
      include_columns=places,
      null_values=[],
      strings_can_be_null=False,
    ),
  )


class _Quotes(NamedTuple):
  """How the quotes of a file look to a strict parser.

  Attributes:
    rows: number of rows, the names of the columns included.
    spans: first and last line of each row that spans several lines.
    look_merged: whether every such line would be a whole row if quotes were ordinary characters.
    fault: the first misplaced quote.
    only_first: whether only the first line has quotes, and each line is a row.
  """

  rows: int
  spans: list[tuple[int, int]]
  look_merged: bool
  fault: InputError | None = None
  only_first: bool = False


def _survey(path: Path, delimiter: str, flag: str) -> _Quotes:
  plain = _count_whole_lines(path, delimiter)
  if plain is not None:
    lines, quoted = plain
    return _Quotes(lines, [], False, only_first=quoted == [1])
  rows, spans, whole = 0, [], True
  width, lines = 0, []
  reader = reader_of(_noted(_lines(path), lines), delimiter, quoted=True)
  while True:
    line = reader.line_num + 1
    lines.clear()
    try:
      fields = next(reader)
    except StopIteration:
      return _Quotes(rows, spans, bool(spans) and whole)
    except csv.Error as error:
      fault = InputError(
        f'{path}, {quote_fault(line, reader.line_num, error)}: {shown(lines[0].rstrip())}; double'
        f' the quotes inside a text, or correct them{f", or pass {flag}=none" if flag else ""}'
      )
      return _Quotes(rows, spans, False, fault)
    if not fields:
      continue
    rows, width = rows + 1, width or len(fields)
    if len(lines) > 1:
      spans.append((line, reader.line_num))
      whole = whole and all(text.count(delimiter) == width - 1 for text in lines)


def _count_whole_lines(path: Path, delimiter: str) -> tuple[int, list[int]] | None:
  """Counts the rows of a file in which each line is a row and all quotes are well placed.

  Most files are such ones. Only their lines with quotes have to be parsed.

  Returns:
    The number of rows, and the numbers of the first two lines with quotes; None if a row spans
    several lines, a quote is misplaced, or a line is empty.
  """
  rows, first_quoted = 0, []
  with archives.open_file(path) as content:
    start = codecs.BOM_UTF8
    while block := content.read(_SURVEYED):
      block += content.readline()
      lines = block.removeprefix(start).replace(b'\r\n', b'\n').removesuffix(b'\n')
      start = b''
      if b'\r' in lines or b'\n\n' in b'\n' + lines + b'\n':
        return None
      if b'"' in lines:
        numbered = [
          (i, line) for i, line in enumerate(lines.split(b'\n'), rows + 1) if b'"' in line
        ]
        quoted = [line.decode(errors='replace') for _, line in numbered]
        first_quoted += [number for number, _ in numbered[: 2 - len(first_quoted)]]
        try:
          if len([*reader_of(quoted, delimiter, quoted=True)]) < len(quoted):
            return None
        except csv.Error:
          return None
      rows += lines.count(b'\n') + 1
  return rows, first_quoted


def quote_fault(first: int, last: int, error: csv.Error) -> str:
  """Describes the misplaced quote that the parser found in a row, with its line."""
  if 'unexpected end' in str(error):
    return f'line {first}: a quote is opened and never closed'
  opened = '' if first == last else f' that opens in line {first} or later'
  return f'line {last}: text after the closing quote of a field{opened}'


def _merged(path: Path, spans: list[tuple[int, int]], flag: str) -> InputError:
  first, last = spans[0]
  way_out = 'correct the quotes'
  if flag:
    way_out = f'pass {flag}=none if each line is a row, otherwise {flag}=standard'
  return InputError(
    f'{path}, lines {first} to {last}: quotes join the lines to one row, but every line has as many'
    f' columns as a row; {way_out}'
  )


def _has_quotes(path: Path) -> bool:
  with archives.open_file(path) as content:
    return any(b'"' in data for data in iter(lambda: content.read(1 << 20), b''))


def _lines_are_rows(path: Path, delimiter: str) -> bool:
  """Whether all lines have the same number of columns if quotes are ordinary characters."""
  return len({line.count(delimiter) for line in _lines(path) if line.strip('\r\n')}) == 1


def _lines(path: Path) -> Iterator[str]:
  """Yields the lines of a text file with their ends: Unix, Windows or old Mac ones."""
  with archives.open_file(path) as content:
    yield from io.TextIOWrapper(content, 'utf-8-sig', 'surrogateescape', newline='')


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
  for line in lines:
    taken.append(line)
    yield line


def reader_of(lines: Iterable[str], delimiter: str, quoted: bool) -> Any:
  """Returns the strict CSV parser of Python, for fields of any length."""
  csv.field_size_limit(_LONGEST_FIELD)  # One limit for the whole process.
  quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
  return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)


def _rows(path: Path, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
  """Yields non-empty rows with their first line."""
  reader = reader_of(_lines(path), delimiter, quoted)
  line = 1
  for fields in reader:
    if fields:
      yield line, fields
    line = reader.line_num + 1


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
  """Turns errors of the disk and of Parquet files into messages."""
  try:
    yield
  except OSError as error:
    reason = ' '.join(str(error.strerror or error).split())
    raise InputError(f'{path}: cannot be read ({reason}); make it readable') from error
  except (pa.ArrowException, UnicodeDecodeError) as error:  # The latter of names of columns.
    raise _damaged(path, error) from error


def no_rows(path: Path) -> NoRows:
  """Creates the error for a file that holds no rows."""
  return NoRows(f'{path}: no rows below the column names; export it again')


def _damaged(path: Path, error: Exception) -> InputError:
  what = 'is no Parquet file' if kind(path) in PARQUET else 'cannot be read'
  return InputError(f'{path}: {what} ({" ".join(str(error).split())}); export it again')


def _check_text(path: Path, line: int, fields: list[str]) -> None:
  text = ' '.join(fields)
  if not text.isascii() and any('\udc80' <= letter <= '\udcff' for letter in text):
    readable = text.encode('utf-8', 'surrogateescape').decode('latin-1')
    raise InputError(
      f'{path}, line {line}: bytes that are not UTF-8: {shown(readable)}; save the file as UTF-8'
    )


def plain_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
  """Removes blanks around numbers and a plus before them, which Arrow does not read."""
  return pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r'^\+', '')


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

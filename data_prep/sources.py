"""Raw formats -> columns. A new source is one `read_*` function and one entry in `SOURCES`."""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv

from data_prep import synthetic
from data_prep.builders import Origin
from data_prep.prepare import Item, Raw
from ur4rec_jax.errors import InputError

_INT64 = np.iinfo(np.int64)


class Source(NamedTuple):
  """How to find and read one kind of raw data.

  `files`: patterns, each of which matches exactly one file of the raw folder; `read` gets the
  files in that order; none where data is generated. `archive`: where to download them, a URL
  listed in checksums.tsv. `parameters`: flags of this source and their defaults, which `read`
  gets by name.
  """

  origin: Origin
  files: tuple[str, ...]
  read: Callable[..., Raw]
  archive: str | None = None
  parameters: Mapping[str, int] = MappingProxyType({})


def read_movielens_100k(data: Path, items: Path, genres: Path) -> Raw:
  """Reads u.data, u.item and u.genre."""
  names = [line.rsplit('|', 1)[0] for _, line in _text_lines(genres)]
  table = {}
  for number, line in _text_lines(items):
    fields = line.split('|')
    if len(fields) != 5 + len(names):
      raise InputError(
        f"{items}, line {number}: expected {5 + len(names)} columns separated by '|' (id, title,"
        f' two dates, url, {len(names)} genre flags), found {len(fields)}: {_shown(line)};'
        ' use u.item and u.genre of one download'
      )
    flags = fields[5:]
    if not set(flags) <= {'0', '1'}:
      raise InputError(
        f'{items}, line {number}: a genre flag is neither 0 nor 1: {_shown(line)}; correct it'
      )
    marked = tuple(name for name, flag in zip(names, flags, strict=True) if flag == '1')
    _add_item(table, items, number, fields[0], Item(title=fields[1], genres=marked))
  return _read_ratings(data, '\t', table)


def read_movielens_1m(data: Path, items: Path) -> Raw:
  """Reads ratings.dat and movies.dat."""
  table = {}
  for number, line in _text_lines(items):
    fields = line.split('::')
    if len(fields) != 3:
      raise InputError(
        f"{items}, line {number}: expected 3 columns separated by '::' (id, title, genres),"
        f' found {len(fields)}: {_shown(line)}; correct the line'
      )
    genres = tuple(name for name in fields[2].split('|') if name)
    _add_item(table, items, number, fields[0], Item(title=fields[1], genres=genres))
  return _read_ratings(data, '::', table)


def read_sequences(path: Path) -> Raw:
  """Reads "user item" lines; a user's lines are in the order of time, repeats are events."""
  columns = {'user': pa.string(), 'item': pa.string()}
  table, lines = _read_columns(path, ' ', columns)
  return Raw(
    path=str(path),
    users=table['user'].combine_chunks(),
    items=table['item'].combine_chunks(),
    timestamps=None,
    ratings=None,
    lines=lines,
  )


_MOVIELENS_CITATION = (
  'F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context.'
  ' ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19.'
  ' https://doi.org/10.1145/2827872'
)
_MOVIELENS_LICENCE = (
  'MovieLens terms of GroupLens: research use with citation; no redistribution and no commercial'
  ' use without permission'
)

SOURCES = {
  'movielens_100k': Source(
    origin=Origin(
      name='MovieLens 100K',
      licence=_MOVIELENS_LICENCE,
      citation=_MOVIELENS_CITATION,
      url='https://grouplens.org/datasets/movielens/100k/',
    ),
    files=('u.data', 'u.item', 'u.genre'),
    read=read_movielens_100k,
    archive='https://files.grouplens.org/datasets/movielens/ml-100k.zip',
  ),
  'movielens_1m': Source(
    origin=Origin(
      name='MovieLens 1M',
      licence=_MOVIELENS_LICENCE,
      citation=_MOVIELENS_CITATION,
      url='https://grouplens.org/datasets/movielens/1m/',
    ),
    files=('ratings.dat', 'movies.dat'),
    read=read_movielens_1m,
    archive='https://files.grouplens.org/datasets/movielens/ml-1m.zip',
  ),
  'sequences': Source(
    origin=Origin(name='sequences', licence="that of the file's owner", citation='', url=''),
    files=('*.txt',),
    read=read_sequences,
  ),
  'synthetic': Source(
    origin=Origin(name='synthetic', licence='generated; no rights reserved', citation='', url=''),
    files=(),
    read=synthetic.generate,
    parameters={'num_users': 2000, 'num_items': 800, 'seed': 0},
  ),
}


def find_files(patterns: tuple[str, ...], raw_dir: Path) -> list[Path]:
  """The one file each pattern means; `raw_dir` may itself be the file if one is all there is."""
  wanted = ', '.join(patterns)
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
  for pattern in patterns:
    matches = fnmatch.filter(there, pattern)
    if not matches:
      raise InputError(
        f'{raw_dir}: no {pattern} in it (it holds {", ".join(there[:8])}); it must hold {wanted}'
      )
    if len(matches) > 1:
      raise InputError(
        f'{raw_dir}: {len(matches)} files match {pattern} ({", ".join(matches[:8])});'
        ' give --raw_dir the one meant'
      )
    found.append(raw_dir / matches[0])
  return found


def _read_ratings(path: Path, delimiter: str, table: dict[str, Item]) -> Raw:
  columns = {
    'user': pa.int64(),
    'item': pa.int64(),
    'rating': pa.float32(),
    'timestamp': pa.int64(),
  }
  data, lines = _read_columns(path, delimiter, columns)
  return Raw(
    path=str(path),
    users=data['user'].to_numpy(),
    items=data['item'].to_numpy(),
    timestamps=data['timestamp'].to_numpy(),
    ratings=data['rating'].to_numpy(),
    lines=lines,
    table=table,
  )


def _read_columns(
  path: Path, delimiter: str, columns: dict[str, pa.DataType]
) -> tuple[pa.Table, np.ndarray]:
  """Parses a headerless file without a Python loop; `[rows]` line numbers come with it.

  Only when a line does not parse is the file gone through again, line by line, to name it.
  """
  raw = _read_bytes(path)
  single = delimiter
  text = raw
  if delimiter == ' ':
    # Any run of blanks separates; most files need no rewriting.
    if b'\t' in raw or b'  ' in raw or re.search(rb'^ | \r?$', raw, re.MULTILINE):
      text = re.sub(rb'[ \t]+', b' ', raw)
      text = re.sub(rb'^ | (?=\r?$)', b'', text, flags=re.MULTILINE)
  elif len(delimiter) > 1:
    # The parser knows one-byte delimiters only; a tab must then not occur on its own.
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
  if not table.num_rows:
    raise InputError(f'{path}: the file is empty; download or export it again')
  lines = np.arange(1, table.num_rows + 1)
  if raw.count(b'\n') + (not raw.endswith(b'\n')) != table.num_rows:  # empty lines were skipped
    lines = np.flatnonzero([bool(line.strip()) for line in raw.splitlines()]) + 1
  return table, lines


def _bad_line(
  path: Path, raw: bytes, delimiter: str, columns: dict[str, pa.DataType], reason: str
) -> InputError:
  """Finds the first line that breaks the format and says what is wrong with it."""
  shown = {'\t': 'a tab', ' ': 'blanks'}.get(delimiter, repr(delimiter))
  expected = f'{len(columns)} columns separated by {shown} ({", ".join(columns)})'
  for number, data in enumerate(raw.splitlines(), 1):
    where = f'{path}, line {number}'
    if not (data.strip() if delimiter == ' ' else data):
      continue
    try:
      line = data.decode()
    except UnicodeDecodeError:
      return InputError(
        f'{where}: bytes that are not UTF-8: {_shown(data.decode("latin-1"))};'
        ' save the file as UTF-8'
      )
    if '\0' in line:
      return InputError(f'{where}: a NUL byte: {_shown(line)}; the file is damaged, get it again')
    fields = line.split() if delimiter == ' ' else line.split(delimiter)
    if len(fields) != len(columns):
      return InputError(
        f'{where}: expected {expected}, found {len(fields)}: {_shown(line)};'
        ' correct the line, or choose the --source that has this format'
      )
    for (name, kind), value in zip(columns.items(), fields, strict=True):
      if fault := _fault(value.strip(), kind):
        return InputError(
          f'{where}: {name} is {fault}: {value!r} in {_shown(line)}; correct the line'
        )
  return InputError(f'{path}: expected {expected}; cannot be read: {reason}')


def _fault(value: str, kind: pa.DataType) -> str:
  """What is wrong with a field, '' if nothing is."""
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


def _read_bytes(path: Path) -> bytes:
  try:
    raw = path.read_bytes()
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); make it readable') from error
  raw = raw.removeprefix(b'\xef\xbb\xbf')
  if not raw.strip():
    raise InputError(f'{path}: the file is empty; download or export it again')
  return raw


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
  """Numbered non-empty lines of a text file, UTF-8 if it is that, else latin-1."""
  raw = _read_bytes(path)
  try:
    text = raw.decode()
  except UnicodeDecodeError:
    text = raw.decode('latin-1')
  for number, line in enumerate(text.split('\n'), 1):
    line = line.removesuffix('\r')
    # Latin-1 gives every byte a character; the control ones never belong in a title.
    if control := re.search(r'[\x00-\x08\x0a-\x1f\x7f-\x9f]', line):
      raise InputError(
        f'{path}, line {number}: byte 0x{ord(control[0]):02x} is no text, neither in UTF-8 nor in'
        f' latin-1: {_shown(line)}; save the file in one of the two'
      )
    if line.strip():
      yield number, line


def _add_item(table: dict[str, Item], path: Path, number: int, name: str, item: Item) -> None:
  if not re.fullmatch(r'\d+', name, re.ASCII):
    raise InputError(f'{path}, line {number}: item id is not a whole number: {name!r}; correct it')
  name = str(int(name))  # as the ratings' integer column reads it
  if name in table:
    raise InputError(
      f'{path}, line {number}: item {name} is in the table twice; remove one of the lines'
    )
  table[name] = item


def _shown(line: str) -> str:
  return repr(line if len(line) <= 80 else line[:77] + '...')

"""Reads the user's own interactions: files of any kind in `tables`, or a table in memory.

  python -m data_prep.build_dataset --source=interactions --raw_dir=orders.csv --items=goods.csv \
    --data_dir=data/shop
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data import column_names
from ur4rec_jax.data.raw import columns as arrow_columns
from ur4rec_jax.data.raw import ids, json_lines, tables, times
from ur4rec_jax.data.raw import items as item_tables
from ur4rec_jax.data.raw.hints import hint_about_spelling, hints_about_ids
from ur4rec_jax.data.raw.records import Item, NoRows, Place, Raw
from ur4rec_jax.data.raw.selection import Selection
from ur4rec_jax.data.raw.texts import listed
from ur4rec_jax.errors import InputError

OPTIONAL = ('time', 'rating', 'event')
FILES = (tuple(f'*{kind}' for kind in tables.KINDS),)
NONE = 'none'
# Flags of the source and their defaults; None: look for it.
PARAMETERS: Mapping[str, Any] = {
  **{f'{role}_column': None for role in column_names.INTERACTIONS},
  'delimiter': None,
  'quoting': None,
  'items': None,
  **item_tables.PARAMETERS,
  'partial_items': False,
  'keep_cold_items': False,
  'where': None,
  'event_weights': None,
  'clean_ids': None,
}
# Those of them that are about the item table.
ABOUT_ITEMS = (*item_tables.PARAMETERS, 'partial_items', 'keep_cold_items')


def find(raw_dir: Path, parameters: Mapping[str, Any]) -> list[Path]:
  """Returns the file, or the files of a folder without the item table and hidden files."""
  if not raw_dir.is_dir():
    if not raw_dir.exists():
      raise InputError(
        f'{raw_dir}: no such file; --raw_dir must be a CSV, TSV, Parquet or JSON lines file of'
        ' interactions, or a folder of them'
      )
    return [raw_dir]
  items = parameters.get('items')
  files = [
    path
    for path in _files(raw_dir)
    if not (items and Path(items).exists() and path.samefile(items))
  ]
  tabular = [path for path in files if tables.kind(path) in (*tables.DELIMITERS, *tables.PARQUET)]
  # Beside other tables, JSON files are descriptions of them.
  tabular = tabular or [path for path in files if tables.kind(path) in json_lines.KINDS]
  if parameters.get('delimiter') and not tabular:
    tabular = files
  if not tabular:
    raise InputError(
      f'{raw_dir}: no CSV, TSV, Parquet or JSON lines file in it; give --raw_dir the file itself'
    )
  kinds = sorted({tables.kind(path) for path in tabular})
  if len(kinds) > 1:
    raise InputError(
      f'{raw_dir}: holds files of several kinds ({", ".join(kinds)}); give --raw_dir the one file'
      ' meant, or a folder with one kind, and --items the item table'
    )
  return tabular


def _files(folder: Path) -> Iterator[Path]:
  """Yields the files of a folder and of its folders with a name like `day=2024-05-31`."""
  for path in sorted(folder.iterdir()):
    if path.name.startswith(('.', '_')):
      continue
    if path.is_file():
      yield path
    elif path.is_dir() and '=' in path.name[1:]:
      yield from _files(path)


def find_pictures(files: list[Path], parameters: Mapping[str, Any]) -> list[Path]:
  """Returns the distinct picture files that the item table names."""
  del files
  if parameters['items'] is None:
    return []
  return item_tables.pictures(_read_items(parameters)[0])


def read(*files: Path, **parameters: Any) -> Raw:
  """Reads files of interactions, one after the other, and the item table."""
  return read_files(files, {**PARAMETERS, **parameters})


class Layout(NamedTuple):
  """Files of interactions, and which of their columns are read.

  Attributes:
    path: the file or the folder, for messages.
    files: the files.
    columns: name of the column of each role.
    selection: takes the wanted rows.
    notes: notes for the user about the files.
  """

  path: str
  files: tuple[tables.File, ...]
  columns: Mapping[str, str]
  selection: Selection
  notes: tuple[str, ...]

  def note(self, raw: Raw) -> Raw:
    """Adds the notes about the files and what the selection left out."""
    raw = self.selection.note(raw)
    return raw._replace(notes=(*raw.notes[:1], *self.notes, *raw.notes[1:]))


def read_files(files: Sequence[Path], options: Mapping[str, Any], every_kind: bool = True) -> Raw:
  """Reads files of interactions, one after the other.

  Args:
    files: the files.
    options: all of `PARAMETERS`.
    every_kind: whether every kind of event that has a weight must occur.

  Raises:
    InputError: a file or an option is wrong.
  """
  return read_layout(open_files(files, options), options, every_kind)


def open_files(files: Sequence[Path], options: Mapping[str, Any]) -> Layout:
  """Detects the format of files of interactions, and chooses their columns.

  Args:
    files: the files.
    options: all of `PARAMETERS`.

  Raises:
    InputError: a file is no table or has no such columns, or an option is wrong.
  """
  parts = with_rows(files)
  notes = []
  if len(parts) < len(files):
    notes.append(f'{len(files) - len(parts):,} of {len(files):,} files have no rows: skipped')
  opened = [
    tables.open_file(path, parse_delimiter(options['delimiter']), options['quoting'], '--quoting')
    for path in parts
  ]
  names = _with_folders(opened[0], options)
  try:
    columns = choose_columns(str(parts[0]), names, options, opened[0].delimiter)
  except InputError as error:
    check_one_table(opened, options, error)
    raise
  all_names = [(*file.columns, *file.folders) for file in opened]
  selection = Selection(str(parts[0]), columns, all_names, options)
  notes += [note for file in opened for note in file.notes]
  if opened[0].delimiter and tables.looks_like_a_row(columns.values()):
    way_out = tables.way_to_names(parts[0], len(opened[0].columns), opened[0].delimiter)
    notes.append(f'the first line gives the names of the columns; {way_out}')
  if 'time' not in columns and options['time_column'] is None:
    notes += [
      f'{name} has dates; if they are the times of the rows, pass --time_column={name}'
      for name in _columns_of_dates(opened[0], columns.values())
    ]
  path = str(files[0] if len(files) == 1 else files[0].parent)
  return Layout(path, tuple(opened), columns, selection, tuple(notes))


def check_one_table(
  opened: Sequence[tables.File], given: Mapping[str, Any], error: InputError
) -> None:
  """Raises a better error for a folder whose files are different tables, not parts of one.

  Args:
    opened: the files.
    given: flags of the source.
    error: why the columns of the first file cannot be used.
  """
  if len({file.columns for file in opened}) == 1:
    return
  fit, options = [], {**PARAMETERS, **given}
  for file in opened:
    with contextlib.suppress(InputError):
      choose_columns('', _with_folders(file, options), options, file.delimiter)
      fit.append(str(file.path))
  more = f', such as {fit[0]}' if fit else f' (of the first one: {error})'
  raise InputError(
    f'{opened[0].path.parent}: its files have different columns'
    f' ({listed([file.path.name for file in opened])}); give the one of interactions instead of the'
    f' folder{more}'
  ) from error


def _columns_of_dates(file: tables.File, used: Collection[str]) -> list[str]:
  """Returns the columns without a role whose first values are dates."""
  free = [name for name in file.columns if file.columns.count(name) == 1 and name not in used]
  return [
    name for name, values in tables.start(file, free).items() if all(map(times.is_date, values))
  ]


def with_rows(files: Sequence[Path]) -> list[Path]:
  """Leaves out the files without rows; a single file stays, and is refused when it is read.

  Raises:
    NoRows: no file has rows.
  """
  parts = [path for path in files if not tables.is_empty(path)] if len(files) > 1 else list(files)
  if not parts:
    raise NoRows(f'{files[0].parent}: no rows in its {len(files)} files; export them again')
  return parts


def read_layout(layout: Layout, options: Mapping[str, Any], every_kind: bool = True) -> Raw:
  """Reads the files of a layout; see `read_files`."""
  # The columns of the files are not kept: encoded ones take a fraction of their memory.
  table = _read_encoded(layout.files, layout.selection)
  if every_kind:
    layout.selection.check()
  locate = layout.selection.locate
  return layout.note(read_columns(layout.path, table, layout.columns, locate, options))


def _read_encoded(opened: Sequence[tables.File], selection: Selection) -> pa.Table:
  """Reads the wanted rows of all files; users and items are dictionary-encoded."""
  found, paths = [], []
  for file in opened:
    for name, use in selection.uses.items():
      if name not in (*file.columns, *file.folders):
        raise InputError(
          f'{file.path}: no column {name!r} ({use}), which {opened[0].path.name} has; its'
          f' columns are {listed(file.columns)}; give all files the same columns'
        )
    start = 0
    for table in tables.batches(file, list(selection.uses)):
      table = arrow_columns.simplified(table, str(file.path), selection.looked_at)
      place = lambda row, file=file, start=start: tables.place(file, start + row)
      start += table.num_rows
      table = arrow_columns.encoded(selection.take(table, place), selection.columns, str(file.path))
      found.append(arrow_columns.shortened(table) if file.is_text else table)
      paths.append(str(file.path))
  return arrow_columns.joined(arrow_columns.alike(found) if file.is_text else found, paths)


def _with_folders(file: tables.File, options: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the columns of a file and those columns of its folders that it needs.

  A log that has times is often kept in folders by day, and the day must not compete with the time.
  """
  asked = {options[f'{role}_column'] for role in column_names.INTERACTIONS}
  missing = [x for x in column_names.INTERACTIONS if not column_names.find(x, file.columns)]
  more = [name for name in file.folders if name not in file.columns]
  needed = asked.union(*(column_names.find(role, more) for role in missing))
  return (*file.columns, *(name for name in more if name in needed))


def from_table(data: Any, **parameters: Any) -> Raw:
  """Reads a table in memory, e.g. a pandas, Polars or Arrow one, or a HuggingFace `Dataset`.

  Args:
    data: the interactions.
    **parameters: flags of `--source=interactions`, e.g. `user_column='customer'`; `items` may be a
      table in memory, too.

  Raises:
    InputError: the table or a flag is wrong.
  """
  name = 'the table'  # In messages.
  memory = arrow_columns.in_memory(data, name)
  if unknown := sorted(set(parameters) - set(PARAMETERS)):
    raise InputError(f'{unknown[0]} is none of {", ".join(PARAMETERS)}')
  select = lambda selection: [memory.select(list(selection.uses), selection.looked_at)]
  return read_parts(name, memory.columns, select, {**PARAMETERS, **parameters})


def read_parts(
  name: str,
  names: Sequence[str],
  select: Callable[[Selection], Iterable[pa.Table]],
  options: Mapping[str, Any],
) -> Raw:
  """Reads a table of which only some columns are fetched, many rows at a time.

  Args:
    name: what messages call the table.
    names: names of its columns.
    select: fetches the columns `uses` of a selection.
    options: all of `PARAMETERS`.

  Raises:
    InputError: the table or an option is wrong.
  """
  columns = choose_columns(name, names, options, None)
  selection = Selection(name, columns, [names], options)
  found, start = [], 0
  for table in select(selection):
    table = arrow_columns.simplified(table, name, selection.looked_at)
    place = lambda row, start=start: Place(name, start + row + 1, 'row')
    start += table.num_rows
    table = selection.take(table, place)
    found.append(arrow_columns.encoded(table, selection.columns, name))
  if not start:
    raise NoRows(f'{name}: has no rows')
  selection.check()
  table = arrow_columns.joined(found, [name] * len(found))
  return selection.note(read_columns(name, table, columns, selection.locate, options))


def choose_columns(
  path: str, names: tuple[str, ...] | list[str], options: Mapping[str, Any], delimiter: str | None
) -> dict[str, str]:
  """Assigns columns to roles, by flag or by name; optional roles may stay without a column."""
  chosen: dict[str, str] = {}
  own = listed(names)
  for role in column_names.INTERACTIONS:
    flag = f'--{role}_column'
    wanted = options[f'{role}_column']
    if wanted is not None:
      if wanted == NONE and role in OPTIONAL and NONE not in names:
        continue
      if wanted not in names:
        raise InputError(f'{path}: no column {wanted!r} ({flag}); its columns are {own}')
      chosen[role] = wanted
      continue
    taken = {options[f'{other}_column'] for other in column_names.INTERACTIONS} | set(
      chosen.values()
    )
    found = column_names.find(role, [name for name in names if name not in taken])
    if len(found) > 1:
      way_out = f', or {flag}={NONE}' if role in OPTIONAL else ''
      raise InputError(
        f'{path}: {" and ".join(found)} may each be the {role}; say which: {flag}={_finest(found)}'
        f'{way_out}'
      )
    if found:
      chosen[role] = found[0]
    elif role == 'time' and (near := [name for name in names if is_like_time(name)]):
      raise InputError(
        f'{path}: {" and ".join(near)} may be the time; say so: {flag}={_finest(near)}, or'
        f' {flag}={NONE} if rows are in order of time'
      )
    elif role not in OPTIONAL:
      way_out = f'pass {flag}=NAME'
      if delimiter is not None and tables.looks_like_a_row(names):
        way_out = tables.way_to_names(path, len(names), delimiter)
      elif delimiter is not None and len(names) == 1:
        name = tables.DELIMITER_NAMES.get(delimiter, delimiter)
        way_out += f'; is the delimiter another than {name}? pass --delimiter'
      names_are = f'the first line must name the columns; it says {own}'
      if delimiter is None:
        names_are = f'its columns are {own}'
      raise InputError(f'{path}: no column is recognised as the {role} ({names_are}); {way_out}')
  if len(set(chosen.values())) < len(chosen):
    raise InputError(f'{path}: one column is given two roles: {_shown(chosen)}')
  return chosen


def is_like_time(name: str) -> bool:
  """Whether a column may hold times, so that the order of the file is used only on request."""
  words = r'time(?!_?(zone|frame))|date|stamp|[_ ]at$|^day$|datum|zeit$|fecha|tijd'
  return bool(re.search(words, name, re.IGNORECASE))


def _finest(names: Sequence[str]) -> str:
  """Returns the name for an example: a timestamp tells more than a date."""
  return next((name for name in names if 'stamp' in name.lower()), names[0])


def _shown(columns: Mapping[str, str]) -> str:
  return ', '.join(f'{role} = {name}' for role, name in columns.items())


def parse_delimiter(value: str | None) -> str | None:
  """Reads `--delimiter`; None chooses it by the extension."""
  if value is None:
    return None
  value = {'tab': '\t', '\\t': '\t', 'space': ' '}.get(value, value)
  if len(value) != 1 or not value.isascii() or value in '"\r\n':
    raise InputError(f'--delimiter must be one character, or tab, not {value!r}')
  return value


def read_columns(
  path: str, table: pa.Table, columns: Mapping[str, str], locate: Any, options: Mapping[str, Any]
) -> Raw:
  """Checks the values of encoded columns and reads the item table."""
  cleanings = ids.parse_cleanings(options['clean_ids'])
  if not table.num_rows:
    raise NoRows(f'{path}: --where and --event_weights leave out all rows; correct them')
  where = lambda row: str(locate(row))
  found = {
    role: ids.read(table[role], columns[role], where, cleanings) for role in ('user', 'item')
  }
  hints = hints_about_ids(found, cleanings)
  # Rows without a user or an item, if --clean_ids allows them.
  is_missing = found['user'].is_missing | found['item'].is_missing
  dropped = {'clean_ids': int(is_missing.sum())} if is_missing.any() else {}
  users, items = (column.ids for column in found.values())
  if dropped:
    rows, locate_any = pa.array(np.flatnonzero(~is_missing)), locate
    if not len(rows):
      raise NoRows(f'{path}: no row has a user and an item; export it again')
    locate = lambda row: locate_any(rows[row].as_py())
    table = table.filter(pa.array(~is_missing))
    users, items = users.take(rows), items.take(rows)
  users, items = ids.compact(users), ids.compact(items)
  timestamps, ticks, ratings = None, 1, None
  if 'time' in columns:
    timestamps, ticks, hint = times.parse(table['time'], columns['time'], where)
    hints += [hint] if hint else []
  if 'rating' in table.column_names:
    name = columns['rating'] if 'rating' in columns else columns['event']
    ratings = _ratings(table['rating'], name, where)
  return complete(
    Raw(
      path=path,
      users=users,
      items=items,
      timestamps=timestamps,
      ratings=ratings,
      lines=locate,
      ticks_per_second=ticks,
      hints=tuple(hints),
      dropped=dropped,
    ),
    columns,
    options,
  )


def complete(raw: Raw, columns: Mapping[str, str], options: Mapping[str, Any]) -> Raw:
  """Adds the item table, and notes on the columns and on the items.

  Args:
    raw: checked rows.
    columns: name of the column of each role.
    options: all of `PARAMETERS`.

  Raises:
    InputError: the item table or a flag of it is wrong.
  """
  cleanings = ids.parse_cleanings(options['clean_ids'])
  notes, hints = [f'columns: {_shown(columns)}'], list(raw.hints)
  if 'time' not in columns:
    notes.append('no time column: rows count as being in order of time, file by file')
  catalogue: dict[str, Item] | None = None
  if options['items'] is not None:
    catalogue, more = _read_items(options)
    names, known = raw.items.dictionary.to_pylist(), set(catalogue)
    unknown, cold = [name for name in names if name not in known], known.difference(names)
    misspelled = hint_about_spelling(unknown, catalogue, cleanings)
    if misspelled and not options['partial_items']:
      raise InputError(f'{raw.path}: {misspelled}')
    hints += [misspelled] if misspelled else []
    notes += more
    if unknown and options['partial_items']:
      notes.append(f'{len(unknown):,} items are not in the item table: kept without text')
    if cold and not options['keep_cold_items']:
      hints.append(
        f'{len(cold):,} items of the item table have no interactions and are left out;'
        ' --keep_cold_items keeps them, so that they can be recommended'
      )
  else:
    _check_no_item_flags(options)
  return raw._replace(
    table=catalogue,
    table_is_partial=bool(options['partial_items']),
    notes=tuple(notes),
    hints=tuple(hints),
    keep_cold_items=bool(options['keep_cold_items']),
  )


def _read_items(options: Mapping[str, Any]) -> tuple[dict[str, Item], list[str]]:
  settings = {name: options[name] for name in item_tables.PARAMETERS}
  cleanings = ids.parse_cleanings(options['clean_ids'])
  if isinstance(options['items'], str | Path):
    return item_tables.read(Path(options['items']), cleanings, **settings)
  name = 'the item table'
  memory = arrow_columns.in_memory(options['items'], name)
  rows = lambda columns: (
    (Place(name, number, 'row'), row)
    for number, row in enumerate(memory.select(columns).to_pylist(), 1)
  )
  read_image = item_tables.image_finder(settings.pop('images'))
  return item_tables.from_table(
    item_tables.Table(name, memory.columns, rows), read_image, cleanings, **settings
  )


def _check_no_item_flags(options: Mapping[str, Any]) -> None:
  for name in ABOUT_ITEMS:
    if options[name] != PARAMETERS[name]:
      raise InputError(f'--{name} is about the item table; pass it with --items, or leave it out')


def _ratings(column: pa.ChunkedArray, name: str, where: Any) -> np.ndarray:
  if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
    number = r'^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$'
    if (odd := tables.first_true(pc.invert(pc.match_substring_regex(column, number)))) is not None:
      raise InputError(
        f'{where(odd)}: {name} is not a number: {column[odd].as_py()!r}; correct it, or leave the'
        f' ratings out: --rating_column={NONE}'
      )
    kind = pa.float32()
    chunks = [tables.plain_numbers(chunk).cast(kind, safe=False) for chunk in column.chunks]
    column = pa.chunked_array(chunks, kind)
  elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
    raise InputError(
      f'{where(0)}: {name} is of type {column.type}, not numbers; convert it, or leave the ratings'
      f' out: --rating_column={NONE}'
    )
  values = column.cast(pa.float32(), safe=False).to_numpy()
  if not np.isfinite(values).all():
    row = int(np.argmin(np.isfinite(values)))
    raise InputError(
      f'{where(row)}: {name} is {values[row]}; correct it, or leave the ratings out:'
      f' --rating_column={NONE}'
    )
  return values

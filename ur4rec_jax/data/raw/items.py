"""Reads item tables in CSV, TSV, Parquet or JSON lines."""

import os
import re
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ur4rec_jax.data import column_names
from ur4rec_jax.data.raw import ids, json_lines, tables
from ur4rec_jax.data.raw.records import Item, Place
from ur4rec_jax.data.raw.texts import listed, shown
from ur4rec_jax.errors import InputError

PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp')
# The first of several picture files in one field, as shops list them, and the character behind it.
_FIRST_FILE = re.compile(rf'(.+?({"|".join(map(re.escape, PICTURES))}))[\s,;|]', re.IGNORECASE)
_NO_GENRES = ('', '(no genres listed)')  # MovieLens marks films without genres so.
# Flags of the table and their defaults; None recognises the column by its name.
PARAMETERS: Mapping[str, Any] = {
  **{f'{role}_column': None for role in column_names.ITEMS},
  'text_columns': None,
  'images': None,
  'items_quoting': None,
}

_MOST_COLUMNS = 12  # Ignored columns that a note lists.

Rows = Iterable[tuple[Place, dict[str, Any]]]


class Table(NamedTuple):
  """A table whose rows become Python objects: names of its columns, and rows of some columns.

  Attributes:
    path: file or description, for messages.
    columns: names of all columns.
    rows: reads the rows of some columns, each with its position.
    notes: notes for the user about how the rows were read.
    delimiter: character between the columns of a text file.
  """

  path: str
  columns: Sequence[str]
  rows: Callable[[list[str]], Rows]
  notes: tuple[str, ...] = ()
  delimiter: str | None = None


def read(
  path: Path, cleanings: Collection[str] = (), **parameters: Any
) -> tuple[dict[str, Item], list[str]]:
  """Reads an item table; returns the items by id, and notes for the user.

  Args:
    path: the table.
    cleanings: some of `ids.CLEANINGS`.
    **parameters: see `PARAMETERS`; picture files are relative to `images`, or to the table. In
      `images`, pictures are also found by the last part of a URL and by the item's id.
  """
  if not path.is_file():
    raise InputError(
      f'{path}: no such file; --items must be a CSV, TSV, Parquet or JSON lines file'
    )
  images = parameters.pop('images', None)
  table = open_table(path, parameters.get('items_quoting'))
  found, notes = from_table(table, image_finder(images, path.parent), cleanings, **parameters)
  if images is not None and not any(item.image for item in found.values()):
    notes.append(
      f'no item has a picture: no file of {images} has the id of an item as its name, and no column'
      ' is used that names files; --image_column=NAME says which does'
    )
  return found, notes


def open_table(path: Path, quoting: str | None = None) -> Table:
  """Opens an item table; see `tables.open_file` for `quoting`."""
  if tables.kind(path) in json_lines.KINDS:
    names = list(json_lines.columns(path))
    return Table(str(path), names, lambda columns: json_lines.rows(path, columns))
  file = tables.open_file(path, quoting=quoting, flag='--items_quoting')
  rows = lambda columns: tables.records(file, columns)
  return Table(str(path), file.columns, rows, file.notes, file.delimiter)


def from_table(
  source: Table,
  read_image: Callable[[Any, str, str, str], Path | str | None],
  cleanings: Collection[str] = (),
  **parameters: Any,
) -> tuple[dict[str, Item], list[str]]:
  """Reads an item table that is open or in memory; see `read`.

  Args:
    source: the table.
    read_image: returns the picture of an item from the value in the table, the name of the column,
      the position of the row and the item's id; see `image_finder`.
    cleanings: some of `ids.CLEANINGS`.
    **parameters: see `PARAMETERS`, without `images`.
  """
  options = {**PARAMETERS, **parameters}
  path, names = source.path, source.columns
  extra = _text_columns(path, names, options['text_columns'])
  columns = _choose_columns(path, names, options, extra, source.delimiter)
  table: dict[str, Item] = {}
  places: dict[str, Place] = {}
  for place, row in source.rows(list(dict.fromkeys([*columns.values(), *extra]))):
    where = str(place)
    name = _cleanable_id(row.get(columns['item_id']), columns['item_id'], where, cleanings)
    if name is None:
      continue
    if name in table:
      raise InputError(
        f'{where}: item {shown(name)} is in the table twice, first in {places[name].unit}'
        f' {places[name].number}; remove one of the two'
      )
    value = lambda role, row=row: row.get(columns[role]) if role in columns else None
    texts = [text(value('description'))]
    texts += [f'{column}: {found}' for column in extra if (found := text(row.get(column)))]
    places[name] = place
    table[name] = Item(
      title=text(value('title')),
      genres=genres(value('genres')),
      description='\n'.join(filter(None, texts)),
      image=read_image(value('image'), columns.get('image', ''), where, name),
    )
  if not table:
    raise InputError(f'{path}: no items in the table; export it again')
  table = ids.clean_table(table, cleanings) if cleanings else table
  used = ', '.join(f'{role} = {name}' for role, name in columns.items())
  if extra:
    used += f', text = {"+".join(extra)}'
  if ignored := [name for name in names if name not in (*columns.values(), *extra)]:
    used += f'; ignored: {listed(ignored, _MOST_COLUMNS)}'
  return table, [f'item table: {used}', *source.notes]


def id_column(path: str | Path, names: Sequence[str], wanted: str | None) -> str:
  """Finds the column of the items' ids."""
  others = dict.fromkeys((f'{role}_column' for role in column_names.ITEMS), 'none')
  return _choose_columns(str(path), names, others | {'item_id_column': wanted})['item_id']


def pictures(table: Mapping[str, Item]) -> list[Path]:
  """Returns the distinct picture files of the items of a table."""
  return list({item.image: None for item in table.values() if isinstance(item.image, Path)})


def text(value: Any) -> str:
  """Converts a value to text, '' for none; the parts of a list are joined."""
  if value is None or (isinstance(value, float) and value != value):
    return ''
  if isinstance(value, list | tuple):
    return ' '.join(filter(None, map(text, value)))
  # JSON may hold halves of surrogate pairs, which UTF-8 files cannot.
  return str(_decoded(value)).encode(errors='replace').decode().strip()


def _decoded(value: Any) -> Any:
  """Decodes bytes, as which some programs store the texts of Parquet files."""
  return value.decode(errors='backslashreplace') if isinstance(value, bytes) else value


def genres(value: Any) -> tuple[str, ...]:
  """Returns the distinct names in a list, nested or not, or in a text separated by `|`."""
  if isinstance(value, list | tuple):
    return tuple(dict.fromkeys(name for part in value for name in genres(part)))
  names = dict.fromkeys(part.strip() for part in text(value).split('|'))
  return tuple(name for name in names if name not in _NO_GENRES)


def _choose_columns(
  path: str,
  names: Sequence[str],
  options: Mapping[str, Any],
  extra: Sequence[str] = (),
  delimiter: str | None = None,
) -> dict[str, str]:
  """Returns the column of each role, by flag or by name; columns in `extra` have another use."""
  chosen: dict[str, str] = {}
  for role in column_names.ITEMS:
    flag = f'--{role}_column'
    wanted = options[f'{role}_column']
    if wanted == 'none' and role != 'item_id' and wanted not in names:
      continue
    if wanted is not None:
      if wanted not in names:
        raise InputError(
          f'{path}: no column {wanted!r} ({flag}); its columns are {", ".join(names)}'
        )
      chosen[role] = wanted
      continue
    free = [name for name in names if name not in chosen.values() and name not in extra]
    found = column_names.find(role, free)
    # A row may have a usual name in it, such as news, and a table may have years as names.
    values = [name for name in names if '://' in name] if found else names
    if role == 'item_id' and delimiter and tables.looks_like_a_row(values):
      raise no_names(path, names, len(names), delimiter)
    if len(found) > 1:
      way_out = '' if role == 'item_id' else f', or {flag}=none'
      raise InputError(
        f'{path}: {" and ".join(found)} may each be the {role}; say which: {flag}={found[0]}'
        f'{way_out}'
      )
    if found:
      chosen[role] = found[0]
    elif role == 'item_id':
      raise InputError(
        f"{path}: no column is recognised as the items' ids; its columns are {', '.join(names)};"
        f' pass {flag}=NAME'
      )
  return chosen


def no_names(path: str | Path, names: Sequence[str], width: int, delimiter: str) -> InputError:
  """Creates the error for an item table whose first line is an item.

  Args:
    path: the table.
    names: what the first line says.
    width: number of columns.
    delimiter: character between them.
  """
  way_out = tables.way_to_names(path, width, delimiter, ('id', 'title'))
  return InputError(
    f'{path}: the first line must name the columns; it says {listed(names)}; {way_out}'
  )


def _text_columns(path: str, names: Sequence[str], wanted: str | None) -> list[str]:
  extra = [name.strip() for name in (wanted or '').split(',') if name.strip()]
  for name in extra:
    if name not in names:
      raise InputError(f'{path}: no column {name!r} (--text_columns); it has {", ".join(names)}')
  return extra


def _cleanable_id(value: Any, column: str, where: str, cleanings: Collection[str]) -> str | None:
  """Converts an id to text; None if `--clean_ids` leaves its row out."""
  if not text(value):
    if ids.MISSING in cleanings or ids.EMPTY in cleanings:
      return None
    raise InputError(
      f'{where}: {column} is empty; fill it in or remove the row, or build with'
      f' --clean_ids={ids.MISSING}'
    )
  # pandas makes whole numbers floats where one of them is missing.
  if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
    if ids.DECIMALS in cleanings:
      return str(int(value))
    raise InputError(
      f'{where}: {column} is {value!r}; ids are text or whole numbers: convert the column, or build'
      f' with --clean_ids={ids.DECIMALS} if all of them are whole numbers'
    )
  return original_id(value, column, where)


def original_id(value: Any, column: str, where: str) -> str:
  """Converts an id to text; InputError if it is empty or no id."""
  if isinstance(value, bool | float | list | dict):
    raise InputError(f'{where}: {column} is {value!r}; ids are text or whole numbers: correct it')
  name = '' if value is None else json_lines.encodable(str(_decoded(value)))
  if not name.strip():
    raise InputError(f'{where}: {column} is empty; fill it in or remove the row')
  return name


def image_finder(
  images: str | Path | None, folder: Path | None = None
) -> Callable[[Any, str, str, str], Path | str | None]:
  """Returns the function that finds the picture of an item, for `from_table`.

  Args:
    images: folder of the pictures, or None. Its files are also found by name: `7.jpg` belongs to
      the URL `https://shop.example/img/7.jpg`, and to item 7 if the table names no picture of it.
    folder: where file names of the table lead if `images` is None.

  Raises:
    InputError: there is no folder `images`.
  """
  if images is None:
    return lambda value, column, where, item: find_image(folder, value, column, where)
  images, by_name, by_stem = Path(images), {}, {}
  if not images.is_dir():
    raise InputError(f'{images}: no such folder; --images must be the folder with the pictures')
  for path in sorted(images.iterdir()):
    if path.suffix.lower() in PICTURES and path.is_file():
      by_name[path.name] = by_stem[path.stem] = path.resolve()

  def find(value: Any, column: str, where: str, item: str) -> Path | str | None:
    found = find_image(images, value, column, where)
    if isinstance(found, str):
      name = urllib.parse.unquote(urllib.parse.urlsplit(found).path).rpartition('/')[2]
      return by_name.get(name, found)
    return found or by_stem.get(item)

  return find


def find_image(folder: Path | None, value: Any, column: str, where: str) -> Path | str | None:
  """Returns an existing picture file inside the folder, or an unchanged URL; the first of several.

  Shops list all pictures of an item, the main one first.
  """
  name = text(value)
  if not name:
    return None
  urls = re.split(r'[\s,;|](?=https?://)', name, maxsplit=1)
  if len(urls) > 1:
    name = urls[0].rstrip(' ,;|')
  if re.match(r'https?://\S+$', name):
    return name
  # The name of a single file may have such characters in it.
  if (files := _FIRST_FILE.match(name)) and not os.path.isfile((folder or Path()) / name):
    name = files[1]
  fault = ''
  if folder is None:
    fault = 'is no URL; for picture files pass images=FOLDER'
  elif Path(name).suffix.lower() not in PICTURES:
    fault = f'is neither a URL nor a file ending in {", ".join(PICTURES)}; correct it'
  else:
    try:
      path = (folder / name).resolve()
      if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()):
        fault = f'leads out of {folder}; put the pictures there, or pass --images=FOLDER'
      elif not path.is_file():
        fault = f'is not in {folder}; put it there, pass --images=FOLDER, or leave the field empty'
    except (OSError, ValueError):  # The text is too long for a path, or has a NUL byte.
      fault = 'is no file name; correct it'
  if fault:
    raise InputError(
      f'{where}: {column} {shown(name)} {fault}, or leave all pictures out: --image_column=none'
    )
  return path

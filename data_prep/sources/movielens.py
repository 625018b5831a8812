"""Reads MovieLens: the original archives and the "Multimodal_Datasets" folders."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.sources import raw_files, spreadsheets
from ur4rec_jax.data.raw import archives
from ur4rec_jax.data.raw import items as item_tables
from ur4rec_jax.data.raw.records import Item, Raw
from ur4rec_jax.data.raw.texts import shown
from ur4rec_jax.errors import InputError


def read_movielens_100k(data: Path, items: Path, genres: Path) -> Raw:
  """Reads u.data, u.item and u.genre."""
  names = [line.rsplit('|', 1)[0] for _, line in raw_files.text_lines(genres)]
  table: dict[str, Item] = {}
  for number, line in raw_files.text_lines(items):
    fields = line.split('|')
    if len(fields) != 5 + len(names):
      raise InputError(
        f"{items}, line {number}: expected {5 + len(names)} columns separated by '|' (id, title,"
        f' two dates, url, {len(names)} genre flags), found {len(fields)}: {shown(line)};'
        ' use u.item and u.genre of one download'
      )
    flags = fields[5:]
    if not set(flags) <= {'0', '1'}:
      raise InputError(
        f'{items}, line {number}: a genre flag is neither 0 nor 1: {shown(line)}; correct it'
      )
    marked = tuple(name for name, flag in zip(names, flags, strict=True) if flag == '1')
    _add_item(table, items, number, fields[0], Item(title=fields[1], genres=marked))
  return read_ratings(data, '\t', table)


def read_movielens_1m(data: Path, items: Path) -> Raw:
  """Reads ratings.dat and movies.dat."""
  table: dict[str, Item] = {}
  for number, line in raw_files.text_lines(items):
    fields = line.split('::')
    if len(fields) != 3:
      raise InputError(
        f"{items}, line {number}: expected 3 columns separated by '::' (id, title, genres),"
        f' found {len(fields)}: {shown(line)}; correct the line'
      )
    item = Item(title=fields[1], genres=item_tables.genres(fields[2]))
    _add_item(table, items, number, fields[0], item)
  return read_ratings(data, '::', table)


def read_multimodal(ratings: Path, movies: Path, texts: Path, *, images: str | None = None) -> Raw:
  """Reads a folder of "Multimodal_Datasets": MovieLens ratings with texts and pictures.

  Args:
    ratings: ratings.dat.
    movies: movies.dat.
    texts: text.xls, .xlsx or .csv with the columns movie-id and review.
    images: folder of pictures named by movie; None takes `image` beside the ratings, if there.
  """
  raw = read_movielens_1m(ratings, movies)
  table = dict(raw.table or {})
  described = dict(_reviews(texts))
  pictures = _pictures(ratings, images)
  for name, item in table.items():
    table[name] = item._replace(description=described.get(name, ''), image=pictures.get(name))
  notes = []
  for what, found in (('texts', described), ('pictures', pictures)):
    note = f'{what}: of {sum(name in found for name in table):,} of {len(table):,} movies'
    if strangers := sum(name not in table for name in found):
      note += f'; {strangers:,} of other movies left out'
    notes.append(note)
  return raw._replace(table=table, notes=tuple(notes))


def _reviews(path: Path) -> Iterator[tuple[str, str]]:
  """Reads movie ids and texts, each movie once."""
  rows = spreadsheets.rows(path)
  number, header = next(rows, (0, []))
  names = [item_tables.text(value).lower() for value in header]
  for name in ('movie-id', 'review'):
    if names.count(name) != 1:
      raise InputError(
        f'{path}, row {number}: no column {name!r}; the first row must name the columns movie-id'
        f' and review, it says {", ".join(names) or "nothing"}'
      )
  id_at, text_at = names.index('movie-id'), names.index('review')
  seen: dict[str, int] = {}
  for number, row in rows:
    row = [*row, *[None] * (len(names) - len(row))]
    if not any(item_tables.text(value) for value in row):
      continue
    # Numbers in spreadsheets are floats.
    name = re.sub(r'\.0+$', '', item_tables.text(row[id_at]))
    where = f'{path}, row {number}'
    if not re.fullmatch(r'\d+', name, re.ASCII):
      raise InputError(f'{where}: movie-id is not a whole number: {row[id_at]!r}; correct it')
    name = str(int(name))
    if name in seen:
      raise InputError(
        f'{where}: movie {name} has a text already in row {seen[name]}; remove one of the two'
      )
    seen[name] = number
    if review := item_tables.text(row[text_at]):
      yield name, review


def find_pictures(files: list[Path], parameters: Mapping[str, Any]) -> list[Path]:
  """Returns the picture files outside of the raw files that `read_multimodal` uses."""
  if parameters['images'] is None and archives.is_archive(files[0]):
    return []  # They are in the archive, and its hash covers them.
  return list(_pictures(files[0], parameters['images']).values())


def _pictures(ratings: Path, images: str | None) -> dict[str, Path]:
  """Finds pictures named after a movie id, by id; other files are ignored."""
  folder = Path(images) if images is not None else ratings.parent / 'image'
  if images is not None and not folder.is_dir():
    raise InputError(f'{images}: no such folder; --images must be the folder with the pictures')
  found: dict[str, Path] = {}
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if not re.fullmatch(r'\d+\.(png|jpe?g)', path.name, re.ASCII | re.IGNORECASE):
      continue
    name = str(int(path.stem))
    if name in found:
      raise InputError(
        f'{folder}: two pictures of movie {name}: {found[name].name} and {path.name}; remove one'
      )
    if path.is_file():
      found[name] = path
  return found


def read_ratings(path: Path, delimiter: str, table: dict[str, Item]) -> Raw:
  columns = {
    'user': pa.int64(),
    'item': pa.int64(),
    'rating': pa.float32(),
    'timestamp': pa.int64(),
  }
  data, lines = raw_files.read_columns(path, delimiter, columns)
  return Raw(
    path=str(path),
    users=data['user'].to_numpy(),
    items=data['item'].to_numpy(),
    timestamps=data['timestamp'].to_numpy(),
    ratings=data['rating'].to_numpy(),
    lines=lines,
    table=table,
  )


def _add_item(table: dict[str, Item], path: Path, number: int, name: str, item: Item) -> None:
  if not re.fullmatch(r'\d+', name, re.ASCII):
    raise InputError(f'{path}, line {number}: item id is not a whole number: {name!r}; correct it')
  name = str(int(name))  # The form that the integer column of ratings has.
  if name in table:
    raise InputError(
      f'{path}, line {number}: item {name} is in the table twice; remove one of the lines'
    )
  table[name] = item

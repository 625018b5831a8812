"""Reads Amazon reviews of 2014: the original pair of files, or a copy as CSV and JSON lines."""

import ast
import html
import json
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json

from ur4rec_jax.data.raw import archives, interactions, items, tables
from ur4rec_jax.data.raw.records import Item, Place, Raw
from ur4rec_jax.data.raw.texts import shown, utf8_lines
from ur4rec_jax.errors import InputError

# Either layout: as downloaded, or the pair.
FILES = (('reviews_*.json', 'interactions.csv'), ('meta_*.json', 'items.jsonl'))
_FIELDS = {
  'reviewerID': pa.string(),
  'asin': pa.string(),
  'overall': pa.float32(),
  'unixReviewTime': pa.int64(),
}
_TEXTS = ('brand', 'price')  # Fields that are appended to the description.


def read(reviews: Path, metadata: Path) -> Raw:
  """Reads either layout; rows with equal times keep the order of the file."""
  if tables.kind(reviews) == '.csv':
    return _read_pair(reviews, metadata)
  columns = _read_reviews(reviews)
  users, asins = (columns[name].combine_chunks() for name in ('reviewerID', 'asin'))
  # Lines are Python dict literals, JSON in later releases.
  records = ((number, _parse(text)) for number, text in utf8_lines(metadata))
  table, notes = catalogue(metadata, records, 'asin', _item)
  known = pa.array(list(table))
  if missing := pc.sum(pc.invert(pc.is_in(pc.unique(asins), known))).as_py():
    notes.append(f'{missing:,} items have no metadata: kept without text')
  return Raw(
    path=str(reviews),
    users=users,
    items=asins,
    timestamps=columns['unixReviewTime'].to_numpy(),
    ratings=columns['overall'].to_numpy(),
    lines=lambda row: Place(str(reviews), line(reviews, row)),
    table=table,
    table_is_partial=True,
    notes=tuple(notes),
  )


def _read_pair(reviews: Path, metadata: Path) -> Raw:
  return interactions.read(
    reviews,
    items=str(metadata),
    user_column='reviewerID',
    item_column='asin',
    time_column='unixReviewTime',
    item_id_column='asin',
    title_column='title',
    genres_column='categories',
    text_columns=','.join(_TEXTS),
  )


def _read_reviews(path: Path) -> pa.Table:
  try:
    if path.stat().st_size == 0:
      raise InputError(f'{path}: the file is empty; download it again')
    with archives.open_file(path) as file:
      table = arrow_json.read_json(
        file,
        read_options=arrow_json.ReadOptions(block_size=1 << 23),
        parse_options=arrow_json.ParseOptions(
          explicit_schema=pa.schema(_FIELDS), unexpected_field_behavior='ignore'
        ),
      )
  except pa.ArrowInvalid as error:
    check_reviews(path, utf8_lines(path), _FIELDS)
    raise InputError(f'{path}: cannot be read ({error}); download it again') from error
  except OSError as error:
    raise InputError(
      f'{path}: cannot be read ({error.strerror or error}); download it again'
    ) from error
  if not table.num_rows:
    raise InputError(f'{path}: the file is empty; download it again')
  for name in _FIELDS:
    column = table[name]
    bad = pc.is_null(column)
    if name in ('reviewerID', 'asin'):
      bad = pc.or_kleene(bad, pc.equal(column, ''))
    elif name == 'overall':
      bad = pc.or_kleene(bad, pc.invert(pc.is_finite(column)))
    if (row := tables.first_true(bad)) is not None:
      raise InputError(
        f'{path}, line {line(path, row)}: {name} is missing or empty; download the file again, or'
        ' remove the line'
      )
  return table


def check_reviews(
  path: Any, lines: Iterable[tuple[int, str | bytes]], fields: Mapping[str, pa.DataType]
) -> None:
  """Reads reviews line by line and raises an error for the first wrong one."""
  for number, line in lines:
    where = f'{path}, line {number}'
    try:
      review = json.loads(line)
    except (ValueError, RecursionError) as error:
      text = line.decode(errors='replace').strip() if isinstance(line, bytes) else line
      raise InputError(
        f'{where}: is no JSON: {shown(text)}; download the file again, or correct the line'
      ) from error
    if not isinstance(review, dict):
      raise InputError(f'{where}: is no JSON object: {shown(str(review))}; correct it')
    for name, kind in fields.items():
      value = review.get(name)
      wanted = (
        str if pa.types.is_string(kind) else int if pa.types.is_integer(kind) else (int, float)
      )
      if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
        what = 'a text' if wanted is str else 'a whole number' if wanted is int else 'a number'
        raise InputError(f'{where}: {name} is {value!r}, not {what}; correct the line')


def line(path: Path, row: int) -> int:
  """Returns the line number of a row (from 0) of JSON lines."""
  for index, (number, _) in enumerate(utf8_lines(path)):
    if index == row:
      return number
  raise InputError(f'{path}: not one JSON object a line; download the file again')


def catalogue(
  path: Any,
  records: Iterable[tuple[int, Any]],
  key: str,
  item: Callable[[dict[str, Any]], Item],
  wanted: Container[str] | None = None,
) -> tuple[dict[str, Item], list[str]]:
  """Reads items by id, with notes on unusable lines.

  Args:
    path: file of the metadata, for messages.
    records: line numbers and parsed lines; a line that is no dict counts as unusable.
    key: field of the id.
    item: converts a record to an item.
    wanted: ids to keep; None keeps all.
  """
  table: dict[str, Item] = {}
  unparsed, repeated, total = [], 0, 0
  for number, record in records:
    total += 1
    name = record.get(key) if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
      unparsed.append(number)
    elif name in table:
      repeated += 1
    elif wanted is None or name in wanted:
      table[name] = item(record)
  if len(unparsed) == total:
    raise InputError(
      f'{path}: none of its {total:,} lines is an object with the field {key}; get the metadata'
      " that belongs to the reviews' category"
    )
  notes = []
  if unparsed:
    first = ', '.join(map(str, unparsed[:5])) + (', ...' if len(unparsed) > 5 else '')
    notes.append(
      f'{PurePosixPath(str(path)).name}: {len(unparsed):,} of {total:,} lines cannot be parsed'
      f' (lines {first}); their items are kept without text'
    )
  if repeated:
    notes.append(
      f'{PurePosixPath(str(path)).name}: {repeated:,} repeated items; the first of each counts'
    )
  return table, notes


def _parse(text: str) -> Any:
  for parse in (ast.literal_eval, json.loads):
    try:
      return parse(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      continue
  return None


def _item(record: dict[str, Any]) -> Item:
  texts = [items.text(record.get('description'))]
  texts += [f'{name}: {value}' for name in _TEXTS if (value := items.text(record.get(name)))]
  image = items.text(record.get('imUrl'))
  return Item(
    title=html.unescape(items.text(record.get('title'))),
    genres=tuple(map(html.unescape, items.genres(record.get('categories')))),
    description=html.unescape('\n'.join(filter(None, texts))),
    image=image if image.startswith(('http://', 'https://')) else None,
  )

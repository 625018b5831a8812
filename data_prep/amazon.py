"""Amazon reviews of 2014: the original pair of files, or the same as CSV and JSON lines."""

import ast
import html
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json

from data_prep import archives, interactions, items, raw_files, tables
from data_prep.prepare import Item, Place, Raw
from ur4rec_jax.errors import InputError

# Either layout: as downloaded, or the pair.
FILES = (('reviews_*.json', 'interactions.csv'), ('meta_*.json', 'items.jsonl'))
_FIELDS = {
  'reviewerID': pa.string(),
  'asin': pa.string(),
  'overall': pa.float32(),
  'unixReviewTime': pa.int64(),
}
_TEXTS = ('brand', 'price')  # fields that join the description


def read(reviews: Path, metadata: Path) -> Raw:
  """Reads either layout; rows with equal times keep the order of the file."""
  if tables.kind(reviews) == '.csv':
    return _read_pair(reviews, metadata)
  columns = _read_reviews(reviews)
  users, asins = (columns[name].combine_chunks() for name in ('reviewerID', 'asin'))
  table, notes = _read_metadata(metadata)
  known = pa.array(list(table))
  if missing := pc.sum(pc.invert(pc.is_in(pc.unique(asins), known))).as_py():
    notes.append(f'{missing:,} items have no metadata: kept without text')
  return Raw(
    path=str(reviews),
    users=users,
    items=asins,
    timestamps=columns['unixReviewTime'].to_numpy(),
    ratings=columns['overall'].to_numpy(),
    lines=lambda row: Place(str(reviews), _line(reviews, row)),
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
    _check_reviews(path)
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
        f'{path}, line {_line(path, row)}: {name} is missing or empty; download the file again, or'
        ' remove the line'
      )
  return table


def _check_reviews(path: Path) -> None:
  """Goes through the reviews line by line and raises what is wrong with them."""
  for number, line in raw_files.utf8_lines(path):
    where = f'{path}, line {number}'
    try:
      review = json.loads(line)
    except ValueError as error:
      raise InputError(
        f'{where}: is no JSON: {raw_files.shown(line)}; download the file again, or correct the'
        ' line'
      ) from error
    if not isinstance(review, dict):
      raise InputError(f'{where}: is no JSON object: {raw_files.shown(line)}; correct the line')
    for name, kind in _FIELDS.items():
      value = review.get(name)
      wanted = (
        str if pa.types.is_string(kind) else int if pa.types.is_integer(kind) else (int, float)
      )
      if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
        what = 'a text' if wanted is str else 'a whole number' if wanted is int else 'a number'
        raise InputError(f'{where}: {name} is {value!r}, not {what}; correct the line')


def _line(path: Path, row: int) -> int:
  for index, (number, _) in enumerate(raw_files.utf8_lines(path)):
    if index == row:
      return number
  raise IndexError(row)


def _read_metadata(path: Path) -> tuple[dict[str, Item], list[str]]:
  """Lines are Python dict literals (JSON in later releases); what is neither is counted."""
  table: dict[str, Item] = {}
  unparsed, repeated, total = [], 0, 0
  for number, line in raw_files.utf8_lines(path):
    total += 1
    record = _parse(line)
    asin = record.get('asin') if isinstance(record, dict) else None
    if not isinstance(asin, str) or not asin:
      unparsed.append(number)
    elif asin in table:
      repeated += 1
    else:
      table[asin] = _item(record)
  if not table:
    raise InputError(
      f'{path}: none of its {total:,} lines is a Python or JSON object with an asin; get the'
      " metadata that belongs to the reviews' category"
    )
  notes = []
  if unparsed:
    first = ', '.join(map(str, unparsed[:5])) + (', ...' if len(unparsed) > 5 else '')
    notes.append(
      f'{path.name}: {len(unparsed):,} of {total:,} lines cannot be parsed (lines {first}); their'
      ' items are kept without text'
    )
  if repeated:
    notes.append(f'{path.name}: {repeated:,} repeated items; the first of each counts')
  return table, notes


def _parse(line: str) -> Any:
  for parse in (ast.literal_eval, json.loads):
    try:
      return parse(line)
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

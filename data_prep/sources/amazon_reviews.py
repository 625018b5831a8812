"""Reads Amazon reviews of 2023: JSON lines or Parquet, from files or the HuggingFace hub.

  python -m data_prep.build_dataset --source=amazon_reviews --raw_dir=raw/all_beauty \
    --data_dir=data/all_beauty
  python -m data_prep.build_dataset --source=amazon_reviews --category=All_Beauty \
    --hub_name=McAuley-Lab/Amazon-Reviews-2023 --data_dir=data/all_beauty

A category may be larger than memory. Reviews are read in batches, and only the four used columns
are kept. Metadata is read only for items that remain after filtering.
"""

import functools
import html
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import json as arrow_json

from data_prep.sources import amazon
from ur4rec_jax.data.raw import archives, interactions, items, tables
from ur4rec_jax.data.raw import columns as arrow_columns
from ur4rec_jax.data.raw.records import Item, Place, Raw
from ur4rec_jax.errors import InputError

FILES = (('*.jsonl', 'raw_review_*/*.parquet'), ('meta_*.jsonl', 'raw_meta_*/*.parquet'))
PARAMETERS: Mapping[str, Any] = {'hub_name': None, 'category': None, 'clean_ids': None}
COLUMNS = {'user': 'user_id', 'item': 'parent_asin', 'time': 'timestamp', 'rating': 'rating'}
_FIELDS = {
  'user_id': pa.string(),
  'parent_asin': pa.string(),
  'timestamp': pa.int64(),
  'rating': pa.float32(),
}
_METADATA = (
  *('parent_asin', 'title', 'main_category', 'categories', 'features', 'description', 'store'),
  *('price', 'images'),
)
_ON_THE_HUB = ('raw/review_categories/{}.jsonl', 'raw/meta_categories/meta_{}.jsonl')
_BATCH_BYTES, _BATCH_LINES = 1 << 23, 1 << 13

File = Path | str  # Text is a URL on the hub.


def find(raw_dir: Path, parameters: Mapping[str, Any]) -> list[Path]:
  """Finds the reviews and metadata of one category anywhere in a folder."""
  if parameters.get('hub_name'):
    raise InputError('--hub_name reads from the hub and --raw_dir from files; pass one of them')
  wanted = parameters.get('category')
  found: tuple[dict[str, list[Path]], ...] = ({}, {})  # Reviews and metadata by category.
  for path in sorted(raw_dir.rglob('*')):
    kind, category = _classify(path)
    if category and wanted in (None, category) and path.is_file():
      found[kind].setdefault(category, []).append(path)
  for by_category, names in zip(found, FILES, strict=True):
    shown = ' or '.join(name.replace('*', wanted or '*', 1) for name in names)
    if not by_category:
      raise InputError(
        f'{raw_dir}: no {shown} in it; --raw_dir must hold reviews and metadata of a category, e.g.'
        ' All_Beauty.jsonl and meta_All_Beauty.jsonl'
      )
    if len(by_category) > 1:
      raise InputError(
        f'{raw_dir}: holds {shown} of several categories ({", ".join(sorted(by_category)[:8])});'
        f' say which: --category={min(by_category)}'
      )
  (reviews, of_reviews), (metadata, of_metadata) = (next(iter(part.items())) for part in found)
  if reviews != metadata:
    raise InputError(
      f'{raw_dir}: holds reviews of {reviews} and metadata of {metadata}; put there what belongs'
      ' together'
    )
  for files in (of_reviews, of_metadata):
    if len({(path.parent, tables.kind(path)) for path in files}) > 1 or (
      len(files) > 1 and not _is_parquet(files[0])
    ):
      shown = ', '.join(str(path.relative_to(raw_dir)) for path in files[:4])
      raise InputError(f'{raw_dir}: the same in {shown}; leave one of them')
  return of_reviews + of_metadata


def _classify(path: Path) -> tuple[int, str]:
  """Tells if a file holds reviews (0) or metadata (1), and its category; '' for other files."""
  plain = path.name.removesuffix('.gz')
  if plain.endswith('.jsonl'):
    category = plain.removesuffix('.jsonl')
    return int(category.startswith('meta_')), category.removeprefix('meta_')
  for kind, prefix in enumerate(('raw_review_', 'raw_meta_')):
    if path.match(f'{prefix}*/*.parquet'):
      return kind, path.parent.name.removeprefix(prefix)
  return 0, ''


def read(
  *files: Path,
  hub_name: str | None = None,
  category: str | None = None,
  clean_ids: str | None = None,
) -> Raw:
  """Reads the files from `find`, or a category on the hub.

  Args:
    *files: reviews, then metadata; no files to read from the hub.
    hub_name: dataset repository on the hub with the layout of McAuley-Lab/Amazon-Reviews-2023.
    category: name such as All_Beauty.
    clean_ids: damages of ids to undo, see `ids.parse_cleanings`.
  """
  notes = []
  reviews: list[File] = [path for path in files if not _classify(path)[0]]
  metadata: list[File] = [*files[len(reviews) :]]
  if not files:
    revision, reviews, metadata = _on_the_hub(hub_name, category)
    notes.append(f'read from {hub_name} at revision {revision}')
  ends: list[int] = [0]
  parts: list[pa.Table] = []
  for file in reviews:
    parts += (arrow_columns.encoded(batch, COLUMNS, str(file)) for batch in _reviews(file))
    ends.append(sum(map(len, parts)))
  path = _place(reviews)
  if not ends[-1]:
    raise InputError(f'{path}: the file is empty; download it again')

  def locate(row: int) -> Place:
    part = int(np.searchsorted(ends, row, side='right')) - 1
    file, row = reviews[part], row - ends[part]
    if isinstance(file, str) or _is_parquet(file):  # Lines from the hub are not read a second time.
      return Place(str(file), row + 1, 'row')
    return Place(str(file), amazon.line(file, row))

  table = arrow_columns.joined(parts, [path] * len(parts))
  options = {**interactions.PARAMETERS, 'clean_ids': clean_ids}
  raw = interactions.read_columns(path, table, COLUMNS, locate, options)
  return raw._replace(
    notes=tuple(notes), read_items=functools.partial(_read_items, metadata=metadata)
  )


def _place(files: Sequence[File]) -> str:
  """Names a file, or the folder of several; those on the hub are always one."""
  return str(files[0]) if len(files) == 1 else str(Path(files[0]).parent)


def _is_parquet(file: File) -> TypeGuard[Path]:
  return isinstance(file, Path) and tables.kind(file) in tables.PARQUET


def _reviews(file: File) -> Iterator[pa.Table]:
  """Yields the used columns in batches."""
  if _is_parquet(file):
    for batch in _parquet(file, list(_FIELDS), list(_FIELDS)):
      yield pa.Table.from_batches([batch])
    return
  for lines in _lines(file):
    try:
      table = arrow_json.read_json(
        pa.BufferReader(b''.join(line for _, line in lines)),
        read_options=arrow_json.ReadOptions(block_size=2 * _BATCH_BYTES),
        parse_options=arrow_json.ParseOptions(
          explicit_schema=pa.schema(_FIELDS), unexpected_field_behavior='ignore'
        ),
      )
      table.validate(full=True)
    except pa.ArrowInvalid as error:
      amazon.check_reviews(file, lines, _FIELDS)
      raise InputError(
        f'{file}, lines {lines[0][0]} to {lines[-1][0]}: cannot be read ({error}); download the'
        ' file again'
      ) from error
    if len(table) != len(lines):
      amazon.check_reviews(file, lines, _FIELDS)
      raise InputError(
        f'{file}, lines {lines[0][0]} to {lines[-1][0]}: not one JSON object a line; download the'
        ' file again'
      )
    yield table


def _read_items(
  wanted: Sequence[str], metadata: Sequence[File]
) -> tuple[dict[str, Item], list[str]]:
  """Reads the metadata of some items; notes tell what is missing."""
  numbered: Iterator[tuple[int, Any]] = itertools.chain.from_iterable(map(_records, metadata))
  if len(metadata) > 1:
    numbered = enumerate((record for _, record in numbered), 1)
  table, notes = amazon.catalogue(_place(metadata), numbered, 'parent_asin', _item, set(wanted))
  absent = {
    'metadata': len(wanted) - len(table),
    'a title': sum(not item.title for item in table.values()),
    'a description': sum(not item.description for item in table.values()),
    'a picture': sum(not item.image for item in table.values()),
  }
  told = ', '.join(f'{count:,} without {what}' for what, count in absent.items() if count)
  return table, [*notes, f'of {len(wanted):,} items {told}: all kept'] if told else notes


def _records(file: File) -> Iterator[tuple[int, Any]]:
  """Yields the records of a file with their numbers; None for a line that is not JSON."""
  if _is_parquet(file):
    batches = _parquet(file, ['parent_asin'], list(_METADATA))
    yield from enumerate(itertools.chain.from_iterable(map(pa.RecordBatch.to_pylist, batches)), 1)
    return
  for lines in _lines(file):
    for number, line in lines:
      try:
        yield number, json.loads(line)
      except (ValueError, RecursionError):
        yield number, None


def _parquet(file: Path, needed: list[str], wanted: list[str]) -> Iterator[pa.RecordBatch]:
  try:
    names = pq.read_schema(file).names
    if missing := [name for name in needed if name not in names]:
      raise InputError(
        f'{file}: no column {missing[0]!r}; its columns are {", ".join(names[:20])}; use the files'
        ' of Amazon Reviews 2023'
      )
    columns = [name for name in wanted if name in names]
    yield from tables.parquet_batches(file, columns)
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise InputError(f'{file}: cannot be read ({error}); download it again') from error


def _lines(file: File) -> Iterator[list[tuple[int, bytes]]]:
  """Yields numbered non-empty lines in batches."""
  number = 1
  for batch in _file_lines(file) if isinstance(file, Path) else _hub_lines(file):
    lines = [(n, line) for n, line in enumerate(batch, number) if line.strip()]
    number += len(batch)
    if lines:
      yield lines


def _file_lines(path: Path) -> Iterator[list[bytes]]:
  try:
    with archives.open_file(path) as file:
      while lines := file.readlines(_BATCH_BYTES):
        yield lines
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); make it readable') from error


def _hub_lines(url: str) -> Iterator[list[bytes]]:
  import datasets

  try:
    # As text: of the metadata no two lines need have the same fields, and bad lines are ours to
    # count.
    stream = datasets.load_dataset('text', data_files=[url], split='train', streaming=True)
    for batch in stream.iter(batch_size=_BATCH_LINES):
      yield [line.encode() + b'\n' for line in batch['text']]
  except Exception as error:  # The library raises many kinds of errors.
    raise _hub_error(url, error) from error


def _on_the_hub(name: str | None, category: str | None) -> tuple[str, list[File], list[File]]:
  """Returns revision, reviews and metadata of a category on the hub.

  The files are read directly, because `datasets` runs no loading scripts since version 4.
  """
  if not name or not category:
    raise InputError(f'--{"category" if name else "hub_name"} is missing; pass both, or --raw_dir')
  try:
    import datasets  # noqa: F401
    import huggingface_hub
  except ImportError as error:
    raise InputError(
      f'--hub_name needs the package datasets ({error}): pip install "datasets>=4.0", or download'
      ' the files by hand and pass --raw_dir'
    ) from error
  try:
    info = huggingface_hub.HfApi().dataset_info(name, timeout=20)
  except Exception as error:
    raise _hub_error(name, error) from error
  paths = [path.format(category) for path in _ON_THE_HUB]
  there = {sibling.rfilename for sibling in info.siblings or ()}
  for path in paths:
    if path not in there:
      known = sorted(
        name.removeprefix('raw/review_categories/').removesuffix('.jsonl')
        for name in there
        if PurePosixPath(name).match('raw/review_categories/*.jsonl')
      )
      raise InputError(
        f'{name}: has no {path}; --category must be one of {", ".join(known) or "those it holds"}'
      )
  reviews, metadata = (f'hf://datasets/{name}@{info.sha}/{path}' for path in paths)
  return str(info.sha), [reviews], [metadata]


def _hub_error(what: str, error: Exception) -> InputError:
  reason = ' '.join(str(error).split())[:200] or type(error).__name__
  return InputError(
    f'{what}: cannot be read from the hub ({reason}); correct the name or try again later, or'
    ' download reviews and metadata by hand and pass --raw_dir with them'
  )


def _item(record: dict[str, Any]) -> Item:
  texts = [items.text(record.get(name)) for name in ('description', 'features')]
  for name in ('store', 'price'):
    value = items.text(record.get(name))
    if value and value != 'None':  # Parquet files hold unknown prices as 'None'.
      texts.append(f'{name}: {value}')
  genres = items.genres([record.get('main_category'), record.get('categories')])
  return Item(
    title=html.unescape(items.text(record.get('title'))),
    genres=tuple(map(html.unescape, genres)),
    description=html.unescape('\n'.join(filter(None, texts))),
    image=_image(record.get('images')),
  )


def _image(images: Any) -> str | None:
  """Returns the URL of the first, main picture, in the size closest to what encoders use."""
  if isinstance(images, dict):  # Parquet holds a dict of lists.
    columns = {name: values for name, values in images.items() if isinstance(values, list)}
    images = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]
  for picture in images if isinstance(images, list) else ():
    for size in ('large', 'hi_res', 'thumb'):
      url = items.text(picture.get(size)) if isinstance(picture, dict) else ''
      if url.startswith(('http://', 'https://')):
        return url
  return None

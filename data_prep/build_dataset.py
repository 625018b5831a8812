"""Turns raw files into one prepared dataset folder.

  python -m data_prep.build_dataset --source=movielens_1m --raw_dir=raw/ml-1m --data_dir=data/ml-1m
  python -m data_prep.build_dataset --source=interactions --raw_dir=orders.csv --data_dir=data/shop
  python -m data_prep.build_dataset --source=synthetic --data_dir=data/synthetic

The folder then holds dataset.json (counts, options, split hash, licence), `interactions` (one
example a user) and `items` (one example an item), both TFDS data in array_record files.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from absl import app, flags, logging

from data_prep import sources
from data_prep.prepared import pictures, prepare, tfds_writer
from data_prep.sources import archives, download, interactions, raw_files
from data_prep.sources import items as item_tables
from ur4rec_jax import files
from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import FORMAT_VERSION, METADATA, load_dataset
from ur4rec_jax.errors import InputError, exit_on_reported_error

_SOURCE = flags.DEFINE_string('source', None, f'One of: {", ".join(sources.SOURCES)}.')
_RAW_DIR = flags.DEFINE_string(
  'raw_dir',
  None,
  'Folder or archive (.zip, .tar, .tar.gz, .tgz) with the raw files, or the file where there is'
  ' one; left out, movielens_100k and movielens_1m are downloaded.',
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder to make.')
_MIN_RATING = flags.DEFINE_float('min_rating', None, 'Drop interactions rated below this.')
_K_CORE = flags.DEFINE_integer(
  'k_core', None, 'Drop users and items with fewer interactions, until none are left.'
)
_MIN_LENGTH = flags.DEFINE_integer('min_length', None, 'Drop users with a shorter history.')
_DROP_DUPLICATES = flags.DEFINE_bool(
  'drop_duplicates', False, 'Keep the first of rows with the same user, item and time.'
)
_TIME_SPLIT = flags.DEFINE_string(
  'time_split',
  None,
  'Where the split by time cuts: two dates such as 2024-05-01,2024-06-01 or two shares of the'
  ' interactions; left out, 0.8,0.9.',
)
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', pictures.IMAGE_SIZE, 'Pixels that the short side of a picture is reduced to.'
)
_PARAMETERS = {
  'num_users': flags.DEFINE_integer('num_users', None, 'Users to generate (synthetic only).'),
  'num_items': flags.DEFINE_integer('num_items', None, 'Items to generate (synthetic only).'),
  'seed': flags.DEFINE_integer('seed', None, 'Seed of the generator (synthetic only).'),
  # Of the source `interactions`; left out, columns are recognised by their names.
  'user_column': flags.DEFINE_string('user_column', None, 'Column of users.'),
  'item_column': flags.DEFINE_string('item_column', None, 'Column of items.'),
  'time_column': flags.DEFINE_string(
    'time_column', None, 'Column of times; none: rows are in order of time.'
  ),
  'rating_column': flags.DEFINE_string(
    'rating_column', None, 'Column of ratings; none: no ratings.'
  ),
  'delimiter': flags.DEFINE_string(
    'delimiter', None, 'Character between columns, or tab; left out, the extension tells.'
  ),
  'items': flags.DEFINE_string('items', None, 'Item table: CSV, TSV, Parquet or JSON lines.'),
  'partial_items': flags.DEFINE_bool(
    'partial_items', None, 'Keep items that the item table lacks, without text.'
  ),
  'item_id_column': flags.DEFINE_string('item_id_column', None, "Item table's column of ids."),
  'title_column': flags.DEFINE_string('title_column', None, 'Column of titles; none: no titles.'),
  'description_column': flags.DEFINE_string(
    'description_column', None, 'Column of descriptions; none: no descriptions.'
  ),
  'text_columns': flags.DEFINE_string(
    'text_columns', None, 'Further columns, separated by commas, to join to the description.'
  ),
  'genres_column': flags.DEFINE_string(
    'genres_column', None, 'Column of genres or categories, lists or separated by |; none: none.'
  ),
  'image_column': flags.DEFINE_string(
    'image_column', None, 'Column of picture files or URLs; none: no pictures.'
  ),
  'images': flags.DEFINE_string(
    'images', None, 'Folder of the pictures (interactions and multimodal_movielens_*).'
  ),
  'hub_name': flags.DEFINE_string(
    'hub_name', None, 'Dataset on the HuggingFace hub to read from (amazon_reviews only).'
  ),
  'category': flags.DEFINE_string(
    'category', None, 'Category to read, e.g. All_Beauty (amazon_reviews only).'
  ),
}
_OVERWRITE = flags.DEFINE_bool(
  'overwrite',
  False,
  'Replace the dataset in --data_dir, texts and embeddings made from it included, once the new one'
  ' is complete.',
)
# What the summary says of a split, where it is not zero.
_SPLIT_COUNTS = {
  'train_interactions': 'interactions train',
  'valid_users': 'users validate',
  'test_users': 'test',
  'train_only_users': 'only train',
  'unused_users': 'are unused',
  'items_without_training': 'items are never in training',
}


def build(
  source: str,
  data_dir: str | Path,
  raw_dir: str | Path | None = None,
  options: prepare.Options = prepare.Options(),
  overwrite: bool = False,
  parameters: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Any], bool]:
  """Builds a dataset, or finds that it is there already.

  Args:
    source: a key of `sources.SOURCES`.
    data_dir: the folder to make.
    raw_dir: where the raw files are; None downloads or generates them.
    options: filters.
    overwrite: whether to replace another dataset in `data_dir`.
    parameters: values for the source's own flags; defaults fill the rest.

  Returns:
    The content of dataset.json and whether it was built now.
  """
  data_dir = Path(os.path.realpath(data_dir))
  with files.disk_errors(data_dir):
    return _build(source, data_dir, raw_dir, options, overwrite, parameters)


def build_from_table(
  data: Any,
  data_dir: str | Path,
  options: prepare.Options = prepare.Options(),
  overwrite: bool = False,
  **parameters: Any,
) -> dict[str, Any]:
  """Builds a dataset from a table in memory, or finds that it is there already.

  Args:
    data: interactions, e.g. a pandas DataFrame, an Arrow table or a HuggingFace `Dataset`.
    data_dir: the folder to make.
    options: filters.
    overwrite: whether to replace another dataset in `data_dir`.
    **parameters: as the flags of `--source=interactions`, e.g. `user_column='customer'`; `items`
      may be a table in memory too.

  Returns:
    The content of dataset.json.
  """
  data_dir = Path(os.path.realpath(data_dir))
  raw = interactions.from_table(data, **parameters)
  found = {'table': _table_fingerprint(raw)}
  found |= _picture_fingerprint(item_tables.pictures(raw.table or {}))
  wanted = {'options': options._asdict(), 'raw_sha256': found}
  with files.disk_errors(data_dir):
    files.clean_up(data_dir)
    old = _old(data_dir, 'interactions', wanted, overwrite)
    if old is not None:
      return old
    prepared = prepare.prepare(raw, options)
    wanted['notes'] = list(prepared.notes)
    with files.new_folder(data_dir) as folder:
      origin = sources.SOURCES['interactions'].origin
      size = options.image_size
      return tfds_writer.write(folder, prepared, origin, 'interactions', wanted, size)


def _build(
  source: str,
  data_dir: Path,
  raw_dir: str | Path | None,
  options: prepare.Options,
  overwrite: bool,
  parameters: Mapping[str, Any],
) -> tuple[dict[str, Any], bool]:
  spec = sources.SOURCES[source]
  if misplaced := sorted(set(parameters) - set(spec.parameters)):
    raise InputError(f'--{misplaced[0]} is no flag of --source={source}; leave it out')
  parameters = {**spec.parameters, **parameters}
  paths = _raw_files(source, raw_dir, data_dir, parameters)
  files.clean_up(data_dir)
  # Where a file lies does not matter, what is in it does.
  plain = {name: value for name, value in parameters.items() if name not in spec.paths}
  wanted = {'options': {**options._asdict(), **plain}}
  if paths:
    wanted['raw_sha256'] = _fingerprints(paths, spec, parameters)
  old = _old(data_dir, source, wanted, overwrite)
  if old is not None:
    return old, False

  with contextlib.ExitStack() as stack:
    if paths is None:
      scratch = stack.enter_context(files.scratch_folder(data_dir))
      paths = download.fetch(spec.archive, spec.files, scratch)
      wanted['raw_sha256'] = _fingerprints(paths, spec, parameters)
    elif paths and archives.is_archive(paths[0]):
      scratch = stack.enter_context(files.scratch_folder(data_dir))
      patterns = (*itertools.chain(*raw_files.alternatives(spec.files)), *spec.more)
      stack.enter_context(archives.unpacked(paths[0], patterns, scratch))
      paths = _find(spec, scratch, parameters)
    # What can be found wrong with the input is found before the dataset is begun.
    raw = spec.read(*paths, **parameters)
    data = prepare.prepare(raw, options)
    del raw  # memory for the writers
    with files.new_folder(data_dir) as folder:
      extra = {**wanted, 'notes': list(data.notes)}
      metadata = tfds_writer.write(folder, data, spec.origin, source, extra, options.image_size)
  return metadata, True


def _raw_files(
  source: str, raw_dir: str | Path | None, data_dir: Path, parameters: Mapping[str, Any]
) -> list[Path] | None:
  """The raw files or their archive; none where none are needed, None for those to download."""
  spec = sources.SOURCES[source]
  if raw_dir is None:
    if not spec.files or parameters.get('hub_name'):
      return []
    if spec.archive is None:
      more = ', or --hub_name and --category' if 'hub_name' in parameters else ''
      raise InputError(
        f'--source={source} cannot be downloaded; pass --raw_dir with'
        f' {raw_files.described(spec.files)}{more}'
      )
    return None
  if not spec.files:
    raise InputError(f'--source={source} needs no raw files; leave --raw_dir out')
  raw_dir = Path(raw_dir)
  paths = [raw_dir] if archives.is_archive(raw_dir) else _find(spec, raw_dir, parameters)
  more = {name: Path(parameters[name]) for name in spec.paths if parameters[name] is not None}
  for name, path in more.items():
    if not path.exists():
      raise InputError(f'{path}: no such file or folder; correct --{name}')
  for path in (*paths, *more.values()):
    real = Path(os.path.realpath(path))
    if data_dir == real or data_dir in real.parents:
      raise InputError(f'{path}: the raw files lie inside --data_dir; give another --data_dir')
  return paths


def _find(spec: sources.Source, folder: Path, parameters: Mapping[str, Any]) -> list[Path]:
  if spec.find is None:
    return raw_files.find_files(spec.files, folder)
  return spec.find(folder, parameters)


def _old(
  data_dir: Path, source: str, wanted: dict[str, Any], overwrite: bool
) -> dict[str, Any] | None:
  """The dataset.json of the dataset wanted, None where it is to be built."""
  old = _existing(data_dir)
  if old is None or overwrite:
    return None
  _check_same(data_dir, old, source, wanted)
  _check_sound(data_dir)
  return old


def _existing(data_dir: Path) -> dict[str, Any] | None:
  """The dataset.json of a prepared dataset, None if there is nothing at the place."""
  if not data_dir.exists():
    return None
  if not data_dir.is_dir():
    raise InputError(f'{data_dir}: is a file; give another --data_dir')
  if not any(data_dir.iterdir()):
    return None
  try:
    metadata = json.loads((data_dir / METADATA).read_text(encoding='utf-8'))
    if {'source', 'options', 'counts', 'format_version'} <= metadata.keys():
      return metadata
  except (OSError, ValueError, AttributeError):
    pass
  raise InputError(
    f'{data_dir}: holds files but no prepared dataset, and is left alone; give another --data_dir'
  )


def _check_same(data_dir: Path, old: dict[str, Any], source: str, wanted: dict[str, Any]) -> None:
  wanted = {'format_version': FORMAT_VERSION, 'source': source, **wanted}
  for field, value in wanted.items():
    if old.get(field) != value:
      raise InputError(
        f'{data_dir}: holds another dataset: its {field} is {_compact(old.get(field))}, asked for'
        f' is {_compact(value)}; pass --overwrite to replace it, or give another --data_dir'
      )


def _check_sound(data_dir: Path) -> None:
  try:
    load_dataset(data_dir)
  except InputError as error:
    raise InputError(
      f'{data_dir}: the interactions are not those of {METADATA}, or cannot be read; pass'
      ' --overwrite to build it again'
    ) from error


def _compact(value: Any) -> str:
  if isinstance(value, dict):
    return (
      ' '.join(f'{k}={str(v)[:16]}' for k, v in value.items() if v not in (None, False)) or 'none'
    )
  return str(value)


def _fingerprints(
  paths: list[Path], spec: sources.Source, parameters: Mapping[str, Any]
) -> dict[str, str]:
  """SHA-256 by file name: two files may hold the same source and still differ."""
  root = os.path.commonpath([path.parent for path in paths])
  found = {os.path.relpath(path, root): _file_hash(path) for path in paths}
  for name in spec.paths:
    if parameters[name] is not None and Path(parameters[name]).is_file():
      found[name] = _file_hash(Path(parameters[name]))
  # Pictures in an archive have its hash.
  inside = archives.is_archive(paths[0]) and parameters.get('images') is None
  return found | _picture_fingerprint([] if inside else spec.pictures(paths, parameters))


def _file_hash(path: Path) -> str:
  try:
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); make it readable') from error


def _picture_fingerprint(paths: list[Path]) -> dict[str, str]:
  """Of content: a picture may change and keep its size, and copying a folder changes its times."""
  digest = hashlib.sha256()
  for path in paths:
    digest.update(f'{path.name}\0{_file_hash(path)}\0'.encode())
  return {'pictures': digest.hexdigest()} if paths else {}


def _table_fingerprint(raw: prepare.Raw) -> str:
  digest = hashlib.sha256()
  for ids in (raw.users, raw.items):
    digest.update('\0'.join(ids.dictionary.to_pylist()).encode())
    digest.update(np.asarray(ids.indices).astype('<i4').tobytes())
  for column in (raw.timestamps, raw.ratings):
    digest.update(b'' if column is None else np.ascontiguousarray(column).tobytes())
  digest.update(repr((raw.ticks_per_second, raw.table, raw.notes)).encode())
  return digest.hexdigest()


def summary(metadata: dict[str, Any], data_dir: str | Path, is_new: bool) -> str:
  """What the user reads at the end: counts, losses, licence and what to do next."""
  counts = metadata['counts']
  rows = [
    ('dataset', f'{metadata["name"]}, {"written to" if is_new else "already in"} {data_dir}'),
    ('users', f'{counts["users"]:,}'),
    ('items', f'{counts["items"]:,}'),
    ('interactions', f'{counts["interactions"]:,}, median {counts["median_length"]:g} a user'),
  ]
  if metadata['time_range']:
    first, last = (np.datetime64(t, 's').astype('datetime64[D]') for t in metadata['time_range'])
    rows.append(('dates', f'{first} to {last}'))
  else:
    rows.append(('dates', 'none; the order of the file'))
  # What fell out, and by which rule.
  for what, reasons in metadata['dropped'].items():
    if reasons:
      rows.append((f'- {what}', ', '.join(f'{reason} {n:,}' for reason, n in reasons.items())))
  rows += [('note', note) for note in metadata.get('notes', [])]
  for name, record in metadata['splits'].items():
    rows.append(('split', f'{splits.describe(name, record)} {record["hash"]}'))
    shown = {what: record[field] for field, what in _SPLIT_COUNTS.items() if record[field]}
    rows.append(('-', ', '.join(f'{n:,} {what}' for what, n in shown.items())))
  rows += [
    ('licence', metadata['licence']),
    ('next', sources.training_command(metadata, data_dir)),
  ]
  return '\n'.join(f'{name:<14} {value}' for name, value in rows)


@exit_on_reported_error
def main(argv: list[str]) -> None:
  """Reads the flags, builds and prints the summary."""
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # TFDS tells of each file it opens
  if len(argv) > 1:
    raise InputError(f'unexpected argument {argv[1]!r}; flags are written --name=value')
  if _SOURCE.value not in sources.SOURCES:
    given = '' if _SOURCE.value is None else f', not {_SOURCE.value!r}'
    raise InputError(f'--source must be one of {", ".join(sources.SOURCES)}{given}')
  if not _DATA_DIR.value:
    raise InputError('--data_dir is missing: the folder to make')
  for flag in (_K_CORE, _MIN_LENGTH, _IMAGE_SIZE):
    if flag.value is not None and flag.value < 1:
      raise InputError(f'--{flag.name} must be 1 or more, not {flag.value}')
  options = prepare.Options(
    _MIN_RATING.value,
    _K_CORE.value,
    _MIN_LENGTH.value,
    _DROP_DUPLICATES.value,
    _TIME_SPLIT.value,
    _IMAGE_SIZE.value,
  )
  parameters = {name: f.value for name, f in _PARAMETERS.items() if f.value is not None}
  metadata, is_new = build(
    _SOURCE.value, _DATA_DIR.value, _RAW_DIR.value, options, _OVERWRITE.value, parameters
  )
  print(summary(metadata, _DATA_DIR.value, is_new))


if __name__ == '__main__':
  app.run(main)

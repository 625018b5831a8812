"""Builds a prepared dataset folder from raw files.

  python -m data_prep.build_dataset --source=movielens_1m --raw_dir=raw/ml-1m --data_dir=data/ml-1m
  python -m data_prep.build_dataset --source=interactions --raw_dir=orders.csv --data_dir=data/shop
  python -m data_prep.build_dataset --source=synthetic --data_dir=data/synthetic
  python -m data_prep.build_dataset --append --raw_dir=day2.csv --data_dir=data/shop --out=data/day2

The folder holds dataset.json (counts, options, split hashes, licence), `interactions` (one example
per user) and `items` (one example per item). The last two are TFDS data in array_record files.
"""

import argparse
import contextlib
import itertools
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from data_prep import carry_over, describe_page, identity, sources
from data_prep.flags import Parser
from data_prep.prepared import appending, content, engine, pictures, prepare, spark, tfds_writer
from data_prep.sources import download, raw_files
from ur4rec_jax import files
from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import read_info
from ur4rec_jax.data.raw import archives, interactions
from ur4rec_jax.data.raw import items as item_tables
from ur4rec_jax.data.raw.records import NoRows, Raw
from ur4rec_jax.errors import InputError, exit_on_reported_error, say

# Flags of single sources: name -> (type, help). Without a flag the default of the source counts.
_PARAMETERS = {
  'connect': (str, 'database, such as duckdb://FILE or postgres://USER@HOST/DATABASE (table)'),
  'table': (str, 'table of the database, also as SCHEMA.TABLE (table)'),
  'num_users': (int, 'users to generate (synthetic)'),
  'num_items': (int, 'items to generate (synthetic)'),
  'seed': (int, 'seed of the generator (synthetic)'),
  'user_column': (str, 'column of users; without it the usual names are recognised (interactions)'),
  'item_column': (str, 'column of items (interactions)'),
  'time_column': (str, 'column of times; none: rows are in time order (interactions)'),
  'rating_column': (str, 'column of ratings; none: no ratings (interactions)'),
  'event_column': (str, 'column of kinds of events, such as view, cart and buy (interactions)'),
  'event_weights': (
    str,
    'weight of each kind of event, stored as its rating, such as view=1,cart=3,buy=5; rows of other'
    ' kinds are left out (interactions)',
  ),
  'where': (
    str,
    'keep only rows that meet a condition, such as "quantity > 0 and status == \'paid\'"'
    ' (interactions)',
  ),
  'clean_ids': (
    str,
    'blanks: remove blanks around ids; decimals: read 7.0 as 7; empty: leave out rows without an'
    ' id; missing: also those whose id is NULL, nan or the like; several with commas, or all'
    ' (interactions, amazon_reviews)',
  ),
  'delimiter': (
    str,
    'character between columns, or "tab"; without it the file extension decides (interactions)',
  ),
  'quoting': (
    str,
    'auto, none or standard: whether double quotes enclose fields; auto looks at the file'
    ' (interactions)',
  ),
  'items': (str, 'item table: CSV, TSV, Parquet or JSON lines (interactions)'),
  'items_quoting': (str, 'item table: auto, none or standard, as --quoting'),
  'partial_items': (bool, 'keep items that are missing in the item table, without texts'),
  'keep_cold_items': (bool, 'keep items of the item table without interactions, as cold items'),
  'item_id_column': (str, 'item table: column of ids'),
  'title_column': (str, 'item table: column of titles; none: no titles'),
  'description_column': (str, 'item table: column of descriptions; none: no descriptions'),
  'text_columns': (
    str,
    'item table: further columns to append to the description, separated by commas',
  ),
  'genres_column': (
    str,
    'item table: column of genres or categories, lists or separated by |; none: no genres',
  ),
  'image_column': (str, 'item table: column of picture files or URLs; none: no pictures'),
  'images': (str, 'folder of the pictures (interactions, multimodal_movielens_*)'),
  'hub_name': (str, 'dataset on the HuggingFace hub to read (amazon_reviews)'),
  'category': (str, 'category to read, such as All_Beauty (amazon_reviews)'),
}
# Flags of the engine that filters and sorts, and their defaults.
_ENGINE = {'engine': 'duckdb', 'master': None, 'memory_limit': engine.MEMORY_LIMIT}
_MOST_SEARCHED = 10_000  # Items that are searched for texts and pictures to suggest what is next.


class _Build(NamedTuple):
  """What is built, where and with how much of the machine; see `build` for the fields."""

  source: str
  data_dir: Path
  options: prepare.Options
  overwrite: bool
  resources: engine.Resources = engine.Resources()


def build(
  source: str,
  data_dir: str | Path,
  raw_dir: str | Path | None = None,
  options: prepare.Options = prepare.Options(),
  overwrite: bool = False,
  parameters: Mapping[str, Any] = MappingProxyType({}),
  resources: engine.Resources = engine.Resources(),
) -> tuple[dict[str, Any], bool]:
  """Builds a dataset unless the folder holds it already.

  Args:
    source: a key of `sources.SOURCES`.
    data_dir: folder to create.
    raw_dir: folder, archive or file with the raw data; None downloads or generates it.
    options: filters.
    overwrite: whether another dataset in `data_dir` may be replaced.
    parameters: flags of the source by name; the others get their defaults.
    resources: engine and memory for filtering and sorting, and processes for writing; what does
      not fit in that memory goes to a folder beside `data_dir`, which is removed at the end.

  Returns:
    The content of dataset.json, and whether the dataset was built now.

  Raises:
    InputError: the raw data or a parameter is wrong, or the folder cannot be written.
  """
  data_dir = Path(os.path.realpath(data_dir))
  with files.disk_errors(data_dir):
    return _build(_Build(source, data_dir, options, overwrite, resources), raw_dir, parameters)


def build_from_table(
  data: Any,
  data_dir: str | Path,
  options: prepare.Options = prepare.Options(),
  overwrite: bool = False,
  **parameters: Any,
) -> dict[str, Any]:
  """Builds a dataset from a table in memory unless the folder holds it already.

  Args:
    data: interactions, e.g. a pandas DataFrame, an Arrow table or a HuggingFace `Dataset`.
    data_dir: folder to create.
    options: filters, which may also be given as parameters.
    overwrite: whether another dataset in `data_dir` may be replaced.
    **parameters: flags of `--source=interactions`, such as `user_column='customer'`; `items` may
      also be a table in memory. Filters, such as `drop_duplicates=True`.

  Returns:
    The content of dataset.json.

  Raises:
    InputError: the table or a parameter is wrong, or the folder cannot be written.
  """
  data_dir = Path(os.path.realpath(data_dir))
  filters = [name for name in options._fields if name in parameters]
  options = options._replace(**{name: parameters.pop(name) for name in filters})
  raw = interactions.from_table(data, **parameters)
  to_build = _Build('interactions', data_dir, options, overwrite)
  with files.disk_errors(data_dir):
    files.clean_up(data_dir)
    return _build_rows(to_build, raw, {'options': options._asdict()})[0]


def _build_rows(to_build: _Build, raw: Raw, wanted: dict[str, Any]) -> tuple[dict[str, Any], bool]:
  """Builds a dataset from rows without a file, which their content identifies."""
  found = {'table': identity.table_fingerprint(raw)}
  found |= identity.picture_fingerprint(item_tables.pictures(raw.table or {}))
  wanted |= {'raw_sha256': found}
  if (old := _found(to_build, wanted)) is not None:
    return old, False
  with _spilling(to_build) as resources:
    data = prepare.prepare(raw, to_build.options, resources)
    return _write(to_build, data, wanted), True


def _found(to_build: _Build, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the content of dataset.json if the folder holds just this dataset."""
  return identity.find_same(to_build.data_dir, to_build.source, wanted, to_build.overwrite)


@contextlib.contextmanager
def _spilling(to_build: _Build) -> Iterator[engine.Resources]:
  """Gives a folder beside the dataset for what does not fit into memory while it is built."""
  with files.scratch_folder(to_build.data_dir, 'spill') as spill:
    yield to_build.resources._replace(folder=spill)


def _write(to_build: _Build, data: prepare.Prepared, wanted: Mapping[str, Any]) -> dict[str, Any]:
  source, size = to_build.source, to_build.options.image_size
  origin, extra = sources.SOURCES[source].origin, {**wanted, 'notes': list(data.notes)}
  with files.new_folder(to_build.data_dir) as folder:
    workers = to_build.resources.workers
    return tfds_writer.write(folder, data, origin, source, extra, size, workers)


def _build(
  to_build: _Build, raw_dir: str | Path | None, parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
  source, data_dir, options = to_build.source, to_build.data_dir, to_build.options
  limit, master = to_build.resources.memory_limit, to_build.resources.master
  engine.megabytes(limit)
  if master is not None:
    spark.check(master, limit)
  spec = sources.SOURCES[source]
  if misplaced := sorted(set(parameters) - set(spec.parameters)):
    raise InputError(f'--{misplaced[0]} is no flag of --source={source}; leave it out')
  parameters = {**spec.parameters, **parameters}
  paths = _raw_files(source, raw_dir, data_dir, parameters)
  files.clean_up(data_dir)
  # Paths are left out: the hashes of the files say what they hold.
  plain = {name: value for name, value in parameters.items() if name not in spec.paths}
  wanted = {'options': {**options._asdict(), **plain}}
  if spec.is_table:
    return _build_rows(to_build, spec.read(**parameters), wanted)
  if paths:
    wanted['raw_sha256'] = identity.fingerprints(paths, spec, parameters)
  if (old := _found(to_build, wanted)) is not None:
    return old, False

  with contextlib.ExitStack() as stack:
    if paths is None:
      scratch = stack.enter_context(files.scratch_folder(data_dir))
      assert spec.archive is not None  # Else `_raw_files` has raised an error.
      paths = download.fetch(spec.archive, spec.files, scratch)
      wanted['raw_sha256'] = identity.fingerprints(paths, spec, parameters)
    paths = _unpacked(stack, spec, paths, data_dir, parameters)
    # All checks of the input come before the first write.
    with _spilling(to_build) as resources:
      data = _prepare(spec, paths, parameters, options, resources)
      return _write(to_build, data, wanted), True


def _prepare(
  spec: sources.Source,
  paths: list[Path],
  parameters: Mapping[str, Any],
  options: prepare.Options,
  resources: engine.Resources,
) -> prepare.Prepared:
  # No name is given to the rows: `prepare` needs their memory after it has stored them.
  if spec.read is not interactions.read:
    return prepare.prepare(spec.read(*paths, **parameters), options, resources)
  layout = interactions.open_files(paths, parameters)
  data = prepare.prepare_plain(layout, parameters, options, resources)
  if data is not None:
    return data
  return prepare.prepare(interactions.read_layout(layout, parameters), options, resources)


def _unpacked(
  stack: contextlib.ExitStack,
  spec: sources.Source,
  paths: list[Path],
  data_dir: Path,
  parameters: Mapping[str, Any],
) -> list[Path]:
  """Returns the raw files; those of an archive are unpacked until `stack` ends."""
  if not paths or not archives.is_archive(paths[0]):
    return paths
  scratch = stack.enter_context(files.scratch_folder(data_dir))
  patterns = (*itertools.chain(*raw_files.alternatives(spec.files)), *spec.more)
  stack.enter_context(archives.unpacked(paths[0], patterns, scratch))
  return _find(spec, scratch, parameters)


def append(
  data_dir: str | Path,
  raw_dir: str | Path,
  out: str | Path,
  given: Mapping[str, Any] = MappingProxyType({}),
  takes_late: bool = False,
  resources: engine.Resources = engine.Resources(),
) -> tuple[dict[str, Any], bool]:
  """Builds a new version of a dataset: the old one, which stays as it is, and new events.

  The settings are those of the first build. `appending` has the rules of joining.

  Args:
    data_dir: folder of the old version.
    raw_dir: folder, archive or file with the new events.
    out: folder to create.
    given: flags by name, such as `items`; a setting of the first build can only be repeated.
    takes_late: see `appending.append`.
    resources: processes for writing; large columns go to a folder beside `out`, which is removed at
      the end.

  Returns:
    The content of the new dataset.json, and whether it was built now.

  Raises:
    NoRows: there is nothing new, so that no folder is made.
    InputError: the old folder or the new events are wrong, or `out` cannot be written.
  """
  old_dir, out = (Path(os.path.realpath(folder)) for folder in (data_dir, out))
  old = appending.read_old(old_dir)
  if out == old_dir or old_dir in out.parents:
    raise InputError(f'--out={out}: is in the old folder, which stays as it is; give another one')
  source = old.info['source']
  spec = sources.SOURCES[source]
  options, parameters = _settings_again(old.info, spec, given)
  paths = _given_files(source, raw_dir, out, parameters)
  parent = appending.parent_record(old.info)
  wanted = {
    'options': old.info['options'],
    'raw_sha256': identity.fingerprints(paths, spec, parameters),
    'parent': parent,
  }
  with files.disk_errors(out, '--out'), contextlib.ExitStack() as stack:
    files.clean_up(out)
    way_out = 'give another --out'
    if (same := identity.find_same(out, source, wanted, False, way_out)) is not None:
      return same, False
    paths = _unpacked(stack, spec, paths, out, parameters)
    spill = stack.enter_context(files.scratch_folder(out, 'spill'))
    resources = resources._replace(folder=spill)
    raw = _read_more(spec, paths, parameters)
    data = appending.append(old, raw, options, takes_late, resources)
    version = len(parent['chain']) + 1
    carry_over.answers([Path(data_dir).absolute(), old_dir], out)
    with files.new_folder(out) as folder:
      data, notes = appending.bring_pictures(old, data, folder, options.image_size, version)
      notes = [*data.notes, *notes, *carry_over.notes(old_dir)]
      extra = {**wanted, 'version': version, 'notes': notes}
      metadata = tfds_writer.write(
        folder, data, spec.origin, source, extra, options.image_size, resources.workers
      )
      carry_over.texts(old_dir, folder)
      carry_over.features(old_dir, folder)
  return metadata, True


def _settings_again(
  info: Mapping[str, Any], spec: sources.Source, given: Mapping[str, Any]
) -> tuple[prepare.Options, dict[str, Any]]:
  """Returns the options and parameters of the first build, with the item table of today."""
  recorded = {**prepare.Options()._asdict(), **info['options']}
  if info['source'] == 'synthetic':
    raise InputError('--append: the synthetic source has no new days; build it with other sizes')
  if spec.is_table:
    raise InputError(
      '--append reads files, and the old folder is of --source=table; build the table again'
    )
  for name, value in given.items():
    if name in recorded and recorded[name] != value:
      raise InputError(
        f'--{name}={value}: the first build had {recorded[name]}, and --append works with the'
        ' settings of the first build; leave the flag out'
      )
    if name not in recorded and name not in spec.parameters:
      raise InputError(f'--{name} is no flag of --source={info["source"]}; leave it out')
  parameters = {**spec.parameters, **recorded, **given}
  if 'hub_name' in parameters:
    parameters['hub_name'] = None  # The new events are files, wherever the first ones came from.
  if 'items' in parameters and parameters['items'] is None:
    parameters |= {name: interactions.PARAMETERS[name] for name in interactions.ABOUT_ITEMS}
  options = {name: recorded[name] for name in prepare.Options._fields if name in recorded}
  return prepare.Options(**options), {name: parameters[name] for name in spec.parameters}


def _read_more(spec: sources.Source, paths: list[Path], parameters: Mapping[str, Any]) -> Raw:
  """Reads raw files of a new day, on which not every kind of event needs to occur."""
  if spec.read is interactions.read:
    return interactions.read_files(paths, parameters, every_kind=False)
  return spec.read(*paths, **parameters)


def _raw_files(
  source: str, raw_dir: str | Path | None, data_dir: Path, parameters: Mapping[str, Any]
) -> list[Path] | None:
  """Returns the raw files or their archive: [] if none are needed, None to download them."""
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
  return _given_files(source, raw_dir, data_dir, parameters)


def _given_files(
  source: str, raw_dir: str | Path, data_dir: Path, parameters: Mapping[str, Any]
) -> list[Path]:
  """Returns the raw files in `raw_dir`, or their archive."""
  spec = sources.SOURCES[source]
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


def summary(metadata: dict[str, Any], data_dir: str | Path, is_new: bool) -> str:
  """Formats counts, dropped data, licence and the next command for the user."""
  counts = metadata['counts']
  rows = [
    ('dataset', f'{metadata["name"]}, {"written to" if is_new else "already in"} {data_dir}'),
    ('users', f'{counts["users"]:,}'),
    ('items', describe_page.item_count(counts)),
    ('interactions', f'{counts["interactions"]:,}, median {counts["median_length"]:g} a user'),
  ]
  if 'parent' in metadata:
    rows.append(('version', f'{metadata["version"]}, after {metadata["parent"]["hash"]}'))
  if 'rows_read' in metadata:  # Older folders do not say it.
    rows.append(('rows read', f'{metadata["rows_read"]:,}'))
  if metadata['time_range']:
    first, last = (np.datetime64(t, 's').astype('datetime64[D]') for t in metadata['time_range'])
    rows.append(('dates', f'{first} to {last}'))
  else:
    rows.append(('dates', 'none; the order of the file'))
  for what, reasons in metadata['dropped'].items():
    if reasons:
      rows.append((f'- {what}', ', '.join(f'{reason} {n:,}' for reason, n in reasons.items())))
  rows += [('note', note) for note in metadata.get('notes', [])]
  for name, record in metadata['splits'].items():
    rows.append(('split', f'{splits.describe(name, record)} {record["hash"]}'))
    rows.append(('-', describe_page.split_counts(record)))
  rows += [('licence', metadata['licence']), *_next_rows(metadata, data_dir)]
  return '\n'.join(f'{name:<14} {value}' for name, value in rows)


def _next_rows(metadata: dict[str, Any], data_dir: str | Path) -> list[tuple[str, str]]:
  """Returns the next commands: what the items have is encoded before a model is trained."""
  folder = shlex.quote(str(data_dir))
  found = content.modalities(data_dir, _MOST_SEARCHED)
  commands = []
  if content.IMAGE not in found and content.has_urls(data_dir, _MOST_SEARCHED):
    commands.append(f'python -m data_prep.download_images --data_dir={folder}')
  if found or commands:
    earlier = carry_over.encoders(Path(data_dir))
    names = [','.join(earlier), shlex.quote(','.join(earlier.values()))]
    flags = f' --modality={names[0]} --encoder={names[1]}' if earlier else ''
    commands.append(f'python -m data_prep.encode --data_dir={folder}{flags}')
  training = sources.training_command(metadata, data_dir)
  if not commands:
    return [('next', training)]
  rows = [('- then' if i else 'next', command) for i, command in enumerate(commands)]
  return [*rows, ('- or, ids alone', training)]


def _flags() -> Parser:
  parser = Parser(__doc__)
  add = parser.add_argument
  add('--source', help=f'one of {", ".join(sources.SOURCES)}')
  add(
    '--raw_dir',
    help='folder or archive (.zip, .tar, .tar.gz, .tgz) with the raw files, or the file if there is'
    ' only one; without it movielens_100k and movielens_1m are downloaded',
  )
  add('--data_dir', help='folder to create')
  add('--min_rating', type=float, help='drop interactions with a lower rating')
  add(
    '--k_core',
    type=int,
    help='drop users and items with fewer interactions, repeatedly until all have as many',
  )
  add('--min_length', type=int, help='drop users with a shorter history')
  add(
    '--drop_duplicates',
    action='store_true',
    help='keep only the first of several rows with the same user, item and time',
  )
  add(
    '--time_split',
    help='borders of the split by time: two dates such as 2024-05-01,2024-06-01 or two shares of'
    ' the interactions; without it 0.8,0.9',
  )
  add(
    '--image_size',
    type=int,
    default=pictures.IMAGE_SIZE,
    help='pictures are reduced until their short side has this many pixels',
  )
  add(
    '--memory_limit',
    default=_ENGINE['memory_limit'],
    help='memory for filtering and sorting, such as 1GB; the rest goes to a folder on the disk',
  )
  add(
    '--engine',
    choices=('duckdb', 'spark'),
    default=_ENGINE['engine'],
    help='what filters and sorts, with the same result: duckdb in this process, or spark, also on'
    ' several machines, see docs/large_data.md',
  )
  add(
    '--master',
    help=f'with --engine=spark: spark://HOST:PORT, or {spark.LOCAL} for the cores of this machine,'
    ' which is the default',
  )
  add(
    '--workers',
    type=int,
    default=os.cpu_count() or 1,
    help='processes that write the interactions where they take several files',
  )
  add(
    '--overwrite',
    action='store_true',
    help='replace the dataset in --data_dir, with the texts and embeddings made from it, when the'
    ' new one is complete',
  )
  add(
    '--append',
    action='store_true',
    help='add the new events in --raw_dir to the dataset in --data_dir, as a new folder --out; the'
    ' settings are those of the first build, see docs/updates.md',
  )
  add('--out', help='with --append: folder to create')
  add(
    '--late',
    action='store_true',
    help='with --append: take a file whose events are all earlier than the last old one',
  )
  add(
    '--if_new',
    action='store_true',
    help='with --append: a file without anything new is no error, and makes no folder',
  )
  for name, (kind, text) in _PARAMETERS.items():
    how = {'action': 'store_true'} if kind is bool else {'type': kind}
    add(f'--{name}', default=None, help=text, **how)
  return parser


def _resources(flags: argparse.Namespace) -> engine.Resources:
  if flags.engine != 'spark' and flags.master:
    raise InputError('--master is for --engine=spark; leave it out')
  master = (flags.master or spark.LOCAL) if flags.engine == 'spark' else None
  return engine.Resources(flags.memory_limit, workers=flags.workers, master=master)


def _append(flags: argparse.Namespace, named: Collection[str]) -> tuple[dict[str, Any], bool]:
  """Appends as the flags say; `named` are those of the command line."""
  for name, what in (
    ('data_dir', 'the folder of the old version'),
    ('raw_dir', 'the file of the new events'),
    ('out', 'the folder to create'),
  ):
    if not getattr(flags, name):
      raise InputError(f'--{name} is missing: {what}')
  if flags.overwrite:
    raise InputError('--overwrite: --append never replaces a folder; leave it out')
  values = vars(flags)
  for name, default in _ENGINE.items():
    if values[name] != default:
      raise InputError(f'--{name}={values[name]}: --append needs no engine; leave it out')
  settings = (*prepare.Options._fields, *_PARAMETERS)
  given = {name: values[name] for name in settings if name in named}
  source = read_info(flags.data_dir)['source']
  if flags.source not in (None, source):
    raise InputError(f'--source={flags.source}: {flags.data_dir} is of --source={source}')
  resources = engine.Resources(workers=flags.workers)
  return append(flags.data_dir, flags.raw_dir, flags.out, given, flags.late, resources)


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, builds the dataset and prints the summary."""
  parser = _flags()
  flags = parser.parse(argv)
  for name in ('k_core', 'min_length', 'image_size', 'workers'):
    value = getattr(flags, name)
    if value is not None and value < 1:
      raise InputError(f'--{name} must be 1 or more, not {value}')
  if flags.append:
    try:
      metadata, is_new = _append(flags, parser.given)
    except NoRows as error:
      if not flags.if_new:
        raise
      say(f'nothing is appended: {error}')
      return
    say(summary(metadata, flags.out, is_new))
    return
  for name in ('out', 'late', 'if_new'):
    if getattr(flags, name):
      raise InputError(f'--{name} is for --append; leave it out')
  if flags.source not in sources.SOURCES:
    given = '' if flags.source is None else f', not {flags.source!r}'
    raise InputError(f'--source must be one of {", ".join(sources.SOURCES)}{given}')
  if not flags.data_dir:
    raise InputError('--data_dir is missing: the folder to create')
  values = vars(flags)
  options = prepare.Options(**{name: values[name] for name in prepare.Options._fields})
  parameters = {name: values[name] for name in _PARAMETERS if values[name] is not None}
  metadata, is_new = build(
    flags.source,
    flags.data_dir,
    flags.raw_dir,
    options,
    flags.overwrite,
    parameters,
    _resources(flags),
  )
  say(summary(metadata, flags.data_dir, is_new))


if __name__ == '__main__':
  main()

"""Turns raw files into one prepared dataset folder.

  python -m data_prep.build_dataset --source=movielens_1m --raw_dir=raw/ml-1m --data_dir=data/ml-1m
  python -m data_prep.build_dataset --source=synthetic --data_dir=data/synthetic

The folder then holds dataset.json (counts, options, split hash, licence), `interactions` (one
example a user) and `items` (one example an item), both TFDS data in array_record files.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from absl import app, flags, logging

from data_prep import builders, download, prepare, sources
from ur4rec_jax.errors import InputError, exit_on_input_error

_SOURCE = flags.DEFINE_string('source', None, f'One of: {", ".join(sources.SOURCES)}.')
_RAW_DIR = flags.DEFINE_string(
  'raw_dir', None, 'Folder with the raw files; left out, MovieLens sources are downloaded.'
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
_PARAMETERS = {
  'num_users': flags.DEFINE_integer('num_users', None, 'Users to generate (synthetic only).'),
  'num_items': flags.DEFINE_integer('num_items', None, 'Items to generate (synthetic only).'),
  'seed': flags.DEFINE_integer('seed', None, 'Seed of the generator (synthetic only).'),
}
_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Replace the dataset in --data_dir, once the new one is complete.'
)


def build(
  source: str,
  data_dir: str | Path,
  raw_dir: str | Path | None = None,
  options: prepare.Options = prepare.Options(),
  overwrite: bool = False,
  parameters: Mapping[str, int] = MappingProxyType({}),
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
  spec = sources.SOURCES[source]
  data_dir = Path(os.path.realpath(data_dir))
  _clean_up(data_dir)
  old = _existing(data_dir)
  if misplaced := sorted(set(parameters) - set(spec.parameters)):
    raise InputError(f'--{misplaced[0]} is no flag of --source={source}; leave it out')
  parameters = {**spec.parameters, **parameters}
  files = None if spec.files else []
  if raw_dir is not None:
    if not spec.files:
      raise InputError(f'--source={source} needs no raw files; leave --raw_dir out')
    raw_dir = Path(raw_dir)
    files = sources.find_files(spec.files, raw_dir)
    if data_dir in Path(os.path.realpath(files[0])).parents:
      raise InputError(f'{raw_dir}: the raw files lie inside --data_dir; give another --data_dir')
  elif spec.files and spec.archive is None:
    raise InputError(
      f'--source={source} cannot be downloaded; pass --raw_dir with {", ".join(spec.files)}'
    )
  wanted = {'options': {**options._asdict(), **parameters}}
  if files:
    wanted['raw_sha256'] = {path.name: _sha256(path) for path in files}
  if old is not None and not overwrite:
    _check_same(data_dir, old, source, wanted)
    return old, False

  raw = None if files is None else spec.read(*files, **parameters)
  staging = data_dir.with_name(f'{data_dir.name}.incomplete-{os.getpid()}')
  try:
    staging.mkdir(parents=True)
    if raw is None:
      folder = staging / 'raw'
      files = download.fetch(spec.archive, spec.files, folder)
      wanted['raw_sha256'] = {path.name: _sha256(path) for path in files}
      raw = spec.read(*files, **parameters)
      shutil.rmtree(folder)
    data = prepare.prepare(raw, options)
    metadata = builders.write(staging, data, spec.origin, source, wanted)
    _move_in(staging, data_dir)
  except OSError as error:
    raise InputError(_disk_trouble(data_dir, error)) from error
  finally:
    shutil.rmtree(staging, ignore_errors=True)
  return metadata, True


def _existing(data_dir: Path) -> dict[str, Any] | None:
  """The dataset.json of a prepared dataset, None if there is nothing at the place."""
  if not data_dir.exists():
    return None
  if not data_dir.is_dir():
    raise InputError(f'{data_dir}: is a file; give another --data_dir')
  if not any(data_dir.iterdir()):
    return None
  try:
    metadata = json.loads((data_dir / builders.METADATA).read_text(encoding='utf-8'))
    if {'source', 'options', 'counts', 'split', 'format_version'} <= metadata.keys():
      return metadata
  except (OSError, ValueError, AttributeError):
    pass
  raise InputError(
    f'{data_dir}: holds files but no prepared dataset, and is left alone; give another --data_dir'
  )


def _check_same(data_dir: Path, old: dict[str, Any], source: str, wanted: dict[str, Any]) -> None:
  wanted = {'format_version': builders.FORMAT_VERSION, 'source': source, **wanted}
  for field, value in wanted.items():
    if old.get(field) != value:
      raise InputError(
        f'{data_dir}: holds another dataset: its {field} is {_compact(old.get(field))}, asked for'
        f' is {_compact(value)}; pass --overwrite to replace it, or give another --data_dir'
      )


def _compact(value: Any) -> str:
  if isinstance(value, dict):
    return (
      ' '.join(f'{k}={str(v)[:16]}' for k, v in value.items() if v not in (None, False)) or 'none'
    )
  return str(value)


def _clean_up(data_dir: Path) -> None:
  """Removes what killed builds left; puts back a dataset whose replacement was cut short."""
  pattern = re.compile(re.escape(data_dir.name) + r'\.(incomplete|replaced)-(\d+)')
  siblings = data_dir.parent.iterdir() if data_dir.parent.is_dir() else ()
  for path in sorted(siblings):
    match = pattern.fullmatch(path.name)
    if not match or (int(match[2]) != os.getpid() and _is_alive(int(match[2]))):
      continue
    if match[1] == 'replaced' and not data_dir.exists():
      path.rename(data_dir)
    else:
      shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _move_in(staging: Path, data_dir: Path) -> None:
  """Puts a complete dataset in its place; an old one goes away only after that."""
  replaced = data_dir.with_name(f'{data_dir.name}.replaced-{os.getpid()}')
  if data_dir.exists() and any(data_dir.iterdir()):
    os.rename(data_dir, replaced)
  os.rename(staging, data_dir)
  shutil.rmtree(replaced, ignore_errors=True)


def _disk_trouble(data_dir: Path, error: OSError) -> str:
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    advice = 'free some space or give another --data_dir'
  else:
    advice = 'make it writable or give another --data_dir'
  return f'{data_dir}: cannot be written ({error.strerror or error}); {advice}'


def _sha256(path: Path) -> str:
  try:
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); make it readable') from error


def summary(metadata: dict[str, Any], data_dir: str | Path, is_new: bool) -> str:
  """What the user reads at the end: counts, losses, licence and what to do next."""
  counts = metadata['counts']
  rows = [
    ('dataset', f'{metadata["name"]}, {"written to" if is_new else "already in"} {data_dir}'),
    ('users', f'{counts["users"]:,} ({counts["evaluated_users"]:,} evaluated)'),
    ('items', f'{counts["items"]:,}'),
    ('interactions', f'{counts["interactions"]:,}, median {counts["median_length"]:g} a user'),
  ]
  if metadata['time_range']:
    first, last = (np.datetime64(t, 's').astype('datetime64[D]') for t in metadata['time_range'])
    rows.append(('dates', f'{first} to {last}'))
  else:
    rows.append(('dates', 'none; the order of the file'))
  lost = [
    f'{n:,} {what} ({reason})'
    for what, reasons in metadata['dropped'].items()
    for reason, n in reasons.items()
  ]
  rows += [
    ('left out', ', '.join(lost) or 'nothing'),
    ('split', f'{metadata["split"]["name"]} {metadata["split"]["hash"]}'),
    ('licence', metadata['licence']),
    (
      'next',
      'python -m ur4rec_jax.main --config=configs/sasrec.py'
      f' --workdir=runs/{Path(data_dir).name} --config.data_dir={data_dir}',
    ),
  ]
  return '\n'.join(f'{name:<13} {value}' for name, value in rows)


@exit_on_input_error
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
  for flag in (_K_CORE, _MIN_LENGTH):
    if flag.value is not None and flag.value < 1:
      raise InputError(f'--{flag.name} must be 1 or more, not {flag.value}')
  options = prepare.Options(
    _MIN_RATING.value, _K_CORE.value, _MIN_LENGTH.value, _DROP_DUPLICATES.value
  )
  parameters = {name: f.value for name, f in _PARAMETERS.items() if f.value is not None}
  metadata, is_new = build(
    _SOURCE.value, _DATA_DIR.value, _RAW_DIR.value, options, _OVERWRITE.value, parameters
  )
  print(summary(metadata, _DATA_DIR.value, is_new))


if __name__ == '__main__':
  app.run(main)

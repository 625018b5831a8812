"""Tells whether a folder already holds the wanted dataset, by options and hashes of raw data."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep import sources
from ur4rec_jax.data.dataset import FORMAT_VERSION, METADATA, check_interactions
from ur4rec_jax.data.raw.records import Raw
from ur4rec_jax.errors import InputError
from ur4rec_jax.files import sha256

_MOST_SHOWN = 8  # Entries of an option or hash in a message.


def find_same(
  data_dir: Path,
  source: str,
  wanted: Mapping[str, Any],
  overwrite: bool,
  way_out: str = 'pass --overwrite to replace it, or give another --data_dir',
) -> dict[str, Any] | None:
  """Looks for the wanted dataset in a folder.

  Args:
    data_dir: the folder; may be missing.
    source: name of the source.
    wanted: `options` and `raw_sha256` of the wanted dataset.
    overwrite: whether another dataset may be replaced.
    way_out: what the user can do if it may not.

  Returns:
    Its dataset.json; None if the dataset has to be built.

  Raises:
    InputError: the folder holds another dataset or other files, or the dataset is damaged.
  """
  old = _existing(data_dir)
  if old is None or overwrite:
    return None
  _check_same(data_dir, old, source, wanted, way_out)
  _check_sound(data_dir)
  return old


def _existing(data_dir: Path) -> dict[str, Any] | None:
  """Reads the dataset.json of a prepared folder; None if the folder is missing or empty."""
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


def _check_same(
  data_dir: Path, old: dict[str, Any], source: str, wanted: Mapping[str, Any], way_out: str
) -> None:
  wanted = {'format_version': FORMAT_VERSION, 'source': source, **wanted}
  for field, value in wanted.items():
    known, value = _given(old.get(field)), _given(value)
    if known != value:
      raise InputError(
        f'{data_dir}: holds another dataset: its {field} is {_compact(known, value)}, asked for'
        f' is {_compact(value, known)}; {way_out}'
      )


def _given(value: Any) -> Any:
  """Leaves out options that are off, because older folders do not know them all."""
  if not isinstance(value, dict):
    return value
  return {name: part for name, part in value.items() if part is not None and part is not False}


def _check_sound(data_dir: Path) -> None:
  try:
    check_interactions(data_dir)
  except InputError as error:
    raise InputError(
      f'{data_dir}: the interactions are not those of {METADATA}, or cannot be read; pass'
      ' --overwrite to build it again'
    ) from error


def _compact(value: Any, other: Any) -> str:
  """Formats a value of dataset.json for an error message, what differs from `other` first."""
  if not isinstance(value, dict):
    return str(value)
  other = other if isinstance(other, dict) else {}
  names = sorted(value, key=lambda name: value[name] == other.get(name))
  parts = [f'{name}={str(value[name])[:16]}' for name in names[:_MOST_SHOWN]]
  return ' '.join(parts) + ' ...' * (len(names) > _MOST_SHOWN) or 'none'


def fingerprints(
  paths: list[Path], spec: sources.Source, parameters: Mapping[str, Any]
) -> dict[str, str]:
  """Returns the SHA-256 of each raw file by its name, and one of all pictures together."""
  root = os.path.commonpath([path.parent for path in paths])
  found = {os.path.relpath(path, root): _file_hash(path) for path in paths}
  for name in spec.paths:
    if parameters[name] is not None and Path(parameters[name]).is_file():
      found[name] = _file_hash(Path(parameters[name]))
  return found | picture_fingerprint(spec.pictures(paths, parameters))


def _file_hash(path: Path) -> str:
  try:
    return sha256(path)
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); make it readable') from error


def picture_fingerprint(paths: list[Path]) -> dict[str, str]:
  """Hashes the content of pictures; sizes and times would miss changes or see false ones."""
  digest = hashlib.sha256()
  for path in paths:
    digest.update(f'{path.name}\0{_file_hash(path)}\0'.encode())
  return {'pictures': digest.hexdigest()} if paths else {}


def table_fingerprint(raw: Raw) -> str:
  """Returns the SHA-256 of a table in memory."""
  digest = hashlib.sha256()
  for ids in map(pa.array, (raw.users, raw.items)):
    digest.update('\0'.join(ids.dictionary.to_pylist()).encode())
    digest.update(np.asarray(ids.indices).astype('<i4').tobytes())
  for column in (raw.timestamps, raw.ratings):
    digest.update(b'' if column is None else np.ascontiguousarray(column).tobytes())
  digest.update(repr((raw.ticks_per_second, raw.table, raw.notes)).encode())
  if raw.keep_cold_items:
    digest.update(b'keep_cold_items')
  return digest.hexdigest()

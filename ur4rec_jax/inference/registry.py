"""A registry: a folder with the models that have been served, and the one that is served now.

  REGISTRY/
    versions/000001/ ...      one export each, as `ur4rec_jax.export` writes it
    current.json              the promoted version, and the ones before it

A kill at any moment leaves the old model or the new one promoted, never a part of one. A promotion
removes old versions. Services lock what they serve, so that it stays.
"""

import contextlib
import datetime
import fcntl
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ur4rec_jax import files
from ur4rec_jax.errors import InputError, StorageError, say

CURRENT = 'current.json'
KEEP_VERSIONS = 5
_VERSIONS = 'versions'
_MANIFEST = 'manifest.json'  # The manifest of an export, with the hashes of its other files.


def current(registry: str | Path) -> str | None:
  """Returns the name of the promoted version; None if there is none yet.

  Raises:
    InputError: `current.json` is damaged.
  """
  record = _read(registry)
  return record['version'] if record else None


def path(registry: str | Path, version: str) -> str:
  """Returns the folder of a version."""
  return str(Path(registry) / _VERSIONS / version)


def hold(export_dir: str | Path) -> BinaryIO | None:
  """Keeps a version from being removed, as long as the returned file is open.

  Args:
    export_dir: the folder of the version, or any other exported folder.

  Returns:
    None if the disk has no locks, or if there is no such folder.
  """
  with contextlib.suppress(OSError):
    file = (Path(export_dir) / _MANIFEST).open('rb')
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file
  return None


def promote(
  registry: str | Path,
  export_dir: str | Path,
  reason: str = '',
  keep_versions: int = KEEP_VERSIONS,
) -> str:
  """Copies an export into the registry and makes it the current version.

  Nothing changes if the current version is the same export already.

  Args:
    registry: the folder; it is made if it is not there.
    export_dir: a folder that `ur4rec_jax.export` wrote.
    reason: why it is promoted, for people who read `current.json`.
    keep_versions: how many versions stay: the new one, the one before it, and the newest others.
      One that a service of this machine serves stays, too.

  Returns:
    The name of the version.

  Raises:
    InputError: `export_dir` is no export, or `current.json` is damaged.
    BusyError: another process changes the registry.
    StorageError: the registry cannot be written.
  """
  from ur4rec_jax.inference import exported  # Slow to import, and a rollback does not need it.

  registry, export_dir = Path(registry), Path(export_dir)
  names = exported.file_names(export_dir)
  try:
    (registry / _VERSIONS).mkdir(parents=True, exist_ok=True)
    with _locked(registry):
      record = _read(registry)
      if record and _is_same(export_dir, Path(path(registry, record['version']))):
        return record['version']
      newest = int(record['newest']) if record else 0
      _remove_leftovers(registry, newest)
      version = f'{newest + 1:06}'
      with files.new_folder(registry / _VERSIONS / version) as draft:
        # Only those: somebody may keep the events of the service in the same folder.
        for name in names:
          shutil.copy2(export_dir / name, draft / name)
        files.sync_tree(draft)
      # Otherwise a power cut might leave a current version without its files.
      files.sync(registry / _VERSIONS)
      history = (
        record['history'][: record['history'].index(record['version']) + 1] if record else []
      )
      with contextlib.ExitStack() as locks:
        old = _lock_old(registry, [*history, version], keep_versions, locks)
        history = [name for name in history if name not in old]
        _write(registry, version, [*history, version], version, reason)
        _remove(registry, old)
      return version
  except OSError as error:
    raise StorageError(f'{registry}: cannot be written ({error.strerror or error})') from error


def rollback(registry: str | Path) -> str:
  """Makes the version before the current one current again.

  Returns:
    The name of the version.

  Raises:
    InputError: no version was promoted before the current one.
    BusyError: another process changes the registry.
    StorageError: the registry cannot be written.
  """
  registry = Path(registry)
  if not (registry / CURRENT).is_file():
    raise InputError(f'{registry}: no registry of models (no {CURRENT}); promote a model first')
  with _locked(registry):
    record = _read(registry)
    before = record['history'].index(record['version']) - 1
    if before < 0:
      raise InputError(
        f'{registry}: nothing was promoted before version {record["version"]}; it stays the'
        ' current one'
      )
    version = record['history'][before]
    reason = f'rolled back from version {record["version"]}'
    _write(registry, version, record['history'], record['newest'], reason)
    return version


def _read(registry: str | Path) -> dict[str, Any] | None:
  file = Path(registry) / CURRENT
  try:
    record = json.loads(file.read_text(encoding='utf-8'))
    version, history = record['version'], record['history']
    if version not in history or not all(name.isdecimal() for name in history):
      raise ValueError('its version is not in its history')
    int(record.setdefault('newest', max(history)))
    return record
  except FileNotFoundError:
    return None
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise InputError(
      f'{file}: is damaged ({error!r:.200}); put back a copy, or write'
      ' {"version": NAME, "history": [NAME]} with the name of a folder in'
      f' {file.parent / _VERSIONS}'
    ) from error


def _write(registry: Path, version: str, history: list[str], newest: str, reason: str) -> None:
  record = {
    'version': version,
    'history': history,
    'newest': newest,  # Numbers are never used twice, not even after a rollback.
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'reason': reason,
  }
  files.write_file(registry / CURRENT, json.dumps(record, indent=2) + '\n')


def _locked(registry: Path) -> Any:
  return files.only_process(
    registry / 'lock', f'another process changes the registry {registry}; wait until it ends'
  )


def _is_same(export_dir: Path, version: Path) -> bool:
  here = version / _MANIFEST
  return here.is_file() and here.read_bytes() == (export_dir / _MANIFEST).read_bytes()


def _lock_old(
  registry: Path, history: Sequence[str], keep: int, locks: contextlib.ExitStack
) -> list[str]:
  """Returns the versions that nobody needs, and locks them so that no service begins with one."""
  folders = (registry / _VERSIONS).iterdir()
  names = {folder.name for folder in folders if folder.is_dir() and folder.name.isdecimal()}
  needed = history[-2:]
  others = sorted(names.difference(needed), key=int, reverse=True)
  old = []
  for name in others[max(keep - len(needed), 0) :]:
    with contextlib.suppress(OSError):  # A service has the lock, or it is no version.
      file = locks.enter_context((registry / _VERSIONS / name / _MANIFEST).open('r+b'))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      old.append(name)
  return sorted(old, key=int)


def _remove(registry: Path, versions: Sequence[str]) -> None:
  """Removes versions, each in one step."""
  for version in versions:
    folder = registry / _VERSIONS / version
    # What a kill leaves of it is a leftover for the next promotion.
    draft = files.draft_path(folder)
    try:
      folder.rename(draft)
      shutil.rmtree(draft)
    except OSError as error:  # The promotion is done.
      say(f'note: {folder}: cannot be removed ({error.strerror or error})', sys.stderr)
  if versions:
    say(f'{registry}: removed old versions: {", ".join(versions)}')


def _remove_leftovers(registry: Path, newest: int) -> None:
  """Removes leftovers of killed commands: drafts, and a version that never became current."""
  versions = registry / _VERSIONS
  names = {folder.name.partition('.')[0] for folder in versions.iterdir() if folder.is_dir()}
  for name in filter(str.isdecimal, names):  # Others are not ours, such as those of file managers.
    files.clean_up(versions / name)  # Drafts of commands that run stay: one may forget a user.
    if int(name) > newest and (versions / name).is_dir():
      shutil.rmtree(versions / name)

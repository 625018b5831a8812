"""Opens a folder that `ur4rec_jax.export` wrote.

This needs only jax, NumPy and flatbuffers, in which jax stores programs. The packages that training
needs may be missing.

  from ur4rec_jax import exported

  recommender = exported.load('shop-model')
  answer = recommender.top([['S0-1', 'S3-7']], k=10)
  answer.items[0], answer.scores[0]
"""

import hashlib
import io
import json
import os
import pathlib
import shutil
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import numpy as np

from ur4rec_jax.errors import InputError
from ur4rec_jax.inference.recommender import Recommender, Users, make_users
from ur4rec_jax.inference.stored_arrays import as_tree, unpack
from ur4rec_jax.inference.stored_format import Settings
from ur4rec_jax.inference.thumbnails import PACKED, Thumbnails

FORMAT_VERSION = 1
MANIFEST, PROGRAM, ARRAYS, ITEMS = 'manifest.json', 'program.bin', 'arrays.npz', 'items.json'
USERS = 'users.npz'  # Only folders that were exported with --users have it.
PICTURES = 'pictures.npz'  # The index of the pictures; only folders with pictures have it.
PASSAGES = 'passages.json'  # Only folders of models that read texts have them.
# Programs in use by the hash of their file.
_programs: weakref.WeakValueDictionary[str, Callable[..., Any]] = weakref.WeakValueDictionary()
_AGAIN = 'export it again: python -m ur4rec_jax.export --workdir=DIR --out=FOLDER'


def load(folder: str | pathlib.Path) -> Recommender:
  """Opens an exported folder.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.

  Raises:
    InputError: this is not an exported folder, a file is missing or has changed, or the folder
      needs another version of this package or of jax, or another device.
  """
  folder = pathlib.Path(folder)
  manifest = _read_manifest(folder)
  contents = {name: _read(folder, name, digest) for name, digest in manifest['files'].items()}
  written, here = manifest['jax'], jax.__version__
  if _version(here) < _version(written):
    raise InputError(
      f'{folder}: was exported with jax {written}, and the older jax {here} may fail to read it;'
      f' install jax {written} or newer'
    )
  device = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  if device not in manifest['platforms']:
    raise InputError(
      f'{folder}: was exported for {", ".join(manifest["platforms"])}, not for {device}; set'
      ' JAX_PLATFORMS=cpu, or export it again for this device'
    )
  program = _program(contents[PROGRAM], manifest['files'][PROGRAM])
  arrays = as_tree(unpack(contents[ARRAYS], manifest['dtypes']))
  # Folders without covariances or a sketch store nothing for them, but the program expects a dict.
  arrays = {name: {} for name in ('params', 'items', 'covariances', 'sketch')} | arrays
  settings = Settings.from_manifest(manifest['settings'])
  users = None
  if USERS in contents:
    users = _users(unpack(contents[USERS], manifest['dtypes']), settings)
  return Recommender(program, arrays, json.loads(contents[ITEMS]), settings, users)


def is_of(folder: str | pathlib.Path, settings: Settings, with_users: bool) -> bool:
  """Tells whether a folder holds the export of a model with these settings.

  Exporting twice gives the same numbers, but not the same bytes of the program.

  Args:
    folder: the folder, which need not exist.
    settings: the settings of the model.
    with_users: whether the export must have the users, or must not.
  """
  try:
    manifest = _read_manifest(pathlib.Path(folder))
  except InputError:
    return False
  is_same = manifest['settings'] == json.loads(json.dumps(settings.to_manifest()))
  return is_same and (USERS in manifest['files']) == with_users


def model_hash(folder: str | pathlib.Path) -> str:
  """Returns the SHA-256 of all that an exported folder holds.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.

  Raises:
    InputError: this is not an exported folder.
  """
  return hashlib.sha256(manifest_text(_read_manifest(pathlib.Path(folder))).encode()).hexdigest()


def file_names(folder: pathlib.Path) -> list[str]:
  """Returns the names of the files of an export; others may lie beside them in its folder.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.

  Raises:
    InputError: this is not an exported folder, or a file is missing.
  """
  found = _read_manifest(folder)['files']
  names = [MANIFEST, *found, *([PACKED] if PICTURES in found else [])]
  for name in names:
    if not (folder / name).is_file():
      raise InputError(f'{folder / name}: is missing; {_AGAIN}')
  return names


def _program(content: bytes, digest: str) -> Callable[..., Any]:
  """Reads a program. The next model after an update has the same program, already compiled."""
  program = _programs.get(digest)
  if program is None:
    program = jax.jit(jax.export.deserialize(bytearray(content)).call)
    _programs[digest] = program
  return program


def is_compiled(folder: str | pathlib.Path) -> bool:
  """Tells whether this process uses a model with the same program.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.

  Raises:
    InputError: this is not an exported folder.
  """
  return _read_manifest(pathlib.Path(folder))['files'].get(PROGRAM) in _programs


def load_thumbnails(folder: str | pathlib.Path) -> Thumbnails | None:
  """Opens the pictures of an exported folder; None if it has none.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.

  Raises:
    InputError: this is not an exported folder, or a file is missing or has changed.
  """
  folder = pathlib.Path(folder)
  manifest = _read_manifest(folder)
  if PICTURES not in manifest['files']:
    return None
  index = unpack(_read(folder, PICTURES, manifest['files'][PICTURES]), manifest['dtypes'])
  return Thumbnails(folder, index)


def load_passages(folder: str | pathlib.Path) -> list[list[str]]:
  """Reads the distinctive passages of each item's text; [] if the model reads no texts.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.

  Raises:
    InputError: this is not an exported folder, or a file is missing or has changed.
  """
  folder = pathlib.Path(folder)
  files = _read_manifest(folder)['files']
  return json.loads(_read(folder, PASSAGES, files[PASSAGES])) if PASSAGES in files else []


def forget_user(folder: str | pathlib.Path, user: str) -> bool:
  """Removes a user's history and texts from an exported folder, in one step.

  The parameters of the model stay as they are, and the user had a part in their training.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.
    user: the user's original id.

  Returns:
    Whether the folder had the user.

  Raises:
    InputError: this is not an exported folder, or a file is missing or has changed.
    BusyError: another process changes the folder.
    OSError: the folder cannot be written.
  """
  from ur4rec_jax import files  # Needs filelock, which machines that only recommend may lack.

  folder = pathlib.Path(folder)
  target = folder.resolve()  # If a link were replaced, the folder behind it would keep the user.
  files.clean_up(target)
  if USERS not in _read_manifest(folder)['files']:  # Then nothing is written, not even a lock.
    return False
  busy = f'another process changes {folder}; wait until it ends'
  # Of two at once, each would put back the user whom the other one has removed.
  with files.only_process(target.with_name(f'{target.name}.lock'), busy):
    return _forget_user(folder, target, user)


def _forget_user(folder: pathlib.Path, target: pathlib.Path, user: str) -> bool:
  from ur4rec_jax import files

  manifest = _read_manifest(folder)
  content = _read(folder, USERS, manifest['files'][USERS])
  with np.load(io.BytesIO(content), allow_pickle=False) as file:
    arrays = dict(file)
  (rows,) = np.nonzero(arrays['ids'] == user)
  if not rows.size:
    return False
  row, offsets = int(rows[0]), arrays.pop('offsets')
  start, end = offsets[row : row + 2]
  items = np.delete(arrays.pop('items'), slice(start, end))
  arrays = {name: np.delete(values, row, 0) for name, values in arrays.items()}
  lengths = np.delete(np.diff(offsets), row)
  arrays |= {'items': items, 'offsets': np.append([0], np.cumsum(lengths)).astype(offsets.dtype)}
  archive = io.BytesIO()
  np.savez(archive, **arrays)
  manifest['files'][USERS] = hashlib.sha256(archive.getvalue()).hexdigest()
  with files.new_folder(target) as draft:
    # Links, not copies: the store of events of a running service may lie in the folder, too. The
    # next start of the service makes its compiled programs again.
    left_out = lambda at, _: {USERS, MANIFEST, 'compiled'} if at == os.fspath(folder) else ()
    shutil.copytree(
      folder, draft, symlinks=True, dirs_exist_ok=True, copy_function=_link_or_copy, ignore=left_out
    )
    files.write_file(draft / USERS, archive.getvalue())
    files.write_file(draft / MANIFEST, manifest_text(manifest))
  return True


def _link_or_copy(source: str, target: str) -> None:
  try:
    os.link(source, target)
  except OSError:  # The disk knows no links.
    shutil.copy2(source, target)


def _users(arrays: Mapping[str, np.ndarray], settings: Settings) -> Users:
  return make_users(
    arrays['ids'].tolist(),
    arrays['offsets'],
    arrays['items'],
    {name: (arrays[f'tokens/{name}'], arrays[f'mask/{name}']) for name in settings.preferences},
  )


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / MANIFEST
  if not path.is_file():
    raise InputError(f'{folder}: no exported model (no {MANIFEST}); {_AGAIN}')
  try:
    content = path.read_text(encoding='utf-8')
    manifest = json.loads(content)
    version = manifest['format_version']
    del manifest['sha256']
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise InputError(f'{path}: cannot be read ({error!r}); {_AGAIN}') from error
  if content != manifest_text(manifest):
    raise InputError(f'{path}: has changed since it was written; {_AGAIN}')
  if version != FORMAT_VERSION:
    raise InputError(
      f'{path}: is of format {version}, this version reads {FORMAT_VERSION}; {_AGAIN}'
    )
  return manifest


def manifest_text(manifest: Mapping[str, Any]) -> str:
  """Returns the content of the manifest's file: the manifest with its own SHA-256."""
  digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
  return json.dumps({**manifest, 'sha256': digest}, indent=2) + '\n'


def _read(folder: pathlib.Path, name: str, digest: str) -> bytes:
  path = folder / name
  try:
    content = path.read_bytes()
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); export it again') from error
  if hashlib.sha256(content).hexdigest() != digest:
    raise InputError(f'{path}: has changed since it was written; export it again')
  return content


def _version(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split('.')[:3] if part.isdigit())

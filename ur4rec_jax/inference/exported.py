"""Opens a folder that `ur4rec_jax.export` wrote.

Needs only jax, NumPy and flatbuffers (with which jax stores programs), so it runs in a process that
has none of the packages that training needs.

  from ur4rec_jax import exported

  recommender = exported.load('shop-model')
  answer = recommender.top([['S0-1', 'S3-7']], k=10)
  answer.items[0], answer.scores[0]
"""

import hashlib
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import numpy as np

from ur4rec_jax.errors import InputError
from ur4rec_jax.inference.recommender import Recommender, Users

FORMAT_VERSION = 1
MANIFEST, PROGRAM, ARRAYS, ITEMS = 'manifest.json', 'program.bin', 'arrays.npz', 'items.json'
USERS = 'users.npz'  # Only if asked for.


def load(folder: str | pathlib.Path) -> Recommender:
  """Opens what `ur4rec_jax.export` wrote.

  Raises:
    InputError: it is no such folder, a file is missing or has changed, or it is of a version or
      for a device that this process has not.
  """
  folder = pathlib.Path(folder)
  manifest = _read_manifest(folder)
  contents = {name: _read(folder, name, digest) for name, digest in manifest['files'].items()}
  written, here = manifest['jax'], jax.__version__
  if _version(here) < _version(written):
    raise InputError(
      f'{folder}: was exported with jax {written}, which jax {here} may not read; install jax'
      f' {written} or newer'
    )
  device = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  if device not in manifest['platforms']:
    raise InputError(
      f'{folder}: was exported for {", ".join(manifest["platforms"])}, not for {device}; set'
      ' JAX_PLATFORMS=cpu, or export it again for this device'
    )
  program = jax.jit(jax.export.deserialize(bytearray(contents[PROGRAM])).call)
  arrays: dict[str, Any] = {'params': {}, 'items': {}, 'covariances': {}, 'sketch': {}}
  for name, values in _unpack(contents[ARRAYS], manifest).items():
    *parents, last = name.split('/')
    tree = arrays
    for parent in parents:
      tree = tree.setdefault(parent, {})
    tree[last] = values
  users = None
  if USERS in contents:
    found = _unpack(contents[USERS], manifest)
    users = Users(
      {name: i for i, name in enumerate(found['ids'].tolist())},
      found['offsets'],
      found['items'],
      {
        name: (found[f'tokens/{name}'], found[f'mask/{name}'])
        for name in manifest['settings']['preferences']
      },
    )
  return Recommender(program, arrays, json.loads(contents[ITEMS]), manifest['settings'], users)


def _unpack(archive: bytes, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(archive), allow_pickle=False) as file:
    return {
      name: values.view(manifest['dtypes'].get(name, values.dtype)) for name, values in file.items()
    }


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / MANIFEST
  again = 'export it again: python -m ur4rec_jax.export --workdir=DIR --out=FOLDER'
  if not path.is_file():
    raise InputError(f'{folder}: no exported model (no {MANIFEST}); {again}')
  try:
    content = path.read_text(encoding='utf-8')
    manifest = json.loads(content)
    version = manifest['format_version']
    del manifest['sha256']
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise InputError(f'{path}: cannot be read ({error!r}); {again}') from error
  if content != manifest_text(manifest):
    raise InputError(f'{path}: has changed since it was written; {again}')
  if version != FORMAT_VERSION:
    raise InputError(
      f'{path}: is of format {version}, this version reads {FORMAT_VERSION}; {again}'
    )
  return manifest


def manifest_text(manifest: Mapping[str, Any]) -> str:
  """What the manifest's file holds: the manifest, and its own SHA-256."""
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

"""Writes a trained recommender into one folder; opening it needs only jax and NumPy."""

import hashlib
import json
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.errors import InputError, StorageError
from ur4rec_jax.files import clean_up, new_folder, write_file
from ur4rec_jax.inference import exported, stored_format, thumbnails
from ur4rec_jax.inference.stored_arrays import by_path, pack

if TYPE_CHECKING:
  from ur4rec_jax.inference.trained import TrainedRecommender

PLATFORMS = ('cpu', 'cuda')


def export(
  recommender: 'TrainedRecommender',
  out: str | pathlib.Path,
  with_users: bool = False,
  with_pictures: bool = True,
) -> dict[str, Any]:
  """Writes a trained recommender into a folder; an error leaves no folder behind.

  Args:
    recommender: a recommender from `ur4rec_jax.load`.
    out: the folder to write, which must not exist.
    with_users: whether to add the users of the data with their histories, so that requests can
      give a user's id.
    with_pictures: whether to add small copies of the items' pictures, which the page shows.

  Returns:
    The manifest.

  Raises:
    InputError: `out` exists.
    StorageError: the folder cannot be written.
  """
  out = pathlib.Path(out)
  if out.exists():
    raise InputError(f'--out={out}: is there already; remove it or give another folder')
  arrays = jax.device_get(recommender.arrays)
  dtypes: dict[str, str] = {}
  contents = {
    exported.PROGRAM: bytes(_program(recommender, arrays)),
    exported.ARRAYS: pack(by_path(arrays), dtypes),
    exported.ITEMS: json.dumps(recommender.items, ensure_ascii=False).encode(),
  }
  if with_users:
    contents[exported.USERS] = pack(_users(recommender), dtypes)
  if any(recommender.passages):
    passages = json.dumps(recommender.passages, ensure_ascii=False)
    contents[exported.PASSAGES] = passages.encode()
  pictures = recommender.picture_files() if with_pictures else []
  try:
    clean_up(out)
    with new_folder(out) as draft:
      if any(pictures):
        contents[exported.PICTURES] = pack(thumbnails.pack(pictures, draft), dtypes)
      manifest = {
        'format_version': exported.FORMAT_VERSION,
        'jax': jax.__version__,
        'platforms': list(PLATFORMS),
        'files': {name: hashlib.sha256(x).hexdigest() for name, x in contents.items()},
        'dtypes': dtypes,
        'settings': recommender.settings.to_manifest(),
      }
      manifest = json.loads(json.dumps(manifest))  # Tuples become lists, as when it is read.
      contents[exported.MANIFEST] = exported.manifest_text(manifest).encode()
      for name, content in contents.items():
        write_file(draft / name, content)
  except OSError as error:
    cause = error.__cause__ or error
    raise StorageError(f'--out={out}: cannot be written ({cause})') from error
  return manifest


def _users(recommender: 'TrainedRecommender') -> dict[str, np.ndarray]:
  """Returns the arrays from which `exported.load` makes the known users."""
  names = list(recommender.users)
  texts = recommender.preferences_of(range(len(names)))
  return {
    'ids': np.array(names),
    'offsets': recommender.dataset.offsets,
    'items': recommender.dataset.item_ids,
    **{f'tokens/{name}': tokens for name, (tokens, _) in texts.items()},
    **{f'mask/{name}': mask for name, (_, mask) in texts.items()},
  }


def _program(recommender: 'TrainedRecommender', arrays: Any) -> bytearray:
  """Lowers the program for any number of users, length of histories, excluded items and k."""
  settings = recommender.settings
  most = settings.most_k or len(recommender.item_ids) + 1
  users, length, excluded, k = jax.export.symbolic_shape(
    'users, length, excluded, k',
    constraints=[f'length <= {settings.max_length}', f'k <= {most}'],
  )
  shape = jax.ShapeDtypeStruct
  queries = {
    stored_format.HISTORY: shape((users, length), jnp.int32),
    stored_format.EXCLUDED: shape((users, excluded), jnp.int32),
    stored_format.ALLOWED: shape((len(recommender.item_ids) + 1,), jnp.bool),
    stored_format.WEIGHTS: shape((users, len(recommender.branches)), jnp.float32),
    stored_format.PREFERENCES: {
      name: {
        'tokens': shape((users, tokens, width), jnp.float32),
        'mask': shape((users, tokens), jnp.bool),
      }
      for name, (tokens, width) in settings.preferences.items()
    },
    stored_format.POSITIONS: shape((k,), jnp.int8),
  }
  shapes = jax.tree.map(lambda x: shape(x.shape, x.dtype), arrays)
  return jax.export.export(recommender.program, platforms=PLATFORMS)(shapes, queries).serialize()

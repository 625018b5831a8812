"""Keeps the best parameters of a run, and its encoded catalogue, in the folder of the run.

Reading a checkpoint needs the libraries of training and the shapes of all trained arrays. The kept
files need only NumPy, so that only the first start after a training takes so long.
"""

import contextlib
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ur4rec_jax.errors import StorageError
from ur4rec_jax.files import clean_up, new_folder, write_file
from ur4rec_jax.inference import stored_arrays
from ur4rec_jax.runs.saved_steps import MANIFEST, checkpoint_folder, is_whole, saved_steps

FOLDER = 'recommender'
_FORMAT_VERSION = 2  # Raise it when items are encoded in another way.
_RECORD, _ARRAYS, _ITEMS = 'record.json', 'arrays.npz', 'items.json'


class Kept(NamedTuple):
  """A trained model that is ready to recommend.

  Attributes:
    config: config of the stage that the parameters come from.
    params: the best parameters, NumPy.
    items: `ids` and `titles` of the catalogue.
    item_arrays: the encoded catalogue, see `scoring.item_arrays`.
    followers: followers of each item, a `FollowerTable` as a dict; {} if the model reads none.
  """

  config: ConfigDict
  params: Any
  items: dict[str, list[str]]
  item_arrays: dict[str, Any]
  followers: dict[str, Any]


def origin(workdir: str | pathlib.Path) -> dict[str, Any] | None:
  """Identifies the checkpoint and the config of a run by hashes; None without a checkpoint."""
  for step in saved_steps(workdir):
    with contextlib.suppress(OSError):
      manifest = (checkpoint_folder(workdir) / str(step) / MANIFEST).read_bytes()
      config = (pathlib.Path(workdir) / 'config.json').read_bytes()
      hashes = [hashlib.sha256(x).hexdigest() for x in (manifest, config)]
      return {'format_version': _FORMAT_VERSION, 'step': step, 'sha256': hashes}
  return None


def read_config(workdir: str | pathlib.Path) -> ConfigDict | None:
  """Returns the config of the kept model; None unless it was made from the newest checkpoint."""
  record = _record(pathlib.Path(workdir) / FOLDER)
  if record is None or record['origin'] != origin(workdir):
    return None
  return ConfigDict(record['config'])


def read(workdir: str | pathlib.Path, config: ConfigDict, dataset: dict[str, Any]) -> Kept | None:
  """Reads the kept model.

  Args:
    workdir: folder of the run.
    config: from `read_config`.
    dataset: identity of the data.

  Returns:
    The model; None if it belongs to other data, or a file is missing or has changed.
  """
  folder = pathlib.Path(workdir) / FOLDER
  record = _record(folder)
  if record is None or record['dataset'] != dataset:
    return None
  try:
    contents = {name: (folder / name).read_bytes() for name in (_ARRAYS, _ITEMS)}
  except OSError:
    return None
  if {name: hashlib.sha256(x).hexdigest() for name, x in contents.items()} != record['files']:
    return None
  arrays = stored_arrays.as_tree(stored_arrays.unpack(contents[_ARRAYS], record['dtypes']))
  items = json.loads(contents[_ITEMS])
  return Kept(config, arrays['params'], items, arrays['items'], arrays.get('followers', {}))


def write(
  workdir: str | pathlib.Path,
  kept: Kept,
  dataset: dict[str, Any],
  made_from: dict[str, Any] | None,
) -> None:
  """Keeps a model that was read from the newest checkpoint; does nothing if it cannot be written.

  Args:
    workdir: folder of the run.
    kept: the model.
    dataset: identity of the data.
    made_from: what `origin` returned before the model was read. Training may save a newer
      checkpoint at any moment, and the model would pass for that one otherwise.
  """
  if made_from is None or not is_whole(checkpoint_folder(workdir) / str(made_from['step'])):
    return  # If the newest checkpoint is damaged, the model comes from an earlier one.
  arrays = stored_arrays.by_path(
    {'params': kept.params, 'items': kept.item_arrays, 'followers': kept.followers}
  )
  dtypes: dict[str, str] = {}
  contents = {
    _ARRAYS: stored_arrays.pack(arrays, dtypes),
    _ITEMS: json.dumps(kept.items, ensure_ascii=False).encode(),
  }
  record = {
    'origin': made_from,
    'dataset': dataset,
    'config': kept.config.to_dict(),
    'dtypes': dtypes,
    'files': {name: hashlib.sha256(x).hexdigest() for name, x in contents.items()},
  }
  folder = pathlib.Path(workdir) / FOLDER
  with contextlib.suppress(OSError, StorageError):  # Then only the next start takes longer.
    clean_up(folder)
    with new_folder(folder) as draft:
      for name, content in contents.items():
        write_file(draft / name, content)
      write_file(draft / _RECORD, json.dumps(record, indent=2) + '\n')


def _record(folder: pathlib.Path) -> dict[str, Any] | None:
  try:
    record = json.loads((folder / _RECORD).read_text(encoding='utf-8'))
    return record if {'origin', 'dataset', 'config', 'dtypes', 'files'} <= record.keys() else None
  except (OSError, ValueError, AttributeError):
    return None

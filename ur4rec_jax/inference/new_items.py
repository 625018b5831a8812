"""Reads and encodes items that the training data do not have, from their content."""

import dataclasses
import functools
import pathlib
import re
import warnings
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import Dataset, iterate_items
from ur4rec_jax.data.features import Features, TokenTable, load_features
from ur4rec_jax.encoders import pretrained, text
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation import cold_items
from ur4rec_jax.inference import scoring
from ur4rec_jax.models.ur4rec import BRANCHES, UR4Rec, create_model
from ur4rec_jax.sharding import devices

if TYPE_CHECKING:
  from ur4rec_jax.data.raw.records import Item

TEXT, IMAGE = 'text', 'image'
# Help of the flags of the commands that append items.
ADD_ITEMS = (
  'new items to append to the catalogue: a table (.csv, .tsv, .parquet, .jsonl) with their ids,'
  ' titles and descriptions, a prepared folder, or a .npz file'
)
PICTURES = 'folder of the pictures of a table of new items; without it, the folder of the table'
# Features can be compared only if these fields of info.json are equal.
_SAME_FIELDS = ('encoder', 'width', 'projection', 'is_normalised')


class NewItems(NamedTuple):
  """Items with their content.

  Attributes:
    ids: original ids.
    titles: titles.
    tables: content by modality; row i belongs to item i, and there is no row for padding.
    pictures: picture files, None for items without one.
  """

  ids: list[str]
  titles: list[str]
  tables: dict[str, TokenTable]
  pictures: list[pathlib.Path | None]

  def select(self, indices: np.ndarray) -> 'NewItems':
    """Returns some of the items.

    Args:
      indices: `[selected]` int.
    """
    return NewItems(
      [self.ids[i] for i in indices],
      [self.titles[i] for i in indices],
      {name: TokenTable(x.tokens[indices], x.mask[indices]) for name, x in self.tables.items()},
      [self.pictures[i] for i in indices],
    )


def read_new_items(
  source: str | pathlib.Path,
  trained_on: Mapping[str, Features],
  options: Mapping[str, Any],
  known: Container[str] = (),
  pictures: str | pathlib.Path | None = None,
) -> NewItems:
  """Reads items from a table of goods, a prepared folder or a .npz file.

  Args:
    source: a table; a prepared folder; or a .npz file with `ids` `[items]`, optionally `titles`
      `[items]`, and for each modality `[items, tokens, width]` or `[items, width]`.
    trained_on: the item features by modality that the model was trained on.
    options: the options of the training data, which name the columns of a table.
    known: ids of items in the catalogue; if a table has them, they are not encoded again.
    pictures: folder of the pictures of a table; None for the folder of the table.

  Raises:
    InputError: the source cannot be read, its features differ in kind from `trained_on`, or an
      encoder is missing.
  """
  from ur4rec_jax.inference import tables  # Slow to import, and a preference needs no table.

  source = pathlib.Path(source)
  if source.is_dir():
    return _read_folder(source, trained_on)
  if tables.is_table(source):
    folder = source.parent if pictures is None else pathlib.Path(pictures)
    return _read_table(source, trained_on, options, known, folder)
  return _read_npz(source, trained_on)


def _read_table(
  path: pathlib.Path,
  trained_on: Mapping[str, Features],
  options: Mapping[str, Any],
  known: Container[str],
  pictures: pathlib.Path,
) -> NewItems:
  from ur4rec_jax.inference import tables

  goods = tables.read_goods(path, options)
  names = list(goods)
  new = [i for i, name in enumerate(names) if name not in known]
  chosen = {names[i]: goods[names[i]] for i in new}
  encoded = {}
  for name, features in trained_on.items():
    count, width = features.max_tokens or features.shape[1], features.shape[2]
    tokens = np.zeros((len(goods), count, width), np.float32)
    mask = np.zeros((len(goods), count), bool)
    encoded[name] = TokenTable(tokens, mask)
    if not _is_encoded(name, features) or not chosen:
      continue
    if name == TEXT:
      found, there = _encode_texts(features, chosen)
    else:
      found, there = _encode_pictures(features, chosen, pictures, options.get('image_size'))
    tokens[new], mask[new] = found[:, :count], there[:, :count]
  lacking = [name for name, features in trained_on.items() if not _is_encoded(name, features)]
  if len(lacking) == len(trained_on):
    raise InputError(
      f'{path}: a table gives texts and pictures for the encoders of the training data, and none'
      f' of them made what this model reads ({", ".join(lacking)}); give a .npz file'
    )
  if lacking:
    warnings.warn(
      f'{path}: its items are taken without {", ".join(lacking)}, which no encoder made; a .npz'
      ' file can have them',
      stacklevel=2,
    )
  files = [_picture_file(good.image, pictures) for good in goods.values()]
  return NewItems(names, [good.title for good in goods.values()], encoded, files)


def _is_encoded(name: str, features: Features) -> bool:
  """Tells whether the features were encoded from texts or pictures, which a table of goods has."""
  return name in (TEXT, IMAGE) and pretrained.can_encode(features.info['encoder'])


def _encode_texts(features: Features, goods: Mapping[str, 'Item']) -> tuple[np.ndarray, np.ndarray]:
  rows = [text.item_texts(good._asdict()) for good in goods.values()]
  return text.encode_rows_like(features.folder, features.info, rows)


def _encode_pictures(
  features: Features, goods: Mapping[str, 'Item'], folder: pathlib.Path, image_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
  from ur4rec_jax.encoders import pictures  # Only this function needs Pillow.

  contents, refused = [], {}
  for row, good in enumerate(goods.values()):
    try:
      contents.append(_find_picture(good.image, folder).read_bytes() if good.image else None)
    except (OSError, ValueError) as error:
      contents.append(None)
      refused[row] = str(error)
  _, *shape = features.shape
  tokens, mask = np.zeros((len(goods), *shape), np.float32), np.zeros((len(goods), shape[0]), bool)
  if any(contents):  # Without a picture the encoder need not be installed.
    tokens, mask, damaged = pictures.encode_like(
      features.folder, features.info, contents, image_size
    )
    refused |= damaged
  if refused:
    row, reason = next(iter(refused.items()))
    name, good = list(goods.items())[row]
    warnings.warn(
      f'{len(refused)} pictures cannot be used, and their items are taken without; the first, of'
      f' item {name!r}: {good.image!r:.80} {reason}',
      stacklevel=2,
    )
  return tokens, mask


def _find_picture(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns the path of a picture file, which must be inside the folder."""
  if re.match(r'https?://', name):
    raise ValueError('is a URL; download it and put the file name into the table')
  path = (folder / name).resolve()
  if not path.is_relative_to(folder.resolve()):
    raise ValueError(f'leads out of {folder}')
  if not path.is_file():
    raise ValueError(f'is not in {folder}')
  return path


def _picture_file(name: str, folder: pathlib.Path) -> pathlib.Path | None:
  try:
    return _find_picture(name, folder) if name else None
  except (OSError, ValueError):  # `_encode_pictures` reports them.
    return None


def _read_folder(folder: pathlib.Path, trained_on: Mapping[str, Features]) -> NewItems:
  items = list(iterate_items(folder))
  tables = {}
  for name, ours in trained_on.items():
    features = load_features(folder, 'item', name)
    for field in _SAME_FIELDS:
      if features.info[field] != ours.info[field]:
        raise InputError(
          f'{features.folder}: differs in {field} from {ours.folder}, on which the model was'
          ' trained; encode the new items with the same encoder and flags'
        )
    features = dataclasses.replace(features, max_tokens=ours.max_tokens)
    tables[name] = TokenTable(*(x[1:] for x in features.table()))  # Row 0 is padding.
  ids, titles = [i['original_id'] for i in items], [i['title'] for i in items]
  return NewItems(ids, titles, tables, item_pictures.find(folder))


def _read_npz(path: pathlib.Path, trained_on: Mapping[str, Features]) -> NewItems:
  try:
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
      raise ValueError('it holds a single array')
    with file:
      arrays = dict(file)
  except Exception as error:  # Damaged files make the reader raise any kind of error.
    raise InputError(
      f'add_items {path}: is neither a prepared folder nor a readable .npz file ({error}); a table'
      ' of goods ends in .csv, .tsv, .parquet or .jsonl'
    ) from error
  if 'ids' in arrays and arrays['ids'].ndim != 1:
    raise InputError(f'{path}: ids must be [items], not of shape {arrays["ids"].shape}')
  for name in ('ids', *trained_on, *arrays.keys() & {'titles'}):
    if name not in arrays or arrays[name].shape[:1] != arrays['ids'].shape:
      raise InputError(f'{path}: must hold {name!r}, with an entry for each of the ids')
    if name in ('ids', 'titles') and arrays[name].dtype.kind not in 'Uiu':
      raise InputError(
        f'{path}: {name} must be text or whole numbers, as in the data, not {arrays[name].dtype}'
      )
  ids = [str(name) for name in arrays['ids']]
  if len(set(ids)) < len(ids):
    raise InputError(f'{path}: an id is there twice; remove one of the two')
  tables = {}
  for name, features in trained_on.items():
    tokens = arrays[name] if arrays[name].ndim == 3 else arrays[name][:, None]
    width = features.shape[2]
    is_right = tokens.dtype.kind in 'fiub' and tokens.ndim == 3 and tokens.shape[2] == width
    if not is_right or not np.isfinite(tokens).all():
      raise InputError(f'{path}: {name} must be finite, [items, tokens, {width}]')
    tokens = tokens[:, : features.max_tokens or None]
    # Encoders never give a token of zeros, so zeros mark a missing token.
    tables[name] = TokenTable(tokens.astype(np.float32), tokens.any(2))
  titles = [str(title) for title in arrays.get('titles', ids)]
  return NewItems(ids, titles, tables, [None] * len(ids))


class NewItemEncoder:
  """Encodes new items with a trained model."""

  def __init__(self, config: ConfigDict, dataset: Dataset, model: UR4Rec, params: Any):
    """Keeps the trained model.

    Args:
      config: config of the run.
      dataset: the data that the model was trained on.
      model: the model.
      params: its parameters.
    """
    self._config, self._dataset = config, dataset
    self._model, self._params = model, params

  def encode(
    self, tables: Mapping[str, TokenTable], item_arrays: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Encodes new items.

    Args:
      tables: the content of the new items by modality.
      item_arrays: the arrays of the catalogue, from `scoring.item_arrays`.

    Returns:
      The same arrays for the new items, `new items + 1` rows each, row 0 for padding.
    """
    count = len(next(iter(tables.values())).mask)
    dtype = devices.compute_dtype(self._config.dtype)
    features = {
      name: TokenTable(
        np.pad(table.tokens, ((1, 0), (0, 0), (0, 0))).astype(dtype),
        np.pad(table.mask, ((1, 0), (0, 0))),
      )
      for name, table in tables.items()
    }
    # A new item has no embedding of its id: zeros add nothing to its content.
    params = {
      name: {
        key: np.zeros((count + 1, *x.shape[1:]), x.dtype) if key == 'item_embedding' else x
        for key, x in tree.items()
      }
      if name in BRANCHES
      else tree
      for name, tree in self._params.items()
    }
    # Compiled as one program, which later starts find in the cache, not operation by operation.
    encode = functools.partial(scoring.item_arrays, create_model(self._config, count))
    arrays = jax.jit(encode)(params, features)
    if cold_items.has_pure_item_table(self._model):
      embeddings = item_arrays['sasrec']['vectors']
      arrays['sasrec']['vectors'] = self._mean_of_nearest(embeddings, tables)
    return arrays

  @functools.cached_property
  def _first_tokens(self) -> dict[str, TokenTable]:
    return cold_items.first_tokens(self._dataset)

  def _mean_of_nearest(self, embeddings: jax.Array, tables: Mapping[str, TokenTable]) -> jax.Array:
    """Returns `[new items + 1, dim]`: the mean embedding of the items with the nearest content."""
    count, num_items = len(next(iter(tables.values())).mask), self._dataset.num_items
    features = {
      name: TokenTable(
        np.concatenate([known.tokens, tables[name].tokens[:, :1]]),
        np.concatenate([known.mask, tables[name].mask[:, :1]]),
      )
      for name, known in self._first_tokens.items()
    }
    is_new = np.repeat([False, True], [num_items + 1, count])
    is_warm = np.pad(cold_items.warm_items(self._dataset), (0, count))
    found = cold_items.find_cold_items(features, is_new, is_warm, self._model.sasrec.dim)
    # An item without a first token has no nearest items and gets the mean of all.
    new = jnp.broadcast_to(embeddings[1:].mean(0), (count + 1, embeddings.shape[1]))
    if found is None:
      return new
    return new.at[found.items - num_items].set(cold_items.mean_of_nearest(embeddings, found))

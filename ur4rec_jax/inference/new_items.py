"""Reads items that the training data do not have: their ids, titles and content."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ur4rec_jax.data.dataset import iterate_items
from ur4rec_jax.data.features import Features, TokenTable, load_features
from ur4rec_jax.errors import InputError

# Features can be compared only if these fields of info.json are equal.
_SAME_FIELDS = ('encoder', 'width', 'projection', 'is_normalised')


class NewItems(NamedTuple):
  """Items with their content.

  Attributes:
    ids: original ids.
    titles: titles.
    tables: content by modality; row i belongs to item i, and there is no row for padding.
  """

  ids: list[str]
  titles: list[str]
  tables: dict[str, TokenTable]

  def select(self, indices: np.ndarray) -> 'NewItems':
    """Returns some of the items.

    Args:
      indices: `[selected]` int.
    """
    return NewItems(
      [self.ids[i] for i in indices],
      [self.titles[i] for i in indices],
      {name: TokenTable(x.tokens[indices], x.mask[indices]) for name, x in self.tables.items()},
    )


def read_new_items(source: str | pathlib.Path, trained_on: Mapping[str, Features]) -> NewItems:
  """Reads items from a prepared folder or a .npz file.

  Args:
    source: a prepared folder, or a .npz file with `ids` `[items]`, optionally `titles` `[items]`,
      and for each modality `[items, tokens, width]` or `[items, width]`.
    trained_on: the item features by modality that the model was trained on.

  Raises:
    InputError: the source cannot be read, or its features differ in kind from `trained_on`.
  """
  source = pathlib.Path(source)
  return (_read_folder if source.is_dir() else _read_npz)(source, trained_on)


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
  return NewItems([i['original_id'] for i in items], [i['title'] for i in items], tables)


def _read_npz(path: pathlib.Path, trained_on: Mapping[str, Features]) -> NewItems:
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = dict(file)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(
      f'add_items {path}: is neither a prepared folder nor a readable .npz file ({error})'
    ) from error
  for name in ('ids', *trained_on):
    if name not in arrays or len(arrays[name]) != len(arrays['ids']):
      raise InputError(f'{path}: must hold {name!r}, with an entry for each of the ids')
  ids = [str(name) for name in arrays['ids']]
  if len(set(ids)) < len(ids):
    raise InputError(f'{path}: an id is there twice; remove one of the two')
  tables = {}
  for name, features in trained_on.items():
    tokens = arrays[name] if arrays[name].ndim == 3 else arrays[name][:, None]
    width = features.shape[2]
    if tokens.ndim != 3 or tokens.shape[2] != width or not np.isfinite(tokens).all():
      raise InputError(f'{path}: {name} must be finite, [items, tokens, {width}]')
    tokens = tokens[:, : features.max_tokens or None]
    # Encoders never give a token of zeros, so zeros mark a missing token.
    tables[name] = TokenTable(tokens.astype(np.float32), tokens.any(2))
  return NewItems(ids, [str(title) for title in arrays.get('titles', ids)], tables)

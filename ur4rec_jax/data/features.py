"""Token embeddings of items and users, as data_prep.encode writes them; NumPy only."""

import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset, load_dataset, read_info, read_versioned
from ur4rec_jax.errors import InputError

FORMAT_VERSION = 1
INFO = 'info.json'


class TokenTable(NamedTuple):
  """Tokens by item id or user index; placed on devices, they are `jax.Array`s.

  Attributes:
    tokens: `[rows, tokens, width]`, zeros where masked.
    mask: `[rows, tokens]` bool, true where there is a token.
  """

  tokens: Any
  mask: Any


class Tables(NamedTuple):
  """What a model reads of items and users besides interactions, by modality.

  Attributes:
    items: tables with `items + 1` rows, row 0 masked.
    users: tables with `users` rows, row u of user u.
  """

  items: dict[str, TokenTable]
  users: dict[str, TokenTable]


class Preferences(NamedTuple):
  """What users' own texts tell of them, as the positions of a batch of histories may read it.

  Attributes:
    tables: by modality, tokens `[batch, segments, tokens, width]` and masks `[batch, segments,
      tokens]`; at index s is the user of segment s + 1.
    visible: `[batch, length]` bool: whether a position may see those of its user.
  """

  tables: dict[str, TokenTable]
  visible: Any


@dataclasses.dataclass(frozen=True)
class Features:
  """The tokens of one modality; row i is of item i + 1, or of user i.

  Attributes:
    folder: where they lie.
    info: contents of `info.json`: encoder, sizes, fingerprint, counts.
    shards: by kind of file (`tokens`, `mask` and, of int8, `scale`) the memory-mapped arrays,
      `[rows of the shard, tokens, width]` and `[rows of the shard, tokens]`.
    is_shuffled: whether `table` gives each row the tokens of another, as a control: a gain that
      stays is not due to what the tokens say.
    max_tokens: how many of a row's tokens `table` has, the first; 0 for all.
  """

  folder: pathlib.Path
  info: dict[str, Any]
  shards: dict[str, list[np.ndarray]]
  is_shuffled: bool = False
  max_tokens: int = 0

  @property
  def shape(self) -> tuple[int, int, int]:
    """Rows, tokens a row, width of a token."""
    return self.info['rows'], self.info['tokens'], self.info['width']

  @property
  def origin(self) -> dict[str, Any]:
    """Who made them of what: goes with every result."""
    encoder = self.info['encoder']
    of_users = {'hold_back': self.info['hold_back']} if self.info['of'] == 'user' else {}
    return {
      'encoder': encoder['name'],
      'is_builtin': encoder['is_builtin'],
      'is_mock': self.info.get('is_mock', False),
      'is_shuffled': self.is_shuffled,
      'max_tokens': self.max_tokens,
      **of_users,
      'fingerprint': self.info['fingerprint'],
    }

  def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads some rows; nothing else is loaded.

    Args:
      indices: `[n]` from 0.

    Returns:
      `[n, tokens, width]` float32, zeros where masked, and `[n, tokens]` bool, true where there is
      a token.
    """
    indices = np.asarray(indices)
    tokens = np.empty((len(indices), *self.shape[1:]), np.float32)
    mask = np.empty((len(indices), self.shape[1]), bool)
    shards, places = np.divmod(indices, self.info['rows_per_shard'])
    for shard in np.unique(shards):
      chosen = shards == shard
      found = {kind: arrays[shard][places[chosen]] for kind, arrays in self.shards.items()}
      tokens[chosen], mask[chosen] = decoded(found), found['mask']
    return tokens, mask

  def table(self, dtype: Any = np.float32) -> TokenTable:
    """Reads everything, for a lookup by item id.

    Args:
      dtype: of the tokens.

    Returns:
      `[rows + 1, tokens, width]`, of the first `max_tokens` alone if that is set, zeros where
      masked, and `[rows + 1, tokens]` bool, true where there is a token; row 0, which is no item,
      has none.

    Raises:
      InputError: the content of a file is not what was written, or is not finite.
    """
    rows, count, width = self.shape
    count = min(self.max_tokens or count, count)
    tokens = np.zeros((rows + 1, count, width), dtype)
    mask = np.zeros((rows + 1, count), bool)
    end = 1
    for shard, record in enumerate(self.info['shards']):
      start, end = end, end + record['rows']
      # Read, not mapped: one shard at a time is in memory beside the table.
      found = {kind: self._read(kind, shard) for kind in self.shards}
      values = decoded(found)
      if not np.isfinite(values).all():
        raise InputError(f'{self.folder}: shard {shard} has values that are not finite')
      tokens[start:end], mask[start:end] = values[:, :count], found['mask'][:, :count]
    if self.is_shuffled:
      # The same order for every modality, so that they still fit each other.
      order = np.r_[0, 1 + np.random.default_rng(0).permutation(rows)]
      tokens, mask = tokens[order], mask[order]
    return TokenTable(tokens, mask)

  def _read(self, kind: str, shard: int) -> np.ndarray:
    path = self.folder / file_name(kind, shard, len(self.info['shards']))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != self.info['shards'][shard]['sha256'][kind]:
      raise InputError(f'{path}: is damaged: its content is not what was written')
    return np.load(io.BytesIO(content), allow_pickle=False)


def decoded(arrays: dict[str, np.ndarray]) -> np.ndarray:
  """Gives the tokens that the arrays of some rows stand for."""
  if 'scale' not in arrays:
    return arrays['tokens']
  return arrays['tokens'] * arrays['scale'].astype(np.float32)[..., None]


def load_features(
  data_dir: str | pathlib.Path, of: str, modality: str, split_hash: str | None = None
) -> Features:
  """Opens features of a prepared folder; the arrays are memory-mapped.

  Args:
    data_dir: the prepared folder.
    of: `item` or `user`.
    modality: `text`, `image` or a name of one's own.
    split_hash: for users, of the split that is used: their features tell of its training part.

  Raises:
    InputError: there are none, they are of other items, users or another split, or a file is
      missing or damaged.
  """
  dataset = read_info(data_dir)
  folder = pathlib.Path(data_dir) / 'features' / of / modality
  again = f'make them: {_command(data_dir, of, modality)}'
  if not folder.is_dir():
    raise InputError(f'data_dir {data_dir}: has no {modality} features of {of}s; {again}')
  info = read_features_info(folder, again)
  if info['ids_sha256'] != dataset['ids_sha256'][f'{of}s']:
    raise InputError(
      f'{folder}: is of other {of}s than those of data_dir {data_dir} (their ids differ); {again}'
    )
  if of == 'user' and info['split_hash'] != split_hash:
    raise InputError(
      f'{folder}: was made for the split {info["split_name"]} {info["split_hash"]}, not for'
      f' {split_hash}, and may tell of what that holds out; {again}'
    )
  if of == 'user' and 'hold_back' not in info:
    raise InputError(
      f'{folder}: does not say what share of the training part was held back; {again}'
    )
  shards: dict[str, list[np.ndarray]] = {}
  for kind, dtype, *shape in array_kinds(info):
    shards[kind] = []
    for number, record in enumerate(info['shards']):
      path = folder / file_name(kind, number, len(info['shards']))
      try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
      except (OSError, ValueError, EOFError) as error:
        raise InputError(f'{path}: cannot be read ({error}); {again}') from error
      if array.dtype != dtype or array.shape != (record['rows'], *shape):
        raise InputError(
          f'{path}: holds {array.dtype} {array.shape}, not what was written; {again}'
        )
      shards[kind].append(array)
  return Features(folder, info, shards)


def load_with_features(config: ConfigDict) -> Dataset:
  """Loads a prepared folder with features of its items and users.

  Args:
    config: `data_dir`, `split`, `modalities`, `max_item_tokens`, `shuffled_features`,
      `user_modalities`.

  Raises:
    InputError: as `load_dataset` and `load_features` do.
  """
  dataset = load_dataset(config.data_dir, config.split)

  def load(of: str, names: Sequence[str]) -> dict[str, Features]:
    return {n: load_features(config.data_dir, of, n, dataset.split_hash) for n in names}

  items = {
    name: dataclasses.replace(
      found, is_shuffled=config.shuffled_features, max_tokens=config.max_item_tokens
    )
    for name, found in load('item', config.modalities).items()
  }
  users = load('user', config.user_modalities)
  return dataclasses.replace(dataset, features=items, user_features=users)


def read_tables(dataset: Dataset, dtype: Any = np.float32) -> Tables:
  """Reads all features whole, in the type that is computed in."""
  items = {name: features.table(dtype) for name, features in dataset.features.items()}
  users = {
    # Without row 0: users are counted from 0.
    name: TokenTable(*(x[1:] for x in features.table(dtype)))
    for name, features in dataset.user_features.items()
  }
  return Tables(items, users)


def preference_starts(train_part: Dataset) -> np.ndarray:
  """Says from where on training may show what the users' features were made from.

  Args:
    train_part: from `Dataset.train_part`.

  Returns:
    `[users]` int32, index into its `item_ids` of the user's first target that no feature of the
    user knows; the end of the user's interactions where there is none.
  """
  shares = [features.info['hold_back'] for features in train_part.user_features.values()]
  written = splits.written_from(train_part.lengths, min(shares, default=0.0))
  return (train_part.offsets[:-1] + written).astype(np.int32)


def read_features_info(folder: pathlib.Path, way_out: str) -> dict[str, Any]:
  """Reads info.json; InputError, with the way out given, if it is missing or damaged."""
  return read_versioned(folder / INFO, FORMAT_VERSION, way_out)


def array_kinds(info: dict[str, Any]) -> Iterator[tuple]:
  """Gives name, dtype and shape of a row of each array of a shard."""
  yield 'tokens', info['dtype'], info['tokens'], info['width']
  yield 'mask', 'bool', info['tokens']
  if info['dtype'] == 'int8':
    yield 'scale', 'float16', info['tokens']


def file_name(kind: str, shard: int, count: int) -> str:
  return f'{kind}-{shard:05}-of-{count:05}.npy'


def _command(data_dir: str | pathlib.Path, of: str, modality: str) -> str:
  return (
    f'python -m data_prep.encode --data_dir={data_dir} --of={of} --modality={modality} --overwrite'
  )

"""Reads token embeddings of items and users, written by data_prep.encode; NumPy only."""

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
  """Tokens by item id or user index; on devices the arrays are `jax.Array`s.

  Attributes:
    tokens: `[rows, tokens, width]`, zeros where masked.
    mask: `[rows, tokens]` bool, true for tokens that exist.
  """

  tokens: Any
  mask: Any


class Tables(NamedTuple):
  """Features of items and users as a model reads them, by modality.

  Attributes:
    items: tables with `items + 1` rows, row 0 masked.
    users: tables with `users` rows, row u of user u.
  """

  items: dict[str, TokenTable]
  users: dict[str, TokenTable]


class Preferences(NamedTuple):
  """Features of the users of a batch of histories, and which positions may read them.

  Attributes:
    tables: by modality, tokens `[batch, segments, tokens, width]` and masks `[batch, segments,
      tokens]`; index s holds the user of segment s + 1.
    visible: `[batch, length]` bool: whether a position may read the features of its user.
  """

  tables: dict[str, TokenTable]
  visible: Any


@dataclasses.dataclass(frozen=True)
class Features:
  """The tokens of one modality; row i belongs to item i + 1, or to user i.

  Attributes:
    folder: folder of the files.
    info: content of `info.json`: encoder, sizes, fingerprint, counts.
    shards: by kind of file (`tokens`, `mask`, and `scale` for int8) the memory-mapped arrays,
      `[rows of the shard, tokens, width]` and `[rows of the shard, tokens]`.
    is_shuffled: whether `table` gives each row the tokens of another row. It is a control: a gain
      that remains does not come from the content of the tokens.
    max_tokens: most tokens per row in `table`, which keeps the first ones; 0 for all.
    way_out: end of the message if a file is damaged.
  """

  folder: pathlib.Path
  info: dict[str, Any]
  shards: dict[str, list[np.ndarray]]
  is_shuffled: bool = False
  max_tokens: int = 0
  way_out: str = 'encode again'

  @property
  def shape(self) -> tuple[int, int, int]:
    """Rows, tokens per row, width of a token."""
    return self.info['rows'], self.info['tokens'], self.info['width']

  @property
  def origin(self) -> dict[str, Any]:
    """Encoder and kind of the features, and who wrote the texts; stored with every result."""
    encoder, is_mock = self.info['encoder'], self.info.get('is_mock', False)
    texts = {} if is_mock else self.info.get('texts', {})
    writer = ' '.join(texts[key] for key in ('provider', 'model') if texts.get(key))
    written = {'written_by': writer} if writer else {}
    of_users = {'hold_back': self.info['hold_back']} if self.info['of'] == 'user' else {}
    return {
      'encoder': encoder['name'],
      'is_builtin': encoder['is_builtin'],
      'is_mock': is_mock,
      'is_shuffled': self.is_shuffled,
      'max_tokens': self.max_tokens,
      **of_users,
      **written,
      'fingerprint': self.info['fingerprint'],
    }

  def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads some rows without loading the others.

    Args:
      indices: `[n]` from 0.

    Returns:
      `[n, tokens, width]` float32, zeros where masked, and `[n, tokens]` bool, true where there is
      a token.
    """
    indices = np.asarray(indices)
    tokens = np.empty((len(indices), *self.shape[1:]), np.float32)
    mask = np.empty((len(indices), self.shape[1]), bool)
    shards, rows = np.divmod(indices, self.info['rows_per_shard'])
    for shard in np.unique(shards):
      chosen = shards == shard
      found = {kind: arrays[shard][rows[chosen]] for kind, arrays in self.shards.items()}
      tokens[chosen], mask[chosen] = decoded(found), found['mask']
    return tokens, mask

  def table(self, dtype: Any = np.float32) -> TokenTable:
    """Reads all rows into a table for lookups by item id.

    Args:
      dtype: type of the tokens.

    Returns:
      Tokens `[rows + 1, tokens, width]`, zeros where masked, and their mask `[rows + 1, tokens]`.
      If `max_tokens` is set, only the first tokens are kept. Row 0 is no item and has no token.

    Raises:
      InputError: a file has changed since it was written, or holds values that are not finite.
    """
    rows, count, width = self.shape
    count = min(self.max_tokens or count, count)
    tokens = np.zeros((rows + 1, count, width), dtype)
    mask = np.zeros((rows + 1, count), bool)
    end = 1
    for shard, record in enumerate(self.info['shards']):
      start, end = end, end + record['rows']
      # Read instead of mapped, so that only one shard is in memory beside the table.
      found = {kind: self._read(kind, shard) for kind in self.shards}
      values = decoded(found)
      if not np.isfinite(values).all():
        raise InputError(
          f'{self.folder}: shard {shard} has values that are not finite; {self.way_out}'
        )
      tokens[start:end], mask[start:end] = values[:, :count], found['mask'][:, :count]
    if self.is_shuffled:
      # All modalities get the same order, so that they still fit each other.
      order = np.r_[0, 1 + np.random.default_rng(0).permutation(rows)]
      tokens, mask = tokens[order], mask[order]
    return TokenTable(tokens, mask)

  def _read(self, kind: str, shard: int) -> np.ndarray:
    path = self.folder / file_name(kind, shard, len(self.info['shards']))
    try:
      content = path.read_bytes()
    except OSError as error:
      raise InputError(f'{path}: cannot be read ({error}); {self.way_out}') from error
    if hashlib.sha256(content).hexdigest() != self.info['shards'][shard]['sha256'][kind]:
      raise InputError(f'{path}: is damaged: its content is not what was written; {self.way_out}')
    return np.load(io.BytesIO(content), allow_pickle=False)


def marks_of(origin: dict[str, Any]) -> list[str]:
  """Returns what is to be said of features beside the encoder, from `Features.origin`."""
  marks = [key.removeprefix('is_') for key, value in origin.items() if value is True]
  return marks + ([f'texts by {origin["written_by"]}'] if 'written_by' in origin else [])


def decoded(arrays: dict[str, np.ndarray]) -> np.ndarray:
  """Converts stored arrays of some rows to tokens."""
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
    modality: `text`, `image` or the name of imported features.
    split_hash: hash of the split in use; features of users are made from its training part.

  Raises:
    InputError: the features are missing, belong to other items, users or another split, or a file
      is missing or damaged.
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
  return open_features(folder, info, again)


def open_features(folder: pathlib.Path, info: dict[str, Any], way_out: str) -> Features:
  """Opens the arrays of features, memory-mapped.

  Args:
    folder: folder of the features.
    info: its info.json.
    way_out: end of the message if a file is missing or damaged.

  Raises:
    InputError: a file is missing or damaged.
  """
  shards: dict[str, list[np.ndarray]] = {}
  for kind, dtype, *shape in array_kinds(info):
    shards[kind] = []
    for number, record in enumerate(info['shards']):
      path = folder / file_name(kind, number, len(info['shards']))
      try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
      except (OSError, ValueError, EOFError) as error:
        raise InputError(f'{path}: cannot be read ({error}); {way_out}') from error
      if array.dtype != dtype or array.shape != (record['rows'], *shape):
        raise InputError(
          f'{path}: holds {array.dtype} {array.shape}, not what was written; {way_out}'
        )
      shards[kind].append(array)
  return Features(folder, info, shards, way_out=way_out)


def load_with_features(config: ConfigDict) -> Dataset:
  """Loads a prepared folder with the features of its items and users.

  Args:
    config: `data_dir`, `split`, `train_on`, `modalities`, `max_item_tokens`,
      `shuffled_features`, `user_modalities`.

  Raises:
    InputError: see `load_dataset` and `load_features`.
  """
  dataset = load_dataset(config.data_dir, config.split)
  if config.train_on == 'all':
    dataset = dataset.with_all_in_training()

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
  """Reads all features completely, in the type of the computation."""
  items = {name: features.table(dtype) for name, features in dataset.features.items()}
  users = {
    # Users are counted from 0, so row 0 is dropped.
    name: TokenTable(*(x[1:] for x in features.table(dtype)))
    for name, features in dataset.user_features.items()
  }
  return Tables(items, users)


def preference_starts(dataset: Dataset) -> np.ndarray:
  """Finds each user's first target that the features of the user were not made from.

  Training shows the features of a user only for this target and later ones.

  Args:
    dataset: all interactions.

  Returns:
    `[users]` int32, index of the first such target among the training interactions of all users;
    the end of the user's training interactions if there is none.
  """
  lengths = dataset.split.train_lengths
  shares = [features.info['hold_back'] for features in dataset.user_features.values()]
  written = splits.written_from(lengths, min(shares, default=0.0))
  return (np.cumsum(lengths, dtype=np.int64) - lengths + written).astype(np.int32)


def read_features_info(folder: pathlib.Path, way_out: str) -> dict[str, Any]:
  """Reads info.json; InputError, which ends with `way_out`, if it is missing or damaged."""
  return read_versioned(folder / INFO, FORMAT_VERSION, way_out)


def array_kinds(info: dict[str, Any]) -> Iterator[tuple]:
  """Yields name, dtype and shape of a row of each array of a shard."""
  yield 'tokens', info['dtype'], info['tokens'], info['width']
  yield 'mask', 'bool', info['tokens']
  if info['dtype'] == 'int8':
    yield 'scale', 'float16', info['tokens']


def file_name(kind: str, shard: int, count: int) -> str:
  """Returns the name of the file with one array of a shard."""
  return f'{kind}-{shard:05}-of-{count:05}.npy'


def _command(data_dir: str | pathlib.Path, of: str, modality: str) -> str:
  return (
    f'python -m data_prep.encode --data_dir={data_dir} --of={of} --modality={modality} --overwrite'
  )

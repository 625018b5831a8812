"""Reads prepared folders, written by data_prep.build_dataset, into NumPy arrays."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax import files
from ur4rec_jax.data import flat_arrays, splits
from ur4rec_jax.errors import InputError

FORMAT_VERSION = 2
METADATA = 'dataset.json'
DROPPED_USERS = 'dropped_users.parquet'  # Only where a filter dropped users.
VERSION = '1.0.0'  # Version of the TFDS data in a folder.
_LISTS = ('genres', 'sentences')  # Fields with any number of values; all others have one.
_READ_AT_ONCE = 10_000  # Examples per read, because a large dataset does not fit in memory.
_AT_ONCE = 1 << 20  # Interactions that are handled at once, so that intermediate arrays stay small.


class Interactions(NamedTuple):
  """All histories, user after user, each in time order.

  Attributes:
    user_ids: `[users]` original ids.
    offsets: `[users + 1]` int64, user u owns `[offsets[u]:offsets[u + 1]]` of the others.
    item_ids: `[interactions]` int32, 1-based.
    timestamps: `[interactions]` int64 unix seconds.
    ratings: `[interactions]` float32.
  """

  user_ids: list[str]
  offsets: np.ndarray
  item_ids: np.ndarray
  timestamps: np.ndarray
  ratings: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Interactions, split and features of a prepared dataset.

  Attributes:
    info: content of `dataset.json`: name, counts, splits, options.
    split_name: key of the split in `info['splits']`.
    split: where each history is cut.
    item_ids: `[interactions]` int32, 1-based, user after user, each in time order.
    offsets: `[users + 1]` int64, user u owns `item_ids[offsets[u]:offsets[u + 1]]`.
    features: embeddings of the items by modality, see `features.load_with_features`.
    user_features: embeddings of the users by modality.
  """

  info: dict[str, Any]
  split_name: str
  split: splits.Split
  item_ids: np.ndarray
  offsets: np.ndarray
  features: dict[str, Any] = dataclasses.field(default_factory=dict)
  user_features: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def num_items(self) -> int:
    """Catalogue size; item ids are 1..num_items."""
    return self.info['counts']['items']

  @property
  def num_users(self) -> int:
    """Number of histories."""
    return len(self.offsets) - 1

  @property
  def lengths(self) -> np.ndarray:
    """`[users]` history lengths."""
    return np.diff(self.offsets)

  @property
  def owners(self) -> np.ndarray:
    """`[interactions]` index of the user whose history each one is in."""
    return np.repeat(np.arange(self.num_users), self.lengths)

  @property
  def split_hash(self) -> str:
    """Fingerprint of the interactions and the split."""
    return self.info['splits'][self.split_name]['hash']

  @property
  def is_train(self) -> np.ndarray:
    """`[interactions]` bool: whether each one belongs to the training part."""
    is_train = np.empty(len(self.item_ids), bool)
    for users in self._blocks_of_users():
      is_train[self.offsets[users.start] : self.offsets[users.stop]] = self._is_train(users)
    return is_train

  def _is_train(self, users: slice) -> np.ndarray:
    """Returns `is_train` for the interactions of consecutive users."""
    first, last = self.offsets[users.start], self.offsets[users.stop]
    ends = self.offsets[users] + self.split.train_lengths[users]
    lengths = np.diff(self.offsets[users.start : users.stop + 1])
    return np.arange(first, last) < np.repeat(ends, lengths)

  def _blocks_of_users(self) -> Iterator[slice]:
    """Returns slices of consecutive users with up to `_AT_ONCE` interactions, or of one user."""
    return itertools.starmap(slice, flat_arrays.user_blocks(self.offsets, _AT_ONCE))

  def item_counts(self) -> np.ndarray:
    """Counts the interactions of each item, `[num_items + 1]` by item id."""
    return np.bincount(self.item_ids, minlength=self.num_items + 1)

  def train_item_counts(self) -> np.ndarray:
    """Counts the training interactions of each item, `[num_items + 1]` by item id."""
    counts = np.zeros(self.num_items + 1, np.int64)
    for users in self._blocks_of_users():
      first, last = self.offsets[users.start], self.offsets[users.stop]
      items = self.item_ids[first:last][self._is_train(users)]
      counts += np.bincount(items, minlength=len(counts))
      flat_arrays.release(self.item_ids)
    return counts

  def held_out(self, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the users to evaluate on `valid` or `test`, and each one's held-out item id."""
    positions = self.split.held_out[part]
    users = np.flatnonzero(positions >= 0)
    return users, self.item_ids[self.offsets[users] + positions[users]]

  def is_repeated(self, part: str) -> np.ndarray:
    """Tells for each user of `held_out` whether the user had the held-out item before.

    Returns:
      `[users]` bool.
    """
    return np.concatenate([np.zeros(0, bool), *self.repeated_blocks(part)])

  def repeated_blocks(self, part: str) -> Iterator[np.ndarray]:
    """Yields `is_repeated` in blocks of users, so that a caller can stop early."""
    for block in self._blocks_of_users():
      lengths = self.split.held_out[part][block]
      starts, lengths = self.offsets[block][lengths >= 0], lengths[lengths >= 0]
      targets = self.item_ids[starts + lengths]
      entry = np.repeat(np.arange(len(starts)), lengths)
      first = np.cumsum(lengths) - lengths
      place = np.arange(lengths.sum()) + (starts - first)[entry]
      same = self.item_ids[place] == targets[entry]
      yield np.bincount(entry[same], minlength=len(starts)) > 0

  def is_untrained(self, part: str) -> np.ndarray:
    """Tells for each user of `held_out` whether the held-out item never occurs in training.

    Returns:
      `[users]` bool.
    """
    is_trained = np.zeros(self.info['counts']['items'] + 1, bool)
    is_trained[self.train_part().item_ids] = True
    held_out = self.split.held_out[part]
    return ~is_trained[self.item_ids[(self.offsets[:-1] + held_out)[held_out >= 0]]]

  @property
  def all_features(self) -> dict[str, dict[str, Any]]:
    """Features of `item` and `user`, by modality."""
    return {'item': self.features, 'user': self.user_features}

  def identity(self) -> dict[str, Any]:
    """Returns name, split hash and feature fingerprints, which identify the data of a run."""
    fingerprints = {
      of: {name: f.info['fingerprint'] for name, f in features.items()}
      for of, features in self.all_features.items()
      if features
    }
    found = {'name': self.info['name'], 'split_hash': self.split_hash}
    return found | ({'features': fingerprints} if fingerprints else {})

  def train_part(self) -> 'Dataset':
    """Returns the dataset without its held-out interactions, so that training cannot see them."""
    offsets = np.concatenate([[0], np.cumsum(self.split.train_lengths)])
    return dataclasses.replace(self, item_ids=self.item_ids[self.is_train], offsets=offsets)

  def with_all_in_training(self) -> 'Dataset':
    """Returns the dataset with its held-out interactions in the training part, too."""
    lengths = self.lengths.astype(np.int32)
    return dataclasses.replace(self, split=self.split._replace(train_lengths=lengths))


def load_dataset(data_dir: str | pathlib.Path, split_name: str = splits.LEAVE_ONE_OUT) -> Dataset:
  """Opens the interactions of a prepared folder with one of its splits.

  The arrays are mapped into memory if the folder has flat arrays. Folders of earlier versions have
  none; their interactions are decoded.

  Raises:
    InputError: the folder is missing, is no prepared dataset, has no such split, or has changed
      since it was written.
  """
  info = read_info(data_dir)
  if split_name not in info['splits']:
    raise InputError(
      f'data_dir {data_dir}: has no split {split_name!r}, only {", ".join(info["splits"])};'
      ' data_prep.build_dataset makes a split by time where the data has times'
    )
  flat = _find_flat_arrays(data_dir, info)
  if flat is None:
    return _split(data_dir, info, split_name, decode_interactions(data_dir))
  train_lengths, valid, test = flat[f'split_{split_name}']
  split = splits.Split(train_lengths, {'valid': valid, 'test': test})
  return Dataset(info, split_name, split, flat['item_ids'], flat['offsets'])


def _split(
  data_dir: str | pathlib.Path, info: dict[str, Any], split_name: str, interactions: Interactions
) -> Dataset:
  """Splits interactions; InputError if they are not those of dataset.json."""
  record = info['splits'][split_name]
  _, offsets, item_ids, timestamps, _ = interactions
  split = splits.make_split(split_name, record, offsets, timestamps)
  found = splits.split_hash(split_name, offsets, item_ids, split, info['counts']['items'])
  if found != record['hash']:
    raise InputError(
      f'data_dir {data_dir}: interactions differ from {METADATA}; {_rebuild(data_dir)}'
    )
  return Dataset(info, split_name, split, item_ids, offsets)


def check_interactions(data_dir: str | pathlib.Path) -> None:
  """Decodes the TFDS data of a prepared folder and compares them with dataset.json.

  Afterwards the folder has flat arrays, unless it cannot be written.

  Raises:
    InputError: they differ, or cannot be read.
  """
  info, interactions = read_info(data_dir), decode_interactions(data_dir)
  for name in info['splits']:
    _split(data_dir, info, name, interactions)
  if _find_flat_arrays(data_dir, info) is None:
    with contextlib.suppress(OSError):
      write_flat_arrays(data_dir, info, interactions)


def write_flat_arrays(
  data_dir: str | pathlib.Path, info: dict[str, Any], interactions: Interactions
) -> None:
  """Writes the interactions and splits of a prepared folder as flat arrays.

  Args:
    data_dir: the folder, which holds the TFDS data.
    info: content of dataset.json.
    interactions: the content of the TFDS data.
  """
  ids = [name.encode() for name in interactions.user_ids]
  arrays = {
    'offsets': interactions.offsets,
    'item_ids': interactions.item_ids,
    'timestamps': interactions.timestamps,
    'ratings': interactions.ratings,
    'user_ids': np.frombuffer(b''.join(ids), np.uint8),
    'user_id_offsets': np.cumsum([0, *map(len, ids)], dtype=np.int64),
  }
  for name in info['splits']:
    split = _split(data_dir, info, name, interactions).split
    cuts = [split.train_lengths, split.held_out['valid'], split.held_out['test']]
    arrays[f'split_{name}'] = np.stack(cuts)
  folder = pathlib.Path(data_dir) / flat_arrays.FOLDER
  files.clean_up(folder)
  with files.new_folder(folder) as draft:
    flat_arrays.write(draft, arrays, _flat_arrays_belong_to(data_dir, info))


def _find_flat_arrays(
  data_dir: str | pathlib.Path, info: dict[str, Any]
) -> flat_arrays.FlatArrays | None:
  return flat_arrays.find(data_dir, _flat_arrays_belong_to(data_dir, info), _rebuild(data_dir))


def _flat_arrays_belong_to(data_dir: str | pathlib.Path, info: dict[str, Any]) -> dict[str, Any]:
  """Identifies the interactions of a folder by hashes in dataset.json and by file sizes."""
  records = (pathlib.Path(data_dir) / 'interactions' / VERSION).glob('*.array_record*')
  return {
    'splits': {name: record['hash'] for name, record in info['splits'].items()},
    'users': info['ids_sha256']['users'],
    'items': info['counts']['items'],
    'files': {path.name: path.stat().st_size for path in sorted(records)},
  }


def read_info(data_dir: str | pathlib.Path) -> dict[str, Any]:
  """Reads dataset.json.

  Raises:
    InputError: the folder is missing, is no prepared dataset, or has another format version.
  """
  path = pathlib.Path(data_dir) / METADATA
  if not path.parent.is_dir():
    raise InputError(f'data_dir {data_dir}: no such folder; {_rebuild(data_dir)}')
  if not path.is_file():
    raise InputError(
      f'data_dir {data_dir}: not a prepared dataset (no {METADATA}); {_rebuild(data_dir)}'
    )
  return read_versioned(path, FORMAT_VERSION, _rebuild(data_dir))


def read_versioned(path: pathlib.Path, format_version: int, way_out: str) -> dict[str, Any]:
  """Reads a JSON object that has a `format_version`.

  Raises:
    InputError: the file is missing, damaged or of another version; the message ends with `way_out`.
  """
  try:
    info = json.loads(path.read_text(encoding='utf-8'))
    version = info['format_version']
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise InputError(f'{path}: cannot be read ({error!r}); {way_out}') from error
  if version != format_version:
    raise InputError(
      f'{path}: is of format {version}, this version reads {format_version}; {way_out}'
    )
  return info


def read_interactions(data_dir: str | pathlib.Path) -> Interactions:
  """Reads all histories, from flat arrays if there are any; InputError if they cannot be read."""
  import pyarrow as pa  # Training does not need it.

  flat = _find_flat_arrays(data_dir, read_info(data_dir))
  if flat is None:
    return decode_interactions(data_dir)
  ends = flat['user_id_offsets']
  user_ids = pa.LargeStringArray.from_buffers(
    len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(flat['user_ids'])
  )
  columns = (flat[name] for name in Interactions._fields[1:])
  return Interactions(user_ids.to_pylist(), *columns)


def decode_interactions(data_dir: str | pathlib.Path) -> Interactions:
  """Decodes all histories from the TFDS data; InputError if they cannot be read."""
  kinds = {'item_ids': np.int32, 'timestamps': np.int64, 'ratings': np.float32}
  columns: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
  user_ids: list[str] = []
  lengths = [0]
  for examples in _examples(data_dir, 'interactions', 'users'):
    user_ids += [example['user_id'][0].decode() for example in examples]
    lengths += [len(example['item_ids']) for example in examples]
    for name, parts in columns.items():
      values = itertools.chain.from_iterable(example[name] for example in examples)
      parts.append(np.fromiter(values, kinds[name]))
  flat = {name: np.concatenate(parts) for name, parts in columns.items()}
  return Interactions(user_ids, np.cumsum(lengths), **flat)


def first_user(data_dir: str | pathlib.Path) -> str:
  """Decodes the original id of the first user, without reading the others."""
  return next(_examples(data_dir, 'interactions', 'users', 1))[0]['user_id'][0].decode()


def read_dropped_users(data_dir: str | pathlib.Path) -> dict[str, str]:
  """Reads which filter of the build dropped a user, by original id.

  Returns {} for folders of earlier versions, which do not record it.

  Raises:
    InputError: the file is damaged.
  """
  import pyarrow.parquet  # Only this function needs it.

  path = pathlib.Path(data_dir) / DROPPED_USERS
  if not path.exists():
    return {}
  try:
    table = pyarrow.parquet.read_table(path)
    return dict(zip(table['user'].to_pylist(), table['filter'].to_pylist(), strict=True))
  except (OSError, ValueError, KeyError) as error:
    raise InputError(f'{path}: cannot be read ({error}); {_rebuild(data_dir)}') from error


def read_items(data_dir: str | pathlib.Path) -> list[dict[str, Any]]:
  """Reads the metadata of the items, in the order of `item_id`; InputError if unreadable.

  Returns:
    `[items]` of `item_id`, `original_id`, `title`, `genres` (a list), `description`, `image`.
  """
  return list(iterate_items(data_dir))


def iterate_items(data_dir: str | pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the items of `read_items` one at a time, for catalogues that do not fit in memory."""
  for examples in _examples(data_dir, 'items', 'items'):
    yield from map(_plain, examples)


def iterate_texts(data_dir: str | pathlib.Path, kind: str) -> Iterator[dict[str, Any]]:
  """Yields `original_id`, `text`, `sentences` and `source` of each item or user, in order."""
  texts_origin(data_dir, kind)  # An error if there are no texts.
  for examples in _examples(data_dir, f'{kind}_texts', f'{kind}s'):
    yield from map(_plain, examples)


def texts_origin(data_dir: str | pathlib.Path, kind: str) -> dict[str, Any]:
  """Reads the origin of texts: provider, model, prompt version, time, counts; for users the split.

  Raises:
    InputError: the texts are missing or unreadable.
  """
  folder = pathlib.Path(data_dir) / f'{kind}_texts'
  if not folder.is_dir():
    raise InputError(f'data_dir {data_dir}: has no {kind} texts; {_rewrite(data_dir, kind)}')
  try:
    return json.loads((folder / VERSION / 'metadata.json').read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise InputError(f'{folder}: cannot be read ({error!r}); {_rewrite(data_dir, kind)}') from error


def _plain(example: dict[str, Sequence]) -> dict[str, Any]:
  """Decodes bytes to text, and unpacks fields that have a single value."""
  decode = lambda value: value.decode() if isinstance(value, bytes) else value
  return {
    name: [*map(decode, values)] if name in _LISTS else decode(values[0])
    for name, values in example.items()
  }


def read_items_at(
  data_dir: str | pathlib.Path, item_ids: Sequence[int]
) -> dict[int, dict[str, Any]]:
  """Reads the metadata of some items, as `read_items` returns them, by `item_id`."""
  found = _examples_at(data_dir, 'items', 'items', [item - 1 for item in item_ids])
  return {place + 1: _plain(example) for place, example in found.items()}


def read_user_ids_at(data_dir: str | pathlib.Path, users: Sequence[int]) -> dict[int, str]:
  """Reads the original ids of some users, by their index in the dataset."""
  found = _examples_at(data_dir, 'interactions', 'users', users)
  return {user: example['user_id'][0].decode() for user, example in found.items()}


def _examples_at(
  data_dir: str | pathlib.Path, name: str, split: str, places: Sequence[int]
) -> dict[int, dict[str, Sequence]]:
  chosen = sorted(set(places))
  blocks = _examples(data_dir, name, split, places=chosen)
  return dict(zip(chosen, itertools.chain.from_iterable(blocks), strict=True))


def _examples(
  data_dir: str | pathlib.Path,
  name: str,
  split: str,
  at_once: int = _READ_AT_ONCE,
  places: Sequence[int] | None = None,
) -> Iterator[list[dict[str, Sequence]]]:
  """Yields lists of all examples, or of those at `places`, with each field as a sequence.

  This decoder is five times as fast as that of TFDS.
  """
  from tensorflow_datasets.proto import tf_example_pb2

  try:
    for records in read_records(pathlib.Path(data_dir) / name / VERSION, split, at_once, places):
      examples = []
      for record in records:
        features = tf_example_pb2.Example.FromString(record).features.feature
        examples.append(
          {field: getattr(f, f.WhichOneof('kind')).value for field, f in features.items()}
        )
      yield examples
  except Exception as error:  # Damaged files make the readers raise any kind of error.
    kind, is_text, _ = name.partition('_texts')
    way_out = _rewrite(data_dir, kind) if is_text else _rebuild(data_dir)
    raise InputError(
      f'data_dir {data_dir}: {name} cannot be read ({error!r}); {way_out}'
    ) from error


def read_records(
  folder: pathlib.Path,
  split: str,
  at_once: int = _READ_AT_ONCE,
  places: Sequence[int] | None = None,
) -> Iterator[list[bytes]]:
  """Yields lists of encoded examples of one TFDS dataset, in order.

  Missing or damaged files raise any kind of error.

  Args:
    folder: folder of the dataset, `.../NAME/VERSION`.
    split: name of its split.
    at_once: length of a list.
    places: indices of the examples to read; None for all.
  """
  import tensorflow_datasets as tfds  # Slow to import, and only this function needs it.

  source = tfds.builder_from_directory(folder).as_data_source(
    split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )
  places = range(len(source)) if places is None else places
  for start in range(0, len(places), at_once):
    records = source.__getitems__(places[start : start + at_once])
    if not all(records):  # The reader returns an empty record for a damaged one.
      raise ValueError('a damaged record')
    yield records


def _rebuild(data_dir: str | pathlib.Path) -> str:
  return f'build it: python -m data_prep.build_dataset --source=NAME --data_dir={data_dir}'


def _rewrite(data_dir: str | pathlib.Path, kind: str) -> str:
  return f'write them: python -m data_prep.generate_text --data_dir={data_dir} --kind={kind}s'

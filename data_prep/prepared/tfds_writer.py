"""Writes a prepared dataset as TFDS data that can be read without TensorFlow."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from data_prep.prepared import pictures, prepare, record_files
from ur4rec_jax.data.dataset import (
  DROPPED_USERS,
  FORMAT_VERSION,
  METADATA,
  VERSION,
  Interactions,
  write_flat_arrays,
)


class Origin(NamedTuple):
  """Origin and licence of a dataset."""

  name: str
  licence: str
  citation: str
  url: str


def write(
  folder: Path,
  data: prepare.Prepared,
  origin: Origin,
  source: str,
  extra: dict[str, Any],
  image_size: int = pictures.IMAGE_SIZE,
  workers: int = 1,
) -> dict[str, Any]:
  """Writes pictures, interactions, items and, last, dataset.json into an empty folder.

  The interactions are written twice: as TFDS data, in several files if there are many, and as flat
  arrays that training opens.

  Args:
    folder: existing, empty folder.
    data: the prepared dataset.
    origin: name, licence and citation, stored with the data.
    source: value of --source.
    extra: further fields of dataset.json (options, hashes of the raw files).
    image_size: short side of stored pictures in pixels.
    workers: processes that write the interactions; the bytes do not depend on their number.

  Returns:
    The content of dataset.json.
  """
  offered = [item.image for item in data.items]
  images, notes = pictures.import_all(folder, data.item_names, offered, image_size)
  columns = data.user_names, data.offsets, data.item_ids, data.timestamps, data.ratings
  interactions = Interactions(*columns)
  _write_interactions(folder, interactions, origin, workers)
  _write_items(folder, data, images, origin)
  _write_dropped_users(folder, data)
  metadata = {
    'name': origin.name,
    'source': source,
    **extra,
    'notes': [*extra.get('notes', []), *notes],
    'counts': prepare.counts(data),
    'ids_sha256': {'users': _hash(data.user_names), 'items': _hash(data.item_names)},
    'rows_read': data.rows_read,
    'dropped': data.dropped,
    'has_timestamps': data.has_timestamps,
    'has_ratings': data.has_ratings,
    'time_range': _time_range(data),
    'splits': data.splits,
    'licence': origin.licence,
    'citation': origin.citation,
    'url': origin.url,
    'format_version': FORMAT_VERSION,
  }
  write_flat_arrays(folder, metadata, interactions)
  text = json.dumps(metadata, indent=2, ensure_ascii=False) + '\n'
  (folder / METADATA).write_text(text, encoding='utf-8')
  return metadata


class Table(NamedTuple):
  """One TFDS dataset of a prepared folder.

  Attributes:
    name: name of the dataset.
    split: name of its only split.
    features: types of the fields.
    description: description of an example.
    origin: licence and citation, stored with the data.
  """

  name: str
  split: str
  features: dict[str, tfds.features.FeatureConnector]
  description: str
  origin: Origin


def write_records(
  folder: Path,
  table: Table,
  examples: Iterable[dict[str, Any] | bytes],
  metadata: dict[str, Any] | None = None,
) -> None:
  """Writes one TFDS dataset into an empty folder, in order; faster than TFDS itself.

  The same examples give the same bytes in every process. They are read back once, so that a failing
  disk cannot leave a broken dataset unnoticed.

  Args:
    folder: folder to create, `.../NAME/VERSION`.
    table: name, fields and origin of the dataset.
    examples: text, list of texts, number or array by field, or an example that is encoded already.
    metadata: content of metadata.json.

  Raises:
    InputError: the data read back differently.
  """
  folder.mkdir(parents=True)
  records = (example if isinstance(example, bytes) else _serialize(example) for example in examples)
  [path] = _paths(folder, table, 1)
  _write_info(folder, table, [record_files.write(path, records)], metadata)


def _paths(folder: Path, table: Table, count: int) -> list[Path]:
  names = (f'{table.name}-{table.split}.array_record-{i:05}-of-{count:05}' for i in range(count))
  return [folder / name for name in names]


def _write_info(
  folder: Path,
  table: Table,
  shards: list[record_files.Written],
  metadata: dict[str, Any] | None = None,
) -> None:
  """Describes the files of records, so that TFDS can read them."""
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
  )
  info = tfds.core.SplitInfo(
    name=table.split,
    shard_lengths=[shard.records for shard in shards],
    num_bytes=sum(shard.size for shard in shards),
    filename_template=template,
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=tfds.features.FeaturesDict(table.features),
    split_infos=[info],
    check_data=False,  # The check would need TensorFlow.
    description=table.description,
    homepage=table.origin.url or None,
    citation=table.origin.citation or None,
    license=table.origin.licence or None,
    disable_shuffling=True,
    metadata=tfds.core.MetadataDict(metadata) if metadata else None,
  )


def _serialize(example: dict[str, Any]) -> bytes:
  record = tf_example_pb2.Example()
  for name, value in example.items():
    feature = record.features.feature[name]
    if isinstance(value, str):
      feature.bytes_list.value.append(value.encode())
    elif isinstance(value, list):
      feature.bytes_list.value.extend([text.encode() for text in value])
    elif isinstance(value, np.ndarray) and value.dtype.kind == 'f':
      feature.float_list.value.extend(value.tolist())
    else:
      feature.int64_list.value.extend(np.atleast_1d(value).tolist())
  # The order of fields in a protocol buffer map changes from process to process.
  return record.SerializeToString(deterministic=True)


def _write_interactions(
  folder: Path, interactions: Interactions, origin: Origin, workers: int
) -> None:
  table = Table(
    'interactions',
    'users',
    {
      'user_id': tfds.features.Text(),
      'item_ids': tfds.features.Tensor(shape=(None,), dtype=np.int32),
      'timestamps': tfds.features.Tensor(shape=(None,), dtype=np.int64),
      'ratings': tfds.features.Tensor(shape=(None,), dtype=np.float32),
    },
    f'{origin.name}: one example a user, the whole history in time order;'
    ' item_ids are 1-based positions in the items dataset.',
    origin,
  )
  folder = folder / 'interactions' / VERSION
  folder.mkdir(parents=True)
  paths = _paths(folder, table, len(record_files.shards(interactions.offsets)))
  _write_info(folder, table, record_files.write_histories(paths, interactions, workers))


def _write_items(folder: Path, data: prepare.Prepared, images: list[str], origin: Origin) -> None:
  columns = zip(data.item_names, data.items, images, strict=True)
  table = Table(
    'items',
    'items',
    {
      'item_id': tfds.features.Scalar(np.int32),
      'original_id': tfds.features.Text(),
      'title': tfds.features.Text(),
      'genres': tfds.features.Sequence(tfds.features.Text()),
      'description': tfds.features.Text(),
      'image': tfds.features.Text(),
    },
    f'{origin.name}: one example an item, in the order of item_id (1-based);'
    " image is a path relative to the dataset's folder, or the URL of a picture not fetched.",
    origin,
  )
  examples = (
    {
      'item_id': i + 1,
      'original_id': name,
      'title': item.title,
      'genres': list(item.genres),
      'description': item.description,
      'image': image,
    }
    for i, (name, item, image) in enumerate(columns)
  )
  write_records(folder / 'items' / VERSION, table, examples)


def _write_dropped_users(folder: Path, data: prepare.Prepared) -> None:
  rows = [(name, reason) for reason, names in data.dropped_users.items() for name in names]
  if rows:
    users, reasons = (pa.array(column, pa.string()) for column in zip(*rows, strict=True))
    pq.write_table(pa.table({'user': users, 'filter': reasons}), folder / DROPPED_USERS)


def _hash(names: list[str]) -> str:
  return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _time_range(data: prepare.Prepared) -> list[int] | None:
  if not data.has_timestamps:
    return None
  return [int(data.timestamps.min()), int(data.timestamps.max())]

"""A prepared dataset -> one folder of TFDS data that reads back without TensorFlow."""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer as writer_lib
from tensorflow_datasets.proto import tf_example_pb2

from data_prep import prepare, staging
from ur4rec_jax.dataset import FORMAT_VERSION, METADATA, read_interactions, read_items
from ur4rec_jax.errors import InputError


class Origin(NamedTuple):
  """Where a dataset comes from and what may be done with it."""

  name: str
  licence: str
  citation: str
  url: str


def write(
  folder: Path, data: prepare.Prepared, origin: Origin, source: str, extra: dict[str, Any]
) -> dict[str, Any]:
  """Writes pictures, interactions, items and, last, dataset.json into an empty folder.

  Args:
    folder: exists and is empty.
    data: what to write.
    origin: name, licence and citation, kept with the data.
    source: the value of --source.
    extra: further fields of dataset.json (options, fingerprints of the raw files).

  Returns:
    The content of dataset.json.
  """
  images = _write_images(folder, data)
  build(Interactions, folder, data=data, origin=origin)
  build(Items, folder, data=data, images=images, origin=origin)
  _verify(folder, data)
  metadata = {
    'name': origin.name,
    'source': source,
    **extra,
    'counts': prepare.counts(data),
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
  text = json.dumps(metadata, indent=2, ensure_ascii=False) + '\n'
  (folder / METADATA).write_text(text, encoding='utf-8')
  return metadata


class _StableWriter(writer_lib.ExampleWriter):
  """Writes each record with its fields in sorted order.

  Protocol buffers order a map's fields by a hash that changes from process to process; sorted,
  the same data gives the same bytes.
  """

  def write(self, path, examples):
    return super().write(path, ((key, _sort_fields(record)) for key, record in examples))


def _sort_fields(record: bytes) -> bytes:
  return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


class Builder(tfds.core.GeneratorBasedBuilder):
  """What all builders share; the data comes in ready, there is nothing to download."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, data: Any, origin: Origin, **kwargs):
    self._data = data
    self._origin = origin
    super().__init__(**kwargs)

  def _dataset_info(
    self, description: str, features: dict[str, Any], metadata: dict[str, Any] | None = None
  ) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=description,
      features=tfds.features.FeaturesDict(features),
      homepage=self._origin.url or None,
      citation=self._origin.citation or None,
      license=self._origin.licence or None,
      disable_shuffling=True,
      metadata=metadata,
    )

  def _example_writer(self) -> writer_lib.ExampleWriter:
    return _StableWriter(file_format=self.info.file_format)


def build(builder: type[Builder], folder: Path, **kwargs: Any) -> None:
  """Writes the data of one builder into a folder, under the builder's name and version."""
  # TFDS announces itself on stdout; what the user should read is printed by the caller.
  with contextlib.redirect_stdout(io.StringIO()):
    tfds.disable_progress_bar()
    try:
      builder(data_dir=folder, file_format='array_record', **kwargs).download_and_prepare()
    except RuntimeError as error:  # what the record writer raises when the disk is full
      for code in staging.DISK_FULL:
        if os.strerror(code) in str(error):
          raise OSError(code, os.strerror(code)) from error
      raise
  shutil.rmtree(folder / 'downloads', ignore_errors=True)  # TFDS makes it even when unused


class Interactions(Builder):
  """One example a user: the whole history in time order."""

  def _info(self) -> tfds.core.DatasetInfo:
    return self._dataset_info(
      f'{self._origin.name}: one example a user, the whole history in time order;'
      ' item_ids are 1-based positions in the items dataset.',
      {
        'user_id': tfds.features.Text(),
        'item_ids': tfds.features.Tensor(shape=(None,), dtype=np.int32),
        'timestamps': tfds.features.Tensor(shape=(None,), dtype=np.int64),
        'ratings': tfds.features.Tensor(shape=(None,), dtype=np.float32),
      },
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'users': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    data = self._data
    for user, name in enumerate(data.user_names):
      span = slice(data.offsets[user], data.offsets[user + 1])
      yield (
        user,
        {
          'user_id': name,
          'item_ids': data.item_ids[span],
          'timestamps': data.timestamps[span],
          'ratings': data.ratings[span],
        },
      )


class Items(Builder):
  """One example an item, in the order of item_id."""

  def __init__(self, *, images: list[str], **kwargs):
    self._images = images
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return self._dataset_info(
      f'{self._origin.name}: one example an item, in the order of item_id (1-based);'
      " image is a path relative to the dataset's folder, or the URL of a picture not fetched.",
      {
        'item_id': tfds.features.Scalar(np.int32),
        'original_id': tfds.features.Text(),
        'title': tfds.features.Text(),
        'genres': tfds.features.Sequence(tfds.features.Text()),
        'description': tfds.features.Text(),
        'image': tfds.features.Text(),
      },
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'items': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    columns = zip(self._data.item_names, self._data.items, self._images, strict=True)
    for i, (name, item, image) in enumerate(columns):
      yield (
        i,
        {
          'item_id': i + 1,
          'original_id': name,
          'title': item.title,
          'genres': list(item.genres),
          'description': item.description,
          'image': image,
        },
      )


def _write_images(folder: Path, data: prepare.Prepared) -> list[str]:
  """Writes or copies the pictures; returns `[items]` relative paths, '' where there is none."""
  paths = []
  for name, item in zip(_picture_names(data.item_names), data.items, strict=True):
    if item.image is None or isinstance(item.image, str):
      paths.append(item.image or '')
      continue
    suffix = '.png' if isinstance(item.image, bytes) else item.image.suffix.lower()
    paths.append(f'images/{name}{suffix}')
    target = folder / paths[-1]
    target.parent.mkdir(exist_ok=True)
    if isinstance(item.image, bytes):
      target.write_bytes(item.image)
    else:
      shutil.copyfile(item.image, target)
  return paths


def _picture_names(names: list[str]) -> list[str]:
  """File names without suffix: the items' ids if all are plain, else their numbers.

  An id may be `../x`, and two ids may differ in case only, which some file systems do not see.
  """
  plain = all(re.fullmatch(r'[0-9A-Za-z][0-9A-Za-z_-]{0,63}', name) for name in names)
  if plain and len({name.casefold() for name in names}) == len(names):
    return names
  return [str(i + 1) for i in range(len(names))]


def _verify(folder: Path, data: prepare.Prepared) -> None:
  """Reads back what was written: a failing disk must not leave a dataset that looks complete."""
  stored = read_interactions(folder)
  same = stored.user_ids == data.user_names and all(
    np.array_equal(getattr(stored, name), getattr(data, name))
    for name in ('offsets', 'item_ids', 'timestamps', 'ratings')
  )
  if not same or [item['original_id'] for item in read_items(folder)] != data.item_names:
    raise InputError(f'{folder}: what was written reads back differently; is the disk sound?')


def _time_range(data: prepare.Prepared) -> list[int] | None:
  if not data.has_timestamps:
    return None
  return [int(data.timestamps.min()), int(data.timestamps.max())]

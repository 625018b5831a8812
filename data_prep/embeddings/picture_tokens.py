"""Encodes pictures of items: token 0 is the whole picture, the others a grid of its parts."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.embeddings.decoded_files import FileEncoder, encoding
from data_prep.embeddings.feature_files import Row, Source
from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import iterate_items, read_info
from ur4rec_jax.encoders.pictures import Encoder
from ur4rec_jax.errors import InputError


def source(data_dir: str | Path, encoder: Encoder, processes: int = 0) -> Source:
  """Describes how to encode the pictures of a prepared folder.

  Args:
    data_dir: prepared folder.
    encoder: picture encoder.
    processes: processes that decode pictures; 0 decodes in this process.

  Raises:
    InputError: the folder is no prepared dataset, or no item has a picture.
  """
  info = read_info(data_dir)
  found = item_pictures.find(data_dir)
  if not any(found):
    raise InputError(
      f'data_dir {data_dir}: no item has a picture; fetch them: python -m data_prep.download_images'
      f' --data_dir={data_dir}, or build the dataset with an item table that names picture files'
    )
  grid = encoder.grid
  meaning = {'0': 'the whole picture'}
  if grid:
    meaning[f'1-{grid * grid}'] = f'{grid} x {grid} parts, row by row from the upper left'
  file_encoder = FileEncoder(
    functools.partial(_decode, encoder.prepare),
    [functools.partial(_with_mask, work) for work in encoder.workers],
    encoder.batch_size,
    1 + grid * grid,
    encoder.width,
  )
  return Source(
    name=encoder.info['name'],
    info={'encoder': encoder.info, 'is_mock': False, 'token_meaning': meaning},
    total=info['counts']['items'],
    tokens=file_encoder.tokens,
    width=encoder.width,
    rows=lambda: _rows(Path(data_dir), found),
    encode=encoding(file_encoder, processes),
  )


def _rows(data_dir: Path, found: list[Path | None]) -> Iterator[Row]:
  records = item_pictures.read_manifest(data_dir)
  last = {record['item']: record for record in records}
  fetched = {
    r['item']: r.get('stored_sha256', '') for r in records if r['status'] == item_pictures.FETCHED
  }
  for item, path in zip(iterate_items(data_dir), found, strict=True):
    name = item['original_id']
    if path is not None:
      yield Row(name, path, fetched[name].encode())
    elif name in fetched:
      yield Row(name, None, reason='its picture file is missing or damaged')
    elif name in last and last[name].get('reason'):
      yield Row(name, None, reason=f'{last[name]["status"]}: {last[name]["reason"]}')
    else:
      yield Row(name, None, reason='no picture')


def _decode(prepare: Callable[[Image.Image], np.ndarray], path: Path) -> np.ndarray:
  try:
    with Image.open(path) as file:
      return prepare(file.convert('RGB'))
  except Exception as error:  # Damaged files make decoders raise any kind of error.
    raise ValueError(f'its picture cannot be decoded ({error})') from error


def _with_mask(
  work: Callable[[list[np.ndarray]], np.ndarray], arrays: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  tokens = work(arrays)
  return tokens, np.ones(tokens.shape[:2], bool)

"""Encodes pictures of items: token 0 is the whole picture, the others a grid of its parts."""

import collections
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.embeddings.feature_files import Row, Source
from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import iterate_items, read_info
from ur4rec_jax.encoders import pretrained
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
  return Source(
    name=encoder.info['name'],
    info={'encoder': encoder.info, 'is_mock': False, 'token_meaning': meaning},
    count=info['counts']['items'],
    tokens=1 + grid * grid,
    width=encoder.width,
    rows=lambda: _rows(Path(data_dir), found),
    encode=functools.partial(_encode, encoder, _Decoders(encoder.prepare, processes)),
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


class _Decoders:
  """Decodes batches of pictures in other processes, ahead of their use."""

  def __init__(self, prepare: Callable[[Image.Image], np.ndarray], processes: int):
    self._prepare, self._processes = prepare, processes
    self._pool: ProcessPoolExecutor | None = None

  def arrays(self, batches: list[list[Path]]) -> Iterator[list[np.ndarray | str]]:
    """Yields the arrays of each batch in order; text in place of an array says why it failed."""
    if not self._processes:
      for batch in batches:
        yield _open_all(self._prepare, batch)
      return
    if self._pool is None:
      # Spawned, because torch's threads do not survive a fork.
      self._pool = ProcessPoolExecutor(
        self._processes, multiprocessing.get_context('spawn'), _follow_parent
      )
    waiting: collections.deque = collections.deque()
    for batch in batches:
      waiting.append(self._pool.submit(_open_all, self._prepare, batch))
      if len(waiting) > 2 * self._processes:
        yield _result(waiting.popleft())
    while waiting:
      yield _result(waiting.popleft())


def _result(waiting: Future) -> list[np.ndarray | str]:
  try:
    return waiting.result()
  except BrokenProcessPool as error:
    raise InputError(
      'a process that decodes pictures was killed, probably for lack of memory; pass fewer'
      ' --workers'
    ) from error


def _follow_parent() -> None:
  """Ends a process of the pool when its parent is killed; only the parent handles Ctrl-C."""

  def watch() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=watch, daemon=True).start()


def _open_all(
  prepare: Callable[[Image.Image], np.ndarray], paths: list[Path]
) -> list[np.ndarray | str]:
  return [_open(prepare, path) for path in paths]


def _open(prepare: Callable[[Image.Image], np.ndarray], path: Path) -> np.ndarray | str:
  try:
    with Image.open(path) as file:
      return prepare(file.convert('RGB'))
  except Exception as error:  # Damaged files make decoders raise any kind of error.
    return f'its picture cannot be decoded ({error})'


def _encode(
  encoder: Encoder, decoders: _Decoders, rows: list[Row], advance: Callable[[float], object]
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  num_tokens = 1 + encoder.grid**2
  tokens = np.zeros((len(rows), num_tokens, encoder.width), np.float32)
  mask = np.zeros((len(rows), num_tokens), bool)
  reasons: dict[int, str] = {}
  places = [at for at, row in enumerate(rows) if row.content is not None]
  advance(len(rows) - len(places))
  size = encoder.batch_size
  chosen = [places[i : i + size] for i in range(0, len(places), size)]

  def batches() -> Iterator[tuple[list[int], list[np.ndarray]]]:
    decoded = decoders.arrays([[rows[at].content for at in batch] for batch in chosen])
    for batch, arrays in zip(chosen, decoded, strict=True):
      pairs = list(zip(batch, arrays, strict=True))
      reasons.update((at, array) for at, array in pairs if isinstance(array, str))
      good = [(at, array) for at, array in pairs if not isinstance(array, str)]
      yield [at for at, _ in good], [array for _, array in good]

  workers = [lambda pair, work=work: work(pair[1]) if pair[0] else None for work in encoder.workers]
  for (batch, _), found in pretrained.in_order(workers, batches()):
    if batch:
      tokens[batch], mask[batch] = found, True
    advance(len(batch))
  advance(len(reasons))
  return tokens, mask, reasons

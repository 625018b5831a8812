"""Encodes files in batches, which other processes decode ahead of their use."""

import collections
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.embeddings.feature_files import Encode, Row
from data_prep.prepared import record_files
from ur4rec_jax.encoders import pretrained
from ur4rec_jax.errors import InputError

Tokens = tuple[np.ndarray, np.ndarray]


class FileEncoder(NamedTuple):
  """How files become tokens.

  Attributes:
    decode: turns a file into the input of a worker; runs in another process. Any error that it
      raises refuses the file.
    workers: functions from a list of such inputs to tokens `[files, tokens, width]` and their mask
      `[files, tokens]`, one per device.
    batch_size: files per call of a worker.
    tokens: most tokens of a file.
    width: width of a token.
  """

  decode: Callable[[Path], Any]
  workers: list[Callable[[list[Any]], Tokens]]
  batch_size: int
  tokens: int
  width: int


class Decoders:
  """Decodes batches of files in other processes, ahead of their use."""

  def __init__(self, decode: Callable[[Path], Any], processes: int):
    """Starts nothing yet; without processes it decodes in this one."""
    self._decode, self._processes = decode, processes
    self._pool: ProcessPoolExecutor | None = None

  def inputs(self, batches: list[list[Path]]) -> Iterator[list[Any]]:
    """Yields the inputs of each batch in order; text in place of one says why it failed."""
    if not self._processes:
      for batch in batches:
        yield _decode_all(self._decode, batch)
      return
    if self._pool is None:
      self._pool = record_files.pool_of(self._processes)
    waiting: collections.deque = collections.deque()
    for batch in batches:
      waiting.append(self._pool.submit(_decode_all, self._decode, batch))
      if len(waiting) > 2 * self._processes:
        yield _result(waiting.popleft())
    while waiting:
      yield _result(waiting.popleft())


def _result(waiting: Future) -> list[Any]:
  try:
    return waiting.result()
  except BrokenProcessPool as error:
    raise InputError(
      'a process that decodes files was killed, probably for lack of memory; pass fewer --workers'
    ) from error


def _decode_all(decode: Callable[[Path], Any], paths: list[Path]) -> list[Any]:
  return [_decode(decode, path) for path in paths]


def _decode(decode: Callable[[Path], Any], path: Path) -> Any:
  try:
    return decode(path)
  except Exception as error:  # Damaged files make decoders raise any kind of error.
    return next(iter(str(error).splitlines()), repr(error))


def encoding(encoder: FileEncoder, processes: int) -> Encode:
  """Returns the function `Source.encode` for rows whose content is a file.

  Args:
    encoder: what turns files into tokens.
    processes: processes that decode; 0 decodes in this process.
  """
  return functools.partial(_encode, encoder, Decoders(encoder.decode, processes))


def _work(
  worker: Callable[[list[Any]], Tokens], pair: tuple[list[int], list[Any]]
) -> Tokens | None:
  """Encodes the inputs of a batch, which come with their places; None if there are none."""
  return worker(pair[1]) if pair[1] else None


def _encode(
  encoder: FileEncoder, decoders: Decoders, rows: list[Row], advance: Callable[[float], object]
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  tokens = np.zeros((len(rows), encoder.tokens, encoder.width), np.float32)
  mask = np.zeros((len(rows), encoder.tokens), bool)
  reasons: dict[int, str] = {}
  places = [at for at, row in enumerate(rows) if row.content is not None]
  advance(len(rows) - len(places))
  size = encoder.batch_size
  chosen = [places[i : i + size] for i in range(0, len(places), size)]

  def batches() -> Iterator[tuple[list[int], list[Any]]]:
    decoded = decoders.inputs([[rows[at].content for at in batch] for batch in chosen])
    for batch, arrays in zip(chosen, decoded, strict=True):
      pairs = list(zip(batch, arrays, strict=True))
      reasons.update((at, array) for at, array in pairs if isinstance(array, str))
      good = [(at, array) for at, array in pairs if not isinstance(array, str)]
      yield [at for at, _ in good], [array for _, array in good]

  workers = [functools.partial(_work, worker) for worker in encoder.workers]
  for (batch, _), found in pretrained.in_order(workers, batches()):
    if found:
      tokens[batch], mask[batch] = found
    advance(len(batch))
  advance(len(reasons))
  return tokens, mask, reasons

"""Encodes sounds of items: token 0 is the whole sound, the others its parts in time."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.embeddings import media_files
from data_prep.embeddings.decoded_files import FileEncoder
from data_prep.embeddings.feature_files import Source
from ur4rec_jax.encoders import sounds


def source(
  data_dir: str | Path,
  files: str | Path,
  encoder: sounds.Encoder,
  parts: int,
  max_seconds: float,
  processes: int = 0,
) -> Source:
  """Describes how to encode the sounds of the items of a prepared folder.

  Args:
    data_dir: prepared folder.
    files: folder of sounds, each named by the original id of its item.
    encoder: sound encoder.
    parts: most parts with a token of their own.
    max_seconds: what comes later in a file is not read.
    processes: processes that decode; 0 decodes in this process.

  Raises:
    InputError: see `media_files.find`.
  """
  found = media_files.find(data_dir, files, 'sound')
  decode = functools.partial(_decode, encoder.prepare, encoder.rate, max(1, parts), max_seconds)
  file_encoder = FileEncoder(
    decode,
    [functools.partial(_encode, work, parts) for work in encoder.workers],
    batch_size=1,  # A sound has several windows, which are a batch already.
    tokens=1 + parts,
    width=encoder.width,
  )
  meaning = {'0': 'the mean of the parts of the sound'}
  if parts:
    seconds = f'{sounds.WINDOW_SECONDS} seconds at most'
    meaning[f'1-{parts}'] = f'a part each, of {seconds}; of more parts some, evenly spaced'
  about = encoder.info | {'max_seconds': max_seconds}
  return found.source(about, meaning, file_encoder, processes)


def _decode(
  prepare: Callable[[np.ndarray], sounds.Inputs],
  rate: int,
  parts: int,
  max_seconds: float,
  path: Path,
) -> sounds.Inputs:
  with media_files.refusing():
    samples = media_files.read_sound(path, rate, max_seconds)
  return prepare(sounds.windows(samples, rate, parts))


def _encode(
  work: Callable[[sounds.Inputs], np.ndarray], parts: int, inputs: list[sounds.Inputs]
) -> tuple[np.ndarray, np.ndarray]:
  return media_files.mean_and_parts([work(one) for one in inputs], parts)

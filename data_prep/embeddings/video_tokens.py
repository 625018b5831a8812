"""Encodes videos of items: token 0 is the mean of some frames, the others are these frames."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.embeddings import media_files
from data_prep.embeddings.decoded_files import FileEncoder
from data_prep.embeddings.feature_files import Source
from ur4rec_jax.encoders import pictures


def source(
  data_dir: str | Path,
  files: str | Path,
  encoder: pictures.Encoder,
  frames: int,
  max_seconds: float,
  processes: int = 0,
) -> Source:
  """Describes how to encode the videos of the items of a prepared folder.

  Args:
    data_dir: prepared folder.
    files: folder of videos, each named by the original id of its item.
    encoder: picture encoder of whole pictures, without a grid.
    frames: most frames with a token of their own.
    max_seconds: what comes later in a file is not read.
    processes: processes that decode; 0 decodes in this process.

  Raises:
    InputError: see `media_files.find`.
  """
  found = media_files.find(data_dir, files, 'video')
  count = max(1, frames)
  file_encoder = FileEncoder(
    functools.partial(_decode, encoder.prepare, count, max_seconds),
    [functools.partial(_encode, work, frames) for work in encoder.workers],
    batch_size=max(1, encoder.batch_size // count),
    tokens=1 + frames,
    width=encoder.width,
  )
  meaning = {'0': 'the mean of the frames'}
  if frames:
    meaning[f'1-{frames}'] = 'a frame each, evenly spaced'
  about = encoder.info | {'max_seconds': max_seconds}
  return found.source(about, meaning, file_encoder, processes)


def _decode(
  prepare: Callable[[Image.Image], np.ndarray], count: int, max_seconds: float, path: Path
) -> np.ndarray:
  """Returns `[frames, ...]`."""
  with media_files.refusing():
    frames = media_files.read_frames(path, count, max_seconds)
  return np.stack([prepare(frame) for frame in frames])


def _encode(
  work: Callable[[list[np.ndarray]], np.ndarray], frames: int, videos: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  vectors = work([frame for video in videos for frame in video])[:, 0]
  ends = np.cumsum([len(video) for video in videos])[:-1]
  return media_files.mean_and_parts(np.split(vectors, ends), frames)

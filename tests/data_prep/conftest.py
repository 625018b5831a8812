"""Small raw files in the true formats, and a way to run the program as a user does."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_prep import build_dataset
from data_prep.prepared import prepare
from tests.helpers.commands import run_here
from tests.helpers.fork_server import Program
from tests.helpers.runs import ROOT

GENRES = ('unknown', 'Action', 'Comedy', 'Drama')


@pytest.fixture
def start_build() -> Callable[..., Program]:
  """Starts the program with some flags in a process of its own."""
  return lambda *flags: Program('data_prep.build_dataset', flags, os.environ, ROOT)


@pytest.fixture
def run_build() -> Callable[..., subprocess.CompletedProcess]:
  """Runs the program; with limits or an environment in a process of its own."""

  def run(*flags: str, limit: tuple[str, ...] = (), **kwargs) -> subprocess.CompletedProcess:
    if not (limit or kwargs):
      return run_here(build_dataset.main, flags)
    words = [*limit, sys.executable, '-m', 'data_prep.build_dataset', *flags]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)

  return run


@pytest.fixture
def make_picture() -> Callable[..., bytes]:
  """Content of a noisy picture file: `make_picture(format, size, seed, **options of Pillow)`."""

  def make(kind: str = 'JPEG', size: tuple[int, int] = (40, 60), seed: int = 0, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()

  return make


@pytest.fixture
def ratings() -> np.ndarray:
  """`[rows, 4]` user, item, rating, time; shuffled, many equal times, no duplicates."""
  num_users, num_items = 12, 9
  rng = np.random.default_rng(0)
  pairs = np.stack(np.divmod(np.arange(num_users * num_items), num_items), axis=1) + 1
  pairs = rng.permutation(pairs[rng.random(len(pairs)) < 0.7])
  stars = rng.integers(1, 6, len(pairs))
  times = 880_000_000 + rng.integers(0, 5, len(pairs))
  return np.column_stack([pairs, stars, times])


@pytest.fixture
def ml_100k(ratings, tmp_path) -> Path:
  """A folder like ml-100k, item 10 never rated, a title in latin-1."""
  folder = tmp_path / 'ml-100k'
  folder.mkdir()
  rows = ['\t'.join(map(str, row)) for row in ratings]
  (folder / 'u.data').write_text('\n'.join(rows) + '\n')
  items = [
    f'{i}|{"Misérables, Les" if i == 3 else f"Film {i}"} (1995)|01-Jan-1995||http://x/{i}|0|1|0|1'
    for i in range(1, 11)
  ]
  (folder / 'u.item').write_bytes(('\n'.join(items) + '\n').encode('latin-1'))
  lines = [f'{name}|{i}' for i, name in enumerate(GENRES)]
  (folder / 'u.genre').write_text('\n'.join(lines) + '\n\n')
  return folder


@pytest.fixture
def ml_1m(ratings, tmp_path) -> Path:
  """A folder like ml-1m with the same interactions as `ml_100k`."""
  folder = tmp_path / 'ml-1m'
  folder.mkdir()
  rows = ['::'.join(map(str, row)) for row in ratings]
  (folder / 'ratings.dat').write_text('\n'.join(rows) + '\n')
  items = [
    f"{i}::{'Misérables, Les' if i == 3 else f'Film {i}'} (1995)::Children's|Drama"
    for i in range(1, 11)
  ]
  (folder / 'movies.dat').write_bytes(('\n'.join(items) + '\n').encode('latin-1'))
  return folder


@pytest.fixture
def sequences(tmp_path) -> Path:
  """A file of "user item" lines with a repeat."""
  path = tmp_path / 'pairs.txt'
  path.write_text('b x\na y\nb x\na z\nb y\na x\nb z\n')
  return path


@pytest.fixture
def make_shop(tmp_path) -> Callable[..., Path]:
  """Prepares a small dataset: `make_shop(rows, items)` from dicts or tuples gives its folder."""

  def make(rows, items, time_split: str | None = None, name: str = 'shop') -> Path:
    if not isinstance(rows, pd.DataFrame):
      rows = pd.DataFrame(rows, columns=['user', 'item', 'time', 'rating'][: len(rows[0])])
    build_dataset.build_from_table(
      rows,
      tmp_path / name,
      prepare.Options(time_split=time_split),
      items=pd.DataFrame(items),
      time_column='time',
    )
    return tmp_path / name

  return make

"""The program as tests start it, and small data in memory."""

import pathlib
import sys
import time

import numpy as np

from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = (sys.executable, '-m', 'ur4rec_jax.main')


def make_dataset(histories, num_items: int | None = None) -> Dataset:
  """A dataset in memory, split by leave-one-out."""
  offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
  item_ids = np.concatenate(histories).astype(np.int32)
  info = {
    'counts': {'items': int(item_ids.max()) if num_items is None else num_items},
    'splits': {splits.LEAVE_ONE_OUT: {}},
  }
  split = splits.leave_one_out(np.diff(offsets))
  return Dataset(info, splits.LEAVE_ONE_OUT, split, item_ids, offsets)


def wait_for(process, condition, timeout=300):
  """Waits until `condition()`, failing if the process ends or time runs out before."""
  deadline = time.monotonic() + timeout
  while not condition():
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.001)

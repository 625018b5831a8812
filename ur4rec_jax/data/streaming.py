"""Reads the items of batches from mapped files, for data that are larger than a device's memory.

Batches are the same as those that the device gathers from all interactions. Which items are read
depends only on the plan, so nothing needs to be saved to go on after an interruption.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data import flat_arrays
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.input_pipeline import Plan, ReadPlan


class ItemReader:
  """Reads the items of planned rows from the interactions of a dataset."""

  def __init__(self, dataset: Dataset, row_length: int):
    """Computes where the training interactions of each user are among all interactions.

    Args:
      dataset: all interactions, which may be mapped from a file.
      row_length: tokens per row.
    """
    self._item_ids, self._row_length = dataset.item_ids, row_length
    train_lengths = dataset.split.train_lengths
    before = np.cumsum(train_lengths, dtype=np.int64) - train_lengths
    # Held-out interactions of earlier users, which training plans do not count.
    self._held_out_before = (dataset.offsets[:-1] - before).astype(np.int32)
    flat_arrays.expect_random_reads(self._item_ids)

  def read(self, plan: Plan) -> tuple[np.ndarray, ReadPlan]:
    """Reads the items of rows `[..., rows, slots]`.

    Returns:
      `[capacity]` int32 items, whose number depends only on the shape of the plan, and the plan
      with indices into them.
    """
    is_filled = plan.lengths > 0
    starts = plan.starts[is_filled] + self._held_out_before[plan.users[is_filled]].astype(np.int64)
    lengths = np.asarray(plan.lengths)[is_filled] + 1  # The last token of a slot has a target, too.
    places = np.cumsum(lengths) - lengths
    *rows, slots = plan.lengths.shape
    items = np.zeros(np.prod(rows) * (self._row_length + slots), np.int32)
    items[: lengths.sum()] = self._item_ids[indices(starts, lengths)]
    flat_arrays.release(self._item_ids)
    own_starts, shift = np.zeros_like(plan.starts), np.zeros_like(plan.starts)
    own_starts[is_filled] = places
    shift[is_filled] = plan.starts[is_filled] - places
    return items, ReadPlan(own_starts, plan.lengths, plan.users, shift)


def indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Returns the indices of slices with these starts and lengths, one after another."""
  return np.repeat(starts, lengths) + ranges(lengths)


def ranges(lengths: np.ndarray) -> np.ndarray:
  """Returns 0, 1, ... up to each of the lengths, one after another."""
  ends = np.cumsum(lengths)
  return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


class Ahead(NamedTuple):
  """A call that the thread has begun: its arguments and its result."""

  wanted: tuple[Any, ...]
  result: Future


class Prefetcher:
  """Calls a function ahead of time in a thread; `get` computes any other call when asked."""

  def __init__(self, function: Callable[..., Any]):
    """Starts no thread yet.

    Args:
      function: what to call; one call at a time.
    """
    self._function = function
    self._pool = ThreadPoolExecutor(1, 'prefetch')
    self._ahead: Ahead | None = None

  def start(self, *wanted: Any) -> None:
    """Begins to compute the call that `get` will ask for next."""
    self._ahead = Ahead(wanted, self._pool.submit(self._function, *wanted))

  def get(self, *wanted: Any) -> Any:
    """Returns the function's result, and waits for it if need be."""
    ahead, self._ahead = self._ahead, None
    if ahead is not None:
      result = ahead.result.result()  # A call that is not wanted has to end, too.
      if ahead.wanted == wanted:
        return result
    return self._function(*wanted)

  def close(self) -> None:
    """Waits for the thread and ends it."""
    self._pool.shutdown(cancel_futures=True)

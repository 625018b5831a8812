"""Writes the events of many requests in one transaction, so that they wait for the disk once."""

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ur4rec_jax.online.events import Event, Exposure, Outcome
from ur4rec_jax.online.feedback_store import FeedbackStore

_MOST_EVENTS = 5000  # Limit for a transaction.
_MOST_EXPOSURES = 10_000  # Limit of waiting exposures; with more, the store cannot keep up.
_EXPOSURE_SECONDS = 0.5  # No request waits for exposures, so they wait to be written with events.


class _Waiting(NamedTuple):
  events: Sequence[Event]
  outcomes: asyncio.Future


class GroupCommit:
  """Collects events while earlier ones are being written.

  Attributes:
    lost_exposures: exposures that could not be written.
  """

  def __init__(self, store: FeedbackStore):
    """Prepares a thread of its own for the store.

    Args:
      store: the store to write to.
    """
    self._store, self._thread = store, ThreadPoolExecutor(1)
    self._waiting: list[_Waiting] = []
    self._exposures: list[Exposure] = []
    self._has_events = asyncio.Event()
    self.lost_exposures = 0

  async def write(self, events: Sequence[Event]) -> list[Outcome]:
    """Waits until the events are durable.

    Raises:
      StorageError: the store failed; see `FeedbackStore.write`.
    """
    outcomes = asyncio.get_running_loop().create_future()
    self._waiting.append(_Waiting(events, outcomes))
    self._has_events.set()
    return await outcomes

  def note(self, exposure: Exposure) -> None:
    """Queues an exposure to be written soon, without waiting for it."""
    if len(self._exposures) < _MOST_EXPOSURES:
      self._exposures.append(exposure)
    else:
      self.lost_exposures += 1

  async def run(self) -> None:
    """Writes until the task is cancelled, and then writes the rest of the queue."""
    try:
      while True:
        with contextlib.suppress(TimeoutError):
          async with asyncio.timeout(_EXPOSURE_SECONDS):
            await self._has_events.wait()
        await self._write_some()
    finally:
      while self._waiting or self._exposures:
        await self._write_some()

  async def _write_some(self) -> None:
    taken, count = [], 0
    while self._waiting and (not taken or count + len(self._waiting[0].events) <= _MOST_EVENTS):
      taken.append(self._waiting.pop(0))
      count += len(taken[-1].events)
    if not self._waiting:
      self._has_events.clear()
    exposures, self._exposures = self._exposures, []
    if not taken and not exposures:
      return
    events = [event for waiting in taken for event in waiting.events]
    loop = asyncio.get_running_loop()
    writing = loop.run_in_executor(self._thread, self._store.write, events, exposures)
    try:
      await asyncio.wait([writing])
    except asyncio.CancelledError:
      await asyncio.wait([writing])  # A transaction that has begun goes to its end.
      raise
    finally:
      if error := writing.exception():
        self.lost_exposures += len(exposures)
        self._fail(taken, error)
      else:
        self._answer(taken, writing.result())

  def _answer(self, taken: Sequence[_Waiting], outcomes: Sequence[Outcome]) -> None:
    start = 0
    for waiting in taken:
      end = start + len(waiting.events)
      if not waiting.outcomes.done():  # The client may have left.
        waiting.outcomes.set_result(outcomes[start:end])
      start = end

  def _fail(self, taken: Sequence[_Waiting], error: BaseException) -> None:
    for waiting in taken:
      if not waiting.outcomes.done():
        waiting.outcomes.set_exception(error)

"""Handles the events of the service: stores them, ranks with them, and measures its answers."""

import asyncio
import contextlib
import math
import secrets
import sys
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from prometheus_client import Counter, Gauge

from ur4rec_jax.errors import StorageError, say
from ur4rec_jax.inference.query import Known
from ur4rec_jax.inference.recommender import Recommender
from ur4rec_jax.online.events import CLICK, Event, Exposure, History, Outcome, Shown
from ur4rec_jax.online.feedback_store import FeedbackStore
from ur4rec_jax.online.group_commit import GroupCommit

MOST_READ = 1000  # Events of a user that are read, the latest ones.
ONLY_ARM = 'default'  # The arm without an experiment.
_EXPIRE_SECONDS = 3600
_POSITIONS = 20  # Positions that are counted one by one; the others are counted together.

EVENTS = Counter('ur4rec_events', 'Events by what became of them.', ['outcome'])
SHOWN = Counter('ur4rec_shown', 'Items in answers by position and arm.', ['position', 'arm'])
CLICKS = Counter(
  'ur4rec_clicks', 'Clicks on items of answers by position and arm.', ['position', 'arm']
)
NEW_SHOWN = Counter('ur4rec_shown_new', 'Items in answers that no exported user has had.')
LOST = Gauge('ur4rec_exposures_lost', 'Answers whose items could not be written to the store.')
COVERAGE = Gauge(
  'ur4rec_catalogue_coverage', 'Share of the catalogue in answers since this model is served.'
)


class Feedback:
  """The events of a running service, which stay when the model changes.

  Attributes:
    keep_seconds: for how long events are kept.
  """

  def __init__(
    self,
    store: FeedbackStore,
    kinds: Sequence[str],
    keep_seconds: float,
    outside: str = ONLY_ARM,
  ):
    """Prepares writing.

    Args:
      store: where events are kept.
      kinds: kinds of events whose items belong to a user's history.
      keep_seconds: for how long events are kept.
      outside: the arm that is logged for answers of no arm; '' if there is an experiment.
    """
    self.keep_seconds = keep_seconds
    self._store, self._kinds, self._outside = store, tuple(kinds), outside
    self._commit = GroupCommit(store)
    LOST.set_function(lambda: self._commit.lost_exposures)

  async def add(self, events: Sequence[Event]) -> dict[str, int]:
    """Stores events, and returns how many had which outcome as soon as they are durable.

    Raises:
      StorageError: they may not be stored; sent again, none counts twice.
    """
    try:
      outcomes = await self._commit.write(events)
    except StorageError:
      EVENTS.labels('failed').inc(len(events))
      raise
    counts = {outcome.value: outcomes.count(outcome) for outcome in Outcome}
    for name, count in counts.items():
      EVENTS.labels(name).inc(count)
    clicks: dict[str, list[Event]] = {}
    for event, outcome in zip(events, outcomes, strict=True):
      if outcome is Outcome.NEW and event.kind == CLICK and event.request_id:
        clicks.setdefault(event.request_id, []).append(event)
    if clicks:
      await self._count_clicks(clicks)
    return counts

  async def _count_clicks(self, clicks: Mapping[str, Sequence[Event]]) -> None:
    """Counts clicks, which are grouped by the answers that they name."""
    with contextlib.suppress(StorageError):  # The events are stored; only their count is missing.
      for shown in await self._read(self._store.shown_in, [*clicks]):
        # A user's click on an answer to somebody else does not count.
        own = (x for x in clicks[shown.request_id] if shown.user in ('', x.user))
        items = Counts(event.item for event in own)
        for position, row in enumerate(shown.items, 1):
          if row.item in items:
            CLICKS.labels(_position(position), shown.arm).inc(items[row.item])

  async def history(self, user: str) -> History:
    """Returns the latest items of a user's stored events.

    Raises:
      StorageError: the store cannot be read now.
    """
    return await self._read(self._store.history, user, self._kinds, MOST_READ)

  async def is_deleted(self, user: str) -> bool:
    """Tells whether a user was deleted once, without reading any event.

    Raises:
      StorageError: the store cannot be read now.
    """
    return (await self._read(self._store.history, user, self._kinds, 0)).is_deleted

  def show(self, user: str, arm: str | None, model: str, rows: Iterable[dict[str, Any]]) -> str:
    """Logs the items of an answer as shown, and returns the answer's id.

    Args:
      user: the user; '' if the request had a history of its own.
      arm: the arm of the experiment; None without an arm.
      model: name of the model.
      rows: the recommendations.
    """
    request_id = new_request_id()
    arm = self._outside if arm is None else arm
    items = tuple(Shown(row['item'], row['score'], row.get('propensity', 1.0)) for row in rows)
    self._commit.note(Exposure(request_id, user, time.time(), arm, model, items))
    for position in range(1, len(items) + 1):
      SHOWN.labels(_position(position), arm).inc()
    return request_id

  async def _read(self, function: Callable, *arguments: Any) -> Any:
    if self._store.waits:
      return await asyncio.to_thread(function, *arguments)
    return function(*arguments)

  async def run(self) -> None:
    """Writes events until the task is cancelled, and then closes the store."""
    try:
      await self._commit.run()
    finally:
      self._store.close()

  async def expire(self) -> None:
    """Deletes old events once an hour, until the task is cancelled."""
    while np.isfinite(self.keep_seconds):
      try:
        await asyncio.to_thread(self._store.expire, time.time() - self.keep_seconds)
      except StorageError as error:
        say(f'note: {error}', sys.stderr)
      await asyncio.sleep(_EXPIRE_SECONDS)


class Coverage:
  """Counts which items of one model's catalogue were in answers."""

  def __init__(self, recommender: Recommender):
    """Starts at nothing.

    Args:
      recommender: the model.
    """
    self._is_shown = bytearray(len(recommender.item_ids) + 1)
    self._count = 0
    users = recommender.known_users
    self._is_new = None
    if users is not None:
      self._is_new = np.ones(len(self._is_shown), bool)
      self._is_new[users.items] = False

  def count(self, numbers: Iterable[int]) -> None:
    """Counts the items of an answer.

    Args:
      numbers: item numbers.
    """
    for number in numbers:
      if not self._is_shown[number]:
        self._is_shown[number] = 1
        self._count += 1
      if self._is_new is not None and self._is_new[number]:
        NEW_SHOWN.inc()
    COVERAGE.set(self._count / max(len(self._is_shown) - 1, 1))


def new_request_id() -> str:
  """Makes an id for an answer, which nobody can guess."""
  return secrets.token_hex(12)


def join_history(
  recommender: Recommender, known: Known | None, stored: History, until: float
) -> Known:
  """Appends stored events to the history that a model was exported with.

  Args:
    recommender: the model.
    known: the exported history; None if the model does not know the user.
    stored: the stored events. Items that are not in the catalogue are left out and not reported,
      because the client need not be the user.
    until: the time of the latest interaction in the exported histories. An event up to that
      second is left out if its item is in the exported history.
  """
  items = stored.items
  if known is not None and known.items.size:
    exported = set(known.items.tolist())
    number_of = recommender.number_of
    items = [
      item
      for item, time in zip(items, stored.times, strict=True)
      # Prepared data have whole seconds.
      if math.floor(time) > until or number_of(item) not in exported
    ]
  numbers, _ = recommender.lookup(items)
  if known is None or not known.items.size:
    return Known(numbers, np.unique(numbers))
  if not numbers.size:
    return known
  return Known(np.concatenate([known.items, numbers]), np.union1d(known.seen, numbers))


def _position(position: int) -> str:
  return str(position) if position <= _POSITIONS else f'over {_POSITIONS}'

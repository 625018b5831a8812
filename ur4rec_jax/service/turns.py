"""Decides whose request is read next, so that no client can take the time of the others."""

import asyncio
import collections
import time
from collections.abc import Hashable

# Runs of the event loop between two turns. A new connection needs about five until its request
# waits for a turn, and an answer a few until it is sent. Without a turn in between, each is short.
RUNS_BETWEEN = 8
# With many connections at once a run may take as long as a turn, so time counts, too.
SECONDS_BETWEEN = 0.005


class Turns:
  """Has requests read one after the other, first those of the client who has used the least time.

  Reading a request takes the event loop, which all clients share. Without turns, somebody who asks
  a hundred long questions at once would get a hundred times the time of somebody who asks a short
  one. The order is that of start-time fair queueing (Goyal, Vin and Cheng 1996): nothing waits
  while the loop is free, and clients who want more than their share divide the rest equally.
  """

  def __init__(self) -> None:
    # By client, in the order in which they came.
    self._waiting: dict[Hashable, collections.deque[asyncio.Future]] = {}
    self._reading: set[Hashable] = set()  # Clients whose turn it is.
    # Seconds used by each client that has a request here. A client that arrives starts with the
    # seconds of the latest turn's client, so that being away earns nothing.
    self._used: dict[Hashable, float] = {}
    self._latest = 0.0
    self._given = 0.0  # When the latest turn was given, by `time.perf_counter`.
    self._is_scheduled = False

  def __len__(self) -> int:
    """Returns how many clients have a request that is read or waits for it."""
    return len(self._used)

  async def begin(self, client: Hashable) -> None:
    """Waits until a request of the client may be read."""
    turn = asyncio.get_running_loop().create_future()
    self._waiting.setdefault(client, collections.deque()).append(turn)
    self._used.setdefault(client, self._latest)
    self._schedule()
    try:
      await turn
    except asyncio.CancelledError:
      if not turn.cancelled():  # The turn had come already.
        self.end(client, 0)
      raise

  def end(self, client: Hashable, seconds: float) -> None:
    """Ends a turn.

    Args:
      client: whose turn it was.
      seconds: how long it took.
    """
    self._reading.discard(client)
    self._used[client] += seconds
    if client in self._waiting:
      self._schedule()
    else:
      del self._used[client]

  def _schedule(self, runs: int = 1) -> None:
    """Gives the next turn after some runs of the event loop."""
    if not self._is_scheduled:
      self._is_scheduled = True
      asyncio.get_running_loop().call_soon(self._count_down, runs)

  def _count_down(self, runs: int) -> None:
    if runs > 1 and time.perf_counter() < self._given + SECONDS_BETWEEN:
      asyncio.get_running_loop().call_soon(self._count_down, runs - 1)
    else:
      self._is_scheduled = False
      self._give_next()

  def _give_next(self) -> None:
    # A turn that waits for something else than the loop delays only its own client.
    ready = [client for client in self._waiting if client not in self._reading]
    if not ready:
      return
    client = min(ready, key=self._used.__getitem__)
    line = self._waiting[client]
    turn = line.popleft()
    if not line:
      del self._waiting[client]
    self._reading.add(client)
    self._latest, self._given = self._used[client], time.perf_counter()
    if turn.cancelled():
      self.end(client, 0)
    else:
      turn.set_result(None)
    self._schedule(RUNS_BETWEEN)


class Turn:
  """The time in which a client's next request is read; `async with` waits for it."""

  def __init__(self, turns: Turns, client: Hashable):
    self._turns, self._client = turns, client
    self._start: float | None = None

  async def __aenter__(self) -> 'Turn':
    await self._turns.begin(self._client)
    self._start = time.perf_counter()
    return self

  async def __aexit__(self, *_) -> None:
    self.end()

  def end(self) -> None:
    """Lets the next request be read, once this one waits for its batch or is answered."""
    if self._start is not None:
      self._turns.end(self._client, time.perf_counter() - self._start)
      self._start = None

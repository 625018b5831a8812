"""Serves one model after the other: the next one is loaded beside the current one.

A request stays with the model that it came to, so that no request fails or waits for a change.
"""

import asyncio
import contextlib
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge

from ur4rec_jax.errors import FailedTaskError, InputError, as_reported, say
from ur4rec_jax.inference import registry
from ur4rec_jax.service.batcher import Batcher

WATCH_SECONDS = 1
_TURN_SECONDS, _REST_SECONDS = 0.0005, 0.004
SWAPS = Counter('ur4rec_model_swaps', 'Changes of the served model.')
REFUSED = Counter('ur4rec_model_refused', 'Versions that could not be loaded.', ['version'])
SERVED = Gauge('ur4rec_model_served', '1 for the version that is served.', ['version'])
_loading = threading.local()


class Served(NamedTuple):
  """A model that answers.

  Attributes:
    app: the ASGI application of this model.
    batcher: its batcher.
    version: its name in the registry, or the start of its hash.
    close: frees its memory, after the last request.
  """

  app: Callable
  batcher: Batcher
  version: str
  close: Callable[[], None]


def is_loading() -> bool:
  """Tells whether this thread loads the next model, which may compile."""
  return getattr(_loading, 'is_on', False)


class CurrentModel:
  """An ASGI application that passes requests on to the current model.

  Attributes:
    failure: the error of a background task that has failed, which ends the service; None so far.
  """

  def __init__(
    self,
    served: Served,
    load: Callable[[str, str], Served],
    folder: str | None = None,
    beside: Sequence[Callable[[], Coroutine]] = (),
    prepare: Callable[[str], Coroutine] | None = None,
  ):
    """Starts with a model.

    Args:
      served: the model to begin with.
      load: opens a model, from its folder and the name of its version.
      folder: the registry to watch, if there is one.
      beside: functions that run beside the requests, until their tasks are cancelled.
      prepare: prepares a folder before it is loaded, e.g. compiles its programs elsewhere.
    """
    self._served, self._load, self._folder, self._beside = served, load, folder, beside
    self._prepare = prepare
    self.failure: FailedTaskError | None = None
    self._inside: dict[int, int] = {}
    self._tasks: dict[int, asyncio.Task] = {}
    self._thread = ThreadPoolExecutor(1, initializer=_become_loader)
    SERVED.labels(served.version).set(1)

  async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
    if scope['type'] == 'lifespan':
      await self._lifespan(receive, send)
      return
    served = self._served
    key = id(served)
    self._inside[key] = self._inside.get(key, 0) + 1
    try:
      await served.app(scope, receive, send)
    finally:
      self._inside[key] -= 1
      if served is not self._served and not self._inside[key]:
        self._let_go(served)

  async def _lifespan(self, receive: Callable, send: Callable) -> None:
    """Runs the background tasks, from the start of the service to its end."""
    await receive()
    self._start(self._served)
    others = [self._run(function()) for function in self._beside]
    if self._folder is not None:
      others.append(self._run(self._watch(self._folder)))
    await send({'type': 'lifespan.startup.complete'})
    await receive()
    for task in (*others, *self._tasks.values()):
      task.cancel()
    await asyncio.gather(*others, return_exceptions=True)  # Events that wait are written.
    await send({'type': 'lifespan.shutdown.complete'})

  def _start(self, served: Served) -> None:
    self._tasks[id(served)] = self._run(served.batcher.run())

  def _run(self, work: Coroutine) -> asyncio.Task:
    """Starts a background task. If it fails, the service ends, because it would be half alive."""
    task = asyncio.create_task(work, name=work.__qualname__)
    task.add_done_callback(self._end_if_failed)
    return task

  def _end_if_failed(self, task: asyncio.Task) -> None:
    error = None if task.cancelled() else task.exception()
    if error is None or self.failure is not None:
      return
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f'{pathlib.Path(place.filename).name}, line {place.lineno}'
    self.failure = FailedTaskError(
      f'the background task {task.get_name()} has failed: {as_reported(error) or repr(error)}'
      f' ({where}); the service ends, start it again'
    )
    say(f'error: {self.failure}', sys.stderr)
    signal.raise_signal(signal.SIGTERM)  # Accepted requests are answered if they can be.

  def _let_go(self, served: Served) -> None:
    """Ends a former model, when its last request was answered."""
    self._inside.pop(id(served), None)
    if task := self._tasks.pop(id(served), None):
      task.cancel()
      served.close()

  async def _watch(self, folder: str) -> None:
    refused, loop = b'', asyncio.get_running_loop()
    while True:
      await asyncio.sleep(WATCH_SECONDS)
      version, content = None, _content(folder)
      if content == refused:
        continue
      try:
        version = registry.current(folder)
        if version is None or version == self._served.version:
          refused = b''
          continue
        place = registry.path(folder, version)
        if self._prepare is not None:
          await self._prepare(place)
        with _short_turns():
          served = await loop.run_in_executor(self._thread, _gently, self._load, place, version)
      except Exception as error:
        refused = content  # It is reported once, and tried again when the file changes.
        reason = as_reported(error) or repr(error)
        REFUSED.labels(version or registry.CURRENT).inc()
        say(f'version {version} is refused, {self._served.version} goes on: {reason}', sys.stderr)
        continue
      self._swap(served)
      del served  # The next one replaces it, and it may be large.

  def _swap(self, served: Served) -> None:
    former, self._served = self._served, served
    self._start(served)
    SERVED.remove(former.version)
    SERVED.labels(served.version).set(1)
    SWAPS.inc()
    if not self._inside.get(id(former)):
      self._let_go(former)
    say(f'serving version {served.version} after {former.version}')


def open_current(folder: str) -> tuple[str, str]:
  """Returns the folder and the name of the version that a registry serves.

  Raises:
    InputError: there is none.
  """
  version = registry.current(folder)
  if version is None:
    raise InputError(f'--registry={folder}: has no model yet; promote one, or give --export=FOLDER')
  return registry.path(folder, version), version


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
  """Makes threads release the interpreter after half a millisecond instead of five."""
  usual = sys.getswitchinterval()
  sys.setswitchinterval(_TURN_SECONDS)
  try:
    yield
  finally:
    sys.setswitchinterval(usual)


def _gently(function: Callable, *arguments: Any) -> Any:
  """Calls a function and makes its thread sleep most of the time.

  A request needs the interpreter (GIL) many times. Each time, it would have to wait for a thread
  that never sleeps.
  """
  until = 0.0

  def rest(*_: Any) -> None:
    nonlocal until
    if time.perf_counter() > until:
      time.sleep(_REST_SECONDS)
      until = time.perf_counter() + _TURN_SECONDS

  sys.setprofile(rest)  # Runs at each function call of this thread only.
  try:
    return function(*arguments)
  finally:
    sys.setprofile(None)


def _content(folder: str) -> bytes:
  try:
    return (pathlib.Path(folder) / registry.CURRENT).read_bytes()
  except OSError:  # `registry.current` says what is wrong.
    return b'unreadable'


def _become_loader() -> None:
  # The thread keeps its priority, because requests wait while it holds the interpreter.
  _loading.is_on = True

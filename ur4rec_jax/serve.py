"""A small HTTP service over an exported folder: recommendations as JSON, and a page to try them.

  pip install 'ur4rec-jax[serve]'      # in a checkout: pip install -e '.[serve]'
  python -m ur4rec_jax.serve --export=shop-model --port=8000

Needs jax and NumPy of what the model needs, and nothing of training. Requests are ranked together
in batches of sizes that were compiled before the first one; docs/inference.md has the limits.
"""

import argparse
import asyncio
import contextlib
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.inference import exported
from ur4rec_jax.inference.recommender import BATCH_SIZES, Answer, Asked, Recommender

try:
  import uvicorn
  from fastapi import FastAPI, HTTPException, Query
  from fastapi.exceptions import RequestValidationError
  from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
  from prometheus_client import Counter, Gauge, Histogram, generate_latest
  from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator
except ImportError as error:
  sys.exit(f"error: {error.name} is not installed; pip install 'ur4rec-jax[serve]'")

MOST_BYTES = 1 << 20  # Of a request's body.
MOST_IDS = 1000  # In a history or a filter.
MOST_K = 100
MOST_FOUND = 20  # By a search.
MOST_WEIGHT = 100
READ_SECONDS = 5  # In which a body must have come.
RETRY_SECONDS = 1  # After which a refused client may try again.
STOP_SECONDS = 30  # In which clients must have taken their answers, when the service stops.
_PAGE = pathlib.Path(__file__).with_name('serve.html')
_PAGE_HEADERS = {
  'Content-Security-Policy': "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline';"
  " style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none';"
  " frame-ancestors 'none'"
}

REQUESTS = Counter('ur4rec_requests', 'Answers by status.', ['status'])
SECONDS = Histogram(
  'ur4rec_request_seconds',
  'From the first byte of an accepted request to the last of its answer.',
  buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
BATCHES = Histogram(
  'ur4rec_batch_users', 'Requests that were ranked together.', buckets=BATCH_SIZES
)
INSIDE = Gauge('ur4rec_requests_inside', 'Accepted requests without an answer yet.')
COMPILED = Counter('ur4rec_compilations', 'Programs compiled since the service was ready.')

# In JSON, 3.0 is a whole number, too.
Whole = Annotated[
  int, BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)
]
ItemId = Annotated[str, Field(max_length=256)] | Whole


class Strict(BaseModel):
  """No conversions, no unknown fields, no NaN."""

  model_config = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)


class Problem(BaseModel):
  """What went wrong, and the way out."""

  detail: str


class Item(BaseModel):
  item: str
  title: str


class Recommended(Item):
  rank: int
  score: float
  shares: dict[str, float]


class Recommendations(BaseModel):
  """The answer; `history` counts its items and those that are read; `unknown` were ignored."""

  user: str | None
  history: dict[str, int]
  unknown: list[str]
  recommendations: list[Recommended]


class Health(BaseModel):
  """What is served, and its limits."""

  status: str
  dataset: str
  items: int
  users: int
  paths: list[str]
  share_names: list[str]
  max_length: int
  most_k: int


class Job(NamedTuple):
  """A checked request: `only` is its filter, by which it can be ranked beside others."""

  asked: Asked
  k: int
  only: tuple | None
  texts: dict[str, tuple[np.ndarray, np.ndarray]]


class Batcher:
  """Ranks the jobs of many requests together, in shapes that are compiled at the start."""

  def __init__(self, recommender: Recommender, most: int, wait_seconds: float):
    """Compiles.

    Args:
      recommender: that ranks.
      most: jobs in a batch.
      wait_seconds: how long the first job of a batch waits for others.
    """
    self._recommender, self._most, self._wait_seconds = recommender, most, wait_seconds
    self._waiting: asyncio.Queue = asyncio.Queue()  # As long as `Door` lets it become.
    self._thread = ThreadPoolExecutor(1)
    self.most_k = min(MOST_K, recommender.most_k)
    longest, self.no_texts = MOST_IDS, {}
    if users := recommender.known_users:
      longest = max(longest, int(np.diff(users.offsets).max()))
      for name, (tokens, mask) in users.preferences.items():
        self.no_texts[name] = np.zeros_like(tokens[:1]), np.zeros_like(mask[:1])
    self._left_out = longest + MOST_IDS
    job = Job(recommender.ask([recommender.item_ids[:1]], 1), 1, None, self.no_texts)
    for size in recommender.batch_sizes:
      if size <= most:
        self._rank([job] * size)

  async def answer(self, job: Job) -> Answer:
    """Waits for the job's turn and answers it."""
    future = asyncio.get_running_loop().create_future()
    self._waiting.put_nowait((job, future))
    return await future

  async def run(self) -> None:
    """Answers jobs for ever."""
    loop = asyncio.get_running_loop()
    while True:
      batch = [await self._waiting.get()]
      if self._waiting.qsize() < self._most - 1:
        await asyncio.sleep(self._wait_seconds)
      while len(batch) < self._most and not self._waiting.empty():
        batch.append(self._waiting.get_nowait())
      jobs, futures = zip(*batch, strict=True)
      BATCHES.observe(len(jobs))
      try:
        answers = await loop.run_in_executor(self._thread, self._rank, jobs)
      except Exception as error:  # Of the device: these requests fail, the next may do well.
        answers = [error] * len(jobs)
      for future, answer in zip(futures, answers, strict=True):
        if not future.done():
          settle = future.set_exception if isinstance(answer, Exception) else future.set_result
          settle(answer)

  def _rank(self, jobs: Sequence[Job]) -> list[Answer]:
    # Users are ranked among the same items, so that jobs go together whose filter is the same.
    groups: dict[Any, list[int]] = {}
    for i, job in enumerate(jobs):
      groups.setdefault(job.only, []).append(i)
    answers: list[Any] = [None] * len(jobs)
    for rows in groups.values():
      part = [jobs[i] for i in rows]
      found = self._recommender.rank(
        [_padded(job.asked.known[0], self._recommender.max_length) for job in part],
        self.most_k,
        [_padded(job.asked.left_out[0], self._left_out) for job in part],
        part[0].asked.allowed,
        np.concatenate([job.asked.emphasis for job in part]),
        {
          name: tuple(map(np.concatenate, zip(*(job.texts[name] for job in part), strict=True)))
          for name in self.no_texts
        },
      )
      for at, i in enumerate(rows):
        of_one = (values[at : at + 1, : jobs[i].k] for values in found)
        answers[i] = self._recommender.named(jobs[i].asked.unknown, *of_one)
    return answers


def _padded(ids: np.ndarray, length: int) -> np.ndarray:
  """One length for all, so that one program a batch size is enough; 0 is no item."""
  return np.pad(ids[-length:], (max(length - len(ids), 0), 0))


class Door:
  """Stands before the application: limits bodies, and how many requests are inside at once.

  It does so before anything is parsed, because refusing must cost little when there is too much to
  do. What it has let in is answered.
  """

  def __init__(self, app: Callable, most_inside: int):
    """Takes an ASGI application, and the number of requests that may be inside."""
    self._app, self._most_inside = app, most_inside
    self.inside = self.accepted = self.answered = 0

  async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
    elif scope['path'] in ('/health', '/metrics'):  # Wanted most when there is too much to do.
      await self._pass_on(scope, receive, send)
    elif self.inside >= self._most_inside:
      await self._answer(_REFUSED, scope, receive, send)
    else:
      start = time.perf_counter()
      self.inside += 1
      try:
        await self._pass_on(scope, receive, send)
      finally:
        self.inside -= 1
        SECONDS.observe(time.perf_counter() - start)

  async def _pass_on(self, scope, receive, send) -> None:
    body, size, is_whole = bytearray(), 0, False
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(READ_SECONDS):
        while not is_whole:
          message = await receive()
          if message['type'] == 'http.disconnect':
            return
          part = message.get('body', b'')
          size += len(part)
          # What is too long is read and thrown away: who still sends does not read the answer.
          if size <= MOST_BYTES:
            body += part
          is_whole = not message.get('more_body', False)
    if size > MOST_BYTES:
      problem = _problem(413, f'the body has more than {MOST_BYTES:,} bytes')
      return await self._answer(problem, scope, receive, send)
    if not is_whole:
      problem = _problem(408, f'the body did not come within {READ_SECONDS} s')
      return await self._answer(problem, scope, receive, send)
    messages = iter([{'type': 'http.request', 'body': bytes(body), 'more_body': False}])

    async def replay():
      return next(messages, None) or await receive()

    self.accepted += 1
    await self._answer(self._app, scope, replay, send)
    self.answered += 1

  async def _answer(self, app, scope, receive, send) -> None:
    async def counting(message):
      if message['type'] == 'http.response.start':
        REQUESTS.labels(message['status']).inc()
      await send(message)

    await app(scope, receive, counting)


def _problem(status: int, detail: str) -> JSONResponse:
  return JSONResponse({'detail': detail}, status)


_REFUSED = _problem(503, 'too many requests at once; try again later')
_REFUSED.headers['Retry-After'] = str(RETRY_SECONDS)


def make_app(recommender: Recommender, batcher: Batcher) -> FastAPI:
  """Builds the application.

  Args:
    recommender: that is served.
    batcher: of the same.
  """
  weight = (float, Field(1.0, ge=0, le=MOST_WEIGHT))
  Weights = create_model('Weights', __base__=Strict, **dict.fromkeys(recommender.branches, weight))
  ids = list[ItemId]

  class Question(Strict):
    """Either `history`, the oldest first, or `user`; `weights` are 1 as trained, 0 without."""

    model_config = ConfigDict(
      json_schema_extra={'oneOf': [{'required': ['history']}, {'required': ['user']}]}
    )
    history: ids = Field(None, min_length=1, max_length=MOST_IDS)
    user: str = Field(None, max_length=256)
    k: Whole = Field(min(10, batcher.most_k), ge=1, le=batcher.most_k)
    only: ids = Field(None, min_length=1, max_length=MOST_IDS)
    without: ids = Field((), max_length=MOST_IDS)
    keep_seen: bool = False
    weights: Weights = Weights()

    @model_validator(mode='after')
    def _one_of_two(self):
      if len(self.model_fields_set & {'history', 'user'}) != 1:
        raise ValueError('give one of history and user')
      return self

  @contextlib.asynccontextmanager
  async def lifespan(_):
    running = asyncio.create_task(batcher.run())
    yield
    running.cancel()

  app = FastAPI(title='ur4rec_jax', lifespan=lifespan, docs_url=None, redoc_url=None)
  problems = lambda *statuses: {status: {'model': Problem} for status in statuses}
  users = recommender.known_users
  user_names = [] if users is None else list(users.index)
  names = zip(recommender.titles, recommender.item_ids, strict=True)
  find_items = make_search([f'{title} {item}' for title, item in names])
  find_users = make_search(user_names)

  @app.exception_handler(RequestValidationError)
  async def on_bad_request(_, error):
    first = error.errors()[0]
    if first['type'] == 'json_invalid':
      return _problem(400, f'the body is no JSON: {first["ctx"]["error"]}')
    where = '.'.join(str(part)[:80] for part in first['loc'][1:])
    return _problem(422, f'{where}: {first["msg"]}' if where else first['msg'])

  @app.post('/recommend', responses=problems(400, 404, 408, 413, 422, 503))
  async def recommend(question: Question) -> Recommendations:
    """The best items."""
    history, texts = question.history, batcher.no_texts
    try:
      if question.user is not None:
        history, texts = recommender.user(question.user)
      asked = recommender.ask(
        [history],
        question.k,
        only=question.only,
        without=question.without,
        keep_seen=question.keep_seen,
        emphasis=[getattr(question.weights, branch) for branch in recommender.branches],
        preferences=texts,
      )
    except InputError as error:  # What is left to be wrong are unknown ids.
      raise HTTPException(404, str(error)) from error
    only = None if question.only is None else tuple(question.only)
    answer = await batcher.answer(Job(asked, question.k, only, texts))
    known = len(asked.known[0])
    return JSONResponse(
      {
        'user': question.user,
        'history': {'items': known, 'read': min(known, recommender.max_length)},
        'unknown': answer.unknown[0],
        'recommendations': recommender.rows(answer),
      }
    )

  content = _PAGE.read_bytes()
  named = lambda i: {'item': recommender.item_ids[i], 'title': recommender.titles[i]}
  Search = Annotated[str, Query(max_length=256)]

  @app.get('/items', responses=problems(422, 503))
  def items(search: Search = '') -> list[Item]:
    """Items by a part of their title or id, whatever its case."""
    return [named(i) for i in find_items(search)]

  @app.get('/users', responses=problems(422, 503))
  def users_(search: Search = '') -> list[str]:
    """Known users by a part of their id."""
    return [user_names[i] for i in find_users(search)]

  @app.get('/history', responses=problems(404, 422, 503))
  async def history(user: Annotated[str, Query(max_length=256)]) -> list[Item]:
    """What a known user has, the oldest first."""
    try:
      known, _ = recommender.lookup(recommender.user(user)[0])
    except InputError as error:
      raise HTTPException(404, str(error)) from error
    return [named(i - 1) for i in known]

  @app.get('/health')
  async def health() -> Health:
    """Answers as soon as requests are."""
    return Health(
      status='ok',
      dataset=recommender.about.get('dataset', {}).get('name', ''),
      items=len(recommender.item_ids),
      users=len(user_names),
      paths=recommender.branches,
      share_names=recommender.share_names,
      max_length=recommender.max_length,
      most_k=batcher.most_k,
    )

  @app.get('/metrics', response_class=PlainTextResponse)
  async def metrics() -> str:
    """For Prometheus."""
    return PlainTextResponse(generate_latest())

  @app.get('/', include_in_schema=False)
  async def page() -> HTMLResponse:
    return HTMLResponse(content, headers=_PAGE_HEADERS)

  return app


def make_search(texts: Sequence[str]) -> Callable[[str], list[int]]:
  """Builds a function that finds the places of texts that hold a part, whatever its case."""
  lines = [text.casefold().replace('\n', ' ') for text in texts]
  whole = '\n'.join(lines)  # One scan of one string is fast enough for a million titles.
  ends = np.cumsum([len(line) + 1 for line in lines])

  def search(part: str) -> list[int]:
    part, found, at = part.casefold().replace('\n', ' '), [], 0
    while len(found) < MOST_FOUND and lines and (at := whole.find(part, at)) >= 0:
      found.append(int(np.searchsorted(ends, at, side='right')))
      at = int(ends[found[-1]])
    return found

  return search


def _open_port(host: str, port: int) -> socket.socket:
  try:
    return socket.create_server((host, port), backlog=2048)
  except (OSError, OverflowError) as error:
    raise InputError(
      f'--host={host} --port={port}: cannot be opened ({error}); give others, --port=0 for any free'
    ) from error


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, compiles, and serves until SIGTERM or Ctrl-C."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--export', required=True, help='folder that ur4rec_jax.export wrote')
  add('--host', default='127.0.0.1', help='0.0.0.0 for all networks')
  add('--port', type=int, default=8000)
  add('--batch', type=int, default=64, choices=BATCH_SIZES, help='requests at once')
  add('--wait_ms', type=float, default=2, help='how long a batch waits for more requests')
  add('--queue', type=int, default=256, help='requests inside at once; more are refused by a 503')
  flags = parser.parse_args(argv)
  for name, least in (('wait_ms', 0), ('queue', 1)):
    if not least <= getattr(flags, name) <= 100_000:
      raise InputError(f'--{name}={getattr(flags, name)}: must be from {least} to 100000')
  for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn has its own, and comes back to these.
    signal.signal(number, lambda *_: sys.exit(0))
  start = time.monotonic()
  recommender = exported.load(flags.export)
  batcher = Batcher(recommender, flags.batch, flags.wait_ms / 1000)
  door = Door(make_app(recommender, batcher), flags.queue)
  INSIDE.set_function(lambda: door.inside)
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: event.endswith('backend_compile_duration') and COMPILED.inc()
  )
  with _open_port(flags.host, flags.port) as listening:
    host, port = listening.getsockname()[:2]
    took = time.monotonic() - start
    print(f'ready after {took:.1f} s: http://{host}:{port}', flush=True)
    config = uvicorn.Config(
      door,
      http='httptools',
      ws='none',
      lifespan='on',
      log_level='warning',
      access_log=False,
      server_header=False,
      timeout_keep_alive=75,
      timeout_graceful_shutdown=STOP_SECONDS,
    )
    try:
      uvicorn.Server(config).run(sockets=[listening])
    finally:
      print(
        f'stopped: {door.answered:,} of {door.accepted:,} accepted requests answered', flush=True
      )


if __name__ == '__main__':
  main()

"""Ranks the requests of many clients together, in batches whose sizes are compiled in advance."""

import asyncio
import collections
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import Histogram

from ur4rec_jax.inference.query import Answer, CheckedQuery, Query, Ranking
from ur4rec_jax.inference.recommender import BATCH_SIZES, Recommender
from ur4rec_jax.inference.rules import Rules

# These limits of a request are also the input shapes for which the programs are compiled.
MOST_IDS = 1000  # Limit for a history, and for each of the filters.
MOST_K = 100
BATCHES = Histogram(
  'ur4rec_batch_users', 'Requests that were ranked together.', buckets=BATCH_SIZES
)


# Few users have more distinct items than this share of all users. The requests of these few are
# ranked alone, so that the width of the others' batches does not grow with the longest history.
_USUAL_SHARE = 0.99
# Sizes, numbers of items and numbers of excluded items for which each program is compiled.
_compiled: weakref.WeakKeyDictionary[Callable, set[tuple[int, int, int]]]
_compiled = weakref.WeakKeyDictionary()


class Job(NamedTuple):
  """One request.

  Attributes:
    query: the query of a single user.
    only: the request's filter `only`, or None. Jobs with the same filter share a batch.
    client: the client that asks. Clients take turns.
    rules: the rules that make the list, or None.
  """

  query: CheckedQuery
  only: Hashable
  client: Hashable = None
  rules: Rules | None = None


class Waiting(NamedTuple):
  """A job that waits for its batch.

  Attributes:
    job: the job.
    key: jobs with the same key may share a batch.
    answer: future of the answer.
    since: when the job came, in seconds of the event loop's clock.
  """

  job: Job
  key: Hashable
  answer: asyncio.Future
  since: float


class Line:
  """The queue of jobs. Clients take turns, so that no client waits for all jobs of another."""

  def __init__(self) -> None:
    self._waiting: list[Waiting] = []
    self._turns = itertools.count(1)
    self._last_turn: dict[Hashable, int] = {}  # For clients with waiting jobs.
    self._is_filled = asyncio.Event()

  def __len__(self) -> int:
    return len(self._waiting)

  def put(self, waiting: Waiting) -> None:
    """Adds a job."""
    self._waiting.append(waiting)
    self._is_filled.set()

  async def first(self) -> Waiting:
    """Waits until there is a job, and returns the one that came first."""
    await self._is_filled.wait()
    return self._waiting[0]

  def take(self, most: int) -> list[Waiting]:
    """Takes the next job and others that may share its batch.

    Args:
      most: the most jobs to take.
    """
    key = min(self._waiting, key=lambda entry: self._last_turn.get(entry.job.client, 0)).key
    counts: collections.Counter = collections.Counter()
    order = []
    for i, entry in enumerate(self._waiting):
      if entry.key == key:
        order.append((counts[entry.job.client], i))
        counts[entry.job.client] += 1
    chosen = {i for _, i in sorted(order)[:most]}
    taken = [entry for i, entry in enumerate(self._waiting) if i in chosen]
    self._waiting = [entry for i, entry in enumerate(self._waiting) if i not in chosen]
    turns = self._last_turn | dict.fromkeys((e.job.client for e in taken), next(self._turns))
    self._last_turn = {e.job.client: turns.get(e.job.client, 0) for e in self._waiting}
    if not self._waiting:
      self._is_filled.clear()
    return taken


class Batcher:
  """Collects jobs and ranks them together.

  Attributes:
    most_k: the most items that a request can ask for.
    no_texts: empty tokens and masks, for a user without texts.
  """

  def __init__(
    self, recommender: Recommender, most_jobs: int, wait_seconds: float, most_waiting: int = 256
  ):
    """Compiles a program for each batch size, unless an earlier batcher has.

    Args:
      recommender: ranks the jobs.
      most_jobs: the most jobs in a batch.
      wait_seconds: how long the first job of a batch waits for others.
      most_waiting: the most jobs that `has_room` lets wait.
    """
    self._recommender, self._most_jobs = recommender, most_jobs
    self._wait_seconds, self._most_waiting = wait_seconds, most_waiting
    self._line = Line()  # AdmissionControl limits the requests in it, `has_room` the rest.
    self._thread = ThreadPoolExecutor(1)
    self.most_k = min(MOST_K, recommender.most_k)
    self.no_texts: dict[str, Any] = {}
    most_seen = MOST_IDS
    if users := recommender.known_users:
      if len(users.index):  # All of them may have been deleted.
        counts = np.diff(users.seen_offsets)
        most_seen = max(most_seen, int(np.quantile(counts, _USUAL_SHARE)))
      for name, (tokens, mask) in users.preferences.items():
        self.no_texts[name] = _one_empty(tokens), _one_empty(mask)
    self._most_excluded = most_seen + MOST_IDS
    query = Query([recommender.item_ids[:1]], 1, preferences=self.no_texts)
    job = Job(recommender.check(query), None)
    compiled = _compiled.setdefault(recommender.program, set())
    for size in recommender.batch_sizes:
      shape = size, self.most_k, self._most_excluded
      # A model after an update has the program of the one before. A batch of one shows that it can
      # rank; larger ones would make the requests wait.
      if size == 1 or (size <= most_jobs and shape not in compiled):
        self._rank([job] * size)
        compiled.add(shape)

  def has_room(self, jobs: int) -> bool:
    """Returns whether so many jobs of one request would not make all others wait too long."""
    return not self._line or len(self._line) + jobs <= self._most_waiting

  def answer(self, job: Job) -> asyncio.Future[Answer]:
    """Lets the job wait at once, so that `has_room` counts it, and returns its answer to be."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    is_usual = len(job.query.excluded[0]) <= self._most_excluded
    # The program takes one set of allowed items per batch, so each filter needs its own batch.
    key = job.only, None if is_usual else id(job)
    self._line.put(Waiting(job, key, future, loop.time()))
    return future

  async def run(self) -> None:
    """Ranks jobs until the task is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
      batch = await self._next_batch()
      BATCHES.observe(len(batch))
      jobs = [waiting.job for waiting in batch]
      answers = await loop.run_in_executor(self._thread, self._rank_or_fail, jobs)
      for waiting, answer in zip(batch, answers, strict=True):
        future = waiting.answer
        if not future.done():
          settle = future.set_exception if isinstance(answer, Exception) else future.set_result
          settle(answer)

  def close(self) -> None:
    """Ends the thread, when all jobs are answered."""
    self._thread.shutdown(wait=False)

  async def _next_batch(self) -> list[Waiting]:
    first = await self._line.first()
    # Jobs that came while the last batch was ranked have waited already.
    seconds = first.since + self._wait_seconds - asyncio.get_running_loop().time()
    if len(self._line) < self._most_jobs and seconds > 0:
      await asyncio.sleep(seconds)
    return self._line.take(self._most_jobs)

  def _rank_or_fail(self, jobs: Sequence[Job]) -> list[Answer | Exception]:
    """Ranks jobs; if that fails, each job alone, so that only those that cause it fail."""
    try:
      return self._rank(jobs)
    except Exception as error:  # An error of the device must not end the service.
      if len(jobs) == 1:
        return [error]
      return [answer for job in jobs for answer in self._rank_or_fail([job])]

  def _rank(self, jobs: Sequence[Job]) -> list[Answer]:
    """Ranks jobs that may share a batch."""
    queries = [job.query for job in jobs]
    if len(queries[0].excluded[0]) > self._most_excluded:
      queries = [self._recommender.exclude_for_all(query) for query in queries]
    ranking = self._recommender.rank(self._joined(queries))
    answers = []
    for row, (query, job) in enumerate(zip(queries, jobs, strict=True)):
      if job.rules is not None:  # Rules choose among all ranked items.
        of_one = Ranking(*(values[row : row + 1] for values in ranking))
        answers.append(self._recommender.apply_rules(job.query, of_one, job.rules))
        continue
      of_one = Ranking(*(values[row : row + 1, : query.k] for values in ranking))
      answers.append(self._recommender.to_answer(query, of_one))
    return answers

  def _joined(self, queries: Sequence[CheckedQuery]) -> CheckedQuery:
    """Returns one query for all users, padded so that one program per batch size is enough."""
    preferences = {}
    for name in self.no_texts:
      tokens, masks = zip(*(query.preferences[name] for query in queries), strict=True)
      preferences[name] = np.concatenate(tokens), np.concatenate(masks)
    return CheckedQuery(
      [_padded(query.histories[0], self._recommender.max_length) for query in queries],
      self.most_k,
      [_padded(query.excluded[0], self._most_excluded) for query in queries],
      queries[0].allowed,
      np.concatenate([query.weights for query in queries]),
      preferences,
    )


def _one_empty(rows: np.ndarray) -> np.ndarray:
  """Returns `[1, ...]` zeros like each of the rows, of which there may be none."""
  return np.zeros((1, *rows.shape[1:]), rows.dtype)


def _padded(ids: np.ndarray, length: int) -> np.ndarray:
  """Returns the last `length` ids, padded at the start with zeros, which are no item."""
  return np.pad(ids[-length:], (max(length - len(ids), 0), 0))

"""Ranks the requests of many clients together, in batches of sizes that were compiled before."""

import asyncio
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import Histogram

from ur4rec_jax.inference.query import Answer, CheckedQuery, Query, Ranking
from ur4rec_jax.inference.recommender import BATCH_SIZES, Recommender

# These limits of a request are also the input shapes for which the programs are compiled.
MOST_IDS = 1000  # In a history, and in each of the filters.
MOST_K = 100
BATCHES = Histogram(
  'ur4rec_batch_users', 'Requests that were ranked together.', buckets=BATCH_SIZES
)


class Job(NamedTuple):
  """One request.

  Attributes:
    query: the query of a single user.
    only: the request's filter `only`, or None. Jobs with the same filter share a batch.
  """

  query: CheckedQuery
  only: Hashable


class Batcher:
  """Collects jobs and ranks them together.

  Attributes:
    most_k: the most items that a request can ask for.
    no_texts: texts of a user without texts.
  """

  def __init__(self, recommender: Recommender, most_jobs: int, wait_seconds: float):
    """Compiles a program for each batch size.

    Args:
      recommender: ranks the jobs.
      most_jobs: the most jobs in a batch.
      wait_seconds: how long the first job of a batch waits for others.
    """
    self._recommender, self._most_jobs = recommender, most_jobs
    self._wait_seconds = wait_seconds
    self._waiting: asyncio.Queue = asyncio.Queue()  # AdmissionControl limits its length.
    self._thread = ThreadPoolExecutor(1)
    self.most_k = min(MOST_K, recommender.most_k)
    self.no_texts: dict[str, Any] = {}
    longest_history = MOST_IDS
    if users := recommender.known_users:
      longest_history = max(longest_history, int(np.diff(users.offsets).max()))
      for name, (tokens, mask) in users.preferences.items():
        self.no_texts[name] = np.zeros_like(tokens[:1]), np.zeros_like(mask[:1])
    self._most_excluded = longest_history + MOST_IDS
    query = Query([recommender.item_ids[:1]], 1, preferences=self.no_texts)
    job = Job(recommender.check(query), None)
    for size in recommender.batch_sizes:
      if size <= most_jobs:
        self._rank([job] * size)

  async def answer(self, job: Job) -> Answer:
    """Waits until the job was ranked and returns its answer."""
    future = asyncio.get_running_loop().create_future()
    self._waiting.put_nowait((job, future))
    return await future

  async def run(self) -> None:
    """Ranks jobs until the task is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
      jobs, futures = zip(*await self._next_batch(), strict=True)
      BATCHES.observe(len(jobs))
      try:
        answers = await loop.run_in_executor(self._thread, self._rank, jobs)
      except Exception as error:  # An error of the device fails these jobs, not the service.
        answers = [error] * len(jobs)
      for future, answer in zip(futures, answers, strict=True):
        if not future.done():
          settle = future.set_exception if isinstance(answer, Exception) else future.set_result
          settle(answer)

  async def _next_batch(self) -> list[tuple[Job, asyncio.Future]]:
    batch = [await self._waiting.get()]
    if self._waiting.qsize() < self._most_jobs - 1:
      await asyncio.sleep(self._wait_seconds)
    while len(batch) < self._most_jobs and not self._waiting.empty():
      batch.append(self._waiting.get_nowait())
    return batch

  def _rank(self, jobs: Sequence[Job]) -> list[Answer]:
    # The program takes one set of allowed items per batch, so each filter needs its own batch.
    groups: dict[Hashable, list[int]] = {}
    for i, job in enumerate(jobs):
      groups.setdefault(job.only, []).append(i)
    answers: dict[int, Answer] = {}
    for indices in groups.values():
      queries = [jobs[i].query for i in indices]
      ranking = self._recommender.rank(self._joined(queries))
      for row, (i, query) in enumerate(zip(indices, queries, strict=True)):
        of_one = Ranking(*(values[row : row + 1, : query.k] for values in ranking))
        answers[i] = self._recommender.to_answer(query, of_one)
    return [answers[i] for i in range(len(jobs))]

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


def _padded(ids: np.ndarray, length: int) -> np.ndarray:
  """Brings ids to a length: drops the first ones, or puts zeros before them, which are no item."""
  return np.pad(ids[-length:], (max(length - len(ids), 0), 0))

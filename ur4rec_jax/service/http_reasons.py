"""Adds reasons for the recommended items to an answer of the service."""

import asyncio
import dataclasses
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ur4rec_jax.inference import influences, reasons
from ur4rec_jax.inference.passages import closest
from ur4rec_jax.service.batcher import Job

if TYPE_CHECKING:
  from ur4rec_jax.service.http_app import Model

MOST_LEFT_OUT = 50  # The latest items of a history, which are left out one by one to explain.


async def add_reasons(
  model: 'Model', job: Job, rows: Sequence[dict[str, Any]], told: Container[int] | None
) -> list[str]:
  """Adds `because`, `why` and `sentence` to recommended items; see `http_schema.Recommended`.

  Args:
    model: the model that recommended them.
    job: the question that it answered.
    rows: the recommended items.
    told: numbers of the items of the history that may be named; None for all.

  Returns:
    Remarks for the reader: why no item of the history is named, if none can be named now.
  """
  if not rows:
    return []
  recommender, passages = model.recommender, model.passages
  numbers = np.array([recommender.number_of(row['item']) for row in rows], np.int32)
  history = job.query.histories[0][-recommender.max_length :]
  left_out = history[-MOST_LEFT_OUT:]
  found = np.zeros((len(left_out), len(numbers)))
  remarks = _why_not(model, 1 + len(left_out))
  if not remarks:
    found = await _influences(model, job, history, numbers)
  if told is not None:
    found[[item not in told for item in left_out.tolist()]] = 0
  for row, number, column in zip(rows, numbers, found.T, strict=True):
    named = reasons.because(column, left_out, recommender.item_ids, recommender.titles)
    row['because'] = named
    row['why'] = reasons.why(named)
    if passages:
      about = [passages[recommender.number_of(item['item']) - 1] for item in named]
      text = ' '.join([*(item['title'] for item in named), *(x for own in about for x in own)])
      row['sentence'] = closest(passages[number - 1], text) or ''
  return remarks


def _why_not(model: 'Model', jobs: int) -> list[str]:
  """Returns the reason if influences cannot be measured by so many jobs, otherwise nothing."""
  count, most = len(model.recommender.item_ids), model.batcher.most_k
  if model.recommender.compares_ranks and count > most:  # It would need another program.
    return [
      f'no item of the history is named: scores of this model are made of ranks among all {count:,}'
      f' items, of which the service compares {most} at most; recommend --explain names them'
    ]
  if not model.batcher.has_room(jobs):
    return ['no item of the history is named, because the service is busy; ask again later']
  return []


async def _influences(
  model: 'Model', job: Job, history: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
  """Measures how much the scores of items fall without each of the latest items of a history.

  Returns:
    `[left out, items]`.
  """
  recommender, batcher = model.recommender, model.batcher
  num_items = len(recommender.item_ids)
  compared = influences.reference(num_items, recommender.compares_ranks)
  whole = dataclasses.replace(job.query, histories=[history])
  query = influences.leave_one_out(
    whole, numbers, compared, num_items, recommender.branches, MOST_LEFT_OUT
  )
  only = 'why', np.flatnonzero(query.allowed).tobytes()
  jobs = [Job(query.select(np.array([i])), only, job.client) for i in range(len(query.histories))]
  answers = await asyncio.gather(*map(batcher.answer, jobs))
  ids = np.array([[*map(recommender.number_of, x.items[0])] for x in answers], np.int32)
  scores = np.array([x.scores[0] for x in answers])
  return influences.influences(ids, scores, numbers, compared)

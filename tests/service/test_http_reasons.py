"""The reasons that the service gives are those of the whole history."""

import asyncio

import pytest

from tests.helpers.recommenders import make
from ur4rec_jax.inference import reasons
from ur4rec_jax.inference.query import Query
from ur4rec_jax.service import http_reasons
from ur4rec_jax.service.batcher import Batcher, Job
from ur4rec_jax.service.http_app import Model


def test_items_that_are_not_left_out_still_belong_to_the_history(shop, monkeypatch):
  recommender = make(shop, 'sasrec')[0]
  history, most = recommender.item_ids[:12], 4
  monkeypatch.setattr(http_reasons, 'MOST_LEFT_OUT', most)
  batcher = Batcher(recommender, most_jobs=4, wait_seconds=0)
  query = recommender.check(Query([history], 5))
  rows = recommender.recommendations(recommender.ask(Query([history], 5)))

  async def explain():
    running = asyncio.create_task(batcher.run())
    await http_reasons.add_reasons(Model(recommender, batcher), Job(query, None), rows, None)
    running.cancel()

  asyncio.run(explain())
  expected = recommender.influences(history, [row['item'] for row in rows])[-most:]
  numbers = recommender.lookup(history[-most:])[0]
  for row, column in zip(rows, expected.T, strict=True):
    named = reasons.because(column, numbers, recommender.item_ids, recommender.titles)
    assert [found['item'] for found in row['because']] == [found['item'] for found in named]
    for found, known in zip(row['because'], named, strict=True):
      assert found['influence'] == pytest.approx(known['influence'], abs=1e-5)
  assert any(row['because'] for row in rows)


@pytest.mark.parametrize('name', ['rank', 'text'])
def test_an_answer_that_cannot_be_explained_says_so(shop, monkeypatch, name):
  recommender = make(shop, name)[0]
  monkeypatch.setattr(Batcher, '_rank', lambda *_: [])  # Nothing is ranked, or compiled, here.
  batcher = Batcher(recommender, most_jobs=1, wait_seconds=0)
  batcher.most_k = len(recommender.item_ids) - 1  # As with more items than the service compares.
  query = recommender.check(Query([recommender.item_ids[:2]], 5))
  rows = [{'item': item} for item in recommender.item_ids[7:9]] if name == 'rank' else []
  model = Model(recommender, batcher)
  notes = asyncio.run(http_reasons.add_reasons(model, Job(query, None), rows, None))
  assert [row['because'] for row in rows] == [[]] * len(rows)
  if name == 'rank':
    (note,) = notes
    assert note.startswith('no item of the history is named: scores of this model are made of')
    assert 'among all 60 items, of which the service compares 59 at most' in note
  else:
    assert notes == []


def test_a_busy_service_leaves_reasons_out_and_says_so(shop):
  recommender = make(shop, 'sasrec')[0]
  batcher = Batcher(recommender, most_jobs=4, wait_seconds=0, most_waiting=8)
  history = recommender.item_ids[:6]  # Reasons rank it seven times.
  job = Job(recommender.check(Query([history], 5)), None)

  async def explain(waiting):
    rows = recommender.recommendations(recommender.ask(Query([history], 5)))
    others = [batcher.answer(job) for _ in range(waiting)]
    explaining = asyncio.create_task(
      http_reasons.add_reasons(Model(recommender, batcher), job, rows, None)
    )
    await asyncio.sleep(0)
    running = asyncio.create_task(batcher.run())
    notes = await explaining
    await asyncio.gather(*others)
    running.cancel()
    return rows, notes

  rows, notes = asyncio.run(explain(waiting=1))
  assert notes == []
  assert any(row['because'] for row in rows)
  rows, notes = asyncio.run(explain(waiting=2))
  assert notes == ['no item of the history is named, because the service is busy; ask again later']
  assert [(row['because'], row['why']) for row in rows] == [([], '')] * 5


def test_questions_for_reasons_that_come_at_once_are_counted_together(shop):
  recommender = make(shop, 'sasrec')[0]
  batcher = Batcher(recommender, most_jobs=4, wait_seconds=0, most_waiting=16)
  history = recommender.item_ids[:6]  # Reasons rank it seven times.
  job = Job(recommender.check(Query([history], 5)), None)
  model = Model(recommender, batcher)

  async def explain(times):
    rows = recommender.recommendations(recommender.ask(Query([history], 5)))
    copies = [[dict(row) for row in rows] for _ in range(times)]
    running = asyncio.create_task(batcher.run())
    notes = await asyncio.gather(
      *(http_reasons.add_reasons(model, job, copy, None) for copy in copies)
    )
    running.cancel()
    return notes

  notes = asyncio.run(explain(5))
  assert [len(x) for x in notes] == [0, 0, 1, 1, 1]

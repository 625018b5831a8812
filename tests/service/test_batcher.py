"""Which waiting requests are ranked next: clients take turns, and filters do not mix."""

import asyncio
import collections
import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.recommenders import make
from ur4rec_jax.inference.query import Query
from ur4rec_jax.inference.recommender import make_users
from ur4rec_jax.service.batcher import Batcher, Job, Line, Waiting


@settings(max_examples=100)
@given(
  jobs=st.lists(st.tuples(st.sampled_from('abc'), st.sampled_from([None, 'x', 'y'])), max_size=30),
  most=st.integers(1, 5),
)
def test_every_job_is_taken_once_in_batches_of_one_filter(jobs, most):
  line = Line()
  for i, (client, only) in enumerate(jobs):
    line.put(Waiting(Job(i, only, client), only, None, 0))
  taken = []
  while len(line):
    batch = line.take(most)
    assert 1 <= len(batch) <= most
    assert len({entry.key for entry in batch}) == 1
    taken += batch
  assert sorted(entry.job.query for entry in taken) == list(range(len(jobs)))
  order = collections.defaultdict(list)
  for entry in taken:
    order[entry.job.client, entry.key].append(entry.job.query)
  assert all(numbers == sorted(numbers) for numbers in order.values())


def test_a_client_waits_for_one_batch_of_another_at_most():
  line = Line()
  for i in range(50):
    line.put(Waiting(Job(i, i, 'flood'), i, None, 0))
  line.take(4)
  line.put(Waiting(Job('honest', None, 'honest'), None, None, 0))
  assert [entry.job.query for entry in line.take(4)] == ['honest']


def test_jobs_that_waited_during_the_last_batch_are_ranked_at_once(shop):
  an_hour = 3600
  batcher = Batcher(make(shop, 'sasrec')[0], most_jobs=4, wait_seconds=an_hour)

  async def next_batch(waited):
    since = asyncio.get_running_loop().time() - waited
    batcher._line.put(Waiting(Job('old', None), None, None, since))
    batcher._line.put(Waiting(Job('new', None), None, None, since + waited))
    batch = await asyncio.wait_for(batcher._next_batch(), 1)
    return [waiting.job.query for waiting in batch]

  assert asyncio.run(next_batch(an_hour)) == ['old', 'new']
  with pytest.raises(TimeoutError):
    asyncio.run(next_batch(an_hour / 2))


@pytest.fixture
def with_long_user(shop):
  """A recommender that knows 200 users with one item, and one with 20,000 plays of all items."""
  recommender = make(shop, 'sasrec')[0]
  counts = [*[1] * 200, 20_000]
  offsets = np.concatenate([[0], np.cumsum(counts)])
  items = (np.arange(offsets[-1]) % 60 + 1).astype(np.int32)
  names = [f'u{i}' for i in range(200)] + ['radio']
  recommender.known_users = make_users(names, offsets, items, {})
  yield recommender
  recommender.known_users = None


def test_the_width_of_batches_does_not_grow_with_plays(with_long_user):
  recommender = with_long_user
  seen = recommender.known_user('radio')[0]
  assert (len(seen.items), len(seen.seen)) == (20_000, 60)
  batcher = Batcher(recommender, most_jobs=1, wait_seconds=0)
  assert batcher._most_excluded == 2000


def test_a_model_with_the_program_of_another_ranks_one_batch_to_begin_with(shop, monkeypatch):
  recommender = make(shop, 'sasrec')[0]
  monkeypatch.setattr(recommender, 'program', jax.jit(recommender.program.__wrapped__))
  sizes, rank = [], recommender.rank
  counted = lambda query: sizes.append(len(query.histories)) or rank(query)
  monkeypatch.setattr(recommender, 'rank', counted)
  for most_jobs, expected in ((4, [1, 4]), (4, [1]), (16, [1, 16])):
    sizes.clear()
    Batcher(recommender, most_jobs, wait_seconds=0)
    assert sizes == expected


def test_a_model_whose_users_were_all_deleted_is_served(shop, monkeypatch):
  recommender = make(shop, 'paper')[0]
  none = {
    name: (np.zeros((0, *shape), np.float32), np.zeros((0, shape[0]), bool))
    for name, shape in recommender.settings.preferences.items()
  }
  users = make_users([], np.zeros(1, int), np.zeros(0, np.int32), none)
  history = recommender.item_ids[:3]
  expected = recommender.ask(Query([history], 5))
  monkeypatch.setattr(recommender, 'known_users', users)
  batcher = Batcher(recommender, most_jobs=1, wait_seconds=0)

  async def ask():
    running = asyncio.create_task(batcher.run())
    query = recommender.check(Query([history], 5, preferences=batcher.no_texts))
    answer = await batcher.answer(Job(query, None))
    running.cancel()
    return answer

  assert none
  assert asyncio.run(ask()).items == expected.items


def test_a_user_of_unusually_many_items_gets_the_same_answer_alone(shop, monkeypatch):
  recommender = make(shop, 'sasrec')[0]
  monkeypatch.setattr('ur4rec_jax.service.batcher.MOST_IDS', 10)
  batcher = Batcher(recommender, most_jobs=4, wait_seconds=0)
  ids = recommender.item_ids
  histories = [ids[:40], ids[3:5], ids[5:50]]
  queries = [Query([history], 5, only=only) for history in histories for only in (None, ids[30:])]

  async def ask():
    running = asyncio.create_task(batcher.run())
    jobs = [Job(recommender.check(q), None if q.only is None else tuple(q.only)) for q in queries]
    answers = await asyncio.gather(*map(batcher.answer, jobs))
    running.cancel()
    return answers

  for query, answer in zip(queries, asyncio.run(ask()), strict=True):
    expected = recommender.ask(query)
    assert answer.items == expected.items
    np.testing.assert_allclose(answer.scores[0], expected.scores[0], atol=1e-5)


def test_a_job_that_cannot_be_ranked_fails_alone(shop):
  recommender = make(shop, 'sasrec')[0]
  batcher = Batcher(recommender, most_jobs=4, wait_seconds=0.01)
  good = Job(recommender.check(Query([recommender.item_ids[:2]], 3)), None)
  bad = good._replace(query=dataclasses.replace(good.query, histories=[None]))

  async def ask():
    running = asyncio.create_task(batcher.run())
    found = await asyncio.gather(*map(batcher.answer, [good, bad, good]), return_exceptions=True)
    running.cancel()
    return found

  first, failed, last = asyncio.run(ask())
  assert first.items == last.items == recommender.answer([recommender.item_ids[:2]], 3).items
  assert isinstance(failed, Exception)

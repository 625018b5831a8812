"""Stored events join the exported history, and metrics count what was shown."""

import asyncio
import math

import numpy as np
import pytest
from prometheus_client import REGISTRY

from tests.helpers.recommenders import make
from ur4rec_jax.inference.query import Known
from ur4rec_jax.inference.recommender import Recommender, make_users
from ur4rec_jax.online.events import CLICK, Event, Exposure, History, Shown
from ur4rec_jax.online.feedback_store import open_store
from ur4rec_jax.service.feedback import Coverage, Feedback, join_history


@pytest.fixture(scope='module')
def recommender(shop):
  return make(shop, 'sasrec')[0]


def known(*numbers):
  items = np.array(numbers, np.int32)
  return Known(items, np.unique(items))


@pytest.mark.parametrize(
  ('exported', 'stored', 'until', 'expected'),
  [
    (None, [], 10, []),
    (None, [(3, 1), (2, 20)], 10, [3, 2]),
    ([5, 6], [], 10, [5, 6]),
    ([5, 6], [(7, 11), (5, 12)], 10, [5, 6, 7, 5]),
    # The export was made from the events up to 10, so these two are in it already.
    ([5, 6], [(5, 8), (6, 9), (7, 11)], 10, [5, 6, 7]),
    # Exported times are whole seconds, those of events are not.
    ([5, 6], [(6, 10.7), (7, 11)], 10, [5, 6, 7]),
    # An event of that time that the export lacks, for example of a kind that was not trained on.
    ([5, 6], [(8, 9), (7, 11)], 10, [5, 6, 8, 7]),
    ([5, 6], [(5, 8)], -math.inf, [5, 6, 5]),
  ],
)
def test_an_event_counts_once_before_and_after_a_model_learned_from_it(
  recommender, exported, stored, until, expected
):
  ids = recommender.item_ids
  history = History([ids[n - 1] for n, _ in stored], [time for _, time in stored])
  joined = join_history(recommender, exported and known(*exported), history, until)
  assert joined.items.tolist() == expected
  assert joined.seen.tolist() == sorted(set(expected))
  assert joined.items.dtype == joined.seen.dtype == np.int32


def test_items_that_the_catalogue_lacks_are_left_out_and_not_told(recommender):
  history = History(['nothing', recommender.item_ids[4]], [1, 2])
  joined = join_history(recommender, known(1), history, 0)
  assert joined.items.tolist() == [1, 5]
  assert list(joined.unknown) == []


def test_coverage_counts_each_item_once_and_new_items_each_time(recommender):
  users = make_users(['ann'], np.array([0, 2]), np.array([1, 2], np.int32), {})
  model = Recommender(
    recommender.program, {}, recommender.items, recommender.settings, users
  )  # fmt: skip
  value = lambda name: REGISTRY.get_sample_value(name)
  before = value('ur4rec_shown_new_total')
  coverage = Coverage(model)
  coverage.count([1, 2, 3])
  coverage.count([3, 1])
  assert value('ur4rec_catalogue_coverage') == 3 / len(model.item_ids)
  assert value('ur4rec_shown_new_total') == before + 2


def test_the_lists_of_many_clicks_are_read_once(tmp_path):
  store = open_store(str(tmp_path / 'events.db'))
  reads, read = [], store.shown_in
  store.shown_in = lambda request_ids: reads.append(sorted(request_ids)) or read(request_ids)
  items = tuple(Shown(f'i{n}', 0.5) for n in range(3))
  store.write([], [Exposure('r1', 'ann', 1.7e9, 'click test', 'abc', items)])
  clicks = [
    Event('ann', str(n), f'i{n % 3}', CLICK, 1.7e9, None, 'r1' if n < 8 else 'r2')
    for n in range(10)
  ]
  clicks.append(Event('bob', '1', 'i0', CLICK, 1.7e9, None, 'r1'))  # Not his list.

  async def main():
    feedback = Feedback(store, [CLICK], math.inf)
    running = asyncio.create_task(feedback.run())
    counts = await feedback.add(clicks)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return counts

  assert asyncio.run(main())['accepted'] == 11
  assert reads == [['r1', 'r2']]
  counted = [
    REGISTRY.get_sample_value('ur4rec_clicks_total', {'position': str(n), 'arm': 'click test'})
    for n in (1, 2, 3)
  ]
  assert counted == [3, 3, 2]


def test_whether_a_user_was_deleted_is_told_without_reading_events(tmp_path):
  store = open_store(str(tmp_path / 'events.db'))
  store.delete_user('ann', 1.7e9)
  store.write([Event(user, '1', 'i0', CLICK, 1.8e9) for user in ('ann', 'bob')])
  found, history = [], store.history
  store.history = lambda *arguments: found.append(history(*arguments)) or found[-1]
  feedback = Feedback(store, [CLICK], math.inf)
  are_deleted = [asyncio.run(feedback.is_deleted(user)) for user in ('ann', 'bob', 'nobody')]
  assert are_deleted == [True, False, False]
  assert not any(one.items for one in found)
  store.close()

"""The routes of the service, called without a network."""

import asyncio
import contextlib
import math
import types

import httpx

from tests.helpers.recommenders import make
from ur4rec_jax.online.events import KINDS, Event
from ur4rec_jax.online.feedback_store import open_store
from ur4rec_jax.service.admission import RateLimit
from ur4rec_jax.service.batcher import Batcher
from ur4rec_jax.service.feedback import Feedback
from ur4rec_jax.service.http_app import EventIntake, Model, Service, make_app
from ur4rec_jax.service.http_events import EventRoute


def test_a_network_of_ipv6_addresses_is_one_client_in_the_queue(shop):
  recommender = make(shop, 'sasrec')[0]
  batcher = Batcher(recommender, 1, 0)
  clients = []

  async def ask(address):
    transport = httpx.ASGITransport(
      make_app(Service(Model(recommender, batcher))), client=(address, 5)
    )
    async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
      question = {'history': recommender.item_ids[:2]}
      assert (await client.post('/recommend', json=question)).status_code == 200

  async def main():
    answer = batcher.answer
    batcher.answer = lambda job: clients.append(job.client) or answer(job)
    running = asyncio.create_task(batcher.run())
    for address in ('2001:db8::1', '2001:db8::2:3', '10.0.0.1'):
      await ask(address)
    running.cancel()

  asyncio.run(main())
  assert clients == ['2001:db8::/64', '2001:db8::/64', '10.0.0.1']


def test_a_request_that_names_a_model_gets_no_arm(shop, tmp_path):
  by_name = {name: make(shop, name)[0] for name in ('sasrec', 'text')}
  models = {name: Model(x, Batcher(x, 1, 0), digest=name) for name, x in by_name.items()}
  arms = types.SimpleNamespace(
    choose=lambda user: 'new', models=lambda default: {'old': default, 'new': models['text']}
  )
  history = by_name['sasrec'].item_ids[:3]
  place = str(tmp_path / 'events.db')
  with contextlib.closing(open_store(place)) as store:
    store.write([Event('ann', item, item, 'click', 1.7e9 + n) for n, item in enumerate(history)])

  async def main():
    feedback = Feedback(open_store(place), KINDS, math.inf, outside='')
    intake = EventIntake(feedback, EventRoute(feedback, math.inf), RateLimit(math.inf, 100))
    running = [asyncio.create_task(x.batcher.run()) for x in models.values()]
    running.append(asyncio.create_task(feedback.run()))
    found = {}
    for name, query, own_arms in (
      ('of the arm', '', arms),
      ('served', '&model=sasrec', arms),
      ('compared with', '&model=text', None),
    ):
      app = make_app(Service(models['text' if own_arms is None else 'sasrec'], intake, own_arms))
      transport = httpx.ASGITransport(app)
      async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
        answer = (await client.get(f'/recommend?user=ann&k=5{query}')).json()
      found[name] = answer['request_id'], [row['item'] for row in answer['recommendations']]
    for task in running:
      task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return found

  found = asyncio.run(main())
  expected = {name: x.top([history], 5).items[0] for name, x in by_name.items()}
  assert expected['sasrec'] != expected['text']
  assert found['of the arm'][1] == found['compared with'][1] == expected['text']
  assert found['served'][1] == expected['sasrec']
  with contextlib.closing(open_store(place)) as store:
    logged = {name: store.shown_in([request_id])[0] for name, (request_id, _) in found.items()}
  assert {name: (x.arm, x.model) for name, x in logged.items()} == {
    'of the arm': ('new', 'text'),
    'served': ('', 'sasrec'),
    'compared with': ('', 'text'),
  }

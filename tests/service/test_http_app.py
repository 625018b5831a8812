"""The routes of the service, called without a network."""

import asyncio

import httpx

from tests.helpers.recommenders import make
from ur4rec_jax.service.batcher import Batcher
from ur4rec_jax.service.http_app import Model, make_app


def test_a_network_of_ipv6_addresses_is_one_client_in_the_queue(shop):
  recommender = make(shop, 'sasrec')[0]
  batcher = Batcher(recommender, 1, 0)
  clients = []

  async def ask(address):
    transport = httpx.ASGITransport(make_app(Model(recommender, batcher)), client=(address, 5))
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

"""Who gets into the queue of the service, and in which order the requests of clients are read."""

import asyncio

from ur4rec_jax.service.admission import TURN, AdmissionControl


def scope(client):
  return {
    'type': 'http',
    'path': '/recommend',
    'raw_path': b'/recommend',
    'query_string': b'',
    'headers': [(b'host', b'localhost')],
    'client': (client, 1),
  }


async def receive():
  return {'type': 'http.request', 'body': b'', 'more_body': False}


class App:
  """An application that takes some time to read a request, then waits until it may answer."""

  def __init__(self, ends_turn=True):
    self.read, self.may_answer, self.ends_turn = [], asyncio.Event(), ends_turn

  async def __call__(self, scope, receive, send):
    await asyncio.sleep(0.001)
    self.read.append(scope['client'][0])
    if self.ends_turn:
      scope[TURN].end()
    await self.may_answer.wait()
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})
    await send({'type': 'http.response.body', 'body': b''})


async def statuses_of(admission, app, clients):
  """Sends requests in this order without waiting; returns their statuses."""
  found = [None] * len(clients)

  async def one(i, client):
    async def send(message):
      found[i] = message.get('status', found[i])

    await admission(scope(client), receive, send)

  tasks = [asyncio.create_task(one(i, client)) for i, client in enumerate(clients)]
  await asyncio.sleep(0.2)
  app.may_answer.set()
  await asyncio.gather(*tasks)
  return found


def test_a_full_queue_still_takes_clients_with_less_than_their_share():
  async def run():
    app = App()
    admission = AdmissionControl(app, 4, lambda host: True)
    found = await statuses_of(admission, app, ['flood'] * 6 + ['ann', 'bob', 'flood', 'ann', 'ann'])
    assert found == [200] * 4 + [503] * 2 + [200, 200, 503, 200, 503]
    assert admission.inside == 0
    assert not len(admission._turns)
    # Alone, a client has the whole queue.
    assert await statuses_of(admission, app, ['flood'] * 5) == [200] * 4 + [503]

  asyncio.run(run())


def test_many_clients_with_one_request_each_do_not_make_the_queue_endless():
  async def run():
    app = App()
    admission = AdmissionControl(app, 4, lambda host: True)
    clients = [f'client {i}' for i in range(40)]
    assert await statuses_of(admission, app, clients) == [200] * 8 + [503] * 32
    assert await statuses_of(admission, app, clients[-2:]) == [200] * 2

  asyncio.run(run())


def test_the_addresses_of_one_ipv6_network_are_one_client():
  async def run():
    app = App()
    admission = AdmissionControl(app, 4, lambda host: True)
    flood = [f'2001:db8:1:2::{i}' for i in range(6)]
    assert await statuses_of(admission, app, [*flood, '2001:db8:1:3::1']) == (
      [200] * 4 + [503] * 2 + [200]
    )

  asyncio.run(run())


def test_clients_are_read_in_turn_and_wait_for_their_batch_together():
  async def run():
    app = App()
    admission = AdmissionControl(app, 100, lambda host: True)
    assert await statuses_of(admission, app, ['flood'] * 20 + ['ann']) == [200] * 21
    assert app.read.index('ann') <= 1
    assert admission.answered == 21

  asyncio.run(run())


def test_a_client_who_reads_slowly_does_not_hold_up_the_next_request():
  async def run():
    app = App(ends_turn=False)
    app.may_answer.set()
    admission = AdmissionControl(app, 100, lambda host: True)
    slow, got = asyncio.Event(), []

    async def send_slowly(message):
      await slow.wait()

    async def send(message):
      got.append(message)

    waiting = asyncio.create_task(admission(scope('a'), receive, send_slowly))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(admission(scope('a'), receive, send), 5)
    assert got[0]['status'] == 200
    slow.set()
    await waiting

  asyncio.run(run())

"""Whose request is read next."""

import asyncio
import types

import pytest

from ur4rec_jax.service import turns as turns_module
from ur4rec_jax.service.turns import Turn, Turns


@pytest.fixture
def read(monkeypatch):
  """Takes seconds of the clock that the turns read, and none of the machine's."""
  now = 0.0

  def read(seconds):
    nonlocal now
    now += seconds

  clock = types.SimpleNamespace(perf_counter=lambda: now)
  monkeypatch.setattr(turns_module, 'time', clock)
  return read


def in_order(read, requests, pause=0):
  """Has requests come in this order; returns the clients in the order in which they were read.

  Args:
    read: the fixture.
    requests: client and seconds of reading of each.
    pause: seconds that each waits for something else while it is read.
  """

  async def run():
    turns, order = Turns(), []

    async def ask(client, seconds):
      async with Turn(turns, client):
        order.append(client)
        read(seconds)
        if pause:
          await asyncio.sleep(pause)

    await asyncio.gather(*(ask(*request) for request in requests))
    assert not len(turns)
    return order

  return asyncio.run(run())


def test_who_asks_long_questions_waits_for_who_asks_short_ones(read):
  order = in_order(read, [('flood', 0.01)] * 20 + [('ann', 0)] * 20)
  assert order[0] == 'flood'
  assert order[1:21] == ['ann'] * 20


def test_equal_questions_are_read_in_turn(read):
  order = in_order(read, [('a', 0.002)] * 10 + [('b', 0.002)] * 10)
  assert all(abs(order[:n].count('a') - order[:n].count('b')) <= 1 for n in range(20))


def test_being_away_earns_nothing(read):
  async def run():
    turns, order = Turns(), []

    async def ask(client):
      async with Turn(turns, client):
        order.append(client)
        read(0.002)

    early = [asyncio.create_task(ask('early')) for _ in range(30)]
    while len(order) < 10:
      await asyncio.sleep(0)
    late = [asyncio.create_task(ask('late')) for _ in range(10)]
    await asyncio.gather(*early, *late)
    return order[10:]

  order = asyncio.run(run())
  assert order[:12].count('late') <= 7


def test_a_turn_that_waits_for_something_else_holds_up_its_own_client_alone(read):
  order = in_order(read, [('a', 0), ('a', 0), ('b', 0), ('c', 0)], pause=0.1)
  assert order == ['a', 'b', 'c', 'a']


@pytest.mark.parametrize('iterations', range(4))
def test_whoever_leaves_gives_the_turn_on(iterations):
  async def run():
    turns, order = Turns(), []

    async def ask(client):
      async with Turn(turns, client):
        order.append(client)
        await asyncio.sleep(0)

    asks = [asyncio.create_task(ask('a')) for _ in range(3)]
    for _ in range(iterations):
      await asyncio.sleep(0)
    for leaving in asks[:2]:
      leaving.cancel()
    await asyncio.wait_for(asyncio.gather(ask('a'), ask('b'), asks[2]), 5)
    assert {*order} == {'a', 'b'}
    assert not len(turns)

  asyncio.run(run())

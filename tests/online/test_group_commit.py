"""Requests that come together share a transaction, and each gets its own outcomes."""

import asyncio
import contextlib
import threading
import time

import pytest

from ur4rec_jax.errors import StorageError
from ur4rec_jax.online.events import Event, Exposure, Outcome, Shown
from ur4rec_jax.online.feedback_store import SqliteStore, open_store
from ur4rec_jax.online.group_commit import GroupCommit


class CountingStore(SqliteStore):
  """A store that counts transactions, and takes as long for one as a slow disk."""

  def __init__(self, path, seconds=0.05):
    super().__init__(str(path))
    self.seconds, self.sizes, self.is_broken = seconds, [], False

  def write(self, events, exposures=()):
    if self.is_broken:
      raise StorageError('the disk is gone')
    time.sleep(self.seconds)
    self.sizes.append(len(events))
    return super().write(events, exposures)


def event(name):
  return Event('ann', str(name), 'lamp', 'click', 1.7e9)


def exposure(name):
  return Exposure(name, 'ann', 1.7e9, 'default', 'abc', (Shown('lamp', 0.5),))


@contextlib.asynccontextmanager
async def running(store):
  commit = GroupCommit(store)
  task = asyncio.create_task(commit.run())
  yield commit
  task.cancel()
  with contextlib.suppress(asyncio.CancelledError):
    await task


def test_many_requests_share_few_transactions(tmp_path):
  store = CountingStore(tmp_path / 'events.db')

  async def main():
    async with running(store) as commit:
      requests = [[event(n)] if n % 2 else [event(n), event(n - 1)] for n in range(200)]
      return await asyncio.gather(*map(commit.write, requests))

  outcomes = asyncio.run(main())
  assert len(store.sizes) < 10
  assert sum(store.sizes) == 300
  assert [len(of) for of in outcomes] == [2, 1] * 100
  found = [outcome for of in outcomes for outcome in of]
  assert found.count(Outcome.NEW) == sum(1 for _ in store.events()) == 201


def test_a_failed_transaction_acknowledges_nothing_and_the_next_one_may_succeed(tmp_path):
  store = CountingStore(tmp_path / 'events.db', 0)

  async def main():
    async with running(store) as commit:
      store.is_broken = True
      commit.note(exposure('lost'))
      failed = await asyncio.gather(*(commit.write([event(n)]) for n in range(5)),
                                    return_exceptions=True)  # fmt: skip
      assert [type(error) for error in failed] == [StorageError] * 5
      assert commit.lost_exposures == 1
      store.is_broken = False
      assert await commit.write([event(1)]) == [Outcome.NEW]

  asyncio.run(main())
  assert [found.id for found in store.events()] == ['1']


def test_what_waits_is_written_when_the_service_ends(tmp_path):
  store = CountingStore(tmp_path / 'events.db', 0.02)

  async def main():
    async with running(store) as commit:
      for n in range(50):
        commit.note(exposure(str(n)))
      writing = [asyncio.create_task(commit.write([event(n)])) for n in range(50)]
      await asyncio.sleep(0.01)
    return await asyncio.gather(*writing)

  assert asyncio.run(main()) == [[Outcome.NEW]] * 50
  with contextlib.closing(open_store(str(tmp_path / 'events.db'))) as again:
    assert sum(1 for _ in again.exposures()) == 50


@pytest.mark.parametrize('error', [StorageError('the disk is gone'), ValueError('a fault')])
def test_a_failure_while_the_service_ends_is_told_and_counted(tmp_path, error):
  store = CountingStore(tmp_path / 'events.db')

  has_begun = threading.Event()

  def fail(events, exposures=()):
    has_begun.set()
    time.sleep(0.05)
    raise error

  async def main():
    async with running(store) as commit:
      store.write = fail
      commit.note(exposure('lost'))
      writing = asyncio.create_task(commit.write([event(1)]))
      await asyncio.to_thread(has_begun.wait, 60)
    with pytest.raises(type(error)):
      await asyncio.wait_for(writing, 60)
    assert commit.lost_exposures == 1

  asyncio.run(main())


def test_exposures_are_written_without_events_and_do_not_fill_the_memory(tmp_path):
  store = CountingStore(tmp_path / 'events.db', 0)

  async def main():
    async with running(store) as commit:
      for n in range(10_010):
        commit.note(exposure(str(n)))
      assert commit.lost_exposures == 10
      for _ in range(600):
        await asyncio.sleep(0.1)
        if store.shown_in(['9999']):
          return
      pytest.fail('exposures were not written')

  asyncio.run(main())

"""How the next model is loaded while the current one answers."""

import asyncio
import copy
import gc
import subprocess
import sys
import threading
import time
import weakref

import httpx
import jax
import pytest

from tests.helpers.recommenders import make
from ur4rec_jax.errors import InputError
from ur4rec_jax.export import export
from ur4rec_jax.inference import exported
from ur4rec_jax.service import model_swap
from ur4rec_jax.service.batcher import Batcher
from ur4rec_jax.service.http_app import Model, Service, make_app
from ur4rec_jax.service.model_swap import CurrentModel, Served
from ur4rec_jax.service.precompile import precompile


def test_who_loads_rests_most_of_the_time():
  def load(calls):
    before = time.thread_time()
    for _ in range(calls):
      len(range(100))
    return time.thread_time() - before

  started = time.perf_counter()
  busy = model_swap._gently(load, 20_000)
  assert time.perf_counter() - started > 3 * busy
  assert sys.getprofile() is None


def test_other_threads_do_not_rest_and_errors_come_out():
  seen = []

  def load():
    other = threading.Thread(target=lambda: seen.append(sys.getprofile()))
    other.start()
    other.join()
    assert sys.getprofile() is not None
    raise ValueError('damaged')

  with pytest.raises(ValueError, match='damaged'):
    model_swap._gently(load)
  assert seen == [None]
  assert sys.getprofile() is None


def test_another_program_is_compiled_by_another_process(shop, tmp_path, monkeypatch):
  folder, cache, before = tmp_path / 'model', tmp_path / 'cache', jax.config.values
  options = {'jax_compilation_cache_dir': str(cache)}
  options['jax_persistent_cache_min_compile_time_secs'] = 0.0
  export(make(shop, 'sasrec')[0], folder, with_users=False, with_pictures=False)
  before = {name: before[name] for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  try:
    asyncio.run(precompile(str(folder), 1))
    assert list(cache.iterdir())
    batcher = Batcher(exported.load(folder), 1, 0)
    monkeypatch.setattr(subprocess, 'Popen', None)
    asyncio.run(precompile(str(folder), 1))  # It has the program now.
    del batcher
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
  with pytest.raises(InputError, match='no exported model'):
    exported.is_compiled(tmp_path)


def test_a_former_model_is_freed_after_its_last_request(shop):
  alive = []

  def served(version):
    recommender = copy.copy(make(shop, 'sasrec')[0])  # `make` keeps what it has made.
    alive.append(weakref.ref(recommender))
    service = Service(Model(recommender, Batcher(recommender, 8, 0.2)))
    return Served(make_app(service), service.model.batcher, version, service.close)

  async def main():
    current = CurrentModel(served('1'), load=None)
    current._start(current._served)
    transport = httpx.ASGITransport(current)
    async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
      item = (await client.get('/items')).json()[0]['item']
      ask = lambda: client.post('/recommend', json={'history': [item]})
      assert (await ask()).status_code == 200
      last = asyncio.create_task(ask())
      await asyncio.sleep(0.05)  # It waits for others to share a batch.
      current._swap(served('2'))
      assert all(model() for model in alive)
      assert (await last).status_code == 200
      await asyncio.sleep(0.05)  # The task of the batcher ends.
      assert [bool(model()) for model in alive] == [False, True]
      assert (await ask()).status_code == 200
    current._let_go(current._served)

  gc.collect()
  gc.disable()  # Requests would have to wait for a collection.
  try:
    asyncio.run(main())
  finally:
    gc.enable()

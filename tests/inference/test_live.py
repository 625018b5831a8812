"""How the next model is loaded while the current one answers."""

import sys
import threading
import time

import pytest

from ur4rec_jax.inference import live


def test_who_loads_rests_most_of_the_time():
  def load(calls):
    before = time.thread_time()
    for _ in range(calls):
      len(range(100))
    return time.thread_time() - before

  started = time.perf_counter()
  busy = live._gently(load, 20_000)
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
    live._gently(load)
  assert seen == [None]
  assert sys.getprofile() is None

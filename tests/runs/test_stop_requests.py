import os
import signal

import jax
import pytest

from ur4rec_jax.errors import DivergenceError
from ur4rec_jax.runs.stop_requests import stop_requests


@pytest.fixture
def before():
  """The handler of SIGTERM, which is put back afterwards."""
  handler = signal.getsignal(signal.SIGTERM)
  yield handler
  signal.signal(signal.SIGTERM, handler)


def test_a_signal_is_reported_and_handlers_are_put_back(before):
  with stop_requests(grace_seconds=60) as requested:
    assert requested() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert requested() == signal.SIGTERM
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_that_fails_by_another_lives_to_say_so(before, monkeypatch):
  """The launcher sends SIGTERM at the moment when a collective fails."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(RuntimeError), stop_requests(grace_seconds=60):
    raise RuntimeError('Gloo: connection closed by peer')
  os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(DivergenceError), stop_requests(grace_seconds=60):
    raise DivergenceError('loss')


def test_a_single_process_obeys_after_a_failure(before):
  """A sweep goes on after a run that has failed, and a search after a trial that ended early."""
  with pytest.raises(RuntimeError), stop_requests(grace_seconds=60):
    raise RuntimeError('a fault of one run')
  assert signal.getsignal(signal.SIGTERM) == before


def test_who_was_woken_by_signals_before_is_woken_again(before):
  """An event loop, as notebooks have one, would never hear of a signal again."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer)
  with stop_requests(grace_seconds=60):
    pass
  assert signal.set_wakeup_fd(-1) == writer
  os.close(reader)
  os.close(writer)

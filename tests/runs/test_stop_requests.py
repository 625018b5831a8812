import os
import signal

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


def test_a_process_that_fails_by_another_lives_to_say_so(before):
  """The launcher sends SIGTERM at the moment when a collective fails."""
  with pytest.raises(RuntimeError), stop_requests(grace_seconds=60):
    raise RuntimeError('Gloo: connection closed by peer')
  os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(DivergenceError), stop_requests(grace_seconds=60):
    raise DivergenceError('loss')

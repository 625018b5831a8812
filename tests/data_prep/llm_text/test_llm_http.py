"""Hostile servers neither hold a run up, nor fill its memory, nor get a key stored."""

import os
import signal
import time

import pytest

from benchmarks.robustness import hostile_llm, llm_server
from data_prep.llm_text import llm_batch, llm_http, llm_online
from tests.helpers.llm_runs import PROVIDERS, Run, questions
from ur4rec_jax.errors import InputError, ReportedError

BACKENDS = pytest.mark.parametrize('backend', tuple(PROVIDERS))
ASKED = [p._replace(text=f'{p.text} {"[bad]" * (n % 3 == 1)}') for n, p in enumerate(questions(8))]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  for provider in PROVIDERS.values():
    monkeypatch.setenv(provider.KEY, hostile_llm.KEY)
  for module in (llm_online, llm_batch):
    monkeypatch.setattr(module, '_FIRST_WAIT', 0.01)


def run_against(mode, backend, folder, timeout=20.0, ask=Run.online):
  """Asks all in this process; returns the run and the server after their end."""
  with hostile_llm.HostileServer(mode) as server:
    run = Run(server, backend, folder)
    run.settings.timeout = timeout
    try:
      ask(run, ASKED)
    finally:
      server.over.set()
  return run, server


@BACKENDS
@pytest.mark.parametrize(
  'name',
  [
    'endless',
    'endless_error',
    'nested',
    'brotli',
    'wrong_types',
    'usage_1e999',
    'usage_negative',
    'key_spelled',
    'key_in_refusal',
    'key_in_400',
    'redirect',
    'retry_nan',
    'results_cut',
    'results_cut_no_range',
    'results_short',
    'results_junk',
    'results_endless',
  ],
)
def test_a_hostile_server_costs_only_what_it_does_not_answer(name, backend, tmp_path):
  mode = hostile_llm.MODES[name]
  ask = Run.batch if mode.hits == 'batch' else Run.online
  run, server = run_against(mode, backend, tmp_path, ask=ask)
  is_refused = mode.stored < hostile_llm.NUM_ITEMS
  assert len(run.texts) == len(ASKED) - 3 * is_refused
  assert len(run.failures) == 3 * is_refused
  assert max(server.answers().values()) == 1
  if mode.is_answer:
    assert max(server.requests.values()) == 1
  assert hostile_llm.KEY not in f'{run.texts} {run.failures}'
  assert server.num_leaks == 0
  assert run.budget.is_idle
  assert 0 < run.budget.spent < 1


@BACKENDS
@pytest.mark.parametrize('name', ['drip', 'drip_header', 'drip_second_half', 'endless_interim'])
def test_a_reply_has_one_deadline_as_a_whole(name, backend, tmp_path):
  run, server = run_against(hostile_llm.MODES[name], backend, tmp_path, timeout=3.0)
  assert len(run.texts) == len(ASKED)
  late = [name for name, count in server.requests.items() if count > 1]
  assert len(late) >= 3
  assert run.budget.lost > 0  # What broke off may have been paid.


def test_a_server_that_only_drips_is_given_up(tmp_path):
  begin = time.monotonic()
  with pytest.raises(InputError, match=r'cannot be reached \(no whole reply in 0.5 s\)'):
    run_against(hostile_llm.MODES['drip_at_all'], 'openai', tmp_path, timeout=0.5)
  assert time.monotonic() - begin < 60


def test_results_that_drip_are_given_up_and_the_batch_is_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(llm_batch, 'ATTEMPTS', 2)
  with pytest.raises(ReportedError, match=r'no whole reply in 0.5 s'):
    run_against(hostile_llm.MODES['results_slow'], 'openai', tmp_path, 0.5, Run.batch)
  assert len(llm_batch.keys_under_way(tmp_path)) == len(ASKED)


def test_an_unpacked_reply_is_limited(tmp_path, monkeypatch):
  monkeypatch.setattr(hostile_llm, '_BOMB_BYTES', 20 << 20)
  hostile_llm._bomb.cache_clear()
  assert len(hostile_llm._bomb()) < llm_http.MAX_REPLY // 10
  for name in ('gzip_bomb', 'gzip_bomb_error', 'gzip_twice'):
    run, _ = run_against(hostile_llm.MODES[name], 'openai', tmp_path)
    assert len(run.texts) == len(ASKED)
  hostile_llm._bomb.cache_clear()


def test_a_signal_ends_the_run_within_the_grace(tmp_path, monkeypatch):
  monkeypatch.setattr(llm_online, '_GRACE_SECONDS', 0.5)
  seen = []

  def stop(handler, reply):
    seen.append(time.monotonic())
    if len(seen) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    hostile_llm._drip(handler, reply)

  with pytest.raises(llm_online.Stopped):
    run_against(hostile_llm.Mode(stop, 'all'), 'openai', tmp_path, timeout=600.0)
  assert time.monotonic() - seen[2] < 60


@pytest.mark.parametrize('bad_id', [hostile_llm.KEY, 'x' * 300, '../../x y', 7, None])
def test_an_id_that_is_no_id_is_not_stored(bad_id, tmp_path, monkeypatch):
  monkeypatch.setattr(llm_batch, 'ATTEMPTS', 2)
  shown = hostile_llm._Handler._shown
  monkeypatch.setattr(hostile_llm._Handler, '_shown', lambda h, b: shown(h, b) | {'id': bad_id})
  with pytest.raises(ReportedError, match='the provider does not answer'):
    run_against(hostile_llm.Mode(lambda *_: None, 'none'), 'openai', tmp_path, ask=Run.batch)
  files = [path.read_text() for path in tmp_path.rglob('*.json')]
  assert files
  assert not any(hostile_llm.KEY in content for content in files)


@BACKENDS
def test_a_server_behind_a_login_gets_it_and_the_password_is_in_no_log(backend, tmp_path, caplog):
  caplog.set_level('DEBUG')
  with llm_server.LlmServer() as server:
    run = Run(server, backend, tmp_path)
    logins = []
    handler = server.RequestHandlerClass

    class Keeping(handler):
      def do_POST(self):
        logins.append(self.headers['authorization'])
        super().do_POST()

      def _is_known(self):
        return True

    server.RequestHandlerClass = Keeping
    run.settings.base_url = run.settings.base_url.replace('//', '//me:p%40ss-canary@')
    run.online(ASKED[:2])
  assert len(run.texts) == 2
  assert set(logins) == {'Basic bWU6cEBzcy1jYW5hcnk='}
  assert 'ss-canary' not in caplog.text

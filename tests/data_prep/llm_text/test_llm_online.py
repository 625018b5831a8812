import asyncio
import json
import os
import signal
import socket
import sys

import pytest

from benchmarks.robustness import llm_server
from data_prep.llm_text import costs, llm_online
from tests.helpers.llm_runs import PROVIDERS, expected, questions, running
from ur4rec_jax.errors import InputError

BACKENDS = pytest.mark.parametrize('backend', tuple(PROVIDERS))


@pytest.fixture(autouse=True)
def keys(monkeypatch):
  for provider in PROVIDERS.values():
    monkeypatch.setenv(provider.KEY, llm_server.KEY)


@BACKENDS
def test_every_prompt_is_answered_whatever_the_server_does(backend, tmp_path, monkeypatch):
  monkeypatch.setattr(llm_online, '_FIRST_WAIT', 0.01)
  faults = llm_server.Faults(rate_limit=0.15, error=0.1, drop=0.1, malformed=0.1, seed=3)
  asked = questions(40)
  with running(backend, tmp_path, faults) as run:
    run.online(asked, concurrency=40)
    outcomes = run.server.outcomes()
    assert run.texts == expected(asked)
    assert not run.failures
    assert {'rate_limit', 'error', 'drop', 'malformed'} < set(outcomes)
    assert outcomes['answer'] == 40


@BACKENDS
@pytest.mark.parametrize(
  ('word', 'reason', 'times'),
  [
    ('[refuse]', 'refused', 1),
    ('[filter]', {'openai': 'filtered by the provider', 'anthropic': 'refused'}, 1),
    ('[length]', 'cut off at the limit of output tokens', 1),
    ('[empty]', 'unusable answer: empty', 3),
    ('[huge]', 'unusable answer: too long', 3),
    ('[broken]', 'unusable answer: no complete JSON', 3),
  ],
)
def test_what_is_no_whole_answer_is_a_failure(backend, word, reason, times, tmp_path, monkeypatch):
  monkeypatch.setattr(llm_online, '_FIRST_WAIT', 0.001)
  asked = [*questions(1, word), questions(2)[1]]
  with running(backend, tmp_path) as run:
    run.online(asked)
    assert list(run.texts) == [asked[1].id]
    wanted = reason[backend] if isinstance(reason, dict) else reason
    assert run.failures[asked[0].id].startswith(wanted)
    assert run.server.answers()[llm_server.input_name(asked[0].text)] == times
    # Paid, nevertheless.
    assert run.budget.spent >= (times + 1) * 40 * 2.0 / 1e6


@BACKENDS
def test_a_field_that_the_server_refuses_is_left_out_from_then_on(backend, tmp_path):
  refused = {'openai': ('response_format', 'reasoning_effort', 'max_completion_tokens')}.get(
    backend, ('output_config', 'thinking')
  )
  asked = questions(5)
  with running(backend, tmp_path, llm_server.Faults(refused=refused)) as run:
    run.online(asked, concurrency=1)
    assert run.texts == expected(asked)
    bodies = [json.loads(body) for body in run.server.bodies]
    assert len(bodies) == len(asked) + len(refused)
    assert not set(bodies[-1]) & set(refused)
    assert bodies[-1]['max_tokens'] == 1000


@BACKENDS
def test_a_request_holds_the_schema_the_limit_and_nothing_of_the_id(backend, tmp_path):
  with running(backend, tmp_path, temperature=0.25) as run:
    run.online(questions(3))
    assert len(run.server.bodies) == 3
    for content in run.server.bodies:
      assert b'secret-id' not in content
      body = json.loads(content)
      assert body['temperature'] == 0.25
      assert 'additionalProperties' in json.dumps(body)


@BACKENDS
def test_an_unusable_answer_before_the_end_of_a_run_is_recorded(backend, tmp_path):
  [prompt] = asked = questions(1, '[empty]')
  with running(backend, tmp_path) as run:
    most = run.settings.parameters[run.provider.MAX_OUTPUT]
    body = run.provider.body(prompt, run.settings)
    run.budget.limit = run.price.cost(costs.most_tokens(body, most))  # A second try does not fit.
    with pytest.raises(llm_online.BudgetReached):
      run.online(asked)
    assert run.failures == {prompt.id: 'the run ended after an unusable answer'}
    assert run.price.cost(run.lost[prompt.id]) == run.budget.spent > 0


@BACKENDS
def test_a_budget_is_reached_and_never_exceeded(backend, tmp_path):
  asked = questions(200)
  limit = 0.05
  faults = llm_server.Faults(latency=0.01, output_tokens=1000)
  with running(backend, tmp_path, faults, limit=limit) as run:
    with pytest.raises(llm_online.BudgetReached):
      run.online(asked, concurrency=16)
    outcomes = run.server.outcomes()
    assert 5 < len(run.texts) == outcomes['answer'] < 200
    assert run.budget.is_idle
    spent = run.budget.spent
    assert spent == pytest.approx(sum(_paid(body) for body in run.server.bodies))
    assert limit - 0.005 < spent <= limit


def _paid(content: bytes) -> float:
  body = json.loads(content)
  reply = llm_server.message_reply if 'system' in body else llm_server.chat_reply
  reply = reply(body, '', '', 1000)
  tokens = PROVIDERS['anthropic' if 'system' in body else 'openai'].tokens(reply)
  return (tokens[0] + 2 * tokens[1]) / 1e6


def test_prompts_are_pulled_when_there_is_a_place(tmp_path):
  with running('openai', tmp_path) as run:
    most = 0
    answer = run._on_answer

    def watched(key, prompt, text):
      nonlocal most
      answer(key, prompt, text)
      most = max(most, run.pulled - len(run.texts))

    run._on_answer = watched
    run.online(questions(60), concurrency=4)
    assert len(run.texts) == 60
    assert most < 4


def test_a_signal_lets_what_is_under_way_come_in(tmp_path):
  asked = questions(400)
  with running('openai', tmp_path, llm_server.Faults(latency=0.2)) as run:
    answer = run._on_answer

    def then_stop(key, prompt, text):
      answer(key, prompt, text)
      if len(run.texts) == 20:
        os.kill(os.getpid(), signal.SIGTERM)

    run._on_answer = then_stop
    with pytest.raises(llm_online.Stopped):
      run.online(asked, concurrency=8)
    assert run.now.signal_number == signal.SIGTERM
    assert 20 <= len(run.texts) < 60
    assert run.server.outcomes()['answer'] == len(run.texts)


@BACKENDS
def test_a_wrong_key_ends_the_run_with_one_request_a_place(backend, tmp_path, monkeypatch):
  canary = 'sk-canary-4711'
  monkeypatch.setenv(PROVIDERS[backend].KEY, canary)
  with running(backend, tmp_path) as run:
    with pytest.raises(InputError, match=r'does not accept the key in \w+ \(401\)') as error:
      run.online(questions(50), concurrency=2)
    # The server sends the key back.
    assert '[key]' in str(error.value)
    assert canary not in str(error.value)
    assert '\n' not in str(error.value)
    assert len(run.server.bodies) <= 2


@BACKENDS
def test_an_unknown_model_ends_the_run(backend, tmp_path):
  with running(backend, tmp_path) as run:
    run.settings.model = 'gpt-99'
    with pytest.raises(InputError, match=r'404.*gpt-99.*--model=gpt-99'):
      run.online(questions(50), concurrency=2)


def test_a_server_that_refuses_everything_ends_the_run(tmp_path):
  faults = llm_server.Faults(refused=('top_k',))
  with (
    running('openai', tmp_path, faults, top_k=5) as run,
    pytest.raises(InputError, match=r"400.*'top_k'.*--parameters"),
  ):
    run.online(questions(50), concurrency=2)
  assert len(run.server.bodies) <= 8


ENDS_THE_RUN = (401, 402)
STATUSES = [status for status in range(400, 600) if status not in ENDS_THE_RUN]


def is_waited_for(status: int) -> bool:
  return status in (408, 409, 425, 429) or status >= 500


@BACKENDS
def test_every_status_costs_its_own_item_at_most(backend, tmp_path, monkeypatch):
  monkeypatch.setattr(llm_online, '_FIRST_WAIT', 0.001)
  asked = [questions(1, f'[status {status}]')[0] for status in STATUSES]
  asked = [p._replace(id=str(s)) for p, s in zip(asked, STATUSES, strict=True)]
  with running(backend, tmp_path) as run:
    # One by one, so that the first is answered before five are refused, which would end the run.
    run.online([*questions(1), *asked], concurrency=1)
  assert run.texts.pop('secret-id-0')
  assert run.texts.keys() == {str(s) for s in STATUSES if is_waited_for(s)}
  assert run.failures == {
    str(s): f'the server answers {s}: too fast; see your billing page'
    for s in STATUSES
    if not is_waited_for(s)
  }


@BACKENDS
@pytest.mark.parametrize('status', ENDS_THE_RUN)
def test_a_dead_key_or_an_empty_account_ends_the_run_and_loses_nothing(backend, status, tmp_path):
  last = questions(6, f'[status {status}]')[5]
  asked = [*questions(5), last, *questions(300)[6:]]
  with (
    running(backend, tmp_path) as run,
    pytest.raises(InputError, match=r'does not accept the key|wants to be paid first'),
  ):
    run.online(asked, concurrency=1)
  assert run.texts == expected(asked[:5])
  assert not run.failures


@BACKENDS
def test_refusals_before_the_first_answer_wait_for_it(backend, tmp_path):
  refused = [p._replace(id=f'x{n}') for n, p in enumerate(questions(3, '[status 403]'))]
  with running(backend, tmp_path) as run:
    # Three of a model that is allowed are failures of their own.
    run.online([*refused, *questions(2)], concurrency=1)
    assert run.texts == expected(questions(2))
    assert set(run.failures) == {'x0', 'x1', 'x2'}
  with running(backend, tmp_path) as run:
    # If none is answered, what they share is at fault, and none is noted as failed.
    with pytest.raises(InputError, match=r'403.*no request was answered, and 3 failed like this'):
      run.online(refused, concurrency=1)
    assert not run.failures
    many = [questions(1, f'{n} [status 404]')[0] for n in range(50)]
    with pytest.raises(InputError, match=r'404.*and 5 failed like this: check --model='):
      run.online(many, concurrency=1)
    assert len(run.server.arrivals) == 8


def test_a_key_that_loses_its_rights_is_noticed(tmp_path):
  many = [questions(1, f'{n} [status 403]')[0]._replace(id=str(n)) for n in range(200)]
  with (
    running('openai', tmp_path) as run,
    pytest.raises(llm_online.ReportedError, match='answers nothing any more'),
  ):
    run.online([*questions(3), *many], concurrency=2)
  assert run.texts == expected(questions(3))
  # Two requests are under way at once: one may fail before the last answer comes, which starts the
  # count anew, and one when the run is given up.
  assert llm_online._GIVEN_UP - 1 <= len(run.failures) <= llm_online._GIVEN_UP + 2


@BACKENDS
def test_a_server_that_always_refuses_the_same_field_is_not_asked_for_ever(backend, tmp_path):
  field = {'openai': 'reasoning_effort', 'anthropic': 'thinking'}[backend]
  with running(backend, tmp_path) as run:
    refuse = lambda handler, *_: handler._error(400, f'{field} is not supported')
    monkey = type('Refusing', (run.server.RequestHandlerClass,), {'_answer': refuse})
    run.server.RequestHandlerClass = monkey
    with pytest.raises(InputError, match=f'400: {field}'):
      run.online(questions(50), concurrency=2)
    assert len(run.server.bodies) < 15


def test_no_network_is_known_after_three_tries(tmp_path, monkeypatch):
  monkeypatch.setattr(llm_online, '_FIRST_WAIT', 0.001)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    with running('openai', tmp_path) as run:
      run.settings.base_url = f'http://127.0.0.1:{free.getsockname()[1]}/v1'
      with pytest.raises(InputError, match=r'cannot be reached.*--backend=mock'):
        run.online(questions(5), concurrency=2)
      assert run.budget.lost == 0


def test_a_server_that_dies_ends_the_run_instead_of_failing_all(tmp_path, monkeypatch):
  monkeypatch.setattr(llm_online, '_FIRST_WAIT', 0.0001)
  monkeypatch.setattr(llm_online, 'ATTEMPTS', 3)
  with running('openai', tmp_path, llm_server.Faults(error=1.0)) as run:
    with pytest.raises(llm_online.ReportedError, match='answers nothing any more'):
      run.online(questions(100), concurrency=4)
    # Those under way beside the last one may still fail.
    assert llm_online._GIVEN_UP - 1 <= len(run.failures) < llm_online._GIVEN_UP + 4


def test_a_retry_waits_as_long_as_the_server_says(tmp_path):
  faults = llm_server.Faults(rate_limit=1.0, retry_after=0.4)
  with running('openai', tmp_path, faults) as run:

    async def then_answer():
      while not run.server.arrivals:
        await asyncio.sleep(0.01)
      faults.rate_limit = 0.0

    async def both():
      online = llm_online.Online(run.provider, run.settings, run.budget, None, None)
      work = run.work(questions(1))
      await asyncio.gather(
        online.answer_all(work, 1, run._on_answer, run._on_failure), then_answer()
      )

    asyncio.run(both())
    first, second = (at for at, _, _ in run.server.arrivals)
    assert second - first >= 0.4


def test_a_pace_spreads_a_limit_evenly(monkeypatch):
  async def waits():
    # A machine that is busy would make some of the waits shorter.
    monkeypatch.setattr(asyncio.get_running_loop(), 'time', lambda: 50.0)
    pace = llm_online.Pace(600)
    taken = [pace.take(1) for _ in range(101)]
    pace.give_back(50)
    return taken, pace.take(1), llm_online.Pace(None).take(1e9)

  taken, corrected, free = asyncio.run(waits())
  # 600 a minute are 10 a second; at most 0.2 seconds are made up for.
  assert taken[0] == 0
  assert taken[100] == pytest.approx(9.8)
  assert corrected == pytest.approx(4.9)
  assert free == 0


@BACKENDS
def test_a_missing_sdk_is_named_with_the_way_to_install_it(backend, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, backend, None)
  with (
    running(backend, tmp_path) as run,
    pytest.raises(InputError, match=rf"pip install 'ur4rec-jax\[llm\]' or pip install {backend}"),
  ):
    run.online(questions(1))

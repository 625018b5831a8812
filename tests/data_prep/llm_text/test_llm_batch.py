import json

import pytest

from benchmarks.robustness import llm_server
from data_prep.llm_text import llm_batch, llm_online
from tests.helpers.llm_runs import PROVIDERS, expected, questions, running
from ur4rec_jax.errors import InputError

BACKENDS = pytest.mark.parametrize('backend', tuple(PROVIDERS))
ASKED = questions(20)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
  for provider in PROVIDERS.values():
    monkeypatch.setenv(provider.KEY, llm_server.KEY)


def paid(run) -> list[int]:
  """How often each input of `ASKED` was answered."""
  return [run.server.answers()[llm_server.input_name(prompt.text)] for prompt in ASKED]


@BACKENDS
def test_what_failed_or_expired_is_asked_again_and_nothing_else(backend, tmp_path):
  faults = llm_server.Faults(batches=('partly', 'expired'), polls=2)
  with running(backend, tmp_path, faults) as run:
    run.batch(ASKED)
    assert run.texts == expected(ASKED)
    assert not run.failures
    assert paid(run) == [1] * len(ASKED)
    outcomes = run.server.outcomes()
    assert outcomes['partly'] > 0
    assert outcomes['expired'] > 0
    assert len(run.server.batches) == 3
  assert not list((tmp_path / llm_batch.FOLDER).iterdir())


@BACKENDS
def test_a_later_process_collects(backend, tmp_path):
  with running(backend, tmp_path, llm_server.Faults(polls=2)) as run:
    batches = run.batch(ASKED, wait=False)
    assert batches.num_under_way == 1
    assert not run.texts
    assert len(llm_batch.keys_under_way(tmp_path)) == len(ASKED)
    (state,) = llm_batch.read_states(tmp_path)
    assert state['promised'] > 0
    # The answers to one model are not taken for those to another.
    run.settings.model = 'local'
    run.batch([], wait=False)
    assert not run.texts
    run.settings.model = run.provider.DEFAULT_MODEL
    run.batch(ASKED, wait=False)
    assert run.texts == expected(ASKED)
    assert len(run.server.batches) == 1
    assert not llm_batch.keys_under_way(tmp_path)


@BACKENDS
def test_what_a_killed_process_has_stored_is_not_paid_again(backend, tmp_path):
  asked = [*ASKED[:3], *questions(4, '[refuse]')[3:]]
  with running(backend, tmp_path, llm_server.Faults(polls=9)) as run:
    run.batch(asked, wait=False)
    kept = {path: path.read_bytes() for path in (tmp_path / llm_batch.FOLDER).iterdir()}
    run.server.faults.polls = 1
    run.batch([])
    assert run.texts == expected(ASKED[:3])
    assert run.failures == {asked[3].id: 'refused'}
    spent = run.budget.spent
    for path, content in kept.items():  # The process was killed before it removed them.
      path.write_bytes(content)
    run.failures.clear()
    run.batch([])
    assert run.budget.spent == spent > 0
    assert not run.failures
    assert not list((tmp_path / llm_batch.FOLDER).iterdir())


@BACKENDS
def test_a_batch_whose_making_went_unnoticed_is_found(backend, tmp_path, monkeypatch):
  monkeypatch.setattr(llm_batch, '_FIRST_WAIT', 0.01)
  with running(backend, tmp_path, llm_server.Faults(batches=('unnoticed',))) as run:
    run.batch(ASKED)
    assert run.texts == expected(ASKED)
    assert len(run.server.batches) == 1


@BACKENDS
@pytest.mark.parametrize('was_made', [True, False])
def test_a_process_killed_while_it_submits_neither_loses_nor_pays_twice(
  backend, was_made, tmp_path
):
  with running(backend, tmp_path, llm_server.Faults()) as run:
    path = tmp_path / llm_batch.FOLDER
    create = run.provider.create_batch
    killed = KeyboardInterrupt()

    async def then_die(*arguments):
      if was_made:
        await create(*arguments)
      raise killed

    run.provider.create_batch = then_die
    try:
      with pytest.raises(KeyboardInterrupt):
        run.batch(ASKED)
    finally:
      run.provider.create_batch = create
    (state,) = path.glob('*.json')
    assert json.loads(state.read_text())['ids'] == []
    (path / 'torn.requests.jsonl').write_text('{"cut')  # Of a process that died before that.
    run.batch(ASKED)
    assert run.texts == expected(ASKED)
    assert paid(run) == [1] * len(ASKED)
    assert not list(path.iterdir())


def test_a_guess_that_was_wrong_loses_nothing(tmp_path):
  """Anthropic's batches carry no tag: another one of the same size is taken for the lost one."""
  with running('anthropic', tmp_path) as run:
    run.batch(questions(20, 'of another store'))
    run.texts.clear()
    run.server.faults.polls = 9
    run.batch(ASKED, wait=False)
    run.server.faults.polls = 1
    for path in (tmp_path / llm_batch.FOLDER).glob('*.json'):
      state = json.loads(path.read_text())
      path.write_text(json.dumps(state | {'ids': ['msgbatch_0']}))
    run.batch(ASKED)
    assert len(run.failures) == len(ASKED)
    run.batch(ASKED)
    assert run.texts == expected(ASKED)


@BACKENDS
def test_batches_are_split_by_requests_and_by_bytes(backend, tmp_path, monkeypatch):
  with running(backend, tmp_path) as run:
    run.batch(ASKED[:10], max_requests=4)
    assert [len(batch['requests']) for batch in run.server.batches.values()] == [4, 4, 2]
    monkeypatch.setattr(run.provider, 'BATCH_BYTES', 1500)
    run.batch(ASKED)
    sizes = [len(batch['requests']) for batch in run.server.batches.values()][3:]
    assert sum(sizes) == 10
    assert len(sizes) > 2
    if backend == 'openai':
      assert all(len(file) <= 1500 for file in list(run.server.files.values())[-2 * len(sizes) :])
    assert run.texts == expected(ASKED)
    assert paid(run) == [1] * len(ASKED)


@BACKENDS
def test_the_limits_are_the_providers(backend, tmp_path):
  limits = {'openai': (50_000, 200_000_000), 'anthropic': (100_000, 256_000_000)}
  provider = PROVIDERS[backend]
  assert limits[backend] == (provider.BATCH_REQUESTS, provider.BATCH_BYTES)
  with running(backend, tmp_path) as run:
    run.batch(ASKED)
    (batch,) = run.server.batches.values()
    names = [name for name, _ in batch['requests']]
    assert set(names) == {run.key(prompt) for prompt in ASKED}
    assert {len(name) for name in names} == {64}
    assert not any(b'secret-id' in body for body in run.server.bodies)


def test_a_batch_that_is_not_taken_costs_nothing_and_is_forgotten(tmp_path):
  with running('openai', tmp_path, llm_server.Faults(batches=('failed',))) as run:
    with pytest.raises(InputError, match='costs nothing: Enqueued token limit reached'):
      run.batch(ASKED)
    assert run.budget.spent == 0
    run.batch(ASKED)
    assert run.texts == expected(ASKED)


@BACKENDS
def test_bad_requests_are_failures_and_are_not_sent_again(backend, tmp_path):
  with running(backend, tmp_path, llm_server.Faults(batches=('bad',))) as run:
    run.batch(ASKED)
    assert set(run.failures) == {prompt.id for prompt in ASKED}
    assert set(run.failures.values()) == {'the server answers 400: this went wrong'}
    assert len(run.server.batches) == 1


@BACKENDS
def test_a_refused_field_is_left_out_of_the_next_batch(backend, tmp_path):
  field = {'openai': 'reasoning_effort', 'anthropic': 'thinking'}[backend]
  with running(backend, tmp_path, llm_server.Faults(refused=(field,))) as run:
    run.batch(ASKED)
    run.batch(ASKED)
    assert run.texts == expected(ASKED)
    assert field in run.settings.refused


@BACKENDS
def test_a_budget_sends_what_fits_and_stops(backend, tmp_path):
  limit = 0.03
  most = {PROVIDERS[backend].MAX_OUTPUT: 40}
  with running(backend, tmp_path, limit=limit, **most) as run:
    with pytest.raises(llm_online.BudgetReached):
      run.batch(questions(400))
    assert 10 < len(run.texts) < 400
    assert len(run.server.batches) > 1
    assert limit / 2 < run.budget.spent <= limit
    assert run.budget.is_idle
    assert run.server.outcomes()['answer'] == len(run.texts)


@BACKENDS
def test_answers_that_are_no_text_are_failures(backend, tmp_path):
  asked = [*questions(1, '[refuse]'), *questions(2, '[length]')[1:], *questions(3, '')[2:]]
  with running(backend, tmp_path) as run:
    run.batch(asked)
    assert list(run.texts) == [asked[2].id]
    assert set(run.failures.values()) == {'refused', 'cut off at the limit of output tokens'}


def test_a_batch_of_another_account_is_explained(tmp_path):
  with running('openai', tmp_path, llm_server.Faults(polls=9)) as run:
    run.batch(ASKED, wait=False)
    run.server.batches.clear()
    with pytest.raises(InputError, match=r'batch batch_0: .*404.* deleting .*\.json'):
      run.batch(ASKED)


def test_a_server_without_batches_is_explained(tmp_path):
  with running('openai', tmp_path) as run:
    run.settings.base_url = run.server.url + '/v2'
    with pytest.raises(InputError, match='404'):
      run.batch(ASKED)
    assert not llm_batch.keys_under_way(tmp_path)  # Asking online is possible.

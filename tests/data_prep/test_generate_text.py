"""The program as a user runs it: real processes, a real server, real prepared folders."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.robustness import llm_server, text_generation
from data_prep import build_dataset
from data_prep.llm_text import answers, llm_batch
from tests.helpers.fork_server import Program
from tests.helpers.runs import ROOT
from ur4rec_jax.data import dataset

# The last two items are held out of the texts about users.
TITLES = ('Heat (1995)', '羅生門', 'Амели', 'فیلم', 'A \x07 bell', '[refuse] me', '[huge] one')
KEYS = {'openai': 'OPENAI_API_KEY', 'anthropic': 'ANTHROPIC_API_KEY'}


def build(folder: Path, titles, description='') -> Path:
  """A prepared folder of six users who have seen everything."""
  ids = [f'i{n}' for n in range(len(titles))]
  log = [(f'secret-user-{u}', name, n) for u in range(6) for n, name in enumerate(ids)]
  log = pa.table(dict(zip(('user', 'item', 'timestamp'), zip(*log, strict=True), strict=True)))
  genres = ['Drama|Crime' if title else '' for title in titles]
  descriptions = [description, *[''] * (len(titles) - 1)]
  items = pa.table({'id': ids, 'title': titles, 'genres': genres, 'description': descriptions})
  build_dataset.build_from_table(log, folder, time_column='timestamp', items=items)
  return folder


def start(*flags: str, **environment: str) -> Program:
  """Starts the program; keys of the machine it runs on are not seen."""
  inherited = {name: value for name, value in os.environ.items() if name not in KEYS.values()}
  return Program('data_prep.generate_text', flags, inherited | environment, ROOT)


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess:
  return start(*flags, **environment).finish()


@contextlib.contextmanager
def serving(backend='openai', faults=None):
  """A server, and a way to run the program against it."""
  path = '/v1' if backend == 'openai' else ''
  with llm_server.LlmServer(faults, keep_bodies=True) as server:
    to = (f'--backend={backend}', f'--base_url={server.url}{path}')
    yield server, lambda *flags, how=run: how(*to, *flags, **{KEYS[backend]: llm_server.KEY})


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('texts') / 'films'
  return build(folder, TITLES, 'A heist, and what it costs.')


def row(result: subprocess.CompletedProcess, name: str) -> str:
  return ' / '.join(line[15:] for line in result.stdout.splitlines() if line.startswith(name))


@pytest.mark.parametrize('backend', ['openai', 'anthropic'])
def test_killed_again_and_again_nothing_is_lost_or_paid_twice(backend, tmp_path):
  num_kills = {'openai': 3, 'anthropic': 1}[backend]

  def start_against(server, backend, data_dir, *flags):
    path = '/v1' if backend == 'openai' else ''
    to = (f'--data_dir={data_dir}', f'--backend={backend}', f'--base_url={server.url}{path}')
    text_generation.output_of(data_dir).write_text('')
    return start(*to, '--kind=items', *flags, **{KEYS[backend]: llm_server.KEY})

  proof = text_generation.prove_kills(tmp_path, 150, num_kills, backend, start=start_against)
  assert proof['exit_code'] == 0, proof['output']
  assert proof['answered'] == 150
  assert proof['answers_lost'] == 0
  assert proof['stored_but_asked_again'] == 0
  assert {'rate_limit', 'error'} < set(proof['outcomes'])


def test_from_the_dry_run_to_texts_in_any_script(data_dir, tmp_path):
  store = f'--store={tmp_path / "answers"}'
  flags = (f'--data_dir={data_dir}', store)
  with serving() as (server, generate):
    dry = generate(*flags, '--dry_run')
    assert dry.returncode == 0, dry.stderr
    # The first item has a description; all six users have seen the same: one question.
    assert row(dry, 'requests') == '7: 6 about items, 1 about users'
    assert '- same as another 5' in dry.stdout
    assert float(row(dry, 'cost').split()[1].strip('$,')) > 0
    assert not server.bodies
    assert not (tmp_path / 'answers').exists()

    first = generate(*flags, '--max_cost=1')
    assert first.returncode == 0, first.stderr
    assert row(first, 'answered') == '5 now, 0 before'
    failed = row(first, 'failed')
    assert '1 refused' in failed
    assert '1 unusable answer' in failed
    assert '--retry_failed' in row(first, 'next')
    assert "4 by the LLM, 1 the dataset's own descriptions, 2 without text" in row(first, 'item')
    assert '6 by the LLM' in row(first, 'user')
    requests = len(server.bodies)

    again = generate(*flags, '--max_cost=1')
    assert row(again, 'answered') == '0 now, 10 before'
    assert row(again, 'failed') == '2 failed before'
    assert len(server.bodies) == requests

    assert generate(*flags, '--retry_failed', '--kind=items').returncode == 0
    assert len(server.bodies) == requests + 4

    said = b''.join(server.bodies).decode()
    assert 'secret-user' not in said
    assert '\\u0007' not in said
    about_users = [body for body in server.bodies if b'person' in body]
    assert about_users
    # Nor is the last of the five items to train on, as a fifth is held back.
    held_out = (b'A  bell', b'A bell', b'[refuse]', b'[huge]')
    assert not any(title in body for body in about_users for title in held_out)
  texts = {t['original_id']: t['text'] for t in dataset.iterate_texts(data_dir, 'item')}
  assert texts['i0'] == 'A heist, and what it costs.'
  assert texts['i1'].startswith('A text about input')
  assert not texts['i5']
  origin = dataset.texts_origin(data_dir, 'user')
  assert origin['provider'] == 'openai'
  assert origin['split_hash'] == dataset.load_dataset(data_dir).split_hash
  assert origin['hold_back'] == 0.2
  assert origin['is_mock'] is False


def test_mock_says_that_it_is_mock_and_texts_go_out_and_in(data_dir, tmp_path):
  flags = (f'--data_dir={data_dir}', f'--store={tmp_path / "answers"}')
  mock = run(*flags, '--backend=mock', '--language=zh')
  assert mock.returncode == 0, mock.stderr
  assert 'by mock, invented' in row(mock, 'item texts')
  assert dataset.texts_origin(data_dir, 'item')['is_mock']
  records = (tmp_path / 'answers' / answers.ANSWERS).read_text().splitlines()
  assert {json.loads(line)['provider'] for line in records} == {'mock'}

  file = tmp_path / 'texts.json'
  out = run(*flags, '--kind=items', f'--export={file}')
  assert out.returncode == 0, out.stderr
  exported = json.loads(file.read_text())
  assert set(exported) == {f'i{n}' for n in range(len(TITLES))}
  file.write_text(json.dumps({'i1': 'From elsewhere.', 'i99': 'Nobody.'}))
  into = run(*flags, '--kind=items', f'--import={file}')
  assert into.returncode == 0, into.stderr
  assert '1 imported' in row(into, 'item texts')
  assert '1 ids that the dataset lacks' in row(into, 'item texts')
  texts = {t['original_id']: t['text'] for t in dataset.iterate_texts(data_dir, 'item')}
  assert texts['i1'] == 'From elsewhere.'


def test_titles_like_refusals_and_reasoning_stop_no_mock(tmp_path):
  folder = build(tmp_path / 'odd', ('[think] different', 'Heat', 'Dusk'))
  mock = run(f'--data_dir={folder}', '--kind=items', '--backend=mock')
  assert mock.returncode == 0, mock.stderr
  assert 'unusable answer' in row(mock, 'failed')
  assert row(mock, 'answered') == '2 now, 0 before'


def test_texts_about_users_say_what_they_were_not_written_from(data_dir, tmp_path):
  flags = (f'--data_dir={data_dir}', f'--store={tmp_path / "answers"}', '--kind=users')
  hold_back = lambda: dataset.texts_origin(data_dir, 'user')['hold_back']
  for share, asked in (('0', '1 now'), ('0.4', '1 now'), ('0', '0 now, 6 before')):
    assert asked in run(*flags, '--backend=mock', f'--hold_back={share}').stdout
    assert hold_back() == float(share)
  none_left = run(*flags, '--backend=mock', '--hold_back=0.9')
  assert '- all is held back 6' in none_left.stdout
  file = tmp_path / 'texts.json'
  assert run(*flags, f'--export={file}').returncode == 0
  unsaid = run(*flags, f'--import={file}')
  assert unsaid.returncode == 2
  assert '--hold_back is missing' in unsaid.stderr
  assert hold_back() == 0
  # What users say of themselves was made from none of their interactions.
  assert run(*flags, f'--import={file}', '--hold_back=1').returncode == 0
  assert hold_back() == 1


def test_a_batch_is_collected_after_a_kill(data_dir, tmp_path):
  store = tmp_path / 'answers'
  flags = (f'--data_dir={data_dir}', f'--store={store}', '--mode=batch', '--poll_seconds=0.05')
  with serving('anthropic', llm_server.Faults(polls=10**9, batches=('expired',))) as (
    server,
    generate,
  ):
    process = generate(*flags, how=start)
    while not any(json.loads(p.read_text())['ids'] for p in store.glob('batches/*.json')):
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    requests = len(server.bodies)
    online = generate(*flags[:2])
    assert online.returncode == 1
    assert 'in a batch: --mode=batch collects them' in online.stdout
    assert len(server.bodies) == requests
    nowait = generate(*flags, '--nowait')
    assert nowait.returncode == 0, nowait.stderr
    assert len(server.batches) == 1
    server.faults.polls = 1
    done = generate(*flags)
    assert done.returncode == 0, done.stderr
    assert row(done, 'answered') == '5 now, 0 before'
    assert len(server.batches) == 2
    asked = [name for batch in server.batches.values() for name, _ in batch['requests']]
    assert server.outcomes()['expired'] == len(asked) - 7
  assert not llm_batch.keys_under_way(store)


def test_a_batch_that_is_collected_twice_costs_once(data_dir, tmp_path):
  store = tmp_path / 'answers'
  data_dir = build(tmp_path / 'films', ['Heat (1995)', '[refuse] me'])
  flags = (f'--data_dir={data_dir}', f'--store={store}', '--kind=items', '--mode=batch')
  with serving('openai', llm_server.Faults(polls=10**9)) as (server, generate):
    assert generate(*flags, '--nowait').returncode == 0
    kept = {path: path.read_bytes() for path in (store / 'batches').iterdir()}
    server.faults.polls = 1
    time.sleep(1)  # The times in the store are whole seconds.
    found = [generate(*flags, '--poll_seconds=0.05')]
    for path, content in kept.items():  # The process was killed before it removed them.
      path.write_bytes(content)
    found.append(generate(*flags, '--poll_seconds=0.05'))
    assert len(server.batches) == 1
  costs = [row(one, 'cost') for one in found]
  assert costs[0].split(' now, ')[1] == costs[1].split(' now, ')[1]
  assert costs[1].startswith('$0.0000 now')
  assert len((store / 'failed.jsonl').read_text().splitlines()) == 1


def test_a_signal_stops_with_everything_stored(tmp_path):
  data = text_generation.make_data(tmp_path, 400)
  with serving(faults=llm_server.Faults(latency=0.1)) as (server, generate):
    process = generate(f'--data_dir={data}', '--kind=items', how=start)
    while len(server.answers()) < 30:
      assert process.poll() is None
      time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    done = process.finish()
    assert done.returncode == 143
    count = server.outcomes()['answer']
    assert f'stopped: {count} answers are in' in done.stderr
    assert len(text_generation.stored(data)) == count < 400


def test_a_budget_stops_and_the_same_command_never_exceeds_it(data_dir, tmp_path):
  flags = (f'--data_dir={data_dir}', f'--store={tmp_path / "answers"}', '--kind=items')
  with serving() as (server, generate):
    budget = ('--max_cost=0.0007', '--concurrency=1')
    first = generate(*flags, *budget)
    assert first.returncode == 1
    assert '--max_cost=0.0007 is reached' in first.stderr
    assert 'by the LLM' in row(first, 'item texts')
    count = len(server.bodies)
    assert 0 < count < 8
    second = generate(*flags, *budget)
    assert second.returncode == 1
    assert len(server.bodies) == count


@pytest.mark.parametrize(('backend', 'status'), [('openai', 403), ('anthropic', 401)])
def test_the_texts_that_exist_are_written_whatever_one_status_does(backend, status, tmp_path):
  titles = ('A', 'B', f'C [status {status}]', 'D', 'E')
  data = build(tmp_path / 'films', titles)
  flags = (f'--data_dir={data}', '--kind=items', '--concurrency=1')
  texts = lambda: {t['original_id'] for t in dataset.iterate_texts(data, 'item') if t['text']}
  with serving(backend) as (_, generate):
    first = generate(*flags)
    if status == 403:
      assert first.returncode == 0, first.stderr
      assert row(first, 'failed') == '1 the server answers 403'
      assert texts() == {'i0', 'i1', 'i3', 'i4'}
    else:
      assert first.returncode == 2
      assert 'does not accept the key' in first.stderr
      assert '2 by the LLM' in first.stderr
      assert texts() == {'i0', 'i1'}
    # Started again, the same command goes on.
    again = generate(*flags, '--retry_failed')
    assert again.returncode == 0, again.stderr
    assert texts() == {f'i{n}' for n in range(5)}


def test_a_new_prompt_and_a_damaged_line_are_told(data_dir, tmp_path):
  flags = (f'--data_dir={data_dir}', f'--store={tmp_path}', '--backend=openai', '--dry_run')
  old = {
    'key': 'ab' * 32,
    'provider': 'openai',
    'model': 'gpt-6-luna',
    'prompt': 'item-en-00000000',
  }
  (tmp_path / answers.ANSWERS).write_text(json.dumps(old | {'text': 'Old.'}) + '\n{"torn')
  result = run(*flags)
  assert result.returncode == 0
  assert 'holds 1 answers to another version of the prompt (item-en-00000000)' in result.stdout
  assert '1 lines are torn or damaged' in result.stdout
  assert (tmp_path / answers.ANSWERS).read_text().endswith('{"torn')


def test_a_key_is_nowhere(data_dir, tmp_path):
  canary = 'sk-canary-0815'
  outputs = []
  for backend, key in KEYS.items():
    with serving(backend) as (server, _):
      path = '/v1' if backend == 'openai' else ''
      for name, accepted in (('wrong', llm_server.KEY), ('right', canary)):
        server.key = accepted
        store = tmp_path / f'{backend}-{name}'
        result = run(
          f'--data_dir={data_dir}',
          f'--backend={backend}',
          f'--base_url={server.url}{path}',
          f'--store={store}',
          '--kind=users',
          **{key: canary, f'{key.split("_")[0]}_LOG': 'debug'},
        )
        assert result.returncode == {'wrong': 2, 'right': 0}[name], result.stderr
        outputs += [result.stdout, result.stderr]
  files = [p.read_bytes() for p in (*tmp_path.rglob('*'), *data_dir.rglob('*')) if p.is_file()]
  assert len(files) > 10
  assert not any(canary in text for text in outputs)
  assert not any(canary.encode() in content for content in files)


@pytest.fixture(scope='module')
def mistakes(data_dir, tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
  """Every mistake made, side by side."""
  folder = tmp_path_factory.mktemp('mistakes')
  untitled = build(folder / 'untitled', ('', '', ''))
  (folder / 'list.json').write_text('["no", "object"]')
  with socket.socket() as free, llm_server.LlmServer() as server:
    free.bind(('127.0.0.1', 0))
    nobody = f'--base_url=http://127.0.0.1:{free.getsockname()[1]}/v1'
    url = f'--base_url={server.url}/v1'
    data, store, ai = f'--data_dir={data_dir}', f'--store={folder}/store', '--backend=openai'
    key = {'OPENAI_API_KEY': llm_server.KEY}
    commands = {
      'no key': ((data, ai), {}),
      'wrong key': ((data, ai, url), {'OPENAI_API_KEY': 'sk-wrong'}),
      'unknown model': ((data, ai, url, '--model=gpt-99'), key),
      'no network': ((data, ai, nobody), key),
      'budget of 0': ((data, ai, url, '--max_cost=0'), key),
      'no price': ((data, ai, url, '--model=local', '--max_cost=1'), key),
      'no titles': ((f'--data_dir={untitled}', ai, url), key),
      'no data': ((f'--data_dir={folder}/none', ai, url), key),
      'no backend': ((data,), {}),
      'bad parameters': ((data, ai, url, '--parameters=[1]'), key),
      'bad import': ((data, '--kind=items', f'--import={folder}/list.json'), {}),
      'no address': ((data, ai, '--base_url=http://me:canary-pass@host:port/v1'), key),
      'password': ((data, ai, nobody.replace('//', '//me:canary-pass@')), key),
      'all held back': ((data, ai, url, '--hold_back=1'), key),
      'import of both': ((data, f'--import={folder}/list.json'), {}),
      'no limit': ((data, ai, url, '--parameters={"max_completion_tokens": null}'), key),
      'hidden model': ((data, ai, url, '--parameters={"model": "gpt-99"}'), key),
      'seed': ((data, ai, url, '--seed=3'), key),
      'model of mock': ((data, '--backend=mock', '--model=gpt-99'), {}),
      'share of items': ((data, ai, url, '--kind=items', '--hold_back=0.5'), key),
      'no batch': ((data, ai, url, '--nowait'), key),
      'dry import': ((data, '--kind=items', f'--import={folder}/list.json', '--dry_run'), {}),
      'in and out': (
        (data, '--kind=items', f'--import={folder}/list.json', f'--export={folder}/out.json'),
        {},
      ),
    }
    processes = {
      name: start(*words, f'{store}-{name}', **environment)
      for name, (words, environment) in commands.items()
    }
    results = {name: process.finish() for name, process in processes.items()}
    assert not server.outcomes()
  return results


@pytest.mark.parametrize(
  ('mistake', 'message'),
  [
    ('no key', 'OPENAI_API_KEY is not set: export the key'),
    ('wrong key', 'does not accept the key in OPENAI_API_KEY (401)'),
    ('unknown model', 'check --model=gpt-99'),
    ('no network', 'cannot be reached'),
    ('budget of 0', '--max_cost must be above 0, not 0; --dry_run shows the cost'),
    ('no price', 'the price of local is unknown; give --input_price'),
    ('no titles', 'no item has a title'),
    ('no data', 'no such folder'),
    ('no backend', '--backend must be one of mock, openai, anthropic'),
    ('bad parameters', '--parameters=[1]: must be a JSON object'),
    ('bad import', 'must hold one object'),
    ('no address', '--base_url must be an address'),
    ('password', 'http://127.0.0.1:'),
    ('all held back', '--hold_back=1: must be at least 0 and below 1'),
    ('import of both', '--kind=items or --kind=users'),
    ('no limit', 'max_completion_tokens is null, and must be a whole number above 0'),
    ('hidden model', "--parameters: 'model' cannot be given there; pass --model"),
    ('seed', '--seed: is for --backend=mock'),
    ('model of mock', '--model: is for LLMs; leave it out'),
    ('share of items', '--hold_back: is for texts about users; leave it out'),
    ('no batch', '--nowait: is for --mode=batch; leave it out'),
    ('dry import', '--dry_run: is for texts to write, not for --import and --export'),
    ('in and out', '--export: is for the texts of the folder, and --import writes new ones'),
  ],
)
def test_a_mistake_is_one_message(mistakes, mistake, message):
  result = mistakes[mistake]
  assert result.returncode == 2
  (line,) = (line for line in result.stderr.splitlines() if line.startswith('error: '))
  assert message in line
  assert 'Traceback' not in result.stderr
  assert 'canary-pass' not in result.stderr + result.stdout

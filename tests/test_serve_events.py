"""The service that takes events and changes its model, as a process on a free port."""

import contextlib
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers import services
from tests.helpers.commands import run_here
from tests.helpers.fork_server import Program
from tests.helpers.postgres_server import postgres_folder, postgres_server
from tests.helpers.recommenders import make
from tests.helpers.redis_server import redis_server
from tests.helpers.runs import ROOT
from tests.helpers.services import refusal, request, service
from ur4rec_jax import feedback as feedback_command
from ur4rec_jax.errors import EXIT_CODES, FailedTaskError
from ur4rec_jax.inference import exported, registry
from ur4rec_jax.online.events import Exposure, Shown
from ur4rec_jax.online.feedback_store import open_store
from ur4rec_jax.online.logs import read_logs


@pytest.fixture(scope='module')
def recommender(shop):
  return make(shop, 'sasrec')[0]


def serve(environment, *flags):
  """Starts the service; gives the process and its address."""
  return services.serve(environment, '--batch=4', *flags)


@pytest.fixture(scope='module')
def live(environment, exports, tmp_path_factory):
  """A service with events: its address and the file of its store."""
  place = tmp_path_factory.mktemp('store') / 'events.db'
  with serve(environment, f'--export={exports}/sasrec', f'--events={place}') as (_, address):
    yield address, place


def get(url, body=None, **headers):
  """Status and content."""
  status, _, content = request(url, body, **headers)
  return status, content


def ask(address, user, **options):
  query = '&'.join(f'{name}={value}' for name, value in {'user': user, **options}.items())
  status, content = get(f'{address}/recommend?{query}')
  assert status == 200, content
  return json.loads(content)


def send(address, *events):
  status, content = get(f'{address}/events', list(events))
  assert status == 200, content
  return json.loads(content)


def event(user, item, name, kind='click', **more):
  return {'user': user, 'item': item, 'kind': kind, 'id': name, **more}


def items(answer):
  return [row['item'] for row in answer['recommendations']]


def metrics(address):
  time.sleep(1.1)  # They are the same for a second.
  return get(f'{address}/metrics')[1]


def test_a_user_never_seen_is_recommended_to_from_the_first_event(live, recommender):
  address, _ = live
  ids = recommender.item_ids
  status, content = get(f'{address}/recommend?user=newcomer')
  assert (status, 'has no event yet' in content) == (404, True)
  send(address, event('newcomer', 'not in the catalogue', '0', 'buy'))
  status, content = get(f'{address}/recommend?user=newcomer')
  assert (status, 'no event with an item of the catalogue' in content) == (404, True)
  assert 'not in the' not in content.replace('no event with an item of the catalogue', '')
  for n in range(1, 4):
    send(address, event('newcomer', ids[n], str(n)))
    expected = recommender.top([ids[1 : n + 1]], 5).items[0]
    assert items(ask(address, 'newcomer', k=5)) == expected
  question = {'user': 'newcomer', 'k': 5, 'without': ids[:20]}
  answer = json.loads(get(f'{address}/recommend', question)[1])
  assert items(answer) == recommender.top([ids[1:4]], 5, without=ids[:20]).items[0]
  assert answer['unknown'] == []


def test_what_a_known_user_just_did_changes_the_next_answer(live, recommender):
  address, _ = live
  user = list(recommender.users)[3]
  history, new = recommender.history(user), recommender.item_ids[-1]
  before = ask(address, user)
  assert items(before) == recommender.top([history], 10).items[0]
  send(address, event(user, new, 'a'), event(user, recommender.item_ids[0], 'b', 'view'))
  after = ask(address, user)
  assert items(after) == recommender.top([[*history, new]], 10).items[0]
  assert after['history']['items'] == len(history) + 1  # Views do not count by default.
  assert after['request_id'] != before['request_id']
  shown = json.loads(get(f'{address}/history?user={user}')[1])
  assert [row['item'] for row in shown] == history  # Events are told to nobody.


def test_an_event_is_counted_once_however_often_it_comes(live):
  address, place = live
  one = event('repeater', 'i01', 'same')
  assert send(address, one) == {'accepted': 1, 'duplicates': 0, 'of_deleted_users': 0}
  assert send(address, one, one | {'id': 'other'})['duplicates'] == 1
  with ThreadPoolExecutor(8) as threads:
    found = list(threads.map(lambda n: send(address, event('crowd', 'i01', n % 10)), range(80)))
  assert sum(counts['accepted'] for counts in found) == 10
  assert sum(counts['duplicates'] for counts in found) == 70
  with contextlib.closing(open_store(str(place))) as store:
    assert len(store.history('crowd', ('click',), 99).items) == 10


GOOD = event('u', 'i', '1')


@pytest.mark.parametrize(
  ('body', 'status', 'message'),
  [
    (b'{', 400, 'the body is no JSON'),
    (b'[' * 100_000, 400, 'the body is no JSON'),
    (b'\xff', 400, 'the body is no JSON'),
    (b'{"time": NaN}', 400, 'NaN is no number of JSON'),
    ([], 422, 'a request has 0 events; 1 to 1,000 are allowed'),
    ([GOOD] * 1001, 422, 'a request has 1,001 events'),
    (b'[' + b'{},' * 300_000 + b'{}]', 422, 'a request has 300,001 events'),
    ([GOOD, GOOD | {'kind': 'x'}], 422, 'event 1: kind: must be one of'),
    (GOOD | {'user': 'x' * 10_240}, 422, 'user: has 10,240 characters; 256 are allowed'),
    (GOOD | {'time': time.time() + 1e6}, 422, 'in the future; correct the clock'),
    (GOOD | {'time': 1.7e12}, 422, 'must be in seconds since 1970, not in milliseconds'),
    (GOOD | {'id': '\ud800'}, 422, 'must be text on one line'),
    (GOOD | {'user': 'a\0b'}, 422, 'must be text on one line'),
    ('text', 422, 'an event must be an object'),
    (b' ' * 2_000_000, 413, 'the body has more than 1,048,576 bytes'),
  ],
)
def test_bad_events_get_one_message_and_store_nothing(live, body, status, message):
  address, place = live
  with contextlib.closing(open_store(str(place))) as store:
    before = sum(1 for _ in store.events())
    found, content = get(f'{address}/events', body)
    assert (found, message in content) == (status, True), content
    assert len(content) < 1000
    assert sum(1 for _ in store.events()) == before


@pytest.mark.parametrize('store', ['sqlite', 'redis', 'postgres'])
def test_a_nul_in_an_id_is_refused_with_every_store(environment, exports, tmp_path, store):
  with contextlib.ExitStack() as stack:
    if store == 'sqlite':
      place = f'{tmp_path}/events.db'
    elif store == 'redis':
      _, place = stack.enter_context(redis_server(tmp_path))
    else:
      _, place = stack.enter_context(postgres_server(stack.enter_context(postgres_folder())))
    flags = f'--export={exports}/sasrec', f'--events={place}'
    _, address = stack.enter_context(serve(environment, *flags))
    for route, body in (
      ('recommend?user=%00', None),
      ('recommend?user=a%00b', None),
      ('history?user=a%00b', None),
      ('recommend', {'user': 'a\0b'}),
    ):
      status, content = get(f'{address}/{route}', body)
      assert (status, 'user: ' in content, 'NUL' in content) == (422, True, True), content
    for field in ('user', 'item', 'id', 'request_id'):
      status, content = get(f'{address}/events', GOOD | {field: 'a\0b'})
      assert (status, f'{field}: ' in content) == (422, True), content
    assert send(address, GOOD)['accepted'] == 1


def test_pages_of_other_sites_cannot_send_events(live):
  address, _ = live
  body = json.dumps(GOOD).encode()
  for kind in ('text/plain', 'application/x-www-form-urlencoded', ''):
    status, content = get(f'{address}/events', body, **{'Content-Type': kind})
    assert (status, 'set Content-Type' in content) == (415, True)


def test_answers_and_clicks_are_logged_and_counted_by_position(live, recommender, exports):
  address, place = live
  user, other = list(recommender.users)[7:9]
  answer, unlogged = ask(address, user, k=4), ask(address, user, log=False)
  third = items(answer)[2]
  click = event(user, third, 'c1', request_id=answer['request_id'])
  before = metrics(address)
  send(address, click)
  send(address, click)  # Once.
  send(address, event(other, third, 'c2', request_id=answer['request_id']))  # Not shown to them.
  send(address, event(user, 'other', 'c3', request_id=answer['request_id']))  # Not shown at all.
  send(address, event(user, third, 'c4', request_id='nothing'))

  def clicks(text, position):
    found = re.search(rf'ur4rec_clicks_total{{arm="default",position="{position}"}} (\S+)', text)
    return float(found[1]) if found else 0.0

  after = metrics(address)
  assert [clicks(after, n) - clicks(before, n) for n in (1, 2, 3, 4)] == [0, 0, 1, 0]
  assert re.search(r'ur4rec_shown_total{arm="default",position="4"} ', after)
  assert 0 < float(re.search(r'^ur4rec_catalogue_coverage (\S+)', after, re.M)[1]) <= 1
  with contextlib.closing(open_store(str(place))) as store:
    (logged,) = store.shown_in([answer['request_id']])
    assert store.shown_in([unlogged['request_id']]) == []
  assert (logged.user, logged.arm) == (user, 'default')
  assert [(x.item, x.propensity) for x in logged.items] == [(item, 1) for item in items(answer)]
  manifest = (exports / 'sasrec' / 'manifest.json').read_bytes()
  assert logged.model == hashlib.sha256(manifest).hexdigest()[:12]


def feedback(environment, *flags):
  return Program('ur4rec_jax.feedback', flags, environment, ROOT).finish()


def test_reasons_tell_nobody_what_a_user_did(live, recommender):
  address, _ = live
  users, ids = list(recommender.users), recommender.item_ids
  known, stranger = users[21], 'somebody-new'
  exported = recommender.history(known)
  done = [item for item in ids if item not in exported][:3]
  for i, item in enumerate(done):
    send(address, event(known, item, f'why-{i}'), event(stranger, item, f'new-{i}'))
  for user, allowed in ((known, set(exported)), (stranger, set())):
    rows = ask(address, user, explain='true')['recommendations']
    named = {item['item'] for row in rows for item in row['because']}
    assert named <= allowed
    assert bool(named) == bool(allowed)


def test_a_deleted_user_is_forgotten_while_the_service_runs(
  live, recommender, environment, exports, tmp_path
):
  address, place = live
  user = list(recommender.users)[11]
  send(address, event(user, recommender.item_ids[5], 'x'))
  copy = shutil.copytree(exports / 'sasrec', tmp_path / 'model')
  flags = f'--events={place}', f'--delete_user={user}', f'--export={copy}'
  done = feedback(environment, *flags)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[0].startswith('deleted 1 event of the user')
  assert 'has forgotten the user' in done.stdout
  assert get(f'{address}/recommend?user={user}')[0] == 404
  assert get(f'{address}/history?user={user}')[0] == 404
  assert json.loads(get(f'{address}/users?search={user}')[1]) == []
  # An event from before the deletion, which some queue still held.
  late = event(user, 'i01', 'y', time=time.time() - 60)
  assert send(address, late) == {'accepted': 0, 'duplicates': 0, 'of_deleted_users': 1}
  assert get(f'{address}/recommend?user={user}')[0] == 404
  # The user comes back, as a new one.
  send(address, event(user, recommender.item_ids[5], 'z'))
  assert ask(address, user)['history']['items'] == 1
  # Buying something of the deleted history again tells nobody that it was there.
  for i, item in enumerate(recommender.history(user)):
    send(address, event(user, item, f'again-{i}'))
  rows = ask(address, user, explain='true')['recommendations']
  assert rows
  assert not any(row['because'] for row in rows)
  with serve(environment, f'--export={copy}') as (_, other):
    assert get(f'{other}/recommend?user={user}')[0] == 404
    assert ask(other, list(recommender.users)[12])['recommendations']


def test_no_user_is_deleted_without_an_id(tmp_path):
  place = tmp_path / 'events.db'
  with contextlib.closing(open_store(str(place))) as store:
    # A request with a history of its own has no user.
    store.write([], [Exposure('r', '', time.time(), 'default', 'abc', (Shown('lamp', 0.5),))])
    done = run_here(feedback_command.main, [f'--events={place}', '--delete_user='])
    assert (done.returncode, done.stdout) == (2, '')
    assert '--delete_user: is empty; give the id of a user' in done.stderr
    flags = f'--events={place}', '--delete_user=u001', '--export='
    done = run_here(feedback_command.main, flags)
    assert (done.returncode, done.stdout) == (2, '')
    assert '--export: is empty; give the exported folder' in done.stderr
    assert store.shown_in(['r'])


def test_the_log_becomes_tables_and_training_data(live, recommender, environment, tmp_path):
  address, place = live
  ids = recommender.item_ids
  for n in range(6):
    rows = [event(f'b{n}', ids[(n + i) % 7], i, ('click', 'buy')[i % 2]) for i in range(6)]
    send(address, *rows, event(f'b{n}', 'a,"b" ü', 'odd'))
    ask(address, f'b{n}')  # The next event has it written.
  send(address, event('b5', ids[7], 'last'))
  done = feedback(environment, f'--events={place}', f'--out={tmp_path}/log')
  assert done.returncode == 0, done.stderr
  next_line = done.stdout.splitlines()[-1]
  assert next_line.startswith('next: python -m data_prep.build_dataset --source=interactions ')
  command = next_line.removeprefix('next: python -m ').replace('data/live', f'{tmp_path}/data')
  module, *flags = command.split()
  built = Program(module, flags, environment, ROOT).finish()
  assert built.returncode == 0, built.stderr
  from ur4rec_jax.data.dataset import read_interactions, read_items

  names = [item['original_id'] for item in read_items(tmp_path / 'data')]
  read = read_interactions(tmp_path / 'data')
  row = list(read.user_ids).index('b2')
  numbers = read.item_ids[read.offsets[row] : read.offsets[row + 1]]
  assert [names[n - 1] for n in numbers] == [*(ids[(2 + i) % 7] for i in range(6)), 'a,"b" ü']
  logs = read_logs(tmp_path / 'log/exposures.csv', tmp_path / 'log/events.csv')
  assert {'b0', 'b5'} <= {*logs.users.to_pylist()}
  assert {'click', 'buy'} <= {*logs.kinds}
  header, first = (tmp_path / 'log' / 'exposures.csv').read_text().splitlines()[:2]
  assert header == 'request_id,user,time,arm,model,item,position,score,propensity'
  assert first.count(',') == header.count(',')


def test_models_change_under_load_and_a_damaged_one_is_refused(
  environment, exports, recommender, shop, tmp_path
):
  folder, place = tmp_path / 'models', tmp_path / 'events.db'
  registry.promote(folder, exports / 'sasrec')
  other, _ = make(shop, 'text')
  history = recommender.item_ids[:3]
  lists = [model.top([history], 10).items[0] for model in (recommender, other)]
  assert lists[0] != lists[1]
  flags = f'--registry={folder}', f'--events={place}'
  with serve(environment, *flags) as (process, address):
    send(address, *(event('ann', item, i) for i, item in enumerate(history)))
    found, is_over = [], threading.Event()

    def keep_asking():
      while not is_over.is_set():
        found.append(get(f'{address}/recommend?user=ann'))

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
      thread.start()
    try:
      assert registry.promote(folder, exports / 'text') == '000002'
      assert process.stdout.readline() == 'serving version 000002 after 000001\n'
      assert items(ask(address, 'ann')) == lists[1]
      damaged = shutil.copytree(exports / 'sasrec', tmp_path / 'damaged')
      content = bytearray((damaged / 'arrays.npz').read_bytes())
      content[len(content) // 2] ^= 1
      (damaged / 'arrays.npz').write_bytes(content)
      registry.promote(folder, damaged)
      line = process.stderr.readline()
      assert line.startswith('version 000003 is refused, 000002 goes on: ')
      assert 'has changed since it was written' in line
      assert items(ask(address, 'ann')) == lists[1]
      (folder / 'current.json').write_text('{')
      assert 'current.json: is damaged' in process.stderr.readline()
      assert items(ask(address, 'ann')) == lists[1]
      history_of = {'version': '000003', 'history': ['000001', '000002', '000003']}
      (folder / 'current.json').write_text(json.dumps(history_of))
      process.stderr.readline()
      assert registry.rollback(folder) == '000002'
      time.sleep(2)
      assert registry.rollback(folder) == '000001'
      assert process.stdout.readline() == 'serving version 000001 after 000002\n'
      assert items(ask(address, 'ann')) == lists[0]
    finally:
      is_over.set()
      for thread in threads:
        thread.join()
    assert {status for status, _ in found} == {200}
    assert {tuple(items(json.loads(content))) for _, content in found} == set(map(tuple, lists))
    text = metrics(address)
    assert 'ur4rec_model_refused_total{version="000003"} ' in text
    assert 'ur4rec_model_served{version="000001"} 1.0' in text
    assert 'ur4rec_model_swaps_total 2.0' in text
    assert 'ur4rec_compilations_total 0.0' in text
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
  with contextlib.closing(open_store(str(place))) as store:
    assert len(list(store.events())) == 3
    assert sum(1 for _ in store.exposures()) >= len(found)


def test_the_served_version_stays_in_the_registry(environment, exports, recommender, tmp_path):
  folder = tmp_path / 'models'
  registry.promote(folder, exports / 'sasrec')
  other = shutil.copytree(exports / 'text', tmp_path / 'other')
  kept = lambda: sorted(path.name for path in (folder / 'versions').iterdir())

  (other / 'arrays.npz').write_bytes(b'damaged')

  def promote_damaged():
    manifest = json.loads((other / 'manifest.json').read_text())
    del manifest['sha256']
    manifest['settings']['about']['time'] = time.time()  # Another version each time.
    (other / 'manifest.json').write_text(exported.manifest_text(manifest))
    registry.promote(folder, other, keep_versions=2)

  with serve(environment, f'--registry={folder}') as (process, address):
    for _ in range(3):
      promote_damaged()
    assert '000001 goes on' in process.stderr.readline()
    assert kept() == ['000001', '000003', '000004']
    assert get(f'{address}/recommend', {'history': recommender.item_ids[:1]})[0] == 200
  promote_damaged()
  assert kept() == ['000004', '000005']


def test_without_its_store_nothing_is_acknowledged_and_histories_still_work(
  environment, exports, recommender, tmp_path
):
  ids = recommender.item_ids
  with (
    redis_server(tmp_path) as (redis, place),
    serve(environment, f'--export={exports}/sasrec', f'--events={place}') as (_, address),
  ):
    send(address, event('ann', ids[0], '1'))
    assert items(ask(address, 'ann')) == recommender.top([ids[:1]], 10).items[0]
    redis.kill()
    redis.wait()
    status, content = get(f'{address}/events', event('ann', ids[1], '2'))
    # Not that nothing was stored: a server that is only slow may store it after all.
    assert (status, 'not acknowledged, send the same again later' in content) == (503, True)
    status, content = get(f'{address}/recommend?user=ann')
    assert (status, 'give a history instead' in content) == (503, True)
    assert get(f'{address}/recommend', {'history': ids[:1]})[0] == 200
    assert get(f'{address}/health')[0] == 200
    port = int(place.rsplit(':', 1)[1].split('/')[0])
    with redis_server(tmp_path, port=port):
      assert send(address, event('ann', ids[1], '2'))['accepted'] == 1
      assert ask(address, 'ann')['history']['items'] == 2


def test_a_flood_of_events_is_slowed_down(environment, exports, tmp_path):
  flags = f'--events={tmp_path}/events.db', '--events_per_second=100'
  with serve(environment, f'--export={exports}/sasrec', *flags) as (_, address):
    flood = lambda n: get(f'{address}/events', [event('u', 'i', f'{n}-{i}') for i in range(500)])
    answers = [flood(n) for n in range(5)]
    assert [status for status, _ in answers] == [200, 200, 429, 429, 429]
    assert 'more than 100 events a second; try again in' in answers[-1][1]
    assert get(f'{address}/health')[0] == 200


def test_a_flood_of_lists_cannot_fill_the_store(environment, exports, recommender, tmp_path):
  place = tmp_path / 'events.db'
  flags = f'--events={place}', '--shown_per_second=10'
  with serve(environment, f'--export={exports}/sasrec', *flags) as (_, address):
    question = {'history': recommender.item_ids[:1], 'k': 40}
    answers = [request(f'{address}/recommend', question) for _ in range(5)]
    assert [status for status, *_ in answers] == [200, 200, 429, 429, 429]
    _, headers, content = answers[-1]
    assert 'more than 10 items a second in answers that are logged; try again in' in content
    assert 1 <= int(headers['Retry-After']) <= 4
    assert get(f'{address}/recommend', question | {'log': False})[0] == 200
    assert send(address, event('u', 'i', '1'))['accepted'] == 1
    time.sleep(int(headers['Retry-After']))
    assert get(f'{address}/recommend', question)[0] == 200
    send(address, event('u', 'i', '2'))  # Exposures are written with the next events.
  with contextlib.closing(open_store(str(place))) as store:
    assert [len(x.items) for x in store.exposures()] == [40, 40, 40]


FAILING = """
import asyncio, sys
from ur4rec_jax import serve
from ur4rec_jax.service.batcher import Batcher
from ur4rec_jax.service.feedback import Feedback
async def fail(*_):
  await asyncio.sleep(1)
  raise ZeroDivisionError('an unknown fault')
owner, name = sys.argv[1].split('.')
setattr(globals()[owner], name, fail)
serve.main(sys.argv[2:])
"""


@pytest.mark.parametrize('part', ['Feedback.expire', 'Batcher._next_batch'])
def test_a_background_task_that_fails_ends_the_service(environment, exports, tmp_path, part):
  command = [sys.executable, '-c', FAILING, part, '--port=0', '--batch=1', '--keep_days=9']
  command += [f'--export={exports}/sasrec', f'--events={tmp_path}/events.db']
  with service(command, environment) as (process, _):
    line = process.stderr.readline()
    assert line.startswith('error: the background task ')
    assert "has failed: ZeroDivisionError('an unknown fault')" in line
    assert process.wait(60) == FailedTaskError.exit_code
    assert EXIT_CODES[process.returncode].restart
    assert process.stderr.read() == ''
    assert process.stdout.read().startswith('stopped: 0 of 0 accepted requests answered')


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), 'give one of --export=FOLDER and --registry=FOLDER'),
    (('--export=x', '--registry=y'), 'give one of --export=FOLDER and --registry=FOLDER'),
    (('--registry=nowhere',), '--registry=nowhere: has no model yet'),
    (('--export=x', '--event_kinds=click,bye'), "--event_kinds: 'bye' is none of view, click"),
    (('--export=x', '--shown_per_second=0'), '--shown_per_second=0: must be more than 0'),
    (('--export=x', '--keep_days=0'), '--keep_days=0: must be more than 0'),
    (('--export=x', '--events=kafka://y'), 'kafka://: no such store of events'),
    (('--export=x', '--events=no/such/folder.db'), 'its folder does not exist'),
  ],
)
def test_bad_flags_are_one_message(environment, flags, message):
  assert message in refusal(environment, *flags)


def test_the_route_of_events_keeps_to_its_openapi(live, tmp_path):
  address, _ = live
  command = [sys.executable, '-m', 'schemathesis.cli', 'run', f'{address}/openapi.json']
  command += ['--checks=all', '--max-examples=8', '--seed=1', '--generation-database=none']
  command += ['--include-path=/events', '--include-path=/recommend']
  # A schema cannot say that times must not lie in the future.
  command += ['--exclude-checks=positive_data_acceptance']
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '3 selected' in done.stdout

"""The service as a process on a free port: answers, limits, overload, stop, and its page."""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers import services
from tests.helpers.recommenders import make
from tests.helpers.runs import ROOT
from tests.helpers.services import refusal, service
from tests.helpers.services import request as get
from ur4rec_jax.export import export
from ur4rec_jax.service.admission import make_host_check

# A process in which nothing of what training needs can be imported.
ALONE = """
import sys
for name in ('flax', 'optax', 'orbax', 'ml_collections', 'absl', 'pyarrow', 'pandas', 'tqdm',
             'tensorflow_datasets', 'torch', 'PIL', 'ur4rec_jax.models', 'data_prep'):
  sys.modules[name] = None
from ur4rec_jax.serve import main
main()
"""


@pytest.fixture(scope='module')
def recommender(shop):
  return make(shop, 'paper')[0]


@pytest.fixture(scope='module')
def folder(recommender, make_once):
  """An exported folder that knows its users, who have texts of their own; read only."""
  make_model = lambda folder: export(recommender, folder / 'model', with_users=True)
  return make_once('served', make_model) / 'model'


@pytest.fixture(scope='module')
def serve(environment):
  """Starts the service: `serve(folder, *flags)` gives the process and the start of its address."""

  def serve(folder, *flags):
    command = [sys.executable, '-c', ALONE, f'--export={folder}', '--port=0', *flags]
    return service(command, environment)

  return serve


@pytest.fixture(scope='module')
def serve_forked(environment):
  """As `serve`, where it does not matter what the service imports, which takes a second."""
  return lambda folder, *flags: services.serve(environment, f'--export={folder}', *flags)


@pytest.fixture(scope='module')
def address(serve, folder):
  with serve(folder, '--batch=4', '--allowed_hosts=shop.example') as (_, address):
    yield address


def ask(address, **question):
  status, _, content = get(f'{address}/recommend', question)
  assert status == 200, content
  return json.loads(content)


def metric(address, name):
  (value,) = re.findall(rf'^{name} (\S+)$', get(f'{address}/metrics')[2], re.MULTILINE)
  return float(value)


def check(found, answer, recommender):
  rows = found['recommendations']
  assert [row['item'] for row in rows] == answer.items[0]
  assert [row['title'] for row in rows] == answer.titles[0]
  assert [row['rank'] for row in rows] == list(range(1, len(rows) + 1))
  np.testing.assert_allclose([row['score'] for row in rows], answer.scores[0], atol=1e-5)
  shares = [[row['shares'][name] for name in recommender.share_names] for row in rows]
  np.testing.assert_allclose(shares, answer.shares[0], atol=1e-5)


def test_requests_at_once_are_answered_as_by_the_trainer_and_nothing_is_compiled(
  recommender, address
):
  ids, users = recommender.item_ids, list(recommender.users)
  questions = [{'history': [ids[(7 * n + i) % 60] for i in range(n)]} for n in (1, 3, 20, 33, 50)]
  questions += [{'user': name} for name in users[:5]]
  options = [
    {},
    {'k': 12, 'without': ids[:9]},
    {'only': ids[20:40], 'keep_seen': True},
    {'k': 16, 'weights': {'sasrec': 0.25, 'retriever': 1.5}},
  ]
  questions = [question | more for question in questions for more in options]
  with ThreadPoolExecutor(12) as threads:
    answers = list(threads.map(lambda question: ask(address, **question), questions))
  for question, found in zip(questions, answers, strict=True):
    question = dict(question)
    user = question.pop('user', None)
    history = question.pop('history', None) or recommender.history(user)
    if weights := question.pop('weights', None):
      question['weights'] = [weights[branch] for branch in recommender.branches]
    rows = None if user is None else [recommender.users[user]]
    check(found, recommender.answer([history], users=rows, **question), recommender)
    assert found['user'] == user
    assert found['history'] == {'items': len(history), 'read': min(len(history), 20)}
  assert metric(address, 'ur4rec_compilations_total') == 0
  assert metric(address, 'ur4rec_batch_users_sum') >= len(questions)
  assert metric(address, 'ur4rec_batch_users_count') < metric(address, 'ur4rec_batch_users_sum')
  assert metric(address, 'ur4rec_requests_inside') == 0


def test_items_users_and_histories_are_found(recommender, address):
  fetch = lambda path: json.loads(get(f'{address}/{path}')[2])
  item, title = recommender.item_ids[7], recommender.titles[7]
  named = lambda path: [(found['item'], found['title']) for found in fetch(path)]
  assert (item, title) in named(f'items?search={title[:9].upper().split()[0]}')
  assert (item, title) in named(f'items?search={item}')
  assert [found['item'] for found in fetch('items')] == recommender.item_ids[:20]
  assert fetch('items?search=nothing%20has%20this') == []
  users = list(recommender.users)
  assert fetch('users') == users[:20]
  assert fetch(f'users?search={users[33]}') == [users[33]]
  history = fetch(f'history?user={users[3]}')
  assert [found['item'] for found in history] == recommender.history(users[3])
  assert fetch('health')['share_names'] == recommender.share_names


@pytest.mark.parametrize(
  ('body', 'status', 'message'),
  [
    ({'user': 'nobody'}, 404, "user 'nobody': is unknown"),
    ({'history': ['x', 'y']}, 404, 'none of its 2 items is in the catalogue'),
    ({'history': [-1, -2]}, 404, 'none of its 2 items is in the catalogue'),
    ({'history': ['i01'], 'only': ['x']}, 404, 'only: none of its 1 items'),
    ({'history': []}, 422, 'history: List should have at least 1 item'),
    ({'history': ['i01'] * 10_000}, 422, 'history: List should have at most 1000 items'),
    ({'history': 'i01'}, 422, 'history: Input should be a valid list'),
    ({'history': [1.5]}, 422, 'history.0'),
    ({'history': [True]}, 422, 'history.0'),
    ({'history': ['x' * 1000]}, 422, 'history.0'),
    ({'history': None}, 422, 'history: Input should be a valid list'),
    ({'history': ['i01'], 'user': 'u001'}, 422, 'give one of history and user'),
    ({}, 422, 'give one of history and user'),
    ({'history': ['i01'], 'k': 0}, 422, 'k: Input should be greater than or equal to 1'),
    ({'history': ['i01'], 'k': 61}, 422, 'k: Input should be less than or equal to 60'),
    ({'history': ['i01'], 'k': 1.5}, 422, 'k: Input should be a valid integer'),
    ({'history': ['i01'], 'k': '3'}, 422, 'k: Input should be a valid integer'),
    ({'history': ['i01'], 'kk': 3}, 422, 'kk: Extra inputs are not permitted'),
    ({'history': ['i01'], 'weights': {'sasrec': -1}}, 422, 'weights.sasrec'),
    ({'history': ['i01'], 'weights': {'sasrec': float('nan')}}, 422, 'weights.sasrec'),
    ({'history': ['i01'], 'weights': {'other': 1}}, 422, 'weights.other'),
    ({'\ud800': ['\ud800']}, 422, 'should be a valid string'),
    ([], 422, 'valid'),
    (b'', 422, 'required'),
    (b'{"history": [', 400, 'the body is no JSON'),
    (b'\xff\xfe', 400, ''),
    (b'[' * 100_000, 400, ''),
    (b'1' * 10_000, 400, ''),
    (b' ' * 10_000_000, 413, 'the body has more than 1,048,576 bytes'),
  ],
)
def test_bad_requests_get_one_message(address, body, status, message):
  found, headers, content = get(f'{address}/recommend', body)
  assert (found, headers['Content-Type']) == (status, 'application/json')
  (detail,) = json.loads(content).values()
  assert message in detail
  assert len(content) < 1000
  assert 'Traceback' not in content


def test_a_body_that_is_not_said_to_be_json_is_told(address):
  body = b'{"history": ["i01"]}'
  for kind in ('application/x-www-form-urlencoded', ''):  # The first is that of `curl -d`.
    status, _, content = get(f'{address}/recommend', body, **{'Content-Type': kind})
    assert (status, 'set Content-Type: application/json' in content) == (422, True)


def test_bad_users_among_others_are_named_alone(address, recommender):
  good = [{'history': recommender.item_ids[i : i + 2]} for i in range(10)]
  bad = [{'history': [f'nothing-{i}']} for i in range(5)]
  bad += [{'user': f'nobody-{i}'} for i in range(5)]
  questions = [question for pair in zip(good, bad, strict=True) for question in pair]
  with ThreadPoolExecutor(20) as threads:
    answers = list(threads.map(lambda question: get(f'{address}/recommend', question), questions))
  assert [status for status, *_ in answers] == [200, 404] * 10
  for question, (_, _, content) in zip(bad, answers[1::2], strict=True):
    assert (question.get('user') or question['history'][0]) in json.loads(content)['detail']


def raw(address, *parts):
  """Sends bytes as they are, and gives what comes back until the connection is closed."""
  host, port = address.removeprefix('http://').split(':')
  with socket.create_connection((host, int(port)), timeout=60) as connection:
    for part in parts:
      connection.sendall(part)
    return b''.join(iter(lambda: connection.recv(65536), b'')).decode()


def test_bodies_without_length_and_those_that_do_not_come_are_limited(address):
  head = b'POST /recommend HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
  head += b'Content-Type: application/json\r\n'
  chunked = head + b'Transfer-Encoding: chunked\r\n\r\n'
  chunk = b'10000\r\n' + b' ' * 0x10000 + b'\r\n'
  assert raw(address, chunked, *[chunk] * 160, b'0\r\n\r\n').startswith('HTTP/1.1 413 ')
  body = b'{"history": [1]}'
  whole = raw(address, chunked, b'%x\r\n%s\r\n0\r\n\r\n' % (len(body), body))
  assert 'none of its 1 items' in whole
  assert raw(address, head + b'Content-Length: 9\r\n\r\n', b'{').startswith('HTTP/1.1 408 ')
  assert raw(address, b'nonsense\r\n\r\n').startswith('HTTP/1.1 400 ')
  assert ask(address, user='u001')['recommendations']


def test_headers_are_limited_whole_or_not_one_or_many(address):
  start = b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
  for header in (
    b'A: ' + b'b' * 70_000,
    b'A: b\r\n' * 12_000,
    b'A: b\r\n' * 300,
    b'A: ' + b'b' * 3_000_000,
  ):
    for end in (b'', b'\r\n\r\n'):
      assert raw(address, start, header, end).startswith('HTTP/1.1 431 ')
  assert raw(address, start.replace(b'/health', b'/' + b'a' * 70_000) + b'\r\n')[9:12] == '431'
  assert raw(address, start + b'A: ' + b'b' * 60_000 + b'\r\n\r\n')[9:12] == '200'
  trailers = (
    start.replace(b'GET /health', b'POST /recommend') + b'Transfer-Encoding: chunked\r\n\r\n'
  )
  assert raw(address, trailers, b'2\r\n{}\r\n0\r\n', b'A: b\r\n' * 60_000)[9:12] == '431'


def test_health_and_metrics_read_no_bodies(address):
  for path in (b'health', b'metrics'):
    start = b'POST /%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n' % path
    assert raw(address, start + b'Content-Length: 9999\r\n\r\n')[9:12] == '405'
    start = start.replace(b'POST', b'GET')
    assert raw(address, start + b'Content-Length: 9999\r\n\r\n')[9:12] == '200'


@pytest.mark.parametrize(
  ('host', 'status'),
  [
    ('localhost', 200),
    ('LOCALHOST:80', 200),
    ('127.0.0.1:5', 200),
    ('[::1]:80', 200),
    ('shop.example', 200),
    ('evil.example', 421),
    ('localhost.evil.example', 421),
    ('evil.example:127.0.0.1', 421),
    ('10.0.0.1', 421),
    ('', 421),
  ],
)
def test_only_requests_that_name_the_service_are_answered(address, host, status):
  found, _, content = get(f'{address}/health', Host=host)
  assert found == status
  assert status == 200 or '--allowed_hosts' in content
  assert raw(address, b'GET /health HTTP/1.0\r\n\r\n').startswith('HTTP/1.1 400 ')


def test_names_are_checked_only_where_addresses_cannot_be_made_to_point_elsewhere():
  everywhere = make_host_check('0.0.0.0')
  assert everywhere('10.1.2.3:80')
  assert everywhere('[fe80::1]:80')
  assert not everywhere('evil.example')
  assert make_host_check('10.1.2.3')('10.1.2.3')
  assert make_host_check('127.0.0.1', ['*'])('evil.example')


def has_ipv6():
  try:
    socket.create_server(('::1', 0), family=socket.AF_INET6).close()
  except OSError:
    return False
  return True


@pytest.mark.skipif(not has_ipv6(), reason='this machine has no IPv6')
def test_an_ipv6_address_is_served(serve_forked, folder):
  with serve_forked(folder, '--batch=1', '--host=::') as (_, address):
    port = address.removeprefix('http://[::]:')
    for host in ('[::1]', '127.0.0.1'):
      assert get(f'http://{host}:{port}/health')[0] == 200


def open_connections(address, count, content, source='127.0.0.1'):
  """Opens connections that send something and then nothing."""
  host, port = address.removeprefix('http://').split(':')
  found = []
  for _ in range(count):
    connection = socket.create_connection((host, int(port)), 60, (source, 0))
    connection.sendall(content)
    found.append(connection)
  return found


def is_closed(connection):
  """Tells whether the service has closed a connection without an answer."""
  try:
    return connection.recv(1) == b''
  except ConnectionResetError:
    return True


def test_silent_connections_lock_nobody_out_and_are_closed(serve_forked, folder):
  limit = '--client_connections=20'
  with serve_forked(folder, '--batch=1', limit) as (process, address):
    start = b'GET /health HTTP/1.1\r\nHost: localhost\r\n'
    lazy = open_connections(address, 20, start + b'Content-Length: 2\r\n\r\n')
    for connection in lazy:  # Their bodies come after the answers.
      assert connection.recv(12) == b'HTTP/1.1 200'
      connection.sendall(b'{}')
    silent = open_connections(address, 60, b'') + open_connections(address, 60, start)
    others = open_connections(address, 15, start, '127.0.0.2')
    assert get(f'{address}/health')[0] == 200
    files = len(os.listdir(f'/proc/{process.pid}/fd'))
    # The oldest ones of the client gave way to the new ones, the other client's stayed.
    assert all(map(is_closed, silent[:90]))
    for connection in others:
      assert connection.recv(12) == b'HTTP/1.1 408'
    for connection in (*lazy, *silent, *others):
      connection.close()
    assert get(f'{address}/health')[0] == 200
    assert len(os.listdir(f'/proc/{process.pid}/fd')) < files - 15


def test_hostile_clients_of_all_kinds_stop_nothing(folder, environment):
  command = [sys.executable, '-m', 'benchmarks.robustness.hostile_clients', f'--export={folder}']
  command += ['--seconds=5', '--calm_seconds=2']
  done = subprocess.run(
    command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
  )
  found = json.loads(done.stdout.splitlines()[-1])
  # Other processes of the machine decide about the wait in so short a time.
  assert [name for name in found['broken'] if name != 'p99'] == [], found
  assert found['all_answers'].keys() >= {'200', '400', '421', '431'}
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--client_connections=0',), '--client_connections=0: must be from 1'),
    ((), 'arrays.npz: has changed since it was written; export it again'),
    (('--queue=0',), '--queue=0: must be from 1 to 100000'),
    (('--export=nowhere',), 'nowhere: no exported model'),
  ],
)
def test_a_bad_start_is_one_message(folder, tmp_path, environment, flags, message):
  changed = shutil.copytree(folder, tmp_path / 'model')
  content = bytearray((changed / 'arrays.npz').read_bytes())
  content[len(content) // 2] ^= 1
  (changed / 'arrays.npz').write_bytes(content)
  assert message in refusal(environment, f'--export={changed}', *flags)


def test_an_export_without_users_says_so_and_a_taken_port_is_named(
  recommender, serve_forked, tmp_path, environment
):
  export(recommender, tmp_path / 'model')
  with serve_forked(tmp_path / 'model', '--batch=1') as (_, address):
    status, _, content = get(f'{address}/recommend', {'user': 'u001'})
    assert (status, 'this export knows no users' in content) == (404, True)
    assert json.loads(get(f'{address}/users')[2]) == []
    port = address.rsplit(':', 1)[1]
    line = refusal(environment, f'--export={tmp_path}/model', '--batch=1', f'--port={port}')
  assert 'cannot be opened' in line


# Ids that could lead elsewhere, or that an address cannot hold as they are.
ODD_IDS = [
  'a/b',
  '../../manifest.json',
  '/etc/passwd',
  'ü 50% ?#&',
  'a%2Fb',
  '...',
  '\'"<img>',
  'x\\y',
]


@pytest.fixture(scope='module')
def illustrated(small_shop, tmp_path_factory):
  """An export with pictures of all items but the last; the first items have odd ids."""
  folder = tmp_path_factory.mktemp('illustrated') / 'model'
  recommender = copy.copy(make(small_shop, 'multimodal')[0])
  files = [*recommender.picture_files()[:-1], None]
  recommender.picture_files = lambda: files
  recommender.items = {
    **recommender.items,
    'ids': [*ODD_IDS, *recommender.item_ids[len(ODD_IDS) :]],
  }
  export(recommender, folder)
  return folder


def test_pictures_are_served_by_the_address_in_the_answers_and_kept(serve, illustrated):
  def fetch(picture, **headers):
    url = f'{address}/{picture}'
    try:
      with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
      return error.code, error.headers, error.read()

  with serve(illustrated, '--batch=1') as (_, address):
    items = {row['item']: row for row in json.loads(get(f'{address}/items')[2])}
    assert list(items)[: len(ODD_IDS)] == ODD_IDS
    assert json.loads(get(f'{address}/health')[2])['pictures'] == len(items) - 1
    contents = set()
    for name in list(items)[:-1]:
      status, headers, content = fetch(items[name]['picture'])
      assert (status, headers['Content-Type']) == (200, 'image/jpeg')
      assert headers['Cache-Control'] == 'public, max-age=31536000, immutable'
      contents.add(content)
      again = fetch(items[name]['picture'], **{'If-None-Match': headers['ETag']})
      assert (again[0], again[2]) == (304, b'')
      # Without the version in the address the picture may change.
      assert fetch(items[name]['picture'].split('?')[0])[1]['Cache-Control'] == 'no-cache'
    assert len(contents) == len(items) - 1
    for row in ask(address, history=[ODD_IDS[0]], k=19)['recommendations']:
      assert row.get('picture') == items[row['item']].get('picture')
    last = list(items)[-1]
    assert 'picture' not in items[last]
    for path in (last, '', 'nothing', '..%2F..%2Fmanifest.json%00', '%FF', '../manifest.json'):
      assert fetch(f'pictures/{path}')[0] == 404, path
    assert fetch('pictures/' + 'x' * 300)[0] == 422


def test_overload_is_refused_and_stopping_loses_nothing(folder, environment):
  command = [
    sys.executable,
    '-m',
    'benchmarks.speed.serve_load',
    f'--export={folder}',
    '--p99_ms=100',
  ]
  command += ['--seconds=2', '--capacity_seconds=1', '--batch=4']
  done = subprocess.run(
    command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
  )
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['refused'] > 0
  assert found['answered'] == found['accepted'] == found['service_says_answered'] > 0
  assert found['other_statuses'] == found['refused_without_retry_after'] == 0
  assert found['exit_code'] == 0
  assert 'Traceback' not in done.stderr


def test_the_service_keeps_to_its_openapi(address, tmp_path):
  command = [sys.executable, '-m', 'schemathesis.cli', 'run', f'{address}/openapi.json']
  command += ['--checks=all', '--max-examples=15', '--seed=1', '--generation-database=none']
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '9 selected' in done.stdout


@pytest.mark.parametrize('by', ['sequence', 'content', 'both', 'users'])
def test_similar_items(recommender, address, by):
  item = recommender.item_ids[7]
  status, _, content = get(f'{address}/similar?item={item}&k=6&by={by}')
  assert status == 200, content
  expected = recommender.similar(item, k=6, by=by)
  found = json.loads(content)
  assert [row['item'] for row in found] == [row['item'] for row in expected]
  assert [row['title'] for row in found] == [row['title'] for row in expected]


def test_wrong_questions_about_similar_items(address, recommender):
  status, _, content = get(f'{address}/similar?item=nothing')
  assert (status, 'is in the catalogue' in content) == (404, True)
  assert get(f'{address}/similar?item={recommender.item_ids[0]}&k=0')[0] == 422
  assert get(f'{address}/similar?item={recommender.item_ids[0]}&by=colour')[0] == 422


def test_the_service_follows_rules(serve, folder, recommender, tmp_path):
  ids = recommender.item_ids
  lines = [f'{name},{"ab"[i % 2]},{i % 3}' for i, name in enumerate(ids)]
  (tmp_path / 'goods.csv').write_text('\n'.join(['sku,kind,stock', *lines]))
  rules = tmp_path / 'rules.toml'
  rules.write_text(
    'attributes = "goods.csv"\nbought = "keep"\n[[filter]]\nwhere = "stock > 0"\n[[cap]]\n'
    f'attribute = "kind"\nmost = 3\n[[pin]]\nitem = "{ids[1]}"\nposition = 1\n[diversity]\n'
    'strength = 0.2'
  )
  with serve(folder, '--batch=4', f'--rules={rules}') as (_, address):
    found = ask(address, history=ids[:4], k=5)
    rows = found['recommendations']
    assert rows[0]['item'] == ids[1]
    assert rows[0]['rules'] == ['pinned to position 1']
    kinds = [ids.index(row['item']) % 2 for row in rows]
    assert max(map(kinds.count, (0, 1))) <= 3
    assert all(ids.index(row['item']) % 3 for row in rows)
    assert [row['rank'] for row in rows] == [1, 2, 3, 4, 5]
    short = ask(address, history=ids[:4], k=8)
    assert len(short['recommendations']) == 6
    assert 'would exceed a cap (3 of one kind)' in short['notes'][0]
    plain = ask(address, history=ids[:4], k=5, rules=False, keep_seen=True)
    check(plain, recommender.top([ids[:4]], k=5, keep_seen=True), recommender)
    with ThreadPoolExecutor(8) as pool:  # Requests with and without rules share the service.
      again = pool.map(lambda i: ask(address, history=ids[:4], k=5, rules=bool(i % 2)), range(8))
      lists = [[row['item'] for row in answer['recommendations']] for answer in again]
    assert lists[1::2] == [[row['item'] for row in rows]] * 4
    assert metric(address, 'ur4rec_compilations_total') == 0


def test_buying_again_is_answered_for_each_history(serve_forked, folder, recommender, tmp_path):
  rules = tmp_path / 'rules.toml'
  rules.write_text('bought = "only"')
  ids = recommender.item_ids
  asked = [ids[i : i + 3] for i in range(4)]
  with (
    serve_forked(folder, '--batch=4', f'--rules={rules}') as (_, address),
    ThreadPoolExecutor(4) as pool,
  ):
    found = list(pool.map(lambda history: ask(address, history=history), asked))
  for history, answer in zip(asked, found, strict=True):
    assert {row['item'] for row in answer['recommendations']} == set(history)


# Texts that are seen, and their contrast with what is behind them, as WCAG has it.
CONTRASTS = """() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    const [r, g, b, a = 1] = parse(getComputedStyle(element).backgroundColor);
    return a ? [r, g, b] : behind(element.parentElement);
  };
  return [...document.body.querySelectorAll('*')].filter(element => element.checkVisibility()
      && !element.closest('.poster, script')
      && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
    .map(element => {
      const two = [luminance(parse(getComputedStyle(element).color)), luminance(behind(element))];
      return [element.textContent, (Math.max(...two) + .05) / (Math.min(...two) + .05)];
    });
}"""


@pytest.mark.parametrize('width', [390, 1280])
def test_the_page_shows_pictures_and_letters_where_there_are_none(
  browser, serve_forked, illustrated, tmp_path, width
):
  damaged = shutil.copytree(illustrated, tmp_path / 'model')
  packed = bytearray((damaged / 'pictures.bin').read_bytes())
  packed[100] ^= 1  # Of the first item.
  (damaged / 'pictures.bin').write_bytes(packed)
  with serve_forked(damaged, '--batch=1') as (_, address):
    page = browser.new_page(viewport={'width': width, 'height': 844})
    page.goto(address)
    names = json.loads(get(f'{address}/items')[2])
    first, second, last = names[0], names[1], names[-1]
    for item in (first, second, last):
      page.get_by_label('Add a title').fill(item['item'])
      page.get_by_role('option', name=item['title']).first.click()
    # The newest one is above: it has no picture, and the picture of the oldest is damaged.
    page.wait_for_function(
      """() => [...document.querySelectorAll('#history .poster')].map(x => x.tagName).join()
      === 'DIV,IMG,DIV' && document.querySelector('#history img').naturalWidth"""
    )
    shown = page.locator('#history img')
    assert shown.get_attribute('alt') == second['title']
    assert shown.get_attribute('loading') == 'lazy'
    page.wait_for_function(
      """() => [...document.querySelectorAll('#found img')].some(x => x.naturalWidth)"""
    )
    assert page.evaluate('document.documentElement.scrollWidth') == width
    page.close()


def test_the_page_does_not_move_while_it_fills(browser, address):
  page = browser.new_page(viewport={'width': 390, 'height': 844})
  answer = page.goto(address)
  assert answer.header_value('Content-Encoding') == 'gzip'
  page.wait_for_function(
    '() => document.querySelector("#status").textContent.startsWith("based on")'
  )
  page.wait_for_function('() => document.querySelector("#found .why")')
  shifts = """() => new Promise(done => {
    new PerformanceObserver(list => done(list.getEntries().map(entry => entry.value)))
      .observe({type: 'layout-shift', buffered: true});
    setTimeout(() => done([]), 500);
  })"""
  # Below 0.1 is good: https://web.dev/articles/cls.
  assert sum(page.evaluate(shifts)) < 0.1
  heights = page.locator('#found .rank').evaluate_all('all => all.map(x => x.offsetHeight)')
  assert len(heights) == 10
  assert len(set(heights)) == 1  # The two digits of 10 are side by side.
  page.close()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_recommends_by_user_by_titles_and_by_weights(
  browser, address, recommender, scheme
):
  page = browser.new_page(color_scheme=scheme, viewport={'width': 390, 'height': 844})
  fetched, problems = [], []
  page.on('request', lambda request: fetched.append(request.url))
  page.on('console', lambda message: problems.append(message.text))
  page.on('pageerror', lambda error: problems.append(str(error)))

  def shown(question):
    """Waits until the page shows the answer to a question."""
    rows = ask(address, **question)['recommendations']
    expected = [f'{row["title"]} {row["score"]:.2f}' for row in rows]
    page.wait_for_function(
      """expected => JSON.stringify(expected) === JSON.stringify(
      [...document.querySelectorAll('#found > li')].map(row =>
      row.querySelector('.title').textContent + ' ' + row.querySelector('.score').textContent))""",
      arg=expected,
      timeout=60_000,
    )
    return rows

  page.goto(address)
  users = list(recommender.users)
  shown({'user': users[0]})
  # By keyboard alone: the second user that is found.
  page.get_by_label('Known user').focus()
  page.keyboard.type(users[33][:-1])
  first = f'{users[33][:-1]}0'
  page.wait_for_function('x => document.querySelector("#user-0")?.textContent === x', arg=first)
  page.keyboard.press('ArrowDown')
  found = page.locator('#user-1').inner_text()
  page.keyboard.press('Enter')
  shown({'user': found})
  rows = page.locator('#found > li')
  names = [name for name in recommender.share_names if name != 'retriever']
  assert rows.first.locator('.bar i').count() == len(names) == page.locator('#legend li').count()

  # The reasons come a moment after the list.
  reasons = ask(address, user=found, explain=True)['recommendations']
  for row in reasons:
    expected = f'{row["why"]}. '.lstrip('. ') + row['sentence']
    page.wait_for_function(
      "([i, text]) => document.querySelectorAll('#found .why')[i].textContent.endsWith(text)",
      arg=[row['rank'] - 1, expected],
    )

  slider = page.get_by_role('slider', name='SASRec')
  slider.focus()
  page.keyboard.press('Home')
  changed = shown({'user': found, 'weights': {'sasrec': 0}})
  before = [row['item'] for row in ask(address, user=found)['recommendations']]
  moved = [row['item'] for row in changed] != before
  assert (page.locator('.move').count() > 0) == moved
  page.get_by_role('button', name='As trained').click()
  shown({'user': found})

  page.get_by_role('button', name='Clear').click()
  page.get_by_text('Choose a user or add a title to begin.').wait_for()
  ids, titles = recommender.item_ids, recommender.titles
  for title in (titles[5], titles[8]):
    page.get_by_label('Add a title').fill(title)
    page.get_by_role('option', name=title).first.click()
  shown({'history': [ids[5], ids[8]]})
  page.get_by_role('button', name=f'Remove {titles[8]}').click()
  shown({'history': [ids[5]]})

  low = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]
  assert low == []
  assert page.evaluate('document.documentElement.scrollWidth') == 390
  unnamed = 'input:not([aria-label])'
  assert page.eval_on_selector_all(unnamed, 'all => all.filter(x => !x.labels.length).length') == 0
  assert problems == []
  assert {url for url in fetched if not url.startswith((address, 'data:'))} == set()
  page.close()


def test_the_page_asks_no_reasons_for_a_history_that_was_cleared_meanwhile(browser, address):
  page = browser.new_page()
  problems = []
  page.on('console', lambda message: problems.append(message.text))
  # The page asks for reasons 300 ms after a list appears, and for a new list 60 ms after a change.
  page.add_init_script("""
    addEventListener('DOMContentLoaded', () => new MutationObserver((changes, observer) => {
      observer.disconnect();
      setTimeout(() => document.getElementById('clear').click(), 270);
    }).observe(document.getElementById('found'), {childList: true}))""")
  page.goto(address)
  page.get_by_text('Choose a user or add a title to begin.').wait_for()
  page.wait_for_timeout(500)
  assert page.locator('#found > li').count() == 0
  assert problems == []
  page.close()


def test_the_page_says_that_the_service_is_busy_and_asks_again(browser, address):
  page = browser.new_page()
  asked = []

  def busy_at_first(route):
    asked.append(route)
    if len(asked) > 2:
      return route.continue_()
    detail = {'detail': 'the queue is full'} if len(asked) == 1 else None
    content = json.dumps(detail) if detail else '<html>'  # A proxy answers with a page.
    return route.fulfill(status=503, headers={'Retry-After': '1'}, body=content)

  page.route('**/recommend', busy_at_first)
  page.goto(address)
  page.get_by_text('the queue is full (asking again in 1 s)').wait_for()
  page.get_by_text('the service cannot answer now (asking again in 1 s)').wait_for()
  page.locator('#found > li').first.wait_for()
  assert 'asking again' not in page.locator('#status').inner_text()
  page.close()


def test_the_page_shows_similar_items_on_click_and_by_keyboard(browser, address, recommender):
  page = browser.new_page(viewport={'width': 390, 'height': 844})
  problems = []
  page.on('pageerror', lambda error: problems.append(str(error)))
  page.goto(address)
  title = page.locator('#found button.title').first
  title.wait_for()
  name = title.inner_text()
  title.focus()
  page.keyboard.press('Enter')
  page.get_by_role('dialog', name=f'Similar to {name}').wait_for()
  item = recommender.item_ids[recommender.titles.index(name)]
  for label, by in (('order and content', 'both'), ('users who have it', 'users')):
    page.get_by_label('Similar by').select_option(label=label)
    rows = recommender.similar(item, by=by)
    expected = [row['item'] for row in rows]
    page.wait_for_function(
      """expected => JSON.stringify(expected) === JSON.stringify(
      [...document.querySelectorAll('#similar-items .values')].map(x => x.textContent))""",
      arg=expected,
    )
  low = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]
  assert low == []
  assert page.evaluate('document.documentElement.scrollWidth') == 390
  page.keyboard.press('Escape')
  page.locator('#similar').wait_for(state='hidden')
  assert problems == []


def test_a_signal_that_comes_before_the_first_request_ends_the_service(folder, environment):
  early = (
    'import signal, uvicorn\n'
    'run = uvicorn.Server.run\n'
    'def early(self, **options):\n'
    '  signal.raise_signal(signal.SIGTERM)\n'
    '  return run(self, **options)\n'
    'uvicorn.Server.run = early\n'
    'from ur4rec_jax.serve import main\n'
    'main()\n'
  )
  command = [sys.executable, '-c', early, f'--export={folder}', '--port=0', '--batch=1']
  done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert b'stopped: 0 of 0 accepted requests answered' in done.stdout


def test_the_health_check_of_the_image(address):
  text = (ROOT / 'launch' / 'Dockerfile.serve').read_text().replace('\\\n', '')
  (command,) = re.findall(r'^HEALTHCHECK .*CMD (.*)$', text, re.M)
  _, flag, code = json.loads(command)
  port = address.rpartition(':')[2]
  for place, code_of_exit in ((port, 0), ('1', 1)):
    check = code.replace(':8000', f':{place}')
    done = subprocess.run([sys.executable, flag, check], capture_output=True, timeout=60)
    assert done.returncode == code_of_exit, done.stderr


def test_an_answer_says_why(recommender, address):
  history = [recommender.item_ids[i] for i in (3, 17, 5, 40)]
  found = ask(address, history=history, k=6, explain=True)
  assert metric(address, 'ur4rec_compilations_total') == 0
  plain = ask(address, history=history, k=6)['recommendations']
  assert [row['item'] for row in found['recommendations']] == [row['item'] for row in plain]
  assert 'because' not in plain[0]
  items = [row['item'] for row in plain]
  influences = recommender.influences(history, items)
  for row, column in zip(found['recommendations'], influences.T, strict=True):
    strongest = sorted(zip(-column, history, strict=True))
    named = [item for influence, item in strongest[:3] if influence < -1e-6]
    assert [item['item'] for item in row['because']] == named
    for item in row['because']:
      assert item['influence'] == pytest.approx(column[history.index(item['item'])], abs=1e-4)
    assert row['why'].startswith('Because of ' if named else '')
    own = recommender.passages[recommender.item_ids.index(row['item'])]
    assert row['sentence'] in own or (row['sentence'] == '' and not own)
  assert any(row['because'] for row in found['recommendations'])
  user = next(iter(recommender.users))
  content = get(f'{address}/recommend?user={user}&k=40&explain=true')[2]
  rows = json.loads(content)['recommendations']
  assert ['because' in row for row in rows] == [i < 20 for i in range(len(rows))]


@pytest.fixture(scope='module')
def two_models(serve, folder, shop, tmp_path_factory):
  """A service that compares two models; gives its address and both recommenders' answers."""
  other = make(shop, 'sasrec')[0]
  place = tmp_path_factory.mktemp('compared') / 'sequences'
  export(other, place, with_users=True)
  with serve(folder, f'--compare_with={place}', '--batch=1') as (_, address):
    yield address, other


def test_a_question_names_the_model_that_answers(two_models, recommender):
  address, other = two_models
  history = recommender.item_ids[3:6]
  for model, answering in (('model', recommender), ('sequences', other)):
    answer = answering.top([history], k=5)
    status, _, content = get(f'{address}/recommend?model={model}', {'history': history, 'k': 5})
    assert status == 200, content
    check(json.loads(content), answer, answering)
    health = json.loads(get(f'{address}/health?model={model}')[2])
    assert health['models'] == ['model', 'sequences']
    assert health['paths'] == answering.branches
    user = next(iter(answering.users))
    found = json.loads(get(f'{address}/recommend?user={user}&k=3&model={model}')[2])
    check(found, answering.answer([answering.history(user)], 3, users=[0]), answering)
  check(ask(address, history=history), recommender.top([history]), recommender)
  status, _, content = get(f'{address}/recommend?user=u1&model=none')
  assert status == 404
  assert "model 'none': is not here; there is model, sequences" in content


def test_a_second_model_that_fails_leaves_the_first_list_as_it_is_alone(browser, two_models):
  page = browser.new_page()
  page.route(
    '**/recommend?model=*', lambda route: route.fulfill(status=404, json={'detail': 'no such user'})
  )
  page.goto(two_models[0])
  page.locator('#other-problem', has_text='no such user').wait_for()
  page.locator('#status', has_text='based on').wait_for()
  assert page.locator('#found > li').count() == 10
  assert page.locator('.alone').count() == page.locator('#other-found > li').count() == 0
  assert 'in both lists' not in page.locator('#status').inner_text()
  page.close()


@pytest.mark.parametrize(('width', 'scheme'), [(390, 'dark'), (1280, 'light')])
def test_the_page_shows_two_models_side_by_side(browser, two_models, recommender, width, scheme):
  address, other = two_models
  page = browser.new_page(viewport={'width': width, 'height': 844}, color_scheme=scheme)
  problems = []
  page.on('console', lambda message: problems.append(message.text))
  page.on('pageerror', lambda error: problems.append(str(error)))
  page.goto(address)
  user = next(iter(recommender.users))
  history = recommender.history(user)
  first = recommender.answer([history], users=[0]).items[0]
  second = other.answer([history]).items[0]
  page.wait_for_function(
    """lists => JSON.stringify(lists) === JSON.stringify(['found', 'other-found'].map(id =>
    [...document.querySelectorAll(`#${id} > li`)].map(row => row.dataset.item)))""",
    arg=[first, second],
  )
  common = len(set(first) & set(second))
  assert 0 < common < 10  # Otherwise this test would show nothing.
  assert f'{common} of 10 are in both lists' in page.locator('#status').inner_text()
  alone = lambda found: page.eval_on_selector_all(
    f'#{found} > li.alone', 'all => all.map(row => row.dataset.item)'
  )
  assert alone('found') == [item for item in first if item not in second]
  assert alone('other-found') == [item for item in second if item not in first]
  moves = {
    item: f'{"▲" if was > now else "▼"} {abs(was - now)}'
    for now, item in enumerate(second)
    if item in first and (was := first.index(item)) != now
  }
  shown = page.eval_on_selector_all(
    '#other-found > li:not(.alone)',
    'all => all.map(row => [row.dataset.item, row.querySelector(".move")?.textContent])',
  )
  assert {item: text for item, text in shown if text} == moves
  boxes = [page.locator(f'#{found}').bounding_box() for found in ('found', 'other-found')]
  assert boxes[0]['y'] == pytest.approx(boxes[1]['y'], abs=40)  # Their legends may differ.
  assert boxes[0]['x'] + boxes[0]['width'] <= boxes[1]['x']
  assert page.evaluate('document.documentElement.scrollWidth') == width
  low = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]
  assert low == []

  title = page.locator('#other-found button.title').first
  title.click()
  page.get_by_role('dialog').wait_for()
  expected = [row['item'] for row in other.similar(second[0], by='sequence')]
  page.wait_for_function(
    """expected => JSON.stringify(expected) === JSON.stringify(
    [...document.querySelectorAll('#similar-items .values')].map(x => x.textContent))""",
    arg=expected,
  )
  assert problems == []
  page.close()

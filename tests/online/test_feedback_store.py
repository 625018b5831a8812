"""All stores keep what they acknowledged, once, through kills, full disks and lost servers."""

import collections
import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.postgres_server import postgres_folder, postgres_server
from tests.helpers.redis_server import redis_server
from tests.helpers.runs import ROOT
from ur4rec_jax.errors import InputError, StorageError
from ur4rec_jax.online.events import Event, Exposure, History, Outcome, Shown
from ur4rec_jax.online.feedback_store import open_store

NOW = 1_700_000_000.0
NEW, DUPLICATE, DELETED = Outcome


@pytest.fixture(scope='module')
def redis_address(tmp_path_factory):
  with redis_server(tmp_path_factory.mktemp('redis')) as (_, address):
    yield address


@pytest.fixture(scope='module')
def postgres_address():
  with postgres_folder() as folder, postgres_server(folder) as (_, address):
    yield address


@pytest.fixture(params=['sqlite', 'redis', 'postgres'])
def place(request, tmp_path):
  """Where an empty store is."""
  if request.param == 'sqlite':
    return str(tmp_path / 'events.db')
  if request.param == 'postgres':
    import psycopg

    address = request.getfixturevalue('postgres_address')
    with psycopg.connect(address, dbname='postgres', autocommit=True) as connection:
      connection.execute('DROP DATABASE IF EXISTS shop WITH (FORCE)')
      connection.execute('CREATE DATABASE shop')
    return address.removesuffix('postgres') + 'shop'
  import redis

  address = request.getfixturevalue('redis_address')
  redis.Redis.from_url(address).flushdb()
  return address


@pytest.fixture
def store(place):
  with contextlib.closing(open_store(place)) as store:
    yield store


def event(user='ann', name='1', item='lamp', kind='click', at=0.0, **more):
  return Event(user, name, item, kind, NOW + at, **more)


def exposure(name='r1', user='ann', at=0.0):
  return Exposure(name, user, NOW + at, 'default', 'abc', (Shown('lamp', 0.5), Shown('sofa', 0.25)))


def test_an_event_is_stored_once_and_the_first_content_stays(store):
  assert store.write([event(), event(item='sofa'), event(name='2')]) == [NEW, DUPLICATE, NEW]
  assert store.write([event(item='chair')]) == [DUPLICATE]
  assert store.write([event(user='bob', item='desk')]) == [NEW]  # Another user's id is another one.
  assert list(store.events()) == [event(), event(name='2'), event(user='bob', item='desk')]


def test_written_grows_by_one_with_each_new_event(store):
  assert store.written() == 0
  store.write([event(), event(), event(name='2')], [exposure()])
  assert store.written() == 2
  store.write([event(), event(user='bob')])
  assert store.written() == 3


def test_all_fields_come_back_as_they_were(store):
  odd = event('ü\n\x1b"', "'; DROP TABLE events; --", '\u2028', 'rating', 0.123, value=4.5)
  odd = odd._replace(request_id='r')
  store.write([odd], [exposure(user='')])
  assert list(store.events()) == [odd]
  assert list(store.exposures()) == [exposure(user='')]
  assert store.shown_in(['r1']) == [exposure(user='')]
  assert store.shown_in(['other']) == []
  assert store.shown_in([]) == []
  store.write([], [exposure('r2')])
  found = store.shown_in(['r2', 'other', 'r1'])
  assert sorted(found) == [exposure(user=''), exposure('r2')]


def test_a_history_is_that_of_one_user_in_the_order_of_time(store):
  rows = [event(name=str(n), item=f'i{n}', at=-n, kind='click' if n % 2 else 'view')
          for n in range(600)]  # fmt: skip
  random.Random(0).shuffle(rows)
  store.write([*rows, event('bob', item='secret', at=-5)])
  found = store.history('ann', ('click',), 3)
  assert found == History(['i5', 'i3', 'i1'], [NOW - 5, NOW - 3, NOW - 1])
  assert len(store.history('ann', ('click', 'view'), 1000).items) == 600
  assert store.history('nobody', ('click',), 3) == History([], [])


@pytest.mark.parametrize('place', ['redis'], indirect=True)
def test_an_event_that_comes_while_a_history_is_read_repeats_no_other_one(store, monkeypatch):
  store.write([event(name=str(n), item=f'i{n}', at=n) for n in range(300)])
  read = store._redis.hmget

  def read_and_write(*arguments):
    found = read(*arguments)
    store.write([event(name='new', item='new', at=999)])
    return found

  monkeypatch.setattr(store._redis, 'hmget', read_and_write)
  assert store.history('ann', ('click',), 1000).items == [f'i{n}' for n in range(300)]


def test_a_history_is_looked_for_in_a_limited_number_of_events(store):
  most = 10_000
  views = [event(name=f'v{n}', at=n, kind='view') for n in range(most - 1)]
  old = [event(name='c1', item='sofa', at=-1), event(name='c2', item='desk', at=-2)]
  store.write([*views[:5000], *old, *views[5000:]])
  assert store.history('ann', ('click',), 9).items == ['sofa']
  assert len(store.history('ann', ('click', 'view'), most + 9).items) == most


def test_the_history_of_a_user_with_very_many_views_takes_no_longer(tmp_path):
  with contextlib.closing(open_store(str(tmp_path / 'events.db'))) as store:
    store.write([event(name='click', at=-1)])
    waits = []
    for start in (0, 20_000):
      for first in range(start, 20_000 + 10 * start, 5000):
        store.write([event(name=str(n), at=n, kind='view') for n in range(first, first + 5000)])
      for _ in range(20):
        began = time.thread_time()
        store.history('ann', ('click',), 1000)
        waits.append(time.thread_time() - began)
  assert sorted(waits[20:])[10] < 3 * sorted(waits[:20])[10]


def test_a_deleted_user_leaves_nothing_and_old_events_do_not_come_back(store, place):
  store.write([event(), event(name='2'), event('bob')], [exposure(), exposure('r2', 'bob')])
  assert store.delete_user('ann', NOW + 1) == 2
  assert store.history('ann', ('click',), 9) == History([], [], True)
  assert list(store.events()) == [event('bob')]
  assert list(store.exposures()) == [exposure('r2', 'bob')]
  late = [event(), event(name='3', at=2)]
  assert store.write(late, [exposure('r3')]) == [DELETED, NEW]
  assert store.history('ann', ('click',), 9).items == ['lamp']
  assert store.history('ann', ('click',), 0) == History([], [], True)
  assert store.history('bob', ('click',), 0) == History([], [])
  assert store.shown_in(['r3']) == []
  assert store.delete_user('nobody', NOW) == 0


SHOWER = """
import itertools, sys
from ur4rec_jax.online.events import Exposure, Shown
from ur4rec_jax.online.feedback_store import open_store
store = open_store(sys.argv[1])
for n in itertools.count():
  name = f'{sys.argv[2]}-{n}'
  # After the deletion, as if the clock of this service were ahead: it may be stored.
  store.write([], [Exposure(name, 'ann', 1.8e9, 'default', 'abc', (Shown('lamp', 0.5),))])
  print(name, flush=True)
"""


def test_what_is_shown_during_a_deletion_is_kept_or_deleted_as_a_whole(place):
  command = [sys.executable, '-c', SHOWER, place]
  with contextlib.closing(open_store(place)) as store:
    services = [
      subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
      for name in 'ab'
    ]
    for process in services:
      process.stdout.readline()
    for _ in range(40):
      store.delete_user('ann', NOW)
    for process in services:
      process.kill()
      process.communicate()
    # Nothing of the user is left that a second deletion would not find.
    store.delete_user('ann', NOW)
    assert list(store.exposures()) == []


def test_nothing_of_a_deleted_user_is_in_the_file(tmp_path):
  with contextlib.closing(open_store(str(tmp_path / 'events.db'))) as store:
    store.write(
      [event('unmistakable', str(n)) for n in range(500)], [exposure('r', 'unmistakable')]
    )
    read = lambda: b''.join(path.read_bytes() for path in tmp_path.iterdir())
    assert b'unmistakable' in read()
    store.delete_user('unmistakable', NOW)
    assert b'unmistakable' not in read()


def test_what_is_too_old_goes(store):
  store.write(
    [event(name=str(n), at=-n) for n in range(6000)], [exposure('old', at=-9), exposure()]
  )
  assert store.expire(NOW - 3) == 5996
  assert [found.id for found in store.events()] == ['3', '2', '1', '0']
  assert list(store.exposures()) == [exposure()]
  assert store.expire(NOW - 3) == 0


@pytest.mark.parametrize('place', ['redis'], indirect=True)
def test_old_events_are_deleted_while_the_users_are_looked_for(store, monkeypatch):
  store.write([event(f'user {n}') for n in range(5)])
  steps, scan, find = [], store._redis.scan_iter, store._redis.zrangebyscore

  def scan_and_note(*arguments, **options):
    for key in scan(*arguments, **options):
      steps.append('scan')
      yield key

  monkeypatch.setattr(store._redis, 'scan_iter', scan_and_note)
  monkeypatch.setattr(store._redis, 'zrangebyscore', lambda *x: steps.append('find') or find(*x))
  assert store.expire(NOW + 1) == 5
  assert steps == ['scan', 'find'] * 5
  assert list(store.events()) == []


@pytest.mark.parametrize('place', ['redis'], indirect=True)
def test_the_answers_to_nobody_go_in_parts_between_which_others_write(store):
  store.write([], [exposure(f'r{n}', user='') for n in range(2500)])
  store.write([event(name=str(n)) for n in range(2500)])
  store._redis.config_resetstat()
  assert store.expire(NOW + 1) == 2500
  calls = store._redis.info('commandstats')
  assert [calls[f'cmdstat_{name}']['calls'] for name in ('del', 'hdel', 'zrem')] == [3, 3, 6]
  assert store._redis.keys() == ['ur4rec:written']


@settings(max_examples=25)
@given(
  st.lists(
    st.lists(
      st.tuples(st.sampled_from('ab'), st.sampled_from('123'), st.sampled_from('xy'),
                st.integers(-3, 3))
    ),
    max_size=6,
  )
)  # fmt: skip
def test_any_requests_leave_the_first_event_of_each_id(tmp_path_factory, requests):
  path = tmp_path_factory.mktemp('store') / 'events.db'
  with contextlib.closing(open_store(str(path))) as store:
    first = {}
    for rows in requests:
      events = [event(user, name, item, at=at) for user, name, item, at in rows]
      expected = []
      for one in events:
        expected.append(DUPLICATE if (one.user, one.id) in first else NEW)
        first.setdefault((one.user, one.id), one)
      assert store.write(events) == expected
    assert sorted(store.events()) == sorted(first.values())
    for user in 'ab':
      of_user = sorted((x for x in first.values() if x.user == user), key=lambda x: x.time)
      assert store.history(user, ('click',), 9).times == [x.time for x in of_user]


WRITER = """
import sys
from ur4rec_jax.online.events import Event
from ur4rec_jax.online.feedback_store import open_store
store, start = open_store(sys.argv[1]), int(sys.argv[2])
for n in range(start, 10**9, 3):
  store.write([Event(f'u{i % 3}', str(i), 'x', 'click', 1.7e9 + i) for i in (n, n + 1, n + 2)])
  print(n, flush=True)
"""


def test_kills_lose_nothing_that_was_acknowledged(place):
  acknowledged, start = set(), 0
  rng = random.Random(0)
  for _ in range(6):
    command = [sys.executable, '-c', WRITER, place, str(start)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline()]
    threading.Timer(rng.uniform(0, 0.2), process.send_signal, [signal.SIGKILL]).start()
    lines += process.stdout.readlines()
    process.wait()
    acknowledged |= {int(line) for line in lines if line.endswith('\n')}
    start = max(acknowledged) + 3  # What was on its way is sent again.
  assert len(acknowledged) > 6
  with contextlib.closing(open_store(place)) as store:
    stored = collections.Counter(int(x.id) for x in store.events())
  expected = {i for n in acknowledged for i in (n, n + 1, n + 2)}
  assert expected <= stored.keys()
  assert max(stored.values()) == 1
  assert all(i in stored for n in stored if n % 3 == 0 for i in (n, n + 1, n + 2))  # All or none.


def test_two_processes_write_to_one_store(place):
  with (
    contextlib.closing(open_store(place)) as first,
    contextlib.closing(open_store(place)) as other,
  ):
    for n in range(20):
      assert first.write([event(name=f'a{n}')]) == [NEW]
      assert other.write([event(name=f'a{n}'), event(name=f'b{n}')]) == [DUPLICATE, NEW]
      assert len(first.history('ann', ('click',), 99).items) == 2 * n + 2


FULL = """
import resource, sys
from ur4rec_jax.errors import StorageError
from ur4rec_jax.online.events import Event
from ur4rec_jax.online.feedback_store import open_store
store = open_store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
event = lambda name: Event('u', name, 'x' * 200, 'click', 1.7e9)
write = lambda n: store.write([event(f'{n}-{i}') for i in range(50)])
done = 0
try:
  while True:
    write(done)
    done += 1
except StorageError as error:
  assert 'events.db' in str(error), error
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert sum(1 for _ in store.events()) == 50 * done, done
assert write(done)[0].value == 'accepted'  # There is room again.
print(done)
"""


def test_a_full_disk_is_an_error_and_what_was_stored_before_stays(tmp_path):
  command = [sys.executable, '-c', FULL, str(tmp_path / 'events.db')]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) > 0
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000


@pytest.mark.parametrize('kind', ['redis', 'postgres'])
def test_a_lost_server_is_an_error_until_it_is_back(tmp_path, kind):
  with contextlib.ExitStack() as stack:
    if kind == 'redis':
      server, folder = redis_server, tmp_path
    else:
      server, folder = postgres_server, stack.enter_context(postgres_folder())
    process, address = stack.enter_context(server(folder))
    store = stack.enter_context(contextlib.closing(open_store(address)))
    store.write([event()])
    process.send_signal(signal.SIGKILL if kind == 'redis' else signal.SIGQUIT)
    process.wait()
    for ask in (
      lambda: store.write([event(name='2')]),
      lambda: store.history('ann', ('click',), 9),
      lambda: list(store.events()),
      lambda: store.delete_user('ann', NOW),
    ):
      with pytest.raises(StorageError, match='cannot be used now'):
        ask()
    port = int(address.rsplit(':', 1)[1].split('/')[0])
    with server(folder, port=port):
      assert list(store.events()) == [event()]
      assert store.write([event(), event(name='2')]) == [DUPLICATE, NEW]


def test_no_thread_needs_an_error_to_see_that_postgres_was_restarted():
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(postgres_folder())
    with postgres_server(folder) as (_, address):
      store = stack.enter_context(contextlib.closing(open_store(address)))
      store.write([event()])
      other = stack.enter_context(ThreadPoolExecutor(1))
      read = lambda: other.submit(store.history, 'ann', ('click',), 9).result().items
      assert read() == ['lamp']
    port = int(address.rsplit(':', 1)[1].split('/')[0])
    with postgres_server(folder, port=port):
      assert read() == ['lamp']
      assert store.write([event(), event(name='2')]) == [DUPLICATE, NEW]


def test_a_redis_that_forgets_is_refused(tmp_path, capsys):
  with (
    redis_server(tmp_path, '--appendonly', 'no') as (_, address),
    pytest.raises(InputError, match='would lose events when it ends; set appendonly yes'),
  ):
    open_store(address)
  with redis_server(tmp_path, '--appendonly', 'yes') as (_, address):
    open_store(address)
  assert 'may lose the last second of events in a power cut' in capsys.readouterr().err
  with pytest.raises(InputError, match='cannot be reached') as raised:
    open_store('redis://user:hidden@127.0.0.1:1/0')
  assert 'hidden' not in str(raised.value)
  with pytest.raises(InputError, match=r'Redis at 127.0.0.1:1/0: cannot be reached') as raised:
    open_store('rediss://127.0.0.1:1/0?password=hidden')
  assert 'hidden' not in str(raised.value)


def test_a_postgres_that_cannot_be_used_is_named(postgres_address, capsys):
  import psycopg

  for address in (postgres_address.replace('%40', ''), 'postgres://user:hidden@127.0.0.1:1/shop'):
    with pytest.raises(InputError, match=r'Postgres at 127.0.0.1:.*: cannot be used') as raised:
      open_store(address)
    assert not {'opensesame', 'hidden'} & set(str(raised.value).replace(':', ' ').split())
  with psycopg.connect(postgres_address, autocommit=True) as connection:
    connection.execute('CREATE DATABASE newer')
    address = postgres_address.removesuffix('postgres') + 'newer'
    open_store(address).close()
    with psycopg.connect(address) as other:
      other.execute('UPDATE ur4rec_store SET version = 9')
    with pytest.raises(InputError, match='its tables are of format 9, this version reads 1'):
      open_store(address)
    connection.execute('DROP DATABASE newer WITH (FORCE)')
  assert capsys.readouterr().err == ''


def test_events_are_durable_in_a_postgres_that_is_set_to_forget(postgres_address):
  with contextlib.closing(
    open_store(f'{postgres_address}?options=-csynchronous_commit%3Doff')
  ) as x:
    assert x._connection().execute('SHOW synchronous_commit').fetchone() == ('on',)


@pytest.mark.parametrize(
  ('content', 'message'),
  [(b'no database at all' * 100, 'file is not a database'), (None, 'is another SQLite file')],
)
def test_another_file_is_refused_and_stays(tmp_path, content, message):
  path = tmp_path / 'events.db'
  if content is None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
      connection.execute('CREATE TABLE mine (x)')
      connection.commit()
  else:
    path.write_bytes(content)
  before = path.read_bytes()
  with pytest.raises(InputError, match=message):
    open_store(str(path))
  assert path.read_bytes() == before


def test_bad_places_are_named(tmp_path):
  with pytest.raises(InputError, match='its folder does not exist'):
    open_store(str(tmp_path / 'nowhere' / 'events.db'))
  with pytest.raises(InputError, match='kafka://: no such store of events'):
    open_store('kafka://localhost')
  with pytest.raises(InputError, match='cannot be opened'):
    open_store(str(tmp_path))
  assert os.listdir(tmp_path) == []


def test_reading_a_history_takes_less_than_a_millisecond(tmp_path):
  with contextlib.closing(open_store(str(tmp_path / 'events.db'))) as store:
    for start in range(0, 20_000, 1000):
      store.write([event(f'u{n % 400}', str(n), at=-n) for n in range(start, start + 1000)])
    waits = []
    for n in range(300):
      start = time.thread_time()
      assert len(store.history(f'u{n}', ('click', 'buy'), 1000).items) == 50
      waits.append(time.thread_time() - start)
  assert sorted(waits)[150] < 1e-3

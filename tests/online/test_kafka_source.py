"""Events of a Kafka topic are stored once, whatever ends the consumer."""

import contextlib
import json
import signal
import sqlite3
import threading
import time
from collections import Counter
from typing import NamedTuple

import pytest

from tests.helpers.fork_server import Program
from tests.helpers.kafka_server import kafka_server
from ur4rec_jax import feedback
from ur4rec_jax.online import kafka_source
from ur4rec_jax.online.events import Outcome
from ur4rec_jax.online.feedback_store import SqliteStore


@pytest.fixture
def kafka():
  with kafka_server() as server:
    yield server


@pytest.fixture
def consume(kafka, tmp_path, environment):
  """Starts the command that stores the events of topic `clicks`."""
  processes = []
  # The broker notices soon that a consumer was killed.
  (tmp_path / 'kafka').write_text('session.timeout.ms=6000\nheartbeat.interval.ms=500\n')

  def start(*flags):
    place = f'--events={tmp_path}/events.db'
    source = (f'--consume=kafka://{kafka.address}/clicks', '--kafka_config=kafka')
    processes.append(
      Program('ur4rec_jax.feedback', [place, *source, *flags], environment, tmp_path)
    )
    return processes[-1]

  yield start
  for process in processes:
    process.kill()
    process.wait()


class Sent(NamedTuple):
  """A message, as far as `_store` looks at it."""

  content: bytes
  at: int

  value = lambda self: self.content
  offset = lambda self: self.at
  topic, partition = staticmethod(lambda: 'clicks'), staticmethod(lambda: 0)
  timestamp = staticmethod(lambda: (1, 1_000_000_000_000))


def event(number, **fields):
  return {'user': f'u{number % 7}', 'item': f'i{number}', 'kind': 'click', 'time': 1e9} | fields


def stored(tmp_path):
  store = SqliteStore(str(tmp_path / 'events.db'))
  events = list(store.events())
  store.close()
  return events


def wait_until(is_true):
  end = time.monotonic() + 300
  while not is_true():
    assert time.monotonic() < end
    time.sleep(0.05)


def count(tmp_path):
  with contextlib.closing(sqlite3.connect(tmp_path / 'events.db')) as connection:
    try:
      return connection.execute('SELECT count(*) FROM events').fetchone()[0]
    except sqlite3.Error:  # The consumer has not made the table yet.
      return 0


def test_good_events_are_stored_and_others_named(kafka, consume, tmp_path):
  before = time.time()
  kafka.send(
    'clicks',
    event(0, id='a'),
    event(0, id='a'),
    [event(1, id='b'), event(2, id='c', kind='buy', value=3.5)],
    {'user': 'u', 'item': 'i', 'kind': 'view'},
    b'{',
    b'',
    event(3, id='d', kind='hug'),
    [],
    event(4, id='e', user='a\0b'),
  )
  process = consume('--until_end')
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  assert out.splitlines()[-1] == (
    '4 events stored, 1 were stored before, 0 of deleted users, 5 messages refused'
  )
  notes = [line for line in err.splitlines() if line.startswith('note: partition')]
  assert len(notes) == 5
  assert all(line.endswith('; refused') for line in notes)
  assert 'kind: must be one of' in err
  assert 'the message is no JSON' in err
  assert "user: 'a\\x00b' must be text on one line" in err
  events = {found.id: found for found in stored(tmp_path)}
  assert len(events) == 4
  assert events['c'].value == 3.5
  (place,) = events.keys() - {'a', 'b', 'c'}  # The id and the time come from the message.
  assert place.startswith('clicks/')
  assert before - 1 <= events[place].time <= time.time() + 1


def test_large_messages_take_several_transactions_so_that_a_service_can_write_between():
  rows = [[event(n, id=str(n)) for n in range(start, start + 1000)] for start in (0, 1000, 2000)]
  messages = [Sent(json.dumps(row).encode(), offset) for offset, row in enumerate(rows * 5)]
  sizes, stored, counts = [], set(), Counter()

  class Store:
    def write(self, events):
      sizes.append(len(events))
      return [Outcome.DUPLICATE if x in stored else stored.add(x) or Outcome.NEW for x in events]

  assert kafka_source._store(messages, Store(), counts, lambda: False)
  assert sum(sizes) == 15_000
  assert max(sizes) <= 5000
  assert counts == {'accepted': 3000, 'duplicates': 12_000}


def test_after_kills_every_event_is_there_once(kafka, consume, tmp_path):
  sent = 0
  for _ in range(2):
    process, before = consume(), sent
    kafka.send('clicks', *(event(i) for i in range(sent, sent + 2000)))
    sent += 2000
    wait_until(lambda before=before: count(tmp_path) > before)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  process = consume('--until_end')
  _, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  events = stored(tmp_path)
  assert sorted(found.item for found in events) == sorted(f'i{i}' for i in range(sent))


def test_until_end_ends_on_a_topic_that_is_always_written_to(kafka, consume, tmp_path):
  kafka.send('clicks', *(event(i) for i in range(1000)))
  is_over = threading.Event()

  def keep_sending():
    while not is_over.is_set():
      kafka.send('clicks', event(1000))
      time.sleep(0.005)

  sender = threading.Thread(target=keep_sending)
  sender.start()
  try:
    process = consume('--until_end')
    _, err = process.communicate(timeout=300)
  finally:
    is_over.set()
    sender.join()
  assert process.returncode == 0, err
  assert {f'i{i}' for i in range(1000)} <= {found.item for found in stored(tmp_path)}
  # A topic without new messages ends at once, too.
  process = consume('--until_end')
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err


def test_it_goes_on_where_it_was_stopped(kafka, consume, tmp_path):
  kafka.send('clicks', event(0))
  process = consume()
  wait_until(lambda: count(tmp_path) == 1)
  kafka.send('clicks', event(1))
  wait_until(lambda: count(tmp_path) == 2)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert out.splitlines()[-1].startswith('2 events stored')
  kafka.send('clicks', event(2))
  process = consume('--until_end')
  out, err = process.communicate(timeout=120)
  assert out.splitlines()[-1].startswith('1 events stored, 0 were stored before'), err


def test_events_wait_for_a_store_that_cannot_be_written(kafka, consume, tmp_path):
  kafka.send('clicks', event(0))
  process = consume()
  wait_until(lambda: count(tmp_path) == 1)
  with contextlib.closing(sqlite3.connect(tmp_path / 'events.db')) as other:
    other.execute('BEGIN IMMEDIATE')
    kafka.send('clicks', event(1))
    assert 'cannot be used now' in process.stderr.readline()
    assert count(tmp_path) == 1
  wait_until(lambda: count(tmp_path) == 2)


@pytest.mark.parametrize(
  ('address', 'message'),
  [
    ('kafka://localhost', 'must be kafka://HOST:PORT/TOPIC'),
    ('localhost:9092/clicks', 'must be kafka://HOST:PORT/TOPIC'),
    ('kafka://localhost:9092/a b', 'must be kafka://HOST:PORT/TOPIC'),
  ],
)
def test_wrong_addresses(address, message):
  with pytest.raises(kafka_source.InputError, match=message):
    kafka_source.parse_topic(address, 'group')


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('nonsense', 'line 2 must be name=value'),
    ('group.id=x', 'line 2: group.id is set by this program'),
    ('enable.auto.commit=true', 'enable.auto.commit is set by this program'),
    ('no.such.setting=1', 'no.such.setting'),
  ],
)
def test_wrong_settings(tmp_path, capsys, line, message):
  (tmp_path / 'kafka').write_text(f'# comment\n{line}\n')
  flags = [f'--events={tmp_path}/e.db', f'--kafka_config={tmp_path}/kafka']
  with pytest.raises(SystemExit) as end:
    feedback.main([*flags, '--consume=kafka://127.0.0.1:1/clicks'])
  assert end.value.code == 2
  assert message in capsys.readouterr().err


def test_missing_topics_and_brokers_are_one_message(kafka, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(kafka_source, '_FIND_SECONDS', 1)
  kafka.send('carts', event(0))
  flags = [f'--events={tmp_path}/e.db']
  for address, message in (
    (f'{kafka.address}/clicks', 'clicks: no such topic'),
    ('127.0.0.1:1/clicks', 'no broker answers within 1 s'),
  ):
    with pytest.raises(SystemExit) as end:
      feedback.main([*flags, f'--consume=kafka://{address}'])
    assert end.value.code == 2
    assert message in capsys.readouterr().err

"""Copies events from a Kafka topic into a store of events, each once.

A message is one event or a list of events, in the JSON of `POST /events`. Offsets are committed
after the events are durable. A consumer that was killed therefore reads some messages again, and
the store knows their events by their ids.
"""

import contextlib
import logging
import math
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from ur4rec_jax.errors import InputError, StorageError, say
from ur4rec_jax.online.events import Event, NotJsonError, Outcome, check_event, load_json, rows_of
from ur4rec_jax.online.feedback_store import FeedbackStore

REFUSED = 'refused'  # Beside the names of `Outcome`.
_MESSAGES = 500  # Messages that are read at once.
_AT_ONCE = 5000  # Events of a transaction, so that a service that writes need not wait for long.
_POLL_SECONDS = 0.5  # A signal ends the consumer within this time.
_FIND_SECONDS = 10  # How long the brokers are looked for at the start.
_RETRY_SECONDS = 1  # Pause after the store has failed.
_REPORT_SECONDS = 10  # Between lines of progress.
_MOST_NAMED = 10  # Refused messages that are named; later ones are only counted.
# Other values of these settings would lose events.
_OWN_SETTINGS = {
  'auto.offset.reset': 'earliest',
  'enable.auto.commit': False,
  'enable.partition.eof': True,
}


class Topic(NamedTuple):
  """A topic to read.

  Attributes:
    servers: brokers, `HOST:PORT` with commas between them.
    name: the name of the topic.
    group: the consumer group. Consumers of one group share the messages.
    settings: further settings of the client (librdkafka), such as those of SASL.
  """

  servers: str
  name: str
  group: str
  settings: Mapping[str, str] = {}


def parse_topic(address: str, group: str, settings_file: str | None = None) -> Topic:
  """Reads the address of a topic, `kafka://HOST:PORT[,HOST:PORT...]/TOPIC`.

  Args:
    address: the address.
    group: the consumer group.
    settings_file: a file of lines `name=value` with settings of the client.

  Raises:
    InputError: the address or a line of the file is wrong, or the file cannot be read.
  """
  match = re.fullmatch(r'kafka://([^/\s]+)/([\w.-]{1,249})', address)
  if match is None:
    raise InputError(f'{address}: must be kafka://HOST:PORT/TOPIC, with commas between brokers')
  settings = {} if settings_file is None else dict(_read_settings(pathlib.Path(settings_file)))
  return Topic(match[1], match[2], group, settings)


def _read_settings(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path}: cannot be read ({error})') from error
  for number, line in enumerate(lines, 1):
    if not line.strip() or line.lstrip().startswith('#'):
      continue
    name, equals, value = (part.strip() for part in line.partition('='))
    if not name or not equals:
      raise InputError(f'{path}: line {number} must be name=value')
    if name in (*_OWN_SETTINGS, 'bootstrap.servers', 'group.id'):
      raise InputError(f'{path}: line {number}: {name} is set by this program; remove the line')
    yield name, value


def copy_events(
  topic: Topic, store: FeedbackStore, is_stopped: Callable[[], bool], until_end: bool = False
) -> Counter[str]:
  """Copies the events of a topic, those that come later included, until it is stopped.

  While the store or the brokers cannot be reached, it tries again.

  Args:
    topic: the topic.
    store: where the events go.
    is_stopped: tells whether to stop.
    until_end: whether to stop, too, when all messages were read that there are at the start.

  Returns:
    How many events had which outcome, by the values of `Outcome`, and how many were `REFUSED`.

  Raises:
    InputError: no broker answers at the start, there is no such topic, or a setting is wrong.
  """
  counts: Counter[str] = Counter()
  ended, reported, known = set(), time.monotonic(), 0
  # Closing tells the group at once that this consumer has left.
  with contextlib.closing(_make_consumer(topic)) as consumer:
    partitions = _subscribe(consumer, topic)
    ends = _end_offsets(consumer, topic, partitions) if until_end else {}
    while not is_stopped():
      batch = []
      for message in consumer.consume(_MESSAGES, _POLL_SECONDS):
        if message.error() is None:
          batch.append(message)
          is_last = message.offset() + 1 >= ends.get(message.partition(), math.inf)
          (ended.add if is_last else ended.discard)(message.partition())
        elif message.error().code() == KafkaError._PARTITION_EOF:
          ended.add(message.partition())
        else:
          say(f'note: {topic.name}: {message.error().str()}; trying again', sys.stderr)
      if batch:
        if not _store(batch, store, counts, is_stopped):
          break
        _commit(consumer, batch)
      assigned = {partition.partition for partition in consumer.assignment()}
      if until_end and assigned and assigned <= ended:
        break
      if counts.total() > known and time.monotonic() > reported + _REPORT_SECONDS:
        reported, known = time.monotonic(), counts.total()
        say(summary(counts))
  return counts


def summary(counts: Mapping[str, int]) -> str:
  """Describes the result of `copy_events` in one line."""
  return (
    f'{counts.get(Outcome.NEW.value, 0):,} events stored,'
    f' {counts.get(Outcome.DUPLICATE.value, 0):,} were stored before,'
    f' {counts.get(Outcome.DELETED.value, 0):,} of deleted users,'
    f' {counts.get(REFUSED, 0):,} messages refused'
  )


def _make_consumer(topic: Topic) -> Consumer:
  logger = logging.Logger('kafka')  # Without handlers: `note` reports what a person needs to know.
  logger.addHandler(logging.NullHandler())

  def note(error: KafkaError) -> None:
    say(f'note: Kafka at {topic.servers}: {error.str()}; trying again', sys.stderr)

  settings = {
    **topic.settings,
    **_OWN_SETTINGS,
    'bootstrap.servers': topic.servers,
    'group.id': topic.group,
  }
  try:
    return Consumer({**settings, 'error_cb': note}, logger=logger)
  except KafkaException as error:
    raise InputError(f'--kafka_config: {error.args[0].str()}') from error


def _subscribe(consumer: Consumer, topic: Topic) -> list[int]:
  """Looks for the topic and joins the group; returns the partitions of the topic."""
  try:
    topics = consumer.list_topics(timeout=_FIND_SECONDS).topics
  except KafkaException as error:
    raise InputError(
      f'Kafka at {topic.servers}: no broker answers within {_FIND_SECONDS} s'
      f' ({error.args[0].str()}); correct the address, or give --kafka_config'
    ) from error
  if topic.name not in topics:
    names = ', '.join(sorted(topics)[:10]) or 'none'
    raise InputError(f'{topic.name}: no such topic at {topic.servers}; its topics are: {names}')
  consumer.subscribe([topic.name])
  return list(topics[topic.name].partitions)


def _end_offsets(consumer: Consumer, topic: Topic, partitions: Sequence[int]) -> dict[int, int]:
  """Returns by partition the offset after the last message that there is now."""
  try:
    offsets = {
      number: consumer.get_watermark_offsets(TopicPartition(topic.name, number), _FIND_SECONDS)
      for number in partitions
    }
  except KafkaException as error:
    raise InputError(
      f'--until_end: Kafka at {topic.servers} does not tell where {topic.name} ends'
      f' ({error.args[0].str()}); try again, or leave the flag out'
    ) from error
  return {number: end for number, (_, end) in offsets.items()}


def _store(
  batch: Sequence[Message],
  store: FeedbackStore,
  counts: Counter[str],
  is_stopped: Callable[[], bool],
) -> bool:
  """Stores the events of messages; False if it was stopped before it could."""
  events = []
  for message in batch:
    try:
      events += _events_of(message)
    except InputError as error:
      counts[REFUSED] += 1
      if counts[REFUSED] <= _MOST_NAMED:
        where = f'partition {message.partition()}, offset {message.offset()}'
        end = '; later ones are only counted' if counts[REFUSED] == _MOST_NAMED else ''
        say(f'note: {where}: {error}; refused{end}', sys.stderr)
  for start in range(0, len(events), _AT_ONCE):
    outcomes = _write(events[start : start + _AT_ONCE], store, is_stopped)
    if outcomes is None:
      return False
    counts.update(outcome.value for outcome in outcomes)
  return True


def _write(
  events: Sequence[Event], store: FeedbackStore, is_stopped: Callable[[], bool]
) -> list[Outcome] | None:
  """Stores events, as often as it takes; None if it was stopped before it could."""
  has_failed = False
  while True:
    try:
      return store.write(events)
    except StorageError as error:
      if not has_failed:
        say(f'note: {error}; trying again', sys.stderr)
      has_failed = True
    if is_stopped():
      return None
    time.sleep(_RETRY_SECONDS)


def _events_of(message: Message) -> list[Event]:
  """Returns the events of a message.

  An event without `id` gets the place of the message, one without `time` the time of the message.
  """
  try:
    rows = rows_of(load_json(message.value() or b''), 'the message')
  except NotJsonError as error:
    raise InputError(f'the message is no JSON: {error}') from error
  now = time.time()
  kind, milliseconds = message.timestamp()
  defaults: dict[str, Any] = {'time': milliseconds / 1000 if kind else now}
  place = f'{message.topic()}/{message.partition()}/{message.offset()}'
  return [
    check_event({'id': f'{place}/{i}', **defaults, **row} if isinstance(row, dict) else row, now)
    for i, row in enumerate(rows)
  ]


def _commit(consumer: Consumer, batch: Sequence[Message]) -> None:
  next_offsets: dict[tuple[str, int], int] = {}
  for message in batch:
    next_offsets[message.topic(), message.partition()] = message.offset() + 1
  offsets = [TopicPartition(*place, offset) for place, offset in next_offsets.items()]
  try:
    consumer.commit(offsets=offsets, asynchronous=False)
  except KafkaException as error:
    # The partition now belongs to another consumer, or no broker answers. What is stored twice is
    # counted once.
    say(f'note: offsets were not committed ({error.args[0].str()})', sys.stderr)

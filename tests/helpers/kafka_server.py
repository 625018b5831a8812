"""A Kafka broker of a test: the one that librdkafka has for tests, which listens on a real port."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import confluent_kafka


class KafkaServer(NamedTuple):
  """A running broker.

  Attributes:
    address: `HOST:PORT`.
    producer: sends messages to it. The broker ends with it.
  """

  address: str
  producer: confluent_kafka.Producer

  def send(self, topic: str, *messages: Any) -> None:
    """Sends messages, bytes as they are and others as JSON, and waits until they are stored."""
    for message in messages:
      value = message if isinstance(message, bytes) else json.dumps(message).encode()
      self.producer.produce(topic, value)
    assert self.producer.flush(30) == 0


@contextlib.contextmanager
def kafka_server() -> Iterator[KafkaServer]:
  """Runs a broker that makes topics when messages are sent to them."""
  settings = {'bootstrap.servers': 'none', 'test.mock.num.brokers': 1, 'log_level': 2}
  producer = confluent_kafka.Producer(settings)
  broker = next(iter(producer.list_topics(timeout=30).brokers.values()))
  yield KafkaServer(f'{broker.host}:{broker.port}', producer)

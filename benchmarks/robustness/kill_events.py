"""Kills the service again and again while events arrive; none that it acknowledged may be missing.

  python -m benchmarks.robustness.kill_events --export=shop-model --kills=100 [--keep]
  python -m benchmarks.robustness.kill_events --export=shop-model --kills=100 --events=redis://...

Clients send events, one or several in a request, and half of the requests again, as clients do that
got no answer. Each start of the service ends by SIGKILL at a random moment. What has no answer is
sent again to the next start. In the end every acknowledged event must be in the store once, with
the content of the first time, no event may be there that nobody sent, and as many must have been
acknowledged as new as the store has, but for those whose acknowledgement the kill cut off.

Without `--events` the store is a new SQLite file. `redis` alone starts a Redis server of its own.
The last line of output is one JSON object. The exit code is 1 if an event was lost or counted
twice.
"""

import argparse
import collections
import contextlib
import http.client
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.quality.accuracy import put_between_marks
from benchmarks.speed.measure import ROOT, machine, port_when_ready
from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.files import write_file
from ur4rec_jax.inference import exported
from ur4rec_jax.online.feedback_store import open_store

STORED = ROOT / 'benchmarks' / 'results' / 'robustness' / 'kill_events.json'
PAGE = ROOT / 'docs' / 'live.md'
NAMES = {'sqlite': 'SQLite', 'redis': 'Redis', 'postgres': 'Postgres'}
CLIENTS = 8


class Sender(threading.Thread):
  """A client that sends events until it is told to end.

  Attributes:
    acknowledged: contents of the events that the service said are stored, by user and id.
    sent: contents of all events that were sent.
    accepted: how many events were acknowledged as new.
    unanswered: events in requests that got no answer.
  """

  def __init__(self, number: int, items: list[str], seed: int):
    super().__init__()
    self._number, self._items, self._rng = number, items, random.Random(f'{seed} {number}')
    self.acknowledged: dict[tuple[str, str], tuple[str, float]] = {}
    self.sent: dict[tuple[str, str], tuple[str, float]] = {}
    self.counts: collections.Counter[str] = collections.Counter()
    self.port, self.is_over = 0, False
    self._next = 0

  def run(self) -> None:
    waiting: list[list[dict[str, Any]]] = []
    while not self.is_over or waiting:
      if self.port < 0:
        return
      # While nobody answers, not much piles up that must be sent in the end.
      if waiting and (self.is_over or len(waiting) > 50 or self._rng.random() < 0.5):
        events = waiting.pop(0)
      else:
        events = [self._event() for _ in range(self._rng.choice((1, 1, 1, 5, 40)))]
      answer = self._post(events)
      if answer is None:
        self.counts['unanswered'] += len(events)
        waiting.append(events)  # Sent again.
        time.sleep(0.02)
        continue
      self.counts.update(answer)
      for event in events:
        key = event['user'], event['id']
        self.acknowledged[key] = event['item'], event['time']
      # As a client does whose connection broke after the answer.
      if not self.is_over and self._rng.random() < 0.5:
        waiting.append(events)

  def _event(self) -> dict[str, Any]:
    self._next += 1
    event = {
      'user': f'u{self._rng.randrange(50)}',
      'id': f'{self._number}-{self._next}',
      'item': self._rng.choice(self._items),
      'kind': 'click',
      'time': round(time.time() - self._rng.random() * 1000, 3),
    }
    self.sent[event['user'], event['id']] = event['item'], event['time']
    return event

  def _post(self, events: list[dict[str, Any]]) -> dict[str, int] | None:
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=20)
    try:
      body = json.dumps(events)
      connection.request('POST', '/events', body, {'Content-Type': 'application/json'})
      answer = connection.getresponse()
      content = json.loads(answer.read())
      if answer.status == 200:
        return content
      self.counts[f'status {answer.status}'] += 1
      return None
    except (OSError, http.client.HTTPException, ValueError):
      return None
    finally:
      connection.close()


@contextlib.contextmanager
def redis_server(folder: pathlib.Path) -> Iterator[str]:
  """Runs a Redis server whose log is on the disk before it answers; gives its address."""
  program = shutil.which('redis-server')
  if program is None:
    raise InputError('redis-server is not on this machine; install the Debian package of this name')
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  command = [program, '--port', str(port), '--bind', '127.0.0.1', '--dir', str(folder)]
  command += ['--appendonly', 'yes', '--appendfsync', 'always', '--save', '']
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  try:
    for _ in range(100):
      with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
        break
      time.sleep(0.05)
    yield f'redis://127.0.0.1:{port}/0'
  finally:
    process.kill()
    process.wait()


def start(flags: argparse.Namespace, place: str, cache: str) -> tuple[subprocess.Popen, int]:
  """Starts the service and waits until it is ready."""
  command = [sys.executable, '-m', 'ur4rec_jax.serve', f'--export={flags.export}', '--port=0']
  command += [f'--events={place}', '--batch=1', '--events_per_second=inf']
  process = subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    text=True,
    env={'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    | os.environ,
  )
  try:
    return process, port_when_ready(process)
  except InputError:
    process.kill()
    raise


def measure(flags: argparse.Namespace, place: str, cache: str) -> dict[str, Any]:
  """Kills the service and compares the store with what was acknowledged."""
  rng, items = random.Random(flags.seed), exported.load(flags.export).item_ids
  senders = [Sender(number, items, flags.seed) for number in range(CLIENTS)]
  process, port = start(flags, place, cache)
  for sender in senders:
    sender.port = port
    sender.start()
  try:
    end, kills = time.monotonic() + 60 * flags.minutes, 0
    for number in range(flags.kills):
      if time.monotonic() > end:
        break
      time.sleep(rng.uniform(0.05, flags.seconds))
      process.send_signal(signal.SIGKILL)
      process.wait()
      process, port = start(flags, place, cache)
      for sender in senders:
        sender.port = port
      kills = number + 1
      print(f'kill {kills}: {_total(senders)["accepted"]:,} accepted', flush=True)
    for sender in senders:
      sender.is_over = True
    for sender in senders:
      sender.join(60)
  finally:
    for sender in senders:
      sender.is_over, sender.port = True, -1
    process.send_signal(signal.SIGTERM)
    process.wait()
  stored = collections.Counter()
  contents = {}
  with contextlib.closing(open_store(place)) as store:
    for event in store.events():
      stored[event.user, event.id] += 1
      contents[event.user, event.id] = event.item, event.time
  acknowledged = {key: value for sender in senders for key, value in sender.acknowledged.items()}
  sent = {key: value for sender in senders for key, value in sender.sent.items()}
  counts = _total(senders)
  return {
    'kills': kills,
    'store': next((name for name in NAMES if place.startswith(name) and '://' in place), 'sqlite'),
    'acknowledged': len(acknowledged),
    'lost': sum(key not in stored for key in acknowledged),
    'counted_twice': sum(count > 1 for count in stored.values()),
    'changed': sum(contents[key] != sent.get(key) for key in contents),
    'never_sent': sum(key not in sent for key in stored),
    'stored': len(stored),
    'accepted_as_new': counts['accepted'],
    'accepted_more_than_stored': max(counts['accepted'] - len(stored), 0),
    'sent_again': counts['duplicates'],
    'without_answer': counts['unanswered'],
    'other_answers': {key: n for key, n in counts.items() if key.startswith('status')},
    **machine(),
  }


def sentence(found: dict[str, Any]) -> str:
  """Describes the result in a sentence for docs/live.md."""
  return (
    f'{NAMES[found["store"]]}, {found["kills"]} kills: of {found["acknowledged"]:,} acknowledged'
    f' events {found["lost"]} were lost and {found["counted_twice"]} counted twice;'
    f' {found["without_answer"]:,} were sent again because no answer came.'
  )


def _total(senders: list[Sender]) -> collections.Counter[str]:
  return sum((sender.counts.copy() for sender in senders), collections.Counter())


@exit_on_reported_error
def main() -> None:
  """Reads the flags, kills, and prints the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--export', required=True, help='folder that ur4rec_jax.export wrote')
  add('--events', help='the store; "redis" for a new Redis server; without it a new SQLite file')
  add('--kills', type=int, default=100)
  add('--minutes', type=float, default=math.inf, help='no kill after so many minutes')
  add('--seconds', type=float, default=2, help='the longest time between a start and its kill')
  add('--seed', type=int, default=0)
  add('--keep', action='store_true', help='store the result')
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
    place = flags.events or f'{scratch}/events.db'
    if place == 'redis':
      place = stack.enter_context(redis_server(pathlib.Path(scratch)))
    found = measure(flags, place, f'{scratch}/cache')
  if flags.keep:
    STORED.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(STORED.read_text()) if STORED.exists() else {}
    kept[found['store']] = found
    write_file(STORED, json.dumps(kept, indent=2) + '\n')
    put_between_marks(PAGE, 'kills', '\n'.join(map(sentence, kept.values())))
  print(json.dumps(found))
  bad = ('lost', 'counted_twice', 'changed', 'never_sent', 'accepted_more_than_stored')
  sys.exit(1 if any(found[name] for name in bad) else 0)


if __name__ == '__main__':
  main()

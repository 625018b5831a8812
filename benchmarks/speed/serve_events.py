"""Measures what events and changes of the model cost a service that answers requests.

  python -m benchmarks.speed.serve_events --export=shop-model --next=shop-model-2 [--keep]

Four things, each with services that are processes of their own, on this machine's cores:

- requests a second of clients who ask again as soon as they have an answer: recommendations by a
  service without events, by one with events, and as many events as recommendations;
- the median wait of one client who asks for users whose export has a history, and for those whose
  latest twenty events were stored since, in turns;
- twenty changes of the model while requests arrive at random times: how many failed, and the 99th
  percentile of the wait in the seconds around a change, over that of the seconds without one. The
  two exports take turns; `--larger` is a third one, whose program must be compiled;
- the bytes of one event in the store.

The last line of output is one JSON object. The exit code is 1 if a promise was broken.
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from benchmarks.quality.accuracy import put_between_marks
from benchmarks.speed.measure import ROOT, machine, port_when_ready
from benchmarks.speed.serve_load import Client, Load
from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.files import write_file
from ur4rec_jax.inference import exported, registry

STORED = ROOT / 'benchmarks/results/inference/events.json'
PAGE = ROOT / 'docs' / 'live.md'
CLIENTS = 64
SWAPS = 20
ROUNDS = 3  # Services take turns, because other processes of the machine change what it can do.
STORED_EVENTS = 20  # Of a user, before the waits are measured.
_NO_LIMIT = '--events_per_second=inf'
_HEAD = 'HTTP/1.1\r\nHost: localhost\r\n'


@contextlib.contextmanager
def service(*flags: str, cache: str) -> Iterator[tuple[int, subprocess.Popen]]:
  """Runs a service on a free port while the block runs, and stops it."""
  command = [sys.executable, '-m', 'ur4rec_jax.serve', '--port=0', '--client_connections=2000']
  process = subprocess.Popen(
    [*command, '--queue=2000', *flags],
    stdout=subprocess.PIPE,
    text=True,
    env={'JAX_COMPILATION_CACHE_DIR': cache} | os.environ,
  )
  try:
    yield port_when_ready(process), process
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
  finally:
    process.kill()
    process.wait()


def recommend(user: str) -> bytes:
  """Makes a request for recommendations."""
  return f'GET /recommend?user={user} {_HEAD}\r\n'.encode()


def event(user: str, item: str, number: int) -> bytes:
  """Makes a request with one event."""
  body = json.dumps({'user': user, 'item': item, 'kind': 'click', 'id': str(number)})
  head = (
    f'POST /events {_HEAD}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n'
  )
  return f'{head}{body}'.encode()


class Requests(Sequence):
  """Requests without end: of every few, one is an event, the others ask for recommendations."""

  def __init__(self, folder: str, share_of_events: float):
    known = exported.load(folder)
    self._users, self._items = list(known.known_users.index), known.item_ids
    self._share, self._rng, self._numbers = share_of_events, np.random.default_rng(0), None
    self._start = time.time_ns()

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, number: int) -> bytes:
    user = self._users[number % len(self._users)]
    if self._rng.random() < self._share:
      return event(user, self._items[self._rng.integers(len(self._items))], self._start + number)
    return recommend(user)


async def per_second(port: int, requests: Sequence[bytes], seconds: float) -> float:
  """Returns the answers a second to clients who ask without pause."""
  load = Load(port, requests)
  await load.connect(CLIENTS)
  start = time.perf_counter()
  load.keep_asking_until = start + seconds
  for _ in range(CLIENTS):
    load.ask(start)
  await asyncio.sleep(seconds)
  answered = load.counts[200]
  await load.drain()
  if set(load.counts) - {'sent', 200}:
    raise InputError(f'answers that are not 200: {load.counts}')
  return answered / seconds


async def medians(ports: Sequence[int], users: Sequence[str], asks: int) -> list[float]:
  """Returns the median wait at each service in ms; they are asked in turns by one client each."""
  loads = [Load(port, []) for port in ports]
  for load in loads:
    await load.connect(1)
  for number in range(asks):
    for load in loads:
      load._requests = [recommend(users[number % len(users)])]
      load.ask(time.perf_counter())
      while load.open:
        await asyncio.sleep(0)
  return [1000 * float(np.median(load.waits)) for load in loads]


class TimedLoad(Load):
  """Also remembers when the requests were due, and opens connections when all are busy."""

  def __init__(self, port: int, requests: Sequence[bytes]):
    super().__init__(port, requests)
    self.dues: list[float] = []

  def ask(self, due: float) -> None:
    if self._idle:
      super().ask(due)
    else:
      self._opening = asyncio.create_task(self._connect_and_ask(due))

  async def _connect_and_ask(self, due: float) -> None:
    await self.connect(1)
    super().ask(due)

  def on_answer(self, client: Client, status: int, may_retry: bool, due: float) -> None:
    if status == 200:
      self.dues.append(due)
    super().on_answer(client, status, may_retry, due)


async def swap_under_load(
  load: 'TimedLoad', process: subprocess.Popen, folder: str, exports: Sequence[str], flags: Any
) -> dict[str, Any]:
  """Promotes one export after the other while requests come."""
  rng = np.random.default_rng(0)
  loop = asyncio.get_running_loop()
  promoter = futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
  await loop.run_in_executor(promoter, registry.current, folder)  # It starts and imports.
  await load.connect(20)
  swaps: list[tuple[float, float]] = []
  done = asyncio.Event()

  async def ask() -> None:
    due = time.perf_counter()
    while not done.is_set():
      while due <= time.perf_counter():
        load.ask(due)
        due += rng.exponential(1 / flags.rate)
      await asyncio.sleep(min(0.002, max(due - time.perf_counter(), 0)))

  asking = asyncio.create_task(ask())
  await asyncio.sleep(2)
  for export in itertools.islice(itertools.cycle([*exports[1:], exports[0]]), SWAPS):
    await asyncio.sleep(flags.pause)
    start = time.perf_counter()
    # By another process, as the promotion copies files, and this one must go on asking.
    version = await loop.run_in_executor(promoter, registry.promote, folder, export)
    while f'serving version {version}' not in await asyncio.to_thread(process.stdout.readline):
      pass
    swaps.append((start, time.perf_counter() + 0.5))
  done.set()
  await asking
  await load.drain()
  promoter.shutdown()
  dues, waits = np.array(load.dues), 1000 * np.array(load.waits)
  is_during = np.any([(dues >= a) & (dues <= b) for a, b in swaps], axis=0)
  is_first = dues < dues[0] + 1  # The connections are new.
  before, during = waits[~is_during & ~is_first], waits[is_during]
  counts = load.counts
  return {
    'swaps': len(swaps),
    'requests': counts['sent'],
    'failed': counts['sent'] - counts[200] + counts['not sent'],
    'answers': {str(key): n for key, n in counts.items()},
    'rate_per_s': flags.rate,
    'seconds_to_swap': round(float(np.median([b - a - 0.5 for a, b in swaps])), 2),
    'p99_ms_without': round(float(np.percentile(before, 99)), 2),
    'p99_ms_during': round(float(np.percentile(during, 99)), 2),
    'max_ms_during': round(float(during.max()), 2),
    'p99_ratio': round(float(np.percentile(during, 99) / np.percentile(before, 99)), 3),
  }


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Measures all four."""
  found: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as scratch:
    cache = f'{scratch}/cache'
    _measure_costs(flags, f'{scratch}/events.db', cache, found)
    if flags.events is None:
      size = sum(path.stat().st_size for path in pathlib.Path(scratch).glob('events.db*'))
      found['store_mb'] = round(size / 1e6, 1)
    print(json.dumps(found), file=sys.stderr, flush=True)
    exports = [flags.export, flags.next]
    found['swap'] = _measure_swaps(exports, flags, scratch, cache)
    if flags.larger:
      found['swap_compiled'] = _measure_swaps([*exports, flags.larger], flags, scratch, cache)
  return found | machine()


def _measure_costs(flags: argparse.Namespace, db: str, cache: str, found: dict[str, Any]) -> None:
  """Measures services with and without events in turns."""
  known = exported.load(flags.export)
  users, place = list(known.known_users.index), flags.events or db
  flag = f'--export={flags.export}'
  with (
    service(flag, cache=cache) as (without, _),
    service(flag, f'--events={place}', _NO_LIMIT, cache=cache) as (with_events, _),
  ):
    sides = {
      'recommendations_without_events': (without, 0.0),
      'recommendations': (with_events, 0.0),
      'half_events': (with_events, 0.5),
      'events_alone': (with_events, 1.0),
    }
    rates = {name: [] for name in sides}
    for round_number in range(ROUNDS + 1):
      for name, (port, share) in sides.items():
        requests = Requests(flags.export, share)
        rate = asyncio.run(per_second(port, requests, flags.seconds if round_number else 1))
        if round_number:  # The first one warms up.
          rates[name].append(rate)
    found['per_second'] = {name: round(float(np.median(x)), 1) for name, x in rates.items()}
    ratio = np.divide(rates['half_events'], rates['recommendations_without_events'])
    found['ratio'] = round(float(np.median(ratio)), 3)
    numbers, items = itertools.count(10**9), known.item_ids[:STORED_EVENTS]
    load = [event(user, item, next(numbers)) for user in users[:50] for item in items]
    asyncio.run(_send(with_events, load))
    waits = asyncio.run(medians((without, with_events), users[:50], flags.asks))
    found['p50_ms'] = {'without': round(waits[0], 3), 'fresh_history': round(waits[1], 3)}
    found['fresh_history_costs_ms'] = round(waits[1] - waits[0], 3)


def _measure_swaps(
  exports: list[str], flags: argparse.Namespace, scratch: str, cache: str
) -> dict[str, Any]:
  folder = tempfile.mkdtemp(dir=scratch)
  registry.promote(folder, exports[0])
  where = f'--registry={folder}', f'--events={flags.events or f"{folder}/events.db"}'
  with service(*where, _NO_LIMIT, cache=f'{cache}-{len(exports)}') as (port, process):
    load = TimedLoad(port, Requests(exports[0], 0.3))
    found = asyncio.run(swap_under_load(load, process, folder, exports, flags))
  print(json.dumps(found), file=sys.stderr, flush=True)
  return found


async def _send(port: int, requests: Sequence[bytes]) -> None:
  load = Load(port, requests)
  await load.connect(1)
  for _ in requests:
    load.ask(time.perf_counter())
    while load.open:
      await asyncio.sleep(0)


def broken_promises(found: dict[str, Any]) -> list[str]:
  """Returns the names of the promises that were broken."""
  swaps = [found[name] for name in ('swap', 'swap_compiled') if name in found]
  return [
    name
    for name, is_kept in {
      '500 requests a second with events': found['per_second']['half_events'] >= 500,
      'a fresh history costs 1 ms': found['fresh_history_costs_ms'] <= 1,
      'no request fails in a swap': not any(swap['failed'] for swap in swaps),
      'p99 in a swap': all(swap['p99_ratio'] <= 1.5 for swap in swaps),
    }.items()
    if not is_kept
  ]


def sentence(found: dict[str, Any]) -> str:
  """Describes the result in a sentence for docs/live.md."""
  rates, waits, swap = found['per_second'], found['p50_ms'], found['swap']
  return (
    f'On {found["cores"]} cores that the services, their clients and other programs shared (load'
    f' {found["load"]:.0f}): {rates["recommendations_without_events"]:.0f} recommendations a'
    f' second without events, {rates["recommendations"]:.0f} with them, {rates["half_events"]:.0f}'
    f' requests of which half were events. The median answer took {waits["without"]:.1f} ms'
    f' without events and {waits["fresh_history"]:.1f} ms with a history of {STORED_EVENTS} stored'
    f' events. {swap["swaps"]} changes of the model at {swap["rate_per_s"]:g} requests a second:'
    f' {swap["failed"]} of {swap["requests"]:,} failed, p99 {swap["p99_ms_during"]:.0f} ms around a'
    f' change and {swap["p99_ms_without"]:.0f} ms between.'
  )


@exit_on_reported_error
def main() -> None:
  """Reads the flags, measures, and prints the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--export', required=True, help='exported folder with users')
  add('--next', required=True, help='another export of the same catalogue')
  add('--larger', help='an export of another catalogue')
  add('--events', help='where to keep events; without it a new SQLite file')
  add('--seconds', type=float, default=8, help='seconds of each measured load')
  add('--asks', type=int, default=1000, help='requests of each median')
  add('--rate', type=float, default=100, help='requests a second while models change')
  add('--pause', type=float, default=3, help='seconds without a change between two changes')
  add('--keep', action='store_true', help='store the result')
  flags = parser.parse_args()
  gc.freeze()  # A full garbage collection here would look like a slow answer.
  found = measure(flags)
  found['broken'] = broken_promises(found)
  print(json.dumps(found, indent=2))
  if flags.keep:
    write_file(STORED, json.dumps(found, indent=2) + '\n')
    put_between_marks(PAGE, 'events', sentence(found))
  print(json.dumps(found))
  sys.exit(1 if found['broken'] else 0)


if __name__ == '__main__':
  main()

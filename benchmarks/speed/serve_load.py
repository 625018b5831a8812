"""Sends the service four times the requests that it can answer, and stops it under that load.

  python -m benchmarks.speed.serve_load --export=shop-model --seconds=60 --p99_ms=1000

The benchmark first measures the capacity: how many requests per second are answered when a fixed
number of clients ask again as soon as they have an answer. It then sets `--queue` to a sixth of the
requests that are answered within the stated p99; refusing the other requests costs time, too. Under
overload, requests are sent at random times without waiting for answers, and each wait counts from
the time at which the request was due. The service is a separate process. The last line of output is
one JSON object. The exit code is 1 if a promise was broken.
"""

import argparse
import asyncio
import collections
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.quality.accuracy import put_between_marks
from benchmarks.speed.measure import ROOT, machine, memory_megabytes, port_when_ready
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.files import write_file
from ur4rec_jax.inference import exported
from ur4rec_jax.inference.stored_format import Settings

STORED, PAGE = ROOT / 'benchmarks/results/inference/load.json', ROOT / 'docs' / 'inference.md'
CLIENTS = 128  # Clients that measure the capacity.
CONNECTIONS = 600  # Connections under overload.
OVERLOAD = 4  # Requests sent under overload, relative to the capacity.
QUEUE = 256  # `--queue` while the capacity is measured.
DRAIN_SECONDS = 10
K = 10


class Client(asyncio.Protocol):
  """One connection that sends one request after the other with a minimum of HTTP."""

  def __init__(self, load: 'Load'):
    self._load, self._buffer = load, b''
    self._due: float | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    self._transport = transport

  def send(self, request: bytes, due: float) -> None:
    self._due = due
    self._transport.write(request)

  def data_received(self, data: bytes) -> None:
    self._buffer += data
    head, end, body = self._buffer.partition(b'\r\n\r\n')
    if not end:
      return
    head = head.lower()
    length = int(head.split(b'content-length:')[1].split(b'\r\n', 1)[0])
    if len(body) < length:
      return
    self._buffer = body[length:]
    due, self._due = self._due, None
    self._load.on_answer(self, int(head[9:12]), b'\r\nretry-after:' in head, due)

  def connection_lost(self, error: Exception | None) -> None:
    self._load.on_close(self, self._due is not None)


class Load:
  """Sends requests and counts the answers."""

  def __init__(self, port: int, requests: list[bytes]):
    self._port, self._requests = port, requests
    self._idle: list[Client] = []
    self._number = 0
    self.counts: collections.Counter = collections.Counter()
    self.waits: list[float] = []
    self.keep_asking_until = 0.0

  async def connect(self, connections: int) -> None:
    """Opens connections and keeps them open, as a proxy does."""
    loop = asyncio.get_running_loop()
    for _ in range(connections):
      _, client = await loop.create_connection(lambda: Client(self), '127.0.0.1', self._port)
      self._idle.append(client)

  def ask(self, due: float) -> None:
    """Sends the next request, if a connection is idle."""
    if self._idle:
      self._send(self._idle.pop(), due)
    else:
      self.counts['not sent'] += 1

  def _send(self, client: Client, due: float) -> None:
    self._number += 1
    self.counts['sent'] += 1
    client.send(self._requests[self._number % len(self._requests)], due)

  def on_answer(self, client: Client, status: int, may_retry: bool, due: float) -> None:
    now = time.perf_counter()
    self.counts[status] += 1
    if status == 200:
      self.waits.append(now - due)
    elif not may_retry:
      self.counts['without Retry-After'] += 1
    if now < self.keep_asking_until:
      self._send(client, now)
    else:
      self._idle.append(client)

  def on_close(self, client: Client, was_waiting: bool) -> None:
    if client in self._idle:
      self._idle.remove(client)
    if was_waiting:
      self.counts['closed without answer'] += 1

  @property
  def open(self) -> int:
    """Number of requests that were sent and have no answer yet."""
    done = sum(n for key, n in self.counts.items() if isinstance(key, int))
    return self.counts['sent'] - done - self.counts['closed without answer']

  async def drain(self) -> None:
    """Waits for the answers."""
    deadline = time.perf_counter() + DRAIN_SECONDS
    while self.open and time.perf_counter() < deadline:
      await asyncio.sleep(0.01)


async def measure_capacity(port: int, requests: list[bytes], seconds: float) -> float:
  """Returns the answers per second to `CLIENTS` clients that ask without pause."""
  load = Load(port, requests)
  await load.connect(CLIENTS)
  start = time.perf_counter()
  load.keep_asking_until = start + seconds
  for _ in range(CLIENTS):
    load.ask(start)
  await asyncio.sleep(seconds)
  answered = load.counts[200]
  await load.drain()
  return answered / seconds


async def overload(
  port: int, requests: list[bytes], rate: float, seconds: float, process: subprocess.Popen
) -> tuple[Load, list[float]]:
  """Sends `rate` requests a second, and SIGTERM to the service one second before the end.

  Returns:
    The load, and ten measurements of the service's memory in MB.
  """
  load, memory, rng = Load(port, requests), [], np.random.default_rng(0)
  await load.connect(CONNECTIONS)
  start = time.perf_counter()
  due, is_stopped = start, False
  while due < start + seconds + 1:
    while due <= time.perf_counter():
      load.ask(due)
      due += rng.exponential(1 / rate)
    elapsed = time.perf_counter() - start
    if elapsed >= seconds * (len(memory) + 1) / 10 and len(memory) < 10:
      memory.append(memory_megabytes('VmRSS', process.pid))
    if elapsed >= seconds and not is_stopped:
      process.send_signal(signal.SIGTERM)
      is_stopped = True
    await asyncio.sleep(min(0.001, max(due - time.perf_counter(), 0)))
  await load.drain()
  return load, memory


def start_service(folder: str, batch: int, queue: int, cache: str) -> tuple[subprocess.Popen, int]:
  """Starts the service on a free port and waits until it is ready."""
  command = [sys.executable, '-m', 'ur4rec_jax.serve', f'--export={folder}', '--port=0']
  process = subprocess.Popen(
    [*command, f'--batch={batch}', f'--queue={queue}', f'--client_connections={2 * CONNECTIONS}'],
    stdout=subprocess.PIPE,
    text=True,
    env={'JAX_COMPILATION_CACHE_DIR': cache} | os.environ,
  )
  return process, port_when_ready(process)


def make_requests(folder: str, explained: float) -> list[bytes]:
  """Makes requests with random histories of 1 to 100 items; a share of them asks for reasons."""
  ids = json.loads((pathlib.Path(folder) / 'items.json').read_text())['ids']
  rng, requests = np.random.default_rng(0), []
  for _ in range(500):
    history = [ids[i] for i in rng.integers(0, len(ids), rng.integers(1, 101))]
    question = {'history': history, 'k': K, 'keep_seen': True, 'explain': rng.random() < explained}
    body = json.dumps(question).encode()
    head = (
      'POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
      f'Content-Length: {len(body)}\r\n\r\n'
    )
    requests.append(head.encode() + body)
  return requests


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Measures the capacity, then the overload."""
  with tempfile.TemporaryDirectory() as cache:
    process, port = start_service(flags.export, flags.batch, QUEUE, cache)
    plain = make_requests(flags.export, explained=0)
    requests = make_requests(flags.export, flags.explained)
    asyncio.run(measure_capacity(port, plain, 1))
    capacity = asyncio.run(measure_capacity(port, plain, flags.capacity_seconds))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    queue = max(1, int(capacity * flags.p99_ms / 1000 / 6))
    process, port = start_service(flags.export, flags.batch, queue, cache)
    rate = OVERLOAD * capacity
    load, memory = asyncio.run(overload(port, requests, rate, flags.seconds, process))
    said, _ = process.communicate(timeout=60)
  answered, accepted = (int(x.replace(',', '')) for x in said.split()[1:4:2])
  counts = load.counts
  manifest, items = (
    json.loads((pathlib.Path(flags.export) / name).read_text())
    for name in (exported.MANIFEST, exported.ITEMS)
  )
  p50, p99, most = (1000 * np.percentile(load.waits, [50, 99, 100])).round(1).tolist()
  return {
    'capacity_per_s': round(capacity, 1),
    'offered_per_s': round(counts['sent'] / (flags.seconds + 1), 1),
    'answered_per_s': round(counts[200] / flags.seconds, 1),
    'seconds': flags.seconds,
    'queue': queue,
    'stated_p99_ms': flags.p99_ms,
    'explained_share': flags.explained,
    'p50_ms': p50,
    'p99_ms': p99,
    'max_ms': most,
    'sent': counts['sent'],
    'answered': counts[200],
    'refused': counts[503],
    'refused_without_retry_after': counts['without Retry-After'],
    'other_statuses': sum(
      n for s, n in counts.items() if isinstance(s, int) and s not in (200, 503)
    ),
    'not_sent': counts['not sent'],
    'closed_when_stopping': counts['closed without answer'],
    'accepted': accepted,
    'accepted_without_answer': accepted - counts[200],
    'service_says_answered': answered,
    'memory_mb': memory,
    'exit_code': process.returncode,
    'items': len(items['ids']),
    'paths': Settings.from_manifest(manifest['settings']).branches,
    **machine(),
  }


def broken_promises(found: dict[str, Any]) -> list[str]:
  """Returns the names of the promises that were broken."""
  return [
    name
    for name, is_kept in {
      'p99': found['p99_ms'] <= found['stated_p99_ms'],
      'answers are 200 or 503': not found['other_statuses'],
      'a 503 has Retry-After': not found['refused_without_retry_after'],
      'no accepted request is lost': not found['accepted_without_answer'],
      'SIGTERM ends with 0': found['exit_code'] == 0,
      'memory stays': found['memory_mb'][-1] <= found['memory_mb'][2] + 32,
    }.items()
    if not is_kept
  ]


def sentence(found: dict[str, Any]) -> str:
  """Describes the result in a sentence for docs/inference.md."""
  answered = found['accepted'] - found['accepted_without_answer']
  return (
    f'On {found["cores"]} cores that the service and its clients shared ({found["items"]:,} items, '
    f'{" and ".join(found["paths"])}, queue of {found["queue"]}): {found["capacity_per_s"]:.0f} '
    f'answers a second without overload; {found["answered_per_s"]:.0f} of '
    f'{found["offered_per_s"]:,.0f} a second with it, p99 {found["p99_ms"]:.0f} ms of the '
    f'{found["stated_p99_ms"]:,.0f} stated, {max(found["memory_mb"]):.0f} MB at most, '
    f'{answered:,} of {found["accepted"]:,} accepted requests answered.'
  )


@exit_on_reported_error
def main() -> None:
  """Reads the flags, measures, and prints the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--export', required=True, help='folder that ur4rec_jax.export wrote')
  add('--seconds', type=float, default=60, help='seconds of overload')
  add('--capacity_seconds', type=float, default=10, help='seconds of measuring the capacity')
  add('--batch', type=int, default=64, help='--batch of the service')
  add('--p99_ms', type=float, default=1000, help='promised 99th percentile of the wait, in ms')
  add('--explained', type=float, default=0, help='share of the requests that ask for reasons')
  add('--keep', action='store_true', help='store the result and write it to docs/inference.md')
  flags = parser.parse_args()
  gc.freeze()  # A full garbage collection here would look like a slow answer.
  found = measure(flags)
  for name, value in found.items():
    print(f'{name.replace("_", " "):<28} {value}')
  found['broken'] = broken_promises(found)
  if flags.keep:
    write_file(STORED, json.dumps(found, indent=2) + '\n')
    put_between_marks(PAGE, 'load', sentence(found))
  print(json.dumps(found))
  sys.exit(1 if found['broken'] else 0)


if __name__ == '__main__':
  main()

"""Attacks the service in every way at once, beside clients who only want recommendations.

  python -m benchmarks.robustness.hostile_clients --export=shop-model --seconds=600

The service runs as a separate process that may open 1,024 files. Honest clients ask 50 times a
second, each time over a new connection: first undisturbed, then beside a process of hostile
clients, each with an address of its own (127.0.0.2 and so on). Between the two, the hostile clients
attack another service of the same kind. It shows how much of the delay comes from sharing the cores
with the attackers, which real attackers do not do. The last line of output is one JSON object. The
exit code is 1 if a promise was broken. With --keep, it stores the result in
`benchmarks/results/robustness/hostile_clients.json` and writes docs/inference.md.
"""

import argparse
import asyncio
import collections
import contextlib
import gc
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.quality.accuracy import put_between_marks
from benchmarks.speed.measure import machine, memory_megabytes, port_when_ready
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.files import write_file

ROOT = pathlib.Path(__file__).parents[2]
STORED = ROOT / 'benchmarks' / 'results' / 'robustness' / 'hostile_clients.json'
PAGE = ROOT / 'docs' / 'inference.md'
FILES = 1024  # Open files of the service.
RATE = 50  # Honest requests a second.
MOST_TIMES_SLOWER, MOST_MEGABYTES = 3, 200
SECONDS_TO_BEGIN = 2  # The attackers need so long to open their connections.
PATIENCE = 30  # Seconds that an honest client waits for an answer.
HEAD = b'POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'


def request(question: dict[str, Any]) -> bytes:
  """Returns the bytes of a request on a connection of its own."""
  body = json.dumps(question).encode()
  return HEAD + b'Connection: close\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body)


class Attack:
  """What hostile clients do; each method attacks until it is cancelled or cut off."""

  def __init__(self, port: int, ids: list[str]):
    self._port, self._ids = port, ids

  async def _open(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection('127.0.0.1', self._port, local_addr=(address, 0))

  async def endless_header(self, address: str) -> None:
    await self._pour(address, b'GET /health HTTP/1.1\r\nHost: localhost\r\nA: ', b'b' * 65_536)

  async def many_headers(self, address: str) -> None:
    await self._pour(address, b'GET /health HTTP/1.1\r\nHost: localhost\r\n', b'A: b\r\n' * 10_000)

  async def endless_trailers(self, address: str) -> None:
    start = HEAD + b'Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n'
    await self._pour(address, start, b'A: b\r\n' * 10_000)

  async def long_body(self, address: str) -> None:
    await self._pour(address, HEAD + b'Content-Length: 99999999\r\n\r\n', b' ' * 65_536)

  async def body_for_health(self, address: str) -> None:
    start = b'POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n'
    await self._pour(address, start, b' ' * 65_536)

  async def _pour(self, address: str, start: bytes, more: bytes) -> None:
    _, writer = await self._open(address)
    writer.write(start)
    for _ in range(1000):
      writer.write(more)
      await writer.drain()
      await asyncio.sleep(0.02)
    writer.close()

  async def silence(self, address: str) -> None:
    await self._then_wait(address, b'')

  async def half_header(self, address: str) -> None:
    await self._then_wait(address, b'GET /health HTTP/1.1\r\nHost: localhost\r\n')

  async def half_body(self, address: str) -> None:
    await self._then_wait(address, HEAD + b'Content-Length: 99\r\n\r\n{')

  async def unread_answers(self, address: str) -> None:
    ask = b'GET /items HTTP/1.1\r\nHost: localhost\r\n\r\n'
    await self._then_wait(address, ask * 200, reads=False)

  async def _then_wait(self, address: str, start: bytes, reads: bool = True) -> None:
    reader, writer = await self._open(address)
    writer.write(start)
    await (reader.read() if reads else asyncio.sleep(20))
    writer.close()

  async def flood_of_filters(self, address: str) -> None:
    some = lambda: random.choices(self._ids, k=1000)
    question = {'history': some(), 'only': some(), 'without': some(), 'k': 10, 'keep_seen': True}
    await self._ask(address, request(question))

  async def flood_of_metrics(self, address: str) -> None:
    await self._ask(address, b'GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n')

  async def wrong_host(self, address: str) -> None:
    await self._ask(address, b'GET /users HTTP/1.0\r\nHost: example.com\r\n\r\n')

  async def nonsense(self, address: str) -> None:
    await self._ask(address, random.randbytes(200))

  async def _ask(self, address: str, content: bytes) -> None:
    reader, writer = await self._open(address)
    writer.write(content)
    await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()

  async def swap(self, address: str) -> None:
    _, writer = await self._open(address)
    writer.close()


# How many clients do what at once, and how many seconds each pauses before it does so again.
CROWD = {
  'endless_header': (4, 0.1),
  'many_headers': (4, 0.1),
  'endless_trailers': (2, 0.1),
  'long_body': (4, 0.1),
  'body_for_health': (4, 0.1),
  'silence': (400, 0.5),
  'half_header': (400, 0.5),
  'half_body': (40, 0.5),
  'unread_answers': (8, 1.0),
  'flood_of_filters': (16, 0.05),
  'flood_of_metrics': (4, 0.1),
  'wrong_host': (4, 0.1),
  'nonsense': (4, 0.1),
  'swap': (4, 0.01),
}


async def repeat(attack: Callable[[str], Awaitable[None]], address: str, pause: float) -> None:
  """Attacks again and again."""
  while True:
    with contextlib.suppress(OSError, EOFError, TimeoutError):
      await attack(address)
    await asyncio.sleep(pause * random.uniform(0.5, 1.5))


def attack_all(port: int, ids: list[str], has_begun: Any) -> None:
  """Runs all attacks until the process is killed, and sets an event when they have begun."""
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
  os.nice(10)  # Real attackers run on other machines and take no time from the service's cores.

  async def run() -> None:
    attack = Attack(port, ids)
    asyncio.get_running_loop().call_later(SECONDS_TO_BEGIN, has_begun.set)
    await asyncio.gather(
      *(
        repeat(getattr(attack, name), f'127.0.0.{at}', pause)
        for at, (name, (count, pause)) in enumerate(CROWD.items(), 2)
        for _ in range(count)
      )
    )

  asyncio.run(run())


class Honest:
  """Clients who ask at fixed times and count from the time at which they wanted to ask."""

  def __init__(self, port: int, ids: list[str]):
    self._port, self._ids = port, ids
    self.counts: collections.Counter = collections.Counter()
    self.waits: list[float] = []

  async def ask(self, due: float) -> None:
    question = {'history': random.choices(self._ids, k=20), 'k': 10, 'keep_seen': True}
    try:
      async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection('127.0.0.1', self._port)
        writer.write(request(question))
        answer = await reader.read()
        writer.close()
      status = answer[9:12].decode() or 'no answer'
    except (OSError, TimeoutError) as error:
      status = type(error).__name__
    self.counts[status] += 1
    if status == '200':
      self.waits.append(time.perf_counter() - due)

  async def run(self, seconds: float, watch: Callable[[], None]) -> None:
    """Asks `RATE` times a second; calls `watch` each second."""
    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
      for i in range(int(seconds * RATE)):
        due = start + i / RATE
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        tasks.create_task(self.ask(due))
        if i % RATE == 0:
          watch()

  def p99_ms(self) -> float:
    """Returns the 99th percentile of the wait."""
    return round(1000 * float(np.percentile(self.waits or [PATIENCE], 99)), 1)


@contextlib.contextmanager
def service(folder: str) -> Iterator[tuple[subprocess.Popen, int]]:
  """Runs a service that may open few files, and yields its process and port when it is ready."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'ur4rec_jax.serve', f'--export={folder}', '--port=0', '--batch=16'],
    stdout=subprocess.PIPE,
    text=True,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
  )
  try:
    yield process, port_when_ready(process)
  finally:
    process.kill()
    process.wait()


@contextlib.contextmanager
def attackers(port: int, ids: list[str]) -> Iterator[None]:
  """Attacks the service at a port while the block runs."""
  context = multiprocessing.get_context('spawn')
  has_begun = context.Event()
  hostile = context.Process(target=attack_all, args=(port, ids, has_begun), daemon=True)
  hostile.start()
  try:
    has_begun.wait(120)
    yield
  finally:
    hostile.kill()
    hostile.join()


def measure(folder: str, seconds: float, calm_seconds: float) -> dict[str, Any]:
  """Measures honest clients alone, beside attacks on another service, and beside all attacks."""
  ids = json.loads((pathlib.Path(folder) / 'items.json').read_text())['ids']
  with service(folder) as (process, port):

    def honest(seconds: float, watch: Callable[[], None] = lambda: None) -> Honest:
      clients = Honest(port, ids)
      asyncio.run(clients.run(seconds, watch))
      return clients

    honest(min(calm_seconds, 3))
    calm = honest(calm_seconds)
    with service(folder) as (_, other_port), attackers(other_port, ids):
      beside = honest(2 * calm_seconds)
    memory = []
    before = memory_megabytes('VmRSS', process.pid)
    with attackers(port, ids):
      besieged = honest(seconds, lambda: memory.append(memory_megabytes('VmRSS', process.pid)))
      address = f'http://127.0.0.1:{port}/metrics'
      metrics = urllib.request.urlopen(address, timeout=PATIENCE).read().decode()
      stopping = time.perf_counter()
      process.send_signal(signal.SIGTERM)
      said, _ = process.communicate(timeout=90)
      stop_seconds = time.perf_counter() - stopping
  statuses = re.findall(r'ur4rec_requests_total\{status="(\d+)"\} (\S+)', metrics)
  return {
    'seconds': seconds,
    'calm_p99_ms': calm.p99_ms(),
    'beside_p99_ms': beside.p99_ms(),
    'besieged_p99_ms': besieged.p99_ms(),
    'calm': dict(calm.counts),
    'besieged': dict(besieged.counts),
    'all_answers': {status: int(float(count)) for status, count in statuses},
    'memory_before_mb': before,
    'memory_mb': max(memory),
    'stop_seconds': round(stop_seconds, 1),
    'exit_code': process.returncode,
    'said': said.strip().splitlines()[-1:],
    'load': os.getloadavg()[0],
    **machine(),
  }


def broken_promises(found: dict[str, Any]) -> list[str]:
  """Returns the names of the promises that were broken."""
  asked = sum(found['besieged'].values())
  statuses = {*found['besieged'], *found['all_answers']}
  return [
    name
    for name, is_kept in {
      'p99': found['besieged_p99_ms'] <= MOST_TIMES_SLOWER * found['calm_p99_ms'],
      'honest requests are answered': found['besieged'].get('200', 0) >= 0.99 * asked,
      'no 5xx but 503': not [s for s in statuses if s.startswith('5') and s != '503'],
      'memory': found['memory_mb'] <= found['memory_before_mb'] + MOST_MEGABYTES,
      'SIGTERM ends with 0': found['exit_code'] == 0,
    }.items()
    if not is_kept
  ]


def sentence(found: dict[str, Any]) -> str:
  """Describes the result in a sentence for docs/inference.md."""
  answered, asked = found['besieged'].get('200', 0), sum(found['besieged'].values())
  return (
    f'On {found["cores"]} cores that the service and all clients shared, {found["seconds"]:g}'
    f' seconds: {answered:,} of {asked:,} honest requests answered, p99'
    f' {found["besieged_p99_ms"]:.0f} ms beside hostile clients, {found["beside_p99_ms"]:.0f} ms'
    f' while they attacked another service on the same cores, and {found["calm_p99_ms"]:.0f} ms'
    f' without them; {found["memory_mb"] - found["memory_before_mb"]:.0f} MB more memory, stopped'
    f' {found["stop_seconds"]:.0f} s after SIGTERM.'
  )


@exit_on_reported_error
def main() -> None:
  """Reads the flags, measures, and prints the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--export', required=True, help='folder that ur4rec_jax.export wrote')
  add('--seconds', type=float, default=600, help='seconds beside hostile clients')
  add('--calm_seconds', type=float, default=20, help='seconds without them before')
  add('--keep', action='store_true', help='store the result and write it to docs/inference.md')
  flags = parser.parse_args()
  gc.freeze()  # A full garbage collection here would look like a slow answer.
  found = measure(flags.export, flags.seconds, flags.calm_seconds)
  for name, value in found.items():
    print(f'{name.replace("_", " "):<28} {value}')
  found['broken'] = broken_promises(found)
  if flags.keep:
    write_file(STORED, json.dumps(found, indent=1) + '\n')
    put_between_marks(PAGE, 'hostile', sentence(found))
  print(json.dumps(found))
  sys.exit(1 if found['broken'] else 0)


if __name__ == '__main__':
  main()

"""Limits the size of requests and how many are inside the service at once, and checks the Host."""

import asyncio
import contextlib
import ipaddress
import math
import time
from collections import Counter as Counts
from collections.abc import Callable, Hashable, Sequence

from fastapi.responses import JSONResponse
from prometheus_client import Counter, Gauge, Histogram

from ur4rec_jax.service.http_schema import problem
from ur4rec_jax.service.turns import Turn, Turns

MOST_BYTES = 1 << 20  # Limit for the body of a request.
MOST_HEADER_BYTES = 1 << 16  # Limit for the address and the header of a request.
READ_SECONDS = 5  # A body that takes longer to arrive is refused.
RETRY_SECONDS = 1  # Refused clients are told to wait this long.
BURST_SECONDS = 10  # A client that was silent may use the limit of this many seconds at once.
_MOST_CLIENTS = 10_000  # Clients whose use of a limit is remembered.
TURN = 'ur4rec.turn'  # The `Turn` of a request in its scope.
ALWAYS_ADMITTED = ('/health', '/metrics')  # They are needed most when the service is overloaded.

REQUESTS = Counter('ur4rec_requests', 'Answers by status.', ['status'])
SECONDS = Histogram(
  'ur4rec_request_seconds',
  'Seconds from the first byte of an accepted request to the last byte of its answer.',
  buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
INSIDE = Gauge('ur4rec_requests_inside', 'Accepted requests that have no answer yet.')


class AdmissionControl:
  """ASGI middleware that refuses requests that the service could not answer in time.

  It decides before anything is parsed, because refusing must be cheap under overload. Every request
  that it admits is answered.

  Attributes:
    inside: admitted requests that have no answer yet.
    accepted: requests whose body was read.
    answered: accepted requests that were answered.
  """

  def __init__(self, app: Callable, most_inside: int, is_allowed: Callable[[str], bool]):
    """Wraps an application.

    Args:
      app: the ASGI application.
      most_inside: the most requests that may be inside at once; see `_in_queue` for exceptions.
      is_allowed: tells whether the Host of a request is that of this service.
    """
    self._app, self._most_inside, self._is_allowed = app, most_inside, is_allowed
    self._of_client: Counts[str] = Counts()
    self._turns = Turns()
    self.inside = self.accepted = self.answered = 0
    self._refusal = problem(503, 'too many requests at once; try again later')
    self._refusal.headers['Retry-After'] = str(RETRY_SECONDS)
    INSIDE.set_function(lambda: self.inside)

  async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
    elif refusal := self._refusal_of_header(scope):
      await refusal(scope, receive, _counting(send))
    elif scope['path'] in ALWAYS_ADMITTED:
      # Their bodies are never read, because the queue does not limit how many there are.
      await self._app(scope, _nothing, _counting(send))
    else:
      await self._in_queue(scope, receive, send)

  def _refusal_of_header(self, scope: dict) -> JSONResponse | None:
    headers = scope['headers']
    size = len(scope['raw_path']) + len(scope['query_string'])
    if size + sum(len(name) + len(value) + 4 for name, value in headers) > MOST_HEADER_BYTES:
      return _closing(problem(431, f'the header has more than {MOST_HEADER_BYTES:,} bytes'))
    hosts = [value.decode('latin-1') for name, value in headers if name == b'host']
    if not hosts:
      return problem(400, 'the header has no Host')
    if not all(map(self._is_allowed, hosts)):
      way_out = 'start it with --allowed_hosts'
      return problem(421, f'Host {hosts[0][:80]!r} is not that of this service; {way_out}')
    return None

  async def _in_queue(self, scope: dict, receive: Callable, send: Callable) -> None:
    client = client_name(scope['client'][0]) if scope['client'] else ''
    # When the queue is full, a client with less than an equal share of it still gets in, until the
    # queue holds twice as many requests: of ten thousand clients each one has less than its share.
    of_client = self._of_client[client]
    share = self._most_inside / (len(self._of_client) + (not of_client))
    most = self._most_inside * (1 if of_client >= share else 2)
    if self.inside >= most:
      await self._refusal(scope, receive, _counting(send))
      return
    start = time.perf_counter()
    self.inside += 1
    self._of_client[client] += 1
    try:
      await self._admit(client, scope, receive, send)
    finally:
      self.inside -= 1
      self._of_client[client] -= 1
      if not self._of_client[client]:
        del self._of_client[client]
      SECONDS.observe(time.perf_counter() - start)

  async def _admit(self, client: str, scope: dict, receive: Callable, send: Callable) -> None:
    send = _counting(send)
    body = await _read_body(receive)
    if body is None:
      return
    if isinstance(body, JSONResponse):
      await body(scope, receive, send)
      return
    messages = iter([{'type': 'http.request', 'body': body, 'more_body': False}])

    async def replay():
      return next(messages, None) or await receive()

    self.accepted += 1
    async with Turn(self._turns, client) as turn:

      async def end_turn_and_send(message: dict) -> None:
        turn.end()  # The client may read its answer slowly.
        await send(message)

      scope[TURN] = turn
      await self._app(scope, replay, end_turn_and_send)
    self.answered += 1


class RateLimit:
  """Limits what each client may send or ask for, on average over some seconds.

  Attributes:
    per_second: the most of one client; infinite for no limit.
  """

  def __init__(self, per_second: float, largest: int):
    """Sets the limit.

    Args:
      per_second: the most of one client.
      largest: the most in one request, which a client that was silent may always make.
    """
    self.per_second = per_second
    self._most = max(per_second * BURST_SECONDS, largest)
    self._spent: dict[Hashable, tuple[float, float]] = {}  # By client: time and use of the limit.

  def seconds_to_wait(self, client: Hashable, count: int) -> int:
    """Counts a request against a client's limit, or returns the seconds until it may try again.

    Args:
      client: who asks.
      count: how much the request has of what is limited.

    Returns:
      0 if the request is allowed.
    """
    if not math.isfinite(self.per_second):
      return 0
    now = time.monotonic()
    before, spent = self._spent.pop(client, (now, 0.0))
    spent = max(spent - (now - before) * self.per_second, 0)
    is_allowed = spent + count <= self._most
    if len(self._spent) >= _MOST_CLIENTS:
      del self._spent[next(iter(self._spent))]  # The one that was silent for the longest time.
    self._spent[client] = now, spent + count * is_allowed
    return 0 if is_allowed else max(math.ceil((spent + count - self._most) / self.per_second), 1)


def client_name(address: str) -> str:
  """Returns the name of a client: its IPv4 address, or the 64-bit network of its IPv6 address.

  Args:
    address: the address of the other side.
  """
  try:
    found = ipaddress.ip_address(address.partition('%')[0])
  except ValueError:
    return address
  if found.version == 6 and found.ipv4_mapped is not None:
    return str(found.ipv4_mapped)
  return str(found) if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))


def make_host_check(bound: str, more: Sequence[str] = ()) -> Callable[[str], bool]:
  """Builds a function that tells whether a Host header names this service.

  A page of another site can make its own name point to this machine (DNS rebinding), and would then
  be allowed to read the answers. Its requests have the name of that site as their Host.

  Args:
    bound: the address that the service listens on. For all networks (0.0.0.0 or ::) every Host that
      is an address is right, because only names can be made to point elsewhere.
    more: further names; `*` allows all.
  """
  names = {'localhost', '127.0.0.1', '::1', bound.casefold(), *(name.casefold() for name in more)}
  is_any_address = bound in ('', '0.0.0.0', '::')

  def is_allowed(host: str) -> bool:
    host = host.casefold()
    name = host[1:].partition(']')[0] if host.startswith('[') else host.partition(':')[0]
    if '*' in names or name.rstrip('.') in names:
      return True
    with contextlib.suppress(ValueError):
      return is_any_address and bool(ipaddress.ip_address(name))
    return False

  return is_allowed


async def _nothing() -> dict:
  """Returns an empty body in place of one that is not read."""
  return {'type': 'http.request', 'body': b'', 'more_body': False}


def _closing(response: JSONResponse) -> JSONResponse:
  """Makes a response close its connection, because the rest of the request is not read."""
  response.headers['Connection'] = 'close'
  return response


async def _read_body(receive: Callable) -> bytes | JSONResponse | None:
  """Returns the body, an error response if it is too long or too slow, None if the client left."""
  body, size, is_whole = bytearray(), 0, False
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(READ_SECONDS):
      while not is_whole:
        message = await receive()
        if message['type'] == 'http.disconnect':
          return None
        part = message.get('body', b'')
        size += len(part)
        # A body that is too long is read to its end, because clients that still send do not read
        # the answer.
        if size <= MOST_BYTES:
          body += part
        is_whole = not message.get('more_body', False)
  if size > MOST_BYTES:
    return _closing(problem(413, f'the body has more than {MOST_BYTES:,} bytes'))
  if not is_whole:
    return _closing(problem(408, f'the body did not come within {READ_SECONDS} s'))
  return bytes(body)


def _counting(send: Callable) -> Callable:
  """Counts answers by status."""

  async def counting(message: dict) -> None:
    if message['type'] == 'http.response.start':
      REQUESTS.labels(message['status']).inc()
    await send(message)

  return counting

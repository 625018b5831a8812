"""Limits the size of requests and how many are inside the service at once."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from fastapi.responses import JSONResponse
from prometheus_client import Counter, Gauge, Histogram

from ur4rec_jax.inference.http_schema import problem

MOST_BYTES = 1 << 20  # In the body of a request.
READ_SECONDS = 5  # A body that takes longer to arrive is refused.
RETRY_SECONDS = 1  # Refused clients are told to wait this long.
ALWAYS_ADMITTED = ('/health', '/metrics')  # They are needed most when the service is overloaded.

REQUESTS = Counter('ur4rec_requests', 'Answers by status.', ['status'])
SECONDS = Histogram(
  'ur4rec_request_seconds',
  'Seconds from the first byte of an accepted request to the last byte of its answer.',
  buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
INSIDE = Gauge('ur4rec_requests_inside', 'Accepted requests that have no answer yet.')


class AdmissionControl:
  """An ASGI application around another that refuses requests it could not answer in time.

  It decides before anything is parsed, because refusing must be cheap under overload. Every request
  that it admits is answered.

  Attributes:
    inside: admitted requests that have no answer yet.
    accepted: requests whose body was read.
    answered: accepted requests that were answered.
  """

  def __init__(self, app: Callable, most_inside: int):
    """Wraps an application.

    Args:
      app: the ASGI application.
      most_inside: the most requests that may be inside at once.
    """
    self._app, self._most_inside = app, most_inside
    self.inside = self.accepted = self.answered = 0
    self._refusal = problem(503, 'too many requests at once; try again later')
    self._refusal.headers['Retry-After'] = str(RETRY_SECONDS)
    INSIDE.set_function(lambda: self.inside)

  async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
    elif scope['path'] in ALWAYS_ADMITTED:
      await self._admit(scope, receive, send)
    elif self.inside >= self._most_inside:
      await self._refusal(scope, receive, _counting(send))
    else:
      start = time.perf_counter()
      self.inside += 1
      try:
        await self._admit(scope, receive, send)
      finally:
        self.inside -= 1
        SECONDS.observe(time.perf_counter() - start)

  async def _admit(self, scope: dict, receive: Callable, send: Callable) -> None:
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
    await self._app(scope, replay, send)
    self.answered += 1


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
    return problem(413, f'the body has more than {MOST_BYTES:,} bytes')
  if not is_whole:
    return problem(408, f'the body did not come within {READ_SECONDS} s')
  return bytes(body)


def _counting(send: Callable) -> Callable:
  """Counts answers by status."""

  async def counting(message: dict) -> None:
    if message['type'] == 'http.response.start':
      REQUESTS.labels(message['status']).inc()
    await send(message)

  return counting

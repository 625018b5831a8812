"""Limits the connections of the HTTP service: deadlines, header size, and connections per client.

uvicorn limits none of these with httptools, so this module adds them to its protocol.
"""

import asyncio
import http
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ur4rec_jax.service.admission import (
  MOST_HEADER_BYTES,
  READ_SECONDS,
  REQUESTS,
  client_name,
)
from ur4rec_jax.service.http_schema import problem

MOST_HEADERS = 200  # Lines of a header; each line costs time, however short it is.
HEADER_SECONDS = 10  # A header that takes longer to arrive is refused.
# The service itself answers a late body; this deadline is for bodies that nobody waits for.
BODY_SECONDS = READ_SECONDS + 5
WRITE_SECONDS = 30  # A client that does not read its answer for so long is disconnected.
# A refused client that still sends would not read the answer if the connection were closed at once.
LINGER_SECONDS = 2


class Connections:
  """The open connections by client.

  If a client has too many, its oldest one that waits for a request gives way to the new one. If
  there are too many in all, one of the client with the most connections does, or of any other.
  """

  def __init__(self, most: int, most_of_client: int):
    """Sets the limits.

    Args:
      most: the most open connections.
      most_of_client: the most open connections of one client.
    """
    self._most, self._most_of_client = most, most_of_client
    self._by_client: dict[str, dict[Connection, None]] = {}
    self._count = 0

  def add(self, connection: 'Connection') -> bool:
    """Counts a new connection; False if there is no room for it."""
    client = connection.client_name
    of_client = self._by_client.get(client, {})
    has_room = True
    if len(of_client) >= self._most_of_client:
      has_room = self._make_room(of_client)
    elif self._count >= self._most:
      by_client = self._by_client.values()
      has_room = self._make_room(max(by_client, key=len)) or any(map(self._make_room, by_client))
    if has_room:
      # Making room may have removed the last connection of this client, and its dict with it.
      self._by_client.setdefault(client, {})[connection] = None
      self._count += 1
    return has_room

  def remove(self, connection: 'Connection') -> None:
    """Forgets a connection."""
    of_client = self._by_client.get(connection.client_name, {})
    if connection in of_client:
      del of_client[connection]
      self._count -= 1
      if not of_client:
        self._by_client.pop(connection.client_name, None)

  def _make_room(self, connections: dict['Connection', None]) -> bool:
    oldest = next((connection for connection in connections if connection.is_waiting), None)
    if oldest is None:
      return False
    self.remove(oldest)
    oldest.abort()
    return True


class Connection(HttpToolsProtocol):
  """One connection.

  Attributes:
    is_waiting: whether it waits for a request or the rest of one, so that nothing is lost if the
      connection is closed.
    client_name: see the function of this name.
  """

  def __init__(self, connections: Connections, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._connections = connections
    self._answering: RequestResponseCycle | None = None
    self._deadline: asyncio.TimerHandle | None = None
    self._write_deadline: asyncio.TimerHandle | None = None
    self._is_refused, self._is_in_header = False, False
    self._without_body = 0  # Bytes since the last part of a body: headers, trailers and the like.
    self._has_progressed = False
    self.is_waiting, self.client_name = True, ''

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self.client_name = client_name(self.client[0] if self.client else '')
    if self._connections.add(self):
      self._expect_within(HEADER_SECONDS)
    else:
      self.abort()

  def abort(self) -> None:
    """Closes the connection at once."""
    self._answer_no_more()
    self.transport.abort()

  def _start_asgi_task(self, cycle: RequestResponseCycle, app: Callable) -> None:
    self._answering = cycle
    super()._start_asgi_task(cycle, app)

  def _answer_no_more(self) -> None:
    """Stops the application from writing; uvicorn does so for the newest request only."""
    if self._answering is not None:
      self._answering.disconnected = True
      self._answering.message_event.set()

  def connection_lost(self, exc: Exception | None) -> None:
    self._connections.remove(self)
    self._expect_within(None)
    self._expect_reading_within(None)
    self._answer_no_more()
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    if self._is_refused:
      return
    self._has_progressed = False
    super().data_received(data)
    if self.is_waiting and self._deadline is None:
      # uvicorn cancels its own deadline of idle connections whatever arrives.
      self._expect_within(HEADER_SECONDS)
    self._without_body = 0 if self._has_progressed else self._without_body + len(data)
    if self._without_body > MOST_HEADER_BYTES and not self._is_refused:
      self._refuse(431, f'the header has more than {MOST_HEADER_BYTES:,} bytes')

  def send_400_response(self, msg: str) -> None:
    if self.headers is not None and len(self.headers) >= MOST_HEADERS:
      self._refuse(431, f'the header has more than {MOST_HEADERS} lines')
    elif self._is_in_header and len(self.url) > MOST_HEADER_BYTES:
      self._refuse(431, f'the address has more than {MOST_HEADER_BYTES:,} bytes')
    else:
      self._refuse(400, msg)

  def on_header(self, name: bytes, value: bytes) -> None:
    if len(self.headers) >= MOST_HEADERS:
      raise ValueError('too many lines')  # The parser stops, and uvicorn sends a 400 response.
    super().on_header(name, value)

  def on_message_begin(self) -> None:
    super().on_message_begin()
    self._is_in_header = True
    self._expect_within(HEADER_SECONDS)

  def on_headers_complete(self) -> None:
    super().on_headers_complete()
    self._is_in_header, self._has_progressed = False, True
    self._expect_within(BODY_SECONDS)

  def on_body(self, body: bytes) -> None:
    self._has_progressed = True
    super().on_body(body)

  def on_message_complete(self) -> None:
    # A refused request may be answered before its body has arrived.
    self._has_progressed, self.is_waiting = True, self.cycle.response_complete
    self._expect_within(None)
    super().on_message_complete()

  def on_response_complete(self) -> None:
    super().on_response_complete()
    if self.transport.is_closing():
      self._expect_reading_within(WRITE_SECONDS)
    elif self.cycle.response_complete:
      self.is_waiting = True

  def pause_writing(self) -> None:
    super().pause_writing()
    self._expect_reading_within(WRITE_SECONDS)

  def resume_writing(self) -> None:
    super().resume_writing()
    if not self.transport.is_closing():
      self._expect_reading_within(None)

  def _expect_within(self, seconds: float | None) -> None:
    """Sets the deadline of the header or body that is to come; None for no deadline."""
    if self._deadline is not None:
      self._deadline.cancel()
    self._deadline = None if seconds is None else self.loop.call_later(seconds, self._on_late)

  def _expect_reading_within(self, seconds: float | None) -> None:
    """Sets the deadline by which the client must read its answer; None for no deadline."""
    if self._write_deadline is not None:
      self._write_deadline.cancel()
    self._write_deadline = None
    if seconds is not None:
      self._write_deadline = self.loop.call_later(seconds, self.abort)

  def _on_late(self) -> None:
    if self._is_in_header and not self._is_refused:
      self._refuse(408, f'the header did not come within {HEADER_SECONDS} s')
    else:
      self.abort()

  def _refuse(self, status: int, detail: str) -> None:
    """Answers data that never became a request, and closes the connection."""
    self._is_refused = True
    if self.transport.is_closing():
      return
    answering = self._answering
    if answering is not None and answering.response_started and not answering.response_complete:
      self.abort()  # This answer would be written into the middle of the other one.
      return
    self._answer_no_more()
    REQUESTS.labels(status).inc()
    answer = problem(status, detail)
    lines = [f'HTTP/1.1 {status} {http.HTTPStatus(status).phrase}', 'connection: close']
    lines += [f'{key.decode()}: {value.decode()}' for key, value in answer.raw_headers]
    self.transport.write('\r\n'.join([*lines, '', '']).encode() + answer.body)
    if self.transport.can_write_eof():
      self.transport.write_eof()
    self._expect_within(LINGER_SECONDS)


def make_protocol(most: int, most_of_client: int) -> Callable[..., Connection]:
  """Returns the protocol class for `uvicorn.Config(http=...)`.

  Args:
    most: the most open connections.
    most_of_client: the most open connections of one client.
  """
  connections = Connections(most, most_of_client)

  class Limited(Connection):
    def __init__(self, *args: Any, **kwargs: Any):
      super().__init__(connections, *args, **kwargs)

  return Limited

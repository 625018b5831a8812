"""The HTTP client under a provider's SDK, with limits against hostile and broken servers.

A reply is read up to a limit, packed and unpacked. Redirects are not followed, because the key
would go along.
"""

import asyncio
import importlib
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

# Most bytes of a reply, and of a line in the results of a batch. An answer has a few thousand.
MAX_REPLY = 2 << 20
_MAX_ERROR = 64 << 10  # Most bytes of an error message.
# Uploads and downloads of batches may take longer than a reply: a second more for so many bytes.
BYTES_PER_SECOND = 16 << 10


class BadReply(Exception):
  """A reply that cannot be read.

  Attributes:
    is_too_large: whether it passed the limit, so that another try is likely to pass it again.
  """

  def __init__(self, reason: str, is_too_large: bool = False):
    super().__init__(reason)
    self.is_too_large = is_too_large


def make_client(sdk: ModuleType, timeout: float, login: tuple[str, str] | None) -> Any:
  """Creates an asynchronous HTTP client for an SDK.

  Args:
    sdk: the package `openai` or `anthropic`.
    timeout: seconds to wait for a connection and for the next bytes.
    login: user and password of a server behind HTTP Basic authentication.
  """
  base = sdk.DefaultAsyncHttpxClient

  async def send(self: Any, request: Any, *, stream: bool = False, **options: Any) -> Any:
    request.headers['accept-encoding'] = 'identity' if stream else 'gzip'
    reply = await base.send(self, request, stream=True, **options)
    if stream and reply.is_success and _encoding(reply) == 'identity':
      return reply  # The results of a batch; `read_lines` limits them.
    try:
      content = await _content(reply)
    finally:
      await reply.aclose()
    left_out = ('content-encoding', 'content-length', 'transfer-encoding')
    headers = [pair for pair in reply.headers.multi_items() if pair[0] not in left_out]
    return type(reply)(reply.status_code, headers=headers, content=content, request=reply.request)

  client = type('Client', (base,), {'send': send})
  return client(timeout=timeout, auth=login, follow_redirects=False)


def transport_errors(sdk: ModuleType) -> tuple[type[Exception], ...]:
  """Returns the errors of the SDK's HTTP library that mean a broken connection."""
  library = sdk.DefaultAsyncHttpxClient.__mro__[1].__module__.partition('.')[0]
  module = importlib.import_module(library)
  return module.TransportError, module.StreamError, module.DecodingError


async def read_lines(
  open_reply: Callable[[dict[str, str]], Any],
  start: int,
  most: int,
  timeout: float,
  on_line: Callable[[bytes, int], bool],
) -> None:
  """Reads the lines of a large reply, from a position on if the server can do that.

  Args:
    open_reply: sends the request with further headers; an asynchronous context of the reply.
    start: position in bytes behind the lines that are known.
    most: bytes after which reading stops with an error.
    timeout: seconds for the whole reply, and one more for each `BYTES_PER_SECOND`.
    on_line: called with each line, with its line end unless it has none, and the position behind
      it; reading ends when it returns False. A line above `MAX_REPLY` is cut.

  Raises:
    BadReply: the reply is too large.
    TimeoutError: the reply comes too slowly.
  """
  now = asyncio.get_running_loop().time
  last = now() + timeout
  async with asyncio.timeout_at(last) as deadline:
    async with open_reply({'Range': f'bytes={start}-'} if start else {}) as reply:
      position = start if reply.status_code == 206 else 0
      line = bytearray()
      async for part in reply.iter_bytes():
        for piece in _lines(part):
          position += len(piece)
          line += piece[: max(0, MAX_REPLY - len(line))]
          if piece.endswith(b'\n'):
            if position > start and not on_line(bytes(line.rstrip()) + b'\n', position):
              return
            line.clear()
        if position > most:
          raise BadReply(f'more than {most:,} bytes', is_too_large=True)
        last += len(part) / BYTES_PER_SECOND
        deadline.reschedule(last)
      if line.strip() and position > start:
        on_line(bytes(line), position)


def _lines(part: bytes) -> list[bytes]:
  """Splits at line feeds only and keeps them."""
  *whole, rest = part.split(b'\n')
  return [line + b'\n' for line in whole] + ([rest] if rest else [])


def _encoding(reply: Any) -> str:
  return reply.headers.get('content-encoding', '').strip().lower() or 'identity'


async def _content(reply: Any) -> bytes:
  """Reads and unpacks a reply; a too long error message is cut."""
  most = MAX_REPLY if reply.is_success else _MAX_ERROR
  packed = bytearray()
  async for part in reply.aiter_raw():
    packed += part
    if len(packed) > most:
      break
  content = bytes(packed)
  encoding = _encoding(reply)
  if encoding in ('gzip', 'x-gzip', 'deflate'):
    try:
      # Reads the headers of both formats and unpacks one byte more than allowed at most.
      content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(packed, most + 1)
    except zlib.error:
      raise BadReply('the reply is damaged') from None
  elif encoding != 'identity':
    raise BadReply(f'content encoding {encoding[:40]}, which was not asked for')
  if len(content) > most and reply.is_success:
    raise BadReply(f'a reply of more than {most:,} bytes', is_too_large=True)
  return content[:most]

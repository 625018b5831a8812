"""Downloads small files from servers that may be slow, busy, broken or hostile."""

import asyncio
import collections
import contextlib
import random
import socket
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from typing import NamedTuple

from data_prep.images import addresses
from data_prep.retry_after import seconds_to_wait
from ur4rec_jax.data import item_pictures
from ur4rec_jax.encoders.picture_files import MAX_BYTES

with contextlib.suppress(ImportError):  # An optional package, see `addresses`.
  import httpx

UNANSWERED = 'unanswered'
_MAX_REDIRECTS = 5
_BACKOFF = 0.5  # Seconds before the second try; doubles from try to try.
_LONGEST_WAIT = 60  # Seconds to wait at most when a server asks for patience.
_SILENCE = 8  # A host is skipped after this many unanswered pictures in a row.


class Settings(NamedTuple):
  """What to download and how patiently; the flags of download_images have the same names.

  Attributes:
    source: where the addresses come from, `urls` (the items) or `tmdb`.
    links: path of MovieLens' links.csv for `tmdb`.
    concurrency: downloads at the same time.
    timeout: seconds to wait for the next bytes.
    deadline: seconds for one file, all tries included.
    tries: requests per file.
    redirect_hosts: other hosts that a server may redirect to; `public` allows every public one.
    allow_private: whether to connect to addresses outside the public internet.
    retry_failed: whether missing and rejected pictures are requested again.
    placeholders: whether items without a picture get a card with their title.
    tmdb_url: server to use instead of TMDB's.
  """

  source: str = 'urls'
  links: str | None = None
  concurrency: int = 8
  timeout: float = 20.0
  deadline: float = 120.0
  tries: int = 4
  redirect_hosts: tuple[str, ...] = ()
  allow_private: bool = False
  retry_failed: bool = False
  placeholders: bool = False
  tmdb_url: str | None = None


class NoPicture(Exception):
  """An item gets no picture.

  Attributes:
    status: outcome for the manifest: missing, rejected or unanswered.
    code: HTTP status of the answer, if it decided the outcome.
  """

  def __init__(self, status: str, reason: str, code: int | None = None):
    super().__init__(reason)
    self.status, self.code = status, code


class _TryAgain(Exception):
  """The server is reachable but busy.

  Attributes:
    wait: seconds that the server asks to wait.
  """

  def __init__(self, reason: str, wait: float):
    super().__init__(reason)
    self.wait = wait


@contextlib.asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator['Web']:
  """Gives a client that is closed when the block ends."""
  client = httpx.AsyncClient(
    timeout=settings.timeout,
    limits=httpx.Limits(max_connections=settings.concurrency),
    transport=addresses.GuardedTransport(settings.concurrency, settings.allow_private),
    mounts=_proxies(),
    # A small compressed answer could unpack to gigabytes.
    headers={'Accept-Encoding': 'identity', 'User-Agent': 'ur4rec-jax'},
  )
  async with client:
    yield Web(client, settings)


def _proxies() -> dict[str, 'httpx.AsyncBaseTransport | None']:
  """Returns the transports through the proxies of the environment, by the addresses they serve.

  A proxy resolves names itself, so it decides which machines can be reached through it.
  """
  found = urllib.request.getproxies()
  proxies = {
    f'{scheme}://': httpx.AsyncHTTPTransport(proxy=url)
    for scheme, url in found.items()
    if scheme in ('http', 'https', 'all') and url.startswith(('http://', 'https://'))
  }
  hosts = (host.strip().lstrip('*.') for host in found.get('no', '').split(',')) if proxies else ()
  return proxies | {f'all://*{host}': None for host in hosts if host}


class Web:
  """An HTTP client with limits on time, size, redirects and content types."""

  def __init__(self, client: 'httpx.AsyncClient', settings: Settings):
    self._client = client
    self._settings = settings
    self._silent: collections.Counter[str] = collections.Counter()

  async def get(
    self, address: str, kind: str = 'image/', headers: dict[str, str] | None = None
  ) -> bytes:
    """Downloads a URL.

    Args:
      address: the URL.
      kind: required beginning of the content type.
      headers: further request headers; redirects are not followed with them, since they may hold
        a key.

    Raises:
      NoPicture: the download failed; the message says why.
    """
    url = _url(address)
    if self._silent[url.host] >= _SILENCE:
      raise NoPicture(UNANSWERED, f'{url.host} gave no answer {_SILENCE} times in a row')
    try:
      async with asyncio.timeout(self._settings.deadline):
        content = await self._tried(url, kind, headers)
    except (NoPicture, TimeoutError) as error:
      if isinstance(error, TimeoutError):
        error = NoPicture(UNANSWERED, f'no whole answer in {self._settings.deadline:g} seconds')
      self._silent[url.host] = self._silent[url.host] + 1 if error.status == UNANSWERED else 0
      raise error from None
    self._silent[url.host] = 0
    return content

  async def _tried(self, url: 'httpx.URL', kind: str, headers: dict[str, str] | None) -> bytes:
    reason, wait = '', 0.0
    for attempt in range(self._settings.tries):
      if attempt:
        await asyncio.sleep(wait + _BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1))
      try:
        return await self._request(url, kind, headers)
      except addresses.Refused as error:
        raise NoPicture(item_pictures.REJECTED, str(error)) from None
      except _TryAgain as error:
        reason, wait = str(error), error.wait
      except httpx.TransportError as error:
        reason, wait = f'{type(error).__name__} {error}'.strip(), 0.0
    raise NoPicture(UNANSWERED, reason)

  async def _request(self, url: 'httpx.URL', kind: str, headers: dict[str, str] | None) -> bytes:
    target = url
    self._check_literal(url.host)
    for _ in range(_MAX_REDIRECTS + 1):
      async with self._client.stream('GET', target, headers=headers) as response:
        if headers or not response.has_redirect_location:
          return await _content(response, kind)
        target = _url(response.headers['location'], base=str(target))
      self._check_literal(target.host)
      if not await self._may_follow(url, target):
        reason = f'redirected to another host, {target.host}'
        if await self._is_allowed(target.host):
          reason = f'redirected to another host; --redirect_hosts={target.host} would allow it'
        raise NoPicture(item_pictures.REJECTED, reason)
    raise NoPicture(item_pictures.REJECTED, f'redirected more than {_MAX_REDIRECTS} times')

  async def _may_follow(self, url: 'httpx.URL', target: 'httpx.URL') -> bool:
    """Whether to follow a redirect: the target may be a machine inside the user's own network."""
    if (target.host, target.port) == (url.host, url.port):
      return True
    allowed = self._settings.redirect_hosts
    is_public = 'public' in allowed and await self._is_allowed(target.host, allow_private=False)
    return target.host in allowed or is_public

  async def _is_allowed(self, host: str, allow_private: bool | None = None) -> bool:
    """Whether all addresses of a host may be connected to; without a value, by the settings."""
    if allow_private is None:
      allow_private = self._settings.allow_private
    try:
      for address in await addresses.resolve(host):
        addresses.check(address, host, allow_private)
    except (OSError, addresses.Refused):
      return False
    return True

  def _check_literal(self, host: str) -> None:
    """Checks an address in a URL, in every spelling; a proxy would connect to it unseen."""
    try:
      found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except OSError:  # A name; it is checked when it is resolved.
      return
    for entry in found:
      addresses.check(str(entry[4][0]), host, self._settings.allow_private)


def _url(address: str, base: str = '') -> 'httpx.URL':
  try:
    url = httpx.URL(urllib.parse.urljoin(base, address))
    url.host.encode('idna')  # Looking up the address does this too, but outside of our handlers.
  except (httpx.InvalidURL, ValueError) as error:
    raise NoPicture(item_pictures.REJECTED, f'no usable URL ({error})') from error
  if url.scheme not in ('http', 'https') or not url.host or (url.port or 0) > 65535:
    raise NoPicture(item_pictures.REJECTED, f'no usable URL: {address[:200]!r}')
  return url


async def _content(response: 'httpx.Response', kind: str) -> bytes:
  """Reads the body of a response after checking its status, type, encoding and size."""
  code, headers = response.status_code, response.headers
  if code in (408, 425, 429) or code >= 500:
    wait = seconds_to_wait(headers.get('retry-after', ''), _LONGEST_WAIT) or 0.0
    raise _TryAgain(f'the server answers {code}', wait)
  if code != 200:
    status = item_pictures.MISSING if code >= 400 else item_pictures.REJECTED
    raise NoPicture(status, f'the server answers {code}', code)
  content_type = headers.get('content-type', 'none')
  if not content_type.lower().startswith(kind):
    raise NoPicture(item_pictures.REJECTED, f'content type {content_type[:80]}, not {kind}')
  encoding = headers.get('content-encoding', 'identity')
  if encoding != 'identity':
    raise NoPicture(
      item_pictures.REJECTED, f'content encoding {encoding[:80]}, which was not asked for'
    )
  limit = f'more than {MAX_BYTES:,} bytes'
  declared = headers.get('content-length', '')
  if declared.isdecimal() and int(declared) > MAX_BYTES:
    raise NoPicture(item_pictures.REJECTED, f'{limit}: {int(declared):,} declared')
  content = bytearray()
  async for part in response.aiter_raw():
    content += part
    if len(content) > MAX_BYTES:
      raise NoPicture(item_pictures.REJECTED, limit)
  return bytes(content)

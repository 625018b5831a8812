"""Which IP addresses a download may connect to: a URL in a table may name any machine.

The check comes after the name is resolved and before the connection, to the very address that is
connected to. So no spelling of an address and no changing DNS answer gets around it.
"""

import asyncio
import ipaddress
import socket
from typing import Any

try:
  import httpcore
  import httpx
except ImportError:  # Optional packages; `download_images.download` asks for them.
  HAS_HTTPX = False
else:
  HAS_HTTPX = True

# Services that give a cloud machine its credentials, and other link-local ones.
_METADATA = tuple(
  map(
    ipaddress.ip_network,
    ('169.254.0.0/16', 'fe80::/10', 'fd00:ec2::/32', '100.100.100.200/32', '168.63.129.16/32'),
  )
)
# IPv6 addresses whose last four bytes are an IPv4 address.
_IPV4_INSIDE = tuple(map(ipaddress.ip_network, ('::/96', '::ffff:0:0/96', '64:ff9b::/96')))


class Refused(Exception):
  """An address that must not be connected to; the message says why."""


def check(address: str, host: str, allow_private: bool) -> None:
  """Checks an address before it is connected to.

  Args:
    address: a resolved IP address, such as `93.184.216.34` or `fe80::1%eth0`.
    host: its name, for the message.
    allow_private: whether addresses outside the public internet are allowed.

  Raises:
    Refused: the address is not public, or it is that of a metadata service.
  """
  ip = ipaddress.ip_address(address.partition('%')[0])
  inside = _ipv4_inside(ip)
  name = host if host == str(ip) else f'{host} ({ip})'
  for candidate in (ip, inside):
    if any(candidate in network for network in _METADATA):
      raise Refused(f'{name} is the address of a metadata service')
  if not (allow_private or _is_public(inside)):
    raise Refused(f'{name} is no public address; --allow_private would allow it')


async def resolve(host: str, port: int | None = None) -> list[str]:
  """Returns the IP addresses of a host; raises OSError if it has none."""
  find = asyncio.get_running_loop().getaddrinfo
  found = await find(host, port, type=socket.SOCK_STREAM)
  return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _ipv4_inside(ip: Any) -> Any:
  """Returns the IPv4 address that an IPv6 address stands for, or the address itself."""
  if ip.version == 4:
    return ip
  if any(ip in network for network in _IPV4_INSIDE) and int(ip) > 1:
    return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
  return ip.sixtofour or (ip.teredo or (None, None))[1] or ip


def _is_public(ip: Any) -> bool:
  is_special = ip.is_multicast or ip.is_reserved or getattr(ip, 'is_site_local', False)
  return ip.is_global and not is_special


if HAS_HTTPX:

  class GuardedTransport(httpx.AsyncHTTPTransport):
    """An HTTP transport that connects only to addresses that pass `check`."""

    def __init__(self, max_connections: int, allow_private: bool):
      super().__init__()
      # The pool takes a network backend, but the transport has no parameter for it.
      self._pool = httpcore.AsyncConnectionPool(
        ssl_context=httpx.create_ssl_context(),
        max_connections=max_connections,
        network_backend=_Guard(allow_private),
      )

  class _Guard(httpcore.AsyncNetworkBackend):
    """Resolves names itself and connects to the addresses that it has checked."""

    def __init__(self, allow_private: bool):
      self._allow_private = allow_private
      self._network = httpcore.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> Any:
      try:
        addresses = await resolve(host, port)
      except OSError as error:
        raise httpcore.ConnectError(str(error)) from error
      for address in addresses:
        check(address, host, self._allow_private)
      for address in addresses[:-1]:
        try:
          return await self._network.connect_tcp(address, port, *args, **options)
        except (httpcore.ConnectError, httpcore.ConnectTimeout):
          continue
      return await self._network.connect_tcp(addresses[-1], port, *args, **options)

    async def sleep(self, seconds: float) -> None:
      await self._network.sleep(seconds)

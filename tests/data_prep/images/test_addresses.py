"""No spelling of an address and no answer of a DNS server leads into a private network."""

import asyncio
import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.images import addresses

PRIVATE = [
  '0.0.0.0/8',
  '10.0.0.0/8',
  '100.64.0.0/10',
  '127.0.0.0/8',
  '169.254.0.0/16',
  '172.16.0.0/12',
  '192.168.0.0/16',
  '224.0.0.0/4',
  '240.0.0.0/4',
]
METADATA = ['169.254.169.254', 'fe80::a9fe:a9fe', 'fd00:ec2::254', '100.100.100.200']
private = st.sampled_from(PRIVATE).flatmap(
  lambda network: st.ip_addresses(v=4, network=network).map(int)
)


def is_refused(address: str, allow_private: bool = False) -> bool:
  try:
    addresses.check(address, 'name', allow_private)
  except addresses.Refused:
    return True
  return False


@given(private)
@example(0x7F000001)
@example(0xA9FEA9FE)
def test_private_addresses_are_refused_in_every_spelling(number):
  four = ipaddress.IPv4Address(number)
  parts = four.packed
  spellings = [
    str(number),
    hex(number),
    f'0{number:o}',
    '.'.join(map(hex, parts)),
    '.'.join(f'0{part:o}' for part in parts),
    f'{parts[0]}.{number & 0xFFFFFF}',
    f'::ffff:{four}',
    f'::{four}',
    f'64:ff9b::{four}',
    f'2002:{number >> 16:x}:{number & 0xFFFF:x}::1',
  ]
  for spelling in spellings:
    found = socket.getaddrinfo(spelling, None, flags=socket.AI_NUMERICHOST)
    for entry in found:
      assert is_refused(entry[4][0]), spelling


@given(st.sampled_from(['::1', '::', 'fc00::/7', 'fe80::/10', 'fec0::/10', 'ff00::/8']).flatmap(
  lambda network: st.ip_addresses(v=6, network=network)
))  # fmt: skip
def test_private_ipv6_addresses_are_refused(address):
  assert is_refused(str(address))
  assert is_refused(f'{address}%eth0')


@pytest.mark.parametrize('address', ['93.184.216.34', '2606:2800:220:1::1', '::ffff:93.184.216.34'])
def test_public_addresses_are_allowed(address):
  assert not is_refused(address)
  assert not is_refused(address, allow_private=True)


@pytest.mark.parametrize('address', ['127.0.0.1', '10.1.2.3', '::1', 'fd12::1', '::ffff:10.0.0.1'])
def test_private_addresses_can_be_allowed(address):
  assert not is_refused(address, allow_private=True)


@pytest.mark.parametrize('address', [*METADATA, '::ffff:169.254.169.254', '168.63.129.16'])
def test_metadata_services_are_never_allowed_nor_suggested(address):
  with pytest.raises(addresses.Refused) as error:
    addresses.check(address, 'name', allow_private=True)
  assert 'allow' not in str(error.value)


def test_a_name_is_resolved_once_and_the_checked_address_is_connected_to(monkeypatch):
  """The answer of a DNS server changes between check and connection: rebinding."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    asked = []

    def answer(host, *args, **options):
      asked.append(host)
      # A test network: nothing answers there.
      address = '192.88.99.1' if len(asked) == 1 else '127.0.0.1'
      return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (address, port))]

    real = socket.getaddrinfo
    is_name = lambda host: host == 'rebind.example'
    monkeypatch.setattr(
      socket,
      'getaddrinfo',
      lambda host, *args, **options: (answer if is_name(host) else real)(host, *args, **options),
    )

    async def fetch():
      transport = addresses.GuardedTransport(1, allow_private=False)
      async with addresses.httpx.AsyncClient(transport=transport, timeout=0.3) as client:
        await client.get(f'http://rebind.example:{port}/')

    with pytest.raises((addresses.httpx.TransportError, addresses.Refused)):
      asyncio.run(fetch())
    assert asked == ['rebind.example']
    with pytest.raises(addresses.Refused, match=r'rebind.example \(127.0.0.1\) is no public'):
      asyncio.run(fetch())
    server.setblocking(False)
    with pytest.raises(BlockingIOError):  # Nobody has connected.
      server.accept()

"""Which connections stay open when there are too many."""

import pytest

from ur4rec_jax.service.connections import Connections


class Connection:
  """A connection that notes whether it is open, and is removed when it is closed, as in uvicorn."""

  def __init__(self, client, connections, is_waiting=True):
    self.client_name, self.is_waiting, self.is_open = client, is_waiting, True
    self._connections = connections

  def abort(self):
    self.is_open = False
    self._connections.remove(self)


@pytest.mark.parametrize(('most', 'most_of_client'), [(9, 1), (2, 9)])
def test_a_client_whose_only_connection_gives_way_is_still_counted(most, most_of_client):
  connections = Connections(most, most_of_client)
  opened = []
  for client in ['ann', 'bob'] + 20 * ['ann']:
    opened.append(Connection(client, connections))
    assert connections.add(opened[-1])
  still = [x for x in opened if x.is_open]
  assert len(still) == 2
  for one in still:
    connections.remove(one)
  # Nothing is left, so that as many may come as at the start.
  new = [Connection(f'client {n}', connections) for n in range(most)]
  assert all(map(connections.add, new))
  assert all(x.is_open for x in new)


def test_a_client_of_many_busy_connections_locks_nobody_out():
  connections = Connections(5, 9)
  busy = [Connection('flood', connections, is_waiting=False) for _ in range(4)]
  idle = Connection('ann', connections)
  assert all(map(connections.add, [*busy, idle]))
  assert connections.add(Connection('bob', connections))
  assert all(x.is_open for x in busy)
  assert not idle.is_open

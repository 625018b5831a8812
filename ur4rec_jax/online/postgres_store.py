"""Stores events and exposures in Postgres, for several services that share them."""

import contextlib
import select
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg

from ur4rec_jax.errors import InputError, StorageError, say, server_name
from ur4rec_jax.online.events import (
  MOST_SCANNED,
  Event,
  Exposure,
  History,
  Outcome,
  pack,
  unpack,
  user_hash,
)

_SECONDS = 3  # A server that does not answer a connection within this time counts as lost.
_BUSY_SECONDS = 5  # Another service may be writing.
_AT_ONCE = 5000  # Rows that one transaction deletes, so that no writer waits for long.
_VERSION = 1  # Version of the tables.
_LOCK = 0x75723472  # Advisory lock: services that start together create the tables one by one.
# `written` counts the events. A writer locks its row, so that writers take turns: numbers of events
# have no gaps, and nothing is stored about a user in the middle of the user's deletion.
_TABLES = f"""
CREATE TABLE ur4rec_store (version integer NOT NULL, written bigint NOT NULL);
INSERT INTO ur4rec_store VALUES ({_VERSION}, 0);
CREATE TABLE ur4rec_events (
  number bigint PRIMARY KEY, user_id text NOT NULL, id text NOT NULL, item text NOT NULL,
  kind text NOT NULL, time double precision NOT NULL, value double precision,
  request_id text NOT NULL, UNIQUE (user_id, id)
);
CREATE INDEX ur4rec_events_of_user ON ur4rec_events (user_id, time, number);
CREATE INDEX ur4rec_events_by_time ON ur4rec_events (time);
CREATE TABLE ur4rec_exposures (
  number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, request_id text NOT NULL UNIQUE,
  user_id text NOT NULL, time double precision NOT NULL, arm text NOT NULL, model text NOT NULL,
  items text NOT NULL
);
CREATE INDEX ur4rec_exposures_of_user ON ur4rec_exposures (user_id);
CREATE INDEX ur4rec_exposures_by_time ON ur4rec_exposures (time);
CREATE TABLE ur4rec_deleted_users (user_hash text PRIMARY KEY, time double precision NOT NULL);
"""
_EVENT = 'user_id, id, item, kind, time, value, request_id'
_EXPOSURE = 'request_id, user_id, time, arm, model, items'


class PostgresStore:
  """Tables `ur4rec_*` in one database of a Postgres server."""

  waits = True

  def __init__(self, address: str):
    """Connects to the server, and makes the tables if they are not there.

    Args:
      address: `postgres://[USER[:PASSWORD]@]HOST[:PORT]/DATABASE`.

    Raises:
      InputError: the server cannot be reached, or the tables cannot be made or are of another
        version.
    """
    self._address = address
    self._name = server_name(address)
    self._mine = threading.local()
    self._connections: list[psycopg.Connection] = []
    try:
      self._prepare()
    except psycopg.Error as error:
      raise InputError(
        f'Postgres at {self._name}: cannot be used ({_first_line(error)})'
      ) from error

  def _prepare(self) -> None:
    connection = self._connection()
    with connection.transaction():
      connection.execute('SELECT pg_advisory_xact_lock(%s)', (_LOCK,))
      if connection.execute("SELECT to_regclass('ur4rec_store')").fetchone() == (None,):
        connection.execute(_TABLES)
    (version,) = connection.execute('SELECT version FROM ur4rec_store').fetchone()
    if version != _VERSION:
      raise InputError(
        f'Postgres at {self._name}: its tables are of format {version}, this version reads'
        f' {_VERSION}'
      )
    if connection.execute('SHOW fsync').fetchone() == ('off',):
      say(
        f'note: Postgres at {self._name} may lose events in a power cut; set fsync on', sys.stderr
      )

  def _connect(self) -> psycopg.Connection:
    connection = psycopg.connect(
      self._address,
      autocommit=True,
      connect_timeout=_SECONDS,
      tcp_user_timeout=1000 * _SECONDS,
      application_name='ur4rec',
    )
    connection.execute(f"SET lock_timeout = '{_BUSY_SECONDS}s'")
    # A database or role may have it turned off; then events would be acknowledged too early.
    connection.execute(
      "SELECT set_config('synchronous_commit', 'on', false)"
      " WHERE current_setting('synchronous_commit') = 'off'"
    )
    return connection

  def _connection(self) -> psycopg.Connection:
    """Returns this thread's own connection; a lost one is replaced."""
    connection = getattr(self._mine, 'connection', None)
    if connection is not None and not connection.closed and _has_ended(connection):
      connection.close()
    if connection is None or connection.closed:
      connection = self._mine.connection = self._connect()
      self._connections = [x for x in self._connections if not x.closed] + [connection]
    return connection

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except psycopg.Error as error:
      raise StorageError(
        f'Postgres at {self._name}: cannot be used now ({_first_line(error)})'
      ) from error

  @contextlib.contextmanager
  def _writing(self) -> Iterator[tuple[psycopg.Connection, int]]:
    """Runs a transaction while other writers wait; yields the connection and the event count."""
    with self._errors():
      connection = self._connection()
      with connection.transaction():
        (written,) = connection.execute('SELECT written FROM ur4rec_store FOR UPDATE').fetchone()
        yield connection, written

  def write(self, events: Sequence[Event], exposures: Sequence[Exposure] = ()) -> list[Outcome]:
    outcomes: list[Outcome] = []
    new: list[Event] = []
    with self._writing() as (connection, written):
      deleted = _deleted(connection, {x.user for x in (*events, *exposures)})
      sent = [event.user for event in events], [event.id for event in events]
      known = set(
        connection.execute(
          'SELECT user_id, id FROM ur4rec_events'
          ' JOIN unnest(%s::text[], %s::text[]) AS sent (user_id, id) USING (user_id, id)',
          sent,
        )
      )
      for event in events:
        if event.time <= deleted.get(event.user, -1):
          outcomes.append(Outcome.DELETED)
        elif (event.user, event.id) in known:
          outcomes.append(Outcome.DUPLICATE)
        else:
          known.add((event.user, event.id))
          outcomes.append(Outcome.NEW)
          new.append(event)
      with connection.cursor() as cursor:
        if new:
          with cursor.copy(f'COPY ur4rec_events (number, {_EVENT}) FROM STDIN') as rows:
            for number, event in enumerate(new, written + 1):
              rows.write_row((number, *event))
          cursor.execute('UPDATE ur4rec_store SET written = %s', (written + len(new),))
        cursor.executemany(
          f'INSERT INTO ur4rec_exposures ({_EXPOSURE}) VALUES (%s, %s, %s, %s, %s, %s)'
          ' ON CONFLICT DO NOTHING',
          [pack(x) for x in exposures if x.time > deleted.get(x.user, -1)],
        )
    return outcomes

  def history(self, user: str, kinds: Sequence[str], most: int) -> History:
    with self._errors():
      connection = self._connection()
      rows = connection.execute(
        'SELECT item, time FROM (SELECT item, time, number, kind FROM ur4rec_events'
        f' WHERE user_id = %s ORDER BY time DESC, number DESC LIMIT {MOST_SCANNED}) AS latest'
        ' WHERE kind = ANY(%s) ORDER BY time DESC, number DESC LIMIT %s',
        (user, [*kinds], most),
      ).fetchall()
      is_deleted = user in _deleted(connection, {user})
    rows.reverse()
    return History([item for item, _ in rows], [time for _, time in rows], is_deleted)

  def shown_in(self, request_ids: Sequence[str]) -> list[Exposure]:
    query = f'SELECT {_EXPOSURE} FROM ur4rec_exposures WHERE request_id = ANY(%s)'
    with self._errors():
      return [*map(unpack, self._connection().execute(query, ([*request_ids],)))]

  def delete_user(self, user: str, now: float) -> int:
    with self._writing() as (connection, _):
      count = connection.execute('DELETE FROM ur4rec_events WHERE user_id = %s', (user,)).rowcount
      connection.execute('DELETE FROM ur4rec_exposures WHERE user_id = %s', (user,))
      connection.execute(
        'INSERT INTO ur4rec_deleted_users VALUES (%s, %s)'
        ' ON CONFLICT (user_hash) DO UPDATE SET time = excluded.time',
        (user_hash(user), now),
      )
    return count

  def expire(self, before: float) -> int:
    total = 0
    for table in ('ur4rec_events', 'ur4rec_exposures'):
      count = _AT_ONCE
      while count == _AT_ONCE:
        with self._errors():
          count = (
            self._connection()
            .execute(
              f'DELETE FROM {table} WHERE number IN'
              f' (SELECT number FROM {table} WHERE time < %s LIMIT {_AT_ONCE})',
              (before,),
            )
            .rowcount
          )
        total += count if table == 'ur4rec_events' else 0
    return total

  def written(self) -> int:
    with self._errors():
      return self._connection().execute('SELECT written FROM ur4rec_store').fetchone()[0]

  def events(self) -> Iterator[Event]:
    query = f'SELECT {_EVENT} FROM ur4rec_events ORDER BY user_id COLLATE "C", time, number'
    for row in self._rows(query):
      yield Event(*row)

  def exposures(self) -> Iterator[Exposure]:
    query = f'SELECT {_EXPOSURE} FROM ur4rec_exposures ORDER BY number'
    yield from map(unpack, self._rows(query))

  def _rows(self, query: str) -> Iterator[Any]:
    """Reads rows piece by piece on a connection of their own, as they were at one moment."""
    with (
      self._errors(),
      self._connect() as connection,
      connection.transaction(),
      connection.cursor(name='ur4rec') as cursor,
    ):
      yield from cursor.execute(query)

  def close(self) -> None:
    for connection in self._connections:
      connection.close()


def _has_ended(connection: psycopg.Connection) -> bool:
  """Tells whether the server has ended a connection that waits, as a restart does.

  The first use would fail otherwise, long after the server is back.
  """
  arrived = select.poll()
  arrived.register(connection.fileno(), select.POLLIN)
  return bool(arrived.poll(0))  # Unasked, a server hardly says anything else.


def _deleted(connection: psycopg.Connection, users: set[str]) -> dict[str, float]:
  """Returns which of the users were deleted, and when."""
  names = {user_hash(user): user for user in users}
  query = 'SELECT user_hash, time FROM ur4rec_deleted_users WHERE user_hash = ANY(%s)'
  return {names[name]: time for name, time in connection.execute(query, ([*names],))}


def _first_line(error: psycopg.Error) -> str:
  """Returns the first line of an error, without the hints of the server."""
  return str(error).strip().partition('\n')[0]

"""Stores events and exposures in one SQLite file, or in Redis or Postgres if an address says so.

All stores have the same functions. When `write` returns, its events are on the disk: they survive a
kill of this process and, with SQLite, a power cut. An event with the id of an earlier one of the
same user is not stored again.
"""

import contextlib
import pathlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ur4rec_jax.errors import InputError, StorageError
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

_BUSY_SECONDS = 5  # Another process may be writing: a second service, or a command.
_EXPIRED_AT_ONCE = 5000  # Rows in one transaction, so that no writer waits for long.
_APPLICATION_ID, _VERSION = 0x75723472, 1  # Marks of the file: "ur4r", and the format version.
_TABLES = """
CREATE TABLE events (
  number INTEGER PRIMARY KEY, user TEXT NOT NULL, id TEXT NOT NULL, item TEXT NOT NULL,
  kind TEXT NOT NULL, time REAL NOT NULL, value REAL, request_id TEXT NOT NULL,
  UNIQUE (user, id)
);
CREATE INDEX events_of_user ON events (user, time, number, kind, item);
CREATE INDEX events_by_time ON events (time);
CREATE TABLE exposures (
  number INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, user TEXT NOT NULL,
  time REAL NOT NULL, arm TEXT NOT NULL, model TEXT NOT NULL, items TEXT NOT NULL
);
CREATE INDEX exposures_of_user ON exposures (user);
CREATE INDEX exposures_by_time ON exposures (time);
CREATE TABLE deleted_users (user_hash TEXT PRIMARY KEY, time REAL NOT NULL) WITHOUT ROWID;
"""


class FeedbackStore(Protocol):
  """The functions that every store has. All raise StorageError if the store cannot be reached.

  Attributes:
    waits: whether reading goes over a network, so that an event loop must not wait for it.
  """

  waits: bool

  def write(self, events: Sequence[Event], exposures: Sequence[Exposure] = ()) -> list[Outcome]:
    """Stores all or nothing, durably, and returns one outcome per event.

    After a StorageError all may be stored, too, if a server was lost before it could say so.
    """

  def history(self, user: str, kinds: Sequence[str], most: int) -> History:
    """Reads the latest events of some kinds, as far as they are in the latest `MOST_SCANNED`."""

  def shown_in(self, request_ids: Sequence[str]) -> list[Exposure]:
    """Finds the items that were shown in some answers; unknown answers are left out."""

  def delete_user(self, user: str, now: float) -> int:
    """Deletes all events and exposures of a user, and returns the number of events."""

  def expire(self, before: float) -> int:
    """Deletes events and exposures before a time, and returns the number of events."""

  def written(self) -> int:
    """Returns a number that grows by one with each event that is stored.

    It may fall when the latest events are deleted.
    """

  def events(self) -> Iterator[Event]:
    """Reads all events, those of one user in the order of time."""

  def exposures(self) -> Iterator[Exposure]:
    """Reads all exposures."""

  def close(self) -> None:
    """Closes the store."""


def open_store(place: str) -> FeedbackStore:
  """Opens a store, which is created if it does not exist.

  Args:
    place: the path of a SQLite file, or an address such as `redis://localhost:6379/0` or
      `postgres://localhost/shop`.

  Raises:
    InputError: the file is something else, or its folder is missing, or the server cannot be
      reached or would lose events.
  """
  scheme, is_address, _ = place.partition('://')
  if not is_address:
    return SqliteStore(place)
  try:
    if scheme in ('redis', 'rediss'):
      from ur4rec_jax.online.redis_store import RedisStore

      return RedisStore(place)
    if scheme in ('postgres', 'postgresql'):
      from ur4rec_jax.online.postgres_store import PostgresStore

      return PostgresStore(place)
  except ImportError as error:
    extra = 'redis' if scheme.startswith('redis') else 'postgres'
    raise InputError(f"{error.name} is not installed; pip install 'ur4rec-jax[{extra}]'") from error
  raise InputError(
    f'{scheme}://: no such store of events; give a file, redis://HOST:PORT/0 or'
    ' postgres://HOST/DATABASE'
  )


class SqliteStore:
  """A file of SQLite in WAL mode. Several processes of one machine may have it open."""

  waits = False

  def __init__(self, path: str):
    """Opens the file, or makes it.

    Args:
      path: the file; its folder must exist.

    Raises:
      InputError: it cannot be opened, or is not such a file.
    """
    self._path = path
    self._lock = threading.Lock()  # One thread at a time uses the connection that writes.
    self._reads = threading.local()
    self._readers: list[sqlite3.Connection] = []
    if not pathlib.Path(path).absolute().parent.is_dir():
      raise InputError(f'{path}: its folder does not exist; make it, or give another file')
    try:
      self._connection = self._connect()
      self._prepare()
    except sqlite3.Error as error:
      raise InputError(
        f'{path}: cannot be opened as a store of events ({error}); give another file, which is made'
      ) from error

  def _connect(self) -> sqlite3.Connection:
    connection = sqlite3.connect(
      self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    # FULL syncs each transaction to the disk before it ends; NORMAL would not in WAL mode.
    connection.execute('PRAGMA synchronous = FULL')
    return connection

  def _prepare(self) -> None:
    connection = self._connection
    one = lambda name: connection.execute(f'PRAGMA {name}').fetchone()[0]
    # Looked at before anything is set: the journal mode would stay in a file of somebody else. In
    # this order, because another service may be making the tables, and sets both in one step.
    has_tables, application = one('schema_version') > 0, one('application_id')
    if application != _APPLICATION_ID and (application or has_tables):
      raise InputError(f'{self._path}: is another SQLite file; give another one, which is made')
    connection.execute('PRAGMA journal_mode = WAL')
    # Deleted rows are overwritten with zeros, and the write-ahead log does not stay large.
    connection.execute('PRAGMA secure_delete = ON')
    connection.execute('PRAGMA journal_size_limit = 16777216')
    connection.execute('PRAGMA cache_size = -65536')
    with self._transaction():
      is_new = one('application_id') == 0 and one('schema_version') == 0
      if is_new:
        for statement in _TABLES.split(';'):
          connection.execute(statement)
        connection.execute(f'PRAGMA application_id = {_APPLICATION_ID}')
        connection.execute(f'PRAGMA user_version = {_VERSION}')
    if one('user_version') != _VERSION:
      raise InputError(
        f'{self._path}: is of format {one("user_version")}, this version reads {_VERSION}'
      )

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[sqlite3.Connection]:
    """Runs the block as one transaction on the connection that writes."""
    with self._lock, self._errors():
      self._begin()
      try:
        yield self._connection
        self._connection.execute('COMMIT')
      except BaseException:
        with contextlib.suppress(sqlite3.Error):  # A full disk has ended the transaction already.
          self._connection.execute('ROLLBACK')
        raise

  def _begin(self) -> None:
    """Starts a transaction as soon as no other process writes.

    SQLite itself tries ten times a second. Beside services that write all the time, it would hardly
    ever find a moment between two of their transactions.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    self._connection.execute('PRAGMA busy_timeout = 1')  # In milliseconds.
    try:
      while True:
        try:
          self._connection.execute('BEGIN IMMEDIATE')
          return
        except sqlite3.OperationalError as error:
          is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
          if not is_busy or time.monotonic() > deadline:
            raise
    finally:
      self._connection.execute(f'PRAGMA busy_timeout = {1000 * _BUSY_SECONDS}')

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except sqlite3.Error as error:
      raise StorageError(
        f'{self._path}: the store of events cannot be used now ({error}); make room or give access'
      ) from error

  def _reader(self) -> sqlite3.Connection:
    """Returns this thread's own connection: reading never waits for a writer."""
    if not hasattr(self._reads, 'connection'):
      connection = self._connect()
      connection.execute('PRAGMA query_only = ON')
      self._reads.connection = connection
      self._readers.append(connection)
    return self._reads.connection

  def write(self, events: Sequence[Event], exposures: Sequence[Exposure] = ()) -> list[Outcome]:
    outcomes = []
    with self._transaction() as connection:
      execute = connection.execute
      find = 'SELECT time FROM deleted_users WHERE user_hash = ?'
      deleted: dict[str, float] = {}
      if execute('SELECT 1 FROM deleted_users LIMIT 1').fetchone():
        for user in {x.user for x in (*events, *exposures)}:
          if row := execute(find, (user_hash(user),)).fetchone():
            deleted[user] = row[0]
      for event in events:
        if event.time <= deleted.get(event.user, -1):
          outcomes.append(Outcome.DELETED)
          continue
        done = execute(
          'INSERT INTO events (user, id, item, kind, time, value, request_id)'
          ' VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING',
          event,
        )
        outcomes.append(Outcome.NEW if done.rowcount else Outcome.DUPLICATE)
      connection.executemany(
        'INSERT INTO exposures (request_id, user, time, arm, model, items)'
        ' VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING',
        [pack(x) for x in exposures if x.time > deleted.get(x.user, -1)],
      )
    return outcomes

  def history(self, user: str, kinds: Sequence[str], most: int) -> History:
    with self._errors():
      execute = self._reader().execute
      # An outer ORDER BY would sort again what the inner one has read in the order of the index.
      rows = execute(
        'SELECT item, time FROM (SELECT item, time, kind FROM events INDEXED BY events_of_user'
        f' WHERE user = ? ORDER BY time DESC, number DESC LIMIT {MOST_SCANNED})'
        f' WHERE kind IN ({",".join("?" * len(kinds))}) LIMIT ?',
        (user, *kinds, most),
      ).fetchall()
      find = 'SELECT 1 FROM deleted_users WHERE user_hash = ?'
      is_deleted = execute(find, (user_hash(user),)).fetchone() is not None
    rows.reverse()
    return History([item for item, _ in rows], [time for _, time in rows], is_deleted)

  def shown_in(self, request_ids: Sequence[str]) -> list[Exposure]:
    query = 'SELECT request_id, user, time, arm, model, items FROM exposures WHERE request_id = ?'
    with self._errors():
      execute = self._reader().execute  # Without a network many queries take no longer than one.
      return [unpack(row) for name in request_ids for row in execute(query, (name,))]

  def delete_user(self, user: str, now: float) -> int:
    with self._transaction() as connection:
      count = connection.execute('DELETE FROM events WHERE user = ?', (user,)).rowcount
      connection.execute('DELETE FROM exposures WHERE user = ?', (user,))
      connection.execute(
        'INSERT OR REPLACE INTO deleted_users VALUES (?, ?)', (user_hash(user), now)
      )
    # The write-ahead log still holds the rows; this empties it unless somebody is reading.
    with self._lock, self._errors():
      self._connection.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()
    return count

  def expire(self, before: float) -> int:
    total = 0
    for table in ('events', 'exposures'):
      while True:
        with self._transaction() as connection:
          count = connection.execute(
            f'DELETE FROM {table} WHERE number IN'
            f' (SELECT number FROM {table} WHERE time < ? LIMIT {_EXPIRED_AT_ONCE})',
            (before,),
          ).rowcount
        total += count if table == 'events' else 0
        if count < _EXPIRED_AT_ONCE:
          break
    return total

  def written(self) -> int:
    with self._errors():
      return self._reader().execute('SELECT coalesce(max(number), 0) FROM events').fetchone()[0]

  def events(self) -> Iterator[Event]:
    query = 'SELECT user, id, item, kind, time, value, request_id FROM events'
    for row in self._rows(f'{query} ORDER BY user, time, number'):
      yield Event(*row)

  def exposures(self) -> Iterator[Exposure]:
    query = 'SELECT request_id, user, time, arm, model, items FROM exposures ORDER BY number'
    yield from map(unpack, self._rows(query))

  def _rows(self, query: str) -> Iterator[Any]:
    """Reads rows on a connection of their own, which sees one state of the file."""
    with self._errors(), contextlib.closing(self._connect()) as connection:
      yield from connection.execute(query)

  def close(self) -> None:
    with self._lock:
      for connection in (*self._readers, self._connection):
        connection.close()

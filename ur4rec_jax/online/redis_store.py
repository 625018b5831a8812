"""Stores events and exposures in Redis, for several services that share them."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

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

_PREFIX = 'ur4rec:'
_SECONDS = 3  # A Redis that does not answer within this time counts as lost.
_READ_AT_ONCE = 256  # Events per read of a history, from the newest on.
# Ids that are deleted in one step, so that no writer waits for long. Requests without a user count
# as those of one user, who may have hundreds of thousands an hour.
_EXPIRED_AT_ONCE = 1000
# Keys: EVENTS + user is a hash from ids to events, ORDER + user sorts the ids by time. SHOWN +
# request id is an exposure, SHOWN_TO + user has the user's request ids by time.
_EVENTS, _ORDER = f'{_PREFIX}events:', f'{_PREFIX}order:'
_SHOWN, _SHOWN_TO = f'{_PREFIX}shown:', f'{_PREFIX}shown_to:'
_DELETED = f'{_PREFIX}deleted'  # A hash from hashes of users to times.
_WRITTEN = f'{_PREFIX}written'  # The number of events that were stored.

# A script is atomic, so that no event is ever stored without its place in the order, and nothing is
# stored about a user in the middle of the user's deletion.
_ADD = """
local deleted = redis.call('HGET', KEYS[3], ARGV[1])
if deleted and tonumber(ARGV[3]) <= tonumber(deleted) then return 2 end
if redis.call('HSETNX', KEYS[1], ARGV[2], ARGV[4]) == 0 then return 0 end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
redis.call('INCR', KEYS[4])
return 1
"""
_SHOW = """
local deleted = redis.call('HGET', KEYS[3], ARGV[1])
if deleted and tonumber(ARGV[3]) <= tonumber(deleted) then return 0 end
redis.call('SET', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
return 1
"""
_DELETE = """
local count = redis.call('HLEN', KEYS[1])
for _, request_id in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  redis.call('DEL', ARGV[1] .. request_id)
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
redis.call('HSET', KEYS[4], ARGV[2], ARGV[3])
return count
"""
_OUTCOMES = (Outcome.DUPLICATE, Outcome.NEW, Outcome.DELETED)


class RedisStore:
  """A database of one Redis server, which must write its log to the disk (`appendonly yes`)."""

  waits = True

  def __init__(self, address: str):
    """Connects to the server.

    Args:
      address: `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`.

    Raises:
      InputError: the server cannot be reached, or would lose events when it ends.
    """
    self._name = server_name(address)
    try:
      self._redis = redis.Redis.from_url(
        address,
        decode_responses=True,
        socket_timeout=_SECONDS,
        socket_connect_timeout=_SECONDS,
        # The sender of an event tries again; the same event would not be counted twice.
        retry=Retry(NoBackoff(), 0),
      )
      self._redis.ping()
    except (redis.RedisError, ValueError) as error:
      raise InputError(f'Redis at {self._name}: cannot be reached ({error})') from error
    self._check_durability()

  def _check_durability(self) -> None:
    try:
      settings = self._redis.config_get('append*')
    except redis.RedisError:  # Hosted servers forbid it.
      say(f'note: Redis at {self._name} does not tell whether it is durable', sys.stderr)
      return
    if settings.get('appendonly') != 'yes':
      raise InputError(
        f'Redis at {self._name}: would lose events when it ends; set appendonly yes and'
        ' appendfsync always in its configuration'
      )
    if settings.get('appendfsync') != 'always':
      say(
        f'note: Redis at {self._name} may lose the last second of events in a power cut; set'
        ' appendfsync always',
        sys.stderr,
      )

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except redis.RedisError as error:
      raise StorageError(f'Redis at {self._name}: cannot be used now ({error})') from error

  def write(self, events: Sequence[Event], exposures: Sequence[Exposure] = ()) -> list[Outcome]:
    with self._errors(), self._redis.pipeline(transaction=True) as pipeline:
      for e in events:
        content = json.dumps([e.item, e.kind, e.time, e.value, e.request_id])
        keys = _EVENTS + e.user, _ORDER + e.user, _DELETED, _WRITTEN
        pipeline.eval(_ADD, 4, *keys, user_hash(e.user), e.id, repr(e.time), content)
      for x in exposures:
        content = json.dumps(pack(x))
        keys = _SHOWN + x.request_id, _SHOWN_TO + x.user, _DELETED
        pipeline.eval(_SHOW, 3, *keys, user_hash(x.user), x.request_id, repr(x.time), content)
      found = pipeline.execute()
    return [_OUTCOMES[int(code)] for code in found[: len(events)]]

  def history(self, user: str, kinds: Sequence[str], most: int) -> History:
    rows: dict[str, tuple[str, float]] = {}  # By id: a new event moves others to the next read.
    start = 0
    with self._errors():
      is_deleted = self._redis.hexists(_DELETED, user_hash(user))
      while len(rows) < most and start < MOST_SCANNED:
        end = min(start + _READ_AT_ONCE, MOST_SCANNED)
        ids = self._redis.zrevrange(_ORDER + user, start, end - 1)
        if not ids:
          break
        for name, content in zip(ids, self._redis.hmget(_EVENTS + user, ids), strict=True):
          item, kind, time, *_ = json.loads(content) if content else ('', '', 0)
          if kind in kinds:
            rows[name] = item, time
        start += len(ids)
    found = [*rows.values()][:most][::-1]
    return History([item for item, _ in found], [time for _, time in found], bool(is_deleted))

  def shown_in(self, request_ids: Sequence[str]) -> list[Exposure]:
    with self._errors():
      contents = self._redis.mget([_SHOWN + name for name in request_ids]) if request_ids else []
    return [unpack(json.loads(content)) for content in contents if content]

  def delete_user(self, user: str, now: float) -> int:
    keys = _EVENTS + user, _ORDER + user, _SHOWN_TO + user, _DELETED
    with self._errors():
      return int(self._redis.eval(_DELETE, 4, *keys, _SHOWN, user_hash(user), repr(now)))

  def expire(self, before: float) -> int:
    total = 0
    with self._errors():
      # A scan may give a user twice, of whom the second time nothing is left to delete.
      for user in self._names(_ORDER):
        for ids in self._before(_ORDER + user, before):
          with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hdel(_EVENTS + user, *ids)
            pipeline.zrem(_ORDER + user, *ids)
            total += pipeline.execute()[0]
      for user in self._names(_SHOWN_TO):
        for ids in self._before(_SHOWN_TO + user, before):
          with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(*(_SHOWN + request_id for request_id in ids))
            pipeline.zrem(_SHOWN_TO + user, *ids)
            pipeline.execute()
    return total

  def _before(self, key: str, time: float) -> Iterator[list[str]]:
    """Reads the ids of a key that are before a time, a part at a time; the caller deletes each."""
    is_whole = False
    while not is_whole:
      ids = self._redis.zrangebyscore(key, '-inf', f'({time!r}', 0, _EXPIRED_AT_ONCE)
      if ids:
        yield ids
      is_whole = len(ids) < _EXPIRED_AT_ONCE

  def written(self) -> int:
    with self._errors():
      return int(self._redis.get(_WRITTEN) or 0)

  def events(self) -> Iterator[Event]:
    with self._errors():
      for user in sorted({*self._names(_ORDER)}):
        ids = self._redis.zrange(_ORDER + user, 0, -1)
        contents = self._redis.hmget(_EVENTS + user, ids) if ids else []
        for name, content in zip(ids, contents, strict=True):
          if content:
            item, kind, time, value, request_id = json.loads(content)
            yield Event(user, name, item, kind, time, value, request_id)

  def exposures(self) -> Iterator[Exposure]:
    with self._errors():
      for name in {*self._names(_SHOWN)}:
        if content := self._redis.get(_SHOWN + name):
          yield unpack(json.loads(content))

  def _names(self, kind: str) -> Iterator[str]:
    """Scans the names of keys that start with `kind`, without it; some may come twice."""
    for key in self._redis.scan_iter(f'{kind}*', count=1000):
      yield key.removeprefix(kind)

  def close(self) -> None:
    self._redis.close()

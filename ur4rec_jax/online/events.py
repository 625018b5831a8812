"""Events and exposures: actions of users, and the items they were shown. Standard library only."""

import enum
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ur4rec_jax.errors import InputError

KINDS = ('view', 'click', 'cart', 'buy', 'rating', 'skip')
CLICK = 'click'
MOST_SCANNED = 10_000  # Latest events of a user, of all kinds, in which a history is looked for.
MOST_CHARACTERS = 256  # Limit for an id, and for a search.
MOST_EVENTS = 1000  # Limit for a request.
FUTURE_SECONDS = 300  # Clocks of senders may be ahead of this machine's clock by this much.
_CONTROLS = re.compile(r'[\x00-\x1f\x7f]')
_OTHER_UNIT = 1e11  # Seconds since 1970 beyond this are milliseconds or smaller.


class NotJsonError(InputError):
  """Events are not written as JSON."""


class Event(NamedTuple):
  """Something that a user did with an item.

  Attributes:
    user: the user.
    id: the event's own id. Two events of a user with the same id are the same event.
    item: the item, which the catalogue may not have yet.
    kind: one of `KINDS`.
    time: seconds since 1970.
    value: for example the stars of a rating or the price of a purchase; None without one.
    request_id: the answer in which the user saw the item; '' if that is unknown.
  """

  user: str
  id: str
  item: str
  kind: str
  time: float
  value: float | None = None
  request_id: str = ''


class Shown(NamedTuple):
  """An item of an answer.

  Attributes:
    item: the item.
    score: its score.
    propensity: the probability with which the service showed this item at this position.
  """

  item: str
  score: float
  propensity: float = 1.0


class Exposure(NamedTuple):
  """The items that the service showed in one answer.

  Attributes:
    request_id: the id in the answer.
    user: the user; '' if the request had a history of its own.
    time: seconds since 1970.
    arm: the arm of an experiment.
    model: the start of the model's hash.
    items: the items, the one at position 1 first.
  """

  request_id: str
  user: str
  time: float
  arm: str
  model: str
  items: tuple[Shown, ...]


class Outcome(enum.Enum):
  """The outcome for an event: stored, stored earlier, or from before its user was deleted."""

  NEW = 'accepted'
  DUPLICATE = 'duplicates'
  DELETED = 'of_deleted_users'


class History(NamedTuple):
  """The latest events of a user in the store.

  Attributes:
    items: items of the events, the oldest first.
    times: times of the events, in seconds since 1970.
    is_deleted: whether the user was deleted once, so that older copies must not be used either.
  """

  items: list[str]
  times: list[float]
  is_deleted: bool = False


def user_hash(user: str) -> str:
  """Returns the hash under which a deleted user is remembered."""
  return hashlib.sha256(user.encode()).hexdigest()


def pack(exposure: Exposure) -> tuple[Any, ...]:
  """Returns the fields as a store keeps them, the items as JSON."""
  return *exposure[:5], json.dumps(exposure.items, ensure_ascii=False, separators=(',', ':'))


def unpack(fields: Sequence[Any]) -> Exposure:
  """Returns the exposure whose fields `pack` returned."""
  return Exposure(*fields[:5], tuple(Shown(*item) for item in json.loads(fields[5])))


def load_json(text: bytes) -> Any:
  """Reads the JSON of one event or of a list of events.

  Raises:
    NotJsonError: it is no JSON; the message is the reason.
  """
  try:
    return json.loads(text, parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:
    raise NotJsonError(str(error)[:200]) from error


def rows_of(content: Any, what: str) -> list[Any]:
  """Returns the events in what `load_json` read; `check_event` checks each.

  Args:
    content: one event or a list of events.
    what: name of the content in messages, such as `a request`.

  Raises:
    InputError: there is no event, or more than `MOST_EVENTS`.
  """
  rows = content if isinstance(content, list) else [content]
  if not 1 <= len(rows) <= MOST_EVENTS:
    raise InputError(f'{what} has {len(rows):,} events; 1 to {MOST_EVENTS:,} are allowed')
  return rows


def check_event(fields: Any, now: float, keep_seconds: float = math.inf) -> Event:
  """Checks the fields that a client sent, and makes an event of them.

  Args:
    fields: `user`, `item`, `kind` and `id`, and optionally `time` (without it: now), `value` and
      `request_id`. Ids may be whole numbers.
    now: seconds since 1970.
    keep_seconds: events older than this are refused, because they would be deleted at once.

  Raises:
    InputError: a field is missing, unknown or wrong; the message names it.
  """
  if not isinstance(fields, Mapping):
    raise InputError('an event must be an object with user, item, kind and id')
  if unknown := fields.keys() - set(Event._fields):
    first = min(map(str, unknown))
    raise InputError(
      f'{_shown(first)}: there is no such field; there are {", ".join(Event._fields)}'
    )
  kind = fields.get('kind')
  if not isinstance(kind, str) or kind not in KINDS:
    raise InputError(f'kind: must be one of {", ".join(KINDS)}, not {_shown(kind)}')
  return Event(
    _id(fields, 'user'),
    _id(fields, 'id'),
    _id(fields, 'item'),
    kind,
    _time(fields.get('time', now), now, keep_seconds),
    None if fields.get('value') is None else _number(fields['value'], 'value'),
    _request_id(fields.get('request_id', '')),
  )


def _id(fields: Mapping[str, Any], name: str) -> str:
  """Returns an id as text: a string, or a whole number, which JSON may write as 3.0."""
  value = fields.get(name)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 10**15:
    return str(value)
  if not isinstance(value, str) or not value:
    raise InputError(f'{name}: must be text or a whole number, not {_shown(value)}')
  if len(value) > MOST_CHARACTERS:
    raise InputError(f'{name}: has {len(value):,} characters; {MOST_CHARACTERS} are allowed')
  # The build refuses such ids, so one of them would keep a log from being trained on.
  if _CONTROLS.search(value) or not value.strip() or not _is_unicode(value):
    raise InputError(f'{name}: {value[:80]!r} must be text on one line')
  return value


def _request_id(value: Any) -> str:
  if not isinstance(value, str):
    raise InputError(f'request_id: must be text, not {_shown(value)}')
  return _id({'request_id': value}, 'request_id') if value else ''


def _time(value: Any, now: float, keep_seconds: float) -> float:
  time = _number(value, 'time')
  if time > _OTHER_UNIT:
    raise InputError(f'time: {time:.0f} must be in seconds since 1970, not in milliseconds')
  if time > now + FUTURE_SECONDS:
    raise InputError(f'time: {time:.0f} lies {time - now:,.0f} s in the future; correct the clock')
  if time < 0:
    raise InputError(f'time: {time:.0f} must be seconds since 1970, 0 or more')
  if time < now - keep_seconds:
    raise InputError(f'time: {time:.0f} is older than the days for which events are kept')
  return time


def _number(value: Any, name: str) -> float:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not abs(value) < 1e15:  # False for NaN, too.
    raise InputError(f'{name}: must be a number, not {_shown(value)}')
  return float(value)


def _refuse_constant(name: str) -> None:
  raise ValueError(f'{name} is no number of JSON')


def _is_unicode(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:  # Half of a surrogate pair.
    return False
  return True


def _shown(value: Any) -> str:
  """Formats a wrong value for a message."""
  if value is None:
    return 'missing'
  return repr(value[:80] if isinstance(value, str) else value)[:100]

"""Reads the exposures and events of a service, and encodes their ids as integers.

An exposure is one item that was shown: `request_id`, `user`, `time`, `arm`, `item`, and if they are
needed `position`, `propensity` and `team`. An event is `id`, `user`, `item`, `kind`, `time`,
and optionally `request_id` and `value`. Both are tables (CSV, TSV, Parquet or JSON lines), so they
can come from any service.
"""

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data.raw import columns, json_lines, tables, texts, times
from ur4rec_jax.errors import InputError, counted

_EXPOSURE = ('request_id', 'user', 'time', 'item')
_EVENT = ('id', 'user', 'item', 'kind', 'time')
_NUMBERS = ('position', 'propensity', 'value', 'predicted')
_CLOCK_SKEW = 86_400.0  # A day: clocks and time zones of two servers may differ.
UNNAMED, UNKNOWN = -1, -2  # Values of `Events.request`.
_MAY_BE_BLANK = ('arm', 'team', 'request_id')  # `request_id` only in events.


class Exposures(NamedTuple):
  """Items shown, in the order of their times; each field is `[exposures]`.

  Attributes:
    user: int64 index into `Logs.users`.
    item: int64 index into `Logs.items`.
    request: int64 index into `Logs.requests`.
    arm: index of the arm, or of the item's team, in `Logs.arms`.
    time: seconds since 1970.
    position: place in the list from 1, or None if the table has no such column.
    propensity: probability with which the item was shown there, or None.
  """

  user: np.ndarray
  item: np.ndarray
  request: np.ndarray
  arm: np.ndarray
  time: np.ndarray
  position: np.ndarray | None = None
  propensity: np.ndarray | None = None


class Events(NamedTuple):
  """Events, in the order of their times; each field is `[events]`.

  Attributes:
    user: as in `Exposures`; -1 for a user who was shown nothing.
    item: as in `Exposures`; -1 for an item that was never shown.
    request: as in `Exposures`, the request whose list led to the event; `UNNAMED` if the event
      names none, `UNKNOWN` if it names one that no exposure has.
    kind: index into `Logs.kinds`.
    time: seconds since 1970.
    value: value of the event, or None if the table has no such column.
  """

  user: np.ndarray
  item: np.ndarray
  request: np.ndarray
  kind: np.ndarray
  time: np.ndarray
  value: np.ndarray | None = None


class Logs(NamedTuple):
  """Exposures and events whose indices belong to the same lists of ids.

  Attributes:
    exposures: the items shown.
    events: the events.
    arms: names of the arms or teams.
    users: ids of the users.
    requests: ids of the requests.
    items: ids of the items.
    kinds: kinds of events.
    warnings: possible faults of the tables.
    paths: the two files, for messages.
  """

  exposures: Exposures
  events: Events
  arms: tuple[str, ...]
  users: pa.Array
  requests: pa.Array
  items: pa.Array
  kinds: tuple[str, ...]
  warnings: tuple[str, ...]
  paths: tuple[str, str]


class Table(NamedTuple):
  """Some columns of a file, with the position of each row for messages."""

  path: str
  columns: dict[str, pa.ChunkedArray]
  where: Callable[[int], str]

  def take(self, rows: np.ndarray) -> 'Table':
    """Returns some of the rows."""
    picked = {name: column.take(pa.array(rows)) for name, column in self.columns.items()}
    return Table(self.path, picked, lambda row: self.where(int(rows[row])))

  def floats(self, name: str) -> np.ndarray | None:
    """Returns a column of numbers, or None if the table has no such column."""
    if name not in self.columns:
      return None
    return self.columns[name].to_numpy().astype(np.float64)


def read_logs(
  exposures: str | Path,
  events: str | Path,
  arms: Sequence[str] | None = None,
  needs: Collection[str] = (),
  by_item: bool = False,
) -> Logs:
  """Reads the two tables.

  Args:
    exposures: table of the items shown.
    events: table of what users did.
    arms: names of the arms; None if arms do not matter, or to take all teams of the table.
    needs: columns that must be there besides those that are always needed.
    by_item: whether each item has an arm of its own, its team, as in interleaving. The team is in
      the column `team`, or else in `arm`.

  Raises:
    InputError: a file cannot be read, or the tables contradict themselves or each other.
  """
  warnings: list[str] = []
  of_shown = sorted({'position', 'propensity'} & {*needs})
  optional = {'position', 'propensity', 'team', 'arm'} - {*of_shown}
  has_arms = arms is not None
  needed = [*_EXPOSURE, *of_shown, *['arm'] * has_arms]
  shown = read_table(Path(exposures), needed, sorted(optional - {*needed}))
  done = read_table(
    Path(events),
    (*_EVENT, *(name for name in ('value',) if name in needs)),
    ('request_id', 'value'),
  )
  if by_item and 'team' in shown.columns:
    shown.columns['arm'] = shown.columns['team']
  if by_item or has_arms:
    _check_columns(Path(exposures), list(shown.columns), ['arm'])
    shown, times_shown = _without_blank_arms(shown, warnings)
  else:
    rows = len(shown.columns['user'])
    shown.columns['arm'] = pa.chunked_array([pa.repeat(pa.scalar(''), rows)])
    times_shown = _seconds(shown)
  shown, times_shown = _without_repeats(shown, times_shown, by_item, warnings)
  names = _check_arms(shown, arms)
  late = np.flatnonzero(times_shown > time.time() + _CLOCK_SKEW)
  if late.size:
    raise InputError(
      f'{shown.where(int(late[0]))}: time lies in the future; correct the clock of the service'
    )
  done, times_done = _without_repeated_events(done, warnings)
  users, requests, items = (
    pc.unique(shown.columns[name].combine_chunks()) for name in ('user', 'request_id', 'item')
  )
  arm = codes(shown.columns['arm'], pa.array(names, pa.string()))
  found = Exposures(
    user=codes(shown.columns['user'], users),
    item=codes(shown.columns['item'], items),
    request=codes(shown.columns['request_id'], requests),
    arm=arm,
    time=times_shown,
    position=shown.floats('position'),
    propensity=shown.floats('propensity'),
  )
  _check_propensities(shown, found)
  kinds = pc.unique(done.columns['kind'].combine_chunks())
  user = codes(done.columns['user'], users)
  logged = Events(
    user=user,
    item=codes(done.columns['item'], items),
    request=_named_requests(done, requests),
    kind=codes(done.columns['kind'], kinds),
    time=times_done,
    value=done.floats('value'),
  )
  _warn_about_links(done, logged, warnings, shown.path)
  return Logs(
    _in_order(found),
    _in_order(logged),
    names,
    users,
    requests,
    items,
    tuple(kinds.to_pylist()),
    tuple(warnings),
    (shown.path, done.path),
  )


def codes(column: pa.ChunkedArray, vocabulary: pa.Array) -> np.ndarray:
  """Returns `[rows]` the position of each value in a vocabulary, -1 if it is not there."""
  found = pc.fill_null(pc.index_in(column, value_set=vocabulary), -1)
  return found.to_numpy().astype(np.int64)


def read_table(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Table:
  """Reads columns of a CSV, TSV, Parquet or JSON lines file and checks their values.

  Ids become texts and numbers become float64. Times stay as they are.

  Raises:
    InputError: there is no such file, column or row, or a value is missing or no number.
  """
  if not path.is_file():
    raise InputError(f'{path}: no such file; give a CSV, TSV, Parquet or JSON lines file')
  if tables.kind(path) in json_lines.KINDS:
    table, where = _read_json(path, needed, optional)
  else:
    file = tables.open_file(path)
    _check_columns(path, file.columns, needed)
    names = [*needed, *(name for name in optional if name in file.columns)]
    table = columns.simplified(tables.read(file, names), str(path))
    where = lambda row: str(tables.place(file, row))
  found = {}
  for name in table.column_names:
    if name in _NUMBERS:
      found[name] = _numbers(table[name], name, where)
    elif name == 'time':
      found[name] = table[name]
    else:
      may_be_blank = name in _MAY_BE_BLANK and (name != 'request_id' or name in optional)
      found[name] = _texts(table[name], name, where, may_be_blank)
  return Table(str(path), found, where)


def _read_json(
  path: Path, needed: Sequence[str], optional: Sequence[str]
) -> tuple[pa.Table, Callable[[int], str]]:
  rows = list(json_lines.read(path))
  if not rows:
    raise InputError(f'{path}: no rows; export it again')
  found = {}
  for name in (*needed, *optional):
    values = [row.get(name) for _, row in rows]
    if name in optional and all(value is None for value in values):
      continue
    for (place, row), value in zip(rows, values, strict=True):
      if isinstance(value, list | dict | bool):
        raise InputError(
          f'{place}: {name} must be a text or a number, not {texts.shown(repr(value))}'
        )
      if name in needed and name not in row:
        raise InputError(f'{place}: has no field {name!r}; each line needs {", ".join(needed)}')
    kinds = {type(value) for value in values} - {type(None)}
    # Mixed numbers and texts are ids; times and numbers of one type keep it.
    if len(kinds) > 1 and kinds != {int, float}:
      values = [None if value is None else str(value) for value in values]
    found[name] = pa.chunked_array([pa.array(values)])
  return pa.table(found), lambda row: str(rows[row][0])


def _value(column: pa.ChunkedArray, row: int) -> str:
  value = column[row].as_py()
  return texts.shown(value) if isinstance(value, str) else repr(value)


def _check_columns(path: Path, found: Sequence[str], needed: Sequence[str]) -> None:
  lacking = [name for name in needed if name not in found]
  if lacking:
    raise InputError(
      f'{path}: has no column {", ".join(map(repr, lacking))}; its columns are'
      f' {", ".join(map(repr, found[:12]))}; rename or add what is missing'
    )


def _texts(
  column: pa.ChunkedArray, name: str, where: Callable[[int], str], may_be_blank: bool
) -> pa.ChunkedArray:
  if pa.types.is_floating(column.type):
    whole = pc.fill_null(pc.equal(pc.floor(column), column), True)
    if pc.all(whole).as_py():
      column = column.cast(pa.int64())  # Pandas writes whole ids with gaps as floats.
  column = pc.utf8_trim_whitespace(pc.fill_null(column.cast(pa.string()), ''))
  if not may_be_blank:
    row = tables.first_true(pc.equal(column, ''))
    if row is not None:
      raise InputError(f'{where(row)}: {name} is empty; fill it in or remove the row')
  return column


def _numbers(column: pa.ChunkedArray, name: str, where: Callable[[int], str]) -> pa.ChunkedArray:
  if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
    column = tables.plain_numbers(column)
    column = pc.if_else(pc.equal(column, ''), pa.scalar(None, column.type), column)
    is_number = pc.match_substring_regex(column, r'^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$')
    row = tables.first_true(pc.invert(pc.fill_null(is_number, True)))
    if row is not None:
      raise InputError(f'{where(row)}: {name} must be a number, not {_value(column, row)}')
  found = column.cast(pa.float64())
  # A missing value counts as 0; a position or probability must be known.
  if name == 'value':
    found = pc.fill_null(found, 0.0)
  row = tables.first_true(pc.invert(pc.fill_null(pc.is_finite(found), False)))
  if row is not None:
    raise InputError(f'{where(row)}: {name} must be a finite number, not {_value(column, row)}')
  return found


def _seconds(table: Table) -> np.ndarray:
  parsed = times.parse(table.columns['time'], 'time', table.where)
  return parsed.ticks / parsed.ticks_per_second


def _named_requests(events: Table, requests: pa.Array) -> np.ndarray:
  """Returns `[events]` the field `Events.request`."""
  named = events.columns.get('request_id')
  if named is None:
    return np.full(len(events.columns['user']), UNNAMED)
  found = codes(named, requests)
  found[found < 0] = UNKNOWN
  found[pc.equal(named, '').to_numpy()] = UNNAMED
  return found


def _in_order(records: NamedTuple) -> NamedTuple:
  order = np.argsort(records.time, kind='stable')
  return type(records)(*(None if field is None else field[order] for field in records))


def _without_blank_arms(table: Table, warnings: list[str]) -> tuple[Table, np.ndarray]:
  """Leaves out the exposures of users who are not in the experiment."""
  seconds = _seconds(table)
  blank = pc.equal(table.columns['arm'], '').to_numpy()
  if blank.all():
    raise InputError(f'{table.path}: the column arm is empty in every row; log the arm')
  if blank.any():
    warnings.append(
      f'{counted(int(blank.sum()), "exposure")} without an arm left out: users who are not in the'
      ' experiment'
    )
    rows = np.flatnonzero(~blank)
    return table.take(rows), seconds[rows]
  return table, seconds


def _without_repeats(
  table: Table, seconds: np.ndarray, by_item: bool, warnings: list[str]
) -> tuple[Table, np.ndarray]:
  """Keeps each shown item once; refuses requests with two users, arms, or times of an item."""
  request, item, user, arm = (
    _dense(table.columns[name]) for name in ('request_id', 'item', 'user', 'arm')
  )
  first = np.unique(request, return_index=True)[1]  # First row of each request.
  for name, values in (('user', user), ('arm', arm)):
    if name == 'arm' and by_item:
      continue
    wrong = np.flatnonzero(values != values[first][request])
    if wrong.size:
      row = int(wrong[0])
      earlier = int(first[request[row]])
      column = table.columns[name]
      raise InputError(
        f'{table.where(row)}: request {_value(table.columns["request_id"], row)} has {name}'
        f' {_value(column, row)}, and {_value(column, earlier)} in an earlier row; each'
        ' request needs an id of its own'
      )
  key = request * (item.max() + 1) + item
  first = np.unique(key, return_index=True)[1]
  if len(first) == len(key):
    return table, seconds
  kept = np.sort(first)
  repeated = np.setdiff1d(np.arange(len(key)), kept, assume_unique=True)
  earlier = first[np.searchsorted(key[first], key[repeated])]
  positions = table.floats('position')
  differs = (seconds[repeated] != seconds[earlier]) | (arm[repeated] != arm[earlier])
  if positions is not None:
    differs |= positions[repeated] != positions[earlier]
  if differs.any():
    row = int(repeated[np.argmax(differs)])
    raise InputError(
      f'{table.where(row)}: request {_value(table.columns["request_id"], row)} shows item'
      f' {_value(table.columns["item"], row)} twice, with another position, time or arm; log'
      ' each item of an answer once'
    )
  warnings.append(f'{counted(len(repeated), "repeated exposure")} counted once: equal rows')
  return table.take(kept), seconds[kept]


def _dense(column: pa.ChunkedArray) -> np.ndarray:
  return column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


def _check_arms(table: Table, arms: Sequence[str] | None) -> tuple[str, ...]:
  found = table.columns['arm']
  if arms is None:
    return tuple(sorted(pc.unique(found).to_pylist()))
  numbers = codes(found, pa.array(arms, pa.string()))
  unknown = np.flatnonzero(numbers < 0)
  if unknown.size:
    row = int(unknown[0])
    raise InputError(
      f'{table.where(row)}: the experiment has no arm {_value(found, row)}; its arms are'
      f' {", ".join(arms)}. Leave out the rows of other experiments'
    )
  for number, name in enumerate(arms):
    if not (numbers == number).any():
      raise InputError(
        f'{table.path}: nobody was shown arm {name!r}; check that the service serves it and logs'
        ' its name'
      )
  return tuple(arms)


def _check_propensities(table: Table, exposures: Exposures) -> None:
  values = exposures.propensity
  if values is None:
    return
  wrong = np.flatnonzero((values <= 0) | (values > 1))
  if wrong.size:
    row = int(wrong[0])
    raise InputError(
      f'{table.where(row)}: propensity must be above 0 and at most 1, not {values[row]:g}; it is'
      ' the probability with which the item was shown'
    )


def _without_repeated_events(table: Table, warnings: list[str]) -> tuple[Table, np.ndarray]:
  """Keeps each event once, and leaves out events in the future; returns the times, too.

  As in the store of a service, events of two users may have the same id. An event dated next year
  would make every window look finished.
  """
  seconds = _seconds(table)
  user = _dense(table.columns['user'])
  ids = _dense(table.columns['id']) * (user.max() + 1) + user
  is_first = np.zeros(len(ids), bool)
  is_first[np.unique(ids, return_index=True)[1]] = True
  is_past = seconds <= time.time() + _CLOCK_SKEW
  if not is_first.all():
    warnings.append(
      f'{counted(int((~is_first).sum()), "event")} with the id of an earlier one left out'
    )
  if not is_past.all():
    warnings.append(f'{counted(int((~is_past).sum()), "event")} dated in the future left out')
  kept = np.flatnonzero(is_first & is_past)
  if not kept.size:
    raise InputError(f'{table.path}: all events lie in the future; correct their times')
  return (table, seconds) if len(kept) == len(ids) else (table.take(kept), seconds[kept])


def _warn_about_links(table: Table, events: Events, warnings: list[str], exposures: str) -> None:
  strangers = int((events.user < 0).sum())
  if strangers == len(events.user):
    user = _value(table.columns['user'], 0)
    raise InputError(
      f'{table.path}: no event has a user of {exposures} (the first one has {user}); use the same'
      ' ids in both'
    )
  if strangers:
    warnings.append(
      f'{counted(strangers, "event")} of {len(events.user):,} left out: their users were shown'
      ' nothing'
    )
  if lost := int(((events.request == UNKNOWN) & (events.user >= 0)).sum()):
    warnings.append(f'{counted(lost, "event")} with a request that no exposure has')


def reacted(logs: Logs, kind: str) -> np.ndarray:
  """Returns the first time at which each shown item got an event; infinity where it got none.

  An event belongs to the item in the request that it names. Without a request it belongs to the
  latest time before it that the user was shown the item.

  Args:
    logs: exposures and events.
    kind: kind of the events.

  Returns:
    `[exposures]` float64 seconds since 1970.
  """
  shown = logs.exposures
  number = logs.kinds.index(kind) if kind in logs.kinds else -1
  wanted = np.flatnonzero(
    (logs.events.kind == number) & (logs.events.user >= 0) & (logs.events.item >= 0)
  )
  user, item, request, moment = (
    getattr(logs.events, name)[wanted] for name in ('user', 'item', 'request', 'time')
  )
  first = np.full(len(shown.user), np.inf)
  items = len(logs.items)

  key = shown.request * items + shown.item
  order = np.argsort(key, kind='stable')
  named = np.flatnonzero(request >= 0)
  asked = request[named] * items + item[named]
  at = np.minimum(np.searchsorted(key[order], asked), len(key) - 1)
  exposure = order[at]
  # A request id is not a secret: an event of another user does not count.
  fits = (key[exposure] == asked) & (shown.user[exposure] == user[named])
  np.minimum.at(first, exposure[fits], moment[named][fits])

  free = np.flatnonzero(request == UNNAMED)
  pair = np.concatenate([shown.user * items + shown.item, user[free] * items + item[free]])
  moment = np.concatenate([shown.time, moment[free]])
  is_event = np.arange(len(pair)) >= len(key)
  order = np.lexsort((is_event, moment, pair))
  latest = np.maximum.accumulate(np.where(is_event[order], -1, np.arange(len(pair))))
  events = np.flatnonzero(is_event[order] & (latest >= 0))
  source = order[latest[events]]
  same = pair[source] == pair[order[events]]
  np.minimum.at(first, source[same], moment[order[events]][same])
  return first

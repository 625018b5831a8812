"""Filters raw interactions, puts them in order and gives users and items dense indices."""

import datetime
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from data_prep.prepared import engine, pictures, plain_files
from data_prep.prepared.rows import Repeat, Rows, open_rows
from ur4rec_jax.data import flat_arrays, splits
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.raw.interactions import Layout, complete
from ur4rec_jax.data.raw.records import Item, Raw
from ur4rec_jax.data.raw.texts import shown
from ur4rec_jax.errors import InputError

# Where --time_split says nothing: 80 % of the interactions train, 10 % validate, 10 % test.
_TIME_SPLIT = '0.8,0.9'
_BUCKET_BITS = 16
_WHOLE_NUMBER = re.compile(r'-?\d{1,4000}')  # Python refuses to read longer ones.
# One of so many users hardly has so large a share of the interactions.
_MANY_USERS, _LARGE_SHARE = 20, 0.2


class Options(NamedTuple):
  """Filters and other choices that shape a dataset.

  Attributes:
    min_rating: drop interactions with a lower rating; None keeps all.
    k_core: drop users and items with fewer interactions; None keeps all.
    min_length: drop users with a shorter history; None keeps all.
    drop_duplicates: keep only the first of equal rows.
    time_split: borders of the split by time, two dates or two shares of the interactions; None
      takes the default shares where the data has times.
    image_size: pixels of the short side of stored pictures.
  """

  min_rating: float | None = None
  k_core: int | None = None
  min_length: int | None = None
  drop_duplicates: bool = False
  time_split: str | None = None
  image_size: int = pictures.IMAGE_SIZE


class Prepared(NamedTuple):
  """A dataset ready to write: user u (from 0) owns `[offsets[u]:offsets[u + 1]]`.

  Attributes:
    offsets: `[users + 1]` int64.
    item_ids: `[interactions]` int32, 1-based.
    timestamps: `[interactions]` int64.
    ratings: `[interactions]` float32.
    item_names: `[items]` original ids; entry i belongs to item i + 1.
    items: `[items]` metadata.
    rows_read: number of rows of the raw data; each became an interaction or was dropped.
    dropped: number of dropped rows, users and items by reason.
    splits: records of the splits for dataset.json.
    notes: notes and hints of `Raw`, and notes of the filters.
    dropped_users: original ids of the users that each filter dropped.
  """

  user_names: list[str]
  item_names: list[str]
  items: list[Item]
  offsets: np.ndarray
  item_ids: np.ndarray
  timestamps: np.ndarray
  ratings: np.ndarray
  has_timestamps: bool
  has_ratings: bool
  rows_read: int
  dropped: dict[str, dict[str, int]]
  splits: dict[str, dict[str, Any]]
  notes: tuple[str, ...] = ()
  dropped_users: Mapping[str, list[str]] = MappingProxyType({})


def prepare(
  raw: Raw, options: Options = Options(), resources: engine.Resources = engine.Resources()
) -> Prepared:
  """Filters rows, sorts each user's rows by time and gives users and items dense indices.

  Args:
    raw: the rows.
    options: filters.
    resources: memory of the engine that filters and sorts.

  Raises:
    InputError: the rows cannot be used, or a filter leaves too few.
  """
  user_names, users = encode_ids(raw.users)
  item_names, items = encode_ids(raw.items, cold_items(raw))
  found = {'user': users, 'item': items, 'time': raw.timestamps, 'rating': raw.ratings}
  columns = {name: values for name, values in found.items() if values is not None}
  with engine.connected(resources) as database:
    engine.store(database, columns)
    stored = _Stored(database, user_names, item_names, tuple(columns))
    # The engine has the rows now, and the memory is needed.
    raw = raw._replace(users=(), items=(), timestamps=None, ratings=None)
    del users, items, found, columns
    return _prepare(raw, stored, options, resources)


def prepare_plain(
  layout: Layout,
  parameters: Mapping[str, Any],
  options: Options = Options(),
  resources: engine.Resources = engine.Resources(),
) -> Prepared | None:
  """Does the same as `prepare` with plain files, whose rows are never all in memory.

  Args:
    layout: the files.
    parameters: those of the source `interactions`.
    options: filters.
    resources: memory of the engine that reads, filters and sorts.

  Returns:
    None if the files are not plain.

  Raises:
    InputError: the rows cannot be used, or a filter leaves too few.
  """
  with engine.connected(resources) as database:
    loaded = plain_files.load(database, layout)
    if loaded is None:
      return None
    raw = layout.note(complete(loaded.raw, layout.columns, parameters))
    ids = {role: found.cast(pa.string()).to_pylist() for role, found in loaded.ids.items()}
    user_names, users = sort_ids(ids['user'])
    item_names, items = sort_ids(ids['item'], cold_items(raw))
    plain_files.number(database, loaded, {'user': users, 'item': items[: len(ids['item'])]})
    columns = ('user', 'item', *loaded.columns)
    stored = _Stored(database, user_names, item_names, columns)
    return _prepare(raw, stored, options, resources)


def cold_items(raw: Raw) -> Collection[str]:
  """Returns the original ids of the items that belong to the catalogue even without rows."""
  return raw.table if raw.keep_cold_items and raw.table else ()


class _Stored(NamedTuple):
  """Rows that the engine has in its table `rows_0`, for `open_rows`.

  Attributes:
    database: the engine.
    user_names: original ids of the users, by number.
    item_names: original ids of the items, by number.
    columns: names of the columns beside `row`.
  """

  database: duckdb.DuckDBPyConnection
  user_names: list[str]
  item_names: list[str]
  columns: tuple[str, ...]


def _prepare(raw: Raw, stored: _Stored, options: Options, resources: engine.Resources) -> Prepared:
  """Filters and sorts rows that the engine has.

  Args:
    raw: where the rows are from, and their item table.
    stored: the rows.
    options: filters.
    resources: where the columns of the result are kept.
  """
  database, user_names, item_names, has = stored
  sizes = {'user': len(user_names), 'item': len(item_names)}
  with open_rows(database, resources, sizes) as rows:
    rows_read = len(rows) + sum(raw.dropped.values())
    unknown = _unknown_items(raw, item_names, rows)
    # No filter drops these items.
    cold = cold_items(raw)
    stays = np.array([name in cold for name in item_names], bool)
    ledger = _Ledger(rows, stays, raw.dropped)
    _filter(raw, rows, has, options, ledger, (user_names, item_names))
    lengths = rows.counts('user')
    kept_users, lengths = np.flatnonzero(lengths), lengths[lengths > 0]
    is_kept = stays | (rows.counts('item') > 0)
    numbers = np.cumsum(is_kept, dtype=np.int32)
    kinds = {'item': np.int32, 'time': np.int64, 'rating': np.float32}
    found = {name: resources.column(name, len(rows), kinds[name]) for name in kinds if name in has}
    _put_in_order(rows, found, numbers, raw.ticks_per_second)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  names = [item_names[i] for i in np.flatnonzero(is_kept)]
  dropped = ledger.dropped
  if raw.table is not None and (idle := len(raw.table) + unknown - len(item_names)):
    dropped['items']['never_interacted'] = idle
  if 'time' not in has:
    found['time'] = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
  table, notes = raw.table or {}, (*raw.notes, *_notes_on_users(user_names, lengths, kept_users))
  if raw.read_items is not None:
    table, more = raw.read_items(names)
    notes += tuple(more)
  return Prepared(
    user_names=[user_names[u] for u in kept_users],
    item_names=names,
    items=[table.get(name, Item()) for name in names],
    offsets=offsets,
    item_ids=found['item'],
    timestamps=found['time'],
    ratings=found['rating'] if 'rating' in has else np.ones(offsets[-1], np.float32),
    has_timestamps='time' in has,
    has_ratings='rating' in has,
    rows_read=rows_read,
    dropped=dropped,
    splits=make_splits(
      offsets,
      found['item'],
      found['time'] if 'time' in has else None,
      options.time_split,
      len(names),
    ),
    notes=(*notes, *raw.hints),
    dropped_users={
      **raw.dropped_users,
      **{reason: [user_names[u] for u in lost] for reason, lost in ledger.dropped_users.items()},
    },
  )


def _notes_on_users(names: Sequence[str], lengths: np.ndarray, kept: np.ndarray) -> list[str]:
  """Tells whether one user has so many rows that the id may stand for all who have none.

  Args:
    names: original ids of all users.
    lengths: `[kept users]` interactions of each.
    kept: `[kept users]` their indices in `names`.
  """
  at = int(np.argmax(lengths))
  share = lengths[at] / lengths.sum()
  if len(lengths) < _MANY_USERS or share < _LARGE_SHARE:
    return []
  return [
    f'user {shown(names[kept[at]])} has {share:.0%} of the interactions; if the id stands for all'
    ' guests, leave its rows out with --where'
  ]


def _filter(
  raw: Raw,
  rows: Rows,
  has: Collection[str],
  options: Options,
  ledger: '_Ledger',
  names: tuple[list[str], list[str]],
) -> None:
  """Drops the rows that the options do not want.

  Args:
    raw: where the rows are from.
    rows: the rows.
    has: names of their columns.
    options: filters.
    ledger: gets the counts of what is dropped.
    names: original ids of the users and of the items.
  """
  if 'time' in has:
    repeats, first = rows.find_repeats()
    if first and not options.drop_duplicates:
      raise _repeated(raw, repeats, first, names)
    if first:
      rows.drop_repeats()
    ledger.record('drop_duplicates', rows)
  elif options.drop_duplicates:
    raise InputError(
      '--drop_duplicates needs times; in this source every line is an event of its own,'
      ' repeats included: leave the flag out'
    )
  if options.min_rating is not None:
    if 'rating' not in has:
      raise InputError('--min_rating: this source has no ratings; leave the flag out')
    rows.keep_rated(options.min_rating)
    ledger.record('min_rating', rows)
  # Dropping users can push items below the threshold and vice versa, so both are repeated.
  while True:
    before = len(rows)
    if options.k_core is not None:
      rows.keep_frequent('item', options.k_core)
      rows.keep_frequent('user', options.k_core)
      ledger.record('k_core', rows)
    if options.min_length is not None:
      rows.keep_frequent('user', options.min_length)
      ledger.record('min_length', rows)
    if len(rows) == before:
      break
  _check_enough_left(raw.path, rows, ledger, options)


def _put_in_order(
  rows: Rows, found: dict[str, np.ndarray], numbers: np.ndarray, ticks_per_second: int
) -> None:
  """Fills columns with all rows, user after user, each in time order.

  Args:
    rows: the rows.
    found: `[rows]` columns to fill.
    numbers: `[items]` int32 number of each item that is kept.
    ticks_per_second: see `Raw`.
  """
  keys = ['user', *(name for name in ('time',) if name in found), 'row']
  start = 0
  for part in rows.ordered(keys, list(found)):
    here = slice(start, start := start + len(part['item']))
    part['item'] = numbers[part['item']]
    if 'time' in part:
      part['time'] = part['time'] // ticks_per_second
    for name, values in part.items():
      found[name][here] = values
      flat_arrays.release(found[name])


def counts(prepared: Prepared) -> dict[str, int | float]:
  """Returns the sizes of a dataset for dataset.json."""
  lengths = np.diff(prepared.offsets)
  cold = len(prepared.item_names) - _distinct(prepared.item_ids, len(prepared.item_names))
  return {
    'users': len(lengths),
    'items': len(prepared.item_names),
    **({'items_without_interactions': cold} if cold else {}),
    'interactions': len(prepared.item_ids),
    'median_length': float(np.median(lengths)),
  }


def make_splits(
  offsets: np.ndarray,
  item_ids: np.ndarray,
  timestamps: np.ndarray | None,
  time_split: str | None,
  num_items: int,
) -> dict[str, dict[str, Any]]:
  """Describes every split of the interactions: borders, hash, and how many users it leaves out.

  Args:
    offsets: `[users + 1]`, user u owns `[offsets[u]:offsets[u + 1]]` of the others.
    item_ids: `[interactions]` 1-based.
    timestamps: `[interactions]` unix seconds or None.
    time_split: see `Options`.
    num_items: size of the catalogue.

  Raises:
    InputError: `time_split` is impossible for this data.
  """
  records: dict[str, dict[str, Any]] = {splits.LEAVE_ONE_OUT: {}}
  if timestamps is not None:
    valid_from, test_from = _borders(timestamps, time_split or _TIME_SPLIT)
    records[splits.TIME] = {'valid_from': valid_from, 'test_from': test_from}
  elif time_split is not None:
    raise InputError('--time_split: this source has no times; leave the flag out')
  for name, record in records.items():
    split = splits.make_split(name, record, offsets, timestamps)
    data = Dataset({'counts': {'items': num_items}}, name, split, item_ids, offsets)
    trained = int(np.count_nonzero(data.train_item_counts()))
    record |= {
      'train_interactions': int(split.train_lengths.sum(dtype=np.int64)),
      **{f'{part}_users': int((at >= 0).sum()) for part, at in split.held_out.items()},
      'train_only_users': int((split.held_out['test'] < 0)[split.train_lengths > 0].sum()),
      'unused_users': int((split.held_out['test'] < 0)[split.train_lengths == 0].sum()),
      'items_without_training': num_items - trained,
      'hash': splits.split_hash(name, offsets, item_ids, split, num_items),
    }
  # A split by time may leave no user to evaluate.
  by_time = records.get(splits.TIME)
  if by_time and not (by_time['valid_users'] and by_time['test_users']):
    if time_split is not None:
      raise InputError(
        f'--time_split={time_split}: {by_time["valid_users"]} users to validate and'
        f' {by_time["test_users"]} to test are left; choose other borders'
      )
    del records[splits.TIME]
  return records


def _borders(timestamps: np.ndarray, wanted: str) -> tuple[int, int]:
  """Returns the first seconds of the validation and the test period."""
  try:
    first, second = wanted.split(',')
    if '-' in wanted:
      dates = map(datetime.datetime.fromisoformat, (first.strip(), second.strip()))
      times = [time if time.tzinfo else time.replace(tzinfo=datetime.UTC) for time in dates]
      borders = [int(time.timestamp()) for time in times]
      if borders[0] >= borders[1]:
        raise ValueError
    else:
      shares = float(first), float(second)
      if not 0 < shares[0] < shares[1] < 1:
        raise ValueError
      places = [int(share * len(timestamps)) for share in shares]
      borders = _sorted_at(timestamps, places)
  except ValueError as error:
    raise InputError(
      f'--time_split={wanted}: must be two dates such as 2024-05-01,2024-06-01, or two shares of'
      ' the interactions such as 0.8,0.9, the first below the second'
    ) from error
  return borders[0], borders[1]


def _distinct(numbers: np.ndarray, most: int) -> int:
  """Counts the distinct values of numbers up to `most`."""
  is_there = np.zeros(most + 1, bool)
  for _, part in flat_arrays.parts(numbers):
    is_there[part] = True
  return int(is_there.sum())


def _sorted_at(values: np.ndarray, places: Sequence[int]) -> list[int]:
  """Returns what would be at some places of sorted whole numbers, without a copy of all of them."""
  least, most = int(values.min()), int(values.max())
  shift = max(0, (most - least).bit_length() - _BUCKET_BITS)
  sizes = np.zeros((most - least >> shift) + 1, np.int64)
  for _, part in flat_arrays.parts(values):
    sizes += np.bincount(part - least >> shift, minlength=len(sizes))
  ends, found = np.cumsum(sizes), []
  for place in places:
    bucket = int(np.searchsorted(ends, place, 'right'))
    inside = [part[part - least >> shift == bucket] for _, part in flat_arrays.parts(values)]
    place -= int(ends[bucket] - sizes[bucket])
    found.append(int(np.partition(np.concatenate(inside), place)[place]))
  return found


class _Ledger:
  """Counts the rows that each filter drops, and keeps the users."""

  def __init__(self, rows: Rows, stays: np.ndarray, dropped: Mapping[str, int]):
    """Counts what there is before the first filter.

    Args:
      rows: the rows.
      stays: `[items]` bool, items that count as kept without any row, too.
      dropped: number of rows that reading left out, by reason.
    """
    self._stays = stays
    self.dropped: dict[str, dict[str, int]] = {
      'users': {},
      'items': {},
      'interactions': dict(dropped),
    }
    self._left = self._count(rows)
    self.dropped_users: dict[str, list[int]] = {}
    self._has_rows = rows.counts('user') > 0

  def _count(self, rows: Rows) -> dict[str, int]:
    return {
      'users': int(np.count_nonzero(rows.counts('user'))),
      'items': int(((rows.counts('item') > 0) | self._stays).sum()),
      'interactions': len(rows),
    }

  def record(self, reason: str, rows: Rows) -> None:
    left = self._count(rows)
    for what, reasons in self.dropped.items():
      if lost := self._left[what] - left[what]:
        reasons[reason] = reasons.get(reason, 0) + lost
    self._left = left
    has_rows = rows.counts('user') > 0
    users = np.flatnonzero(self._has_rows & ~has_rows)
    if users.size:
      self.dropped_users.setdefault(reason, []).extend(users.tolist())
    self._has_rows = has_rows


def encode_ids(
  ids: np.ndarray | pa.Array, others: Iterable[str] = ()
) -> tuple[list[str], np.ndarray]:
  """Returns sorted distinct ids, by number if all are whole numbers, and `[rows]` indices.

  Args:
    ids: `[rows]` ids.
    others: further ids, which have no row or are among `ids`.
  """
  encoded = pa.array(ids).dictionary_encode()
  names, rank = sort_ids(encoded.dictionary.cast(pa.string()).to_pylist(), others)
  return names, rank[np.asarray(encoded.indices)]


def sort_ids(ids: Sequence[str], others: Iterable[str] = ()) -> tuple[list[str], np.ndarray]:
  """Sorts distinct ids, by number if all are whole numbers.

  Args:
    ids: distinct ids.
    others: further ids, or some of them.

  Returns:
    All ids in order, and the place of each of `ids` and of the others in it.
  """
  names = list(dict.fromkeys([*ids, *others]))
  if all(_WHOLE_NUMBER.fullmatch(name) for name in names):
    # The text is the second key, because '7' and '007' are two ids with one value.
    order = sorted(range(len(names)), key=lambda i: (int(names[i]), names[i]))
  else:
    order = sorted(range(len(names)), key=names.__getitem__)
  rank = np.empty(len(names), np.int32)
  rank[order] = np.arange(len(names))
  return [names[i] for i in order], rank


def _unknown_items(raw: Raw, names: list[str], rows: Rows) -> int:
  """Counts items without a row in the item table; an error unless the table may be partial."""
  if raw.table is None:
    return 0
  unknown = [i for i, name in enumerate(names) if name not in raw.table]
  if unknown and not raw.table_is_partial:
    first, item = rows.first_with('item', np.array(unknown))
    raise InputError(
      f'{raw.where(first)}: item {names[item]!r} is not in the item table'
      f' ({len(unknown)} such items in all); use the item table that belongs to these'
      ' interactions, add the missing items to it, or, where the source has the flag, pass'
      ' --partial_items to keep them without text'
    )
  return len(unknown)


def _repeated(
  raw: Raw, count: int, repeat: Repeat, names: tuple[list[str], list[str]]
) -> InputError:
  users, items = names
  seconds, ticks = divmod(repeat.time, raw.ticks_per_second)
  fraction = f'{ticks / raw.ticks_per_second:.9f}'[1:].rstrip('0') if ticks else ''
  return InputError(
    f'{raw.where(repeat.first, repeat.row)}: the same user'
    f' {users[repeat.user]!r}, item {items[repeat.item]!r} and time'
    f' {seconds}{fraction} twice ({count:,} such rows in all);'
    ' pass --drop_duplicates to keep the first of each'
  )


def _check_enough_left(path: str, rows: Rows, ledger: _Ledger, options: Options) -> None:
  num_users, num_items = (int((rows.counts(of) > 0).sum()) for of in ('user', 'item'))
  if num_users > 1 and num_items > 1:
    return
  value = lambda reason: getattr(options, reason, True)
  removed = [
    f'--{reason}{"" if value(reason) is True else f"={value(reason)}"} removed {lost:,}'
    for reason, lost in ledger.dropped['interactions'].items()
  ]
  left = (
    f'{num_users} user{"s" * (num_users != 1)} and {num_items} item{"s" * (num_items != 1)} left'
    if num_users
    else 'nothing left'
  )
  total = len(rows) + sum(ledger.dropped['interactions'].values())
  way_out = (
    f' after filtering: of {total:,} interactions {", ".join(removed)}; loosen these options'
    if removed
    else '; a recommender needs at least 2 of each: use a larger file'
  )
  raise InputError(f'{path}: {left}{way_out}')

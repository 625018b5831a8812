"""Joins the events of a new day with a prepared dataset whose numbers of users and items stay.

The rules of joining:

- An old user or item keeps its number, whatever happens. New ones get the next numbers, in the
  order that a build gives them.
- An event with the user, item and time (in whole seconds) of an old event is a repeat: it is left
  out and counted. So is one that the new file has twice.
- A late event, earlier than the last old one, is placed by its time. At equal times old events come
  first.
- `min_rating`, and the selection of rows by the source, work as in the build.
- `k_core` and `min_length` look at new users and items alone: they enter when the new file has
  enough events of them. Old ones stay, and so do their events.
- An old item keeps its title, texts and picture.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.prepared import engine, pictures, prepare
from ur4rec_jax.data import flat_arrays, item_pictures, splits
from ur4rec_jax.data.dataset import Interactions, read_info, read_interactions, read_items
from ur4rec_jax.data.raw.records import Item, NoRows, Raw
from ur4rec_jax.data.streaming import indices, ranges
from ur4rec_jax.errors import InputError, counted

_AT_ONCE = 1 << 20  # Events that are put into order at once.


class Old(NamedTuple):
  """A prepared folder that events are appended to.

  Attributes:
    folder: the folder.
    info: content of its dataset.json.
    interactions: its histories.
    items: its items, see `read_items`.
  """

  folder: Path
  info: dict[str, Any]
  interactions: Interactions
  items: list[dict[str, Any]]

  @property
  def end(self) -> int:
    """Unix seconds of the last event."""
    return max(int(part.max()) for _, part in flat_arrays.parts(self.interactions.timestamps))


def read_old(folder: Path) -> Old:
  """Reads a prepared folder; InputError if it is missing or damaged."""
  return Old(folder, read_info(folder), read_interactions(folder), read_items(folder))


def parent_record(info: dict[str, Any]) -> dict[str, Any]:
  """Describes a dataset for the dataset.json of the next version.

  Args:
    info: content of the dataset.json of the old version.

  Returns:
    `hash` of its interactions, numbers of `users`, `items` and `interactions`, its `time_range`,
    and the `chain` of the hashes of all versions so far, the oldest first.
  """
  found = info['splits'][splits.LEAVE_ONE_OUT]['hash']
  return {
    'hash': found,
    **{name: info['counts'][name] for name in ('users', 'items', 'interactions')},
    'time_range': info['time_range'],
    'chain': [*info.get('parent', {}).get('chain', []), found],
  }


def append(
  old: Old,
  raw: Raw,
  options: prepare.Options,
  takes_late: bool = False,
  resources: engine.Resources = engine.Resources(),
) -> prepare.Prepared:
  """Joins old histories with new events, see the rules above.

  Args:
    old: the dataset so far.
    raw: the new events, and the table of new items.
    options: the filters of the first build.
    takes_late: whether a file without any event after the last old one is taken.
    resources: where the joined columns are kept.

  Returns:
    All histories; `rows_read` and `dropped` are of the new events.

  Raises:
    NoRows: the new file has no event that can be added: all are there already, or left out.
    InputError: the new file is no new day of this dataset.
  """
  _check_columns(old, raw)
  events = _number_events(old, raw)
  left, notes = _choose(old, raw, events, options, takes_late)
  rows, dropped = left.rows, {reason: count for reason, count in left.dropped.items() if count}
  cold = prepare.cold_items(raw)
  kept_users, kept_items = (
    _kept(numbers.of_rows[rows], numbers.known, len(numbers.names))
    for numbers in (events.users, events.items)
  )
  kept_items |= np.array([name in cold for name in events.items.names], bool)
  users, items = events.users.only(kept_users), events.items.only(kept_items)
  new_items = items.names[items.known :]
  if not len(rows) and not new_items:
    reasons = ', '.join(f'{name} {count:,}' for name, count in dropped.items())
    raise NoRows(
      f'{raw.path}: the settings of {old.folder} leave out all its events ({reasons}); there is'
      ' nothing to append'
    )
  table, more = _table(raw, new_items)
  joined = _join(old, raw, rows, events._replace(users=users, items=items), resources)
  lost: dict[str, list[str]] = {}
  for at in np.flatnonzero(~kept_users):
    lost.setdefault(left.last_reason[at], []).append(events.users.names[at])
  return prepare.Prepared(
    user_names=users.names,
    item_names=items.names,
    items=[*map(_old_item, old.items), *(table.get(name, Item()) for name in new_items)],
    offsets=joined.offsets,
    item_ids=joined.item_ids,
    timestamps=joined.timestamps,
    ratings=joined.ratings,
    has_timestamps=raw.timestamps is not None,
    has_ratings=raw.ratings is not None,
    rows_read=len(raw.users) + sum(raw.dropped.values()),
    dropped={'users': {}, 'items': {}, 'interactions': dropped},
    splits=prepare.make_splits(
      joined.offsets,
      joined.item_ids,
      None if raw.timestamps is None else joined.timestamps,
      options.time_split,
      len(items.names),
    ),
    notes=(
      f'appended {counted(len(rows), "event")}, {counted(users.new, "new user")} and'
      f' {counted(items.new, "new item")} to {counted(users.known, "user")} and'
      f' {counted(items.known, "item")}',
      *notes,
      *raw.notes,
      *more,
      *raw.hints,
    ),
    dropped_users={**raw.dropped_users, **lost},
  )


class _Numbers(NamedTuple):
  """Numbers from 0 of the users or of the items: the known ones, then the new ones.

  Attributes:
    of_rows: `[rows]` the number in each new row.
    names: original ids of all numbers.
    known: how many are known.
  """

  of_rows: np.ndarray
  names: list[str]
  known: int

  @property
  def new(self) -> int:
    return len(self.names) - self.known

  def only(self, is_kept: np.ndarray) -> '_Numbers':
    """Leaves out some new ones, after which the next ones have smaller numbers."""
    names = [name for name, kept in zip(self.names, is_kept, strict=True) if kept]
    return _Numbers(np.cumsum(is_kept)[self.of_rows] - 1, names, self.known)


class _Events(NamedTuple):
  """The new rows in numbers.

  Attributes:
    users: who.
    items: what.
    times: `[rows]` whole unix seconds; None if the data have no times.
  """

  users: _Numbers
  items: _Numbers
  times: np.ndarray | None


def _number_events(old: Old, raw: Raw) -> _Events:
  """Numbers the new rows; NoRows if none of their users and items is known."""
  known_users = old.interactions.user_ids
  known_items = [item['original_id'] for item in old.items]
  users = _number(raw.users, known_users)
  items = _number(raw.items, known_items, prepare.cold_items(raw))
  if all((numbers.of_rows >= numbers.known).all() for numbers in (users, items)):
    user, item = (numbers.names[numbers.of_rows[0]] for numbers in (users, items))
    raise NoRows(
      f'{raw.path}: none of its users and items is in {old.folder}, such as user {user!r} and item'
      f' {item!r}, where {old.folder} has {known_users[0]!r} and {known_items[0]!r}; give the ids'
      ' of the same kind'
    )
  times = None
  if raw.timestamps is not None:
    times = (raw.timestamps // raw.ticks_per_second).astype(np.int64)
  return _Events(users, items, times)


class _Left:
  """The new rows that are left.

  Attributes:
    rows: their indices.
    dropped: number of the others by reason.
    last_reason: `[users]` why a user has lost a row last, '' for who has lost none.
  """

  def __init__(self, raw: Raw, users: _Numbers):
    self.rows = np.arange(len(raw.users))
    self.dropped = Counter(raw.dropped)
    self.last_reason = np.full(len(users.names), '', object)
    self._users = users.of_rows

  def keep(self, is_kept: np.ndarray, reason: str) -> None:
    """Leaves out the other rows; `is_kept` is `[rows that are left]` bool."""
    lost, self.rows = self.rows[~is_kept], self.rows[is_kept]
    self.dropped[reason] += len(lost)
    self.last_reason[self._users[lost]] = reason


def _choose(
  old: Old, raw: Raw, events: _Events, options: prepare.Options, takes_late: bool
) -> tuple[_Left, list[str]]:
  """Leaves out rows by the rules above; also returns notes.

  Raises:
    NoRows: all rows are repeats.
    InputError: all rows are late.
  """
  left, notes = _Left(raw, events.users), []
  if events.times is not None:
    left.keep(_is_new(old, raw, events), 'repeated')
    if not len(left.rows):
      raise NoRows(
        f'{raw.path}: all {counted(len(raw.users), "event")} are in {old.folder} already: these are'
        ' old days again; give the file of the new day'
      )
    times = events.times[left.rows]
    if not takes_late and (times <= old.end).all():
      raise InputError(
        f'{raw.path}: has no event after {_date(old.end)}, the last one of {old.folder}, and is no'
        f' new day; its last one is of {_date(times.max())}; pass --late to add late events alone'
      )
    if repeats := left.dropped['repeated']:
      notes.append(f'{counted(repeats, "repeated event")} left out')
  if options.min_rating is not None:
    assert raw.ratings is not None  # The old data have ratings, or they could have no such filter.
    left.keep(raw.ratings[left.rows] >= options.min_rating, 'min_rating')
  _keep_core(left, events, options)
  if events.times is not None and (late := int((events.times[left.rows] < old.end).sum())):
    notes.append(f'{counted(late, "late event")} placed by time')
  return left, notes


def _check_columns(old: Old, raw: Raw) -> None:
  """Raises InputError if the new events have other columns than the old ones."""
  for what, has_old, values in (
    ('times', old.info['has_timestamps'], raw.timestamps),
    ('ratings', old.info['has_ratings'], raw.ratings),
  ):
    if has_old != (values is not None):
      here, there = ('no ', '') if has_old else ('', 'no ')
      raise InputError(
        f'{raw.path}: has {here}{what}, and {old.folder} has {there}{what}; export the new events'
        ' with the columns of the old ones'
      )


def _number(ids: Any, known: Sequence[str], others: Any = ()) -> _Numbers:
  """Numbers ids: the known ones as they are, then the new ones in the order of a build."""
  names, indices = prepare.encode_ids(ids, others)
  places = {name: i for i, name in enumerate(known)}
  new = [name for name in names if name not in places]
  places |= {name: len(known) + i for i, name in enumerate(new)}
  lookup = np.array([places[name] for name in names], np.int64)
  return _Numbers(lookup[indices], [*known, *new], len(known))


def _is_new(old: Old, raw: Raw, events: _Events) -> np.ndarray:
  """`[rows]` bool: new rows that are neither in the old data nor in an earlier new row."""
  users, items, times = events.users.of_rows, events.items.of_rows, events.times
  assert times is not None  # `_choose` asks only about data with times.
  assert raw.timestamps is not None
  order = np.lexsort((raw.timestamps, items, users))
  same = np.ones(len(order) - 1, bool)
  for column in (users, items, raw.timestamps):
    same &= column[order[1:]] == column[order[:-1]]
  is_repeated = np.zeros(len(order), bool)
  is_repeated[order[1:][same]] = True
  # The old rows of the same users, and after them the new rows; whatever follows an equal one has
  # been there before.
  involved = np.zeros(len(old.interactions.user_ids), bool)
  involved[users[users < len(involved)]] = True
  known = np.flatnonzero(involved)
  starts, lengths = old.interactions.offsets[known], np.diff(old.interactions.offsets)[known]
  mine = indices(starts, lengths)
  owners = np.repeat(known, lengths)
  columns = (
    np.concatenate([owners, users]),
    np.concatenate([old.interactions.item_ids[mine] - 1, items]),
    np.concatenate([old.interactions.timestamps[mine], times]),
  )
  order = np.lexsort(columns[::-1])
  starts = np.ones(len(order), bool)
  starts[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
  # lexsort is stable, so an old row of a group of equal ones comes first.
  first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
  is_old = np.empty(len(order), bool)
  is_old[order] = first < len(owners)
  return ~is_repeated & ~is_old[len(owners) :]


def _keep_core(left: _Left, events: _Events, options: prepare.Options) -> None:
  """Leaves out new users and items with too few events."""
  limits = (
    ('k_core', events.items, options.k_core),
    ('k_core', events.users, options.k_core),
    ('min_length', events.users, options.min_length),
  )
  before = -1
  while len(left.rows) != before:
    before = len(left.rows)
    for reason, numbers, least in limits:
      if least is not None and len(left.rows):
        found = numbers.of_rows[left.rows]
        left.keep((found < numbers.known) | (np.bincount(found)[found] >= least), reason)


def _kept(numbers: np.ndarray, known: int, count: int) -> np.ndarray:
  """`[count]` bool: the known ones, and those that occur."""
  is_kept = np.bincount(numbers, minlength=count) > 0
  is_kept[:known] = True
  return is_kept


def _table(raw: Raw, new: list[str]) -> tuple[dict[str, Item], list[str]]:
  """Returns the metadata of new items, and notes."""
  if raw.read_items is not None:
    table, notes = raw.read_items(new)
    return table, list(notes)
  if raw.table is None:
    note = f'{counted(len(new), "new item")} without title and text; --items gives them'
    return {}, [note] if new else []
  unknown = [name for name in new if name not in raw.table]
  if unknown and not raw.table_is_partial:
    raise InputError(
      f'{raw.path}: the new item {unknown[0]!r} is not in the item table ({len(unknown):,} such'
      ' items in all); add the missing items to it'
    )
  return raw.table, []


def _join(
  old: Old, raw: Raw, rows: np.ndarray, events: _Events, resources: engine.Resources
) -> Interactions:
  """Puts old and new events into one order: by user, then by time, old ones first.

  Some users are joined at a time, so that all together need not fit into memory.
  """
  users, items, times = events.users.of_rows, events.items.of_rows, events.times
  before = old.interactions
  # New events within a second keep their order.
  keys = (users[rows],) if raw.timestamps is None else (raw.timestamps[rows], users[rows])
  rows = rows[np.lexsort(keys)]
  new_lengths = np.bincount(users[rows], minlength=len(events.users.names))
  old_lengths = np.zeros_like(new_lengths)
  old_lengths[: len(before.user_ids)] = np.diff(before.offsets)
  starts, new_starts, offsets = (
    np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for lengths in (old_lengths, new_lengths, old_lengths + new_lengths)
  )
  joined = Interactions(
    [],
    offsets,
    *(
      resources.column(name, int(offsets[-1]), kind)
      for name, kind in (('item', np.int32), ('time', np.int64), ('rating', np.float32))
    ),
  )
  for first, last in flat_arrays.user_blocks(offsets, _AT_ONCE):
    old_part = slice(starts[first], starts[last])
    part = rows[new_starts[first] : new_starts[last]]
    here, numbers = slice(offsets[first], offsets[last]), np.arange(first, last)
    owners = np.concatenate(
      [np.repeat(numbers, lengths[first:last]) for lengths in (old_lengths, new_lengths)]
    )
    if times is None:
      order = np.argsort(owners, kind='stable')
      joined.timestamps[here] = ranges(np.diff(offsets[first : last + 1]))
    else:
      both = np.concatenate([before.timestamps[old_part], times[part]])
      order = np.lexsort((both, owners))
      joined.timestamps[here] = both[order]
    joined.item_ids[here] = np.concatenate([before.item_ids[old_part], items[part] + 1])[order]
    ratings = np.ones(len(part)) if raw.ratings is None else raw.ratings[part]
    joined.ratings[here] = np.concatenate([before.ratings[old_part], ratings])[order]
    for column in (*before[2:], *joined[2:]):
      flat_arrays.release(column)
  return joined


def _old_item(item: dict[str, Any]) -> Item:
  return Item(item['title'], tuple(item['genres']), item['description'], item['image'] or None)


def _date(seconds: int) -> str:
  return str(np.datetime64(int(seconds), 's'))


def bring_pictures(
  old: Old, data: prepare.Prepared, folder: Path, image_size: int, version: int
) -> tuple[prepare.Prepared, list[str]]:
  """Puts the old pictures and those of new items into the folder of the new version.

  Args:
    old: the dataset so far.
    data: the joined dataset.
    folder: folder of the new version.
    image_size: see `pictures.normalise`.
    version: number of the new version; its pictures get a folder of their own, so that their names
      cannot meet old ones.

  Returns:
    The dataset with the paths of all pictures, and notes for the user.
  """
  if (old.folder / item_pictures.FOLDER).is_dir():
    link_tree(old.folder / item_pictures.FOLDER, folder / item_pictures.FOLDER)
  count = len(old.items)
  names, new = data.item_names[count:], data.items[count:]
  images, notes = pictures.import_all(
    folder, names, [item.image for item in new], image_size, f'v{version}'
  )
  new = [item._replace(image=image) for item, image in zip(new, images, strict=True)]
  return data._replace(items=[*data.items[:count], *new]), notes


def link_tree(source: Path, target: Path) -> None:
  """Copies a folder; large files share their place on the disk with the old ones if possible.

  Files of a prepared folder are replaced, never changed, except for manifests, which grow.
  """
  shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
  if not source.endswith('.jsonl'):
    try:
      Path(target).hardlink_to(source)
      return
    except OSError:
      pass  # Another disk, or one that knows no links.
  shutil.copyfile(source, target)

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

from data_prep.prepared import pictures, prepare
from ur4rec_jax.data import item_pictures, splits
from ur4rec_jax.data.dataset import Interactions, read_info, read_interactions, read_items
from ur4rec_jax.data.raw.records import Item, Raw
from ur4rec_jax.errors import InputError, counted


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
    return int(self.interactions.timestamps.max())


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
  old: Old, raw: Raw, options: prepare.Options, takes_late: bool = False
) -> prepare.Prepared:
  """Joins old histories with new events, see the rules above.

  Args:
    old: the dataset so far.
    raw: the new events, and the table of new items.
    options: the filters of the first build.
    takes_late: whether a file without any event after the last old one is taken.

  Returns:
    All histories; `rows_read` and `dropped` are of the new events.

  Raises:
    InputError: the new file is no new day of this dataset.
  """
  _check_columns(old, raw)
  known_users = old.interactions.user_ids
  known_items = [item['original_id'] for item in old.items]
  users, user_names = _number(raw.users, known_users)
  cold = raw.table if raw.keep_cold_items and raw.table else ()
  items, item_names = _number(raw.items, known_items, cold)
  num_users, num_items = len(known_users), len(known_items)
  if (users >= num_users).all() and (items >= num_items).all():
    raise InputError(
      f'{raw.path}: none of its users and items is in {old.folder}, such as user'
      f' {user_names[users[0]]!r} and item {item_names[items[0]]!r}, where {old.folder} has'
      f' {known_users[0]!r} and {known_items[0]!r}; give the ids of the same kind'
    )
  rows, dropped, repeats = np.arange(len(users)), Counter(raw.dropped), 0
  times = None
  if raw.timestamps is not None:
    times = (raw.timestamps // raw.ticks_per_second).astype(np.int64)
    rows = _without_repeats(old, raw, users, items, times)
    repeats = dropped['repeated'] = len(users) - len(rows)
    if not len(rows):
      raise InputError(
        f'{raw.path}: all {counted(len(users), "event")} are in {old.folder} already: these are'
        ' old days again; give the file of the new day'
      )
    late = int((times[rows] < old.end).sum())
    if not takes_late and (times[rows] <= old.end).all():
      raise InputError(
        f'{raw.path}: has no event after {_date(old.end)}, the last one of {old.folder}, and is no'
        f' new day; its last one is of {_date(times[rows].max())}; pass --late to add late events'
        ' alone'
      )
  before = len(rows)
  if options.min_rating is not None:
    rows = rows[raw.ratings[rows] >= options.min_rating]
    dropped['min_rating'] = before - len(rows)
  rows, by_core = _core(rows, users, items, (num_users, num_items), options)
  dropped |= by_core
  stays = np.array([name in cold for name in item_names], bool)
  stays[:num_items] = True
  kept_users = _kept(users[rows], num_users, len(user_names))
  kept_items = _kept(items[rows], num_items, len(item_names)) | stays
  if not len(rows) and kept_items.sum() == num_items:
    reasons = ', '.join(f'{name} {count:,}' for name, count in dropped.items() if count)
    raise InputError(
      f'{raw.path}: the settings of {old.folder} leave out all its events ({reasons}); there is'
      ' nothing to append'
    )
  new_users, new_items = kept_users[num_users:].sum(), kept_items[num_items:].sum()
  # Numbers without the users and items that were left out; those of old ones do not change.
  users, items = np.cumsum(kept_users)[users] - 1, np.cumsum(kept_items)[items] - 1
  lost = [name for name, kept in zip(user_names, kept_users, strict=True) if not kept]
  item_names = [name for name, kept in zip(item_names, kept_items, strict=True) if kept]
  user_names = [name for name, kept in zip(user_names, kept_users, strict=True) if kept]
  table, notes = _table(raw, item_names[num_items:])
  joined = _join(old, raw, rows, users, items, times, len(user_names))
  notes = [
    f'appended {counted(len(rows), "event")}, {counted(int(new_users), "new user")} and'
    f' {counted(int(new_items), "new item")} to {counted(num_users, "user")} and'
    f' {counted(num_items, "item")}',
    *([f'{counted(repeats, "repeated event")} left out'] if repeats else []),
    *([f'{counted(late, "late event")} placed by time'] if times is not None and late else []),
    *raw.notes,
    *notes,
    *raw.hints,
  ]
  return prepare.Prepared(
    user_names=user_names,
    item_names=item_names,
    items=[
      *map(_old_item, old.items),
      *(table.get(name, Item()) for name in item_names[num_items:]),
    ],
    offsets=joined.offsets,
    item_ids=joined.item_ids,
    timestamps=joined.timestamps,
    ratings=joined.ratings,
    has_timestamps=raw.timestamps is not None,
    has_ratings=raw.ratings is not None,
    rows_read=len(raw.users) + sum(raw.dropped.values()),
    dropped={'users': {}, 'items': {}, 'interactions': {k: n for k, n in dropped.items() if n}},
    splits=prepare.make_splits(
      joined.offsets,
      joined.item_ids,
      None if raw.timestamps is None else joined.timestamps,
      options.time_split,
      len(item_names),
    ),
    notes=tuple(notes),
    dropped_users={**raw.dropped_users, **({'k_core': lost} if lost else {})},
  )


def _check_columns(old: Old, raw: Raw) -> None:
  """Raises InputError if the new events have other columns than the old ones, or no rows."""
  if not len(raw.users):
    raise InputError(f'{raw.path}: has no rows; there is nothing to append')
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


def _number(ids: Any, known: Sequence[str], others: Any = ()) -> tuple[np.ndarray, list[str]]:
  """Numbers ids from 0: the known ones as they are, then the new ones in the order of a build.

  Returns:
    `[rows]` numbers, and the names of all numbers.
  """
  names, indices = prepare.encode_ids(ids, others)
  places = {name: i for i, name in enumerate(known)}
  new = [name for name in names if name not in places]
  places |= {name: len(known) + i for i, name in enumerate(new)}
  lookup = np.array([places[name] for name in names], np.int64)
  return lookup[indices], [*known, *new]


def _without_repeats(
  old: Old, raw: Raw, users: np.ndarray, items: np.ndarray, times: np.ndarray
) -> np.ndarray:
  """Returns the indices of new rows that are neither in the old data nor in an earlier new row."""
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
  lengths = np.diff(old.interactions.offsets)
  mine = np.repeat(involved, lengths)
  owners = np.repeat(np.flatnonzero(involved), lengths[involved])
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
  return np.flatnonzero(~is_repeated & ~is_old[len(owners) :])


def _core(
  rows: np.ndarray,
  users: np.ndarray,
  items: np.ndarray,
  num_known: tuple[int, int],
  options: prepare.Options,
) -> tuple[np.ndarray, dict[str, int]]:
  """Leaves out new users and items with too few events; returns what is left, and counts."""
  dropped = Counter()
  limits = (
    ('k_core', items, num_known[1], options.k_core),
    ('k_core', users, num_known[0], options.k_core),
    ('min_length', users, num_known[0], options.min_length),
  )
  while True:
    before = len(rows)
    for reason, numbers, known, least in limits:
      if least is not None and len(rows):
        enough = np.bincount(numbers[rows])[numbers[rows]] >= least
        kept = rows[(numbers[rows] < known) | enough]
        dropped[reason] += len(rows) - len(kept)
        rows = kept
    if len(rows) == before:
      return rows, dict(dropped)


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
  old: Old,
  raw: Raw,
  rows: np.ndarray,
  users: np.ndarray,
  items: np.ndarray,
  times: np.ndarray | None,
  num_users: int,
) -> Interactions:
  """Puts old and new events into one order: by user, then by time, old ones first."""
  before = old.interactions
  if times is not None:  # New events within a second keep their order.
    rows = rows[np.argsort(raw.timestamps[rows], kind='stable')]
  owners = np.repeat(np.arange(len(before.user_ids)), np.diff(before.offsets))
  owners = np.concatenate([owners, users[rows]])
  item_ids = np.concatenate([before.item_ids, items[rows] + 1]).astype(np.int32)
  new_ratings = np.ones(len(rows)) if raw.ratings is None else raw.ratings[rows]
  ratings = np.concatenate([before.ratings, new_ratings]).astype(np.float32)
  lengths = np.bincount(owners, minlength=num_users)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  if times is None:
    order = np.argsort(owners, kind='stable')
    timestamps = np.arange(len(owners)) - np.repeat(offsets[:-1], lengths)
  else:
    timestamps = np.concatenate([before.timestamps, times[rows]])
    order = np.lexsort((timestamps, owners))
    timestamps = timestamps[order]
  return Interactions([], offsets, item_ids[order], timestamps, ratings[order])


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

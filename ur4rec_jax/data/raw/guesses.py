"""Guesses what the columns of two tables mean: interactions, and items.

A guess is made of flags of `data_prep.build_dataset`, so that a user can read and change it. Names
decide first. Where they do not, values do: ids that the other table has, dates, and texts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data import column_names, conditions
from ur4rec_jax.data.raw import columns as arrow_columns
from ur4rec_jax.data.raw import interactions, items, json_lines, tables, times, where
from ur4rec_jax.data.raw.hints import hint_about_spelling
from ur4rec_jax.data.raw.ids import LIST, MISSING, clean, parse_cleanings
from ur4rec_jax.data.raw.texts import listed
from ur4rec_jax.errors import InputError, counted

# Parts of names in several languages, for columns without a usual name.
_HINTS = {
  'user': 'user cust kund client klant buyer member shopper visitor person utilis usuario consum'
  ' 顧客 会員 客户 用户 고객',
  'item': 'item prod artik artic sku good ware isbn asin track movie song book 商品 产品 상품',
  'title': 'title titel titre titul titol bezeichn 商品名 品名 名称 标题 상품명',
  'description': 'desc beschreib omschrij 説明 描述 介绍 설명',
}
_DATE = rf'\s*(\d{{4}}-\d{{2}}-\d{{2}}|{times.DAY_FIRST})'
# Dates, and unix times of the years 1995 to 2033 in any unit: other numbers may be ids.
_TIME = rf'{_DATE}|\s*(1\d{{9}}|[89]\d{{8}})(\.\d*|\d{{3}}|\d{{6}}|\d{{9}})?\s*$'
_PICTURE = rf'(?i).*({"|".join(map(re.escape, items.PICTURES))})(\?|$)'
_ROWS = 5000  # Rows at the start of a table whose values are looked at.
_FEWEST_IDS = 10  # A column with fewer different values holds kinds or quantities.
_LONG = 60  # Characters of a usual description.
# Chinese, Japanese and Korean: one of these characters says about as much as three letters.
_SIGN = r'[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]'


class Guess(NamedTuple):
  """A guess.

  Attributes:
    flags: flags of the build by name; one without a value has '' or True.
    notes: one sentence about each column that plays a role.
  """

  flags: dict[str, str | bool]
  notes: list[str]


class _Sample(NamedTuple):
  """The first rows of a table as texts, by column.

  Attributes:
    path: the file.
    columns: the values of each column.
    delimiter: character between columns of a text file.
    width: number of its columns, those included that have no name.
  """

  path: Path
  columns: dict[str, list[str]]
  delimiter: str | None = None
  width: int = 0

  def filled(self, name: str) -> float:
    """Returns the share of the fields of a column that say something."""
    values = self.columns[name]
    there = clean(pa.array(values, pa.string()), (MISSING,))
    return 1 - there.null_count / max(len(values), 1)

  def share(self, name: str, pattern: str) -> float:
    """Returns the share of the filled fields of a column that a pattern matches."""
    filled = [value for value in self.columns[name] if value]
    return sum(bool(re.match(pattern, value)) for value in filled) / max(len(filled), 1)


def guess(
  orders: Path, goods: Path | None, given: Mapping[str, str | bool], has_pictures: bool = False
) -> Guess:
  """Guesses the flags of a build.

  Args:
    orders: the table of interactions, or a folder of its parts.
    goods: the item table, or None.
    given: flags that the user gave, which count.
    has_pictures: whether there is a folder of pictures of the items.

  Raises:
    InputError: a table cannot be read, or no column can be the user or the item.
  """
  files = interactions.with_rows(interactions.find(orders, {'items': goods}))
  found = _sample(files[0])
  goods_found = None if goods is None else _sample_items(goods)
  ids = set() if goods_found is None else _any_ids(goods_found)
  flags, notes = {}, []
  try:
    columns = _interaction_columns(found, ids, given)
  except InputError as error:
    interactions.check_one_table([tables.open_file(path) for path in files], given, error)
    raise
  for role, (name, why) in columns.items():
    notes.append(f'{role} = {name}{why}')
    if why:  # The build finds the others by itself.
      flags[f'{role}_column'] = name
  if 'where' not in given and (negative := _negative_quantities(files, found)):
    name, count, others = negative
    flags['where'] = f'{conditions.quoted(name)} > 0'
    note = f'{counted(count, "row")} with a negative {name} are left out, as they look like returns'
    notes.append(note + f', and {counted(others, "row")} where it is 0 or empty' * bool(others))
  flags |= given
  if goods_found is not None:
    item_column = flags.get('item_column') or columns['item'][0]
    more, about = _item_flags(goods_found, _values(files, item_column), given, has_pictures)
    flags |= more | given
    notes += about
  return Guess(flags, notes)


def _interaction_columns(
  found: _Sample, ids: set[str], given: Mapping[str, str | bool]
) -> dict[str, tuple[str, str]]:
  """Returns the column of each role, and why it was chosen if its name alone does not say it."""
  chosen: dict[str, tuple[str, str]] = {}
  for role in ('item', 'user', 'time'):
    if flag := given.get(f'{role}_column'):
      chosen[role] = flag, ''
      continue
    free = [name for name in found.columns if name not in (x for x, _ in chosen.values())]
    by_name = usual = column_names.find(role, free)
    if role != 'item':
      # Logs have a column for the ids of the few users that are signed in, and another for all.
      usual = column_names.find(role, [name for name in free if found.filled(name) > 0.5])
    if len(usual) == 1:
      empty = [name for name in by_name if name not in usual]
      chosen[role] = usual[0], f' ({", ".join(empty)}: mostly empty)' if empty else ''
    elif len(usual) > 1:
      rivals = usual if role == 'item' and ids else _without_names(usual)
      best = max(rivals, key=lambda name: _fit(role, found.columns[name], ids))
      others = [name for name in usual if name != best]
      chosen[role] = best, f' (rather than {", ".join(others)})'
    elif role != 'time' and found.delimiter and tables.looks_like_a_row([*found.columns]):
      way_out = tables.way_to_names(found.path, found.width, found.delimiter)
      raise InputError(
        f'{found.path}: the first line must name the columns; it says'
        f' {listed(list(found.columns))}; {way_out}'
      )
    elif candidate := _by_values(role, found, free, ids):
      chosen[role] = candidate
    elif by_name:
      chosen[role] = by_name[0], ''
    elif role != 'time':
      hint = f'say which it is: --{role}_column=NAME'
      if role == 'item' and (lists := [name for name in free if _is_of_lists(found, name)]):
        hint = f'{lists[0]} has lists: write a row for each of their entries'
      raise InputError(
        f'{found.path}: no column looks like the {role}; its columns are'
        f' {listed(list(found.columns))}; {hint}'
      )
  missing = [name for name, _ in chosen.values() if name not in (*found.columns, 'none')]
  if missing:
    raise InputError(
      f'{found.path}: no column {missing[0]!r}; its columns are {listed(list(found.columns))}'
    )
  return {role: chosen[role] for role in ('user', 'item', 'time') if role in chosen}


def _without_names(columns: Sequence[str]) -> list[str]:
  """Leaves out `customer` beside `customer_id`: several customers may have one name."""
  plain = {column_names.plain(name) for name in columns}
  return [name for name in columns if f'{column_names.plain(name)}id' not in plain]


def _fit(role: str, values: Sequence[str], ids: set[str]) -> float:
  """Says how well values fit a role, to choose between columns with usual names."""
  if role == 'item' and ids:
    return sum(value in ids for value in values)
  if role == 'time':
    return sum(bool(re.match(_TIME, value)) for value in values)
  return -len(set(values))  # Sessions and orders are more than users.


def _by_values(
  role: str, found: _Sample, free: Sequence[str], ids: set[str]
) -> tuple[str, str] | None:
  """Finds the column of a role by its values, or by a part of its name."""
  if role == 'time':
    times = [name for name in free if found.share(name, _TIME) > 0.95]
    # Numbers of orders and users may look like unix times.
    likely = lambda name: (found.share(name, _DATE), interactions.is_like_time(name))
    best = max(times, key=likely, default=None)
    return (best, ' (its values are times)') if best else None
  if role == 'item' and ids:
    for name in free:
      filled = [value for value in found.columns[name] if value]
      if filled and sum(value in ids for value in filled) > 0.5 * len(filled):
        return name, ' (the item table has its values)'
  candidates = [name for name in free if _may_be_ids(found, name)]
  for hint in _HINTS[role].split():
    for name in candidates:
      if hint in name.lower():
        return name, f' (its name has {hint!r} in it)'
  other = _HINTS['user' if role == 'item' else 'item'].split()
  left = [name for name in candidates if not any(hint in name.lower() for hint in other)]
  # Users come before items in most tables. Items are chosen first, while both are free.
  expected = 2 if role == 'item' and len(left) == len(candidates) else 1
  return (left[-1], ' (its values repeat)') if len(left) == expected else None


def _may_be_ids(found: _Sample, name: str) -> bool:
  values = [value for value in found.columns[name] if value]
  distinct = len(set(values))
  is_number = found.share(name, r'^-?\d*\.\d+$') > 0.5
  is_odd = is_number or found.share(name, _TIME) > 0.95 or _is_quantity(name)
  is_odd = is_odd or _is_of_lists(found, name)
  return not is_odd and _FEWEST_IDS <= distinct < 0.95 * len(values)


def _is_of_lists(found: _Sample, name: str) -> bool:
  return found.share(name, LIST) > 0.5


def _is_quantity(name: str) -> bool:
  return column_names.plain(name) in column_names.QUANTITIES.split()


def _values(files: Sequence[Path], name: str) -> set[str]:
  """Returns the distinct values of a column in all files, as texts."""
  found: set[str] = set()
  for path in files:
    table = arrow_columns.simplified(tables.read(tables.open_file(path), [name]), str(path))
    found.update(_texts(pc.unique(table[name]).to_pylist()))
  return found


def _negative_quantities(files: Sequence[Path], found: _Sample) -> tuple[str, int, int] | None:
  """Returns the column of quantities, its negative rows if there are some, and those with none."""
  for name in filter(_is_quantity, found.columns):
    negative, others = _not_positive(files, name)
    if negative:
      return name, negative, others
  return None


def _not_positive(files: Sequence[Path], name: str) -> tuple[int, int]:
  """Counts the negative numbers of a column, and its zeros and empty fields.

  Both are 0 if a file lacks the column or has other values in it.
  """
  negative = others = 0
  for file in map(tables.open_file, files):
    if name not in file.columns:
      return 0, 0
    numbers, odd = where.as_numbers(tables.read(file, [name])[name])
    if odd is not None:
      return 0, 0
    below = pc.sum(pc.less(numbers, 0)).as_py() or 0
    negative += below
    others += len(numbers) - below - (pc.sum(pc.greater(numbers, 0)).as_py() or 0)
  return negative, others


def _item_flags(
  found: _Sample, used: set[str], given: Mapping[str, str | bool], has_pictures: bool
) -> tuple[dict[str, str], list[str]]:
  """Guesses the columns of the item table, given ids of the interactions."""
  flags, chosen = {}, {}
  names = list(found.columns)
  cleanings = parse_cleanings(given.get('clean_ids'))
  cleaned = lambda values: set(clean(pa.array(values, pa.string()), cleanings).to_pylist())
  used = cleaned(used) - {None}
  overlap = {name: len(used & cleaned(found.columns[name])) for name in names}
  for role in column_names.ITEMS:
    flag = f'{role}_column'
    if flag in given:
      chosen[role] = given[flag]
      continue
    free = [name for name in names if name not in chosen.values()]
    usual = column_names.find(role, free)
    if role == 'item_id':
      best = max(free, key=overlap.get, default='')
      is_row = best in used or (usual != [best] and tables.looks_like_a_row(names))
      if is_row and found.delimiter:
        raise items.no_names(found.path, names, found.width, found.delimiter)
      if not overlap.get(best):
        for name in usual or names:
          if misspelled := hint_about_spelling(sorted(used), found.columns[name], cleanings):
            raise InputError(f'{found.path}: {misspelled}')
        raise InputError(
          f'{found.path}: none of its columns has the ids of the interactions, such as'
          f' {next(iter(sorted(used)))!r}; its columns are {listed(names)}'
        )
      chosen[role] = best
      if usual != [best]:
        flags[flag] = best
    elif usual:
      chosen[role] = usual[0]
      if len(usual) > 1:
        flags[flag] = usual[0]
  beside = lambda name: name.rpartition('.')[0] == chosen['item_id'].rpartition('.')[0]
  if tables.kind(found.path) in json_lines.KINDS:  # Other objects, such as hours, say little.
    names = [*filter(beside, names)]
  texts = {name: _mean_length(found.columns[name]) for name in names if _is_text(found, name)}
  for role, choose in (('title', min), ('description', max)):
    left = {name: length for name, length in texts.items() if name not in chosen.values()}
    free = {name: length for name, length in left.items() if _is_distinct(found.columns[name])}
    # Titles may repeat, too, such as those of a series, and descriptions may be short.
    hints = _HINTS[role].split()
    hinted = {name: left[name] for name in left if any(hint in name.lower() for hint in hints)}
    free = hinted or free
    name = choose(free, key=free.get, default=None)
    if role not in chosen and name and (role == 'title' or hinted or free[name] >= _LONG):
      chosen[role] = flags[f'{role}_column'] = name
  if has_pictures and 'image' not in chosen:
    # A folder alone is enough if its files have the ids of the items as their names.
    pictures = [name for name in names if found.share(name, _PICTURE) > 0.8]
    if pictures and pictures[0] not in chosen.values():
      chosen['image'] = flags['image_column'] = pictures[0]
  more = [x for x in texts if x not in chosen.values() and not _is_distinct(found.columns[x])]
  more = [x for x in more if x.split(',') == [x.strip()]]  # The flag is split at commas.
  if more and 'text_columns' not in given:
    flags['text_columns'] = ','.join(more)
  notes = [f'{role} of an item = {name}' for role, name in chosen.items()]
  if more:
    notes.append(f'appended to the description: {", ".join(more)}')
  if len(used) > (known := overlap.get(chosen['item_id'], 0)):
    flags['partial_items'] = ''
    missing = counted(len(used) - known, 'item')
    notes.append(f'{missing} without a row in the item table stay, without texts')
  return flags, notes


def _is_text(found: _Sample, name: str) -> bool:
  """Tells whether a column holds words rather than numbers, codes, URLs, files or JSON."""
  words = rf'(?!https?://)(?!\[?{{)(?!.*\.(jpe?g|png|webp|gif)$).*([^\W\d_]{{3}}|{_SIGN})'
  return found.share(name, words) > 0.8


def _is_distinct(values: Iterable[str]) -> bool:
  values = [value for value in values if value]
  return len(set(values)) > 0.5 * len(values)


def _mean_length(values: Iterable[str]) -> float:
  lengths = [len(re.sub(_SIGN, 'abc', value)) for value in values if value]
  return float(np.mean(lengths)) if lengths else 0.0


def _any_ids(found: _Sample) -> set[str]:
  """Returns the values of the columns that may hold the ids of the item table."""
  usual = column_names.find('item_id', found.columns)
  distinct = [name for name, x in found.columns.items() if len(set(x)) == len(x)]
  return {value for name in (usual or distinct) for value in found.columns[name] if value}


def _sample(path: Path) -> _Sample:
  """Reads the first rows of a file of interactions."""
  file = tables.open_file(path)
  names = _clear_names(file.columns)
  if file.delimiter is None:
    batch = next(tables.record_batches(file, names), None)
    if batch is None:
      raise tables.no_rows(path)
    table = pa.Table.from_batches([batch]).slice(0, _ROWS)
  else:
    parts = tables.batches(file, names)
    table = next(parts).slice(0, _ROWS)
    for _ in parts:  # Read without keeping them, so that a damaged row is named before the build.
      pass
  columns = {name: _texts(table[name].to_pylist()) for name in names}
  return _Sample(path, columns, file.delimiter, len(file.columns))


def _sample_items(path: Path) -> _Sample:
  """Reads an item table."""
  table = items.open_table(path)
  names = _clear_names(table.columns)
  rows = [row for _, row in table.rows(names)]
  columns = {name: _texts([row.get(name) for row in rows]) for name in names}
  return _Sample(path, columns, table.delimiter, len(table.columns))


def _clear_names(names: Sequence[str]) -> list[str]:
  """Leaves out the columns that a flag cannot name: those without a name, and with that of two."""
  return [name for name in names if name and names.count(name) == 1]


def _texts(values: Sequence[object]) -> list[str]:
  return [items.text(value) for value in values]

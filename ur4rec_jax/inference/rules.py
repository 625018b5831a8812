"""Rules of a shop, applied after scoring: filters, caps, diversity, boosts and pins.

One small TOML file declares them; docs/inference.md has an example. Needs only NumPy.

Filters and what a user has bought decide which items are ranked at all. The other rules choose
among the best of these, in this order: pins take their positions, boosts change scores, and the
rest of the list is filled one by one, without breaking a cap, by score and diversity. Exploration
draws the order of some lists.
"""

import csv
import dataclasses
import difflib
import functools
import operator
import os
import pathlib
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data import column_names, conditions
from ur4rec_jax.errors import InputError, counted
from ur4rec_jax.inference.exploration import Exploration

CANDIDATES = 128  # Best items among which rules choose; as many as the service ranks anyway.
LEAVE_OUT, KEEP, ONLY = BOUGHT = ('leave_out', 'keep', 'only')
_SHOWN = 3
_COMPARE = {
  '==': operator.eq,
  '=': operator.eq,
  '!=': operator.ne,
  '<>': operator.ne,
  '<': operator.lt,
  '<=': operator.le,
  '>': operator.gt,
  '>=': operator.ge,
}
_NUMBER, _WHOLE, _TEXT = (int, float), (int,), (str,)
_EXPECTED = {_NUMBER: 'a number', _WHOLE: 'a whole number', _TEXT: 'text in quotes'}
# Fields of the file and of the tables in it: the types of a value, and whether it must be there.
_FIELDS = {
  '': {'attributes': (_TEXT, False), 'id_column': (_TEXT, False), 'bought': (_TEXT, False)},
  'filter': {'where': (_TEXT, True)},
  'cap': {'attribute': (_TEXT, True), 'most': (_WHOLE, True)},
  'boost': {'where': (_TEXT, True), 'add': (_NUMBER, True)},
  'pin': {'item': (_TEXT, True), 'position': (_WHOLE, True)},
  'diversity': {'strength': (_NUMBER, True)},
  'exploration': {
    'share': (_NUMBER, True),
    'temperature': (_NUMBER, False),
    'items': (_WHOLE, False),
  },
}


class Filter(NamedTuple):
  """A filter: the condition, and `[items + 1]` bool: whether an item meets it."""

  where: str
  allowed: np.ndarray


class Cap(NamedTuple):
  """A cap.

  Attributes:
    attribute: name of the attribute.
    most: the most items with the same value in a list.
    values: `[items + 1]` the values of each item, which may be several.
  """

  attribute: str
  most: int
  values: Sequence[tuple[str, ...]]


class Boost(NamedTuple):
  """A boost: the condition, `[items + 1]` bool: whether an item meets it, and the added score."""

  where: str
  holds: np.ndarray
  add: float


class Pick(NamedTuple):
  """An item of a list that rules made.

  Attributes:
    item: its number.
    at: its index among the candidates, -1 for an item that is none of them.
    reasons: the rules that put it here, in words.
    propensity: the probability with which the item is shown at its position; None without
      exploration, where the list is certain.
  """

  item: int
  at: int
  reasons: list[str]
  propensity: float | None = None


class Choice(NamedTuple):
  """The list that rules made from the candidates of a user.

  Attributes:
    picks: the list, the best item first.
    is_final: whether more candidates would change nothing.
    notes: remarks for the reader, such as why the list is short.
  """

  picks: list[Pick]
  is_final: bool
  notes: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
  """The rules of a file for the items of a catalogue; see `load`.

  Attributes:
    filters: the filters, all of which an item must meet.
    caps: the caps.
    boosts: the boosts; an item may get several.
    pins: item number by position, from 1.
    pin_names: original id of these items by number.
    diversity: 0 sorts by score alone, 1 by difference from the items before alone.
    bought: whether items of the user's history are left out, kept or the only ones; None does as
      the query says.
    exploration: how some lists are drawn; None for none.
  """

  filters: Sequence[Filter] = ()
  caps: Sequence[Cap] = ()
  boosts: Sequence[Boost] = ()
  pins: Mapping[int, int] = dataclasses.field(default_factory=dict)
  pin_names: Mapping[int, str] = dataclasses.field(default_factory=dict)
  diversity: float = 0.0
  bought: str | None = None
  exploration: Exploration | None = None

  def allowed(self, num_items: int) -> np.ndarray | None:
    """Returns `[num_items + 1]` bool, the items that pass all filters; None without filters.

    Items that were added to the catalogue after `load` do not pass.
    """
    passed = self._passed
    if passed is None or len(passed) == num_items + 1:
      return passed
    return np.pad(passed, (0, num_items + 1 - len(passed)))

  @functools.cached_property
  def _passed(self) -> np.ndarray | None:
    return np.all([x.allowed for x in self.filters], axis=0) if self.filters else None

  def candidates(self, k: int) -> int:
    """Returns how many of the best items `choose` should get for a list of k."""
    chooses = self.caps or self.boosts or self.diversity or self.pins or self.exploration
    return max(k, CANDIDATES) if chooses else k

  def choose(
    self,
    items: np.ndarray,
    scores: np.ndarray,
    k: int,
    is_allowed: Callable[[int], bool],
    vectors: Callable[[], np.ndarray] | None = None,
    available: int | None = None,
  ) -> Choice:
    """Makes the list of a user.

    Args:
      items: `[candidates]` item numbers, the best first.
      scores: `[candidates]` their scores, -inf where no item is left.
      k: length of the list.
      is_allowed: whether the user may get an item, which pins must be, too.
      vectors: returns `[items + 1, width]` vectors of length 1, whose inner products are the
        similarities of items; only diversity needs it.
      available: number of items that the user may get, all of which may be candidates.
    """
    count = int(np.isfinite(scores).sum())
    is_all = count < len(items) or count == available
    items, scores = items[:count], scores[:count]
    boosted = self._boosted(items, scores)
    if self.exploration is not None:
      return self._explored(items, scores, boosted, k, is_all)
    pins, notes = self._pins(k, is_allowed)
    counts = [Counter() for _ in self.caps]
    for item in pins.values():
      self._count(counts, item)
    pinned, wanted = set(pins.values()), max(k - len(pins), 0)
    order = _by_score(boosted)
    if self.diversity and count:
      order = _by_difference(boosted, self.diversity, vectors(), items, list(pins.values()))
    chosen: list[int] = []
    capped, numbers = 0, items.tolist()
    for at in order:
      if len(chosen) == wanted:
        break
      if numbers[at] in pinned:
        continue
      if not self._fits(counts, numbers[at]):
        capped += 1
        continue
      self._count(counts, numbers[at])
      chosen.append(at)
      if self.diversity:
        order.send(at)  # Later items should differ from this one.
    picks = self._joined(numbers, chosen, pins, k)
    is_final = is_all or self._is_final(len(chosen) == wanted, scores, boosted[chosen])
    if len(picks) < k:
      notes += self._why_short(len(picks), capped, is_all, count)
    return Choice(picks, is_final, notes)

  def _explored(
    self, items: np.ndarray, scores: np.ndarray, boosted: np.ndarray, k: int, is_all: bool
  ) -> Choice:
    by_score = np.argsort(-boosted, kind='stable')
    order, propensities, is_drawn = self.exploration.draw(boosted[by_score], k)
    picks = [
      Pick(item := int(items[at]), int(at), ['drawn'] * is_drawn + self._gains(item), float(p))
      for at, p in zip(by_score[order], propensities, strict=True)
    ]
    chosen = boosted[by_score[: max(k, self.exploration.items)]]
    is_final = is_all or self._is_final(len(picks) == k, scores, chosen)
    notes = self._why_short(len(picks), 0, is_all, len(items)) if len(picks) < k else []
    return Choice(picks, is_final, notes)

  def _boosted(self, items: np.ndarray, scores: np.ndarray) -> np.ndarray:
    total = scores.astype(np.float64)
    for boost in self.boosts:
      # Items that were added to the catalogue after `load` get no boost.
      known = np.minimum(items, len(boost.holds) - 1)
      total += boost.add * (boost.holds[known] & (known == items))
    return total

  def _pins(self, k: int, is_allowed: Callable[[int], bool]) -> tuple[dict[int, int], list[str]]:
    pins, notes = {}, []
    for position, item in sorted(self.pins.items()):
      if position > k:
        continue
      if is_allowed(item):
        pins[position] = item
      else:
        name = self.pin_names[item]
        notes.append(f'{name} is pinned to position {position}, but a filter leaves it out')
    return pins, notes

  def _fits(self, counts: Sequence[Counter], item: int) -> bool:
    return all(
      counts[i][value] < cap.most
      for i, cap in enumerate(self.caps)
      for value in _values_of(cap, item)
    )

  def _count(self, counts: Sequence[Counter], item: int) -> None:
    for i, cap in enumerate(self.caps):
      counts[i].update(_values_of(cap, item))

  def _joined(
    self, numbers: Sequence[int], chosen: Sequence[int], pins: Mapping[int, int], k: int
  ) -> list[Pick]:
    """Puts the pins at their positions, or at the end of a list that is too short."""
    others, waiting, picks = iter(chosen), dict(pins), []
    other = next(others, None)
    while len(picks) < k and (other is not None or waiting):
      position = len(picks) + 1
      if position in waiting or other is None:
        position = position if position in waiting else min(waiting)
        item = waiting.pop(position)
        at = numbers.index(item) if item in numbers else -1
        picks.append(Pick(item, at, [f'pinned to position {position}', *self._gains(item)]))
      else:
        picks.append(Pick(numbers[other], other, self._gains(numbers[other])))
        other = next(others, None)
    return picks

  def _gains(self, item: int) -> list[str]:
    """Says which boosts an item gets."""
    return [f'score {x.add:+g}: {x.where}' for x in self.boosts if x.holds[item : item + 1].any()]

  def _is_final(self, is_full: bool, scores: np.ndarray, chosen: np.ndarray) -> bool:
    """Tells whether no item beyond the candidates can enter the list."""
    if not is_full:
      return False
    if self.diversity or not len(chosen):
      return True  # Diversity is defined among the candidates.
    return bool(scores[-1] + sum(max(boost.add, 0) for boost in self.boosts) <= chosen.min())

  def _why_short(self, found: int, capped: int, is_all: bool, count: int) -> list[str]:
    reasons = []
    if self.filters:
      passed = int(self._passed.sum())
      wheres = ' and '.join(x.where for x in self.filters)
      reasons.append(f'{counted(passed, "item")} of the catalogue meet {wheres}')
    if self.bought == ONLY:
      reasons.append('only items of the history count')
    elif self.bought == LEAVE_OUT:
      reasons.append('items of the history are left out')
    if capped:
      caps = ', '.join(f'{cap.most} of one {cap.attribute}' for cap in self.caps)
      reasons.append(f'{counted(capped, "item")} would exceed a cap ({caps})')
    if not is_all:
      reasons.append(f'only the best {counted(count, "item")} were looked at')
    why = '; '.join(reasons) or 'no other item is left'
    return [f'{"nothing is" if not found else f"only {found} are"} recommended: {why}']


def _by_score(scores: np.ndarray) -> Iterator[int]:
  yield from np.argsort(-scores, kind='stable').tolist()


def _by_difference(
  scores: np.ndarray, strength: float, vectors: np.ndarray, items: np.ndarray, pins: list[int]
) -> Generator[int, int | None, None]:
  """Yields candidates by maximal marginal relevance: score minus similarity to the list so far.

  Args:
    scores: `[candidates]`.
    strength: 0 sorts by score alone, 1 by difference alone.
    vectors: `[items + 1, width]` of length 1.
    items: `[candidates]` item numbers.
    pins: item numbers that are in the list already. The caller sends back a candidate that joins
      the list.
  """
  low, high = scores.min(), scores.max()
  relevance = (1 - strength) * (scores - low) / max(high - low, 1e-9)
  item_vectors, nearest = vectors[items], np.zeros(len(items))
  for item in pins:
    nearest = np.maximum(nearest, item_vectors @ vectors[item])
  value = relevance - strength * nearest
  for _ in range(len(items)):
    at = int(value.argmax())
    if (yield at) is not None:
      yield at  # The result of `send`, which is not used.
      nearest = np.maximum(nearest, item_vectors @ item_vectors[at])
    relevance[at] = -np.inf
    value = relevance - strength * nearest


def _values_of(cap: Cap, item: int) -> tuple[str, ...]:
  return cap.values[item] if item < len(cap.values) else ()


def load(path: str | pathlib.Path, item_ids: Sequence[str]) -> Rules:
  """Reads a file of rules for a catalogue.

  Args:
    path: the TOML file.
    item_ids: `[items]` original ids of the catalogue.

  Raises:
    InputError: the file cannot be read, or a rule is wrong; the message names the rule.
  """
  path = pathlib.Path(path)
  try:
    found = tomllib.loads(path.read_text(encoding='utf-8-sig'))
  except (OSError, ValueError, RecursionError) as error:  # Also a number of more than 4,300 digits.
    raise InputError(f'--rules={path}: cannot be read ({error}); correct it') from error
  return make(found, path, item_ids)


def make(found: Mapping[str, Any], path: pathlib.Path, item_ids: Sequence[str]) -> Rules:
  """Builds the rules of a catalogue from the tables of a file.

  Args:
    found: the tables as TOML has them.
    path: the file; a table of attributes lies relative to its folder.
    item_ids: `[items]` original ids of the catalogue.

  Raises:
    InputError: a rule is wrong; the message names it.
  """
  tables = {name: _checked(path, name, found) for name in _FIELDS}
  for name in found:
    if name not in _FIELDS and name not in _FIELDS['']:
      near = difflib.get_close_matches(name, [*_FIELDS, *_FIELDS['']], n=1)
      hint = f'; did you mean {near[0]}?' if near and near[0] else '.'
      raise InputError(f'{path}: {name} is no rule{hint} The rules are {", ".join(_FIELDS)[2:]}')
  (general,) = tables['']
  bought = general.get('bought')
  if bought not in (None, *BOUGHT):
    raise InputError(f'{path}: bought={bought!r} must be one of {", ".join(BOUGHT)}')
  attributes = _Attributes(path, general, item_ids)
  filters = [Filter(x['where'], attributes.holds(x['where'])) for x in tables['filter']]
  boosts = [Boost(x['where'], attributes.holds(x['where']), x['add']) for x in tables['boost']]
  caps = []
  for cap in tables['cap']:
    if cap['most'] < 0:
      raise InputError(f'{path}: cap of {cap["attribute"]}: most={cap["most"]} must be 0 or more')
    caps.append(Cap(cap['attribute'], cap['most'], attributes.values(cap['attribute'])))
  strength = tables['diversity'][0]['strength'] if tables['diversity'] else 0.0
  if not 0 <= strength <= 1:
    raise InputError(f'{path}: diversity: strength={strength} must be from 0 to 1')
  pins = _read_pins(path, tables['pin'], item_ids)
  names = {item: item_ids[item - 1] for item in pins.values()}
  exploration = _read_exploration(path, tables['exploration'])
  rules = Rules(filters, caps, boosts, pins, names, strength, bought, exploration)
  if exploration and (caps or pins or strength):
    raise InputError(
      f'{path}: exploration goes with filters, boosts and bought alone: with caps, pins or'
      ' diversity the probability of a list could not be logged'
    )
  _check_pins(path, rules)
  return rules


def _checked(path: pathlib.Path, name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the tables of a name, whose fields have the right types."""
  rows = [{key: found[key] for key in _FIELDS[''] if key in found}] if not name else found.get(name)
  rows = [] if rows is None else [rows] if isinstance(rows, dict) else rows
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise InputError(f'{path}: {name} must be written as [[{name}]]')
  if name in ('diversity', 'exploration') and len(rows) > 1:
    raise InputError(f'{path}: {name} may be there once')
  for row in rows:
    where = f'{path}: {name}' if name else str(path)
    for key in row:
      if key not in _FIELDS[name]:
        raise InputError(f'{where} has no field {key}; it has {", ".join(_FIELDS[name])}')
    for key, (types, is_needed) in _FIELDS[name].items():
      value = row.get(key)
      if value is None and is_needed:
        raise InputError(f'{where} needs the field {key}')
      if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
        raise InputError(f'{where}: {key}={value!r} must be {_EXPECTED[types]}')
      # TOML has whole numbers of any size.
      if types is _NUMBER and value is not None and not abs(value) <= sys.float_info.max:
        raise InputError(f'{where}: {key}={value!r:.80} must be finite')
  return rows


def _read_exploration(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> Exploration | None:
  if not rows:
    return None
  found = Exploration(**rows[0])
  for name, is_right, limits in (
    ('share', 0 < found.share <= 1, 'above 0 and at most 1'),
    ('temperature', 0 < found.temperature <= 100, 'above 0 and at most 100'),
    ('items', 2 <= found.items <= CANDIDATES, f'from 2 to {CANDIDATES}'),
  ):
    if not is_right:
      raise InputError(f'{path}: exploration: {name}={getattr(found, name)} must be {limits}')
  return found


def _read_pins(
  path: pathlib.Path, rows: Sequence[Mapping[str, Any]], item_ids: Sequence[str]
) -> dict[int, int]:
  numbers = {name: i for i, name in enumerate(item_ids, 1)} if rows else {}
  pins: dict[int, int] = {}
  for row in rows:
    item, position = row['item'], row['position']
    if item not in numbers:
      raise InputError(f'{path}: pin: {item!r} is not in the catalogue; correct it')
    if position < 1 or position in pins or numbers[item] in pins.values():
      raise InputError(
        f'{path}: pin of {item!r}: each item and each position from 1 on may be pinned once'
      )
    pins[position] = numbers[item]
  return pins


def _check_pins(path: pathlib.Path, rules: Rules) -> None:
  """Raises an InputError if the pins alone exceed a cap, because then no list can keep both."""
  for cap in rules.caps:
    counts = Counter(value for item in rules.pins.values() for value in cap.values[item])
    for value, count in counts.items():
      if count > cap.most:
        raise InputError(
          f'{path}: {count} pins have {cap.attribute} {value!r}, more than its cap of {cap.most}'
        )


class _Attributes:
  """The attributes of the items, from a table of goods."""

  def __init__(self, path: pathlib.Path, general: Mapping[str, Any], item_ids: Sequence[str]):
    """Reads the table, if the rules name one.

    Args:
      path: the file of rules, to whose folder the table's path is relative.
      general: the fields of the file that are in no table.
      item_ids: `[items]` original ids.
    """
    self._path, self._ids = path, item_ids
    self._rows: dict[str, dict[str, str]] = {}
    self._columns = ['item']
    self._has_decimal_commas = False
    if 'attributes' not in general:
      return
    table = path.parent / os.path.expanduser(general['attributes'])
    try:
      with table.open(encoding='utf-8-sig', newline='') as file:
        delimiter = '\t'
        if table.suffix not in ('.tsv', '.tab'):
          delimiter = column_names.delimiter_of(file.readline(), ',')
        file.seek(0)
        self._has_decimal_commas = delimiter == ';'
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        self._columns += [name for name in reader.fieldnames or () if name]
        column = self._id_column(table, general.get('id_column'))
        known = set(item_ids)
        for row in reader:
          # A catalogue has blanks around its ids only if its own tables had them.
          name = row[column] if row[column] in known else (row[column] or '').strip()
          if name in self._rows:
            raise InputError(
              f'{table}, line {reader.line_num}: item {name!r:.80} is in the table twice; remove'
              ' one of the two'
            )
          if name:
            self._rows[name] = row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
      raise InputError(
        f'{path}: attributes: {table} must be a CSV or TSV file ({error}); correct it'
      ) from error

  def _id_column(self, table: pathlib.Path, wanted: str | None) -> str:
    names = self._columns[1:]
    usual = [wanted] if wanted in names else column_names.find('item_id', names)
    if not usual or (wanted is not None and wanted not in names):
      raise InputError(
        f'{table}: no column {wanted or "of ids"}; its columns are {", ".join(names)}; set'
        ' id_column in the rules'
      )
    return usual[0]

  def _column(self, name: str) -> list[str]:
    """Returns `[items]` the values of an attribute, '' for none."""
    if name not in self._columns:
      near = difflib.get_close_matches(name, self._columns, n=1)
      hint = f'did you mean {near[0]}?' if near else f'known are {", ".join(self._columns)}'
      raise InputError(f'{self._path}: no attribute {name!r}; {hint}')
    return [(self._rows.get(item, {}).get(name) or '').strip() for item in self._ids]

  def values(self, name: str) -> list[tuple[str, ...]]:
    """Returns `[items + 1]` the values of an attribute, which `|` separates."""
    if name == 'item':  # An id may have a `|` in it.
      return [(), *((item,) for item in self._ids)]
    parts = [tuple(filter(None, map(str.strip, x.split('|')))) for x in self._column(name)]
    return [(), *map(tuple, map(dict.fromkeys, parts))]

  def holds(self, where: str) -> np.ndarray:
    """Returns `[items + 1]` bool, the items that meet a condition; empty values meet none."""
    found = np.ones(len(self._ids) + 1, bool)
    for comparison in conditions.parse(where, f'{self._path}: where'):
      compare, wanted = _COMPARE[comparison.operator], comparison.value
      # One of several values is enough, but `!=` says that the item has no such value.
      enough = all if compare is operator.ne else any
      values: Sequence[Sequence[Any]] = self.values(comparison.column)
      if not isinstance(wanted, str):
        values = [
          [self._number(x, item, comparison) for x in own]
          for item, own in zip(('', *self._ids), values, strict=True)
        ]
      found &= [bool(own) and enough(compare(x, wanted) for x in own) for own in values]
    return found

  def _number(self, value: str, item: str, comparison: conditions.Comparison) -> float:
    number = value.replace(',', '.') if self._has_decimal_commas else value
    if not _is_number(number):
      raise InputError(
        f'{self._path}: {comparison.column} of {item!r} is {value!r}, which cannot be compared'
        f' with the number {comparison.value}'
      )
    return float(number)


def _is_number(text: str) -> bool:
  try:
    return bool(np.isfinite(float(text)))
  except ValueError:
    return False

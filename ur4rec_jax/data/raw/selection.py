"""Chooses rows of the user's own interactions by `--where` and by the kinds of events."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data import column_names, conditions
from ur4rec_jax.data.raw import events, where
from ur4rec_jax.data.raw.records import Place, Raw
from ur4rec_jax.data.raw.texts import listed
from ur4rec_jax.errors import InputError

# Names of columns that are worth a look although they play no role, spelled as in `column_names`.
_QUANTITIES = (
  f'{column_names.QUANTITIES} amount number orderedquantity quantityordered itemquantity'
)
_EVENTS = (
  'event eventtype eventname eventkind action actiontype behavior behaviour behaviortype'
  ' behaviourtype interaction interactiontype activity activitytype'
)
_MOST_KINDS = 12  # A column with more different values does not hold kinds of events.
_MOST_COLUMNS = 12  # Ignored columns that a note lists.
_WEIGHT = 'weight of the event'


class Selection:
  """Takes the wanted rows of tables, one after the other, and remembers where they were.

  Attributes:
    uses: name of each column to read, and its use, for messages.
    columns: name of the column of each role in the tables of `take`.
  """

  def __init__(
    self,
    path: str,
    columns: Mapping[str, str],
    names: Sequence[Sequence[str]],
    options: Mapping[str, Any],
  ):
    """Decides what to read.

    Args:
      path: the first file, for messages.
      columns: name of the column of each role.
      names: names of the columns of each file.
      options: all flags of the source.

    Raises:
      InputError: a flag is wrong.
    """
    self._conditions = conditions.parse(options['where'])
    where.check_columns(self._conditions, names[0], path)
    self._weights = events.parse_weights(options['event_weights'])
    self._event = columns.get('event')
    if self._weights and self._event is None:
      raise InputError('--event_weights: needs --event_column, the column of the kinds of events')
    if self._event is not None and 'rating' in columns:
      raise InputError(
        f'{path}: the weight of an event is stored as its rating, and {columns["rating"]} is the'
        ' rating already; pass --rating_column=none, or leave --event_column out'
      )
    self.columns = {role: name for role, name in columns.items() if role != 'event'}
    if self._event is not None:
      self.columns['rating'] = _WEIGHT
    self.uses = {name: f'the {role}' for role, name in columns.items()}
    self.uses |= {c.column: 'of --where' for c in self._conditions if c.column not in self.uses}
    self._ignored = [name for name in dict.fromkeys(names[0]) if name not in self.uses]
    # Only columns that are once in every file are worth a look.
    common = [name for name in self._ignored if all([*of].count(name) == 1 for of in names)]
    named = lambda usual: [name for name in common if column_names.plain(name) in usual.split()]
    self._negative = dict.fromkeys(named(_QUANTITIES), 0)
    self._kinds = {name: Counter() for name in named(_EVENTS) if self._event is None}
    self.uses |= dict.fromkeys((*self._negative, *self._kinds), 'a column to look at')
    self._dropped: Counter[str] = Counter()
    self._dropped_users: dict[str, set[str]] = {'event_weights': set(), 'where': set()}
    self._event_counts: Counter[str] = Counter()
    self._parts: list[tuple[Callable[[int], Place], np.ndarray | None]] = []
    self._ends: list[int] = []

  @property
  def looked_at(self) -> set[str]:
    """Names of the columns that are read only to say something about them."""
    return {*self._negative, *self._kinds}

  @property
  def takes_all(self) -> bool:
    """Whether all rows are wanted, and no column is read but those of users, items and so on."""
    return not (self._conditions or self._event or self.looked_at)

  def take(self, table: pa.Table, place: Callable[[int], Place]) -> pa.Table:
    """Returns the wanted rows of a table with the columns `uses`.

    Args:
      table: the next table.
      place: finds the position of one of its rows.

    Raises:
      InputError: a value cannot be compared as `--where` asks.
    """
    self._look(table)
    position = lambda row: str(place(row))
    is_kept = where.holds(self._conditions, table, position)
    self._drop('where', ~is_kept, table)
    if self._event is not None:
      weights = events.weights_of(table[self._event], self._weights)
      self._drop('event_weights', is_kept & np.isnan(weights), table)
      is_kept &= ~np.isnan(weights)
      table = table.append_column(_WEIGHT, pa.array(weights))
    rows = None if is_kept.all() else np.flatnonzero(is_kept)
    if rows is not None:
      table = table.filter(pa.array(is_kept))
    self._parts.append((place, rows))
    self._ends.append((self._ends[-1] if self._ends else 0) + table.num_rows)
    return table

  def _drop(self, reason: str, is_dropped: np.ndarray, table: pa.Table) -> None:
    """Counts the rows that a flag leaves out, and keeps their users."""
    self._dropped[reason] += int(is_dropped.sum())
    users = table[self.columns['user']].filter(pa.array(is_dropped)).unique()
    self._dropped_users[reason].update(filter(None, users.cast(pa.string()).to_pylist()))

  def locate(self, row: int) -> Place:
    """Finds the position of a row, counted over all tables that `take` returned."""
    part = int(np.searchsorted(self._ends, row, side='right'))
    place, rows = self._parts[part]
    row -= self._ends[part - 1] if part else 0
    return place(row if rows is None else int(rows[row]))

  def check(self) -> None:
    """Checks the weights of events against the kinds in all tables."""
    if self._event is not None:
      events.check(self._weights, self._event_counts, self._event)

  def note(self, raw: Raw) -> Raw:
    """Adds what was left out, and hints about the other columns."""
    dropped = {reason: count for reason, count in self._dropped.items() if count}
    kept = set(pa.array(raw.users).dictionary.to_pylist())
    # A user whose rows two flags leave out is named with the first.
    dropped_users = {reason: sorted(users - kept) for reason, users in self._dropped_users.items()}
    return raw._replace(
      dropped={**dropped, **raw.dropped},
      dropped_users=dropped_users,
      hints=(*self._hints(), *raw.hints),
    )

  def _look(self, table: pa.Table) -> None:
    for name in self._negative:
      numbers, odd = where.as_numbers(table[name])
      if odd is None:
        self._negative[name] += pc.sum(pc.less(numbers, 0.0)).as_py() or 0
    for name, counts in self._kinds.items():
      if len(counts) <= _MOST_KINDS:
        counts.update(events.count_kinds(table[name]))
    if self._event is not None:
      self._event_counts.update(events.count_kinds(table[self._event]))

  def _hints(self) -> list[str]:
    hints = []
    if self._ignored:
      hints.append(f'ignored columns: {listed(self._ignored, _MOST_COLUMNS)}')
    for name, count in self._negative.items():
      if count:
        hints.append(
          f'{name} is negative in {count:,} rows, which count as interactions; if they are returns,'
          f" leave them out: --where='{conditions.quoted(name)} > 0'"
        )
    for name, counts in self._kinds.items():
      if 1 < len(counts) <= _MOST_KINDS:
        hints.append(
          f'{name} has the kinds {events.shown(counts)}, which all count alike; to tell them apart'
          f' pass --event_column={name} {events.example(counts)}'
        )
    return hints

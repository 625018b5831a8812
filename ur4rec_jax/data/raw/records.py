"""What the readers of raw data return: interactions as columns, and metadata of items."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ur4rec_jax.errors import InputError

Where = Callable[[int], str]  # Names the place of a row, for messages.


class NoRows(InputError):
  """No row of the raw data is of use: there is none, the settings leave all out, or all are known.

  A build cannot go on without rows. A quiet day, of which `build_dataset --append` is told, has
  none either, and there that is no fault of the file.
  """


class Item(NamedTuple):
  """Metadata of one item; an empty value means unknown."""

  title: str = ''
  genres: tuple[str, ...] = ()
  description: str = ''
  image: bytes | Path | str | None = None  # Content of a picture, its file, or a URL.


class Place(NamedTuple):
  """Position of a row in the raw data, for messages; `unit` is `line`, `row` or the like."""

  path: str
  number: int
  unit: str = 'line'

  def __str__(self) -> str:
    return f'{self.path}, {self.unit} {self.number}'


class Raw(NamedTuple):
  """Interactions as columns, in file order, and the item table.

  Attributes:
    path: file of the rows, for messages.
    users: `[rows]` original ids, integers or strings.
    items: `[rows]` original ids, integers or strings.
    timestamps: `[rows]` int64, or None if rows are already in time order.
    ratings: `[rows]` float32 or None.
    lines: `[rows]` line numbers in `path` for messages, or a function that finds the position of a
      row.
    table: metadata by original id, or None.
    table_is_partial: whether items may be missing in the table.
    ticks_per_second: unit of `timestamps`; rows are sorted by ticks and stored in whole seconds.
    notes: notes for the user about how the data was read.
    read_items: reads the metadata of some items, with notes, if the table does not fit in memory.
    hints: what may be wrong with the data, for the user; no part of the identity of the dataset.
    dropped: number of rows that reading left out, by reason.
    dropped_users: original ids of the users without a row that was left, by reason.
    keep_cold_items: whether the items of `table` without interactions belong to the catalogue.
  """

  path: str
  users: np.ndarray | pa.Array
  items: np.ndarray | pa.Array
  timestamps: np.ndarray | None
  ratings: np.ndarray | None
  lines: np.ndarray | Callable[[int], Place]
  table: dict[str, Item] | None = None
  table_is_partial: bool = False
  ticks_per_second: int = 1
  notes: tuple[str, ...] = ()
  read_items: Callable[[list[str]], tuple[dict[str, Item], list[str]]] | None = None
  hints: tuple[str, ...] = ()
  dropped: Mapping[str, int] = MappingProxyType({})
  dropped_users: Mapping[str, list[str]] = MappingProxyType({})
  keep_cold_items: bool = False

  def where(self, *rows: int) -> str:
    """Names file and line of one or two rows."""
    find = self.lines if callable(self.lines) else self._line
    places = [find(int(row)) for row in rows]
    if len({place.path for place in places}) == 1:
      plural = 's' * (len(rows) > 1)
      numbers = ' and '.join(str(place.number) for place in places)
      return f'{places[0].path}, {places[0].unit}{plural} {numbers}'
    return ' and '.join(map(str, places))

  def _line(self, row: int) -> Place:
    return Place(self.path, int(self.lines[row]))

"""Gives each kind of event, such as view, cart and buy, a weight, which is stored as the rating."""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data.raw.texts import listed
from ur4rec_jax.errors import InputError

_MOST_SHOWN = 12  # Kinds in a message.


def parse_weights(text: str | None) -> dict[str, float]:
  """Reads `--event_weights`, such as `view=1,cart=3,buy=5`.

  Raises:
    InputError: a weight is no number above 0, or a kind is there twice.
  """
  weights: dict[str, float] = {}
  for part in (text or '').split(','):
    if not part.strip():
      continue
    kind, _, number = (piece.strip() for piece in part.rpartition('='))
    try:
      weight = float(number)
    except ValueError:
      weight = math.nan
    if not kind or not 0 < weight < math.inf or kind in weights:
      raise InputError(
        f'--event_weights={text}: {part.strip()!r} must be KIND=NUMBER, the number above 0 and each'
        ' kind once, such as view=1,cart=3,buy=5'
      )
    weights[kind] = weight
  return weights


def count_kinds(column: pa.ChunkedArray) -> Counter[str]:
  """Counts the rows of each kind; blanks around a kind are ignored, and an empty one is ''."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  counts = pc.value_counts(column).to_pylist()
  kinds: Counter[str] = Counter()
  for entry in counts:
    kinds[_name(entry['values'])] += entry['counts']
  return kinds


def weights_of(column: pa.ChunkedArray, weights: Mapping[str, float]) -> np.ndarray:
  """Looks the weight of each row up.

  Args:
    column: kinds of events.
    weights: weight of each kind.

  Returns:
    `[rows]` float32, NaN for a kind without a weight.
  """
  if not pa.types.is_dictionary(column.type):
    column = column.dictionary_encode()
  encoded = column.combine_chunks()
  if isinstance(encoded, pa.ChunkedArray):
    encoded = encoded.chunk(0)
  names = map(_name, encoded.dictionary.to_pylist())
  found = np.array([*(weights.get(name, math.nan) for name in names), math.nan], np.float32)
  return found[np.asarray(encoded.indices.fill_null(len(found) - 1)).astype(np.int64)]


def check(weights: Mapping[str, float], kinds: Counter[str], name: str) -> None:
  """Checks the weights against the kinds that occur.

  Args:
    weights: weight of each kind.
    kinds: number of rows of each kind.
    name: name of the column.

  Raises:
    InputError: there are no weights, or a kind with a weight does not occur.
  """
  if not weights:
    raise InputError(
      f'--event_column={name}: has the kinds {shown(kinds)}; say what each one weighs, such as'
      f' {example(kinds)}'
    )
  if missing := [kind for kind in weights if kind not in kinds]:
    raise InputError(
      f'--event_weights: no row of {name} is {missing[0]!r}; it has the kinds {shown(kinds)}'
    )


def shown(kinds: Counter[str]) -> str:
  """Formats kinds with their numbers of rows, the most frequent first."""
  return listed(
    [f'{kind or "(empty)"} ({count:,})' for kind, count in kinds.most_common()], _MOST_SHOWN
  )


def example(kinds: Counter[str]) -> str:
  """Returns `--event_weights` for the kinds, with rare ones weighing more."""
  names = [kind for kind, _ in kinds.most_common(_MOST_SHOWN) if kind]
  return '--event_weights=' + ','.join(f'{kind}={i}' for i, kind in enumerate(names, 1))


def _name(value: object) -> str:
  return '' if value is None else str(value).strip()

"""Histories in the forms that Python users have them, and answers as columns and DataFrames."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.errors import InputError
from ur4rec_jax.inference.query import Answer, Ids


class Histories(NamedTuple):
  """The histories of some users.

  Attributes:
    users: names of the users.
    items: one list of item ids per user.
    is_one: whether the caller gave a single user, so that the answer needs no column `user`.
  """

  users: Sequence[Any]
  items: Sequence[Ids]
  is_one: bool


def read_histories(history: Any) -> Histories:
  """Converts a list, a dict or a DataFrame to histories.

  Args:
    history: a list of item ids, a list of lists, a dict of lists by user, or a table of pandas,
      Polars or Arrow with the columns `user`, `item` and optionally `timestamp`.

  Raises:
    InputError: it has none of these forms.
  """
  if hasattr(history, 'to_pandas'):  # A table of Polars or Arrow.
    history = history.to_pandas()
  if hasattr(history, 'columns'):
    history = _histories_of_frame(history)
  if isinstance(history, Mapping):
    return Histories(list(history), list(history.values()), False)
  if isinstance(history, str | bytes) or not hasattr(history, '__iter__'):
    raise InputError(f'history: must be a list of item ids, not {history!r:.80}')
  history = list(history)
  if all(isinstance(x, str | int | float) or not hasattr(x, '__iter__') for x in history):
    return Histories([''], [history], True)
  return Histories(range(len(history)), history, False)


def _histories_of_frame(frame: Any) -> dict[Any, list]:
  """Turns a DataFrame with one row per interaction into histories by user."""
  missing = [name for name in ('user', 'item') if name not in frame.columns]
  if missing:
    raise InputError(
      f'history: the DataFrame has no column {missing[0]!r}, only {", ".join(map(str, frame))};'
      ' rename yours to user, item and, for the order, timestamp'
    )
  if 'timestamp' in frame.columns:
    frame = frame.sort_values('timestamp', kind='stable')
  return frame.groupby('user', sort=False)['item'].agg(list).to_dict()


def columns(answer: Answer, share_names: Sequence[str]) -> dict[str, Any]:
  """Returns an answer as flat columns, one user after the other.

  Args:
    answer: the answer.
    share_names: names of the columns of shares.
  """
  shares = np.concatenate([np.zeros((0, len(share_names)), np.float32), *answer.shares])
  reasons = ['; '.join(pick.reasons) for choice in answer.choices for pick in choice.picks]
  return {
    'rank': [i for items in answer.items for i in range(1, len(items) + 1)],
    'item': [item for items in answer.items for item in items],
    'title': [title for titles in answer.titles for title in titles],
    'score': np.concatenate([np.zeros(0, np.float32), *answer.scores]),
    **{name: shares[:, i] for i, name in enumerate(share_names)},
    **({'rules': reasons} if answer.choices else {}),
  }


def to_frame(answer: Answer, share_names: Sequence[str], histories: Histories) -> Any:
  """Returns an answer as a pandas DataFrame with one row per user and item.

  Args:
    answer: the answer.
    share_names: names of the columns of shares.
    histories: the users of the answer.

  Raises:
    InputError: pandas is not installed.
  """
  try:
    import pandas as pd
  except ImportError as error:
    raise InputError('pandas is not installed; pip install pandas, or call .answer') from error
  found = columns(answer, share_names)
  if not histories.is_one:
    counted = zip(histories.users, answer.items, strict=True)
    found = {'user': [user for user, items in counted for _ in items], **found}
  return pd.DataFrame(found)

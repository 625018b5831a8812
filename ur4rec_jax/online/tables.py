"""Writes stored events and exposures into tables."""

import collections
import csv
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ur4rec_jax.files import disk_errors, new_file
from ur4rec_jax.online.events import Event, Exposure
from ur4rec_jax.online.feedback_store import FeedbackStore

EVENTS, EXPOSURES = 'events.csv', 'exposures.csv'
_EVENT_COLUMNS = ('user', 'item', 'time', 'kind', 'value', 'id', 'request_id')
_EXPOSURE_COLUMNS = (
  'request_id', 'user', 'time', 'arm', 'model', 'item', 'position', 'score', 'propensity',
)  # fmt: skip


def write_tables(store: FeedbackStore, out: str | pathlib.Path) -> dict[str, int]:
  """Writes all events, and the exposures of users: one row per event and per item shown.

  Args:
    store: the store.
    out: the folder; it is made if it is not there.

  Returns:
    The number of events of each kind, and of rows of exposures under ''.

  Raises:
    InputError: the folder cannot be written.
    StorageError: the store cannot be read.
  """
  out = pathlib.Path(out)
  counts: collections.Counter[str] = collections.Counter()
  with disk_errors(out, '--out'):
    out.mkdir(parents=True, exist_ok=True)
    write(out / EVENTS, _EVENT_COLUMNS, _event_rows(store.events(), counts))
    write(out / EXPOSURES, _EXPOSURE_COLUMNS, _exposure_rows(store.exposures(), counts))
  return dict(counts)


def write(
  path: pathlib.Path, columns: Sequence[str], rows: Iterable[Sequence], **form: Any
) -> None:
  """Writes a table row by row, as it may not fit into memory; the file appears when complete.

  Args:
    path: the file.
    columns: names of the columns.
    rows: values of each row.
    **form: parameters of `csv.writer`, such as the delimiter.
  """
  with new_file(path) as draft, draft.open('w', encoding='utf-8', newline='') as file:
    writer = csv.writer(file, **form)
    writer.writerow(columns)
    writer.writerows(rows)


def number_text(value: float) -> str:
  """Writes the value of an event with all digits that people enter, such as 4 and 1234567.89."""
  return f'{value:.15g}'


def _event_rows(events: Iterable[Event], counts: collections.Counter) -> Iterator[Sequence]:
  for e in events:
    counts[e.kind] += 1
    value = '' if e.value is None else number_text(e.value)
    yield e.user, e.item, f'{e.time:.3f}', e.kind, value, e.id, e.request_id


def _exposure_rows(exposures: Iterable[Exposure], counts: collections.Counter) -> Iterator:
  for x in exposures:
    if not x.user:  # Analyses compare users, and a request with only a history has no user.
      continue
    for position, shown in enumerate(x.items, 1):
      counts[''] += 1
      yield (*x[:2], f'{x.time:.3f}', x.arm, x.model, shown.item, position, *shown[1:])

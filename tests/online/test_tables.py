"""Stored events become tables without losing what they are worth."""

import contextlib
import csv

import pytest

from ur4rec_jax.online.events import Event
from ur4rec_jax.online.feedback_store import open_store
from ur4rec_jax.online.tables import write_tables


@pytest.mark.parametrize('value', [1234567.89, 12345.67, 0.1, 4.0, -1e-7, 999_999_999_999_999.0])
def test_the_value_of_an_event_is_not_rounded(tmp_path, value):
  with contextlib.closing(open_store(str(tmp_path / 'events.db'))) as store:
    store.write([Event('ann', '1', 'lamp', 'buy', 1_700_000_000.0, value)])
    write_tables(store, tmp_path / 'log')
  with (tmp_path / 'log' / 'events.csv').open(newline='') as file:
    (row,) = csv.DictReader(file)
  assert float(row['value']) == value

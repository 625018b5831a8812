"""Times in all spellings give the same ticks, and types that cannot hold them are refused."""

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ur4rec_jax.data.raw import interactions, times
from ur4rec_jax.errors import InputError

NANOSECONDS = 10**9
INSTANTS = st.tuples(
  st.integers(-(10**9), 4 * 10**9),  # Seconds: years 1938 to 2096.
  st.integers(0, 9),  # Digits of the fraction.
  st.integers(0, NANOSECONDS - 1),
  st.sampled_from([0, 3600, 19_800, -34_200]),  # Seconds that the clock is ahead.
)
ZONES = st.sampled_from(['Z', 'z', ' UTC', ' utc', ' GMT', '+hh:mm', ' +hhmm', '+hhmm', 'none'])


def parse(values, name: str = 'time') -> times.Times:
  column = values if isinstance(values, pa.Array) else pa.array(values)
  return times.parse(pa.chunked_array([column]), name, lambda row: f'row {row + 1}')


@given(
  st.lists(INSTANTS, min_size=1, max_size=5), ZONES, st.sampled_from('T '), st.sampled_from('.,')
)
def test_every_spelling_of_iso_8601_is_the_same_instant(instants, zone, between, point):
  texts, expected = [], []
  for seconds, digits, nanoseconds, ahead in instants:
    if 'hh' not in zone:
      ahead = 0
    fraction = f'{nanoseconds:09}'[:digits]
    local = datetime.datetime.fromtimestamp(seconds + ahead, datetime.UTC)
    text = local.strftime(f'%Y-%m-%d{between}%H:%M:%S') + (point + fraction if digits else '')
    sign, minutes = '+-'[ahead < 0], abs(ahead) // 60
    offset = zone.replace('+', sign).replace('hh', f'{minutes // 60:02}')
    texts.append(text + ('' if zone == 'none' else offset.replace('mm', f'{minutes % 60:02}')))
    expected.append(seconds * NANOSECONDS + int(fraction.ljust(9, '0')))
  found = parse(texts)
  assert (found.ticks * (NANOSECONDS // found.ticks_per_second)).tolist() == expected


@given(st.lists(st.integers(10**9, 4 * 10**9), min_size=1, max_size=5), st.integers(0, 3))
def test_unix_times_of_every_unit_are_the_same_instant(seconds, thousands):
  factor = 1000**thousands
  for values in ([s * factor for s in seconds], [str(s * factor) for s in seconds]):
    found = parse(values)
    assert (found.ticks // found.ticks_per_second).tolist() == seconds


@pytest.mark.parametrize(
  ('form', 'way_out'),
  [
    ('%Y%m%d', 'is in 1970, .* write it as YYYY-MM-DD'),
    ('%Y%m%d%H%M', 'is in 1976, .* write it as YYYY-MM-DD hh:mm'),
    ('%Y%m%d%H%M%S', 'is in 2611, .* write it as YYYY-MM-DD hh:mm:ss'),
    ('%Y%m%d%H%M%S123', 'is in 2611, .* write it as YYYY-MM-DD hh:mm:ss.sss'),
  ],
)
def test_dates_written_as_one_number_are_no_unix_times(form, way_out):
  days = [datetime.datetime(2024, 5, 31, 18, 20), datetime.datetime(2024, 6, 1, 9, 5, 59)]
  numbers = [int(day.strftime(form)) for day in days]
  for values in (numbers, [*map(str, numbers)]):
    with pytest.raises(InputError, match=f'^row 1: time is {numbers[0]}, .*{way_out}$'):
      parse(values)
  assert times.plain_unit(min(numbers), max(numbers)) is None


@pytest.mark.parametrize('absent', [0, -1, 99_999_999])
def test_a_number_for_no_date_among_dates_does_not_hide_them(absent):
  for values in ([absent, 20240531], [20240531, 20240601, absent]):
    with pytest.raises(InputError, match=r'^row \d: time is 20240531, .* write it as YYYY-MM-DD$'):
      parse(values)
    sizes = [abs(value) for value in values]
    assert times.plain_unit(min(sizes), max(sizes)) is None


@pytest.mark.parametrize(
  'values', [[45443.5, 45444.25], [45443, 45444], ['45443.5', '45444'], ['45443', '45444']]
)
def test_dates_of_a_spreadsheet_are_told(values):
  found = parse(values)
  assert (np.diff(found.ticks) > 0).all()
  assert f'such as {values[0]}, which as unix time is in 1970' in found.hint
  assert 'is 2024-05-31; if it is that, the order is right' in found.hint
  assert times.plain_unit(45443, 45444) is None
  # Numbers of rows begin lower.
  assert parse([0, 45443]).hint is None
  assert times.plain_unit(0, 45443) == 1


@pytest.mark.parametrize('values', [[511, 1112], ['0511', '1112'], [2.5, 1112.25]])
def test_numbers_that_are_too_small_for_unix_times_are_told(values):
  assert 'is above 1112' in (hint := parse(values).hint)
  assert 'which as unix time is in 1970' in hint
  assert times.plain_unit(511, 1112) is None
  # Positions, old dates and unix times raise no question.
  for more in ([1, 2, 3], [0, 1112], ['1970-01-01 00:10:00'], [10**8, 10**9]):
    assert parse(more).hint is None
  assert (times.plain_unit(1, 1112), times.plain_unit(10**8, 10**9)) == (1, 1)


def test_dates_with_the_day_first_are_read_between_points():
  texts = ['31.12.2025 14:05', '01.02.2025', '5.1.2025 9:05', ' 05.01.2025 09:05:30,5']
  expected = ['2025-12-31T14:05', '2025-02-01', '2025-01-05T09:05', '2025-01-05T09:05:30.5']
  found = parse(texts)
  ticks = found.ticks * (NANOSECONDS // found.ticks_per_second)
  assert ticks.tolist() == np.array(expected, 'M8[ns]').astype(np.int64).tolist()
  assert (times.is_date(texts[0]), times.is_date('1.2.3'), times.is_date('12.2025')) == (1, 0, 0)


@pytest.mark.parametrize(
  'odd', ['31/12/2025', '31.12.25', '2025-12-31', '31.13.2025', '31.12.20251']
)
def test_dates_that_are_not_as_the_first_are_refused(odd):
  with pytest.raises(InputError, match=f"row 2: time is '{odd}', unlike '31.12.2025' in row 1"):
    parse(['31.12.2025', odd])


def test_more_than_nine_digits_are_cut():
  found = parse(['2023-11-14T23:20:40.1234567899999Z'])
  assert found.ticks.tolist() == [1_700_004_040_123_456_789]


@pytest.mark.parametrize(
  'texts',
  [
    ['2023-11-14 23:20:40 UTC', '2023-11-14 23:20:40'],
    ['2023-11-14', '14.11.2023'],
    ['2023-11-14 23:20:40 CET'],
    ['2023-11-14 23:20:61 UTC'],
    ['2023-11-14 UTC'],
  ],
)
def test_other_texts_are_refused_with_their_row(texts):
  with pytest.raises(InputError, match=f"row {len(texts)}: time is '{texts[-1]}'"):
    parse(texts)


@pytest.mark.parametrize(
  ('kind', 'start'), [('float32', 1_700_000_000), ('float32', 1.7e12), ('float16', 3000)]
)
def test_times_in_too_short_floats_are_refused(kind, start):
  values = pa.array(np.array([1, start, start + 60], kind))
  with pytest.raises(InputError, match=rf'row \d: time is of type {kind} .* apart at .*int64'):
    parse(values)


def test_short_floats_that_hold_their_numbers_exactly_are_read():
  assert parse(np.arange(5, dtype=np.float32)).ticks.tolist() == [0, 1, 2, 3, 4]


def test_times_that_were_short_floats_once_are_pointed_out():
  seconds = 1_700_000_000 + 977 * np.arange(50)
  for damaged in (seconds, seconds * 1000):
    damaged = damaged.astype(np.float32)
    for column in (damaged.astype(np.int64), damaged.astype(np.float64)):
      assert 'float32 once' in parse(column).hint
  assert parse(seconds).hint is None
  # Whole days, here from midnight in Beijing, are multiples of 128 seconds by nature.
  assert parse(86_400 * np.arange(19_000, 19_050) + 57_600).hint is None
  assert parse(np.full(50, 1_700_000_000)).hint is None
  rows = pd.DataFrame({'user': range(50), 'item': range(50), 'time': seconds.astype(np.float32)})
  hints = interactions.from_table(rows.astype({'time': np.int64})).hints
  assert 'all values of time are numbers that float32' in hints[0]

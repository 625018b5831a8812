"""Conditions on rows keep what Python's own comparisons keep, and say what they cannot read."""

import operator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ur4rec_jax.data import conditions
from ur4rec_jax.data.raw import where
from ur4rec_jax.errors import InputError

OPERATORS = {
  '==': operator.eq,
  '=': operator.eq,
  '!=': operator.ne,
  '<>': operator.ne,
  '<': operator.lt,
  '<=': operator.le,
  '>': operator.gt,
  '>=': operator.ge,
}
NUMBERS = st.integers(-3, 3) | st.floats(-3, 3).map(lambda x: round(x, 2))
TEXTS = st.text(st.sampled_from('ab\'"` é'), max_size=3)


def kept(condition: str, **columns) -> list[int]:
  comparisons = conditions.parse(condition)
  where.check_columns(comparisons, list(columns), 'rows.csv')
  found = where.holds(comparisons, pa.table(columns), lambda row: f'row {row + 1}')
  return np.flatnonzero(found).tolist()


def quoted(value) -> str:
  if not isinstance(value, str):
    return repr(value)
  return "'" + value.replace("'", "''") + "'"


@pytest.mark.parametrize('kind', [pa.string(), pa.uint64(), pa.int64()])
def test_ids_that_floats_would_round_are_told_apart(kind):
  at = 2**53 + 1
  ids = pa.array([at - 1, at, None, at + 1], pa.int64()).cast(kind)
  if kind == pa.string():
    ids = ids.fill_null(' ')  # As in a CSV file.
  assert kept(f'id == {at}', id=ids) == [1]
  assert kept(f'id < {at}', id=ids) == [0]
  assert kept(f'id != {at}', id=ids) == [0, 3]


@settings(max_examples=60)
@given(
  st.lists(st.tuples(st.none() | NUMBERS, st.none() | TEXTS), min_size=1, max_size=8),
  st.lists(
    st.tuples(st.just('quantity'), st.sampled_from([*OPERATORS]), NUMBERS)
    | st.tuples(st.just('kind'), st.sampled_from([*OPERATORS]), TEXTS),
    min_size=1,
    max_size=3,
  ),
  st.booleans(),
)
def test_rows_are_kept_as_python_compares_them(rows, comparisons, is_text):
  names = {'quantity': 'quantity', 'kind': '`kind of row`'}
  condition = ' and '.join(
    f'{names[column]}{symbol} {quoted(value)}' for column, symbol, value in comparisons
  )
  quantities = [None if number is None else float(number) for number, _ in rows]
  columns = {'quantity': pa.array(quantities), 'kind of row': pa.array([t for _, t in rows])}
  if is_text:  # As in a CSV file, where an empty number has no value.
    texts = ['' if number is None else f' {number!r}' for number, _ in rows]
    columns['quantity'] = pa.array(texts)
  expected = [
    at
    for at, (number, text) in enumerate(rows)
    if all(
      (own := number if column == 'quantity' else text) is not None
      and OPERATORS[symbol](own, value)
      for column, symbol, value in comparisons
    )
  ]
  columns = {name: column for name, column in columns.items() if column.type != pa.null()}
  if all(name.strip('`') in columns for name in (names[c] for c, _, _ in comparisons)):
    assert kept(condition, **columns) == expected


def test_columns_of_every_type():
  days = np.array(['2024-01-31', '2024-02-01'], 'datetime64[ms]')
  columns = {
    'int': pa.array([2**60, 2**60 + 1]),
    'small': pa.array([-1, 2], pa.int8()),
    'unsigned': pa.array([0, 2**64 - 1], pa.uint64()),
    'float': pa.array([np.nan, 1.5]),
    'flag': pa.array([True, False]),
    'kind': pa.array(['buy', 'view']).dictionary_encode(),
    'day': pa.array(days.astype('datetime64[D]')),
    'time': pa.array(days).cast(pa.timestamp('ms', 'UTC')),
    'text': pa.array(['2024-01-31T23:00', '2024-02-01T00:00'], pa.string_view()),
    'empty': pa.nulls(2),
  }
  for condition, expected in [
    (f'int > {2**60}', [1]),
    ('small > -1', [1]),
    ('unsigned > -1 AND unsigned < 1e3', [0]),
    ('float != 0', [1]),
    ("flag = 'True'", [0]),
    ('kind == "buy"', [0]),
    ("day >= '2024-02-01'", [1]),
    ("time < '2024-02-01' and time >= '2024-01-31T00:00:00+00:00'", [0]),
    ("text >= '2024-02-01'", [1]),
    ('empty > 0', []),
  ]:
    assert kept(condition, **columns) == expected, condition


@pytest.mark.parametrize(
  ('condition', 'message'),
  [
    ('', "'nothing' is no comparison; write it like: quantity > 0 and"),
    ('quantity', "'quantity' is no comparison"),
    ('quantity > 0 and', 'is no comparison'),
    ('quantity > 0 or quantity < 5', "'quantity > 0 or' is no comparison"),
    ('0 < quantity', "'0 < quantity' is no comparison"),
    ('quantity > price', "'quantity > price' is no comparison"),
    ('quantity > 0; x', "cannot be read from '; x' on"),
    ("__import__('os') == 1", r'cannot be read from .*on'),
    ("kind == 'buy", 'cannot be read from "\'buy" on'),
    ('quantitiy > 0', r'no column .quantitiy. \(--where\); did you mean quantity\?'),
    ('zzz > 0', 'its columns are quantity, kind'),
    ('kind > 0', "row 1: kind is 'buy', which --where compares with the number 0"),
    ("quantity == 'x'", r"row 1: quantity is of type int64, which --where cannot compare with 'x'"),
  ],
)
def test_what_is_no_condition_is_refused(condition, message):
  with pytest.raises(InputError, match=message):
    kept(condition, quantity=pa.array([1, 2]), kind=pa.array(['buy', '3']))


def test_dates_with_the_day_first_are_compared_by_time_with_dates_of_either_spelling():
  days = ['31.12.2024 14:05', '01.06.2025', '5.7.2025 9:00']
  for wanted in ('2025-06-01', '01.06.2025', '1.6.2025'):
    assert kept(f"day >= '{wanted}'", day=days) == [1, 2]
    assert kept(f"day == '{wanted}'", day=days) == [1]
  assert kept("version >= '1.10'", version=['1.9', '1.2']) == [0, 1]


def test_a_decimal_comma_is_told():
  with pytest.raises(InputError, match=r"row 1: price is '29,69', .* write decimals with a point"):
    kept('price > 10', price=['29,69', '3'])

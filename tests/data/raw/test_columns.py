"""Columns of every type of Arrow and pandas: each is converted rightly or refused."""

import datetime
import decimal
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.raw.test_tables import attempt
from ur4rec_jax.data.raw import interactions
from ur4rec_jax.errors import InputError

_DAY = datetime.datetime(2024, 5, 31, 12)
_WORDS = ['7', 'b', 'ü', '7']
_NUMBERS = [7, 8, 9, 7]
_UUIDS = [uuid.UUID(int=i) for i in _NUMBERS]
# Type, values, and the ids that they are; None where ids cannot be of the type.
KINDS = [
  *((kind, _NUMBERS, ['7', '8', '9', '7']) for kind in (pa.int8(), pa.int16(), pa.int32())),
  *((kind, _NUMBERS, ['7', '8', '9', '7']) for kind in (pa.int64(), pa.uint8(), pa.uint16())),
  *((kind, _NUMBERS, ['7', '8', '9', '7']) for kind in (pa.uint32(), pa.uint64())),
  *((kind, _WORDS, _WORDS) for kind in (pa.string(), pa.large_string(), pa.string_view())),
  *(
    (kind, [word.encode() for word in _WORDS], _WORDS)
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view())
  ),
  (pa.binary(2), [b'ab', b'cd', b'ab', b'zz'], ['ab', 'cd', 'ab', 'zz']),
  (pa.binary(), [b'a', b'\xff', b'a', b'b'], None),
  (pa.uuid(), [value.bytes for value in _UUIDS], [str(value) for value in _UUIDS]),
  *(
    (kind, [decimal.Decimal(i) for i in _NUMBERS], ['7', '8', '9', '7'])
    for kind in (pa.decimal32(5), pa.decimal64(9), pa.decimal128(38), pa.decimal256(50))
  ),
  (pa.decimal128(5, 1), [decimal.Decimal(i) for i in _NUMBERS], None),
  *((kind, _NUMBERS, None) for kind in (pa.float32(), pa.float64())),
  (pa.float16(), np.array(_NUMBERS, np.float16), None),
  (pa.bool_(), [True, False, True, False], None),
  (pa.null(), [None] * 4, None),
  (pa.date32(), [_DAY.date()] * 4, None),
  (pa.date64(), [_DAY.date()] * 4, None),
  (pa.time32('s'), [_DAY.time()] * 4, None),
  (pa.time64('us'), [_DAY.time()] * 4, None),
  *((pa.timestamp(unit), [_DAY] * 4, None) for unit in ('s', 'ms', 'us', 'ns')),
  (pa.timestamp('us', 'Europe/Berlin'), [_DAY] * 4, None),
  (pa.duration('s'), _NUMBERS, None),
  (pa.month_day_nano_interval(), [(1, 2, 3)] * 4, None),
  (pa.list_(pa.string()), [['a', 'b']] * 4, None),
  (pa.large_list(pa.int64()), [[1, 2]] * 4, None),
  (pa.list_(pa.int64(), 2), [[1, 2]] * 4, None),
  (pa.list_view(pa.int64()), [[1, 2]] * 4, None),
  (pa.struct([('a', pa.int64())]), [{'a': 1}] * 4, None),
  (pa.map_(pa.string(), pa.int64()), [[('a', 1)]] * 4, None),
  (pa.json_(), ['{"a": 1}'] * 4, None),
  (pa.bool8(), [1, 0, 1, 0], None),
]


def made(kind: pa.DataType, values: list, form: str) -> pa.Array:
  """An array as it is, with repeated values stored once, or in chunks."""
  storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
  array = pa.array(values, storage)
  if isinstance(kind, pa.BaseExtensionType):
    return pa.ExtensionArray.from_storage(kind, array)
  if form == 'dictionary':
    return array.dictionary_encode()
  if form == 'runs':
    return pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3, 4], pa.int32()), array)
  return array


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('columns')


@settings(max_examples=200)
@given(
  st.sampled_from(KINDS),
  # A column of quantities or kinds of events is only looked at.
  st.sampled_from(['user', 'item', 'time', 'rating', 'quantity', 'event', 'not used']),
  st.sampled_from(['plain', 'dictionary', 'runs']),
  st.booleans(),
)
def test_every_type_is_converted_or_refused_in_one_message(folder, case, role, form, in_a_file):
  kind, values, ids = case
  columns = {
    'user': ['a', 'b', 'c', 'd'],
    'item': ['x', 'y', 'x', 'y'],
    'time': [1, 2, 3, 4],
    'rating': [1.0, 2.0, 3.0, 4.0],
  }
  try:
    table = pa.table({**columns, role: made(kind, values, form)})
    if in_a_file:
      pq.write_table(table, folder / 'rows.parquet')
  except (pa.ArrowException, NotImplementedError):
    return  # Arrow has no such array, or Parquet no such column.
  raw, message = attempt(
    lambda: (
      interactions.read(folder / 'rows.parquet') if in_a_file else interactions.from_table(table)
    )
  )
  if message:
    assert '\n' not in message
    assert role in message
    assert message.startswith(str(folder) if in_a_file else 'the table')
    assert role in columns
    # Arrow does not decode runs of every type.
    assert role not in ('user', 'item') or ids is None or form == 'runs'
    return
  found = {'user': raw.users, 'item': raw.items, 'time': raw.timestamps, 'rating': raw.ratings}
  for name in columns:
    if name != role and name in ('user', 'item'):
      assert found[name].to_pylist() == columns[name]
    elif name != role:
      assert found[name].tolist() == columns[name]
  if role in ('user', 'item'):
    # Whole numbers are the only other values that ids may have.
    assert found[role].to_pylist() == (ids or [str(int(v)) for v in values])
  elif role == 'rating':
    assert found[role].tolist() == [float(value) for value in values]
  elif role == 'time':
    seconds = (raw.timestamps / raw.ticks_per_second).tolist()
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
      midnight = _DAY.replace(hour=0 if pa.types.is_date(kind) else 12)
      zone = datetime.UTC
      assert seconds == [midnight.replace(tzinfo=zone).timestamp()] * 4
    else:
      assert seconds == [float(value) for value in values]


@settings(max_examples=80)
@given(st.lists(st.sampled_from(KINDS), min_size=2, max_size=3), st.sampled_from(['item', 'time']))
def test_parts_of_any_types_are_joined_or_refused(folder, cases, role):
  paths = []
  for number, (kind, values, _) in enumerate(cases):
    columns = {'user': ['a', 'b', 'c', 'd'], 'item': ['x', 'y', 'x', 'y'], 'time': [1, 2, 3, 4]}
    path = folder / f'part-{number}.parquet'
    try:
      pq.write_table(pa.table({**columns, role: made(kind, values, 'plain')}), path)
    except (pa.ArrowException, NotImplementedError):
      return
    paths.append(path)
  raw, message = attempt(lambda: interactions.read(*paths))
  if message:
    assert '\n' not in message
    assert message.startswith(str(folder))
    return
  assert len(raw.users) == 4 * len(cases)
  if role == 'item':
    expected = [name for _, values, ids in cases for name in ids or [str(int(v)) for v in values]]
    assert raw.items.to_pylist() == expected


def test_widths_dates_and_text_of_parts(tmp_path):
  parts = [
    {'user': pa.array([1, 2], pa.int64()), 'item': ['x', 'y'], 'date': [_DAY, _DAY]},
    {'user': pa.array([2, 3], pa.int32()), 'item': pa.array([7, 8]), 'date': [_DAY.date()] * 2},
  ]
  paths = []
  for number, part in enumerate(parts):
    paths.append(tmp_path / f'{number}.parquet')
    pq.write_table(pa.table(part), paths[-1])
  raw = interactions.read(*paths)
  assert raw.users.to_pylist() == ['1', '2', '2', '3']
  assert raw.items.to_pylist() == ['x', 'y', '7', '8']
  noon = int(_DAY.replace(tzinfo=datetime.UTC).timestamp())
  times = raw.timestamps // raw.ticks_per_second
  assert times.tolist() == [noon, noon, noon - 43_200, noon - 43_200]
  pq.write_table(pa.table({**parts[0], 'date': ['2024-05-31'] * 2}), paths[1])
  with pytest.raises(InputError, match=r'1\.parquet: the time is of type string, but timestamp'):
    interactions.read(*paths)


FRAME = pd.DataFrame({'user': ['a', 'b', 'c'], 'item': ['7', '8', '7'], 'time': [1, 2, 3]})


def test_only_columns_in_use_are_converted():
  odd = FRAME.assign(extra=[{'a': 1}, 'x', object()])
  odd = pd.concat([odd, odd[['extra']]], axis=1)
  assert interactions.from_table(odd).items.to_pylist() == ['7', '8', '7']
  with pytest.raises(InputError, match="'extra' is the name of two columns; rename one"):
    interactions.from_table(odd, user_column='extra')
  goods = pd.DataFrame({'id': [7, 8], 'title': ['A', 300], 'odd': [object(), {1}], 'image': None})
  raw = interactions.from_table(FRAME, items=goods)
  assert [item.title for item in raw.table.values()] == ['A', '300']


def test_pandas_columns_of_objects():
  mixed = interactions.from_table(FRAME.assign(item=[7, '8', '7']))
  assert mixed.items.to_pylist() == ['7', '8', '7']
  large = interactions.from_table(FRAME.assign(item=[2**70, 2**70, 1]))
  assert large.items.to_pylist() == [str(2**70), str(2**70), '1']
  with pytest.raises(InputError, match=r'^the table, row 2: item is a float, other'):
    interactions.from_table(FRAME.assign(item=['7', 8.5, '7']))
  # A column that is only looked at may be anything.
  looked_at = interactions.from_table(FRAME.assign(quantity=[1.5, 'two', 3]))
  assert looked_at.items.to_pylist() == ['7', '8', '7']
  with pytest.raises(InputError, match='user holds values of type complex, which cannot be read'):
    interactions.from_table(FRAME.assign(user=np.array([1j, 2j, 3j]).astype(object)))


def test_moments_of_several_kinds_in_one_pandas_column():
  zoned = _DAY.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
  for moments, message in [
    ([_DAY, _DAY, zoned], 'row 3: time is a time with a zone, but a time without a zone in other'),
    ([zoned, pd.NaT, _DAY], 'row 3: time is a time without a zone, but a time with a zone in oth'),
    ([_DAY.date(), _DAY, _DAY], 'row 2: time is a time without a zone, but a date in other rows'),
  ]:
    frame = FRAME.assign(time=pd.Series(moments, dtype=object))
    with pytest.raises(InputError, match=f'^the table, {message}'):
      interactions.from_table(frame)
  for moments in ([zoned] * 3, [_DAY] * 3, [_DAY.date()] * 3):
    assert interactions.from_table(FRAME.assign(time=pd.Series(moments, dtype=object)))


def test_categories_in_use_nowhere_are_no_items():
  frame = FRAME.astype({'item': 'category', 'user': 'category'})
  frame['item'] = frame['item'].cat.add_categories(['gone'])
  raw = interactions.from_table(frame, items=pd.DataFrame({'id': ['7', '8']}))
  assert raw.items.dictionary.to_pylist() == ['7', '8']
  missing = frame.assign(item=frame['item'].where([True, False, True]))
  with pytest.raises(InputError, match='the table, row 2: item is empty'):
    interactions.from_table(missing)

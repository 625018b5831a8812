"""Ids keep their spelling, and what looks damaged is told and cleaned on request."""

import csv

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import build_dataset
from data_prep.prepared import prepare
from ur4rec_jax.data.original_ids import read_ids
from ur4rec_jax.data.raw import ids, interactions
from ur4rec_jax.errors import InputError

IDS = st.text(
  st.characters(exclude_categories=['Cc', 'Cs']) | st.sampled_from(' ,"i7.'), min_size=1
).filter(str.strip)


def table(**columns) -> pd.DataFrame:
  return pd.DataFrame(columns)


def fault(data, **flags) -> str:
  with pytest.raises(InputError) as error:
    prepare.prepare(interactions.from_table(data, **flags))
  return str(error.value)


@settings(max_examples=25)
@given(
  st.lists(IDS, min_size=2, max_size=6, unique=True),
  st.lists(IDS, min_size=2, max_size=6, unique=True),
)
def test_every_id_goes_through_a_file_and_back_as_it_is(tmp_path_factory, users, items):
  path = tmp_path_factory.mktemp('rows') / 'rows.csv'
  with path.open('w', newline='') as file:
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)
    writer.writerow(['user', 'item'])
    writer.writerows([user, item] for user in users for item in items)
  data = prepare.prepare(interactions.read(path))
  assert (sorted(data.user_names), sorted(data.item_names)) == (sorted(users), sorted(items))
  assert all(read_ids(name, set(items)) == [name] for name in data.item_names)
  # Cleaned ids need no further cleaning.
  for names in (users, items):
    once = ids.clean(pa.array(names, pa.string()), ids.CLEANINGS)
    assert ids.clean(once.drop_null(), ids.CLEANINGS).to_pylist() == once.drop_null().to_pylist()


@pytest.mark.parametrize('names', [['N1 N2', 'N3 N1 N2', 'N3'], ['[1, 2]', '[3, 1]', '[2]']])
def test_items_that_look_like_lists_are_told(tmp_path, names):
  path = tmp_path / 'rows.tsv'
  path.write_text('user\titem\n' + ''.join(f'{i} 2\t{name}\n' for i, name in enumerate(names)))
  data, _ = build_dataset.build('interactions', tmp_path / 'data', path)
  assert any(
    f'items that look like lists (2 such as {names[0]!r}), each of which counts' in note
    for note in data['notes']
  )
  titles = table(user=[1, 2, 2], item=['Pan 24 cm', 'Pan 28', 'Kettle 2'])
  assert not interactions.from_table(titles).hints


@pytest.mark.parametrize('name', ['4.00638E+12', '4,00638E+12', '1e+16', '1.2345678901234568e+16'])
def test_ids_that_a_spreadsheet_rounded_are_told(tmp_path, name):
  path = tmp_path / 'rows.csv'
  path.write_text(f'user;item;time\n1;{name};1\n2;{name};2\n2;5E12;3\n')
  data, _ = build_dataset.build('interactions', tmp_path / 'data', path)
  assert any(
    f'look like rounded numbers (items: {name!r} in 2 rows): several ids may' in note
    for note in data['notes']
  )


MISSING = ['NULL', 'nan', 'None', r'\N', 'N/A', '<NA>', '', '  ', None]


@pytest.mark.parametrize('word', MISSING)
def test_rows_without_a_user_are_left_out_on_request_and_counted(word):
  rows = table(user=['a', word, 'b', word, 'b'], item=['x', 'y', 'x', 'x', 'z'], time=range(5))
  if word is None or not word.strip():
    assert 'row 2: user is empty' in fault(rows)
    assert '--clean_ids=missing' in fault(rows)
    assert interactions.from_table(rows, clean_ids='empty').dropped == {'clean_ids': 2}
  else:
    raw = interactions.from_table(rows)
    assert f'{word!r} in 2 rows' in raw.hints[0]
    assert len(prepare.prepare(raw).user_names) == 3
  raw = interactions.from_table(rows, clean_ids='missing')
  data = prepare.prepare(raw)
  assert data.user_names == ['a', 'b']
  assert data.item_names == ['x', 'z']  # Nobody is known to have had y.
  assert data.dropped['interactions'] == {'clean_ids': 2}
  assert raw.where(1) == 'the table, row 3'


def test_whole_numbers_with_and_without_a_fraction():
  rows = table(user=['7', '7.0', '8', '8.5'], item=['1', '1', '2.00', '3'])
  raw = interactions.from_table(rows)
  (hint,) = raw.hints
  assert "users: 1 such as '7.0', 1 of them also without .0" in hint
  assert "items: 1 such as '2.00', 0 of them" in hint
  data = prepare.prepare(interactions.from_table(rows, clean_ids='decimals'))
  assert (data.user_names, data.item_names) == (['7', '8', '8.5'], ['1', '2', '3'])


def test_ids_that_pandas_made_floats_are_read_on_request():
  rows = table(user=[7.0, np.nan, 8, 7], item=['x', 'y', 'y', 'y'])
  assert 'row 1: user is of type double' in fault(pa.table({'user': [7.0, 8], 'item': [1, 2]}))
  assert '--clean_ids=decimals' in fault(pa.table({'user': [7.0, 8], 'item': [1, 2]}))
  data = prepare.prepare(interactions.from_table(rows, clean_ids='decimals,missing'))
  assert data.user_names == ['7', '8']
  assert data.dropped['interactions'] == {'clean_ids': 1}
  assert 'row 2: user is 8.5' in fault(table(user=[7, 8.5], item=[1, 2]), clean_ids='all')
  inexact = pa.table({'user': pa.array([7, 2**24], pa.float32()), 'item': [1, 2]})
  assert 'row 2: user is 16777216.0, and float holds' in fault(inexact, clean_ids='all')


def test_float_ids_of_an_item_table_are_read_on_request(tmp_path):
  rows = table(user=['a', 'b'], item=['1', '2'])
  goods = table(id=[1.0, np.nan, 2, np.nan], title=['A', '?', 'B', '?'])
  goods.to_parquet(tmp_path / 'goods.parquet')
  for items in (goods, str(tmp_path / 'goods.parquet')):
    assert 'row 1: id is 1.0; ids are text or whole numbers: convert' in fault(rows, items=items)
    assert '--clean_ids=decimals if all' in fault(rows, items=items)
    message = fault(rows, items=items, clean_ids='decimals')
    assert 'row 2: id is empty' in message
    assert '--clean_ids=missing' in message
    raw = interactions.from_table(rows, items=items, clean_ids='all')
    assert {name: item.title for name, item in raw.table.items()} == {'1': 'A', '2': 'B'}
  goods = table(id=[1.5, 2.0], title=['A', 'B'])
  assert 'row 1: id is 1.5; ids are text' in fault(rows, items=goods, clean_ids='all')


def test_a_row_without_an_id_is_not_taken_for_a_broken_one():
  rows = table(user=[None, 'a\nb', 'c'], item=['x', 'y', 'y'])
  assert 'row 2: user is no text on one line' in fault(rows, clean_ids='missing')
  rows = table(user=[None, 7.5, 8], item=['x', 'y', 'y'])
  assert 'row 2: user is 7.5' in fault(rows, clean_ids='missing,decimals')


def test_padded_ids_fit_the_item_table_on_request():
  rows = table(user=['a', 'a ', 'b'], item=[' i1', ' i2', 'i2'])
  goods = table(id=['i1', 'i2', ' i3 '], title=['1', '2', '3'])
  raw = interactions.from_table(rows)
  assert "users: 1 such as 'a '; items: 2 such as ' i1'" in raw.hints[0]
  message = fault(rows, items=goods)
  assert "2 of 2 items that are not in the item table are spelled otherwise there, first ' i1'" in (
    message
  )
  assert '--clean_ids=blanks' in message
  raw = interactions.from_table(rows, items=goods, clean_ids='blanks')
  data = prepare.prepare(raw)
  assert (data.user_names, data.item_names) == (['a', 'b'], ['i1', 'i2'])
  assert [*raw.table] == ['i1', 'i2', 'i3']
  twice = table(id=['i1', 'i2', ' i1'], title=['1', '2', '3'])
  assert "has 'i1' and ' i1'" in fault(rows, items=twice, clean_ids='blanks')


def test_items_that_lost_their_leading_zeros_are_told():
  rows = table(user=['a', 'b', 'c'], item=['7', '8', 'x'])
  goods = table(id=['00007', '0008', '12345'], title=['1', '2', '3'])
  told = (
    '2 of 3 items that are not in the item table differ from its ids in leading zeros only, first'
    " '7', there '00007'"
  )
  assert told in fault(rows, items=goods)
  assert told in interactions.from_table(rows, items=goods, partial_items=True).hints[0]


def test_values_that_no_row_has_are_no_items():
  kinds = pd.CategoricalDtype(['x', 'y', '', 'z'])
  rows = table(user=['a', 'b'], item=pd.Series(['x', 'z'], dtype=kinds))
  assert prepare.prepare(interactions.from_table(rows)).item_names == ['x', 'z']


def test_an_unknown_cleaning_is_refused():
  rows = table(user=['a', 'b'], item=['x', 'y'])
  assert "'spaces' is none of blanks, decimals, missing" in fault(rows, clean_ids='blanks,spaces')

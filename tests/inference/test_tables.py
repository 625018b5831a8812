"""Tables of interactions and of new goods: read from files, encoded as the training data were."""

import argparse
import csv

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.goods import row_of_item, write_picture, write_table
from tests.helpers.recommenders import make
from ur4rec_jax import recommend
from ur4rec_jax.data.dataset import read_dropped_users, read_info
from ur4rec_jax.data.features import load_features
from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import tables
from ur4rec_jax.inference.new_items import read_new_items

FLAGS = argparse.Namespace(k=3, only=None, without=None, keep_seen=False)
IDS = st.text('ab 07-\n",;é', min_size=1, max_size=4).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(
  rows=st.lists(st.tuples(IDS, IDS, st.integers(-5, 2**40)), min_size=1, max_size=20),
  kind=st.sampled_from(['.csv', '.parquet', '.jsonl']),
)
def test_histories_of_every_file_are_those_that_were_written(tmp_path_factory, rows, kind):
  path = tmp_path_factory.mktemp('orders') / f'orders{kind}'
  frame = pd.DataFrame(rows, columns=['customer id', 'SKU', 'ordered_at'])
  if kind == '.csv':
    frame.to_csv(path, index=False)
  elif kind == '.parquet':
    frame.to_parquet(path)
  else:
    frame.to_json(path, orient='records', lines=True)
  found = tables.read_customers(path, {})
  expected: dict = {}
  for user, item, _ in sorted(rows, key=lambda row: row[2]):
    expected.setdefault(user, []).append(item)
  histories = {name: found.history(i) for i, name in enumerate(found.names)}
  assert histories == expected
  assert found.incomplete == 0


def test_quotes_in_tsv_bad_rows_and_dates(tmp_path):
  path = tmp_path / 'orders.tsv'
  path.write_text(
    'user\titem\ttime\nann\t12" disc\t2024-05-02 10:00:00\nbob\t\t2024-05-01\n'
    'ann\t7" disc\t2024-05-01 09:00:00\n'
  )
  found = tables.read_customers(path, {})
  assert (found.names, found.history(0), found.incomplete) == (['ann'], ['7" disc', '12" disc'], 1)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.csv', 'who,item\na,b\n', 'no column is recognised as the user; its columns are who, item'),
    ('a.csv', 'user,item,time\na,b,soon\n', 'time must hold a number or a date'),
    ('a.csv', 'user,customer,item\na,b,c\n', 'user and customer may each be the user'),
    ('a.csv', 'user,item\na,b,c\n', 'cannot be read'),
    ('a.csv', 'user,item\na,\n', 'no row has both'),
    ('a.csv', b'user,item\n\xff,b\n', 'cannot be read'),
    ('a.csv', '', 'cannot be read'),
    ('a.parquet', 'user', 'cannot be read'),
    ('a.xlsx', 'user', 'must be a file ending in .csv'),
    ('', '', 'no such file'),
  ],
)
def test_a_wrong_table_is_one_message(tmp_path, name, content, message):
  if name:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(InputError, match=message):
    tables.read_customers(tmp_path / name, {})


def test_every_customer_of_a_file_is_answered_or_named(small_shop, tmp_path, monkeypatch):
  recommender = make(small_shop, 'text')[0]
  orders = small_shop.parent / 'orders.csv'
  rows = list(csv.reader(orders.open()))
  more = [['new', 'g05', '5'], ['new', 'nothing', '6'], ['stranger', 'nothing', '6']]
  more.append(['', 'g01', '7'])
  path = write_table(tmp_path / 'all.csv', ','.join(rows[0]), rows[1:] + more)
  assert read_dropped_users(small_shop) == {'short': 'min_length'}
  group, summary = recommend.customers_of(path, recommender)
  assert '28 customers: 25 of the training data, 1 dropped by min_length, 2 not' in summary
  assert '1 rows without' in summary
  assert 'warning' not in summary
  monkeypatch.setitem(recommender.dataset.info['options'], 'where', 'quantity > 0')
  assert 'the build left rows out by --where' in recommend.customers_of(path, recommender)[1]
  flags = argparse.Namespace(**vars(FLAGS), out=tmp_path / 'top.parquet')
  count, refused = recommend.to_file(recommender, group, flags)
  table = pq.read_table(tmp_path / 'top.parquet').to_pandas()
  assert len(table) == count == 27 * 3
  assert [name for name, _ in refused] == ['stranger']
  notes = {row['user']: row for row in csv.DictReader((tmp_path / 'top.notes.csv').open())}
  assert set(notes) == {'short', 'new', 'stranger'}
  assert 'dropped them by min_length' in notes['short']['note']
  assert notes['short']['recommendations'] == '3'
  assert "none of its 1 items is in the catalogue, first 'nothing'" in notes['stranger']['note']
  assert '1 items that are not in the catalogue were ignored' in notes['new']['note']
  # The order is that of the times, not of the file.
  expected = recommender.answer([['g04', 'g03']], 3).items[0]
  assert table[table.user == 'short']['item'].tolist() == expected
  # In parts of one user, the first of whom is not answered, the columns have the same types.
  monkeypatch.setattr(recommend, '_CHUNK', 1)
  two = [list(group.names).index(name) for name in ('stranger', 'new')]
  parts = group._replace(
    names=['stranger', 'new'], history=lambda i: group.history(two[i]), rows=group.rows[two]
  )
  assert recommend.to_file(recommender, parts, flags)[0] == 3
  # Without notes the file of an earlier run is removed.
  group = group._replace(names=['c00'], rows=group.rows[:1], notes={})
  recommend.to_file(recommender, group, flags)
  assert not (tmp_path / 'top.notes.csv').exists()


@pytest.fixture
def read(small_shop):
  """Reads a table of goods as a model of texts and pictures does."""
  features = {name: load_features(small_shop, 'item', name) for name in ('text', 'image')}
  options = read_info(small_shop)['options']
  read = lambda path, pictures=None: read_new_items(path, features, options, {'g01'}, pictures)
  return read, features


def test_new_goods_are_encoded_as_the_training_data_were(read, tmp_path):
  read, features = read
  twin, lone = row_of_item(3), ['new-lone', 'A quite other thing', '', '']
  twin[0], twin[3] = 'new-twin', 'pictures/3.png'
  (tmp_path / 'pictures').mkdir()
  write_picture(tmp_path / 'pictures' / '3.png', 3)
  known = row_of_item(1)  # It is not encoded again, and its picture is not looked for.
  path = write_table(tmp_path / 'goods.csv', 'sku,title,description,image', [twin, lone, known])
  new = read(path)
  assert new.ids == ['new-twin', 'new-lone', 'g01']
  assert new.titles[1] == 'A quite other thing'
  for name, table in new.tables.items():
    tokens, mask = features[name].rows(np.array([3]))
    np.testing.assert_array_equal(table.mask[0], mask[0])
    np.testing.assert_allclose(table.tokens[0], tokens[0], atol=1e-3)
    assert not table.mask[2].any()
  assert not new.tables['image'].mask[1].any()
  assert new.tables['text'].mask[1].sum() == 2


@pytest.mark.parametrize(
  ('picture', 'reason'),
  [
    ('none.png', 'is not in'),
    ('../goods.csv', 'leads out of'),
    ('https://example.com/a.png', 'is a URL'),
    ('bad.png', 'is no JPEG'),
  ],
)
def test_a_bad_picture_costs_an_item_its_picture_alone(read, tmp_path, picture, reason):
  (tmp_path / 'here').mkdir()
  (tmp_path / 'here' / 'bad.png').write_bytes(b'no picture')
  row = ['new', 'The red lamp', 'A lamp.', picture]
  path = write_table(tmp_path / 'goods.csv', 'id,title,description,image', [row])
  with pytest.warns(UserWarning, match=f"1 pictures .* item 'new': .*{reason}"):
    new = read[0](path, tmp_path / 'here')
  assert (new.tables['image'].mask.any(), new.tables['text'].mask.any()) == (False, True)


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([['a', 'One', ''], ['a', 'Two', '']], "two have the same .'a'"),
    ([['', 'One', '']], 'an item has no id'),
    ([['a', '', '']], "item 'a' has no features"),
  ],
)
def test_goods_that_cannot_be_placed_are_refused(small_shop, tmp_path, rows, message):
  path = write_table(tmp_path / 'goods.csv', 'id,title,description', rows)
  with pytest.raises(InputError, match=message):
    make(small_shop, 'text')[0].add_items(path)

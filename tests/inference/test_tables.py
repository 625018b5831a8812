"""Tables of interactions and of new goods: read from files, encoded as the training data were."""

import argparse
import csv
import gzip

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.prepared import prepare
from tests.helpers.goods import row_of_item, write_picture, write_table
from tests.helpers.recommenders import make
from ur4rec_jax import recommend
from ur4rec_jax.data.dataset import read_dropped_users, read_info
from ur4rec_jax.data.features import load_features
from ur4rec_jax.data.raw import interactions
from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import tables
from ur4rec_jax.inference.new_items import read_new_items

FLAGS = argparse.Namespace(k=3, only=None, without=None, keep_seen=False, rules=None)
IDS = st.text('ab 07-",;é', min_size=1, max_size=4).filter(str.strip)
# Unix seconds of nine digits, because numbers such as 19000101 and 2024010112 are taken for dates.
TIMES = st.integers(10**8, 10**9 - 1)


@settings(max_examples=40)
@given(
  rows=st.lists(st.tuples(IDS, IDS, TIMES), min_size=1, max_size=20),
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
  assert (found.incomplete, found.dropped) == (0, {})


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
    ('a.csv', 'who,item\na,b\n', 'no column is recognised as the user .*it says who, item'),
    ('a.csv', 'user,item,time\na,b,soon\n', "line 2: time is 'soon'; write all times"),
    ('a.csv', 'user,item,time\na,b,\n', 'line 2: time is empty; fill it in'),
    ('a.csv', 'user,customer,item\na,b,c\n', 'user and customer may each be the user'),
    ('a.csv', 'user,item\na,b,c\n', 'line 2: expected 2 columns separated by'),
    ('a.csv', 'user,item\na,\n', 'no row has a user and an item'),
    ('a.csv', b'user,item\n\xff,b\n', 'line 2: bytes that are not UTF-8'),
    ('a.csv', 'user,item\na,"b"c\n', 'line 2: text after the closing quote'),
    ('a.csv', '', 'the file is empty'),
    ('a.parquet', 'user', 'is no Parquet file'),
    ('a.jsonl', 'user', 'line 1: is no JSON'),
    ('a.xlsx', 'user', 'must be a file ending in .csv'),
    ('', '', 'no CSV, TSV, Parquet or JSON lines file in it; give --histories the file itself'),
  ],
)
def test_a_wrong_table_is_one_message(tmp_path, name, content, message):
  if name:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(InputError, match=message):
    tables.read_customers(tmp_path / name, {})
  with pytest.raises(InputError, match=r'--histories=.*nowhere\.csv: no such file'):
    tables.read_customers(tmp_path / 'nowhere.csv', {})


BIG = 'x' * 200_000


@pytest.mark.parametrize(
  ('name', 'content', 'histories'),
  [
    (
      'a.tsv',
      'user\titem\nann\t12" disc\nann\t"7\nbob\tx"\n',
      {'ann': ['12" disc', '"7'], 'bob': ['x"']},
    ),
    ('a.csv', 'user,item\rann,a\rann,"b, c"\r', {'ann': ['a', 'b, c']}),
    ('a.csv', f'user,item,note\nann,a,{BIG}\n', {'ann': ['a']}),
    ('a.tab', '\ufeffuser\titem\nann\t007\n', {'ann': ['007']}),
    ('day=2024-05-02/a.csv', 'user,item\nann,a\n', {'ann': ['a']}),
    (
      'a.jsonl',
      '{"user": 12345678901234567890123, "item": 1.0, "tags": []}\n{"item": "é"}\n',
      {'12345678901234567890123': ['1.0']},
    ),
  ],
)
def test_files_are_read_as_the_build_reads_them(tmp_path, name, content, histories):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(content.encode())
  found = tables.read_customers(path, {})
  assert {user: found.history(i) for i, user in enumerate(found.names)} == histories
  with gzip.open(f'{path}.gz', 'wb') as file:
    file.write(content.encode())
  assert tables.read_customers(f'{path}.gz', {}).items == found.items


ROW = st.tuples(
  st.sampled_from('abc'),
  st.sampled_from('xyz'),
  st.integers(10**9, 10**9 + 5),
  st.integers(-2, 3),
  st.sampled_from(['view', 'buy', 'other']),
)
FLAGS_OF_BUILD = [
  {},
  {'where': 'quantity > 0'},
  {'where': "quantity >= 0 and event != 'other'"},
  {'event_column': 'event', 'event_weights': 'view=1,buy=5'},
  {'event_column': 'event', 'event_weights': 'view=1,buy=5', 'where': 'quantity > 0'},
]


@settings(max_examples=40)
@given(
  rows=st.lists(ROW, min_size=1, max_size=25),
  flags=st.sampled_from(FLAGS_OF_BUILD),
  least=st.sampled_from([None, 2.0]),
  drop_duplicates=st.booleans(),
)
def test_histories_have_the_rows_that_the_build_keeps(
  tmp_path_factory, rows, flags, least, drop_duplicates
):
  """The same table through the build and as histories gives every user the same history."""
  folder = tmp_path_factory.mktemp('orders')
  least = least if 'event_column' in flags else None  # The other tables have no ratings.
  path = write_table(folder / 'orders.csv', 'user,item,time,quantity,event', rows)
  options = prepare.Options(min_rating=least, drop_duplicates=drop_duplicates)
  stored = {**interactions.PARAMETERS, **options._asdict(), **flags}
  try:
    raw = interactions.read_files([path], {**interactions.PARAMETERS, **flags}, every_kind=False)
    built = prepare.prepare(raw, options)
  except InputError:  # No row is left, or duplicates have to be dropped by a flag.
    assume(False)
  expected = {
    user: [built.item_names[item - 1] for item in built.item_ids[start:end]]
    for user, start, end in zip(
      built.user_names, built.offsets[:-1], built.offsets[1:], strict=True
    )
  }
  found = tables.read_customers(path, stored)
  assert {user: found.history(i) for i, user in enumerate(found.names)} == expected
  assert len(found.codes) + sum(found.dropped.values()) == len(rows)
  lost = {user for users in found.dropped_users.values() for user in users}
  assert {row[0] for row in rows} - set(found.names) >= lost


def test_flags_of_the_build_without_a_column_are_named(tmp_path):
  path = write_table(tmp_path / 'a.csv', 'user,item', [['ann', 'a'], ['', 'b'], ['ann', 'NULL']])
  options = {
    'where': 'quantity > 0',
    'event_column': 'kind',
    'event_weights': 'buy=1',
    'min_rating': 3.0,
    'user_column': 'customer',
  }
  found = tables.read_customers(path, options)
  assert (found.names, found.history(0), found.incomplete) == (['ann'], ['a', 'NULL'], 1)
  warnings = [note for note in found.notes if note.startswith('warning')]
  assert len(warnings) == 3
  assert '--where=quantity > 0, but this table has no column quantity' in warnings[0]
  assert '--event_weights=buy=1, but this table has no column kind' in warnings[1]
  assert '--min_rating=3, but this table has no ratings' in warnings[2]
  found = tables.read_customers(path, {'clean_ids': 'missing'})
  assert (found.history(0), found.incomplete) == (['a'], 2)


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
  assert 'left out 1 row without' in summary
  assert 'warning' not in summary
  options = recommender.dataset.info['options']
  with monkeypatch.context() as patch:
    patch.setitem(options, 'where', 'quantity > 0')
    assert 'the build left rows out by --where' in recommend.customers_of(path, recommender)[1]
    patch.setitem(options, 'where', "sku != 'g03' and sku != 'g04'")
    fewer, summary = recommend.customers_of(path, recommender)
    assert 'of the build leaves out' in summary
    assert 'and with them 1 customer' in summary
    assert 'short' not in fewer.names
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
  assert 'ignored 1 item not in the catalogue' in notes['new']['note']
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
    (
      [['a', 'One', ''], ['a', 'Two', '']],
      "line 3: item 'a' is in the table twice, first in line 2",
    ),
    ([['', 'One', '']], 'line 2: id is empty; fill it in or remove the row'),
    ([['a', '', '']], "item 'a' has no features"),
  ],
)
def test_goods_that_cannot_be_placed_are_refused(small_shop, tmp_path, rows, message):
  path = write_table(tmp_path / 'goods.csv', 'id,title,description', rows)
  with pytest.raises(InputError, match=message):
    make(small_shop, 'text')[0].add_items(path)

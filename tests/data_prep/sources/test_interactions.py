import gzip
import json

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import build_dataset
from data_prep.prepared import prepare
from ur4rec_jax.data.raw import interactions, tables
from ur4rec_jax.errors import InputError

DAY = 86_400
ROWS = 'user_id,item_id,timestamp,rating\na,x,20,1\nb,y,10,2\na,y,10,3\nb,x,30,4.5\n'


@pytest.fixture
def write(tmp_path):
  """Writes a file and gives its path."""

  def write(content: str | bytes, name: str = 'rows.csv'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path

  return write


def read(path, **parameters):
  return interactions.read(*interactions.find(path, parameters), **parameters)


def events(raw) -> list[tuple]:
  """(user, item, time in seconds, rating) a row."""
  users, items = raw.users.to_pylist(), raw.items.to_pylist()
  times = [None] * len(users) if raw.timestamps is None else raw.timestamps / raw.ticks_per_second
  stars = [None] * len(users) if raw.ratings is None else raw.ratings
  return list(zip(users, items, times, stars, strict=True))


EVENTS = [('a', 'x', 20, 1), ('b', 'y', 10, 2), ('a', 'y', 10, 3), ('b', 'x', 30, 4.5)]


def fault(path, **parameters) -> str:
  with pytest.raises(InputError) as error:
    prepare.prepare(read(path, **parameters))
  return str(error.value)


def test_a_csv_file_is_read_and_what_was_recognised_is_told(write):
  raw = read(write(ROWS))
  assert events(raw) == EVENTS
  assert raw.notes == (
    'columns: user = user_id, item = item_id, time = timestamp, rating = rating',
  )
  assert (raw.timestamps.dtype, raw.ratings.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize(
  ('change', 'name'),
  [
    (lambda text: text.replace(',', '\t'), 'rows.tsv'),
    (lambda text: text.replace('\n', '\r\n'), 'rows.csv'),
    (lambda text: '\ufeff' + text, 'rows.csv'),
    (lambda text: text.rstrip('\n'), 'rows.CSV'),
    (lambda text: text.replace('\n', '\n\n'), 'rows.csv'),
    (lambda text: text.replace('user_id,', 'User ID ,').replace('a,', '"a",'), 'rows.csv'),
    (lambda text: gzip.compress(text.encode()), 'rows.csv.gz'),
  ],
)
def test_other_ways_to_write_the_same_rows_change_nothing(write, change, name):
  assert events(read(write(change(ROWS), name))) == EVENTS


def test_another_delimiter_comes_by_flag(write):
  path = write(ROWS.replace(',', '^'), 'rows.csv')
  assert events(read(path, delimiter='^')) == EVENTS
  assert 'is the delimiter another than' in fault(path)
  assert events(read(write(ROWS.replace(',', '\t'), 'rows.dat'), delimiter='tab')) == EVENTS
  for name in ('rows.dat', 'rows', 'rows.gz'):
    assert 'pass --delimiter' in fault(write(ROWS, name))
  assert '--delimiter must be one character' in fault(path, delimiter='::')


@pytest.mark.parametrize(('delimiter', 'name'), [(';', "';'"), ('\t', 'tab'), ('|', "'|'")])
def test_a_csv_file_of_a_spreadsheet_may_have_another_delimiter(write, delimiter, name):
  path = write(ROWS.replace(',', delimiter), 'rows.csv')
  raw = read(path, items=str(write(f'sku{delimiter}title\nx{delimiter}A, or B\n', 'items.csv')))
  assert events(raw._replace(table=None)) == EVENTS
  assert f'rows.csv: the columns are separated by {name}' in raw.notes
  assert raw.table == {'x': prepare.Item('A, or B')}


def test_a_file_of_another_program_has_to_be_saved_as_a_table(write):
  assert 'save the table as one of them' in fault(write(ROWS, 'rows.xlsx'))


def test_quotes_delimiters_and_line_ends_inside_other_columns(write):
  path = write(
    'title,user,item,note\n"Nails, 5"" and\nmore",a,x,5" long\nplain,a,y,\n"q",b,x,"""\n"\nz,b,y,\n'
    'z,b,y,\n'
  )
  raw = read(path)
  assert events(raw)[:2] == [('a', 'x', None, None), ('a', 'y', None, None)]
  assert raw.where(1) == f'{path}, line 4'
  assert raw.where(3, 4) == f'{path}, lines 7 and 8'


def test_a_folder_of_parts_in_any_format(write, tmp_path):
  lines = ROWS.splitlines()
  write('\n'.join(lines[:3]), 'csv/part-0.csv')
  write('rating,item_id,extra,user_id,timestamp\n3,y,?,a,10\n4.5,x,?,b,30', 'csv/part-1.csv')
  write('', 'csv/_SUCCESS')
  write('', 'csv/.part-0.csv.crc')
  items = write('item_id,title\nx,X\ny,Y\n', 'csv/items.csv')
  raw = read(tmp_path / 'csv', items=str(items))
  assert events(raw) == EVENTS
  assert (
    raw.where(1, 2) == f'{tmp_path}/csv/part-0.csv, line 3 and {tmp_path}/csv/part-1.csv, line 2'
  )
  (tmp_path / 'parquet').mkdir()
  frame = pd.DataFrame(EVENTS, columns=['user', 'item', 'time', 'stars'])
  for part in range(2):
    frame.iloc[2 * part : 2 * part + 2].to_parquet(tmp_path / f'parquet/{part}.parquet')
  raw = read(tmp_path / 'parquet')
  assert events(raw) == EVENTS
  assert raw.where(3) == f'{tmp_path}/parquet/1.parquet, row 2'
  write(ROWS, 'parquet/rows.csv')
  assert 'several kinds (.csv, .parquet)' in fault(tmp_path / 'parquet')
  write('user_id,thing\na,b\n', 'csv/part-2.csv')
  message = fault(tmp_path / 'csv', items=str(items))
  assert "part-2.csv: no column 'item_id' (the item), which part-0.csv has" in message


@pytest.mark.parametrize(
  ('times', 'expected', 'ticks'),
  [
    (['1400000000', '1400000001'], [1_400_000_000, 1_400_000_001], 1),
    (['1400000000000', '1400000000001'], [1_400_000_000_000, 1_400_000_000_001], 1000),
    (['1.4e9', '2'], None, None),
    ([f'{10**18}', f'{14 * 10**17}'], [10**18, 14 * 10**17], 10**9),
    (['1400000000.0', '1400000001.0'], [1_400_000_000, 1_400_000_001], 1),
    (['1400000000', '1400000000.25'], [1_400_000_000_000_000, 1_400_000_000_250_000], 10**6),
    (['1970-01-02', '1969-12-31'], [DAY, -DAY], 1),
    (['1970-01-02', '1970-01-02 00:00:01.5'], [DAY * 10**6, DAY * 10**6 + 1_500_000], 10**6),
    (['1970-01-02T00:00:00Z', '1970-01-02T01:00:01+01:00'], [DAY, DAY + 1], 1),
    (['-1', '0'], [-1, 0], 1),
    ([' +5', '6 '], [5, 6], 1),
    (['+5.5', '6.0'], [5_500_000, 6_000_000], 10**6),
  ],
)
def test_times_in_usual_forms(write, times, expected, ticks):
  path = write('user,item,time\n' + ''.join(f'u,i,{time}\n' for time in times))
  if expected is None:
    assert "line 2: time is '1.4e9'" in fault(path)
    return
  raw = read(path)
  assert (raw.timestamps.tolist(), raw.ticks_per_second) == (expected, ticks)


def test_rows_within_a_second_keep_their_order_and_times_are_stored_in_seconds(write):
  path = write('user,item,ts\na,x,1400000000900\na,y,1400000000100\nb,x,1400000000000\n')
  data = prepare.prepare(read(path))
  assert [data.item_names[i - 1] for i in data.item_ids] == ['y', 'x', 'x']
  assert data.timestamps.tolist() == [1_400_000_000] * 3


def test_typed_columns_of_parquet(tmp_path):
  times = np.array(['2020-01-01T00:00:00.5', '2020-01-02'], 'datetime64[ms]')
  seconds = times.astype(np.int64) / 1000
  columns = [times, times.astype('datetime64[ns]'), times.astype('datetime64[D]'), seconds]
  for column in columns:
    table = pa.table(
      {'user': [7, 8], 'item': pa.array(['x', 'y']).dictionary_encode(), 't': column}
    )
    pq.write_table(table, tmp_path / 'rows.parquet')
    raw = read(tmp_path / 'rows.parquet', time_column='t')
    expected = np.floor(seconds) if column is columns[2] else seconds
    if column is columns[2]:
      expected = seconds // DAY * DAY
    assert (raw.timestamps / raw.ticks_per_second).tolist() == expected.tolist()
    assert prepare.prepare(raw).user_names == ['7', '8']


def test_without_a_time_column_the_order_of_the_file_counts(write):
  path = write('uid,sku\na,y\nb,x\na,x\n')
  raw = read(path)
  assert raw.timestamps is None
  assert 'no time column' in raw.notes[1]
  path = write(ROWS)
  raw = read(path, time_column='none', rating_column='none')
  assert (raw.timestamps, raw.ratings) == (None, None)


@pytest.mark.parametrize('name', ['bought_on_date', 'Datum', 'Bestellzeit', 'fecha'])
def test_a_column_that_looks_like_a_time_is_asked_for(write, name):
  path = write(f'user,item,{name}\na,x,2024-01-31\nb,y,2024-01-30\n')
  assert f'--time_column={name}' in fault(path)
  assert [x for *_, x, _ in events(read(path, time_column=name))] == [1706659200, 1706572800]


def test_columns_by_flag_and_ambiguous_ones(write):
  path = write('user,customer,asin,parent_asin,when\na,c,x,p,1\nb,d,y,q,2\n')
  assert 'user and customer may each be the user; say which: --user_column=user' in fault(path)
  # A flag leaves the other candidate out, and frees a name that another role would take.
  flags = {'user_column': 'customer', 'item_column': 'asin', 'time_column': 'when'}
  assert events(read(path, **flags))[0] == ('c', 'x', 1, None)
  assert "no column 'who' (--user_column); its columns are user, " in fault(path, user_column='who')
  assert 'one column is given two roles' in fault(path, user_column='user', item_column='user')
  path = write('user,item,valid_from_date\na,x,1\nb,y,2\n')
  assert 'valid_from_date may be the time; say so: --time_column=valid_from_date' in fault(path)
  assert events(read(path, time_column='valid_from_date'))[1] == ('b', 'y', 2, None)
  path = write('user,item,date,time\na,x,1,1\n')
  assert '--time_column=date, or --time_column=none' in fault(path)


def test_rarer_names_count_where_no_usual_one_is_there(write):
  path = write('Email,Lineitem sku,Created at,Name\na@b.example,007,2024-01-31,#1\n')
  assert events(read(path)) == [('a@b.example', '007', 1706659200, None)]
  path = write('email,user_id,isbn,item\na@b.example,a,9,x\n')
  assert events(read(path)) == [('a', 'x', None, None)]
  assert 'isbn and video_id may each be the item' in fault(write('user,isbn,video_id\na,x,y\n'))


def test_a_date_under_another_name_is_told(write, tmp_path):
  path = write('t_dat,user,item,born,price\n2018-09-20,a,x,,1\n2018-09-21,a,y,1990-01-01,2\n')
  (told,) = [note for note in read(path).notes if 'has dates' in note]
  assert told == 't_dat has dates; if they are the times of the rows, pass --time_column=t_dat'
  assert not [note for note in read(path, time_column='none').notes if 'has dates' in note]
  typed = tmp_path / 'rows.parquet'
  days = np.array(['2018-09-20', '2018-09-21'], 'datetime64[s]')
  pq.write_table(
    pa.table({'user': ['a', 'b'], 'item': ['x', 'y'], 't': days, 'z': [[1], []]}), typed
  )
  assert 't has dates' in ''.join(read(typed).notes)


@pytest.mark.parametrize(
  ('name', 'names', 'command'),
  [
    ('rows.csv', 'user,item,kind,time', "(printf 'user,item,...\\n'; cat "),
    ('rows.tsv', 'user\titem\tkind\ttime', "(printf 'user\\titem\\t...\\n'; cat "),
    ('rows.tsv.gz', 'user\titem\tkind\ttime', "(printf 'user\\titem\\t...\\n'; zcat "),
  ],
)
def test_a_file_without_names_says_how_to_write_them(write, name, names, command):
  rows = 'a,7,pv,1511544070\nb,8,pv,1511544071\n'.replace(',', '\t' if '.tsv' in name else ',')
  pack = gzip.compress if name.endswith('.gz') else bytes
  path = write(pack(rows.encode()), name)
  message = fault(path)
  assert 'that looks like a row: write a name for each of the 4 columns above it' in message
  assert command in message
  # One row is lost if its values are taken as names.
  raw = read(path, user_column='a', item_column='7', time_column='1511544070')
  assert any('that looks like a row' in note for note in raw.notes)
  raw = read(write(pack(f'{names}\n{rows}'.encode()), name))
  assert len(events(raw)) == 2
  assert not any('looks like a row' in note for note in raw.notes)


def test_a_folder_of_different_tables_names_the_one_of_interactions(write, tmp_path):
  write('movieId,imdbId\n1,2\n', 'ml/links.csv')
  write('movieId,title\n1,One\n', 'ml/movies.csv')
  found = write('userId,movieId,rating,timestamp\n1,1,5,1000\n', 'ml/ratings.csv')
  message = fault(tmp_path / 'ml')
  assert '(links.csv, movies.csv, ratings.csv)' in message
  assert f'give the one of interactions instead of the folder, such as {found}' in message
  found.unlink()
  assert 'no column is recognised as the user' in fault(tmp_path / 'ml')


def test_a_zone_is_no_time_and_a_timestamp_tells_more_than_a_date(write):
  path = write('user,item,timezoneOffset,utc_moment\na,x,-240,1\n')
  assert read(path).timestamps is None
  path = write('user,item,event_date,event_timestamp\na,x,20240201,1706745600123456\n')
  assert 'say so: --time_column=event_timestamp, or' in fault(path)
  path = write('user,item,time,date,timestamp\na,x,,20240201,1706745600.5\n')
  assert 'say which: --time_column=timestamp, or' in fault(path)


def test_an_empty_time_names_the_way_to_leave_its_row_out(write):
  path = write('user,item,timestamp\na,x,\nb,y,1000\n')
  assert 'line 2: timestamp is empty; ' in (message := fault(path))
  assert '--where' in message
  assert events(read(path, where='timestamp > 0')) == [('b', 'y', 1000, None)]


HEADER = 'user,item,time,rating\na,x,1000,1\n'
FAULTS = {
  'no header': ('1,2,3\n1,2,3\n', 'no column is recognised as the user (the first line must name'),
  'missing column': ('user,time\na,1\n', 'recognised as the item'),
  'nothing': ('', 'the file is empty'),
  'blank lines': ('\n\n', 'the file is empty'),
  'header only': ('user,item,time\n', 'no rows below the column names'),
  'too few fields': (HEADER + 'b,y,1000\n', 'line 3: expected 4 columns separated by'),
  'too many fields': (HEADER + '\nb,y,z,1000,2\n', 'line 4: expected 4 columns'),
  'empty user': (HEADER + ',y,1000,1\n', 'line 3: user is empty'),
  'blank item': (HEADER + 'b,  ,1000,1\n', "line 3: item is empty: '  '"),
  'a control character': (HEADER + 'b,\0,1000,1\n', 'line 3: item is no text on one line'),
  'a line break': (HEADER + 'b,"y\nz",1000,1\n', 'line 3: item is no text on one line'),
  'latin-1': (HEADER.encode() + b'b,caf\xe9,1000,1\n', 'line 3: bytes that are not UTF-8: '),
  'utf-16': (HEADER.encode('utf-16'), 'line 1: bytes that are not UTF-8 but seem to be UTF-16'),
  'utf-16 without a mark': (HEADER.encode('utf-16-le'), 'but seem to be UTF-16; save the file'),
  'utf-16 of quoted names': ('"a","b"\n'.encode('utf-16-be'), 'but seem to be UTF-16'),
  'unclosed quote': (HEADER + 'b,y,1000,"2\nc,z,1000,3\n', 'line 3: a quote is opened and never'),
  'a time': (HEADER + 'b,y,soon,1\n', "line 3: time is 'soon', unlike '1000' in"),
  'an empty time': (HEADER + 'b,y,,1\n', 'line 3: time is empty'),
  'ISO among numbers': (
    HEADER + 'b,y,2020-01-01,1\n',
    "line 3: time is '2020-01-01', unlike '1000'",
  ),
  'mixed units': (
    'user,item,time\na,x,1400000000\nb,y,1400000000000\n',
    'line 3: time mixes units: 1400000000 (seconds?) in ',
  ),
  'too large': ('user,item,time\na,x,1\nb,y,9999999999999999999\n', "line 3: time is '99999"),
  'digits of a date': ('user,item,time\na,x,20240131\nb,y,20240201\n', 'looks like a date; write'),
  'no such day': (
    'user,item,time\na,x,2024-01-31\nb,y,2024-02-31\n',
    "line 3: time is '2024-02-31'",
  ),
  'zones': ('user,item,time\na,x,2024-01-31T00:00\nb,y,2024-01-31T00:00Z\n', 'has a time zone'),
  'a rating': (HEADER + 'b,y,1000,good\n', "line 3: rating is not a number: 'good'"),
  'an empty rating': (HEADER + 'b,y,1000,\n', "line 3: rating is not a number: ''"),
  'an infinite rating': (HEADER + 'b,y,1000,inf\n', "line 3: rating is not a number: 'inf'"),
  'one name twice': ('user,item,item\na,x,y\n', 'item and item may each be the item'),
  'duplicates': (HEADER + 'b,y,5,1\na,x,1000,2\n', 'lines 2 and 4: the same user'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_bad_file_is_one_message_with_the_place(write, name):
  content, expected = FAULTS[name]
  path = write(content)
  message = fault(path)
  assert message.startswith(str(path))
  assert expected in message
  assert '\n' not in message


def test_bad_parquet_files(tmp_path):
  path = tmp_path / 'rows.parquet'
  path.write_bytes(b'user,item\na,b\n' * 9)
  assert 'is no Parquet file' in fault(path)
  for columns, expected in [
    ({'user': [1.5, 2], 'item': ['x', 'y']}, 'row 1: user is of type double'),
    ({'user': ['a', None], 'item': ['x', 'y']}, 'row 2: user is empty'),
    ({'user': ['a', 'b'], 'item': ['x', 'y'], 'time': [1, None]}, 'row 2: time is empty'),
    ({'user': ['a', 'b'], 'item': ['x', 'y'], 'time': [[1], [2]]}, 'time is of type list'),
    ({'user': ['a', 'b'], 'item': ['x', 'y'], 'rating': [1.0, np.nan]}, 'row 2: rating is nan'),
    ({'user': ['a', 'b'], 'item': ['x', 'y'], 'rating': [True, False]}, 'not numbers'),
  ]:
    pq.write_table(pa.table(columns), path)
    assert expected in fault(path)
  assert 'no such file' in fault(tmp_path / 'nowhere.csv')
  (tmp_path / 'empty').mkdir()
  assert 'no CSV, TSV, Parquet or JSON lines file in it' in fault(tmp_path / 'empty')


ITEMS = [
  {'id': 'x', 'title': 'The "X", a, film', 'plot': 'One\ntwo.', 'brand': 'Acme', 'genre': 'A|B'},
  {'id': 'y', 'title': '', 'plot': '', 'brand': '', 'genre': ''},
  {'id': 'z', 'title': 'Zoë', 'plot': '', 'brand': 'Zed', 'genre': 'A'},
]


@pytest.mark.parametrize('name', ['t.csv', 't.tsv', 't.parquet', 't.jsonl', 't.csv.gz'])
def test_item_tables_of_every_format_say_the_same(write, tmp_path, name):
  frame, path = pd.DataFrame(ITEMS), tmp_path / name
  if name == 't.parquet':
    frame.to_parquet(path)
  elif name == 't.jsonl':
    path.write_text('\n\n'.join(json.dumps(item) for item in ITEMS))
  else:
    frame.to_csv(path, index=False, sep='\t' if name == 't.tsv' else ',')
  raw = read(write(ROWS), items=str(path), text_columns='brand')
  assert raw.table['x'] == prepare.Item('The "X", a, film', ('A', 'B'), 'One\ntwo.\nbrand: Acme')
  assert raw.table['y'] == prepare.Item()
  assert raw.table['z'] == prepare.Item('Zoë', ('A',), 'brand: Zed')
  note = 'item table: item_id = id, title = title, description = plot, genres = genre, text = brand'
  assert note in raw.notes
  assert prepare.prepare(raw).dropped['items'] == {'never_interacted': 1}


def test_texts_that_parquet_stores_as_bytes_are_texts(write, tmp_path):
  path = tmp_path / 'items.parquet'
  columns = {'sku': [b'x', b'y'], 'title': ['Zoë'.encode(), b''], 'genre': [[b'A', b'B'], None]}
  pq.write_table(pa.table(columns), path)
  raw = read(write(ROWS), items=str(path))
  assert raw.table == {'x': prepare.Item('Zoë', ('A', 'B')), 'y': prepare.Item()}


def test_values_of_json_lines(write):
  items = write(
    '{"asin": 1, "title": null, "categories": [["A", "B"], ["A"]], "size": 7, "desc": ["p", "q"]}\n'
    '{"asin": "2", "title": "half \\ud800"}\n',
    'items.jsonl',
  )
  raw = read(write('user,item\na,1\nb,2\n'), items=str(items), text_columns='size')
  assert raw.table['1'] == prepare.Item('', ('A', 'B'), 'p q\nsize: 7')
  assert raw.table['2'].title == 'half ?'


ITEM_FAULTS = {
  'twice': ('id,title\nx,1\ny,2\nx,3\n', "line 4: item 'x' is in the table twice, first in line 2"),
  'no id': ('id,title\nx,1\n,2\n', 'line 3: id is empty'),
  'no id column': (
    'name,title\nx,1\n',
    "recognised as the items' ids; its columns are name, title",
  ),
  'two id columns': ('id,sku,title\nx,1,1\n', 'id and sku may each be the item_id'),
  'empty': ('', 'the file is empty'),
  'header only': ('id,title\n', 'no items in the table'),
  'latin-1': (b'id,title\nx,\xe9\n', 'line 2: bytes that are not UTF-8'),
  'fields': ('id,title\nx,a,b\n', 'line 2: expected 2 columns'),
  'unknown': ('id,title\ny,Y\n', "line 2: item 'x' is not in the item table (1 such items in all)"),
}


@pytest.mark.parametrize('name', ITEM_FAULTS)
def test_a_bad_item_table_is_one_message_with_the_place(write, name):
  content, expected = ITEM_FAULTS[name]
  message = fault(write(ROWS), items=str(write(content, 'items.csv')))
  assert expected in message
  assert '\n' not in message


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('{"id": "x"', 'line 2: is no JSON ('),
    ('["x"]', 'line 2: is no JSON object'),
    ('{"id": 1.5}', 'line 2: id is 1.5; ids are text or whole numbers'),
    ('{"title": "x"}', 'line 2: id is empty'),
  ],
)
def test_bad_json_lines(write, line, expected):
  items = write('{"id": "y"}\n' + line + '\n', 'items.jsonl')
  assert expected in fault(write(ROWS), items=str(items))


def test_half_a_character_in_an_id_is_the_same_in_both_files(write):
  ids = ['"x\\ud83d"', '"y"']
  rows = [
    f'{{"user": "{user}", "item": {item}, "time": {10**9}}}\n' for user in 'ab' for item in ids
  ]
  items = write(''.join(f'{{"id": {item}}}\n' for item in ids), 'items.jsonl')
  data = prepare.prepare(read(write(''.join(rows), 'in.jsonl'), items=str(items)))
  assert data.item_names == ['x\\ud83d', 'y']
  assert not data.dropped['items']


def test_items_that_the_table_lacks_are_kept_if_told(write):
  items = write('id,title\ny,Y\n', 'items.csv')
  raw = read(write(ROWS), items=str(items), partial_items=True)
  assert '1 items are not in the item table' in raw.notes[-1]
  data = prepare.prepare(raw)
  assert [item.title for item in data.items] == ['', 'Y']
  assert '--title_column is about the item table' in fault(write(ROWS), title_column='t')
  assert '--items must be' in fault(write(ROWS), items='nowhere.csv')
  message = fault(write(ROWS), items=str(items), text_columns='size')
  assert "no column 'size' (--text_columns)" in message


def test_pictures_are_found_copied_under_safe_names_and_never_outside(
  write, make_picture, tmp_path
):
  (tmp_path / 'secret.png').write_bytes(b'secret')
  folder = tmp_path / 'shop'
  (folder / 'pics').mkdir(parents=True)
  (folder / 'pics/1.JPG').write_bytes(one := make_picture())
  (folder / 'notes.txt').write_bytes(b'text')
  (folder / 'link.png').symlink_to(tmp_path / 'secret.png')
  rows = write('user,item\nu/../v,../../x\nu/../v,a b/c\nw,../../x\nw,Ü\n')
  table = 'id,image\n../../x,pics/1.JPG\na b/c,https://shop.example/a?b=1\nÜ,\n'
  items = write(table, 'shop/items.csv')
  data_dir = tmp_path / 'data'
  flags = {'items': str(items)}
  build_dataset.build('interactions', data_dir, rows, parameters=flags)
  builder = tfds.builder_from_directory(data_dir / 'items/1.0.0')
  found = {
    item['original_id'].decode(): item['image'].decode() for item in builder.as_data_source('items')
  }
  assert found == {'../../x': 'images/1.jpg', 'a b/c': 'https://shop.example/a?b=1', 'Ü': ''}
  assert (data_dir / 'images/1.jpg').read_bytes() == one
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'data',
    'rows.csv',
    'secret.png',
    'shop',
  ]
  for value, expected in [
    ('../secret.png', 'leads out of'),
    ('link.png', 'leads out of'),
    (str(tmp_path / 'secret.png'), 'leads out of'),
    ('pics/2.jpg', 'put it there, pass --images=FOLDER, or leave the field empty'),
    ('notes.txt', 'is neither a URL nor a file ending in .jpg'),
    ('ftp://shop.example/a.svg', 'is neither a URL nor'),
    ('x' * 300 + '.png', 'no file name'),
  ]:
    items = write(table.replace('pics/1.JPG', value), 'shop/items.csv')
    message = fault(rows, items=str(items))
    assert f"{items}, line 2: image '{value[:70]}" in message
    assert expected in message
  items = write(table.replace('pics/', ''), 'items.csv')
  raw = read(rows, items=str(items), images=str(folder / 'pics'))
  assert raw.table['../../x'].image == (folder / 'pics/1.JPG').resolve()


def test_a_table_in_memory_gives_what_its_file_gives(write, tmp_path):
  path = write(ROWS)
  frame = pd.read_csv(path)
  items = pd.DataFrame({'id': ['x', 'y'], 'title': ['X', None]})
  items.to_csv(tmp_path / 'items.csv', index=False)
  flags = {'items': str(tmp_path / 'items.csv')}
  expected, _ = build_dataset.build('interactions', tmp_path / 'a', path, parameters=flags)
  metadata = build_dataset.build_from_table(frame, tmp_path / 'b', items=items)
  assert metadata['splits'] == expected['splits']
  assert metadata['counts'] == expected['counts']
  views = pa.table(frame)  # ids as Polars hands them over
  for i, name in enumerate(('user_id', 'item_id')):
    views = views.set_column(i, name, views[name].cast(pa.string_view()))
  assert events(interactions.from_table(views)) == EVENTS
  again = build_dataset.build_from_table(pa.table(frame), tmp_path / 'b', items=items)
  assert again == metadata
  with pytest.raises(InputError, match='raw_sha256 is table='):
    build_dataset.build_from_table(frame.iloc[::-1], tmp_path / 'b', items=items)
  with pytest.raises(InputError, match='of type list; pass a pandas DataFrame'):
    interactions.from_table([1, 2])
  with pytest.raises(InputError, match='the table: has no rows'):
    interactions.from_table(frame.iloc[:0])
  with pytest.raises(InputError, match='users is none of'):
    interactions.from_table(frame, users='a')
  with pytest.raises(InputError, match='the table, row 2: user_id is empty'):
    interactions.from_table(frame.assign(user_id=['a', None, 'b', 'c']))


class LikeHuggingFace:
  """The part of `datasets.Dataset` that is used: a table behind `with_format('arrow')`."""

  features = ()

  def __init__(self, table: pa.Table):
    self._table = table

  def with_format(self, name: str) -> 'LikeHuggingFace':
    assert name == 'arrow'
    return self

  def __getitem__(self, rows: slice) -> pa.Table:
    return self._table[rows] if rows != slice(None) else self._table


def test_a_dataset_of_the_hub_is_a_table_too():
  table = pa.table({'user': ['a', 'b'], 'item': ['x', 'y'], 'time': [1, 2]})
  assert events(interactions.from_table(LikeHuggingFace(table))) == [
    ('a', 'x', 1, None),
    ('b', 'y', 2, None),
  ]


def test_the_program_builds_refuses_and_leaves_nothing_half_built(run_build, write, tmp_path):
  rows = write(ROWS)
  items = write('id,title\nx,X\ny,Y\nz,Z\n', 'items.csv')
  flags = ['--source=interactions', f'--raw_dir={rows}', f'--items={items}']
  flags += [f'--data_dir={tmp_path / "data"}']
  result = run_build(*flags)
  assert (result.returncode, result.stderr) == (0, '')
  for part in (
    'user = user_id',
    'title = title',
    'rows read      4\n',
    'never_interacted 1',
    '--config=default',
  ):
    assert part in result.stdout
  before = (tmp_path / 'data/dataset.json').read_bytes()
  write(ROWS + 'a,x,soon,1\n')
  result = run_build(*flags, '--overwrite')
  assert result.returncode == 2
  assert result.stderr.startswith(f"error: {rows}, line 6: timestamp is 'soon'")
  assert result.stderr.count('\n') == 1
  assert (tmp_path / 'data/dataset.json').read_bytes() == before
  assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'items.csv', 'rows.csv']


@settings(max_examples=25)
@given(
  st.lists(
    st.tuples(st.sampled_from('abc'), st.sampled_from('xyz'), st.integers(1, 5)), min_size=1
  ),
  st.sampled_from([None, 2, 4]),
  st.sampled_from([None, 2, 3]),
  st.sampled_from([None, 'rating < 5']),
)
def test_every_row_is_an_interaction_or_dropped_for_a_reason(rows, min_rating, k_core, where):
  table = pa.table(
    {
      'user': [user for user, _, _ in rows],
      'item': [item for _, item, _ in rows],
      'time': [time % 7 for time in range(len(rows))],
      'rating': [rating for _, _, rating in rows],
    }
  )
  options = prepare.Options(min_rating=min_rating, k_core=k_core, drop_duplicates=True)
  try:
    data = prepare.prepare(interactions.from_table(table, where=where), options)
  except InputError:  # Nothing is left.
    return
  dropped = data.dropped['interactions']
  assert data.rows_read == len(rows) == len(data.item_ids) + sum(dropped.values())
  assert set(dropped) <= {'min_rating', 'k_core', 'drop_duplicates', 'where'}


def test_where_files_lie_does_not_matter_and_what_is_in_them_does(write, tmp_path):
  rows, data_dir = write(ROWS), tmp_path / 'data'
  items = write('id,title\nx,X\ny,Y\n', 'items.csv')
  build_dataset.build('interactions', data_dir, rows, parameters={'items': str(items)})
  moved = items.rename(tmp_path / 'moved.csv')
  flags = {'items': str(moved)}
  assert not build_dataset.build('interactions', data_dir, rows, parameters=flags)[1]
  moved.write_text('id,title\nx,X2\ny,Y\n')
  with pytest.raises(InputError, match='raw_sha256 is'):
    build_dataset.build('interactions', data_dir, rows, parameters=flags)
  with pytest.raises(InputError, match=r'items\.csv: no such file or folder; correct --items'):
    build_dataset.build('interactions', data_dir, rows, parameters={'items': str(items)})
  inside = moved.rename(data_dir / 'items.csv')
  with pytest.raises(InputError, match='inside --data_dir'):
    build_dataset.build('interactions', data_dir, rows, parameters={'items': str(inside)})


def test_blocks_of_a_large_file_fit_together(write):
  # Larger than the parser's blocks, the quoted text across their borders.
  number = 60_000
  lines = [f'u{i % 977},i{i % 641},{i},"{"x" * 80},\n{i}"' for i in range(number)]
  path = write('user,item,time,text\n' + '\n'.join(lines))
  assert path.stat().st_size > 5e6
  raw = read(path)
  assert raw.users.to_pylist() == [f'u{i % 977}' for i in range(number)]
  assert raw.timestamps.tolist() == list(range(number))
  assert tables.place(tables.open_file(path), number - 1).number == 2 * number


def test_filters_of_a_table_in_memory_are_parameters_like_the_other_flags(tmp_path):
  rows = {'user': [f'u{i % 4}' for i in range(16)], 'item': [f'i{i % 5}' for i in range(16)]}
  table = pa.table(rows | {'time': [1_700_000_000 + i for i in range(16)]})
  table = pa.concat_tables([table, table.slice(0, 1)])
  with pytest.raises(InputError, match='pass --drop_duplicates'):
    build_dataset.build_from_table(table, tmp_path / 'data')
  metadata = build_dataset.build_from_table(table, tmp_path / 'data', drop_duplicates=True)
  assert metadata['counts']['interactions'] == 16
  assert metadata['options']['drop_duplicates'] is True


def test_records_in_a_table_become_columns_as_the_message_says(tmp_path):
  users = [{'id': f'u{i % 4}', 'country': 'JP'} for i in range(16)]
  table = pa.table({'user': users, 'item': [f'i{i % 5}' for i in range(16)]})
  with pytest.raises(InputError, match=r'records of id, country; .* flatten\(\) .* user\.id'):
    build_dataset.build_from_table(table, tmp_path / 'data')
  metadata = build_dataset.build_from_table(
    table.flatten(), tmp_path / 'data', user_column='user.id'
  )
  assert metadata['counts']['users'] == 4


@pytest.mark.parametrize('kind', [polars.DataFrame, polars.LazyFrame])
def test_tables_and_queries_of_polars(tmp_path, kind):
  rows = {'user': [f'u{i % 4}' for i in range(16)], 'item': [f'i{i % 5}' for i in range(16)]}
  table = kind(rows).filter(polars.col('user') != 'u0')
  metadata = build_dataset.build_from_table(table, tmp_path / 'data')
  assert metadata['counts']['users'] == 3

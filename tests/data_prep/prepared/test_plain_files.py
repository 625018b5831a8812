"""The engine's own parser gives what the other reader gives, or leaves the file to it."""

import random

import numpy as np
import pytest

from data_prep import build_dataset
from data_prep.prepared import engine, plain_files
from data_prep.prepared.prepare import Options, Prepared, prepare, prepare_plain
from ur4rec_jax.data.raw import interactions
from ur4rec_jax.errors import InputError

OPTIONS = Options(drop_duplicates=True)
FLAGS = {**interactions.PARAMETERS}
HEAD = '"user","item","rating","timestamp"\n'


def lines(count=200):
  rng = random.Random(0)
  return [
    f'{rng.randint(1, 9)},{rng.randint(1, 20)},'
    f'{rng.choice(["3", "4.5", "1e0", "+2", " 5", "4."])},{rng.randint(10**9, 10**9 + 50)}'
    for _ in range(count)
  ]


BASE = HEAD + '\n'.join(lines())
PLAIN = {
  'numbers': BASE,
  'text': BASE.replace('\n7,', '\nu7,'),
  'text far below': BASE + '\nu,1,3,1000000000',
  'two spellings of a number': BASE + '\n007,1,3,1000000000',
  'negative': BASE.replace('\n3,', '\n-3,'),
  'Windows': BASE.replace('\n', '\r\n'),
  'milliseconds': BASE.replace('\n', '000\n').replace('p"000', 'p"') + '000',
  'letters': BASE.replace('\n7,', '\nÄ😀,'),
  'an empty last column': 'user,item,rating,timestamp,"a,b"\n'
  + '\n'.join(f'{line},' for line in lines()),
  'more columns': 'x,user,item,rating,timestamp\n' + '\n'.join(f'a,{line}' for line in lines()),
}
# Sound or not, these are for the other reader.
OTHER = {
  'no user': BASE + '\n,1,3,1000000000',
  'no time': BASE + '\n1,1,3,x',
  'a time with a line': BASE + '\n1,1,3,1_000_000_000',
  'a time with a zero': BASE + '\n1,1,3,01000000000',
  'a rating with a line': BASE + '\n1,1,3_0,1000000000',
  'an infinite rating': BASE + '\n1,1,inf,1000000000',
  'too few columns': BASE + '\n1,1',
  'a delimiter at the end': BASE + '\n1,1,3,1000000000,',
  'old Mac': BASE.replace('\n', '\r'),
  'units': BASE + '\n1,1,3,1000000000000',
  'quotes': BASE + '\n"1","1",3,1000000000',
  'dates': HEAD + '\n'.join(f'{i % 5},{i % 7},3,{20240101 + i % 20}' for i in range(60)),
  'empty lines': BASE + '\n\n\n1,1,3,1000000001\n\n',
  'an empty first line': '\n' + BASE,
  'a control character': BASE + '\nu\x07,1,3,1000000000',
  'blanks': BASE + '\n u,1,3,1000000000',
  'an id that is none': BASE + '\nnone,1,3,1000000000',
  'a decimal id': BASE + '\n7.0,1,3,1000000000',
  'not UTF-8': BASE.encode() + b'\nu\xff,1,3,1000000000',
}


def opened(*paths, **flags) -> interactions.Layout:
  return interactions.open_files(paths, FLAGS | flags)


def by_other_reader(layout, options=OPTIONS, **flags) -> Prepared:
  return prepare(interactions.read_layout(layout, FLAGS | flags), options)


def assert_same(found: Prepared, wanted: Prepared):
  for name, value in wanted._asdict().items():
    if isinstance(value, np.ndarray):
      assert np.array_equal(getattr(found, name), value), name
    else:
      assert getattr(found, name) == value, name


@pytest.mark.parametrize('name', PLAIN)
def test_plain_files_give_the_same_dataset(tmp_path, name):
  path = tmp_path / 'orders.csv'
  path.write_bytes(PLAIN[name].encode())
  found = prepare_plain(opened(path), FLAGS, OPTIONS)
  assert_same(found, by_other_reader(opened(path)))


@pytest.mark.parametrize('name', OTHER)
def test_other_files_are_left_to_the_other_reader(tmp_path, name):
  path = tmp_path / 'orders.csv'
  text = OTHER[name]
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  assert prepare_plain(opened(path), FLAGS, OPTIONS) is None


def test_several_files_without_times_keep_their_order(tmp_path):
  paths = [tmp_path / "a'1.tsv", tmp_path / 'b.tsv']
  for number, path in enumerate(paths):
    rows = [f'{i % 5}\t{(i * i + number) % 11}' for i in range(40)]
    path.write_text('\n'.join(['user\titem', *rows]))
  found = prepare_plain(opened(*paths), FLAGS, Options())
  assert_same(found, by_other_reader(opened(*paths), Options()))


def test_a_name_like_a_pattern_means_one_file(tmp_path):
  path = tmp_path / 'orders*[1]?.csv'
  path.write_text(BASE)
  (tmp_path / 'orders-1-.csv').write_text(BASE.replace('\n7,', '\n77,'))
  found = prepare_plain(opened(path), FLAGS, OPTIONS)
  assert_same(found, by_other_reader(opened(path)))


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  """And not the folder that is written."""
  path = tmp_path / 'orders[1].csv'
  path.write_text(BASE)
  insert = plain_files._insert

  def gone(*args):
    path.unlink(missing_ok=True)
    return insert(*args)

  monkeypatch.setattr(plain_files, '_insert', gone)
  with pytest.raises(InputError, match=r'orders\[1\]\.csv: cannot be read .*; make it readable'):
    build_dataset.build('interactions', tmp_path / 'data', path, OPTIONS)


def test_rows_keep_their_numbers_where_several_threads_read(tmp_path):
  path = tmp_path / 'many.csv'
  count = 400_000
  with path.open('w') as file:
    file.write('user,item,time\n')
    file.writelines(f'u{i % 997},{i},{10**9 + i}\n' for i in range(count))
  with engine.connected(engine.Resources()) as database:
    database.execute('SET threads = 4')
    loaded = plain_files.load(database, opened(path))
    rows = database.execute('SELECT rowid, item FROM loaded').fetchnumpy()
  assert np.array_equal(rows['rowid'], rows['item'])
  assert len(rows['item']) == count
  assert str(loaded.raw.lines(count - 1)) == f'{path}, line {count + 1}'


def test_errors_name_the_line(tmp_path):
  path = tmp_path / 'orders.csv'
  path.write_text(BASE)
  with pytest.raises(InputError, match='lines 54 and 73: the same user'):
    prepare_plain(opened(path), FLAGS, Options())
  items = tmp_path / 'items.csv'
  items.write_text('id,title\n' + '\n'.join(f'{i},Item {i}' for i in range(2, 21)))
  flags = {'items': str(items)}
  row = next(i for i, line in enumerate(lines(), 2) if line.split(',')[1] == '1')
  with pytest.raises(InputError, match=f'line {row}: item .1. is not in the item table'):
    prepare_plain(opened(path, **flags), FLAGS | flags, OPTIONS)


def test_cold_items_stay(tmp_path):
  path, items = tmp_path / 'orders.csv', tmp_path / 'items.csv'
  path.write_text(BASE)
  items.write_text('id,title\n' + '\n'.join(f'{i},Item {i}' for i in range(-3, 30)))
  flags = {'items': str(items), 'keep_cold_items': True}
  found = prepare_plain(opened(path, **flags), FLAGS | flags, OPTIONS)
  assert len(found.item_names) == 33
  assert_same(found, by_other_reader(opened(path, **flags), OPTIONS, **flags))

import re
import shlex

import numpy as np
import pytest

from data_prep import sources
from data_prep.sources import raw_files
from tests.helpers.runs import ROOT
from ur4rec_jax.errors import InputError


def read(name: str, folder):
  spec = sources.SOURCES[name]
  return spec.read(*raw_files.find_files(spec.files, folder))


def test_the_two_movielens_formats_give_the_same_columns(ml_100k, ml_1m):
  small, large = read('movielens_100k', ml_100k), read('movielens_1m', ml_1m)
  expected = np.loadtxt(ml_100k / 'u.data', dtype=np.int64, delimiter='\t')
  for raw in (small, large):
    columns = [raw.users, raw.items, raw.ratings, raw.timestamps]
    np.testing.assert_array_equal(np.column_stack(columns), expected)
    np.testing.assert_array_equal(raw.lines, np.arange(1, len(expected) + 1))
    assert raw.table['3'].title == 'Misérables, Les (1995)'
    assert len(raw.table) == 10
  assert small.table['1'].genres == ('Action', 'Drama')
  assert large.table['1'].genres == ("Children's", 'Drama')


def test_titles_in_utf_8_are_read_as_such(ml_1m):
  path = ml_1m / 'movies.dat'
  path.write_bytes(path.read_bytes().decode('latin-1').replace('Film 4', '千と千尋').encode())
  table = read('movielens_1m', ml_1m).table
  assert (table['4'].title, table['3'].title) == ('千と千尋 (1995)', 'Misérables, Les (1995)')


def test_a_movie_without_genres_has_none(ml_1m):
  path = ml_1m / 'movies.dat'
  path.write_bytes(path.read_bytes().replace(b"(1995)::Children's|Drama\n10", b'(1995)::\n10'))
  assert read('movielens_1m', ml_1m).table['9'].genres == ()


def test_other_line_ends_a_bom_and_empty_lines_change_nothing_but_line_numbers(ml_1m):
  before = read('movielens_1m', ml_1m)
  path = ml_1m / 'ratings.dat'
  lines = path.read_bytes().splitlines()
  path.write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join([*lines[:2], b'', *lines[2:]]))
  after = read('movielens_1m', ml_1m)
  for field in ('users', 'items', 'timestamps', 'ratings'):
    np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
  assert after.lines[:4].tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize(
  'text', ['1 a\n2 b\n1 c\n', '1\ta\r\n2\tb\r\n1\tc', ' 1  a \n2 \t b\n\n1 c']
)
def test_sequences_take_any_blanks(tmp_path, text):
  path = tmp_path / 'x.txt'
  path.write_bytes(text.encode())
  for raw_dir in (path, tmp_path):
    raw = read('sequences', raw_dir)
    assert (raw.users.to_pylist(), raw.items.to_pylist()) == (['1', '2', '1'], ['a', 'b', 'c'])
  assert raw.timestamps is raw.ratings is raw.table is None


ML_100K_FAULTS = {
  'a comma for a tab': ('1,2,3,4', ['4 columns separated by a tab', "'1,2,3,4'", '--source']),
  'blanks only': ('  ', ['found 1', "'  '"]),
  'too few': ('1\t2\t3', ['found 3', 'user, item, rating, timestamp']),
  'too many': ('1\t2\t3\t4\t5', ['found 5']),
  'user': ('u1\t2\t3\t4', ['user is not a whole number', "'u1'"]),
  'item': ('1\t2.5\t3\t4', ['item is not a whole number', "'2.5'"]),
  'rating': ('1\t2\tgood\t4', ['rating is not a number', "'good'"]),
  'not finite': ('1\t2\tnan\t4', ['rating is not a finite number', "'nan'"]),
  'empty rating': ('1\t2\t\t4', ['rating is not a number', "''"]),
  'timestamp': ('1\t2\t3\t1997-01-01', ['timestamp is not a whole number', "'1997-01-01'"]),
  'huge': ('1\t2\t3\t99999999999999999999', ['timestamp is out of range']),
  'NUL': ('1\t2\t\0\t4', ['a NUL byte']),
}


@pytest.mark.parametrize('fault', ML_100K_FAULTS)
def test_a_bad_rating_line_is_shown(ml_100k, fault):
  line, expected = ML_100K_FAULTS[fault]
  path = ml_100k / 'u.data'
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([*lines[:4], line, *lines[4:]]) + '\n')
  with pytest.raises(InputError) as error:
    read('movielens_100k', ml_100k)
  for part in [f'{path}, line 5: ', *expected]:
    assert part in str(error.value)


@pytest.mark.parametrize('line', ['1:2:3:4', '1:x:2:y:3:z:4', '1\t2::3::4', '1::2::3', '1,2,3,4'])
def test_a_wrong_delimiter_is_shown(ml_1m, line):
  path = ml_1m / 'ratings.dat'
  path.write_text('1::1::3::4\n' + line + '\n')
  with pytest.raises(InputError, match="line 2: expected 4 columns separated by '::'"):
    read('movielens_1m', ml_1m)


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    (b'11|Film|0|1', "expected 9 columns separated by '|'"),
    (b'x|Film||||0|1|0|1', "item id is not a whole number: 'x'"),
    (b'3|Film||||0|1|0|1', 'item 3 is in the table twice'),
    (b'11|Film||||0|1|0|2', 'a genre flag is neither 0 nor 1'),
    (b'11|Fi\0lm||||0|1|0|1', 'byte 0x00 is no text'),
    (b'11|Fi\x93lm||||0|1|0|1', 'byte 0x93 is no text'),
  ],
)
def test_a_bad_item_line_is_shown(ml_100k, line, expected):
  path = ml_100k / 'u.item'
  path.write_bytes(path.read_bytes() + line + b'\n')
  with pytest.raises(InputError) as error:
    read('movielens_100k', ml_100k)
  assert f'{path}, line 11: ' in str(error.value)
  assert expected in str(error.value)


@pytest.mark.parametrize(
  ('data', 'expected'),
  [
    (b'1 a\n2 b c\n', 'line 2: expected 2 columns separated by blanks (user, item), found 3'),
    (b'1 a\n2\n', 'found 1'),
    (b'1,a\n2,b\n', "line 1: expected 2 columns separated by blanks (user, item), found 1: '1,a'"),
    (b'1 a\n2 \xff\n', 'line 2: bytes that are not UTF-8'),
    (b'1 a\n2 b\0\n', 'line 2: a NUL byte'),
    (b' \n\n', 'the file is empty'),
    (b'', 'the file is empty'),
  ],
)
def test_a_bad_sequence_line_is_shown(tmp_path, data, expected):
  path = tmp_path / 'x.txt'
  path.write_bytes(data)
  with pytest.raises(InputError) as error:
    read('sequences', path)
  assert str(path) in str(error.value)
  assert expected in str(error.value)


def test_missing_raw_files_are_named(tmp_path, ml_100k):
  with pytest.raises(InputError, match=r'nowhere: .*No such file.* u\.data, u\.item, u\.genre'):
    read('movielens_100k', tmp_path / 'nowhere')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(InputError, match='empty: no files in it'):
    read('movielens_100k', tmp_path / 'empty')
  with pytest.raises(InputError, match=r'u\.data: .*Not a directory'):
    read('movielens_100k', ml_100k / 'u.data')
  with pytest.raises(InputError, match=r'no ratings\.dat in it \(it holds u\.data, u\.genre'):
    read('movielens_1m', ml_100k)
  (tmp_path / 'a.txt').write_text('1 2\n')
  (tmp_path / 'b.txt').write_text('1 2\n')
  with pytest.raises(InputError, match=r'2 files match \*\.txt \(a\.txt, b\.txt\)'):
    read('sequences', tmp_path)


def test_the_next_command_has_a_workdir_of_its_own(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shop = {'source': 'interactions'}

  def workdir(*arguments) -> str:
    flags = shlex.split(sources.training_command(*arguments))
    return dict(flag.split('=', 1) for flag in flags if '=' in flag)['--workdir']

  (tmp_path / 'old/shop').mkdir(parents=True)
  folders = ['data/shop', 'data/old/shop', 'old/shop', 'shops/a/data', 'shops/b/data', 'data']
  variants = [(), ('text',), ('multimodal',), ('text', 'audio')]
  found = [workdir(shop, folder, *variant) for folder in folders for variant in variants]
  assert found[:4] == ['runs/shop', 'runs/shop-text', 'runs/shop-multimodal', 'runs/shop-audio']
  assert len(set(found)) == len(found)
  assert {'runs/shops-a-data', 'runs/old-shop', 'runs/data-old-shop'} < set(found)
  (tmp_path / 'runs/shop').mkdir(parents=True)
  assert workdir(shop, 'data/shop') == 'runs/shop-2'
  (tmp_path / 'runs/shop-2').mkdir()
  assert workdir(shop, tmp_path / 'data/shop') == 'runs/shop-3'
  assert workdir(shop, tmp_path.parent / 'my shop') == 'runs/my shop'
  command = shlex.split(sources.training_command(shop, 'my shop', 'text', 'audio'))
  assert command[3:] == [
    '--config=default:text',
    '--workdir=runs/my shop-audio',
    '--config.data_dir=my shop',
    '--config.modalities=audio',
    '--config.stages=("train",)',
  ]
  assert '--config.stages' not in sources.training_command(shop, 'my shop')


@pytest.mark.parametrize('source', sources.SOURCES)
def test_the_docs_tell_where_data_come_from_and_what_to_cite(source):
  text = (ROOT / 'docs/data.md').read_text()
  table = text.split('## Datasets and their terms')[1].split('\n## ')[0]
  rows = [line for line in table.splitlines() if line.startswith('|')]
  (row,) = [row for row in rows if f'`{source}`' in row.split('|')[1]]
  origin = sources.SOURCES[source].origin
  assert origin.name in row
  assert not origin.url or f']({origin.url})' in row
  for link in re.findall(r'https://\S+', origin.citation):
    assert f']({link})' in row

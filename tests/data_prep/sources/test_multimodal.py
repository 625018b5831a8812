import csv
import io

import numpy as np
import openpyxl
import pytest
import tensorflow_datasets as tfds
import xlwt

from data_prep import build_dataset, sources
from data_prep.sources import movielens, raw_files
from ur4rec_jax.errors import InputError

FILES = sources.SOURCES['multimodal_movielens_1m'].files
TEXTS = [[1, 'Toys, "alive"\nand kicking à né'], [3, ''], [99, 'Of another film']]


def xls(rows) -> bytes:
  book = xlwt.Workbook()
  sheet = book.add_sheet('Sheet1')
  for r, row in enumerate(rows):
    for c, value in enumerate(row):
      sheet.write(r, c, value)
  book.save(file := io.BytesIO())
  return file.getvalue()


def xlsx(rows) -> bytes:
  book = openpyxl.Workbook()
  for row in rows:
    book.active.append(row)
  book.save(file := io.BytesIO())
  return file.getvalue()


def csv_file(rows) -> bytes:
  file = io.StringIO(newline='')
  csv.writer(file).writerows(rows)
  return b'\xef\xbb\xbf' + file.getvalue().encode()


KINDS = {
  'text.xls': xls,
  'text.xlsx': xlsx,
  'text.csv': csv_file,
}


@pytest.fixture
def folder(ml_1m, make_picture):
  """A folder like M_ML-1M: a MovieLens-1M one with texts and pictures."""
  write_texts(ml_1m, TEXTS)
  (ml_1m / 'image').mkdir()
  for name in ('1.png', '2.jpg', '77.png', 'Thumbs.db'):
    (ml_1m / 'image' / name).write_bytes(make_picture())
  return ml_1m


def write_texts(folder, rows, header=('movie-id', 'review'), name='text.xls', make=xls) -> None:
  (folder / name).write_bytes(make([list(header), *rows]))


def read(folder, **parameters):
  return movielens.read_multimodal(*raw_files.find_files(FILES, folder), **parameters)


def fault(folder, **parameters) -> str:
  with pytest.raises(InputError) as error:
    read(folder, **parameters)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_texts_and_pictures_join_the_movies(folder):
  raw = read(folder)
  assert raw.table['1'].title == 'Film 1 (1995)'
  assert raw.table['1'].description == TEXTS[0][1]
  assert raw.table['1'].image == folder / 'image/1.png'
  assert (raw.table['3'].description, raw.table['3'].image) == ('', None)
  assert raw.notes == (
    'texts: of 1 of 10 movies; 1 of other movies left out',
    'pictures: of 2 of 10 movies; 1 of other movies left out',
  )
  plain = movielens.read_movielens_1m(*raw_files.find_files(('ratings.dat', 'movies.dat'), folder))
  np.testing.assert_array_equal(raw.users, plain.users)
  np.testing.assert_array_equal(raw.timestamps, plain.timestamps)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('made_as', KINDS)
def test_what_is_in_the_text_file_decides_not_its_name(folder, name, made_as):
  expected = read(folder).table
  (folder / 'text.xls').unlink()
  write_texts(folder, TEXTS, name=name, make=KINDS[made_as])
  assert read(folder).table == expected


def test_columns_are_found_by_name_and_numbers_may_be_text(folder):
  write_texts(
    folder, [['x', 'A', '1'], ['', '', ''], ['y', 'B', '2.0']], ('n', 'Review', 'Movie-ID ')
  )
  table = read(folder).table
  assert (table['1'].description, table['2'].description) == ('A', 'B')


@pytest.mark.parametrize('make', KINDS.values())
@pytest.mark.parametrize(
  ('rows', 'expected'),
  [
    ([['id', 'review'], [1, 'a']], "row 1: no column 'movie-id'; the first row must name"),
    ([['movie-id', 'text'], [1, 'a']], "row 1: no column 'review'"),
    ([['movie-id', 'review'], ['x1', 'a']], "row 2: movie-id is not a whole number: 'x1'"),
    ([['movie-id', 'review'], [1, 'a'], [2, 'b'], [1, 'c']], 'row 4: movie 1 has a text already'),
  ],
)
def test_a_bad_text_file_is_shown(folder, make, rows, expected):
  (folder / 'text.xls').write_bytes(make(rows))
  message = fault(folder)
  assert message.startswith(str(folder / 'text.xls'))
  assert expected in message


def test_damaged_text_files(folder):
  path = folder / 'text.xls'
  for content, expected in [
    (b'', 'the file is empty'),
    (xls([['movie-id', 'review']])[:700], 'the Excel file cannot be read'),
    (xlsx([['movie-id', 'review']])[:700], 'the Excel file cannot be read'),
    (b'movie-id,review\n1,caf\xe9\n', 'line 2: is no Excel file, and bytes are not UTF-8'),
    (b'movie-id,review\n1,"open\n', 'neither an Excel nor a CSV file'),
  ]:
    path.write_bytes(content)
    assert expected in fault(folder)
  path.unlink()
  assert 'no text.xls or text.xlsx or text.csv in it' in fault(folder)
  write_texts(folder, TEXTS, name='text.csv', make=csv_file)
  write_texts(folder, TEXTS)
  assert '(text.csv, text.xls); leave only the one meant' in fault(folder)


def test_a_folder_of_pictures_elsewhere_is_copied_from_and_remembered(
  folder, make_picture, tmp_path
):
  pictures = tmp_path / 'posters'
  pictures.mkdir()
  four = make_picture()
  (pictures / '4.JPG').write_bytes(four)
  data_dir = tmp_path / 'data'
  flags = {'images': str(pictures)}
  arguments = ('multimodal_movielens_1m', data_dir, folder)
  metadata, _ = build_dataset.build(*arguments, parameters=flags)
  items = tfds.builder_from_directory(data_dir / 'items/1.0.0').as_data_source('items')
  assert {item['item_id']: item['image'].decode() for item in items if item['image']} == {
    4: 'images/4.jpg'
  }
  assert (data_dir / 'images/4.jpg').read_bytes() == four
  assert metadata['notes'][1] == 'pictures: of 1 of 10 movies'
  assert not build_dataset.build(*arguments, parameters=flags)[1]
  # As large as before, but another.
  (pictures / '4.JPG').write_bytes(four[:-3] + b'.' + four[-2:])
  with pytest.raises(InputError, match='raw_sha256 is'):
    build_dataset.build(*arguments, parameters=flags)
  (pictures / '4.png').write_bytes(b'four')
  assert 'two pictures of movie 4: 4.JPG and 4.png' in fault(folder, images=str(pictures))
  assert 'no such folder; --images must be' in fault(folder, images=str(tmp_path / 'nowhere'))


def test_pictures_beside_the_ratings_are_remembered_too(folder, tmp_path):
  arguments = ('multimodal_movielens_1m', tmp_path / 'data', folder)
  metadata, _ = build_dataset.build(*arguments)
  assert 'owners' in metadata['licence']
  (folder / 'image/3.png').write_bytes(b'three')
  with pytest.raises(InputError, match='raw_sha256 is'):
    build_dataset.build(*arguments)

"""Texts of items, and pictures by file name, by the end of a URL, and by the item's id."""

import json

import pytest

from tests.helpers.goods import write_picture, write_table
from ur4rec_jax.data.raw import items
from ur4rec_jax.data.raw.records import Item
from ur4rec_jax.errors import InputError


@pytest.fixture
def pictures(tmp_path):
  folder = tmp_path / 'pictures'
  folder.mkdir()
  for i, name in enumerate(('a.png', 'b c.png', 'k3.png')):
    write_picture(folder / name, i)
  return folder


def read(tmp_path, rows, **parameters):
  table = write_table(tmp_path / 'goods.csv', 'sku,title,image', rows)
  return {name: item.image for name, item in items.read(table, **parameters)[0].items()}


def test_they_are_found_in_a_folder_that_is_given(tmp_path, pictures):
  rows = [
    ['k0', 'by name', 'a.png'],
    ['k1', 'by URL', 'https://shop.example/img/b%20c.png?size=2'],
    ['k2', 'URL of no file', 'https://shop.example/img/z.png'],
    ['k3', 'by id', ''],
    ['k4', 'none', ''],
    ['../pictures/a', 'an id that looks like a path', ''],
  ]
  found = read(tmp_path, rows, images=str(pictures))
  real = pictures.resolve()
  assert found == {
    'k0': real / 'a.png',
    'k1': real / 'b c.png',
    'k2': 'https://shop.example/img/z.png',
    'k3': real / 'k3.png',
    'k4': None,
    '../pictures/a': None,
  }


def test_without_such_a_folder_only_names_count(tmp_path, pictures):
  write_picture(tmp_path / 'k3.png', 3)
  url = 'https://shop.example/k3.png'
  assert read(tmp_path, [['k3', 'no picture', ''], ['k4', 'URL', url]]) == {'k3': None, 'k4': url}
  with pytest.raises(InputError, match=r'leads out of .*pictures'):
    read(tmp_path, [['k0', 'outside', '../k3.png']], images=str(pictures))


@pytest.mark.parametrize('between', [', ', ',', ' ', ' | ', ';'])
def test_the_first_of_several_urls_is_taken(tmp_path, pictures, between):
  urls = [f'https://shop.example/{name}.png?a=1,2' for name in ('z', 'a', 'k3')]
  rows = [['k0', 'several', between.join(urls)]]
  assert read(tmp_path, rows) == {'k0': urls[0]}
  assert read(tmp_path, [['k0', 'of a file', between.join(urls[1:])]], images=str(pictures)) == {
    'k0': pictures.resolve() / 'a.png'
  }
  inside = 'https://cdn.example/fetch/w_90,h_90/https://shop.example/a.png'
  assert read(tmp_path, [['k0', 'a URL in a URL', inside]]) == {'k0': inside}


# The last one makes a list that is longer than the name of a file can be.
@pytest.mark.parametrize('between', [', ', ',', ' ', '|', ';', f', {"x" * 300}.png,'])
def test_the_first_of_several_files_is_taken(tmp_path, pictures, between):
  rows = [
    ['k0', 'blanks in a name', f'b c.png{between}a.png'],
    ['k1', 'with a URL', f'a.png{between}https://shop.example/z.png'],
    ['k2', 'nothing behind it', f'a.png{between}'],
  ]
  real = pictures.resolve()
  found = read(tmp_path, rows, images=str(pictures))
  assert found == {'k0': real / 'b c.png', 'k1': real / 'a.png', 'k2': real / 'a.png'}
  with pytest.raises(InputError, match=r"line 2: image '\.\./k3\.png' leads out of"):
    read(tmp_path, [['k0', 'outside', f'../k3.png{between}a.png']], images=str(pictures))


def test_a_file_whose_name_looks_like_two_is_one(tmp_path, pictures):
  write_picture(pictures / 'a.png, b.png', 3)
  rows = [['k0', 'one', 'a.png, b.png']]
  assert read(tmp_path, rows, images=str(pictures)) == {'k0': pictures.resolve() / 'a.png, b.png'}


@pytest.mark.parametrize('name', ['goods.csv', 'nowhere'])
def test_a_folder_of_pictures_that_is_none(tmp_path, name):
  with pytest.raises(InputError, match=f'{name}: no such folder; --images must be the folder'):
    read(tmp_path, [['k0', 'no picture', '']], images=str(tmp_path / name))


def test_the_bytes_of_a_picture_are_not_printed_whole(tmp_path):
  rows = [('k0', b'\x89PNG\r\n' + bytes(range(256)) * 99)]
  table = items.Table(
    'the table',
    ['sku', 'image'],
    lambda columns: [('row 1', dict(zip(columns, rows[0], strict=True)))],
  )
  with pytest.raises(InputError, match=r'row 1: image .*PNG.* is neither a URL nor') as error:
    items.from_table(table, items.image_finder(str(tmp_path)))
  assert len(str(error.value)) < 400


@pytest.mark.parametrize('wanted', ['brand,description', 'brand, description '])
def test_a_column_that_is_named_as_a_text_is_read_once(tmp_path, wanted):
  table = write_table(tmp_path / 'goods.csv', 'sku,description,brand', [['k0', 'Long.', 'Acme']])
  found, _ = items.read(table, text_columns=wanted)
  assert found['k0'].description == 'brand: Acme\ndescription: Long.'


def test_a_folder_of_which_no_item_has_a_picture_is_told(tmp_path, pictures):
  table = write_table(tmp_path / 'goods.csv', 'sku,title,cover', [['k0', 'a title', 'a.png']])
  _, notes = items.read(table, images=str(pictures))
  assert 'no item has a picture: no file of' in notes[-1]
  found, notes = items.read(table, images=str(pictures), image_column='cover')
  assert found['k0'].image == pictures.resolve() / 'a.png'
  assert not any('no item has' in note for note in notes)


def test_keys_in_objects_are_columns(tmp_path):
  table = tmp_path / 'goods.jsonl'
  row = {'item': {'id': 7, 'name': 'A lamp', 'tags': ['oak', 'red']}, 'shop': {'city': 'Kyoto'}}
  table.write_text(json.dumps(row) + '\n')
  found, notes = items.read(table, item_id_column='item.id', genres_column='item.tags')
  assert found == {'7': Item(title='A lamp', genres=('oak', 'red'), description='', image=None)}
  assert notes == [
    'item table: item_id = item.id, title = item.name, genres = item.tags; ignored: shop.city'
  ]


def test_a_table_without_a_line_of_names_is_told(tmp_path):
  table = tmp_path / 'news.tsv'
  table.write_text('N1\tnews\tA title\thttps://news.example/1.html\n')
  with pytest.raises(InputError, match=r'each of the 4 columns .*id\\ttitle\\t\.\.\.') as error:
    items.read(table)
  assert str(table) in str(error.value)


def test_categories_and_descriptions_of_products_count_if_no_usual_name_is_there(tmp_path):
  header, row = 'product_id,product_name,product_category', ['7', 'A lamp', 'Light|Home']
  read_note = lambda table: items.read(table)[1][0]
  table = write_table(tmp_path / 'goods.csv', header, [row])
  assert read_note(table).endswith('title = product_name, genres = product_category')
  table = write_table(tmp_path / 'goods.csv', f'{header},category', [[*row, 'Home']])
  assert read_note(table).endswith('genres = category; ignored: product_category')


def test_the_mark_of_films_without_genres_is_no_genre(tmp_path):
  rows = [['1', 'A', '(no genres listed)'], ['2', 'B', 'Drama||War']]
  table = write_table(tmp_path / 'movies.csv', 'movieId,title,genres', rows)
  found, _ = items.read(table)
  assert [item.genres for item in found.values()] == [(), ('Drama', 'War')]

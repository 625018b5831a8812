"""Guesses about the columns of tables in several languages, and where there is no guess."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.goods import row_of_item, write_table
from ur4rec_jax.data.raw.guesses import guess
from ur4rec_jax.errors import InputError

DAY = 86_400


def orders(folder, header, rows=None):
  """A table of 120 orders of 12 customers; `rows` makes a row of user, item and number."""
  rows = rows or (
    lambda user, item, i: [f'B{i // 2}', user, item, 2, '9.50', f'2024-05-{i % 28 + 1:02}']
  )
  table = [rows(f'k{i % 12:02}', f'g{(i * 7) % 20:02}', i) for i in range(120)]
  return write_table(folder / 'orders.csv', header, table)


def goods(folder, header='sku,title,description,image'):
  rows = [[*row_of_item(i)[:3], ''] for i in range(20)]
  return write_table(folder / 'goods.csv', header, rows)


def test_usual_names_need_no_flags(tmp_path):
  path = orders(tmp_path, 'order_id,customer_id,sku,quantity,price,ordered_at')
  found = guess(path, goods(tmp_path), {})
  assert found.flags == {}
  assert found.notes[:3] == ['user = customer_id', 'item = sku', 'time = ordered_at']


def test_json_lines_are_guessed_like_csv(tmp_path):
  header = 'Bestellung,Kundennummer,Artikel-Nr,Menge,Preis,Wann'
  table, names = orders(tmp_path, header), header.split(',')
  rows = (line.split(',') for line in table.read_text().splitlines()[1:])
  lines = [json.dumps({**dict(zip(names, row, strict=True)), 'Posten': [1]}) for row in rows]
  path = tmp_path / 'orders.jsonl'
  path.write_text('\n'.join(lines))
  items = goods(tmp_path, 'Nr,Bezeichnung,Beschreibung,Bild')
  assert guess(path, items, {}) == guess(table, items, {})
  with pytest.raises(InputError, match='Posten is of type list'):
    guess(path, items, {'item_column': 'Posten'})


def test_other_languages_are_guessed_from_values_and_parts_of_names(tmp_path):
  path = orders(tmp_path, 'Bestellung,Kundennummer,Artikel-Nr,Menge,Preis,Wann')
  found = guess(path, goods(tmp_path, 'Nr,Bezeichnung,Beschreibung,Bild'), {})
  assert found.flags['user_column'] == 'Kundennummer'
  assert found.flags['item_column'] == 'Artikel-Nr'
  assert found.flags['time_column'] == 'Wann'
  assert found.flags['item_id_column'] == 'Nr'
  assert found.flags['title_column'] == 'Bezeichnung'
  assert 'item = Artikel-Nr (the item table has its values)' in found.notes


def test_names_that_say_nothing_are_guessed_only_if_there_is_one_way(tmp_path):
  two = orders(tmp_path, 'a,b,c', lambda user, item, i: [user, item, 1_700_000_000 + i * DAY])
  assert guess(two, None, {}).flags == {'user_column': 'a', 'item_column': 'b', 'time_column': 'c'}
  many = orders(tmp_path, 'a,b,c,d,e,f')
  with pytest.raises(InputError, match=r'no column looks like the item.*--item_column=NAME'):
    guess(many, None, {})
  with pytest.raises(InputError, match=r'no column looks like the user.*--user_column=NAME'):
    guess(many, goods(tmp_path), {})
  found = guess(many, goods(tmp_path), {'user_column': 'b'})
  assert found.flags['user_column'] == 'b'
  with pytest.raises(InputError, match="no column 'x'"):
    guess(many, goods(tmp_path), {'user_column': 'x'})


def test_files_without_rows_are_left_out_or_named(tmp_path):
  parts = tmp_path / 'parts'
  parts.mkdir()
  orders(parts, 'order_id,customer_id,sku,quantity,price,ordered_at')
  (parts / 'before.csv').write_text('order_id,customer_id,sku,quantity,price,ordered_at\n')
  assert guess(parts, None, {}).notes[0] == 'user = customer_id'
  (parts / 'other.csv').write_text('customer_id,article\nk00,g00\n')  # Quantities are no must.
  with pytest.raises(InputError, match=r"other\.csv: no column 'sku'; its columns are customer_id"):
    guess(parts, goods(tmp_path), {})
  empty = tmp_path / 'empty.parquet'
  pq.write_table(pa.table({name: pa.array([], pa.string()) for name in ('user', 'item')}), empty)
  with pytest.raises(InputError, match=r'empty\.parquet: no rows'):
    guess(empty, None, {})


def test_the_item_table_may_lie_in_the_folder_of_the_orders(tmp_path):
  orders(tmp_path, 'order_id,customer_id,sku,quantity,price,ordered_at')
  assert guess(tmp_path, goods(tmp_path), {}).notes[0] == 'user = customer_id'


def test_returns_are_left_out_and_counted(tmp_path):
  header = 'customer_id,sku,Order Qty,ordered_at'
  path = orders(
    tmp_path, header.replace('Order Qty', 'qty'), lambda u, x, i: [u, x, -1 if i % 5 == 0 else 1, i]
  )
  found = guess(path, None, {'time_column': 'ordered_at'})
  assert found.flags['where'] == 'qty > 0'
  assert '24 rows with a negative qty are left out, as they look like returns' in found.notes
  rows = lambda u, x, i: [u, x, (-1, 0, '', 1, 2)[i % 5], i]
  found = guess(orders(tmp_path, header.replace('Order Qty', 'qty'), rows), None, {})
  note = '24 rows with a negative qty are left out, as they look like returns, and 48 rows where it'
  assert f'{note} is 0 or empty' in found.notes
  assert guess(path, None, {'where': 'qty > 1'}).flags['where'] == 'qty > 1'


def test_the_better_of_two_columns_with_usual_names_is_taken(tmp_path):
  path = orders(
    tmp_path, 'session_id,user_id,product,sku,date', lambda u, x, i: [f's{i}', u, 'lamp', x, i]
  )
  found = guess(path, goods(tmp_path), {'time_column': 'none'})
  assert found.flags['user_column'] == 'user_id'
  assert found.flags['item_column'] == 'sku'
  assert 'user = user_id (rather than session_id)' in found.notes


def test_ids_are_preferred_to_names_that_several_may_have(tmp_path):
  header = 'customer_id,customer,product,product_id,date'
  rows = lambda u, x, i: [u, f'Ann {i % 3}', f'lamp {i % 4}', x, i]
  path = orders(tmp_path, header, rows)
  found = guess(path, None, {})
  assert found.flags['user_column'] == 'customer_id'
  assert found.flags['item_column'] == 'product_id'
  assert 'user = customer_id (rather than customer)' in found.notes


def test_numbers_of_orders_and_goods_are_no_times(tmp_path):
  for number in (1_000_000_123, 3_000_012_345, 4_006_381_000_000):
    rows = lambda u, x, i, n=number: [
      n + i // 2,
      u,
      4_006_381_333_900 + int(x[1:]),
      f'2024-05-{i % 28 + 1:02}',
    ]
    found = guess(orders(tmp_path, 'Bestellnummer,Kunde,EAN-Artikel,Datum', rows), None, {})
    assert found.flags['time_column'] == 'Datum'
    assert found.flags['item_column'] == 'EAN-Artikel'


def test_an_item_table_of_other_items_is_refused_and_missing_items_are_told(tmp_path):
  path = orders(tmp_path, 'customer_id,sku,quantity', lambda u, x, i: [u, f'other{x}', 1])
  with pytest.raises(InputError, match='none of its columns has the ids of the interactions'):
    guess(path, goods(tmp_path), {})
  path = orders(tmp_path, 'customer_id,sku', lambda u, x, i: [u, 'new' if i == 119 else x])
  found = guess(path, goods(tmp_path), {})
  assert 'partial_items' in found.flags
  assert '1 item without a row in the item table stay, without texts' in found.notes


def test_an_item_table_whose_ids_are_spelled_otherwise_names_the_cause(tmp_path):
  path = orders(tmp_path, 'customer_id,sku,quantity', lambda u, x, i: [u, f'000{x[1:]}', 1])
  rows = [[i, f'The {i}'] for i in range(20)]
  table = write_table(tmp_path / 'goods.csv', 'sku,title', rows)
  with pytest.raises(InputError, match="leading zeros only, first '00000', there '0': a program"):
    guess(path, table, {})
  path = orders(tmp_path, 'customer_id,sku,quantity', lambda u, x, i: [u, f'{int(x[1:])}.0', 1])
  with pytest.raises(InputError, match=r"first '0\.0'; pass --clean_ids=decimals"):
    guess(path, table, {})
  assert guess(path, table, {'clean_ids': 'decimals'}).flags == {'clean_ids': 'decimals'}


def test_short_texts_that_repeat_join_the_description(tmp_path):
  path = orders(tmp_path, 'customer_id,sku,quantity', lambda u, x, i: [u, x, 1])
  labels = '[{"Label": "Oak"}]'  # No text.
  rows = [[*row_of_item(i)[:3], ['Alder', 'Birch'][i % 2], 4.5, labels] for i in range(20)]
  table = write_table(tmp_path / 'goods.csv', 'sku,title,description,brand,price,labels', rows)
  assert guess(path, table, {}).flags['text_columns'] == 'brand'


def test_columns_without_a_name_or_with_a_comma_in_it_are_left_out(tmp_path):
  path = orders(tmp_path, 'customer_id,sku,quantity', lambda u, x, i: [u, x, 1])
  rows = [[*row_of_item(i)[:2], ['Alder', 'Birch'][i % 2], '', ''] for i in range(20)]
  table = write_table(tmp_path / 'goods.csv', 'sku,title,colour,,', rows)
  table.write_text(table.read_text().replace('colour', '"colour, main"', 1))
  assert guess(path, table, {}).flags == {}
  text = path.read_text().splitlines()
  path.write_text('\n'.join([f',{text[0]}', *(f'{i},{row}' for i, row in enumerate(text[1:]))]))
  assert guess(path, table, {}).flags == {}
  table.write_text(',,\n1,2,3\n')
  with pytest.raises(InputError, match='none of its columns has the ids of the interactions'):
    guess(path, table, {})


def test_a_column_that_is_mostly_empty_is_not_the_user_or_the_time(tmp_path):
  header = 'user_id,event_date,event_timestamp,user_pseudo_id,item_id,read_at'
  number = 1_706_745_600
  rows = lambda u, x, i: [
    u if i % 6 == 0 else ('', 'NA')[i % 2],
    f'202402{i % 28 + 1:02}',
    (number + i) * 10**6 + 123_456,
    f'1234567{u[1:]}.{number + i % 12}',
    x,
    '',
  ]
  found = guess(orders(tmp_path, header, rows), None, {})
  assert found.flags['user_column'] == 'user_pseudo_id'
  assert found.flags['time_column'] == 'event_timestamp'
  assert 'user = user_pseudo_id (user_id: mostly empty)' in found.notes
  # Without another one it stays the user, and the build asks what to do with the rows.
  found = guess(
    orders(tmp_path, 'user_id,price,sku', lambda u, x, i: [*rows(u, x, i)[:1], i, x]), None, {}
  )
  assert found.notes[:2] == ['user = user_id', 'item = sku']


def test_a_first_line_that_is_a_row_gives_no_names(tmp_path):
  rows = lambda u, x, i: [i % 12, f'{i % 20}', 'pv', 1_511_544_070 + i]
  path = orders(tmp_path, '1,2268318,pv,1511544069', rows)
  with pytest.raises(InputError, match='looks like a row: write a name for each of the 4 columns'):
    guess(path, None, {})
  flags = {'user_column': '1', 'item_column': '2268318'}
  assert guess(path, None, flags).flags == {**flags, 'time_column': '1511544069'}


def test_a_folder_of_different_tables_is_refused_and_the_right_one_named(tmp_path):
  folder = tmp_path / 'parts'
  folder.mkdir()
  write_table(folder / 'links.csv', 'movieId,imdbId', [[1, 2], [2, 3]])
  orders(folder, 'order_id,customer_id,sku,quantity,price,ordered_at')
  with pytest.raises(InputError, match=r'different columns .* such as .*orders\.csv'):
    guess(folder, None, {})


def test_dates_with_the_day_first_are_times(tmp_path):
  rows = lambda u, x, i: [f'{i % 28 + 1:02}.05.2024 1{i % 10}:05', u, x, i]
  found = guess(orders(tmp_path, 'Datum,Kundennr,Artikelnr,Bestellnr', rows), None, {})
  assert found.flags['time_column'] == 'Datum'
  path = tmp_path / 'orders.csv'
  path.write_text(path.read_text().partition('\n')[2])
  with pytest.raises(InputError, match='looks like a row: write a name for each of the 4 columns'):
    guess(path, None, {})


def test_titles_that_repeat_are_known_by_a_part_of_the_name(tmp_path):
  path = orders(tmp_path, 'order_id,customer_id,sku,quantity,price,ordered_at')
  rows = [[*row_of_item(i)[:1], f'Band {i % 3}', row_of_item(i)[2]] for i in range(20)]
  table = write_table(tmp_path / 'goods.csv', 'Artikelnr,Buchtitel,Beschreibung', rows)
  found = guess(path, table, {})
  assert found.flags['title_column'] == 'Buchtitel'
  assert 'text_columns' not in found.flags
  assert guess(path, table, {'title_column': 'none'}).flags['title_column'] == 'none'


@pytest.mark.parametrize('form', ['{}', 'https://shop.example/img/{}?w=90'])
def test_files_of_pictures_are_known_by_their_endings_if_there_is_a_folder(tmp_path, form):
  path = orders(tmp_path, 'order_id,customer_id,sku,quantity,price,ordered_at')
  names = [form.format(f'cover_{i}.JPG') if i % 2 else '' for i in range(20)]
  rows = [[*row_of_item(i)[:2], names[i]] for i in range(20)]
  table = write_table(tmp_path / 'goods.csv', 'sku,title,Bild', rows)
  assert guess(path, table, {}).flags == {}
  found = guess(path, table, {}, has_pictures=True)
  assert found.flags == {'image_column': 'Bild'}
  assert 'image of an item = Bild' in found.notes
  none = {'image_column': 'none'}
  assert guess(path, table, none, has_pictures=True).flags == none


def test_tables_in_japanese_are_guessed_with_their_descriptions_and_returns(tmp_path):
  rows = lambda u, x, i: [u, x, f'{i % 28 + 1:02}.05.2024 10:05', -1 if i % 5 == 0 else 1, 9 + i]
  path = orders(tmp_path, '顧客番号,商品番号,注文日,数量,金額', rows)
  signs = '青赤白黒古新大小静速甘辛朝夕春夏秋冬東西'
  rows = [[f'g{i:02}', f'{signs[i]}傘', f'{signs[i]}傘です。', '傘靴'[i % 2], i] for i in range(20)]
  items = write_table(tmp_path / 'goods.csv', '商品番号,商品名,説明,分類,価格', rows)
  flags = guess(path, items, {}).flags
  assert flags['user_column'] == '顧客番号'
  assert flags['where'] == '数量 > 0'
  assert (flags['title_column'], flags['description_column']) == ('商品名', '説明')
  assert flags['text_columns'] == '分類'
  # Names that say nothing: a description is known by its length, in signs.
  rows = [[*row[:2], f'{row[2]}雨の日も晴れの日も使えます。軽いです。', row[3]] for row in rows]
  items = write_table(tmp_path / 'goods.csv', 'a,b,c,d', rows)
  flags = guess(path, items, {}).flags
  assert (flags['title_column'], flags['description_column']) == ('b', 'c')


def test_a_column_of_lists_is_no_item(tmp_path):
  rows = lambda u, x, i: [u, 1_700_000_000 + i, f'N{i % 20} N{i % 7} N3']
  path = orders(tmp_path, 'user,time,history', rows)
  with pytest.raises(InputError, match='history has lists: write a row for each of their entries'):
    guess(path, None, {})
  assert guess(path, None, {'item_column': 'history'}).flags == {'item_column': 'history'}


def test_an_item_table_without_a_line_of_names_is_told(tmp_path):
  path = orders(tmp_path, 'order_id,customer_id,sku,quantity,price,ordered_at')
  table = goods(tmp_path)
  table.write_text(table.read_text().partition('\n')[2])
  with pytest.raises(InputError, match=r'write a name for each of the 4 columns .*id,title,\.\.\.'):
    guess(path, table, {})


def test_item_tables_of_json_may_hold_objects(tmp_path):
  path = orders(tmp_path, 'order_id,customer_id,sku,quantity,price,ordered_at')
  rows = [dict(zip(('id', 'name', 'desc'), row_of_item(i), strict=False)) for i in range(20)]
  rows = [{'item': row | {'brand': ['Alder', 'Birch'][i % 2]}} for i, row in enumerate(rows)]
  rows = [row | {'hours': {'open': ['never', 'always'][i % 2]}} for i, row in enumerate(rows)]
  table = tmp_path / 'goods.jsonl'
  table.write_text('\n'.join(map(json.dumps, rows)))
  found = guess(path, table, {})
  assert found.flags == {'text_columns': 'item.brand'}
  roles = {'item_id': 'item.id', 'title': 'item.name', 'description': 'item.desc'}
  assert found.notes[3:6] == [f'{role} of an item = {name}' for role, name in roles.items()]

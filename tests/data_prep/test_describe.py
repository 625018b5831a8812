import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep import build_dataset, describe, describe_page
from data_prep.prepared import prepare
from tests.helpers.commands import run_here
from tests.helpers.html_page import Page
from tests.helpers.runs import ROOT
from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import read_info, read_interactions, read_items
from ur4rec_jax.errors import InputError

SCRIPT = '<script>alert(1)</script>'
HISTORIES = {  # user -> (item, day of January 2024, rating)
  'u1': [('a', 1, 5), ('b', 2, 4), ('c', 3, 3), ('a', 4, 5)],
  'u2': [('a', 1, 4), ('b', 6, 4), ('d', 6, 2)],
  'u3': [('a', 1, 1), ('e', 8, 5)],
  'u4': [('a', 2, 3), ('b', 3, 3), ('<i>', 4, 4)],
}
GOODS = [
  {'id': 'a', 'title': SCRIPT, 'genres': '<b>|x', 'image': 'a.png'},
  {'id': 'b', 'title': 'B', 'description': '"><img src=//x.example>', 'image': 'b.png'},
  {'id': 'c', 'title': 'C', 'image': 'https://x.example/' + 300 * 'c'},
  {'id': 'd', 'title': 'D'},
  {'id': 'e', 'title': 'E'},
  {'id': '<i>'},
]


@pytest.fixture
def shop(tmp_path) -> Path:
  """A prepared folder of `HISTORIES` and `GOODS`; the pictures of a and b are files."""
  rows = [(user, *row) for user, history in HISTORIES.items() for row in history]
  users, items, days, ratings = zip(*rows, strict=True)
  times = [f'2024-01-{day:02}' for day in days]
  table = pa.table({'user': users, 'item': items, 'time': times, 'rating': ratings})
  for name, size in (('a', (400, 300)), ('b', (30, 40))):
    Image.new('RGB', size, 'teal').save(tmp_path / f'{name}.png')
  build_dataset.build_from_table(
    table,
    tmp_path / 'shop',
    prepare.Options(time_split='2024-01-03,2024-01-04'),
    items=pa.Table.from_pylist(
      [{**dict.fromkeys(GOODS[0]), 'description': None, **item} for item in GOODS]
    ),
    images=tmp_path,
  )
  return tmp_path / 'shop'


def run(*flags: str, limit: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
  if not limit:
    return run_here(describe.main, flags)
  command = [*limit, sys.executable, '-m', 'data_prep.describe', *flags]
  return subprocess.run(
    command,
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'},
  )


def test_figures_are_those_computed_by_hand(shop):
  pictures = item_pictures.find(shop)
  figures = describe.measure(
    describe_page.Prepared(
      'shop', read_info(shop), read_interactions(shop), read_items(shop), pictures
    )
  )
  assert figures.pop('warnings') == [
    '1 of 3 (33.3 %) evaluated users have their last two interactions at one time: the order of'
    ' the raw file decides which one is the test item',
    'all times are whole days: within a day the order is that of the raw file',
    '1 of 12 (8.33 %) interactions repeat an item that the user had before',
    'leave_one_out: 1 of 3 (33.3 %) validation items and 2 of 3 (66.7 %) test items never occur'
    ' in training, and ids alone cannot find them',
    'time: 1 of 2 (50 %) validation items and 2 of 4 (50 %) test items never occur in training,'
    ' and ids alone cannot find them',
  ]
  ratings = figures.pop('ratings')
  assert ratings.pop('shares') == pytest.approx(
    {1: 1 / 12, 2: 1 / 12, 3: 3 / 12, 4: 4 / 12, 5: 0.25}
  )
  assert ratings == pytest.approx({'min': 1, 'max': 5, 'mean': 43 / 12})
  # 5 interactions of a, 3 of b, 1 of each other.
  assert figures.pop('popularity') == pytest.approx(
    {'top_1_percent': 5 / 12, 'top_10_percent': 5 / 12, 'gini': 13 / 36, 'items_with_few': 5}
  )
  lengths = {'min': 2, 'q1': 2.75, 'median': 3, 'q3': 3.25, 'max': 4, 'mean': 3}
  known = {'title': 5, 'genres': 1, 'description': 1, 'picture': 2, 'picture URL': 1}
  assert figures == {'density': 0.5, 'lengths': lengths, 'known': known}


def test_text_columns_are_no_descriptions(tmp_path):
  orders = tmp_path / 'orders.csv'
  orders.write_text('user,item\n' + ''.join(f'u{i},i{j}\n' for i in range(3) for j in range(4)))
  goods = tmp_path / 'goods.csv'
  goods.write_text('item,description,brand,size\ni0,Good.,Acme,\ni1,,Acme,7\ni2,Fine.,,\ni3,,,\n')
  flags = ['--source=interactions', f'--raw_dir={orders}', f'--items={goods}']
  build_dataset.main([*flags, '--text_columns=brand,size', f'--data_dir={tmp_path / "data"}'])
  result = run(f'--data_dir={tmp_path / "data"}')
  rows = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
  assert ['description', '2 items (50 %)'] in rows
  assert ['text', 'columns   2 items (50 %)'] in rows


def test_the_command_prints_and_writes_a_page_of_its_own(shop):
  result = run(f'--data_dir={shop}')
  assert (result.returncode, result.stderr) == (0, '')
  rows = [(line[:14].strip(), line[15:]) for line in result.stdout.splitlines()]
  printed = dict(rows)
  assert printed['interactions'] == '12, density 50 %'
  assert printed['dates'] == '2024-01-01 to 2024-01-08'
  assert printed['history'] == '2 to 4 interactions a user, quartiles 2.75, 3, 3.25, mean 3.0'
  assert printed['ratings'] == '1: 8.33 %, 2: 8.33 %, 3: 25 %, 4: 33.3 %, 5: 25 %; mean 3.58'
  info = read_info(shop)
  assert [line[-16:] for what, line in rows if what == 'split'] == [
    record['hash'] for record in info['splits'].values()
  ]
  assert sum(what == 'warning' for what, _ in rows) == 5

  html = (shop / 'describe.html').read_text(encoding='utf-8')
  page = Page(html)
  assert len(page.all('svg')) == 4
  assert len(page.all('h4')) == 6
  for text in ('Worth knowing', '12', '50 %', info['splits']['time']['hash'], info['licence']):
    assert text in page.texts
  # What the data say is text, never markup.
  for text in (SCRIPT, '"><img src=//x.example>', 'Item <i>'):
    assert text in page.texts
  assert '5 interactions · <b> · x' in page.texts
  assert not page.all('i')
  assert not page.all('b')
  assert [picture['alt'] for picture in page.all('img')] == [f'Picture of {SCRIPT}', 'Picture of B']
  # The same folder gives the same page, here in another process.
  before = (shop / 'describe.html').stat().st_ino
  describe.describe(shop)
  assert (shop / 'describe.html').read_text(encoding='utf-8') == html
  assert (shop / 'describe.html').stat().st_ino != before  # replaced, not written into


def test_damaged_and_lost_pictures_are_said_in_words(shop):
  stored = sorted((shop / 'images').iterdir())
  stored[0].write_bytes(stored[0].read_bytes()[:-40])
  (shop / 'images' / 'junk.jpg').write_text('no picture')
  cards = [
    card
    for path in (stored[0], shop / 'images' / 'junk.jpg')
    for group in describe_page.sample_cards(read_items(shop)[:1], np.array([1]), [path])
    for card in group['cards']
  ]
  assert [card['absence'] for card in cards] == ['picture cannot be read'] * 2
  assert [card['picture'] for card in cards] == [None] * 2
  assert 'picture files that items name and that are lost or damaged: 1' in describe.describe(shop)
  page = Page((shop / 'describe.html').read_text())
  assert len(page.all('img')) == 1
  assert 'picture not fetched' in page.texts
  stored[1].unlink()
  assert 'picture files that items name and that are lost or damaged: 2' in describe.describe(shop)
  assert Page((shop / 'describe.html').read_text()).all('img') == []


def test_data_of_ids_alone(sequences, tmp_path):
  build_dataset.build('sequences', tmp_path / 'data', sequences)
  out = tmp_path / 'page.html'
  printed = describe.describe(tmp_path / 'data', out)
  assert 'no times: the order of the raw file is all there is' in printed
  assert 'ratings' not in printed
  assert not (tmp_path / 'data' / 'describe.html').exists()
  page = Page(out.read_text())
  assert [svg['aria-label'].split(':')[0] for svg in page.all('svg')] == [
    'Length of the histories',
    'Popularity of the items',
  ]
  assert {'Item x', 'Item y', 'Item z'} <= set(page.texts)


@pytest.mark.parametrize(
  ('out', 'message'),
  [
    ('missing/page.html', 'there is no folder'),
    ('folder.html', 'is a folder'),
    ('data/dataset.json', r'must end in \.html'),
  ],
)
def test_a_place_that_cannot_take_the_page(out, message, sequences, tmp_path):
  build_dataset.build('sequences', tmp_path / 'data', sequences)
  (tmp_path / 'folder.html').mkdir()
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(InputError, match=message):
    describe.describe(tmp_path / 'data', tmp_path / out)
  assert sorted(tmp_path.rglob('*')) == before
  assert read_info(tmp_path / 'data')


def test_errors_are_one_line_and_an_old_page_stays(sequences, tmp_path):
  result = run(f'--data_dir={tmp_path}')
  assert result.returncode == 2
  assert re.fullmatch(r'error: .*not a prepared dataset.*\n', result.stderr)
  build_dataset.build('sequences', tmp_path / 'data', sequences)
  out = tmp_path / 'page.html'
  out.write_text('old')
  full = ('bash', '-c', 'ulimit -f 1 && exec "$@"', '-')
  result = run(f'--data_dir={tmp_path / "data"}', f'--out={out}', limit=full)
  assert result.returncode == 2
  assert result.stderr == (
    f'error: {out}: cannot be written (File too large); free some space or give another --out\n'
  )
  assert out.read_text() == 'old'
  assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'page.html', 'pairs.txt']


def test_sample_takes_popular_middling_and_rare_items_with_pictures_first(tmp_path):
  picture = tmp_path / 'x.png'
  Image.new('L', (9, 9)).save(picture)
  counts = np.arange(300, 0, -1)
  items = [
    {'original_id': str(i), 'title': '', 'genres': [], 'description': '', 'image': ''}
    for i in range(300)
  ]
  images = [picture if i in (5, 20, 40, 150, 290) else None for i in range(300)]
  groups = describe_page.sample_cards(items, counts, images)
  found = {
    group['name']: [int(card['title'].removeprefix('Item ')) for card in group['cards']]
    for group in groups
  }
  # 40 is not among the tenth with the most interactions.
  assert found['Popular'] == [5, 20, 0, 1, 2, 3, 4, 6]
  assert found['In the middle'][:2] == [150, 149]
  assert found['Rare'] == [290, 299, 298, 297, 296, 295, 294, 293]
  assert groups[0]['span'] == '300 to 280 interactions'


def test_large_and_odd_data_stay_a_small_page():
  rng = np.random.default_rng(0)
  drawn = [
    describe_page.length_plot(rng.zipf(1.5, 100_000) % 1_000_000 + 1, ''),
    describe_page.popularity_plot(rng.zipf(1.5, 1_000_000) % 1_000_000 + 1, ''),
    describe_page.time_plot(rng.integers(-(10**9), 10**9, 1_000_000), None, ''),
    describe_page.rating_plot(rng.normal(size=100_000).astype(np.float32), ''),
    # All users alike, all items alike, all at one time.
    describe_page.length_plot(np.full(5, 3), ''),
    describe_page.popularity_plot(np.ones(2, int), ''),
    describe_page.time_plot(np.full(4, 7), None, ''),
    describe_page.rating_plot(np.ones(4), ''),
  ]
  for plot in drawn:
    assert len(plot['bars']) <= 150
    points = [point for _, lines in plot['curves'] for line in lines for point in line.split()]
    assert len(points) <= 200
    box = plot['box']
    numbers = [x for x, *_ in plot['x_ticks']] + [x for x, *_ in plot['bars']]
    numbers += [float(point.split(',')[0]) for point in points]
    assert all(box['left'] <= x <= box['right'] for x in numbers)
    assert all(box['top'] <= y <= box['bottom'] for _, y, *_ in plot['bars'])
    assert plot['x_ticks']
    assert plot['y_ticks']
  assert sum(bar[-1].height for bar in drawn[0]['bars']) == 100_000
  assert sum(bar[-1].height for bar in drawn[2]['bars']) == 1_000_000
  card = {
    'original_id': 'x',
    'title': '无' * 10**6,
    'genres': ['g'] * 99,
    'image': '',
    'description': 'a ' * 10**6,
  }
  (group,) = describe_page.sample_cards([card], np.array([1]), [None])
  (shown,) = group['cards']
  assert shown['title'] == '无' * 120 + '…'
  assert len(shown['text']) < 200
  assert shown['genres'] == 'g · g · g'


def test_a_share_is_100_percent_only_where_all_are():
  shares = (1, 0.9999, 0.0000123, 0)
  assert [describe_page.percent(share) for share in shares] == [
    '100 %',
    '99.9 %',
    '0.00123 %',
    '0 %',
  ]

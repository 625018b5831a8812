import gzip
import http.server
import json
import shutil
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import build_dataset
from data_prep.prepared import prepare
from data_prep.prepared.prepare import Options
from data_prep.sources import amazon_reviews
from tests.helpers.runs import ROOT
from ur4rec_jax.data.raw.records import Item
from ur4rec_jax.errors import InputError

EVENTS = [
  ('AG2L', 'B00', 5.0, 1_588_687_728_923),
  ('AG2L', 'B01', 4.0, 1_588_687_728_924),
  ('AE74', 'B01', 1.0, 1_300_000_000_000),
  ('AE74', 'B09', 2.0, 1_300_000_000_000),
  ('AG2L', 'B02', 3.0, 833_000_000_000),
]
PICTURE = {'hi_res': None, 'large': 'https://x.example/l.jpg', 'thumb': 'https://x.example/t.jpg'}
METADATA = [
  {
    'main_category': 'All Beauty',
    'title': 'Soap &amp; Co',
    'average_rating': 4.8,
    'features': ['Soft', 'Mild'],
    'description': ['Two', 'parts'],
    'price': 9.99,
    'images': [PICTURE | {'variant': 'MAIN'}, {'large': 'https://x.example/other.jpg'}],
    'store': 'Acme',
    'categories': ['Beauty', 'Soaps'],
    'details': {'Weight': '2 ounces'},
    'parent_asin': 'B00',
  },
  {
    'main_category': None,
    'title': None,
    'features': [],
    'description': [],
    'price': None,
    'images': [],
    'store': None,
    'categories': [],
    'details': {},
    'parent_asin': 'B01',
  },
  {'title': 'Brush', 'price': 'from 3.99', 'details': '{}', 'parent_asin': 'B02'},
  {'title': 'Never reviewed', 'parent_asin': 'B55'},
]
FILES = {'All_Beauty.jsonl': EVENTS, 'meta_All_Beauty.jsonl': METADATA}
HUB = 'McAuley-Lab/Amazon-Reviews-2023'


def review(event: tuple, **more) -> dict:
  user, item, rating, time = event
  return {
    'rating': rating,
    'title': 'Lovely "scent"',
    'text': 'This is\nreally nice. ' * 20,
    'images': [{'small_image_url': 'https://x.example/s.jpg'}],
    'asin': f'{item}-red',
    'parent_asin': item,
    'user_id': user,
    'timestamp': time,
    'helpful_vote': 0,
    'verified_purchase': True,
    **more,
  }


def lines(records: list) -> bytes:
  return b''.join(json.dumps(record).encode() + b'\n' for record in records)


@pytest.fixture
def folder(tmp_path):
  """A folder with the two files of a category as they are downloaded."""
  folder = tmp_path / 'raw'
  folder.mkdir()
  (folder / 'All_Beauty.jsonl').write_bytes(lines(map(review, EVENTS)))
  (folder / 'meta_All_Beauty.jsonl').write_bytes(lines(METADATA))
  return folder


def read(folder, **parameters):
  return amazon_reviews.read(*amazon_reviews.find(folder, parameters), **parameters)


def fault(folder, **parameters) -> str:
  with pytest.raises(InputError) as error:
    prepare.prepare(read(folder, **parameters))
  assert '\n' not in str(error.value)
  assert str(folder) in str(error.value)
  return str(error.value)


def test_reviews_and_metadata_as_downloaded(folder):
  raw = read(folder)
  times = raw.timestamps / raw.ticks_per_second * 1000
  rows = zip(raw.users.to_pylist(), raw.items.to_pylist(), raw.ratings, times, strict=True)
  assert list(rows) == EVENTS
  data = prepare.prepare(raw)
  items = dict(zip(data.item_names, data.items, strict=True))
  assert items == {
    'B00': Item(
      title='Soap & Co',
      genres=('All Beauty', 'Beauty', 'Soaps'),
      description='Two parts\nSoft Mild\nstore: Acme\nprice: 9.99',
      image='https://x.example/l.jpg',
    ),
    'B01': Item(),
    'B02': Item(title='Brush', description='price: from 3.99'),
    'B09': Item(),
  }
  assert data.notes == (
    'of 4 items 1 without metadata, 1 without a title, 1 without a description, 2 without a'
    ' picture: all kept',
  )
  # Milliseconds decide: AG2L has B00 before B01 in one second.
  span = slice(data.offsets[1], data.offsets[2])
  assert [data.item_names[i - 1] for i in data.item_ids[span]] == ['B02', 'B00', 'B01']
  assert data.timestamps[span].tolist() == [833_000_000, 1_588_687_728, 1_588_687_728]


def test_metadata_is_read_for_the_items_that_filters_leave(folder):
  path = folder / 'All_Beauty.jsonl'
  path.write_bytes(path.read_bytes() + lines([review(('AE74', 'B55', 1.0, 5 * 10**11))]))
  asked = []
  raw = read(folder)
  read_items = raw.read_items
  raw = raw._replace(read_items=lambda wanted: asked.append(wanted) or read_items(wanted))
  data = prepare.prepare(raw, Options(min_rating=2))
  assert asked == [data.item_names] == [['B00', 'B01', 'B02', 'B09']]


def write_parquet(path, columns: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(columns), path)


def test_parquet_shards_and_gz_files_give_the_same(folder, tmp_path):
  before = prepare.prepare(read(folder))
  shards = tmp_path / 'shards'
  rows = list(map(review, EVENTS))
  for part, chosen in enumerate((rows[:2], rows[2:])):
    columns = {name: [row[name] for row in chosen] for name in rows[0] if name != 'images'}
    write_parquet(shards / f'raw_review_All_Beauty/full-0000{part}-of-00002.parquet', columns)
  columns = {name: [row.get(name) for row in METADATA] for name in METADATA[0]}
  columns['price'] = [str(value) for value in columns['price']]
  columns['details'] = [str(value) for value in columns['details']]
  sizes = ('hi_res', 'large', 'thumb')
  columns['images'] = [
    {size: [picture.get(size) for picture in value or ()] for size in sizes}
    for value in columns['images']
  ]
  write_parquet(shards / 'raw_meta_All_Beauty/full-00000-of-00001.parquet', columns)
  for path in list(folder.iterdir()):
    (folder / f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
  for place in (shards, folder):
    after = prepare.prepare(read(place))
    assert after.items == before.items
    assert after.notes == before.notes
    for field in ('item_ids', 'timestamps', 'ratings', 'offsets'):
      np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
  metadata, _ = build_dataset.build('amazon_reviews', tmp_path / 'data', shards)
  assert len(metadata['raw_sha256']) == 3
  assert not build_dataset.build('amazon_reviews', tmp_path / 'data', shards)[1]
  # Shards of both kinds have the same names, and are told apart by their folders.
  archive = shutil.make_archive(str(tmp_path / 'packed'), 'zip', shards)
  packed, _ = build_dataset.build('amazon_reviews', tmp_path / 'again', archive)
  assert packed['splits'] == metadata['splits']


def test_one_category_of_several_is_chosen(folder):
  for name in ('Books.jsonl', 'meta_Books.jsonl'):
    (folder / name).write_bytes((folder / name.replace('Books', 'All_Beauty')).read_bytes())
  assert 'several categories (All_Beauty, Books); say which: --category=All_Beauty' in fault(folder)
  assert len(read(folder, category='Books').ratings) == len(EVENTS)
  assert 'no Toys.jsonl or raw_review_Toys/*.parquet in it' in fault(folder, category='Toys')
  (folder / 'Books.jsonl').unlink()
  (folder / 'meta_All_Beauty.jsonl').unlink()
  assert 'reviews of All_Beauty and metadata of Books' in fault(folder)
  (folder / 'meta_Books.jsonl').unlink()
  assert 'no meta_*.jsonl or raw_meta_*/*.parquet in it' in fault(folder)
  (folder / 'All_Beauty.jsonl.gz').write_bytes(b'')
  (folder / 'meta_All_Beauty.jsonl').write_bytes(b'')
  assert 'the same in All_Beauty.jsonl, All_Beauty.jsonl.gz' in fault(folder)


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    (b'{"user_id": "A", ', 'line 7: is no JSON: '),
    (b'{"user_id": "\xff"}', 'line 7: is no JSON: '),
    (b'[1]', 'line 7: is no JSON object'),
    (lines([review(EVENTS[0], user_id=None)]), 'line 7: user_id is empty'),
    (lines([review(EVENTS[0], parent_asin='')]), 'line 7: parent_asin is empty; fill it in'),
    (lines([review(EVENTS[0], timestamp=None)]), 'line 7: timestamp is empty'),
    (lines([review(EVENTS[0], timestamp='now')]), "line 7: timestamp is 'now', not a whole number"),
    (lines([review(EVENTS[0], timestamp=1_588_687)]), 'line 7: timestamp mixes units'),
    (lines([review(EVENTS[0], rating=None)]), 'line 7: rating is nan'),
    (lines([review(EVENTS[0], rating='5')]), "line 7: rating is '5', not a number"),
    (lines([review(EVENTS[0])]).strip() * 2, 'line 7: is no JSON'),
    (lines([review(EVENTS[0])]), 'lines 1 and 7: the same user'),
  ],
)
def test_a_bad_review_is_shown_with_its_line(folder, line, expected):
  path = folder / 'All_Beauty.jsonl'
  path.write_bytes(path.read_bytes() + b'\n' + line)
  message = fault(folder)
  assert message.startswith(str(path))
  assert expected in message


def test_damaged_and_empty_files(folder):
  path = folder / 'All_Beauty.jsonl'
  path.write_bytes(b'\n')
  assert 'the file is empty' in fault(folder)
  path.rename(folder / 'All_Beauty.jsonl.gz').write_bytes(gzip.compress(lines([1]))[:-9])
  assert 'it is damaged' in fault(folder)
  (folder / 'All_Beauty.jsonl.gz').unlink()
  shard = folder / 'raw_review_All_Beauty/0.parquet'
  write_parquet(shard, {'user_id': ['A'], 'asin': ['B']})
  assert "no column 'parent_asin'; its columns are user_id, asin" in fault(folder)
  shard.write_bytes(shard.read_bytes()[:-9])
  assert '0.parquet: cannot be read' in fault(folder)


def test_metadata_that_cannot_be_used_is_counted_and_told(folder):
  path = folder / 'meta_All_Beauty.jsonl'
  bad = [b'{"title": "cut', b'{"title": "x", "parent_asin": null}', b'[]', b'\xff']
  path.write_bytes(b'\n'.join([lines(METADATA[:1]), *bad, lines(METADATA)]))
  notes = prepare.prepare(read(folder)).notes
  assert notes[:2] == (
    'meta_All_Beauty.jsonl: 4 of 9 lines cannot be parsed (lines 3, 4, 5, 6); their items are kept'
    ' without text',
    'meta_All_Beauty.jsonl: 1 repeated items; the first of each counts',
  )
  path.write_bytes(b'\n'.join(bad))
  assert 'none of its 4 lines is an object with the field parent_asin' in fault(folder)


def test_duplicates_are_dropped_when_told(folder):
  path = folder / 'All_Beauty.jsonl'
  path.write_bytes(path.read_bytes() * 2)
  assert 'pass --drop_duplicates' in fault(folder)
  data = prepare.prepare(read(folder), Options(drop_duplicates=True))
  assert data.dropped['interactions'] == {'drop_duplicates': len(EVENTS)}


class _Hub(http.server.BaseHTTPRequestHandler):
  """Of the hub what reading a file takes: the repository's state, a folder's list, the bytes."""

  protocol_version = 'HTTP/1.1'
  revision = 'a' * 40

  def log_message(self, *args):
    pass

  def do_GET(self):
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    files, api = self.server.files, f'/api/datasets/{HUB}'
    if path in (api, f'{api}/revision/{self.revision}'):
      siblings = [{'rfilename': name} for name in files]
      self.answer({'id': HUB, 'sha': self.revision, 'siblings': siblings, 'tags': []})
    elif path.startswith(f'{api}/tree/{self.revision}/'):
      folder = path.removeprefix(f'{api}/tree/{self.revision}/')
      self.answer(
        [
          {'type': 'file', 'oid': 'b' * 40, 'size': len(data), 'path': name}
          for name, data in files.items()
          if name.startswith(folder)
        ]
      )
    elif (name := path.removeprefix(f'/datasets/{HUB}/resolve/{self.revision}/')) in files:
      first, last = self.headers['Range'].removeprefix('bytes=').split('-')
      self.answer(files[name][int(first) : int(last) + 1], 206)
    else:
      self.answer({'error': 'Repository not found'}, 404)

  def answer(self, content, status=200):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)


@pytest.fixture
def hub(folder):
  """Address of a hub on this machine that holds the category, and its files by name."""
  reviews, metadata = ((folder / name).read_bytes() for name in FILES)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Hub) as server:
    server.files = {
      'raw/review_categories/All_Beauty.jsonl': reviews,
      'raw/meta_categories/meta_All_Beauty.jsonl': metadata,
      'README.md': b'',
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', server.files
    server.shutdown()


@pytest.fixture
def build_from_hub(run_build, environment, tmp_path):
  """Builds from a hub at some address, in a process, as libraries read addresses when imported."""

  def build(address: str, *flags: str, **env) -> subprocess.CompletedProcess:
    env = environment | {'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'hf'), **env}
    flags = ('--source=amazon_reviews', f'--data_dir={tmp_path}/data', *flags)
    return run_build(*flags, env=env)

  return build


CATEGORY = (f'--hub_name={HUB}', '--category=All_Beauty')


@pytest.mark.slow
def test_from_the_hub_comes_what_the_files_hold(build_from_hub, hub, folder, tmp_path):
  address, files = hub
  result = build_from_hub(address, *CATEGORY)
  assert (result.returncode, 'written to' in result.stdout) == (0, True), result.stderr
  assert f'read from {HUB} at revision {"a" * 40}' in result.stdout
  metadata = json.loads((tmp_path / 'data/dataset.json').read_text())
  local, _ = build_dataset.build('amazon_reviews', tmp_path / 'local', folder)
  assert metadata['splits'] == local['splits']
  assert metadata['notes'][-1] == local['notes'][-1]
  assert metadata['options']['category'] == 'All_Beauty'
  # There already: without the hub, too.
  result = build_from_hub('http://127.0.0.1:9', *CATEGORY)
  assert (result.returncode, 'already in' in result.stdout) == (0, True)
  result = build_from_hub(address, CATEGORY[0], '--category=Beauty', '--overwrite')
  assert result.returncode == 2
  assert '--category must be one of All_Beauty\n' in result.stderr
  files['raw/review_categories/All_Beauty.jsonl'] += b'{"user_id": '
  result = build_from_hub(address, *CATEGORY, '--overwrite')
  assert result.returncode == 2
  assert 'raw/review_categories/All_Beauty.jsonl, line 6: is no JSON' in result.stderr


@pytest.mark.parametrize('env', [{}, {'HF_HUB_OFFLINE': '1'}])
def test_without_a_network_the_way_out_is_raw_dir(build_from_hub, tmp_path, env):
  result = build_from_hub('http://127.0.0.1:9', *CATEGORY, **env)
  assert (result.returncode, result.stderr.count('\n')) == (2, 1), result.stderr
  assert result.stderr.startswith(f'error: {HUB}: cannot be read from the hub (')
  assert 'pass --raw_dir with them' in result.stderr
  assert sorted(path.name for path in tmp_path.iterdir() if path.name != 'hf') == []


def test_without_the_library_the_way_out_is_pip(tmp_path):
  # None makes Python find no such module.
  program = """
import sys
from data_prep import build_dataset
sys.modules['datasets'] = None
build_dataset.main()
"""
  flags = ['--source=amazon_reviews', f'--data_dir={tmp_path}/data', *CATEGORY]
  words = [sys.executable, '-c', program, *flags]
  result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  assert (result.returncode, result.stderr.count('\n')) == (2, 1), result.stderr
  assert 'pip install "datasets>=4.0"' in result.stderr
  assert not (tmp_path / 'data').exists()


def test_flags_that_do_not_go_together(folder, tmp_path):
  for parameters, raw_dir, expected in [
    ({}, None, 'or --hub_name and --category'),
    ({'hub_name': HUB}, None, '--category is missing'),
    ({'category': 'All_Beauty'}, None, 'or --hub_name and --category'),
    ({'hub_name': HUB, 'category': 'All_Beauty'}, folder, 'pass one of them'),
  ]:
    with pytest.raises(InputError, match=expected):
      build_dataset.build('amazon_reviews', tmp_path / 'data', raw_dir, parameters=parameters)

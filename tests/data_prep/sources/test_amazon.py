import ast
import gzip
import json

import numpy as np
import pytest

from data_prep.prepared import prepare
from data_prep.prepared.prepare import Options
from data_prep.sources import amazon, raw_files
from ur4rec_jax.errors import InputError

REVIEW = {
  'reviewerName': 'A "B"',
  'helpful': [0, 1],
  'reviewText': 'Good,\nreally à "good"',
  'summary': 'Ok',
  'reviewTime': '01 30, 2014',
}
EVENTS = [
  ('A1', 'B1', 5.0, 1_391_040_000),
  ('A1', 'B2', 4.0, 1_391_040_000),
  ('A2', 'B2', 1.0, 1_300_000_000),
  ('A2', 'B9', 2.0, 1_300_000_000),
  ('A1', '0001', 3.0, 1_200_000_000),
]
METADATA = [
  "{'asin': '0001', 'title': \"L'Or &amp; Co\", 'price': 9.5, 'imUrl': 'http://x.example/1.jpg',"
  " 'related': {'also_viewed': ['B1']}, 'categories': [['Beauty', 'Nails'], ['Beauty', 'Gifts']],"
  " 'description': 'Two\\nlines', 'brand': 'Or', 'salesRank': {'Beauty': 7}}",
  "{'asin': 'B1', 'categories': [['Beauty']], 'imUrl': ''}",
  "{'asin': 'B2', 'title': 'Brush'}",
  "{'asin': 'IDLE', 'title': 'Never reviewed'}",
]


@pytest.fixture
def folder(tmp_path):
  """A folder as it is downloaded: JSON reviews, metadata of Python literals, both gzipped."""
  lines = [
    json.dumps(
      {'reviewerID': user, 'asin': item, 'overall': stars, 'unixReviewTime': time, **REVIEW}
    )
    for user, item, stars, time in EVENTS
  ]
  write(tmp_path, 'reviews_Beauty_5.json.gz', lines)
  write(tmp_path, 'meta_Beauty.json.gz', METADATA)
  return tmp_path


def write(folder, name: str, lines: list[str]) -> None:
  data = ('\n'.join(lines) + '\n').encode()
  (folder / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)


def read(folder):
  return amazon.read(*raw_files.find_files(amazon.FILES, folder))


def fault(folder) -> str:
  with pytest.raises(InputError) as error:
    read(folder)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_reviews_and_metadata_as_downloaded(folder):
  raw = read(folder)
  rows = zip(raw.users.to_pylist(), raw.items.to_pylist(), raw.ratings, raw.timestamps, strict=True)
  assert list(rows) == EVENTS
  assert raw.table['0001'] == prepare.Item(
    title="L'Or & Co",
    genres=('Beauty', 'Nails', 'Gifts'),
    description='Two\nlines\nbrand: Or\nprice: 9.5',
    image='http://x.example/1.jpg',
  )
  assert raw.table['B1'] == prepare.Item(genres=('Beauty',))
  assert raw.notes == ('1 items have no metadata: kept without text',)
  data = prepare.prepare(raw)
  # Equal times keep the order of the file.
  names = [data.item_names[i - 1] for i in data.item_ids[: data.offsets[1]]]
  assert names == ['0001', 'B1', 'B2']
  assert data.dropped['items'] == {'never_interacted': 1}
  assert prepare.counts(data)['items'] == 4


def test_two_reviews_in_a_line_are_one_message(folder):
  lines = [json.dumps(dict(zip(amazon._FIELDS, event, strict=True))) for event in EVENTS]
  bad = lines[0].replace('"B1"', '""')
  write(folder, 'reviews_Beauty_5.json.gz', [' '.join([*lines, bad])])
  assert 'not one JSON object a line; download the file again' in fault(folder)


def test_files_may_be_unpacked_and_metadata_json(folder):
  before = read(folder)
  for path in list(folder.iterdir()):
    (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
  write(folder, 'meta_Beauty.json', [json.dumps(ast.literal_eval(line)) for line in METADATA])
  after = read(folder)
  assert after.table == before.table
  np.testing.assert_array_equal(after.timestamps, before.timestamps)


def test_metadata_lines_that_cannot_be_read_are_counted_and_told(folder):
  broken = ["{'asin': 'B9', 'title': 'cut o", "{'title': 'no asin'}", '{"asin": open("x")}', '[1]']
  write(folder, 'meta_Beauty.json.gz', [*METADATA[:2], *broken, METADATA[1], METADATA[2]])
  raw = read(folder)
  assert raw.notes == (
    'meta_Beauty.json.gz: 4 of 8 lines cannot be parsed (lines 3, 4, 5, 6); their items are kept'
    ' without text',
    'meta_Beauty.json.gz: 1 repeated items; the first of each counts',
    '1 items have no metadata: kept without text',
  )
  write(folder, 'meta_Beauty.json.gz', broken)
  assert 'none of its 4 lines is an object with the field asin' in fault(folder)


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('{"reviewerID": "A3", "asin": ', 'line 3: is no JSON: '),
    ('[]', 'line 3: is no JSON object'),
    ('{"reviewerID": "A3", "overall": 1, "unixReviewTime": 1}', 'line 3: asin is missing or empty'),
    ('{"reviewerID": "", "asin": "B", "overall": 1, "unixReviewTime": 1}', 'line 3: reviewerID is'),
    ('{"reviewerID": 3, "asin": "B", "overall": 1, "unixReviewTime": 1}', 'is 3, not a text'),
    (
      '{"reviewerID": "A", "asin": "B", "overall": 1, "unixReviewTime": "01 30, 2014"}',
      "line 3: unixReviewTime is '01 30, 2014', not a whole number",
    ),
    ('{"reviewerID": "A", "asin": "B", "unixReviewTime": 1}', 'line 3: overall is missing'),
  ],
)
def test_a_bad_review_is_shown(folder, line, expected):
  good = json.dumps({'reviewerID': 'A', 'asin': 'B', 'overall': 1.0, 'unixReviewTime': 5})
  write(folder, 'reviews_Beauty_5.json.gz', [good, '', line])
  message = fault(folder)
  assert message.startswith(str(folder / 'reviews_Beauty_5.json.gz'))
  assert expected in message


def test_damaged_and_missing_files(folder):
  path = folder / 'reviews_Beauty_5.json.gz'
  whole = path.read_bytes()
  path.write_bytes(whole[:-20])
  assert f'{path}: cannot be unpacked' in fault(folder)
  path.write_bytes(b'')
  assert 'the file is empty' in fault(folder)
  path.write_bytes(whole)
  metadata = folder / 'meta_Beauty.json.gz'
  content = metadata.read_bytes()
  metadata.write_bytes(content[:-20])
  assert f'{metadata}: cannot be unpacked' in fault(folder)
  metadata.write_bytes(gzip.compress(b"{'asin': 'B', 'title': '\xe9'}\n"))
  assert 'line 1: bytes that are not UTF-8' in fault(folder)
  metadata.unlink()
  assert 'no meta_*.json or items.jsonl in it (it holds reviews_Beauty_5.json.gz)' in fault(folder)
  write(folder, 'reviews_Books_5.json.gz', [])
  assert '2 files match reviews_*.json or interactions.csv' in fault(folder)
  assert 'No such file or directory' in fault(folder / 'nowhere')


def test_the_pair_of_csv_and_json_lines(tmp_path):
  lines = ['reviewerID,asin,p5_user,p5_item,position,unixReviewTime,timestamp_exact']
  lines += [f'{u},{i},1,1,0,{time},1' for u, i, _, time in EVENTS]
  write(tmp_path, 'interactions.csv', lines)
  items = [
    {'asin': i, 'p5_id': n, 'title': f'T{n}', 'brand': 'O', 'categories': ['A', 'B'], 'price': None}
    for n, i in enumerate(['B1', 'B2', 'B9', '0001'])
  ]
  write(tmp_path, 'items.jsonl', [json.dumps(item) for item in items])
  raw = read(tmp_path)
  data = prepare.prepare(raw, Options(min_length=2))
  assert [data.item_names[i - 1] for i in data.item_ids[:3]] == ['0001', 'B1', 'B2']
  assert raw.table['B2'] == prepare.Item('T1', ('A', 'B'), 'brand: O')
  write(tmp_path, 'items.jsonl', [json.dumps(item) for item in [*items, items[0]]])
  assert "line 5: item 'B1' is in the table twice, first in line 1" in fault(tmp_path)

import gzip
import json
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from data_prep.llm_text import texts
from tests.helpers.runs import ROOT
from ur4rec_jax.data.dataset import iterate_texts, load_dataset, read_info, texts_origin
from ur4rec_jax.encoders import text
from ur4rec_jax.errors import InputError

ORIGIN = {'provider': 'acme', 'model': 'm', 'is_mock': False, 'time': '2024-01-01T00:00:00Z'}
ITEMS = [
  {'id': 'z/1', 'title': 'Zero', 'description': 'Its own. And more.'},
  {'id': '../x', 'title': 'Ex', 'description': 'No description available.'},
  {'id': 'ü', 'title': 'Ü', 'description': ''},
  {'id': 'b', 'title': 'Be', 'description': 'Bees at 3.5 m. Mr. B.'},
]
ROWS = [(user, item['id'], time) for user in ('10', '9') for time, item in enumerate(ITEMS)]
# Writes again and again, killed before its first, second, ... step in the file system, until one
# run gets through. Each run first reads what is there.
KILLS = """
import os, signal, sys
from data_prep.llm_text import texts
from ur4rec_jax.data.dataset import iterate_texts, texts_origin

data_dir = sys.argv[1]
STEPS = ('os.mkdir', 'os.rename', 'shutil.rmtree', 'ctypes.dlopen')

def run(number):
  if number:
    sentences = [row['sentences'] for row in iterate_texts(data_dir, 'item')]
    origin = texts_origin(data_dir, 'item')
    assert sentences[1] == sentences[3] == [origin['provider']], sentences
    print(origin['provider'], flush=True)
  steps = 0
  def count(event, arguments):
    nonlocal steps
    writes = event == 'open' and '.incomplete-' in str(arguments[0])
    if number and (event in STEPS or writes):
      steps += 1
      if steps == number:
        os.kill(os.getpid(), signal.SIGKILL)
  sys.addaudithook(count)
  name = f'run{number}'
  texts.write_texts(data_dir, 'item', {'b': name, 'ü': name}, {'provider': name, 'is_mock': False})

number, status = 0, signal.SIGKILL
while number <= 1 or status == signal.SIGKILL:
  pid = os.fork()
  if not pid:
    run(number)
    sys.stdout.flush()
    os._exit(0)
  status = os.waitpid(pid, 0)[1]
  number += 1
assert status == 0
"""


@pytest.fixture
def shop(make_shop) -> Path:
  return make_shop(ROWS, ITEMS, time_split='0.3,0.7')


def contents(folder: Path) -> dict[str, bytes]:
  files = (path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def sentences(data_dir: Path, kind: str) -> list[list[str]]:
  return [row['sentences'] for row in iterate_texts(data_dir, kind)]


class OneAtATime(Mapping):
  """Texts that are looked up, as those of a large store on disk."""

  def __init__(self, given: dict[str, str]):
    self._given = given

  def __getitem__(self, name: str) -> str:
    return self._given[name]

  def __iter__(self):
    return iter(self._given)

  def __len__(self) -> int:
    return len(self._given)


def test_item_texts_are_joined_by_id_and_fall_back_on_the_own_description(shop):
  given = {
    '../x': 'An ex. 一。二！',
    'b': unicodedata.normalize('NFD', 'Bié\u202e.'),
    'gone': 'Lost.',
  }
  before = contents(shop)
  counts = texts.write_texts(shop, 'item', OneAtATime(given), ORIGIN)
  assert counts == {'llm': 2, 'dataset': 1, 'without_text': 1, 'unknown_ids': 1}
  builder = tfds.builder_from_directory(shop / 'item_texts/1.0.0')
  rows = list(builder.as_data_source(split='items'))
  # In the order of item_id: '../x', 'b', 'z/1', 'ü'.
  assert [row['original_id'].decode() for row in rows] == ['../x', 'b', 'z/1', 'ü']
  assert [row['source'] for row in rows] == [b'llm', b'llm', b'dataset', b'']
  assert [row['text'].decode() for row in rows] == [
    'An ex. 一。二！',
    'Bié.',
    'Its own. And more.',
    '',
  ]
  assert sentences(shop, 'item') == [
    ['An ex.', '一。', '二！'],
    ['Bié.'],
    ['Its own.', 'And more.'],
    [],
  ]
  origin = texts_origin(shop, 'item')
  assert origin == {**ORIGIN, 'kind': 'item', 'counts': counts} == dict(builder.info.metadata)
  after = contents(shop)
  assert {name: after[name] for name in before} == before
  assert {path.name for path in shop.iterdir()} == {
    *{Path(name).parts[0] for name in before},
    'item_texts',
  }

  # The same texts, the same bytes; the time is in the JSON only.
  texts.write_texts(shop, 'item', given, {**ORIGIN, 'time': 'later'})
  changed = contents(shop)
  assert {name for name in after if after[name] != changed[name]} == {
    'item_texts/1.0.0/metadata.json'
  }


@pytest.mark.parametrize(
  ('origin', 'source'),
  [({'provider': 'mock', 'is_mock': True}, 'mock'), ({'provider': 'import'}, 'import')],
)
def test_every_text_says_what_it_is(origin, source, shop):
  counts = texts.write_texts(shop, 'item', {'z/1': 'Of another.'}, ORIGIN | origin)
  assert counts == {source: 1, 'dataset': 1, 'without_text': 2, 'unknown_ids': 0}
  assert sentences(shop, 'item')[2] == ['Of another.']


def test_user_texts_are_of_one_split(shop):
  dataset = load_dataset(shop)
  split = {'split_name': 'leave_one_out', 'split_hash': dataset.split_hash}
  texts.write_texts(shop, 'user', {'10': 'Likes it. A lot.'}, ORIGIN | split)
  # Users are ordered by number: 9, 10.
  assert sentences(shop, 'user') == [[], ['Likes it.', 'A lot.']]
  assert texts_origin(shop, 'user')['split_hash'] == dataset.split_hash
  by_time = load_dataset(shop, 'time').split_hash
  info = read_info(shop)
  info['splits']['leave_one_out']['hash'] = by_time
  message = f'for the split leave_one_out {dataset.split_hash}, which this .* has not.*--kind=users'
  with pytest.raises(InputError, match=message):
    text.origin(shop, 'user', info)
  before = contents(shop)
  for wrong, message in (
    ({'split_hash': by_time}, f'{by_time}, but the dataset has {dataset.split_hash}'),
    ({'split_name': 'week'}, "no split 'week', only leave_one_out, time"),
  ):
    with pytest.raises(InputError, match=message):
      texts.write_texts(shop, 'user', {'10': 'x'}, ORIGIN | split | wrong)
  assert contents(shop) == before


def test_texts_that_are_not_of_the_dataset_are_refused(shop, make_shop):
  with pytest.raises(InputError, match=r'no item texts; write them: python -m data_prep\.generate'):
    texts_origin(shop, 'item')
  texts.write_texts(shop, 'item', {'b': 'Good.'}, ORIGIN)
  before = contents(shop)
  with pytest.raises(InputError, match="no item '1', nor any other of the 2 ids with a text"):
    texts.write_texts(shop, 'item', {'1': 'x', '2': 'y'}, ORIGIN)
  assert contents(shop) == before
  assert not list(shop.glob('*incomplete*'))
  bare = make_shop(ROWS, [{'id': item['id'], 'title': 'T'} for item in ITEMS], name='bare')
  with pytest.raises(InputError, match='no text about any item'):
    texts.write_texts(bare, 'item', {'b': 'n/a'}, ORIGIN)
  assert not (bare / 'item_texts').exists()
  # Texts copied from another dataset, and damaged ones.
  fewer = make_shop([row for row in ROWS if row[1] != 'b'], ITEMS, name='fewer')
  (shop / 'item_texts').rename(fewer / 'item_texts')
  with pytest.raises(InputError, match="item 'z/1' has the text of 'b'; write the texts again"):
    list(text.texts(fewer, 'item', 8))
  (record,) = fewer.glob('item_texts/1.0.0/*.array_record*')
  record.write_bytes(record.read_bytes()[:-100])
  with pytest.raises(InputError, match=r'item_texts cannot be read.*--kind=items'):
    list(text.texts(fewer, 'item', 8))


def test_killed_at_any_step_the_old_texts_are_there_or_the_new(shop):
  done = subprocess.run(
    [sys.executable, '-c', KILLS, shop], cwd=ROOT, capture_output=True, text=True, timeout=100
  )
  assert done.returncode == 0, done.stderr
  seen = done.stdout.split()
  assert seen[0] == seen[4] == 'run0'  # killed while writing
  assert seen[-1] == f'run{len(seen) - 1}'  # killed when only the old was left to be removed
  assert len(seen) > 8
  assert texts_origin(shop, 'item')['provider'] == f'run{len(seen)}'
  assert not list(shop.glob('item_texts.*'))


def test_a_text_of_any_length_and_script(shop):
  long = 'Слово и дело. ' * 80_000 + 'x' * 5000
  odd = 'שלום עולם. 😀 مرحبا؟ \ud800 \x00 end'
  texts.write_texts(shop, 'item', {'b': long, 'ü': odd}, ORIGIN)
  found = sentences(shop, 'item')
  assert len(found[1]) > 80_000
  assert found[3] == ['שלום עולם.', '😀 مرحبا؟', '? end']


def test_import_and_export(shop, tmp_path):
  given = {'../x': 'An ex. "Quoted"', 'ü': 'Grüße 世界', 'b': 'No description available.'}
  (tmp_path / 'in.json').write_text(json.dumps(given))
  lines = [
    {'sku': '../x', 'about': given['../x']},
    {'sku': 'ü', 'about': given['ü'], 'n': 1},
    {'sku': 'b', 'about': None},
    {'sku': '7'},
  ]
  (tmp_path / 'in.jsonl').write_text('\n\n'.join(json.dumps(line) for line in lines))
  found = texts.read_json(tmp_path / 'in.json')
  assert found == {**given, 'b': ''}
  assert texts.read_json(tmp_path / 'in.jsonl', 'sku', ['about']) == {**found, '7': ''}
  joined = texts.read_json(tmp_path / 'in.jsonl', 'sku', ['about', 'sku'])
  assert (joined['ü'], joined['b']) == ('Grüße 世界\nü', 'b')
  texts.write_texts(shop, 'item', found, {'provider': 'import', 'is_mock': False})
  # The placeholder is no text: item b keeps its own.
  expected = {**given, 'b': ITEMS[3]['description'], 'z/1': ITEMS[0]['description']}
  out = tmp_path / 'out.json'
  assert texts.write_json(shop, 'item', out) == 4
  assert texts.read_json(out) == expected
  assert 'Grüße 世界' in out.read_text(encoding='utf-8')
  with pytest.raises(InputError, match='has no user texts'):
    texts.write_json(shop, 'user', out)
  (tmp_path / 'folder').mkdir()
  for path in (tmp_path / 'folder', tmp_path / 'no' / 'out.json'):
    with pytest.raises(InputError, match='cannot be written'):
      texts.write_json(shop, 'item', path)
  assert texts.read_json(out) == expected
  assert not list(tmp_path.glob('*.incomplete-*'))


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.json', '{"1": "a"', 'a.json: is no JSON'),
    ('a.json', '{"1": "a"}\n{"2": "b"}', 'call a file with an object a line .jsonl'),
    ('a.json', '["a"]', 'must hold one object'),
    ('a.json', '"a"', 'must hold one object'),
    ('a.json', '{}', 'no texts in it'),
    ('a.json', ' ', 'the file is empty'),
    ('a.json', '[' * 100_000, 'is no JSON'),
    ('a.json', '{"1": "a", "1": "b"}', "'1' is there twice"),
    ('a.json', '{"1": ["a"]}', "the text of '1' is .*no text"),
    ('a.json', '{"1": {"text": "a"}}', "the text of '1' is .*no text"),
    ('a.json', b'{"1": "\xff"}', 'is no JSON'),
    ('a.jsonl', '{"id": 1, "text": "a"}\n{"text": "b"}', "line 2: has no field 'id', only text"),
    ('a.jsonl', '{"id": 1.5, "text": "a"}', 'id 1.5 is neither text nor a whole number'),
    ('a.jsonl', '{"id": true, "text": "a"}', 'id True is neither'),
    ('a.jsonl', '{"id": 1, "plot": "a"}', "no line has a 'text'"),
    ('a.jsonl', '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', "line 2: '1' is there twice"),
    ('a.jsonl', 'one\n', 'line 1: is no JSON'),
    ('a.jsonl', '\n', 'no texts in it'),
    # Without the time, which would be another one in each process that collects the tests.
    ('a.jsonl.gz', gzip.compress(b'one\n', mtime=0), 'line 1: is no JSON'),
  ],
)
def test_a_file_that_is_not_what_it_should_be(name, content, message, tmp_path):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(InputError, match=message):
    texts.read_json(path)


def test_a_missing_file_is_not_called_broken(tmp_path):
  with pytest.raises(InputError, match=r'^[^ ]*none\.json: cannot be read .*; make it readable$'):
    texts.read_json(tmp_path / 'none.json')

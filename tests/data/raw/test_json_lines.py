"""JSON lines as tables: the same rows as in CSV, and one message for a wrong line."""

import csv
import gzip
import json
import re
import shlex
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ur4rec_jax.data.raw import interactions, json_lines, tables
from ur4rec_jax.data.raw.records import NoRows
from ur4rec_jax.errors import InputError

IDS = st.text('ab07 -",;.Zé🛒', min_size=1, max_size=4) | st.integers(-5, 10**30).map(str)
ROW = st.fixed_dictionaries(
  {'user_id': IDS, 'item_id': IDS, 'timestamp': st.integers(0, 10**9).map(str)},
  optional={
    'rating': st.sampled_from(['1', '1.0', '2.50', '-0.5', '3e0', '']),
    'kind': st.sampled_from(['buy', 'view', 'other', '']),
  },
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """One folder for all examples of a property."""
  return tmp_path_factory.mktemp('lines')


def write(path, *lines: str):
  path.write_text(''.join(f'{line}\n' for line in lines))
  return path


def read(path, **parameters):
  return interactions.read(*interactions.find(path, parameters), **parameters)


def outcome(path, **parameters):
  """The rows as the build takes them, or the message without the place."""
  try:
    raw = read(path, quoting='standard', **parameters)
  except InputError as error:
    return re.sub(r'lines? \d+( and \d+)?', 'line', str(error).replace(str(path), ''))
  ratings = None if raw.ratings is None else raw.ratings.tolist()
  users, items = raw.users.to_pylist(), raw.items.to_pylist()
  return users, items, raw.timestamps.tolist(), ratings, raw.dropped, raw.notes, raw.hints


def fault(path, **parameters) -> str:
  with pytest.raises(InputError) as error:
    read(path, **parameters)
  return str(error.value)


def as_line(row, draw) -> str:
  """Writes an object whose numbers are with or without quotes."""

  def written(value: str) -> str:
    is_number = re.fullmatch(r'-?(0|[1-9]\d*)(\.\d+)?(e\d+)?', value)
    return value if is_number and draw(st.booleans()) else json.dumps(value)

  return '{' + ', '.join(f'{json.dumps(name)}: {written(row[name])}' for name in row) + '}'


@settings(max_examples=60)
@given(
  rows=st.lists(ROW, min_size=1, max_size=12),
  name=st.sampled_from(['rows.json', 'rows.jsonl', 'rows.ndjson.gz']),
  options=st.sampled_from(
    [
      {},
      {'where': 'timestamp > 9'},
      {'where': "item_id != 'a' and rating > 0"},
      {'rating_column': 'none', 'event_column': 'kind', 'event_weights': 'buy=2,view=1'},
    ]
  ),
  data=st.data(),
)
def test_lines_say_what_a_csv_file_of_the_same_rows_says(folder, rows, name, options, data):
  rows[0] = {'rating': '1', 'kind': 'buy'} | rows[0]
  table, path = folder / 'rows.csv', folder / name
  with table.open('w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]), restval='')
    writer.writeheader()
    writer.writerows(rows)
  lines = '\n'.join(as_line(row, data.draw) for row in rows).encode()
  path.write_bytes(gzip.compress(lines) if name.endswith('.gz') else lines)
  files = (tables.open_file(path), tables.open_file(table, quoting='standard'))
  found, expected = (tables.read(file, list(file.columns)) for file in files)
  assert found.to_pydict() == expected.to_pydict()
  assert outcome(path, **options) == outcome(table, **options)


def test_numbers_stay_as_they_are_written_and_what_is_missing_is_empty(tmp_path):
  values = ['12345678901234567890123', '1.0', '1', '-0', '1.10', '1e400', 'NaN', '"007"', '""']
  path = write(
    tmp_path / 'a.jsonl',
    *(f'{{"a": {value}}}' for value in values),
    '{"a": null, "b": true}',
    '',
    '{"b": false, "a": "\\ud83d\\u0041"}',
  )
  file = tables.open_file(path)
  found = tables.read(file, ['a', 'b']).to_pydict()
  assert found['a'] == [*(value.strip('"') for value in values), '', '\\ud83dA']
  assert found['b'] == [''] * len(values) + ['true', 'false']
  assert str(tables.place(file, len(values) + 1)) == f'{path}, line {len(values) + 3}'


def test_keys_are_of_all_lines_and_batches_end_anywhere(tmp_path, monkeypatch):
  rows = [{'user': f'u{i}', 'item': i % 3, 'time': 1_700_000_000 + i} for i in range(20)]
  rows[17]['kind'] = 'buy'
  path = write(tmp_path / 'a.jsonl', *map(json.dumps, rows))
  whole = outcome(path)
  for name, value in (('_BATCH_ROWS', 3), ('_BATCH_CHARACTERS', 40)):
    monkeypatch.setattr(json_lines, name, value)
    assert len(list(tables.record_batches(tables.open_file(path), ['user', 'item', 'time']))) > 6
    assert outcome(path) == whole
  raw = read(path, event_column='kind', event_weights='buy=3')
  assert (raw.users.to_pylist(), raw.ratings.tolist()) == (['u17'], [3])
  assert raw.where(0) == f'{path}, line 18'


def test_lists_and_objects_are_refused_only_where_they_are_needed(tmp_path):
  path = write(
    tmp_path / 'a.jsonl',
    '{"user": "a", "item": "x", "quantity": {"n": 1}, "tags": [], "bought": "2024-01-01"}',
    '{"user": "b", "item": "y", "quantity": 1, "tags": ["t"], "bought": "2024-01-02"}',
  )
  assert read(path).users.to_pylist() == ['a', 'b']
  assert 'tags is of type list<item: string>; write one row' in fault(path, item_column='tags')
  assert 'quantity is of type struct<>; write one row' in fault(path, where='quantity > 0')
  message = fault(write(path, '{"who": 1, "item": 2}'))
  assert 'no column is recognised as the user (its columns are who, item)' in message


def test_keys_in_objects_are_columns(tmp_path):
  path = write(
    tmp_path / 'a.jsonl',
    '{"ts": 1700000000000, "user": {"id": 7, "plan": {"name": "free"}}, "track": null}',
    '{"ts": 1700000000001, "user": {"id": 8}, "track": {"id": "x", "tags": ["a"]}}',
    '{"ts": 1700000000002, "user": {"id": 7}, "track": {"id": "y"}, "user.id": 9}',
  )
  file = tables.open_file(path)
  assert file.columns == ('ts', 'user.id', 'user.plan.name', 'track.id', 'track.tags')
  found = tables.read(file, ['user.id', 'user.plan.name', 'track.id']).to_pydict()
  assert found == {
    'user.id': ['7', '8', '9'],
    'user.plan.name': ['free', '', ''],
    'track.id': ['', 'x', 'y'],
  }
  assert 'line 1: track.id is empty' in fault(path)
  assert 'track.tags is of type list' in fault(path, item_column='track.tags')
  lines = path.read_text().splitlines()
  raw = read(write(path, *lines[1:]), where='user.id < 9')
  assert (raw.users.to_pylist(), raw.items.to_pylist()) == (['8'], ['x'])


def test_keys_that_are_ids_are_no_columns(tmp_path, monkeypatch):
  monkeypatch.setattr(json_lines, '_MOST_COLUMNS', 9)
  rows = [{'user': f'u{i}', 'item': 'x', 'seen': {f'i{i}': 1, f'j{i}': {}}} for i in range(20)]
  path = write(tmp_path / 'a.jsonl', *map(json.dumps, rows))
  assert tables.open_file(path).columns == ('user', 'item', 'seen')
  assert read(path).users.to_pylist() == [row['user'] for row in rows]
  deep = '{"a":' * 900 + '1' + '}' * 900
  write(path, f'{{"user": "a", "item": "x", "deep": {deep}}}')
  assert read(path).users.to_pylist() == ['a']


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('{"user": "b"', 'line 3: is no JSON ('),
    ('user,item', "'user,item'; write one object a line"),
    ('["b", "y"]', 'line 3: is no JSON object'),
    ('[' * 100_000, 'line 3: is no JSON ('),
    (b'{"user": "\xff"}', 'line 3: bytes that are not UTF-8'),
    ('{"user": "b", "item": ""}', 'line 3: item is empty'),
    ('{"user": "b"}', 'line 3: item is empty'),
    ('{"user": "b", "item": "y\\nz"}', 'line 3: item is no text on one line'),
  ],
)
def test_a_broken_line_is_one_message_with_its_number(tmp_path, line, expected):
  path = tmp_path / 'a.jsonl'
  line = line if isinstance(line, bytes) else line.encode()
  path.write_bytes(b'{"user": "a", "item": "x"}\n\n' + line + b'\n')
  message = fault(path)
  assert expected in message
  assert '\n' not in message


def test_lines_in_utf_16_are_named(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes('{"user": "a", "item": "x"}\n'.encode('utf-16-le'))
  assert 'line 1: bytes that are not UTF-8 but seem to be UTF-16; save' in fault(path)


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ("it's.json", '[\n {"user": 12345678901234567890123, "item": "007"}\n]\n'),
    ('one.jsonl', '[{"user": 12345678901234567890123, "item": "007"}]'),
    ('steam.json.gz', "{u'user': 12345678901234567890123, 'item': u'007', 'is': True}\n"),
  ],
)
def test_other_files_name_the_command_that_makes_lines_of_them(
  tmp_path, monkeypatch, name, content
):
  path = tmp_path / name
  path.write_bytes(gzip.compress(content.encode()) if name.endswith('.gz') else content.encode())
  command = fault(path).partition('write one object a line: ')[2]
  monkeypatch.chdir(tmp_path)
  subprocess.run(['bash', '-c', command], check=True)
  raw = read(tmp_path / shlex.split(command)[-1])
  assert (raw.users.to_pylist(), raw.items.to_pylist()) == (['12345678901234567890123'], ['007'])


def test_parts_without_lines_are_skipped_and_files_beside_other_tables_are_no_parts(tmp_path):
  folder = tmp_path / 'log'
  folder.mkdir()
  line = '{"user": "a", "item": "x"}'
  for name, content in (('0.jsonl', ''), ('1.jsonl', line), ('2.jsonl', '\n\n'), ('3.jsonl', line)):
    (folder / name).write_text(content)
  raw = read(folder)
  assert raw.users.to_pylist() == ['a', 'a']
  assert '2 of 4 files have no rows: skipped' in raw.notes
  with pytest.raises(NoRows, match='the file is empty'):
    read(folder / '2.jsonl')
  write(folder / 'rows.csv', 'user,item', 'b,y')
  assert read(folder).users.to_pylist() == ['b']

"""Rows are chosen by conditions and kinds of events, and other columns are not forgotten."""

import json

import pytest

from data_prep import build_dataset
from data_prep.prepared import prepare
from ur4rec_jax.data.raw import interactions
from ur4rec_jax.errors import InputError

HEADER = 'customer,sku,purchased_at,quantity,price,event\n'
ROWS = [
  'a,x,2024-01-01,1,2.5,view',
  'a,y,2024-01-02,-1,2.5,buy',
  'b,x,2024-01-03, 2,2.5,cart',
  'b,y,2024-01-04,,,buy',
  'b,z,2024-01-05,3,1,view',
  'c,z,2024-01-06,-2,1, buy',
]


@pytest.fixture
def rows(tmp_path):
  """Two files, so that positions are those in the right file."""
  folder = tmp_path / 'orders'
  folder.mkdir()
  for part in (0, 1):
    (folder / f'{part}.csv').write_text(HEADER + '\n'.join(ROWS[3 * part : 3 * part + 3]) + '\n')
  return folder


def read(path, **flags):
  return interactions.read(*interactions.find(path, flags), **flags)


def fault(path, **flags) -> str:
  with pytest.raises(InputError) as error:
    prepare.prepare(read(path, **flags))
  return str(error.value)


def pairs(raw) -> list[tuple[str, str]]:
  return list(zip(raw.users.to_pylist(), raw.items.to_pylist(), strict=True))


def test_returns_are_told_of_and_left_out_on_request(rows):
  raw = read(rows)
  assert raw.notes[0].endswith('time = purchased_at')
  assert raw.hints[0] == 'ignored columns: quantity, price, event'
  assert 'quantity is negative in 2 rows' in raw.hints[1]
  assert "--where='quantity > 0'" in raw.hints[1]
  raw = read(rows, where='quantity > 0')
  assert pairs(raw) == [('a', 'x'), ('b', 'x'), ('b', 'z')]
  assert raw.dropped == {'where': 3}
  assert raw.dropped_users == {'event_weights': [], 'where': ['c']}
  assert raw.hints[0] == 'ignored columns: price, event'
  assert not any('negative' in hint for hint in raw.hints)
  assert raw.where(1, 2) == f'{rows}/0.csv, line 4 and {rows}/1.csv, line 3'
  # Faults of rows that are left out do not matter, those of others are found in their place.
  (rows / '1.csv').write_text(HEADER + ',x,never,-1,1,buy\n,x,2024-01-05,1,1,buy\n')
  assert f'{rows}/1.csv, line 3: customer is empty' in fault(rows, where='quantity > 0')
  assert 'leave out all rows' in fault(rows, where='quantity > 99')
  (rows / '1.csv').write_text(HEADER + 'c,x,2024-01-05,many,1,buy\n')
  assert f"{rows}/1.csv, line 2: quantity is 'many'" in fault(rows, where='quantity > 0')


def test_only_the_first_of_many_ignored_columns_are_listed(tmp_path):
  path = tmp_path / 'wide.csv'
  names = [f'feature{i}' for i in range(500)]
  values = ','.join('0' for _ in names)
  path.write_text(f'user,item,{",".join(names)}\na,x,{values}\nb,y,{values}\n')
  (hint,) = read(path).hints
  assert hint.endswith('feature10, feature11 and 488 more')


def test_kinds_of_events_get_weights_which_are_stored_as_ratings(rows):
  hint = read(rows).hints[2]
  assert 'event has the kinds buy (3), view (2), cart (1), which all count alike' in hint
  raw = read(rows, event_column='event', event_weights='view=1, buy=4.5')
  assert list(zip(pairs(raw), raw.ratings.tolist(), strict=True)) == [
    (('a', 'x'), 1),
    (('a', 'y'), 4.5),
    (('b', 'y'), 4.5),
    (('b', 'z'), 1),
    (('c', 'z'), 4.5),
  ]
  assert raw.dropped == {'event_weights': 1}
  assert not any('kinds' in hint for hint in raw.hints)
  data = prepare.prepare(raw, prepare.Options(min_rating=4))
  assert data.dropped['interactions'] == {'event_weights': 1, 'min_rating': 2}
  both = read(rows, where='quantity > 0', event_column='event', event_weights='view=1,cart=2')
  assert (both.dropped, both.ratings.tolist()) == ({'where': 3}, [1, 2, 1])


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'event_column': 'event'}, 'buy (3), view (2), cart (1); say what each one weighs'),
    ({'event_weights': 'buy=1'}, '--event_weights: needs --event_column'),
    ({'event_column': 'event', 'event_weights': 'sell=1'}, "no row of event is 'sell'"),
    ({'event_column': 'event', 'event_weights': 'buy=0'}, "'buy=0' must be KIND=NUMBER"),
    ({'event_column': 'event', 'event_weights': 'buy=1,buy=2'}, "'buy=2' must be KIND=NUMBER"),
    ({'event_column': 'event', 'event_weights': 'buy'}, "'buy' must be KIND=NUMBER"),
    ({'event_column': 'kind', 'event_weights': 'buy=1'}, "no column 'kind' (--event_column)"),
    (
      {'event_column': 'event', 'event_weights': 'buy=1', 'rating_column': 'price'},
      'price is the rating already',
    ),
  ],
)
def test_weights_that_do_not_fit_are_refused(rows, flags, message):
  assert message in fault(rows, **flags)


@pytest.mark.parametrize(
  'name', ['ordered_at', 'purchased_at', 'created_at', 'orderDate', 'Purchase Date', 'viewed-on']
)
def test_usual_names_of_times_are_recognised(tmp_path, name):
  path = tmp_path / 'rows.csv'
  path.write_text(f'user,item,{name}\na,x,2024-01-02\na,y,2024-01-01\nb,x,2024-01-03\n')
  assert f'time = {name}' in read(path).notes[0]
  if name == 'created_at':
    return
  # A plain name comes first, and two others are a question.
  path.write_text(f'user,item,timestamp,{name}\na,x,2,1\nb,y,1,2\n')
  assert 'time = timestamp' in read(path).notes[0]
  path.write_text(f'user,item,paid_at,{name}\na,x,2,1\nb,y,1,2\n')
  assert f'paid_at and {name} may each be the time' in fault(path)


def test_an_older_folder_is_still_the_same_dataset(rows, tmp_path):
  metadata, is_new = build_dataset.build('interactions', tmp_path / 'data', rows)
  path = tmp_path / 'data/dataset.json'
  for name in ('where', 'event_weights', 'event_column', 'clean_ids', 'keep_cold_items'):
    metadata['options'].pop(name)
  path.write_text(json.dumps(metadata))
  assert is_new
  assert not build_dataset.build('interactions', tmp_path / 'data', rows)[1]
  with pytest.raises(InputError, match=r'asked for is .*where=quantity > 0'):
    build_dataset.build(
      'interactions', tmp_path / 'data', rows, parameters={'where': 'quantity > 0'}
    )


def test_messages_stay_short_however_many_files_and_columns_there_are(tmp_path):
  folder = tmp_path / 'log'
  folder.mkdir()
  names = [f'feature{i}' for i in range(500)]
  for part in range(100):
    (folder / f'{part:03}.csv').write_text(f'user,item\na,x\nb,y{part}\n')
  build_dataset.build('interactions', tmp_path / 'data', folder)
  (folder / '050.csv').write_text('user,item\na,x\nb,z\n')
  with pytest.raises(InputError) as error:
    build_dataset.build('interactions', tmp_path / 'data', folder)
  assert 'raw_sha256 is 050.csv=' in str(error.value)
  assert len(str(error.value)) < 1000
  path = tmp_path / 'wide.csv'
  path.write_text(f'user,{",".join(names)}\na,{",".join("0" for _ in names)}\n')
  assert len(fault(path)) < 1000
  assert len(fault(path, item_column='feature0', where='price > 0')) < 1000
  path.write_text(f'user,item\na,x\n{"b" * 5000} ,y\n')
  assert len(read(path).hints[0]) < 400

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.prepared import engine, prepare
from data_prep.prepared.prepare import Options
from ur4rec_jax.data.raw.records import Item, Raw
from ur4rec_jax.errors import InputError


def make_raw(rows, table=None, **kwargs) -> Raw:
  """A raw dataset from (user, item, time, rating) rows."""
  users, items, times, stars = zip(*rows, strict=True)
  columns = {
    'users': np.array(users),
    'items': np.array(items),
    'timestamps': np.array(times, np.int64),
    'ratings': np.array(stars, np.float32),
    'lines': np.arange(1, len(rows) + 1),
    **kwargs,
  }
  return Raw(path='rows.csv', table=table, **columns)


def histories(data: prepare.Prepared) -> dict[str, list[str]]:
  return {
    name: [data.item_names[i - 1] for i in data.item_ids[data.offsets[u] : data.offsets[u + 1]]]
    for u, name in enumerate(data.user_names)
  }


def random_rows(seed: int, num_rows: int = 300):
  rng = np.random.default_rng(seed)
  pairs = rng.permutation(40 * 30)[:num_rows]
  return [
    (int(p // 30) ** 2 % 37, int(p % 30) ** 2 % 29, t, 1 + p % 5) for t, p in enumerate(pairs)
  ]


def test_orders_rows_by_time_and_keeps_file_order_among_equals():
  rows = [(1, 5, 20, 3), (1, 7, 10, 1), (2, 5, 9, 2), (1, 6, 10, 4), (1, 4, 10, 5), (2, 4, 8, 1)]
  data = prepare.prepare(make_raw(rows))
  assert histories(data) == {'1': ['7', '6', '4', '5'], '2': ['4', '5']}
  np.testing.assert_array_equal(data.timestamps, [10, 10, 10, 20, 8, 9])
  np.testing.assert_array_equal(data.ratings, [1, 4, 5, 3, 1, 2])
  assert (data.item_ids.dtype, data.timestamps.dtype) == (np.int32, np.int64)
  assert (data.ratings.dtype, data.offsets.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
  ('ids', 'expected'),
  [
    (['10', '9', '2'], ['2', '9', '10']),
    (['10', '9', '2', 'x'], ['10', '2', '9', 'x']),
    (['7', '007', '-1'], ['-1', '007', '7']),
    (['99999999999999999999', '3'], ['3', '99999999999999999999']),
    (['9', '1' * 5000, '3'], ['1' * 5000, '3', '9']),  # No number that Python reads.
  ],
)
def test_ids_are_ordered_by_number_only_if_all_are_whole_numbers(ids, expected):
  data = prepare.prepare(make_raw([(u, i, 0, 1) for u in ids for i in ids]))
  assert data.user_names == data.item_names == expected


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(('k_core', 'min_length'), [(5, None), (None, 8), (4, 12)])
def test_filters_reach_the_fixed_point(seed, k_core, min_length):
  raw = make_raw(random_rows(seed))._replace(timestamps=None)
  data = prepare.prepare(raw, Options(k_core=k_core, min_length=min_length))
  rows = list(zip(raw.users, raw.items, strict=True))
  while True:  # the definition, one row at a time
    users, items = [[r[i] for r in rows] for i in (0, 1)]
    kept = [
      (u, i)
      for u, i in rows
      if users.count(u) >= max(k_core or 0, min_length or 0) and items.count(i) >= (k_core or 0)
    ]
    if len(kept) == len(rows):
      break
    rows = kept
  assert rows
  expected = {str(u): [str(i) for v, i in rows if v == u] for u in sorted({u for u, _ in rows})}
  assert histories(data) == expected


def test_what_falls_out_adds_up():
  raw = make_raw(random_rows(0) + random_rows(0)[:7])
  everything = prepare.counts(prepare.prepare(raw, Options(drop_duplicates=True)))
  options = Options(min_rating=2, k_core=4, min_length=7, drop_duplicates=True)
  data = prepare.prepare(raw, options)
  counts = prepare.counts(data)
  assert data.dropped['interactions']['drop_duplicates'] >= 7
  for what in ('users', 'items'):
    assert counts[what] + sum(data.dropped[what].values()) == everything[what]
  assert counts['interactions'] + sum(data.dropped['interactions'].values()) == len(raw.users)
  assert data.ratings.min() >= 2


def test_a_user_who_may_be_all_guests_is_told():
  rows = [(f'u{i}', f'i{i % 5}', i, 1) for i in range(20)]
  guests = [('0', f'i{i % 5}', i, 1) for i in range(10)]
  note = "user '0' has 33% of the interactions; if the id stands for all guests, leave"
  assert prepare.prepare(make_raw([*rows, *guests])).notes[-1].startswith(note)
  assert not prepare.prepare(make_raw([*rows, *guests[:3]])).notes
  assert not prepare.prepare(make_raw([*rows[:10], *guests])).notes


def test_catalogue_holds_only_items_with_interactions():
  table = {name: Item(title=f'T{name}') for name in ('1', '2', '3', '4')}
  rows = [(1, 1, 0, 5), (1, 3, 1, 5), (2, 3, 2, 5), (2, 4, 3, 1)]
  data = prepare.prepare(make_raw(rows, table), Options(min_rating=2))
  assert [item.title for item in data.items] == ['T1', 'T3']
  assert data.dropped['items'] == {'min_rating': 1, 'never_interacted': 1}


def test_without_times_the_position_is_the_time_and_repeats_stay():
  raw = make_raw([('b', 'x', 0, 1), ('a', 'x', 0, 1), ('b', 'x', 0, 1), ('b', 'y', 0, 1)])
  data = prepare.prepare(raw._replace(timestamps=None, ratings=None))
  assert histories(data) == {'a': ['x'], 'b': ['x', 'x', 'y']}
  np.testing.assert_array_equal(data.timestamps, [0, 0, 1, 2])
  np.testing.assert_array_equal(data.ratings, np.ones(4))
  assert not data.has_timestamps
  assert not data.has_ratings
  assert data.splits.keys() == {'leave_one_out'}
  assert data.splits['leave_one_out']['test_users'] == 1


def test_duplicates_are_named_or_dropped():
  rows = [(1, 1, 5, 2), (2, 2, 5, 2), (2, 1, 7, 1), (1, 2, 5, 2), (2, 1, 7, 5), (1, 1, 5, 2)]
  with pytest.raises(InputError, match=r'rows\.csv, lines 3 and 5: .*2 such.*--drop_duplicates'):
    prepare.prepare(make_raw(rows))
  data = prepare.prepare(make_raw(rows), Options(drop_duplicates=True))
  assert data.dropped['interactions'] == {'drop_duplicates': 2}
  np.testing.assert_array_equal(data.ratings, [2, 2, 2, 1])  # the first of each


@pytest.mark.parametrize(
  ('rows', 'options', 'message'),
  [
    ([(1, 1, 0, 5), (1, 2, 0, 5)], Options(), '1 user and 2 items left'),
    ([(1, 1, 0, 5), (2, 1, 0, 5)], Options(), '2 users and 1 item left'),
    (
      [(1, 1, 0, 3), (2, 2, 0, 3)],
      Options(min_rating=4.5),
      'nothing left after filtering: of 2 interactions --min_rating=4.5 removed 2',
    ),
    (
      [(1, 1, 0, 5), (2, 1, 0, 5), (2, 2, 0, 1)],
      Options(min_rating=2, k_core=2),
      'of 3 interactions --min_rating=2 removed 1, --k_core=2 removed 2',
    ),
    ([(1, 1, 0, 5), (2, 2, 0, 5)], Options(min_length=2), '--min_length=2 removed 2'),
  ],
)
def test_too_little_left(rows, options, message):
  with pytest.raises(InputError) as error:
    prepare.prepare(make_raw(rows), options)
  assert message in str(error.value)


def test_filters_that_a_source_cannot_serve():
  raw = make_raw([(1, 1, 0, 5), (2, 2, 0, 5)])._replace(timestamps=None, ratings=None)
  with pytest.raises(InputError, match='--min_rating'):
    prepare.prepare(raw, Options(min_rating=1))
  with pytest.raises(InputError, match='--drop_duplicates'):
    prepare.prepare(raw, Options(drop_duplicates=True))


def test_an_item_missing_from_the_table_is_named():
  rows = [(1, 1, 0, 5), (1, 8, 0, 5), (2, 9, 0, 5)]
  with pytest.raises(InputError, match=r"rows\.csv, line 2: item '8' .*\(2 such items"):
    prepare.prepare(make_raw(rows, {'1': Item()}))


DAY = 86_400
# Two users over ten days from 2024-01-01; the second starts on the seventh day.
BY_DAY = [(1, item, 1_704_067_200 + item * DAY, 5) for item in range(10)] + [
  (2, item, 1_704_067_200 + item * DAY, 5) for item in range(6, 10)
]


@pytest.mark.parametrize('wanted', ['2024-01-06,2024-01-09T00:00:00Z', ' 2024-01-06, 2024-01-09'])
def test_the_split_by_time_cuts_at_dates_and_counts_who_falls_out(wanted):
  split = prepare.prepare(make_raw(BY_DAY), Options(time_split=wanted)).splits['time']
  assert split.pop('hash') != prepare.prepare(make_raw(BY_DAY)).splits['time']['hash']
  assert split == {
    'valid_from': 1_704_067_200 + 5 * DAY,
    'test_from': 1_704_067_200 + 8 * DAY,
    'train_interactions': 5,
    'valid_users': 1,
    'test_users': 2,
    'train_only_users': 0,
    'unused_users': 0,
    'items_without_training': 5,
  }


def test_the_split_by_time_cuts_at_shares_of_the_interactions():
  data = prepare.prepare(make_raw(BY_DAY), Options(time_split='0.5,0.75'))
  # In the order of time: one a day for six days, then two a day.
  assert data.splits['time']['valid_from'] == 1_704_067_200 + 6 * DAY
  assert data.splits['time']['test_from'] == 1_704_067_200 + 8 * DAY


@pytest.mark.parametrize(
  ('wanted', 'message'),
  [
    ('0.9,0.8', 'the first below the second'),
    ('0.5', 'two shares'),
    ('2024-01-08,2024-01-03', 'the first below the second'),
    ('yesterday,today', 'two dates'),
    ('2024-02-30,2024-03-01', 'two dates'),
    ('2030-01-01,2030-02-01', '0 users to validate and 0 to test'),
  ],
)
def test_an_impossible_split_by_time_is_refused(wanted, message):
  with pytest.raises(InputError, match=message):
    prepare.prepare(make_raw(BY_DAY), Options(time_split=wanted))


def test_a_split_by_time_nobody_asked_for_is_left_out_where_it_is_impossible():
  rows = [(user, item, 0, 5) for user in range(3) for item in range(4)]
  assert prepare.prepare(make_raw(rows)).splits.keys() == {'leave_one_out'}
  with pytest.raises(InputError, match='has no times'):
    prepare.prepare(make_raw(rows)._replace(timestamps=None), Options(time_split='0.8,0.9'))


@given(
  st.lists(st.integers(-(10**10), 10**10), min_size=1, max_size=30),
  st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=30)
def test_order_statistics_are_found_without_sorting(values, share):
  places = [int(share * len(values)), len(values) - 1]
  found = prepare._sorted_at(np.array(values), places)
  assert found == [sorted(values)[place] for place in places]


def test_columns_of_many_rows_are_files_that_go_with_the_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(engine, '_ROWS_IN_MEMORY', 10)
  resources = engine.Resources(folder=tmp_path)
  column = resources.column('item', 20, np.int32)
  column[:] = np.arange(20)
  assert (tmp_path / 'item.column').read_bytes() == np.arange(20, dtype=np.int32).tobytes()
  assert not [*tmp_path.glob('few*')]
  assert len(resources.column('few', 10, np.int32)) == 10
  assert not [*tmp_path.glob('few*')]

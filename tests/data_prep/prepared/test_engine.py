"""The engine keeps, counts and sorts rows as plain Python does, also where they do not fit."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import build_dataset
from data_prep.prepared import engine
from data_prep.prepared.prepare import Options, Prepared, prepare
from data_prep.prepared.rows import Rows
from ur4rec_jax.data.raw.records import Raw
from ur4rec_jax.errors import InputError

ROWS = st.lists(
  st.tuples(
    st.sampled_from('abcde'), st.sampled_from('xyzvw'), st.integers(0, 3), st.integers(1, 5)
  ),
  min_size=1,
  max_size=60,
)
OPTIONS = st.builds(
  Options,
  min_rating=st.one_of(st.none(), st.integers(1, 3)),
  k_core=st.one_of(st.none(), st.integers(1, 3)),
  min_length=st.one_of(st.none(), st.integers(1, 4)),
  drop_duplicates=st.just(True),
  time_split=st.none(),
  image_size=st.just(256),
)


def raw_of(rows) -> Raw:
  users, items, times, ratings = zip(*rows, strict=True)
  return Raw(
    path='rows',
    users=np.array(users),
    items=np.array(items),
    timestamps=np.array(times, np.int64),
    ratings=np.array(ratings, np.float32),
    lines=np.arange(len(rows)),
  )


def by_hand(rows, options: Options):
  """Filters rows one after the other; returns them in order, and the counts of dropped ones."""
  dropped = collections.Counter()

  def keep(reason, wanted):
    nonlocal rows
    kept = [row for row in rows if wanted(row)]
    dropped[reason] += len(rows) - len(kept)
    rows = kept

  seen = set()
  keep('drop_duplicates', lambda row: row[:3] not in seen and not seen.add(row[:3]))
  if options.min_rating:
    keep('min_rating', lambda row: row[3] >= options.min_rating)
  while True:
    before = len(rows)
    for reason, least, column in (
      ('k_core', options.k_core, 1),
      ('k_core', options.k_core, 0),
      ('min_length', options.min_length, 0),
    ):
      sizes = collections.Counter(row[column] for row in rows)
      keep(reason, lambda row, s=sizes, c=column, n=least: s[row[c]] >= (n or 0))
    if len(rows) == before:
      break
  return sorted(rows, key=lambda row: (row[0], row[2])), {k: n for k, n in dropped.items() if n}


def rows_of(data: Prepared):
  for user, (start, end) in zip(data.user_names, itertools.pairwise(data.offsets), strict=True):
    for i in range(start, end):
      item = data.item_names[data.item_ids[i] - 1]
      yield user, item, int(data.timestamps[i]), int(data.ratings[i])


@settings(max_examples=12)
@given(rows=ROWS, options=OPTIONS)
def test_filters_and_order_are_those_of_a_plain_loop(rows, options):
  expected, dropped = by_hand(rows, options)
  if len({row[0] for row in expected}) < 2 or len({row[1] for row in expected}) < 2:
    with pytest.raises(InputError, match='left'):
      prepare(raw_of(rows), options)
    return
  data = prepare(raw_of(rows), options)
  assert [*rows_of(data)] == expected
  assert data.dropped['interactions'] == dropped
  assert data.item_names == sorted({row[1] for row in expected})
  lost = {row[0] for row in rows} - {row[0] for row in expected}
  assert sorted(itertools.chain(*data.dropped_users.values())) == sorted(lost)


def test_rows_beyond_the_limit_of_memory_go_to_the_disk(tmp_path):
  rng = np.random.default_rng(0)
  count, users, items = 1_500_000, 20_000, 500
  columns = {
    'user': rng.integers(0, users, count).astype(np.int32),
    'item': rng.integers(0, items, count).astype(np.int32),
    'time': rng.integers(0, 10**9, count),
  }
  wanted = np.lexsort((columns['time'], columns['user']))
  resources = engine.Resources('50MB', tmp_path)  # The rows alone take 36 MB.
  with engine.connected(resources) as database:
    engine.store(database, columns)
    rows = Rows(engine.Tables(database), {'user': users, 'item': items})
    assert np.array_equal(rows.counts('item'), np.bincount(columns['item'], minlength=items))
    parts = rows.ordered(['user', 'time', 'row'], ['item', 'time'])
    found = [next(parts)]
    assert [*(tmp_path / 'spilled').iterdir()]
    found += parts
  for name in ('item', 'time'):
    assert np.array_equal(np.concatenate([part[name] for part in found]), columns[name][wanted])
  assert not [*tmp_path.rglob('*.tmp')]


def test_the_first_repeat_is_named_and_the_others_are_counted():
  rows = [*zip('aabbab', 'xxyyxy', [5, 7, 3, 3, 5, 3], [1] * 6, strict=True)]
  message = r"lines 2 and 3: the same user 'b', item 'y' and time 3 twice \(3 such rows in all\)"
  with pytest.raises(InputError, match=message):
    prepare(raw_of(rows))


def test_too_little_memory_is_said():
  rows = [(user, item, time, 1) for user in 'abcde' for item in 'xyz' for time in range(99)]
  with pytest.raises(InputError, match='--memory_limit=1MB: is too low'):
    prepare(raw_of(rows * 100), Options(drop_duplicates=True), engine.Resources('1MB'))


@pytest.mark.parametrize('value', ['1', 'GB', '-1GB', '5MB', '1 GB', 'much'])
def test_a_limit_that_is_no_size_is_refused(value, capsys):
  with pytest.raises(SystemExit, match='2'):
    build_dataset.main(['--source=synthetic', '--data_dir=x', f'--memory_limit={value}'])
  assert '--memory_limit' in capsys.readouterr().err


def test_what_a_killed_build_has_spilled_is_removed_by_the_next(sequences, tmp_path):
  left = tmp_path / 'data.spill-999999999'
  left.mkdir()
  (left / 'rows').touch()
  build_dataset.build('sequences', tmp_path / 'data', sequences)
  assert [path.name for path in tmp_path.iterdir() if path.name.startswith('data')] == ['data']

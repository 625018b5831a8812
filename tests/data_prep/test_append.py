"""`build_dataset --append`: numbers stay, repeats go, late events find their place."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import build_dataset, carry_over, encode, generate_text
from data_prep.llm_text import llm_batch
from data_prep.prepared import appending, prepare
from tests.helpers.commands import run_here
from tests.helpers.goods import write_picture, write_table
from tests.helpers.runs import ROOT
from ur4rec_jax.data.dataset import Interactions, iterate_texts, read_interactions, read_items
from ur4rec_jax.data.features import load_features
from ur4rec_jax.data.item_pictures import find
from ur4rec_jax.data.raw.records import Raw

START = 1_700_000_000
DAY_2 = START + 10_000
NEW_GOODS = [
  ['g20', 'The golden stool', 'A stool for the kitchen. It is golden.', '20.png'],
  ['g21', 'The silver bench', 'A bench for gardens. It is silver.', '21.png'],
]


def histories(folder):
  data, items = read_interactions(folder), read_items(folder)
  names = [item['original_id'] for item in items]
  return {
    user: [(names[i - 1], int(t)) for i, t in zip(*columns, strict=True)]
    for user, *columns in (
      (u, data.item_ids[a:b], data.timestamps[a:b])
      for u, a, b in zip(data.user_ids, data.offsets, data.offsets[1:], strict=False)
    )
  }


def append(data, new, out, *flags):
  flags = (f'--raw_dir={new}', f'--data_dir={data}', f'--out={out}', *flags)
  return run_here(build_dataset.main, ['--append', *flags])


def snapshot(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


@pytest.fixture
def day_2(small_shop, tmp_path):
  """Orders of a second day: new and old customers, two new goods, a repeat and a late order."""
  old = histories(small_shop)
  repeat = old['c03'][2]
  rows = [
    ['c03', repeat[0], repeat[1]],
    ['c03', 'g20', DAY_2 + 5],
    ['c03', 'g20', DAY_2 + 5],
    ['c04', 'g21', old['c04'][0][1] + 1],  # Late: its place is the second one.
    *(['new', f'g{i:02}', DAY_2 + i] for i in (20, 21, 1, 2)),
    ['another', 'g01', DAY_2],  # Too short for the --min_length=4 of the first build.
  ]
  for i in (20, 21):
    write_picture(small_shop.parent / f'{i}.png', i)
  goods = write_table(
    small_shop.parent / 'goods2.csv',
    'sku,title,description,image',
    NEW_GOODS,
  )
  return write_table(tmp_path / 'day2.csv', 'customer_id,sku,ordered', rows), goods


def test_a_new_day(small_shop, day_2, tmp_path):
  before, out = snapshot(small_shop), tmp_path / 'day2'
  new, goods = day_2
  done = append(small_shop, new, out, f'--items={goods}')
  assert done.returncode == 0, done.stderr
  assert 'appended 6 events, 1 new user and 2 new items to 25 users and 20 items' in done.stdout
  assert '2 repeated events left out' in done.stdout
  assert '1 late event placed by time' in done.stdout
  assert snapshot(small_shop) == before
  old, now = read_interactions(small_shop), read_interactions(out)
  assert now.user_ids == [*old.user_ids, 'new']
  old_items, items = read_items(small_shop), read_items(out)
  assert items[:20] == old_items
  assert [item['original_id'] for item in items[20:]] == ['g20', 'g21']
  assert items[20]['title'] == NEW_GOODS[0][1]
  was, found = histories(small_shop), histories(out)
  assert found['new'] == [(f'g{i:02}', DAY_2 + i) for i in (1, 2, 20, 21)]
  assert found['c03'] == [*was['c03'], ('g20', DAY_2 + 5)]
  late = was['c04'][0][1] + 1
  assert found['c04'] == [was['c04'][0], ('g21', late), *was['c04'][1:]]
  assert {u: found[u] for u in was if u not in ('c03', 'c04')} == {
    u: was[u] for u in was if u not in ('c03', 'c04')
  }
  info = json.loads((out / 'dataset.json').read_text())
  first = json.loads((small_shop / 'dataset.json').read_text())
  assert info['dropped']['interactions'] == {'repeated': 2, 'min_length': 1}
  assert info['version'] == 2
  assert info['options'] == first['options']
  assert info['parent']['chain'] == [first['splits']['leave_one_out']['hash']]
  assert all(path is not None for path in find(out))
  # The same command finds its folder; the next version continues the chain.
  again = append(small_shop, new, out, f'--items={goods}')
  assert 'already in' in again.stdout
  rows = [['c03', 'g01', DAY_2 + 50_000], ['c05', 'g21', DAY_2 + 50_000]]
  third = write_table(tmp_path / 'day3.csv', 'customer_id,sku,ordered', rows)
  assert append(out, third, tmp_path / 'day3').returncode == 0
  last = json.loads((tmp_path / 'day3' / 'dataset.json').read_text())
  hashes = [x['splits']['leave_one_out']['hash'] for x in (first, info)]
  assert (last['version'], last['parent']['chain']) == (3, hashes)
  assert all(path is not None for path in find(tmp_path / 'day3'))


def test_answers_beside_a_link_to_the_old_folder_are_used_again(small_shop, day_2, tmp_path):
  (tmp_path / 'current').symlink_to(small_shop)
  (tmp_path / 'current.answers').mkdir()
  (tmp_path / 'current.answers/answers.jsonl').write_text('{}\n')
  new, goods = day_2
  assert append(tmp_path / 'current', new, tmp_path / 'day2', f'--items={goods}').returncode == 0
  assert (tmp_path / 'day2.answers/answers.jsonl').read_text() == '{}\n'


def test_files_continue_a_dataset_from_the_hub(tmp_path):
  for name in ('All_Beauty.jsonl', 'meta_All_Beauty.jsonl'):
    (tmp_path / name).touch()
  spec = build_dataset.sources.SOURCES['amazon_reviews']
  options = {'hub_name': 'someone/reviews', 'category': 'All_Beauty', 'clean_ids': None}
  info = {'source': 'amazon_reviews', 'options': options}
  _, parameters = build_dataset._settings_again(info, spec, {})
  assert [path.name for path in spec.find(tmp_path, parameters)] == sorted(os.listdir(tmp_path))


@pytest.mark.parametrize('flags', [(), ('--width=8', '--dtype=int8', '--normalise')], ids=str)
def test_only_new_items_are_encoded(small_shop, day_2, tmp_path, flags, monkeypatch):
  old, out = tmp_path / 'old', tmp_path / 'out'
  shutil.copytree(small_shop, old)
  command = ['--modality=text', '--encoder=hashing', *flags]
  assert run_here(encode.main, [f'--data_dir={old}', *command, '--overwrite']).returncode == 0
  appended = append(old, day_2[0], out, f'--items={day_2[1]}')
  assert appended.returncode == 0
  assert f' data_prep.encode --data_dir={out} --modality=' in appended.stdout
  assert re.search('--modality=text(,image)? --encoder=hashing(,color)?\n', appended.stdout)
  encoded = []
  hashing = encode.text.hashing

  def counting():
    encoder = hashing()
    (worker,) = encoder.workers
    return encoder._replace(workers=[lambda texts: encoded.extend(texts) or worker(texts)])

  monkeypatch.setattr(encode.text, 'hashing', counting)
  done = run_here(encode.main, [f'--data_dir={out}', *command])
  assert done.returncode == 0, done.stderr
  assert '20 rows of the version before are used again' in done.stdout
  assert encoded
  assert all(re.search('golden|silver|stool|bench', text) for text in encoded)
  tables = [load_features(folder, 'item', 'text').table() for folder in (old, out)]
  for before, now in zip(*tables, strict=True):
    np.testing.assert_array_equal(now[:21], before)
  assert tables[1].mask[21:].any(1).all()
  assert 'already in' in run_here(encode.main, [f'--data_dir={out}', *command]).stdout


def test_texts_and_answers_are_used_again(small_shop, day_2, tmp_path):
  old, out = tmp_path / 'old', tmp_path / 'out'
  shutil.copytree(small_shop, old)
  write = ['--backend=mock', '--kind=items', '--regenerate']
  assert run_here(generate_text.main, [f'--data_dir={old}', *write]).returncode == 0
  assert append(old, day_2[0], out, f'--items={day_2[1]}').returncode == 0
  texts = [row['text'] for row in iterate_texts(old, 'item')]
  now = [row['text'] for row in iterate_texts(out, 'item')]
  assert now[:20] == texts
  assert now[20] == NEW_GOODS[0][2]
  answers = (tmp_path / 'out.answers' / 'answers.jsonl').read_text()
  assert answers == (tmp_path / 'old.answers' / 'answers.jsonl').read_text()
  assert run_here(generate_text.main, [f'--data_dir={out}', *write]).returncode == 0
  more = (tmp_path / 'out.answers' / 'answers.jsonl').read_text()
  assert more.startswith(answers)
  assert len(more.splitlines()) == 22
  assert [row['text'] for row in iterate_texts(out, 'item')][:20] == texts


def test_a_setting_is_compared_also_where_it_is_the_default(small_shop, day_2, tmp_path):
  old = shutil.copytree(small_shop, tmp_path / 'old')
  info = json.loads((old / 'dataset.json').read_text())
  info['options']['image_size'] = 128
  (old / 'dataset.json').write_text(json.dumps(info))
  done = append(old, day_2[0], tmp_path / 'out', '--image_size=256')
  assert done.returncode == 2
  assert '--image_size=256: the first build had 128' in done.stderr
  del info['options']['image_size']  # As a folder of an earlier version.
  (old / 'dataset.json').write_text(json.dumps(info))
  done = append(old, day_2[0], tmp_path / 'out', f'--items={day_2[1]}', '--image_size=256')
  assert done.returncode == 0, done.stderr


def test_wrong_input_is_one_message_and_changes_nothing(small_shop, tmp_path):
  header, out = 'customer_id,sku,ordered', tmp_path / 'out'
  before, was = snapshot(small_shop), histories(small_shop)
  old = [[user, item, t] for user, rows in was.items() for item, t in rows]
  late = [[user, 'g19', rows[0][1] - 5] for user, rows in was.items()]
  cases = [
    (header, old, (), 'are in .* already: these are old days again'),
    (header, late, (), 'has no event after .* and is no new day; .* pass --late'),
    (header, [['7', '123', DAY_2]], (), 'none of its users and items is in'),
    (header, [], (), 'no rows'),
    ('customer_id,sku', [['c01', 'g01']], (), "no column 'ordered'"),
    ('who,what,ordered', [['c01', 'g01', DAY_2]], (), 'no column is recognised as the user'),
    (header, [['c01', 'g01', DAY_2]], ('--min_length=2',), 'the first build had 4'),
    (header, [['c01', 'g01', DAY_2]], ('--overwrite',), '--append never replaces'),
    (header, [['c01', 'g01', DAY_2]], ('--source=movielens_1m',), 'is of --source=interactions'),
    *(
      (header, [['c01', 'g01', DAY_2]], (flag,), f'{re.escape(flag)}: --append needs no engine')
      for flag in ('--engine=spark', '--master=local[*]', '--memory_limit=2GB')
    ),
    (header, [['x', 'g01', DAY_2]], (), r'leave out all its events \(min_length 1\)'),
  ]
  for number, (columns, rows, flags, message) in enumerate(cases):
    new = write_table(tmp_path / f'{number}.csv', columns, rows)
    done = append(small_shop, new, out, *flags)
    assert done.returncode == 2, (message, done.stdout)
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr
    assert not out.exists()
  for number in (0, 2, 3, 12):  # Nothing is new, which --if_new takes.
    done = append(small_shop, tmp_path / f'{number}.csv', out, '--if_new', '--late')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('nothing is appended: ')
    assert not out.exists()
  new = write_table(tmp_path / 'late.csv', header, late)
  assert append(small_shop, new, out, '--late').returncode == 0
  missing = append(tmp_path / 'nowhere', new, tmp_path / 'other')
  assert missing.returncode == 2
  assert 'nowhere: no such folder' in missing.stderr
  inside = append(small_shop, new, small_shop / 'x')
  assert 'stays as it is' in inside.stderr
  refused = append(small_shop, tmp_path / '6.csv', out).stderr
  assert 'holds another dataset' in refused
  assert refused.endswith('; give another --out\n')
  assert run_here(build_dataset.main, ['--out=x']).returncode == 2
  assert snapshot(small_shop) == before


def test_a_day_in_json_lines_is_read_as_one_in_csv(tmp_path):
  header, rows = 'user;item;time', [['a', '1.0', START], ['b', 'y', START + 1]]
  first = tmp_path / 'day1.csv'
  first.write_text('\n'.join(';'.join(map(str, row)) for row in [header.split(';'), *rows]))
  flags = [f'--raw_dir={first}', f'--data_dir={tmp_path / "data"}', '--delimiter=;']
  assert run_here(build_dataset.main, ['--source=interactions', *flags]).returncode == 0
  day = tmp_path / 'day2.jsonl'
  day.write_text('')  # A quiet day.
  result = append(tmp_path / 'data', day, tmp_path / 'out', '--if_new')
  assert (result.returncode, (tmp_path / 'out').exists()) == (0, False)
  day.write_text(f'{{"user": "a", "tags": [], "time": {DAY_2}, "item": 1.0}}\n')
  assert append(tmp_path / 'data', day, tmp_path / 'out').returncode == 0
  assert histories(tmp_path / 'out')['a'] == [('1.0', START), ('1.0', DAY_2)]


@pytest.mark.parametrize(
  ('flag', 'quiet_day'),
  [
    ("--where=status == 'paid'", 'c01,g01,{},open'),
    ('--clean_ids=empty', ',g01,{},paid'),
  ],
)
def test_a_day_of_which_the_settings_leave_out_all_is_nothing_new(tmp_path, flag, quiet_day):
  header = 'customer_id,sku,ordered,status'
  rows = [[f'c{i % 5}', f'g{i % 7}', START + i, 'paid'] for i in range(40)]
  new = [row.split(',') for row in (quiet_day.format(DAY_2), quiet_day.format(DAY_2 + 1))]
  orders = write_table(tmp_path / 'orders.csv', header, rows)
  words = ['--source=interactions', f'--raw_dir={orders}', f'--data_dir={tmp_path / "data"}', flag]
  assert run_here(build_dataset.main, words).returncode == 0
  new = write_table(tmp_path / 'new.csv', header, new)
  assert append(tmp_path / 'data', new, tmp_path / 'out').returncode == 2
  done = append(tmp_path / 'data', new, tmp_path / 'out', '--if_new')
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith('nothing is appended: ')
  assert not (tmp_path / 'out').exists()


EVENTS = st.lists(
  st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 8)), min_size=4, max_size=30
)


def raw(rows):
  users, items, times = (list(column) for column in zip(*rows, strict=True))
  return Raw(
    'new.csv',
    np.array([f'u{u}' for u in users]),
    np.array([f'i{i}' for i in items]),
    np.array(times, np.int64),
    None,
    np.arange(len(rows)),
  )


@settings(max_examples=60)
@given(EVENTS, EVENTS, st.sampled_from([3, 1 << 20]))
def test_appending_is_building_with_other_numbers(first, second, at_once):
  """Old and new events together are those of one build of all events."""
  first += [(0, 0, 0), (1, 1, 0)]
  second += [(0, 1, 9)]
  options = prepare.Options(drop_duplicates=True)
  old = prepare.prepare(raw(first), options)
  columns = old.user_names, old.offsets, old.item_ids, old.timestamps, old.ratings
  items = [
    {'original_id': name, 'title': '', 'genres': [], 'description': '', 'image': ''}
    for name in old.item_names
  ]
  info = {'has_timestamps': True, 'has_ratings': False}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(appending, '_AT_ONCE', at_once)
    appended = appending.append(
      appending.Old('old', info, Interactions(*columns), items), raw(second), options
    )
  assert appended.user_names[: len(old.user_names)] == old.user_names
  assert appended.item_names[: len(old.item_names)] == old.item_names
  whole = prepare.prepare(raw([*first, *second]), options)

  def by_name(data):
    return {
      name: sorted(
        (int(t), data.item_names[i - 1])
        for i, t in zip(data.item_ids[a:b], data.timestamps[a:b], strict=True)
      )
      for name, a, b in zip(data.user_names, data.offsets, data.offsets[1:], strict=False)
    }

  assert by_name(appended) == by_name(whole)
  for a, b in zip(appended.offsets, appended.offsets[1:], strict=False):
    assert (np.diff(appended.timestamps[a:b]) >= 0).all()
  repeated = appended.dropped['interactions'].get('repeated', 0)
  assert len(appended.item_ids) == len(old.item_ids) + len(second) - repeated


def test_core_keeps_old_users_and_items():
  old = prepare.prepare(raw([(u, i, u) for u in range(3) for i in range(3)]), prepare.Options())
  columns = old.user_names, old.offsets, old.item_ids, old.timestamps, old.ratings
  items = [
    {'original_id': name, 'title': '', 'genres': [], 'description': '', 'image': ''}
    for name in old.item_names
  ]
  folder = appending.Old(
    'old', {'has_timestamps': True, 'has_ratings': False}, Interactions(*columns), items
  )
  # Item 4 has three new events and enters, item 5 has one and does not; user 4 enters, user 3 not.
  new = [(0, 4, 9), (1, 4, 9), (4, 4, 9), (0, 5, 10), (4, 0, 9), (4, 1, 9), (3, 0, 9)]
  found = appending.append(folder, raw(new), prepare.Options(k_core=3))
  assert found.user_names == ['u0', 'u1', 'u2', 'u4']
  assert found.item_names == ['i0', 'i1', 'i2', 'i4']
  assert found.dropped['interactions'] == {'k_core': 2}
  assert found.dropped_users == {'k_core': ['u3']}
  assert np.diff(found.offsets).tolist() == [4, 4, 3, 3]


def test_a_dropped_user_has_the_filter_that_dropped_the_last_row():
  first = [(u, i, u) for u in range(3) for i in range(3)]
  old = prepare.prepare(raw(first)._replace(ratings=np.full(9, 5, np.float32)))
  columns = old.user_names, old.offsets, old.item_ids, old.timestamps, old.ratings
  items = [
    {'original_id': name, 'title': '', 'genres': [], 'description': '', 'image': ''}
    for name in old.item_names
  ]
  info = {'has_timestamps': True, 'has_ratings': True}
  folder = appending.Old('old', info, Interactions(*columns), items)
  # User 3 likes nothing, 4 has too short a history, 5 has only an item that nobody else has.
  new = [(3, 0, 9), (4, 0, 9), (4, 1, 9), (5, 9, 9), (0, 1, 1), (0, 2, 1)]
  stars = np.array([1, 5, 5, 5, 5, 1], np.float32)
  options = prepare.Options(min_rating=2, k_core=2, min_length=3)
  found = appending.append(folder, raw(new)._replace(ratings=stars), options, True)
  assert found.dropped_users == {'min_rating': ['u3'], 'min_length': ['u4'], 'k_core': ['u5']}
  assert found.dropped['interactions'] == {'min_rating': 2, 'k_core': 1, 'min_length': 2}
  # The late event with one star is not among them.
  assert '1 late event placed by time' in found.notes


def test_batches_under_way_are_collected_with_the_new_store(tmp_path):
  """Else their requests would be paid twice; of those without an id the old store takes care."""
  folder = tmp_path / 'old.answers' / llm_batch.FOLDER
  folder.mkdir(parents=True)
  for tag, ids in (('a', ['batch-1']), ('b', [])):
    (folder / f'{tag}.json').write_text(json.dumps({'tag': tag, 'ids': ids}))
    (folder / f'{tag}.keys.jsonl').write_text(json.dumps({'key': f'key {tag}'}) + '\n')
  carry_over.answers([tmp_path / 'old'], tmp_path / 'new')
  assert llm_batch.keys_under_way(tmp_path / 'new.answers') == {'key a'}
  assert llm_batch.keys_under_way(tmp_path / 'old.answers') == {'key a', 'key b'}


def test_data_without_times_is_continued_in_the_order_of_the_file(sequences, tmp_path):
  data, out = tmp_path / 'data', tmp_path / 'out'
  flags = ['--source=sequences', f'--raw_dir={sequences}', f'--data_dir={data}']
  assert run_here(build_dataset.main, flags).returncode == 0
  more = tmp_path / 'more.txt'
  more.write_text('a z\nc x\na w\n')
  done = append(data, more, out)
  assert done.returncode == 0, done.stderr
  found = {user: [item for item, _ in rows] for user, rows in histories(out).items()}
  assert found == {'a': [*'yzxzw'], 'b': [*'xxyz'], 'c': ['x']}


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bytes(small_shop, day_2, tmp_path):
  new, goods = day_2
  words = ('--append', f'--raw_dir={new}', f'--data_dir={small_shop}', f'--items={goods}')
  command = [sys.executable, '-m', 'data_prep.build_dataset', *words]
  expected, before = tmp_path / 'expected', snapshot(small_shop)
  started = time.monotonic()
  subprocess.run([*command, f'--out={expected}'], cwd=ROOT, check=True, capture_output=True)
  seconds, rng = time.monotonic() - started, random.Random(0)
  for number in range(6):
    out = tmp_path / f'killed-{number}'
    process = subprocess.Popen([*command, f'--out={out}'], cwd=ROOT, stdout=subprocess.DEVNULL)
    time.sleep(rng.uniform(0.3, 1.0) * seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() or snapshot(out) == snapshot(expected)
    subprocess.run([*command, f'--out={out}'], cwd=ROOT, check=True, capture_output=True)
    assert snapshot(out) == snapshot(expected)
  assert snapshot(small_shop) == before
  assert not [x for x in tmp_path.iterdir() if '.incomplete' in x.name or '.raw' in x.name]

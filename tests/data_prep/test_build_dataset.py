import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_prep import build_dataset
from data_prep.prepared import prepare
from ur4rec_jax.data import splits
from ur4rec_jax.errors import InputError

SMALL = {'num_users': 20, 'num_items': 48}
READ = """
import sys
import tensorflow_datasets as tfds
folder = sys.argv[1]
users = tfds.builder_from_directory(folder + '/interactions/1.0.0').as_data_source(split='users')
items = tfds.builder_from_directory(folder + '/items/1.0.0').as_data_source(split='items')
assert 'tensorflow' not in sys.modules
print(len(users), len(items), users[1]['user_id'].decode(), items[2]['title'].decode())
"""


def contents(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def read(folder: Path, name: str, split: str) -> list[dict]:
  return list(tfds.builder_from_directory(folder / name / '1.0.0').as_data_source(split=split))


def test_movielens_from_raw_files_to_what_is_read_back(
  run_build, start_build, ratings, ml_1m, tmp_path
):
  data_dir = tmp_path / 'data' / 'ml-1m'
  flags = ['--source=movielens_1m', f'--raw_dir={ml_1m}', f'--data_dir={data_dir}']
  result = run_build(*flags)
  assert (result.returncode, result.stderr) == (0, '')
  rows = ratings
  users = read(data_dir, 'interactions', 'users')
  items = read(data_dir, 'items', 'items')
  for index, user in enumerate(users):
    own = rows[rows[:, 0] == index + 1]
    own = own[np.argsort(own[:, 3], kind='stable')]
    assert user['user_id'] == str(index + 1).encode()
    # Original ids are 1..9 here, all rated, so they are the dense ones too.
    np.testing.assert_array_equal(user['item_ids'], own[:, 1])
    np.testing.assert_array_equal(user['ratings'], own[:, 2])
    np.testing.assert_array_equal(user['timestamps'], own[:, 3])
    types = [user[name].dtype for name in ('item_ids', 'timestamps', 'ratings')]
    assert types == [np.int32, np.int64, np.float32]
  assert [item['item_id'] for item in items] == list(range(1, 10))
  assert items[2] == {
    'item_id': 3,
    'original_id': b'3',
    'title': 'Misérables, Les (1995)'.encode(),
    'genres': [b"Children's", b'Drama'],
    'description': b'',
    'image': b'',
  }

  metadata = json.loads((data_dir / 'dataset.json').read_text())
  offsets = np.concatenate([[0], np.cumsum([len(user['item_ids']) for user in users])])
  item_ids = np.concatenate([user['item_ids'] for user in users])
  lengths = np.diff(offsets)
  split = splits.leave_one_out(lengths)
  assert metadata['splits']['leave_one_out'] == {
    'train_interactions': split.train_lengths.sum(),
    'valid_users': 11,
    'test_users': 11,
    'train_only_users': 1,
    'unused_users': 0,
    'items_without_training': 0,
    'hash': splits.split_hash('leave_one_out', offsets, item_ids, split),
  }
  assert metadata['counts'] == {
    'users': 12,
    'items': 9,
    'interactions': len(rows),
    'median_length': np.median(lengths),
  }
  assert metadata['dropped']['items'] == {'never_interacted': 1}
  assert metadata['has_timestamps']
  assert 'GroupLens' in metadata['licence']
  info = tfds.builder_from_directory(data_dir / 'interactions/1.0.0').info
  assert 'Harper' in info.citation
  assert 'grouplens.org' in info.homepage

  for part in (
    'users          12',
    '11 validation users, 11 test users, 1 users only in training',
    '1997-11-20 to',
    'never_interacted 1',
    'ur4rec_jax.main',
  ):
    assert part in result.stdout
  assert metadata['splits']['leave_one_out']['hash'] in result.stdout
  assert [path.name for path in data_dir.parent.iterdir()] == ['ml-1m']

  # Nothing of this needs TensorFlow, and the written fields are complete for a fresh reader.
  fresh = subprocess.run(
    [sys.executable, '-c', READ, str(data_dir)], capture_output=True, text=True, check=True
  )
  assert fresh.stdout.split(maxsplit=3) == ['12', '9', '2', 'Misérables, Les (1995)\n']

  before = contents(data_dir)
  again = run_build(*flags)
  assert (again.returncode, 'already in' in again.stdout) == (0, True)
  assert again.stdout.split('\n')[1:] == result.stdout.split('\n')[1:]
  assert start_build(*flags, '--overwrite').finish().returncode == 0
  assert contents(data_dir) == before  # another process writes the very same bytes


def test_both_movielens_sources_and_sequences_agree(ml_100k, ml_1m, sequences, tmp_path):
  small, _ = build_dataset.build('movielens_100k', tmp_path / 'a', ml_100k)
  large, _ = build_dataset.build('movielens_1m', tmp_path / 'b', ml_1m)
  assert small['splits'] == large['splits']
  assert small['counts'] == large['counts']
  metadata, _ = build_dataset.build('sequences', tmp_path / 'c', sequences)
  users = read(tmp_path / 'c', 'interactions', 'users')
  assert [user['user_id'] for user in users] == [b'a', b'b']
  assert users[1]['item_ids'].tolist() == [1, 1, 2, 3]
  assert users[1]['timestamps'].tolist() == [0, 1, 2, 3]
  assert metadata['has_timestamps'] is False


def test_synthetic_pictures_are_where_the_items_say(tmp_path):
  data_dir = tmp_path / 'data'
  metadata, _ = build_dataset.build('synthetic', data_dir, parameters=SMALL)
  assert metadata['options'] | SMALL | {'seed': 0} == metadata['options']
  items = read(data_dir, 'items', 'items')
  paths = {item['image'].decode() for item in items} - {''}
  files = {f'images/{path.name}' for path in (data_dir / 'images').iterdir()}
  assert files == paths | {'images/manifest.jsonl'}
  assert all(item['image'] in (b'', b'images/' + item['original_id'] + b'.png') for item in items)
  other = tmp_path / 'again'
  build_dataset.build('synthetic', other, parameters=SMALL)
  assert contents(other) == contents(data_dir)


def test_another_dataset_is_not_replaced_unless_told(ml_100k, tmp_path):
  data_dir = tmp_path / 'data'
  build_dataset.build('movielens_100k', data_dir, ml_100k)
  before = contents(data_dir)
  options = prepare.Options(min_rating=3)
  with pytest.raises(InputError, match=r'options is image_size=256, .* min_rating=3 .*--overwr'):
    build_dataset.build('movielens_100k', data_dir, ml_100k, options)
  with pytest.raises(InputError, match='source is movielens_100k, asked for is synthetic'):
    build_dataset.build('synthetic', data_dir)
  data = (ml_100k / 'u.data').read_text()
  (ml_100k / 'u.data').write_text(data.replace('\t1\t8', '\t2\t8', 1))
  with pytest.raises(InputError, match=r'raw_sha256 is u\.data='):
    build_dataset.build('movielens_100k', data_dir, ml_100k)
  assert contents(data_dir) == before
  metadata, is_new = build_dataset.build('movielens_100k', data_dir, ml_100k, options, True)
  assert is_new
  assert metadata['dropped']['interactions']['min_rating'] > 0
  assert min(user['ratings'].min() for user in read(data_dir, 'interactions', 'users')) >= 3
  assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'ml-100k']


def test_a_failed_replacement_leaves_the_old_dataset(ml_100k, tmp_path):
  data_dir = tmp_path / 'data'
  build_dataset.build('movielens_100k', data_dir, ml_100k)
  before = contents(data_dir)
  (ml_100k / 'u.data').write_text('1\t1\t5\tyesterday\n')
  with pytest.raises(InputError, match='yesterday'):
    build_dataset.build('movielens_100k', data_dir, ml_100k, overwrite=True)
  assert contents(data_dir) == before


def test_a_folder_of_something_else_is_left_alone(sequences, tmp_path):
  data_dir = tmp_path / 'thesis'
  data_dir.mkdir()
  (data_dir / 'chapter1.tex').write_text('years of work')
  (data_dir / 'dataset.json').write_text('{"mine": true}')
  for overwrite in (False, True):
    with pytest.raises(InputError, match='no prepared dataset, and is left alone'):
      build_dataset.build('sequences', data_dir, sequences, overwrite=overwrite)
  assert (data_dir / 'chapter1.tex').read_text() == 'years of work'
  with pytest.raises(InputError, match='is a file'):
    build_dataset.build('sequences', data_dir / 'chapter1.tex', sequences)
  # Raw files inside the folder would go with it.
  with pytest.raises(InputError, match='inside --data_dir'):
    build_dataset.build('sequences', sequences.parent, sequences, overwrite=True)
  assert sequences.exists()


def test_an_empty_folder_and_a_link_to_a_folder_are_filled(sequences, tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to('real')
  build_dataset.build('sequences', tmp_path / 'link', sequences)
  assert (tmp_path / 'link').is_symlink()
  assert (tmp_path / 'real' / 'dataset.json').exists()


def test_a_damaged_dataset_is_not_passed_off_as_there(sequences, tmp_path):
  data_dir = tmp_path / 'data'
  build_dataset.build('sequences', data_dir, sequences)
  (record,) = data_dir.glob('interactions/1.0.0/*.array_record*')
  record.write_bytes(record.read_bytes()[:-100])
  with pytest.raises(InputError, match='--overwrite'):
    build_dataset.build('sequences', data_dir, sequences)
  build_dataset.build('sequences', data_dir, sequences, overwrite=True)
  assert not build_dataset.build('sequences', data_dir, sequences)[1]


def test_a_killed_build_leaves_nothing_trusted_and_the_next_one_cleans_up(start_build, tmp_path):
  data_dir = tmp_path / 'data'
  build_dataset.build('synthetic', data_dir, parameters=SMALL)
  before = contents(data_dir)
  flags = ['--source=synthetic', '--num_users=300', '--num_items=200', '--overwrite']
  process = start_build(*flags, f'--data_dir={data_dir}')
  folder = tmp_path / f'data.incomplete-{socket.gethostname()}-{process.pid}'
  deadline = time.monotonic() + 300
  while not (folder / 'interactions').exists():
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert folder.exists()
  assert not (folder / 'dataset.json').exists()
  assert contents(data_dir) == before

  # Only what a dead process left is removed.
  sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
  try:
    alive = tmp_path / f'data.incomplete-{sleeper.pid}'
    alive.mkdir()
    assert not build_dataset.build('synthetic', data_dir, parameters=SMALL)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', alive.name]
  finally:
    sleeper.kill()
    sleeper.wait()
  # Killed between the two renames of a replacement: the old dataset comes back.
  data_dir.rename(tmp_path / f'data.replaced-{process.pid}')
  assert not build_dataset.build('synthetic', data_dir, parameters=SMALL)[1]
  assert contents(data_dir) == before
  assert [path.name for path in tmp_path.iterdir()] == ['data']


def noise(rng: np.random.Generator) -> bytes:
  """A picture that takes a while to be made smaller."""
  file = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8)).save(file, 'PNG')
  return file.getvalue()


@pytest.fixture
def packed(tmp_path) -> Path:
  """An archive of Multimodal MovieLens that takes more than a second to build from."""
  rng = np.random.default_rng(0)
  ratings = [(user, item) for user in range(1, 20_001) for item in rng.permutation(40)[:5] + 1]
  content = {
    'ratings.dat': ''.join(f'{u}::{i}::5::{n}\n' for n, (u, i) in enumerate(ratings)),
    'movies.dat': ''.join(f'{i}::Film {i} (1995)::Drama\n' for i in range(1, 41)),
    'text.csv': 'movie-id,review\n1,Fine\n',
    **{f'image/{i}.png': noise(rng) for i in range(1, 41)},
  }
  path = tmp_path / 'movies.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    for name, data in content.items():
      archive.writestr(f'M_ML/{name}', data)
  return path


# A file that shows that a build has come so far. A little later the build is killed.
@pytest.mark.parametrize(
  'signs',
  [
    ('raw-*', 'incomplete-*/interactions/*'),
    pytest.param(
      (
        'raw-*/image/2*',
        'incomplete-*',
        'incomplete-*/images/3*',
        'incomplete-*/interactions/*',
      ),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_build_killed_at_any_moment_is_made_good_by_the_next(
  signs, start_build, packed, sequences, tmp_path
):
  source = 'multimodal_movielens_1m'
  build_dataset.build(source, tmp_path / 'undisturbed', packed)
  expected = contents(tmp_path / 'undisturbed')
  build_dataset.build('sequences', tmp_path / 'old', sequences)
  before = contents(tmp_path / 'old')
  delays = np.random.default_rng(1).uniform(0, 0.2, len(signs))
  for start in range(0, len(signs), 2):
    running = {}
    for moment in (start, start + 1):
      shutil.copytree(tmp_path / 'old', tmp_path / f'place{moment}/data')
      flags = [f'--source={source}', f'--raw_dir={packed}', '--overwrite']
      flags += [f'--data_dir={tmp_path}/place{moment}/data']
      running[moment] = start_build(*flags)
    deadline = time.monotonic() + 300
    while running:
      for moment, process in list(running.items()):
        assert process.poll() is None
        if any((tmp_path / f'place{moment}').glob(f'data.{signs[moment]}')):
          time.sleep(delays[moment])
          process.kill()
          del running[moment]
          assert process.wait() == -signal.SIGKILL
      assert time.monotonic() < deadline
      time.sleep(0.001)
  for moment in range(len(signs)):
    place = tmp_path / f'place{moment}'
    assert len(list(place.iterdir())) > 1
    assert contents(place / 'data') == before
    assert build_dataset.build(source, place / 'data', packed, overwrite=True)[1]
    assert contents(place / 'data') == expected
    assert [path.name for path in place.iterdir()] == ['data']


def test_a_full_disk_and_an_unwritable_place(run_build, ml_1m, tmp_path):
  limit = ('bash', '-c', 'ulimit -f 1 && exec "$@"', '-')
  data_dir = tmp_path / 'new' / 'data'
  flags = ['--source=movielens_1m', f'--raw_dir={ml_1m}']
  environment = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'}
  result = run_build(*flags, f'--data_dir={data_dir}', limit=limit, env=environment)
  assert result.returncode == 2
  assert result.stderr == (
    f'error: {data_dir}: cannot be written (File too large); free some space or give another'
    ' --data_dir\n'
  )
  assert not (tmp_path / 'new').exists()
  result = run_build(*flags, f'--data_dir={ml_1m}/movies.dat/data')
  assert result.returncode == 2
  assert 'cannot be written (Not a directory)' in result.stderr


def test_what_is_next_depends_on_what_the_items_have(tmp_path, capsys):
  orders = tmp_path / 'orders.csv'
  orders.write_text('user,item\n' + ''.join(f'u{i},i{j}\n' for i in range(4) for j in range(5)))
  Image.new('RGB', (32, 32)).save(tmp_path / 'a.png')

  def next_commands(name: str, header: str = '', value: str = '') -> list[str]:
    goods = tmp_path / 'goods.csv'
    goods.write_text(f'item,{header}\n' + ''.join(f'i{j},{value}\n' for j in range(5)))
    items = [f'--items={goods}'] if header else []
    data_dir = f'--data_dir={tmp_path / name}'
    build_dataset.main(['--source=interactions', f'--raw_dir={orders}', data_dir, *items])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('next '))
    assert f'--data_dir={tmp_path / name}' in lines[start] or len(lines) == start + 1
    return [re.search(r'python -m (\S+)', line)[1] for line in lines[start:]]

  train, encode, fetch = 'ur4rec_jax.main', 'data_prep.encode', 'data_prep.download_images'
  assert next_commands('bare') == [train]
  assert next_commands('texts', 'title', 'A lamp') == [encode, train]
  assert next_commands('pictures', 'image', 'a.png') == [encode, train]
  assert next_commands('urls', 'image', 'https://shop.example/a.png') == [fetch, encode, train]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--data_dir=x'], '--source must be one of movielens_100k, '),
    (['--source=netflix', '--data_dir=x'], "not 'netflix'"),
    (['--source=synthetic'], '--data_dir is missing'),
    (['--source=synthetic', '--data_dir=x', '--k_core=0'], '--k_core must be 1 or more, not 0'),
    (['--append', '--data_dir=x', '--workers=0'], '--workers must be 1 or more, not 0'),
    (['--source=synthetic', '--data_dir=x', 'y'], "unexpected argument 'y'"),
    (['--sorce=synthetic', '--data_dir=x'], 'unknown flag --sorce; did you mean --source?'),
    (['--source=synthetic', '--data_dir=x', '--k_core=two'], "--k_core: invalid int value: 'two'"),
    (['--source=synthetic', '--data_dir'], '--data_dir: expected one argument'),
    (['--source=synthetic', '--data_dir=x', '--raw_dir=y'], 'leave --raw_dir out'),
    (['--source=sequences', '--data_dir=x'], r'pass --raw_dir with *.txt'),
    (['--source=movielens_1m', '--data_dir=x', '--seed=3'], '--seed is no flag of'),
  ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, message, capsys, monkeypatch, tmp_path):
  # In this process: what is tested are the flags, and a process each would take a second each.
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as stop:
    build_dataset.main(flags)
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert message in error
  assert not list(tmp_path.iterdir())

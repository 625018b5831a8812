"""The reader of features, on what data_prep.encode wrote and on what became of it."""

import dataclasses
import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_prep import encode
from ur4rec_jax.data.dataset import read_interactions, read_items
from ur4rec_jax.data.features import load_features, load_with_features, read_tables
from ur4rec_jax.errors import InputError


@pytest.fixture(scope='module')
def original(data_dir, tmp_path_factory):
  """A prepared folder with random features of 50 of its 60 items in 4 shards, and the features."""
  folder = tmp_path_factory.mktemp('features')
  names = np.array([item['original_id'] for item in read_items(data_dir)][5:55])
  tokens = np.random.default_rng(0).normal(size=(50, 3, 5)).astype(np.float16)
  np.savez(folder / 'f.npz', ids=names, tokens=tokens)
  shutil.copytree(data_dir, folder / 'data')
  for modality, dtype in (('audio', 'float16'), ('small', 'int8')):
    encode.main(
      [
        *(f'--data_dir={folder / "data"}', f'--modality={modality}', f'--dtype={dtype}'),
        *(f'--import={folder / "f.npz"}', '--rows_per_shard=16'),
      ]
    )
  return folder / 'data', tokens


@pytest.fixture
def data(original, tmp_path):
  """A copy to damage."""
  return shutil.copytree(original[0], tmp_path / 'data')


def test_the_table_has_a_row_for_each_item_id(original):
  data_dir, expected = original
  features = load_features(data_dir, 'item', 'audio')
  for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
    tokens, mask = features.table(dtype)
    assert (tokens.shape, tokens.dtype, mask.shape) == ((61, 3, 5), dtype, (61, 3))
    assert mask.any(1).tolist() == [False] * 6 + [True] * 50 + [False] * 5
    np.testing.assert_array_equal(tokens[6:56], expected.astype(dtype))
    assert not tokens[~mask].any()
  first, first_mask = dataclasses.replace(features, max_tokens=2).table()
  np.testing.assert_array_equal(first, features.table()[0][:, :2])
  np.testing.assert_array_equal(first_mask, features.table()[1][:, :2])
  tokens, _ = load_features(data_dir, 'item', 'small').table()
  np.testing.assert_allclose(tokens[6:56], expected, atol=np.abs(expected).max() / 127)


@pytest.mark.parametrize('modality', ['audio', 'small'])
def test_single_rows_are_those_of_the_table(original, modality):
  features = load_features(original[0], 'item', modality)
  tokens, mask = features.table()
  indices = np.array([59, 3, 17, 16, 15, 17, 40])
  found, found_mask = features.rows(indices)
  np.testing.assert_array_equal(found, tokens[indices + 1])
  np.testing.assert_array_equal(found_mask, mask[indices + 1])
  assert all(isinstance(array, np.memmap) for array in features.shards['tokens'])


def test_there_are_none(data):
  with pytest.raises(InputError, match='has no video features of items; make them: python -m'):
    load_features(data, 'item', 'video')


def test_features_of_other_items_are_refused(data):
  path = data / 'dataset.json'
  info = json.loads(path.read_text())
  info['ids_sha256']['items'] = '0' * 64
  path.write_text(json.dumps(info))
  with pytest.raises(InputError, match='is of other items than those of data_dir'):
    load_features(data, 'item', 'audio')


def test_features_of_users_need_their_split(data, tmp_path):
  np.savez(tmp_path / 'u.npz', ids=['u001', 'u099'], embeddings=np.ones((2, 4), np.float32))
  flags = ('--modality=age', '--of=user', f'--import={tmp_path / "u.npz"}', '--split=time')
  flags += ('--hold_back=0.3',)
  encode.main([f'--data_dir={data}', *flags])
  splits = json.loads((data / 'dataset.json').read_text())['splits']
  assert load_features(data, 'user', 'age', splits['time']['hash']).shape == (120, 1, 4)
  fields = {
    'data_dir': str(data),
    'split': 'time',
    'train_on': 'training',
    'modalities': (),
    'user_modalities': ('age',),
  }
  fields['max_item_tokens'] = 1
  dataset = load_with_features(ConfigDict({**fields, 'shuffled_features': True}))
  tokens, mask = read_tables(dataset).users['age']
  assert (tokens.shape, mask.shape) == ((120, 1, 4), (120, 1))
  users = [read_interactions(data).user_ids.index(name) for name in ('u001', 'u099')]
  assert np.flatnonzero(mask).tolist() == users
  np.testing.assert_array_equal(tokens[users], 1)
  for other in (splits['leave_one_out']['hash'], None):
    with pytest.raises(InputError, match='was made for the split time'):
      load_features(data, 'user', 'age', other)
  path = data / 'features/user/age/info.json'
  path.write_text(path.read_text().replace('"hold_back"', '"other"'))
  with pytest.raises(
    InputError, match=r'what share .* was held back.*encode .* --of=user --modality=age'
  ):
    load_features(data, 'user', 'age', splits['time']['hash'])


def test_shuffled_items_have_each_others_tokens_in_every_modality_alike(data):
  fields = {'data_dir': str(data), 'split': 'leave_one_out', 'train_on': 'training'}
  fields['user_modalities'] = ()
  fields['max_item_tokens'] = 0
  fields['modalities'] = ('audio', 'small')
  datasets = [
    load_with_features(ConfigDict({**fields, 'shuffled_features': value}))
    for value in (False, True)
  ]
  before, after = (read_tables(dataset).items for dataset in datasets)
  row_of = {row.tobytes(): i for i, row in enumerate(before['audio'].tokens) if row.any()}
  moved = {i: row_of[row.tobytes()] for i, row in enumerate(after['audio'].tokens) if row.any()}
  assert sorted(moved.values()) == sorted(row_of.values())
  assert sum(i == j for i, j in moved.items()) < 5
  for i, j in moved.items():
    np.testing.assert_array_equal(after['small'].tokens[i], before['small'].tokens[j])
    assert after['small'].mask[i].all()
  assert not after['audio'].mask[0].any()
  assert [d.features['audio'].origin['is_shuffled'] for d in datasets] == [False, True]


def shard(data, kind='tokens'):
  return data / f'features/item/audio/{kind}-00001-of-00004.npy'


def test_damaged_files_are_named(data):
  path = shard(data)
  content = path.read_bytes()

  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  features = load_features(data, 'item', 'audio')
  with pytest.raises(InputError, match=rf'{path.name}: is damaged.*; make them: '):
    features.table()

  for damaged in (content[:-7], content[:40], b''):
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=rf'{path.name}: cannot be read'):
      load_features(data, 'item', 'audio')

  np.save(path, np.zeros((16, 3, 4), np.float16))
  with pytest.raises(InputError, match=rf'{path.name}: holds float16 \(16, 3, 4\)'):
    load_features(data, 'item', 'audio')

  path.unlink()
  with pytest.raises(InputError, match=rf'{path.name}: cannot be read .*No such file'):
    load_features(data, 'item', 'audio')

  path.write_bytes(content)
  shard(data, 'mask').unlink()
  with pytest.raises(InputError, match=r'mask-00001-of-00004.*: cannot be read'):
    load_features(data, 'item', 'audio')


def test_what_is_not_finite_is_refused(data):
  path = shard(data)
  tokens = np.load(path)
  tokens[2, 1, 0] = np.nan
  np.save(path, tokens)
  info_path = path.parent / 'info.json'
  info = json.loads(info_path.read_text())
  info['shards'][1]['sha256']['tokens'] = hashlib.sha256(path.read_bytes()).hexdigest()
  info_path.write_text(json.dumps(info))
  with pytest.raises(InputError, match='shard 1 has values that are not finite; make them: '):
    load_features(data, 'item', 'audio').table()
  found = load_features(data, 'item', 'audio')
  path.unlink()
  with pytest.raises(InputError, match=f'{path.name}: cannot be read .*; make them: '):
    found.table()


@pytest.mark.parametrize('content', ['', '{', '[]', '{"format_version": 99}'])
def test_a_damaged_info_is_refused(data, content):
  (data / 'features/item/audio/info.json').write_text(content)
  with pytest.raises(InputError, match=r'info\.json'):
    load_features(data, 'item', 'audio')

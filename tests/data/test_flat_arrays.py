"""Flat arrays give the same dataset as decoding, or are refused; folders without them open too."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import build_dataset
from tests.helpers.runs import ROOT, make_dataset
from ur4rec_jax.data import dataset, input_pipeline
from ur4rec_jax.data.dataset import (
  Dataset,
  Interactions,
  decode_interactions,
  load_dataset,
  read_interactions,
)
from ur4rec_jax.data.input_pipeline import TrainBatches
from ur4rec_jax.errors import InputError

# At most two events of a user at the same time, so that order and ties are covered too.
EVENTS = st.lists(
  st.tuples(st.sampled_from('abcdé7'), st.integers(1, 9), st.integers(0, 20)),
  min_size=1,
  max_size=40,
)


def build(events, folder: pathlib.Path) -> pathlib.Path:
  """Builds a prepared folder; two events more make sure that two users and items are left."""
  users, items, times = zip(*events, ('x', 1, 5), ('y', 2, 6), strict=True)
  table = pa.table({'user': users, 'item': items, 'timestamp': [1_600_000_000 + t for t in times]})
  options = build_dataset.prepare.Options(drop_duplicates=True)
  build_dataset.build_from_table(table, folder, options)
  return folder


def without_flat_arrays(folder: pathlib.Path) -> pathlib.Path:
  """Copies a folder as an earlier version would have written it."""
  copy = folder.with_name(f'{folder.name}-old')
  shutil.copytree(folder, copy, ignore=shutil.ignore_patterns('flat'))
  return copy


def same(a: np.ndarray, b: np.ndarray) -> bool:
  return a.dtype == b.dtype and np.array_equal(a, b)


def assert_same_dataset(found: Dataset, expected: Dataset) -> None:
  assert (found.info, found.split_hash) == (expected.info, expected.split_hash)
  assert same(found.offsets, expected.offsets)
  assert same(found.item_ids, expected.item_ids)
  assert same(found.split.train_lengths, expected.split.train_lengths)
  for part in ('valid', 'test'):
    assert same(found.split.held_out[part], expected.split.held_out[part])
    assert same(found.is_repeated(part), expected.is_repeated(part))
  assert same(found.train_part().item_ids, expected.train_part().item_ids)
  assert same(found.train_part().offsets, expected.train_part().offsets)


@settings(max_examples=15)
@given(events=EVENTS)
def test_flat_arrays_and_decoding_give_the_same_dataset(events):
  with tempfile.TemporaryDirectory() as scratch:
    folder = build(events, pathlib.Path(scratch) / 'data')
    old = without_flat_arrays(folder)
    for name in json.loads((folder / 'dataset.json').read_text())['splits']:
      assert_same_dataset(load_dataset(folder, name), load_dataset(old, name))
    found, expected = read_interactions(folder), decode_interactions(old)
    assert found.user_ids == expected.user_ids
    for name in Interactions._fields[1:]:
      assert same(getattr(found, name), getattr(expected, name))


def test_batches_are_the_same_bit_for_bit(data_dir, tmp_path):
  shutil.copytree(data_dir, tmp_path / 'data')
  old = without_flat_arrays(tmp_path / 'data')
  options = {'max_length': 20, 'batch_size': 16, 'crop': 'random', 'seed': 1}
  flat, decoded = (
    TrainBatches(load_dataset(folder).split.train_lengths, **options) for folder in (data_dir, old)
  )
  for epoch in range(3):
    for a, b in zip(flat.epoch(epoch), decoded.epoch(epoch), strict=True):
      assert same(a, b)


def test_opening_writes_nothing_and_building_again_adds_the_arrays(tmp_path):
  rows = tmp_path / 'rows.csv'
  rows.write_text('user,item,timestamp\n' + ''.join(f'{i % 7},{i % 5},{i}\n' for i in range(60)))
  data_dir = tmp_path / 'data'
  build_dataset.build('interactions', data_dir, rows)
  before = load_dataset(data_dir)
  shutil.rmtree(data_dir / 'flat')
  content = sorted(data_dir.rglob('*'))
  load_dataset(data_dir)
  read_interactions(data_dir)
  assert sorted(data_dir.rglob('*')) == content
  assert not build_dataset.build('interactions', data_dir, rows)[1]
  assert (data_dir / 'flat' / 'item_ids.npy').exists()
  assert_same_dataset(load_dataset(data_dir), before)


@pytest.mark.parametrize('name', ['offsets', 'item_ids', 'split_leave_one_out', 'info'])
def test_a_damaged_array_is_refused_and_the_tfds_data_still_open(data_dir, tmp_path, name):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  (path,) = (copy / 'flat').glob(f'{name}.*')
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  path.write_bytes(content)
  with pytest.raises(InputError, match=f'{name}.*delete {copy}/flat') as raised:
    load_dataset(copy)
  assert 'build it' in str(raised.value)
  shutil.rmtree(copy / 'flat')
  assert_same_dataset(load_dataset(copy), load_dataset(data_dir))


def test_arrays_of_other_interactions_are_refused(data_dir, tmp_path):
  folder = build([('a', i, i) for i in range(9)], tmp_path / 'data')
  shutil.rmtree(folder / 'flat')
  shutil.copytree(data_dir / 'flat', folder / 'flat')
  with pytest.raises(InputError, match=r'interactions differ from.*items, splits, users'):
    load_dataset(folder)


def test_arrays_beside_changed_tfds_data_are_refused(data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  (path,) = copy.glob('interactions/*/*.array_record*')
  path.write_bytes(path.read_bytes() + b'more')
  with pytest.raises(InputError, match='TFDS data beside it'):
    load_dataset(copy)


def test_arrays_of_a_later_version_are_not_read(data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  path = copy / 'flat' / 'info.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'format_version': 99}))
  (copy / 'flat' / 'item_ids.npy').write_bytes(b'of a later version')
  assert_same_dataset(load_dataset(copy), load_dataset(data_dir))


def test_small_blocks_change_nothing(monkeypatch):
  rng = np.random.default_rng(0)
  data = make_dataset([rng.integers(1, 5, n).tolist() for n in rng.integers(1, 12, 50)])
  options = {'max_length': 4, 'batch_size': 8, 'crop': 'random', 'seed': 0}
  outcome = lambda: (
    data.is_train,
    data.is_repeated('valid'),
    data.is_repeated('test'),
    *TrainBatches(data.split.train_lengths, **options).epoch(2),
  )
  whole = outcome()
  assert whole[1].any()
  assert not whole[1].all()
  for size in (1, 7):
    monkeypatch.setattr(dataset, '_AT_ONCE', size)
    monkeypatch.setattr(input_pipeline, '_USERS_AT_ONCE', size)
    for a, b in zip(outcome(), whole, strict=True):
      assert same(a, b)


def test_opening_reads_the_arrays_without_keeping_them_in_memory(tmp_path):
  """Opens 32 MB of interactions; the process grows by far less, and decodes nothing."""
  users, length = 200_000, 40
  item_ids = np.tile(np.arange(1, length + 1, dtype=np.int32), users)
  offsets = np.arange(0, len(item_ids) + 1, length)
  split = build_dataset.prepare.make_splits(offsets, item_ids, None, None, length)
  info = {
    'counts': {'items': length},
    'splits': split,
    'ids_sha256': {'users': ''},
    'format_version': dataset.FORMAT_VERSION,
  }
  columns = offsets, item_ids, np.zeros(1, np.int64), np.zeros(1, np.float32)
  dataset.write_flat_arrays(tmp_path, info, Interactions([], *columns))
  (tmp_path / 'dataset.json').write_text(json.dumps(info))
  program = f"""
import re, sys
from ur4rec_jax.data.dataset import load_dataset
def memory():
  return int(re.search(r'VmRSS:\\s*(\\d+)', open('/proc/self/status').read())[1])
before = memory()
data = load_dataset({str(tmp_path)!r})
print(memory() - before, data.num_users, data.item_ids[-1])
print(sorted({{'jax', 'pyarrow', 'tensorflow_datasets'}} & set(sys.modules)))
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT, check=True
  )
  grown, found_users, last = map(int, done.stdout.splitlines()[0].split())
  assert (found_users, last) == (users, length)
  assert grown < 4000  # KiB; the arrays have 38 MB.
  assert done.stdout.splitlines()[1] == '[]'

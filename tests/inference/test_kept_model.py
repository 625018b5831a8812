"""A kept model is that of the newest checkpoint, the config and the data, or it is not used."""

import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from ur4rec_jax.files import write_file
from ur4rec_jax.inference import kept_model
from ur4rec_jax.runs.saved_steps import MANIFEST, checkpoint_folder

CONFIG = ConfigDict({'data_dir': 'data', 'branches': ('sasrec',), 'sasrec': {'dim': 8}})
PARAMS = {'sasrec': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}}
ITEMS = {'ids': ['a', 'ß'], 'titles': ['A', 'The ß']}
FOLLOWERS = {'items': np.array([[0], [2], [1]], np.int32), 'values': np.ones((3, 1), np.float32)}
DATASET = {'name': 'shop', 'split_hash': '12'}


def save_step(workdir, step: int) -> None:
  folder = checkpoint_folder(workdir) / str(step)
  folder.mkdir(parents=True)
  write_file(folder / MANIFEST, '{}')


@pytest.fixture
def workdir(tmp_path):
  save_step(tmp_path, 3)
  write_file(tmp_path / 'config.json', '{}')
  arrays = {'sasrec': {'vectors': np.ones((3, 8), 'bfloat16')}}
  kept = kept_model.Kept(CONFIG, PARAMS, ITEMS, arrays, FOLLOWERS)
  kept_model.write(tmp_path, kept, DATASET, kept_model.origin(tmp_path))
  return tmp_path


def test_what_was_kept_comes_back(workdir):
  config = kept_model.read_config(workdir)
  assert list(config.branches) == ['sasrec']
  assert config.sasrec.dim == 8
  kept = kept_model.read(workdir, config, DATASET)
  assert kept.items == ITEMS
  np.testing.assert_array_equal(kept.params['sasrec']['kernel'], PARAMS['sasrec']['kernel'])
  assert kept.item_arrays['sasrec']['vectors'].dtype == 'bfloat16'
  assert (kept.item_arrays['sasrec']['vectors'] == 1).all()
  np.testing.assert_array_equal(kept.followers['items'], FOLLOWERS['items'])


@pytest.mark.parametrize(
  'change',
  [
    lambda folder: save_step(folder, 4),
    lambda folder: write_file(folder / 'config.json', '{"config": 1}'),
    lambda folder: write_file(checkpoint_folder(folder) / '3' / MANIFEST, '{"a": "b"}'),
    lambda folder: write_file(folder / 'recommender' / 'record.json', '[]'),
    lambda folder: (folder / 'recommender' / 'record.json').unlink(),
  ],
)
def test_after_a_change_the_checkpoint_is_read(workdir, change):
  change(workdir)
  assert kept_model.read_config(workdir) is None


def test_other_data_and_damaged_files_are_not_used(workdir):
  config = kept_model.read_config(workdir)
  assert kept_model.read(workdir, config, {**DATASET, 'split_hash': '13'}) is None
  write_file(workdir / 'recommender' / 'items.json', '{}')
  assert kept_model.read(workdir, config, DATASET) is None


def test_nothing_is_kept_of_a_damaged_checkpoint_or_in_a_folder_that_cannot_be_written(tmp_path):
  kept = kept_model.Kept(CONFIG, PARAMS, ITEMS, {}, {})
  save_step(tmp_path, 3)
  write_file(tmp_path / 'config.json', '{}')
  write_file(checkpoint_folder(tmp_path) / '3' / 'array', 'not in the manifest')
  made_from = kept_model.origin(tmp_path)
  kept_model.write(tmp_path, kept, DATASET, made_from)
  assert not (tmp_path / 'recommender').exists()
  (checkpoint_folder(tmp_path) / '3' / 'array').unlink()
  write_file(tmp_path / 'recommender', 'a file in the place of the folder')
  kept_model.write(tmp_path, kept, DATASET, made_from)
  assert kept_model.read_config(tmp_path) is None


def test_a_model_does_not_pass_for_one_that_is_saved_while_it_is_read(tmp_path):
  save_step(tmp_path, 3)
  write_file(tmp_path / 'config.json', '{}')
  made_from = kept_model.origin(tmp_path)
  save_step(tmp_path, 4)
  kept = kept_model.Kept(CONFIG, PARAMS, ITEMS, {}, {})
  kept_model.write(tmp_path, kept, DATASET, made_from)
  assert kept_model.read_config(tmp_path) is None
  shutil.rmtree(checkpoint_folder(tmp_path) / '3')  # Training keeps only the newest ones.
  kept_model.write(tmp_path, kept, DATASET, made_from)
  assert kept_model.read_config(tmp_path) is None

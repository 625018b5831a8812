"""The benchmark of opening generates a folder that opens, and measures what training does."""

import json

from benchmarks.speed import open_dataset
from ur4rec_jax.data.dataset import check_interactions, load_dataset


def test_a_generated_folder_opens_and_every_part_is_measured(tmp_path):
  open_dataset.generate(tmp_path / 'flat', 40, with_records=False)
  open_dataset.generate(tmp_path / 'both', 40, with_records=True)
  check_interactions(tmp_path / 'both')
  info = json.loads((tmp_path / 'both' / 'dataset.json').read_text())
  assert load_dataset(tmp_path / 'flat').split_hash == info['splits']['leave_one_out']['hash']
  rows = open_dataset.measure_one(str(tmp_path / 'flat'))
  assert [row['after'] for row in rows][1:3] == [
    'the dataset is open',
    'the run is open and checked',
  ]
  assert all(row['seconds'] >= 0 and 0 < row['rss_mb'] <= row['peak_mb'] for row in rows)

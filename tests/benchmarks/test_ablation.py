"""Runs that each have another half of the parts: the design, their configs, and the table."""

import itertools
import json

import pytest

from benchmarks.quality import ablation, accuracy
from configs import movielens_100k
from tests.helpers.stored_results import BASE, store
from ur4rec_jax.runs.config_checks import check_config


@pytest.mark.parametrize('rows', [range(12), range(12, 24), range(24)])
def test_every_part_and_every_pair_of_parts_is_in_as_many_runs(rows):
  has = ablation.design()[list(rows)]
  assert has.shape == (len(rows), len(ablation.PARTS))
  assert (has.sum(0) == len(rows) / 2).all()
  for i, j in itertools.combinations(range(has.shape[1]), 2):
    assert (has[:, i] & has[:, j]).sum() == len(rows) / 4


def test_in_all_runs_no_part_is_where_the_product_of_two_others_is():
  signs = 2 * ablation.design().astype(int) - 1
  for i, j, k in itertools.combinations(range(signs.shape[1]), 3):
    assert (signs[:, i] * signs[:, j] * signs[:, k]).sum() == 0


@pytest.mark.parametrize('run', [*range(24)])
def test_every_run_has_a_config_of_its_own_that_can_be_trained(run):
  config = movielens_100k.get_config('multimodal')
  config.update_from_flattened_dict(ablation.overrides(run))
  check_config(config)
  assert config.seed == run
  assert config.shuffled_features == (not ablation.design()[run, 0])


def test_parts_on_the_page(tmp_path):
  store(tmp_path, 'joined', BASE)
  runs = [
    {'run': 0, 'parts': ['eyes', 'ears'], 'valid': 0.3, 'test': 0.2},
    {'run': 1, 'parts': ['ears'], 'valid': 0.1, 'test': 0.1},
    {'run': 2, 'parts': ['eyes'], 'valid': 0.1, 'test': 0.2},
    {'run': 3, 'parts': [], 'valid': 0.1, 'test': 0.1},
  ]
  folder = tmp_path / 'ablation'
  folder.mkdir()
  (folder / 'joined.json').write_text(json.dumps({'names': ['eyes', 'ears'], 'runs': runs}))
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  assert '| joined | eyes | 4 | 0.2000 / 0.1000 | +100.0 % | 0.2000 / 0.1000 | +100.0 % |' in page
  assert '| joined | ears | 4 | 0.2000 / 0.1000 | +100.0 % | 0.1500 / 0.1500 | +0.0 % |' in page

"""The runs that training left, ranked in other ways; and the table that is made of it."""

import json

import pytest

from benchmarks import accuracy, fusions
from tests.test_accuracy import BASE, store
from ur4rec_jax.errors import InputError


@pytest.fixture(scope='module')
def of_two_paths(run, encoded, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two_paths') / 'run'
  flags = ("--config.stages=('train',)", '--config.num_epochs=1', '--config.retriever.dim=16')
  flags += ('--config.retriever.num_blocks=0', '--config.retriever.cross_modal_blocks=0')
  flags += ('--config.fusion.weights=(0.8,0.2)', f'--config.data_dir={encoded}')
  done = run(workdir, *flags, variant='text')
  assert done.returncode == 0, done.stderr
  return workdir


def test_a_run_is_ranked_by_each_path_and_in_each_way(of_two_paths):
  results = json.loads((of_two_paths / 'results.json').read_text())
  found = fusions.rank_in_all_ways(of_two_paths)
  assert found.keys() == fusions.WAYS.keys()
  expected = {part: results[part]['ndcg@10'] for part in ('valid', 'test')}
  assert found['as trained'] == found['weighted 0.8 : 0.2'] == pytest.approx(expected)
  assert found['sasrec alone'] != found['retriever alone'] != found['as trained']


def test_only_finished_runs_of_two_paths_are_taken(finished, tmp_path):
  with pytest.raises(InputError, match='not a run of two paths'):
    fusions.rank_in_all_ways(finished)
  with pytest.raises(InputError, match='no finished run here'):
    fusions.rank_in_all_ways(tmp_path)


def test_ways_on_the_page(tmp_path):
  store(tmp_path, 'joined', BASE)
  folder = tmp_path / accuracy.FUSIONS.name
  folder.mkdir()
  runs = [
    {'seed': seed, 'ways': {'as trained': {'valid': 0.2, 'test': test}}}
    for seed, test in enumerate((0.1, 0.2))
  ]
  (folder / 'joined.json').write_text(json.dumps(runs))
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  assert '| joined | as trained | 0, 1 | 0.2000 ± 0.0000 | 0.1500 ± 0.0707 |' in page

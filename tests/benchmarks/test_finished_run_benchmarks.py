"""The runs that training left: ranked in other ways, and what losses ask of their parameters."""

import json

import pytest

from benchmarks.quality import accuracy, fusions, loss_gradients
from benchmarks.robustness.small_runs import lines
from tests.helpers.stored_results import BASE, rows, store
from ur4rec_jax.errors import InputError


@pytest.fixture(scope='module')
def of_two_paths(run, encoded, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two_paths') / 'run'
  flags = ("--config.stages=('train',)", '--config.num_epochs=1', '--config.retriever.dim=16')
  flags += ('--config.retriever.num_blocks=0', '--config.retriever.cross_modal_blocks=0')
  flags += ('--config.fusion.weights=(0.8,0.2)', '--config.loss.weights.fused=0.5')
  flags += (f'--config.data_dir={encoded}',)
  done = run(workdir, *flags, variant='text')
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.mark.slow
def test_a_run_is_ranked_by_each_path_and_in_each_way(of_two_paths, monkeypatch):
  results = json.loads((of_two_paths / 'results.json').read_text())
  # Those that differ in weights alone are one way, compiled anew for each.
  alike = [f'weighted {weight:g} : {1 - weight:g}' for weight in (0.6, 0.5, 0.4, 0.2)]
  some = {name: way for name, way in fusions.WAYS.items() if name not in alike}
  monkeypatch.setattr(fusions, 'WAYS', some)
  found = fusions.rank_in_all_ways(of_two_paths)
  assert len(found) == len(some) == 7
  expected = {part: results[part]['ndcg@10'] for part in ('valid', 'test')}
  assert found['as trained'] == found['weighted 0.8 : 0.2'] == pytest.approx(expected)
  assert found['sasrec alone'] != found['retriever alone'] != found['as trained']


@pytest.mark.slow
def test_only_finished_runs_are_taken_and_of_two_paths_to_rank(finished, tmp_path):
  with pytest.raises(InputError, match='not a run of two branches'):
    fusions.rank_in_all_ways(finished)
  for measure in (fusions.rank_in_all_ways, loss_gradients.measure_run):
    with pytest.raises(InputError, match='no finished run here'):
      measure(tmp_path)


def test_ways_on_the_page(tmp_path):
  store(tmp_path, 'joined', BASE)
  folder = tmp_path / 'fusions'
  folder.mkdir()
  runs = [
    {'seed': seed, 'ways': {'as trained': {'valid': 0.2, 'test': test}}}
    for seed, test in enumerate((0.1, 0.2))
  ]
  (folder / 'joined.json').write_text(json.dumps(runs))
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  assert '| joined | as trained | 0, 1 | 0.2000 ± 0.0000 | 0.1500 ± 0.0707 |' in page


@pytest.mark.slow
def test_what_losses_ask_of_the_first_parameters_and_of_the_best(of_two_paths, tmp_path):
  found = loss_gradients.measure_run(of_two_paths)
  for by_loss in found.values():
    assert by_loss.keys() == {'sasrec', 'retriever', 'fused'}
    for branch in ('sasrec', 'retriever'):  # Its own loss alone reaches the parameters of a path.
      assert by_loss[branch]['length'] == pytest.approx(1, rel=1e-5)
      assert by_loss[branch]['cosine'] == pytest.approx(1, rel=1e-5)
    assert 0.3 < by_loss['fused']['cosine'] < 1
    assert by_loss['fused']['weight'] == 0.5
  values = lambda when: [found[when][loss]['value'] for loss in found[when]]
  assert all(best < first for first, best in zip(values('first'), values('best'), strict=True))
  recorded = lines(of_two_paths)
  at_first = next(line for line in recorded if 'loss/fused' in line)
  assert found['first']['fused']['value'] == pytest.approx(at_first['loss/fused'], rel=0.1)

  store(tmp_path, 'joined', BASE)
  folder = tmp_path / 'loss_gradients'
  folder.mkdir()
  (folder / 'joined.json').write_text(json.dumps(found))
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  assert '| joined | sasrec | ' in page
  assert rows(page, 'loss', 'cosine')['joined']['cosine'].count(', ') == 1

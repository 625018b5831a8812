"""`--init_from` starts a run with another one's parameters; tests/test_update.py has the rest."""

import json

import pytest

from benchmarks.robustness.small_runs import lines


@pytest.mark.slow
def test_a_run_starts_where_another_has_its_best(finished, run, tmp_path):
  workdir = tmp_path / 'run'
  flags = (f'--init_from={finished}', '--config.num_epochs=1')
  done = run(workdir, *flags)
  assert done.returncode == 0, done.stderr
  assert json.loads((workdir / 'config.json').read_text())['config']['init']['run'] == str(finished)
  best = json.loads((finished / 'results.json').read_text())['valid']['ndcg@10']
  first = next(line for line in lines(workdir) if 'valid/ndcg@10' in line)
  assert (first['step'], first['valid/ndcg@10']) == (0, best)
  assert json.loads((workdir / 'results.json').read_text())['valid']['ndcg@10'] >= best


def test_a_missing_run_is_named(run, tmp_path):
  done = run(tmp_path / 'run', f'--init_from={tmp_path / "nowhere"}')
  assert done.returncode == 2
  assert 'config.init.run=' in done.stderr
  assert 'no run here' in done.stderr
  assert len(done.stderr.splitlines()) == 1

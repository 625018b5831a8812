"""`--init_from` starts a run with another one's parameters; tests/test_update.py has the rest."""

import json
import shutil

import pytest

from benchmarks.robustness.small_runs import lines
from ur4rec_jax.errors import InputError
from ur4rec_jax.runs import warm_start
from ur4rec_jax.runs.knobs import default_config
from ur4rec_jax.runs.open_run import open_run
from ur4rec_jax.runs.workdir import note_start


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


def test_fields_that_keep_shapes_but_make_another_model_are_named(data_dir, tmp_path):
  config = default_config()
  config.data_dir = str(data_dir)
  (tmp_path / 'run').mkdir()
  note_start(tmp_path / 'run', open_run(config))
  config.init.run = str(tmp_path / 'run')
  config.sasrec.dropout = 0.4  # It changes only training.
  run = open_run(config)
  assert warm_start.other_model_warning(run, warm_start.open_before(run)) == ''
  config.update_from_flattened_dict({'sasrec.num_heads': 2, 'sasrec.norm': 'pre'})
  run = open_run(config)
  warning = warm_start.other_model_warning(run, warm_start.open_before(run))
  assert 'config.sasrec.num_heads is 2 here and 1 there' in warning
  assert "config.sasrec.norm is 'pre' here and 'post' there" in warning
  assert 'dropout' not in warning


@pytest.mark.parametrize(
  ('modality', 'change', 'is_refused'),
  [
    ('text', {}, False),
    ('text', {'encoder': {'name': 'another', 'is_builtin': True}}, True),
    ('text', {'projection': {'sha256': 'of other data'}}, True),
    ('image', {'encoder': {'name': 'imported from day2.npz', 'is_builtin': False}}, False),
  ],
)
def test_embeddings_of_another_encoder_are_refused(modality, change, is_refused, encoded, tmp_path):
  config = default_config('text')
  config.update_from_flattened_dict({'data_dir': str(encoded), 'modalities': (modality,)})
  (tmp_path / 'run').mkdir()
  note_start(tmp_path / 'run', open_run(config))
  data = shutil.copytree(encoded, tmp_path / 'data')
  path = data / 'features/item' / modality / 'info.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  config.update_from_flattened_dict({'data_dir': str(data), 'init.run': str(tmp_path / 'run')})
  run = open_run(config)
  if not is_refused:
    assert warm_start.open_before(run).dataset.num_items == run.dataset.num_items
    return
  with pytest.raises(InputError, match='item embeddings text that were made in another way'):
    warm_start.open_before(run)

"""Results of runs whose users take items again."""

import json

import numpy as np
import pyarrow as pa
import pytest

from data_prep import build_dataset
from tests.helpers.runs import make_dataset
from ur4rec_jax import default_config
from ur4rec_jax.errors import InputError
from ur4rec_jax.runs.open_run import Run
from ur4rec_jax.runs.report import repeated_targets
from ur4rec_jax.runs.run_summary import repeats_warning


def run_on(histories, seen_items: str) -> Run:
  config = default_config()
  config.evaluation.seen_items = seen_items
  return Run(config, make_dataset(histories), None, [], None)


@pytest.mark.slow
def test_repeats_do_not_count_and_are_kept_on_request(run, tmp_path):
  rng = np.random.default_rng(0)
  users, items = np.repeat(np.arange(60), 9), rng.integers(0, 15, 540)
  log = pa.table({'user': users, 'item': items, 'timestamp': np.arange(540)})
  build_dataset.build_from_table(log, tmp_path / 'data')
  workdir, flags = tmp_path / 'run', (f'--config.data_dir={tmp_path}/data', '--config.num_epochs=1')
  done = run(workdir, *flags)
  assert done.returncode == 0, done.stderr
  assert 'set --config.evaluation.seen_items=keep' in done.stdout
  results = json.loads((workdir / 'results.json').read_text())
  left_out = results['by_target']['test']
  assert left_out['new'] == results['test']
  assert left_out['repeated'].keys() == {'users'}
  assert 'they do not count' in (workdir / 'report.html').read_text()
  done = run(workdir, *flags, '--mode=evaluate', '--config.evaluation.seen_items=keep')
  assert done.returncode == 0, done.stderr
  kept = json.loads(done.stdout)
  assert kept['protocol']['seen_items'] == 'kept'
  new, repeated = (kept['by_target']['test'][name] for name in ('new', 'repeated'))
  assert new['users'] == results['test']['users']
  assert repeated['users'] == left_out['repeated']['users']
  users = new['users'] + repeated['users']
  assert kept['test']['users'] == kept['baselines']['random']['users'] == users
  mean = (new['users'] * new['mrr'] + repeated['users'] * repeated['mrr']) / users
  assert kept['test']['mrr'] == pytest.approx(mean)
  # More rivals cannot make a rank better.
  assert new['mean_rank'] >= results['test']['mean_rank']
  for word in (
    'sasrec (items new to the user)',
    'sasrec (repeated items)',
    'they had before; they count',
  ):
    assert word in done.stderr


@pytest.mark.parametrize('part', ['valid', 'test'])
def test_a_run_of_repeats_alone_is_refused_with_the_way_out(part):
  histories = [[1, 2, 1, 2], [2, 3, 3, 2]] if part == 'valid' else [[1, 2, 1], [2, 3, 2]]
  with pytest.raises(InputError, match=f'every {part} item is a repeat.*seen_items=keep'):
    run_on(histories, 'leave_out').check_targets()
  run_on(histories, 'keep').check_targets()


def test_a_run_with_repeats_warns_at_its_start():
  histories = [[1, 2, 1], [1, 2, 3], [3, 1, 2], [2, 3, 1]]
  warning = repeats_warning(run_on(histories, 'leave_out'))
  assert warning.startswith(
    'warning: 1 of 4 test users (25%) have a test item that they had before'
  )
  assert '--config.evaluation.seen_items=keep' in warning
  assert not repeats_warning(run_on(histories, 'keep'))
  assert not repeats_warning(run_on(histories[1:], 'leave_out'))


def test_results_without_repeats_say_nothing_of_them():
  assert not repeated_targets({'test': {}})

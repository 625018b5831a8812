"""A search is runs of a sweep: it finds the better settings, ends weak ones early, and goes on."""

import copy
import json

import optuna
import pytest

from benchmarks.robustness.small_runs import lines
from configs import synthetic
from tests.helpers.runs import wait_for
from ur4rec_jax.errors import BusyError, InputError
from ur4rec_jax.files import only_process
from ur4rec_jax.runs import search

SEARCH = """
def get_search(trial):
  # With 1e-9 nothing is learned.
  return {'optimizer.learning_rate': trial.suggest_categorical('rate', [1e-2, 1e-9])}

def even(trial):
  return {'optimizer.learning_rate': trial.suggest_float('rate', 1e-4, 1e-2)}

def some_impossible(trial):
  rate = trial.suggest_float('rate', 1e-4, 1e-2)
  return {'optimizer.learning_rate': rate if trial.number % 3 else -rate}

def unknown(trial):
  return {'sasrec.drop': trial.suggest_float('x', 0.1, 0.5)}

def of_numpy(trial):
  import numpy as np
  return {'batch_size': np.int64(trial.suggest_int('size', 8, 9))}

def nothing(trial):
  return None
"""


@pytest.fixture
def space(tmp_path):
  path = tmp_path / 'space.py'
  path.write_text(SEARCH)
  return path


def read(workdir):
  return json.loads((workdir / 'search.json').read_text())


@pytest.mark.slow
def test_a_killed_search_goes_on_and_finds_the_better_rate(start, run, space, tmp_path):
  workdir = tmp_path / 'search'
  first = start(workdir, f'--search={space}', '--trials=5')
  wait_for(first, lambda: any(lines(folder) for folder in workdir.glob('*/seed0')))
  first.kill()
  first.communicate()
  done = run(workdir, f'--search={space}', '--trials=5')
  assert done.returncode == 0, done.stderr
  summary = read(workdir)
  best, *others = summary['trials']
  assert best['overrides'] == {'optimizer.learning_rate': 1e-2}
  assert best['state'] == 'complete'
  assert best['valid'] == max(trial['valid'] for trial in summary['trials'])
  # The same settings are one run, however often they are drawn.
  assert len(others) == 1
  results = json.loads((workdir / best['folder'] / 'results.json').read_text())
  assert results['valid']['ndcg@10'] == best['valid']
  assert f'best           {workdir / best["folder"]} by validation' in done.stdout
  assert 'test items decided nothing' in (workdir / 'search.html').read_text()
  # More trials go on from there.
  more = run(workdir, f'--search={space}', '--trials=5')
  assert 'trial ' not in more.stdout
  assert read(workdir) == summary


@pytest.fixture
def instant(data_dir, monkeypatch):
  """Trials that train nothing; gives a config."""
  monkeypatch.setattr(search.train_loop, 'train_and_evaluate', lambda *_: None)
  monkeypatch.setattr(search, 'read_run', lambda _: ({'valid': {search.METRIC: 0.1}}, None))
  config = synthetic.get_config()
  config.data_dir = str(data_dir)
  return config


def test_a_later_start_draws_other_settings(space, tmp_path, instant):
  for trials in (1, 2, 3):
    found = search.run_search(instant, str(tmp_path), f'{space}:even', trials)
  rates = {trial['overrides']['optimizer.learning_rate'] for trial in found['trials']}
  assert len(rates) == 3


def test_trials_of_another_config_or_of_other_data_do_not_mix(space, tmp_path, instant, small_shop):
  workdir = str(tmp_path / 'search')
  search.run_search(instant, workdir, f'{space}:even', 1)
  for field, value, told in (
    ('sasrec.dim', 32, r'config\.sasrec\.dim is 32, but the trials of the search in .* had 64'),
    ('num_epochs', 3, r'config\.num_epochs is 3, but'),
    ('data_dir', str(small_shop), r'dataset\.name is '),
  ):
    other = copy.deepcopy(instant)
    other.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=told):
      search.run_search(other, workdir, f'{space}:even', 2)
  instant.evaluation.batch_size = 32  # It changes no number.
  assert len(search.run_search(instant, workdir, f'{space}:even', 2)['trials']) == 2


def test_a_search_that_noted_a_field_which_may_change_now_goes_on(space, tmp_path, instant):
  search.run_search(instant, str(tmp_path), f'{space}:even', 1)
  study = optuna.load_study(study_name='search', storage=f'sqlite:///{tmp_path}/search.db')
  before = study.user_attrs['searched']
  assert 'config.dtype' not in before
  study.set_user_attr('searched', before | {'config.dtype': 'float32'})
  assert len(search.run_search(instant, str(tmp_path), f'{space}:even', 2)['trials']) == 2


def test_a_trial_that_fails_does_not_stop_the_search(space, tmp_path, instant, monkeypatch):
  started = []

  def train(config, *_):
    started.append(config.optimizer.learning_rate)
    if len(started) in (1, 3):
      raise (MemoryError if len(started) == 1 else ValueError)('too wide')

  monkeypatch.setattr(search.train_loop, 'train_and_evaluate', train)
  found = search.run_search(instant, str(tmp_path), f'{space}:even', 4)
  assert len(started) == len(set(started)) == 4
  assert [trial['number'] for trial in found['trials']] == [2, 4]
  assert [trial['reason'] for trial in found['failed']] == [
    'out of memory: too wide',
    'ValueError: too wide',
  ]
  assert 'ValueError: too wide' in (tmp_path / 'search.html').read_text()
  again = search.run_search(instant, str(tmp_path), f'{space}:even', 5)
  assert (len(again['trials']), len(again['failed']), len(started)) == (3, 2, 5)


def test_impossible_settings_end_a_search_only_at_its_start(space, tmp_path, instant):
  some = f'{space}:some_impossible'
  with pytest.raises(InputError, match=r'learning_rate=-0.*must be above 0'):
    search.run_search(instant, str(tmp_path), some, 4)
  found = search.run_search(instant, str(tmp_path), some, 4)
  assert [trial['number'] for trial in found['trials']] == [2, 3, 5]
  (failed,) = found['failed']
  assert failed['number'] == 4
  assert 'must be above 0' in failed['reason']


def test_numbers_that_json_lacks_end_a_search_at_its_start(space, tmp_path, instant):
  with pytest.raises(InputError, match=r'of_numpy: .*int64'):
    search.run_search(instant, str(tmp_path), f'{space}:of_numpy', 3)


def test_a_damaged_database_is_named(space, tmp_path, instant):
  (tmp_path / 'search.db').write_text('no database' * 200)
  with pytest.raises(InputError, match=r'search\.db: cannot be opened .*not a database'):
    search.run_search(instant, str(tmp_path), f'{space}:even', 1)


def test_two_searches_do_not_work_in_one_folder(space, tmp_path, instant):
  with only_process(tmp_path / 'search.lock', ''), pytest.raises(BusyError, match='another search'):
    search.run_search(instant, str(tmp_path), f'{space}:even', 1)


@pytest.mark.parametrize(
  ('flags', 'told'),
  [
    (['--search=FILE:unknown'], 'sasrec.drop: no such field'),
    (['--search=FILE:nothing'], 'must return a dict'),
    (['--search=FILE:absent'], 'has no function absent'),
    (['--search=FILE', '--trials=0'], '--trials=0: must be at least 1'),
    (['--search=FILE', '--seeds=0,1'], 'leave out --seeds'),
    (['--search=FILE', '--mode=evaluate'], 'works on one run'),
  ],
)
def test_a_search_that_cannot_be_is_refused(run, space, tmp_path, flags, told):
  done = run(tmp_path / 'search', *(flag.replace('FILE', str(space)) for flag in flags))
  assert done.returncode == 2
  assert told in done.stderr
  assert 'Traceback' not in done.stderr

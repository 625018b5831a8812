"""A run's folder is all that later commands need, wherever they are started."""

import json
import shutil
import sys
from importlib.machinery import ModuleSpec

import pytest

from ur4rec_jax import default_config
from ur4rec_jax.errors import InputError
from ur4rec_jax.runs.open_run import open_run
from ur4rec_jax.runs.workdir import is_started_with, note_start, open_stored_run, stored_config


@pytest.fixture
def started(data_dir, tmp_path, monkeypatch):
  """A folder with `data`, and a run in `run` that was started beside it with a relative path."""
  shutil.copytree(data_dir, tmp_path / 'data')
  (tmp_path / 'run').mkdir()
  monkeypatch.chdir(tmp_path)
  config = default_config()
  config.data_dir = 'data'
  note_start('run', open_run(config))
  assert is_started_with('run', config)
  return tmp_path


def test_a_relative_data_folder_is_found_from_everywhere(started, monkeypatch):
  assert stored_config('run').data_dir == str(started / 'data')
  (started / 'notebooks').mkdir()
  monkeypatch.chdir(started / 'notebooks')
  assert open_stored_run('../run').dataset.num_items > 0


def test_data_that_moved_are_asked_for_by_the_flag(started):
  (started / 'data').rename(started / 'moved')
  with pytest.raises(InputError, match=r'data is not there.*--data_dir=FOLDER') as error:
    open_stored_run('run')
  assert 'build it' not in str(error.value)
  assert open_stored_run('run', 'moved').dataset.num_items > 0


@pytest.mark.parametrize(
  ('module', 'argv', 'command'),
  [
    (
      'ur4rec_jax.main',
      ['ur4rec_jax/main.py', '--seeds=0,1'],
      'python -m ur4rec_jax.main --seeds=0,1',
    ),
    ('ur4rec_jax.update', ['x/update.py', '--out=a b'], "python -m ur4rec_jax.update '--out=a b'"),
    (None, ['ur4rec update', '--out=run2'], 'ur4rec update --out=run2'),
    (None, ['experiment.py', '3'], 'python experiment.py 3'),
  ],
)
def test_the_command_that_started_a_run_is_noted(module, argv, command, started, monkeypatch):
  """Typed again, it goes on with the run."""
  spec = module and ModuleSpec(module, None)
  monkeypatch.setattr(sys.modules['__main__'], '__spec__', spec)
  monkeypatch.setattr(sys, 'argv', argv)
  note_start('run', open_run(stored_config('run')))
  assert json.loads((started / 'run/config.json').read_text())['command'] == command


def test_other_devices_are_told_until_the_run_is_finished(started, capsys):
  """Each device draws its own dropout and negatives, so more differs than the last digits."""
  path = started / 'run/config.json'
  (started / 'run/checkpoints/3').mkdir(parents=True)
  record = json.loads(path.read_text())
  record['machine']['devices'] = 3
  path.write_text(json.dumps(record))
  run = open_run(stored_config('run'))
  note_start('run', run)
  warning = capsys.readouterr().err
  assert 'devices 1 instead of 3; dropout and negatives are drawn in another way' in warning
  assert warning.endswith('; JAX_NUM_CPU_DEVICES=3 keeps the number of devices\n')
  assert json.loads(path.read_text())['machine']['devices'] == 1
  (started / 'run/results.json').touch()
  path.write_text(json.dumps(record))
  note_start('run', run)
  assert not capsys.readouterr().err
  assert json.loads(path.read_text()) == record


@pytest.mark.parametrize('inside', ['seed0', 'runs/ids', 'model/runs/content'])
def test_a_folder_of_runs_names_them(tmp_path, inside):
  (tmp_path / inside).mkdir(parents=True)
  with pytest.raises(InputError, match=r'no run here .*; train one: '):
    stored_config(tmp_path)
  (tmp_path / inside / 'config.json').touch()
  with pytest.raises(InputError, match=f'no run here .*; give one of those inside: .*/{inside}$'):
    stored_config(tmp_path)

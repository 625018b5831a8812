"""Trackers get what a run reports; none of them stops or slows it."""

import json
import sys
import threading
import time

import pytest

from ur4rec_jax.errors import InputError
from ur4rec_jax.runs import trackers
from ur4rec_jax.runs.config_checks import check_config
from ur4rec_jax.runs.knobs import default_config
from ur4rec_jax.runs.metric_writers import MetricWriter


class Notebook:
  """A tracker that keeps what it gets; the file of its run stands for a real one's storage."""

  def __init__(self, folder, known, config):
    self.id, self.config = known or 'first', config
    self.points, self.ended = [], []
    Notebook.last = self

  def log(self, step, values):
    self.points.append((step, values))

  def close(self, is_done):
    self.ended.append(is_done)


class Failing(Notebook):
  """Fails at the third point."""

  def log(self, step, values):
    if len(self.points) == 2:
      raise OSError(28, 'No space left on device')
    super().log(step, values)


class Exiting(Notebook):
  """Ends the process where a login is missing, as some libraries do."""

  def __init__(self, folder, known, config):
    raise SystemExit('no login')


class Stuck(Notebook):
  """Never returns."""

  def log(self, step, values):
    threading.Event().wait()


@pytest.fixture
def use(monkeypatch):
  """Puts trackers of this file in the place of real ones: `use(mlflow=Notebook)`."""

  def use(**kinds):
    monkeypatch.setattr(trackers, 'OPEN', kinds)
    monkeypatch.setattr(trackers, 'check_installed', lambda name: None)

  return use


def test_a_writer_sends_its_points_and_goes_on_in_the_same_run(use, tmp_path):
  use(mlflow=Notebook)
  for attempt, is_done in enumerate((False, True)):
    size = 0 if attempt == 0 else (tmp_path / 'metrics.jsonl').stat().st_size
    try:
      with trackers.open_trackers(tmp_path, ('mlflow',), {'sasrec.dim': 8}) as found:
        writer = MetricWriter(str(tmp_path), 3 * attempt, size, found)
        writer.write(3 * attempt + 3, 'train', {'loss': 0.5, 'grad_norm': float('nan')})
        writer.write_curves(3 * attempt + 3, 'train', {'sequences_per_second': 9.0})
        writer.close()
        if not is_done:
          raise KeyboardInterrupt
    except KeyboardInterrupt:
      pass
    notebook = Notebook.last
    step = 3 * attempt + 3
    assert notebook.points == [
      (step, {'train/loss': 0.5}),
      (step, {'train/sequences_per_second': 9.0}),
    ]
    assert (notebook.id, notebook.config) == ('first', {'sasrec.dim': 8})
    assert notebook.ended == [is_done]
    assert json.loads((tmp_path / 'trackers.json').read_text()) == {'mlflow': 'first'}


@pytest.mark.parametrize(('kind', 'told'), [(Failing, 'No space left'), (Exiting, 'no login')])
def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(use, tmp_path, capsys, kind, told):
  use(mlflow=kind, wandb=Notebook)
  with trackers.open_trackers(tmp_path, ('mlflow', 'wandb'), {}) as found:
    for step in range(6):
      found.log(step, {'loss': 1.0})
  assert len(Notebook.last.points) == 6
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('warning: mlflow has failed (')
  assert told in line
  assert 'metrics.jsonl has all of them' in line


def test_a_tracker_that_hangs_slows_nothing(use, tmp_path, capsys, monkeypatch):
  use(mlflow=Stuck)
  monkeypatch.setattr(trackers, '_MOST_WAITING', 10)
  monkeypatch.setattr(trackers, '_END_SECONDS', 0.2)
  start = time.monotonic()
  with trackers.open_trackers(tmp_path, ('mlflow',), {}) as found:
    for step in range(1000):
      found.log(step, {'loss': 1.0})
  assert time.monotonic() - start < 30
  slow, late = capsys.readouterr().err.splitlines()
  assert 'too slow, and some points are left out' in slow
  assert 'mlflow did not take all points within 0.2 seconds' in late


def test_a_damaged_record_of_the_runs_starts_new_ones(use, tmp_path):
  use(mlflow=Notebook)
  (tmp_path / 'trackers.json').write_text('[half')
  with trackers.open_trackers(tmp_path, ('mlflow',), {}):
    pass
  assert json.loads((tmp_path / 'trackers.json').read_text()) == {'mlflow': 'first'}


def test_no_trackers_start_nothing_and_wrong_ones_are_refused(tmp_path, monkeypatch):
  threads = threading.active_count()
  with trackers.open_trackers(tmp_path, (), {}) as found:
    assert found is None
    assert threading.active_count() == threads
  config = default_config()
  config.trackers = ('mlflow', 'tensorbored')
  config.data_dir = 'data'
  with pytest.raises(InputError, match='tensorbored is none of mlflow, trackio, wandb'):
    check_config(config)
  monkeypatch.setitem(sys.modules, 'mlflow', None)
  with (
    pytest.raises(InputError, match=r"pip install 'ur4rec-jax\[trackers\]'"),
    trackers.open_trackers(tmp_path, ('mlflow',), {}),
  ):
    pass


# Each against its own real local backend. These are long proofs, as the libraries are large.


def report_twice(folder, name) -> str:
  """Reports as a run that is stopped, started again and repeats a step; returns the run's id."""
  for steps in ((1, 2, 3), (3, 4)):
    try:
      with trackers.open_trackers(folder, (name,), {'sasrec.dim': 8, 'stages': ['train']}) as found:
        for step in steps:
          found.log(step, {'train/loss': 1 / step, 'train/valid/ndcg@10': step / 10})
        if steps[-1] == 3:
          raise KeyboardInterrupt
    except KeyboardInterrupt:
      pass
  return json.loads((folder / 'trackers.json').read_text())[name]


@pytest.fixture
def patient(monkeypatch):
  """Waits long enough for libraries that are slow to import on a loaded machine."""
  monkeypatch.setattr(trackers, '_END_SECONDS', 300.0)
  monkeypatch.setattr(trackers, '_STOP_SECONDS', 300.0)


@pytest.mark.slow
def test_mlflow_has_one_run_with_all_points(tmp_path, patient):
  mlflow = pytest.importorskip('mlflow')
  run_id = report_twice(tmp_path, 'mlflow')
  client = mlflow.MlflowClient(tracking_uri=f'sqlite:///{tmp_path}/mlflow.db')
  (found,) = client.search_runs([client.get_experiment_by_name('ur4rec').experiment_id])
  assert (found.info.run_id, found.info.status) == (run_id, 'FINISHED')
  assert found.data.params == {'sasrec.dim': '8', 'stages': '["train"]'}
  points = client.get_metric_history(run_id, 'train/valid/ndcg_at_10')
  assert {(point.step, point.value) for point in points} == {(i, i / 10) for i in (1, 2, 3, 4)}


@pytest.mark.slow
def test_trackio_has_one_run_with_all_points(tmp_path, patient, monkeypatch):
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
  pytest.importorskip('trackio')
  from trackio.sqlite_storage import SQLiteStorage

  name = report_twice(tmp_path, 'trackio')
  assert name.startswith(f'{tmp_path.name}-')
  assert SQLiteStorage.get_runs('ur4rec') == [name]
  logs = SQLiteStorage.get_logs('ur4rec', name)
  assert {(point['step'], point['train/loss']) for point in logs} == {
    (i, 1 / i) for i in (1, 2, 3, 4)
  }


@pytest.mark.slow
def test_wandb_goes_on_offline_under_the_same_id(tmp_path, patient, monkeypatch):
  pytest.importorskip('wandb')
  monkeypatch.delenv('WANDB_MODE', raising=False)
  run_id = report_twice(tmp_path, 'wandb')
  folders = sorted((tmp_path / 'wandb').glob('offline-run-*'))
  assert len(folders) == 2
  assert all((folder / f'run-{run_id}.wandb').stat().st_size for folder in folders)
  written = b''.join((folder / f'run-{run_id}.wandb').read_bytes() for folder in folders)
  assert b'train/valid/ndcg@10' in written

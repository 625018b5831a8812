"""Sends the metrics of a run to experiment trackers: MLflow, Weights & Biases, trackio.

A tracker is a sink beside the run's own files. One thread feeds all of them, so that a slow one
does not slow training, and an error of one ends only that one. `WORKDIR/trackers.json` remembers
the runs of the trackers, so that a run that is started again goes on in the same ones.
"""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ur4rec_jax.errors import InputError, say
from ur4rec_jax.files import write_file

FILE = 'trackers.json'
PROJECT = 'ur4rec'
_MOST_WAITING = 10_000  # Points that wait for a slow tracker; further ones are dropped.
# How long a run waits for its trackers at its end, and when it is stopped and has little time left.
_END_SECONDS, _STOP_SECONDS = 20.0, 5.0


class Tracker(Protocol):
  """A run of a tracker.

  Attributes:
    id: the tracker's name for the run.
  """

  id: str

  def log(self, step: int, values: dict[str, float]) -> None:
    """Adds a point to the curve of each value."""

  def close(self, is_done: bool) -> None:
    """Ends the run, or leaves it open to go on with later."""


class Trackers:
  """Feeds trackers in a thread of its own; a tracker with an error is dropped with a warning."""

  def __init__(self, workdir: str | pathlib.Path, names: Sequence[str], config: dict[str, Any]):
    """Starts to open the trackers.

    Args:
      workdir: the run's folder.
      names: names of trackers in `OPEN`.
      config: fields of the run's config by dotted name.
    """
    self._folder, self._config = pathlib.Path(workdir), config
    self._queue: queue.Queue = queue.Queue(_MOST_WAITING)
    self._open: dict[str, Tracker] = {}
    self._has_dropped = False
    self._thread = threading.Thread(target=self._feed, args=(names,), daemon=True)
    self._thread.start()

  def log(self, step: int, values: dict[str, float]) -> None:
    """Adds a point to the curve of each value; it never waits."""
    try:
      self._queue.put_nowait((step, values))
    except queue.Full:
      if not self._has_dropped:
        _warn('the trackers are too slow, and some points are left out of them')
      self._has_dropped = True

  def close(self, is_done: bool) -> None:
    """Sends the waiting points, and ends the thread.

    Args:
      is_done: whether the run has ended; if not, the trackers can go on with it later.
    """
    seconds = _END_SECONDS if is_done else _STOP_SECONDS
    deadline = time.monotonic() + seconds
    with contextlib.suppress(queue.Full):
      self._queue.put(is_done, timeout=seconds)
    self._thread.join(max(0.0, deadline - time.monotonic()))
    if self._thread.is_alive():
      _warn(
        f'{" and ".join([*self._open]) or "the trackers"} did not take all points within '
        f'{seconds:g} seconds; {self._folder / "metrics.jsonl"} has all of them'
      )

  def _feed(self, names: Sequence[str]) -> None:
    known = _read(self._folder)
    for name in names:
      with self._ending_alone(name):
        self._open[name] = OPEN[name](self._folder, known.get(name), self._config)
        known[name] = self._open[name].id
        write_file(self._folder / FILE, json.dumps(known) + '\n')
    while isinstance(found := self._queue.get(), tuple):
      step, values = found
      finite = {name: float(x) for name, x in values.items() if math.isfinite(x)}
      for name, tracker in [*self._open.items()]:
        with self._ending_alone(name):
          tracker.log(step, finite)
    for name, tracker in [*self._open.items()]:
      with self._ending_alone(name):
        tracker.close(found)

  @contextlib.contextmanager
  def _ending_alone(self, name: str) -> Iterator[None]:
    """Drops a tracker that raises an error; its library may raise any kind of error."""
    try:
      yield
    except BaseException as error:  # Some end the process when they lack a login.
      self._open.pop(name, None)
      reason = next(iter(str(error).strip().splitlines()), repr(error))
      _warn(
        f'{name} has failed ({reason:.200}) and gets no more points; the run goes on, and '
        f'{self._folder / "metrics.jsonl"} has all of them'
      )


@contextlib.contextmanager
def open_trackers(
  workdir: str | pathlib.Path, names: Sequence[str], config: dict[str, Any]
) -> Iterator[Trackers | None]:
  """Opens trackers for the time of a run; None without any. See `Trackers` for the arguments.

  Raises:
    InputError: a tracker is not installed.
  """
  if not names:
    yield None
    return
  for name in names:
    check_installed(name)
  trackers, is_done = Trackers(workdir, names, config), False
  try:
    yield trackers
    is_done = True
  finally:
    trackers.close(is_done)


def check_installed(name: str) -> None:
  """Raises InputError if the library of a tracker is missing."""
  if importlib.util.find_spec(name) is None:
    raise InputError(
      f"config.trackers: {name} is not installed: pip install 'ur4rec-jax[trackers]' (in a clone:"
      " -e '.[trackers]'), which brings mlflow and wandb, or pip install trackio; or leave it out"
    )


class _MLflow:
  """A run in MLflow: at MLFLOW_TRACKING_URI, or in the folder of the run."""

  def __init__(self, folder: pathlib.Path, known: str | None, config: dict[str, Any]):
    from mlflow import MlflowClient

    place = os.environ.get('MLFLOW_TRACKING_URI') or f'sqlite:///{folder.absolute()}/mlflow.db'
    self._client = MlflowClient(tracking_uri=place)
    if known:
      self.id = known
      self._client.update_run(known, status='RUNNING')
      return
    found = self._client.get_experiment_by_name(PROJECT)
    experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
    self.id = self._client.create_run(experiment, run_name=folder.absolute().name).info.run_id
    for name, value in config.items():
      self._client.log_param(self.id, name, json.dumps(value))

  def log(self, step: int, values: dict[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    # MLflow allows no @ in a name.
    points = [Metric(name.replace('@', '_at_'), x, now, step) for name, x in values.items()]
    self._client.log_batch(self.id, metrics=points)

  def close(self, is_done: bool) -> None:
    self._client.set_terminated(self.id, 'FINISHED' if is_done else 'KILLED')


class _WandB:
  """A run in Weights & Biases: offline, in the run's folder, unless WANDB_MODE says otherwise."""

  def __init__(self, folder: pathlib.Path, known: str | None, config: dict[str, Any]):
    import wandb

    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      name=folder.absolute().name,
      id=known,
      resume='allow' if known else None,
      dir=str(folder),
      mode=os.environ.get('WANDB_MODE', 'offline'),
      config=config,
      settings=wandb.Settings(silent=True, console='off'),
    )
    self.id = self._run.id
    # Steps of W&B may only grow, but a run that was killed repeats some.
    self._run.define_metric('*', step_metric='step')

  def log(self, step: int, values: dict[str, float]) -> None:
    self._run.log({'step': step, **values})

  def close(self, is_done: bool) -> None:
    self._run.finish(exit_code=0 if is_done else 1)


class _Trackio:
  """A run in trackio, in its local database (TRACKIO_DIR)."""

  def __init__(self, folder: pathlib.Path, known: str | None, config: dict[str, Any]):
    import trackio

    # trackio finds runs by name, so the name must differ from those of runs in other folders.
    self.id = known or f'{folder.absolute().name}-{secrets.token_hex(4)}'
    self._run = trackio.init(
      project=PROJECT,
      name=self.id,
      config=config,
      resume='allow' if known else 'never',
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )

  def log(self, step: int, values: dict[str, float]) -> None:
    self._run.log(values, step=step)

  def close(self, is_done: bool) -> None:
    del is_done
    self._run.finish()


OPEN: dict[str, Callable[[pathlib.Path, str | None, dict[str, Any]], Tracker]] = {
  'mlflow': _MLflow,
  'trackio': _Trackio,
  'wandb': _WandB,
}


def _read(folder: pathlib.Path) -> dict[str, str]:
  """Reads the trackers' ids of the run; {} if the file is missing or damaged."""
  try:
    found = json.loads((folder / FILE).read_text())
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _warn(message: str) -> None:
  say(f'warning: {message}', sys.stderr)

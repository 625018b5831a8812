"""What a run reports: JSON lines, TensorBoard, a progress bar or plain lines."""

import json
import os
import pathlib
import sys
import time

from tqdm import tqdm

from ur4rec_jax.errors import StorageError

# tensorboardX loads torch wherever it is installed, which takes seconds and serves nothing here.
if has_no_torch := 'torch' not in sys.modules:
  sys.modules['torch'] = None
import tensorboardX

if has_no_torch:
  del sys.modules['torch']


class MetricWriter:
  """Appends scalars to `WORKDIR/metrics.jsonl` and to TensorBoard files in `WORKDIR/tensorboard`.

  The JSON lines hold nothing that depends on the clock, so that a resumed run has the same ones
  as an undisturbed run; speeds go to TensorBoard.
  """

  def __init__(self, workdir: str, step: int, size: int):
    """Opens the files at a resumed place.

    Args:
      workdir: the run's folder.
      step: last step that is kept.
      size: bytes of `metrics.jsonl` that are kept, from `position` when `step` was saved.
    """
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    try:
      self._lines = open(path, 'ab')  # noqa: SIM115
      if self._lines.tell() > size:
        self._lines.truncate(size)
      self._tensorboard = tensorboardX.SummaryWriter(
        str(pathlib.Path(workdir) / 'tensorboard'), purge_step=step + 1
      )
    except OSError as error:
      raise StorageError(f'cannot write to {path}: {error.strerror}') from error

  def write(self, step: int, stage: str, values: dict[str, float]) -> None:
    """Adds one line `{"step", "stage", **values}` and a TensorBoard point for each value."""
    line = {'step': step, 'stage': stage, **values}
    self._lines.write(json.dumps(line).encode() + b'\n')
    self._lines.flush()
    self.write_timing(step, stage, values)

  def write_timing(self, step: int, stage: str, values: dict[str, float]) -> None:
    """Adds TensorBoard points only, for values that differ from run to run."""
    for name, value in values.items():
      self._tensorboard.add_scalar(f'{stage}/{name}', value, step)

  def position(self) -> int:
    """Makes all lines durable and returns the size of `metrics.jsonl`."""
    try:
      self._lines.flush()
      os.fsync(self._lines.fileno())
    except OSError as error:
      raise StorageError(f'cannot write {self._lines.name}: {error.strerror}') from error
    return self._lines.tell()

  def close(self) -> None:
    self._lines.close()
    self._tensorboard.close()


class Progress:
  """A progress bar on a terminal; elsewhere one line now and then."""

  def __init__(self, description: str, total: int, done: int):
    """Starts at `done` of `total` steps."""
    self._bar = tqdm(
      total=total,
      initial=done,
      desc=description,
      unit='step',
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
    )
    self._start = time.monotonic()
    self._first, self._done, self._total = done, done, total
    self._description = description

  def update(self, step: int, **status: str) -> None:
    """Moves to `step` and shows `status` beside the bar, until it is replaced."""
    self._bar.set_postfix(status, refresh=False)
    self._bar.update(step - self._done)
    self._done = step

  def line(self, message: str) -> None:
    """Prints a message that stays; without a terminal, with the step and the time left."""
    if not self._bar.disable:
      self._bar.write(message, file=sys.stderr)
      return
    elapsed = time.monotonic() - self._start
    left = elapsed * (self._total - self._done) / max(self._done - self._first, 1)
    done = f'{self._description} {self._done}/{self._total} steps, at most {_clock(left)} left'
    print(f'[{done}] {message}', file=sys.stderr, flush=True)

  def close(self) -> None:
    self._bar.close()


class Silent:
  """Takes the place of both in the processes of a run that report nothing."""

  def __getattr__(self, name: str):
    return lambda *args, **kwargs: 0


def _clock(seconds: float) -> str:
  return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'

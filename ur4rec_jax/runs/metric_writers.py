"""What a run reports while it trains: JSON lines, curves for trackers, a bar or plain lines."""

import contextlib
import json
import math
import os
import pathlib
import socket
import sys
import time
from typing import NamedTuple

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from ur4rec_jax.errors import StorageError
from ur4rec_jax.files import write_file
from ur4rec_jax.runs.trackers import Trackers

METRICS = 'metrics.jsonl'


class Curves:
  """Writes TensorBoard files in `WORKDIR/tensorboard`, in the calling thread.

  A write that fails is an error of the run. Writers with a thread and a queue of their own would
  block the run instead once the disk is full.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    """Opens a new file; points of earlier files after `step` are not shown any more."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}'
    self._writer = RecordWriter(open(folder / name, 'ab'))  # noqa: SIM115
    self._write(Event(wall_time=time.time(), file_version='brain.Event:2'))
    start = SessionLog(status=SessionLog.START)
    self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

  def add(self, step: int, values: dict[str, float]) -> None:
    """Adds a point to the curve of each value."""
    points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

  def _write(self, event: Event) -> None:
    self._writer.write(event.SerializeToString())
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class MetricWriter:
  """Appends scalars to `WORKDIR/metrics.jsonl`, to TensorBoard and to trackers.

  The JSON lines hold nothing that depends on the clock, so a resumed run writes the same lines as
  an undisturbed run. Speeds go to TensorBoard and the trackers alone.
  """

  def __init__(self, workdir: str, step: int, size: int, trackers: Trackers | None = None):
    """Opens the files at the place where the run goes on.

    Args:
      workdir: the run's folder.
      step: last step that is kept.
      size: bytes of `metrics.jsonl` that are kept, from `position` when `step` was saved.
      trackers: trackers that get the points of the curves, too.

    Raises:
      StorageError: a file cannot be written. Every other method but `close` raises it, too.
    """
    self._path, self._trackers = pathlib.Path(workdir) / METRICS, trackers
    try:
      _keep_lines(self._path, size)
      self._lines = open(self._path, 'ab')  # noqa: SIM115
      self._curves = Curves(pathlib.Path(workdir) / 'tensorboard', step)
    except OSError as error:
      raise self._storage_error(error) from error

  def write(self, step: int, stage: str, values: dict[str, float]) -> None:
    """Adds one line `{"step", "stage", **values}` and a point of a curve for each value."""
    line = {'step': step, 'stage': stage, **values}
    try:
      self._lines.write(json.dumps(line).encode() + b'\n')
      self._lines.flush()
    except OSError as error:
      raise self._storage_error(error) from error
    self.write_curves(step, stage, values)

  def write_curves(self, step: int, stage: str, values: dict[str, float]) -> None:
    """Adds points of curves only, for values that differ from run to run."""
    points = {f'{stage}/{name}': value for name, value in values.items()}
    try:
      self._curves.add(step, points)
    except OSError as error:
      raise self._storage_error(error) from error
    if self._trackers is not None:
      self._trackers.log(step, points)

  def position(self) -> int:
    """Makes all lines durable and returns the size of `metrics.jsonl`."""
    try:
      self._lines.flush()
      os.fsync(self._lines.fileno())
    except OSError as error:
      raise self._storage_error(error) from error
    return self._lines.tell()

  def close(self) -> None:
    for file in (self._lines, self._curves):
      # What counts was made durable by `position`, and an error here would hide the first one.
      with contextlib.suppress(OSError):
        file.close()

  def _storage_error(self, error: OSError) -> StorageError:
    return StorageError(
      f'cannot write {self._path} or the curves beside it: {error.strerror or error}; make room'
      ' and start the same command again to go on from the last checkpoint'
    )


def _keep_lines(path: pathlib.Path, size: int) -> None:
  """Cuts a file of JSON lines to its first `size` bytes, without lines that are damaged.

  The file is checked when a run goes on, because the report at the end of the run reads every line.
  """
  if not path.exists() and not size:
    return
  content = path.read_bytes()[:size] if path.exists() else b''
  good = b''.join(line for line in content.splitlines(keepends=True) if _is_good(line))
  if len(good) < size:
    print(
      f'warning: {path}: {size - len(good)} of {size} bytes that were written before are missing '
      'or damaged; the run goes on, but its curves will have a gap',
      file=sys.stderr,
      flush=True,
    )
    write_file(path, good)
  elif path.stat().st_size > size:
    os.truncate(path, size)


def _is_good(line: bytes) -> bool:
  try:
    record = json.loads(line)
  except ValueError:
    return False
  return line.endswith(b'\n') and isinstance(record, dict) and {'step', 'stage'} <= record.keys()


class Course(NamedTuple):
  """Where a run stands when one of its stages begins or goes on.

  Attributes:
    stage: name of the stage.
    number: number of the stage, from 1.
    num_stages: number of stages of the run.
    first_step: step of the run at which the stage began.
    done: steps that the stage has taken.
    total: steps that it may take.
    later: steps that the stages after it may take.
    deadline: moment of the monotonic clock at which `max_minutes` end the training.
  """

  stage: str
  number: int
  num_stages: int
  first_step: int
  done: int
  total: int
  later: int
  deadline: float = math.inf

  def __str__(self) -> str:
    """Names the stage, e.g. `2/4 pretrain_retriever`; without a number if it is alone."""
    return f'{self.number}/{self.num_stages} {self.stage}' if self.num_stages > 1 else self.stage

  def seconds_left(self, done: int, seconds: float, end: int | None = None) -> float:
    """Estimates the time until the end of the run if the later stages take all their steps.

    Args:
      done: steps that the stage has taken by now.
      seconds: time that the steps since `self.done` took.
      end: step at which the stage ends; None for `self.total`.
    """
    end = self.total if end is None else end
    return seconds / max(done - self.done, 1) * (end - done + self.later)


class Progress:
  """A progress bar on a terminal; elsewhere one line now and then."""

  def __init__(self, course: Course):
    """Starts where the stage stands."""
    self._course = course
    self._bar = tqdm(
      total=course.total,
      initial=course.done,
      desc=str(course),
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
      bar_format='{desc} {percentage:3.0f}%|{bar}| {n}/{total}{postfix}',
    )
    self._start = time.monotonic()
    self._done, self._end = course.done, course.total

  def update(self, step: int, loss: float) -> None:
    """Moves to `step` of the stage."""
    moved, self._done = step - self._done, step
    more = '+' * (self._end < self._course.total)
    self._bar.set_postfix_str(f'loss {loss:.3f}, {self._left(self._end)}{more} left', refresh=False)
    self._bar.update(moved)

  def line(self, message: str, end: int | None = None) -> None:
    """Prints a message that stays; without a terminal, with the step and the time left.

    Args:
      message: the message.
      end: step at which the stage ends unless validation improves; None for its last step.
    """
    total = self._course.total
    self._end = total if end is None else min(end, total)
    if self._bar.disable:
      most = f'at most {self._left(total)}'
      left = f'{most} left'
      if self._end < total:
        left = f'{self._left(self._end)} left, more while validation improves ({most})'
      message = f'[{self._course} {self._done}/{total} steps, {left}] {message}'
    self.note(message)

  def note(self, message: str) -> None:
    """Prints a message that stays."""
    self._bar.write(message, file=sys.stderr)
    sys.stderr.flush()

  def _left(self, end: int) -> str:
    now = time.monotonic()
    seconds = self._course.seconds_left(self._done, now - self._start, end)
    return _clock(min(seconds, max(self._course.deadline - now, 0.0)))

  def close(self) -> None:
    self._bar.close()


class Reporter:
  """Everything that a training loop reports, in the one process that writes and prints."""

  def __init__(self, writer: MetricWriter):
    """Takes over an open writer and closes it at the end."""
    self._writer, self._bar = writer, None
    self._stage, self._first_step = '', 0

  def begin_stage(self, course: Course) -> None:
    """Starts a new bar."""
    if self._bar is not None:
      self._bar.close()
    self._stage, self._first_step = course.stage, course.first_step
    self._bar = Progress(course)

  def end_stage(self, reason: str) -> None:
    """Reports why the stage is over."""
    self._bar.note(f'{self._stage} is over: {reason}')

  def trained(self, step: int, values: dict[str, float], speed: float) -> None:
    """Reports the mean metrics of a dispatch that ended at `step`; `speed` in sequences/s."""
    self._writer.write(step, self._stage, values)
    self._writer.write_curves(step, self._stage, {'sequences_per_second': speed})
    self._bar.update(step - self._first_step, values['loss'])

  def validated(self, step: int, values: dict[str, float], message: str, end: int) -> None:
    """Reports a validation; the stage ends at step `end` of the run unless another is better."""
    self._writer.write(step, self._stage, {f'valid/{name}': x for name, x in values.items()})
    self._bar.line(message, end - self._first_step)

  def position(self) -> int:
    """Makes `metrics.jsonl` durable and returns its size."""
    return self._writer.position()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    self._writer.close()


class NullReporter:
  """Reports nothing: for the other processes of a run, and for benchmarks."""

  def begin_stage(self, course: Course) -> None:
    pass

  def end_stage(self, reason: str) -> None:
    pass

  def trained(self, step: int, values: dict[str, float], speed: float) -> None:
    pass

  def validated(self, step: int, values: dict[str, float], message: str, end: int) -> None:
    pass

  def position(self) -> int:
    return 0

  def close(self) -> None:
    pass


def _clock(seconds: float) -> str:
  return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'

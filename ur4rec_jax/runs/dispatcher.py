"""Sends training steps to the devices and reads their metrics one dispatch later."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ur4rec_jax.data.input_pipeline import Plan, ReadPlan, TrainBatches
from ur4rec_jax.data.streaming import ItemReader, Prefetcher
from ur4rec_jax.errors import DivergenceError
from ur4rec_jax.runs.metric_writers import NullReporter, Reporter
from ur4rec_jax.sharding import devices
from ur4rec_jax.training.stages import StageNumbers
from ur4rec_jax.training.train_data import TrainData
from ur4rec_jax.training.train_state import TrainState


@dataclasses.dataclass
class Dispatcher:
  """Keeps the devices busy: they get their next steps before the host reads the last metrics.

  Attributes:
    train_step: the mapped step of the stage.
    data: training data, on the devices.
    numbers: numbers of the stage, on the devices.
    alternates: whether the stage trains groups in turns; the turn is then among the metrics.
    batches: all batches.
    max_steps: steps in one dispatch.
    reporter: gets the mean metrics of each dispatch.
    reader: reads the items of the next steps; None if the devices hold all.
  """

  train_step: Callable
  data: TrainData
  numbers: StageNumbers
  alternates: bool
  batches: TrainBatches
  max_steps: int
  reporter: Reporter | NullReporter
  reader: ItemReader | None = None

  def __post_init__(self):
    self._epoch, self._plan = -1, None
    self._prefetcher = None if self.reader is None else Prefetcher(self._place)
    self._pending: tuple[int, int, dict[str, Any]] | None = None
    self._last_read = 0.0
    self._loss = self._speed = None  # From the last dispatch read.

  def run(self, state: TrainState, step: int, border: int) -> tuple[TrainState, int]:
    """Trains `max_steps` from `step` on, or fewer: to the end of the epoch or to step `border`."""
    count = min(self._most_steps(step), border - step)
    place = self._place if self._prefetcher is None else self._prefetcher.get
    data, plan = place(step, count)
    state, metrics = self.train_step(
      state, data, plan, devices.replicate(np.int32(count)), self.numbers
    )
    if self._prefetcher is not None:  # While the devices work on these steps.
      self._prefetcher.start(step + count, self._most_steps(step + count))
    # Restarts the clock: compiling or a validation before this dispatch is not training.
    if self._pending is None:
      self._last_read = time.monotonic()
    self.flush()
    self._pending = (step + count, count, metrics)
    return state, step + count

  def _most_steps(self, step: int) -> int:
    """Returns how many steps of the same epoch one dispatch takes from `step` on."""
    return min(self.max_steps, self.batches.steps_per_epoch - step % self.batches.steps_per_epoch)

  def _place(self, step: int, count: int) -> tuple[TrainData, Plan | ReadPlan]:
    """Looks up the rows of some steps of one epoch, and places them and their items on devices."""
    epoch, offset = divmod(step, self.batches.steps_per_epoch)
    if epoch != self._epoch:
      self._plan = None  # Two plans at once would take twice the memory.
      self._epoch, self._plan = epoch, self.batches.plan(epoch)
    # Padded, so that a shorter dispatch needs no second program; the step ignores the padding.
    padding = ((0, self.max_steps - count), (0, 0), (0, 0))
    plan = Plan(*(np.pad(x, padding) for x in self._plan.steps(offset, offset + count)))
    data = self.data
    if self.reader is not None:
      items, plan = self.reader.read(plan)
      data = data._replace(item_ids=devices.replicate(items))
    return data, devices.shard(devices.deal(plan))

  def close(self) -> None:
    """Ends the thread that reads ahead."""
    if self._prefetcher is not None:
      self._prefetcher.close()

  def flush(self) -> None:
    """Waits for the last dispatch and reports it.

    Raises:
      DivergenceError: its loss or gradients are not finite.
    """
    if self._pending is None:
      return
    step, count, metrics = self._pending
    self._pending = None
    metrics = {name: values[:count] for name, values in jax.device_get(metrics).items()}
    finite = metrics.pop('finite')
    if not self.alternates:
      del metrics['turn']
    if not finite.all():
      raise DivergenceError(
        'the loss or its gradient is not finite at step '
        f'{step - count + int(np.argmin(finite)) + 1}; train in another --workdir with a lower '
        'config.optimizer.learning_rate, or with config.optimizer.clip_norm. Nothing after the last'
        ' checkpoint was kept'
      )
    values = {name: float(x.mean(dtype=np.float64)) for name, x in metrics.items()}
    now = time.monotonic()
    users = count * self.batches.users / self.batches.steps_per_epoch
    self._loss, self._speed = values['loss'], users / (now - self._last_read)
    self._last_read = now
    self.reporter.trained(step, values, self._speed)

  def last_dispatch(self) -> str:
    """Describes the last dispatch that was read; empty if none was read since the start."""
    if self._loss is None:
      return ''
    return f'loss {self._loss:.4f}, {self._speed:.0f} sequences/s, '

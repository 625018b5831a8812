"""Trains a model, keeps its best parameters, and survives being stopped at any moment."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax import evaluate, optimizers, parallel, results, steps
from ur4rec_jax.checkpoint import Checkpointer
from ur4rec_jax.config_checks import check_config
from ur4rec_jax.dataset import Dataset
from ur4rec_jax.errors import DivergenceError, InputError, InterruptedBySignal
from ur4rec_jax.features import load_with_features, preference_starts, read_tables
from ur4rec_jax.input_pipeline import Plan, TrainBatches
from ur4rec_jax.metric_writers import MetricWriter, Progress, Silent
from ur4rec_jax.metrics import ranking_metrics
from ur4rec_jax.models.ur4rec import create_model, losses_in_use
from ur4rec_jax.train_state import TrainState, create_train_state
from ur4rec_jax.workdir import claim_workdir

PyTree = Any
STAGE = 'train'
SELECTION_METRIC = 'ndcg@10'


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict:
  """Trains, or goes on training, and writes the best parameters' numbers to `results.json`.

  Args:
    config: see `configs/default.py`.
    workdir: everything that is written goes here; a started run in it is resumed.

  Returns:
    The contents of `results.json`.

  Raises:
    InputError: the config, the data or the workdir's earlier run do not fit.
    DivergenceError: the loss, a gradient or a score is not finite.
    StorageError: something cannot be written.
    InterruptedBySignal: SIGTERM or SIGINT came; the run is saved.
  """
  check_config(config)
  dataset = load_with_features(config)
  _check_dataset(config, dataset)
  claim_workdir(workdir, config, dataset)
  checkpointer = Checkpointer(workdir, config.checkpoint.max_to_keep)
  try:
    with _stop_requests() as stop_requested, jax.transfer_guard(config.transfer_guard):
      loop = _TrainLoop(config, workdir, dataset, checkpointer, stop_requested)
      loop.run()
  finally:
    checkpointer.close()
  progress = loop.progress
  stage = {
    'name': STAGE,
    'steps': progress.step,
    'best_step': progress.best_step,
    'best_epoch': progress.best_epoch,
  }
  return results.write_results(
    config, workdir, dataset, loop.tables, loop.best_params, stage, progress.seconds
  )


def _check_dataset(config: ConfigDict, dataset: Dataset) -> None:
  if dataset.num_items < 2 or len(dataset.lengths) < 2:
    raise InputError(
      f'config.data_dir={config.data_dir}: {len(dataset.lengths)} users and {dataset.num_items} '
      'items; a recommender needs at least 2 of each'
    )
  for part in evaluate.PARTS:
    if not (dataset.split.held_out[part] >= 0).any():
      raise InputError(
        f'config.data_dir={config.data_dir}: split {dataset.split_name} has no {part} users; '
        'leave_one_out needs users with 3 interactions, time needs users before and after it'
      )


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], int]]:
  """Turns SIGTERM and SIGINT into a number to ask for, 0 while there was none."""
  received = []
  old = {
    number: signal.signal(number, lambda number, frame: received.append(number))
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    # Every process of a run must come to the same answer, or one would wait for the others.
    yield lambda: int(parallel.any_process(bool(received))) and (received or [signal.SIGTERM])[0]
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


@dataclasses.dataclass
class TrainProgress:
  """Host state of a run, saved with every checkpoint.

  Attributes:
    step: optimizer steps taken.
    validated_step: step of the last validation.
    best_step: step of the best validation.
    best_epoch: its epoch.
    best_valid: its metrics.
    metrics_size: bytes of `metrics.jsonl` written so far.
    seconds: time spent training and validating, over all starts.
  """

  step: int = 0
  validated_step: int = 0
  best_step: int = 0
  best_epoch: int = 0
  best_valid: dict[str, float] | None = None
  metrics_size: int = 0
  seconds: float = 0.0


class _TrainLoop:
  """Training from the latest checkpoint to the end.

  What happens next is a function of `progress` alone: whatever was going on when the process died
  is done again, in the same way, from the last save.
  """

  def __init__(
    self,
    config: ConfigDict,
    workdir: str,
    dataset: Dataset,
    checkpointer: Checkpointer,
    stop_requested: Callable[[], int],
  ):
    self.config, self.workdir, self.checkpointer = config, workdir, checkpointer
    self.stop_requested = stop_requested
    train_part = dataset.train_part()
    self.batches = TrainBatches(
      train_part,
      max_length=config.max_length,
      batch_size=config.batch_size,
      crop=config.crop,
      seed=config.seed,
    )
    if self.batches.rows % parallel.device_count():
      raise InputError(
        f'config.batch_size={config.batch_size} gives {self.batches.rows} rows, which '
        f'{parallel.device_count()} devices cannot share equally; make it larger'
      )
    self.total_steps = config.num_epochs * self.batches.steps_per_epoch
    self.validate_every = config.validate_every_epochs * self.batches.steps_per_epoch

    model = create_model(config, dataset.num_items)
    tx = optimizers.create_optimizer(config.optimizer, self.total_steps)
    train_step = parallel.MAPPINGS[config.mapping](
      steps.make_train_step(
        model, tx, steps.make_losses(config.loss), losses_in_use(config.loss), config.max_length
      ),
      in_axes=(None, None, 0, None),
      donate_argnums=(0,),
    )
    self.tables = read_tables(dataset, jnp.dtype(config.dtype))
    self._restore_or_create(model, tx)
    data = parallel.replicate(
      steps.TrainData(
        train_part.item_ids,
        train_part.item_counts()[1:].astype(np.float32),
        self.tables,
        preference_starts(train_part),
      )
    )
    self.validator = evaluate.make_evaluator(
      model,
      dataset,
      parallel.replicate(dataset.item_ids),
      data.tables,
      'valid',
      config.evaluation,
      config.mapping,
    )
    self.writer = self.bar = Silent()
    if parallel.is_main_process():
      description = _describe_run(config, dataset, self.batches, self.state.params, self.progress)
      print(description, flush=True)
      self.writer = MetricWriter(workdir, self.progress.step, self.progress.metrics_size)
      self.bar = Progress(STAGE, self.total_steps, self.progress.step)
    self.dispatcher = _Dispatcher(
      config.steps_per_dispatch,
      self.batches,
      train_step,
      data,
      self.writer,
      self.bar,
    )
    self.started = time.monotonic() - self.progress.seconds

  def _restore_or_create(self, model: nn.Module, tx) -> None:
    state = create_train_state(model, tx, self.config.seed, self.tables)
    restored = self.checkpointer.restore({'state': state, 'best_params': state.params})
    if restored is None:
      self.state: TrainState = parallel.replicate(state)
      self.best_params = _copy(self.state.params)
      self.progress, self.saved = TrainProgress(), None
    else:
      arrays, progress = restored
      self.state, self.best_params = arrays['state'], arrays['best_params']
      self.progress = TrainProgress(**progress)
      self.saved = self._position()

  def run(self) -> None:
    """Trains to the end; `best_params` and `progress` then hold the outcome."""
    progress = self.progress
    try:
      while True:
        is_border = progress.step and progress.step % self.validate_every == 0
        if is_border and progress.validated_step < progress.step:
          self._validate()
        if self._is_over():
          break
        if signal_number := self.stop_requested():
          self._save_and_stop(signal_number)
        self.state, progress.step = self.dispatcher.run(self.state, progress.step)
      self.dispatcher.flush()
      self._save()
    finally:
      self.bar.close()
      self.writer.close()

  def _is_over(self) -> bool:
    progress = self.progress
    waited = progress.step - progress.best_step
    out_of_patience = waited >= self.config.patience * self.validate_every
    return progress.step >= self.total_steps or bool(progress.best_valid and out_of_patience)

  def _validate(self) -> None:
    """Ranks the validation items, keeps the parameters if they are the best, and saves."""
    progress = self.progress
    self.dispatcher.flush()
    ranks = self.validator(self.state.params, interrupted=self.stop_requested)
    if ranks is None:
      self._save_and_stop(self.stop_requested())
    values = ranking_metrics(ranks)
    self.writer.write(progress.step, STAGE, {f'valid/{k}': v for k, v in values.items()})
    epoch = progress.step // self.batches.steps_per_epoch
    score = values[SELECTION_METRIC]
    if not progress.best_valid or score > progress.best_valid[SELECTION_METRIC]:
      progress.best_step, progress.best_epoch = progress.step, epoch
      progress.best_valid = values
      self.best_params = _copy(self.state.params)
    progress.validated_step = progress.step
    self.bar.line(
      f'epoch {epoch}: loss {self.dispatcher.loss:.4f}, {self.dispatcher.speed:.0f} sequences/s, '
      f'valid {SELECTION_METRIC} {score:.4f}, '
      f'best {progress.best_valid[SELECTION_METRIC]:.4f} at epoch {progress.best_epoch}'
    )
    if progress.step // self.validate_every % self.config.checkpoint.every_validations == 0:
      self._save()

  def _position(self) -> tuple[int, int]:
    return self.progress.step, self.progress.validated_step

  def _save(self) -> None:
    """Saves, unless the last save was of the same position."""
    if self.saved == self._position():
      return
    self.progress.metrics_size = self.writer.position()
    self.progress.seconds = time.monotonic() - self.started
    tree = {'state': self.state, 'best_params': self.best_params}
    with jax.transfer_guard('allow'):
      self.checkpointer.save(self.progress.step, tree, dataclasses.asdict(self.progress))
    self.saved = self._position()

  def _save_and_stop(self, signal_number: int) -> None:
    self.dispatcher.flush()
    self._save()
    raise InterruptedBySignal(
      f'{signal.Signals(signal_number).name}: saved step {self.progress.step} in {self.workdir}; '
      'start the same command again to go on',
      signal_number,
    )


class _Dispatcher:
  """Sends training steps to the devices and reads their metrics one dispatch later.

  So the devices have their next work before the host waits for the results of the last.

  Attributes:
    loss: mean over the last dispatch that was read.
    speed: its sequences a second.
  """

  def __init__(
    self,
    max_steps: int,
    batches: TrainBatches,
    train_step: Callable,
    data: steps.TrainData,
    writer: MetricWriter,
    bar: Progress,
  ):
    self.loss = self.speed = float('nan')
    self._max_steps, self._batches = max_steps, batches
    self._train_step, self._data = train_step, data
    self._writer, self._bar = writer, bar
    self._epoch, self._plan = -1, None
    self._pending = None
    self._last_read = 0.0

  def run(self, state: TrainState, step: int) -> tuple[TrainState, int]:
    """Trains up to the next border: `max_steps` on, or the end of the epoch."""
    epoch, offset = divmod(step, self._batches.steps_per_epoch)
    if epoch != self._epoch:
      self._epoch, self._plan = epoch, self._batches.epoch(epoch)
    count = min(self._max_steps, self._batches.steps_per_epoch - offset)
    # Padded, so that a shorter last dispatch needs no second program; the step ignores the rest.
    padding = ((0, self._max_steps - count), (0, 0), (0, 0))
    plan = Plan(*(np.pad(x[offset : offset + count], padding) for x in self._plan))
    state, metrics = self._train_step(
      state,
      self._data,
      parallel.shard(parallel.split(plan, axis=1)),
      parallel.replicate(np.int32(count)),
    )
    if self._pending is None:  # The first call compiled, others followed a validation.
      self._last_read = time.monotonic()
    self.flush()
    self._pending = (step + count, count, metrics)
    return state, step + count

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
    if not finite.all():
      raise DivergenceError(
        'the loss or its gradient is not finite at step '
        f'{step - count + int(np.argmin(finite)) + 1}; lower config.optimizer.learning_rate or '
        'set config.optimizer.clip_norm. Nothing after the last checkpoint was kept'
      )
    values = {name: float(x.mean(dtype=np.float64)) for name, x in metrics.items()}
    now = time.monotonic()
    users = count * self._batches.users / self._batches.steps_per_epoch
    self.loss, self.speed = values['loss'], users / (now - self._last_read)
    self._last_read = now
    self._writer.write(step, STAGE, values)
    self._writer.write_timing(step, STAGE, {'sequences_per_second': self.speed})
    self._bar.update(step, loss=f'{self.loss:.4f}', speed=f'{self.speed:.0f} sequences/s')


def _copy(tree: PyTree) -> PyTree:
  """Copies arrays, so that donating the original leaves the copy alone."""
  return jax.tree.map(jnp.copy, tree)


def parameter_table(params: PyTree) -> str:
  """Lists every parameter with its shape and size, and the sum."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  rows = [
    (jax.tree_util.keystr(path, simple=True, separator='/'), str(x.shape), x.size)
    for path, x in leaves
  ]
  rows.append(('total', '', sum(size for _, _, size in rows)))
  width = max(len(name) for name, _, _ in rows)
  return '\n'.join(f'{name:<{width}}  {shape:>14} {size:>12,}' for name, shape, size in rows)


def _describe_run(
  config: ConfigDict,
  dataset: Dataset,
  batches: TrainBatches,
  params: PyTree,
  progress: TrainProgress,
) -> str:
  counts = dataset.info['counts']
  filled = batches.tokens / (batches.steps_per_epoch * batches.rows * config.max_length)
  lines = [
    parameter_table(params),
    '',
    f'data     {dataset.info["name"]}: {counts["users"]:,} users, {counts["items"]:,} items, '
    f'{counts["interactions"]:,} interactions, split {dataset.split_name} {dataset.split_hash}',
    f'batches  {batches.steps_per_epoch} an epoch of {batches.rows} rows x {config.max_length} '
    f'tokens, {filled:.0%} filled, {batches.users / batches.steps_per_epoch:.0f} users each',
    f'devices  {parallel.describe_devices()}, jax {jax.__version__}',
  ]
  for of, features in dataset.all_features.items():
    for name, found in features.items():
      rows, tokens, width = found.shape
      origin = found.origin
      marks = ' (built in)' * origin['is_builtin'] + ' (mock texts)' * origin['is_mock']
      marks += ' (shuffled)' * origin['is_shuffled']
      lines.append(
        f'features {of} {name}: {rows:,} x {tokens} tokens x {width}, {origin["encoder"]}{marks}, '
        f'{origin["fingerprint"][:16]}'
      )
  if progress.step:
    lines.append(f'resuming from step {progress.step}')
  return '\n'.join(lines)

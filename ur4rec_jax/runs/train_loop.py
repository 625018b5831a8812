"""Walks a run's stages, keeps the best parameters, and survives being stopped at any moment."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables, TokenTable, load_with_features, read_tables
from ur4rec_jax.data.input_pipeline import Plan, TrainBatches
from ur4rec_jax.errors import DivergenceError, InputError, InterruptedBySignal
from ur4rec_jax.evaluation import evaluate
from ur4rec_jax.evaluation.metrics import ranking_metrics
from ur4rec_jax.models.content import initial_item_embeddings
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.runs import results
from ur4rec_jax.runs.checkpoint import Checkpointer
from ur4rec_jax.runs.config_checks import check_config
from ur4rec_jax.runs.metric_writers import MetricWriter, Progress, Silent
from ur4rec_jax.runs.workdir import claim_workdir, keep_compiled_programs
from ur4rec_jax.sharding import devices, item_embeddings
from ur4rec_jax.training import optimizers, train_step
from ur4rec_jax.training.stages import Stage, StageNumbers, make_stages, stage_numbers
from ur4rec_jax.training.train_state import (
  NEVER,
  SELECTION_METRIC,
  StageProgress,
  TrainProgress,
  TrainState,
  create_train_state,
  parameter_shapes,
  params_of_stage,
  put_params,
  repeat_params,
  saved_tree,
  start_of_stage,
)

PyTree = Any


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
  tables = read_tables(dataset, jnp.dtype(config.dtype))
  stages, labels = make_stages(
    config, lambda of: parameter_shapes(create_model(of, dataset.num_items), tables)
  )
  claim_workdir(workdir, config, dataset)
  keep_compiled_programs(workdir, config)
  checkpointer = Checkpointer(workdir, config.checkpoint.max_to_keep)
  try:
    with (
      _stop_requests(config.checkpoint.grace_seconds) as stop_requested,
      jax.transfer_guard(config.transfer_guard),
    ):
      loop = TrainLoop(
        config, workdir, dataset, tables, stages, labels, checkpointer, stop_requested
      )
      loop.run()
  finally:
    checkpointer.close()
  return results.write_results(
    config,
    workdir,
    dataset,
    loop.data.tables,
    stages,
    loop.progress,
    loop.best_params,
    num_parameters=sum(x.size for x in jax.tree.leaves(loop.shapes.params)),
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
def _stop_requests(grace_seconds: float) -> Iterator[Callable[[], int]]:
  """Turns SIGTERM and SIGINT into a number to ask for, 0 while there was none.

  After SIGTERM the process ends itself when `grace_seconds` are over, saved or not: Python hears of
  a signal only after the call that it is in, and compiling may take longer than a scheduler waits.
  """
  received = []
  old = {
    number: signal.signal(number, lambda number, frame: received.append(number))
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  noticed, notify = os.pipe()  # A signal's number arrives here even within such a call.
  os.set_blocking(notify, False)
  signal.set_wakeup_fd(notify)
  is_over = threading.Event()

  def end_in_time():
    while number := os.read(noticed, 1):
      if number[0] == signal.SIGTERM and not is_over.wait(grace_seconds):
        print(
          f'SIGTERM: no save within config.checkpoint.grace_seconds={grace_seconds}; start the '
          'same command again to go on from the last checkpoint',
          file=sys.stderr,
          flush=True,
        )
        os._exit(128 + signal.SIGTERM)

  threading.Thread(target=end_in_time, daemon=True).start()
  try:
    # Every process of a run must come to the same answer, or one would wait for the others.
    yield lambda: int(devices.any_process(bool(received))) and (received or [signal.SIGTERM])[0]
  finally:
    is_over.set()
    signal.set_wakeup_fd(-1)
    os.close(notify)
    for number, handler in old.items():
      signal.signal(number, handler)


class TrainLoop:
  """Training from the latest checkpoint to the end.

  What happens next is a function of `progress` alone: whatever was going on when the process died
  is done again, in the same way, from the last save.
  """

  def __init__(
    self,
    config: ConfigDict,
    workdir: str,
    dataset: Dataset,
    tables: Tables,
    stages: list[Stage],
    labels: PyTree,
    checkpointer: Checkpointer,
    stop_requested: Callable[[], int],
  ):
    self.config, self.workdir, self.dataset = config, workdir, dataset
    self.stages, self.labels = stages, labels
    self.checkpointer, self.stop_requested = checkpointer, stop_requested
    train_part = dataset.train_part()
    self.batches = TrainBatches(
      train_part,
      max_length=config.max_length,
      batch_size=config.batch_size,
      crop=config.crop,
      seed=config.seed,
    )
    if self.batches.rows % devices.device_count():
      raise InputError(
        f'config.batch_size={config.batch_size} gives {self.batches.rows} rows, which '
        f'{devices.device_count()} devices cannot share equally; make it larger'
      )
    self.tx = optimizers.create_optimizer(config.optimizer, labels)
    self.item_rows = config.optimizer.item_embeddings
    item_embeddings.check_devices(self.item_rows)
    self._restore_or_create(tables)
    tables = tables._replace(items=item_embeddings.padded_features(tables.items, self.item_rows))
    feature_axes = Tables(items=item_embeddings.feature_axis(self.item_rows), users=None)
    self.data_axes = train_step.TrainData(None, None, feature_axes, None)
    self.data = devices.place(train_step.make_train_data(train_part, tables), self.data_axes)
    self.item_ids = devices.replicate(dataset.item_ids)
    self.validators, self.train_steps = {}, {}
    self.writer = self.bar = Silent()
    if devices.is_main_process():
      description = _describe_run(
        config, dataset, self.batches, stages, labels, self.shapes.params, self.progress
      )
      print(description, flush=True)
      self.writer = MetricWriter(workdir, self.progress.step, self.progress.metrics_size)
    self.started = time.monotonic() - self.progress.seconds
    self._enter_stage()

  def _restore_or_create(self, tables: Tables) -> None:
    model = create_model(self.config, self.dataset.num_items)
    create = jax.jit(lambda: create_train_state(model, self.tx, self.config.seed, tables))
    self.shapes = jax.eval_shape(create)
    create_padded = lambda: item_embeddings.padded(create(), self.item_rows)
    stored = saved_tree(jax.eval_shape(create_padded), len(self.stages))
    self.axes = {
      'state': item_embeddings.row_axes(stored['state'], self.item_rows),
      'best_params': item_embeddings.row_axes(stored['best_params'], self.item_rows, axis=1),
    }
    restored = self.checkpointer.restore(stored, self.axes)
    if restored is None:
      self.state: TrainState = devices.create(create_padded, self.axes['state'])
      if 'sasrec' in self.config.branches and self.config.sasrec.item_input == 'id_from_content':
        self._begin_items_as_content(tables)
      self.best_params = repeat_params(self.state.params, len(self.stages))
      self.progress, self.saved = TrainProgress(), None
    else:
      arrays, progress = restored
      self.state, self.best_params = arrays['state'], arrays['best_params']
      self.progress = TrainProgress.from_json(progress)
      self.saved = self._position()

  def _begin_items_as_content(self, tables: Tables) -> None:
    sasrec, name = self.config.sasrec, item_embeddings.ITEM_TABLE

    @jax.jit
    def table(features: dict[str, TokenTable]) -> dict[str, jax.Array]:
      key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
      rows = initial_item_embeddings(features, sasrec.dim, sasrec.item_scale, sasrec.whitening, key)
      return item_embeddings.padded({name: rows}, self.item_rows)

    first_tokens = jax.tree.map(lambda x: x[:, :1], tables.items)
    rows = jax.device_get(table(jax.device_put(first_tokens)))
    params = self.state.params['sasrec']
    params |= devices.place(rows, {name: self.axes['state'].params['sasrec'][name]})

  def _enter_stage(self) -> None:
    """Prepares what the current stage trains and validates with."""
    stage = self.stage = self.stages[len(self.progress.stages) - 1]
    self.total_steps = stage.total_steps(self.batches.steps_per_epoch)
    self.validate_every = stage.validate_every_epochs * self.batches.steps_per_epoch
    model = create_model(stage.config, self.dataset.num_items)
    branches = stage.config.branches
    if branches not in self.validators:
      self.validators[branches] = evaluate.make_evaluator(
        model,
        self.dataset,
        self.item_ids,
        self.data.tables,
        'valid',
        self.config.evaluation,
        self.config.mapping,
        self.item_rows,
        self.axes['state'].params,
      )
    program = branches, stage.losses, stage.trainable
    if program not in self.train_steps:
      self.train_steps[program] = devices.MAPPINGS[self.config.mapping](
        train_step.make_train_step(model, self.tx, self.labels, stage.config, stage.trainable),
        in_axes=(self.axes['state'], self.data_axes, 0, None, None),
        donate_argnums=(0,),
        out_axes=(self.axes['state'], None),
      )
    max_turns = max(len(stage.alternation) for stage in self.stages)
    numbers = stage_numbers(stage, self.labels, self.batches.steps_per_epoch, max_turns)
    self.bar.close()
    if devices.is_main_process():
      self.bar = Progress(str(stage), self.total_steps, self._steps_in_stage())
    self.dispatcher = _Dispatcher(
      stage,
      self.config.steps_per_dispatch,
      self.batches,
      self.train_steps[program],
      self.data,
      devices.replicate(numbers),
      self.writer,
      self.bar,
      self.progress.stage.start,
    )

  def _stage_index(self) -> jax.Array:
    return devices.replicate(np.int32(len(self.progress.stages) - 1))

  def _steps_in_stage(self) -> int:
    return self.progress.step - self.progress.stage.start

  def run(self) -> None:
    """Trains to the end; `best_params` and `progress` then hold the outcome."""
    progress = self.progress
    try:
      while True:
        if self._is_border() and progress.validated_step < progress.step:
          self._validate()
        if self._is_over():
          if len(progress.stages) == len(self.stages):
            break
          self._start_next_stage()
          continue
        if signal_number := self.stop_requested():
          self._save_and_stop(signal_number)
        self.state, progress.step = self.dispatcher.run(self.state, progress.step, self._border())
      self.dispatcher.flush()
      self._save()
    finally:
      self.bar.close()
      self.writer.close()

  def _border(self) -> int:
    """Returns the step of the stage's next validation."""
    every = self.validate_every
    return self.progress.stage.start + min(
      (self._steps_in_stage() // every + 1) * every, self.total_steps
    )

  def _is_border(self) -> bool:
    # Later stages are validated at their start, too: what they begin with may stay their best.
    done = self._steps_in_stage()
    return done % self.validate_every == 0 or done >= self.total_steps

  def _is_over(self) -> bool:
    progress = self.progress
    waited = progress.step - progress.stage.best_step
    out_of_patience = waited >= self.stage.patience * self.validate_every
    is_validated = progress.validated_step == progress.step
    return is_validated and (self._steps_in_stage() >= self.total_steps or out_of_patience)

  def _start_next_stage(self) -> None:
    """Goes on from the best parameters; needs no save, as the last one leads here again."""
    progress = self.progress
    params = self.state.params
    if self.stage.start_next_with == 'best':
      params = params_of_stage(self.best_params, self._stage_index())
    at_start = devices.replicate(start_of_stage())
    self.state = self.state.replace(params=params, stage=at_start)
    progress.stages.append(StageProgress(progress.step, best_step=progress.step))
    progress.validated_step = NEVER
    self._enter_stage()

  def _validate(self) -> None:
    """Ranks the validation items, keeps the parameters if they are the best, and saves."""
    progress, best = self.progress, self.progress.stage
    self.dispatcher.flush()
    validator = self.validators[self.stage.config.branches]
    ranks = validator(self.state.params, interrupted=self.stop_requested)
    if ranks is None:
      self._save_and_stop(self.stop_requested())
    values = ranking_metrics(ranks)
    self.writer.write(progress.step, self.stage.name, {f'valid/{k}': v for k, v in values.items()})
    done = self._steps_in_stage()
    epoch = done // self.batches.steps_per_epoch
    score = values[SELECTION_METRIC]
    if not best.valid or score > best.valid[SELECTION_METRIC]:
      best.best_step, best.best_epoch, best.valid = progress.step, epoch, values
      self.best_params = put_params(self.best_params, self.state.params, self._stage_index())
    progress.validated_step = progress.step
    trained = f'loss {self.dispatcher.loss:.4f}, {self.dispatcher.speed:.0f} sequences/s, '
    self.bar.line(
      f'epoch {epoch}: {trained if done else ""}valid {SELECTION_METRIC} {score:.4f}, '
      f'best {best.valid[SELECTION_METRIC]:.4f} at epoch {best.best_epoch}'
    )
    count = done // self.validate_every
    if done and (self._is_over() or count % self.config.checkpoint.every_validations == 0):
      self._save()

  def _position(self) -> tuple[int, int, int]:
    return self.progress.step, len(self.progress.stages), self.progress.validated_step

  def _save(self) -> None:
    """Saves, unless the last save was of the same position."""
    if self.saved == self._position():
      return
    self.progress.metrics_size = self.writer.position()
    self.progress.seconds = time.monotonic() - self.started
    tree = {'state': self.state, 'best_params': self.best_params}
    with jax.transfer_guard('allow'):
      progress = dataclasses.asdict(self.progress)
      self.checkpointer.save(self.progress.step, tree, progress, self.axes)
    self.saved = self._position()

  def _save_and_stop(self, signal_number: int) -> None:
    self.dispatcher.flush()
    # A save of the same step would first delete the last one, to spare a validation at most.
    if self.saved is None or self.saved[0] < self.progress.step:
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
    stage: Stage,
    max_steps: int,
    batches: TrainBatches,
    train_step: Callable,
    data: train_step.TrainData,
    numbers: StageNumbers,
    writer: MetricWriter,
    bar: Progress,
    first_step: int,
  ):
    self.loss = self.speed = float('nan')
    self._stage, self._max_steps, self._batches = stage, max_steps, batches
    self._train_step, self._data, self._numbers = train_step, data, numbers
    self._writer, self._bar, self._first_step = writer, bar, first_step
    self._epoch, self._plan = -1, None
    self._pending = None
    self._last_read = 0.0

  def run(self, state: TrainState, step: int, border: int) -> tuple[TrainState, int]:
    """Trains `max_steps`, or less: to the end of the epoch or to step `border`."""
    epoch, offset = divmod(step, self._batches.steps_per_epoch)
    if epoch != self._epoch:
      self._epoch, self._plan = epoch, self._batches.epoch(epoch)
    count = min(self._max_steps, self._batches.steps_per_epoch - offset, border - step)
    # Padded, so that a shorter last dispatch needs no second program; the step ignores the rest.
    padding = ((0, self._max_steps - count), (0, 0), (0, 0))
    plan = Plan(*(np.pad(x[offset : offset + count], padding) for x in self._plan))
    state, metrics = self._train_step(
      state,
      self._data,
      devices.shard(devices.split(plan, axis=1)),
      devices.replicate(np.int32(count)),
      self._numbers,
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
    if len(self._stage.alternation) == 1:
      metrics.pop('turn')
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
    self._writer.write(step, self._stage.name, values)
    self._writer.write_timing(step, self._stage.name, {'sequences_per_second': self.speed})
    self._bar.update(
      step - self._first_step, loss=f'{self.loss:.4f}', speed=f'{self.speed:.0f} sequences/s'
    )


def parameter_table(params: PyTree, labels: PyTree) -> str:
  """Lists every parameter with its shape, size and label, and the sum."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  rows = [
    (jax.tree_util.keystr(path, simple=True, separator='/'), str(x.shape), x.size, label)
    for (path, x), label in zip(leaves, jax.tree.leaves(labels), strict=True)
  ]
  rows.append(('total', '', sum(row[2] for row in rows), ''))
  width = max(len(row[0]) for row in rows)
  return '\n'.join(
    f'{name:<{width}}  {shape:>14} {size:>12,}  {label}' for name, shape, size, label in rows
  )


def _describe_run(
  config: ConfigDict,
  dataset: Dataset,
  batches: TrainBatches,
  stages: list[Stage],
  labels: PyTree,
  params: PyTree,
  progress: TrainProgress,
) -> str:
  counts = dataset.info['counts']
  filled = batches.tokens / (batches.steps_per_epoch * batches.rows * config.max_length)
  lines = [
    parameter_table(params, labels),
    '',
    f'data     {dataset.info["name"]}: {counts["users"]:,} users, {counts["items"]:,} items, '
    f'{counts["interactions"]:,} interactions, split {dataset.split_name} {dataset.split_hash}',
    f'batches  {batches.steps_per_epoch} an epoch of {batches.rows} rows x {config.max_length} '
    f'tokens, {filled:.0%} filled, {batches.users / batches.steps_per_epoch:.0f} users each',
    f'devices  {devices.describe_devices()}, jax {jax.__version__}',
  ]
  for of, features in dataset.all_features.items():
    for name, found in features.items():
      rows, tokens, width = found.shape
      origin = found.origin
      marks = ' (built in)' * origin['is_builtin'] + ' (mock texts)' * origin['is_mock']
      marks += ' (shuffled)' * origin['is_shuffled']
      marks += f' (first {found.max_tokens} read)' * bool(found.max_tokens)
      lines.append(
        f'features {of} {name}: {rows:,} x {tokens} tokens x {width}, {origin["encoder"]}{marks}, '
        f'{origin["fingerprint"][:16]}'
      )
  if len(stages) > 1:
    lines.append(f'stages   {", ".join(map(str, stages))}')
  if progress.step:
    name = stages[len(progress.stages) - 1].name
    lines.append(f'resuming from step {progress.step}, in stage {name}')
  return '\n'.join(lines)

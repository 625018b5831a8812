"""Trains a run through its stages, keeps the best parameters, and survives being stopped."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data.features import TokenTable
from ur4rec_jax.data.input_pipeline import TrainBatches
from ur4rec_jax.data.streaming import ItemReader
from ur4rec_jax.errors import InputError, InterruptedBySignal, say
from ur4rec_jax.evaluation.evaluate import Evaluators
from ur4rec_jax.evaluation.metrics import ranking_metrics
from ur4rec_jax.models.content import initial_item_embeddings
from ur4rec_jax.runs import warm_start
from ur4rec_jax.runs.checkpoint import Checkpointer
from ur4rec_jax.runs.config_checks import flatten
from ur4rec_jax.runs.dispatcher import Dispatcher
from ur4rec_jax.runs.metric_writers import Course, MetricWriter, NullReporter, Reporter
from ur4rec_jax.runs.open_run import Run, open_run
from ur4rec_jax.runs.results import write_results
from ur4rec_jax.runs.run_summary import run_summary
from ur4rec_jax.runs.stop_requests import stop_requests
from ur4rec_jax.runs.trackers import Trackers, open_trackers
from ur4rec_jax.runs.workdir import claimed_workdir, note_start, stored_config
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import ITEM_TABLE
from ur4rec_jax.training.stages import Stage, stage_numbers
from ur4rec_jax.training.train_data import make_train_data, train_data_axes
from ur4rec_jax.training.train_state import (
  NEVER,
  SELECTION_METRIC,
  StageProgress,
  TrainProgress,
  TrainState,
  params_of_stage,
  put_params,
  repeat_params,
  start_of_stage,
)
from ur4rec_jax.training.train_step import make_train_step

PyTree = Any


def train_and_evaluate(
  config: ConfigDict, workdir: str, on_validation: Callable[[int, float], None] | None = None
) -> dict:
  """Trains, or goes on training, and writes the metrics of the best parameters to `results.json`.

  Args:
    config: see `configs/default.py`.
    workdir: the run's folder; if a run was started in it, it goes on.
    on_validation: is called after each validation with the stage's epoch and the NDCG@10. An
      exception from it ends the run, which can be started again.

  Returns:
    The contents of `results.json`.

  Raises:
    InputError: the config, the data or the workdir's earlier run do not fit.
    DivergenceError: the loss, a gradient or a score is not finite.
    StorageError: something cannot be written.
    InterruptedBySignal: SIGTERM, SIGINT or SIGHUP came; the run is saved.
  """
  run = open_run(config)
  run.check_targets()
  batches = plan_batches(run)
  with claimed_workdir(workdir, run), _trackers(run, workdir) as trackers:
    with (
      contextlib.closing(Checkpointer(workdir, config.checkpoint.max_to_keep)) as checkpointer,
      stop_requests(config.checkpoint.grace_seconds) as stop_requested,
      jax.transfer_guard(config.transfer_guard),
    ):
      start = restore_or_create(run, checkpointer)
      _check_length(run, batches, start.progress, workdir)
      _check_patience(run, batches, start.progress, workdir)
      note_start(workdir, run)
      reporter = _open_reporter(run, batches, start, workdir, trackers)
      with contextlib.closing(reporter):
        loop = TrainLoop(run, batches, start, checkpointer, reporter, on_validation)
        with contextlib.closing(loop):
          loop.run_to_end(stop_requested)
    results = write_results(run, workdir, loop.progress, loop.best_params, loop.evaluators)
    if trackers is not None:
      points = {f'test/{name}': value for name, value in results['test'].items()}
      trackers.log(loop.progress.step, points)
    return results


def _trackers(run: Run, workdir: str) -> contextlib.AbstractContextManager[Trackers | None]:
  """Opens the trackers of a run in the one process that reports."""
  names = run.config.trackers if devices.is_main_process() else ()
  return open_trackers(workdir, names, flatten(run.config.to_dict()))


def plan_batches(run: Run) -> TrainBatches:
  """Plans the training batches of a run.

  Raises:
    InputError: there is nobody to train on, or a device would get no rows.
  """
  config, lengths = run.config, run.dataset.split.train_lengths
  trains = warm_start.users_to_train(run)
  if trains is not None and not (trains & (lengths > 1)).any():
    raise InputError(
      f'config.init.replay={config.init.replay}: no user with two training interactions has new'
      f' events since {config.init.run}; set it above 0, or add events'
    )
  batches = TrainBatches(
    lengths,
    max_length=config.max_length,
    batch_size=config.batch_size,
    crop=config.crop,
    seed=config.seed,
    trains=trains,
  )
  if batches.rows < devices.device_count():
    raise InputError(
      f'config.batch_size={config.batch_size} gives {batches.rows} rows, fewer than the '
      f'{devices.device_count()} devices; make it larger, or train on fewer devices'
    )
  return batches


def _check_length(run: Run, batches: TrainBatches, progress: TrainProgress, workdir: str) -> None:
  """Raises InputError if the run has trained its current stage for longer than the config asks."""
  stage = run.stages[len(progress.stages) - 1]
  done = progress.step - progress.stage.start
  if done <= stage.total_steps(batches.steps_per_epoch):
    return
  trained = f'{done // batches.steps_per_epoch} epochs' if not stage.num_steps else f'{done} steps'
  field = 'num_steps' if stage.num_steps else 'num_epochs'
  follows_run = not stage.num_steps and stage.num_epochs == run.config.num_epochs
  raise InputError(
    f'config.{"" if follows_run else f"stage.{stage.name}."}{field}={getattr(stage, field)}: the '
    f'run in {workdir} has trained its stage {stage.name} for {trained} already and cannot become '
    'shorter; set the number back, or train the shorter run in another --workdir'
  )


def _check_patience(run: Run, batches: TrainBatches, progress: TrainProgress, workdir: str) -> None:
  """Raises InputError if with a lower patience the run might have ended where it did not."""
  stage = run.stages[len(progress.stages) - 1]
  done = progress.step - progress.stage.start
  validations = done // (stage.validate_every_epochs * batches.steps_per_epoch)
  if run.config.keep == 'last' or validations <= stage.patience:
    return
  before = stored_config(workdir).stage[stage.name].patience
  if stage.patience < before:
    field = 'patience' if stage.patience == run.config.patience else f'stage.{stage.name}.patience'
    raise InputError(
      f'config.{field}={stage.patience}: the run in {workdir} was started with {before} and has'
      f' validated its stage {stage.name} {validations} times; with less patience it might have'
      ' ended before, at another best epoch; set it back, or train in another --workdir'
    )


@dataclasses.dataclass
class Start:
  """Where a training loop starts or goes on.

  Attributes:
    state: training state, on the devices.
    best_params: best parameters of all stages, `[stages, ...]` each, on the devices.
    axes: for the arrays of both, the dimension that is spread over devices.
    progress: progress of the run.
    is_saved: whether the latest checkpoint holds this position.
  """

  state: TrainState
  best_params: PyTree
  axes: dict[str, PyTree]
  progress: TrainProgress
  is_saved: bool


def restore_or_create(run: Run, checkpointer: Checkpointer) -> Start:
  """Reads the latest checkpoint, or initialises the run if there is none."""
  stored, embeddings = run.stored(), run.embeddings
  axes = run.stored_axes(stored)
  restored = checkpointer.restore(stored, axes)
  if restored is not None:
    arrays, progress = restored
    progress = TrainProgress.from_json(progress)
    return Start(arrays['state'], arrays['best_params'], axes, progress, is_saved=True)
  progress = TrainProgress()
  if run.config.init.run:
    state = devices.place(warm_start.warm_state(run), axes['state'])
    progress.validated_step = NEVER  # The parameters it starts with may stay its best.
  else:
    state = devices.create(lambda: embeddings.pad(run.create_state()), axes['state'])
    if 'sasrec' in run.config.branches and run.config.sasrec.item_input == 'id_from_content':
      _begin_items_as_content(run, state.params, axes['state'].params)
  best_params = repeat_params(state.params, len(run.stages))
  return Start(state, best_params, axes, progress, is_saved=False)


def _begin_items_as_content(run: Run, params: PyTree, axes: PyTree) -> None:
  """Replaces the initial item embeddings of SASRec by embeddings made from content."""
  sasrec, seed = run.config.sasrec, run.config.seed

  @jax.jit
  def table(features: dict[str, TokenTable]) -> dict[str, jax.Array]:
    key = jax.random.fold_in(jax.random.key(seed), 1)
    rows = initial_item_embeddings(features, sasrec.dim, sasrec.item_scale, sasrec.whitening, key)
    return run.embeddings.pad({ITEM_TABLE: rows})

  first_tokens = jax.tree.map(lambda x: x[:, :1], run.tables.items)
  rows = jax.device_get(table(jax.device_put(first_tokens)))
  params['sasrec'] |= devices.place(rows, {ITEM_TABLE: axes['sasrec'][ITEM_TABLE]})


def _open_reporter(
  run: Run, batches: TrainBatches, start: Start, workdir: str, trackers: Trackers | None
) -> Reporter | NullReporter:
  if not devices.is_main_process():
    return NullReporter()
  say(run_summary(run, batches, start.progress))
  progress = start.progress
  return Reporter(MetricWriter(workdir, progress.step, progress.metrics_size, trackers))


class TrainLoop:
  """Training from where a run stands to its end.

  What happens next is a function of `progress` alone. If the process dies, the next one repeats
  whatever came after the last save, in the same way.

  Attributes:
    state: training state, on the devices.
    best_params: best parameters of all stages, `[stages, ...]` each, on the devices.
    progress: progress of the run.
    evaluators: evaluations that rank the held-out items.
  """

  def __init__(
    self,
    run: Run,
    batches: TrainBatches,
    start: Start,
    checkpointer: Checkpointer,
    reporter: Reporter | NullReporter,
    on_validation: Callable[[int, float], None] | None = None,
  ):
    """Places the data on the devices and prepares the current stage."""
    self.config, self.run, self.batches = run.config, run, batches
    self.checkpointer, self.reporter = checkpointer, reporter
    self.on_validation = on_validation
    self.state, self.best_params, self.axes = start.state, start.best_params, start.axes
    self.progress = start.progress
    self.saved = self._position() if start.is_saved else None
    tables = run.tables._replace(items=run.embeddings.pad_features(run.tables.items))
    self.data_axes = train_data_axes(run.embeddings)
    in_memory = self.config.data_in_memory
    train_data = make_train_data(run.dataset, tables, in_memory)
    self.reader = None if in_memory else ItemReader(run.dataset, self.config.max_length)
    self.data = devices.place(train_data, self.data_axes)
    self.evaluators = Evaluators(
      run.eval_data(self.data.tables)._replace(
        embeddings=run.embeddings, params_axes=self.axes['state'].params
      )
    )
    self.train_steps = {}
    self.started = time.monotonic() - self.progress.seconds
    self.is_out_of_time, self._any_process = False, devices.late_any_process()
    self._enter_stage()

  def _enter_stage(self) -> None:
    """Prepares the training step, the limits and the progress report of the current stage."""
    stage = self.stage = self.run.stages[len(self.progress.stages) - 1]
    self.total_steps = stage.total_steps(self.batches.steps_per_epoch)
    self.validate_every = stage.validate_every_epochs * self.batches.steps_per_epoch
    max_turns = max(len(stage.alternation) for stage in self.run.stages)
    numbers = stage_numbers(stage, self.run.labels, self.batches.steps_per_epoch, max_turns)
    number, later = len(self.progress.stages), self.run.stages[len(self.progress.stages) :]
    limit = 60 * self.config.max_minutes
    self.reporter.begin_stage(
      Course(
        stage.name,
        number=number,
        num_stages=len(self.run.stages),
        first_step=self.progress.stage.start,
        done=self._steps_in_stage(),
        total=self.total_steps,
        later=sum(x.total_steps(self.batches.steps_per_epoch) for x in later),
        deadline=self.started + limit if limit > 0 else math.inf,
      )
    )
    self.dispatcher = Dispatcher(
      train_step=self._train_step(stage),
      data=self.data,
      numbers=devices.replicate(numbers),
      alternates=len(stage.alternation) > 1,
      batches=self.batches,
      max_steps=self.config.steps_per_dispatch,
      reporter=self.reporter,
      reader=self.reader,
    )

  def _train_step(self, stage: Stage) -> Callable:
    """Returns the mapped step of a stage; stages that differ only in numbers share one."""
    program = stage.model, stage.trainable
    if program not in self.train_steps:
      self.train_steps[program] = devices.MAPPINGS[self.config.mapping](
        make_train_step(self.run.tx, self.run.labels, stage, self.run.embeddings),
        in_axes=(self.axes['state'], self.data_axes, 0, None, None),
        donate_argnums=(0,),
        out_axes=(self.axes['state'], None),
      )
    return self.train_steps[program]

  def _stage_index(self) -> jax.Array:
    return devices.replicate(np.int32(len(self.progress.stages) - 1))

  def _steps_in_stage(self) -> int:
    return self.progress.step - self.progress.stage.start

  def run_to_end(self, stop_requested: Callable[[], int]) -> None:
    """Trains to the end; `best_params` and `progress` then hold the outcome.

    Args:
      stop_requested: returns the signal that asks the run to stop, or 0.

    Raises:
      InterruptedBySignal: the run was asked to stop, and is saved.
    """
    progress = self.progress
    while True:
      self.is_out_of_time = self._find_out_of_time()
      if (self._is_border() or self.is_out_of_time) and progress.validated_step < progress.step:
        self._validate(stop_requested)
      if self._is_over():
        self.reporter.end_stage(self._why_over())
        if len(progress.stages) == len(self.run.stages):
          break
        self._start_next_stage()
        continue
      if signal_number := stop_requested():
        self._save_and_stop(signal_number)
      self.state, progress.step = self.dispatcher.run(self.state, progress.step, self._border())
    self.dispatcher.flush()
    self._save()

  def _border(self) -> int:
    """Returns the step of the stage's next validation."""
    every = self.validate_every
    return self.progress.stage.start + min(
      (self._steps_in_stage() // every + 1) * every, self.total_steps
    )

  def _is_border(self) -> bool:
    # Later stages are validated at their start, too: their first parameters may stay their best.
    done = self._steps_in_stage()
    return done % self.validate_every == 0 or done >= self.total_steps

  def _is_over(self) -> bool:
    progress = self.progress
    out_of_patience = progress.step >= self._out_of_patience_at()
    is_validated = progress.validated_step == progress.step
    is_done = self._steps_in_stage() >= self.total_steps or out_of_patience
    # A run that is out of time at its start still takes a step and is validated after it.
    return is_validated and (is_done or (self.is_out_of_time and bool(progress.stage.valid)))

  def _find_out_of_time(self) -> bool:
    """Tells whether `max_minutes` are over; all processes get the same answer."""
    limit = 60 * self.config.max_minutes
    return limit > 0 and self._any_process(time.monotonic() - self.started >= limit)

  def _out_of_patience_at(self) -> int:
    """Returns the step at which the stage ends unless a validation before is better."""
    if self.config.keep == 'last':  # Validation chooses nothing, so it does not end the stage.
      return self.progress.stage.start + self.total_steps
    return self.progress.stage.best_step + self.stage.patience * self.validate_every

  def _why_over(self) -> str:
    """Says why the stage is over and what its best validation was."""
    stage, best = self.stage, self.progress.stage
    why = f'{stage.patience} validations without gain'
    if self.is_out_of_time and self.progress.step < self._out_of_patience_at():
      why = f'the {self.config.max_minutes:g} minutes of max_minutes are over'
    if self._steps_in_stage() >= self.total_steps:
      length = f'{stage.num_steps} steps' if stage.num_steps else f'{stage.num_epochs} epochs'
      why = f'all {length} are done'
    score = best.valid[SELECTION_METRIC]
    return (
      f'{why}; {self.config.keep} valid {SELECTION_METRIC} {score:.4f} at epoch {best.best_epoch}'
    )

  def _start_next_stage(self) -> None:
    """Begins the next stage with the best or the last parameters; the optimizer state is kept.

    Nothing is saved: a run that restarts from the last save comes here again.
    """
    progress = self.progress
    params = self.state.params
    if self.stage.start_next_with == 'best':
      params = params_of_stage(self.best_params, self._stage_index())
    at_start = devices.replicate(start_of_stage())
    self.state = self.state.replace(params=params, stage=at_start)
    progress.stages.append(StageProgress(progress.step, best_step=progress.step))
    progress.validated_step = NEVER
    self.close()
    self._enter_stage()

  def close(self) -> None:
    """Ends the threads of the loop."""
    self.dispatcher.close()

  def _validate(self, stop_requested: Callable[[], int]) -> None:
    """Ranks the validation items, keeps the parameters that `config.keep` names, and saves."""
    progress, best = self.progress, self.progress.stage
    self.dispatcher.flush()
    # Prepared for the first validation, so that training begins before all queries are packed.
    evaluator = self.evaluators.get(self.stage.model, 'valid')
    ranks = evaluator(self.state.params, interrupted=stop_requested)
    if ranks is None:
      self._save_and_stop(stop_requested())
    values = ranking_metrics(ranks)
    done = self._steps_in_stage()
    epoch = done // self.batches.steps_per_epoch
    score = values[SELECTION_METRIC]
    is_best = not best.valid or score > best.valid[SELECTION_METRIC]
    if is_best or self.config.keep == 'last':
      best.best_step, best.best_epoch, best.valid = progress.step, epoch, values
      self.best_params = put_params(self.best_params, self.state.params, self._stage_index())
    progress.validated_step = progress.step
    message = (
      f'epoch {epoch}: {self.dispatcher.last_dispatch()}valid {SELECTION_METRIC} {score:.4f}, '
      f'{self.config.keep} {best.valid[SELECTION_METRIC]:.4f} at epoch {best.best_epoch}'
    )
    self.reporter.validated(progress.step, values, message, self._out_of_patience_at())
    count = done // self.validate_every
    if done and (self._is_over() or count % self.config.checkpoint.every_validations == 0):
      self._save()
    if self.on_validation is not None:
      self.on_validation(epoch, score)

  def _position(self) -> tuple[int, int, int]:
    return self.progress.step, len(self.progress.stages), self.progress.validated_step

  def _save(self) -> None:
    """Saves, unless the last save was of the same position."""
    if self.saved == self._position():
      return
    self.progress.metrics_size = self.reporter.position()
    self.progress.seconds = time.monotonic() - self.started
    tree = {'state': self.state, 'best_params': self.best_params}
    with jax.transfer_guard('allow'):
      progress = dataclasses.asdict(self.progress)
      self.checkpointer.save(self.progress.step, tree, progress, self.axes)
    self.saved = self._position()

  def _save_and_stop(self, signal_number: int) -> None:
    self.dispatcher.flush()
    # Saving the same step again would first delete the last save, only to spare a validation.
    if self.saved is None or self.saved[0] < self.progress.step:
      self._save()
    raise InterruptedBySignal(
      f'{signal.Signals(signal_number).name}: saved step {self.progress.step} in '
      f'{self.checkpointer.workdir}; start the same command again to go on',
      signal_number,
    )

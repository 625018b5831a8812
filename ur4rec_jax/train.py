"""Trains a model, keeps its best parameters, survives being stopped, and writes test numbers."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax import evaluate, optimizers, parallel, steps
from ur4rec_jax.checkpoint import Checkpointer, write_file
from ur4rec_jax.config_checks import check_config, check_unchanged
from ur4rec_jax.errors import DivergenceError, InputError, InterruptedBySignal, StorageError
from ur4rec_jax.input_pipeline import Dataset, Plan, TrainBatches, load_dataset
from ur4rec_jax.metric_writers import MetricWriter, Progress, metrics_table
from ur4rec_jax.models.sasrec import SASRec
from ur4rec_jax.train_state import TrainState, create_train_state

PyTree = Any
STAGE = 'train_sasrec'
SELECTION_METRIC = 'ndcg@10'


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


def create_model(config: ConfigDict, num_items: int) -> nn.Module:
  """Builds the model that `config.model` and `config.max_length` describe."""
  fields = dict(config.model)
  dtype = jnp.dtype(fields.pop('dtype'))
  return SASRec(num_items=num_items, max_length=config.max_length, dtype=dtype, **fields)


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


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], int]]:
  """Turns SIGTERM and SIGINT into a number to ask for, 0 while there was none."""
  received = []

  def note(number, frame):
    del frame
    received.append(number)

  old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    # Every process of a run must come to the same answer, or one would wait for the others.
    yield lambda: int(parallel.any_process(bool(received))) and (received or [signal.SIGTERM])[0]
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _claim_workdir(workdir: str, config: ConfigDict, dataset: Dataset) -> None:
  """Writes what the run is to `config.json`, or checks that it is the same as before.

  Raises:
    InputError: the folder holds a run on other data or with another config.
    StorageError: the folder cannot be written.
  """
  folder = pathlib.Path(workdir)
  identity = {'name': dataset.info['name'], 'split_hash': dataset.info['split']['hash']}
  path = folder / 'config.json'
  if path.exists():
    started = json.loads(path.read_text())
    if started['dataset'] != identity:
      raise InputError(
        f'{workdir} holds a run on dataset {started["dataset"]}, but config.data_dir='
        f'{config.data_dir} is {identity}; use another --workdir'
      )
    check_unchanged(started['config'], config.to_dict(), workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise StorageError(f'cannot write to --workdir {workdir}: {error.strerror}') from error
  if parallel.is_main_process():
    text = json.dumps({'dataset': identity, 'config': config.to_dict()}, indent=2)
    write_file(path, text + '\n')


def _git_version() -> str | None:
  """Commit of the source tree, with `-dirty` if it has changes; None outside a checkout."""
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
  folder = pathlib.Path(__file__).parent
  try:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
  except OSError:
    return None
  return done.stdout.strip() or None


class _Dispatcher:
  """Sends training steps to the devices and reads their metrics one dispatch later.

  So the devices have their next work before the host waits for the results of the last.
  """

  def __init__(self, config: ConfigDict, batches: TrainBatches, train_step: Callable, writer, bar):
    self._batches, self._train_step = batches, train_step
    self._max_steps = config.steps_per_dispatch
    self._writer, self._bar = writer, bar
    self._epoch, self._plan = -1, None
    self._pending = None
    self._last_read = 0.0
    self.loss = self.speed = float('nan')  # Of the last dispatch that was read.

  def run(self, state: TrainState, data: steps.TrainData, step: int) -> tuple[TrainState, int]:
    """Trains up to the next border: `steps_per_dispatch`, or the end of the epoch."""
    epoch, offset = divmod(step, self._batches.steps_per_epoch)
    if epoch != self._epoch:
      self._epoch, self._plan = epoch, self._batches.epoch(epoch)
    count = min(self._max_steps, self._batches.steps_per_epoch - offset)
    # Padded, so that a shorter last dispatch needs no second program; the step ignores the rest.
    padding = ((0, self._max_steps - count), (0, 0), (0, 0))
    plan = Plan(*(np.pad(x[offset : offset + count], padding) for x in self._plan))
    state, metrics = self._train_step(
      state,
      data,
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
    if not metrics['finite'].all():
      bad = step - count + int(np.argmin(metrics['finite'])) + 1
      raise DivergenceError(
        f'the loss or its gradient is not finite at step {bad}; lower '
        'config.optimizer.learning_rate or set config.optimizer.clip_norm. '
        'Nothing after the last checkpoint was kept'
      )
    values = {
      name: float(np.mean(metrics[name], dtype=np.float64)) for name in ('loss', 'grad_norm')
    }
    now = time.monotonic()
    users = count * self._batches.users / self._batches.steps_per_epoch
    self.loss, self.speed = values['loss'], users / (now - self._last_read)
    self._last_read = now
    self._writer.write(step, STAGE, values)
    self._writer.write_timing(step, STAGE, {'sequences_per_second': self.speed})
    self._bar.update(step, loss=f'{self.loss:.4f}', speed=f'{self.speed:.0f} sequences/s')


class _Silent:
  """Takes the writer's and the bar's place in the processes that report nothing."""

  def __getattr__(self, name):
    return lambda *args, **kwargs: 0


def _copy(tree: PyTree) -> PyTree:
  """Copies arrays, so that donating the original leaves the copy alone."""
  return jax.tree.map(jnp.copy, tree)


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
  dataset = load_dataset(config.data_dir)
  _check_dataset(config, dataset)
  _claim_workdir(workdir, config, dataset)
  checkpointer = Checkpointer(workdir, config.checkpoint.max_to_keep)
  try:
    with _stop_requests() as stop_requested, jax.transfer_guard(config.transfer_guard):
      state, best_params, progress = _train(config, workdir, dataset, checkpointer, stop_requested)
    del state
    return _write_results(config, workdir, dataset, best_params, progress)
  finally:
    checkpointer.close()


def _check_dataset(config: ConfigDict, dataset: Dataset) -> None:
  if dataset.num_items < 2 or len(dataset.lengths) < 2:
    raise InputError(
      f'config.data_dir={config.data_dir}: {len(dataset.lengths)} users and {dataset.num_items} '
      'items; a recommender needs at least 2 of each'
    )
  if not dataset.info['counts']['evaluated_users']:
    raise InputError(
      f'config.data_dir={config.data_dir}: no user has the 3 interactions that training, '
      'validation and test need'
    )


def _train(
  config: ConfigDict,
  workdir: str,
  dataset: Dataset,
  checkpointer: Checkpointer,
  stop_requested: Callable[[], int],
) -> tuple[TrainState, PyTree, TrainProgress]:
  """Runs the training loop from the latest checkpoint to its end.

  The loop is a function of the step alone: whatever was running when the process died is run
  again from the last save in the same way.
  """
  model = create_model(config, dataset.num_items)
  train_part = dataset.train_part()
  batches = TrainBatches(
    train_part,
    max_length=config.max_length,
    batch_size=config.batch_size,
    crop=config.crop,
    seed=config.seed,
  )
  if batches.rows % parallel.device_count():
    raise InputError(
      f'config.batch_size={config.batch_size} gives {batches.rows} rows, which '
      f'{parallel.device_count()} devices cannot share equally; make it larger'
    )
  total_steps = config.num_epochs * batches.steps_per_epoch
  validate_every = config.validate_every_epochs * batches.steps_per_epoch
  tx = optimizers.create_optimizer(config.optimizer, total_steps)
  train_step = parallel.MAPPINGS[config.mapping](
    steps.make_train_step(model, tx, steps.make_loss(config.loss), config.max_length),
    in_axes=(None, None, 0, None),
    donate_argnums=(0,),
  )

  state = create_train_state(model, tx, config.seed)
  restored = checkpointer.restore({'state': state, 'best_params': state.params})
  progress = TrainProgress()
  if restored is None:
    state = parallel.replicate(state)
    best_params = _copy(state.params)
  else:
    state, best_params = restored[0]['state'], restored[0]['best_params']
    progress = TrainProgress(**restored[1])
  item_counts = np.bincount(train_part.item_ids, minlength=dataset.num_items + 1)[1:]
  data = parallel.replicate(steps.TrainData(train_part.item_ids, item_counts.astype(np.float32)))
  validator = evaluate.make_evaluator(
    model, dataset, parallel.replicate(dataset.item_ids), 'valid', config.evaluation, config.mapping
  )

  writer = bar = _Silent()
  if parallel.is_main_process():
    print(_describe_run(config, dataset, batches, state.params, progress), flush=True)
    writer = MetricWriter(workdir, progress.step, progress.metrics_size)
    bar = Progress(STAGE, total_steps, progress.step)
  dispatcher = _Dispatcher(config, batches, train_step, writer, bar)

  started = time.monotonic() - progress.seconds

  def save():
    progress.metrics_size = writer.position()
    progress.seconds = time.monotonic() - started
    with jax.transfer_guard('allow'):
      tree = {'state': state, 'best_params': best_params}
      checkpointer.save(progress.step, tree, dataclasses.asdict(progress))

  def save_and_stop(signal_number: int):
    dispatcher.flush()
    save()
    raise InterruptedBySignal(
      f'{signal.Signals(signal_number).name}: saved step {progress.step} in {workdir}; '
      'start the same command again to go on',
      signal_number,
    )

  try:
    while True:
      is_border = progress.step and progress.step % validate_every == 0
      if is_border and progress.validated_step < progress.step:
        dispatcher.flush()
        values = validator(state.params, interrupted=stop_requested)
        if values is None:
          save_and_stop(stop_requested())
        writer.write(progress.step, STAGE, {f'valid/{k}': v for k, v in values.items()})
        epoch = progress.step // batches.steps_per_epoch
        improved = not progress.best_valid or (
          values[SELECTION_METRIC] > progress.best_valid[SELECTION_METRIC]
        )
        progress.validated_step = progress.step
        if improved:
          progress.best_step, progress.best_epoch = progress.step, epoch
          progress.best_valid = values
          best_params = _copy(state.params)
        bar.line(
          f'epoch {epoch}: loss {dispatcher.loss:.4f}, {dispatcher.speed:.0f} sequences/s, '
          f'valid {SELECTION_METRIC} {values[SELECTION_METRIC]:.4f}, '
          f'best {progress.best_valid[SELECTION_METRIC]:.4f} at epoch {progress.best_epoch}'
        )
        if progress.step // validate_every % config.checkpoint.every_validations == 0:
          save()
      out_of_patience = progress.step - progress.best_step >= config.patience * validate_every
      if progress.step >= total_steps or (progress.best_valid and out_of_patience):
        break
      if signal_number := stop_requested():
        save_and_stop(signal_number)
      state, progress.step = dispatcher.run(state, data, progress.step)
    dispatcher.flush()
    if checkpointer.latest_step != progress.step:
      save()
    return state, best_params, progress
  finally:
    bar.close()
    writer.close()


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
    f'{counts["interactions"]:,} interactions, split {dataset.info["split"]["hash"]}',
    f'batches  {batches.steps_per_epoch} an epoch of {batches.rows} rows x {config.max_length} '
    f'tokens, {filled:.0%} filled, {batches.users / batches.steps_per_epoch:.0f} users each',
    f'devices  {parallel.describe_devices()}, jax {jax.__version__}',
  ]
  if progress.step:
    lines.append(f'resuming from step {progress.step}')
  return '\n'.join(lines)


def _evaluate_params(
  config: ConfigDict, dataset: Dataset, params: PyTree
) -> dict[str, dict[str, float]]:
  """Returns the metrics of `params` on both splits."""
  model = create_model(config, dataset.num_items)
  item_ids = parallel.replicate(dataset.item_ids)
  return {
    split: evaluate.make_evaluator(
      model, dataset, item_ids, split, config.evaluation, config.mapping
    )(params)
    for split in evaluate.HELD_OUT
  }


def _write_results(
  config: ConfigDict, workdir: str, dataset: Dataset, params: PyTree, progress: TrainProgress
) -> dict:
  with jax.transfer_guard(config.transfer_guard):
    scores = _evaluate_params(config, dataset, params)
  baselines = evaluate.baseline_metrics(dataset, 'test', config.evaluation)
  results = {
    'dataset': {
      'name': dataset.info['name'],
      **dataset.info['counts'],
      'split_hash': dataset.info['split']['hash'],
    },
    'protocol': evaluate.protocol(config.evaluation),
    **scores,
    'baselines': baselines,
    'stages': [{'name': STAGE, 'steps': progress.step, 'best_step': progress.best_step, **scores}],
    'seed': config.seed,
    'git': _git_version(),
  }
  if parallel.is_main_process():
    # Apart from the results, which are the same whenever and wherever the run is repeated.
    timing = {
      'device': parallel.describe_devices(),
      'seconds': round(progress.seconds, 1),
      'jax': jax.__version__,
    }
    for name, content in (('timing.json', timing), ('results.json', results)):
      write_file(pathlib.Path(workdir) / name, json.dumps(content, indent=2) + '\n')
    print(_results_table(config, results), flush=True)
  return results


def _results_table(config: ConfigDict, results: dict) -> str:
  protocol = ', '.join(f'{k}: {v}' for k, v in evaluate.protocol(config.evaluation).items())
  table = metrics_table(
    {'random': results['baselines']['random'], 'popularity': results['baselines']['popularity']}
    | {'sasrec': results['test'], 'sasrec (valid)': results['valid']}
  )
  return f'\ntest, {results["test"]["users"]:,} users; {protocol}\n{table}'


def evaluate_workdir(config: ConfigDict, workdir: str) -> dict:
  """Evaluates a run's best parameters again and prints them.

  Args:
    config: the run's config; `evaluation` may differ.
    workdir: a folder that `train_and_evaluate` wrote.

  Returns:
    `protocol`, `valid`, `test` and `baselines`, as in `results.json`.

  Raises:
    InputError: the folder holds no run or another one.
  """
  check_config(config)
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    raise InputError(f'--workdir {workdir}: no run here; train first with --mode=train')
  dataset = load_dataset(config.data_dir)
  started = json.loads(path.read_text())
  # The protocol may be another one; the rest may not.
  fixed = config.to_dict() | {'evaluation': started['config']['evaluation']}
  check_unchanged(started['config'], fixed, workdir)
  if started['dataset']['split_hash'] != dataset.info['split']['hash']:
    raise InputError(
      f'{workdir} holds a run on dataset {started["dataset"]}, not on {config.data_dir}'
    )
  model = create_model(config, dataset.num_items)
  tx = optimizers.create_optimizer(config.optimizer, 1)
  shapes = jax.eval_shape(lambda: create_train_state(model, tx, config.seed))
  checkpointer = Checkpointer(workdir, config.checkpoint.max_to_keep)
  try:
    restored = checkpointer.restore({'state': shapes, 'best_params': shapes.params})
  finally:
    checkpointer.close()
  if restored is None or not restored[1]['best_valid']:
    raise InputError(f'--workdir {workdir}: no validated checkpoint yet; go on training')
  results = {'protocol': evaluate.protocol(config.evaluation)}
  results |= _evaluate_params(config, dataset, restored[0]['best_params'])
  results['baselines'] = evaluate.baseline_metrics(dataset, 'test', config.evaluation)
  if parallel.is_main_process():
    print(_results_table(config, results), file=sys.stderr)
    print(json.dumps(results))
  return results

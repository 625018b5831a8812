"""Our side of the benchmarks: the program's training loop and evaluator, epoch by epoch."""

import ast
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.speed.measure import Clock, answer_requests
from configs import default
from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.input_pipeline import Plan
from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.evaluation import evaluate
from ur4rec_jax.evaluation.metrics import ranking_metrics
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.runs.checkpoint import Checkpointer
from ur4rec_jax.runs.config_checks import check_config
from ur4rec_jax.runs.metric_writers import NullReporter
from ur4rec_jax.runs.open_run import Run, make_run
from ur4rec_jax.runs.train_loop import TrainLoop, plan_batches, restore_or_create
from ur4rec_jax.sharding import devices
from ur4rec_jax.training.stages import stage_numbers


def make_dataset(item_ids: np.ndarray, offsets: np.ndarray, num_items: int) -> Dataset:
  """A dataset in memory, split by leave-one-out; arguments as the fields of `Dataset`."""
  counts = {'users': len(offsets) - 1, 'items': num_items, 'interactions': len(item_ids)}
  info = {'name': 'benchmark', 'counts': counts, 'splits': {splits.LEAVE_ONE_OUT: {'hash': ''}}}
  split = splits.leave_one_out(np.diff(offsets))
  return Dataset(info, splits.LEAVE_ONE_OUT, split, item_ids, offsets)


def make_config(settings: dict[str, Any]) -> ConfigDict:
  """The default config with a benchmark's settings, and then its `overrides`.

  Raises:
    InputError: a field cannot have such a value.
  """
  config = default.get_config()
  for name in ('max_length', 'batch_size', 'seed'):
    config[name] = settings[name]
  for name in ('dim', 'num_blocks', 'num_heads', 'dropout'):
    config.sasrec[name] = settings[name]
  config.sasrec.ffn_dim = settings['dim']
  config.sasrec.norm, config.sasrec.item_scale = 'pre', 0.02  # About as RecTools has them.
  config.dtype = 'float32'  # RecTools computes in it, too.
  config.loss.name = settings['loss']
  config.loss.seen_items = 'keep'  # RecTools leaves no items out, either.
  config.optimizer.warmup_steps = 0  # As RecTools has it.
  config.optimizer.learning_rate = settings['learning_rate']
  override(config, settings['overrides'])
  return config


def override(config: ConfigDict, overrides: Sequence[str]) -> None:
  """Sets the fields that `--config.FIELD=VALUE` name; InputError if they cannot be so."""
  config.lock()  # So that a field that does not exist is an error.
  for override in overrides:
    field, _, value = override.removeprefix('--config.').partition('=')
    with contextlib.suppress(ValueError, SyntaxError):  # Which a word raises.
      value = ast.literal_eval(value)
    try:
      config.update_from_flattened_dict({field: value})
    except (AttributeError, KeyError, TypeError) as error:
      raise InputError(f'{override}: no such field, or no value for it ({error})') from error
  check_config(config)


def make_loop(config: ConfigDict, dataset: Dataset, workdir: str) -> TrainLoop:
  """The program's training loop at its start; it reports and saves nothing."""
  return loop_of(make_run(config, dataset), workdir)


def loop_of(run: Run, workdir: str) -> TrainLoop:
  """The training loop of an opened run, as `make_loop`."""
  checkpointer = Checkpointer(workdir, run.config.checkpoint.max_to_keep)
  start = restore_or_create(run, checkpointer)
  return TrainLoop(run, plan_batches(run), start, checkpointer, NullReporter())


def train(loop: TrainLoop, num_steps: int) -> None:
  """Trains on and waits for the end."""
  progress = loop.progress
  end = progress.step + num_steps
  with jax.transfer_guard(loop.config.transfer_guard):
    while progress.step < end:
      loop.state, progress.step = loop.dispatcher.run(loop.state, progress.step, end)
    loop.dispatcher.flush()


def make_evaluator(loop: TrainLoop, dataset: Dataset, part: str) -> Callable[[], np.ndarray]:
  """A function that ranks the held-out items of a part of a dataset, the loop's or another."""
  config, data = loop.config, loop.evaluators.data
  if dataset is not loop.run.dataset:
    data = data._replace(dataset=dataset, item_ids=devices.replicate(dataset.item_ids))
  model = create_model(config, dataset.num_items)
  evaluator = evaluate.make_evaluator(model, data, part)

  def rank() -> np.ndarray:
    with jax.transfer_guard(config.transfer_guard):
      return evaluator(loop.state.params)

  return rank


def step_program(loop: TrainLoop) -> tuple[Callable, tuple]:
  """The mapped training step, and arguments of the shapes that the loop calls it with."""
  (step,) = loop.train_steps.values()
  count, batches = loop.config.steps_per_dispatch, loop.batches
  plan = Plan(*(np.resize(x, (count, *x.shape[1:])) for x in batches.epoch(0)))
  numbers = stage_numbers(loop.stage, loop.run.labels, batches.steps_per_epoch, 1)
  placed = devices.replicate((np.int32(count), numbers))
  return step, (loop.state, loop.data, devices.shard(devices.split(plan, axis=1)), *placed)


def make_answers(settings: dict[str, Any]) -> dict:
  """Prepares the loop; see `measure.answer_requests`."""
  compile_seconds = 0.0

  def add_compile_seconds(event: str, seconds: float, **_) -> None:
    nonlocal compile_seconds
    if event == '/jax/core/compile/backend_compile_duration':
      compile_seconds += seconds

  jax.monitoring.register_event_duration_secs_listener(add_compile_seconds)
  config = make_config(settings)
  with np.load(settings['data']) as data:
    dataset = make_dataset(data['item_ids'], data['offsets'], int(data['num_items']))
  loop = make_loop(config, dataset, os.path.dirname(settings['data']))
  evaluators = {}

  def epoch() -> dict[str, Any]:
    before = compile_seconds
    clock = Clock()
    train(loop, loop.batches.steps_per_epoch)
    return {
      **clock.read(),
      'sequences': loop.batches.users,
      'compile_seconds': round(compile_seconds - before, 2),
      'device': devices.describe_devices(),
    }

  def rank(part: str) -> dict[str, Any]:
    before, preparation = compile_seconds, Clock()
    if part not in evaluators:
      evaluators[part] = make_evaluator(loop, dataset, part)
    prepare_seconds = preparation.read()['seconds']
    clock = Clock()
    ranks = evaluators[part]()
    metrics = ranking_metrics(ranks)
    return {
      **clock.read(),
      'users': len(ranks),
      'ranks': ranks.tolist(),
      'metrics': metrics,
      'prepare_seconds': round(prepare_seconds, 2),
      'compile_seconds': round(compile_seconds - before, 2),
      'device': devices.describe_devices(),
    }

  return {'epoch': epoch, 'rank': rank}


if __name__ == '__main__':
  exit_on_reported_error(answer_requests)(make_answers)

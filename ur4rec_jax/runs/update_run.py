"""Trains an update: a run that starts from an earlier one, trains few epochs and passes a gate.

The gate needs events that the model has not seen. If the served model should learn those, too, a
second model is trained in the same way on all events, in `WORKDIR/all`, and that model is promoted.
The next update continues both: its first model from the first one, its second from the second.
"""

import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from ur4rec_jax.errors import InputError
from ur4rec_jax.files import write_file
from ur4rec_jax.runs import gate, train_loop
from ur4rec_jax.runs.compiled_programs import keep_compiled_programs
from ur4rec_jax.runs.open_run import open_run, restore_best
from ur4rec_jax.runs.sweep import is_finished
from ur4rec_jax.runs.workdir import open_stored_run
from ur4rec_jax.sharding import devices

GATE = 'gate.json'
ALL = 'all'  # Folder of the second model, in that of the update.
_EPOCHS = 6
# With few users, six epochs are so few steps that new items are hardly ever recommended.
MIN_STEPS = 100
_WARMUP_STEPS = 10  # Limit, because an update may have fewer steps than the warmup of a first run.


def update_config(
  workdir: str | pathlib.Path,
  data_dir: str | pathlib.Path,
  *,
  epochs: int | None,
  replay: float = 1.0,
  moments: str = 'reset',
  keep: str = 'best',
) -> ConfigDict:
  """Returns the config of an update: that of the earlier run, with only its best stage.

  Args:
    workdir: folder of the earlier run.
    data_dir: the new data.
    epochs: number of epochs to train; None for 6, or as many as `MIN_STEPS` steps take.
    replay: see the knob `init.replay`.
    moments: see the knob `init.moments`.
    keep: see the knob `keep`; with `last`, both models of an update train equally long.

  Raises:
    InputError: there is no trained run in `workdir`, or it has learned the held-out events, too.
  """
  before = open_stored_run(workdir)
  if before.config.train_on == 'all':
    raise InputError(
      f'--workdir={workdir}: has learned all events, the held-out ones, too, so that nothing is'
      f' left to judge an update by. The second model of an update lies in its folder {ALL}/: give'
      ' the folder of the update itself, which goes on with both'
    )
  name = restore_best(before, str(workdir))[0].name
  config = before.config
  config.data_dir = str(data_dir)
  config.init = ConfigDict(
    {'run': os.path.abspath(workdir), 'moments': moments, 'replay': float(replay)}
  )
  config.stages = (name,)
  if epochs is None:
    steps_per_epoch = train_loop.plan_batches(open_run(config)).steps_per_epoch
    epochs = max(_EPOCHS, -(-MIN_STEPS // steps_per_epoch))
  stage = config.stage[name]
  stage.num_epochs, stage.num_steps, stage.patience = epochs, 0, epochs + 1
  config.keep, stage.validate_every_epochs = keep, 1 if keep == 'best' else epochs
  config.max_minutes = 0.0  # The limit was for the epochs of the earlier run.
  stage.warmup_steps = min(stage.warmup_steps, _WARMUP_STEPS)
  stage.schedule = 'cosine'  # So short a training is better if its last steps are small.
  return config


def train_on_all(config: ConfigDict, workdir: str | pathlib.Path) -> pathlib.Path:
  """Trains the second model of an update, which learns the held-out events, too.

  Args:
    config: config of the update.
    workdir: folder of the update.

  Returns:
    The folder of the second model.
  """
  config = config.copy_and_resolve_references()
  before = pathlib.Path(config.init.run) / ALL
  if (before / 'results.json').exists():
    config.init.run = str(before)
  config.train_on = 'all'
  folder = pathlib.Path(workdir) / ALL
  if not is_finished(folder, config):
    train_loop.train_and_evaluate(config, str(folder))
  return folder


def train_and_judge(config: ConfigDict, workdir: str, margin: float) -> dict[str, Any]:
  """Trains an update, or goes on training it, and writes the verdict of the gate to `gate.json`.

  Args:
    config: from `update_config`.
    workdir: folder of the update.
    margin: see `gate.judge`.

  Returns:
    The verdict, see `gate.judge`.

  Raises:
    InputError: the config or the data do not fit the run before.
  """
  if not is_finished(pathlib.Path(workdir), config):
    train_loop.train_and_evaluate(config, workdir)
  keep_compiled_programs(workdir, config.compilation_cache)
  verdict = gate.judge(gate.rank_both(open_run(config), workdir), margin)
  if devices.is_main_process():
    write_file(pathlib.Path(workdir) / GATE, json.dumps(verdict, indent=2) + '\n')
  return verdict

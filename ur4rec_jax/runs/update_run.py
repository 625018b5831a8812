"""An update as a run: the config of the run before, its parameters, few epochs, and the gate."""

import json
import os
import pathlib
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ur4rec_jax.files import write_file
from ur4rec_jax.runs import gate, train_loop
from ur4rec_jax.runs.compiled_programs import keep_compiled_programs
from ur4rec_jax.runs.open_run import open_run, restore_best
from ur4rec_jax.runs.sweep import is_finished
from ur4rec_jax.runs.workdir import open_stored_run
from ur4rec_jax.sharding import devices

GATE = 'gate.json'
_WARMUP_STEPS = 10  # Most steps of the warmup; an update may have fewer steps than a first run's.


def update_config(
  workdir: str | pathlib.Path,
  data_dir: str | pathlib.Path,
  epochs: int,
  replay: float = 1.0,
  moments: str = 'reset',
) -> ConfigDict:
  """Returns the config of an update: that of the run before, for the stage that it serves from.

  Args:
    workdir: of the run before.
    data_dir: the new data.
    epochs: to train.
    replay: see the knob `init.replay`.
    moments: see the knob `init.moments`.

  Raises:
    InputError: there is no trained run in `workdir`.
  """
  before = open_stored_run(workdir)
  name = restore_best(before, str(workdir))[0].name
  config = _with_tuples(before.config)
  config.data_dir = str(data_dir)
  config.init = ConfigDict(
    {'run': os.path.abspath(workdir), 'moments': moments, 'replay': float(replay)}
  )
  config.stages = (name,)
  stage = config.stage[name]
  stage.num_epochs, stage.num_steps, stage.patience = epochs, 0, epochs + 1
  stage.validate_every_epochs = 1
  stage.warmup_steps = min(stage.warmup_steps, _WARMUP_STEPS)
  return config


def _with_tuples(config: ConfigDict) -> ConfigDict:
  """Returns a config as its file made it: JSON has turned its tuples into lists."""
  fields = flatten_dict(config.to_dict(), sep='.')
  fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
  return ConfigDict(unflatten_dict(fields, sep='.'))


def train_and_judge(config: ConfigDict, workdir: str, margin: float) -> dict[str, Any]:
  """Trains an update, or goes on training it, and writes the verdict of the gate to `gate.json`.

  Args:
    config: from `update_config`.
    workdir: of the update.
    margin: see `gate.judge`.

  Returns:
    The verdict, see `gate.judge`.

  Raises:
    InputError: the config or the data do not fit the run before.
  """
  if not is_finished(pathlib.Path(workdir), config):
    train_loop.train_and_evaluate(config, workdir)
  keep_compiled_programs(workdir, config)
  verdict = gate.judge(gate.rank_both(open_run(config), workdir), margin)
  if devices.is_main_process():
    write_file(pathlib.Path(workdir) / GATE, json.dumps(verdict, indent=2) + '\n')
  return verdict

"""Opens a run: the config, data and model that training, evaluation and recommending share."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables, load_with_features, read_tables
from ur4rec_jax.data.followers import FollowerTable, count_followers
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation.evaluate import EvalData
from ur4rec_jax.evaluation.protocol import PARTS, Protocol
from ur4rec_jax.models.ur4rec import UR4Rec, create_model
from ur4rec_jax.runs.checkpoint import read_latest
from ur4rec_jax.runs.config_checks import check_config
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings
from ur4rec_jax.training import optimizers
from ur4rec_jax.training.stages import Stage, make_stages
from ur4rec_jax.training.train_state import (
  TrainProgress,
  TrainState,
  create_train_state,
  parameter_shapes,
  params_of_stage,
  saved_tree,
)

PyTree = Any
_MOST_INTERACTIONS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Run:
  """A config with the data that it names.

  Attributes:
    config: the whole run's config; each stage has its own.
    dataset: all interactions, with features.
    tables: tokens of items and users, in host memory.
    stages: stages of training, in order.
    labels: tree with the label of each parameter, see `make_stages`.
  """

  config: ConfigDict
  dataset: Dataset
  tables: Tables
  stages: list[Stage]
  labels: PyTree

  @property
  def embeddings(self) -> ItemEmbeddings:
    """The policy for item tables in training."""
    return ItemEmbeddings(self.config.optimizer.item_embeddings, self.dataset.num_items)

  @property
  def protocol(self) -> Protocol:
    """The protocol under which held-out items are ranked."""
    return Protocol.of_config(self.config.evaluation)

  @functools.cached_property
  def tx(self) -> optax.GradientTransformationExtraArgs:
    """The optimizer of all stages."""
    return optimizers.create_optimizer(self.config.optimizer, self.labels)

  @functools.cached_property
  def shapes(self) -> TrainState:
    """Shapes of the training state, without padding of item tables."""
    return jax.eval_shape(self.create_state)

  @functools.cached_property
  def model(self) -> UR4Rec:
    """The model of the whole run; a stage may train only a part of it, `Stage.model`."""
    return create_model(self.config, self.dataset.num_items)

  @functools.cached_property
  def followers(self) -> FollowerTable | None:
    """Followers of each item, in host memory; None if rankings do not read them."""
    config = self.config.followers
    return count_followers(self.dataset, config.count, config.reach) if config.weight else None

  def create_state(self) -> TrainState:
    """Initialises the training state from the seed; can be compiled."""
    return create_train_state(self.model, self.tx, self.config.seed, self.tables)

  def stored(self) -> dict[str, PyTree]:
    """Returns the shapes of a checkpoint's arrays, see `saved_tree`."""
    padded = jax.eval_shape(self.embeddings.pad, self.shapes)
    return saved_tree(padded, len(self.stages))

  def stored_axes(self, stored: dict[str, PyTree]) -> dict[str, PyTree]:
    """Returns for each array of `stored` the dimension that is spread over devices, or None."""
    return {
      'state': self.embeddings.axes(stored['state']),
      'best_params': self.embeddings.axes(stored['best_params'], axis=1),
    }

  def check_targets(self) -> None:
    """Raises InputError if all held-out items of a part are left out of the ranking."""
    for part in PARTS:
      if not self.protocol.counts_any(self.dataset, part):
        raise InputError(
          f'every {part} item is a repeat: its user had it before, and '
          "config.evaluation.seen_items='leave_out' leaves such items out; set "
          '--config.evaluation.seen_items=keep to rank and recommend them too'
        )

  def eval_data(self, tables: Tables | None = None) -> EvalData:
    """Copies the inputs of an evaluation onto each device, with whole item tables.

    Args:
      tables: the run's tables, if they are on the devices already.
    """
    item_ids = devices.replicate(self.dataset.item_ids) if self.config.data_in_memory else None
    return EvalData(
      dataset=self.dataset,
      protocol=self.protocol,
      users_per_batch=self.config.evaluation.batch_size,
      item_ids=item_ids,
      tables=devices.replicate(self.tables) if tables is None else tables,
      embeddings=ItemEmbeddings('all', self.dataset.num_items),
      mapping=self.config.mapping,
      followers=None if self.followers is None else devices.replicate(self.followers),
    )


def open_run(config: ConfigDict) -> Run:
  """Checks a config and loads the data that it names.

  Raises:
    InputError: the config is impossible, the data are missing or damaged, or they do not fit.
  """
  check_config(config)
  dataset = load_with_features(config)
  _check_dataset(config, dataset)
  return make_run(config, dataset)


def make_run(config: ConfigDict, dataset: Dataset) -> Run:
  """Builds a run on a dataset in memory; InputError if a stage is impossible."""
  tables = read_tables(dataset, devices.compute_dtype(config.dtype))
  # Stages that train the same model need its parameters' shapes only once.
  shapes_of = functools.cache(lambda model: parameter_shapes(model, tables))
  stages, labels = make_stages(config, dataset.num_items, shapes_of)
  return Run(config, dataset, tables, stages, labels)


def _check_dataset(config: ConfigDict, dataset: Dataset) -> None:
  if dataset.num_items < 2 or dataset.num_users < 2:
    raise InputError(
      f'config.data_dir={config.data_dir}: {dataset.num_users} users and {dataset.num_items} '
      'items; a recommender needs at least 2 of each'
    )
  if (count := dataset.info['counts']['interactions']) > _MOST_INTERACTIONS:
    raise InputError(
      f'config.data_dir={config.data_dir}: {count:,} interactions; batches count in 32 bits, up to'
      f' {_MOST_INTERACTIONS:,}: build it with a larger --k_core, or with --where'
    )
  for part in PARTS:
    if not dataset.info['splits'][dataset.split_name][f'{part}_users']:
      raise InputError(
        f'config.data_dir={config.data_dir}: split {dataset.split_name} has no {part} users; '
        'leave_one_out needs users with 3 interactions, time needs users before and after it'
      )


def restore_best(run: Run, workdir: str) -> tuple[Stage, PyTree]:
  """Reads a run's best parameters, and the stage that they come from.

  Raises:
    InputError: the run has not been validated yet.
  """
  stored = run.stored()
  restored = read_latest(workdir, stored, run.stored_axes(stored))
  best = TrainProgress.from_json(restored[1]).best_stage if restored else None
  if best is None:
    raise InputError(f'--workdir {workdir}: no validated checkpoint yet; go on training')
  params = params_of_stage(restored[0]['best_params'], best)
  return run.stages[best], run.embeddings.unpad(params)

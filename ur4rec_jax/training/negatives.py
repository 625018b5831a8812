"""Negatives: the items that a sampled loss compares the targets with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ur4rec_jax.sharding.item_embeddings import StepTables
from ur4rec_jax.training.stages import Stage
from ur4rec_jax.training.train_data import TrainData

Array = jax.Array


class Negatives(NamedTuple):
  """Items that a loss compares the targets with.

  Attributes:
    items: int32 from 0: `[tokens, negatives]` if each token has its own, `[negatives]` if all
      tokens share them.
    log_expected_count: `[negatives]` float32, the log of how often each shared negative was
      expected to be drawn; None if each token has its own negatives.
  """

  items: Array
  log_expected_count: Array | None = None


ByBranch = dict[str, Negatives | None]


def draw_all_negatives(stage: Stage, targets: Array, data: TrainData, key: Array) -> ByBranch:
  """Draws the negatives of each branch of a stage.

  Branches with the same loss share their negatives. The other arguments are those of
  `draw_negatives`.
  """
  return {
    branch: draw_negatives(name, stage.config.loss, targets, data, key)
    for branch, name in stage.retrieval_losses.items()
  }


def draw_negatives(
  name: str, config: ConfigDict, targets: Array, data: TrainData, key: Array
) -> Negatives | None:
  """Draws the negatives of a retrieval loss.

  Args:
    name: name of the loss, see `objective.make_retrieval_loss`.
    config: `config.loss`: `num_negatives`, and `negatives`, the distribution of shared ones.
    targets: `[tokens]` int32, items from 0.
    data: has the popularity of items.
    key: random key of this draw.

  Returns:
    The negatives, or None if the loss reads the whole catalogue.
  """
  num_items = data.item_counts.size
  if name == 'softmax':
    return None
  if name != 'sampled_softmax':
    shift = jax.random.randint(key, (targets.shape[0], config.num_negatives), 1, num_items)
    return Negatives((targets[:, None] + shift) % num_items)  # Uniform over all but the target.
  shape = (config.num_negatives,)
  if config.negatives == 'popularity':
    # The item of a random training interaction is an item drawn by popularity.
    items = data.item_ids[jax.random.randint(key, shape, 0, data.item_ids.size)] - 1
    probability = data.item_counts[items] / data.item_ids.size
  else:
    items = jax.random.randint(key, shape, 0, num_items)
    probability = jnp.full(shape, 1 / num_items)
  return Negatives(items, jnp.log(config.num_negatives * probability))


def drawn_ids(negatives: ByBranch, weights: Array) -> dict[str, Array]:
  """Returns the item ids of all negatives, from 1; 0 for a padding token's own negatives.

  Args:
    negatives: from `draw_all_negatives`.
    weights: `[tokens]`, 0 for padding.
  """
  is_token = weights[:, None] > 0
  return {
    branch: jnp.where(is_token, x.items + 1, 0) if x.items.ndim > 1 else x.items + 1
    for branch, x in negatives.items()
    if x is not None
  }


def renumbered(negatives: ByBranch, ids: dict[str, Array], tables: StepTables) -> ByBranch:
  """Replaces the items of negatives by the step's row numbers, from 0.

  Args:
    negatives: from `draw_all_negatives`.
    ids: from `drawn_ids`.
    tables: item tables of the step.
  """
  new = {branch: jnp.maximum(tables.renumber(x) - 1, 0) for branch, x in ids.items()}
  return negatives | {branch: negatives[branch]._replace(items=x) for branch, x in new.items()}

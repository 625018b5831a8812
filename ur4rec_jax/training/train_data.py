"""The part of a dataset that training reads, without its held-out interactions."""

from typing import NamedTuple

import jax
import numpy as np

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables, preference_starts
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings


class TrainData(NamedTuple):
  """The data that devices hold during training.

  Attributes:
    item_ids: `[training interactions]` int32, 1-based, user after user; only those of the current
      steps if interactions are read from disk.
    item_counts: `[num_items]` float32, the number of training interactions of each item.
    tables: tokens of items and users.
    preference_starts: `[num_users]` int32, from `features.preference_starts`.
  """

  item_ids: jax.Array
  item_counts: jax.Array
  tables: Tables
  preference_starts: jax.Array


def make_train_data(dataset: Dataset, tables: Tables, in_memory: bool = True) -> TrainData:
  """Collects the arrays in host memory.

  Args:
    dataset: all interactions; only those of the training part are used.
    tables: tokens of items and users.
    in_memory: whether the devices hold the interactions.
  """
  return TrainData(
    dataset.train_part().item_ids if in_memory else np.zeros(0, np.int32),
    dataset.train_item_counts()[1:].astype(np.float32),
    tables,
    preference_starts(dataset),
  )


def train_data_axes(embeddings: ItemEmbeddings) -> TrainData:
  """Returns the dimension along which each array of `TrainData` is spread over devices."""
  tables = Tables(items=embeddings.axis, users=None)
  return TrainData(item_ids=None, item_counts=None, tables=tables, preference_starts=None)

"""Gives cold items, which training never sees, the embeddings of the items most like them.

A branch that only learns embeddings of ids meets a cold item only as a negative, so its embedding
carries no other information. The mean embedding of the items with the nearest content is a better
guess (the nearest-neighbour mapping of Gantner et al., "Learning attribute-to-feature mappings for
cold-start recommendations", ICDM 2010).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import TokenTable
from ur4rec_jax.models.content import initial_item_embeddings
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings

Array = jax.Array
NEAREST = 2  # Number of items whose embeddings are averaged.
_AT_ONCE = 1024  # Cold items in one comparison with all warm items.

_WHOLE = ItemEmbeddings('all', 0)  # Whole tables; the number of items does not matter here.


class ColdItems(NamedTuple):
  """Cold items that have content, and the warm items nearest to them; NumPy.

  Attributes:
    items: `[cold items]` int32 item ids.
    nearest: `[cold items, NEAREST]` int32 ids of items that training sees.
  """

  items: np.ndarray
  nearest: np.ndarray


def has_pure_item_table(model: Any) -> bool:
  """Tells whether a model has a branch that embeds items by id alone, without content."""
  sasrec = getattr(model, 'sasrec', None)
  return sasrec is not None and sasrec.content is None


def first_tokens(dataset: Dataset) -> dict[str, TokenTable]:
  """Returns the content that `find_cold_items` compares: tables `[items + 1, 1, width]`."""
  return {
    name: dataclasses.replace(found, max_tokens=1).table()
    for name, found in dataset.features.items()
  }


def warm_items(dataset: Dataset) -> np.ndarray:
  """Returns `[items + 1]` bool: whether training sees the item."""
  return dataset.train_item_counts() > 0


def find_cold_items(
  features: Mapping[str, TokenTable], is_cold: np.ndarray, is_warm: np.ndarray, dim: int
) -> ColdItems | None:
  """Finds each cold item's nearest warm items by the cosine of `initial_item_embeddings`.

  Args:
    features: the result of `first_tokens`.
    is_cold: `[items + 1]` bool, the items to find neighbours for.
    is_warm: `[items + 1]` bool, the items that may be neighbours, from `warm_items`.
    dim: width of the vectors that are compared.

  Returns:
    None if no cold item or fewer than `NEAREST` warm items have content.
  """
  if not features:
    return None
  has_content = np.any([table.mask[:, 0] for table in features.values()], axis=0)
  cold = np.flatnonzero(has_content & is_cold).astype(np.int32)
  warm = np.flatnonzero(has_content & is_warm).astype(np.int32)
  if not cold.size or warm.size < NEAREST:
    return None
  directions = _directions(jax.device_put(dict(features)), dim)
  # Every comparison has the same number of items, so that a single program is compiled. For that,
  # the last comparison repeats some items of the one before.
  count = min(_AT_ONCE, cold.size)
  nearest = np.zeros((cold.size, NEAREST), np.int32)
  for start in range(0, cold.size, count):
    start = min(start, cold.size - count)
    compared = jax.device_put((cold[start : start + count], warm))
    nearest[start : start + count] = warm[jax.device_get(_nearest(directions, *compared))]
  return ColdItems(cold, nearest)


@functools.partial(jax.jit, static_argnames='dim')
def _directions(features: dict[str, TokenTable], dim: int) -> Array:
  embeddings = initial_item_embeddings(features, dim, 1.0, 1.0, jax.random.key(0))
  return embeddings / jnp.maximum(jnp.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


@jax.jit
def _nearest(directions: Array, cold: Array, warm: Array) -> Array:
  # Rounded cosines would choose other neighbours.
  cosines = jnp.matmul(directions[cold], directions[warm].T, precision='highest')
  return jax.lax.top_k(cosines, NEAREST)[1]


def cold_items_of(model: Any, dataset: Dataset) -> ColdItems | None:
  """Finds the items that training on a dataset leaves cold.

  Args:
    model: the model.
    dataset: its training data.

  Returns:
    None if there are no such items or the model scores them by their content.
  """
  is_warm = warm_items(dataset)
  # Features are only read if there is a cold item, because they are read whole.
  if not has_pure_item_table(model) or is_warm[1:].all():
    return None
  return find_cold_items(first_tokens(dataset), ~is_warm, is_warm, model.sasrec.dim)


def mean_of_nearest(table: Array, cold: ColdItems, embeddings: ItemEmbeddings = _WHOLE) -> Array:
  """Returns the mean embedding of each cold item's nearest neighbours, `[cold items, dim]`.

  Args:
    table: item embeddings `[items + 1, dim]`, or this device's rows if they are sharded.
    cold: the cold items and their neighbours.
    embeddings: the policy for item tables.
  """
  found = embeddings.take(table, cold.nearest.reshape(-1))
  return found.reshape(*cold.nearest.shape, -1).mean(1)


def with_mean_of_nearest(
  table: Array, cold: ColdItems, embeddings: ItemEmbeddings = _WHOLE
) -> Array:
  """Returns the item embeddings with those of cold items replaced; see `mean_of_nearest`."""
  return embeddings.put(table, cold.items, mean_of_nearest(table, cold, embeddings))

"""A training step on the items that it reads alone, however many there are besides.

The ids of a step's histories, targets and negatives become numbers of a small catalogue, made of
their rows of the item tables and of the tables' moments; the step runs on that one as it is, and
the rows go back. Items that a step does not read keep parameters and moments (lazy Adam), and cost
nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ur4rec_jax.parallel import AXIS

Array = jax.Array
PyTree = Any
_ITEM_TABLE = 'item_embedding'  # The last name in the path of a parameter with a row an item.


def find_rows(item_ids: Array, num_items: int) -> Array:
  """Lists the items that the steps of all devices read, once each.

  Args:
    item_ids: `[ids]` int32 that this device's step reads, from 1; 0 where there is none.
    num_items: catalogue size.

  Returns:
    `[rows]` int32, ascending, the same on each device: 0, the ids, and `num_items + 1`, which is
    nobody, as often as ids come twice.
  """
  everywhere = jax.lax.all_gather(item_ids, AXIS, tiled=True)
  size = min(everywhere.size, num_items) + 1
  with_padding = jnp.concatenate([jnp.zeros(1, everywhere.dtype), everywhere])
  return jnp.unique(with_padding, size=size, fill_value=num_items + 1)


def renumber(item_ids: Array, rows: Array) -> Array:
  """Turns ids `[...]` that are among `rows` into their places there; 0 stays 0."""
  return jnp.searchsorted(rows, item_ids).astype(item_ids.dtype)


def take_rows(table: Array, rows: Array) -> Array:
  """Takes rows of a table `[items + 1, ...]`; zeros where `rows` names nobody."""
  return jnp.take(table, rows, axis=0, mode='fill', fill_value=0)


def take_item_tables(tree: PyTree, rows: Array) -> PyTree:
  """Cuts every item table in parameters or optimizer state down to `rows`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: take_rows(x, rows) if _is_item_table(path) else x, tree
  )


def put_item_tables(tree: PyTree, rows: Array, new: PyTree) -> PyTree:
  """Returns `new` with its item tables, of `rows` alone, put into those of `tree`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, old, x: old.at[rows].set(x, mode='drop') if _is_item_table(path) else x, tree, new
  )


def _is_item_table(path: tuple) -> bool:
  return jax.tree_util.keystr(path[-1:], simple=True) == _ITEM_TABLE

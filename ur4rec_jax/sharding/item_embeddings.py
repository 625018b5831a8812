"""Steps on the rows of the items that they read alone, and item tables spread over devices.

The ids of a step's histories, targets and negatives become numbers of a small catalogue, made of
their rows of the item tables and of the tables' moments; the step runs on that one as it is, and
the rows go back. Items that a step does not read keep parameters and moments (lazy Adam), and cost
nothing. Where tables are sharded, each device holds as many rows, gives those that it has to all
others, and takes back its own. A loss that reads all items is formed where their rows are; then all
rows are updated, each on its device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.errors import InputError
from ur4rec_jax.sharding.devices import AXIS, device_count

Array = jax.Array
PyTree = Any
ITEM_TABLE = 'item_embedding'  # The last name in the path of a parameter with a row an item.
# Sharded tables have a multiple of so many rows, which as many devices can share; so what is saved
# does not depend on their number.
_MULTIPLE = 64
NOBODY = np.iinfo(np.int32).max  # A number beyond every end.


def check_devices(item_rows: str) -> None:
  """Raises InputError if sharded tables cannot be shared by the devices there are."""
  if item_rows == 'sharded' and _MULTIPLE % device_count():
    raise InputError(
      f"config.optimizer.item_embeddings='sharded' on {device_count()} devices: their number must "
      f'divide {_MULTIPLE}'
    )


def rows_of_device(num_items: int) -> int:
  """Rows that each device has of a sharded table `[items + 1, ...]`."""
  return -(-(num_items + 1) // _MULTIPLE) * _MULTIPLE // device_count()


def feature_axis(item_rows: str) -> int | None:
  """As `row_axes`, of the items' features, which are all sharded or none."""
  return 0 if item_rows == 'sharded' else None


def row_axes(tree: PyTree, item_rows: str, axis: int = 0) -> PyTree:
  """Says along which dimension every array is sharded: `axis` for item tables, None for others."""

  def axis_of(path: tuple, _: Any) -> int | None:
    return axis if item_rows == 'sharded' and _is_item_table(path) else None

  return jax.tree_util.tree_map_with_path(axis_of, tree)


def padded(tree: PyTree, item_rows: str) -> PyTree:
  """Gives every item table as many rows as it is stored with; those added are zeros."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: _pad(x, jnp) if item_rows == 'sharded' and _is_item_table(path) else x, tree
  )


def unpadded(tree: PyTree, num_items: int) -> PyTree:
  """Undoes `padded`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x[: num_items + 1] if _is_item_table(path) else x, tree
  )


def with_placeholders(params: PyTree, num_items: int) -> PyTree:
  """Puts zeros of the size that a model declares for item tables that nothing here reads."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros((num_items + 1, *x.shape[1:])) if _is_item_table(path) else x, params
  )


def padded_features(tables: PyTree, item_rows: str) -> PyTree:
  """Gives tables of features `[items + 1, ...]`, NumPy, as many rows as item tables have."""
  return jax.tree.map(lambda x: _pad(x, np), tables) if item_rows == 'sharded' else tables


def _pad(x: Array, numpy: Any) -> Array:
  return numpy.pad(x, ((0, -len(x) % _MULTIPLE), *[(0, 0)] * (x.ndim - 1)))


def find_rows(item_ids: Array, num_items: int) -> Array:
  """Lists the items that the steps of all devices read, once each.

  Args:
    item_ids: `[ids]` int32 that this device's step reads, from 1; 0 where there is none.
    num_items: catalogue size.

  Returns:
    `[rows]` int32, ascending, the same on each device: 0, the ids, and a number of nobody as often
    as ids come twice.
  """
  everywhere = jax.lax.all_gather(item_ids, AXIS, tiled=True)
  size = min(everywhere.size, num_items) + 1
  with_padding = jnp.concatenate([jnp.zeros(1, everywhere.dtype), everywhere])
  return jnp.unique(with_padding, size=size, fill_value=NOBODY)


def renumber(item_ids: Array, rows: Array) -> Array:
  """Turns ids `[...]` that are among `rows` into their places there; 0 stays 0."""
  return jnp.searchsorted(rows, item_ids).astype(item_ids.dtype)


def take_rows(table: Array, rows: Array, item_rows: str) -> Array:
  """Takes rows of a table `[items + 1, ...]`; zeros where `rows` names nobody.

  Of a sharded table, `[rows of this device, ...]`, every device gets them, whoever has them.
  """
  found = jnp.take(table, _places(table, rows, item_rows), axis=0, mode='fill', fill_value=0)
  if item_rows != 'sharded':
    return found
  summable = jnp.promote_types(found.dtype, jnp.int8)  # Which bool is not.
  return jax.lax.psum(found.astype(summable), AXIS).astype(found.dtype)


def put_rows(table: Array, rows: Array, new: Array, item_rows: str) -> Array:
  """Puts `new` at `rows` into a table `[items + 1, ...]`, or a device's part of a sharded one."""
  return table.at[_places(table, rows, item_rows)].set(new, mode='drop')


def take_item_tables(tree: PyTree, rows: Array, item_rows: str) -> PyTree:
  """Cuts every item table in parameters or optimizer state down to `rows`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: take_rows(x, rows, item_rows) if _is_item_table(path) else x, tree
  )


def put_item_tables(tree: PyTree, rows: Array, new: PyTree, item_rows: str) -> PyTree:
  """Returns `new` with its item tables, of `rows` alone, put into those of `tree`."""

  def put(path: tuple, old: Array, x: Array) -> Array:
    return put_rows(old, rows, x, item_rows) if _is_item_table(path) else x

  return jax.tree_util.tree_map_with_path(put, tree, new)


def mean_over_devices(gradients: PyTree, moves: PyTree, has_parts: bool) -> PyTree:
  """Averages the devices' gradients of all that `moves`.

  Args:
    gradients: of parameters.
    moves: bool for each; of what does not, gradients are zeros.
    has_parts: whether those of item tables are this device's rows, summed over devices already.
  """

  def mean(path: tuple, g: Array, is_moving: bool) -> Array:
    if not is_moving:
      return g
    if has_parts and _is_item_table(path):
      return g / jax.lax.axis_size(AXIS)
    return jax.lax.pmean(g, AXIS)

  return jax.tree_util.tree_map_with_path(mean, gradients, moves)


def global_norm_of_parts(tree: PyTree) -> Array:
  """Returns `optax.tree.norm` of a tree of which each device has its rows of item tables."""
  squares = [jnp.zeros(()), jnp.zeros(())]
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    squares[_is_item_table(path)] += jnp.square(x).sum(dtype=jnp.float32)
  return jnp.sqrt(squares[False] + jax.lax.psum(squares[True], AXIS))


def places_from(first: Array, ids: Array) -> Array:
  """Where ids are in rows of which the first is of id `first`; beyond every end if before it."""
  places = ids - first
  return jnp.where(places >= 0, places, NOBODY)  # Negative ones would count from the end.


def _places(table: Array, rows: Array, item_rows: str) -> Array:
  """Where `rows` are in this device's part of a table; beyond its end if they are elsewhere."""
  return (
    places_from(jax.lax.axis_index(AXIS) * len(table), rows) if item_rows == 'sharded' else rows
  )


def _is_item_table(path: tuple) -> bool:
  return jax.tree_util.keystr(path[-1:], simple=True) == ITEM_TABLE

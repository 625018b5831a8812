"""Item embeddings: which rows of the item tables a step reads, updates and holds on which device.

An item table is an array with one row for each item: a parameter called `item_embedding`, or its
moments in the optimizer state. `ItemEmbeddings` is the policy for all of them:

- `all`: every device holds whole tables, and every step updates all rows.
- `touched`: every device holds whole tables, and a step updates only the rows of the items that it
  reads. The others keep parameters and moments (lazy Adam) and cost nothing.
- `sharded`: the rows are spread over the devices. A step that reads some items collects their rows
  from all devices and updates them as `touched` does. If there are so many devices that each has
  few rows, a device gets only the rows that it reads itself, sends their gradients back, and
  updates its own. A loss over the whole catalogue is computed on each device for its own rows, and
  then all rows are updated, each on its device.

In training, the items that a step reads are renumbered from 1, in the order of their ids, and the
model runs on that small catalogue.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.sharding.devices import AXIS, device_count

Array = jax.Array
PyTree = Any
POLICIES = ('all', 'touched', 'sharded')
ITEM_TABLE = 'item_embedding'  # The last part of an item table's name.
# The rows of a sharded table are a multiple of this and of the number of devices. So 1, 2, 4 to 64
# devices store the same arrays; a checkpoint of another number is cut or padded when it is read.
_MULTIPLE = 64
NOWHERE = np.iinfo(np.int32).max  # An index beyond every end, which scatter and gather drop.


@dataclasses.dataclass(frozen=True)
class ItemEmbeddings:
  """The policy for item tables, see the module's docstring.

  Attributes:
    policy: one of `POLICIES`.
    num_items: catalogue size; item ids are 1..num_items, and row i is the row of item i.
  """

  policy: str
  num_items: int

  @property
  def is_sharded(self) -> bool:
    """Whether each device holds only its own rows."""
    return self.policy == 'sharded'

  @property
  def is_partial(self) -> bool:
    """Whether a step works with only a part of the rows."""
    return self.policy != 'all'

  @property
  def axis(self) -> int | None:
    """The dimension along which item features are spread over devices; None if they are whole."""
    return 0 if self.is_sharded else None

  @property
  def items_on_device(self) -> int:
    """The catalogue size for a model that holds this device's rows."""
    if not self.is_sharded:
      return self.num_items
    return _padded_length(self.num_items + 1) // device_count() - 1

  def axes(self, tree: PyTree, axis: int = 0) -> PyTree:
    """Returns the dimension of each array that is spread over devices: `axis`, or None if whole."""
    return map_item_tables(lambda x: axis if self.is_sharded else None, tree, lambda x: None)

  def pad(self, tree: PyTree) -> PyTree:
    """Appends rows of zeros to every item table, so that the devices can share the rows equally."""
    return map_item_tables(_pad(jnp), tree) if self.is_sharded else tree

  def unpad(self, tree: PyTree) -> PyTree:
    """Undoes `pad`."""
    return map_item_tables(lambda x: x[: self.num_items + 1], tree)

  def pad_features(self, tables: PyTree) -> PyTree:
    """Pads NumPy features `[items + 1, ...]` like item tables."""
    return jax.tree.map(_pad(np), tables) if self.is_sharded else tables

  def take(self, table: Array, ids: Array) -> Array:
    """Looks up rows by item id, inside a mapped function.

    Args:
      table: `[items + 1, ...]`, or this device's part of a sharded one.
      ids: `[rows]` int32; an id that is no item's gives zeros.

    Returns:
      `[rows, ...]`, on every device, whichever device holds the rows.
    """
    found = jnp.take(table, self._rows_of(table, ids), axis=0, mode='fill', fill_value=0)
    if not self.is_sharded:
      return found
    summable = jnp.promote_types(found.dtype, jnp.int8)  # Bool cannot be summed.
    return jax.lax.psum(found.astype(summable), AXIS).astype(found.dtype)

  def put(self, table: Array, ids: Array, new: Array) -> Array:
    """Replaces rows by item id in a table `[items + 1, ...]` or this device's part of one."""
    return table.at[self._rows_of(table, ids)].set(new, mode='drop')

  def _rows_of(self, table: Array, ids: Array) -> Array:
    return index_from(self.first_item(table), ids) if self.is_sharded else ids

  def first_item(self, table: Array) -> Array | int:
    """Returns the item id of the first row that this device holds."""
    return jax.lax.axis_index(AXIS) * len(table) if self.is_sharded else 0

  def read(self, ids: Array) -> Array:
    """Lists the items that the steps of all devices read.

    Args:
      ids: `[ids]` int32 item ids that this device's step reads; 0 stands for no item.

    Returns:
      `[rows]` int32, ascending, the same on each device: 0, each id once, and `NOWHERE` as padding.
    """
    return self._distinct(jax.lax.all_gather(ids, AXIS, tiled=True))

  def _distinct(self, ids: Array) -> Array:
    size = min(ids.size, self.num_items) + 1
    with_padding = jnp.concatenate([jnp.zeros(1, ids.dtype), ids])
    return jnp.unique(with_padding, size=size, fill_value=NOWHERE)

  def for_step(
    self, ids: Sequence[Array], needs_catalogue: bool, has_content: bool
  ) -> 'StepTables':
    """Prepares the item tables of one training step, inside a mapped function.

    Args:
      ids: int32 arrays of the item ids that this device's step reads; 0 stands for no item.
      needs_catalogue: whether a loss needs the embeddings of all items.
      has_content: whether the model encodes features of items.
    """
    if not self.is_partial:
      return StepTables(self)
    flat = jnp.concatenate([x.reshape(-1) for x in ids])
    if self.is_sharded and not needs_catalogue and not has_content:
      rows = self.items_on_device + 1
      if rows <= flat.size * jax.lax.axis_size(AXIS):
        # A device has fewer rows than all devices read together. So each device updates its own
        # rows, which is cheaper than updating every row that any device reads.
        own = self._distinct(flat)
        everywhere = jax.lax.all_gather(own, AXIS, tiled=True)
        place = index_from(jax.lax.axis_index(AXIS) * rows, everywhere)
        is_read = jnp.zeros(rows, bool).at[place].set(True, mode='drop')
        return OwnTables(self, own, is_read)
    read = self.read(flat)
    return DeviceTables(self, read) if needs_catalogue else ReadTables(self, read)

  # The next four methods let ranking be written once. With whole tables the first query is 0, and
  # the other three return their argument.

  def gather_queries(self, queries: PyTree) -> PyTree:
    """Collects the queries of all devices; each device ranks all of them among its own items."""
    return jax.lax.all_gather(queries, AXIS, tiled=True) if self.is_sharded else queries

  def first_query(self, count: int) -> Array | int:
    """Returns the index of this device's first of `count` queries among those of all devices."""
    return jax.lax.axis_index(AXIS) * count if self.is_sharded else 0

  def sum_parts(self, x: Array) -> Array:
    """Sums the results that devices computed from their own items."""
    return jax.lax.psum(x, AXIS) if self.is_sharded else x

  def sum_own_queries(self, x: Array) -> Array:
    """Sums over devices and keeps the entries of this device's queries."""
    return jax.lax.psum_scatter(x, AXIS, tiled=True) if self.is_sharded else x


@dataclasses.dataclass(frozen=True)
class StepTables:
  """The item tables of one training step: whole here, only a part of the rows in subclasses.

  Attributes:
    embeddings: the policy.
  """

  embeddings: ItemEmbeddings

  @property
  def num_items(self) -> int:
    """The catalogue size for the model in this step."""
    return self.embeddings.num_items

  def renumber(self, ids: Array) -> Array:
    """Turns item ids into the step's row numbers; 0 stays 0."""
    return ids

  def take(self, tree: PyTree) -> PyTree:
    """Returns parameters or optimizer state with the rows that the step updates."""
    return tree

  def take_features(self, features: PyTree) -> PyTree:
    """Returns item features with the rows that the model encodes."""
    return features

  @property
  def lookup(self) -> Callable[[Array], Array] | None:
    """Gathers, from encoded items, those that the step reads; None if the step reads them all."""
    return None

  def put_back(self, old: PyTree, new: PyTree) -> PyTree:
    """Undoes `take`: returns `new`, with its item rows written into the item tables of `old`."""
    del old
    return new

  def mean_over_devices(self, gradients: PyTree, is_trainable: PyTree) -> PyTree:
    """Averages the devices' gradients of trainable parameters; the others are zeros already."""
    mean = lambda g, trains: jax.lax.pmean(g, AXIS) if trains else g
    return jax.tree.map(mean, gradients, is_trainable)

  def norm(self, gradients: PyTree) -> Array:
    """Returns the global L2 norm of a tree of gradients."""
    import optax  # Slow to import, and only training gets here.

    return optax.tree.norm(gradients)


@dataclasses.dataclass(frozen=True)
class ReadTables(StepTables):
  """Item tables cut down to the items that the steps of all devices read.

  Attributes:
    embeddings: the policy.
    read: `[rows]` int32 item ids, from `ItemEmbeddings.read`.
  """

  read: Array

  @property
  def num_items(self) -> int:
    return self.read.size - 1

  def renumber(self, ids: Array) -> Array:
    return renumber(ids, self.read)

  def take(self, tree: PyTree) -> PyTree:
    return map_item_tables(self._take_rows, tree)

  def take_features(self, features: PyTree) -> PyTree:
    return jax.tree.map(self._take_rows, features)

  def _take_rows(self, table: Array) -> Array:
    return self.embeddings.take(table, self.read)

  def put_back(self, old: PyTree, new: PyTree) -> PyTree:
    put = lambda x, rows: self.embeddings.put(x, self.read, rows)
    return map_item_tables(put, old, lambda x, changed: changed, new)


@dataclasses.dataclass(frozen=True)
class DeviceTables(StepTables):
  """This device's rows of sharded item tables, all of which the step updates.

  Attributes:
    embeddings: the policy.
    read: `[rows]` int32 ids of the items that the steps of all devices read.
  """

  read: Array

  @property
  def num_items(self) -> int:
    return self.embeddings.items_on_device

  def renumber(self, ids: Array) -> Array:
    return renumber(ids, self.read)

  @property
  def lookup(self) -> Callable[[Array], Array]:
    return lambda table: self.embeddings.take(table, self.read)

  def mean_over_devices(self, gradients: PyTree, is_trainable: PyTree) -> PyTree:
    # The gradient of an item table has this device's rows, already summed over devices.
    mean = lambda g, trains: jax.lax.pmean(g, AXIS) if trains else g
    part = lambda g, trains: g / jax.lax.axis_size(AXIS) if trains else g
    return map_item_tables(part, gradients, mean, is_trainable)

  def norm(self, gradients: PyTree) -> Array:
    squares = {True: jnp.zeros(()), False: jnp.zeros(())}
    for path, x in jax.tree_util.tree_leaves_with_path(gradients):
      squares[_is_item_table(path)] += jnp.square(x).sum(dtype=jnp.float32)
    return jnp.sqrt(squares[False] + jax.lax.psum(squares[True], AXIS))


@dataclasses.dataclass(frozen=True)
class OwnTables(DeviceTables):
  """This device's rows of sharded item tables; the step updates those that any device reads.

  Attributes:
    embeddings: the policy.
    read: `[ids]` int32 ids of the items that this device's step reads.
    is_read: `[rows]` bool: which of this device's rows the steps of all devices read.
  """

  is_read: Array

  @property
  def lookup(self) -> Callable[[Array], Array]:
    return lambda table: exchange_rows(table, self.read)

  def put_back(self, old: PyTree, new: PyTree) -> PyTree:
    keep = lambda x, changed: jnp.where(self.is_read[:, None], changed, x)
    return map_item_tables(keep, old, lambda x, changed: changed, new)


@jax.custom_vjp
def exchange_rows(rows: Array, ids: Array) -> Array:
  """Looks up the rows of a sharded table that this device needs, inside a mapped function.

  Each device sends the others the ids that they hold and gets their rows. All messages have the
  same length, twice what evenly spread ids would need. A device that holds more of the ids answers
  in several rounds. So a device receives about as many rows as it needs, however many devices there
  are. Gradients go the same way back.

  Args:
    rows: `[rows, width]`, this device's rows of the table.
    ids: `[ids]` int32, ascending and distinct; `NOWHERE` for none.

  Returns:
    `[ids, width]`, zeros for `NOWHERE`.
  """
  messages = _Messages(ids, len(rows))

  def round_trip(i: Array, found: Array) -> Array:
    place, asked = messages.ask(i)
    answer = jnp.take(rows, asked, axis=0, mode='fill', fill_value=0)
    return found.at[place].set(_all_to_all(answer), mode='drop')

  nothing = jnp.zeros((len(ids), *rows.shape[1:]), rows.dtype)
  return jax.lax.fori_loop(0, messages.rounds, round_trip, nothing)


def _exchange_forward(rows: Array, ids: Array) -> tuple[Array, tuple]:
  return exchange_rows(rows, ids), (ids, jnp.zeros((len(rows), 0), rows.dtype))


def _exchange_backward(residuals: tuple, gradient: Array) -> tuple[Array, None]:
  ids, like = residuals
  messages = _Messages(ids, len(like))

  def send(i: Array, total: Array) -> Array:
    place, asked = messages.ask(i)
    sent = jnp.take(gradient, place, axis=0, mode='fill', fill_value=0)
    return total.at[asked].add(_all_to_all(sent).astype(total.dtype), mode='drop')

  # float32, because a row that many devices read sums many small gradients.
  nothing = jnp.zeros((len(like), *gradient.shape[1:]), jnp.float32)
  total = jax.lax.fori_loop(0, messages.rounds, send, nothing)
  return total.astype(like.dtype), None


exchange_rows.defvjp(_exchange_forward, _exchange_backward)


class _Messages:
  """The requests for rows between devices, in rounds.

  Attributes:
    rounds: `[]` int32, how many are needed until every device has all rows that it needs.
  """

  def __init__(self, ids: Array, rows: int):
    """Sorts the ids by the device that holds them.

    Args:
      ids: see `exchange_rows`.
      rows: rows on each device.
    """
    devices = jax.lax.axis_size(AXIS)
    self._ids, self._rows = ids, rows
    self._length = min(len(ids), -(-2 * len(ids) // devices))
    borders = jnp.arange(devices + 1, dtype=jnp.int32) * rows
    self._starts = jnp.searchsorted(ids, borders).astype(jnp.int32)
    most = jnp.diff(self._starts).max()
    self.rounds = jax.lax.pmax(-(-most // self._length), AXIS)

  def ask(self, i: Array) -> tuple[Array, Array]:
    """Sends the ids of round `i`.

    Returns:
      `[devices, length]` int32 each: indices of the ids that this device asks the others for; and
      indices of the rows that the others ask this device for. `NOWHERE` where there is none.
    """
    place = self._starts[:-1, None] + i * self._length + jnp.arange(self._length, dtype=jnp.int32)
    place = jnp.where(place < self._starts[1:, None], place, NOWHERE)
    ids = jnp.take(self._ids, place, mode='fill', fill_value=NOWHERE)
    return place, index_from(jax.lax.axis_index(AXIS) * self._rows, _all_to_all(ids))


def _all_to_all(x: Array) -> Array:
  """Sends `x[d]` to device d; in the result, row d is from device d."""
  return jax.lax.all_to_all(x, AXIS, 0, 0)


def with_placeholders(params: PyTree, num_items: int) -> PyTree:
  """Replaces item tables that a model declares but never reads by zeros `[num_items + 1, ...]`."""
  return map_item_tables(lambda x: jnp.zeros((num_items + 1, *x.shape[1:])), params)


def renumber(ids: Array, read: Array) -> Array:
  """Turns ids `[...]` that are among `read` into their positions there; 0 stays 0."""
  return jnp.searchsorted(read, ids).astype(ids.dtype)


def index_from(first: Array | int, ids: Array) -> Array:
  """Returns the index of ids in rows that begin with item `first`, `NOWHERE` for smaller ids."""
  index = ids - first
  return jnp.where(index >= 0, index, NOWHERE)  # A negative index would count from the end.


def map_item_tables(
  function: Callable, tree: PyTree, otherwise: Callable = lambda x, *rest: x, *rest: PyTree
) -> PyTree:
  """Maps `function` over the item tables of a tree, and `otherwise` over its other arrays."""

  def apply(path: tuple, *arrays: Array) -> Any:
    return (function if _is_item_table(path) else otherwise)(*arrays)

  return jax.tree_util.tree_map_with_path(apply, tree, *rest)


def _is_item_table(path: tuple) -> bool:
  return jax.tree_util.keystr(path[-1:], simple=True) == ITEM_TABLE


def _padded_length(rows: int) -> int:
  multiple = math.lcm(_MULTIPLE, device_count())
  return -(-rows // multiple) * multiple


def _pad(numpy: Any) -> Callable[[Array], Array]:
  def pad(x: Array) -> Array:
    return numpy.pad(x, ((0, _padded_length(len(x)) - len(x)), *[(0, 0)] * (x.ndim - 1)))

  return pad

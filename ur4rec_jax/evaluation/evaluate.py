"""Ranks the held-out items of all users among the whole catalogue, under a named protocol."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables, TokenTable
from ur4rec_jax.data.followers import FollowerTable
from ur4rec_jax.data.input_pipeline import gather_batch, gather_preferences
from ur4rec_jax.errors import DivergenceError
from ur4rec_jax.evaluation.cold_items import cold_items_of, with_mean_of_nearest
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import (
  EvalBatch,
  count_own_items,
  make_queries,
  pack_queries,
  with_own_items,
)
from ur4rec_jax.evaluation.ranking import (
  Seen,
  leave_out_seen,
  rank_among_candidates,
  rank_by_products,
  rank_by_scores,
)
from ur4rec_jax.models.content import EncodedItems
from ur4rec_jax.models.followers import RECENT, FollowerScores, follower_scores
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings, renumber, with_placeholders

Array = jax.Array
PyTree = Any


class EvalData(NamedTuple):
  """The inputs of an evaluation, and their placement on the devices.

  Attributes:
    dataset: all interactions.
    protocol: which items the held-out items are ranked against.
    users_per_batch: about how many users a device ranks at once.
    item_ids: `dataset.item_ids` on the devices; None if each batch brings the items that it reads.
    tables: tokens of items and users, on the devices.
    embeddings: the policy for item tables and item features.
    params_axes: for each parameter the dimension that is spread over devices, from
      `ItemEmbeddings.axes`; None if all are whole.
    mapping: `pmap` or `shard_map`.
    followers: followers of each item, on the devices; None if the model does not read them.
  """

  dataset: Dataset
  protocol: Protocol
  users_per_batch: int
  item_ids: Array | None
  tables: Tables
  embeddings: ItemEmbeddings
  params_axes: PyTree = None
  mapping: str = 'pmap'
  followers: FollowerTable | None = None


class Evaluators:
  """The evaluations of a run, each prepared when it is first needed: programs take time to compile.

  Attributes:
    data: inputs of the evaluations.
  """

  def __init__(self, data: EvalData):
    self.data = data
    self._prepared: dict[tuple[nn.Module, str], Callable[..., np.ndarray | None]] = {}

  def get(self, model: nn.Module, part: str) -> Callable[..., np.ndarray | None]:
    """Returns the function of `make_evaluator`; equal models share it."""
    if (model, part) not in self._prepared:
      self._prepared[model, part] = make_evaluator(model, self.data, part)
    return self._prepared[model, part]


class Catalogue(NamedTuple):
  """All encoded items, which users are ranked against; this device's rows if they are sharded.

  Attributes:
    items: by branch, from the model's `encode_items`.
    covariances: by branch, for the model's `scaled_users`.
  """

  items: dict[str, EncodedItems]
  covariances: dict[str, Array]


def make_evaluator(model: nn.Module, data: EvalData, part: str) -> Callable[..., np.ndarray | None]:
  """Prepares the evaluation of one part, and places its inputs on the devices.

  Args:
    model: see `UR4Rec`.
    data: what to evaluate on.
    part: `valid` or `test`.

  Returns:
    `evaluator(params, interrupted=lambda: False)`: the ranks of the held-out items as `[users]`
    int32, for the users whose rank counts, see `Protocol.is_counted`; or None once `interrupted()`
    is True. It raises DivergenceError if a score is not finite.
  """
  queries = make_queries(data.dataset, part, data.protocol)
  batches, members = pack_queries(queries, model.max_length, data.users_per_batch)
  seen_capacity = max(1, int(batches.seen_lengths.sum(-1).max()))
  rank = devices.MAPPINGS[data.mapping](
    make_eval_step(model, data.embeddings, seen_capacity),
    (data.params_axes, data.embeddings.axis, None, None, None, 0),
    (),
  )
  encode = make_catalogue_encoder(model, data)
  is_counted = data.protocol.is_counted(data.dataset, part)
  placed = place_batches(batches, data)

  def evaluator(params, interrupted=lambda: False) -> np.ndarray | None:
    outputs = []
    catalogue = encode(params, data.tables.items)  # Once for all users.
    for item_ids, batch in placed():
      if interrupted():
        return None
      outputs.append(rank(params, catalogue, data.tables.users, data.followers, item_ids, batch))
    outputs = jax.device_get(outputs)
    if not all(finite for _, finite in outputs):
      raise DivergenceError(
        f'a score is not finite in the evaluation on {part}; train in another --workdir with a '
        'lower config.optimizer.learning_rate'
      )
    ranks = np.concatenate([ranks for ranks, _ in outputs])
    # In the users' order, so that sums do not depend on the number of devices.
    flat = members.reshape(-1)
    ordered = np.zeros(len(queries.users), np.int32)
    ordered[flat[flat >= 0]] = ranks[flat >= 0]
    return ordered[is_counted]

  return evaluator


def place_batches(
  batches: EvalBatch, data: EvalData
) -> Callable[[], Iterable[tuple[Array, EvalBatch]]]:
  """Returns a function that iterates over batches on the devices, each with the items it reads."""
  count = devices.device_count()
  starts = range(0, len(batches.targets), count)
  groups = [jax.tree.map(lambda x, i=i: x[i : i + count], batches) for i in starts]
  if data.item_ids is not None:
    placed = [(data.item_ids, devices.shard(batch)) for batch in groups]
    return lambda: placed

  def read() -> Iterator[tuple[Array, EvalBatch]]:
    for batch in groups:
      item_ids, batch = with_own_items(data.dataset.item_ids, batch, capacity)
      yield devices.replicate(item_ids), devices.shard(batch)

  capacity = max(map(count_own_items, groups))
  return read


def make_catalogue_encoder(model: nn.Module, data: EvalData) -> Callable[..., Catalogue]:
  """Compiles the function of `make_encode_step`."""
  encode = make_encode_step(model, data)
  if not data.embeddings.is_sharded:
    return devices.on_each_device(encode)
  axes = data.params_axes, data.embeddings.axis
  return devices.MAPPINGS[data.mapping](encode, axes, (), out_axes=0)


def make_encode_step(model: nn.Module, data: EvalData) -> Callable[..., Catalogue]:
  """Builds `encode(params, features)`, which encodes all items, or those of one device.

  In a branch that embeds items by id alone, cold items get the mean embedding of their nearest
  neighbours, see `cold_items.py`.
  """
  embeddings, cold = data.embeddings, cold_items_of(model, data.dataset)
  model = model.for_items(embeddings.items_on_device) if embeddings.is_sharded else model

  def encode(params: PyTree, features: dict[str, TokenTable]) -> Catalogue:
    items = model.apply({'params': params}, features, method='encode_items')
    if cold is not None:
      vectors = with_mean_of_nearest(items['sasrec'].vectors, cold, embeddings)
      items |= {'sasrec': items['sasrec']._replace(vectors=vectors)}
    return Catalogue(items, model.covariances(items))

  return encode


def make_eval_step(model: nn.Module, embeddings: ItemEmbeddings, seen_capacity: int) -> Callable:
  """Builds the step that ranks the held-out items of one device's users.

  Args:
    model: has `encode_users`, `is_sum` and `scaled_users` or `scores`, see `UR4Rec`.
    embeddings: the policy for item tables.
    seen_capacity: at least the sum of a batch's `seen_lengths`.

  Returns:
    `eval_step(params, catalogue, user_tables, table, item_ids, batch)` with the token tables of all
    users and the followers of all items. It returns the ranks `[users of all devices]`, in the
    order of the batches, and whether everything is finite.
  """

  encode_batch = make_batch_encoder(model, embeddings, seen_capacity)

  def eval_step(
    params: PyTree,
    catalogue: Catalogue,
    user_tables: dict[str, TokenTable],
    table: FollowerTable | None,
    item_ids: Array,
    batch: EvalBatch,
  ) -> tuple[Array, Array]:
    apply, users, targets, seen = encode_batch(params, catalogue, user_tables, item_ids, batch)
    if not model.is_sum:
      leave_out = lambda scores: leave_out_seen(scores, targets, seen)
      scores = apply(users, catalogue.items, leave_out, method='scores')
      # The inputs are checked too: these fusions turn NaNs into ranks that look like numbers.
      finite = _all_finite((users, catalogue)) & (scores < jnp.inf).all()
      ranks = rank_by_scores(scores, targets, batch.candidates)
    else:
      users = apply(users, catalogue.covariances, method='scaled_users')
      vectors = {branch: items.vectors for branch, items in catalogue.items.items()}
      added = added_scores(model, table, item_ids, batch)
      if batch.candidates.shape[1]:
        ranks, finite = rank_among_candidates(
          users, vectors, targets, batch.candidates, embeddings, added
        )
      else:
        ranks, finite = rank_by_products(users, vectors, targets, seen, embeddings, added)
    finite = jax.lax.pmin(finite.astype(jnp.int32), devices.AXIS)
    return jax.lax.all_gather(ranks, devices.AXIS, tiled=True), finite

  return eval_step


def make_batch_encoder(
  model: nn.Module, embeddings: ItemEmbeddings, seen_capacity: int
) -> Callable:
  """Builds the function that encodes the users of one device's batch.

  Args:
    model: see `make_eval_step`.
    embeddings: the policy for item tables.
    seen_capacity: at least the sum of a batch's `seen_lengths`.

  Returns:
    `encode_batch(params, catalogue, user_tables, item_ids, batch)`, which returns the model's
    `apply` with its parameters; by branch `[users, width]`, each user's state after the whole
    history; the targets `[users]`; and the items that the users have seen.
  """

  def encode_batch(
    params: PyTree,
    catalogue: Catalogue,
    user_tables: dict[str, TokenTable],
    item_ids: Array,
    batch: EvalBatch,
  ) -> tuple[Callable, dict[str, Array], Array, Seen]:
    apply = functools.partial(
      model.apply, {'params': with_placeholders(params, embeddings.num_items)}
    )
    tokens = gather_batch(item_ids, batch.plan, model.max_length)
    newest = jnp.maximum(jnp.cumsum(batch.plan.lengths, axis=1) - 1, 0)
    items, history = catalogue.items, tokens.item_ids
    if embeddings.is_sharded:
      read = embeddings.read(history.reshape(-1))
      items = jax.tree.map(lambda x: embeddings.take(x, read), items)
      history = renumber(history, read)
    users = apply(
      items,
      history,
      tokens.segment_ids,
      gather_preferences(user_tables, tokens),
      query_positions=newest,
      method='encode_users',
    )
    users = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[batch.slots], users)
    seen = _seen(item_ids, batch, seen_capacity)
    return apply, users, jnp.maximum(batch.targets, 1), seen

  return encode_batch


def added_scores(
  model: nn.Module, table: FollowerTable | None, item_ids: Array, batch: EvalBatch
) -> FollowerScores | None:
  """Returns what followers add to the scores of a batch's users; None without a table."""
  if table is None:
    return None
  starts, lengths = (x.reshape(-1)[batch.slots, None] for x in batch.plan[:2])
  age = jnp.arange(RECENT)
  recent = item_ids[jnp.clip(starts + lengths - 1 - age, 0, item_ids.size - 1)]
  return follower_scores(jnp.where(age < lengths, recent, 0), table, model.followers)


def _seen(item_ids: Array, batch: EvalBatch, capacity: int) -> Seen:
  """Lists the items that the users of a batch have seen; unused pairs at the end have no user."""
  num_users = len(batch.targets)
  entry = jnp.arange(capacity)
  users = jnp.repeat(jnp.arange(num_users), batch.seen_lengths, total_repeat_length=capacity)
  ends = jnp.cumsum(batch.seen_lengths)
  begins = batch.seen_starts - (ends - batch.seen_lengths)
  items = item_ids[jnp.minimum(entry + begins[users], item_ids.size - 1)]
  return Seen(jnp.where(entry < ends[-1], users, num_users), items)


def _all_finite(tree: PyTree) -> Array:
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()

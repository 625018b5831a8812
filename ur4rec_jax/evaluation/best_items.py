"""Lists the items that a model ranks first for some users of the evaluation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.evaluation.evaluate import (
  EvalData,
  added_scores,
  make_batch_encoder,
  make_catalogue_encoder,
  place_batches,
)
from ur4rec_jax.evaluation.queries import Queries, pack_queries
from ur4rec_jax.evaluation.ranking import best_by_products, best_of, without_seen
from ur4rec_jax.sharding import devices

PyTree = Any


def best_items(
  model: nn.Module, data: EvalData, params: PyTree, queries: Queries, count: int
) -> np.ndarray:
  """Lists the best items of the whole catalogue for a few users, without those they have seen.

  Args:
    model: see `UR4Rec`.
    data: inputs of the evaluation, on the devices.
    params: on the devices, as `data.embeddings` says.
    queries: the users, so few that a device can score the catalogue for all of them at once.
    count: number of items for each user.

  Returns:
    `[users, count]` int32 item ids, the best first, 0 where no item is left.
  """
  data = data._replace(params_axes=data.embeddings.axes(params))
  batches, members = pack_queries(queries, model.max_length, len(queries.users))
  capacity = max(1, int(batches.seen_lengths.sum(-1).max()))
  find = devices.MAPPINGS[data.mapping](
    _make_step(model, data, capacity, min(count, data.dataset.num_items)),
    (data.params_axes, data.embeddings.axis, None, None, None, 0),
    (),
  )
  catalogue = make_catalogue_encoder(model, data)(params, data.tables.items)
  # One batch for each device: together they hold all users.
  ((item_ids, placed),) = place_batches(batches, data)()
  found = jax.device_get(
    find(params, catalogue, data.tables.users, data.followers, item_ids, placed)
  )
  flat = members.reshape(-1)
  best = np.zeros((len(queries.users), count), np.int32)
  best[flat[flat >= 0], : found.shape[1]] = found[flat >= 0]
  return best


def _make_step(model: nn.Module, data: EvalData, seen_capacity: int, count: int) -> Callable:
  encode_batch = make_batch_encoder(model, data.embeddings, seen_capacity)

  def step(params, catalogue, user_tables, table, item_ids, batch):
    apply, users, _, seen = encode_batch(params, catalogue, user_tables, item_ids, batch)
    if model.is_sum:
      users = apply(users, catalogue.covariances, method='scaled_users')
      vectors = {branch: items.vectors for branch, items in catalogue.items.items()}
      added = added_scores(model, table, item_ids, batch)
      return best_by_products(users, vectors, seen, count, data.embeddings, added)
    leave_out = lambda scores: without_seen(scores, seen)
    scores = apply(users, catalogue.items, leave_out, method='scores')
    _, found = best_of(scores, 1 + jnp.arange(scores.shape[1]), count)
    return jax.lax.all_gather(found, devices.AXIS, tiled=True)

  return step

"""Full-catalogue ranking of held-out items under a named protocol, and the two baselines."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables, TokenTable
from ur4rec_jax.data.input_pipeline import (
  Plan,
  assign,
  gather_batch,
  gather_preferences,
  pack,
  plan_rows,
)
from ur4rec_jax.errors import DivergenceError
from ur4rec_jax.evaluation import metrics
from ur4rec_jax.evaluation.cold_items import ColdItems, cold_items_of, with_mean_of_nearest
from ur4rec_jax.evaluation.ranking import (
  leave_out_seen,
  rank_among_candidates,
  rank_by_products,
  rank_by_scores,
)
from ur4rec_jax.models.content import EncodedItems
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import (
  feature_axis,
  find_rows,
  renumber,
  rows_of_device,
  take_rows,
  with_placeholders,
)

Array = jax.Array
PyTree = Any
PARTS = ('valid', 'test')


class Queries(NamedTuple):
  """Held-out items to rank, and what each user had before. NumPy, `[users]` unless said.

  Attributes:
    users: index of the user in the dataset.
    targets: the held-out item id.
    starts: index into `Dataset.item_ids` of the user's first interaction.
    lengths: interactions before the target.
    candidates: `[users, candidates]` item ids to rank against, or `[users, 0]` for all.
  """

  users: np.ndarray
  targets: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  candidates: np.ndarray


class Share(NamedTuple):
  """One device's part of `Queries`; users fill up to the same number with empty ones.

  Attributes:
    plan: `[rows, slots]`, the users' latest interactions.
    slots: `[users]` index of the user's slot, all rows' slots one after the other.
    targets: `[users]` item ids, 0 for an empty user.
    seen_starts: `[users]` index of the first earlier interaction.
    seen_lengths: `[users]` number of earlier interactions.
    candidates: `[users, candidates]`, see `Queries`.
  """

  plan: Plan
  slots: np.ndarray | Array
  targets: np.ndarray | Array
  seen_starts: np.ndarray | Array
  seen_lengths: np.ndarray | Array
  candidates: np.ndarray | Array


def protocol(dataset: Dataset, config: ConfigDict) -> dict[str, str]:
  """Names everything that a number depends on besides the model.

  Args:
    dataset: whose split is used.
    config: `candidates`, `num_candidates`, `seed`.
  """
  if config.candidates == 'all':
    candidates = 'all items'
  else:
    candidates = f'target + {config.num_candidates} {config.candidates} (seed {config.seed})'
  return {
    'split': splits.describe(dataset.split_name, dataset.info['splits'][dataset.split_name]),
    'candidates': candidates,
    'seen_items': 'left out',
    'ties': 'against the model',
  }


def make_queries(dataset: Dataset, part: str, config: ConfigDict) -> Queries:
  """Lists the users to evaluate on `part` with their held-out item.

  Args:
    dataset: all interactions.
    part: `valid` or `test`.
    config: `candidates`: `all`, or `uniform` or `popularity` to draw `num_candidates` others
      that the user never has, with `seed`.
  """
  users, targets = dataset.held_out(part)
  starts, lengths = dataset.offsets[users], dataset.split.held_out[part][users]
  candidates = np.zeros((len(users), 0), np.int32)
  if config.candidates != 'all':
    candidates = _draw_candidates(dataset, users, config)
  return Queries(users, targets, starts, lengths, candidates)


def _draw_candidates(dataset: Dataset, users: np.ndarray, config: ConfigDict) -> np.ndarray:
  """Draws distinct items the user never has, `[users, num_candidates]`, 0 where there are none."""
  rng = np.random.default_rng(config.seed)
  weights = np.ones(dataset.num_items)
  if config.candidates == 'popularity':
    weights = dataset.train_part().item_counts()[1:].astype(float)
  candidates = np.zeros((len(users), config.num_candidates), np.int32)
  with np.errstate(divide='ignore'):
    log_weights = np.log(weights)
  for row, user in zip(candidates, users, strict=True):
    # Gumbel top-k: a draw without replacement in proportion to the weights.
    keys = log_weights + rng.gumbel(size=dataset.num_items)
    keys[dataset.item_ids[dataset.offsets[user] : dataset.offsets[user + 1]] - 1] = -np.inf
    best = np.argsort(-keys)[: config.num_candidates]
    best = best[np.isfinite(keys[best])]
    row[: len(best)] = best + 1
  return candidates


class Catalogue(NamedTuple):
  """The items as users are ranked against them; of sharded ones this device's rows.

  Attributes:
    sides: by branch, from the model's `encode_items`.
    covariances: by branch, what its `scaled_users` reads.
  """

  sides: dict[str, EncodedItems]
  covariances: dict[str, Array]


def make_eval_step(
  model: nn.Module, num_items: int, row_length: int, seen_capacity: int, item_rows: str
) -> Callable:
  """Builds the step that ranks the held-out items of one device's share.

  Args:
    model: has `encode_users`, `is_sum` and `scaled_users` or `scores`, see `UR4Rec`.
    num_items: catalogue size.
    row_length: tokens a row.
    seen_capacity: upper bound on the sum of a share's `seen_lengths`.
    item_rows: `sharded` if each device has its own rows of the items.

  Returns:
    `eval_step(params, catalogue, preferences, item_ids, share)`, with the users' tables as
    `preferences`: ranks `[users of all devices]`, in the order of the shares, and whether
    everything is finite.
  """

  def eval_step(
    params,
    catalogue: Catalogue,
    preferences: dict[str, TokenTable],
    item_ids: Array,
    share: Share,
  ) -> tuple[Array, Array]:
    batch = gather_batch(item_ids, share.plan, row_length)
    apply = functools.partial(model.apply, {'params': with_placeholders(params, num_items)})
    preferences = gather_preferences(preferences, batch)
    newest = jnp.maximum(jnp.cumsum(share.plan.lengths, axis=1) - 1, 0)
    sides, history = catalogue.sides, batch.item_ids
    if item_rows == 'sharded':
      rows = find_rows(history.reshape(-1), num_items)
      sides = jax.tree.map(lambda x: take_rows(x, rows, item_rows), sides)
      history = renumber(history, rows)
    users = apply(
      sides, history, batch.segment_ids, preferences, query_positions=newest, method='encode_users'
    )
    users = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[share.slots], users)
    targets = jnp.maximum(share.targets, 1)
    seen = _seen(item_ids, share, seen_capacity)
    if not model.is_sum:
      leave_out = lambda scores: leave_out_seen(scores, targets, *seen)
      scores = apply(users, catalogue.sides, leave_out, method='scores')
      # Not the scores alone: ranks of NaNs, as such fusions count them, look like numbers.
      finite = _all_finite((users, catalogue)) & (scores < jnp.inf).all()
      ranks = rank_by_scores(scores, targets, share.candidates)
    else:
      users = apply(users, catalogue.covariances, method='scaled_users')
      vectors = {branch: side.vectors for branch, side in catalogue.sides.items()}
      if share.candidates.shape[1]:
        rank, others = rank_among_candidates, (share.candidates,)
      else:
        rank, others = rank_by_products, seen
      ranks, finite = rank(users, vectors, targets, *others, num_items, item_rows)
    finite = jax.lax.pmin(finite.astype(jnp.int32), devices.AXIS)
    return jax.lax.all_gather(ranks, devices.AXIS, tiled=True), finite

  return eval_step


def _seen(item_ids: Array, share: Share, capacity: int) -> tuple[Array, Array]:
  """Lists what the users of a share already have: `[capacity]` indices of users, and item ids.

  At the end, where there is nothing, the index is beyond all users.
  """
  num_users = len(share.targets)
  entry = jnp.arange(capacity)
  users = jnp.repeat(jnp.arange(num_users), share.seen_lengths, total_repeat_length=capacity)
  ends = jnp.cumsum(share.seen_lengths)
  begins = share.seen_starts - (ends - share.seen_lengths)
  items = item_ids[jnp.minimum(entry + begins[users], item_ids.size - 1)]
  return jnp.where(entry < ends[-1], users, num_users), items


def _all_finite(tree: PyTree) -> Array:
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def make_catalogue(
  model: nn.Module,
  num_items: int,
  cold: ColdItems | None,
  mapping: str,
  item_rows: str,
  params_axes: PyTree,
) -> Callable:
  """Compiles `catalogue(params, features)`, the model's items, on each device.

  On the branch of learned rows `cold` items are as their nearest. Other arguments as
  `make_evaluator`'s.
  """
  if item_rows == 'sharded':
    model = model.for_items(rows_of_device(num_items) - 1)

  def catalogue(params: PyTree, features: dict[str, TokenTable]) -> Catalogue:
    sides = model.apply({'params': params}, features, method='encode_items')
    if cold is not None:
      rows = with_mean_of_nearest(sides['sasrec'].vectors, cold, item_rows)
      sides |= {'sasrec': sides['sasrec']._replace(vectors=rows)}
    return Catalogue(sides, model.covariances(sides))

  if item_rows != 'sharded':
    return devices.on_each_device(catalogue)
  axes = params_axes, feature_axis(item_rows)
  return devices.MAPPINGS[mapping](catalogue, axes, (), out_axes=0)


def make_shares(
  queries: Queries, max_length: int, users_per_share: int
) -> tuple[Share, np.ndarray]:
  """Packs the users into equal shares without padding, a multiple of the device count.

  Args:
    queries: whom to evaluate.
    max_length: tokens a row; longer histories lose their oldest interactions.
    users_per_share: users a share, about.

  Returns:
    A `Share` whose arrays have a leading `[shares]`, and `[shares, users]`, the index into
    `queries` of each entry, -1 if empty.
  """
  lengths = np.minimum(queries.lengths, max_length)
  slots = pack(lengths, max_length)
  users = assign(slots, lengths, np.arange(len(lengths)))
  # Spread rows with many users evenly; the order changes no rank.
  users = users[np.random.default_rng(0).permutation(len(users))]
  rows_per_share = min(len(users), max(1, round(len(users) * users_per_share / len(lengths))))
  num_shares = -(-len(users) // rows_per_share)
  num_shares += -num_shares % devices.device_count()
  starts = queries.starts + queries.lengths - lengths
  plan = plan_rows(users, queries.users, starts, lengths, num_shares * rows_per_share)
  by_share = lambda x: x.reshape(num_shares, rows_per_share, -1)
  users = by_share(np.pad(users, ((0, len(plan.lengths) - len(users)), (0, 0)), constant_values=-1))
  capacity = int((users >= 0).sum((1, 2)).max())
  members = np.full((num_shares, capacity), -1, np.int64)
  places = np.zeros((num_shares, capacity), np.int32)
  for share in range(num_shares):
    filled = np.flatnonzero(users[share] >= 0)
    members[share, : len(filled)] = users[share].flat[filled]
    places[share, : len(filled)] = filled
  lookup = lambda x: np.where(members >= 0, x[members], 0).astype(np.int32)
  share = Share(
    Plan(*map(by_share, plan)),
    places,
    lookup(queries.targets),
    lookup(queries.starts),
    lookup(queries.lengths),
    queries.candidates[members],
  )
  return share, members


def make_evaluator(
  model: nn.Module,
  dataset: Dataset,
  item_ids: Array,
  tables: Tables,
  part: str,
  config: ConfigDict,
  mapping: str,
  item_rows: str = 'all',
  params_axes: PyTree = None,
) -> Callable[..., np.ndarray | None]:
  """Prepares the evaluation of one part, everything it reads placed on the devices.

  Args:
    model: has what `make_eval_step` reads, `max_length`, `encode_items` and `covariances`.
    dataset: all interactions.
    item_ids: `dataset.item_ids` on the devices.
    tables: tokens of items and users, on the devices.
    part: `valid` or `test`.
    config: `batch_size`, users a device and dispatch; and the fields that `protocol` reads.
    mapping: `pmap` or `shard_map`.
    item_rows: with `sharded`, each device has its rows of the items' tables, and of the parameters
      that `params_axes` from `item_rows.row_axes` tells.
    params_axes: see there.

  Returns:
    `evaluator(params, interrupted=lambda: False)`: the ranks of the held-out items as `[users]`
    int32, in the order of `Dataset.held_out`, or None once `interrupted()` is True. It raises
    DivergenceError if a score is not finite.
  """
  queries = make_queries(dataset, part, config)
  shares, members = make_shares(queries, model.max_length, config.batch_size)
  seen_capacity = int(shares.seen_lengths.sum(-1).max())
  step = devices.MAPPINGS[mapping](
    make_eval_step(model, dataset.num_items, model.max_length, seen_capacity, item_rows),
    (params_axes, feature_axis(item_rows), None, None, 0),
    (),
  )
  cold = cold_items_of(model, dataset)
  make_items = make_catalogue(model, dataset.num_items, cold, mapping, item_rows, params_axes)
  num_devices = devices.device_count()
  placed = [
    devices.shard(jax.tree.map(lambda x, i=i: x[i : i + num_devices], shares))
    for i in range(0, len(members), num_devices)
  ]

  def evaluator(params, interrupted=lambda: False) -> np.ndarray | None:
    outputs = []
    catalogue = make_items(params, tables.items)  # Once for all users.
    for share in placed:
      if interrupted():
        return None
      outputs.append(step(params, catalogue, tables.users, item_ids, share))
    outputs = jax.device_get(outputs)
    if not all(finite for _, finite in outputs):
      raise DivergenceError(f'a score is not finite in the evaluation on {part}')
    ranks = np.concatenate([ranks for ranks, _ in outputs])
    # In the users' order, so that sums do not depend on the number of devices.
    flat = members.reshape(-1)
    ordered = np.zeros(len(queries.users), np.int32)
    ordered[flat[flat >= 0]] = ranks[flat >= 0]
    return ordered

  return evaluator


def baseline_metrics(dataset: Dataset, part: str, config: ConfigDict) -> dict[str, dict]:
  """Metrics of recommending by training popularity, and in random order, under the same protocol.

  Returns:
    `{'popularity': metrics, 'random': metrics}`.
  """
  queries = make_queries(dataset, part, config)
  popularity = dataset.train_part().item_counts()
  popularity[0] = -1  # Below every item.
  sorted_popularity = np.sort(popularity[1:])
  rng = np.random.default_rng(config.seed)
  popularity_ranks, random_ranks = [], []
  for target, start, length, candidates in zip(
    queries.targets, queries.starts, queries.lengths, queries.candidates, strict=True
  ):
    level = popularity[target]
    if candidates.size:
      rivals = candidates[(candidates > 0) & (candidates != target)]
      num_rivals, not_worse = len(rivals), int((popularity[rivals] >= level).sum())
    else:
      out = np.union1d(dataset.item_ids[start : start + length], target)
      num_rivals = dataset.num_items - len(out)
      not_worse = dataset.num_items - int(np.searchsorted(sorted_popularity, level))
      not_worse -= int((popularity[out] >= level).sum())
    popularity_ranks.append(1 + not_worse)
    # In a random order the target stands at each place with equal probability.
    random_ranks.append(int(rng.integers(1, num_rivals + 2)))
  return {
    'popularity': metrics.ranking_metrics(np.array(popularity_ranks)),
    'random': metrics.ranking_metrics(np.array(random_ranks)),
  }

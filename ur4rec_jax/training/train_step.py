"""The pure training and evaluation steps of one device's share; no I/O, no Python state."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables, preference_starts
from ur4rec_jax.data.input_pipeline import Batch, Plan, gather_batch, gather_preferences
from ur4rec_jax.models.fusion import GATES
from ur4rec_jax.models.ur4rec import Encoded, losses_in_use, retrieval_losses
from ur4rec_jax.sharding.devices import AXIS
from ur4rec_jax.sharding.item_embeddings import (
  find_rows,
  global_norm_of_parts,
  mean_over_devices,
  put_item_tables,
  renumber,
  rows_of_device,
  take_item_tables,
  take_rows,
)
from ur4rec_jax.training import losses, stages
from ur4rec_jax.training.optimizers import learning_rate_at
from ur4rec_jax.training.train_state import TrainState

Array = jax.Array
PyTree = Any


class Negatives(NamedTuple):
  """Items that a loss compares targets with.

  Attributes:
    items: int32 from 0: `[tokens, negatives]`, each token's own, or `[negatives]`, of all.
    log_expected_count: `[negatives]` float32, how often each was to be expected; of those of all.
  """

  items: Array
  log_expected_count: Array | None = None


class TrainData(NamedTuple):
  """What training reads of a dataset, on every device; nothing held out is in it.

  Attributes:
    item_ids: `[training interactions]` int32, 1-based, user after user.
    item_counts: `[num_items]` float32, training interactions an item.
    tables: tokens of items and users.
    preference_starts: `[num_users]` int32, from `features.preference_starts`.
  """

  item_ids: Array
  item_counts: Array
  tables: Tables
  preference_starts: Array


def make_train_data(train_part: Dataset, tables: Tables) -> TrainData:
  """Collects what training reads, still on the host; `train_part` is from `Dataset.train_part`."""
  return TrainData(
    train_part.item_ids,
    train_part.item_counts()[1:].astype(np.float32),
    tables,
    preference_starts(train_part),
  )


def make_losses(config: ConfigDict) -> Callable[..., dict[str, Array]]:
  """Builds all losses that have a weight.

  Args:
    config: `weights` by loss; `name` of the loss on scores, `retriever_name` of that on the
      retriever's; `contrast_items`, targets that `info_nce`, `contrast`, `matching` and
      `diversity` look at; `diversity`, its kind; and what `make_retrieval_loss` reads.

  Returns:
    `losses(encoded, batch, negatives, num_items, tokens, read)`, with `negatives` by branch from
    `draw_negatives`, `tokens` the number to divide sums over tokens by, and `read` the ids of the
    items that `batch` numbers, where it does: the scalars by name.
  """
  retrieval = {
    branch: make_retrieval_loss(name, config) for branch, name in retrieval_losses(config).items()
  }
  names = losses_in_use(config)

  def all_losses(
    encoded: Encoded,
    batch: Batch,
    negatives: dict[str, Negatives | None],
    num_items: int,
    tokens: Array,
    read: Array | None = None,
  ) -> dict[str, Array]:
    targets = jnp.maximum(batch.targets - 1, 0).reshape(-1)
    weights = (batch.targets > 0).astype(jnp.float32).reshape(-1)
    # Targets at even distances stand for the batch: items as often as they are consumed.
    some = jnp.linspace(0, targets.size - 1, min(config.contrast_items, targets.size), dtype=int)
    some_ids, some_weights = batch.targets.reshape(-1)[some], weights[some]

    def of_branch(branch: str) -> Array:
      users = encoded.users[branch]
      users = users.reshape(-1, users.shape[-1])
      if encoded.rows is not None and negatives[branch] is None:
        target_ids = read[batch.targets.reshape(-1)]
        arrays = users, encoded.rows[branch], target_ids, weights
        loss = losses.softmax_over_devices(*arrays, num_items, config.chunk_size, AXIS)
      else:
        items = encoded.items[branch]
        loss = retrieval[branch](users, items, targets, weights, negatives[branch], num_items)
      return loss / tokens

    def info_nce() -> Array:
      vectors = encoded.content.modalities[some_ids]
      present = encoded.content.present[some_ids]
      pairs = list(itertools.combinations(range(present.shape[1]), 2))
      values = [
        losses.info_nce(
          vectors[:, a],
          vectors[:, b],
          some_ids,
          some_weights * present[:, a] * present[:, b],
          encoded.log_temperature,
        )
        for a, b in pairs
      ]
      return sum(values) / len(pairs)

    def diversity() -> Array:
      pooled = encoded.content.pooled[some_ids]
      present = encoded.content.present[some_ids] * some_weights[:, None]
      flat = pooled.reshape(-1, *pooled.shape[2:])
      return losses.diversity(flat, present.reshape(-1), config.diversity)

    def contrast() -> Array:
      retrieved = encoded.retrieved.reshape(-1, *encoded.retrieved.shape[2:])[some]
      wanted = encoded.items['retriever'][targets[some]]
      return losses.info_nce(retrieved, wanted, some_ids, some_weights, encoded.log_temperature)

    def matching() -> Array:
      users = encoded.users['retriever'].reshape(targets.size, -1)[some]
      matched = encoded.items['retriever'][targets[some]]
      # A neighbour's target: an item about as popular as the user's own.
      mismatched, is_other = jnp.roll(matched, 1, axis=0), jnp.roll(some_ids, 1) != some_ids
      scores = [(users * items).sum(-1, dtype=jnp.float32) for items in (matched, mismatched)]
      return losses.matching_bce(
        encoded.matching_scale * jnp.concatenate(scores) + encoded.matching_bias,
        jnp.repeat(jnp.array([1, 0]), len(some)),
        jnp.concatenate([some_weights, some_weights * is_other * jnp.roll(some_weights, 1)]),
      )

    auxiliary = {
      'contrast': contrast,
      'matching': matching,
      'consistency': lambda: losses.consistency(
        encoded.content.modalities[1:], encoded.content.present[1:]
      ),
      'info_nce': info_nce,
      'diversity': diversity,
    }
    return {name: auxiliary[name]() if name in auxiliary else of_branch(name) for name in names}

  return all_losses


def draw_negatives(
  name: str, config: ConfigDict, targets: Array, data: TrainData, key: Array
) -> Negatives | None:
  """Draws what a retrieval loss compares targets with; None where it reads the whole catalogue.

  Args:
    name: as `make_retrieval_loss`'s.
    config: `num_negatives`, and `negatives`, how those of all tokens are drawn.
    targets: `[tokens]` int32, items from 0.
    data: says how popular items are.
    key: of this draw.
  """
  num_items = data.item_counts.size
  if name == 'softmax':
    return None
  if name != 'sampled_softmax':
    shift = jax.random.randint(key, (targets.shape[0], config.num_negatives), 1, num_items)
    return Negatives((targets[:, None] + shift) % num_items)  # Uniform over all but the target.
  shape = (config.num_negatives,)
  if config.negatives == 'popularity':
    # A random training interaction is an item drawn by popularity.
    items = data.item_ids[jax.random.randint(key, shape, 0, data.item_ids.size)] - 1
    probability = data.item_counts[items] / data.item_ids.size
  else:
    items = jax.random.randint(key, shape, 0, num_items)
    probability = jnp.full(shape, 1 / num_items)
  return Negatives(items, jnp.log(config.num_negatives * probability))


def make_retrieval_loss(name: str, config: ConfigDict) -> Callable[..., Array]:
  """Builds a retrieval loss.

  Args:
    name: `softmax`, `sampled_softmax`, `bce`, `bpr` or `gbce`.
    config: `num_negatives`, `calibration`, `chunk_size`.

  Returns:
    `loss(hidden, item_vectors, targets, weights, negatives, num_items)`, see `losses.py` for the
    shapes, with `negatives` from `draw_negatives`; the scalar sum over tokens.
  """

  def sampled_for_each_token(hidden, item_vectors, targets, weights, negatives, num_items):
    pairwise = {
      'bpr': losses.bpr,
      'bce': losses.bce,
      'gbce': lambda *logits: losses.gbce(*logits, num_items, config.calibration),
    }[name]

    def loss(hidden, targets, negatives, weights):
      positive = (hidden * item_vectors[targets]).sum(-1, dtype=jnp.float32)
      negative = jnp.einsum(
        'td,tnd->tn', hidden, item_vectors[negatives], preferred_element_type=jnp.float32
      )
      return pairwise(positive, negative, weights)

    # Every negative brings its vector: about the memory of logits over 2,000 items.
    chunk_size = max(1, 32 * config.chunk_size // config.num_negatives)
    return losses.chunked_sum(loss, chunk_size, hidden, targets, negatives.items, weights)

  def sampled_for_all_tokens(hidden, item_vectors, targets, weights, negatives, num_items):
    del num_items
    negative_vectors = item_vectors[negatives.items]

    def loss(hidden, targets, weights):
      positive = (hidden * item_vectors[targets]).sum(-1, dtype=jnp.float32)
      negative = jnp.matmul(hidden, negative_vectors.T, preferred_element_type=jnp.float32)
      is_target = targets[:, None] == negatives.items
      return losses.sampled_softmax(
        positive, negative, weights, negatives.log_expected_count, is_target
      )

    return losses.chunked_sum(loss, config.chunk_size, hidden, targets, weights)

  def whole_catalogue(hidden, item_vectors, targets, weights, negatives, num_items):
    del negatives, num_items
    return losses.softmax(hidden, item_vectors, targets, weights, config.chunk_size)

  return {
    'bpr': sampled_for_each_token,
    'bce': sampled_for_each_token,
    'gbce': sampled_for_each_token,
    'sampled_softmax': sampled_for_all_tokens,
    'softmax': whole_catalogue,
  }[name]


def _gates(reported: PyTree, modalities: Sequence[str]) -> dict[str, Array]:
  """Names what `fusion.GATES` holds: `PATH`, or `PATH/TOWER/MODALITY`."""
  by_place = traverse_util.flatten_dict(reported.get(GATES, {}))
  name_of = {f'modality_{i}': name for i, name in enumerate(sorted(modalities))}
  return {
    '/'.join(name_of.get(part, part) for part in place if part != 'fusion'): value
    for place, value in by_place.items()
  }


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformationExtraArgs,
  labels: PyTree,
  config: ConfigDict,
  trainable: frozenset[str],
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
  """Builds the step that is mapped over devices: several optimizer steps in one dispatch.

  What does not move takes no gradient, and what the losses do not read is not computed. Where item
  tables are sharded, `state` and `data` have this device's part of them.

  Args:
    model: of the stage; has `encode`, see `UR4Rec`.
    tx: optimizer, from `create_optimizer`.
    labels: of the parameters, see `make_stages`.
    config: of the stage.
    trainable: labels that are trained in it.

  Returns:
    `train_step(state, data, plan, num_steps, numbers)` with `plan` `[steps, rows, slots]`, this
    device's rows of each step, of which the first `num_steps` are taken, and the `numbers` of the
    stage. It gives the new state and per step, `[steps]`: `loss`, the weighted sum, and `loss/NAME`
    each loss if there are several, all means over all devices' tokens; `weight/NAME` what it is
    multiplied by, where that is learned; `gate/NAME` the share of a branch or modality;
    `grad_norm`; `turn`, whose it was; `finite`, whether loss and gradient are.
  """
  all_losses, loss_weights = make_losses(config.loss), losses_in_use(config.loss)
  moves = jax.tree.map(lambda label: label in trainable, labels)
  item_rows = config.optimizer.item_embeddings
  # Of sharded items then each device trains its own, all of them.
  reads_all = item_rows == 'sharded' and 'softmax' in retrieval_losses(config.loss).values()
  norm = global_norm_of_parts if reads_all else optax.tree.norm

  @functools.partial(jax.jit, inline=True)  # Traced once, for its shapes and for the loop.
  def one_step(
    data: TrainData, numbers: stages.StageNumbers, state: TrainState, plan: Plan
  ) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.root_key), state.step)
    key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
    dropout_key, negatives_key = jax.random.split(key)
    batch = gather_batch(data.item_ids, plan, config.max_length)
    targets = jnp.maximum(batch.targets - 1, 0).reshape(-1)
    negatives = {
      branch: draw_negatives(name, config.loss, targets, data, negatives_key)
      for branch, name in retrieval_losses(config.loss).items()
    }
    num_items = data.item_counts.size
    params, opt_state, features = state.params, state.opt_state, data.tables.items
    model_of_step, rows, take = model, None, None
    weights = (batch.targets > 0).astype(jnp.float32).reshape(-1)
    if item_rows != 'all':
      # Padding has negatives of its own, which nothing reads.
      drawn = {
        branch: jnp.where(weights[:, None] > 0, x.items + 1, 0) if x.items.ndim > 1 else x.items + 1
        for branch, x in negatives.items()
        if x is not None
      }
      read = [batch.item_ids, batch.targets, *drawn.values()]
      rows = find_rows(jnp.concatenate([x.reshape(-1) for x in read]), num_items)
      batch = batch._replace(
        item_ids=renumber(batch.item_ids, rows), targets=renumber(batch.targets, rows)
      )
      for branch, ids in drawn.items():
        items = jnp.maximum(renumber(ids, rows) - 1, 0)
        negatives[branch] = negatives[branch]._replace(items=items)
      take_read = functools.partial(take_rows, rows=rows, item_rows=item_rows)
      if reads_all:
        model_of_step, take = model.for_items(rows_of_device(num_items) - 1), take_read
      else:
        model_of_step = model.for_items(rows.size - 1)
        params, opt_state = take_item_tables((params, opt_state), rows, item_rows)
        features = jax.tree.map(take_read, features)
    # Dividing by the global count here makes the mean of the devices' gradients the gradient of
    # the mean over all tokens, however unevenly tokens are spread.
    tokens = jax.lax.pmean(weights.sum(), AXIS)
    tokens = jnp.where(tokens > 0, tokens, 1.0)

    def objective(params):
      params = jax.tree.map(lambda x, m: x if m else jax.lax.stop_gradient(x), params, moves)
      encoded, reported = model_of_step.apply(
        {'params': params},
        features,
        batch.item_ids,
        batch.segment_ids,
        gather_preferences(data.tables.users, batch, data.preference_starts),
        deterministic=False,
        rngs={'dropout': dropout_key},
        take=take,
        method='encode',
        mutable=(GATES,),
      )
      values = all_losses(encoded, batch, negatives, num_items, tokens, rows)
      reported = {
        **({f'loss/{name}': x for name, x in values.items()} if len(values) > 1 else {}),
        **{f'weight/{name}': jnp.exp(-x) for name, x in encoded.log_variances.items()},
        **{f'gate/{name}': x for name, x in _gates(reported, config.modalities).items()},
      }
      if encoded.log_variances:
        return losses.uncertainty_weighted(values, encoded.log_variances), reported
      return sum(loss_weights[name] * value for name, value in values.items()), reported

    (value, reported), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    value, reported = jax.lax.pmean((value, reported), AXIS)
    gradients = mean_over_devices(gradients, moves, reads_all)
    updates, opt_state = tx.update(
      gradients,
      opt_state,
      params,
      learning_rate=learning_rate_at(state.stage.step, *numbers[:4]),
      active={label: by_turn[state.stage.turn] for label, by_turn in numbers.alternation.items()},
      norm=norm,
    )
    params = optax.apply_updates(params, updates)
    if item_rows != 'all' and not reads_all:
      params, opt_state = put_item_tables(
        (state.params, state.opt_state), rows, (params, opt_state), item_rows
      )
    grad_norm = norm(gradients)
    metrics = {
      'loss': value,
      **reported,
      'grad_norm': grad_norm,
      'turn': state.stage.turn,
      'finite': jnp.isfinite(value) & jnp.isfinite(grad_norm),
    }
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      stage=stages.after_step(state.stage, value, numbers),
    )
    return state, metrics

  def train_step(
    state: TrainState, data: TrainData, plan: Plan, num_steps: Array, numbers: stages.StageNumbers
  ) -> tuple[TrainState, dict[str, Array]]:
    def body(i, carry):
      state, metrics = carry
      state, new = one_step(data, numbers, state, jax.tree.map(lambda x: x[i], plan))
      return state, jax.tree.map(lambda all_steps, x: all_steps.at[i].set(x), metrics, new)

    first = jax.tree.map(lambda x: x[0], plan)
    shapes = jax.eval_shape(one_step, data, numbers, state, first)[1]
    metrics = jax.tree.map(lambda x: jnp.zeros(plan.starts.shape[:1] + x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, num_steps, body, (state, metrics))

  return train_step

"""The training step: a pure function of one device's data, which is mapped over devices.

`make_train_step` builds it. A step gathers a batch, draws negatives, takes the item embeddings that
they need, differentiates the objective, updates the parameters, and puts the item embeddings back.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from ur4rec_jax.data.input_pipeline import Batch, Plan, gather_batch, gather_preferences
from ur4rec_jax.models.fusion import GATES
from ur4rec_jax.sharding.devices import AXIS
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings
from ur4rec_jax.training import losses
from ur4rec_jax.training.negatives import draw_all_negatives, drawn_ids, renumbered
from ur4rec_jax.training.objective import LossInputs, make_losses
from ur4rec_jax.training.optimizers import learning_rate_at
from ur4rec_jax.training.seen_items import seen_items
from ur4rec_jax.training.stages import Stage, StageNumbers, after_step
from ur4rec_jax.training.train_data import TrainData
from ur4rec_jax.training.train_state import TrainState

Array = jax.Array
PyTree = Any
Metrics = dict[str, Array]


def make_train_step(
  tx: optax.GradientTransformationExtraArgs,
  labels: PyTree,
  stage: Stage,
  embeddings: ItemEmbeddings,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Builds the function that takes several optimizer steps in one dispatch.

  Frozen parameters get no gradient, and values that no loss reads are not computed.

  Args:
    tx: optimizer, from `create_optimizer`.
    labels: labels of the parameters, from `make_stages`.
    stage: has the model, its losses and the labels that are trained.
    embeddings: the policy for item tables. If they are sharded, `state` and `data` hold this
      device's part.

  Returns:
    `train_step(state, data, plan, num_steps, numbers)`. `plan` is `[steps, rows, slots]`, this
    device's rows of each step; the first `num_steps` steps are taken. `numbers` are those of the
    stage. It returns the new state and metrics `[steps]`, means over all devices: `loss`, the
    weighted sum; `loss/NAME`, each loss without its weight; `weight/NAME`, a learned loss weight;
    `gate/NAME`, the share of a branch or modality. The others are `grad_norm`; `turn`, the index of
    the trained group; and `finite`, whether the loss and the gradient norm are finite.
  """
  is_trainable = jax.tree.map(lambda label: label in stage.trainable, labels)
  needs_catalogue = embeddings.is_sharded and 'softmax' in stage.retrieval_losses.values()
  list_seen = seen_items if stage.leaves_out_seen_items else lambda batch: None
  objective_of = make_objective(stage, is_trainable, embeddings.num_items)

  @functools.partial(jax.jit, inline=True)  # Traced once, for its shapes and for the loop.
  def one_step(
    data: TrainData, numbers: StageNumbers, state: TrainState, plan: Plan
  ) -> tuple[TrainState, Metrics]:
    dropout_key, negatives_key = _keys_of_step(state)
    batch = gather_batch(data.item_ids, plan, stage.config.max_length)
    target_ids = batch.targets.reshape(-1)
    weights = (target_ids > 0).astype(jnp.float32)
    negatives = draw_all_negatives(stage, jnp.maximum(target_ids - 1, 0), data, negatives_key)
    ids = drawn_ids(negatives, weights)
    tables = embeddings.for_step(
      [batch.item_ids, batch.targets, *ids.values()], needs_catalogue, bool(data.tables.items)
    )
    seen_in_catalogue = list_seen(batch)
    batch = batch._replace(  # From here on, items have the numbers of the step.
      item_ids=tables.renumber(batch.item_ids), targets=tables.renumber(batch.targets)
    )
    # Each device divides by the mean number of tokens of all devices. The mean of the devices'
    # gradients is then the gradient of the mean over all tokens, however unevenly they are spread.
    num_tokens = jax.lax.pmean(weights.sum(), AXIS)
    inputs = LossInputs(
      numbers=batch.targets.reshape(-1),
      target_ids=target_ids,
      negatives=renumbered(negatives, ids, tables),
      num_tokens=jnp.where(num_tokens > 0, num_tokens, 1.0),
      seen=list_seen(batch),
      seen_in_catalogue=seen_in_catalogue,
    )
    params, opt_state = tables.take((state.params, state.opt_state))
    objective = objective_of(data, tables, batch, inputs, dropout_key)

    (loss, reported), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    loss, reported = jax.lax.pmean((loss, reported), AXIS)
    gradients = tables.mean_over_devices(gradients, is_trainable)
    updates, opt_state = tx.update(
      gradients,
      opt_state,
      params,
      learning_rate=learning_rate_at(state.stage.step, numbers.rate),
      active={label: by_turn[state.stage.turn] for label, by_turn in numbers.alternation.items()},
      norm=tables.norm,
    )
    params = optax.apply_updates(params, updates)
    params, opt_state = tables.put_back((state.params, state.opt_state), (params, opt_state))

    grad_norm = tables.norm(gradients)
    metrics = {
      'loss': loss,
      **reported,
      'grad_norm': grad_norm,
      'turn': state.stage.turn,
      'finite': jnp.isfinite(loss) & jnp.isfinite(grad_norm),
    }
    new_stage = after_step(state.stage, loss, numbers)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, stage=new_stage)
    return state, metrics

  return _several_steps(one_step)


def make_objective(
  stage: Stage, is_trainable: PyTree, num_items: int
) -> Callable[..., Callable[[PyTree], tuple[Array, Metrics]]]:
  """Builds the objective of a stage.

  Args:
    stage: has the model and its losses.
    is_trainable: tree of bools for the parameters; the others get no gradient.
    num_items: size of the whole catalogue.

  Returns:
    `objective_of(data, tables, batch, inputs, dropout_key)`, which returns the function
    `objective(params)` of one batch: the weighted sum of the losses, and metrics to report.
  """
  all_losses, loss_weights = make_losses(stage, num_items), stage.losses

  def objective_of(data, tables, batch: Batch, inputs: LossInputs, dropout_key: Array):
    features = tables.take_features(data.tables.items)
    preferences = gather_preferences(data.tables.users, batch, data.preference_starts)
    model = stage.model
    if tables.num_items != num_items or tables.lookup is not None:
      model = model.for_items(tables.num_items)

    def objective(params: PyTree) -> tuple[Array, Metrics]:
      params = jax.tree.map(
        lambda x, trains: x if trains else jax.lax.stop_gradient(x), params, is_trainable
      )
      encoded, reported = model.apply(
        {'params': params},
        features,
        batch.item_ids,
        batch.segment_ids,
        preferences,
        deterministic=False,
        rngs={'dropout': dropout_key},
        lookup=tables.lookup,
        method='encode',
        mutable=(GATES,),
      )
      values = all_losses(encoded, inputs)
      reported = {
        **{f'loss/{name}': x for name, x in values.items()},
        **{f'weight/{name}': jnp.exp(-x) for name, x in encoded.log_variances.items()},
        **{f'gate/{name}': x for name, x in _gates(reported, stage.config.modalities).items()},
      }
      if encoded.log_variances:
        return losses.uncertainty_weighted(values, encoded.log_variances), reported
      return sum(loss_weights[name] * value for name, value in values.items()), reported

    return objective

  return objective_of


def _keys_of_step(state: TrainState) -> Array:
  """Returns the random keys of a step on this device, one for dropout and one for negatives."""
  key = jax.random.fold_in(jax.random.wrap_key_data(state.root_key), state.step)
  return jax.random.split(jax.random.fold_in(key, jax.lax.axis_index(AXIS)))


def _gates(reported: PyTree, modalities: Sequence[str]) -> Metrics:
  """Names the values in the collection `fusion.GATES`: `BRANCH`, or `BRANCH/TOWER/MODALITY`."""
  by_module = traverse_util.flatten_dict(reported.get(GATES, {}))
  name_of = {f'modality_{i}': name for i, name in enumerate(sorted(modalities))}
  return {
    '/'.join(name_of.get(part, part) for part in module if part != 'fusion'): value
    for module, value in by_module.items()
  }


def _several_steps(one_step: Callable) -> Callable[..., tuple[TrainState, Metrics]]:
  """Loops `one_step` over the first steps of a plan and stacks the metrics."""

  def train_step(
    state: TrainState, data: TrainData, plan: Plan, num_steps: Array, numbers: StageNumbers
  ) -> tuple[TrainState, Metrics]:
    def body(i, carry):
      state, metrics = carry
      state, new = one_step(data, numbers, state, jax.tree.map(lambda x: x[i], plan))
      return state, jax.tree.map(lambda all_steps, x: all_steps.at[i].set(x), metrics, new)

    first = jax.tree.map(lambda x: x[0], plan)
    shapes = jax.eval_shape(one_step, data, numbers, state, first)[1]
    metrics = jax.tree.map(lambda x: jnp.zeros(plan.starts.shape[:1] + x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, num_steps, body, (state, metrics))

  return train_step

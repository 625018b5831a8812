import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from tests.helpers.marks import slow
from tests.helpers.runs import make_dataset
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables, preference_starts
from ur4rec_jax.data.input_pipeline import Plan, TrainBatches
from ur4rec_jax.models.layers import Dropout
from ur4rec_jax.models.sasrec import SASRec
from ur4rec_jax.models.ur4rec import Encoded, UR4Rec
from ur4rec_jax.sharding import devices, item_embeddings
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings
from ur4rec_jax.training import (
  catalogue_softmax,
  negatives,
  objective,
  optimizers,
  stages,
  train_step,
)
from ur4rec_jax.training.train_data import TrainData
from ur4rec_jax.training.train_state import TrainState, create_train_state, parameter_shapes

NUM_ITEMS = 20
MAX_LENGTH = 6
CAPACITY = 3  # Optimizer steps a dispatch.
LOSSES = ('softmax', 'sampled_softmax', 'bce', 'bpr', 'gbce')


# --- The losses that make_retrieval_loss builds ---


def loss_config(name: str, **fields):
  config = default.get_config().loss
  config.update({'name': name, 'num_negatives': 3, 'chunk_size': 5} | fields)
  return config


def loss_inputs(tokens: int = 11, dim: int = 4):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(tokens, dim)), jnp.float32)
  item_vectors = jnp.asarray(rng.normal(size=(NUM_ITEMS, dim)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, NUM_ITEMS, tokens), jnp.int32)
  weights = jnp.asarray(np.arange(tokens) % 4 > 0, jnp.float32)
  return hidden, item_vectors, targets, weights


def train_data(counts) -> TrainData:
  item_ids = np.repeat(np.arange(1, len(counts) + 1), counts).astype(np.int32)
  counts = jnp.asarray(counts, jnp.float32)
  return TrainData(jnp.asarray(item_ids), counts, Tables({}, {}), jnp.zeros(0, jnp.int32))


def retrieval_loss(name: str, config):
  """`loss(hidden, item_vectors, targets, weights, data, key)`, which draws its own negatives."""

  def loss(hidden, item_vectors, targets, weights, data, key):
    compute = objective.make_retrieval_loss(name, config, data.item_counts.size)
    drawn = negatives.draw_negatives(name, config, targets, data, key)
    return compute(hidden, item_vectors, targets, weights, drawn)

  return loss


EVEN = np.full(NUM_ITEMS, 3)


@pytest.mark.parametrize(
  ('name', 'negatives', 'dtype'),
  [(name, 'uniform', 'float32') for name in LOSSES]
  + [('sampled_softmax', 'popularity', 'float32')]
  + [(name, 'uniform', 'bfloat16') for name in ('sampled_softmax', 'bce')],
)
def test_every_loss_is_a_finite_sum_over_the_tokens_with_weight(name, negatives, dtype):
  config = loss_config(name, negatives=negatives)
  hidden, item_vectors, targets, weights = loss_inputs()
  hidden, item_vectors = hidden.astype(dtype), item_vectors.astype(dtype)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def run(hidden, item_vectors):
    loss = retrieval_loss(config.name, config)
    return loss(hidden, item_vectors, targets, weights, train_data(EVEN), jax.random.key(0))

  value, (hidden_gradient, item_gradient) = run(hidden, item_vectors)
  assert value.shape == ()
  assert value.dtype == jnp.float32
  assert value > 0
  assert all(
    np.isfinite(x.astype(jnp.float32)).all() for x in (value, hidden_gradient, item_gradient)
  )
  moved = jnp.where(weights[:, None] > 0, hidden, 9)
  other, (moved_gradient, other_item_gradient) = run(moved, item_vectors)
  assert other == value
  np.testing.assert_array_equal(moved_gradient[weights == 0], 0)
  np.testing.assert_array_equal(other_item_gradient, item_gradient)


def item_gradients(config, data, target: int, num_keys: int) -> np.ndarray:
  """One token's gradients for each key, `[keys, num_items, dim]`: zero for items not read."""
  hidden, item_vectors, _, _ = loss_inputs(1)
  loss = retrieval_loss(config.name, config)

  def gradient(key):
    objective = lambda v: loss(hidden, v, jnp.array([target]), jnp.ones(1), data, key)
    return jax.grad(objective)(item_vectors[: len(data.item_counts)])

  return np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(1), num_keys)))


@pytest.mark.parametrize(('name', 'target'), [('bce', 0), ('bpr', 2), ('gbce', 4)])
def test_negatives_of_a_token_are_even_over_all_items_but_its_target(name, target):
  config = loss_config(name, num_negatives=1)
  gradients = item_gradients(config, train_data(EVEN[:5]), target, 4000)
  read = np.abs(gradients).sum(-1) > 0
  # The target and exactly one other: were that one the target, there would be one row only.
  np.testing.assert_array_equal(read.sum(1), 2)
  assert read[:, target].all()
  share = np.delete(read.mean(0), target)
  assert np.abs(share - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize(
  ('negatives', 'expected'), [('uniform', [0.2] * 5), ('popularity', [0.0, 0.1, 0.2, 0.3, 0.4])]
)
def test_shared_negatives_follow_their_distribution(negatives, expected):
  """The target is item 0, which training does not have: what else is read was drawn."""
  config = loss_config('sampled_softmax', num_negatives=1, negatives=negatives)
  gradients = item_gradients(config, train_data([0, 5, 10, 15, 20]), 0, 4000)
  read = np.abs(gradients).sum(-1) > 0
  share = read.mean(0)
  # Drawing the target leaves a sum over nothing else, whose gradient is zero.
  share[0] = 1 - read.any(1).mean()
  deviation = np.sqrt(np.array(expected) * (1 - np.array(expected)) / 4000)
  assert np.all(np.abs(share - expected) <= 4 * deviation)


@pytest.mark.parametrize('negatives', ['uniform', 'popularity'])
def test_sampled_softmax_with_many_negatives_is_near_softmax(negatives):
  hidden, item_vectors, targets, weights = loss_inputs()
  data = train_data(np.arange(1, NUM_ITEMS + 1))
  config = loss_config('sampled_softmax', num_negatives=30_000, negatives=negatives)
  sampled = jax.jit(retrieval_loss(config.name, config))(
    hidden, item_vectors, targets, weights, data, jax.random.key(0)
  )
  exact = catalogue_softmax.plain_softmax(hidden, item_vectors, targets, weights)
  np.testing.assert_allclose(sampled, exact, rtol=0.01)


@pytest.mark.parametrize('name', ['sampled_softmax', 'bce', 'bpr', 'gbce'])
def test_negatives_follow_the_key(name):
  loss = retrieval_loss(name, loss_config(name))
  run = lambda seed: loss(*loss_inputs(), train_data(EVEN), jax.random.key(seed))
  assert run(0) == run(0)
  assert run(0) != run(1)


@pytest.mark.parametrize('name', ['bce', 'sampled_softmax', 'softmax'])
def test_chunk_size_changes_no_loss(name):
  whole, parts = (
    retrieval_loss(name, loss_config(name, chunk_size=size))(
      *loss_inputs(), train_data(EVEN), jax.random.key(0)
    )
    for size in (1000, 2)
  )
  np.testing.assert_allclose(whole, parts, rtol=1e-6)


# --- The training step ---


@functools.cache
def make_batches(batch_size: int = 20) -> TrainBatches:
  return TrainBatches(
    training_part().lengths, max_length=MAX_LENGTH, batch_size=batch_size, crop='last', seed=0
  )


@functools.cache
def training_part() -> Dataset:
  """80 users who mostly go on to the item after; some trained on one item, some on many."""
  rng = np.random.default_rng(0)
  histories = []
  for length in rng.integers(3, 14, 80):
    steps_ahead = rng.choice([1, 1, 1, 2], length)
    histories.append((rng.integers(NUM_ITEMS) + np.cumsum(steps_ahead)) % NUM_ITEMS + 1)
  return make_dataset(histories, NUM_ITEMS).train_part()


def all_data() -> TrainData:
  train = training_part()
  counts = np.bincount(train.item_ids, minlength=NUM_ITEMS + 1)[1:].astype(np.float32)
  starts = preference_starts(train)
  return TrainData(*map(jnp.asarray, (train.item_ids, counts)), Tables({}, {}), jnp.asarray(starts))


class Lookup(nn.Module):
  """A model that compiles fast: a state is the embedding of the item it is at, partly dropped."""

  dropout: float

  def setup(self):
    init = nn.initializers.normal(1.0)
    self.item_embedding = self.param('item_embedding', init, (NUM_ITEMS + 1, 8))
    self.drop = Dropout(self.dropout)

  def encode(
    self, features, item_ids, segment_ids, preferences, *, deterministic: bool = True, lookup=None
  ):
    users = self.drop(self.item_embedding[item_ids], deterministic=deterministic)
    return Encoded({'sasrec': users}, {'sasrec': self.item_embedding[1:]})


class Trainer:
  """A training step as the program maps it, and what it is made of."""

  def __init__(self, model: nn.Module, loss: str = 'softmax', **optimizer):
    fields = {'name': 'sgd', 'learning_rate': 0.5, 'warmup_steps': 0, 'clip_norm': 0.0}
    config = default.get_config()
    config.update({'max_length': MAX_LENGTH, 'loss': loss_config(loss)})
    config.optimizer.update(fields | optimizer)
    self.model = model
    ((stage,), _) = stages.make_stages(config, NUM_ITEMS, lambda _: {'sasrec': {'anything': 0}})
    stage = dataclasses.replace(stage, model=model)
    labels = jax.tree.map(lambda _: 'sasrec', parameter_shapes(model, Tables({}, {})))
    numbers = stages.stage_numbers(stage, labels, steps_per_epoch=100, max_turns=1)
    self.numbers = jax.tree.map(jnp.asarray, numbers)
    self.tx = optimizers.create_optimizer(config.optimizer, labels)
    embeddings = ItemEmbeddings(config.optimizer.item_embeddings, NUM_ITEMS)
    self.step = train_step.make_train_step(self.tx, labels, stage, embeddings)
    self.mapped = devices.pmap(self.step, in_axes=(None, None, 0, None, None), donate_argnums=(0,))
    self.data = devices.replicate(all_data())
    self.initial = jax.device_get(self.create(seed=0))

  def create(self, seed: int) -> TrainState:
    return create_train_state(self.model, self.tx, seed, Tables({}, {}))

  def init(self, **changes) -> TrainState:
    """The state of seed 0 on the devices, with some fields changed."""
    return devices.replicate(self.initial.replace(**changes))

  def dispatch(self, state, plan: Plan, num_steps: int | None = None, capacity: int = CAPACITY):
    """Takes the first `num_steps` of `plan` `[steps, rows, slots]`; gives state and metrics."""
    count = len(plan.starts) if num_steps is None else num_steps
    padding = ((0, capacity - len(plan.starts)), (0, 0), (0, 0))
    plan = Plan(*(np.pad(x, padding) for x in plan))
    plan = devices.shard(devices.split(plan, axis=1))
    count, numbers = devices.replicate((np.int32(count), self.numbers))
    state, metrics = self.mapped(state, self.data, plan, count, numbers)
    return state, jax.device_get(metrics)


@functools.cache
def sgd() -> Trainer:
  """Everything that a golden number needs: no dropout, no sampling, no moments."""
  sasrec = SASRec(NUM_ITEMS, MAX_LENGTH, dim=8, num_blocks=1, num_heads=2, ffn_dim=8, dropout=0.0)
  return Trainer(UR4Rec(sasrec))


@functools.cache
def noisy() -> Trainer:
  """Dropout, sampled negatives and AdamW: every source of randomness, every kind of state."""
  return Trainer(Lookup(0.3), 'bce', name='adamw', learning_rate=0.01)


def first_steps(num_steps: int, start: int = 0) -> Plan:
  plan = make_batches().epoch(0)
  assert len(plan.starts) >= start + num_steps
  return Plan(*(x[start : start + num_steps] for x in plan))


def assert_trees_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_trees_close(one, other, atol: float):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), one, other)


def padded_reference(model, params, plan: Plan):
  """Loss and gradients of one batch in plain JAX: a user a row, no packing, plain softmax over the
  items that the user does not have.
  """
  item_ids = training_part().item_ids
  inputs, targets = [], []
  for start, length in zip(plan.starts.ravel(), plan.lengths.ravel(), strict=True):
    if length:
      gap = (MAX_LENGTH - length, 0)
      inputs.append(np.pad(item_ids[start : start + length], gap))
      targets.append(np.pad(item_ids[start + 1 : start + 1 + length], gap))
  left_out = np.zeros((len(inputs), MAX_LENGTH, NUM_ITEMS), bool)
  for user, (history, of_user) in enumerate(zip(inputs, targets, strict=True)):
    for token, target in enumerate(of_user):
      seen = set(history) - {0, target}
      left_out[user, token, [item - 1 for item in seen]] = True
  inputs, targets = jnp.array(inputs), jnp.array(targets)

  @jax.jit
  @jax.value_and_grad
  def objective(params):
    segments = (inputs > 0).astype(jnp.int32)
    encoded = model.apply({'params': params}, {}, inputs, segments, method='encode')
    hidden = encoded.users['sasrec'].reshape(-1, 8)
    weights = (targets > 0).astype(jnp.float32).reshape(-1)
    rows = jnp.maximum(targets - 1, 0).reshape(-1)
    logits = hidden @ encoded.items['sasrec'].T
    candidates = jnp.where(left_out.reshape(logits.shape), -jnp.inf, logits)
    target_logits = jnp.take_along_axis(logits, rows[:, None], axis=1)[:, 0]
    total = (weights * (jax.nn.logsumexp(candidates, axis=1) - target_logits)).sum()
    return total / (targets > 0).sum()

  return objective(params)


def golden_params():
  """Parameters by formula, so that no random generator has a say in the golden numbers."""
  model = sgd().model
  ones = jnp.ones((1, 1), jnp.int32)
  init = functools.partial(model.init, method='encode')
  shapes = jax.eval_shape(init, jax.random.key(0), {}, ones, ones)['params']
  leaves, structure = jax.tree.flatten(shapes)
  values = [
    (0.7 * np.cos(1.7 * np.arange(x.size) ** 1.5 + i)).reshape(x.shape).astype(np.float32)
    for i, x in enumerate(leaves)
  ]
  return structure.unflatten(values)


def golden_step():
  """One step of SGD on one batch of all users."""
  plan = make_batches(1000).epoch(0)
  assert len(plan.starts) == 1
  params = golden_params()
  return params, plan, *sgd().dispatch(sgd().init(params=params), plan)


def test_golden_step():
  """The numbers were printed by this test on CPU, while the next one, which works the step out
  plainly, passed. They move if the model, the batches, the loss or the update change meaning.
  """
  _, _, state, metrics = golden_step()
  params = state.params['sasrec']
  actual = {
    'loss': metrics['loss'][0],
    'grad_norm': metrics['grad_norm'][0],
    'item': params['item_embedding'][3, 0],
    'position': params['position_embedding'][0, 1],
    'query': params['blocks_0']['query_key_value']['kernel'][2, 3],
    'ffn_out': params['blocks_0']['ffn_out']['bias'][4],
    'final_norm': params['final_norm']['scale'][7],
  }
  expected = {
    'loss': 2.9748936,
    'grad_norm': 0.99167401,
    'item': 0.66967189,
    'position': -0.38320789,
    'query': -0.18782343,
    'ffn_out': -0.64929748,
    'final_norm': 0.63115346,
  }
  assert {k: float(v) for k, v in actual.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_step_equals_plain_gradient_descent_on_padded_rows():
  params, plan, state, metrics = golden_step()
  value, gradients = padded_reference(sgd().model, params, plan)
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients)
  np.testing.assert_allclose(metrics['loss'][0], value, rtol=1e-5)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
  np.testing.assert_allclose(metrics['grad_norm'][0], norm, rtol=1e-5)
  assert metrics['finite'][0]
  assert_trees_close(state.params, expected, atol=1e-5)


@functools.cache
def over_shares(dropout: float = 0.0):
  """The step mapped over any number of equal shares, without devices, from its first state."""
  trainer = Trainer(Lookup(dropout))
  mapped = jax.vmap(
    trainer.step, in_axes=(None, None, 0, None, None), out_axes=None, axis_name=devices.AXIS
  )
  return jax.jit(lambda plan: mapped(trainer.initial, all_data(), plan, 1, trainer.numbers))


def cut(plan: Plan, shares: int) -> Plan:
  return Plan(*(np.stack(np.split(x, shares, axis=1)) for x in plan))


def test_a_step_does_not_depend_on_how_rows_are_spread():
  plan = first_steps(1)
  whole, whole_metrics = over_shares()(cut(plan, 1))
  parts, metrics = over_shares()(cut(plan, 8))
  assert_trees_close(parts.params, whole.params, atol=1e-6)
  assert_trees_close(metrics, whole_metrics, atol=1e-5)


def test_a_batch_of_fewer_tokens_than_shares_counts_in_full():
  """The last batch of an epoch may hold one short user."""
  plan = Plan(*map(np.zeros_like, first_steps(1)))
  plan.lengths[0, 0, 0] = 2
  whole, whole_metrics = over_shares()(cut(plan, 1))
  parts, metrics = over_shares()(cut(plan, 8))
  np.testing.assert_allclose(metrics['loss'], whole_metrics['loss'], rtol=1e-5)
  assert_trees_close(parts.params, whole.params, atol=1e-6)


def test_shares_draw_their_own_dropout():
  """The same rows have another loss on another device."""
  plan = cut(first_steps(1), 2)
  left = plan._replace(lengths=plan.lengths * np.array([1, 0], np.int32).reshape(2, 1, 1, 1))
  right = Plan(*(x[::-1] for x in left))
  one, other = (over_shares(0.5)(x)[1]['loss'][0] for x in (left, right))
  assert not np.isclose(one, other, rtol=1e-5)
  assert one == over_shares(0.5)(left)[1]['loss'][0]


def test_steps_in_one_dispatch_equal_single_dispatches():
  plan = first_steps(CAPACITY)
  together, all_metrics = noisy().dispatch(noisy().init(), plan)
  for capacity in (CAPACITY, 1):
    state, metrics = noisy().init(), []
    for i in range(CAPACITY):
      state, one = noisy().dispatch(state, first_steps(1, i), capacity=capacity)
      metrics.append(jax.tree.map(lambda x: x[0], one))
    assert_trees_equal(state, together)
    assert_trees_equal(jax.tree.map(lambda *x: np.stack(x), *metrics), all_metrics)


def test_a_dispatch_takes_only_the_steps_it_is_told():
  plan = first_steps(CAPACITY)
  state, metrics = noisy().dispatch(noisy().init(), plan, num_steps=2)
  expected, first_two = noisy().dispatch(noisy().init(), first_steps(2))
  assert state.step == 2
  assert_trees_equal(state, expected)
  for name, values in metrics.items():
    np.testing.assert_array_equal(values[:2], first_two[name][:2])
    assert not values[2:].any()
  untouched, _ = noisy().dispatch(noisy().init(), plan, num_steps=0)
  assert_trees_equal(untouched, noisy().init())


def test_compiles_once_for_full_and_partial_dispatches_of_several_epochs():
  batches = make_batches()
  assert batches.steps_per_epoch % CAPACITY  # So that there are partial ones.
  state, _ = noisy().dispatch(noisy().init(), first_steps(CAPACITY))
  compiled = []

  def note(event: str, seconds: float, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    for epoch in range(3):
      plan = batches.epoch(epoch)
      for i in range(0, batches.steps_per_epoch, CAPACITY):
        state, _ = noisy().dispatch(state, Plan(*(x[i : i + CAPACITY] for x in plan)))
    assert compiled == []
    jax.jit(lambda x: x * 3 + len(compiled))(jnp.ones(7))  # A new program is noticed.
    assert compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert state.step == CAPACITY + 3 * batches.steps_per_epoch


def test_state_is_donated():
  before = noisy().init()
  after, _ = noisy().dispatch(before, first_steps(1))
  assert all(x.is_deleted() for x in jax.tree.leaves(before))
  assert not any(x.is_deleted() for x in jax.tree.leaves((after, noisy().data)))


def test_same_seed_same_parameters():
  plan = first_steps(CAPACITY)
  first, again, other = (
    noisy().dispatch(devices.replicate(noisy().create(seed)), plan) for seed in (0, 0, 1)
  )
  assert_trees_equal(first, again)
  differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), first[0].params, other[0].params)
  assert all(jax.tree.leaves(differs))


def test_randomness_comes_from_the_root_key_and_the_step():
  plan = first_steps(1)

  def loss_at(**changes):
    before = noisy().initial.replace(**changes)
    state, metrics = noisy().dispatch(noisy().init(**changes), plan)
    assert state.step == before.step + 1
    np.testing.assert_array_equal(state.root_key, before.root_key)
    return float(metrics['loss'][0])

  other_key = np.asarray(jax.random.key_data(jax.random.key(9)))
  values = [loss_at(), loss_at(step=np.int32(1)), loss_at(root_key=other_key)]
  assert len(set(values)) == 3
  assert loss_at() == values[0]


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_steps_that_are_not_finite_are_told_from_those_before(value):
  """Only the second step reads the oldest position, and it spoils the parameters."""
  params = sgd().initial.params['sasrec']
  positions = params['position_embedding'].copy()
  positions[MAX_LENGTH - 1] = value
  plan = Plan(*map(np.copy, first_steps(CAPACITY)))
  plan.lengths[[0, 2]] = np.minimum(plan.lengths[[0, 2]], MAX_LENGTH - 1)
  assert (plan.lengths[1] == MAX_LENGTH).any()
  state = sgd().init(params={'sasrec': params | {'position_embedding': positions}})
  _, metrics = sgd().dispatch(state, plan)
  np.testing.assert_array_equal(metrics['finite'], [True, False, False])
  np.testing.assert_array_equal(np.isfinite(metrics['loss']), [True, False, False])


def test_training_lowers_the_loss():
  batches, state, means = make_batches(), sgd().init(), []
  for epoch in range(12):
    plan, values = batches.epoch(epoch), []
    for i in range(0, batches.steps_per_epoch, CAPACITY):
      part = Plan(*(x[i : i + CAPACITY] for x in plan))
      state, metrics = sgd().dispatch(state, part)
      assert metrics['finite'][: len(part.starts)].all()
      values += metrics['loss'][: len(part.starts)].tolist()
    means.append(np.mean(values))
  # At first all candidates are equal. They are all items but those that the user has.
  assert np.log(NUM_ITEMS - MAX_LENGTH) - 0.1 < means[0] < np.log(NUM_ITEMS)
  assert means[-1] < 0.7 * means[0]


# --- Steps on the items that they read alone ---


@functools.cache
def on_rows(item_rows: str, loss: str, name: str) -> Trainer:
  """SGD or AdamW, without dropout, on all rows of the item table or those that a step reads."""
  sasrec = SASRec(NUM_ITEMS, MAX_LENGTH, dim=8, num_blocks=1, num_heads=2, ffn_dim=8, dropout=0.0)
  rate = 0.5 if name == 'sgd' else 0.01
  return Trainer(
    UR4Rec(sasrec), loss, name=name, learning_rate=rate, clip_norm=0.1, item_embeddings=item_rows
  )


def few_users(num_steps: int) -> Plan:
  """Steps of one short history each, so that most items are not read."""
  plan = make_batches().epoch(0)
  lengths = np.zeros_like(plan.lengths[:num_steps])
  lengths[:, 0, 0] = 3
  return Plan(*(x[:num_steps] for x in plan))._replace(lengths=lengths)


@pytest.mark.parametrize('loss', ['sampled_softmax', *slow('bce')])
def test_a_step_on_the_rows_it_reads_is_the_step_on_all(loss):
  """Without moments, rows of zero gradient stay as they are in either."""
  every, touched = (
    trainer.dispatch(trainer.init(), first_steps(3))
    for trainer in (on_rows(rows, loss, 'sgd') for rows in ('all', 'touched'))
  )
  assert_trees_close(every[0].params, touched[0].params, 1e-6)
  np.testing.assert_allclose(every[1]['loss'], touched[1]['loss'], rtol=1e-6)
  np.testing.assert_allclose(every[1]['grad_norm'], touched[1]['grad_norm'], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('loss', 'shares'),
  [('sampled_softmax', 3), ('sampled_softmax', 8), ('bce', 3), ('bce', 8)],
)
def test_rows_that_their_owners_update_are_those_of_whole_tables(loss, shares, monkeypatch):
  """Tables of ids alone, with AdamW, whose moments only the rows that are read may change."""
  monkeypatch.setattr(item_embeddings, 'device_count', lambda: shares)
  monkeypatch.setattr(devices, 'device_count', lambda: shares)
  plan = devices.deal(first_steps(2))
  found = {}
  for policy in ('touched', 'sharded'):
    trainer = on_rows(policy, loss, 'adamw')
    embeddings = ItemEmbeddings(policy, NUM_ITEMS)
    state = embeddings.pad(trainer.initial)
    axes = embeddings.axes(state)
    cut_rows = lambda axis, x: x if axis is None else x.reshape(shares, -1, *x.shape[1:])
    join_rows = lambda axis, x: x if axis is None else x.reshape(-1, *x.shape[2:])
    by_axis = functools.partial(jax.tree.map, is_leaf=lambda x: x is None)
    step = jax.vmap(trainer.step, (axes, None, 0, None, None), (axes, None), axis_name=devices.AXIS)
    new, metrics = jax.jit(step)(
      by_axis(cut_rows, axes, state), all_data(), plan, 2, trainer.numbers
    )
    new = embeddings.unpad(by_axis(join_rows, axes, new))
    found[policy] = {
      jax.tree_util.keystr(path): x
      for path, x in jax.tree_util.tree_leaves_with_path((new.params, new.opt_state, metrics))
    }
  # The bias of the keys has no gradient but rounding errors, which Adam scales up.
  found = {
    policy: {name: x for name, x in arrays.items() if "['query_key_value']['bias']" not in name}
    for policy, arrays in found.items()
  }
  assert any('item_embedding' in name for name in found['sharded'])
  assert_trees_close(found['sharded'], found['touched'], 1e-4)


def test_rows_that_a_step_does_not_read_keep_parameters_and_moments():
  every, touched = on_rows('all', 'bce', 'adamw'), on_rows('touched', 'bce', 'adamw')
  tables = lambda state: [
    np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    if 'item_embedding' in jax.tree_util.keystr(path)
  ]
  plan = few_users(2)
  first = Plan(*(x[:1] for x in plan))
  after_first = touched.dispatch(touched.init(), first)[0]
  # The bias of the keys has no gradient but rounding errors, which Adam scales up.
  assert_trees_close(after_first.params, every.dispatch(every.init(), first)[0].params, 1e-4)
  after_both = touched.dispatch(touched.init(), plan)[0]
  initial, once, twice = tables(touched.initial), tables(after_first), tables(after_both)
  assert len(once) == 3  # The parameter and its two moments.
  moved_first = (once[0] != initial[0]).any(1)
  moved_then = (twice[0] != once[0]).any(1)
  assert 3 < moved_first.sum() < NUM_ITEMS
  assert (moved_first & ~moved_then).any()
  for before, after in zip(once, twice, strict=True):
    np.testing.assert_array_equal(before[~moved_then], after[~moved_then])
  # Where all rows move, the moments of the first step go on to act.
  with_all = tables(every.dispatch(every.init(), plan)[0])
  kept = moved_first & ~moved_then
  assert (with_all[0][kept] != twice[0][kept]).any()

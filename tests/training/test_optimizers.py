import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from ur4rec_jax.data.features import Tables, TokenTable
from ur4rec_jax.models.sasrec import SASRec
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.training import optimizers
from ur4rec_jax.training.train_state import parameter_shapes


def make_config(**fields):
  config = default.get_config().optimizer
  config.update({'learning_rate': 0.5, 'warmup_steps': 0, 'clip_norm': 0.0} | fields)
  return config


def rate_at(config, step: int, total_steps: int):
  is_cosine = config.schedule == 'cosine'
  rate = optimizers.RateSchedule(config.learning_rate, config.warmup_steps, total_steps, is_cosine)
  return optimizers.learning_rate_at(step, rate)


def take_steps(config, params, gradients, total_steps: int = 10):
  """Parameters after one step for each of `gradients`."""
  tx = optimizers.create_optimizer(config, jax.tree.map(lambda _: 'sasrec', params))
  opt_state = tx.init(params)
  trajectory = []
  for step, gradient in enumerate(gradients):
    rate = rate_at(config, step, total_steps)
    updates, opt_state = tx.update(
      gradient, opt_state, params, learning_rate=rate, active={'sasrec': True}
    )
    params = optax.apply_updates(params, updates)
    trajectory.append(params)
  return trajectory


@pytest.mark.parametrize(
  ('schedule', 'warmup', 'expected'),
  [
    # Of step: rate, at a learning rate of 2 and 20 steps in all.
    ('constant', 0, {0: 2.0, 1: 2.0, 19: 2.0, 500: 2.0}),
    ('constant', 4, {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0, 500: 2.0}),
    ('cosine', 0, {0: 2.0, 5: 1 + np.sqrt(0.5), 10: 1.0, 15: 1 - np.sqrt(0.5), 20: 0.0, 25: 0.0}),
    ('cosine', 4, {0: 0.5, 3: 2.0, 4: 2.0, 8: 1 + np.sqrt(0.5), 12: 1.0, 20: 0.0}),
    ('cosine', 20, {0: 0.1, 19: 2.0}),
    ('cosine', 30, {14: 1.0, 19: 4 / 3}),
  ],
)
def test_schedule_at_chosen_steps(schedule, warmup, expected):
  config = make_config(learning_rate=2.0, schedule=schedule, warmup_steps=warmup)
  rates = {step: float(rate_at(config, step, 20)) for step in expected}
  assert rates == pytest.approx(expected, abs=1e-6)


def test_decay_leaves_out_biases_scales_and_embeddings():
  model = SASRec(9, 4, dim=4, num_blocks=1, ffn_dim=4)
  states = lambda model, ids: model.encode_users(model.encode_items(), ids, ids)
  init = functools.partial(model.init, method=states)
  params = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 1), jnp.int32))['params']
  names = optimizers.by_name(optimizers.decay_mask(params))
  assert {name for name, decays in names.items() if decays} == {
    f'blocks_0/{layer}/kernel'
    for layer in ('query_key_value', 'attention_out', 'ffn_in', 'ffn_out')
  }
  assert {name.split('/')[-1] for name, decays in names.items() if not decays} == {
    'bias',
    'scale',
    'item_embedding',
    'position_embedding',
  }


def test_decay_leaves_out_temperatures_loss_weights_and_learned_tokens():
  config = default.get_config('paper')
  config.loss.weighting, config.fusion.kind, config.loss.weights.fused = 'uncertainty', 'learned', 1
  table = TokenTable(np.zeros((6, 2, 4), np.float32), np.ones((6, 2), bool))
  tables = Tables({'text': table}, {'text': table})
  mask = optimizers.decay_mask(parameter_shapes(create_model(config, 5), tables))
  names = optimizers.by_name(mask)
  assert {'log_temperature', 'retriever/user_tower/proxies', 'fusion/log_weights'} <= names.keys()
  assert {name.split('/')[-1] for name, decays in names.items() if decays} == {'kernel'}


def test_weight_decay_shrinks_only_what_it_is_for():
  params = {'dense': {'kernel': jnp.array([3.0]), 'bias': jnp.array([3.0])}}
  config = make_config(weight_decay=0.1)
  (after,) = take_steps(config, params, [jax.tree.map(jnp.zeros_like, params)])
  np.testing.assert_allclose(after['dense']['kernel'], 3.0 * (1 - 0.5 * 0.1), rtol=1e-6)
  np.testing.assert_array_equal(after['dense']['bias'], 3.0)


def test_adamw_equals_its_formula():
  config = make_config(b1=0.8, b2=0.9, weight_decay=0.2, learning_rate=0.01, warmup_steps=2)
  gradients = [np.array([1.0, -2.0]), np.array([0.5, 3.0]), np.array([-4.0, 0.1])]
  params, mean, square = np.array([1.0, -1.0]), np.zeros(2), np.zeros(2)
  expected = []
  for step, gradient in enumerate(gradients):
    mean = 0.8 * mean + 0.2 * gradient
    square = 0.9 * square + 0.1 * gradient**2
    direction = mean / (1 - 0.8 ** (step + 1)) / (np.sqrt(square / (1 - 0.9 ** (step + 1))) + 1e-8)
    params = params - 0.01 * min(1, (step + 1) / 2) * (direction + 0.2 * params)
    expected.append(params)
  trajectory = take_steps(
    config, {'kernel': jnp.array([1.0, -1.0])}, [{'kernel': jnp.asarray(g)} for g in gradients]
  )
  for actual, wanted in zip(trajectory, expected, strict=True):
    np.testing.assert_allclose(actual['kernel'], wanted, rtol=1e-5)


def test_sgd_is_the_gradient_times_the_rate():
  """No momentum and no weight decay: a step does not depend on those before."""
  config = make_config(name='sgd', weight_decay=0.3, warmup_steps=2)
  params = {'kernel': jnp.array([1.0, 2.0])}
  gradient = {'kernel': jnp.array([4.0, -8.0])}
  first, second, third = take_steps(config, params, [gradient] * 3)
  np.testing.assert_allclose(first['kernel'], [0.0, 4.0], rtol=1e-6)  # Half of the rate.
  np.testing.assert_allclose(second['kernel'], [-2.0, 8.0], rtol=1e-6)
  np.testing.assert_allclose(third['kernel'], [-4.0, 12.0], rtol=1e-6)


@pytest.mark.parametrize(
  ('clip_norm', 'factor'), [(0.0, 1.0), (1.0, 1 / 13), (6.5, 0.5), (14.0, 1.0)]
)
def test_clipping_bounds_the_norm_over_all_parameters(clip_norm, factor):
  """The gradient's norm is 13 over both parameters together."""
  gradient = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([[12.0]])}
  params = jax.tree.map(jnp.zeros_like, gradient)
  config = make_config(name='sgd', clip_norm=clip_norm)
  (after,) = take_steps(config, params, [gradient])
  np.testing.assert_allclose(after['a'], -0.5 * factor * gradient['a'], rtol=1e-6)
  np.testing.assert_allclose(after['b'], -0.5 * factor * gradient['b'], rtol=1e-6)


def test_clipping_comes_before_the_moments_of_adamw():
  """AdamW hides the scale of a constant gradient, but not that one step's was cut."""
  params = {'kernel': jnp.array([0.0])}
  gradients = [{'kernel': jnp.array([g])} for g in (1000.0, 1.0)]
  cut = [{'kernel': jnp.array([1.0])}] * 2
  clipped = take_steps(make_config(clip_norm=1.0), params, gradients)[-1]
  expected = take_steps(make_config(clip_norm=0.0), params, cut)[-1]
  unclipped = take_steps(make_config(clip_norm=0.0), params, gradients)[-1]
  np.testing.assert_allclose(clipped['kernel'], expected['kernel'], rtol=1e-6)
  assert abs(clipped['kernel'] - unclipped['kernel']) > 0.1


def two_groups(**fields):
  """An optimizer of two groups, their parameters, its state after a step of both, and gradients."""
  params = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([[1.0]]), 'c': jnp.array([2.0])}
  labels = {'a': 'sasrec', 'b': 'fusion', 'c': 'sasrec'}
  tx = optimizers.create_optimizer(make_config(**fields), labels)
  gradients = {'a': jnp.array([3.0, 0.0]), 'b': jnp.array([[12.0]]), 'c': jnp.array([4.0])}

  @jax.jit
  def step(params, opt_state, active):
    updates, opt_state = tx.update(
      gradients, opt_state, params, learning_rate=jnp.float32(0.1), active=active
    )
    return optax.apply_updates(params, updates), opt_state

  both = {'sasrec': True, 'fusion': True}
  return step, *step(params, tx.init(params), both)


@pytest.mark.parametrize('frozen', ['sasrec', 'fusion'])
def test_a_group_that_is_not_active_keeps_parameters_moments_and_counts(frozen):
  step, params, opt_state = two_groups(weight_decay=0.1, clip_norm=1.0)
  active = {'sasrec': frozen != 'sasrec', 'fusion': frozen != 'fusion'}
  after, state_after = step(params, opt_state, active)
  for name, label in {'a': 'sasrec', 'b': 'fusion', 'c': 'sasrec'}.items():
    assert np.array_equal(after[name], params[name]) == (label == frozen), name
  for label in ('sasrec', 'fusion'):
    before, now = (jax.tree.leaves(s.inner_states[label]) for s in (opt_state, state_after))
    same = [np.array_equal(x, y) for x, y in zip(before, now, strict=True)]
    assert all(same) if label == frozen else not any(same)
  assert jax.tree.structure(state_after) == jax.tree.structure(opt_state)


def test_a_group_goes_on_from_its_moments_as_if_it_had_never_been_frozen():
  step, params, opt_state = two_groups()
  only = {'sasrec': False, 'fusion': True}
  both = {'sasrec': True, 'fusion': True}
  waited = step(*step(params, opt_state, only), both)[0]
  at_once = step(params, opt_state, both)[0]
  np.testing.assert_array_equal(waited['a'], at_once['a'])
  np.testing.assert_array_equal(waited['c'], at_once['c'])


def test_each_group_is_clipped_by_its_own_norm_and_has_its_own_rate():
  """The gradient's norm is 5 in one group and 12 in the other."""
  params = {'a': jnp.zeros(2), 'b': jnp.zeros(1)}
  config = make_config(name='sgd', clip_norm=6.0)
  config.learning_rate_scales.fusion = 0.5
  tx = optimizers.create_optimizer(config, {'a': 'sasrec', 'b': 'fusion-1'})
  gradients = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([12.0])}
  updates, _ = tx.update(
    gradients,
    tx.init(params),
    params,
    learning_rate=0.1,
    active={'sasrec': True, 'fusion-1': True},
  )
  np.testing.assert_allclose(updates['a'], [-0.3, -0.4], rtol=1e-6)
  np.testing.assert_allclose(updates['b'], [-0.1 * 0.5 * 6], rtol=1e-6)


@pytest.mark.parametrize(
  ('name', 'group'),
  [
    ('sasrec/content/text_in/kernel', 'sasrec'),
    ('retriever/user_tower/position_embedding', 'user_tower'),
    ('retriever/log_temperature', 'user_tower'),
    ('retriever/content/text_in/kernel', 'content_tower'),
    ('retriever/item_embedding', 'content_tower'),
    ('fusion/log_weights', 'fusion'),
    ('log_temperature', 'loss'),
    ('log_variance_sasrec', 'loss'),
  ],
)
def test_groups_by_path(name, group):
  assert optimizers.group_of(name) == group


def test_a_parameter_without_a_group_is_an_error():
  with pytest.raises(ValueError, match='tower/kernel belongs to no group'):
    optimizers.group_of('tower/kernel')

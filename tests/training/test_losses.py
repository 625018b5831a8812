import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from ur4rec_jax.sharding.devices import AXIS
from ur4rec_jax.training import catalogue_softmax, losses

TOKENS, DIM, NUM_ITEMS, NEGATIVES = 13, 6, 17, 4


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def logits(seed: int = 0):
  """Positive `[tokens]` and negative `[tokens, negatives]` logits, and weights with zeros."""
  rng = np.random.default_rng(seed)
  weights = (rng.random(TOKENS) < 0.7).astype(float)
  return 2 * rng.normal(size=TOKENS), 2 * rng.normal(size=(TOKENS, NEGATIVES)), weights


def catalogue_inputs(scale: float = 1.0, dtype=jnp.float32):
  rng = np.random.default_rng(1)
  hidden = jnp.asarray(scale * rng.normal(size=(TOKENS, DIM)), dtype)
  item_vectors = jnp.asarray(rng.normal(size=(NUM_ITEMS, DIM)), dtype)
  targets = jnp.asarray(rng.integers(0, NUM_ITEMS, TOKENS), jnp.int32)
  weights = jnp.asarray(rng.random(TOKENS) < 0.7, jnp.float32)
  return hidden, item_vectors, targets, weights


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(loss, hidden, item_vectors, *rest):
  return jax.value_and_grad(loss, (0, 1))(hidden, item_vectors, *rest)


@functools.cache
def softmax_in_chunks(chunk_size: int):
  return functools.partial(catalogue_softmax.softmax, chunk_size=chunk_size)


def test_bpr_equals_its_formula():
  positive, negative, weights = logits()
  expected = 0.0
  for p, n, w in zip(positive, negative, weights, strict=True):
    expected += w * np.mean([-np.log(sigmoid(p - x)) for x in n])
  np.testing.assert_allclose(losses.bpr(positive, negative, weights), expected, rtol=1e-5)


def test_bce_equals_its_formula():
  positive, negative, weights = logits()
  expected = 0.0
  for p, n, w in zip(positive, negative, weights, strict=True):
    expected -= w * (np.log(sigmoid(p)) + np.mean([np.log(1 - sigmoid(x)) for x in n]))
  np.testing.assert_allclose(losses.bce(positive, negative, weights), expected, rtol=1e-5)


@pytest.mark.parametrize('calibration', [0.0, 0.3, 0.75, 1.0])
def test_gbce_equals_its_formula(calibration):
  """Beta is written as in the paper (eq. 15): alpha (t (1 - 1/alpha) + 1/alpha)."""
  positive, negative, weights = logits()
  alpha = NEGATIVES / (NUM_ITEMS - 1)
  beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
  expected = 0.0
  for p, n, w in zip(positive, negative, weights, strict=True):
    expected -= w * (np.log(sigmoid(p) ** beta) + np.sum([np.log(1 - sigmoid(x)) for x in n]))
  actual = losses.gbce(positive, negative, weights, NUM_ITEMS, calibration)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_gbce_without_calibration_is_bce_over_summed_negatives():
  positive, negative, weights = logits()
  none = np.zeros(TOKENS)
  # bce averages: what it adds for the negatives counts once for each of them.
  negatives_only = losses.bce(np.full(TOKENS, 1e4), negative, weights)
  expected = losses.bce(positive, negative, weights) + (NEGATIVES - 1) * negatives_only
  actual = losses.gbce(positive, negative, weights, NUM_ITEMS, 0.0)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  assert losses.gbce(positive, negative, none, NUM_ITEMS, 0.0) == 0


def test_fully_calibrated_gbce_weighs_the_target_by_the_sampling_rate():
  positive, _, weights = logits()
  hopeless = np.full((TOKENS, NEGATIVES), -1e4)  # Negatives that add nothing.
  actual = losses.gbce(positive, hopeless, weights, NUM_ITEMS, 1.0)
  expected = -NEGATIVES / (NUM_ITEMS - 1) * (weights * np.log(sigmoid(positive))).sum()
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_sampled_softmax_equals_its_formula():
  positive, negative, weights = logits()
  rng = np.random.default_rng(3)
  expected_count = rng.uniform(0.1, 3, NEGATIVES)
  is_target = rng.random((TOKENS, NEGATIVES)) < 0.3
  assert is_target.any()
  expected = 0.0
  for p, n, w, leave_out in zip(positive, negative, weights, is_target, strict=True):
    rivals = sum(
      np.exp(x) / c for x, c, out in zip(n, expected_count, leave_out, strict=True) if not out
    )
    expected -= w * np.log(np.exp(p) / (np.exp(p) + rivals))
  actual = losses.sampled_softmax(positive, negative, weights, np.log(expected_count), is_target)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def sampled_over(negatives, expected_count):
  """Sampled softmax with given shared negatives, as a function of what `softmax` takes."""

  def loss(hidden, item_vectors, targets, weights):
    positive = (hidden * item_vectors[targets]).sum(-1)
    negative = hidden @ item_vectors[negatives].T
    is_target = targets[:, None] == negatives
    return losses.sampled_softmax(positive, negative, weights, jnp.log(expected_count), is_target)

  return loss


def test_sampled_softmax_over_every_item_once_is_the_full_softmax():
  inputs = catalogue_inputs()
  everything = sampled_over(jnp.arange(NUM_ITEMS), jnp.ones(NUM_ITEMS))
  value, gradients = value_and_gradients(everything, *inputs)
  expected, expected_gradients = value_and_gradients(catalogue_softmax.plain_softmax, *inputs)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for actual, wanted in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-5)


@pytest.mark.parametrize('drawn_by', ['uniform', 'popularity'])
def test_partition_sum_of_sampled_softmax_is_unbiased(drawn_by):
  """Its mean over many draws of few negatives is the sum over the catalogue."""
  hidden, item_vectors, targets, _ = catalogue_inputs()
  hidden, targets = hidden[:1], targets[:1]
  draws, negatives = 20_000, 3
  popularity = np.arange(1, NUM_ITEMS + 1) ** 1.5
  probability = np.ones(NUM_ITEMS) if drawn_by == 'uniform' else popularity
  probability = jnp.asarray(probability / probability.sum(), jnp.float32)
  drawn = jax.random.choice(jax.random.key(0), NUM_ITEMS, (draws, negatives), p=probability)

  @jax.jit
  @jax.vmap
  def partition_sum(drawn):
    loss = sampled_over(drawn, negatives * probability[drawn])
    # The loss is log(sum) - positive.
    return jnp.exp(loss(hidden, item_vectors, targets, jnp.ones(1)) + positive)

  positive = (hidden @ item_vectors[targets[0]])[0]
  sums = np.asarray(partition_sum(drawn), np.float64)
  expected = np.exp(np.asarray(hidden @ item_vectors.T, np.float64)).sum()
  error = sums.std() / np.sqrt(draws)
  assert error < 0.03 * expected
  assert abs(sums.mean() - expected) < 4 * error


def test_sampled_softmax_with_many_negatives_is_near_the_full_softmax():
  inputs = catalogue_inputs()
  many = 40_000
  drawn = jax.random.randint(jax.random.key(2), (many,), 0, NUM_ITEMS)
  loss = sampled_over(drawn, jnp.full(many, many / NUM_ITEMS))
  value, gradients = value_and_gradients(loss, *inputs)
  expected, expected_gradients = value_and_gradients(catalogue_softmax.plain_softmax, *inputs)
  np.testing.assert_allclose(value, expected, rtol=0.01)
  for actual, wanted in zip(gradients, expected_gradients, strict=True):
    assert np.linalg.norm(actual - wanted) < 0.03 * np.linalg.norm(wanted)


def test_sampled_softmax_is_zero_and_smooth_where_every_negative_is_the_target():
  hidden, item_vectors, _, _ = catalogue_inputs()
  targets = jnp.full(TOKENS, 5, jnp.int32)
  loss = sampled_over(jnp.array([5, 5]), jnp.ones(2))
  value, gradients = value_and_gradients(loss, hidden, item_vectors, targets, jnp.ones(TOKENS))
  np.testing.assert_allclose(value, 0, atol=1e-5)
  for gradient in gradients:
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize('name', ['bpr', 'bce', 'gbce', 'sampled_softmax'])
def test_sampled_losses_have_the_gradients_of_finite_differences(name):
  with jax.enable_x64(True):
    positive, negative, weights = map(jnp.asarray, logits())
    is_target = jnp.zeros((TOKENS, NEGATIVES), bool).at[:, 1].set(True)
    loss = {
      'bpr': losses.bpr,
      'bce': losses.bce,
      'gbce': lambda *x: losses.gbce(*x, NUM_ITEMS, 0.6),
      'sampled_softmax': lambda *x: losses.sampled_softmax(
        *x, jnp.log(jnp.arange(1.0, NEGATIVES + 1)), is_target
      ),
    }[name]
    check_grads(
      lambda p, n: loss(p, n, weights), (positive, negative), 1, ['rev'], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize('name', ['bpr', 'bce', 'gbce', 'sampled_softmax'])
def test_sampled_losses_stay_finite_for_large_logits(name):
  positive = jnp.array([1e3, -1e3, 1e3, -1e3])
  negative = jnp.array([[1e3, -1e3], [1e3, -1e3], [-1e3, -1e3], [-1e3, -1e3]])
  weights = jnp.ones(4)
  loss = {
    'bpr': losses.bpr,
    'bce': losses.bce,
    'gbce': lambda *x: losses.gbce(*x, NUM_ITEMS, 0.75),
    'sampled_softmax': lambda *x: losses.sampled_softmax(*x, jnp.zeros(2), jnp.zeros((4, 2), bool)),
  }[name]
  value, gradients = jax.value_and_grad(loss, (0, 1))(positive, negative, weights)
  assert all(np.isfinite(x).all() for x in (value, *gradients))


def test_plain_softmax_equals_its_formula():
  hidden, item_vectors, targets, weights = catalogue_inputs()
  expected = 0.0
  for h, t, w in zip(*map(np.asarray, (hidden, targets, weights)), strict=True):
    scores = np.asarray(item_vectors, np.float64) @ h
    expected -= w * np.log(np.exp(scores[t]) / np.exp(scores).sum())
  actual = catalogue_softmax.plain_softmax(hidden, item_vectors, targets, weights)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_plain_softmax_has_the_gradients_of_finite_differences():
  """In float32, as its logits are: hence the wide step and tolerance."""
  hidden, item_vectors, targets, weights = catalogue_inputs()
  loss = lambda h, v: catalogue_softmax.plain_softmax(h, v, targets, weights)
  check_grads(loss, (hidden, item_vectors), 1, ['rev'], atol=2e-2, rtol=2e-2, eps=1e-2)


@pytest.mark.parametrize('chunk_size', [3, TOKENS, 100])
def test_softmax_over_devices_equals_plain_softmax(chunk_size):
  """`vmap` stands for devices; the last has rows of no items, the first row is none either."""
  num_devices = 3
  hidden, item_vectors, targets, weights = catalogue_inputs()
  hidden, targets, weights = (jnp.stack([x, x[::-1], x]) for x in (hidden, targets, weights))
  flat = hidden.reshape(-1, hidden.shape[-1]), item_vectors, targets.ravel(), weights.ravel()
  expected, expected_gradients = value_and_gradients(catalogue_softmax.plain_softmax, *flat)
  rows = jnp.concatenate([jnp.full((1, item_vectors.shape[1]), 9.0), item_vectors])
  rows = jnp.pad(rows, ((0, -len(rows) % num_devices + num_devices), (0, 0)), constant_values=9.0)
  rows = rows.reshape(num_devices, -1, rows.shape[1])

  def of_device(hidden, rows, target_ids, weights):
    loss = lambda h, v: catalogue_softmax.softmax_over_devices(
      h, v, target_ids, weights, NUM_ITEMS, chunk_size
    )
    return jax.value_and_grad(loss, (0, 1))(hidden, rows)

  mapped = jax.jit(jax.vmap(of_device, axis_name=AXIS))
  values, (of_hidden, of_rows) = mapped(hidden, rows, targets + 1, weights)
  np.testing.assert_allclose(values.sum(), expected, rtol=1e-5)
  np.testing.assert_allclose(of_hidden.reshape(flat[0].shape), expected_gradients[0], atol=1e-5)
  of_rows = of_rows.reshape(-1, rows.shape[2])
  np.testing.assert_allclose(of_rows[1 : NUM_ITEMS + 1], expected_gradients[1], atol=1e-5)
  np.testing.assert_array_equal(of_rows[0], 0)
  np.testing.assert_array_equal(of_rows[NUM_ITEMS + 1 :], 0)


@pytest.mark.parametrize('chunk_size', [1, 4, 5, TOKENS, 100])
def test_softmax_equals_plain_softmax(chunk_size):
  inputs = catalogue_inputs()
  value, gradients = value_and_gradients(softmax_in_chunks(chunk_size), *inputs)
  expected, expected_gradients = value_and_gradients(catalogue_softmax.plain_softmax, *inputs)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for actual, wanted in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_softmax_carries_the_cotangent(dtype):
  """Its gradients are formed before the cotangent is known."""
  inputs = catalogue_inputs(dtype=dtype)
  tolerance = 1e-5 if dtype == jnp.float32 else 0.05
  softmax = softmax_in_chunks(5)
  objective = lambda loss: lambda *args: jnp.tanh(loss(*args) / 50) * -70
  value, gradients = value_and_gradients(objective(softmax), *inputs)
  expected, expected_gradients = value_and_gradients(
    objective(catalogue_softmax.plain_softmax), *inputs
  )
  np.testing.assert_allclose(value, expected, rtol=tolerance)
  for actual, wanted in zip(gradients, expected_gradients, strict=True):
    assert actual.dtype == dtype
    difference = np.abs(np.asarray(actual, np.float32) - np.asarray(wanted, np.float32))
    assert difference.max() <= tolerance * max(1, np.abs(np.asarray(wanted, np.float32)).max())


def test_softmax_in_bfloat16_is_near_float32():
  hidden, item_vectors, targets, weights = catalogue_inputs(dtype=jnp.bfloat16)
  exact = [hidden.astype(jnp.float32), item_vectors.astype(jnp.float32), targets, weights]
  softmax = softmax_in_chunks(5)
  value, gradients = value_and_gradients(softmax, hidden, item_vectors, targets, weights)
  expected, expected_gradients = value_and_gradients(catalogue_softmax.plain_softmax, *exact)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=0.01)
  for actual, wanted in zip(gradients, expected_gradients, strict=True):
    difference = np.linalg.norm(np.asarray(actual, np.float32) - wanted)
    assert difference < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize('scale', [1e3, -1e3])
def test_softmax_with_large_logits_equals_plain_softmax(scale):
  inputs = catalogue_inputs(scale)
  softmax = softmax_in_chunks(4)
  value, gradients = value_and_gradients(softmax, *inputs)
  expected, expected_gradients = value_and_gradients(catalogue_softmax.plain_softmax, *inputs)
  assert np.abs(inputs[0] @ inputs[1].T).max() > 1e3
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for actual, wanted in zip(gradients, expected_gradients, strict=True):
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize('chunk_size', [4, 100])
def test_softmax_ignores_tokens_without_weight(chunk_size):
  hidden, item_vectors, targets, weights = catalogue_inputs()
  softmax = softmax_in_chunks(chunk_size)
  kept = weights > 0
  value, gradients = value_and_gradients(softmax, hidden, item_vectors, targets, weights)
  expected, expected_gradients = value_and_gradients(
    softmax, hidden[kept], item_vectors, targets[kept], weights[kept]
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_array_equal(gradients[0][~kept], 0)
  np.testing.assert_allclose(gradients[0][kept], expected_gradients[0], atol=1e-5)
  np.testing.assert_allclose(gradients[1], expected_gradients[1], atol=1e-5)
  nothing, gradients = value_and_gradients(
    softmax, hidden, item_vectors, targets, jnp.zeros(TOKENS)
  )
  assert nothing == 0
  assert all(not x.any() for x in gradients)


@pytest.mark.parametrize('chunk_size', [1, 4, 5, TOKENS, 100])
def test_chunked_sum_equals_the_whole(chunk_size):
  hidden, item_vectors, targets, weights = catalogue_inputs()

  def whole(hidden, item_vectors):
    return catalogue_softmax.plain_softmax(hidden, item_vectors, targets, weights)

  def chunked(hidden, item_vectors):
    loss = lambda h, t, w: catalogue_softmax.plain_softmax(h, item_vectors, t, w)
    return catalogue_softmax.chunked_sum(loss, chunk_size, hidden, targets, weights)

  value, gradients = value_and_gradients(chunked, hidden, item_vectors)
  expected, expected_gradients = value_and_gradients(whole, hidden, item_vectors)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for actual, wanted in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-5)


ITEMS, MODALITIES, ROWS, VECTORS = 9, 3, 8, 4

consistency = jax.jit(losses.consistency)
info_nce = jax.jit(losses.info_nce)
diversity = jax.jit(losses.diversity, static_argnums=2)
matching_bce = jax.jit(losses.matching_bce)


def units_of(vectors):
  vectors = np.asarray(vectors, np.float64)
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def modality_inputs():
  """Vectors of lengths far from 1, and items with 0, 1, 2 and 3 modalities."""
  rng = np.random.default_rng(4)
  vectors = rng.normal(size=(ITEMS, MODALITIES, DIM)) * rng.uniform(0.1, 10, (ITEMS, MODALITIES, 1))
  there = ['', 'a', 'b', 'ab', 'ac', 'bc', 'abc', 'abc', 'c']
  present = np.array([[name in names for name in 'abc'] for names in there])
  return vectors, present


def pair_inputs(vectors_a_row: int | None = None):
  """Rows of `a` near their rows of `b`, some ids twice, two rows left out (one a twin)."""
  rng = np.random.default_rng(5)
  b = rng.normal(size=(ROWS, DIM))
  shape = (ROWS, DIM) if vectors_a_row is None else (ROWS, vectors_a_row, DIM)
  a = (b if vectors_a_row is None else b[:, None]) + 2 * rng.normal(size=shape)
  ids = np.array([7, 3, 7, 5, 3, 9, 3, 11])
  weights = np.array([1, 1, 1, 1, 0, 1, 1, 0], float)
  return a, 3 * b, ids, weights, np.log(0.4)


def query_inputs():
  rng = np.random.default_rng(6)
  weights = np.array([1, 0, 1, 1, 0, 1, 1, 1], float)
  return rng.normal(size=(ROWS, VECTORS, DIM)) * rng.uniform(0.1, 10, (ROWS, VECTORS, 1)), weights


def matching_inputs():
  rng = np.random.default_rng(7)
  labels = np.array([1, 0, 0, 1, 0, 1, 0, 0])
  return 2 * rng.normal(size=ROWS), labels, np.array([1, 1, 0, 1, 1, 0, 1, 1], float)


def vector_losses():
  """Name -> loss as `f(x, weights)`, x, weights; a mask stands for weights where there are none."""
  scores, labels, score_weights = matching_inputs()
  cases = {
    'consistency': (losses.consistency, *modality_inputs()),
    'matching': (lambda x, w: losses.matching_bce(x, labels, w), scores, score_weights),
  }
  for kind in losses.DIVERSITIES:
    loss = functools.partial(losses.diversity, kind=kind)
    cases[kind] = (loss, *query_inputs())
  a, b, ids, weights, log_temperature = pair_inputs(VECTORS)
  cases['info_nce'] = (
    lambda x, w: losses.info_nce(x['a'], x['b'], ids, w, x['log_temperature']),
    {'a': a, 'b': b, 'log_temperature': log_temperature},
    weights,
  )
  return cases


VECTOR_LOSSES = vector_losses()
VALUES_AND_GRADIENTS = {
  name: jax.jit(jax.value_and_grad(loss)) for name, (loss, _, _) in VECTOR_LOSSES.items()
}
every_vector_loss = pytest.mark.parametrize('name', VECTOR_LOSSES)


def of_vectors(change, x):
  """Applies `change` to the arrays of `x`, not to its temperature."""
  return jax.tree.map(lambda leaf: change(leaf) if np.ndim(leaf) else leaf, x)


def spoiled(x, weights):
  """`x` with NaN in place of what `weights` leaves out."""
  left_out = lambda leaf: np.expand_dims(weights == 0, tuple(range(weights.ndim, leaf.ndim)))
  return of_vectors(lambda leaf: np.where(left_out(leaf), np.nan, leaf), x)


@every_vector_loss
def test_vector_losses_have_the_gradients_of_finite_differences(name):
  """All of them, and of the compiled gradient: fused, sums that cancel elsewhere may not."""
  loss, x, weights = VECTOR_LOSSES[name]
  with jax.enable_x64(True):
    flat, unravel = ravel_pytree(x)
    values = jax.jit(jax.vmap(lambda y: loss(unravel(y), weights)))
    steps = 1e-5 * np.eye(flat.size)
    expected = (values(flat + steps) - values(flat - steps)) / 2e-5
    _, gradients = VALUES_AND_GRADIENTS[name](x, weights)
    np.testing.assert_allclose(ravel_pytree(gradients)[0], expected, atol=1e-7)


@every_vector_loss
def test_vector_losses_are_exactly_zero_where_nothing_counts(name):
  _, x, weights = VECTOR_LOSSES[name]
  nothing = np.zeros_like(weights)
  value, gradients = VALUES_AND_GRADIENTS[name](spoiled(x, nothing), nothing)
  assert value == 0
  for gradient in jax.tree.leaves(gradients):
    np.testing.assert_array_equal(gradient, 0)


@every_vector_loss
def test_vector_losses_ignore_what_is_left_out(name):
  _, x, weights = VECTOR_LOSSES[name]
  value, gradients = VALUES_AND_GRADIENTS[name](spoiled(x, weights), weights)
  expected, expected_gradients = VALUES_AND_GRADIENTS[name](x, weights)
  assert value != 0
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  same = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(same, gradients, expected_gradients)
  of_vectors(lambda leaf: np.testing.assert_array_equal(leaf[weights == 0], 0), gradients)


@every_vector_loss
def test_vector_losses_of_bfloat16_are_reduced_in_float32(name):
  _, x, weights = VECTOR_LOSSES[name]
  x = of_vectors(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), x)
  value, gradients = VALUES_AND_GRADIENTS[name](x, weights)
  wide = of_vectors(lambda leaf: leaf.astype(jnp.float32), x)
  expected, _ = VALUES_AND_GRADIENTS[name](wide, weights)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  of_vectors(lambda leaf: np.testing.assert_equal(leaf.dtype, jnp.bfloat16), gradients)


@pytest.mark.parametrize('name', sorted(VECTOR_LOSSES.keys() - {'matching'}))
@pytest.mark.parametrize('factor', [1e-12, 1e12])
def test_vector_losses_do_not_depend_on_length(name, factor):
  _, x, weights = VECTOR_LOSSES[name]
  scaled = of_vectors(lambda leaf: leaf * factor, x)
  value, gradients = VALUES_AND_GRADIENTS[name](scaled, weights)
  expected, expected_gradients = VALUES_AND_GRADIENTS[name](x, weights)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  gradients = of_vectors(lambda leaf: leaf * factor, gradients)
  same = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(same, gradients, expected_gradients)


@every_vector_loss
@pytest.mark.parametrize('constant', [0.0, 1.0])
def test_vector_losses_are_finite_where_vectors_are_zero_or_equal(name, constant):
  _, x, weights = VECTOR_LOSSES[name]
  flat = of_vectors(lambda leaf: np.full(leaf.shape, constant), x)
  value, gradients = VALUES_AND_GRADIENTS[name](flat, weights)
  assert all(np.isfinite(leaf).all() for leaf in (value, *jax.tree.leaves(gradients)))


def test_consistency_equals_its_formula():
  vectors, present = modality_inputs()
  of_items = []
  for item, there in zip(units_of(vectors), present, strict=True):
    pairs = itertools.combinations(item[there], 2)
    of_pairs = [1 - u @ v for u, v in pairs]
    of_items += [np.mean(of_pairs)] if of_pairs else []
  assert len(of_items) == 5
  np.testing.assert_allclose(consistency(vectors, present), np.mean(of_items), rtol=1e-5)


def test_consistency_is_zero_for_alike_modalities_and_two_for_opposite_ones():
  vectors, present = modality_inputs()
  alike = vectors[:, :1] * np.array([1, 2, 0.5])[:, None]
  np.testing.assert_allclose(consistency(alike, present), 0, atol=1e-6)
  opposite = vectors[:, :1] * np.array([1, -3])[:, None]
  np.testing.assert_allclose(consistency(opposite, np.ones((ITEMS, 2), bool)), 2, rtol=1e-6)


def info_nce_by_hand(a, b, ids, weights, log_temperature):
  """Row by row, each cross-entropy over its own list of rivals."""
  a, b = units_of(a if a.ndim == 3 else a[:, None]), units_of(b)
  logit = lambda i, j: max(vector @ b[j] for vector in a[i]) / np.exp(log_temperature)
  total = 0.0
  for i in range(ROWS):
    rivals = [j for j in range(ROWS) if j == i or (weights[j] > 0 and ids[j] != ids[i])]
    for of_rivals in ([logit(i, j) for j in rivals], [logit(j, i) for j in rivals]):
      total += weights[i] * (np.log(np.exp(of_rivals).sum()) - logit(i, i)) / 2
  return total / weights.sum()


@pytest.mark.parametrize('vectors_a_row', [None, 1, VECTORS])
def test_info_nce_equals_its_formula(vectors_a_row):
  inputs = pair_inputs(vectors_a_row)
  np.testing.assert_allclose(info_nce(*inputs), info_nce_by_hand(*inputs), rtol=1e-5)


def test_info_nce_weighs_its_rows():
  a, b, ids, _, log_temperature = pair_inputs()
  inputs = a, b, ids, np.array([0.1, 0.3, 0.0, 0.05, 0.1, 0.0, 0.2, 0.1]), log_temperature
  np.testing.assert_allclose(info_nce(*inputs), info_nce_by_hand(*inputs), rtol=1e-5)


def test_info_nce_of_one_vector_a_row_is_that_of_the_vector():
  a, *rest = pair_inputs()
  np.testing.assert_allclose(info_nce(a[:, None], *rest), info_nce(a, *rest), rtol=1e-6)


def test_info_nce_takes_both_directions():
  a, b, *rest = pair_inputs()
  np.testing.assert_allclose(info_nce(a, b, *rest), info_nce(b, a, *rest), rtol=1e-6)


def test_info_nce_of_rows_all_alike_is_the_logarithm_of_their_number():
  alike, ids, weights = jnp.ones((ROWS, DIM)), jnp.arange(ROWS), jnp.ones(ROWS)
  value = info_nce(alike, alike, ids, weights, 0.0)
  np.testing.assert_allclose(value, np.log(ROWS), rtol=1e-5)
  assert info_nce(alike, alike, jnp.zeros(ROWS, int), weights, 0.0) == 0


def test_info_nce_prefers_a_colder_temperature_where_rows_are_told_apart():
  b = jnp.eye(DIM)
  loss = lambda log_temperature: info_nce(b, b, jnp.arange(DIM), jnp.ones(DIM), log_temperature)
  assert jax.grad(loss)(0.0) > 0
  np.testing.assert_allclose(loss(np.log(0.01)), 0, atol=1e-6)


DIVERSITY_OF_UNITS = {
  'cosine': lambda u: np.mean([x @ y for x, y in itertools.permutations(u, 2)]),
  'logdet': lambda u: -np.log(np.linalg.eigvalsh(u @ u.T + 1e-3 * np.eye(len(u)))).sum() / len(u),
  'distance': lambda u: -np.mean([np.linalg.norm(x - y) for x, y in itertools.combinations(u, 2)]),
}


@pytest.mark.parametrize('kind', losses.DIVERSITIES)
def test_diversity_equals_its_formula(kind):
  vectors, weights = query_inputs()
  weights *= np.linspace(0.1, 0.3, ROWS)
  of_rows = [DIVERSITY_OF_UNITS[kind](row) for row in units_of(vectors)]
  expected = np.average(of_rows, weights=weights)
  np.testing.assert_allclose(diversity(vectors, weights, kind), expected, rtol=1e-4)


@pytest.mark.parametrize('kind', losses.DIVERSITIES)
def test_diversity_is_lower_the_further_vectors_are_apart(kind):
  """From alike to orthogonal, and a step against the gradient leads there."""
  start = np.ones((1, VECTORS, VECTORS))
  values = [
    diversity(start + spread * np.eye(VECTORS), np.ones(1), kind)
    for spread in (0, 0.01, 0.1, 1, 10, 1e9)
  ]
  assert (np.diff(values) < 0).all()
  extremes = {
    'cosine': (1, 0),
    'logdet': (-(np.log(VECTORS + 1e-3) + (VECTORS - 1) * np.log(1e-3)) / VECTORS, -np.log(1.001)),
    'distance': (0, -np.sqrt(2)),
  }[kind]
  np.testing.assert_allclose([values[0], values[-1]], extremes, rtol=1e-3, atol=1e-5)
  loss = lambda vectors: diversity(vectors, np.ones(1), kind)
  near = jnp.asarray(start + 0.1 * np.eye(VECTORS))
  assert loss(near - 0.1 * jax.grad(loss)(near)) < loss(near)


@pytest.mark.parametrize('kind', losses.DIVERSITIES)
def test_diversity_of_vectors_nearly_equal_is_near_its_formula(kind):
  rng = np.random.default_rng(8)
  vectors = rng.normal(size=(1, 1, 64)) + 1e-3 * rng.normal(size=(1, 16, 64))
  vectors = vectors.astype(np.float32)
  expected = DIVERSITY_OF_UNITS[kind](units_of(vectors)[0])
  np.testing.assert_allclose(diversity(vectors, np.ones(1), kind), expected, rtol=1e-3)


def test_diversity_needs_two_vectors():
  with pytest.raises(ValueError, match='at least two'):
    diversity(np.ones((ROWS, 1, DIM)), np.ones(ROWS), 'cosine')


def test_matching_bce_equals_its_formula():
  scores, labels, weights = matching_inputs()
  total = count = 0.0
  for x, label, weight in zip(scores, labels, weights, strict=True):
    total -= weight * np.log(sigmoid(x) if label else 1 - sigmoid(x))
    count += weight
  np.testing.assert_allclose(matching_bce(scores, labels, weights), total / count, rtol=1e-5)


def test_matching_bce_stays_finite_for_large_logits():
  scores, labels = jnp.array([1e4, -1e4, 1e4, -1e4]), jnp.array([1, 1, 0, 0])
  loss = lambda scores: matching_bce(scores, labels, jnp.ones(4))
  value, gradient = jax.value_and_grad(loss)(scores)
  np.testing.assert_allclose(value, 1e4 / 2, rtol=1e-5)
  np.testing.assert_allclose(gradient, [0, -0.25, 0.25, 0], atol=1e-6)


NAMED_LOSSES = {'softmax': 5.5, 'contrastive': 0.3, 'consistency': 1.7}


def test_uncertainty_weighted_equals_its_formula():
  log_variances = {'consistency': -0.4, 'softmax': 1.2, 'contrastive': 0.7}
  expected = sum(
    NAMED_LOSSES[name] / np.exp(log_variances[name]) + log_variances[name] for name in NAMED_LOSSES
  )
  actual = losses.uncertainty_weighted(NAMED_LOSSES, log_variances)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
  with jax.enable_x64(True):
    inputs = jax.tree.map(jnp.asarray, (NAMED_LOSSES, log_variances))
    check_grads(losses.uncertainty_weighted, inputs, 1, ['rev'], atol=1e-6, rtol=1e-6)


def test_descent_on_log_variances_ends_at_the_logarithm_of_each_loss():
  gradient = jax.jit(jax.grad(losses.uncertainty_weighted, 1))
  log_variances = dict.fromkeys(NAMED_LOSSES, 0.0)
  assert all(x != 0 for x in gradient(NAMED_LOSSES, log_variances).values())
  for _ in range(200):
    step = gradient(NAMED_LOSSES, log_variances)
    log_variances = jax.tree.map(lambda s, g: s - 0.2 * g, log_variances, step)
  for name, loss in NAMED_LOSSES.items():
    np.testing.assert_allclose(log_variances[name], np.log(loss), atol=1e-5)


def test_uncertainty_weighted_refuses_different_names():
  with pytest.raises(ValueError, match='contrastive'):
    losses.uncertainty_weighted(NAMED_LOSSES, {'softmax': 0.0, 'consistency': 0.0})
  with pytest.raises(ValueError, match='diversity'):
    losses.uncertainty_weighted(NAMED_LOSSES, dict.fromkeys([*NAMED_LOSSES, 'diversity'], 0.0))

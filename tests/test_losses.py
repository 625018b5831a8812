import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ur4rec_jax import losses

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
  return functools.partial(losses.softmax, chunk_size=chunk_size)


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
  expected, expected_gradients = value_and_gradients(losses.plain_softmax, *inputs)
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
  expected, expected_gradients = value_and_gradients(losses.plain_softmax, *inputs)
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
  actual = losses.plain_softmax(hidden, item_vectors, targets, weights)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_plain_softmax_has_the_gradients_of_finite_differences():
  """In float32, as its logits are: hence the wide step and tolerance."""
  hidden, item_vectors, targets, weights = catalogue_inputs()
  loss = lambda h, v: losses.plain_softmax(h, v, targets, weights)
  check_grads(loss, (hidden, item_vectors), 1, ['rev'], atol=2e-2, rtol=2e-2, eps=1e-2)


@pytest.mark.parametrize('chunk_size', [1, 4, 5, TOKENS, 100])
def test_softmax_equals_plain_softmax(chunk_size):
  inputs = catalogue_inputs()
  value, gradients = value_and_gradients(softmax_in_chunks(chunk_size), *inputs)
  expected, expected_gradients = value_and_gradients(losses.plain_softmax, *inputs)
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
  expected, expected_gradients = value_and_gradients(objective(losses.plain_softmax), *inputs)
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
  expected, expected_gradients = value_and_gradients(losses.plain_softmax, *exact)
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
  expected, expected_gradients = value_and_gradients(losses.plain_softmax, *inputs)
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
    return losses.plain_softmax(hidden, item_vectors, targets, weights)

  def chunked(hidden, item_vectors):
    loss = lambda h, t, w: losses.plain_softmax(h, item_vectors, t, w)
    return losses.chunked_sum(loss, chunk_size, hidden, targets, weights)

  value, gradients = value_and_gradients(chunked, hidden, item_vectors)
  expected, expected_gradients = value_and_gradients(whole, hidden, item_vectors)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for actual, wanted in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-5)

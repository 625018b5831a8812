"""The TPU kernel gives the loss and gradients of a plain softmax, run on CPU step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ur4rec_jax.training import losses, softmax_kernel
from ur4rec_jax.training.catalogue_softmax import fused_sampled_softmax, plain_softmax
from ur4rec_jax.training.negatives import Negatives
from ur4rec_jax.training.softmax_kernel import softmax_gradients, tokens_in_block


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-4), ('bfloat16', 0.05)])
@settings(max_examples=4)
@given(
  tokens=st.sampled_from([1, 255, 256, 300]),
  num_items=st.sampled_from([1, 511, 512, 700]),
  dim=st.sampled_from([3, 64]),
  seed=st.integers(0, 99),
)
def test_it_is_a_plain_softmax(dtype, tolerance, tokens, num_items, dim, seed):
  rng = np.random.default_rng(seed)
  hidden, items = (jnp.asarray(rng.normal(size=(n, dim)), dtype) for n in (tokens, num_items))
  targets = jnp.asarray(rng.integers(0, num_items, tokens), jnp.int32)
  weights = jnp.asarray(rng.random(tokens) < 0.8, jnp.float32)
  expected = jax.value_and_grad(plain_softmax, argnums=(0, 1))(hidden, items, targets, weights)
  loss, *gradients, _ = softmax_gradients(hidden, items, targets, weights, interpret=True)
  np.testing.assert_allclose(loss, expected[0], rtol=1e-3)
  for ours, plain in zip(gradients, expected[1], strict=True):
    scale = max(1.0, float(jnp.abs(plain.astype(jnp.float32)).max()))
    np.testing.assert_allclose(
      np.asarray(ours, np.float32) / scale, np.asarray(plain, np.float32) / scale, atol=tolerance
    )


@pytest.mark.parametrize('dim', [3, 64])
def test_it_is_a_plain_sampled_softmax(dim, monkeypatch):
  tokens, count = 300, 600
  rng = np.random.default_rng(0)
  vectors = [jnp.asarray(rng.normal(size=(n, dim)), jnp.float32) for n in (tokens, tokens, count)]
  # Of 700 items; many negatives are some token's target.
  targets, ids = (jnp.asarray(rng.integers(0, 700, n), jnp.int32) for n in (tokens, count))
  weights = jnp.asarray(rng.random(tokens) < 0.8, jnp.float32)
  negatives = Negatives(ids, jnp.asarray(rng.normal(size=count), jnp.float32))

  def plain(hidden, target_vectors, negative_vectors):
    positive = (hidden * target_vectors).sum(-1)
    logits = hidden @ negative_vectors.T
    is_target = targets[:, None] == ids
    return losses.sampled_softmax(
      positive, logits, weights, negatives.log_expected_count, is_target
    )

  interpreted = functools.partial(softmax_kernel.softmax_gradients, interpret=True)
  monkeypatch.setattr(softmax_kernel, 'softmax_gradients', interpreted)
  ours = lambda *vectors: fused_sampled_softmax(*vectors, targets, weights, negatives)
  (expected, plain_gradients), (loss, gradients) = (
    jax.value_and_grad(f, argnums=(0, 1, 2))(*vectors) for f in (plain, ours)
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  for x, y in zip(gradients, plain_gradients, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4)


def test_a_catalogue_that_does_not_fit_is_left_to_the_chunks():
  assert tokens_in_block(3_416, 256, 2) == 256
  assert tokens_in_block(26_744, 128, 2) == 256
  assert tokens_in_block(1_000_000, 64, 2) == 0

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ur4rec_jax.models.ur4rec import Encoded
from ur4rec_jax.training import losses
from ur4rec_jax.training.negatives import Negatives
from ur4rec_jax.training.objective import (
  LossInputs,
  make_retrieval_loss,
  make_sample,
  same_target,
)

DIM = 4


def inputs_of(numbers) -> LossInputs:
  numbers = jnp.asarray(numbers, jnp.int32)
  return LossInputs(numbers, numbers, {}, jnp.float32(len(numbers)))


def same_target_loss(states, numbers, size: int = 100):
  encoded = Encoded({'sasrec': states[None]}, {}, log_temperature=jnp.log(0.5))
  return same_target(encoded, make_sample(inputs_of(numbers), size), None)


@pytest.mark.parametrize('tokens', [40, 43, 1600])
def test_pairs_are_tokens_with_the_same_target_and_never_padding(tokens):
  rng = np.random.default_rng(0)
  numbers = rng.integers(0, 6, tokens)
  sample = make_sample(inputs_of(numbers), 2000)
  np.testing.assert_array_equal(sample.tokens, np.arange(tokens))
  first, second = numbers[sample.pairs]
  is_pair = np.asarray(sample.pair_weights) > 0
  np.testing.assert_array_equal(is_pair, (first == second) & (first > 0))
  assert (sample.pairs[0] != sample.pairs[1]).all()
  # Each item that occurs n times gives n - 1 pairs.
  counts = np.bincount(numbers, minlength=6)[1:]
  assert is_pair.sum() == (counts - 1).sum()


def test_same_target_is_info_nce_of_the_pairs():
  numbers = [3, 0, 5, 3, 0, 5, 4]
  states = jax.random.normal(jax.random.key(0), (len(numbers), DIM))
  expected = losses.info_nce(
    states[jnp.array([0, 2])],
    states[jnp.array([3, 5])],
    jnp.array([3, 5]),
    jnp.ones(2),
    jnp.log(0.5),
  )
  np.testing.assert_allclose(same_target_loss(states, numbers), expected, rtol=1e-5)


def test_same_target_is_zero_without_a_pair_and_falls_as_pairs_become_alike():
  states = jax.random.normal(jax.random.key(0), (6, DIM))
  assert same_target_loss(states, [1, 2, 3, 4, 0, 0]) == 0
  numbers = jnp.array([1, 2, 3, 1, 2, 3])
  alike = states[:3]
  assert same_target_loss(jnp.concatenate([alike, alike]), numbers) < same_target_loss(
    states, numbers
  )


@pytest.mark.parametrize('name', ['bce', 'sampled_softmax'])
def test_gradients_of_an_item_are_summed_in_float32(name):
  """A sum in bfloat16 would stop growing at 256 of these tokens, or of these chunks."""
  tokens, num_items = 4096, 6
  config = ConfigDict({'num_negatives': 4, 'chunk_size': 1})
  loss = make_retrieval_loss(name, config, num_items)
  rng = np.random.default_rng(0)
  hidden = jnp.broadcast_to(jnp.asarray(rng.normal(size=DIM)), (tokens, DIM))
  items = jnp.asarray(rng.normal(size=(num_items, DIM)))
  drawn = jnp.array([0, 2, 2, 3])
  if name == 'bce':
    negatives = Negatives(jnp.broadcast_to(drawn, (tokens, 4)))
  else:
    negatives = Negatives(drawn, jnp.zeros(4))
  targets, weights = jnp.ones(tokens, jnp.int32), jnp.ones(tokens)
  gradient = jax.jit(jax.grad(loss, argnums=1))
  expected, found = (
    gradient(hidden.astype(kind), items.astype(kind), targets, weights, negatives)
    for kind in (jnp.float32, jnp.bfloat16)
  )
  np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.05, atol=2)


def test_a_sample_is_at_most_as_large_as_asked_for():
  sample = make_sample(inputs_of(np.arange(50)), 8)
  assert sample.tokens.shape == sample.numbers.shape == sample.pair_weights.shape == (8,)
  assert sample.pairs.shape == (2, 8)

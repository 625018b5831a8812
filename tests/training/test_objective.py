import jax
import jax.numpy as jnp
import numpy as np

from ur4rec_jax.models.ur4rec import Encoded
from ur4rec_jax.training import losses
from ur4rec_jax.training.objective import LossInputs, make_sample, same_target

DIM = 4


def inputs_of(numbers) -> LossInputs:
  numbers = jnp.asarray(numbers, jnp.int32)
  return LossInputs(numbers, numbers, {}, jnp.float32(len(numbers)))


def same_target_loss(states, numbers, size: int = 100):
  encoded = Encoded({'sasrec': states[None]}, {}, log_temperature=jnp.log(0.5))
  return same_target(encoded, make_sample(inputs_of(numbers), size), None)


def test_pairs_are_tokens_with_the_same_target_and_never_padding():
  rng = np.random.default_rng(0)
  numbers = rng.integers(0, 6, 40)
  sample = make_sample(inputs_of(numbers), 100)
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


def test_a_sample_is_at_most_as_large_as_asked_for():
  sample = make_sample(inputs_of(np.arange(50)), 8)
  assert sample.tokens.shape == sample.numbers.shape == sample.pair_weights.shape == (8,)
  assert sample.pairs.shape == (2, 8)

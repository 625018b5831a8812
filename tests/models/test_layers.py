import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur4rec_jax.models.layers import take_rows


@pytest.mark.parametrize('shape', [(4,), (2, 3)])
def test_taken_rows_and_their_gradients_are_those_of_indexing(shape):
  table = jax.random.normal(jax.random.key(0), (5, *shape))
  ids = jnp.array([[3, 0, 3], [4, 1, 3]])
  np.testing.assert_array_equal(take_rows(table, ids), table[ids])
  factors = jax.random.normal(jax.random.key(1), (*ids.shape, *shape))
  gradients = [
    jax.grad(lambda table, take=take: (take(table, ids) * factors).sum())(table)
    for take in (take_rows, lambda table, ids: table[ids])
  ]
  np.testing.assert_array_equal(*gradients)


def test_the_gradients_of_a_row_of_bfloat16_are_summed_in_float32():
  """In bfloat16, 256 + 1 is 256."""
  table = jnp.zeros((3, 2), jnp.bfloat16)
  gradient = jax.grad(lambda table: take_rows(table, jnp.ones(1000, jnp.int32)).sum())(table)
  np.testing.assert_array_equal(gradient, [[0, 0], [1000, 1000], [0, 0]])

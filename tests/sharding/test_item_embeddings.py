"""Rows of sharded tables, on devices that `jax.vmap` stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ur4rec_jax.sharding import devices, item_embeddings
from ur4rec_jax.sharding.devices import AXIS
from ur4rec_jax.sharding.item_embeddings import NOWHERE, ItemEmbeddings


@functools.cache
def exchanged(num_devices: int, rows: int, count: int):
  """`exchange_rows` on several devices, and the gradient of its product with some weights."""

  def product(table, ids, weights):
    found = item_embeddings.exchange_rows(table, ids)
    return (found * weights).sum(), found

  def on_device(table, ids, weights):
    gradient, found = jax.grad(product, has_aux=True)(table, ids, weights)
    return found, gradient

  return jax.jit(jax.vmap(on_device, axis_name=AXIS))


@settings(max_examples=25)
@example(3, 5, list(range(5)), 0)  # All ids are on one device, so that one round is not enough.
@given(
  num_devices=st.sampled_from([1, 2, 3, 8]),
  rows=st.sampled_from([1, 5]),
  wanted=st.lists(st.integers(0, 39), min_size=1, max_size=6),
  seed=st.integers(0, 9),
)
def test_each_device_gets_the_rows_that_it_needs_and_gradients_go_back(
  num_devices, rows, wanted, seed
):
  rng = np.random.default_rng(seed)
  size = num_devices * rows
  table = rng.normal(size=(size, 4)).astype(np.float32)
  ids = np.full((num_devices, 6), NOWHERE, np.int32)
  for device in range(num_devices):
    own = np.unique(np.array(wanted[: len(wanted) - device % 2]) % size)
    ids[device, : len(own)] = own
  weights = rng.normal(size=(num_devices, 6, 4)).astype(np.float32)
  found, gradient = exchanged(num_devices, rows, 6)(
    table.reshape(num_devices, rows, 4), ids, weights
  )
  is_id = ids != NOWHERE
  np.testing.assert_array_equal(found, np.where(is_id[..., None], table[ids * is_id], 0))
  expected = np.zeros_like(table)
  np.add.at(expected, ids[is_id], weights[is_id])
  np.testing.assert_allclose(gradient.reshape(size, 4), expected, atol=1e-5)


@pytest.mark.parametrize('count', [1, 3, 8, 64, 256])
def test_any_number_of_devices_shares_a_table_equally(count, monkeypatch):
  monkeypatch.setattr(item_embeddings, 'device_count', lambda: count)
  embeddings = ItemEmbeddings('sharded', 1000)
  rows = len(embeddings.pad({'item_embedding': jnp.ones((1001, 2))})['item_embedding'])
  assert rows % count == 0 == rows % 64
  assert count * (embeddings.items_on_device + 1) == rows


@pytest.mark.parametrize('rows', [8, 9, 10, 23])
def test_rows_of_a_batch_are_dealt_as_evenly_as_can_be(rows, monkeypatch):
  monkeypatch.setattr(devices, 'device_count', lambda: 8)
  x = np.arange(1, 2 * rows + 1).reshape(1, rows, 2)
  parts = devices.deal({'x': x})['x']
  assert parts.shape == (8, 1, -(-rows // 8), 2)
  real = (parts[:, 0, :, 0] > 0).sum(1)
  assert real.max() - real.min() <= 1
  np.testing.assert_array_equal(parts[parts > 0], x.ravel())

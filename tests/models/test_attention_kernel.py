"""The TPU kernel gives the values and gradients of plain attention, run on CPU step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ur4rec_jax.models import attention
from ur4rec_jax.models.attention import Visible, visible_history
from ur4rec_jax.models.attention_kernel import Mix, fused_attention


def plain(mix: Mix, visible, sources):
  """The same from `masked_attention`, one source after the other."""
  batch, width = visible[0].since.shape[0], mix.dim // mix.num_heads

  def part(i: int, column: int):
    parts = jnp.split(sources[i], sources[i].shape[1] // mix.dim, axis=1)
    return parts[column].reshape(batch, -1, mix.num_heads, width)

  result = []
  for index, reads in enumerate(mix.reads):
    key, value = (jnp.concatenate([part(i, c) for i in reads], axis=1) for c in (-2, -1))
    mask = jnp.concatenate([visible[i].mask(mix.lengths[index]) for i in reads], axis=2)
    mixed = attention.masked_attention(part(index, 0), key, value, mask)
    result.append(mixed.reshape(-1, mix.dim))
  return result


def compare(mix: Mix, visible, sources, dtype, tolerance):
  sources = [jnp.asarray(x, dtype) for x in sources]
  rng = np.random.default_rng(1)
  weights = [
    jnp.asarray(rng.normal(size=(len(x), mix.dim)), jnp.float32) for x in sources[: len(mix.reads)]
  ]
  # A query that sees nothing gets what nothing reads.
  seen = [
    jnp.concatenate([visible[i].mask(mix.lengths[index]) for i in reads], 2).any(-1).reshape(-1, 1)
    for index, reads in enumerate(mix.reads)
  ]

  def total(function, sources):
    mixed = function(sources)
    return sum((w * s * x).sum() for w, s, x in zip(weights, seen, mixed, strict=True)), mixed

  stacked = [jnp.stack(x, axis=1) for x in visible]
  ours = lambda sources: fused_attention(mix, stacked, sources)
  for_both = [
    jax.jit(jax.value_and_grad(lambda s, f=f: total(f, s), has_aux=True))(sources)
    for f in (ours, lambda sources: plain(mix, visible, sources))
  ]
  ((_, mixed), gradients), ((_, expected_mixed), expected_gradients) = for_both
  for s, x, y in zip(seen, mixed, expected_mixed, strict=True):
    assert np.isfinite(np.asarray(x, np.float32)).all()
    np.testing.assert_allclose(*(np.asarray(s * z, np.float32) for z in (x, y)), atol=tolerance)
  for x, y in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (x, y)), atol=tolerance)


def segments_of(rng, batch: int, length: int) -> np.ndarray:
  """Rows of several users and, often, padding at the end; some rows are all padding."""
  rows = np.zeros((batch, length), np.int32)
  for row in rows:
    ends = np.sort(rng.integers(0, length + 1, rng.integers(0, 4)))
    for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=False), 1):
      row[begin:end] = number
  return rows


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-4), ('bfloat16', 0.15)])
@settings(max_examples=3)
@given(
  batch=st.integers(1, 9),
  length=st.sampled_from([1, 5, 8, 50, 200]),
  heads=st.sampled_from([1, 2, 3]),
  width=st.sampled_from([4, 16, 32]),
  seed=st.integers(0, 99),
)
def test_histories_in_rows_of_any_length(dtype, tolerance, batch, length, heads, width, seed):
  rng = np.random.default_rng(seed)
  dim = heads * width
  mix = Mix(((0,),), (length,), dim, heads, interpret=True)
  visible = visible_history(jnp.asarray(segments_of(rng, batch, length)))
  source = rng.normal(size=(batch * length, 3 * dim))
  compare(mix, [visible], [source], dtype, tolerance)


@settings(max_examples=3)
@given(
  batch=st.integers(1, 5),
  length=st.sampled_from([3, 16, 50]),
  keys=st.sampled_from([1, 6, 24]),
  seed=st.integers(0, 99),
)
def test_modalities_attend_to_each_other_and_to_texts_of_users(batch, length, keys, seed):
  rng = np.random.default_rng(seed)
  dim = 16
  mix = Mix(((1, 2), (0, 2)), (length, length, keys), dim, 2, interpret=True)
  segments = jnp.asarray(segments_of(rng, batch, length))
  since, until = visible_history(segments)
  visible = [
    Visible(since, jnp.where(rng.random((batch, length)) < 0.7, until, 0)) for _ in range(2)
  ]
  begin = rng.integers(0, length + 1, (batch, keys))
  end = np.minimum(begin + length // 2, length)
  visible.append(Visible(*(jnp.asarray(x, jnp.int32) for x in (begin, end))))
  shapes = (batch * length, 3 * dim), (batch * length, 3 * dim), (batch * keys, 2 * dim)
  sources = [rng.normal(size=shape) for shape in shapes]
  compare(mix, visible, sources, 'float32', 1e-4)


def test_long_histories_are_computed_in_slices():
  rng = np.random.default_rng(0)
  length, dim = 520, 8  # Two slices in a loop and a part of a third.
  mix = Mix(((0,),), (length,), dim, 1, interpret=True)
  visible = visible_history(jnp.asarray(segments_of(rng, 2, length)))
  compare(mix, [visible], [rng.normal(size=(2 * length, 3 * dim))], 'float32', 1e-4)

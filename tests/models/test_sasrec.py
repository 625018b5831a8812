import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from ur4rec_jax.models.attention import causal_attention, masked_attention, visible_history
from ur4rec_jax.models.layers import Dropout
from ur4rec_jax.models.sasrec import CausalFilter, SASRec, segment_positions
from ur4rec_jax.models.ur4rec import UR4Rec, create_model

NUM_ITEMS = 30
LENGTH = 12
WINDOWED = {
  'norm': 'post',
  'positions': 'rotary',
  'window': 3,
  'filter_width': 4,
  'activation': 'swiglu',
  'input_norm': True,
}
KINDS = (
  {'norm': 'pre'},
  {'norm': 'post'},
  {'norm': 'pre', 'positions': 'rotary', 'activation': 'gelu', 'filter_width': 2},
  WINDOWED,
  {'block': 'gru', 'positions': 'none'},
)
each_kind = pytest.mark.parametrize(
  'kind', KINDS, ids=lambda kind: '-'.join(map(str, kind.values()))
)


def small_model(**fields) -> SASRec:
  sizes = {'dim': 8, 'num_blocks': 1, 'num_heads': 2, 'ffn_dim': 6, 'dropout': 0.3}
  return SASRec(NUM_ITEMS, LENGTH, **(sizes | fields))


def states(model: SASRec, item_ids, segment_ids=None, **kwargs):
  """Hidden states of rows of items, each one user unless there are segments."""
  segment_ids = (item_ids > 0).astype(jnp.int32) if segment_ids is None else segment_ids
  return model.encode_users(model.encode_items(), item_ids, segment_ids, **kwargs)


def parameter_shapes(model: SASRec):
  init = functools.partial(model.init, method=states)
  return jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 1), jnp.int32))['params']


def large_params(model: SASRec):
  """Parameters far from zero, so that a leak between positions cannot hide."""
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(scale=0.5, size=x.shape), x.dtype)
  return jax.tree.map(draw, parameter_shapes(model))


@functools.partial(jax.jit, static_argnums=0)
def apply(model: SASRec, params, *inputs):
  return model.apply({'params': params}, *inputs, method=states)


def encode(model: SASRec, params, *inputs) -> np.ndarray:
  """Hidden states of rows of items, and of segments if given."""
  inputs = (jnp.asarray(x, jnp.int32) for x in inputs)
  return np.asarray(apply(model, params, *inputs), np.float32)


def test_gradients_of_an_item_are_summed_in_float32():
  """A sum in bfloat16 would stop growing at 256 of these 4,096 tokens."""
  model = small_model(dim=4, num_blocks=0, dropout=0.0, positions='none', dtype=jnp.bfloat16)
  params = large_params(model)
  wanted = jnp.array([1.0, 2.0, -1.0, 0.5])
  loss = lambda params, item_ids: (apply(model, params, item_ids) * wanted).sum()
  gradient = jax.jit(jax.grad(loss))
  once, often = (
    gradient(params, jnp.full(shape, 7))['item_embedding'][7] for shape in ((1, 1), (1024, 4))
  )
  np.testing.assert_allclose(often / 4096, once, rtol=0.02)


@pytest.mark.parametrize(
  ('segment_ids', 'expected'),
  [
    ([1, 1, 1, 1], [3, 2, 1, 0]),
    ([1, 1, 2, 2, 2, 3], [1, 0, 2, 1, 0, 0]),
    ([0, 0, 1, 1, 1], [1, 0, 2, 1, 0]),
    ([1, 2, 2, 0, 0], [0, 1, 0, 1, 0]),
    ([2], [0]),
  ],
)
def test_positions_count_from_the_end_of_each_segment(segment_ids, expected):
  rows = jnp.array([segment_ids, segment_ids])
  positions = segment_positions(rows)
  np.testing.assert_array_equal(positions, [expected, expected])
  assert positions.dtype == jnp.int32


def test_attention_equals_a_plain_loop():
  batch, length, heads, width = 2, 5, 3, 4
  rng = np.random.default_rng(0)
  query, key, value = rng.normal(size=(3, batch, length, heads, width)).astype(np.float32)
  mask = rng.random((batch, length, length)) < 0.5
  mask |= np.eye(length, dtype=bool)
  expected = np.zeros_like(value)
  for b in range(batch):
    for h in range(heads):
      for i in range(length):
        seen = [j for j in range(length) if mask[b, i, j]]
        weights = np.exp([query[b, i, h] @ key[b, j, h] / np.sqrt(width) for j in seen])
        weights /= weights.sum()
        expected[b, i, h] = sum(w * value[b, j, h] for w, j in zip(weights, seen, strict=True))
  np.testing.assert_allclose(masked_attention(query, key, value, mask), expected, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('sizes', [(1, 1, 1, 1, 1), (3, 5, 9, 1, 8), (2, 9, 4, 3, 5)])
def test_gradients_of_attention_equal_those_derived_from_its_definition(sizes, dtype):
  batch, queries, keys, heads, width = sizes
  rng = np.random.default_rng(0)
  draw = lambda length: jnp.asarray(rng.normal(size=(batch, length, heads, width)), dtype)
  query, key, value, cotangent = draw(queries), draw(keys), draw(keys), draw(queries)
  mask = jnp.asarray(rng.random((batch, queries, keys)) < 0.6)  # Some queries see nothing.

  def definition(query, key, value):
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key) * width**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30))
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value).astype(dtype)

  found, pull_back = jax.vjp(lambda *x: masked_attention(*x, mask), query, key, value)
  expected, pull_back_expected = jax.vjp(definition, query, key, value)
  tolerance = 1e-5 if dtype == 'float32' else 0.05
  gradients = pull_back(cotangent), pull_back_expected(cotangent)
  for x, y in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
    assert x.dtype == y.dtype == dtype
    np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), atol=tolerance)


def test_attention_is_finite_for_large_scores_and_for_a_query_that_sees_nothing():
  query = 1e3 * jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
  value = jax.random.normal(jax.random.key(1), (1, 4, 1, 8))
  mask = jnp.tril(jnp.ones((1, 4, 4), bool)).at[0, 2].set(False)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def run(query, value):
    mixed = masked_attention(query, query, value, mask)
    return mixed.sum(), mixed

  gradients, mixed = run(query, value)
  np.testing.assert_allclose(mixed[0, 2], value[0].mean(0), atol=1e-6)
  assert all(np.isfinite(x).all() for x in (mixed, *gradients))


@each_kind
def test_a_state_depends_on_nothing_later_and_on_no_other_segment(kind):
  """Every token is another item, so the embeddings' gradient tells which tokens were read."""
  model = small_model(**kind)
  params = large_params(model)
  item_ids = jnp.arange(1, LENGTH + 1)[None]
  segment_ids = jnp.array([[1] * 4 + [2] * 5 + [3] + [0] * 2])

  def hidden(embedding):
    return apply(model, params | {'item_embedding': embedding}, item_ids, segment_ids)[0]

  # [state, dim, item, dim] -> [state, item]
  read = np.abs(jax.jit(jax.jacrev(hidden))(params['item_embedding'])).sum((1, 3))[:, 1:]
  segments = np.asarray(segment_ids[0])
  distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
  is_near = (distance >= 0) & (distance < kind.get('window', LENGTH))
  may_read = (segments[:, None] == segments) & is_near
  np.testing.assert_array_equal(read[:, :LENGTH] > 0, may_read)
  np.testing.assert_array_equal(read[:, LENGTH:], 0)


@each_kind
def test_padding_on_either_side_changes_nothing(kind):
  model = small_model(**kind)
  params = large_params(model)
  history = np.array([5, 9, 2, 2, 30])
  padding = np.zeros(LENGTH - len(history), int)
  bare = encode(model, params, history[None])[0]
  left = encode(model, params, [[*padding, *history]])[0, -len(history) :]
  right = encode(model, params, [[*history, *padding]])[0, : len(history)]
  np.testing.assert_allclose(left, bare, atol=1e-5)
  np.testing.assert_allclose(right, bare, atol=1e-5)


@each_kind
def test_users_packed_into_a_row_are_encoded_as_if_alone(kind):
  model = small_model(**kind, num_blocks=2)
  params = large_params(model)
  rng = np.random.default_rng(0)
  rows = [[3, 1, 5, 2], [LENGTH], [4, 4, 3]]  # Lengths of the users in each row.
  packed = np.zeros((2, 8, LENGTH), int)  # Items and segments.
  alone = np.zeros((2, 8, LENGTH), int)
  places = []
  for r, lengths in enumerate(rows):
    for s, (length, end) in enumerate(zip(lengths, np.cumsum(lengths), strict=True)):
      user = rng.integers(1, NUM_ITEMS + 1, length), np.full(length, s + 1)
      packed[:, r, end - length : end] = user
      alone[:, len(places), LENGTH - length :] = user
      places.append((r, slice(end - length, end)))
  together = encode(model, params, *packed)
  separate = encode(model, params, *alone)
  for user, (row, part) in enumerate(places):
    states = separate[user, part.start - part.stop :]
    np.testing.assert_allclose(together[row, part], states, atol=1e-5)


@each_kind
def test_last_states_alone_equal_those_among_all(kind):
  model = small_model(**kind, num_blocks=2)
  params = large_params(model)
  item_ids = np.arange(1, LENGTH + 1).reshape(2, -1)
  positions = np.array([[5, 2], [0, 5]])
  some = functools.partial(states, query_positions=jnp.asarray(positions))
  found = model.apply({'params': params}, jnp.asarray(item_ids), method=some)
  expected = np.take_along_axis(encode(model, params, item_ids), positions[..., None], axis=1)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_with_rotary_positions_a_prefix_has_the_same_state_in_training_as_in_a_query():
  model = small_model(**WINDOWED, num_blocks=2)
  params = large_params(model)
  history = np.arange(1, LENGTH + 1)
  trained = encode(model, params, history[None])[0]
  for end in (1, 4, LENGTH):
    asked = encode(model, params, history[None, max(0, end - 5) : end])[0, -1]
    np.testing.assert_allclose(trained[end - 1], asked, atol=1e-5)


def test_a_window_longer_than_a_block_of_queries_reads_exactly_the_window():
  """On CPU, scores are computed for blocks of 64 queries."""
  length, window = 200, 70
  query, key, value = jax.random.normal(jax.random.key(0), (3, 1, length, 2, 4))
  distance = np.arange(length)[:, None] - np.arange(length)
  mask = jnp.asarray((distance >= 0) & (distance < window))[None]
  visible = visible_history(jnp.ones((1, length), jnp.int32), window)
  np.testing.assert_array_equal(visible.mask(length), mask)
  found = causal_attention(query, key, value, visible, window)
  np.testing.assert_allclose(found, masked_attention(query, key, value, mask), atol=1e-5)


def test_the_filter_adds_up_the_newest_items_of_a_history_by_channel():
  h = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
  kernel = np.array([[2, 3], [5, 7], [11, 13]], np.float32)
  segments = jnp.array([[1, 1, 1, 1, 2, 2]])
  apply = lambda visible: CausalFilter(3, jnp.float32).apply(
    {'params': {'kernel': kernel}}, h, visible
  )
  expected = h * kernel[0]
  expected[[1, 2, 3, 5]] += h[[0, 1, 2, 4]] * kernel[1]
  np.testing.assert_allclose(apply(visible_history(segments, 2)), expected, rtol=1e-5)
  expected[[2, 3]] += h[[0, 1]] * kernel[2]
  np.testing.assert_allclose(apply(visible_history(segments)), expected, rtol=1e-5)


def test_a_block_with_a_filter_begins_as_attention_alone():
  item_ids = jnp.arange(1, LENGTH + 1).reshape(2, -1)
  init = lambda model: model.init(jax.random.key(0), item_ids, method=states)
  with_filter, plain = small_model(filter_width=4), small_model()
  params = init(with_filter)['params']
  assert not params['blocks_0']['filter'].pop('kernel').any()
  del params['blocks_0']['filter']
  found = with_filter.apply(init(with_filter), item_ids, method=states)
  np.testing.assert_array_equal(found, plain.apply({'params': params}, item_ids, method=states))


def test_two_users_with_the_same_items_in_one_row_have_the_same_states():
  model = small_model()
  hidden = encode(model, large_params(model), [[7, 8, 9, 7, 8, 9]], [[1, 1, 1, 2, 2, 2]])[0]
  np.testing.assert_allclose(hidden[:3], hidden[3:], atol=1e-5)


@each_kind
def test_order_matters(kind):
  model = small_model(**kind)
  hidden = encode(model, large_params(model), [[7, 8, 9], [8, 7, 9]])
  assert np.abs(hidden[0, -1] - hidden[1, -1]).max() > 1e-3


@functools.partial(jax.jit, static_argnums=0)
def states_and_gradients(model: SASRec, params, item_ids):
  def objective(params):
    hidden = model.apply({'params': params}, item_ids, method=states)
    return (hidden.astype(jnp.float32) ** 3).sum(), hidden

  gradients, hidden = jax.grad(objective, has_aux=True)(params)
  return hidden, gradients


@each_kind
def test_empty_rows_empty_tails_and_full_rows_are_finite_in_either_type(kind):
  full = np.arange(1, LENGTH + 1)
  item_ids = jnp.array([np.zeros(LENGTH, int), np.where(full < 5, full, 0), full])
  params = large_params(small_model(**kind))
  hidden = {}
  for dtype in (jnp.dtype('float32'), jnp.dtype('bfloat16')):
    model = small_model(**kind, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(parameter_shapes(model))} == {jnp.dtype('float32')}
    hidden[dtype.name], gradients = states_and_gradients(model, params, item_ids)
    assert hidden[dtype.name].dtype == dtype
    assert np.isfinite(hidden[dtype.name].astype(jnp.float32)).all()
    for gradient in jax.tree.leaves(gradients):
      assert gradient.dtype == jnp.float32
      assert np.isfinite(gradient).all()
      assert np.any(gradient)
  difference = np.abs(hidden['float32'] - hidden['bfloat16'].astype(jnp.float32))
  assert difference.max() < 0.1
  assert difference.mean() < 0.01


@pytest.mark.parametrize(
  ('items', 'length', 'dim', 'blocks', 'heads', 'ffn'), [(30, 12, 8, 2, 2, 6), (7, 3, 6, 1, 3, 10)]
)
def test_number_of_parameters(items, length, dim, blocks, heads, ffn):
  model = SASRec(items, length, dim, blocks, heads, ffn)
  attention = 4 * (dim * dim + dim)
  feed_forward = (dim * ffn + ffn) + (ffn * dim + dim)
  norm = 2 * dim
  embeddings = (items + 1) * dim + length * dim
  expected = embeddings + blocks * (attention + feed_forward + 2 * norm) + norm
  assert sum(x.size for x in jax.tree.leaves(parameter_shapes(model))) == expected


def test_config_describes_the_model():
  config = default.get_config()
  config.update({'max_length': 9, 'dtype': 'bfloat16', 'sasrec': {'dim': 6, 'num_heads': 3}})
  sizes = {'dim': 6, 'num_heads': 3, 'ffn_dim': 64, 'dropout': 0.2}
  expected = SASRec(NUM_ITEMS, 9, **sizes, norm='post', item_scale=0.05, dtype=jnp.bfloat16)
  assert create_model(config, NUM_ITEMS) == UR4Rec(sasrec=expected, losses={'sasrec': 1.0})


def test_item_vectors_are_the_input_embeddings():
  model = small_model()
  params = large_params(model)
  items = model.apply({'params': params}, method='encode_items')
  np.testing.assert_array_equal(items.vectors, params['item_embedding'])
  assert items.content is None


def test_model_dropout_follows_its_key():
  model = small_model()
  params = large_params(model)
  item_ids = jnp.arange(1, LENGTH + 1)[None]

  @jax.jit
  def run(key):
    options = {'deterministic': False, 'rngs': {'dropout': key}, 'method': states}
    return model.apply({'params': params}, item_ids, **options)

  first, again, other = (run(jax.random.key(k)) for k in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-2
  assert np.abs(first - encode(model, params, item_ids)).max() > 1e-2


def drop(rate: float, x, key: int = 0, deterministic: bool = False) -> np.ndarray:
  rngs = {'dropout': jax.random.key(key)}
  return np.asarray(Dropout(rate).apply({}, x, deterministic=deterministic, rngs=rngs))


@pytest.mark.parametrize('shape', [(301, 333), (100_001,), (10, 101, 99)])
@pytest.mark.parametrize('rate', [0.1, 0.5, 0.85])
def test_dropout_drops_its_share_and_keeps_the_mean(rate, shape):
  dropped = drop(rate, jnp.ones(shape))
  rate = round(256 * rate) / 256
  assert dropped.shape == shape
  is_dropped = dropped == 0
  deviation = np.sqrt(rate * (1 - rate) / dropped.size)
  assert abs(is_dropped.mean() - rate) < 5 * deviation
  np.testing.assert_allclose(dropped[~is_dropped], 1 / (1 - rate), rtol=1e-4)
  assert abs(dropped.mean() - 1) < 5 * deviation / (1 - rate)
  # The four bytes of a random word are independent of each other, and so are words.
  flat = is_dropped.reshape(-1)
  for distance in (1, 2, 3, 4):
    both = (flat[:-distance] & flat[distance:]).mean()
    assert abs(both - rate**2) < 5 * np.sqrt(rate**2 / flat.size)


@pytest.mark.parametrize('shape', [(1,), (3,), (1, 7), (5, 3, 3), (0, 4)])
def test_dropout_takes_odd_and_empty_sizes(shape):
  x = jnp.arange(1, 1 + np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
  dropped = drop(0.5, x)
  assert dropped.shape == shape
  assert np.all((dropped == 0) | (dropped == 2 * np.asarray(x)))


def test_dropout_is_a_function_of_its_key():
  x = jnp.ones((40, 40))
  np.testing.assert_array_equal(drop(0.3, x, key=5), drop(0.3, x, key=5))
  assert (drop(0.3, x, key=5) != drop(0.3, x, key=6)).any()


def test_dropout_differs_from_call_to_call():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      dropout = Dropout(0.5, deterministic=False)
      return dropout(x), dropout(x)

  first, second = Twice().apply({}, jnp.ones(200), rngs={'dropout': jax.random.key(0)})
  assert 0.3 < np.mean((first == 0) == (second == 0)) < 0.7


def test_dropout_without_a_rate_or_when_deterministic_is_the_identity():
  x = jax.random.normal(jax.random.key(0), (9, 9))
  np.testing.assert_array_equal(drop(0.0, x), x)
  np.testing.assert_array_equal(drop(0.7, x, deterministic=True), x)


def test_dropout_keeps_the_type_and_passes_the_gradient_of_what_it_keeps():
  def total(x):
    return Dropout(0.3).apply({}, x, deterministic=False, rngs={'dropout': jax.random.key(0)}).sum()

  assert drop(0.3, jnp.ones(8, jnp.bfloat16)).dtype == jnp.bfloat16
  np.testing.assert_array_equal(jax.grad(total)(jnp.ones(101)), drop(0.3, jnp.ones(101)))

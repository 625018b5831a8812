"""Both paths together: causality, packing, caching, missing content, and runs of every variant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from tests.helpers.features import make_features
from tests.helpers.marks import slow
from ur4rec_jax.data.features import Preferences, Tables, TokenTable
from ur4rec_jax.data.input_pipeline import Batch
from ur4rec_jax.models.content import Content
from ur4rec_jax.models.retriever import normalised
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.models.user_tower import HistoryTokens
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings, ReadTables
from ur4rec_jax.training import catalogue_softmax, losses, negatives, objective
from ur4rec_jax.training.stages import make_stages
from ur4rec_jax.training.train_data import TrainData
from ur4rec_jax.training.train_state import parameter_shapes

ITEMS, LENGTH = 7, 6
SMALL = {
  'max_length': LENGTH,
  'sasrec': {'dim': 6, 'num_blocks': 1, 'ffn_dim': 6},
  'retriever': {'dim': 4, 'num_blocks': 1, 'ffn_dim': 4},
  'content': {'hidden_dim': 8},
}


def make(variant: str = 'multimodal', **fields):
  """A small model of the variant, its parameters of ordinary size, and features that fit."""
  config = default.get_config(variant)
  config.update(SMALL)
  config.update(fields)
  features = {name: table for name, table in make_features().items() if name in config.modalities}
  model = create_model(config, ITEMS)
  ones = jnp.ones((1, 1), jnp.int32)
  return config, model, ordinary(model, features, ones, ones), features


def ordinary(model, *arguments):
  """Parameters of ordinary size for these arguments of `encode`."""
  init = functools.partial(model.init, method='encode')
  shapes = jax.eval_shape(init, jax.random.key(0), *arguments)['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), x.dtype), shapes)


def initial(model, features):
  """The parameters that training starts from."""
  ones = jnp.ones((1, 1), jnp.int32)
  init = jax.jit(functools.partial(model.init, method='encode'))
  return init(jax.random.key(0), features, ones, ones)['params']


def encode(model, params, features, item_ids, segment_ids=None):
  item_ids = jnp.asarray(item_ids, jnp.int32)
  segment_ids = (item_ids > 0) if segment_ids is None else jnp.asarray(segment_ids)
  return _encode(model, params, features, item_ids, segment_ids.astype(jnp.int32))


def _encode(model, params, features, item_ids, segment_ids):
  return apply(model, params, features, item_ids, segment_ids, method='encode')


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def apply(model, params, *arguments, method, **options):
  """A method of the model as one program, which is compiled sooner than its many operations."""
  return model.apply({'params': params}, *arguments, method=method, **options)


def test_gradients_of_content_are_summed_in_float32():
  """A sum in bfloat16 would stop growing at 256 of these 4,096 tokens."""
  tower = HistoryTokens(LENGTH, 4, 0.0, jnp.bfloat16)
  content = lambda x: Content(x, x, jnp.ones(x.shape[:2], bool), x)
  wanted = jnp.array([1.0, 2.0, -1.0, 0.5])

  def loss(modalities, item_ids):
    inputs = content(modalities), item_ids, jnp.ones_like(item_ids)
    tokens, _ = tower.apply(params, *inputs, deterministic=True)
    return (tokens['modality_0'] * wanted).sum(dtype=jnp.float32)

  modalities, item_ids = jnp.ones((ITEMS, 1, 4), jnp.bfloat16), jnp.full((1024, 4), 3)
  inputs = content(modalities), item_ids, item_ids
  params = tower.init(jax.random.key(0), *inputs, deterministic=True)
  gradient = jax.jit(jax.grad(loss))(modalities, item_ids)
  np.testing.assert_allclose(gradient[3, 0].astype(jnp.float32), 4096 * wanted, rtol=0.01)


@pytest.mark.parametrize('norm', ['pre', 'post'])
@pytest.mark.parametrize('variant', ['multimodal', *slow('text', 'paper')])
def test_no_path_reads_later_items_or_other_segments(variant, norm):
  _, model, params, features = make(variant, sasrec={'norm': norm}, retriever={'norm': norm})
  items = np.array([[1, 2, 7, 5, 6, 1]])  # All of them have a text.
  segments = np.array([[1, 1, 1, 2, 2, 2]])
  before = encode(model, params, features, items, segments).users
  for place in range(LENGTH):
    changed = items.copy()
    changed[0, place] = {1: 2, 2: 5, 5: 6, 6: 7, 7: 1}[items[0, place]]
    after = encode(model, params, features, changed, segments).users
    reads = (segments[0] == segments[0, place]) & (np.arange(LENGTH) >= place)
    for branch in before:
      moved = np.abs(after[branch] - before[branch])[0].max(-1) > 1e-4
      assert not moved[~reads].any(), (branch, place)
      assert moved[place], (branch, place)


def test_packed_users_are_encoded_as_if_alone_and_padding_changes_nothing():
  _, model, params, features = make()
  packed = encode(model, params, features, [[1, 2, 3, 5, 6, 0]], [[1, 1, 1, 2, 2, 0]]).users
  alone = encode(model, params, features, [[0, 0, 0, 1, 2, 3], [5, 6, 0, 0, 0, 0]]).users
  for branch in packed:
    np.testing.assert_allclose(packed[branch][0, :3], alone[branch][0, 3:], atol=1e-5)
    np.testing.assert_allclose(packed[branch][0, 3:5], alone[branch][1, :2], atol=1e-5)


def test_retriever_with_ids_reads_those_of_the_history():
  _, model, params, features = make()
  items = np.array([[1, 2, 7, 5, 6, 1]])
  before = encode(model, params, features, items).users['retriever']
  for item, first_read in ((7, 2), (6, 4), (3, LENGTH)):
    table = params['retriever']['item_embedding'].at[item].multiply(-1)
    changed = params | {'retriever': params['retriever'] | {'item_embedding': table}}
    after = encode(model, changed, features, items).users['retriever']
    moved = np.abs(after - before)[0].max(-1) > 1e-4
    assert moved.tolist() == [False] * first_read + [True] * (LENGTH - first_read)


def test_a_catalogue_of_some_items_has_their_vectors():
  _, model, params, features = make()
  rows = jnp.array([0, 2, 5, 6, ITEMS + 1])  # The last is nobody.
  vectors = lambda model, params, features: {
    branch: side.vectors
    for branch, side in apply(model, params, features, method='encode_items').items()
  }
  whole = vectors(model, params, features)
  tables = ReadTables(ItemEmbeddings('touched', ITEMS), rows)
  some = vectors(
    model.for_items(4),
    tables.take(params),
    tables.take_features(features),
  )
  for branch in whole:
    np.testing.assert_allclose(some[branch][:4], whole[branch][rows[:4]], atol=1e-6)
  assert tables.renumber(jnp.array([5, 0, 2])).tolist() == [2, 0, 1]


@pytest.mark.parametrize('kind', ['weighted', 'adaptive', *slow('learned', 'rank', 'cascade')])
def test_cached_items_score_as_uncached_and_permuting_items_permutes_scores(kind):
  _, model, params, features = make(fusion={'kind': kind, 'cascade_size': 3})
  history = jnp.array([[1, 2, 3, 5, 6, 7]])
  segments = jnp.ones_like(history)

  @jax.jit
  def scores(params, features, history):
    apply = functools.partial(model.apply, {'params': params})
    items = apply(features, method='encode_items')
    users = apply(items, history, segments, method='encode_users')
    return apply({k: x[:, -1] for k, x in users.items()}, items, method='scores')

  cached = apply(model, params, features, method='encode_items')
  users = apply(model, params, cached, history, segments, method='encode_users')
  last = {branch: x[:, -1] for branch, x in users.items()}
  expected = scores(params, features, history)
  assert expected.shape == (1, ITEMS)
  actual = apply(model, params, last, cached, method='scores')
  np.testing.assert_allclose(actual, expected, atol=1e-5)

  order = np.r_[0, 1 + np.random.default_rng(1).permutation(ITEMS)]
  position = np.argsort(order)
  renamed = jax.tree.map(lambda x: x[order], features)
  moved = jax.tree_util.tree_map_with_path(
    lambda path, x: x[order] if 'item_embedding' in jax.tree_util.keystr(path) else x, params
  )
  permuted = scores(moved, renamed, jnp.asarray(position)[history])
  np.testing.assert_allclose(permuted, expected[:, order[1:] - 1], atol=1e-4)


def test_all_vectors_have_the_type_of_the_computation():
  _, model, params, features = make(dtype='bfloat16')
  encoded = encode(model, params, features, [[1, 2, 3]])
  vectors = [*encoded.users.values(), *encoded.items.values()]
  assert {x.dtype for x in vectors} == {jnp.dtype('bfloat16')}


def test_the_retriever_scores_by_cosine_over_temperature():
  config, model, params, features = make('text')
  encoded = encode(model, params, features, [[1, 2, 3, 5, 6, 7]])
  np.testing.assert_allclose(jnp.linalg.norm(encoded.items['retriever'], axis=1), 1, atol=1e-5)
  temperature = np.exp(params['retriever']['log_temperature'])
  lengths = jnp.linalg.norm(encoded.users['retriever'], axis=-1)
  np.testing.assert_allclose(lengths, 1 / temperature, rtol=1e-5)
  fresh = create_model(config, ITEMS)
  init = initial(fresh, features)
  assert np.exp(init['retriever']['log_temperature']) == pytest.approx(config.retriever.temperature)


@pytest.mark.parametrize('item_input', ['id', 'content', 'id+content'])
@pytest.mark.parametrize('item_id', [True, False])
def test_paths_make_items_of_ids_and_content_independently(item_input, item_id):
  config, model, _, features = make(
    sasrec={'item_input': item_input}, retriever={'item_id': item_id}
  )
  params = parameter_shapes(model, Tables(features, {}))
  has_id = {branch: 'item_embedding' in params[branch] for branch in config.branches}
  assert has_id == {'sasrec': 'id' in item_input, 'retriever': item_id}


def test_zeros_have_a_direction_of_zeros_and_a_finite_gradient():
  value, gradient = jax.value_and_grad(lambda x: normalised(x).sum())(jnp.zeros(3))
  assert value == 0
  assert np.isfinite(gradient).all()


def a_batch(item_ids) -> Batch:
  item_ids = jnp.asarray(item_ids, jnp.int32)
  targets = jnp.pad(item_ids[:, 1:], ((0, 0), (0, 1)))
  inputs = jnp.where(targets > 0, item_ids, 0)
  segments = (targets > 0).astype(jnp.int32)
  nothing = jnp.zeros_like(inputs)
  return Batch(inputs, targets, segments, nothing, nothing[:, :1])


def preferences_of(segment_ids, visible=None, seed: int = 0) -> Preferences:
  """Three tokens a user, the last one masked, for two users a row."""
  segment_ids = jnp.asarray(segment_ids)
  tokens = np.random.default_rng(seed).normal(size=(len(segment_ids), 2, 3, 5))
  mask = jnp.broadcast_to(jnp.array([True, True, False]), tokens.shape[:3])
  visible = segment_ids > 0 if visible is None else visible
  return Preferences({'taste': TokenTable(jnp.asarray(tokens, jnp.float32), mask)}, visible)


def with_preferences(variant: str):
  """A model that reads preferences, and its users' vectors as a function of them."""
  config, _, _, features = make(variant)
  model = create_model(config, ITEMS)
  items = jnp.array([[1, 2, 7, 5, 6, 1]])
  segments = jnp.array([[1, 1, 1, 2, 2, 2]])
  arguments = features, items, segments
  init = functools.partial(model.init, method='encode')
  shapes = jax.eval_shape(init, jax.random.key(0), *arguments, preferences_of(segments))['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), x.dtype), shapes)

  def users(preferences, items=items):
    encoded = apply(model, params, features, items, segments, preferences, method='encode')
    return encoded.users['retriever'][0], encoded.retrieved

  return users, segments


@pytest.mark.parametrize('variant', ['text', 'multimodal', 'paper'])
def test_a_position_reads_its_own_users_tokens_where_it_may(variant):
  users, segments = with_preferences(variant)
  visible = jnp.array([[False, False, True, False, True, True]])
  given = preferences_of(segments, visible)
  before, _ = users(given)
  tokens, mask = given.tables['taste']
  for segment, token in ((1, 0), (1, 1), (2, 0), (1, 2)):
    changed = TokenTable(tokens.at[0, segment - 1, token].add(-1.0), mask)
    after, _ = users(Preferences({'taste': changed}, visible))
    moved = np.abs(after - before).max(-1) > 1e-4
    expected = (segments[0] == segment) & visible[0] & (token < 2)  # The third token is masked.
    np.testing.assert_array_equal(moved, expected, err_msg=f'{segment} {token}')


@pytest.mark.parametrize(
  ('variant', 'fields'),
  [
    ('paper', {}),
    ('text', {'retriever': {'dim': 4, 'cross_modal_blocks': 0, 'num_heads': 2}}),
    ('multimodal', {'sasrec': {'num_heads': 3, 'norm': 'post', 'num_blocks': 2}}),
    ('multimodal', {'retriever': {'dim': 4, 'num_blocks': 0, 'cross_modal_blocks': 0}}),
  ],
)
def test_query_positions_positions_are_what_they_are_among_all(variant, fields):
  _, model, _, features = make(variant, **fields)
  items = jnp.array([[1, 2, 7, 5, 6, 1], [0, 0, 3, 4, 5, 6]])
  segments = jnp.array([[1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1]])
  arguments = items, segments, preferences_of(segments)
  params = ordinary(model, features, *arguments)
  sides = apply(model, params, features, method='encode_items')
  query_positions = jnp.array([[2, 5, 5], [5, 2, 3]])
  every, some = (
    apply(model, params, sides, *arguments, method='encode_users', **cut)
    for cut in ({}, {'query_positions': query_positions})
  )
  for branch in every:
    expected = jnp.take_along_axis(every[branch], query_positions[..., None], axis=1)
    np.testing.assert_allclose(some[branch], expected, atol=1e-4, err_msg=branch)


@pytest.mark.parametrize('variant', ['text', 'multimodal', 'paper'])
def test_a_user_without_history_is_told_by_the_preference_alone(variant):
  users, segments = with_preferences(variant)
  nothing = jnp.zeros((1, LENGTH), jnp.int32)
  first, other = (users(preferences_of(segments, seed=i), nothing)[0] for i in (0, 1))
  assert np.isfinite(first).all()
  assert np.abs(first - other).max() > 1e-3
  unknown, _ = users(preferences_of(segments, segments < 0), nothing)
  assert np.isfinite(unknown).all()


def test_proxies_find_different_things_and_are_causal():
  users, segments = with_preferences('paper')
  given = preferences_of(segments)
  before, retrieved = users(given)
  assert retrieved.shape == (1, LENGTH, 4, 4)
  gaps = jnp.abs(retrieved[..., :, None, :] - retrieved[..., None, :, :]).max(-1)
  assert gaps[..., ~np.eye(4, dtype=bool)].min() > 1e-3
  after, _ = users(given, jnp.array([[1, 2, 7, 5, 2, 1]]))
  moved = np.abs(after - before).max(-1) > 1e-4
  np.testing.assert_array_equal(moved, [False, False, False, False, True, True])


def test_contrast_and_matching_are_what_they_are_called():
  config, model, params, features = make('paper', loss={'contrast_items': 100})
  scale, bias = 0.5, 0.25
  params = params | {'matching_scale': jnp.array(scale), 'matching_bias': jnp.array(bias)}
  batch = a_batch([[1, 2, 3, 5, 6, 7]])
  found, encoded = jax.jit(all_losses(config, model, features, batch))(params)
  ids, weights = batch.targets[0], (batch.targets[0] > 0).astype(jnp.float32)
  target_vectors = encoded.items['retriever'][jnp.maximum(ids - 1, 0)]
  expected = losses.info_nce(
    encoded.retrieved[0], target_vectors, ids, weights, encoded.log_temperature
  )
  np.testing.assert_allclose(found['contrast'], expected, rtol=1e-5)
  users = encoded.users['retriever'][0]
  values = []
  for i in range(5):
    logits = [scale * (users[i] @ target_vectors[j]) + bias for j in (i, i - 1)]
    values.append(np.log1p(np.exp(-logits[0])))
    if i > 0:  # The neighbour of the first is padding.
      values.append(np.log1p(np.exp(logits[1])))
  np.testing.assert_allclose(found['matching'], np.mean(values), rtol=1e-4)


ALL_LOSSES = {
  'sasrec': 1.0,
  'retriever': 1.0,
  'fused': 0.5,
  'consistency': 0.1,
  'info_nce': 0.1,
  'diversity': 0.01,
}


def all_losses(config, model, features, batch):
  tables = Tables(features, {})
  with config.ignore_type():
    config.stages = ('train',)
  ((stage,), _) = make_stages(config, ITEMS, lambda model: parameter_shapes(model, tables))
  compute = objective.make_losses(stage, ITEMS)
  target_ids = batch.targets.reshape(-1)

  def values(params):
    encoded = model.apply(
      {'params': params}, features, batch.item_ids, batch.segment_ids, method='encode'
    )
    data = TrainData(
      jnp.arange(1, ITEMS + 1), jnp.ones(ITEMS), Tables(features, {}), jnp.zeros(0, jnp.int32)
    )
    targets = jnp.maximum(target_ids - 1, 0)
    drawn = negatives.draw_all_negatives(stage, targets, data, jax.random.key(0))
    tokens = (target_ids > 0).sum().astype(jnp.float32)
    return compute(encoded, objective.LossInputs(target_ids, target_ids, drawn, tokens)), encoded

  return values


@pytest.mark.parametrize('fusion', ['gated', *slow('add', 'concat')])
def test_every_loss_and_gradient_is_finite_whatever_is_missing(fusion):
  config, model, params, features = make(
    content={'pooled_vectors': 2, 'fusion': fusion},
    retriever={'fusion': fusion},
    loss={'weights': ALL_LOSSES},
  )

  @jax.jit
  def losses_and_gradients(features, item_ids):
    def total(params):
      found, _ = all_losses(config, model, features, a_batch(item_ids))(params)
      return sum(found.values()), found

    return jax.grad(total, has_aux=True)(params)

  some = [[1, 2, 3, 5, 6, 7], [4, 4, 4, 4, 4, 0], [0, 0, 0, 0, 0, 0]]
  one_without = [[4, 4, 4, 0, 0, 0]] * 3  # Item 4 has no modality.
  nothing = {n: TokenTable(t * 0, m & False) for n, (t, m) in features.items()}
  for seen, item_ids in ((features, some), (features, one_without), (nothing, some)):
    gradients, found = losses_and_gradients(seen, jnp.array(item_ids))
    assert set(found) == set(ALL_LOSSES)
    assert all(np.isfinite(x) for x in found.values()), found
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  assert found['consistency'] == found['info_nce'] == found['diversity'] == 0


@pytest.mark.slow
def test_the_retriever_may_have_a_loss_of_its_own():
  sampled = {'retriever_name': 'sampled_softmax', 'num_negatives': 3}
  config, model, params, features = make(loss={'weights': {'fused': 1.0}, **sampled})
  batch = a_batch([[1, 2, 3, 5, 6, 7]])
  found, _ = jax.jit(all_losses(config, model, features, batch))(params)
  config.loss.retriever_name = 'softmax'
  exact, _ = jax.jit(all_losses(config, model, features, batch))(params)
  assert {name for name in found if found[name] != exact[name]} == {'retriever'}


def test_losses_are_what_they_are_called():
  config, model, params, features = make(
    content={'pooled_vectors': 2}, loss={'weights': ALL_LOSSES, 'contrast_items': 100}
  )
  batch = a_batch([[1, 2, 3, 5, 6, 7]])
  found, encoded = jax.jit(all_losses(config, model, features, batch))(params)
  targets, weights = batch.targets[0] - 1, (batch.targets[0] > 0).astype(jnp.float32)
  for branch in ('sasrec', 'retriever', 'fused'):
    expected = catalogue_softmax.plain_softmax(
      encoded.users[branch][0], encoded.items[branch], jnp.maximum(targets, 0), weights
    )
    np.testing.assert_allclose(found[branch], expected / 5, rtol=1e-4)
  content, ids = encoded.content, batch.targets[0]
  np.testing.assert_allclose(
    found['consistency'], losses.consistency(content.modalities[1:], content.present[1:]), rtol=1e-5
  )
  both = content.present[ids].all(1) * weights
  expected = losses.info_nce(
    content.modalities[ids, 0], content.modalities[ids, 1], ids, both, encoded.log_temperature
  )
  np.testing.assert_allclose(found['info_nce'], expected, rtol=1e-5)


def test_uncertainty_weighting_starts_at_the_weights_and_is_trained():
  no_blocks = {'num_blocks': 0, 'cross_modal_blocks': 0}  # They take long to compile.
  config, model, _, features = make(
    loss={'weighting': 'uncertainty'}, retriever=no_blocks, content={'cross_modal_blocks': 0}
  )
  params = initial(model, features)
  values = all_losses(config, model, features, a_batch([[1, 2, 3, 5, 6, 7]]))

  def total(params):
    found, encoded = values(params)
    return losses.uncertainty_weighted(found, encoded.log_variances)

  gradients = jax.jit(jax.grad(total))(params)
  for name, weight in config.loss.weights.items():
    if weight:
      assert np.exp(-params[f'log_variance_{name}']) == pytest.approx(weight)
      assert gradients[f'log_variance_{name}'] != 0

"""Attention between modalities and pooling: what reads what, with masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.features import make_features
from ur4rec_jax.data.features import TokenTable
from ur4rec_jax.models.attention import visible_history, visible_memory
from ur4rec_jax.models.content import ContentTower
from ur4rec_jax.models.cross_modal import AttentionPool, CrossModalBlock

ROWS, DIM = 4, 6
COUNTS = {'text': 3, 'image': 5, 'audio': 2}


def random_like(shapes, seed: int = 0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), x.dtype), shapes)


def make_tokens(names=tuple(COUNTS)):
  rng = np.random.default_rng(1)
  tokens = {n: jnp.asarray(rng.normal(size=(ROWS, COUNTS[n], DIM)), jnp.float32) for n in names}
  masks = {n: jnp.asarray(rng.random((ROWS, COUNTS[n])) < 0.7) for n in names}
  return tokens, masks


def visible_to_all(masks):
  """Every query may attend to the keys whose mask is True."""
  return {name: visible_memory(mask, max(COUNTS.values())) for name, mask in masks.items()}


def make_block(tokens, visible):
  block = CrossModalBlock(2, 0.0, jnp.float32)
  init = lambda key: block.init(key, tokens, visible, deterministic=True)
  params = random_like(jax.eval_shape(init, jax.random.key(0)))
  return jax.jit(lambda *inputs: block.apply(params, *inputs, deterministic=True))


def test_each_modality_reads_the_visible_tokens_of_the_others_and_itself_alone():
  tokens, masks = make_tokens()
  visible = visible_to_all(masks)
  apply = make_block(tokens, visible)
  jacobian = jax.jacrev(lambda t: {n: x.sum(-1) for n, x in apply(t, visible).items()})(tokens)
  for query, count in COUNTS.items():
    for key, keys in COUNTS.items():
      read = np.abs(jacobian[query][key]).sum(-1) > 0  # [row, token, row, token]
      for row in range(ROWS):
        expected = np.zeros((count, ROWS, keys), bool)
        if query == key:
          expected[:, row] = np.eye(count, dtype=bool)
        else:
          expected[:, row] = np.asarray(masks[key])[row]
        np.testing.assert_array_equal(read[row], expected, err_msg=f'{query} reads {key}')


def test_queries_may_be_kept_from_later_keys():
  tokens, _ = make_tokens(('text', 'image'))
  tokens = {name: x[:, :2] for name, x in tokens.items()}
  causal = dict.fromkeys(tokens, visible_history(jnp.ones((ROWS, 2), jnp.int32)))
  apply = make_block(tokens, causal)
  before = apply(tokens, causal)['text']
  after = apply(tokens | {'image': tokens['image'].at[:, 1, 0].add(1.0)}, causal)['text']
  np.testing.assert_array_equal(after[:, 0], before[:, 0])
  assert np.abs(after[:, 1] - before[:, 1]).max() > 1e-3


def test_where_nothing_is_visible_attention_adds_nothing():
  tokens, masks = make_tokens(('text', 'image'))
  visible = visible_to_all(masks)
  apply = make_block(tokens, visible)
  blind = visible_to_all(masks | {'image': masks['image'] & False})
  garbage = tokens | {'image': tokens['image'] * 1e3}
  np.testing.assert_array_equal(apply(tokens, blind)['text'], apply(garbage, blind)['text'])


def test_pooling_equals_a_plain_computation_and_drops_masked_tokens():
  tokens, masks = make_tokens(('image',))
  tokens, mask = tokens['image'], masks['image'].at[:, 0].set(True)
  pool = AttentionPool(3, jnp.float32)
  params = random_like(pool.init(jax.random.key(0), tokens, mask))
  actual = pool.apply(params, jnp.where(mask[..., None], tokens, 1e5), mask)
  assert actual.shape == (ROWS, 3, DIM)
  kernel, bias = (np.asarray(params['params']['logits'][k]) for k in ('kernel', 'bias'))
  for row in range(ROWS):
    present = np.asarray(tokens[row])[np.asarray(mask[row])]
    weights = np.exp(present @ kernel + bias)
    expected = (weights / weights.sum(0)).T @ present
    np.testing.assert_allclose(actual[row], expected, atol=1e-5)


@pytest.mark.parametrize('fusion', ['add', 'concat', 'gated'])
def test_an_item_changes_with_any_patch_it_has_and_with_no_other(fusion):
  """Through the whole tower, cross-modal attention included."""
  features = make_features()
  tower = ContentTower(DIM, 8, 0.0, cross_modal_blocks=2, num_heads=2, fusion=fusion)
  init = lambda key: tower.init(key, features, deterministic=True)
  params = random_like(jax.eval_shape(init, jax.random.key(0)))
  content = jax.jit(lambda f: tower.apply(params, f, deterministic=True))
  before = content(features)
  tokens, mask = features['image']
  for item in range(len(mask)):
    for patch in range(mask.shape[1]):
      changed = features | {'image': TokenTable(tokens.at[item, patch].add(1.0), mask)}
      moved = np.abs(content(changed).vectors - before.vectors).max(1) > 1e-4
      assert np.flatnonzero(moved).tolist() == [item] * bool(mask[item, patch])
  # A picture's patch reaches what the text says: attention is at work.
  changed = features | {'image': TokenTable(tokens.at[5, 0].add(1.0), mask)}
  text = sorted(features).index('text')
  assert np.abs(content(changed).modalities[5, text] - before.modalities[5, text]).max() > 1e-4


def test_items_without_anything_are_zero_and_harmless():
  features = make_features()
  tower = ContentTower(DIM, 8, 0.0, cross_modal_blocks=1, fusion='gated', pooled_vectors=2)
  apply = functools.partial(tower.apply, deterministic=True)
  params = jax.jit(functools.partial(tower.init, deterministic=True))(jax.random.key(0), features)
  empty = {n: TokenTable(t * 0, m & False) for n, (t, m) in features.items()}

  def total(params):
    content = apply(params, empty)
    return (content.vectors**2).sum() + content.modalities.sum(), content

  gradients, content = jax.jit(jax.grad(total, has_aux=True))(params)
  np.testing.assert_array_equal(content.vectors, 0)
  np.testing.assert_array_equal(content.modalities, 0)
  assert not content.present.any()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  alone = jax.jit(apply)(params, features)
  np.testing.assert_array_equal(alone.vectors[4], 0)  # Item 4 has neither.

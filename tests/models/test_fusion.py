"""Fusion of modalities and of paths, on examples worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur4rec_jax.models import fusion
from ur4rec_jax.models.fusion import BranchFusion, ModalityFusion

KEEP = lambda scores: scores


def test_what_a_fusion_reports_is_what_it_did():
  rng = np.random.default_rng(1)
  vectors = jnp.asarray(rng.normal(size=(5, 2, 4)), jnp.float32)
  present = jnp.asarray([[1, 1], [1, 0], [0, 1], [0, 0], [1, 1]], bool)
  layer = ModalityFusion('gated', ('text', 'image'), jnp.float32)
  params = layer.init(jax.random.key(0), vectors, present)['params']
  _, reported = layer.apply({'params': params}, vectors, present, mutable=(fusion.GATES,))
  gates = reported[fusion.GATES]
  assert sum(gates.values()) == pytest.approx(1)
  side_by_side = jnp.where(present[..., None], vectors, 0).reshape(5, -1)
  odds = jnp.exp(side_by_side @ params['gate']['kernel'] + params['gate']['bias']) * present
  odds = odds[present.any(1)]
  expected = (odds / odds.sum(1, keepdims=True)).mean(0)
  np.testing.assert_allclose([gates['text'], gates['image']], expected, rtol=1e-5)


def test_gates_sum_to_one_over_what_is_present():
  rng = np.random.default_rng(0)
  present = rng.random((50, 3)) < 0.5
  weights = np.asarray(fusion.gates(jnp.asarray(rng.normal(size=(50, 3)) * 50), present))
  np.testing.assert_allclose(weights.sum(1), present.any(1), atol=1e-6)
  np.testing.assert_array_equal(weights[~present], 0)


@pytest.mark.parametrize('kind', fusion.MODALITY_FUSIONS)
def test_what_is_absent_has_no_say(kind):
  rng = np.random.default_rng(0)
  vectors = jnp.asarray(rng.normal(size=(6, 3, 4)), jnp.float32)
  present = jnp.asarray([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0]], bool)
  layer = ModalityFusion(kind, ('a', 'b', 'c'), jnp.float32)
  params = layer.init(jax.random.key(0), vectors, present)
  joined = layer.apply(params, vectors, present)
  garbage = jnp.where(present[..., None], vectors, jnp.nan)
  np.testing.assert_array_equal(layer.apply(params, garbage, present), joined)
  np.testing.assert_array_equal(joined[3], 0)
  if kind == 'gated':  # One present modality is all there is.
    np.testing.assert_allclose(joined[1], vectors[1, 0], atol=1e-6)
    np.testing.assert_allclose(joined[4], vectors[4, 2], atol=1e-6)
  if kind == 'add':
    np.testing.assert_allclose(joined[2], vectors[2, 1] + vectors[2, 2], atol=1e-6)


def sides(seed: int = 0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  users = {'sasrec': draw(5, 4), 'retriever': 30 * draw(5, 3)}
  items = {'sasrec': draw(9, 4), 'retriever': draw(9, 3) + 1}
  return users, items


def by_branch(users, items):
  return [np.asarray(users[p] @ items[p].T) for p in users]


def make(kind: str, **fields):
  fields = {'branches': ('sasrec', 'retriever'), 'weights': (0.7, 0.3)} | fields
  layer = BranchFusion(kind, **fields)
  params = layer.init(jax.random.key(0), *sides())
  return layer, params


def scores(layer, params, users, items, leave_out=KEEP):
  return np.asarray(layer.apply(params, users, items, leave_out, method='scores'))


@pytest.mark.parametrize('kind', fusion.SUMS)
@pytest.mark.parametrize('calibration', fusion.CALIBRATIONS)
def test_a_sum_of_scores_is_what_its_definition_says(kind, calibration):
  """`learned` and `adaptive` start as `weighted`, so one reference serves all three."""
  layer, params = make(kind, calibration=calibration)
  users, items = sides()
  first, second = by_branch(users, items)
  actual = scores(layer, params, users, items)
  if calibration == 'standardise':
    first, second = (x / x.std(1, keepdims=True) for x in (first, second))
  np.testing.assert_allclose(actual, 0.7 * first + 0.3 * second, rtol=1e-4, atol=1e-4)


def test_standardised_paths_do_not_depend_on_their_scales():
  layer, params = make('weighted', calibration='standardise')
  users, items = sides()
  louder = users | {'retriever': users['retriever'] * 100}
  expected = scores(layer, params, users, items)
  np.testing.assert_allclose(scores(layer, params, louder, items), expected, atol=1e-4)


def test_adaptive_weights_differ_by_user_and_leave_the_states_alone():
  layer, params = make('adaptive')
  users, items = sides()
  kernel = params['params']['log_weights']['kernel']
  params['params']['log_weights']['kernel'] = kernel + jnp.linspace(-2, 2, kernel.size).reshape(
    kernel.shape
  )
  vectors, _ = layer.apply(params, users, items)
  # Standardised, so what is left of the ratio of both scales is the weights'.
  first, _ = by_branch(users, items)
  weights = np.linalg.norm(vectors[:, :4], axis=1) / np.linalg.norm(users['sasrec'], axis=1)
  assert np.ptp(weights * first.std(1)) > 1e-2
  weighting = lambda users: layer.apply(params, users, items)[0][:, :4].sum()
  gradient = jax.grad(weighting)(users)
  # The retriever's state moves SASRec's weight, but takes no gradient from it.
  np.testing.assert_array_equal(gradient['retriever'], 0)


def test_learned_weights_get_a_gradient():
  layer, params = make('learned')
  users, items = sides()
  total = lambda params: layer.apply(params, users, items, KEEP, method='scores')[0, 0]
  gradient = jax.grad(total)(params)['params']['log_weights']
  assert np.abs(gradient).min() > 1e-4


def test_reciprocal_rank_by_hand():
  one = jnp.array([[3.0, 1.0, 2.0, 1.0]])  # Ranks 1, 4, 2, 4: equal scores share the worst.
  other = jnp.array([[0.1, 0.4, 0.3, 0.2]])  # Ranks 4, 1, 2, 3.
  actual = fusion.reciprocal_rank([one, other], (2.0, 1.0), 60.0)
  expected = [2 / 61 + 1 / 64, 2 / 64 + 1 / 61, 2 / 62 + 1 / 62, 2 / 64 + 1 / 63]
  np.testing.assert_allclose(actual, [expected], rtol=1e-6)


def test_cascade_by_hand():
  first = jnp.array([[9.0, 8.0, 7.0, 6.0, 5.0]])
  second = jnp.array([[0.1, 0.3, 0.2, 9.0, 8.0]])
  order = lambda size: np.argsort(-np.asarray(fusion.cascade(first, second, size))[0]).tolist()
  assert order(1) == [0, 1, 2, 3, 4]
  assert order(3) == [1, 2, 0, 3, 4]
  assert order(5) == order(50) == [3, 4, 1, 2, 0]


@pytest.mark.parametrize('kind', fusion.BRANCH_FUSIONS)
def test_what_is_left_out_takes_no_place(kind):
  """An item that is left out is last, and the others score as if it were last in every branch."""
  layer, params = make(kind, cascade_size=3)
  users, items = sides()
  hidden = 4
  leave_out = lambda x: x.at[:, hidden].set(-jnp.inf)
  actual = scores(layer, params, users, items, leave_out)
  assert (actual[:, hidden] == -np.inf).all()
  if kind == 'cascade':  # Three of what is left are ranked anew, not three of all.
    first, second = by_branch(users, items)
    for row in range(len(first)):
      left = [i for i in np.argsort(-first[row]) if i != hidden]
      best = sorted(left[:3], key=lambda i: -second[row, i])
      assert np.argsort(-actual[row])[:8].tolist() == best + left[3:]


@pytest.mark.parametrize('kind', fusion.BRANCH_FUSIONS)
def test_permuting_items_permutes_the_scores(kind):
  layer, params = make(kind, cascade_size=3)
  users, items = sides()
  order = np.random.default_rng(2).permutation(9)
  permuted = {branch: x[order] for branch, x in items.items()}
  expected = scores(layer, params, users, items)[:, order]
  np.testing.assert_allclose(scores(layer, params, users, permuted), expected, rtol=1e-4, atol=1e-4)

"""The softmax losses leave out what a user has, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ur4rec_jax import default_config
from ur4rec_jax.data.input_pipeline import Plan, gather_batch
from ur4rec_jax.sharding.devices import AXIS
from ur4rec_jax.sharding.item_embeddings import NOWHERE
from ur4rec_jax.training import catalogue_softmax, losses, softmax_kernel
from ur4rec_jax.training.catalogue_softmax import fused_sampled_softmax, plain_softmax
from ur4rec_jax.training.negatives import Negatives
from ur4rec_jax.training.objective import make_retrieval_loss
from ur4rec_jax.training.seen_items import SeenItems, packed, seen_items
from ur4rec_jax.training.stages import make_stages

NUM_USERS, NUM_ITEMS, DIM = 7, 40, 6


def inputs_and_seen(tokens: int = 23, num_items: int = NUM_ITEMS, seed: int = 0):
  """Inputs of a softmax, and the items of users; some targets are among them, some are not."""
  rng = np.random.default_rng(seed)
  hidden, item_vectors = (jnp.asarray(rng.normal(size=(n, DIM)), 'f4') for n in (tokens, num_items))
  targets = jnp.asarray(rng.integers(0, num_items, tokens), jnp.int32)
  weights = jnp.asarray(rng.random(tokens) < 0.8, jnp.float32)
  items = rng.integers(0, num_items, tokens).astype(np.int32)
  items = np.where(rng.random(tokens) < 0.3, targets, items)
  items[rng.random(tokens) < 0.2] = NOWHERE
  users = jnp.asarray(rng.integers(0, NUM_USERS, tokens), jnp.int32)
  return (hidden, item_vectors, targets, weights), SeenItems(jnp.asarray(items), users, NUM_USERS)


def by_definition(hidden, item_vectors, targets, weights, seen: SeenItems) -> float:
  """Adds up the loss of one token after the other, over the candidates that are left."""
  items_of = [set() for _ in range(NUM_USERS)]
  for user, item in zip(np.asarray(seen.users), np.asarray(seen.items), strict=True):
    items_of[user].add(item)
  total = 0.0
  scores = np.asarray(hidden, np.float64) @ np.asarray(item_vectors, np.float64).T
  for of_token, target, weight, user in zip(scores, targets, weights, seen.users, strict=True):
    left = [i for i in range(len(of_token)) if i == target or i not in items_of[user]]
    total += weight * (np.log(np.exp(of_token[left]).sum()) - of_token[target])
  return float(total)


def assert_same(actual, expected) -> None:
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5)


def of_states_and_items(loss):
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def test_plain_softmax_is_over_the_candidates_that_are_left():
  inputs, seen = inputs_and_seen()
  expected = by_definition(*inputs, seen)
  np.testing.assert_allclose(plain_softmax(*inputs, seen), expected, rtol=1e-5)
  assert expected < plain_softmax(*inputs) - 0.5


@pytest.mark.parametrize('chunk_size', [4, 23, 100])
def test_softmax_in_chunks_is_the_plain_one(chunk_size):
  inputs, seen = inputs_and_seen()
  in_chunks = lambda *arrays: catalogue_softmax.softmax(*arrays, chunk_size, seen)
  plain = lambda *arrays: plain_softmax(*arrays, seen)
  assert_same(of_states_and_items(in_chunks)(*inputs), of_states_and_items(plain)(*inputs))


@pytest.mark.parametrize('chunk_size', [5, 100])
def test_softmax_over_devices_is_the_plain_one(chunk_size):
  """`vmap` stands for devices; each has its own users and a part of the items."""
  (hidden, item_vectors, targets, weights), seen = inputs_and_seen(tokens=24)
  devices = 3
  plain = lambda h, v: plain_softmax(h, v, targets, weights, seen_by_all)
  dealt = lambda x: x.reshape(devices, -1, *x.shape[1:])
  seen_by_all = seen.replace(
    users=seen.users + jnp.repeat(jnp.arange(devices), 8) * NUM_USERS,
    num_users=devices * NUM_USERS,
  )
  rows = dealt(jnp.pad(item_vectors, ((1, -(NUM_ITEMS + 1) % devices), (0, 0))))

  def of_device(hidden, rows, target_ids, weights, items, users):
    own = SeenItems(items, users, NUM_USERS)
    loss = lambda h, v: catalogue_softmax.softmax_over_devices(
      h, v, target_ids, weights, NUM_ITEMS, chunk_size, own
    )
    return jax.value_and_grad(loss, (0, 1))(hidden, rows)

  arrays = [dealt(x) for x in (targets + 1, weights, seen.items, seen.users)]
  mapped = jax.jit(jax.vmap(of_device, axis_name=AXIS))
  values, (of_hidden, of_rows) = mapped(dealt(hidden), rows, *arrays)
  gradients = of_hidden.reshape(-1, DIM), of_rows.reshape(-1, DIM)[1 : NUM_ITEMS + 1]
  expected = jax.value_and_grad(plain, (0, 1))(hidden, item_vectors)
  assert_same((values.sum(), gradients), expected)


def test_sampled_softmax_leaves_out_drawn_items_that_the_user_has():
  inputs, seen = inputs_and_seen()
  targets = inputs[2]
  rng = np.random.default_rng(1)
  drawn = jnp.asarray(rng.integers(0, NUM_ITEMS, 60), jnp.int32)  # Many are drawn several times.
  negatives = Negatives(drawn, jnp.asarray(rng.normal(size=60), jnp.float32))
  config = default_config().loss
  config.chunk_size = 5
  loss = make_retrieval_loss('sampled_softmax', config, NUM_ITEMS)
  ours = lambda *arrays: loss(*arrays, negatives, seen)
  left_out = seen.table(NUM_ITEMS)[seen.users][:, drawn] | (targets[:, None] == drawn)

  def plain(hidden, item_vectors, targets, weights):
    logits = hidden @ item_vectors.T
    positive = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    expected = negatives.log_expected_count
    return losses.sampled_softmax(positive, logits[:, drawn], weights, expected, left_out)

  assert_same(of_states_and_items(ours)(*inputs), of_states_and_items(plain)(*inputs))


def test_a_token_whose_negatives_are_all_seen_has_no_loss_and_no_nan():
  hidden, item_vectors, targets, weights = inputs_and_seen()[0]
  drawn = jnp.array([3, 3, 8])
  items = jnp.where(jnp.arange(len(targets)) % 2, 3, 8)
  seen = SeenItems(items, jnp.zeros_like(targets), 1)
  loss = make_retrieval_loss('sampled_softmax', default_config().loss, NUM_ITEMS)
  ours = lambda h, v: loss(h, v, targets, weights, Negatives(drawn, jnp.zeros(3)), seen)
  assert_same(
    of_states_and_items(ours)(hidden, item_vectors), (0.0, (0 * hidden, 0 * item_vectors))
  )


@settings(max_examples=6)
@given(
  tokens=st.sampled_from([1, 256, 300]),
  num_items=st.sampled_from([1, 31, 512, 700]),
  seed=st.integers(0, 99),
)
def test_the_kernel_is_the_plain_softmax(tokens, num_items, seed):
  inputs, seen = inputs_and_seen(tokens, num_items, seed)
  words = packed(seen.table(num_items))[seen.users]
  ours = softmax_kernel.softmax_gradients(*inputs, seen=words, interpret=True)
  plain = of_states_and_items(lambda *arrays: plain_softmax(*arrays, seen))
  loss, gradients = plain(*inputs)
  assert_same((ours.loss, ours.hidden, ours.items), (loss, *gradients))


def test_the_kernel_is_the_plain_sampled_softmax(monkeypatch):
  (hidden, item_vectors, targets, weights), seen = inputs_and_seen(300, 700)
  rng = np.random.default_rng(1)
  drawn = jnp.asarray(rng.integers(0, 700, 600), jnp.int32)
  negatives = Negatives(drawn, jnp.asarray(rng.normal(size=600), jnp.float32))
  vectors = hidden, item_vectors[targets], item_vectors[drawn]
  is_seen = seen.table(700)[:, drawn]
  words = packed(is_seen)[seen.users]
  interpreted = functools.partial(softmax_kernel.softmax_gradients, interpret=True)
  monkeypatch.setattr(softmax_kernel, 'softmax_gradients', interpreted)

  def plain(hidden, target_vectors, negative_vectors):
    positive, logits = (hidden * target_vectors).sum(-1), hidden @ negative_vectors.T
    left_out = is_seen[seen.users] | (targets[:, None] == drawn)
    return losses.sampled_softmax(positive, logits, weights, negatives.log_expected_count, left_out)

  ours = lambda *vectors: fused_sampled_softmax(*vectors, targets, weights, negatives, words)
  expected, actual = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*vectors) for f in (plain, ours)
  )
  assert_same(actual, expected)


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_packing_keeps_every_bit(users, candidates, seed):
  table = np.random.default_rng(seed).random((users, candidates)) < 0.5
  words = np.asarray(packed(jnp.asarray(table))).view(np.uint32)
  bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
  np.testing.assert_array_equal(bits.reshape(users, -1)[:, :candidates], table)


def test_each_user_of_a_packed_row_has_the_own_items_of_the_row():
  histories = [[5, 9, 2, 5], [7, 1], [3, 4, 8, 6, 9]]
  item_ids = np.concatenate(histories)
  # The last item of a history is a target only.
  plan = Plan(*(np.array(x, np.int32) for x in (
    [[0, 4], [6, 0]], [[3, 1], [4, 0]], [[0, 1], [2, 0]])))  # fmt: skip
  batch = gather_batch(jnp.asarray(item_ids), plan, 6)
  table = np.asarray(seen_items(batch).table(9))
  found = [set(np.flatnonzero(row) + 1) for row in table]
  assert found == [*(set(history[:-1]) for history in histories), set()]


@pytest.mark.parametrize('keeps', [None, 'loss', 'evaluation'])
def test_all_items_are_candidates_if_training_or_evaluation_keeps_them(keeps):
  config = default_config()
  if keeps:
    config[keeps].seen_items = 'keep'
  ((stage,), _) = make_stages(config, NUM_ITEMS, lambda _: {'sasrec': {'anything': 0}})
  assert stage.leaves_out_seen_items == (keeps is None)

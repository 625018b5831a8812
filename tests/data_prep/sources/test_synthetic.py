import re
import struct
import zlib

import numpy as np
import pytest

from data_prep.prepared import prepare
from data_prep.sources import synthetic
from ur4rec_jax.errors import InputError

SEED = 0


@pytest.fixture(scope='module')
def world() -> synthetic.World:
  return synthetic.make_world(2000, 1500, SEED)


@pytest.fixture(scope='module')
def histories(world) -> list[np.ndarray]:
  users, items = synthetic.simulate(world, SEED)
  return np.split(items, np.flatnonzero(users[1:] != users[:-1]) + 1)


def ndcg_at_10(histories, score) -> float:
  """Whole catalogue, last item the target, earlier ones left out, ties against the model."""
  total = 0.0
  for user, items in enumerate(histories):
    scores = np.array(score(user, items[:-1]), np.float64)
    scores[items[:-1]] = -np.inf
    rank = (scores >= scores[items[-1]]).sum()
    total += 1 / np.log2(rank + 1) if rank <= 10 else 0
  return total / len(histories)


def oracle(world, *, attributes: bool = True, order: bool = True):
  """The process's own probabilities, written down a second time, one user at a time."""

  def score(user, history):
    last = history[-1]
    liking = world.popularity.copy()
    if attributes:
      liking *= world.style_liking[user, world.styles] * world.look_liking[user, world.looks]
    topics = world.taste[user] * (world.transition[world.topics[last]] if order else 1)
    totals = np.bincount(world.topics, liking, synthetic.NUM_TOPICS)
    chance = (topics / topics.sum() / totals)[world.topics] * liking
    if order:
      chance *= 1 - synthetic.FOLLOW
      for item, share in zip(world.successors[last], synthetic.SUCCESSOR_WEIGHTS, strict=True):
        chance[item] += synthetic.FOLLOW * share
    return chance

  return score


def test_popularity_is_weak_and_knowing_the_process_is_worth_a_lot(world, histories):
  counts = np.bincount(np.concatenate([h[:-1] for h in histories]), minlength=1500)
  popularity = ndcg_at_10(histories, lambda user, history: counts)
  best = ndcg_at_10(histories, oracle(world))
  assert 0.02 < popularity < 0.045
  assert best > 6 * popularity
  # Each part of the process is worth knowing: what is liked, and what comes after what.
  assert best > 1.3 * ndcg_at_10(histories, oracle(world, attributes=False))
  assert best > 2 * ndcg_at_10(histories, oracle(world, order=False))


def test_chances_are_those_of_the_process(world):
  score = oracle(world)
  for user, last in ((0, 0), (7, 30), (59, 1499)):
    expected = score(user, [last])
    np.testing.assert_allclose(synthetic.chances(world, user, last), expected, rtol=1e-12)
    assert expected.sum() == pytest.approx(1)


def test_sizes(histories):
  lengths = np.array([len(h) for h in histories])
  assert 27 < lengths.mean() < 33
  assert lengths.min() >= 5
  assert all(len(set(h)) == len(h) for h in histories)
  counts = np.sort(np.bincount(np.concatenate(histories), minlength=1500))
  assert counts[150] < 15  # a tenth of the items is rare
  assert counts[-150:].sum() > 0.3 * counts.sum()  # and a tenth has most of the weight


def test_the_same_seed_gives_the_same_data():
  first, again, other = (synthetic.generate(60, 60, seed) for seed in (1, 1, 2))
  for field in ('users', 'items', 'timestamps', 'ratings'):
    np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
  assert first.table == again.table
  assert first.table != other.table
  assert first.timestamps.tolist() != other.timestamps.tolist()
  assert set(np.unique(first.ratings)) <= {1, 2, 3, 4, 5}
  # Users are written in time order, and ids sort like numbers.
  data = prepare.prepare(first)
  assert data.user_names[:2] == ['u01', 'u02']
  np.testing.assert_array_equal(data.timestamps, first.timestamps)


def decode_png(data: bytes) -> np.ndarray:
  """`[height, width, 3]` of a PNG without line filters, checksums verified."""
  assert data[:8] == b'\x89PNG\r\n\x1a\n'
  at, chunks = 8, {}
  while at < len(data):
    (size,) = struct.unpack('>I', data[at : at + 4])
    kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
    assert struct.unpack('>I', data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
      kind + content
    )
    chunks[kind], at = content, at + 12 + size
  width, height, *rest = struct.unpack('>IIBBBBB', chunks[b'IHDR'])
  assert rest == [8, 2, 0, 0, 0]
  assert chunks[b'IEND'] == b''
  lines = np.frombuffer(zlib.decompress(chunks[b'IDAT']), np.uint8).reshape(height, -1)
  assert not lines[:, 0].any()
  return lines[:, 1:].reshape(height, width, 3)


def nearest_neighbour_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
  """Share of rows whose nearest other row has the same label."""
  distances = ((features[:, None] - features[None]) ** 2).sum(-1)
  np.fill_diagonal(distances, np.inf)
  return (labels[distances.argmin(1)] == labels).mean()


def test_pictures_tell_topic_and_look_and_words_tell_topic_and_style():
  num_items = 300
  world = synthetic.make_world(2, num_items, SEED)
  items = list(synthetic.generate(2, num_items, SEED).table.values())

  seen = np.array([item.image is not None for item in items])
  assert 0.9 < seen.mean() < 1
  pictures = np.stack([decode_png(item.image) for item in items if item.image]) / 255
  assert pictures.shape[1:] == (64, 64, 3)
  border = np.concatenate([pictures[:, :6].mean((1, 2)), pictures[:, -6:].mean((1, 2))], axis=1)
  assert nearest_neighbour_accuracy(border, world.topics[seen]) > 0.6
  shapes = np.stack(  # share of pixels near each look's colour
    [(np.abs(pictures * 255 - colour).max(-1) < 45).mean((1, 2)) for _, colour in synthetic.LOOKS],
    axis=1,
  )
  assert (shapes.argmax(1) == world.looks[seen]).mean() > 0.9

  told = np.array([bool(item.description) for item in items])
  assert 0.9 < told.mean() < 1
  words = [set(re.findall('[a-z]+', f'{i.title} {i.description}'.lower())) for i in items]
  vocabulary = sorted(set().union(*words))
  bags = np.array([[word in bag for word in vocabulary] for bag in words], float)
  bags *= -np.log(bags.mean(0))  # rare words tell more
  bags /= np.linalg.norm(bags, axis=1, keepdims=True)
  assert nearest_neighbour_accuracy(bags, world.topics) > 0.85
  assert nearest_neighbour_accuracy(bags, world.styles) > 0.4
  # Which look an item has is in its picture only; chance is 0.2.
  assert nearest_neighbour_accuracy(bags, world.looks) < 0.3
  assert len({item.title for item in items}) == num_items
  for item, topic, style in zip(items, world.topics, world.styles, strict=True):
    topic_genre = synthetic.vocabulary.TOPICS[topic].genre
    assert item.genres == (topic_genre, synthetic.vocabulary.STYLES[style].genre)


@pytest.mark.parametrize(('sizes', 'flag'), [((1, 60, 0), 'users'), ((9, 47, 0), 'items')])
def test_too_small_worlds_are_refused(sizes, flag):
  with pytest.raises(InputError, match=f'--num_{flag} must be'):
    synthetic.generate(*sizes)

"""What content could tell: guesses beside plain loops, and data with known answers."""

import json
import math

import numpy as np

from benchmarks.quality import accuracy, content_signal
from tests.helpers.runs import make_dataset
from tests.helpers.stored_results import BASE, rows, store
from ur4rec_jax.data.features import TokenTable

GROUPS, MEMBERS = 4, 15  # Kinds of items, and items of each.


def histories_of_one_kind(num_users: int, seed: int = 0) -> list[np.ndarray]:
  """Each user takes a dozen items of one kind; item i is of kind (i - 1) // MEMBERS."""
  rng = np.random.default_rng(seed)
  kinds = rng.integers(0, GROUPS, num_users)
  return [1 + kind * MEMBERS + rng.permutation(MEMBERS)[:12] for kind in kinds]


def tokens_by_kind(noise: float, seed: int = 0) -> TokenTable:
  """One token an item that tells its kind, and row 0 empty."""
  rng = np.random.default_rng(seed)
  tokens = np.repeat(np.eye(GROUPS), MEMBERS, axis=0)
  tokens = np.concatenate([tokens[:1] * 0, tokens + noise * rng.normal(size=tokens.shape)])
  return TokenTable(tokens[:, None].astype(np.float32), np.arange(len(tokens))[:, None] > 0)


def test_what_followed_an_item_counts_by_its_distance():
  train_part = make_dataset([[1, 2, 3, 4, 4], [2, 3, 1, 1, 1]], num_items=5).train_part()
  assert train_part.item_ids.tolist() == [1, 2, 3, 2, 3, 1]
  guess = content_signal.guess_by_interactions(train_part).toarray()
  expected = np.zeros((6, 6))
  expected[1, [2, 3]] = np.array([1, 1 / 2]) / (3 / 2)
  expected[2, [1, 3]] = np.array([1 / 2, 2]) / (5 / 2)
  expected[3, 1] = 1
  np.testing.assert_allclose(guess, expected, rtol=1e-6)


def test_like_items_are_guessed_the_more_the_more_popular():
  vectors = np.array([[0, 0], [1, 0], [1, 0], [0, 1]])
  guess = content_signal.guess_by_content(vectors, np.array([0, 1, 2, 3]), 0.5)
  weights = np.array([0, math.e**2, 2 * math.e**2, 3])
  np.testing.assert_allclose(guess[1], weights / weights.sum(), rtol=1e-6)


def test_judging_equals_a_loop_over_users():
  dataset = make_dataset(histories_of_one_kind(20), num_items=GROUPS * MEMBERS)
  train_part = dataset.train_part()
  counts = train_part.item_counts()
  interactions = content_signal.guess_by_interactions(train_part)
  vectors = content_signal.content_vectors([tokens_by_kind(noise=0.3)])
  content = content_signal.guess_by_content(vectors, counts, 0.2)
  found = content_signal.judge(dataset, interactions, content)
  for at, share in enumerate(content_signal.SHARES):
    joined = (1 - share) * interactions.toarray() + share * content
    gains, before = [], []
    for user, length in enumerate(dataset.lengths):
      *seen, target = dataset.item_ids[dataset.offsets[user] :][: length - 1]
      scores = sum(joined[item] / (i + 1) for i, item in enumerate(reversed(seen[-10:])))
      others = [item for item in range(1, 61) if item not in (*seen, target)]
      rank = 1 + sum(scores[item] >= scores[target] - 1e-7 for item in others)
      gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0)
      near = [i for i in others if counts[target] / 1.25 <= counts[i] <= counts[target] * 1.25]
      wins = [(1 + np.sign(round(scores[target] - scores[i], 7))) / 2 for i in near]
      before += [np.mean(wins)] if wins else []
    np.testing.assert_allclose(found[0][at], np.mean(gains), rtol=1e-6)
    np.testing.assert_allclose(found[1][at], np.mean(before), rtol=1e-6)


def test_content_that_tells_the_kind_finds_the_next_item_and_shuffled_does_not():
  dataset = make_dataset(histories_of_one_kind(60), num_items=GROUPS * MEMBERS)
  tables = {'text': tokens_by_kind(noise=0.1), 'image': tokens_by_kind(noise=5.0, seed=1)}
  found = {x['source']: x for x in content_signal.signals(dataset, tables)}
  assert [*found] == ['interactions', 'image', 'text', 'image + text', 'image + text, shuffled']
  assert found['text']['before'] > 0.9 > 0.7 > found['image']['before']
  assert 0.35 < found['image + text, shuffled']['before'] < 0.65
  assert found['interactions']['joined'] == found['interactions']['ndcg@10']


def test_what_one_modality_tells_of_another():
  rng = np.random.default_rng(0)
  source = rng.normal(size=(200, 6))
  noise = rng.normal(size=(200, 5))
  explained, more_like = content_signal.agreement(source, source @ rng.normal(size=(6, 5)))
  assert explained > 0.5
  assert more_like > 0.95
  explained, more_like = content_signal.agreement(source, noise)
  assert explained < 0.02
  assert 0.4 < more_like < 0.6


def test_signals_on_the_page(tmp_path):
  store(tmp_path, 'joined', BASE)
  signals = [
    {'source': 'interactions', 'ndcg@10': 0.1, 'joined': 0.1, 'before': 0.8},
    {'source': 'text', 'ndcg@10': 0.05, 'joined': 0.12, 'before': 0.7},
  ]
  agreements = [{'from': 'text', 'to': 'image', 'explained': 0.037, 'matched': 0.75}]
  folder = tmp_path / 'content_signal'
  folder.mkdir()
  found = {'signals': signals, 'agreements': agreements}
  (folder / 'joined.json').write_text(json.dumps(found))
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  assert '| joined | text | 0.0500 | 0.1200 | +20.0 % | 0.700 |' in page
  assert rows(page, 'modality', 'predicts')['joined']['explained'] == '3.7 %'

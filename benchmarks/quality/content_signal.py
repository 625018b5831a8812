"""Measures how well texts and pictures predict the next item and each other, without training.

  python -m benchmarks.quality.content_signal --name=ml-100k-multimodal \
    --data_dir=data/movielens_100k --modalities=text,image

The validation item is guessed from the ten items before it; later items weigh more. The first guess
uses the items that followed them in other users' training histories (interactions). The second
prefers popular items with similar content. The third is the sum of both. The lead of the sum over
interactions alone estimates, before any training, how much content can add.

Then ridge regression predicts one modality from another, judged on unseen items.

Writes `benchmarks/results/content_signal/NAME.json`, from which `benchmarks.quality.accuracy` makes
two tables of docs/results.md. NAME must be the name of stored results.
"""

import argparse
import itertools
from collections.abc import Iterator

import numpy as np
import scipy.sparse

from benchmarks.quality.accuracy import name_of_results, store_beside
from configs import default
from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import TokenTable, load_with_features, read_tables
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.evaluation.metrics import gains

REACH = 10  # Items before the held-out one that the guesses use.
TEMPERATURES = (0.1, 0.2, 0.4)  # Cosines are divided by one of these.
SHARES = (0.0, 0.2, 0.5, 0.8, 1.0)  # Weights of content in the sum of both guesses.
RIDGES = (1.0, 10.0, 100.0)  # Penalties, in units of the mean square of the source vectors.
FOLDS = 5
USERS_AT_ONCE = 256


def content_vectors(tables: list[TokenTable]) -> np.ndarray:
  """Returns each item's mean token, `[items + 1, width]`, centred, scaled to length 1, joined."""
  parts = []
  for tokens, mask in tables:
    count = mask.sum(1, keepdims=True)
    mean = tokens.astype(np.float32).sum(1) / np.maximum(count, 1)
    mean = np.where(count > 0, mean - mean.sum(0) / (count > 0).sum(), 0)
    parts.append(mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12))
  return np.concatenate(parts, axis=1)


def guess_by_interactions(train_part: Dataset) -> scipy.sparse.csr_array:
  """Returns `[items + 1, items + 1]`: how often each item followed another; rows sum to 1."""
  ids, user = train_part.item_ids, train_part.owners
  pairs = []
  for distance in range(1, REACH + 1):
    is_same_user = user[:-distance] == user[distance:]
    before, after = ids[:-distance][is_same_user], ids[distance:][is_same_user]
    pairs.append((np.full(len(before), 1 / distance, np.float32), before, after))
  values, before, after = (np.concatenate(x) for x in zip(*pairs, strict=True))
  shape = (train_part.num_items + 1,) * 2
  follows = scipy.sparse.csr_array((values, (before, after)), shape=shape)
  return scipy.sparse.diags_array(1 / np.maximum(follows.sum(1), 1e-12)) @ follows


def guess_by_content(vectors: np.ndarray, counts: np.ndarray, temperature: float) -> np.ndarray:
  """Returns `[items + 1, items + 1]`: popularity times exp(cosine / temperature); rows sum to 1."""
  guess = counts.astype(np.float32) * np.exp(vectors @ vectors.T / temperature)
  return guess / guess.sum(1, keepdims=True)


def judge(
  dataset: Dataset, interactions: scipy.sparse.csr_array, content: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Measures how well both guesses, added with each weight of `SHARES`, find the validation items.

  Args:
    dataset: provides the validation items.
    interactions: the guess of `guess_by_interactions`.
    content: the guess of `guess_by_content`.

  Returns:
    NDCG@10 over the whole catalogue without the user's seen items, ties against the guess,
    `[shares]`; and how often the item is ranked above another item whose popularity differs by at
    most a quarter, `[shares]`. Chance is 0.5, and popularity alone does not help.
  """
  counts = dataset.train_part().item_counts()
  users, targets = dataset.held_out('valid')
  ends = dataset.split.held_out['valid'][users]
  ndcg, before = [], []
  for at in range(0, len(users), USERS_AT_ONCE):
    block = slice(at, at + USERS_AT_ONCE)
    histories = [
      dataset.item_ids[dataset.offsets[u] : dataset.offsets[u] + end]
      for u, end in zip(users[block], ends[block], strict=True)
    ]
    recent = [history[::-1][:REACH] for history in histories]
    rows = np.repeat(np.arange(len(recent)), [len(ids) for ids in recent])
    weights = np.concatenate([1 / np.arange(1, len(ids) + 1, dtype=np.float32) for ids in recent])
    shape = len(recent), dataset.num_items + 1
    recent = scipy.sparse.csr_array((weights, (rows, np.concatenate(recent))), shape=shape)
    is_other = np.ones(shape, bool)
    is_other[:, 0] = False
    for i, history in enumerate(histories):
      is_other[i, history] = False
    own = np.arange(len(histories)), targets[block]
    is_other[own] = False
    popularity = counts[targets[block]][:, None]
    is_near = is_other & (counts >= popularity / 1.25) & (counts <= popularity * 1.25)
    has_near = is_near.any(1)
    of_interactions, of_content = (recent @ interactions).toarray(), recent @ content
    ndcg.append([])
    before.append([])
    for share in SHARES:
      scores = (1 - share) * of_interactions + share * of_content
      score = scores[own][:, None]
      ndcg[-1].append(gains(1 + ((scores >= score) & is_other).sum(1), 10))
      wins = ((score > scores) + (score == scores) / 2) * is_near
      before[-1].append(wins.sum(1)[has_near] / is_near.sum(1)[has_near])
  return tuple(np.concatenate(x, axis=1).mean(1) for x in (ndcg, before))


def signals(dataset: Dataset, tables: dict[str, TokenTable]) -> Iterator[dict[str, str | float]]:
  """Judges interactions, each modality, all modalities together, and these with shuffled items.

  Yields:
    For each its `source`, its `ndcg@10` and `before` alone, as `judge` returns them, and `joined`,
    the best NDCG@10 together with interactions. Each value is the best over `TEMPERATURES`.
  """
  train_part = dataset.train_part()
  interactions = guess_by_interactions(train_part)
  sets = {name: content_vectors([table]) for name, table in sorted(tables.items())}
  if len(tables) > 1:
    sets[' + '.join(sorted(tables))] = content_vectors([x for _, x in sorted(tables.items())])
  last = [*sets][-1]
  order = np.random.default_rng(0).permutation(dataset.num_items) + 1
  sets[f'{last}, shuffled'] = sets[last][np.r_[0, order]]
  for i, (name, vectors) in enumerate(sets.items()):
    guesses = (guess_by_content(vectors, train_part.item_counts(), t) for t in TEMPERATURES)
    judged = [judge(dataset, interactions, guess) for guess in guesses]
    ndcg, before = (np.max(x, axis=0) for x in zip(*judged, strict=True))
    if i == 0:
      yield {'source': 'interactions', 'ndcg@10': ndcg[0], 'joined': ndcg[0], 'before': before[0]}
    yield {
      'source': name,
      'ndcg@10': ndcg[-1],
      'joined': ndcg[1:-1].max(),
      'before': before[-1],
    }


def agreement(source: np.ndarray, target: np.ndarray) -> tuple[float, float]:
  """Predicts one set of item vectors `[items, width]` from another by ridge regression.

  Returns:
    The explained share of the variance of unseen items; and how often a prediction is closer to the
    vector of its own item than to that of another item (chance is 0.5).
  """
  order = np.random.default_rng(0).permutation(len(source))
  found = []
  for ridge in RIDGES:
    missed, total, wins = 0.0, 0.0, []
    for fold in range(FOLDS):
      is_unseen = np.isin(np.arange(len(source)), order[fold::FOLDS])
      means = source[~is_unseen].mean(0), target[~is_unseen].mean(0)
      a, b = source - means[0], target - means[1]
      seen = a[~is_unseen]
      penalty = ridge * np.square(seen).sum(1).mean() * np.eye(a.shape[1])
      expected = a[is_unseen] @ np.linalg.solve(seen.T @ seen + penalty, seen.T @ b[~is_unseen])
      actual = b[is_unseen]
      missed += np.square(expected - actual).sum()
      total += np.square(actual).sum()
      unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
      cosine = unit(expected) @ unit(actual).T
      wins.append((cosine < np.diagonal(cosine)[:, None]).sum(1) / (len(cosine) - 1))
    found.append((1 - missed / total, np.concatenate(wins).mean()))
  return tuple(float(max(values)) for values in zip(*found, strict=True))


def agreements(tables: dict[str, TokenTable]) -> Iterator[dict[str, str | float]]:
  """Yields the `agreement` of each pair of modalities, on the items that have both."""
  for source, target in itertools.permutations(sorted(tables), 2):
    has_both = tables[source].mask.any(1) & tables[target].mask.any(1)
    rows = (content_vectors([tables[name]])[has_both] for name in (source, target))
    explained, matched = agreement(*rows)
    yield {'from': source, 'to': target, 'explained': explained, 'matched': matched}


@exit_on_reported_error
def main() -> None:
  """Measures a prepared folder, stores the findings and writes the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--name', type=name_of_results, required=True, help='name of stored results')
  parser.add_argument('--data_dir', required=True, help='prepared data with embeddings')
  parser.add_argument('--modalities', default='text', help='comma-separated names')
  parser.add_argument('--max_item_tokens', type=int, default=1, help='tokens to read; 0 for all')
  flags = parser.parse_args()
  config = default.get_config()
  config.data_dir, config.max_item_tokens = flags.data_dir, flags.max_item_tokens
  config.modalities = tuple(flags.modalities.split(','))
  dataset = load_with_features(config)
  tables = read_tables(dataset).items
  found = {'signals': list(signals(dataset, tables)), 'agreements': list(agreements(tables))}
  store_beside(flags.name, 'content_signal', found)


if __name__ == '__main__':
  main()

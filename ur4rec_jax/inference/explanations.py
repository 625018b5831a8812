"""Why an item was recommended: the items of the history and the texts that speak for it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ur4rec_jax.encoders import text
from ur4rec_jax.inference.recommender import Ids
from ur4rec_jax.inference.trained import TEXT, TrainedRecommender

_MOST_REASONS = 3


def explain(
  recommender: TrainedRecommender,
  history: Ids,
  items: Sequence[str],
  users: Sequence[int] | None = None,
  preference: str | None = None,
) -> list[dict[str, Any]]:
  """Gives the reasons for each of some items.

  Args:
    recommender: that recommended them.
    history: item ids, the oldest first.
    items: what was recommended.
    users: the index of the user in the training data, in a list, or None.
    preference: what the user said.

  Returns:
    For each item `because`, the items of the history with most influence (see
    `TrainedRecommender.influences`), and `text`: the sentence about the item and the one of the
    user that are most alike, and their cosine in the space of the frozen encoder; None where the
    model reads no texts, or the sentences are not known. The sentences of the user are those of
    the preference, of what was written about the user, or else of the items of the history.
  """
  known, _ = recommender.lookup(history)
  known = known[-recommender.max_length :]
  influences = recommender.influences(history, items, users)
  matches = _matches(recommender, known, items, users, preference)
  reasons = []
  for at in range(len(items)):
    best = np.argsort(-influences[:, at], kind='stable')[:_MOST_REASONS]
    because = [
      {
        'item': recommender.item_ids[known[i] - 1],
        'title': recommender.titles[known[i] - 1],
        'influence': float(influences[i, at]),
      }
      for i in best
      if influences[i, at] > 0
    ]
    reasons.append({'because': because, 'text': matches[at]})
  return reasons


def _matches(recommender, known, items, users, preference) -> list[dict[str, Any] | None]:
  nothing = [None] * len(items)
  features = recommender.dataset.features.get(TEXT)
  if features is None or features.is_shuffled or '0' not in features.info['token_meaning']:
    return nothing
  data_dir = recommender.config.data_dir
  wanted = [recommender.lookup([item])[0][0] - 1 for item in items]
  last = recommender.dataset.num_items
  rows = sorted({i for i in (*wanted, *(known - 1)) if i < last})
  sentences = dict(_chosen(text.texts(data_dir, 'item', features.shape[1] - 1), rows))
  vectors = dict(zip(rows, _sentence_vectors(features, rows), strict=True))
  own = recommender.dataset.user_features.get(TEXT)
  if preference is not None:
    source = own or features
    tokens, mask = text.encode_like(source.folder, source.info, preference)
    theirs = text.split(preference)[: len(tokens) - 1]
    of_user = _unit(tokens[1:][mask[1:]])
  elif own is not None and users is not None and own.rows(users)[1].any():
    written = text.texts(data_dir, 'user', own.shape[1] - 1)
    ((_, theirs),) = _chosen(written, list(users))
    theirs, of_user = theirs[1:], _sentence_vectors(own, list(users))[0]
  else:
    seen = [i for i in dict.fromkeys((known - 1).tolist()) if i < last and len(vectors[i])]
    if not seen:
      return nothing
    theirs = [sentence for i in seen for sentence in sentences[i][1:]]
    of_user = np.concatenate([vectors[i] for i in seen])
  found = []
  for i in wanted:
    if i >= last or not len(vectors[i]) or of_user.shape[1:] != vectors[i].shape[1:]:
      found.append(None)
      continue
    cosines = vectors[i] @ of_user.T
    one, other = np.unravel_index(cosines.argmax(), cosines.shape)
    found.append(
      {
        'item': sentences[i][1:][one],
        'user': theirs[other],
        'cosine': float(cosines[one, other]),
      }
    )
  return found


def _chosen(texts: Iterable[list[str]], rows: list[int]) -> list[tuple[int, list[str]]]:
  wanted = set(rows)
  return [(i, found) for i, found in enumerate(texts) if i in wanted]


def _sentence_vectors(features: Any, rows: list[int]) -> list[np.ndarray]:
  """For each row `[sentences, width]`, of length 1: token 0 is of the whole text."""
  tokens, mask = features.rows(np.array(rows, int))
  return [_unit(t[1:][m[1:]]) for t, m in zip(tokens, mask, strict=True)]


def _unit(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

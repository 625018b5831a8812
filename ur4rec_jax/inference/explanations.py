"""Explains a recommendation: items of the history and sentences that support it."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ur4rec_jax.data.features import Features
from ur4rec_jax.encoders import text
from ur4rec_jax.inference import reasons
from ur4rec_jax.inference.new_items import TEXT
from ur4rec_jax.inference.passages import without_numbers
from ur4rec_jax.inference.query import Ids

if TYPE_CHECKING:
  from ur4rec_jax.inference.trained import TrainedRecommender

_COMMON = 0.05  # Sentences that a larger share of the items has say nothing about a single item.


class _Sentences(NamedTuple):
  """Sentences about an item or a user, and their embeddings.

  Attributes:
    texts: the sentences.
    vectors: `[sentences, width]`, of length 1.
  """

  texts: list[str]
  vectors: np.ndarray


def explain(
  recommender: 'TrainedRecommender',
  history: Ids,
  items: Sequence[str],
  users: Sequence[int] | None = None,
  preference: str | None = None,
  weights: Sequence[float] | np.ndarray | None = None,
) -> list[dict[str, Any]]:
  """Explains why items were recommended to a user.

  Args:
    recommender: the recommender that recommended them.
    history: the user's item ids, the oldest first.
    items: ids of the recommended items.
    users: a list with the user's index in the training data, or None.
    preference: the preference that was given, or None.
    weights: `[branches]` factors of the branches' scores that were given, or None.

  Returns:
    One dict per item. `because` has the items of the history with the most influence, see
    `Recommender.influences`, and `why` is a sentence that names them. `text` has the passage about
    the item and the sentence about the user that are most alike, and their cosine in the space of
    the frozen encoder. No item with another text has that passage, see `passages.distinctive`.
    `text` is None if the model reads no texts or there is no such passage. The user's sentences are
    those of the preference, or those that were written about the user, or those about the items of
    the history. Sentences about users or items of the history are left out if more than 5 % of the
    users, or items, have them, also with other numbers in them.
  """
  own_texts = None if users is None else recommender.preferences_of(users)
  influences = recommender.influences(history, items, own_texts, weights, preference)
  known = recommender.lookup(history)[0]
  known = known[len(known) - len(influences) :]  # Those that the model reads.
  found = []
  for column, match in enumerate(_text_matches(recommender, known, items, users, preference)):
    named = reasons.because(influences[:, column], known, recommender.item_ids, recommender.titles)
    found.append({'because': named, 'why': reasons.why(named), 'text': match})
  return found


def _text_matches(
  recommender: 'TrainedRecommender',
  known: np.ndarray,
  items: Sequence[str],
  users: Sequence[int] | None,
  preference: str | None,
) -> list[dict[str, Any] | None]:
  """Returns the best pair of sentences for each item."""
  features = recommender.dataset.features.get(TEXT)
  if features is None or features.is_shuffled or '0' not in features.info['token_meaning']:
    return [None] * len(items)
  rows = (recommender.lookup(items, 'items')[0] - 1).tolist()
  # Items that were added after training have features, but their texts are not stored.
  stored = {row for row in (*rows, *(known - 1).tolist()) if row < recommender.dataset.num_items}
  all_sentences = _stored_sentences(recommender, 'item', features, sorted(stored), most=1.0)
  about_user = _user_sentences(recommender, users, preference)
  if about_user is None:
    about_items = _stored_sentences(recommender, 'item', features, sorted(stored))
    in_history = [
      about_items[row]
      for row in dict.fromkeys((known - 1).tolist())
      if row in about_items and len(about_items[row].vectors)
    ]
    if not in_history:
      return [None] * len(items)
    about_user = _Sentences(
      [sentence for found in in_history for sentence in found.texts],
      np.concatenate([found.vectors for found in in_history]),
    )
  passages = {
    row: _passages(recommender.passages[row], all_sentences[row]) for row in rows if row in stored
  }
  return [_best_pair(passages.get(row), about_user) for row in rows]


def _passages(chosen: list[str], sentences: _Sentences) -> _Sentences:
  """Returns the passages of an item; their vectors are the means of those of their sentences."""
  vectors = [
    vectors.mean(0)
    for passage in chosen
    if len(vectors := sentences.vectors[[text in passage for text in sentences.texts]])
  ]
  return _Sentences(chosen, _unit(np.array(vectors)) if vectors else np.zeros((0, 0)))


def _user_sentences(
  recommender: 'TrainedRecommender', users: Sequence[int] | None, preference: str | None
) -> _Sentences | None:
  """Returns the sentences of the preference, or those that were written about the user."""
  written = recommender.dataset.user_features.get(TEXT)
  if preference is not None:
    source = written or recommender.dataset.features[TEXT]
    tokens, mask = text.encode_like(source.folder, source.info, preference)
    return _Sentences(text.split(preference)[: len(tokens) - 1], _unit(tokens[1:][mask[1:]]))
  if written is not None and users is not None and written.rows(users)[1].any():
    (user,) = users
    found = _stored_sentences(recommender, 'user', written, [user])[user]
    return found if found.texts else None
  return None


def _stored_sentences(
  recommender: 'TrainedRecommender',
  of: str,
  features: Features,
  rows: list[int],
  most: float = _COMMON,
) -> dict[int, _Sentences]:
  """Reads the sentences about some items or users by row, without those that many share."""
  chosen, texts, counts = set(rows), {}, Counter()
  stored = text.texts(recommender.config.data_dir, of, features.shape[1] - 1)
  for row, parts in enumerate(stored):
    # Token 0 and the first text stand for the whole text, not for a sentence.
    counts.update({without_numbers(part) for part in parts[1:]})
    if row in chosen:
      texts[row] = parts[1:]
  most = max(2, most * features.shape[0])
  tokens, mask = features.rows(np.array(rows, int))
  found = {}
  for row, t, m in zip(rows, tokens, mask, strict=True):
    kept = [i for i, part in enumerate(texts[row]) if counts[without_numbers(part)] <= most]
    found[row] = _Sentences([texts[row][i] for i in kept], _unit(t[1:][m[1:]])[kept])
  return found


def _best_pair(about_item: _Sentences | None, about_user: _Sentences) -> dict[str, Any] | None:
  """Returns the two most similar sentences, None if there are none or other encoders made them."""
  if about_item is None or not len(about_item.vectors):
    return None
  if about_item.vectors.shape[1:] != about_user.vectors.shape[1:]:
    return None
  cosines = about_item.vectors @ about_user.vectors.T
  i, j = np.unravel_index(cosines.argmax(), cosines.shape)
  return {
    'item': about_item.texts[i],
    'user': about_user.texts[j],
    'cosine': float(cosines[i, j]),
  }


def _unit(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

"""Ranks the catalogue for histories of original item ids. Needs only jax and NumPy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ur4rec_jax.errors import InputError

# Histories are padded to a multiple of these, one user's less than many users', batches to the next
# of these sizes, lists of items to leave out and numbers of places to a power of two: each
# combination is compiled once.
LENGTH_STEP, BATCH_LENGTH_STEP = 16, 32
BATCH_SIZES = (1, 4, 16, 64, 256)
_MOST_SCORES = 1 << 26  # In memory at once.
Ids = Sequence[str | int]


class Answer(NamedTuple):
  """The best items of some users; lists have an entry a user.

  Attributes:
    items: original ids, the best first; fewer than asked for where nothing else is left.
    titles: theirs.
    scores: `[items]` float32.
    shares: `[items, shares]` float32 in the order of `Recommender.share_names`.
    unknown: items of the history that are not in the catalogue and were ignored.
  """

  items: list[list[str]]
  titles: list[list[str]]
  scores: list[np.ndarray]
  shares: list[np.ndarray]
  unknown: list[list[str]]


class Asked(NamedTuple):
  """What some users ask for, looked up and checked; lists have an entry a user.

  Attributes:
    known: `[items]` int32 ids of the history.
    unknown: items of the history that are not in the catalogue.
    left_out: `[any]` int32 ids that are not recommended.
    allowed: `[items + 1]` bool, what may be recommended to any of them; None for all.
    emphasis: `[users, branches]` float32.
  """

  known: list[np.ndarray]
  unknown: list[list[str]]
  left_out: list[np.ndarray]
  allowed: np.ndarray | None
  emphasis: np.ndarray


class Users(NamedTuple):
  """Users of the training data.

  Attributes:
    index: of each by original id.
    offsets: `[users + 1]`, where the history of each begins in `items`.
    items: `[interactions]` int32 item ids, the oldest of each user first.
    preferences: by modality tokens `[users, tokens, width]` and mask `[users, tokens]`.
  """

  index: dict[str, int]
  offsets: np.ndarray
  items: np.ndarray
  preferences: dict[str, tuple[np.ndarray, np.ndarray]]


class Recommender:
  """Ranks the catalogue for histories of original ids.

  Attributes:
    item_ids: `[items]` original ids.
    titles: `[items]`.
    share_names: what scores are made of, see `Answer.shares`.
    branches: names of the model's branches, the order of `emphasis`.
    max_length: how many items of a history it reads, the latest.
    about: dataset, protocol and metrics of the training run.
    batch_sizes: to which batches are padded.
    most_k: the most items that can be recommended.
    known_users: those that were exported, or None.
  """

  def __init__(
    self,
    program: Callable,
    arrays: dict[str, Any],
    items: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    known_users: Users | None = None,
  ):
    """Places everything on the device.

    Args:
      program: from `scoring.make_program`, or what `jax.export` made of it, under `jax.jit`.
      arrays: what it reads.
      items: `ids` and `titles`.
      settings: `paths`, `share_names`, `max_length`; `preferences`, by modality the number of a
        user's tokens and their width; `most_places`, the largest k or None; `about`.
      known_users: that `user` knows.
    """
    self.item_ids, self.titles = list(items['ids']), list(items['titles'])
    self.branches, self.share_names = list(settings['paths']), list(settings['share_names'])
    self.max_length, self.about = settings['max_length'], settings['about']
    self._most_places = settings['most_places']
    self._preferences = settings['preferences']
    self._place_of = {name: i for i, name in enumerate(self.item_ids, 1)}
    self._titles_at = ['', *self.titles]
    self._ids_at = ['', *self.item_ids]
    self._program = program
    self._arrays = jax.device_put(arrays)
    self._constants: dict[Any, Any] = {}  # Placed inputs that calls have in common.
    fitting = [size for size in BATCH_SIZES if size * len(self.item_ids) <= _MOST_SCORES]
    self.batch_sizes = fitting or BATCH_SIZES[:1]
    self.most_k = min(len(self.item_ids), self._most_places or len(self.item_ids))
    self.known_users = known_users

  def lookup(self, ids: Ids, what: str = 'history') -> tuple[np.ndarray, list[str]]:
    """Turns original ids into item ids.

    Returns:
      `[known]` int32, and the unknown ones.

    Raises:
      InputError: `ids` is no list of ids.
    """
    if isinstance(ids, str | bytes | Mapping) or not hasattr(ids, '__iter__'):
      raise InputError(f'{what}: must be a list of item ids, not {ids!r:.80}')
    found, unknown = [], []
    for name in ids:
      if not isinstance(name, str):
        name = self._as_text(name, what)
      place = self._place_of.get(name)
      if place is None:
        unknown.append(name)
      else:
        found.append(place)
    return np.array(found, np.int32), unknown

  def user(self, name: str) -> tuple[list[str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Gives a known user's history, the oldest first, and own texts, as `top` takes them.

    Raises:
      InputError: it is not known.
    """
    users = self.known_users
    if users is None:
      raise InputError(
        f'user {name!r}: this export knows no users; give a history, or export it with --users'
      )
    if name not in users.index:
      raise InputError(f'user {name!r}: is unknown; give a history')
    row = users.index[name]
    start, end = users.offsets[row : row + 2]
    texts = {key: (t[row : row + 1], m[row : row + 1]) for key, (t, m) in users.preferences.items()}
    return [self._ids_at[i] for i in users.items[start:end]], texts

  @staticmethod
  def _as_text(name: Any, what: str) -> str:
    if isinstance(name, bool) or not isinstance(name, int | np.integer):
      raise InputError(f'{what}: item ids must be text or whole numbers, not {name!r:.80}')
    return str(name)

  def top(
    self,
    histories: Sequence[Ids],
    k: int = 10,
    *,
    only: Ids | None = None,
    without: Ids = (),
    keep_seen: bool = False,
    emphasis: Sequence[float] | np.ndarray | None = None,
    preferences: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
  ) -> Answer:
    """Finds the best items of each user.

    Args:
      histories: a list of item ids a user, the oldest first.
      k: how many.
      only: if given, nothing else is recommended.
      without: is not recommended.
      keep_seen: whether items of a user's own history may be recommended.
      emphasis: `[branches]` or `[users, branches]`, multiplies the branches' scores; 1 is as
        trained, 0 leaves a branch out.
      preferences: by modality, tokens `[users, tokens, width]` and mask `[users, tokens]` of the
        users' own texts.

    Raises:
      InputError: an argument is not what it must be, or a user has neither a known item nor a
        preference.
    """
    asked = self.ask(
      histories,
      k,
      only=only,
      without=without,
      keep_seen=keep_seen,
      emphasis=emphasis,
      preferences=preferences,
    )
    found = self.rank(asked.known, k, asked.left_out, asked.allowed, asked.emphasis, preferences)
    return self.named(asked.unknown, *found)

  def ask(
    self,
    histories: Sequence[Ids],
    k: int = 10,
    *,
    only: Ids | None = None,
    without: Ids = (),
    keep_seen: bool = False,
    emphasis: Sequence[float] | np.ndarray | None = None,
    preferences: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
  ) -> Asked:
    """Does the first third of `top`: takes its arguments, raises its errors."""
    self.check_k(k)
    looked_up = [self.lookup(history) for history in histories]
    known = [found for found, _ in looked_up]
    has_text = np.zeros(len(known), bool)
    for _, mask in (preferences or {}).values():
      has_text |= np.asarray(mask).any(1)
    for (found, unknown), has in zip(looked_up, has_text, strict=True):
      if not found.size and not has:
        raise InputError(self._nothing_known(unknown))
    allowed = None
    if only is not None:
      allowed = np.zeros(len(self._ids_at), bool)
      allowed[self._all_known(only, 'only')] = True
    barred = self._all_known(without, 'without') if len(without) else np.zeros(0, np.int32)
    left_out = [
      barred if keep_seen else np.unique(np.concatenate([found, barred])) for found in known
    ]
    if emphasis is None:
      weights = np.ones((len(known), len(self.branches)), np.float32)
    else:
      weights = self._checked_emphasis(emphasis, len(known))
    if 'sasrec' in self.branches and len(self.branches) > 1:
      # It has nothing to say of a user without history.
      is_empty = np.array([not found.size for found in known], bool)
      weights[is_empty, self.branches.index('sasrec')] = 0
    unknown = [missing for _, missing in looked_up]
    return Asked(known, unknown, left_out, allowed, weights)

  def named(
    self, unknown: list[list[str]], ids: np.ndarray, scores: np.ndarray, shares: np.ndarray
  ) -> Answer:
    """Does the last third of `top`, from the unknown items and what `rank` gives."""
    counts = np.isfinite(scores).sum(1)
    kept = [row[:count].tolist() for row, count in zip(ids, counts, strict=True)]
    return Answer(
      [[self._ids_at[i] for i in row] for row in kept],
      [[self._titles_at[i] for i in row] for row in kept],
      [row[:count] for row, count in zip(scores, counts, strict=True)],
      [row[:count] for row, count in zip(shares, counts, strict=True)],
      unknown,
    )

  def rows(self, answer: Answer) -> list[dict[str, Any]]:
    """Gives the first user's items as `rank`, `item`, `title`, `score`, and `shares` by name."""
    return [
      {
        'rank': rank,
        'item': item,
        'title': title,
        'score': float(score),
        'shares': dict(zip(self.share_names, map(float, shares), strict=True)),
      }
      for rank, (item, title, score, shares) in enumerate(
        zip(*(parts[0] for parts in answer[:4]), strict=True), 1
      )
    ]

  def check_k(self, k: int) -> None:
    """Raises InputError unless so many items can be recommended."""
    most = self.most_k
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= most:
      reason = 'the size of the catalogue'
      if most < len(self.item_ids):
        reason = 'the most that the approximate search gives'
      raise InputError(f'k={k!r:.80}: must be a whole number from 1 to {most}, {reason}')

  def _nothing_known(self, unknown: list[str]) -> str:
    if unknown:
      return (
        f'history: none of its {len(unknown)} items is in the catalogue, first {unknown[0]!r}; the'
        f' ids must be those of the data, such as {self.item_ids[0]!r}'
      )
    return 'history: is empty; give items, or a preference where the model reads texts'

  def _all_known(self, ids: Ids, what: str) -> np.ndarray:
    found, unknown = self.lookup(ids, what)
    if not found.size:
      raise InputError(
        f'{what}: none of its {len(unknown)} items is in the catalogue'
        + (f', first {unknown[0]!r}' if unknown else '')
      )
    return found

  def _checked_emphasis(self, emphasis: Any, count: int) -> np.ndarray:
    try:
      weights = np.array(np.broadcast_to(emphasis, (count, len(self.branches))), np.float32)
    except (ValueError, TypeError):
      weights = np.array(np.nan)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
      raise InputError(
        f'emphasis={emphasis!r:.80}: must be one number, 0 or more, for each of the branches'
        f' {", ".join(self.branches)}'
      )
    return weights

  def rank(
    self,
    histories: Sequence[np.ndarray],
    k: int,
    left_out: Sequence[np.ndarray],
    allowed: np.ndarray | None = None,
    emphasis: np.ndarray | None = None,
    preferences: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Does what `top` does, from item ids to item ids, without a check.

    Args:
      histories: `[items]` int32 a user.
      k: how many.
      left_out: `[any]` int32 a user.
      allowed: `[items + 1]` bool, or None for all.
      emphasis: `[users, branches]` float32, or None for 1.
      preferences: as those of `top`.

    Returns:
      Item ids `[users, k]` int32, scores `[users, k]`, -inf where nothing is left, and shares
      `[users, k, shares]`.
    """
    if len(histories) == 1:
      return self._rank_batch(histories, k, left_out, allowed, emphasis, preferences)
    # Users with histories of like length together.
    order = np.argsort([min(len(h), self.max_length) for h in histories], kind='stable')
    results = (
      np.zeros((len(order), k), np.int32),
      np.zeros((len(order), k), np.float32),
      np.zeros((len(order), k, len(self.share_names)), np.float32),
    )
    for start in range(0, len(order), self.batch_sizes[-1]):
      part = order[start : start + self.batch_sizes[-1]]
      found = self._rank_batch(
        [histories[i] for i in part],
        k,
        [left_out[i] for i in part],
        allowed,
        None if emphasis is None else emphasis[part],
        {name: (t[part], m[part]) for name, (t, m) in (preferences or {}).items()},
      )
      for result, values in zip(results, found, strict=True):
        result[part] = values
    return results

  def warm_up(self, k: int = 10, users: int = 1) -> None:
    """Compiles what is needed to answer so many users at once, whatever their histories' length."""
    step = _length_step(users)
    for length in range(step, self.max_length + step, step):
      history = np.ones(min(length, self.max_length), np.int32)
      self.rank([history] * users, k, [history[:0]] * users)

  def _rank_batch(self, histories, k, left_out, allowed, emphasis, preferences):
    count = len(histories)
    places = min(_power_of_two(k), len(self._ids_at), self._most_places or len(self._ids_at))
    queries = self.queries(histories, left_out, allowed, emphasis, preferences)
    queries['places'] = self._constant(('places', places), lambda: np.zeros(places, np.int8))
    # A single user waits for `jax.device_get`, too: it takes longer than three of these.
    ids, scores, shares = map(np.asarray, self._program(self._arrays, queries))
    return ids[:count, :k], scores[:count, :k], shares[:count, :k]

  def queries(
    self, histories, left_out, allowed=None, emphasis=None, preferences=None
  ) -> dict[str, Any]:
    """Pads the arguments of `rank` to what the program takes; `places` is missing."""
    count = len(histories)
    batch = next(size for size in self.batch_sizes if size >= count)
    length = max((min(len(h), self.max_length) for h in histories), default=0)
    step = _length_step(count)
    length = min(-(-max(length, 1) // step) * step, self.max_length)
    history = np.zeros((batch, length), np.int32)
    for row, items in zip(history, histories, strict=False):
      if len(items):
        row[-min(len(items), length) :] = items[-length:]
    most = max(map(len, left_out), default=0)
    # As many as a history has places, at least: else there would be more shapes to compile.
    barred = np.zeros((batch, _power_of_two(max(most, length))), np.int32)
    for row, items in zip(barred, left_out, strict=False):
      row[: len(items)] = items
    if emphasis is not None and not (emphasis == 1).all():
      emphasis = np.pad(emphasis, ((0, batch - count), (0, 0)))
    else:
      ones = lambda: np.ones((batch, len(self.branches)), np.float32)
      emphasis = self._constant(('emphasis', batch), ones)
    if allowed is None:
      allowed = self._constant('allowed', lambda: np.ones(len(self._ids_at), bool))
    texts = {}
    for name, (tokens, width) in self._preferences.items():
      if preferences and name in preferences:
        values, mask = preferences[name]
        texts[name] = {
          'tokens': np.zeros((batch, tokens, width), np.float32),
          'mask': np.zeros((batch, tokens), bool),
        }
        texts[name]['tokens'][:count, : values.shape[1]] = values
        texts[name]['mask'][:count, : mask.shape[1]] = mask
      else:
        none = lambda tokens=tokens, width=width: {
          'tokens': np.zeros((batch, tokens, width), np.float32),
          'mask': np.zeros((batch, tokens), bool),
        }
        texts[name] = self._constant(('preference', name, batch), none)
    return {
      'history': history,
      'left_out': barred,
      'allowed': allowed,
      'emphasis': emphasis,
      'preferences': texts,
    }

  def _constant(self, key: Any, make: Callable[[], Any]) -> Any:
    if key not in self._constants:
      self._constants[key] = jax.device_put(make())
    return self._constants[key]


def _length_step(users: int) -> int:
  return LENGTH_STEP if users == 1 else BATCH_LENGTH_STEP


def _power_of_two(number: int) -> int:
  return 1 << max(number - 1, 0).bit_length()

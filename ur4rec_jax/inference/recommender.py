"""Ranks the catalogue for histories of original item ids. Needs only jax and NumPy."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import influences, stored_format
from ur4rec_jax.inference.query import (
  Answer,
  CheckedQuery,
  Ids,
  Known,
  Query,
  Ranking,
  UserTokens,
  make_query,
  switch_off_sequence,
)
from ur4rec_jax.inference.rules import KEEP, ONLY, Rules
from ur4rec_jax.inference.similar import (
  BOTH,
  CONTENT,
  KINDS,
  SEQUENCE,
  USERS,
  ItemVectors,
  SharedUsers,
)
from ur4rec_jax.inference.stored_format import Settings

# Each combination of input shapes is compiled once, so few shapes are used. The length of the
# histories is padded to a multiple of LENGTH_STEP for a single user and of BATCH_LENGTH_STEP for
# several, the number of users to the next of BATCH_SIZES, and k and the number of excluded items to
# a power of two.
LENGTH_STEP, BATCH_LENGTH_STEP = 16, 32
BATCH_SIZES = (1, 4, 16, 64, 256)
_MOST_SCORES = 1 << 26  # The most scores in memory at once; limits the batch sizes.


class Users(NamedTuple):
  """Users of the training data.

  Attributes:
    index: index of each user by original id.
    offsets: `[users + 1]`, where the history of each user begins in `items`.
    items: `[interactions]` int32 item numbers, the oldest item of each user first.
    seen_offsets: `[users + 1]`, where the items of each user begin in `seen`.
    seen: the distinct items of each user, int32.
    preferences: the users' own texts.
  """

  index: dict[str, int]
  offsets: np.ndarray
  items: np.ndarray
  seen_offsets: np.ndarray
  seen: np.ndarray
  preferences: UserTokens


def make_users(
  names: Sequence[str], offsets: np.ndarray, items: np.ndarray, preferences: UserTokens
) -> Users:
  """Builds the users, and finds the distinct items of each one once, so that no request has to.

  Args:
    names: `[users]` original ids.
    offsets: `[users + 1]`, where the history of each user begins in `items`.
    items: `[interactions]` int32 item numbers, the oldest item of each user first.
    preferences: the users' own texts.
  """
  width = int(items.max(initial=0)) + 1
  owners = np.repeat(np.arange(len(names), dtype=np.int64), np.diff(offsets))
  owners, seen = np.divmod(np.unique(owners * width + items), width)
  seen_offsets = np.searchsorted(owners, np.arange(len(names) + 1))
  index = {name: i for i, name in enumerate(names)}
  return Users(index, offsets, items, seen_offsets, seen.astype(np.int32), preferences)


class Recommender:
  """Recommends items to users who are described by their histories.

  Attributes:
    item_ids: `[items]` original ids.
    titles: `[items]` titles.
    settings: facts about the model.
    share_names: names of the columns of `Answer.shares`.
    branches: names of the model's branches, in the order of `Query.weights`.
    max_length: number of items of a history that the model reads; it reads the latest ones.
    about: dataset, protocol and metrics of the training run.
    batch_sizes: the batch sizes that are compiled.
    most_k: the most items that can be recommended to a user.
    known_users: the users that were exported, or None.
    program: the compiled function that ranks.
  """

  def __init__(
    self,
    program: Callable,
    arrays: dict[str, Any],
    items: Mapping[str, Sequence[str]],
    settings: Settings,
    known_users: Users | None = None,
  ):
    """Places the arrays on the device.

    Args:
      program: the function of `scoring.make_program` under `jax.jit`, or an exported one.
      arrays: first argument of `program`.
      items: `ids` and `titles` of the catalogue.
      settings: facts about the model.
      known_users: users whose histories can be asked for by id.
    """
    self.item_ids, self.titles = list(items['ids']), list(items['titles'])
    self.settings, self.known_users = settings, known_users
    self.branches, self.share_names = list(settings.branches), list(settings.share_names)
    self.max_length, self.about = settings.max_length, settings.about
    # Item numbers begin at 1; 0 is padding.
    self._number_of = {name: i for i, name in enumerate(self.item_ids, 1)}
    self._ids_by_number = ['', *self.item_ids]
    self._titles_by_number = ['', *self.titles]
    self.program = program
    self._arrays = jax.device_put(arrays)
    self._item_vectors: ItemVectors | None = None  # These two are made when they are asked for.
    self._shared_users: SharedUsers | None = None
    self._constants: dict[Any, Any] = {}  # Inputs on the device that many calls share.
    fitting = [size for size in BATCH_SIZES if size * len(self.item_ids) <= _MOST_SCORES]
    self.batch_sizes = fitting or BATCH_SIZES[:1]
    self.most_k = min(len(self.item_ids), settings.most_k or len(self.item_ids))

  @property
  def keeps_seen(self) -> bool:
    """Whether items of a user's history are recommended unless a query says otherwise."""
    config = self.settings.about.get('config', {})
    return config.get('evaluation', {}).get('seen_items') == 'keep'  # As the config stores it.

  @property
  def compares_ranks(self) -> bool:
    """Whether scores are made of ranks among all items and are not sums of branch scores."""
    fusion = self.settings.about.get('config', {}).get('fusion', {})
    return len(self.branches) > 1 and fusion.get('kind') in ('rank', 'cascade')

  def top(self, histories: Sequence[Ids], k: int = 10, **options: Any) -> Answer:
    """Finds the best items of each user.

    Args:
      histories: one list of item ids per user, the oldest item first.
      k: number of items to recommend to each user.
      **options: `only`, `without`, `keep_seen`, `weights` and `preferences` of `Query`.

    Raises:
      InputError: an argument is wrong, or no user has a known item or a preference.
    """
    return self.ask(make_query(histories, k, options)).require_one()

  def ask(self, query: Query) -> Answer:
    """Answers a query; users who cannot be answered have a problem in the answer.

    Raises:
      InputError: a value that concerns all users is wrong.
    """
    return self._answer(self.check(query), query.rules)

  def _answer(self, query: CheckedQuery, rules: Rules | None) -> Answer:
    if rules is not None:
      return self.answer_by_rules(query, rules)
    return self.to_answer(query, self.rank(query))

  def answer_by_rules(self, query: CheckedQuery, rules: Rules) -> Answer:
    """Answers a checked query of the same rules, with as many candidates as the rules need."""
    answers = []
    wanted = min(rules.candidates(query.k), self.most_k)
    all_at_once = None
    if rules.bought != ONLY:  # Otherwise each user has other candidates.
      all_at_once = self.rank(dataclasses.replace(query, k=wanted))
    for i in range(len(query.histories)):
      one = dataclasses.replace(
        query.select(np.array([i])),
        unknown=list(query.unknown[i : i + 1]),
        problems=list(query.problems[i : i + 1]),
      )
      if all_at_once is None:
        one = self.only_seen(one)
        ranking = self.rank(dataclasses.replace(one, k=wanted))
      else:
        ranking = Ranking(*(values[i : i + 1] for values in all_at_once))
      answer = self.apply_rules(one, ranking, rules)
      more = wanted
      while more < self.most_k and not answer.choices[0].is_final and not any(one.problems):
        more = min(4 * more, self.most_k)
        ranking = self.rank(dataclasses.replace(one, k=more))
        answer = self.apply_rules(one, ranking, rules)
      answers.append(answer)
    return Answer(*([x for part in parts for x in part] for parts in zip(*answers, strict=True)))

  def only_seen(self, query: CheckedQuery) -> CheckedQuery:
    """Restricts the query of a single user to the items of the history."""
    is_seen = np.zeros(len(self._ids_by_number), bool)
    is_seen[query.histories[0]] = True
    allowed = is_seen if query.allowed is None else is_seen & query.allowed
    return dataclasses.replace(query, allowed=allowed)

  def apply_rules(self, query: CheckedQuery, ranking: Ranking, rules: Rules) -> Answer:
    """Makes the list of a single user from the candidates.

    Args:
      query: the query, whose k is the length of the list.
      ranking: the candidates.
      rules: the rules.
    """
    is_allowed = lambda item: (
      item not in query.excluded[0] and (query.allowed is None or bool(query.allowed[item]))
    )
    choice = rules.choose(
      ranking.items[0],
      ranking.scores[0],
      query.k,
      is_allowed,
      self._vectors_of_likeness,
      self._available(query),
    )
    if any(query.problems):
      choice = choice._replace(picks=[], notes=[])
    at = np.array([pick.at for pick in choice.picks], int)
    scores, shares = ranking.scores[0][at], ranking.shares[0][at]
    scores[at < 0], shares[at < 0] = np.nan, np.nan
    numbers = [pick.item for pick in choice.picks]
    return Answer(
      [[self._ids_by_number[i] for i in numbers]],
      [[self._titles_by_number[i] for i in numbers]],
      [scores],
      [shares],
      list(query.unknown),
      list(query.problems) or [''],
      [choice],
    )

  def _available(self, query: CheckedQuery) -> int:
    """Returns how many items a query of a single user may recommend."""
    (excluded,) = query.excluded
    if query.allowed is None:
      return len(self.item_ids) - len(excluded)
    return int(query.allowed[1:].sum() - query.allowed[excluded].sum())

  def _vectors_of_likeness(self) -> np.ndarray:
    """Returns `[items + 1, width]` vectors of length 1, with which diversity compares items."""
    vectors = self.item_vectors().vectors
    return vectors.get(CONTENT, vectors.get(SEQUENCE))

  def check(self, query: Query) -> CheckedQuery:
    """Checks a query and looks its ids up; a wrong history is a problem of its user alone.

    Raises:
      InputError: a value that concerns all users is wrong.
    """
    return self.check_known(query, [self.known(history) for history in query.histories])

  def known(self, history: Any) -> Known:
    """Looks up a history; a value that is no list of ids gives a `problem`."""
    try:
      items, unknown = self.lookup(history)
    except InputError as error:
      nothing = np.zeros(0, np.int32)
      return Known(nothing, nothing, problem=str(error))
    return Known(items, np.unique(items), unknown)

  def check_known(self, query: Query, known: Sequence[Known]) -> CheckedQuery:
    """Checks a query whose histories were looked up before.

    Args:
      query: the query; its histories are not read.
      known: one history per user.

    Raises:
      InputError: a value that concerns all users is wrong.
    """
    self.check_k(query.k)
    preferences = query.preferences or {}
    has_text = np.zeros(len(known), bool)
    for name, (tokens, mask) in preferences.items():
      self._check_preference(name, tokens, mask, len(known))
      has_text |= np.asarray(mask).any(1)
    allowed = None
    if query.only is not None:
      allowed = np.zeros(len(self._ids_by_number), bool)
      allowed[self._lookup_filter(query.only, 'only')] = True
    keep_seen = self.keeps_seen if query.keep_seen is None else query.keep_seen
    if (rules := query.rules) is not None:
      passed = rules.allowed(len(self.item_ids))
      if passed is not None:
        allowed = passed if allowed is None else allowed & passed
      keep_seen = keep_seen if rules.bought is None else rules.bought in (KEEP, ONLY)
    without = np.zeros(0, np.int32)
    if query.without is not None and len(query.without):
      without = np.unique(self._lookup_filter(query.without, 'without'))
    return CheckedQuery(
      [history.items for history in known],
      int(query.k),  # NumPy's lack a method that is needed.
      [without if keep_seen else np.union1d(history.seen, without) for history in known],
      allowed,
      self._checked_weights(query.weights, known),
      preferences,
      [list(history.unknown) for history in known],
      [
        history.problem or ('' if history.items.size or has else self._nothing_known(history))
        for history, has in zip(known, has_text, strict=True)
      ],
    )

  def exclude_for_all(self, query: CheckedQuery) -> CheckedQuery:
    """Moves the excluded items of a single user to `allowed`, whose size does not depend on them.

    Args:
      query: a query of one user.
    """
    allowed = np.ones(len(self._ids_by_number), bool)
    if query.allowed is not None:
      allowed = query.allowed.copy()
    (excluded,) = query.excluded
    allowed[excluded] = False
    return dataclasses.replace(query, allowed=allowed, excluded=[excluded[:0]])

  def _check_preference(self, name: str, tokens: Any, mask: Any, users: int) -> None:
    known = self.settings.preferences
    if name not in known:
      reads = f'it reads {", ".join(known)}' if known else 'it reads none'
      raise InputError(f"preferences: the model does not read users' {name}; {reads}")
    count, width = known[name]
    shapes, wanted = (np.shape(tokens), np.shape(mask)), ((users, width), (users,))
    is_right = (shapes[0][::2], shapes[1][:1]) == wanted and shapes[0][:2] == shapes[1]
    if not is_right or shapes[0][1] > count:
      raise InputError(
        f'preferences: {name} must be tokens [{users}, at most {count}, {width}] and a mask of the'
        f' first two dimensions, not {shapes[0]} and {shapes[1]}'
      )

  def rank(self, query: CheckedQuery) -> Ranking:
    """Ranks the catalogue for all users of a query who have no problem; others get no items."""
    count = len(query.histories)
    if count == 1 and not any(query.problems):
      return self._rank_batch(query)
    # Users whose histories are of similar length share a batch, which then needs little padding.
    lengths = np.array([min(len(h), self.max_length) for h in query.histories], int)
    order = np.lexsort((np.array([len(x) for x in query.excluded], int), lengths))
    if query.problems:
      order = order[[not query.problems[i] for i in order]]
    shape = count, query.k
    ranking = Ranking(
      np.zeros(shape, np.int32),
      np.full(shape, -np.inf, np.float32),
      np.zeros((*shape, len(self.share_names)), np.float32),
    )
    for start in range(0, len(order), self.batch_sizes[-1]):
      part = order[start : start + self.batch_sizes[-1]]
      for values, found in zip(ranking, self._rank_batch(query.select(part)), strict=True):
        values[part] = found
    return ranking

  def to_answer(self, query: CheckedQuery, ranking: Ranking) -> Answer:
    """Turns item numbers into ids and titles, and drops positions where no item is left."""
    counts = np.isfinite(ranking.scores).sum(1)
    kept = [row[:count].tolist() for row, count in zip(ranking.items, counts, strict=True)]
    return Answer(
      [[self._ids_by_number[i] for i in row] for row in kept],
      [[self._titles_by_number[i] for i in row] for row in kept],
      [row[:count] for row, count in zip(ranking.scores, counts, strict=True)],
      [row[:count] for row, count in zip(ranking.shares, counts, strict=True)],
      list(query.unknown),
      list(query.problems) or [''] * len(kept),
    )

  def recommendations(self, answer: Answer) -> list[dict[str, Any]]:
    """Returns the first user's items as dicts: `rank`, `item`, `title`, `score` and `shares`."""
    rows = [
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
    if answer.choices:
      for row, pick in zip(rows, answer.choices[0].picks, strict=True):
        row['rules'] = pick.reasons
        if pick.propensity is not None:
          row['propensity'] = pick.propensity
        if pick.at < 0:  # A pinned item that is not among the candidates was not scored.
          row['score'] = None
          row['shares'] = dict.fromkeys(self.share_names)
    return rows

  def similar(self, items: Ids | str, k: int = 10, by: str = BOTH) -> list[dict[str, Any]]:
    """Finds the items that are most similar to an item, or to several together.

    Args:
      items: an item id or a list of them; unknown ones are ignored if there are others.
      k: number of items to find.
      by: `sequence` compares the vectors of SASRec, which are alike for items with the same
        neighbours in histories; `content` compares what the retriever reads; `both` joins these
        two; `users` compares which users have the items.

    Returns:
      `item`, `title` and `similarity` of each, the most similar first. Similarities are cosines;
      with `both` they are in standard deviations.

    Raises:
      InputError: no item is known, `k` or `by` is wrong, or the model or the export cannot say it.
    """
    if by not in KINDS:
      raise InputError(f'by={by!r:.80}: must be one of {", ".join(KINDS)}')
    self.check_k(k)
    chosen = self._lookup_filter([items] if isinstance(items, str | int) else items, 'items')
    if by == USERS:
      scores = self._users_of_items().similarities(chosen)
    else:
      scores = self.item_vectors().similarities(chosen, by)
    scores[0] = scores[chosen] = -np.inf
    scores[scores == 0] = -np.inf  # Items without a user or without content are similar to nothing.
    best = np.argpartition(-scores, min(k, len(scores) - 1))[:k]
    best = best[np.isfinite(scores[best])]
    best = best[np.lexsort((best, -scores[best]))]
    return [
      {
        'item': self._ids_by_number[i],
        'title': self._titles_by_number[i],
        'similarity': float(scores[i]),
      }
      for i in best.tolist()
    ]

  def influences(
    self,
    history: Ids,
    items: Ids,
    preferences: UserTokens | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
  ) -> np.ndarray:
    """Measures how much each item of a history raises the scores of some items.

    The influence is the fall of the item's score, above the mean of the catalogue (of 80 of its
    items if it is larger), when that one interaction is left out of the history.

    Args:
      history: item ids, the oldest first; unknown ones are ignored.
      items: ids of catalogue items.
      preferences: the user's own texts, `[1, tokens, width]` and `[1, tokens]` by modality.
      weights: `[branches]` factors of the branches' scores, with which the items were recommended.

    Returns:
      `[history, items]` float32. The rows are the known items of the history that the model reads.
    """
    known = self.lookup(history)[0]
    query = Query([history], 1, weights=weights, preferences=preferences)
    checked = self.check_known(query, [Known(known, np.unique(known))])
    return self._influences(checked, self.lookup(items, 'items')[0], len(self.item_ids))

  def _influences(
    self, query: CheckedQuery, items: np.ndarray, num_items: int, kept: int = 0
  ) -> np.ndarray:
    """Returns `[history, items]`, see `influences`.

    Args:
      query: the query of a single user.
      items: numbers of the items whose scores are wanted.
      num_items: the scores are compared with those of the first so many items.
      kept: number of items at the start of the history that are never left out, and have no row.
    """
    history = query.histories[0][-self.max_length :]
    compared = influences.reference(num_items, self.compares_ranks)
    asked = influences.leave_one_out(
      dataclasses.replace(query, histories=[history]),
      items,
      compared,
      len(self.item_ids),
      self.branches,
      len(history) - kept,
    )
    found = self.rank(asked)
    return influences.influences(found.items, found.scores, items, compared)

  def item_vectors(self) -> ItemVectors:
    """Returns the item vectors, which are made on the first call."""
    if self._item_vectors is None:
      self._item_vectors = ItemVectors(jax.device_get(self._arrays['items']), self.settings)
    return self._item_vectors

  def _users_of_items(self) -> SharedUsers:
    if self._shared_users is None:
      users = self._users_with_items()
      self._shared_users = SharedUsers(users.seen_offsets, users.seen, len(self.item_ids))
    return self._shared_users

  def _users_with_items(self) -> Users:
    if self.known_users is None:
      raise InputError(f'by={USERS}: this export knows no users; export it with --users')
    return self.known_users

  def lookup(self, ids: Ids, what: str = 'history') -> tuple[np.ndarray, list[str]]:
    """Turns original ids into item numbers.

    Args:
      ids: original ids.
      what: name of the ids in error messages.

    Returns:
      `[known]` int32 item numbers, and the ids that are not in the catalogue.

    Raises:
      InputError: `ids` is not a list of ids.
    """
    if isinstance(ids, str | bytes | Mapping) or not hasattr(ids, '__iter__'):
      raise InputError(f'{what}: must be a list of item ids, not {ids!r:.80}')
    names = [name if type(name) is str else _as_text(name, what) for name in ids]
    numbers = list(map(self._number_of.get, names))
    unknown = []
    if None in numbers:
      unknown = [name for name, number in zip(names, numbers, strict=True) if number is None]
      numbers = [number for number in numbers if number is not None]
    return np.array(numbers, np.int32), unknown

  def number_of(self, item: str) -> int:
    """Returns the number of an item, 0 if the catalogue does not have it."""
    return self._number_of.get(item, 0)

  def known_user(self, name: str) -> tuple[Known, UserTokens]:
    """Returns a known user's history and the user's own texts.

    Raises:
      InputError: the user is not known.
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
    first, last = users.seen_offsets[row : row + 2]
    texts = {key: (t[row : row + 1], m[row : row + 1]) for key, (t, m) in users.preferences.items()}
    return Known(users.items[start:end], users.seen[first:last]), texts

  def check_k(self, k: int) -> None:
    """Raises InputError unless k items can be recommended."""
    most = self.most_k
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= most:
      reason = 'the size of the catalogue'
      if most < len(self.item_ids):
        reason = 'the most items that the approximate search can find'
      raise InputError(f'k={k!r:.80}: must be a whole number from 1 to {most}, {reason}')

  def warm_up(self, k: int = 10, users: int = 1) -> None:
    """Compiles the programs that answer queries of this many users without filters.

    The histories may have any length up to `max_length`.
    """
    step = _length_step(users)
    for length in range(step, self.max_length + step, step):
      history = np.ones(min(length, self.max_length), np.int32)
      self.rank(CheckedQuery([history] * users, k, [history[:0]] * users))

  def program_inputs(self, query: CheckedQuery) -> dict[str, Any]:
    """Pads a query to the inputs of the program, all but `stored_format.POSITIONS`."""
    count = len(query.histories)
    batch = next(size for size in self.batch_sizes if size >= count)
    length = max((min(len(h), self.max_length) for h in query.histories), default=0)
    step = _length_step(count)
    length = min(-(-max(length, 1) // step) * step, self.max_length)
    history = np.zeros((batch, length), np.int32)
    for row, items in zip(history, query.histories, strict=False):
      if len(items):
        row[-min(len(items), length) :] = items[-length:]
    most_excluded = max(map(len, query.excluded), default=0)
    # At least as many columns as the history has: fewer would only mean more shapes to compile.
    excluded = np.zeros((batch, _power_of_two(max(most_excluded, length))), np.int32)
    for row, items in zip(excluded, query.excluded, strict=False):
      row[: len(items)] = items
    allowed = query.allowed
    if allowed is None:
      allowed = self._constant('allowed', lambda: np.ones(len(self._ids_by_number), bool))
    return {
      stored_format.HISTORY: history,
      stored_format.EXCLUDED: excluded,
      stored_format.ALLOWED: allowed,
      stored_format.WEIGHTS: self._padded_weights(query.weights, batch),
      stored_format.PREFERENCES: {
        name: self._padded_preference(name, query.preferences.get(name), batch)
        for name in self.settings.preferences
      },
    }

  def _rank_batch(self, query: CheckedQuery) -> Ranking:
    count, k = len(query.histories), query.k
    most = len(self._ids_by_number)
    positions = min(_power_of_two(k), most, self.settings.most_k or most)
    inputs = self.program_inputs(query)
    inputs[stored_format.POSITIONS] = self._constant(
      ('positions', positions), lambda: np.zeros(positions, np.int8)
    )
    # For a single user one jax.device_get takes longer than np.asarray on each of the three.
    items, scores, shares = map(np.asarray, self.program(self._arrays, inputs))
    return Ranking(items[:count, :k], scores[:count, :k], shares[:count, :k])

  def _padded_weights(self, weights: np.ndarray | None, batch: int) -> Any:
    """Returns `[batch, branches]` float32."""
    if weights is not None and not (weights == 1).all():
      return np.pad(weights, ((0, batch - len(weights)), (0, 0)))
    ones = lambda: np.ones((batch, len(self.branches)), np.float32)
    return self._constant(('weights', batch), ones)

  def _padded_preference(
    self, name: str, preference: tuple[np.ndarray, np.ndarray] | None, batch: int
  ) -> dict[str, Any]:
    """Returns tokens `[batch, tokens, width]` and mask `[batch, tokens]` of one modality."""
    tokens, width = self.settings.preferences[name]
    empty = lambda: {
      'tokens': np.zeros((batch, tokens, width), np.float32),
      'mask': np.zeros((batch, tokens), bool),
    }
    if preference is None:
      return self._constant(('preference', name, batch), empty)
    padded = empty()
    for key, values in zip(('tokens', 'mask'), preference, strict=True):
      padded[key][: len(values), : values.shape[1]] = values
    return padded

  def _constant(self, key: Any, make: Callable[[], Any]) -> Any:
    if key not in self._constants:
      self._constants[key] = jax.device_put(make())
    return self._constants[key]

  def _nothing_known(self, history: Known) -> str:
    if unknown := history.unknown:
      return (
        f'history: none of its {len(unknown)} items is in the catalogue, first {unknown[0]!r}; the'
        f' ids must be those of the data, such as {self.item_ids[0]!r}'
      )
    return 'history: is empty; give items, or a preference if the model reads texts'

  def _lookup_filter(self, ids: Ids, what: str) -> np.ndarray:
    """Looks up the ids of a filter; at least one of them must be in the catalogue."""
    found, unknown = self.lookup(ids, what)
    if not found.size:
      raise InputError(
        f'{what}: none of its {len(unknown)} items is in the catalogue'
        + (f', first {unknown[0]!r}' if unknown else '')
      )
    return found

  def _checked_weights(self, weights: Any, known: Sequence[Known]) -> np.ndarray:
    """Returns `[users, branches]` float32."""
    shape = len(known), len(self.branches)
    try:
      checked = np.array(np.broadcast_to(1 if weights is None else weights, shape), np.float32)
    except (ValueError, TypeError):
      checked = np.array(np.nan)
    if not (np.isfinite(checked).all() and (checked >= 0).all()):
      raise InputError(
        f'weights={weights!r:.80}: must be one number, 0 or more, for each of the branches'
        f' {", ".join(self.branches)}'
      )
    if len(self.branches) > 1:  # For a user without history the retriever alone decides.
      switch_off_sequence(checked, [history.items for history in known], self.branches)
    return checked


def _as_text(name: Any, what: str) -> str:
  """Returns an item id as text; ids may also be whole numbers."""
  if isinstance(name, bool) or not isinstance(name, str | int | np.integer):
    raise InputError(f'{what}: item ids must be text or whole numbers, not {name!r:.80}')
  return str(name)


def _length_step(users: int) -> int:
  return LENGTH_STEP if users == 1 else BATCH_LENGTH_STEP


def _power_of_two(number: int) -> int:
  return 1 << max(number - 1, 0).bit_length()

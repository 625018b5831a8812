"""The question that a recommender is asked, and its answer. Needs only NumPy."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.errors import InputError
from ur4rec_jax.inference.rules import Choice, Rules

Ids = Sequence[str | int]
# The users' own texts by modality: tokens `[users, tokens, width]` and mask `[users, tokens]`.
UserTokens = Mapping[str, tuple[np.ndarray, np.ndarray]]
_RENAMED = {'emphasis': 'weights'}


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
  """A question in original item ids. Python, the command and the HTTP service all build one.

  Attributes:
    histories: one list of item ids per user, the oldest item first.
    k: number of items to recommend to each user.
    only: if given, only these items may be recommended.
    without: items that must not be recommended.
    keep_seen: whether items of a user's own history may be recommended; None does as the model was
      evaluated, see `Recommender.keeps_seen`.
    weights: `[branches]` or `[users, branches]`, factors of the branches' scores: 1 scores as
      trained, 0 switches a branch off. None means 1 for every branch.
    preferences: the users' own texts, or None.
    rules: the rules of a shop, or None.
  """

  histories: Sequence[Ids]
  k: int = 10
  only: Ids | None = None
  without: Ids = ()
  keep_seen: bool | None = None
  weights: Sequence[float] | np.ndarray | None = None
  preferences: UserTokens | None = None
  rules: Rules | None = None


def make_query(histories: Sequence[Ids], k: int, options: Mapping[str, Any]) -> Query:
  """Builds a query from the keyword arguments of a call.

  Args:
    histories: one list of item ids per user.
    k: number of items to recommend to each user.
    options: the other fields of `Query` by name.

  Raises:
    InputError: an option does not exist; the message names the right one.
  """
  known = [field.name for field in dataclasses.fields(Query)][2:]
  for name in options:
    if name in _RENAMED:
      raise InputError(f'{name}: this option is now called {_RENAMED[name]}; rename it')
    if name not in known:
      raise InputError(f'{name}: there is no such option; the options are {", ".join(known)}')
  return Query(histories, k, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedQuery:
  """A query whose ids were looked up and whose values are valid; `Recommender.check` makes it.

  Lists have one entry per user.

  Attributes:
    histories: `[history]` int32 item numbers, the oldest item first.
    k: number of items to recommend to each user.
    excluded: `[excluded]` int32 distinct item numbers that must not be recommended to the user.
    allowed: `[items + 1]` bool, the items that may be recommended to anybody; None for all items.
    weights: `[users, branches]` float32; None means 1 for every branch.
    preferences: the users' own texts.
    unknown: items of the history that are not in the catalogue.
    problems: why a user gets no recommendations, '' for users who get some; () if all do.
  """

  histories: Sequence[np.ndarray]
  k: int
  excluded: Sequence[np.ndarray]
  allowed: np.ndarray | None = None
  weights: np.ndarray | None = None
  preferences: UserTokens = dataclasses.field(default_factory=dict)
  unknown: Sequence[list[str]] = ()
  problems: Sequence[str] = ()

  def select(self, users: np.ndarray) -> 'CheckedQuery':
    """Returns the query of some of the users, without unknown items and problems.

    Args:
      users: `[selected]` int indices of users of this query.
    """
    return CheckedQuery(
      [self.histories[i] for i in users],
      self.k,
      [self.excluded[i] for i in users],
      self.allowed,
      None if self.weights is None else self.weights[users],
      {name: (tokens[users], mask[users]) for name, (tokens, mask) in self.preferences.items()},
    )


def switch_off_sequence(
  weights: np.ndarray, histories: Sequence[np.ndarray], branches: Sequence[str]
) -> None:
  """Sets the weight of SASRec to 0 where the history is empty, of which its score says nothing.

  Args:
    weights: `[users, branches]`, which are changed.
    histories: one history per user.
    branches: names of the branches.
  """
  if 'sasrec' in branches:
    is_empty = np.array([not len(history) for history in histories], bool)
    weights[is_empty, branches.index('sasrec')] = 0


class Known(NamedTuple):
  """The part of a user's history that the catalogue has.

  Attributes:
    items: `[history]` int32 item numbers, the oldest item first.
    seen: `[seen]` int32, the distinct numbers in `items`.
    unknown: items of the history that are not in the catalogue.
    problem: why the history cannot be read, '' if it can.
  """

  items: np.ndarray
  seen: np.ndarray
  unknown: Sequence[str] = ()
  problem: str = ''


class Ranking(NamedTuple):
  """The best items of some users as arrays, the best item first.

  Attributes:
    items: `[users, k]` int32 item numbers.
    scores: `[users, k]` float32, -inf where no item is left.
    shares: `[users, k, shares]` float32.
  """

  items: np.ndarray
  scores: np.ndarray
  shares: np.ndarray


class Answer(NamedTuple):
  """The best items of some users in original ids; lists have one entry per user.

  Attributes:
    items: original ids, the best item first. There are fewer than k if no other item is left.
    titles: the items' titles.
    scores: `[items]` float32.
    shares: `[items, shares]` float32 in the order of `Recommender.share_names`: the
      contributions of the branches to the score.
    unknown: items of the history that are not in the catalogue and were ignored.
    problems: why a user got no recommendations, '' for the others.
    choices: the lists that rules made; () without rules.
  """

  items: list[list[str]]
  titles: list[list[str]]
  scores: list[np.ndarray]
  shares: list[np.ndarray]
  unknown: list[list[str]]
  problems: list[str]
  choices: Sequence[Choice] = ()

  def require_one(self) -> 'Answer':
    """Returns the answer itself.

    Raises:
      InputError: there is no user with recommendations because of their problems.
    """
    if self.problems and all(self.problems):
      count, first = len(self.problems), self.problems[0]
      raise InputError(first if count == 1 else f'none of the {count} users: the first, {first}')
    return self

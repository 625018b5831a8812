"""Interleaving: merges two rankers into one list, and tells from clicks which one users prefer.

Every user sees both rankers, so differences between users do not blur the comparison. It needs far
fewer users than an A/B test, but says only which ranker is preferred, not by how much a metric of
the shop grows.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ur4rec_jax.data.raw.texts import listed
from ur4rec_jax.errors import InputError
from ur4rec_jax.online.logs import Logs, reacted

_DRAWS = 10_000  # Random sign flips: the standard error of a p value of .05 is .002.


class Preference(NamedTuple):
  """The team that users prefer; a team is the items of one ranker.

  Attributes:
    teams: names of the two teams.
    wins: number of users who preferred the first and the second team.
    ties: number of users without a preference.
    advantage: mean over all users of 1 for the second team, -1 for the first, 0 for a tie.
    interval: interval of the advantage.
    p_sign: p value of the sign test over the users with a preference.
    p_permutation: p value of the users' net scores under random sign flips.
    net: mean over all users of these net scores.
  """

  teams: tuple[str, str]
  wins: tuple[int, int]
  ties: int
  advantage: float
  interval: tuple[float, float]
  p_sign: float
  p_permutation: float
  net: float


def team_draft(
  first: Sequence[Hashable], second: Sequence[Hashable], length: int, rng: np.random.Generator
) -> tuple[list[Hashable], list[int]]:
  """Merges two rankings as two captains pick players.

  In each round a coin decides who picks first. Each team picks its best item that is still there.
  (Radlinski, Kurup and Joachims, "How does clickthrough data reflect retrieval quality?", CIKM
  2008.) There the list ends with the shorter ranking. Here the other one fills it, and these items
  speak for one team alone, so the comparison is fair only if both rankings have `length` items.

  Args:
    first: items of the first ranker, the best first.
    second: items of the second ranker.
    length: number of items wanted; fewer if the rankings have no more.
    rng: random generator of the coin.

  Returns:
    The items, and the team of each: 0 for the first ranker and 1 for the second.
  """
  rankings = (first, second)
  at, picks = [0, 0], [0, 0]
  items: list[Hashable] = []
  teams: list[int] = []
  taken: set[Hashable] = set()
  while len(items) < length:
    for team in (0, 1):
      while at[team] < len(rankings[team]) and rankings[team][at[team]] in taken:
        at[team] += 1
    open_teams = [team for team in (0, 1) if at[team] < len(rankings[team])]
    if not open_teams:
      break
    if len(open_teams) == 1:
      team = open_teams[0]
    elif picks[0] != picks[1]:
      team = int(picks[0] > picks[1])
    else:
      team = int(rng.integers(2))
    item = rankings[team][at[team]]
    items.append(item)
    teams.append(team)
    taken.add(item)
    picks[team] += 1
  return items, teams


def balanced(
  first: Sequence[Hashable], second: Sequence[Hashable], length: int, rng: np.random.Generator
) -> list[Hashable]:
  """Merges two rankings so that each prefix holds as many top items of both as possible.

  One coin decides who begins. (Joachims, "Evaluating retrieval performance using clickthrough
  data", 2003.)

  Args:
    first: items of the first ranker, the best first.
    second: items of the second ranker.
    length: number of items wanted; fewer if the rankings have no more.
    rng: random generator of the coin.
  """
  rankings = (first, second)
  at = [0, 0]
  beginner = int(rng.integers(2))
  items: list[Hashable] = []
  while len(items) < length:
    team = beginner if at[0] == at[1] else int(at[0] > at[1])
    if at[team] >= len(rankings[team]):
      team = 1 - team
    if at[team] >= len(rankings[team]):
      break
    item = rankings[team][at[team]]
    at[team] += 1
    if item not in items:
      items.append(item)
  return items


def balanced_credit(
  shown: Sequence[Hashable],
  clicked: Sequence[bool],
  first: Sequence[Hashable],
  second: Sequence[Hashable],
) -> int:
  """Returns how many more of the clicked items the second ranker has in its top than the first.

  The top is the shortest prefix with which one of the rankers reaches the lowest clicked item.

  Args:
    shown: items of the interleaved list.
    clicked: whether each was clicked.
    first: items of the first ranker, the best first.
    second: items of the second ranker.
  """
  hits = [item for item, hit in zip(shown, clicked, strict=True) if hit]
  if not hits:
    return 0
  rank = lambda ranking: ranking.index(hits[-1]) if hits[-1] in ranking else len(ranking)
  depth = min(rank(first), rank(second)) + 1
  tops = [set(ranking[:depth]) for ranking in (first, second)]
  return sum((item in tops[1]) - (item in tops[0]) for item in hits)


def prefer(scores: np.ndarray, teams: tuple[str, str], level: float = 0.05) -> Preference:
  """Tests which team the users prefer.

  Args:
    scores: `[users]` net score of each user: requests that the second team won minus requests that
      the first one won.
    teams: names of the teams.
    level: one minus the confidence of the interval.

  Raises:
    InputError: fewer than two users.
  """
  from scipy.stats import binomtest, norm

  scores = np.asarray(scores)
  if len(scores) < 2:
    raise InputError('interleaving needs two users or more')
  signs = np.sign(scores)
  wins = int((signs < 0).sum()), int((signs > 0).sum())
  advantage = float(signs.mean())
  half = norm.ppf(1 - level / 2) * signs.std(ddof=1) / np.sqrt(len(signs))
  return Preference(
    teams,
    wins,
    len(scores) - sum(wins),
    advantage,
    (advantage - half, advantage + half),
    float(binomtest(wins[1], sum(wins)).pvalue) if sum(wins) else 1.0,
    _flipped_p(scores),
    float(scores.mean()),
  )


def _flipped_p(scores: np.ndarray) -> float:
  """Returns the share of random sign flips whose sum is at least as far from zero."""
  rng = np.random.default_rng(0)
  total = np.zeros(_DRAWS)
  # Users with the same absolute score are flipped together: a binomial number of them is positive.
  for size, users in zip(*np.unique(np.abs(scores[scores != 0]), return_counts=True), strict=True):
    total += size * (2.0 * rng.binomial(users, 0.5, _DRAWS) - users)
  extreme = np.abs(total) >= abs(scores.sum()) - 1e-9
  return float((1 + extreme.sum()) / (1 + _DRAWS))


def scores_of(logs: Logs, event: str) -> np.ndarray:
  """Returns the net score of each user from the logs of a team-draft experiment.

  Args:
    logs: read with `by_item=True`, with two teams.
    event: kind of the events that count as clicks.

  Returns:
    `[users]` requests that the second team won minus requests that the first one won.

  Raises:
    InputError: the logs have another number of teams, or no such events.
  """
  if len(logs.arms) != 2:
    raise InputError(
      f'{logs.paths[0]}: interleaving needs two teams, found {listed(logs.arms)}; log with each'
      ' item which ranker it came from (column team or arm)'
    )
  if event not in logs.kinds:
    raise InputError(
      f'{logs.paths[1]}: has no events of the kind {event!r}; kinds are {listed(logs.kinds)}'
    )
  shown = logs.exposures
  is_hit = np.isfinite(reacted(logs, event))
  side = np.where(shown.arm == 1, 1, -1) * is_hit
  by_request = np.sign(np.bincount(shown.request, side, len(logs.requests)))
  owner = np.zeros(len(logs.requests), np.int64)
  owner[shown.request] = shown.user
  return np.bincount(owner, by_request, len(logs.users))

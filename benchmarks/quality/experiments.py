"""Checks the statistics of experiments by simulation, where the truth is known.

  python -m benchmarks.quality.experiments

- A/A tests: one population of users is split 2,000 times by the hash of another salt. At a fixed
  horizon 4 to 6 % of the tests are below .05, and at most 5 % of the always-valid intervals ever
  exclude zero, although one looks a hundred times. The same with an arm of 5 % of the users.
- A/B tests with a true gain of 5 %: as many are found as the power calculation says.
- Interleaving: how many users two rankers of known quality need, against an A/B test of the same
  two.
- Off-policy estimates: how many of 1,000 intervals hold the true reward of the new policy.

The result is stored in `benchmarks/results/experiments/simulations.json`, and docs/experiments.md
quotes it.
"""

import argparse
import json
import pathlib
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ur4rec_jax.errors import exit_on_reported_error, say
from ur4rec_jax.files import write_file
from ur4rec_jax.online import interleaving, off_policy, statistics
from ur4rec_jax.online.analysis import LOOKS
from ur4rec_jax.online.experiments import position

RESULTS = pathlib.Path(__file__).parents[1] / 'results' / 'experiments' / 'simulations.json'
LEVEL = 0.05
START = 1_767_225_600  # 2026-01-01.
PARTS = ('A/A', 'A/A, small arm', 'A/B', 'interleaving', 'off-policy')
METRICS = ('conversion', 'click-through', 'revenue', 'revenue, CUPED')
_DAY = 86_400


def people(users: int, rng: np.random.Generator, lift: float = 0.0) -> dict[str, np.ndarray]:
  """Draws users of a shop who click and buy more or less often.

  Args:
    users: number of users.
    rng: random numbers.
    lift: relative gain of the probabilities to click and to buy, and so of every metric.

  Returns:
    For each of `METRICS` `[users, 3]` numerator, denominator and covariate.
  """
  taste = rng.gamma(4.0, 0.25, users)  # Mean 1: users differ.
  shown = 10.0 * (1 + rng.poisson(2.0, users))
  click = np.minimum(0.08 * taste * (1 + lift), 1)
  clicks = rng.binomial(shown.astype(int), click).astype(float)
  buys = (rng.random(users) < 0.12 * taste * (1 + lift)) * (1.0 + rng.poisson(0.3, users))
  # What one pays varies less than how often one buys.
  paid = buys * rng.lognormal(3.0, 0.5, users)
  before = rng.poisson(3.0 * taste) * np.exp(3.0)
  one, zero = np.ones(users), np.zeros(users)
  return {
    'conversion': np.stack([(buys > 0).astype(float), one, zero], -1),
    'click-through': np.stack([clicks, shown, zero], -1),
    'revenue': np.stack([paid, one, zero], -1),
    'revenue, CUPED': np.stack([paid, one, before], -1),
  }


def tested(values: np.ndarray, in_arm: np.ndarray, is_adjusted: bool) -> tuple[float, bool, bool]:
  """Tests two arms.

  Returns:
    The p value at the end, whether any always-valid interval excludes zero, and whether any
    interval for a fixed horizon does.
  """
  ends = np.unique(np.linspace(0, len(values), LOOKS + 1)[1:].astype(int))
  of_arm = np.concatenate([[0], np.cumsum(in_arm)])[ends]
  control = statistics.moments(values[~in_arm], ends - of_arm)
  treatment = statistics.moments(values[in_arm], of_arm)
  looks = statistics.sequential(control, treatment, LEVEL, len(values))
  found = statistics.compare(control.last(), treatment.last(), LEVEL, is_adjusted)
  distance = np.abs(looks.difference)
  fixed = NormalDist().inv_cdf(1 - LEVEL / 2) * looks.error
  return found.p or 1.0, bool((distance > looks.half_width).any()), bool((distance > fixed).any())


def null_tests(tests: int, users: int, seed: int, share: float = 0.5) -> dict[str, Any]:
  """Splits one population again and again, and counts false alarms.

  Args:
    tests: number of splits.
    users: number of users in both arms.
    seed: of the population.
    share: share of the users in the second arm.
  """
  values = people(users, np.random.default_rng(seed))
  names = [f'u{i}' for i in range(users)]
  p = {metric: [] for metric in METRICS}
  crossed = dict.fromkeys(METRICS, 0)
  peeked = dict.fromkeys(METRICS, 0)
  balance = []
  for test in range(tests):
    at = np.array([position(f'A/A {test}', name) for name in names])
    in_arm = at < share
    balance.append(statistics.share_p([(~in_arm).sum(), in_arm.sum()], [1 - share, share]))
    for metric in METRICS:
      value, has_crossed, has_peeked = tested(values[metric], in_arm, 'CUPED' in metric)
      p[metric].append(value)
      crossed[metric] += has_crossed
      peeked[metric] += has_peeked
  return {
    'tests': tests,
    'users': users,
    'looks': LOOKS,
    'share of the second arm': share,
    'below .05 at the end': {m: float(np.mean(np.array(p[m]) < LEVEL)) for m in METRICS},
    'always-valid intervals that ever cross': {m: crossed[m] / tests for m in METRICS},
    'p values below .05 at any look': {m: peeked[m] / tests for m in METRICS},
    'sample ratios below .05': float(np.mean(np.array(balance) < LEVEL)),
  }


def power_tests(tests: int, seed: int, lift: float = 0.05, power: float = 0.8) -> dict[str, Any]:
  """Runs A/B tests as large as the power calculation says, and counts those that find the gain."""
  rng = np.random.default_rng(seed)
  found = {}
  for metric in ('conversion', 'click-through'):
    before = statistics.moments(people(1_000_000, rng)[metric]).last()
    (users,) = statistics.users_needed(before, [lift], LEVEL, power)
    hits = 0
    for _ in range(tests):
      arms = [people(users // 2, rng, gain)[metric] for gain in (0.0, lift)]
      control, treatment = (statistics.moments(arm).last() for arm in arms)
      p = statistics.compare(control, treatment, LEVEL, False).p
      hits += p is not None and p < LEVEL
    found[metric] = {'users': users, 'by calculation': power, 'found': hits / tests}
  return {'tests': tests, 'gain': lift, **found}


class Sessions(NamedTuple):
  """Users who were shown the rankings of two rankers, alone and interleaved.

  Attributes:
    alone: for each ranker `[users, 3]`: requests with a click, requests, and zeros.
    chance: for each ranker `[users]` sum of the true probabilities of a click.
    score: `[users]` interleaved requests that the second ranker won minus those of the first.
  """

  alone: tuple[np.ndarray, np.ndarray]
  chance: tuple[np.ndarray, np.ndarray]
  score: np.ndarray


def sessions(
  users: int, rng: np.random.Generator, noises: tuple[float, float], attraction: float = -3.0
) -> Sessions:
  """Simulates users by the cascade model (Craswell, Zoeter, Taylor and Ramsey, WSDM 2008).

  A user looks at a list from the top, clicks the first item that attracts, and gives up after each
  position with probability .1. Some users come often and most of them rarely. A ranker sorts 20
  items by their relevance plus noise; less noise is a better ranker.

  Args:
    users: number of users.
    rng: random numbers.
    noises: standard deviation of the noise of the first and the second ranker.
    attraction: log odds with which an item of average relevance is clicked.
  """
  requests = 1 + rng.poisson(rng.gamma(1.0, 4.0, users))
  user = np.repeat(np.arange(users), requests)
  relevance = rng.normal(size=(len(user), 20))
  mood = rng.normal(0, 0.5, users)[user, None]
  rate = 1 / (1 + np.exp(-(2 * relevance + attraction + mood)))
  rankings = [
    np.argsort(-(relevance + rng.normal(0, noise, relevance.shape)), 1)[:, :10] for noise in noises
  ]
  patience = 0.9 ** np.arange(10)

  def clicked(shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the clicked position, -1 without a click, and the probability of a click."""
    attracts = np.take_along_axis(rate, shown, 1)
    passed = np.cumprod(1 - attracts, 1)
    chance = attracts * patience * np.concatenate([np.ones((len(shown), 1)), passed[:, :-1]], 1)
    draw = rng.random((len(shown), 1))
    at = (chance.cumsum(1) > draw).argmax(1)
    total = chance.sum(1)
    return np.where(draw[:, 0] < total, at, -1), total

  alone, chance = [], []
  for ranking in rankings:
    at, total = clicked(ranking)
    hits = np.bincount(user, at >= 0, users)
    alone.append(np.stack([hits, requests.astype(float), np.zeros(users)], -1))
    chance.append(np.bincount(user, total, users))
  lists = [
    interleaving.team_draft(first, second, 10, rng)
    for first, second in zip(rankings[0].tolist(), rankings[1].tolist(), strict=True)
  ]
  teams = np.array([teams for _, teams in lists])
  at, _ = clicked(np.array([items for items, _ in lists]))
  credit = np.where(at < 0, 0, 2 * teams[np.arange(len(at)), at] - 1)
  return Sessions(tuple(alone), tuple(chance), np.bincount(user, credit, users))


def interleaving_tests(tests: int, pool: int, seed: int, power: float = 0.8) -> dict[str, Any]:
  """Returns the users that an A/B test and interleaving need to tell two rankers apart.

  The A/B test has the metric that needs the fewest users here: requests with a click, by all
  requests. The sizes come from a pool of users, and are checked by tests on users drawn from it.
  """
  rng = np.random.default_rng(seed)
  drawn = sessions(pool, rng, (1.0, 0.8))
  base = statistics.moments(drawn.alone[0]).last()
  gain = float(drawn.chance[1].sum() / drawn.chance[0].sum() - 1)
  (of_test,) = statistics.users_needed(base, [gain], LEVEL, power)
  by_user = drawn.alone[0] * [1, 0, 0] + [0, 1, 0]
  (of_clicks,) = statistics.users_needed(statistics.moments(by_user).last(), [gain], LEVEL, power)
  score = drawn.score
  quantiles = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(power)
  interleaved = int(np.ceil((quantiles * score.std() / score.mean()) ** 2))
  # The clicks of a pool differ from their probabilities by chance, which would look like a gain.
  offset = [
    values * [1, 0, 0] * (chance.sum() / values[:, 0].sum()) + values * [0, 1, 1]
    for values, chance in zip(drawn.alone, drawn.chance, strict=True)
  ]
  hits = {'A/B': 0, 'interleaving': 0, 'equal rankers, interleaving': 0}
  for _ in range(tests):
    halves = [
      statistics.moments(values[rng.integers(0, pool, of_test // 2)]).last() for values in offset
    ]
    p = statistics.compare(*halves, LEVEL, False).p
    hits['A/B'] += p is not None and p < LEVEL
    sample = score[rng.integers(0, pool, interleaved)]
    teams = ('first', 'second')
    hits['interleaving'] += interleaving.prefer(sample, teams).p_permutation < LEVEL
    # Scores whose signs are drawn anew belong to two rankers that are equal.
    equal = sample * rng.choice([-1, 1], len(sample))
    p = interleaving.prefer(equal, teams).p_permutation
    hits['equal rankers, interleaving'] += p < LEVEL
  return {
    'tests': tests,
    'pool': pool,
    'requests with a click': float(statistics.ratio_or_zero(base)),
    'gain': gain,
    'users of the A/B test': of_test,
    'users of the A/B test by clicks a user': of_clicks,
    'users of interleaving': interleaved,
    'ratio': of_test / interleaved,
    'found': {name: count / tests for name, count in hits.items()},
  }


def logged_trials(
  requests: int, rng: np.random.Generator, actions: int = 8, users: int | None = None
) -> tuple[off_policy.Trials, float]:
  """Draws a log of one policy and the true reward of another.

  Each request has a context. Both policies show one of eight items with a softmax over their own
  scores. The model of the doubly robust estimate is wrong by a factor and by noise.

  Returns:
    The log, and the mean reward that the other policy would have had for these contexts' law.
  """
  users = users or requests // 2
  user = rng.integers(0, users, requests)
  # Contexts of one user are alike, so requests of a user depend on each other.
  context = 0.5 * rng.normal(size=(users, 1))[user] + rng.normal(size=(requests, 3)) * [1, 1, 0.5]
  sides = np.random.default_rng(0).normal(size=(3, 3, actions))  # The same world in every log.
  rate = 1 / (1 + np.exp(-(context @ sides[0] - 1)))
  softmax = lambda scores: (e := np.exp(scores - scores.max(1, keepdims=True))) / e.sum(1)[:, None]
  logged = softmax(0.6 * (context @ sides[1]))
  wanted = softmax(0.6 * (context @ sides[0]))
  action = (logged.cumsum(1) > rng.random((requests, 1))).argmax(1)
  row = np.arange(requests)
  reward = (rng.random(requests) < rate[row, action]).astype(float)
  guess = 0.8 * rate + 0.1 * rng.normal(size=rate.shape)
  trials = off_policy.Trials(
    row,
    reward,
    wanted[row, action] / logged[row, action],
    user,
    guess[row, action],
    (wanted * guess).sum(1),
  )
  return trials, float((wanted * rate).sum(1).mean())


def off_policy_tests(logs: int, requests: int, seed: int, chunks: int = 20) -> dict[str, Any]:
  """Counts the intervals that hold the truth, over many logs."""
  rng = np.random.default_rng(seed)
  # The truth is the mean over all contexts, of which one log has only a sample.
  truth = float(np.mean([logged_trials(100_000, rng)[1] for _ in range(chunks)]))
  held = dict.fromkeys(('IPS', 'SNIPS', 'DR'), 0)
  widths = dict.fromkeys(held, 0.0)
  effective = 0.0
  for _ in range(logs):
    found = off_policy.evaluate(logged_trials(requests, rng)[0])
    effective += found.effective / logs
    for estimate in found.estimates[1:]:
      held[estimate.method] += estimate.low <= truth <= estimate.high
      widths[estimate.method] += (estimate.high - estimate.low) / logs
  return {
    'logs': logs,
    'requests': requests,
    'true reward': truth,
    'mean effective exposures': effective,
    'intervals that hold the truth': {method: count / logs for method, count in held.items()},
    'mean width': widths,
  }


def simulated_tables(
  users: int, seed: int, lift: float = 0.0, days: int = 20, salt: str = 'demo'
) -> tuple[pa.Table, pa.Table]:
  """Makes the two tables of an experiment with the arms `old` and `new`, half of the users each.

  Args:
    users: number of users.
    seed: of the random numbers.
    lift: relative gain of the arm `new` in clicks and buys.
    days: days over which the users come.
    salt: salt of the assignment.
  """
  rng = np.random.default_rng(seed)
  shown, done = [], []
  taste = rng.gamma(4.0, 0.25, users)
  for number in range(users):
    user = f'u{number}'
    arm = 'old' if position(salt, user) < 0.5 else 'new'
    gain = 1 + lift * (arm == 'new')
    first = START + (20 + days * rng.random()) * _DAY
    for _ in range(rng.poisson(2 * taste[number])):
      early = first - rng.uniform(0.1, 15) * _DAY
      done.append((f'e{len(done)}', user, f'i{rng.integers(50)}', 'buy', early, '', 20.0))
    for visit in range(1 + rng.poisson(1.0)):
      request = f'r{number}-{visit}'
      moment = first + visit * 0.4 * _DAY
      for place, item in enumerate(rng.choice(50, 5, replace=False).tolist(), 1):
        shown.append((request, user, moment, arm, f'i{item}', place))
        if rng.random() < 0.15 * taste[number] * gain / place:
          click = (f'e{len(done)}', user, f'i{item}', 'click', moment + 60, request, 0.0)
          done.append(click)
          if rng.random() < 0.4:
            price = float(np.round(rng.lognormal(3, 0.5), 2))
            done.append((f'e{len(done)}', user, f'i{item}', 'buy', moment + 600, request, price))
  table = lambda rows, names: pa.table(
    {name: [row[i] for row in rows] for i, name in enumerate(names)}
  )
  return (
    table(shown, ('request_id', 'user', 'time', 'arm', 'item', 'position')),
    table(done, ('id', 'user', 'item', 'kind', 'time', 'request_id', 'value')),
  )


@exit_on_reported_error
def main() -> None:
  """Runs the simulations and stores their results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--tests', type=int, default=2000, help='A/A tests, and as many A/B tests')
  parser.add_argument('--users', type=int, default=5000, help='users of an A/A test')
  parser.add_argument('--logs', type=int, default=1000, help='logs of the off-policy estimates')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--parts', nargs='+', choices=PARTS, default=PARTS, help='others keep their stored results'
  )
  parser.add_argument('--out', type=pathlib.Path, default=RESULTS)
  flags = parser.parse_args()
  parts = {
    'A/A': lambda: null_tests(flags.tests, flags.users, flags.seed),
    'A/A, small arm': lambda: null_tests(flags.tests, flags.users, flags.seed, share=0.05),
    'A/B': lambda: power_tests(flags.tests, flags.seed),
    'interleaving': lambda: interleaving_tests(flags.tests, 30_000, flags.seed),
    'off-policy': lambda: off_policy_tests(flags.logs, 2000, flags.seed),
  }
  found = json.loads(flags.out.read_text()) if flags.out.exists() else {}
  for name in flags.parts:
    found[name] = {'seed': flags.seed, **parts[name]()}
    say(f'{name}: {json.dumps(found[name], indent=1)}')
    write_file(flags.out, json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()

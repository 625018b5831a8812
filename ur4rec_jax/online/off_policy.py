"""Estimates how a new policy would have done, from the logs of another one.

A policy shows items with known probabilities, its propensities. An item that the new policy shows
twice as often as the old one counts twice. The estimates hold only where the old policy also showed
what the new one would show.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ur4rec_jax.data.raw import texts
from ur4rec_jax.errors import InputError, counted
from ur4rec_jax.online.logs import Logs, Table, codes, reacted, read_table

_LEAST_EFFECTIVE = 100  # With a smaller effective sample size, intervals are too narrow.
_LEAST_SHARE = 0.01
_FAR_FROM_ONE = 4.0  # Distance of the mean weight from 1 in standard errors.


class Estimate(NamedTuple):
  """An estimate of the mean reward of a request.

  Attributes:
    method: `IPS`, `SNIPS` or `DR`; `logged` is the mean of the logs themselves.
    value: the estimate.
    low: lower end of its interval.
    high: upper end of its interval.
  """

  method: str
  value: float
  low: float
  high: float


class Evaluation(NamedTuple):
  """Estimates of a policy, and how far to trust them.

  Attributes:
    estimates: by several methods.
    effective: effective sample size of the weighted exposures, `sum(w)**2 / sum(w**2)`.
    exposures: number of exposures.
    mean_weight: mean of the weights, whose expectation is 1 if all propensities are right.
    warnings: why the estimates may be wrong.
  """

  estimates: tuple[Estimate, ...]
  effective: float
  exposures: int
  mean_weight: float
  warnings: tuple[str, ...]


class Trials(NamedTuple):
  """The exposures with rewards and weights; each field is `[exposures]` or `[requests]`.

  Attributes:
    request: number of the request of each exposure, from 0.
    reward: reward of each exposure, e.g. 1 for a click.
    weight: importance weight: propensity under the new policy divided by the logged one.
    user: `[requests]` number of the user; requests of one user depend on each other.
    predicted: reward that a model predicts for each exposure, or None.
    expected: `[requests]` predicted reward of the list that the new policy shows, or None.
  """

  request: np.ndarray
  reward: np.ndarray
  weight: np.ndarray
  user: np.ndarray
  predicted: np.ndarray | None = None
  expected: np.ndarray | None = None


def evaluate(trials: Trials, level: float = 0.05) -> Evaluation:
  """Estimates the mean reward of a request under the new policy.

  - IPS, inverse propensity scoring: unbiased if the propensities are right.
  - SNIPS, self-normalised: a little biased, with less variance where weights vary much.
  - DR, doubly robust: corrects a model's predictions by weighted residuals. It is unbiased if the
    propensities or the predictions are right. (Dudik, Langford and Li, ICML 2011.)

  Args:
    trials: the exposures with rewards and weights.
    level: one minus the confidence of the intervals.

  Raises:
    InputError: fewer than two users, or no item that the new policy would show.
  """
  requests, users = len(trials.user), len(np.unique(trials.user))
  if users < 2:
    raise InputError('off-policy estimates need two users or more')
  if not trials.weight.any():
    raise InputError(
      'the new policy shows none of the logged items: nothing can be said about it from these logs'
    )
  total = lambda values: np.bincount(trials.request, values, requests)
  weight, reward = trials.weight, trials.reward
  estimates = [
    _estimate('logged', total(reward), trials.user, level),
    _estimate('IPS', total(weight * reward), trials.user, level),
  ]
  rate = np.sum(weight * reward) / np.sum(weight)
  # The linearised ratio has the variance of the ratio (delta method). Lists may differ in length.
  lengths = np.bincount(trials.request, minlength=requests)
  around = total(weight * (reward - rate)) / weight.mean() + rate * lengths
  estimates.append(_estimate('SNIPS', around, trials.user, level))
  if trials.predicted is not None and trials.expected is not None:
    residual = total(weight * (reward - trials.predicted))
    estimates.append(_estimate('DR', trials.expected + residual, trials.user, level))
  effective = float(weight.sum() ** 2 / np.sum(weight**2))
  return Evaluation(
    tuple(estimates),
    effective,
    len(weight),
    float(weight.mean()),
    tuple(_doubts(trials, effective)),
  )


def _estimate(method: str, values: np.ndarray, user: np.ndarray, level: float) -> Estimate:
  """Returns the mean over requests, with standard errors clustered by user."""
  from scipy.stats import t

  mean = values.mean()
  half = t.ppf(1 - level / 2, len(np.unique(user)) - 1) * _error_of_mean(values, user)
  return Estimate(method, float(mean), float(mean - half), float(mean + half))


def _error_of_mean(values: np.ndarray, user: np.ndarray) -> float:
  """Returns the standard error of a mean, clustered by user."""
  by_user = np.bincount(user, values - values.mean())[np.unique(user)]
  users = len(by_user)
  return float(np.sqrt(np.sum(by_user**2) * users / (users - 1)) / len(values))


def _doubts(trials: Trials, effective: float) -> list[str]:
  found, weight = [], trials.weight
  if effective < max(_LEAST_EFFECTIVE, _LEAST_SHARE * len(weight)):
    found.append(
      f'too little overlap: {len(weight):,} exposures are worth {effective:,.0f} under the new'
      ' policy, so the intervals are too narrow to be trusted. Log more exploration, or evaluate a'
      ' policy that is closer to the logged one'
    )
  error = _error_of_mean(weight, trials.user[trials.request])
  if abs(weight.mean() - 1) > _FAR_FROM_ONE * error + 1e-3:
    found.append(
      f'the weights have the mean {weight.mean():.3f}, not 1: the new policy shows items that the'
      ' logged one never shows, or some propensities are wrong'
    )
  return found


def trials_of(logs: Logs, target: str | Path, event: str) -> tuple[Trials, list[str]]:
  """Joins the logs with the propensities of a new policy.

  Args:
    logs: read with `needs=['propensity']`.
    target: table with `request_id`, `item` and `propensity` of the items that the new policy may
      show, and optionally `predicted`, the reward that a model predicts. For doubly robust
      estimates, all items that it may show are listed.
    event: kind of the events that are a reward of 1.

  Returns:
    The trials, and warnings.

  Raises:
    InputError: the table cannot be read, does not fit the logs, or the logs have no such events.
  """
  if event not in logs.kinds:
    raise InputError(
      f'{logs.paths[1]}: has no events of the kind {event!r}; kinds are {texts.listed(logs.kinds)}'
    )
  table = read_table(Path(target), ('request_id', 'item', 'propensity'), ('predicted',))
  shown = logs.exposures
  requests = len(logs.requests)
  vocabulary = pc.unique(
    pa.concat_arrays([logs.items, table.columns['item'].combine_chunks().cast(logs.items.type)])
  )
  request = codes(table.columns['request_id'], logs.requests)
  item = codes(table.columns['item'], vocabulary)
  propensity = table.floats('propensity')
  _check_target(table, request, item, propensity, logs)
  # The first items of the joint vocabulary are those of the logs, with the same numbers.
  key = request * len(vocabulary) + item
  order = np.argsort(key, kind='stable')
  wanted = shown.request * len(vocabulary) + shown.item
  at = order[np.minimum(np.searchsorted(key[order], wanted), len(key) - 1)]
  is_listed = key[at] == wanted
  warnings = list(logs.warnings)
  if not is_listed.all():
    warnings.append(
      f'{counted(int((~is_listed).sum()), "exposure")} of {len(wanted):,} not listed in {target}:'
      ' the new policy is taken never to show them'
    )
  owner = np.zeros(requests, np.int64)
  owner[shown.request] = shown.user
  predicted = expected = None
  if 'predicted' in table.columns:
    guess = table.floats('predicted')
    known = request >= 0
    sums = np.bincount(request[known], propensity[known], requests)
    lengths = np.bincount(shown.request, minlength=requests)
    short = np.flatnonzero(np.abs(sums - lengths) > 0.01 * lengths)
    if short.size:
      name = texts.shown(logs.requests[int(short[0])].as_py())
      raise InputError(
        f'{target}: the propensities of request {name} add up to {sums[short[0]]:.3f}, but it'
        f' shows {counted(int(lengths[short[0]]), "item")}; with predictions, list all items that'
        ' the new policy may show'
      )
    predicted = np.where(is_listed, guess[at], 0.0)
    expected = np.bincount(request[known], (propensity * guess)[known], requests)
  weight = np.where(is_listed, propensity[at], 0.0) / shown.propensity
  reward = np.isfinite(reacted(logs, event)).astype(float)
  return Trials(shown.request, reward, weight, owner, predicted, expected), warnings


def _check_target(
  table: Table, request: np.ndarray, item: np.ndarray, propensity: np.ndarray, logs: Logs
) -> None:
  if (request < 0).all():
    raise InputError(
      f'{table.path}: none of its requests is in {logs.paths[0]}; use the same request ids'
    )
  wrong = np.flatnonzero((propensity < 0) | (propensity > 1))
  if wrong.size:
    row = int(wrong[0])
    raise InputError(f'{table.where(row)}: propensity must be from 0 to 1, not {propensity[row]:g}')
  key = np.where(request >= 0, request * (item.max() + 1) + item, -1 - np.arange(len(item)))
  first = np.unique(key, return_index=True)[1]
  if len(first) < len(key):
    row = int(np.setdiff1d(np.arange(len(key)), first)[0])
    raise InputError(f'{table.where(row)}: the item of this request is listed twice; list it once')

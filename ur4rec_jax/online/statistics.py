"""Compares arms: sums over users, intervals, always-valid intervals, sample ratio and power.

Users are the independent units. Everything is computed from counts, means and covariances of three
numbers of each user: numerator, denominator and covariate of a metric.

Fixed-horizon tests and power come from tea-tasting, the chi-square test from SciPy. The
always-valid intervals are asymptotic confidence sequences (Waudby-Smith, Arbour, Sinha, Kennedy and
Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", Annals of
Statistics 2024), which are also those of the mixture sequential probability ratio test (Johari,
Koomen, Pekelis and Walsh, "Always valid inference", Operations Research 2022).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.errors import InputError

LEAST_SHARE_P = 0.001  # The usual threshold for a sample-ratio mismatch, which is tested often.


class Moments(NamedTuple):
  """Sums over users at one or several moments.

  Attributes:
    count: `[looks]` number of users.
    mean: `[looks, 3]` means of numerator, denominator and covariate.
    cov: `[looks, 3, 3]` covariances with the divisor `count - 1`.
  """

  count: np.ndarray
  mean: np.ndarray
  cov: np.ndarray

  def last(self) -> 'Moments':
    """Returns the moments of the last look, without the axis of looks."""
    return Moments(self.count[-1], self.mean[-1], self.cov[-1])


class Comparison(NamedTuple):
  """An arm against the control in one metric.

  Attributes:
    control: value of the control.
    treatment: value of the arm, adjusted by the covariate if there is one.
    difference: `treatment - control`.
    interval: interval of the difference for a horizon that was fixed in advance.
    relative: the difference relative to the control.
    relative_interval: its interval, for the same horizon.
    p: p value for the same horizon; None if an arm has fewer than two users, or if the users of
      both arms are all alike.
  """

  control: float
  treatment: float
  difference: float
  interval: tuple[float, float]
  relative: float
  relative_interval: tuple[float, float]
  p: float | None


class Sequential(NamedTuple):
  """An arm against the control at each look; valid for any number of looks.

  Attributes:
    users: `[looks]` users of both arms.
    control: `[looks]` value of the control.
    difference: `[looks]` difference from the control.
    error: `[looks]` standard error of the difference; infinite where nothing is known yet.
    half_width: `[looks]` half the width of the interval; infinite where nothing is known yet.
    p: `[looks]` smallest always-valid p value so far.
  """

  users: np.ndarray
  control: np.ndarray
  difference: np.ndarray
  error: np.ndarray
  half_width: np.ndarray
  p: np.ndarray


def moments(values: np.ndarray, ends: Sequence[int] | None = None) -> Moments:
  """Returns the moments of the first `end` users for each end; of all users by default.

  Args:
    values: `[users, 3]` numerator, denominator and covariate of each user.
    ends: numbers of users.
  """
  # Sums of squares around the overall mean; around zero they would lose digits.
  center = values.mean(0) if len(values) else np.zeros(values.shape[1])
  around = values - center
  if ends is None:
    cov = around.T @ around / max(len(values) - 1, 1)
    return _without_rounding(Moments(np.array([len(values)]), center[None], cov[None]), values)
  ends = np.array(ends)
  width = values.shape[1]
  sums = np.concatenate([np.zeros((1, width)), around.cumsum(0)])[ends]
  products = (around[:, :, None] * around[:, None]).cumsum(0)
  products = np.concatenate([np.zeros((1, width, width)), products])[ends]
  count = np.maximum(ends, 1)[:, None]
  mean = sums / count
  squares = count[..., None] * mean[:, :, None] * mean[:, None]
  cov = (products - squares) / np.maximum(ends - 1, 1)[:, None, None]
  return _without_rounding(Moments(ends, mean + center, cov), values)


def _without_rounding(m: Moments, values: np.ndarray) -> Moments:
  """Makes the moments exact of numbers that all users so far have in common.

  Rounded sums would give them a tiny variance, against which any difference looks large.
  """
  changes = (values != values[:1]).cumsum(0)
  varies = np.concatenate([np.zeros((1, values.shape[1]), int), changes])[m.count] > 0
  first = values[0] if len(values) else 0.0
  mean = np.where(varies, m.mean, first)
  return Moments(m.count, mean, m.cov * varies[:, :, None] * varies[:, None])


def _influence(mean: np.ndarray, slope: np.ndarray) -> np.ndarray:
  """Returns `[..., 3]` weights of the three numbers in the linearised ratio (delta method)."""
  numerator, denominator, _ = np.moveaxis(mean, -1, 0)
  return np.stack([1 / denominator, -numerator / denominator**2, -slope], -1)


def _variance(cov: np.ndarray, weights: np.ndarray) -> np.ndarray:
  return np.maximum(np.einsum('...i,...ij,...j->...', weights, cov, weights), 0)


def _slopes(control: Moments, treatment: Moments) -> np.ndarray:
  """Returns `[looks]` slopes of the metric on the covariate, from both arms (CUPED).

  Deng, Xu, Kohavi and Walker, "Improving the sensitivity of online controlled experiments by
  utilizing pre-experiment data", WSDM 2013.
  """
  share = (control.count / np.maximum(control.count + treatment.count, 1))[..., None]
  mean = share * control.mean + (1 - share) * treatment.mean
  cov = share[..., None] * control.cov + (1 - share[..., None]) * treatment.cov
  weights = _influence(mean, np.zeros(mean.shape[:-1]))
  with_covariate = np.einsum('...i,...i->...', weights, cov[..., 2])
  variance = cov[..., 2, 2]
  return np.divide(with_covariate, variance, out=np.zeros_like(with_covariate), where=variance > 0)


def sequential(
  control: Moments, treatment: Moments, level: float, planned_users: int
) -> Sequential:
  """Returns intervals that hold the truth at all looks together with probability `1 - level`.

  Args:
    control: moments of the control at each look.
    treatment: moments of the arm at each look.
    level: accepted probability that any of the intervals misses the truth.
    planned_users: number of users, in both arms, at which the interval is narrowest.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    slope = _slopes(control, treatment)
    ratio = lambda m: m.mean[..., 0] / m.mean[..., 1]
    gap = slope * (treatment.mean[..., 2] - control.mean[..., 2])
    difference = ratio(treatment) - ratio(control) - gap
    first, second = (_variance(m.cov, _influence(m.mean, slope)) for m in (control, treatment))
    # An arm whose users are all alike, as when nobody buys, says nothing about its variance. It
    # gets that of the other arm, which it would have if the arms did not differ.
    first, second = np.where(first > 0, first, second), np.where(second > 0, second, first)
    # A small arm lacks the few users who pay most, so its own variance is often far too small.
    # There the variance of the users of both arms is the larger one. Between equal arms it has no
    # effect.
    users = control.count + treatment.count
    of_both = (control.count * first + treatment.count * second) / users
    variance = np.maximum(
      first / control.count + second / treatment.count,
      of_both * (1 / control.count + 1 / treatment.count),
    )
  is_known = np.isfinite(variance) & (variance > 0)
  is_known &= (control.count > 1) & (treatment.count > 1)
  growth = users * tuning(level) / planned_users
  variance = np.where(is_known, variance, 1.0)
  with np.errstate(divide='ignore'):
    half = np.sqrt(variance * (1 + 1 / growth) * (np.log1p(growth) - 2 * math.log(level)))
  evidence = (difference**2 / variance * growth / (growth + 1) - np.log1p(growth)) / 2
  p = np.where(is_known, np.exp(-np.maximum(evidence, 0)), 1.0)
  return Sequential(
    users,
    ratio_or_zero(control),
    np.where(is_known, difference, 0.0),
    np.where(is_known, np.sqrt(variance), np.inf),
    np.where(is_known, half, np.inf),
    np.minimum.accumulate(p),
  )


def ratio_or_zero(m: Moments) -> np.ndarray:
  """Returns numerator divided by denominator at each look; zero where nothing was counted."""
  numerator, denominator = m.mean[..., 0], m.mean[..., 1]
  return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def tuning(level: float) -> float:
  """Returns the mixture variance, relative to the estimate's, that suits the planned users."""
  return -2 * math.log(level) + math.log1p(-2 * math.log(level))


def compare(control: Moments, treatment: Moments, level: float, with_covariate: bool) -> Comparison:
  """Tests one arm against the control at a horizon that was fixed in advance.

  Args:
    control: moments of the control, without an axis of looks.
    treatment: moments of the arm, without an axis of looks.
    level: one minus the confidence of the intervals.
    with_covariate: whether the third number explains a part of the variance.

  Raises:
    InputError: tea-tasting is not installed.
  """
  test = _metric(with_covariate, confidence_level=1 - level)
  if min(control.count, treatment.count) < 2 or not has_variance(control, treatment):
    before, after = (float(ratio_or_zero(arm)) for arm in (control, treatment))
    nothing = math.nan, math.nan
    return Comparison(before, after, after - before, nothing, math.nan, nothing, None)
  # Relative to a control that is zero, there is no interval.
  with np.errstate(divide='ignore', invalid='ignore'):
    found = test.analyze_aggregates(_aggregates(control), _aggregates(treatment))
  return Comparison(
    found.control,
    found.treatment,
    found.effect_size,
    (found.effect_size_ci_lower, found.effect_size_ci_upper),
    found.rel_effect_size,
    (found.rel_effect_size_ci_lower, found.rel_effect_size_ci_upper),
    found.pvalue,
  )


def users_needed(
  baseline: Moments,
  effects: Sequence[float],
  level: float,
  power: float,
  ratio: float = 1.0,
  with_covariate: bool = False,
) -> list[int]:
  """Returns for each effect the number of users in both arms that finds it.

  Args:
    baseline: moments of users without the change, without an axis of looks.
    effects: relative differences, such as 0.05.
    level: accepted probability of a false alarm.
    power: wanted probability of finding the effect.
    ratio: users in the arm divided by users in the control.
    with_covariate: whether the covariate explains a part of the variance.

  Raises:
    InputError: no number of users fits, or tea-tasting is not installed.
  """
  if not power > level:
    raise InputError(
      f'power={power:g}: must be more than the level {level:g}, the probability of a false alarm'
    )
  test = _metric(
    with_covariate,
    rel_effect_size=tuple(effects),
    alpha=level,
    power=power,
    ratio=ratio,
    use_t=False,
  )
  try:
    found = test.solve_power_from_aggregates(_aggregates(baseline), 'n_obs')
  except ValueError as error:
    raise InputError(
      f'effects: three users would show one of {max(effects):g}; give smaller ones, such as 0.05'
    ) from error
  except RuntimeError as error:
    raise InputError(
      f'effects: no number of users shows one of {min(effects):g}; give larger ones, such as 0.05'
    ) from error
  return [plan.n_obs for plan in found]


def sequential_factor(level: float, power: float) -> float:
  """Returns how many times as many users an always-valid test needs as a fixed-horizon test.

  This holds if the effect is found just at the planned number of users. A larger effect is found
  earlier, which is the purpose of such intervals.
  """
  from scipy.stats import norm

  growth = tuning(level)
  bound = math.sqrt((1 + 1 / growth) * (math.log1p(growth) - 2 * math.log(level)))
  return ((bound + norm.ppf(power)) / (norm.ppf(1 - level / 2) + norm.ppf(power))) ** 2


def share_p(counts: Sequence[int], shares: Sequence[float]) -> float:
  """Returns the p value of the numbers of users by arm under their shares (chi-square).

  A tiny value means a sample-ratio mismatch: users were lost or logged wrongly in some arm.
  """
  from scipy.stats import chisquare

  expected = np.array(shares) / np.sum(shares) * np.sum(counts)
  return float(chisquare(counts, expected).pvalue)


def has_variance(*arms: Moments) -> bool:
  """Whether the metric varies between the users of any arm."""
  none = np.zeros(())
  return any(_variance(m.cov, _influence(m.mean, none)).any() for m in arms if m.mean[1] > 0)


def _aggregates(m: Moments) -> Any:
  from tea_tasting.aggr import Aggregates

  names = ('numerator', 'denominator', 'covariate')
  pairs = [(i, j) for i in range(3) for j in range(i)]
  return Aggregates(
    int(m.count),
    {name: float(m.mean[i]) for i, name in enumerate(names)},
    {name: float(m.cov[i, i]) for i, name in enumerate(names)},
    {(names[i], names[j]): float(m.cov[i, j]) for i, j in pairs},
  )


def _metric(with_covariate: bool, **options: Any) -> Any:
  try:
    from tea_tasting.metrics import RatioOfMeans
  except ImportError as error:
    raise InputError(
      f"{error.name} is not installed; pip install 'ur4rec-jax[experiments]'"
    ) from error
  covariate = 'covariate' if with_covariate else None
  return RatioOfMeans('numerator', 'denominator', covariate, **options)

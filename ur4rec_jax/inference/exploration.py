"""Shows some lists in a random order, so that logs can tell how other lists would have done.

The order is drawn by Plackett-Luce: the first item with a probability that grows with its score,
then the next one among those that are left, and so on. Needs only NumPy.
"""

import dataclasses
import functools
import itertools

import numpy as np

ITEMS, TEMPERATURE = 30, 0.5
_LEAST_WEIGHT = np.exp(-30.0)  # Relative to the best item; rarer than any log could show.
_STEP = 0.4  # Largest step of the integral over the logarithm of time.
_TAIL = 30.0


@dataclasses.dataclass(frozen=True, eq=False)
class Exploration:
  """How often and how far lists leave the order of their scores.

  Attributes:
    share: the probability that a list is drawn.
    temperature: 0 would keep the order, large values forget the scores. It is measured in standard
      deviations of the scores of the items that are drawn from.
    items: number of the best items, whose order is drawn; the items after them keep their order.
    rng: random generator.
  """

  share: float
  temperature: float = TEMPERATURE
  items: int = ITEMS
  rng: np.random.Generator = dataclasses.field(default_factory=np.random.default_rng)

  def draw(self, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Makes a list of k items.

    Args:
      scores: `[candidates]`, in descending order.
      k: length of the list.

    Returns:
      `[list]` indices of the candidates; `[list]` the probability with which the item is shown at
      its position, over both kinds of lists; and whether the order was drawn.
    """
    count = min(k, len(scores))
    order, propensity = np.arange(count), np.ones(count)
    drawn = min(count, self.items)
    if not drawn:
      return order, propensity, False
    weights = self.weights(scores[: self.items])
    is_drawn = bool(self.rng.random() < self.share)
    if is_drawn:
      # Sorting log weights with Gumbel noise draws an order by Plackett-Luce.
      keys = np.log(weights) + self.rng.gumbel(size=len(weights))
      order[:drawn] = np.argsort(-keys)[:drawn]
    by_chance = position_probabilities(weights, order[:drawn])
    by_score = order[:drawn] == np.arange(drawn)
    propensity[:drawn] = self.share * by_chance + (1 - self.share) * by_score
    return order, propensity, is_drawn

  def weights(self, scores: np.ndarray) -> np.ndarray:
    """Returns `[items]` weights; the probability of the first position is proportional to them."""
    scale = scores.std() * self.temperature
    relative = (scores - scores.max()) / (scale if scale > 0 else 1.0)
    return np.maximum(np.exp(relative), _LEAST_WEIGHT)


def position_probabilities(weights: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Returns the probability that Plackett-Luce puts each item of a list at its position.

  Items arrive after times that are exponential with the weights as rates, which gives the order of
  Plackett-Luce. An item has position j if j - 1 others have come before it. The probability of that
  is an integral over its time of arrival.

  Args:
    weights: `[items]` above 0.
    order: `[list]` different indices of items, the one at position 1 first.

  Returns:
    `[list]` probabilities.
  """
  first, last = np.log(1e-9 / weights.sum()), np.log(_TAIL / weights.min())
  # The time of arrival at a late position is known better, so its peak is narrower. With such steps
  # the error of the integral stays below a millionth.
  step = min(_STEP, 1 / np.sqrt(len(order)))
  time = np.exp(np.arange(first, last + step, step))
  arrived = -np.expm1(-time[:, None] * weights)  # [times, items]
  nobody = np.zeros((len(time), len(order)))  # [times, count]: whether so many have arrived.
  nobody[:, 0] = 1
  outside = functools.reduce(_with_one_more, np.delete(arrived, order, axis=1).T, nobody)
  # For each item, without it: the items after it in the list and those outside of the list.
  after = [*itertools.accumulate(arrived[:, order[:0:-1]].T, _with_one_more, initial=outside)]
  before, found = nobody, []
  for position, item in enumerate(order):
    others = after.pop()
    count = (before[:, : position + 1] * others[:, position::-1]).sum(1)
    rate = time * weights[item]
    found.append((rate * np.exp(-rate) * count).sum() * step)
    before = _with_one_more(before, arrived[:, item])
  return np.clip(found, 0.0, 1.0)


def _with_one_more(count: np.ndarray, arrived: np.ndarray) -> np.ndarray:
  """Returns `[times, count]` probabilities that so many have arrived, with one more item.

  Args:
    count: `[times, count]` the probabilities without the item.
    arrived: `[times]` probabilities that it has arrived.
  """
  found = count * (1 - arrived[:, None])
  found[:, 1:] += count[:, :-1] * arrived[:, None]
  return found

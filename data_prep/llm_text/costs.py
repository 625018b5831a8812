"""Prices, estimates of the cost, and a budget that is never exceeded."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.llm_text import prompts

PRICES = Path(__file__).with_name('prices.json')
# Tokens of an answer with the length that the prompts ask for.
OUTPUT_TOKENS = {'item': 110, 'user': 140}
# Tokens that a provider may add to a request, for roles and the JSON schema.
_HIDDEN_TOKENS = 600


class Price(NamedTuple):
  """Dollars per million tokens."""

  input: float
  output: float

  def cost(self, tokens: tuple[int, int]) -> float:
    """Returns the dollars that (input, output) tokens cost."""
    return (tokens[0] * self.input + tokens[1] * self.output) / 1e6


def find_price(backend: str, model: str, is_batch: bool) -> Price | None:
  """Returns the price of a model, None if the table lacks it."""
  table = json.loads(PRICES.read_text(encoding='utf-8'))
  models = table['models'].get(backend, {})
  # Dated versions, such as gpt-5.4-mini-2026-03-17, have the price of the undated name.
  price = models.get(model) or models.get(re.sub(r'-(\d{4}-\d\d-\d\d|\d{8})$', '', model))
  factor = table['batch_factor'] if is_batch else 1.0
  return Price(*(factor * value for value in price)) if price else None


def estimate_tokens(text: str) -> int:
  """Estimates the tokens of a text: one per 3.5 ASCII characters, one per other character."""
  others = len(text) - sum(map(str.isascii, text))
  return round((len(text) - others) / 3.5 + others)


def estimate(prompt: prompts.Prompt) -> tuple[int, int]:
  """Estimates the (input, output) tokens of a request and its answer."""
  schema = json.dumps(prompts.SCHEMA)
  return estimate_tokens(prompt.system + prompt.text + schema), OUTPUT_TOKENS[prompt.kind]


def most_tokens(body: Mapping[str, Any], max_output: int) -> tuple[int, int]:
  """Returns the most (input, output) tokens of a request; a token has at least one byte."""
  return len(json.dumps(body, ensure_ascii=False).encode()) + _HIDDEN_TOKENS, max_output


class Budget:
  """A limit in dollars for spent money and for the reservations of running requests.

  Attributes:
    limit: most dollars; None for no limit.
    price: of the model; zero if it is unknown.
    spent: cost of all answers in this store, usable or not.
    lost: the most that replies which broke off may have cost.
  """

  def __init__(self, limit: float | None, spent: float, price: Price | None = None):
    self.limit = limit
    self.price = price or Price(0.0, 0.0)
    self.spent = spent
    self.lost = 0.0
    self._promised = 0.0
    self._num_under_way = 0

  @property
  def is_idle(self) -> bool:
    """Whether no request is running."""
    return not self._num_under_way

  def fits(self, amount: float) -> bool:
    """Whether a request that may cost `amount` can be sent."""
    committed = self.spent + self.lost + self._promised + amount
    return self.limit is None or committed <= self.limit

  def pay(self, tokens: tuple[int, int]) -> None:
    """Adds what the (input, output) tokens of an answer cost."""
    self.spent += self.price.cost(tokens)

  def promise(self, amount: float, num_requests: int = 1) -> None:
    """Reserves the most that requests may cost."""
    self._promised += amount
    self._num_under_way += num_requests

  def release(self, amount: float, num_requests: int = 1) -> None:
    """Removes the reservation of finished requests."""
    self._num_under_way -= num_requests
    # Rounding errors of float sums must not remain when nothing is reserved.
    self._promised = self._promised - amount if self._num_under_way else 0.0

"""What texts cost: the price table, estimates before, and a budget that is never exceeded."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.llm_text import prompts

PRICES = Path(__file__).with_name('prices.json')
# Texts of the length that the prompts ask for, as JSON.
OUTPUT_TOKENS = {'item': 110, 'user': 140}
# What a provider may add to a request: roles, the instructions behind a JSON schema.
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
  # gpt-5.4-mini-2026-03-17 and claude-haiku-4-5-20251001 cost what their families do.
  price = models.get(model) or models.get(re.sub(r'-(\d{4}-\d\d-\d\d|\d{8})$', '', model))
  factor = table['batch_factor'] if is_batch else 1.0
  return Price(*(factor * value for value in price)) if price else None


def estimate_tokens(text: str) -> int:
  """Roughly the tokens of a text: 3.5 characters each, but one by one where they are not ASCII."""
  others = len(text) - sum(map(str.isascii, text))
  return round((len(text) - others) / 3.5 + others)


def estimate(prompt: prompts.Prompt) -> tuple[int, int]:
  """Roughly the (input, output) tokens of a request and its answer."""
  schema = json.dumps(prompts.SCHEMA)
  return estimate_tokens(prompt.system + prompt.text + schema), OUTPUT_TOKENS[prompt.kind]


def most_tokens(body: Mapping[str, Any], max_output: int) -> tuple[int, int]:
  """Returns (input, output) tokens that a request cannot exceed: no token is less than a byte."""
  return len(json.dumps(body, ensure_ascii=False).encode()) + _HIDDEN_TOKENS, max_output


class Budget:
  """Dollars: what was spent, what is promised to requests under way, and the limit of both.

  Attributes:
    spent: for answers that came, usable or not, in this store.
    lost: at most, for replies that broke off: they may have been paid.
  """

  def __init__(self, limit: float | None, spent: float):
    self.limit = limit
    self.spent = spent
    self.lost = 0.0
    self._promised = 0.0
    self._num_under_way = 0

  @property
  def is_idle(self) -> bool:
    """Whether nothing is under way."""
    return not self._num_under_way

  def fits(self, amount: float) -> bool:
    """Whether a request that may cost `amount` can be sent."""
    committed = self.spent + self.lost + self._promised + amount
    return self.limit is None or committed <= self.limit

  def promise(self, amount: float, num_requests: int = 1) -> None:
    """Sets aside what requests may cost at most."""
    self._promised += amount
    self._num_under_way += num_requests

  def release(self, amount: float, num_requests: int = 1) -> None:
    """Ends a promise: the requests are answered, or will never be."""
    self._num_under_way -= num_requests
    # Sums of floats leave a rest.
    self._promised = self._promised - amount if self._num_under_way else 0.0

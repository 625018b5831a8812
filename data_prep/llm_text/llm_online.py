"""Sends single requests to a provider, concurrently, with rate limits, retries and a budget."""

import asyncio
import json
import random
import signal
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from data_prep.llm_text import costs, llm_calls, prompts
from data_prep.llm_text.llm_calls import (
  Answer,
  BadRequest,
  RefusedField,
  Rejected,
  Settings,
  Unanswered,
  Unusable,
)
from ur4rec_jax.errors import InputError, ReportedError

ATTEMPTS = 10
PAID_ATTEMPTS = 3
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
# After this many broken connections without any answer, the network counts as down.
_SILENT_ATTEMPTS = 3
# After this many requests in a row without an answer, the server counts as down.
_GIVEN_UP = 20
# After this many refused requests without any answer, the settings count as wrong.
_BAD_REQUESTS = 5
# Requests that start late may catch up by this many seconds; servers tolerate more.
_BURST = 0.2


class BudgetReached(Exception):
  """The next request might exceed the budget."""


class Stopped(Exception):
  """The user has stopped the run."""


class Pace:
  """Spreads requests or tokens evenly over time, below a limit per minute."""

  def __init__(self, per_minute: float | None):
    self._seconds_each = 60.0 / per_minute if per_minute else 0.0
    self._next = 0.0

  def take(self, amount: float) -> float:
    """Books an amount and returns the seconds to wait before using it."""
    now = asyncio.get_running_loop().time()
    start = max(self._next, now - _BURST)
    self._next = start + amount * self._seconds_each
    return max(0.0, start - now)

  def give_back(self, amount: float) -> None:
    """Returns a part of a booking that was too large; a negative amount books more."""
    self._next -= amount * self._seconds_each


class Online:
  """One run of concurrent requests with shared limits.

  Attributes:
    budget: see `costs.Budget`.
    signal_number: signal that stopped the run, or None.
  """

  def __init__(
    self,
    provider: ModuleType,
    settings: Settings,
    price: costs.Price | None,
    budget: costs.Budget,
    requests_per_minute: float | None,
    tokens_per_minute: float | None,
  ):
    self.budget = budget
    self.signal_number: int | None = None
    self._provider = provider
    self._settings = settings
    self._price = price or costs.Price(0.0, 0.0)
    self._requests = Pace(requests_per_minute)
    self._tokens = Pace(tokens_per_minute)
    self._server_was_heard = False
    self._given_up = self._bad_requests = 0
    self._was_answered = False

  async def answer_all(
    self,
    work: Iterator[tuple[str, prompts.Prompt]],
    concurrency: int,
    on_answer: Callable[[str, prompts.Prompt, Answer], None],
    on_failure: Callable[[str, prompts.Prompt, Rejected | Unanswered], None],
  ) -> None:
    """Sends every prompt and passes each result on as soon as it arrives.

    Args:
      work: keys and prompts; the next one is taken when a request can start.
      concurrency: requests at the same time.
      on_answer: called with key, prompt and answer.
      on_failure: called with key, prompt and error.

    Raises:
      BudgetReached: the next request might exceed the budget; earlier results are passed on.
      Stopped: a signal arrived; earlier results are passed on.
      InputError: the provider refuses the settings, or cannot be reached.
      ReportedError: the server has stopped answering.
    """
    client = llm_calls.connect(self._provider, self._settings)
    loop = asyncio.get_running_loop()
    self._stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
      loop.add_signal_handler(number, self._on_signal, number)

    async def place() -> None:
      for key, prompt in work:
        try:
          answer = await self._ask(client, prompt)
        except (Rejected, Unanswered) as failure:
          on_failure(key, prompt, failure)
        else:
          on_answer(key, prompt, answer)

    places = [asyncio.create_task(place()) for _ in range(concurrency)]
    try:
      # The first error ends the run: waiting requests are dropped, running ones are awaited.
      await asyncio.wait(places, return_when=asyncio.FIRST_EXCEPTION)
      self._stop.set()
      results = await asyncio.gather(*places, return_exceptions=True)
    finally:
      for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
      await client.close()
    errors = [error for error in results if isinstance(error, BaseException)]
    # An error of one request makes the others raise `Stopped`, so the error itself comes first.
    errors.sort(key=lambda error: (isinstance(error, Stopped), isinstance(error, BudgetReached)))
    if errors:
      raise errors[0]

  async def _ask(self, client: Any, prompt: prompts.Prompt) -> Answer:
    unanswered = 0
    paid = []  # Tokens of unusable answers, which are paid as well.
    while True:
      try:
        answer = await self._send(client, prompt)
        self._given_up = 0
        self._was_answered = True
        return Answer(answer.text, _total([*paid, answer.tokens]))
      except RefusedField:
        continue
      except Rejected as error:
        if isinstance(error, BadRequest) and not self._was_answered:
          self._bad_requests += 1
          if self._bad_requests == _BAD_REQUESTS:
            raise InputError(
              f'{error.reason}; the first {_BAD_REQUESTS} requests all failed like this: correct'
              ' --parameters, --max_output_tokens or --model'
            ) from None
        paid.append(error.tokens)
        error.tokens = _total(paid)
        if not isinstance(error, Unusable) or len(paid) == PAID_ATTEMPTS:
          raise
      except Unanswered as error:
        unanswered += 1
        self._server_was_heard |= error.is_from_server
        if not self._server_was_heard and unanswered == _SILENT_ATTEMPTS:
          where = self._settings.base_url or f'the {self._provider.NAME} API'
          raise InputError(
            f'{where} cannot be reached ({error.reason}); check the network and --base_url, or try'
            ' everything out with --backend=mock'
          ) from None
        if unanswered == ATTEMPTS:
          self._given_up += 1
          if self._given_up == _GIVEN_UP:
            raise ReportedError(
              f'the server answers nothing any more (last: {error.reason}); all answers so far are'
              ' stored, and the same command continues later'
            ) from None
          raise
        backoff = random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**unanswered))
        await self._pause(backoff if error.wait is None else error.wait + 0.1 * backoff)

  async def _send(self, client: Any, prompt: prompts.Prompt) -> Answer:
    """Sends a request once and books its cost, or the most it may have cost."""
    body = self._provider.body(prompt, self._settings)
    limit = self._settings.parameters[self._provider.MAX_OUTPUT]
    most = self._price.cost(costs.most_tokens(body, limit))
    while not self.budget.fits(most):
      if self.budget.is_idle:
        raise BudgetReached
      await self._pause(0.02)
    self.budget.promise(most)
    estimate = costs.estimate(prompt)
    tokens = None
    try:
      await self._pause(max(self._requests.take(1), self._tokens.take(sum(estimate))))
      try:
        text = await self._provider.send(client, body)
      except Exception as error:
        raise llm_calls.judge(error, self._provider, self._settings) from None
      self._server_was_heard = True
      try:
        reply = json.loads(text)
      except ValueError:
        raise Unanswered('the reply is no JSON', may_cost=True) from None
      answer = llm_calls.read(self._provider, reply, estimate)
      tokens = answer.tokens
      return answer
    except Rejected as error:
      tokens = error.tokens
      raise
    except Unanswered as error:
      self.budget.lost += most if error.may_cost else 0.0
      raise
    finally:
      self.budget.release(most)
      if tokens:
        self.budget.spent += self._price.cost(tokens)
        self._tokens.give_back(sum(estimate) - sum(tokens))

  async def _pause(self, seconds: float) -> None:
    if seconds > 0 and not self._stop.is_set():
      try:
        await asyncio.wait_for(self._stop.wait(), seconds)
      except TimeoutError:
        return
    if self._stop.is_set():
      raise Stopped

  def _on_signal(self, number: int) -> None:
    self.signal_number = number
    self._stop.set()
    # A second signal ends the program at once.
    asyncio.get_running_loop().remove_signal_handler(number)


def _total(tokens: list[tuple[int, int]]) -> tuple[int, int]:
  return sum(pair[0] for pair in tokens), sum(pair[1] for pair in tokens)

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
# Open requests get this many seconds after a signal: launchers kill a program after 30.
_GRACE_SECONDS = 20.0
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
    budget: costs.Budget,
    requests_per_minute: float | None,
    tokens_per_minute: float | None,
  ):
    self.budget = budget
    self.signal_number: int | None = None
    self._provider = provider
    self._settings = settings
    self._requests = Pace(requests_per_minute)
    self._tokens = Pace(tokens_per_minute)
    self._secrets = llm_calls.secrets(provider, settings)
    self._server_was_heard = False
    self._given_up = 0
    self._was_answered = False
    # Refused requests wait here for the first answer: it tells that the settings are right.
    self._held: list[tuple[str, prompts.Prompt, BadRequest]] = []

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
      Stopped: a signal arrived; earlier results are passed on. Open requests are dropped when the
        time to stop in is over.
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
        paid: list[tuple[int, int]] = []
        try:
          answer = await self._ask(client, prompt, paid)
        except (Rejected, Unanswered) as failure:
          failure.tokens = _total(paid)
          if isinstance(failure, BadRequest) and not self._was_answered:
            self._hold(key, prompt, failure)
          else:
            on_failure(key, prompt, failure)
        except BaseException:
          if paid:  # The store has to know of it, because the next run has the same limit.
            unusable = Unanswered('the run ended after an unusable answer')
            unusable.tokens = _total(paid)
            on_failure(key, prompt, unusable)
          raise
        else:
          on_answer(key, prompt, answer)
        if self._was_answered:
          self._release(on_failure)

    self._places = [asyncio.create_task(place()) for _ in range(concurrency)]
    try:
      # The first error ends the run: waiting requests are dropped, running ones are awaited.
      await asyncio.wait(self._places, return_when=asyncio.FIRST_EXCEPTION)
      self._stop.set()
      results = await asyncio.gather(*self._places, return_exceptions=True)
    finally:
      for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
      await client.close()
    # An error of one request makes the others raise `Stopped`, so the error itself comes first.
    # Requests that are cancelled after a signal have stopped, too.
    cancelled = asyncio.CancelledError
    errors = [Stopped() if isinstance(e, cancelled) else e for e in results if e is not None]
    errors.sort(key=lambda error: (isinstance(error, Stopped), isinstance(error, BudgetReached)))
    if errors:
      raise errors[0]
    if any(failure.is_about_access for _, _, failure in self._held):
      raise self._wrong_settings()
    self._release(on_failure)

  def _hold(self, key: str, prompt: prompts.Prompt, failure: BadRequest) -> None:
    """Keeps a refused request until one is answered; InputError if too many are refused."""
    self._held.append((key, prompt, failure))
    if len(self._held) == _BAD_REQUESTS:
      raise self._wrong_settings()

  def _release(self, on_failure: Callable[[str, prompts.Prompt, BadRequest], None]) -> None:
    """Passes on the refused requests that were kept."""
    for key, prompt, failure in self._held:
      on_failure(key, prompt, failure)
    self._held.clear()

  def _wrong_settings(self) -> InputError:
    failure = self._held[-1][2]
    count = len(self._held)
    return InputError(
      f'{self._settings.server}: {failure.reason}; no request was answered, and'
      f' {count} failed like this: {failure.way_out}'
    )

  async def _ask(self, client: Any, prompt: prompts.Prompt, paid: list[tuple[int, int]]) -> Answer:
    """Sends a request until it is answered; `paid` gets the tokens of answers without a text."""
    unanswered = 0
    while True:
      try:
        answer = await self._send(client, prompt)
        self._given_up = 0
        return Answer(answer.text, _total([*paid, answer.tokens]))
      except RefusedField:
        continue
      except Rejected as error:
        if isinstance(error, BadRequest) and error.is_about_access and self._was_answered:
          self._count_given_up(error.reason)
        paid.append(error.tokens)
        if not isinstance(error, Unusable) or len(paid) == PAID_ATTEMPTS:
          raise
      except Unanswered as error:
        unanswered += 1
        self._server_was_heard |= error.is_from_server
        if not self._server_was_heard and unanswered == _SILENT_ATTEMPTS:
          raise InputError(
            f'{self._settings.server} cannot be reached ({error.reason}); check the network and'
            ' --base_url, or try everything out with --backend=mock'
          ) from None
        if unanswered == ATTEMPTS:
          self._count_given_up(error.reason)
          raise
        backoff = random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**unanswered))
        await self._pause(backoff if error.wait is None else error.wait + 0.1 * backoff)

  def _count_given_up(self, reason: str) -> None:
    """Counts requests in a row without an answer; ReportedError if they are too many."""
    self._given_up += 1
    if self._given_up == _GIVEN_UP:
      raise ReportedError(
        f'the server answers nothing any more (last: {reason}); all answers so far are'
        ' stored, and the same command continues later'
      ) from None

  async def _send(self, client: Any, prompt: prompts.Prompt) -> Answer:
    """Sends a request once and books its cost, or the most it may have cost."""
    body = self._provider.body(prompt, self._settings)
    limit = self._settings.parameters[self._provider.MAX_OUTPUT]
    most_tokens = costs.most_tokens(body, limit)
    most = self.budget.price.cost(most_tokens)
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
        # The SDK's own timeout starts anew with each part of a reply.
        async with asyncio.timeout(self._settings.timeout):
          text = await self._provider.send(client, body)
      except Exception as error:
        reason = llm_calls.judge(error, self._provider, self._settings, body)
        if isinstance(reason, Unusable):  # Its tokens are unknown, but paid.
          reason.tokens = most_tokens
        raise reason from None
      self._server_was_heard = True
      try:
        reply = json.loads(text)
      except (ValueError, RecursionError):
        raise Unanswered('the reply is no JSON', may_cost=True) from None
      self._was_answered = True
      answer = llm_calls.read(self._provider, reply, estimate, self._secrets)
      tokens = answer.tokens
      return answer
    except Rejected as error:
      tokens = error.tokens
      raise
    except Unanswered as error:
      self.budget.lost += most if error.may_cost else 0.0
      raise
    except asyncio.CancelledError:
      self.budget.lost += most
      raise
    finally:
      self.budget.release(most)
      if tokens:
        self.budget.pay(tokens)
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
    loop = asyncio.get_running_loop()
    for place in self._places:
      loop.call_later(_GRACE_SECONDS, place.cancel)
    # A second signal ends the program at once.
    loop.remove_signal_handler(number)


def _total(tokens: list[tuple[int, int]]) -> tuple[int, int]:
  return sum(pair[0] for pair in tokens), sum(pair[1] for pair in tokens)

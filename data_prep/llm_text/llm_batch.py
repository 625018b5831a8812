"""Submits and collects batches; another process can collect what a killed one has submitted.

Three files in STORE/batches describe a batch, from before it is submitted until its answers are in
the store: TAG.requests.jsonl for the provider, TAG.keys.jsonl with the keys of the requests, and
TAG.json with the state. A state without ids means that the program was killed while it submitted
the batch; the next process asks the provider whether the batch exists.
"""

import asyncio
import json
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep.llm_text import costs, llm_calls, llm_http, prompts
from data_prep.llm_text.llm_calls import (
  Answer,
  BadRequest,
  RefusedField,
  Rejected,
  Settings,
  Unanswered,
  Unusable,
)
from data_prep.llm_text.llm_online import ATTEMPTS, BudgetReached
from ur4rec_jax import files
from ur4rec_jax.errors import InputError, ReportedError

FOLDER = 'batches'
# Smaller batches are not worth it when the budget runs out: each may take a day.
_FEWEST_FOR_BUDGET = 10
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0


def read_states(store: Path) -> list[dict[str, Any]]:
  """Returns the states of all batches under way, oldest first."""
  return [json.loads(path.read_text()) for path in sorted((store / FOLDER).glob('*.json'))]


def is_of(state: dict[str, Any], settings: Settings) -> bool:
  """Whether a run with these settings collects the batch."""
  return all(state[name] == getattr(settings, name) for name in ('backend', 'model', 'parameters'))


def keys_under_way(store: Path) -> set[str]:
  """Returns the keys of all requests in unfinished batches."""
  tags = [state['tag'] for state in read_states(store)]
  return {key for tag in tags for key in _read_keys(store / FOLDER / f'{tag}.keys.jsonl')}


def forget_unsubmitted(copy: Path) -> None:
  """Leaves the batches without ids to the store of which this one is a copy: it may submit them."""
  for state in read_states(copy):
    if not state['ids']:
      (copy / FOLDER / f'{state["tag"]}.json').unlink()


class Batches:
  """Submits, polls and collects batches.

  Attributes:
    budget: see `costs.Budget`; it reserves the most that unfinished batches may cost.
    num_under_way: unfinished batches.
    num_done: finished requests in unfinished batches.
  """

  def __init__(
    self,
    store: Path,
    provider: ModuleType,
    settings: Settings,
    budget: costs.Budget,
    is_stored: Callable[[str, float], bool],
    max_requests: int | None = None,
  ):
    """Keeps what all batches need.

    Args:
      store: folder of the stored answers.
      provider: module of the provider.
      settings: backend, model and parameters.
      budget: limits what is sent.
      is_stored: takes the key of a request and a time in unix seconds; tells whether its answer, or
        a rejection after that time, is stored.
      max_requests: most requests in a batch; None for the provider's limit.
    """
    self.budget = budget
    self._is_stored = is_stored
    self.num_under_way = self.num_done = 0
    self._store, self._folder = store, store / FOLDER
    self._provider = provider
    self._settings = settings
    self._secrets = llm_calls.secrets(provider, settings)
    self._max_requests = min(max_requests or provider.BATCH_REQUESTS, provider.BATCH_REQUESTS)
    self._is_full = False  # Whether the next request did not fit into the budget.
    # A request that did not fit into a batch, as `_lines` yields it; it begins the next one.
    self._left_over: tuple[str, str, float] | None = None

  async def answer_all(
    self,
    make_work: Callable[[], Iterator[tuple[str, prompts.Prompt]]],
    poll_seconds: float,
    wait: bool,
    on_answer: Callable[[str, prompts.Prompt, Answer], None],
    on_failure: Callable[[str, prompts.Prompt, Rejected | Unanswered], None],
    on_poll: Callable[[], None],
  ) -> None:
    """Sends every prompt; those that come back without an answer go into the next batch.

    Args:
      make_work: yields the prompts that have no answer and are in no batch.
      poll_seconds: seconds between two looks at the batches.
      wait: whether to wait until the batches have ended.
      on_answer: called with key, prompt (without its texts) and answer.
      on_failure: called with key, prompt (without its texts) and error.
      on_poll: called after each look.

    Raises:
      BudgetReached: no further request fits into the budget, and no batch is unfinished.
      InputError: the provider refuses the key or the requests.
      ReportedError: the provider does not answer.
    """
    self._on_answer, self._on_failure = on_answer, on_failure
    self._folder.mkdir(exist_ok=True)
    self._client = llm_calls.connect(self._provider, self._settings)
    try:
      self._clean_up()
      states = [s for s in read_states(self._store) if is_of(s, self._settings)]
      for state in states:
        self.budget.promise(state['promised'], state['requests'])
        if not state['ids']:
          await self._submit(state, may_exist=True)
      while True:
        self._is_full = False
        states += await self._submit_all(make_work())
        if not states:
          if self._is_full:
            raise BudgetReached
          return
        num_answers = await self._collect_all(states, poll_seconds, wait, on_poll)
        if states or not num_answers:  # Without waiting, or if another round would bring nothing.
          return
    finally:
      await self._client.close()

  async def _submit_all(self, work: Iterator[tuple[str, prompts.Prompt]]) -> list[dict[str, Any]]:
    states = []
    lines = self._lines(work)
    while state := self._write_requests(lines):
      await self._submit(state, may_exist=False)
      states.append(state)
    return states

  def _lines(self, work: Iterator[tuple[str, prompts.Prompt]]) -> Iterator[tuple[str, str, float]]:
    """Yields the requests that fit into the budget: line, entry of the keys file, highest cost."""
    limit = self._settings.parameters[self._provider.MAX_OUTPUT]
    for key, prompt in work:
      body = self._provider.body(prompt, self._settings)
      most = self.budget.price.cost(costs.most_tokens(body, limit))
      if not self.budget.fits(most):
        self._is_full = True
        return
      self.budget.promise(most)
      line = json.dumps(self._provider.batch_line(key, body), ensure_ascii=False)
      entry = {
        'key': key,
        'kind': prompt.kind,
        'id': prompt.id,
        'prompt': prompt.version,
        'estimate': costs.estimate(prompt),
      }
      yield line + '\n', json.dumps(entry, ensure_ascii=False) + '\n', most

  def _write_requests(self, lines: Iterator[tuple[str, str, float]]) -> dict[str, Any] | None:
    """Writes the files of the next batch; None if no request is left."""
    tag = f'{time.strftime("%Y%m%d-%H%M%S", time.gmtime())}-{secrets.token_hex(4)}'
    size = num_requests = 0
    promised = 0.0
    drafts = [self._path(tag, name).open('w', encoding='utf-8') for name in ('requests', 'keys')]
    with drafts[0] as requests, drafts[1] as keys:
      while num_requests < self._max_requests:
        found = self._left_over or next(lines, None)
        self._left_over = None
        if found is None:
          break
        line, entry, most = found
        size += len(line.encode())
        if size > self._provider.BATCH_BYTES and num_requests:
          self._left_over = found
          break
        requests.write(line)
        keys.write(entry)
        promised += most
        num_requests += 1
      for file in drafts:
        file.flush()
        os.fsync(file.fileno())
    if num_requests < (_FEWEST_FOR_BUDGET if self._is_full else 1):
      self.budget.release(promised, num_requests)
      self._forget(tag)
      return None
    state = {
      'tag': tag,
      'backend': self._settings.backend,
      'model': self._settings.model,
      'parameters': self._settings.parameters,
      'requests': num_requests,
      'promised': promised,
      'time': time.time(),
      'ids': [],
    }
    self._write_state(state)
    return state

  async def _submit(self, state: dict[str, Any], may_exist: bool) -> None:
    """Submits a batch exactly once: in doubt, the provider is asked first whether it exists."""
    tag = state['tag']
    requests = self._path(tag, 'requests')
    search = lambda: self._provider.find_batches(
      self._client, tag, state['time'], state['requests']
    )
    known = {batch_id for other in read_states(self._store) for batch_id in other['ids']}
    seconds = self._settings.timeout + requests.stat().st_size / llm_http.BYTES_PER_SECOND
    for attempt in range(1, ATTEMPTS + 1):
      try:
        if may_exist:
          state['ids'] = self._checked([i for i in await self._call(search) if i not in known])
        if not state['ids']:
          async with asyncio.timeout(seconds):
            created = await self._provider.create_batch(self._client, requests, tag)
          state['ids'] = self._checked([created])
        break
      except Exception as error:
        reason = llm_calls.judge(error, self._provider, self._settings)
        if isinstance(reason, Unusable):  # The batch may exist: only the reply was unreadable.
          reason = Unanswered(reason.reason)
        if isinstance(reason, Unanswered) and attempt < ATTEMPTS:
          may_exist = True
          await _back_off(reason, attempt)
          continue
        if not may_exist:  # The provider has certainly created no batch.
          self._forget(tag)
        if isinstance(reason, (Rejected, RefusedField)):
          raise InputError(f'the provider does not take the batch: {reason}') from None
        raise _as_reported(reason) from None
    self._write_state(state)
    requests.unlink(missing_ok=True)

  def _checked(self, ids: list[str]) -> list[str]:
    """Returns ids that a server has given; they are stored, so they must not hold the key."""
    for name in ids:
      is_id = isinstance(name, str) and re.fullmatch(r'[\w.:/-]{1,200}', name, re.ASCII)
      if not is_id or any(secret in name for secret in self._secrets):
        raise Unanswered('the id of the batch is no id')
    return ids

  async def _collect_all(
    self,
    states: list[dict[str, Any]],
    poll_seconds: float,
    wait: bool,
    on_poll: Callable[[], None],
  ) -> int:
    """Collects finished batches and removes them from `states`; returns the number of answers."""
    num_answers = 0
    errors = []
    while states:
      self.num_under_way, self.num_done = len(states), 0
      for state in list(states):
        batches = {i: await self._poll(i, state) for i in state['ids']}
        if all(batch.is_ended for batch in batches.values()):
          num_answers += await self._collect(state, batches)
          errors += [batch.error for batch in batches.values() if batch.error]
          self.budget.release(state['promised'], state['requests'])
          self._forget(state['tag'])
          states.remove(state)
          self.num_under_way -= 1
        else:
          self.num_done += max(batch.num_done for batch in batches.values())
      on_poll()
      if not wait:
        break
      if states:
        await asyncio.sleep(poll_seconds)
    if errors:
      message = llm_calls.redact(errors[0], self._secrets)[:500]
      raise InputError(f'the provider did not take a batch, which costs nothing: {message}')
    return num_answers

  async def _poll(self, batch_id: str, state: dict[str, Any]) -> llm_calls.Batch:
    try:
      return await self._call(lambda: self._provider.poll_batch(self._client, batch_id))
    except InputError as error:
      raise InputError(
        f'batch {batch_id}: {error}; it was submitted with this store: use the key of the account'
        f' that did, or give its answers up by deleting {self._path(state["tag"], "state")}'
      ) from None

  async def _collect(self, state: dict[str, Any], batches: dict[str, llm_calls.Batch]) -> int:
    """Reads the results of a batch in any order and returns the number of answers.

    Each result is passed on as soon as its line is there. Results that a killed program has stored
    are left out, because they are paid already.
    """
    entries = {
      key: entry
      for key, entry in _read_keys(self._path(state['tag'], 'keys')).items()
      if not self._is_stored(key, state['time'])
    }
    num_answers = num_lines = 0

    def take(content: bytes) -> None:
      nonlocal num_answers, num_lines
      num_lines += 1
      try:
        result = self._provider.read_result(json.loads(content))
        entry = entries.pop(result['key'], None)
      except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return  # Its request counts as missing.
      if entry is None:  # A guessed batch may be a wrong one.
        return
      prompt = prompts.Prompt(entry['kind'], entry['id'], entry['prompt'], '', '', {})
      try:
        answer = self._read(result, tuple(entry['estimate']))
      except (Rejected, Unanswered) as failure:
        self._on_failure(result['key'], prompt, failure)
      else:
        self._on_answer(result['key'], prompt, answer)
        num_answers += 1

    most = llm_http.MAX_REPLY * (1 + state['requests'])
    expected = sum(batch.num_done for batch in batches.values())
    for attempt in range(1, ATTEMPTS + 1):
      num_lines = 0
      for batch_id, batch in batches.items():
        for source in self._provider.result_sources(batch, batch_id):
          await self._read_results(source, most, entries, take)
      if not entries or num_lines >= expected:
        break
      # The results ended too early without an error, for example behind a proxy.
      await _back_off(Unanswered('results are missing'), attempt)
    else:
      raise ReportedError(
        f'only {num_lines:,} of {expected:,} results of the batch arrived; they are stored, and the'
        f' same command reads the others. If they never come, give them up by deleting'
        f' {self._path(state["tag"], "state")}'
      )
    for key, entry in entries.items():
      prompt = prompts.Prompt(entry['kind'], entry['id'], entry['prompt'], '', '', {})
      self._on_failure(key, prompt, Unanswered('the batch came back without it'))
    return num_answers

  async def _read_results(
    self, source: str, most: int, missing: dict[str, Any], take: Callable[[bytes], None]
  ) -> None:
    """Passes each line of results to `take`; goes on behind it if the connection breaks.

    Args:
      source: one of the provider's `result_sources`.
      most: most bytes of the results.
      missing: the requests without a result, which `take` removes.
      take: called once for each line.
    """
    known = attempt = 0

    def on_line(line: bytes, position: int) -> bool:
      nonlocal known
      if not line.endswith(b'\n') and not _is_json(line):
        raise Unanswered('the results broke off')
      known = position
      take(line)
      return bool(missing)

    open_reply = lambda headers: self._provider.open_results(self._client, source, headers)
    while missing:
      num_missing = len(missing)
      try:
        await llm_http.read_lines(open_reply, known, most, self._settings.timeout, on_line)
        return
      except Exception as error:
        reason = llm_calls.judge(error, self._provider, self._settings)
        # A download that brings results each time may break off as often as it likes.
        attempt = 1 if len(missing) < num_missing else attempt + 1
        if not isinstance(reason, Unanswered) or attempt == ATTEMPTS:
          raise _as_reported(reason) from None
        await _back_off(reason, attempt)

  def _read(self, result: dict[str, Any], estimate: tuple[int, int]) -> Answer:
    if 'error' in result:
      message = llm_calls.redact(str(result['error']), self._secrets)
      status = result['status'] if isinstance(result['status'], int) else 500
      if status in (400, 422) and llm_calls.refuse(message, self._provider, self._settings):
        raise Unanswered(message)
      if 400 <= status < 500 and status not in llm_calls.RETRIED:
        raise Rejected(f'the server answers {status}: {message[:200]}')
      raise Unanswered(message[:200])
    try:
      answer = llm_calls.read(self._provider, result['reply'], estimate, self._secrets)
    except Rejected as error:
      self.budget.pay(error.tokens)
      raise
    self.budget.pay(answer.tokens)
    return answer

  async def _call(self, request: Callable[[], Any]) -> Any:
    """Sends a request that may be repeated, with retries."""
    for attempt in range(1, ATTEMPTS + 1):
      try:
        async with asyncio.timeout(self._settings.timeout):
          return await request()
      except Exception as error:
        reason = llm_calls.judge(error, self._provider, self._settings)
        if not isinstance(reason, Unanswered) or attempt == ATTEMPTS:
          raise _as_reported(reason) from None
        await _back_off(reason, attempt)

  def _clean_up(self) -> None:
    """Removes files of batches without a state: a program was killed before it submitted them."""
    tags = {state['tag'] for state in read_states(self._store)}
    for path in self._folder.iterdir():
      if path.name.split('.')[0] not in tags:
        path.unlink()

  def _write_state(self, state: dict[str, Any]) -> None:
    files.write_file(self._path(state['tag'], 'state'), json.dumps(state, indent=1) + '\n')

  def _path(self, tag: str, name: str) -> Path:
    return self._folder / (f'{tag}.json' if name == 'state' else f'{tag}.{name}.jsonl')

  def _forget(self, tag: str) -> None:
    for name in ('state', 'keys', 'requests'):
      self._path(tag, name).unlink(missing_ok=True)


def _read_keys(path: Path) -> dict[str, dict[str, Any]]:
  if not path.exists():
    return {}
  with path.open(encoding='utf-8') as file:
    entries = map(json.loads, file)
    return {entry['key']: entry for entry in entries}


async def _back_off(reason: Unanswered, attempt: int) -> None:
  backoff = random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
  await asyncio.sleep(backoff if reason.wait is None else reason.wait)


def _is_json(line: bytes) -> bool:
  try:
    json.loads(line)
  except (ValueError, RecursionError):
    return False
  return True


def _as_reported(reason: Exception) -> Exception:
  if isinstance(reason, BadRequest) and reason.is_about_access:
    return InputError(f'{reason}; {reason.way_out}')
  if isinstance(reason, (Unanswered, Rejected, RefusedField)):
    return ReportedError(
      f'the provider does not answer ({reason}); nothing is lost: start the same command'
      ' again later'
    )
  return reason

"""What there is to ask, what is already answered, and how answers get into the store."""

import collections
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from data_prep.llm_text import answers, costs, llm_calls, prompts
from ur4rec_jax.data import splits


@dataclasses.dataclass(frozen=True)
class Job:
  """The texts to write: about which data, and with which model.

  Attributes:
    data_dir: prepared folder.
    kinds: `item`, `user` or both.
    settings: backend, model and parameters.
    language: language of prompts and texts.
    split_name: see `prompts.user_prompts`.
    hold_back: see `prompts.user_prompts`.
    max_history: see `prompts.user_prompts`.
    regenerate: see `prompts.item_prompts`.
    retry_failed: whether requests with a final failure are sent again.
  """

  data_dir: str
  kinds: tuple[str, ...]
  settings: llm_calls.Settings
  language: str = 'en'
  split_name: str = splits.LEAVE_ONE_OUT
  hold_back: float = 0.2
  max_history: int = 30
  regenerate: bool = False
  retry_failed: bool = False

  def questions(
    self, kind: str, skipped: collections.Counter | None = None
  ) -> Iterator[tuple[str, prompts.Prompt]]:
    """Yields key and prompt of each item or user to write about."""
    if kind == 'item':
      found = prompts.item_prompts(
        self.data_dir, language=self.language, regenerate=self.regenerate, skipped=skipped
      )
    else:
      found = prompts.user_prompts(
        self.data_dir,
        language=self.language,
        split_name=self.split_name,
        hold_back=self.hold_back,
        max_history=self.max_history,
        skipped=skipped,
      )
    settings = self.settings
    for prompt in found:
      yield (
        answers.make_key(settings.backend, settings.model, settings.parameters, prompt),
        prompt,
      )

  def work(
    self,
    store: answers.Store,
    under_way: set[str],
    found: collections.Counter | None = None,
    skipped: collections.Counter | None = None,
  ) -> Iterator[tuple[str, prompts.Prompt]]:
    """Yields each missing request once; counts the others in `found`, by reason."""
    found = collections.Counter() if found is None else found
    yielded = set()
    for kind in self.kinds:
      for key, prompt in self.questions(kind, skipped):
        failure = store.failure(key)
        if key in store:
          found['stored'] += 1
        elif key in under_way:
          found['in a batch'] += 1
        elif failure and failure.is_final and not self.retry_failed:
          found['failed before'] += 1
        elif bytes.fromhex(key) in yielded:
          found['same as another'] += 1
        else:
          yielded.add(bytes.fromhex(key))
          yield key, prompt


@dataclasses.dataclass
class Plan:
  """The missing requests in numbers, with estimated (input, output) tokens."""

  requests: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  found: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  tokens: tuple[int, int] = (0, 0)
  versions: set[str] = dataclasses.field(default_factory=set)


def make_plan(job: Job, store: answers.Store, under_way: set[str]) -> Plan:
  """Counts the missing requests and their tokens without sending anything."""
  plan = Plan()
  for _, prompt in job.work(store, under_way, plan.found, plan.skipped):
    estimate = costs.estimate(prompt)
    plan.tokens = plan.tokens[0] + estimate[0], plan.tokens[1] + estimate[1]
    plan.requests[prompt.kind] += 1
    plan.versions.add(prompt.version)
  return plan


def notes(job: Job, store: answers.Store, plan: Plan) -> list[str]:
  """Returns notes that the user should read before paying."""
  lines = []
  for (provider, model, version), count in sorted(store.versions.items(), key=str):
    is_same = (provider, model) == (job.settings.backend, job.settings.model)
    for wanted in plan.versions - {version}:
      # item-en-1f2e3d4c: kind, language, and a hash that changes with the template.
      if is_same and str(version).rpartition('-')[0] == wanted.rpartition('-')[0]:
        lines.append(
          f'{store.folder} holds {count:,} answers to another version of the prompt ({version});'
          f' they stay there, but are not used: this run asks anew with {wanted}'
        )
  if store.unreadable:
    lines.append(
      f'{store.folder}: {store.unreadable} lines are torn or damaged, and count as not there'
    )
  return lines


class Recorder:
  """Writes results to the store and shows them in the progress bar."""

  def __init__(self, job: Job, store: answers.Store, price: costs.Price | None, bar: tqdm):
    # By key, without requests that were answered later.
    self.failures: dict[str, llm_calls.Rejected | llm_calls.Unanswered] = {}
    self.answered = 0
    self.tokens = [0, 0]
    self.cost = 0.0
    self._job = job
    self.store, self.price, self.bar = store, price, bar

  def answer(self, key: str, prompt: prompts.Prompt, answer: llm_calls.Answer) -> None:
    """Stores an answer."""
    self.store.add(self._record(key, prompt, answer.tokens) | {'text': answer.text})
    self.failures.pop(key, None)
    self.answered += 1
    self.bar.update()

  def failure(
    self, key: str, prompt: prompts.Prompt, error: llm_calls.Rejected | llm_calls.Unanswered
  ) -> None:
    """Stores a failure."""
    failed = {'reason': error.reason, 'is_final': isinstance(error, llm_calls.Rejected)}
    self.store.add_failure(self._record(key, prompt, error.tokens) | failed)
    self.failures[key] = error

  @property
  def failed(self) -> collections.Counter:
    """Number of failed requests by reason."""
    return collections.Counter(e.reason.partition(':')[0] for e in self.failures.values())

  @property
  def may_go_on(self) -> bool:
    """Whether the same command, started again, may get more answers."""
    return not all(isinstance(e, llm_calls.Rejected) for e in self.failures.values())

  def _record(self, key: str, prompt: prompts.Prompt, tokens: tuple[int, int]) -> dict[str, Any]:
    cost = self.price.cost(tokens) if self.price else None
    self.cost += cost or 0.0
    self.tokens = [total + new for total, new in zip(self.tokens, tokens, strict=True)]
    if self.price:
      self.bar.set_postfix_str(f'${self.store.cost + (cost or 0.0):.4f}', refresh=False)
    settings = self._job.settings
    return {
      'key': key,
      'kind': prompt.kind,
      'id': prompt.id,
      'provider': settings.backend,
      'model': settings.model,
      'prompt': prompt.version,
      'parameters': settings.parameters,
      'tokens': list(tokens),
      'cost': cost,
      'time': answers.utc(time.time()),
    }


class StoredTexts(Mapping[str, str]):
  """Texts about items or users by id, read from the store on access."""

  def __init__(self, job: Job, store: answers.Store, kind: str):
    self._store = store
    self._offsets = {
      prompt.id: offset
      for key, prompt in job.questions(kind)
      if (offset := store.offset(key)) is not None
    }

  def __getitem__(self, name: str) -> str:
    return prompts.without_reasoning(self._store.read(self._offsets[name])['text'])

  def __iter__(self) -> Iterator[str]:
    return iter(self._offsets)

  def __len__(self) -> int:
    return len(self._offsets)

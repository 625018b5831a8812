"""Runs the two ways of asking against the test server, without the command line."""

import asyncio
import contextlib

from benchmarks.robustness import llm_server
from data_prep.llm_text import (
  answers,
  costs,
  llm_anthropic,
  llm_batch,
  llm_calls,
  llm_online,
  llm_openai,
)
from data_prep.llm_text.prompts import Prompt

PROVIDERS = {'openai': llm_openai, 'anthropic': llm_anthropic}


def questions(num: int, words: str = '') -> list[Prompt]:
  """Different prompts; `words` go into each."""
  return [
    Prompt('item', f'secret-id-{i}', 'item-en-0', 'Write.', f'title: Film {i} {words}', {})
    for i in range(num)
  ]


class Run:
  """One store, one server, any number of goes; keeps what was handed on.

  Attributes:
    texts: by id.
    failures: by id, the reasons.
    pulled: number of prompts that were taken.
  """

  def __init__(self, server: llm_server.LlmServer, backend: str, folder, limit=None, **parameters):
    self.provider = PROVIDERS[backend]
    path = '/v1' if backend == 'openai' else ''
    self.settings = llm_calls.Settings(
      backend,
      self.provider.DEFAULT_MODEL,
      {**self.provider.PARAMETERS, **parameters},
      server.url + path,
      timeout=20.0,
    )
    self.price = costs.Price(1.0, 2.0)
    self.budget = costs.Budget(limit, 0.0, self.price)
    self.folder = folder
    self.server = server
    self.texts: dict[str, str] = {}
    self.failures: dict[str, str] = {}
    self.stored: set[str] = set()  # Keys with an answer or a rejection.
    self.lost: dict[str, tuple[int, int]] = {}  # Tokens of failures by id.
    self.pulled = 0

  def key(self, prompt: Prompt) -> str:
    settings = self.settings
    return answers.make_key(settings.backend, settings.model, settings.parameters, prompt)

  def work(self, prompts):
    under_way = llm_batch.keys_under_way(self.folder)
    for prompt in prompts:
      if prompt.id not in self.texts and self.key(prompt) not in under_way:
        self.pulled += 1
        yield self.key(prompt), prompt

  def online(self, prompts, concurrency=8, per_minute=None) -> llm_online.Online:
    online = llm_online.Online(self.provider, self.settings, self.budget, per_minute, None)
    self.now = online
    asyncio.run(
      online.answer_all(self.work(prompts), concurrency, self._on_answer, self._on_failure)
    )
    return online

  def batch(self, prompts, wait=True, max_requests=None, polled=lambda: None) -> llm_batch.Batches:
    batches = llm_batch.Batches(
      self.folder,
      self.provider,
      self.settings,
      self.budget,
      lambda key, since: key in self.stored,
      max_requests,
    )
    asyncio.run(
      batches.answer_all(
        lambda: self.work(prompts), 0.01, wait, self._on_answer, self._on_failure, polled
      )
    )
    return batches

  def _on_answer(self, key, prompt, answer):
    assert prompt.id not in self.texts
    self.texts[prompt.id] = answer.text
    self.stored.add(key)
    self.failures.pop(prompt.id, None)

  def _on_failure(self, key, prompt, error):
    self.failures[prompt.id] = error.reason
    self.lost[prompt.id] = error.tokens
    if isinstance(error, llm_calls.Rejected):
      self.stored.add(key)


@contextlib.contextmanager
def running(backend: str, folder, faults=None, limit=None, **parameters):
  """A server with its run."""
  with llm_server.LlmServer(faults, keep_bodies=True) as server:
    yield Run(server, backend, folder, limit, **parameters)


def expected(prompts) -> dict[str, str]:
  """What the server writes about prompts, by id."""
  return {
    p.id: f'A text about input {llm_server.input_name(p.text)}. It has two sentences.'
    for p in prompts
  }

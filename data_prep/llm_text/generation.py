"""Plans, sends and stores the requests of generate_text, and writes the texts into the dataset."""

import asyncio
import collections
import signal
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from data_prep.llm_text import (
  answers,
  costs,
  llm_anthropic,
  llm_batch,
  llm_calls,
  llm_local,
  llm_online,
  llm_openai,
  mock_text,
  prompts,
  text_job,
  texts,
)
from ur4rec_jax.data.dataset import read_info
from ur4rec_jax.errors import InputError, InterruptedBySignal, ReportedError, StorageError, say

PROVIDERS = {module.NAME: module for module in (llm_openai, llm_anthropic, llm_local)}
MOCK = 'mock'
_SOURCES = {
  'llm': 'by the LLM',
  'mock': 'by mock, invented: for trying things out only',
  'import': 'imported',
  'dataset': "the dataset's own descriptions",
  'without_text': 'without text',
  'unknown_ids': 'ids that the dataset lacks',
}


class Sending(NamedTuple):
  """How requests are sent; the flags of generate_text have the same names.

  Attributes:
    mode: `online` or `batch`.
    max_cost: limit in dollars for all answers of the store.
    concurrency: requests at the same time (online).
    requests_per_minute: limit of the account (online).
    tokens_per_minute: limit of the account (online).
    wait: whether to wait until the batches have ended.
    poll_seconds: seconds between two looks at the batches.
    batch_requests: most requests in a batch; None for the provider's limit.
  """

  mode: str = 'online'
  max_cost: float | None = None
  concurrency: int = 16
  requests_per_minute: float | None = None
  tokens_per_minute: float | None = None
  wait: bool = True
  poll_seconds: float = 30.0
  batch_requests: int | None = None


def show(rows: list[tuple[str, str]], file: TextIO | None = None) -> None:
  """Prints rows in two columns."""
  say('\n'.join(f'{name:<14} {value}' for name, value in rows), file)


def dry_run(job: text_job.Job, store_folder: str, price: costs.Price | None) -> None:
  """Prints the number of requests, their tokens and their cost; sends and writes nothing."""
  store = answers.Store(store_folder, read_only=True)
  plan = text_job.make_plan(job, store, llm_batch.keys_under_way(store.folder))
  show([*_plan_rows(plan, price, store), *_notes(job, store, plan)])


def generate(
  job: text_job.Job, store_folder: str, price: costs.Price | None, sending: Sending
) -> None:
  """Sends all missing requests, writes the texts into the dataset and prints a summary.

  Args:
    job: what to write about, and with which model.
    store_folder: folder of the stored answers.
    price: of the model; None if unknown.
    sending: how requests are sent.

  Raises:
    InputError: the provider refuses the key or the model, or the store cannot be written.
    ReportedError: requests are left over; the same command continues.
    InterruptedBySignal: the user stopped the program.
  """
  is_paid = job.settings.backend != MOCK
  if is_paid:
    llm_calls.find_key(PROVIDERS[job.settings.backend], job.settings)
  store = answers.Store(store_folder)
  try:
    _generate(job, store, price, sending)
  except KeyboardInterrupt:
    raise _interrupted(None, store) from None
  finally:
    store.close()


def _generate(
  job: text_job.Job, store: answers.Store, price: costs.Price | None, sending: Sending
) -> None:
  is_paid, is_online = job.settings.backend != MOCK, sending.mode == 'online'
  plan = text_job.make_plan(job, store, llm_batch.keys_under_way(store.folder))
  notes = _notes(job, store, plan)
  if is_paid:
    show([*_plan_rows(plan, price, store), *notes], file=sys.stderr)
  # Batches that this run does not collect; it sets the cost of its own batches aside by itself.
  others = [
    state
    for state in llm_batch.read_states(store.folder)
    if is_online or not llm_batch.is_of(state, job.settings)
  ]
  spent = store.cost + sum(s['promised'] for s in others)
  budget = costs.Budget(sending.max_cost, spent, price)
  total = plan.requests.total()
  if not is_online:
    total += len(llm_batch.keys_under_way(store.folder))
  with tqdm(total=total, unit='text', disable=not total) as bar:
    recorder = text_job.Recorder(job, store, price, bar)
    try:
      stopped = _send(job, recorder, sending, budget)
    except (InterruptedBySignal, StorageError):
      raise
    except ReportedError:
      # Whatever ends the run, the texts that exist are paid and go into the dataset.
      bar.close()
      if store:
        show(_write_all(job, store, has_descriptions=False), file=sys.stderr)
      raise
  store.sync()

  rows = [('answered', f'{recorder.answered:,} now, {plan.found["stored"]:,} before')]
  rows += [(f'- {what}', f'{count:,}') for what, count in plan.skipped.items()]
  if is_online and (waiting := plan.found['in a batch']):
    stopped = stopped or f'{waiting:,} requests are in a batch: --mode=batch collects them'
  failures = recorder.failed + collections.Counter({'failed before': plan.found['failed before']})
  rows += [('failed', f'{count:,} {reason}') for reason, count in failures.items()]
  if is_paid:
    rows += _cost_rows(recorder, budget)
  rows += _write_all(job, store, bool(plan.skipped[prompts.HAS_DESCRIPTION]))
  rows += [('store', str(store.folder)), *notes]
  rows += [
    (
      'note',
      f'{s["requests"]:,} requests to {s["model"]} are in a batch; its command collects them',
    )
    for s in others
  ]
  again = 'the same command again'
  if stopped or recorder.may_go_on:
    rows.append(('next', again + (f'; {stopped}' if stopped else '')))
  else:
    if failures.total():
      rows.append(('next', f'{again} with --retry_failed, or continue without these texts:'))
    command = f'python -m data_prep.encode --data_dir={job.data_dir} --modality=text'
    rows.append(('next', command))
  show(rows)
  # With --nowait, batches that are still under way are no failure.
  is_submitted = not (is_online or sending.wait) and llm_batch.keys_under_way(store.folder)
  if (recorder.may_go_on or stopped) and not is_submitted:
    raise ReportedError(stopped or 'some requests were not answered; the same command continues')


def _send(
  job: text_job.Job, recorder: text_job.Recorder, sending: Sending, budget: costs.Budget
) -> str:
  """Sends all missing requests; returns why it stopped early, '' if it did not."""
  store = recorder.store
  work = lambda: job.work(store, llm_batch.keys_under_way(store.folder))
  provider = PROVIDERS.get(job.settings.backend)
  try:
    if provider is None:
      for key, prompt in job.work(store, set()):
        written = mock_text.write(prompt, job.settings.parameters['seed'])
        try:
          text = prompts.parse_answer(written)
        except ValueError as error:  # A title may look like a refusal, or like reasoning.
          recorder.failure(key, prompt, llm_calls.Unusable(f'unusable answer: {error}'))
        else:
          recorder.answer(key, prompt, llm_calls.Answer(text, (0, 0)))
      return ''
    if sending.mode == 'online':
      online = llm_online.Online(
        provider,
        job.settings,
        budget,
        sending.requests_per_minute,
        sending.tokens_per_minute,
      )
      try:
        asyncio.run(
          online.answer_all(work(), sending.concurrency, recorder.answer, recorder.failure)
        )
      except llm_online.Stopped:
        raise _interrupted(online.signal_number, store) from None
      return ''
    batches = llm_batch.Batches(
      store.folder, provider, job.settings, budget, store.has_result, sending.batch_requests
    )
    return _send_batches(work, recorder, sending, batches)
  except llm_online.BudgetReached:
    return f'--max_cost={budget.limit:g} is reached: the next answer might cost more'


def _send_batches(
  work: Callable, recorder: text_job.Recorder, sending: Sending, batches: llm_batch.Batches
) -> str:
  def on_poll() -> None:
    recorder.bar.set_postfix_str(
      f'{batches.num_under_way} batches under way, {batches.num_done:,} requests done in them'
    )

  asyncio.run(
    batches.answer_all(
      work, sending.poll_seconds, sending.wait, recorder.answer, recorder.failure, on_poll
    )
  )
  return f'{batches.num_under_way} batches are under way' if batches.num_under_way else ''


def _interrupted(number: int | None, store: answers.Store) -> InterruptedBySignal:
  return InterruptedBySignal(
    f'stopped: {len(store):,} answers are in {store.folder}; the same command continues',
    number or signal.SIGINT,
  )


def _plan_rows(
  plan: text_job.Plan, price: costs.Price | None, store: answers.Store
) -> list[tuple[str, str]]:
  """Formats what a run will ask and cost."""
  kinds = ', '.join(f'{count:,} about {kind}s' for kind, count in plan.requests.items())
  rows = [('requests', f'{plan.requests.total():,}{f": {kinds}" if kinds else ""}')]
  rows += [(f'- {what}', f'{count:,}') for what, count in (plan.found + plan.skipped).items()]
  rows.append(('tokens', f'about {plan.tokens[0]:,} in, {plan.tokens[1]:,} out'))
  if price is None:
    cost = 'unknown: prices.json lacks the model; pass --input_price and --output_price'
  else:
    cost = (
      f'about ${price.cost(plan.tokens):.4f}, at ${price.input:g} in and ${price.output:g} out per'
      ' million tokens (check them: data_prep/llm_text/prices.json)'
    )
  return [*rows, ('cost', cost), ('spent', f'${store.cost:.4f} in {store.folder} so far')]


def _cost_rows(recorder: text_job.Recorder, budget: costs.Budget) -> list[tuple[str, str]]:
  now = f'${recorder.cost:.4f} now, ${recorder.store.cost:.4f} in all'
  now = now if recorder.price else 'unknown'
  lost = f', and at most ${budget.lost:.4f} for replies that broke off' if budget.lost else ''
  return [
    ('tokens', f'{recorder.tokens[0]:,} in, {recorder.tokens[1]:,} out'),
    ('cost', now + lost),
  ]


def _notes(job: text_job.Job, store: answers.Store, plan: text_job.Plan) -> list[tuple[str, str]]:
  return [('note', note) for note in text_job.notes(job, store, plan)]


def _write_all(
  job: text_job.Job, store: answers.Store, has_descriptions: bool
) -> list[tuple[str, str]]:
  """Writes all stored texts into the dataset; returns rows of the summary."""
  rows = []
  for kind in job.kinds:
    found = text_job.StoredTexts(job, store, kind)
    if not found and not (kind == 'item' and has_descriptions):
      rows.append((f'{kind} texts', 'none yet'))
      continue
    settings = job.settings
    is_remote = settings.base_url and settings.backend != llm_local.NAME
    server = urllib.parse.urlsplit(settings.server).netloc
    origin = {
      'provider': settings.backend,
      'model': settings.model,
      'prompt_version': prompts.read_template(kind, job.language).version,
      'parameters': settings.parameters,
      'language': job.language,
      'is_mock': settings.backend == MOCK,
      **({'server': server} if is_remote else {}),
    }
    origin |= split_of(job.data_dir, kind, job.split_name, job.hold_back)
    rows += write_texts(job.data_dir, kind, found, origin)
  return rows


def split_of(data_dir: str, kind: str, split_name: str, hold_back: float) -> dict[str, Any]:
  """Describes the interactions that texts of one kind were written from; {} for items.

  Raises:
    InputError: the dataset has no such split.
  """
  if kind == 'item':
    return {}
  split = read_info(data_dir)['splits'].get(split_name)
  if split is None:
    raise InputError(f'data_dir {data_dir}: has no split {split_name!r}')
  return {'split_name': split_name, 'split_hash': split['hash'], 'hold_back': hold_back}


def write_texts(
  data_dir: str, kind: str, found: Mapping[str, str], origin: dict[str, Any]
) -> list[tuple[str, str]]:
  """Writes texts of one kind into the dataset; returns rows of the summary.

  Args:
    data_dir: prepared folder.
    kind: `item` or `user`.
    found: texts by original id.
    origin: where the texts come from, see `texts.write_texts`; the time is added.
  """
  origin = {**origin, 'time': answers.utc(time.time())}
  counts = texts.write_texts(data_dir, kind, found, origin)
  shown = ', '.join(
    f'{counts[name]:,} {what}' for name, what in _SOURCES.items() if counts.get(name)
  )
  return [(f'{kind} texts', f'{shown}; written to {Path(data_dir) / f"{kind}_texts"}')]

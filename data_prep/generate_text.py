"""Lets an LLM write what each item is and what each user prefers, into a prepared folder.

  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=mock
  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=openai --dry_run
  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=openai --max_cost=5
  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=anthropic --mode=batch
  python -m data_prep.generate_text --data_dir=data/ml-1m --kind=items --import=texts.json

Every answer is stored when it arrives, in DATA_DIR.answers beside the folder. The same command
started again, whatever stopped it, asks only for what is missing. See docs/llm_text.md.
"""

import asyncio
import collections
import json
import signal
import sys
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags, logging
from tqdm import tqdm

from data_prep.llm_text import (
  answers,
  costs,
  llm_anthropic,
  llm_batch,
  llm_calls,
  llm_online,
  llm_openai,
  mock_text,
  prompts,
  text_job,
  texts,
)
from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import read_info
from ur4rec_jax.errors import (
  InputError,
  InterruptedBySignal,
  ReportedError,
  exit_on_reported_error,
)

PROVIDERS = {module.NAME: module for module in (llm_openai, llm_anthropic)}
_MOCK = 'mock'
_BACKENDS = (_MOCK, *PROVIDERS)
_KINDS = {'items': ('item',), 'users': ('user',), 'both': ('item', 'user')}
_MODES = ('online', 'batch')

_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Prepared folder, as build_dataset writes it.')
_BACKEND = flags.DEFINE_string('backend', None, f'Who writes: {", ".join(_BACKENDS)}.')
_KIND = flags.DEFINE_string('kind', 'both', f'What is written about: {", ".join(_KINDS)}.')
_MODE = flags.DEFINE_string(
  'mode', 'online', 'online: at once; batch: within a day, at half the price.'
)
_MODEL = flags.DEFINE_string(
  'model',
  None,
  'As the provider calls it; left out,'
  + ','.join(f' {name}: {module.DEFAULT_MODEL}' for name, module in PROVIDERS.items()),
)
_BASE_URL = flags.DEFINE_string(
  'base_url', None, 'Another server that speaks the same language, e.g. http://localhost:8000/v1.'
)
_LANGUAGE = flags.DEFINE_string(
  'language', 'en', f'Of prompts and texts: {", ".join(prompts.LANGUAGES)}.'
)
_SPLIT = flags.DEFINE_string(
  'split', splits.LEAVE_ONE_OUT, 'User texts see only the training part of this split.'
)
_HOLD_BACK = flags.DEFINE_float(
  'hold_back',
  0.2,
  "Share of each user's training interactions, the latest, that user texts do not see: the targets"
  ' that a model learns to use them for. With --import: what the texts were not made from.',
)
_MAX_HISTORY = flags.DEFINE_integer('max_history', 30, 'Items of a user in a prompt, the latest.')
_REGENERATE = flags.DEFINE_bool(
  'regenerate', False, 'Write about items too that have a description in the dataset.'
)
_STORE = flags.DEFINE_string('store', None, 'Folder of the answers; left out, DATA_DIR.answers.')
_RETRY_FAILED = flags.DEFINE_bool(
  'retry_failed', False, 'Ask again where an answer was refused, filtered, cut off or unusable.'
)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Only tell requests, tokens and cost.')
_MAX_COST = flags.DEFINE_float(
  'max_cost', None, 'Dollars that all answers of the store may cost; stops before the next is more.'
)
_INPUT_PRICE = flags.DEFINE_float(
  'input_price', None, 'Dollars per million input tokens, for a model that prices.json lacks.'
)
_OUTPUT_PRICE = flags.DEFINE_float('output_price', None, 'The same for output tokens.')
_CONCURRENCY = flags.DEFINE_integer('concurrency', 16, 'Requests under way at once.')
_REQUESTS_PER_MINUTE = flags.DEFINE_float('requests_per_minute', None, 'Your limit, if any.')
_TOKENS_PER_MINUTE = flags.DEFINE_float('tokens_per_minute', None, 'Your limit, if any.')
_MAX_OUTPUT_TOKENS = flags.DEFINE_integer(
  'max_output_tokens', 1000, 'Where an answer is cut off; reasoning counts too.'
)
_PARAMETERS = flags.DEFINE_string(
  'parameters', '{}', 'More fields of the request, as JSON: \'{"temperature": 0.3}\'.'
)
_TIMEOUT = flags.DEFINE_float('timeout', 120.0, 'Seconds that a reply may take.')
_WAIT = flags.DEFINE_bool('wait', True, 'Batches: stay until they have ended.')
_POLL_SECONDS = flags.DEFINE_float('poll_seconds', 30.0, 'Batches: seconds between two looks.')
_BATCH_REQUESTS = flags.DEFINE_integer(
  'batch_requests', None, "Requests a batch; left out, the provider's limit."
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of --backend=mock.')
_IMPORT = flags.DEFINE_string(
  'import', None, 'File with texts made elsewhere: {"<id>": "text"}, or JSON lines.'
)
_ID_FIELD = flags.DEFINE_string('id_field', 'id', 'Where a JSON line has its id.')
_TEXT_FIELDS = flags.DEFINE_list(
  'text_field', ['text'], 'Where a JSON line has its text; several, with commas, become one text.'
)
_EXPORT = flags.DEFINE_string('export', None, 'File to write the texts of the folder to.')


def write(job: text_job.Job, store: answers.Store, has_descriptions: bool) -> list[tuple[str, str]]:
  """Writes all texts that there are into the prepared folder; returns rows of the summary."""
  rows = []
  for kind in job.kinds:
    found = text_job.StoredTexts(job, store, kind)
    if not found and not (kind == 'item' and has_descriptions):
      rows.append((f'{kind} texts', 'none yet'))
      continue
    settings = job.settings
    server = urllib.parse.urlsplit(settings.base_url or '')
    origin = {
      'provider': settings.backend,
      'model': settings.model,
      'prompt_version': prompts.read_template(kind, job.language).version,
      'parameters': settings.parameters,
      'language': job.language,
      'is_mock': settings.backend == _MOCK,
      **({'server': f'{server.hostname}:{server.port}'} if settings.base_url else {}),
    }
    rows += write_into(job.data_dir, kind, found, origin, job.split_name, job.hold_back)
  return rows


def write_into(
  data_dir: str,
  kind: str,
  found: Mapping[str, str],
  origin: dict[str, Any],
  split_name: str,
  hold_back: float,
) -> list[tuple[str, str]]:
  """Writes texts of one kind; returns rows of the summary."""
  if kind == 'user':
    split = read_info(data_dir)['splits'].get(split_name)
    if split is None:
      raise InputError(f'data_dir {data_dir}: has no split {split_name!r}')
    about_split = {'split_name': split_name, 'split_hash': split['hash']}
    origin = {**origin, **about_split, 'hold_back': hold_back}
  origin = {**origin, 'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}
  counts = texts.write_texts(data_dir, kind, found, origin)
  names = {
    'llm': 'by the LLM',
    'mock': 'by mock, invented: for trying things out only',
    'import': 'imported',
    'dataset': "the dataset's own descriptions",
    'without_text': 'without text',
    'unknown_ids': 'ids that the dataset lacks',
  }
  shown = ', '.join(f'{counts[name]:,} {what}' for name, what in names.items() if counts.get(name))
  return [(f'{kind} texts', f'{shown}; written to {Path(data_dir) / f"{kind}_texts"}')]


def show(rows: list[tuple[str, str]], file=None) -> None:
  """Prints rows in two columns."""
  print('\n'.join(f'{name:<14} {value}' for name, value in rows), file=file, flush=True)


def plan_rows(
  plan: text_job.Plan, price: costs.Price | None, store: answers.Store
) -> list[tuple[str, str]]:
  """What a run will ask and cost."""
  kinds = ', '.join(f'{count:,} about {kind}s' for kind, count in plan.requests.items())
  rows = [('requests', f'{plan.requests.total():,}{f": {kinds}" if kinds else ""}')]
  rows += [(f'- {what}', f'{count:,}') for what, count in (plan.found + plan.skipped).items()]
  rows.append(('tokens', f'about {plan.tokens[0]:,} in, {plan.tokens[1]:,} out'))
  if price is None:
    cost = 'unknown: prices.json lacks the model; --input_price and --output_price tell it'
  else:
    cost = (
      f'about ${price.cost(plan.tokens):.4f}, at ${price.input:g} in and ${price.output:g} out per'
      ' million tokens (check them: data_prep/llm_text/prices.json)'
    )
  return [*rows, ('cost', cost), ('spent', f'${store.cost:.4f} in {store.folder} so far')]


def run(
  job: text_job.Job,
  store: answers.Store,
  price: costs.Price | None,
  budget: costs.Budget,
  plan: text_job.Plan,
) -> tuple[text_job.Recorder, str]:
  """Asks for everything that is missing; returns what came and why it stopped early, if it did."""
  under_way = lambda: llm_batch.keys_under_way(store.folder)
  provider = PROVIDERS.get(job.settings.backend)
  total = plan.requests.total() + (len(under_way()) if _MODE.value == 'batch' else 0)
  with tqdm(total=total, unit='text', disable=not total) as bar:
    recorder = text_job.Recorder(job, store, price, bar)
    stopped = ''
    try:
      if provider is None:
        for key, prompt in job.work(store, set()):
          text = prompts.parse_answer(mock_text.write(prompt, _SEED.value))
          recorder.answer(key, prompt, llm_calls.Answer(text, (0, 0)))
      elif _MODE.value == 'online':
        online = llm_online.Online(
          provider,
          job.settings,
          price,
          budget,
          _REQUESTS_PER_MINUTE.value,
          _TOKENS_PER_MINUTE.value,
        )
        try:
          asyncio.run(
            online.answer_all(
              job.work(store, under_way()), _CONCURRENCY.value, recorder.answer, recorder.failure
            )
          )
        except llm_online.Stopped:
          raise _interrupted(online.signal_number, store) from None
      else:
        batches = llm_batch.Batches(
          store.folder, provider, job.settings, price, budget, _BATCH_REQUESTS.value
        )
        shown = lambda: bar.set_postfix_str(
          f'{batches.num_under_way} batches under way, {batches.num_done:,} requests done in them'
        )
        asyncio.run(
          batches.answer_all(
            lambda: job.work(store, under_way()),
            _POLL_SECONDS.value,
            _WAIT.value,
            recorder.answer,
            recorder.failure,
            shown,
          )
        )
        if batches.num_under_way:
          stopped = f'{batches.num_under_way} batches are under way'
    except llm_online.BudgetReached:
      stopped = f'--max_cost={budget.limit:g} is reached: the next answer might cost more'
  return recorder, stopped


def _interrupted(number: int | None, store: answers.Store) -> InterruptedBySignal:
  return InterruptedBySignal(
    f'stopped: {len(store):,} answers are in {store.folder}; the same command goes on from there',
    number or signal.SIGINT,
  )


def generate(job: text_job.Job, store_folder: str, price: costs.Price | None) -> None:
  """Plans, asks, writes the texts and prints the summary."""
  is_paid = job.settings.backend != _MOCK
  provider = PROVIDERS.get(job.settings.backend)
  if is_paid and not _DRY_RUN.value:
    llm_calls.find_key(provider, job.settings)
  store = answers.Store(store_folder, read_only=_DRY_RUN.value)
  try:
    plan = text_job.make_plan(job, store, llm_batch.keys_under_way(store.folder))
    shown_notes = [('note', note) for note in text_job.notes(job, store, plan)]
    if _DRY_RUN.value:
      show([*plan_rows(plan, price, store), *shown_notes])
      return
    if is_paid:
      show([*plan_rows(plan, price, store), *shown_notes], file=sys.stderr)
    is_online = _MODE.value == 'online'
    # What this run collects is set aside by itself.
    others = [
      state
      for state in llm_batch.read_states(store.folder)
      if is_online or not llm_batch.is_of(state, job.settings)
    ]
    budget = costs.Budget(_MAX_COST.value, store.cost + sum(s['promised'] for s in others))
    recorder, stopped = run(job, store, price, budget, plan)
    store.sync()
    rows = [('answered', f'{recorder.answered:,} now, {plan.found["stored"]:,} before')]
    rows += [(f'- {what}', f'{count:,}') for what, count in plan.skipped.items()]
    waiting = plan.found['in a batch'] if is_online else 0
    if waiting:
      stopped = stopped or f'{waiting:,} requests are in a batch: --mode=batch collects them'
    failures = recorder.failed + collections.Counter({'failed before': plan.found['failed before']})
    rows += [('failed', f'{count:,} {reason}') for reason, count in failures.items()]
    if is_paid:
      rows.append(('tokens', f'{recorder.tokens[0]:,} in, {recorder.tokens[1]:,} out'))
      now = f'${recorder.cost:.4f} now, ${store.cost:.4f} in all' if price else 'unknown'
      lost = f', and at most ${budget.lost:.4f} for replies that broke off' if budget.lost else ''
      rows.append(('cost', now + lost))
    rows += write(job, store, bool(plan.skipped[prompts.HAS_DESCRIPTION]))
    rows += [('store', str(store.folder)), *shown_notes]
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
        rows.append(('next', f'{again} with --retry_failed, or go on without these texts:'))
      command = f'python -m data_prep.encode --data_dir={job.data_dir} --modality=text'
      rows.append(('next', command))
    show(rows)
    # With --nowait it is no fault that batches are under way.
    is_submitted = not (is_online or _WAIT.value) and llm_batch.keys_under_way(store.folder)
    if (recorder.may_go_on or stopped) and not is_submitted:
      raise ReportedError(stopped or 'some requests were not answered; the same command goes on')
  except KeyboardInterrupt:
    raise _interrupted(None, store) from None
  finally:
    store.close()


def make_settings() -> llm_calls.Settings:
  """Reads who writes, from the flags; InputError for what is not possible."""
  backend = _BACKEND.value
  if backend == _MOCK:
    return llm_calls.Settings(_MOCK, mock_text.MODEL, {'seed': _SEED.value})
  provider: ModuleType = PROVIDERS[backend]
  try:
    more = json.loads(_PARAMETERS.value)
    if not isinstance(more, dict):
      raise ValueError('no object')
  except ValueError as error:
    raise InputError(
      f'--parameters={_PARAMETERS.value}: must be a JSON object such as'
      f' \'{{"temperature": 0.3}}\' ({error})'
    ) from error
  parameters = {**provider.PARAMETERS, provider.MAX_OUTPUT: _MAX_OUTPUT_TOKENS.value, **more}
  return llm_calls.Settings(
    backend,
    _MODEL.value or provider.DEFAULT_MODEL,
    {name: value for name, value in parameters.items() if value is not None},
    _BASE_URL.value,
    _TIMEOUT.value,
  )


def make_price(settings: llm_calls.Settings) -> costs.Price | None:
  """Reads the price, from the flags or the table; InputError where a budget needs one."""
  given = (_INPUT_PRICE.value, _OUTPUT_PRICE.value)
  if settings.backend == _MOCK:
    return costs.Price(0.0, 0.0)
  if None not in given:
    if min(given) < 0:
      raise InputError('--input_price and --output_price must be 0 or more')
    return costs.Price(*given)
  if given != (None, None):
    raise InputError('--input_price and --output_price must be given together')
  price = costs.find_price(settings.backend, settings.model, _MODE.value == 'batch')
  if price is None and _MAX_COST.value is not None:
    raise InputError(
      f'--max_cost: the price of {settings.model} is unknown; give --input_price and'
      ' --output_price in dollars per million tokens (0 for a server of your own), or add it to'
      ' data_prep/llm_text/prices.json'
    )
  return price


def _check_flags() -> None:
  if not _DATA_DIR.value:
    raise InputError('--data_dir is missing: the prepared folder')
  for flag, allowed in (
    (_BACKEND, _BACKENDS),
    (_KIND, _KINDS),
    (_MODE, _MODES),
    (_LANGUAGE, prompts.LANGUAGES),
    (_SPLIT, splits.NAMES),
  ):
    is_needed = flag is not _BACKEND or not (_IMPORT.value or _EXPORT.value)
    if flag.value not in allowed and is_needed:
      given = '' if flag.value is None else f', not {flag.value!r}'
      raise InputError(f'--{flag.name} must be one of {", ".join(allowed)}{given}')
  for flag in (
    _MAX_COST,
    _CONCURRENCY,
    _REQUESTS_PER_MINUTE,
    _TOKENS_PER_MINUTE,
    _MAX_OUTPUT_TOKENS,
    _MAX_HISTORY,
    _TIMEOUT,
    _POLL_SECONDS,
    _BATCH_REQUESTS,
  ):
    if flag.value is not None and not flag.value > 0:
      hint = '; --dry_run tells the cost without paying' if flag is _MAX_COST else ''
      raise InputError(f'--{flag.name} must be above 0, not {flag.value:g}{hint}')
  if not (0 <= _HOLD_BACK.value < 1 or (_IMPORT.value and _HOLD_BACK.value == 1)):
    raise InputError(f'--hold_back={_HOLD_BACK.value:g}: must be at least 0 and below 1')
  if _IMPORT.value and _KIND.value == 'users' and not _HOLD_BACK.present:
    raise InputError(
      "--hold_back is missing: the share of each user's training interactions, the latest, that the"
      ' texts were not made from; 0 if they were made from all'
    )
  if _KIND.value == 'both' and (_IMPORT.value or _EXPORT.value):
    raise InputError('--import and --export take one kind: --kind=items or --kind=users')


@exit_on_reported_error
def main(argv: list[str]) -> None:
  """Reads the flags and does what they name."""
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # TFDS and the SDKs tell of each file and request.
  if len(argv) > 1:
    raise InputError(f'unexpected argument {argv[1]!r}; flags are written --name=value')
  _check_flags()
  data_dir, kinds = _DATA_DIR.value, _KINDS[_KIND.value]
  read_info(data_dir)
  if _IMPORT.value:
    found = texts.read_json(_IMPORT.value, _ID_FIELD.value, _TEXT_FIELDS.value)
    origin = {
      'provider': 'import',
      'model': '',
      'prompt_version': '',
      'parameters': {'file': Path(_IMPORT.value).name},
      'language': _LANGUAGE.value,
      'is_mock': False,
    }
    show(write_into(data_dir, kinds[0], found, origin, _SPLIT.value, _HOLD_BACK.value))
  elif _EXPORT.value:
    count = texts.write_json(data_dir, kinds[0], _EXPORT.value)
    show([('texts', f'{count:,} about {_KIND.value}, written to {_EXPORT.value}')])
  else:
    settings = make_settings()
    job = text_job.Job(
      data_dir,
      kinds,
      settings,
      _LANGUAGE.value,
      _SPLIT.value,
      _HOLD_BACK.value,
      _MAX_HISTORY.value,
      _REGENERATE.value,
      _RETRY_FAILED.value,
    )
    store = _STORE.value or str(Path(data_dir).absolute()).rstrip('/') + '.answers'
    signal.signal(signal.SIGTERM, _stop_on_sigterm)
    generate(job, store, make_price(settings))


def _stop_on_sigterm(number: int, frame: Any) -> None:
  del frame
  raise InterruptedBySignal('stopped; the same command goes on from there', number)


if __name__ == '__main__':
  app.run(main)

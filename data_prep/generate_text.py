"""Has an LLM describe the items and the users' preferences of a prepared folder.

  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=mock
  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=openai --dry_run
  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=openai --max_cost=5
  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=anthropic --mode=batch
  python -m data_prep.generate_text --data_dir=data/ml-1m --backend=local --model=model.gguf
  python -m data_prep.generate_text --data_dir=data/ml-1m --kind=items --import=texts.json

Each answer is stored as soon as it arrives, in the folder DATA_DIR.answers. The same command,
started again, asks only for the missing answers. See docs/llm_text.md.
"""

import argparse
import json
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from data_prep.flags import Parser
from data_prep.llm_text import (
  costs,
  generation,
  llm_calls,
  llm_local,
  mock_text,
  prompts,
  text_job,
  texts,
)
from data_prep.llm_text.generation import MOCK, PROVIDERS
from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import read_info
from ur4rec_jax.errors import InputError, InterruptedBySignal, exit_on_reported_error

_KINDS = {'items': ('item',), 'users': ('user',), 'both': ('item', 'user')}
_CHOICES = {
  'backend': (MOCK, *PROVIDERS),
  'kind': tuple(_KINDS),
  'mode': ('online', 'batch'),
  'language': prompts.LANGUAGES,
  'split': splits.NAMES,
}
_POSITIVE = (
  'max_cost',
  'concurrency',
  'requests_per_minute',
  'tokens_per_minute',
  'max_output_tokens',
  'max_history',
  'timeout',
  'poll_seconds',
  'batch_requests',
)
_HOLD_BACK = 0.2
# Fields of a request that --parameters cannot give: the price and the reading of replies depend on
# them.
_OWN_FIELDS = ('model', 'messages', 'system', 'stream', 'n')


def _flags() -> Parser:
  parser = Parser(__doc__)
  for title, add_flags in (
    ('what to write about', _add_subject),
    ('who writes', _add_writer),
    ('stored answers and cost', _add_cost),
    ('requests', _add_requests),
    ('batches', _add_batches),
    ('texts made elsewhere', _add_files),
  ):
    add_flags(parser.add_argument_group(title).add_argument)
  return parser


def _add_subject(add: Callable) -> None:
  add('--data_dir', help='prepared folder, written by build_dataset')
  add('--kind', default='both', help=f'what to write about: {", ".join(_KINDS)}')
  languages = ', '.join(prompts.LANGUAGES)
  add('--language', default='en', help=f'language of prompts and texts: {languages}')
  add(
    '--split',
    default=splits.LEAVE_ONE_OUT,
    help='user texts are written from the training part of this split only',
  )
  add(
    '--hold_back',
    type=float,
    help="share of each user's training interactions, the latest ones, that user texts are not"
    f' written from: they are the targets of training with the texts; default {_HOLD_BACK}. With'
    ' --import: the share that the texts were not written from',
  )
  add('--max_history', type=int, default=30, help='latest items of a user in a prompt')
  add(
    '--regenerate',
    action='store_true',
    help='also write about items that have a description in the dataset',
  )


def _add_writer(add: Callable) -> None:
  add('--backend', help=f'who writes: {", ".join(_CHOICES["backend"])}')
  models = ', '.join(f'{name} {module.DEFAULT_MODEL}' for name, module in PROVIDERS.items())
  add('--model', help=f"the provider's name of the model, local: its file; defaults: {models}")
  add('--base_url', help='another server with the same API, such as http://localhost:8000/v1')
  limits = ', '.join(
    f'{name} {module.PARAMETERS[module.MAX_OUTPUT]}' for name, module in PROVIDERS.items()
  )
  add(
    '--max_output_tokens',
    type=int,
    help='longest answer in tokens, reasoning included; longer ones are cut off; defaults:'
    f' {limits}',
  )
  add(
    '--parameters',
    default='{}',
    help='more fields of the request, as JSON: \'{"temperature": 0.3}\'',
  )
  add('--seed', type=int, default=0, help='seed of --backend=mock')


def _add_cost(add: Callable) -> None:
  add('--store', help='folder of the stored answers; default DATA_DIR.answers')
  add(
    '--retry_failed',
    action='store_true',
    help='ask again where an answer was refused, filtered, cut off or unusable',
  )
  add('--dry_run', action='store_true', help='only print requests, tokens and cost')
  add(
    '--max_cost',
    type=float,
    help='limit in dollars for all answers of the store; the program stops before it is exceeded',
  )
  add(
    '--input_price',
    type=float,
    help='dollars per million input tokens, for a model that is not in prices.json',
  )
  add('--output_price', type=float, help='dollars per million output tokens')


def _add_requests(add: Callable) -> None:
  default = generation.Sending()
  add(
    '--mode', default=default.mode, help='online: at once; batch: within a day, at half the price'
  )
  add(
    '--concurrency', type=int, default=default.concurrency, help='online: requests at the same time'
  )
  add('--requests_per_minute', type=float, help='online: limit of your account')
  add('--tokens_per_minute', type=float, help='online: limit of your account')
  add('--timeout', type=float, default=120.0, help='seconds for a whole reply')


def _add_batches(add: Callable) -> None:
  add(
    '--nowait',
    action='store_true',
    help='look once and return instead of waiting until they have ended',
  )
  add(
    '--poll_seconds',
    type=float,
    default=generation.Sending().poll_seconds,
    help='seconds between two looks',
  )
  add('--batch_requests', type=int, help="most requests in one; without it the provider's limit")


def _add_files(add: Callable) -> None:
  add('--import', dest='file', help='file with texts to import: {"<id>": "text"}, or JSON lines')
  add('--id_field', default='id', help='field of a JSON line that holds the id')
  add(
    '--text_field',
    type=lambda value: value.split(','),
    default=['text'],
    help='field of a JSON line that holds the text; several, separated by commas, are joined',
  )
  add('--export', help='file to write the texts of the folder to')


def _check_used(flags: argparse.Namespace, given: Collection[str]) -> None:
  """Raises InputError if the command line has a flag that the run would not obey.

  Args:
    flags: the parsed command line.
    given: names of the flags on it.
  """
  is_batch, is_file = flags.mode == 'batch', bool(flags.file or flags.export)
  for is_used, names, what in (
    (not is_file, ('backend', 'dry_run'), 'texts to write, not for --import and --export'),
    (not flags.file, ('export',), 'the texts of the folder, and --import writes new ones'),
    (flags.file, ('id_field', 'text_field'), '--import'),
    (flags.backend == MOCK, ('seed',), '--backend=mock; LLMs may have one in --parameters'),
    (flags.backend in PROVIDERS, ('model', 'base_url', 'parameters', 'max_output_tokens'), 'LLMs'),
    (flags.kind != 'items', ('split', 'hold_back', 'max_history'), 'texts about users'),
    (flags.kind != 'users', ('regenerate',), 'texts about items'),
    (is_batch, ('nowait', 'poll_seconds', 'batch_requests'), '--mode=batch'),
  ):
    for name in names:
      if name in given and not is_used:
        raise InputError(f'--{name}: is for {what}; leave it out')


def _check(flags: argparse.Namespace) -> None:
  """Checks the flags; InputError for the first wrong one."""
  if not flags.data_dir:
    raise InputError('--data_dir is missing: the prepared folder')
  for name, allowed in _CHOICES.items():
    value = getattr(flags, name)
    is_needed = name != 'backend' or not (flags.file or flags.export)
    if value not in allowed and is_needed:
      given = '' if value is None else f', not {value!r}'
      raise InputError(f'--{name} must be one of {", ".join(allowed)}{given}')
  for name in _POSITIVE:
    value = getattr(flags, name)
    if value is not None and not value > 0:
      hint = '; --dry_run shows the cost without paying' if name == 'max_cost' else ''
      raise InputError(f'--{name} must be above 0, not {value:g}{hint}')
  if flags.backend == llm_local.NAME and (flags.base_url or flags.mode == 'batch'):
    raise InputError(
      '--backend=local starts a server of its own and asks it online: leave out --base_url and'
      ' --mode; a server that runs already is --backend=openai with its --base_url'
    )
  if flags.file and flags.kind == 'users' and flags.hold_back is None:
    raise InputError(
      "--hold_back is missing: the share of each user's training interactions, the latest ones,"
      ' that the texts were not written from; 0 if they were written from all'
    )
  if flags.hold_back is None:
    flags.hold_back = _HOLD_BACK
  if not (0 <= flags.hold_back < 1 or (flags.file and flags.hold_back == 1)):
    raise InputError(f'--hold_back={flags.hold_back:g}: must be at least 0 and below 1')
  if flags.kind == 'both' and (flags.file or flags.export):
    raise InputError('--import and --export take one kind: --kind=items or --kind=users')


def _settings(flags: argparse.Namespace) -> llm_calls.Settings:
  """Returns who writes, and with which parameters; InputError if that is impossible."""
  if flags.backend == MOCK:
    return llm_calls.Settings(MOCK, mock_text.MODEL, {'seed': flags.seed})
  provider, model = PROVIDERS[flags.backend], flags.model
  if provider is llm_local:
    model = Path(model).name
  try:
    more = json.loads(flags.parameters)
    if not isinstance(more, dict):
      raise ValueError('no object')
  except ValueError as error:
    raise InputError(
      f'--parameters={flags.parameters}: must be a JSON object such as'
      f' \'{{"temperature": 0.3}}\' ({error})'
    ) from error
  for name in _OWN_FIELDS:
    if name in more:
      way_out = 'pass --model' if name == 'model' else 'leave it out'
      raise InputError(f'--parameters: {name!r} cannot be given there; {way_out}')
  limit = {} if flags.max_output_tokens is None else {provider.MAX_OUTPUT: flags.max_output_tokens}
  parameters = {**provider.PARAMETERS, **limit, **more}
  most = parameters[provider.MAX_OUTPUT]
  if isinstance(most, bool) or not isinstance(most, int) or most < 1:
    raise InputError(
      f'--parameters: {provider.MAX_OUTPUT} is {json.dumps(most)}, and must be a whole number above'
      ' 0; pass --max_output_tokens instead'
    )
  return llm_calls.Settings(
    flags.backend,
    model or provider.DEFAULT_MODEL,
    {name: value for name, value in parameters.items() if value is not None},
    flags.base_url,
    flags.timeout,
  )


def _price(flags: argparse.Namespace, model: str) -> costs.Price | None:
  """Returns the price from the flags or the table; InputError if --max_cost needs one."""
  given = (flags.input_price, flags.output_price)
  if flags.backend in (MOCK, llm_local.NAME):
    return costs.Price(0.0, 0.0)
  if None not in given:
    if min(given) < 0:
      raise InputError('--input_price and --output_price must be 0 or more')
    return costs.Price(*given)
  if given != (None, None):
    raise InputError('--input_price and --output_price must be given together')
  price = costs.find_price(flags.backend, model, flags.mode == 'batch')
  if price is None and flags.max_cost is not None:
    raise InputError(
      f'--max_cost: the price of {model} is unknown; give --input_price and'
      ' --output_price in dollars per million tokens (0 for a server of your own), or add it to'
      ' data_prep/llm_text/prices.json'
    )
  return price


def _import(flags: argparse.Namespace, kind: str) -> list[tuple[str, str]]:
  found = texts.read_json(flags.file, flags.id_field, flags.text_field)
  origin = {
    'provider': 'import',
    'model': '',
    'prompt_version': '',
    'parameters': {'file': Path(flags.file).name},
    'language': flags.language,
    'is_mock': False,
  }
  origin |= generation.split_of(flags.data_dir, kind, flags.split, flags.hold_back)
  return generation.write_texts(flags.data_dir, kind, found, origin)


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags and imports, exports or generates texts."""
  parser = _flags()
  flags = parser.parse(argv)
  _check(flags)
  _check_used(flags, parser.given)
  data_dir, kinds = flags.data_dir, _KINDS[flags.kind]
  read_info(data_dir)
  if flags.file:
    generation.show(_import(flags, kinds[0]))
    return
  if flags.export:
    count = texts.write_json(data_dir, kinds[0], flags.export)
    generation.show([('texts', f'{count:,} about {flags.kind}, written to {flags.export}')])
    return
  if flags.backend == llm_local.NAME:
    flags.model = str(llm_local.find_file(flags.model))
  settings = _settings(flags)
  job = text_job.Job(
    data_dir,
    kinds,
    settings,
    language=flags.language,
    split_name=flags.split,
    hold_back=flags.hold_back,
    max_history=flags.max_history,
    regenerate=flags.regenerate,
    retry_failed=flags.retry_failed,
  )
  store = flags.store or str(Path(data_dir).absolute()).rstrip('/') + '.answers'
  price = _price(flags, settings.model)
  signal.signal(signal.SIGTERM, _stop_on_sigterm)
  if flags.dry_run:
    generation.dry_run(job, store, price)
    return
  values = vars(flags) | {'wait': not flags.nowait}
  sending = generation.Sending(**{name: values[name] for name in generation.Sending._fields})
  if flags.backend == llm_local.NAME:
    # Its server answers one request after the other.
    sending = sending._replace(concurrency=1)
    with llm_local.serving(Path(flags.model)) as settings.base_url:
      generation.generate(job, store, price, sending)
    return
  generation.generate(job, store, price, sending)


def _stop_on_sigterm(number: int, frame: Any) -> None:
  del frame
  raise InterruptedBySignal('stopped; the same command continues', number)


if __name__ == '__main__':
  main()

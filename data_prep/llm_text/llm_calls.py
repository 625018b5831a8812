"""Shared parts of all calls to a provider: settings, errors, reading replies."""

import dataclasses
import importlib
import os
import re
import urllib.parse
from types import ModuleType
from typing import Any, NamedTuple

from data_prep import retry_after
from data_prep.llm_text import prompts
from ur4rec_jax.errors import InputError

# Longest wait in seconds when a server asks for one.
MAX_RETRY_AFTER = 120.0
RETRIED = (408, 409, 425, 429)  # Every status from 500 on is retried, too.
_NO_CREDIT = re.compile('insufficient_quota|credit balance|billing', re.IGNORECASE)


@dataclasses.dataclass
class Settings:
  """The server, the model and the parameters of requests.

  Attributes:
    backend: `openai`, `anthropic` or `mock`.
    model: the provider's name of the model.
    parameters: fields of the request that shape the answer.
    base_url: another server with the same API; None for the provider's.
    timeout: seconds to wait for a reply.
    refused: optional fields that the server has refused during the run.
  """

  backend: str
  model: str
  parameters: dict[str, Any]
  base_url: str | None = None
  timeout: float = 120.0
  refused: set[str] = dataclasses.field(default_factory=set)


class Batch(NamedTuple):
  """Progress of a batch; `error` is the reason why the provider refused it."""

  is_ended: bool
  num_done: int
  error: str = ''
  files: tuple[str, ...] = ()


class Answer(NamedTuple):
  """A usable text and its (input, output) tokens."""

  text: str
  tokens: tuple[int, int]


class Rejected(Exception):
  """A request that fails again however often it is sent.

  Attributes:
    reason: message for the user.
    tokens: (input, output) tokens that were paid nevertheless.
  """

  def __init__(self, reason: str, tokens: tuple[int, int] = (0, 0)):
    super().__init__(reason)
    self.reason = reason
    self.tokens = tokens


class BadRequest(Rejected):
  """The server refuses the request."""


class Unusable(Rejected):
  """An answer without a usable text; it is paid, and another try may help."""


class Unanswered(Exception):
  """A request that got no answer and should be sent again.

  Attributes:
    reason: message for the user.
    wait: seconds that the server asks to wait; None if it does not say.
    is_from_server: whether a server has replied at all.
    may_cost: whether an answer may have been paid that never arrived.
  """

  def __init__(
    self,
    reason: str,
    wait: float | None = None,
    is_from_server: bool = True,
    may_cost: bool = False,
  ):
    super().__init__(reason)
    self.reason = reason
    self.wait = wait
    self.is_from_server = is_from_server
    self.may_cost = may_cost


class RefusedField(Exception):
  """The server refuses an optional field; further requests leave it out."""


def find_key(provider: ModuleType, settings: Settings) -> str:
  """Returns the API key, after all checks that need no request.

  Raises:
    InputError: the SDK is not installed, the key is not in the environment, or --base_url is no
      address.
  """
  try:
    importlib.import_module(provider.NAME)
  except ImportError as error:
    raise InputError(
      f"--backend={provider.NAME} needs the {provider.NAME} package: pip install 'ur4rec-jax[llm]'"
      f' or pip install {provider.NAME}'
    ) from error
  if settings.base_url:
    url = urllib.parse.urlsplit(settings.base_url)
    if url.scheme not in ('http', 'https') or not url.hostname:
      raise InputError('--base_url must be an address such as http://localhost:8000/v1')
  key = os.environ.get(provider.KEY, '').strip()
  if not key and not settings.base_url:
    raise InputError(
      f'{provider.KEY} is not set: export the key of your {provider.NAME} account under that name,'
      ' or try everything out with --backend=mock'
    )
  if not key.isascii() or not key.isprintable():
    raise InputError(f'{provider.KEY} holds characters that no key has; export it again')
  return key or 'none'  # Local servers need no key, but the SDK does.


def connect(provider: ModuleType, settings: Settings) -> Any:
  """Creates the SDK's client; raises the errors of `find_key`."""
  return provider.client(find_key(provider, settings), settings.base_url, settings.timeout)


def read(provider: ModuleType, reply: Any, estimate: tuple[int, int]) -> Answer:
  """Reads the text and the tokens of a reply.

  Args:
    provider: module of the provider.
    reply: body of the reply.
    estimate: (input, output) tokens to assume if the reply has none.

  Raises:
    Rejected: the answer was refused, filtered or cut off.
    Unusable: the reply holds no usable text.
  """
  try:
    tokens = provider.tokens(reply)
  except (LookupError, TypeError, ValueError):
    tokens = estimate
  try:
    return Answer(prompts.parse_answer(provider.content(reply)), tokens)
  except Rejected as error:
    raise Rejected(error.reason, tokens) from None
  except ValueError as error:
    raise Unusable(f'unusable answer: {error}', tokens) from None
  except (LookupError, TypeError, AttributeError):
    raise Unusable('unusable answer: not a reply of this API', tokens) from None


def judge(error: Exception, provider: ModuleType, settings: Settings) -> Exception:
  """Converts an error of the SDK into the error that says what to do.

  Returns:
    `Unanswered`, `RefusedField`, `Rejected`, or an `InputError` that ends the run.
  """
  sdk = importlib.import_module(provider.NAME)
  if isinstance(error, sdk.APIConnectionError):
    is_late = isinstance(error, sdk.APITimeoutError)
    reason = f'no reply in {settings.timeout:g} s' if is_late else 'the connection broke'
    was_sent = not type(error.__cause__).__name__.startswith('Connect')
    return Unanswered(reason, is_from_server=False, may_cost=was_sent)
  if not isinstance(error, sdk.APIStatusError):
    return error
  status, message = error.status_code, redact(_message(error), provider)
  where = settings.base_url or f'the {provider.NAME} API'
  if _NO_CREDIT.search(message) or status == 402:
    return InputError(f'{where} wants to be paid first: {message}')
  if status in RETRIED or status >= 500:
    asked = error.response.headers.get('retry-after', '')
    return Unanswered(
      f'the server answers {status}', retry_after.seconds_to_wait(asked, MAX_RETRY_AFTER)
    )
  if status in (401, 403):
    return InputError(f'{where} does not accept the key in {provider.KEY} ({status}): {message}')
  if status == 404:
    return InputError(
      f'{where} does not know what was asked for (404): {message}; check --model={settings.model}'
      ' and --base_url'
    )
  if status in (400, 422) and refuse(message, provider, settings):
    return RefusedField(message)
  return BadRequest(f'the server answers {status}: {message[:200]}')


def refuse(message: str, provider: ModuleType, settings: Settings) -> bool:
  """Drops optional fields named in an error from further requests; tells if there were any."""
  named = {
    field
    for field, words in provider.OPTIONAL.items()
    if any(word in message.lower() for word in words)
  }
  settings.refused |= named
  return bool(named)


def redact(text: str, provider: ModuleType) -> str:
  """Formats a message as one line without the key, which servers may repeat."""
  key = os.environ.get(provider.KEY, '').strip()
  return ' '.join((text.replace(key, '[key]') if key else text).split())


def _message(error: Any) -> str:
  body = error.body if isinstance(error.body, dict) else {}
  inner = body.get('error') if isinstance(body.get('error'), dict) else body
  return f'{inner.get("message") or error.message} {inner.get("code") or ""}'

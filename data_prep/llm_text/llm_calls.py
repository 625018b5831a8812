"""What every call to a provider needs: settings, one judgement of errors, reading a reply."""

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

# Of a longer wait that a server asks for, only these seconds are waited.
MAX_RETRY_AFTER = 120.0
RETRIED = (408, 409, 425, 429)  # And all from 500 on.
_NO_CREDIT = re.compile('insufficient_quota|credit balance|billing', re.IGNORECASE)


@dataclasses.dataclass
class Settings:
  """What is asked of which server.

  Attributes:
    backend: `openai` or `anthropic`.
    model: as the provider calls it.
    parameters: fields of the request that shape the answer.
    base_url: of another server that speaks the same language; None: the provider's.
    timeout: seconds that a reply may take.
    refused: optional fields that the server does not take; found out in the run.
  """

  backend: str
  model: str
  parameters: dict[str, Any]
  base_url: str | None = None
  timeout: float = 120.0
  refused: set[str] = dataclasses.field(default_factory=set)


class Batch(NamedTuple):
  """How far a batch is; `error`: why the provider did not take it."""

  is_ended: bool
  num_done: int
  error: str = ''
  files: tuple[str, ...] = ()


class Answer(NamedTuple):
  """A text that can be used, and the tokens it took: input, output."""

  text: str
  tokens: tuple[int, int]


class Rejected(Exception):
  """A request that the server or the model does not answer, however often it is asked.

  Attributes:
    reason: for the user.
    tokens: that it took nevertheless.
  """

  def __init__(self, reason: str, tokens: tuple[int, int] = (0, 0)):
    super().__init__(reason)
    self.reason = reason
    self.tokens = tokens


class BadRequest(Rejected):
  """The server does not take the request."""


class Unusable(Rejected):
  """An answer that is paid but no text; asking again may help."""


class Unanswered(Exception):
  """A request to send again.

  Attributes:
    reason: for the user.
    wait: seconds that the server asks for, None where it says nothing.
    is_from_server: whether a server sent this, rather than nobody.
    may_cost: whether an answer may have been written, and paid, that never arrived.
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
  """The server does not take an optional field of the request, which is now left out."""


def find_key(provider: ModuleType, settings: Settings) -> str:
  """Returns the key of the provider, after a look at everything that can be wrong without a call.

  Raises:
    InputError: the SDK is not installed, the key is not in the environment, or the address is none.
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
  return key or 'none'  # Local servers want some word.


def connect(provider: ModuleType, settings: Settings) -> Any:
  """Returns the SDK's client; raises as `find_key`."""
  return provider.client(find_key(provider, settings), settings.base_url, settings.timeout)


def read(provider: ModuleType, reply: Any, estimate: tuple[int, int]) -> Answer:
  """Takes the text out of a reply.

  Args:
    provider: whose reply it is.
    reply: its body.
    estimate: (input, output) tokens to assume where the reply does not say.

  Raises:
    Rejected, Unusable: there is no text to use, and why.
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
  """Turns an SDK's error into what to do about it.

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
  """Leaves out, from now on, the optional fields that the server complains of."""
  named = {
    field
    for field, words in provider.OPTIONAL.items()
    if any(word in message.lower() for word in words)
  }
  settings.refused |= named
  return bool(named)


def redact(text: str, provider: ModuleType) -> str:
  """One line without the key: servers may send it back."""
  key = os.environ.get(provider.KEY, '').strip()
  return ' '.join((text.replace(key, '[key]') if key else text).split())


def _message(error: Any) -> str:
  body = error.body if isinstance(error.body, dict) else {}
  inner = body.get('error') if isinstance(body.get('error'), dict) else body
  return f'{inner.get("message") or error.message} {inner.get("code") or ""}'

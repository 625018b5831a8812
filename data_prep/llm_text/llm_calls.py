"""Shared parts of all calls to a provider: settings, errors, reading replies."""

import base64
import dataclasses
import importlib
import os
import urllib.parse
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from data_prep import retry_after
from data_prep.llm_text import llm_http, prompts
from ur4rec_jax.errors import InputError, ReportedError

# Longest wait in seconds when a server asks for one.
MAX_RETRY_AFTER = 120.0
RETRIED = (408, 409, 425, 429)  # Every status from 500 on is retried, too.
# Codes by which providers say that the account has no money left, in lower case.
_NO_CREDIT_CODES = frozenset(
  (
    'account_deactivated',
    'arrearage',
    'billing_error',
    'billing_hard_limit_reached',
    'billing_not_active',
    'exceeded_current_quota_error',
    'insufficient_balance',
    'insufficient_credits',
    'insufficient_quota',
  )
)
# Anthropic says so in words only, with status 400.
_NO_CREDIT_WORDS = 'credit balance is too low'
_MOST_TOKENS = 10**9  # No reply has more; a larger number is nonsense.
# Shorter "keys", such as `none` or `ollama`, are no secrets and may be words of a text.
_SHORTEST_SECRET = 8


@dataclasses.dataclass
class Settings:
  """The server, the model and the parameters of requests.

  Attributes:
    backend: `openai`, `anthropic`, `local` or `mock`.
    model: the provider's name of the model.
    parameters: fields of the request that shape the answer.
    base_url: another server with the same API; None for the provider's.
    timeout: seconds to wait for a whole reply.
    refused: optional fields that the server has refused during the run.
  """

  backend: str
  model: str
  parameters: dict[str, Any]
  base_url: str | None = None
  timeout: float = 120.0
  refused: set[str] = dataclasses.field(default_factory=set)

  @property
  def server(self) -> str:
    """Name of the server for messages: without a password or query in its address."""
    if not self.base_url:
      return f'the {self.backend} API'
    url = urllib.parse.urlsplit(self.base_url)
    return url._replace(netloc=url.netloc.rpartition('@')[2], query='', fragment='').geturl()

  @property
  def login(self) -> tuple[str, str] | None:
    """User and password in the address of the server, if there are any."""
    url = urllib.parse.urlsplit(self.base_url or '')
    if '@' not in url.netloc:
      return None
    return urllib.parse.unquote(url.username or ''), urllib.parse.unquote(url.password or '')


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
  """The server refuses the request.

  Attributes:
    way_out: what to correct if the server refuses all requests like this.
    is_about_access: whether it refuses the key, the model or the address, so that no request can
      succeed if none has succeeded yet.
  """

  def __init__(self, reason: str, way_out: str, is_about_access: bool = False):
    super().__init__(reason)
    self.way_out = way_out
    self.is_about_access = is_about_access


class Unusable(Rejected):
  """An answer without a usable text; it is paid, and another try may help."""


class Unanswered(Exception):
  """A request that got no answer and should be sent again.

  Attributes:
    reason: message for the user.
    wait: seconds that the server asks to wait; None if it does not say.
    is_from_server: whether a server has replied at all.
    may_cost: whether an answer may have been paid that never arrived.
    tokens: (input, output) tokens of unusable answers that were paid before.
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
    self.tokens = (0, 0)


class RefusedField(Exception):
  """The server refuses an optional field; further requests leave it out."""


def find_key(provider: ModuleType, settings: Settings) -> str:
  """Returns the API key, after all checks that need no request.

  Raises:
    InputError: the SDK is not installed, the key is not in the environment, or --base_url is no
      address.
  """
  try:
    importlib.import_module(provider.SDK)
  except ImportError as error:
    raise InputError(
      f"--backend={provider.NAME} needs the {provider.SDK} package: pip install 'ur4rec-jax[llm]'"
      f' or pip install {provider.SDK}'
    ) from error
  if settings.base_url and not _is_address(settings.base_url):
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
  key = find_key(provider, settings)
  sdk = importlib.import_module(provider.SDK)
  return provider.client(
    key,
    # Without the password, since HTTP libraries log addresses.
    settings.server if settings.base_url else None,
    settings.timeout,
    llm_http.make_client(sdk, settings.timeout, settings.login),
  )


def secrets(provider: ModuleType, settings: Settings) -> list[str]:
  """Returns the key and passwords that a server sees and may repeat, in all their spellings."""
  found = [os.environ.get(provider.KEY, '').strip()]
  if settings.login:
    login = ':'.join(settings.login)
    raw = urllib.parse.urlsplit(settings.base_url or '').password or ''
    found += [base64.b64encode(login.encode()).decode(), login, raw, settings.login[1]]
  return [secret for secret in found if len(secret) >= _SHORTEST_SECRET]


def redact(text: str, secrets: list[str]) -> str:
  """Formats a message as one line without secrets, which servers may repeat."""
  for secret in secrets:
    text = text.replace(secret, '[key]')
  return ' '.join(text.split())


def read(provider: ModuleType, reply: Any, estimate: tuple[int, int], secrets: list[str]) -> Answer:
  """Reads the text and the tokens of a reply.

  Args:
    provider: module of the provider.
    reply: body of the reply.
    estimate: (input, output) tokens to assume if the reply has none or nonsense.
    secrets: see `secrets`; the text does not repeat them.

  Raises:
    Rejected: the answer was refused, filtered or cut off.
    Unusable: the reply holds no usable text.
  """
  try:
    tokens = provider.tokens(reply)
    if not all(0 <= count <= _MOST_TOKENS for count in tokens):
      tokens = estimate
  except (LookupError, TypeError, ValueError, OverflowError):
    tokens = estimate
  try:
    return Answer(prompts.parse_answer(provider.content(reply), secrets), tokens)
  except Rejected as error:
    raise Rejected(error.reason, tokens) from None
  except ValueError as error:
    raise Unusable(redact(f'unusable answer: {error}', secrets), tokens) from None
  except (LookupError, TypeError, AttributeError):
    raise Unusable('unusable answer: not a reply of this API', tokens) from None


def judge(
  error: Exception,
  provider: ModuleType,
  settings: Settings,
  body: Mapping[str, Any] | None = None,
) -> Exception:
  """Converts an error of the SDK into the error that says what to do.

  Args:
    error: what the SDK has raised, or the deadline of the reply.
    provider: module of the provider.
    settings: of the run; optional fields that the server refuses are added to `refused`.
    body: fields of the request; None for a batch of requests.

  Returns:
    `Unanswered`, `RefusedField`, `Rejected`, or an `InputError` that ends the run.
  """
  sdk = importlib.import_module(provider.SDK)
  if isinstance(error, (ReportedError, Rejected, Unanswered)):
    return error
  if isinstance(error, sdk.APIStatusError):
    return _judge_status(error, provider, settings, body)
  cause = error if isinstance(error, llm_http.BadReply) else error.__cause__
  if isinstance(cause, llm_http.BadReply):
    return Unusable(str(cause)) if cause.is_too_large else Unanswered(str(cause), may_cost=True)
  if isinstance(error, (TimeoutError, sdk.APITimeoutError)):
    was_sent = not type(cause).__name__.startswith('Connect')
    reason = f'no whole reply in {settings.timeout:g} s'
    return Unanswered(reason, is_from_server=False, may_cost=was_sent)
  if isinstance(error, (sdk.APIConnectionError, *llm_http.transport_errors(sdk))):
    was_sent = not type(cause).__name__.startswith('Connect')
    return Unanswered('the connection broke', is_from_server=False, may_cost=was_sent)
  if isinstance(
    error, (sdk.APIError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
  ):
    return Unanswered('the reply is not one of this API', may_cost=True)
  return error


def _judge_status(
  error: Any, provider: ModuleType, settings: Settings, body: Mapping[str, Any] | None
) -> Exception:
  """Judges a reply with an HTTP status from 300 on."""
  status = error.status_code
  hidden = secrets(provider, settings)
  message, codes = _message(error)
  message = redact(message, hidden)
  server = settings.server
  if status == 402 or codes & _NO_CREDIT_CODES or (status == 400 and _NO_CREDIT_WORDS in message):
    return InputError(f'{server} wants to be paid first: {message[:500]}')
  reason = f'the server answers {status}'
  if status in RETRIED or status >= 500:
    asked = error.response.headers.get('retry-after', '')
    return Unanswered(reason, retry_after.seconds_to_wait(asked, MAX_RETRY_AFTER))
  if status == 401:
    return InputError(
      f'{server} does not accept the key in {provider.KEY} ({status}): {message[:500]}'
    )
  if status in (400, 422) and refuse(message, provider, settings, body):
    return RefusedField(message)
  reason = f'{reason}: {message[:200]}'
  if status < 400:
    return BadRequest(reason, 'it sends requests elsewhere: correct --base_url', True)
  if status == 403:
    return BadRequest(reason, f'check what the key in {provider.KEY} is allowed to use', True)
  if status == 404:
    return BadRequest(reason, f'check --model={settings.model} and --base_url', True)
  return BadRequest(reason, 'correct --parameters, --max_output_tokens or --model')


def refuse(
  message: str,
  provider: ModuleType,
  settings: Settings,
  body: Mapping[str, Any] | None = None,
) -> bool:
  """Drops optional fields named in an error from further requests.

  Returns:
    Whether the error names any that the request had; all named ones count without a `body`.
  """
  named = {
    field
    for field, words in provider.OPTIONAL.items()
    if any(word in message.lower() for word in words) and (body is None or field in body)
  }
  settings.refused |= named
  return bool(named)


def _is_address(text: str) -> bool:
  try:
    url = urllib.parse.urlsplit(text)
    return url.scheme in ('http', 'https') and bool(url.hostname) and url.port != 0
  except ValueError:  # The port is no number, or brackets do not match.
    return False


def _message(error: Any) -> tuple[str, frozenset[str]]:
  """Returns the message of an error and its codes in lower case."""
  body = error.body if isinstance(error.body, dict) else {}
  inner = body.get('error')
  inner = inner if isinstance(inner, dict) else body
  codes = [str(inner[name]) for name in ('code', 'type') if inner.get(name)]
  message = f'{inner.get("message") or error.message} {inner.get("code") or ""}'
  return message, frozenset(code.lower() for code in codes)

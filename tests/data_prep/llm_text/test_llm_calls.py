"""What an error of a provider means, and what a message may say."""

import importlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.robustness import llm_server
from data_prep.llm_text import llm_calls
from data_prep.llm_text.llm_calls import BadRequest, Settings, Unanswered
from tests.helpers.llm_runs import PROVIDERS
from ur4rec_jax.errors import InputError

BACKENDS = pytest.mark.parametrize('backend', tuple(PROVIDERS))
WORDS = (
  'Too many requests a minute; a payment method raises the limit: /account/billing',
  'You have exceeded your current quota of tokens a minute',
  'Your input was flagged by moderation',
  'insufficient funds in the story',
  '',
)
CODES = ('rate_limit_exceeded', 'invalid_request_error', 'requests', None, 429)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
  for provider in PROVIDERS.values():
    monkeypatch.setenv(provider.KEY, llm_server.KEY)


def judged(backend, status, message, code=None, kind=None, headers=None, base_url='http://h/v1'):
  sdk = importlib.import_module(backend)
  http = importlib.import_module(sdk.DefaultAsyncHttpxClient.__mro__[1].__module__.split('.')[0])
  request = http.Request('POST', 'http://h/v1')
  error = {'message': message, 'code': code, 'type': kind}
  reply = http.Response(status, headers=headers, request=request)
  raised = sdk.APIStatusError('failed', response=reply, body={'error': error})
  run = Settings(backend, 'some-model', {}, base_url)
  return llm_calls.judge(raised, PROVIDERS[backend], run, {'model': 'some-model'})


@BACKENDS
@settings(max_examples=100)
@given(
  status=st.integers(300, 599),
  words=st.sampled_from(WORDS) | st.text(max_size=40),
  code=st.sampled_from(CODES),
  wait=st.sampled_from([None, '1', '0.5', 'nan', '-1', '1e999', 'soon', '99999999']),
)
def test_a_status_is_judged_by_its_number_and_not_by_its_words(backend, status, words, code, wait):
  found = judged(backend, status, words, code, headers={'retry-after': wait} if wait else None)
  if status in (408, 409, 425, 429) or status >= 500:
    assert isinstance(found, Unanswered)
    seconds = {'1': 1.0, '0.5': 0.5, '99999999': llm_calls.MAX_RETRY_AFTER}
    assert found.wait == seconds.get(wait)
    assert not found.may_cost
  elif status in (401, 402):
    assert isinstance(found, InputError)
    assert ('paid first' in str(found)) == (status == 402)
  else:
    assert isinstance(found, BadRequest)
    assert found.is_about_access == (status in (403, 404) or status < 400)
    assert found.reason.startswith(f'the server answers {status}')
    assert found.tokens == (0, 0)


@BACKENDS
@pytest.mark.parametrize('status', [400, 403, 429, 500])
@pytest.mark.parametrize('code', sorted(llm_calls._NO_CREDIT_CODES))
def test_a_code_for_an_empty_account_ends_the_run(backend, status, code):
  for named in ({'code': code}, {'kind': code.upper()}):
    found = judged(backend, status, 'no money', headers={'retry-after': '1'}, **named)
    assert isinstance(found, InputError)
    assert 'wants to be paid first' in str(found)


def test_anthropic_says_in_words_that_an_account_is_empty():
  words = 'Your credit balance is too low to access the Anthropic API.'
  found = judged('anthropic', 400, words, kind='invalid_request_error')
  assert isinstance(found, InputError)
  assert isinstance(judged('anthropic', 429, words), Unanswered)


@BACKENDS
def test_a_field_is_refused_only_where_it_was_sent(backend):
  provider = PROVIDERS[backend]
  (field, words), *_ = provider.OPTIONAL.items()
  run = Settings(backend, 'm', {})
  assert not llm_calls.refuse(words[0], provider, run, {'model': 'm'})
  assert not run.refused
  assert llm_calls.refuse(words[0], provider, run, {field: 1})
  assert run.refused == {field}


@BACKENDS
@pytest.mark.parametrize(
  'usage', ['1e999', '-1e999', '-5', '1e30', 'NaN', 'null', '"x"', '[]', '{}', 'true']
)
def test_nonsense_tokens_are_estimated(backend, usage):
  reply_of = {'openai': llm_server.chat_reply, 'anthropic': llm_server.message_reply}[backend]
  body = {'model': 'm', 'messages': [{'content': 'x'}]}
  reply = reply_of(body, 'A film.', '')
  for name in reply['usage']:
    reply['usage'][name] = json.loads(usage)
  answer = llm_calls.read(PROVIDERS[backend], reply, (7, 8), [])
  assert answer == llm_calls.Answer('A film.', (1, 1) if usage == 'true' else (7, 8))


PASSWORD = 'p%40ss-w0rd-canary'


@BACKENDS
@pytest.mark.parametrize('status', [301, 400, 401, 402, 403, 404])
def test_a_password_in_the_address_is_not_repeated(backend, status):
  url = f'https://me:{PASSWORD}@proxy.example:8443/v1?api-key=query-canary'
  plain = 'p@ss-w0rd-canary'
  said = f'{PASSWORD} {plain} {llm_server.KEY} bWU6cEBzcy13MHJkLWNhbmFyeQ=='
  found = judged(backend, status, said, base_url=url)
  message = f'{found} {getattr(found, "way_out", "")}'
  assert 'canary' not in message
  assert 'bWU6' not in message
  assert llm_server.KEY not in message
  run = Settings(backend, 'm', {}, url)
  assert run.server == 'https://proxy.example:8443/v1'
  assert run.login == ('me', plain)


@BACKENDS
@pytest.mark.parametrize(
  'url', ['localhost:8000', 'ftp://h', 'http://', 'http://h:port', 'http://h:99999', 'http://[::1']
)
def test_what_is_no_address_is_said(backend, url):
  with pytest.raises(InputError, match='--base_url must be an address'):
    llm_calls.find_key(PROVIDERS[backend], Settings(backend, 'm', {}, url))


def test_short_keys_of_local_servers_are_words_and_no_secrets(monkeypatch):
  for key, found in (('none', []), ('ollama', []), ('sk-12345', ['sk-12345'])):
    monkeypatch.setenv('OPENAI_API_KEY', key)
    assert llm_calls.secrets(PROVIDERS['openai'], Settings('openai', 'm', {})) == found

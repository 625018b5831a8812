"""Chat Completions and the Batch API of OpenAI, and servers that speak the former (vLLM, Ollama).

The same functions as in llm_anthropic.py; nothing else knows what a provider's messages look like.
"""

from pathlib import Path
from typing import Any

from data_prep.llm_text import prompts
from data_prep.llm_text.llm_calls import Batch, Rejected, Settings

NAME = SDK = 'openai'  # Of the backend, and of the package that speaks to it.
KEY = 'OPENAI_API_KEY'
DEFAULT_MODEL = 'gpt-6-luna'
# A short text needs no reasoning, whose tokens are paid like the answer's.
PARAMETERS = {'max_completion_tokens': 1000, 'reasoning_effort': 'none'}
MAX_OUTPUT = 'max_completion_tokens'
# What some servers and models refuse, and the words by which they say so.
OPTIONAL = {
  'response_format': ('response_format', 'json_schema', 'structured output'),
  'reasoning_effort': ('reasoning',),
  'max_completion_tokens': ('max_completion_tokens',),
}
BATCH_REQUESTS, BATCH_BYTES = 50_000, 200_000_000
_ENDPOINT = '/v1/chat/completions'
_TAG = 'generate_text'
_UNDER_WAY = ('validating', 'in_progress', 'finalizing', 'cancelling')


def client(key: str, base_url: str | None, timeout: float, http_client: Any) -> Any:
  """Creates the SDK's client; its own retries are off, because `llm_online` retries."""
  import openai

  return openai.AsyncOpenAI(
    api_key=key, base_url=base_url, timeout=timeout, max_retries=0, http_client=http_client
  )


def body(prompt: prompts.Prompt, settings: Settings) -> dict[str, Any]:
  """Returns the body of a request without fields that the server has refused."""
  schema = {'name': 'text', 'strict': True, 'schema': prompts.SCHEMA}
  fields = {
    'model': settings.model,
    'messages': [
      {'role': 'system', 'content': prompt.system},
      {'role': 'user', 'content': prompt.text},
    ],
    'response_format': {'type': 'json_schema', 'json_schema': schema},
    **settings.parameters,
  }
  if MAX_OUTPUT in settings.refused:  # Older servers know only the old name of the field.
    fields['max_tokens'] = fields[MAX_OUTPUT]
  return {name: value for name, value in fields.items() if name not in settings.refused}


async def send(client: Any, body: dict[str, Any]) -> str:
  """Sends a request and returns the body of the reply."""
  named = {'model': body['model'], 'messages': body['messages']}
  others = {name: value for name, value in body.items() if name not in named}
  reply = await client.chat.completions.with_raw_response.create(**named, extra_body=others)
  return reply.text


def content(reply: dict[str, Any]) -> str:
  """Returns the text of a reply; Rejected if it is refused, filtered or cut off."""
  choice = reply['choices'][0]
  if choice['message'].get('refusal'):
    raise Rejected('refused')
  if choice.get('finish_reason') == 'content_filter':
    raise Rejected('filtered by the provider')
  if choice.get('finish_reason') == 'length':
    raise Rejected('cut off at the limit of output tokens')
  text = choice['message'].get('content') or ''
  if isinstance(text, list):  # Some servers send parts, and reasoning as a part of its own.
    text = ''.join(part['text'] for part in text if part['type'] == 'text')
  return text


def tokens(reply: dict[str, Any]) -> tuple[int, int]:
  """Returns the paid (input, output) tokens."""
  return int(reply['usage']['prompt_tokens']), int(reply['usage']['completion_tokens'])


def batch_line(key: str, body: dict[str, Any]) -> dict[str, Any]:
  """Returns the line of a request in a batch."""
  return {'custom_id': key, 'method': 'POST', 'url': _ENDPOINT, 'body': body}


async def create_batch(client: Any, requests: Path, tag: str) -> str:
  """Uploads the requests, starts a batch and returns its id."""
  file = await client.files.create(file=requests, purpose='batch')
  batch = await client.batches.create(
    input_file_id=file.id,
    endpoint=_ENDPOINT,
    completion_window='24h',
    metadata={_TAG: tag},
  )
  return batch.id


async def find_batches(client: Any, tag: str, since: float, num_requests: int) -> list[str]:
  """Returns the ids of batches with the tag; [] if the provider has none."""
  del num_requests
  found = []
  async for batch in client.batches.list(limit=100):
    if (batch.metadata or {}).get(_TAG) == tag:
      found.append(batch.id)
    if batch.created_at < since - 3600:  # Newest first.
      break
  return found


async def poll_batch(client: Any, batch_id: str) -> Batch:
  """Returns the progress of a batch."""
  batch = await client.batches.retrieve(batch_id)
  counts = batch.request_counts
  errors = (batch.errors.data if batch.errors else None) or []
  return Batch(
    is_ended=batch.status not in _UNDER_WAY,
    num_done=counts.completed + counts.failed if counts else 0,
    error='; '.join(str(error.message) for error in errors) if batch.status == 'failed' else '',
    files=tuple(file for file in (batch.output_file_id, batch.error_file_id) if file),
  )


def result_sources(batch: Batch, batch_id: str) -> tuple[str, ...]:
  """Returns the names under which `open_results` finds the results of a batch."""
  del batch_id
  return batch.files


def open_results(client: Any, source: str, headers: dict[str, str]) -> Any:
  """Requests results: an asynchronous context of the reply, with a line of JSON a request."""
  return client.files.with_streaming_response.content(source, extra_headers=headers)


def read_result(line: dict[str, Any]) -> dict[str, Any]:
  """Returns `key` and `reply` of a line, or `key`, `error` and `status` of a failed request."""
  response = line.get('response') or {}
  status = response.get('status_code')
  if line.get('error') or status != 200:
    error = line.get('error') or (response.get('body') or {}).get('error') or {}
    reason = error.get('message') or error.get('code') or 'failed in the batch'
    return {'key': line['custom_id'], 'error': reason, 'status': status}
  return {'key': line['custom_id'], 'reply': response['body']}

"""Anthropic's Messages API and Message Batches, with the same functions as llm_openai.py."""

import json
from pathlib import Path
from typing import Any

from data_prep.llm_text import prompts
from data_prep.llm_text.llm_calls import Batch, Rejected, Settings

NAME = SDK = 'anthropic'
KEY = 'ANTHROPIC_API_KEY'
DEFAULT_MODEL = 'claude-haiku-5-5'
# Thinking is off: a short text does not need it, and its tokens cost as much as the answer's.
PARAMETERS = {'max_tokens': 1000, 'thinking': {'type': 'disabled'}}
MAX_OUTPUT = 'max_tokens'
OPTIONAL = {
  'output_config': ('output_config', 'output_format', 'json_schema', 'structured output'),
  'thinking': ('thinking',),
}
BATCH_REQUESTS, BATCH_BYTES = 100_000, 256_000_000


def client(key: str, base_url: str | None, timeout: float, http_client: Any) -> Any:
  """Creates the SDK's client; its own retries are off, because `llm_online` retries."""
  import anthropic

  return anthropic.AsyncAnthropic(
    api_key=key, base_url=base_url, timeout=timeout, max_retries=0, http_client=http_client
  )


def body(prompt: prompts.Prompt, settings: Settings) -> dict[str, Any]:
  """Returns the body of a request without fields that the server has refused."""
  fields = {
    'model': settings.model,
    'system': prompt.system,
    'messages': [{'role': 'user', 'content': prompt.text}],
    'output_config': {'format': {'type': 'json_schema', 'schema': prompts.SCHEMA}},
    **settings.parameters,
  }
  return {name: value for name, value in fields.items() if name not in settings.refused}


async def send(client: Any, body: dict[str, Any]) -> str:
  """Sends a request and returns the body of the reply."""
  named = {name: body[name] for name in ('model', 'messages', 'max_tokens')}
  others = {name: value for name, value in body.items() if name not in named}
  reply = await client.messages.with_raw_response.create(**named, extra_body=others)
  return await reply.text()


def content(reply: dict[str, Any]) -> str:
  """Returns the text of a reply; Rejected if it is refused or cut off."""
  if reply.get('stop_reason') == 'refusal':
    raise Rejected('refused')
  if reply.get('stop_reason') in ('max_tokens', 'model_context_window_exceeded'):
    raise Rejected('cut off at the limit of output tokens')
  return ''.join(block['text'] for block in reply['content'] if block['type'] == 'text')


def tokens(reply: dict[str, Any]) -> tuple[int, int]:
  """Returns the paid (input, output) tokens."""
  usage = reply['usage']
  cached = ('cache_creation_input_tokens', 'cache_read_input_tokens')
  return (
    int(usage['input_tokens']) + sum(int(usage.get(name) or 0) for name in cached),
    int(usage['output_tokens']),
  )


def batch_line(key: str, body: dict[str, Any]) -> dict[str, Any]:
  """Returns the line of a request in a batch."""
  return {'custom_id': key, 'params': body}


async def create_batch(client: Any, requests: Path, tag: str) -> str:
  """Starts a batch of the requests and returns its id."""
  del tag  # The API has no place for it.
  with requests.open(encoding='utf-8') as file:
    batch = await client.messages.batches.create(requests=[json.loads(line) for line in file])
  return batch.id


async def find_batches(client: Any, tag: str, since: float, num_requests: int) -> list[str]:
  """Returns the ids of newer batches with the same number of requests."""
  del tag
  found = []
  async for batch in client.messages.batches.list(limit=100):
    if batch.created_at.timestamp() < since - 300:  # Newest first; clocks differ.
      break
    if sum(batch.request_counts.model_dump().values()) == num_requests:
      found.append(batch.id)
  return found


async def poll_batch(client: Any, batch_id: str) -> Batch:
  """Returns the progress of a batch."""
  batch = await client.messages.batches.retrieve(batch_id)
  counts = batch.request_counts
  return Batch(
    is_ended=batch.processing_status == 'ended',
    num_done=counts.succeeded + counts.errored + counts.canceled + counts.expired,
  )


def result_sources(batch: Batch, batch_id: str) -> tuple[str, ...]:
  """Returns the names under which `open_results` finds the results of a batch."""
  del batch
  return (batch_id,)


def open_results(client: Any, source: str, headers: dict[str, str]) -> Any:
  """Requests results: an asynchronous context of the reply, with a line of JSON a request."""
  return client.messages.batches.with_streaming_response.results(source, extra_headers=headers)


def read_result(line: dict[str, Any]) -> dict[str, Any]:
  """Returns `key` and `reply` of a line, or `key`, `error` and `status` of a failed request."""
  result = line['result']
  if result['type'] == 'succeeded':
    return {'key': line['custom_id'], 'reply': result['message']}
  if result['type'] == 'errored':
    error = result['error']['error']
    status = 400 if error['type'] == 'invalid_request_error' else None
    return {'key': line['custom_id'], 'error': error['message'], 'status': status}
  return {'key': line['custom_id'], 'error': result['type'], 'status': None}

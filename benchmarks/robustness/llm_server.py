"""A server that speaks the wire formats of OpenAI and Anthropic, with faults, and keeps count.

What happens to the n-th request about an input follows from the seed, the input and n. Words in an
input ask for an answer of a kind: [refuse], [filter], [length], [empty], [huge], [broken]. With
[status 418], the first request about an input is answered with that status.

  python benchmarks/robustness/llm_server.py --port=8123 --rate_limit=0.1 --error=0.05
"""

import argparse
import collections
import dataclasses
import email.parser
import email.policy
import hashlib
import http.server
import json
import random
import re
import threading
import time
from typing import Any

KEY = 'test-key-1'
MODELS = ('gpt-6-luna', 'claude-haiku-5-5', 'local')


@dataclasses.dataclass
class Faults:
  """Shares of requests, and how batches go.

  Attributes:
    rate_limit: answered 429, with a short Retry-After.
    error: answered 500.
    drop: not answered, the connection closed.
    malformed: half of them half a reply, half of them an answer that is half an object.
    seed: chooses among requests.
    requests_per_minute: above, every request is answered 429.
    retry_after: of a 429.
    latency: seconds an answer takes.
    output_tokens: that an answer is said to have.
    refused: fields of a request that are answered 400.
    batches: what happens to the first, second, ... batch: `ok`, `partly` failed, `expired`,
      `failed` as a whole, `unnoticed` (made, but the reply is dropped), `bad` (every line 400).
    polls: looks at a batch until it has ended.
  """

  rate_limit: float = 0.0
  error: float = 0.0
  drop: float = 0.0
  malformed: float = 0.0
  seed: int = 0
  requests_per_minute: float | None = None
  retry_after: float = 0.05
  latency: float = 0.0
  output_tokens: int = 40
  refused: tuple[str, ...] = ()
  batches: tuple[str, ...] = ()
  polls: int = 1


class LlmServer(http.server.ThreadingHTTPServer):
  """Counts, by input, and by what it answered.

  Attributes:
    faults: may be changed while it runs.
    arrivals: (time, input, outcome) of each request, batches' too; the outcome is `answer` or a
      fault.
    key: that it accepts.
    num_requests: of every kind, looks at batches too.
    bodies: of all requests, where `keep_bodies` is set.
  """

  daemon_threads = True
  request_queue_size = 256

  def __init__(self, faults: Faults | None = None, port: int = 0, keep_bodies: bool = False):
    super().__init__(('127.0.0.1', port), _Handler)
    self.faults = faults or Faults()
    self.keep_bodies = keep_bodies
    self.key = KEY
    self.num_requests = 0
    self.arrivals: list[tuple[float, str, str]] = []
    self.bodies: list[bytes] = []
    self.files: dict[str, bytes] = {}
    self.batches: dict[str, dict[str, Any]] = {}
    self.lock = threading.Lock()
    self._seen: collections.Counter[str] = collections.Counter()
    self._tokens, self._filled = 2.0, time.monotonic()

  def handle_error(self, request, client_address):
    pass  # A killed client breaks its connections off.

  def __enter__(self):
    threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
    return self

  def __exit__(self, *args):
    self.shutdown()
    self.server_close()

  @property
  def url(self) -> str:
    """Address without a path."""
    return f'http://127.0.0.1:{self.server_port}'

  def outcomes(self) -> collections.Counter[str]:
    """How often each outcome was."""
    return collections.Counter(outcome for _, _, outcome in self.arrivals)

  def answers(self) -> collections.Counter[str]:
    """How often each input was answered."""
    return collections.Counter(name for _, name, outcome in self.arrivals if outcome == 'answer')

  def choose(self, name: str) -> str:
    """What happens to a request, written down."""
    faults = self.faults
    with self.lock:
      self._seen[name] += 1
      now = time.monotonic()
      if faults.requests_per_minute:
        rate = faults.requests_per_minute / 60
        self._tokens = min(max(2.0, rate * 0.5), self._tokens + (now - self._filled) * rate)
        self._filled = now
      chance = random.Random(f'{faults.seed} {name} {self._seen[name]}').random()
      outcome = 'answer'
      for fault in ('rate_limit', 'error', 'drop', 'malformed'):
        if 0 <= chance < getattr(faults, fault):
          outcome = fault
        chance -= getattr(faults, fault)
      if faults.requests_per_minute:
        if self._tokens < 1:
          outcome = 'over the limit'
        else:
          self._tokens -= 1
      self.arrivals.append((time.time(), name, outcome))
    return outcome


def input_name(user_text: str) -> str:
  """Name of an input in the counts."""
  return hashlib.sha256(user_text.encode()).hexdigest()[:16]


def user_text(body: dict[str, Any]) -> str:
  """The data part of a request, of either provider."""
  return body['messages'][-1]['content']


def written(text: str) -> tuple[str, str]:
  """(answer, kind of end) that an input gets."""
  for word, answer in (
    ('[empty]', ''),
    ('[huge]', json.dumps({'text': 'long ' * 200_000})),
    ('[broken]', '{"text": "half an ans'),
  ):
    if word in text:
      return answer, 'stop'
  for word in ('refuse', 'filter', 'length'):
    if f'[{word}]' in text:
      return '{"text": "half of', word
  return json.dumps(
    {'text': f'A text about input {input_name(text)}. It has two sentences.'}
  ), 'stop'


def chat_reply(body: dict[str, Any], content: str, end: str, tokens: int = 40) -> dict[str, Any]:
  """A reply of Chat Completions."""
  message = {'role': 'assistant', 'content': content, 'refusal': None}
  if end == 'refuse':
    message |= {'content': None, 'refusal': 'I would rather not.'}
  reasons = {'filter': 'content_filter', 'length': 'length'}
  size = sum(len(m['content']) for m in body['messages']) // 4
  return {
    'id': 'chatcmpl-1',
    'object': 'chat.completion',
    'created': int(time.time()),
    'model': body['model'],
    'choices': [{'index': 0, 'message': message, 'finish_reason': reasons.get(end, 'stop')}],
    'usage': {'prompt_tokens': size, 'completion_tokens': tokens, 'total_tokens': size + tokens},
  }


def message_reply(body: dict[str, Any], content: str, end: str, tokens: int = 40) -> dict[str, Any]:
  """A reply of Messages."""
  reasons = {'filter': 'refusal', 'refuse': 'refusal', 'length': 'max_tokens'}
  return {
    'id': 'msg_1',
    'type': 'message',
    'role': 'assistant',
    'model': body['model'],
    'content': [{'type': 'text', 'text': content}] if content else [],
    'stop_reason': reasons.get(end, 'end_turn'),
    'stop_sequence': None,
    'usage': {'input_tokens': len(json.dumps(body)) // 4, 'output_tokens': tokens},
  }


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  server: LlmServer

  def log_message(self, *args):
    pass

  def parse_request(self):
    self.server.num_requests += 1
    return super().parse_request()

  def do_POST(self):
    length = int(self.headers.get('content-length', 0))
    content = self.rfile.read(length)
    if len(content) < length:  # The client was killed.
      self.close_connection = True
      return
    if self.server.keep_bodies:
      self.server.bodies.append(content)
    path = self.path.split('?')[0]
    if not self._is_known():
      return
    if path == '/v1/chat/completions':
      self._answer(json.loads(content), chat_reply)
    elif path == '/v1/messages':
      self._answer(json.loads(content), message_reply)
    elif path == '/v1/files':
      file = _multipart(self.headers['content-type'], content)
      name = f'file-{len(self.server.files)}'
      self.server.files[name] = file
      self._send(200, {'id': name, 'object': 'file', 'bytes': len(file), 'purpose': 'batch'})
    elif path == '/v1/batches':
      request = json.loads(content)
      lines = map(json.loads, self.server.files[request['input_file_id']].splitlines())
      self._make_batch(
        [(line['custom_id'], line['body']) for line in lines], request.get('metadata')
      )
    elif path == '/v1/messages/batches':
      requests = json.loads(content)['requests']
      self._make_batch([(line['custom_id'], line['params']) for line in requests], None)
    else:
      self._error(404, 'no such address')

  def do_GET(self):
    path = self.path.split('?')[0]
    parts = path.strip('/').split('/')
    if path == '/stats':
      self._send(200, {'arrivals': self.server.arrivals})
    elif not self._is_known():
      pass
    elif path in ('/v1/batches', '/v1/messages/batches'):
      shown = [self._shown(b) for b in reversed(self.server.batches.values())]
      self._send(200, {'object': 'list', 'data': shown, 'has_more': False})
    elif parts[-1] == 'content':
      self._send(200, self.server.files[parts[-2]])
    elif parts[-1] == 'results':
      self._send(200, self._results(self.server.batches[parts[-2]]))
    elif parts[-2] == 'batches' and parts[-1] in self.server.batches:
      batch = self.server.batches[parts[-1]]
      batch['polls'] += 1
      self._send(200, self._shown(batch))
    else:
      self._error(404, f'no {path}')

  def _is_known(self) -> bool:
    key = self.headers.get('x-api-key') or self.headers.get('authorization', '').split(' ')[-1]
    if key != self.server.key:
      self._error(401, f'Incorrect API key provided: {key}.')
    return key == self.server.key

  def _answer(self, body: dict[str, Any], reply):
    faults = self.server.faults
    if body['model'] not in MODELS:
      self._error(404, f'The model `{body["model"]}` does not exist.')
      return
    for field in faults.refused:
      if field in body:
        self._error(400, f"Unsupported parameter: '{field}' is not supported with this model.")
        return
    name = input_name(user_text(body))
    asked = re.search(r'\[status (\d{3})\]', user_text(body))
    if asked and not any(seen == name for _, seen, _ in self.server.arrivals):
      self.server.arrivals.append((time.time(), name, f'status {asked[1]}'))
      # The words are those of an empty account, which only a provider's code can mean.
      self._error(int(asked[1]), 'too fast; see your billing page', {'retry-after': '0.01'})
      return
    outcome = self.server.choose(name)
    if faults.latency:
      time.sleep(faults.latency)
    content, end = written(user_text(body))
    whole = reply(body, content, end, faults.output_tokens)
    if outcome in ('rate_limit', 'over the limit'):
      self._error(429, 'slow down', {'retry-after': str(faults.retry_after)})
    elif outcome == 'error':
      self._error(500, 'something broke')
    elif outcome == 'drop':
      self.close_connection = True
      self.connection.close()
    elif outcome == 'malformed' and len(self.server.arrivals) % 2:
      self._send(200, json.dumps(whole).encode()[:-20])
    elif outcome == 'malformed':
      self._send(200, reply(body, content[: len(content) // 2], end, faults.output_tokens))
    else:
      self._send(200, whole)

  def _make_batch(self, requests: list[tuple[str, dict]], metadata: dict | None):
    server = self.server
    number = len(server.batches)
    plan = server.faults.batches[number] if number < len(server.faults.batches) else 'ok'
    is_chat = metadata is not None
    batch = {
      'id': f'batch_{number}' if is_chat else f'msgbatch_{number}',
      'plan': plan,
      'requests': requests,
      'metadata': metadata,
      'polls': 0,
      'time': time.time(),
    }
    server.batches[batch['id']] = batch
    chooser = random.Random(f'{server.faults.seed} batch {number}')
    results = []
    for key, body in requests:
      text = user_text(body)
      fate = 'answer'
      refused = [field for field in server.faults.refused if field in body]
      if plan == 'failed':
        break
      if plan == 'bad' or refused:
        fate = 'bad'
      elif plan in ('partly', 'expired') and chooser.random() < 0.4:
        fate = plan
      server.arrivals.append((time.time(), input_name(text), fate))
      content, end = written(text)
      message = f'Unsupported parameter: {refused[0]}' if refused else 'this went wrong'
      if is_chat:
        results.append((key, fate, chat_reply(body, content, end), message))
      else:
        results.append((key, fate, message_reply(body, content, end), message))
    chooser.shuffle(results)
    batch['results'] = results
    if is_chat:
      self._write_files(batch)
    if plan == 'unnoticed':
      self.connection.close()
      self.close_connection = True
    else:
      self._send(200, self._shown(batch))

  def _write_files(self, batch: dict[str, Any]):
    output, errors = [], []
    for key, fate, reply, message in batch['results']:
      line = {'id': f'line-{key[:8]}', 'custom_id': key, 'response': None, 'error': None}
      if fate == 'answer':
        output.append(line | {'response': {'status_code': 200, 'body': reply}})
      elif fate == 'expired':
        errors.append(line | {'error': {'code': 'batch_expired', 'message': 'too late'}})
      else:
        status = 400 if fate == 'bad' else 500
        body = {'error': {'message': message, 'type': 'x'}}
        errors.append(line | {'response': {'status_code': status, 'body': body}})
    for name, lines in (('output_file_id', output), ('error_file_id', errors)):
      if lines:
        batch[name] = f'file-{len(self.server.files)}'
        content = ''.join(json.dumps(line) + '\n' for line in lines)
        self.server.files[batch[name]] = content.encode()

  def _shown(self, batch: dict[str, Any]) -> dict[str, Any]:
    is_ended = batch['polls'] >= self.server.faults.polls
    total = len(batch['requests'])
    fates = collections.Counter(fate for _, fate, _, _ in batch['results'])
    if batch['metadata'] is None:
      stamp = lambda seconds: time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(seconds))
      counts = dict.fromkeys(('succeeded', 'errored', 'canceled', 'expired'), 0)
      if is_ended:
        counts['succeeded'] = fates['answer']
        counts['expired'] = fates['expired']
        counts['errored'] = total - fates['answer'] - fates['expired']
      return {
        'id': batch['id'],
        'type': 'message_batch',
        'processing_status': 'ended' if is_ended else 'in_progress',
        'request_counts': {**counts, 'processing': 0 if is_ended else total},
        'created_at': stamp(batch['time']),
        'expires_at': stamp(batch['time'] + 86400),
        'ended_at': stamp(time.time()) if is_ended else None,
        'archived_at': None,
        'cancel_initiated_at': None,
        'results_url': f'{self.server.url}/v1/messages/batches/{batch["id"]}/results',
      }
    ends = {'failed': 'failed', 'expired': 'expired'}
    errors = [{'code': 'token_limit_exceeded', 'message': 'Enqueued token limit reached.'}]
    return {
      'id': batch['id'],
      'object': 'batch',
      'endpoint': '/v1/chat/completions',
      'completion_window': '24h',
      'created_at': int(batch['time']),
      'input_file_id': 'file-0',
      'metadata': batch['metadata'],
      'status': ends.get(batch['plan'], 'completed') if is_ended else 'in_progress',
      'request_counts': {'total': total, 'completed': fates['answer'], 'failed': 0},
      'output_file_id': batch.get('output_file_id') if is_ended else None,
      'error_file_id': batch.get('error_file_id') if is_ended else None,
      'errors': {'object': 'list', 'data': errors} if batch['plan'] == 'failed' else None,
    }

  def _results(self, batch: dict[str, Any]) -> bytes:
    lines = []
    for key, fate, reply, message in batch['results']:
      if fate == 'answer':
        result = {'type': 'succeeded', 'message': reply}
      elif fate == 'expired':
        result = {'type': 'expired'}
      else:
        kind = 'invalid_request_error' if fate == 'bad' else 'api_error'
        error = {'type': 'error', 'request_id': 'r', 'error': {'type': kind, 'message': message}}
        result = {'type': 'errored', 'error': error}
      lines.append(json.dumps({'custom_id': key, 'result': result}) + '\n')
    return ''.join(lines).encode()

  def _error(self, status: int, message: str, headers: dict[str, str] | None = None):
    self._send(status, {'type': 'error', 'error': {'message': message, 'type': 'x'}}, headers)

  def _send(self, status: int, content: Any, headers: dict[str, str] | None = None):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    kind = 'application/x-jsonl' if self.path.endswith(('content', 'results')) else None
    try:
      self.send_response(status)
      self.send_header('content-type', kind or 'application/json')
      self.send_header('content-length', str(len(body)))
      for name, value in (headers or {}).items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(body)
    except OSError:  # The client was killed.
      self.close_connection = True


def _multipart(content_type: str, content: bytes) -> bytes:
  head = f'content-type: {content_type}\r\n\r\n'.encode()
  parser = email.parser.BytesParser(policy=email.policy.HTTP)
  for part in parser.parsebytes(head + content).iter_parts():
    if part.get_filename():
      return part.get_payload(decode=True)
  raise ValueError('no file in the upload')


def main() -> None:
  """Serves until it is stopped."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--port', type=int, default=8123)
  for field in dataclasses.fields(Faults):
    if isinstance(field.default, (int, float)) or field.default is None:
      kind = int if isinstance(field.default, int) else float
      parser.add_argument(f'--{field.name}', type=kind, default=field.default)
  options = vars(parser.parse_args())
  server = LlmServer(port=options.pop('port'), faults=Faults(**options))
  print(server.url, flush=True)
  server.serve_forever()


if __name__ == '__main__':
  main()

"""Proves that no LLM server, however hostile, hangs generate_text, fills its memory or gets a key.

  python -m benchmarks.robustness.hostile_llm [--modes=drip,gzip_bomb] [--output=FILE.json]

Each mode is a way to misbehave. Most modes hit the first request about three of eight items; the
others hit all requests or the results of a batch. A run is right if it ends by its deadline with
the expected texts and exit code, within the memory limit, without a traceback, with every answer
that the server gave in the store, none paid twice, and the key in no file and no output. Exits with
1 if any run is wrong.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import gzip
import json
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from benchmarks.robustness import llm_server, text_generation
from data_prep import build_dataset

KEY = 'sk-canary-4f1d77ab02'
NUM_ITEMS, BAD = 8, (1, 4, 6)
MOST_MIB = 300
TEXT = 'A calm drama about people in a small town.'
_BOMB_BYTES = 400 << 20


@dataclasses.dataclass
class Mode:
  """A way to misbehave, and what is right.

  Attributes:
    act: answers a request: called with the handler and the right reply.
    hits: `some` items, `all` requests, or the results of a `batch`.
    is_answer: whether it gives a usable answer, which must not be requested again.
    stored: texts that are in the store at the end.
    exit_code: what the program ends with.
    seconds: deadline, from the first request to the end.
    flags: further flags of the program.
    stop: whether the program gets a SIGTERM after the first request.
  """

  act: Callable[['_Handler', Any], None]
  hits: str = 'some'
  is_answer: bool = False
  stored: int = NUM_ITEMS
  exit_code: int = 0
  seconds: float = 60.0
  flags: tuple[str, ...] = ('--timeout=5',)
  stop: bool = False


class HostileServer(llm_server.LlmServer):
  """An `LlmServer` with a mode.

  Attributes:
    mode: how it misbehaves.
    requests: number of requests by input.
    over: set when the run has ended.
    num_leaks: requests that arrived with the key where a redirect led to.
  """

  def __init__(self, mode: Mode):
    super().__init__()
    self.RequestHandlerClass = _Handler
    self.key, self.mode = KEY, mode
    self.requests: collections.Counter[str] = collections.Counter()
    self.over = threading.Event()
    self.num_leaks = self.num_downloads = 0


class _Handler(llm_server._Handler):
  server: HostileServer

  def do_POST(self):
    if self.path.startswith('/elsewhere'):
      self.server.num_leaks += KEY in str(self.headers)
    super().do_POST()

  def _answer(self, body, reply):
    text = llm_server.user_text(body)
    name = llm_server.input_name(text)
    mode = self.server.mode
    self.server.requests[name] += 1
    is_hit = mode.hits == 'some' and '[bad]' in text and self.server.requests[name] == 1
    if not (is_hit or mode.hits == 'all'):
      super()._answer(body, reply)
      return
    try:
      mode.act(self, reply(body, json.dumps({'text': TEXT}), 'stop'))
    except OSError:  # The client has had enough.
      self.close_connection = True

  def do_GET(self):
    is_results = self.path.split('?')[0].endswith(('content', 'results'))
    if self.server.mode.hits == 'batch' and is_results and self._is_known():
      name = self.path.split('?')[0].split('/')[-2]
      found = self.server.files.get(name) or self._results(self.server.batches[name])
      self.server.num_downloads += 1
      try:
        self.server.mode.act(self, found)
      except OSError:
        self.close_connection = True
    else:
      super().do_GET()

  def start(self, status: int = 200, **headers: str) -> None:
    """Begins a reply; the connection is closed after it."""
    self.send_response(status)
    self.send_header('content-type', 'application/json')
    self.send_header('connection', 'close')
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    self.close_connection = True

  def trickle(self, part: bytes, seconds: float = 0.2) -> None:
    """Repeats a part for ever, with pauses."""
    while not self.server.over.wait(seconds):
      self.wfile.write(part)


def _text(reply: dict[str, Any], text: Any) -> dict[str, Any]:
  """Replaces the text of a reply of either provider."""
  if 'choices' in reply:
    reply['choices'][0]['message']['content'] = text
  else:
    reply['content'] = [{'type': 'text', 'text': text}]
  return reply


def _says(text: Callable[[], Any]) -> Callable[[_Handler, Any], None]:
  return lambda handler, reply: handler._send(200, _text(reply, text()))


def _sends(content: Callable[[], bytes], status: int = 200, **headers: str) -> Callable:
  """A whole reply of given bytes."""

  def act(handler: _Handler, reply: Any) -> None:
    del reply
    body = content()
    handler.start(status, content_length=str(len(body)), **headers)
    handler.wfile.write(body)

  return act


def _usage(value: str) -> Callable[[_Handler, Any], None]:
  def act(handler: _Handler, reply: Any) -> None:
    reply['usage'] = dict.fromkeys(reply['usage'], '@')
    handler._send(200, json.dumps(reply).replace('"@"', value).encode())

  return act


def _never(handler: _Handler, reply: Any) -> None:
  del reply
  handler.close_connection = True
  handler.server.over.wait()


def _drip(handler: _Handler, reply: Any) -> None:
  del reply
  handler.start(transfer_encoding='chunked')
  handler.trickle(b'1\r\n \r\n')


def _drip_header(handler: _Handler, reply: Any) -> None:
  del reply
  handler.wfile.write(b'HTTP/1.1 200 OK\r\n')
  handler.close_connection = True
  handler.trickle(b'a: b\r\n')


def _drip_second_half(handler: _Handler, reply: Any) -> None:
  body = json.dumps(reply).encode()
  handler.start(content_length=str(len(body)))
  handler.wfile.write(body[:-100])
  for byte in body[-100:]:
    if handler.server.over.wait(1.0):
      return
    handler.wfile.write(bytes([byte]))


def _endless_interim(handler: _Handler, reply: Any) -> None:
  del reply
  handler.close_connection = True
  while not handler.server.over.is_set():
    handler.wfile.write(b'HTTP/1.1 103 Early Hints\r\n\r\n' * 100)


def _endless(handler: _Handler, status: int = 200, kind: str = ' ') -> None:
  handler.start(status)
  while not handler.server.over.is_set():
    handler.wfile.write(kind.encode() * (1 << 20))


def _declared_300_mb(handler: _Handler, reply: Any) -> None:
  del reply
  handler.start(content_length=str(300 << 20))
  for _ in range(300):
    handler.wfile.write(b' ' * (1 << 20))


@functools.cache
def _bomb() -> bytes:
  packer = zlib.compressobj(9, wbits=31)
  parts = [packer.compress(b' ' * (1 << 20)) for _ in range(_BOMB_BYTES >> 20)]
  return b''.join(parts) + packer.flush()


def _raw(content: bytes) -> Callable[[_Handler, Any], None]:
  def act(handler: _Handler, reply: Any) -> None:
    del reply
    handler.wfile.write(content)
    handler.close_connection = True

  return act


def _reset(handler: _Handler, reply: Any) -> None:
  del reply
  handler.close_connection = True
  handler.connection.shutdown(2)


def _cut(handler: _Handler, content: bytes, honours_range: bool, cuts: int = 3) -> None:
  """Sends a part of the results and breaks off, the first times."""
  begin = 0
  if honours_range and 'range' in handler.headers:
    begin = int(handler.headers['range'].removeprefix('bytes=').rstrip('-'))
  is_cut = handler.server.num_downloads <= cuts
  rest = content[begin:]
  handler.start(206 if begin else 200, content_length=str(len(rest)))
  handler.wfile.write(rest[: max(1, len(rest) // 2)] if is_cut else rest)


def _short_results(handler: _Handler, content: bytes) -> None:
  """Ends without a length: only the torn line and the missing ones tell that it broke off."""
  handler.protocol_version = 'HTTP/1.0'
  handler.start()
  is_cut = handler.server.num_downloads <= 2
  handler.wfile.write(content[: len(content) // 2] if is_cut else content)


def _junk_lines(handler: _Handler, content: bytes) -> None:
  junk = [b'null', b'[]', b'{}', b'{"custom_id": 7}', b'[' * 100_000, b'x' * (5 << 20), b'\xff']
  handler._send(200, b'\n'.join([*junk, content.rstrip(b'\n'), *junk, b'']))


def _endless_results(handler: _Handler, content: bytes) -> None:
  handler.start()
  handler.wfile.write(content)
  while not handler.server.over.is_set():
    handler.wfile.write(b'{"custom_id": "x"}\n' * 10_000)


def _slow_results(handler: _Handler, content: bytes) -> None:
  if handler.server.num_downloads > 2:
    handler._send(200, content)
    return
  handler.start()
  handler.trickle(b'{')


def _spelled() -> str:
  escaped = ''.join(f'\\u{ord(character):04x}' for character in KEY)
  return f'{{"text": "It says {escaped}, a film."}}'


_REFUSED = NUM_ITEMS - len(BAD)
MODES = {
  'never': Mode(_never),
  'drip': Mode(_drip),
  'drip_header': Mode(_drip_header),
  'drip_second_half': Mode(_drip_second_half),
  'endless_interim': Mode(_endless_interim),
  'endless': Mode(lambda handler, reply: _endless(handler)),
  'endless_error': Mode(lambda handler, reply: _endless(handler, 500)),
  'declared_300_mb': Mode(_declared_300_mb),
  'gzip_bomb': Mode(_sends(_bomb, content_encoding='gzip')),
  'gzip_bomb_error': Mode(_sends(_bomb, 503, content_encoding='gzip')),
  'gzip_twice': Mode(_sends(lambda: gzip.compress(_bomb()), content_encoding='gzip, gzip')),
  'brotli': Mode(_sends(lambda: b'\x0b\x02\x80 \x03', content_encoding='br')),
  'gzip_damaged': Mode(_sends(lambda: b'\x1f\x8b\x08damaged', content_encoding='gzip')),
  'nested': Mode(_sends(lambda: b'[' * (1 << 20))),
  'long_number': Mode(_sends(lambda: b'1' * (1 << 20))),
  'many_lists': Mode(_sends(lambda: b'[' + b'[],' * 600_000 + b'0]')),
  'wrong_types': Mode(_sends(lambda: b'{"choices": 7, "content": {"a": 1}, "usage": []}')),
  'half_json': Mode(_sends(lambda: b'{"choices": [{"message')),
  'html': Mode(_sends(lambda: b'<html>Please log in</html>')),
  'empty': Mode(_sends(lambda: b'')),
  'reset': Mode(_reset),
  'no_http': Mode(_raw(b'\x00\x16SSH-2.0-x\r\n\r\n' * 99)),
  'long_header': Mode(_raw(b'HTTP/1.1 200 OK\r\na: ' + b'x' * (20 << 20))),
  'two_lengths': Mode(_raw(b'HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 9\r\n\r\n{}')),
  'usage_1e999': Mode(_usage('1e999'), is_answer=True),
  'usage_negative': Mode(_usage('-1000000'), is_answer=True),
  'usage_nan': Mode(_usage('NaN'), is_answer=True),
  'usage_text': Mode(_usage('"many"'), is_answer=True),
  'key_in_text': Mode(_says(lambda: f'It says {KEY}, a film.'), is_answer=True),
  'key_spelled': Mode(_says(_spelled), is_answer=True),
  'key_in_refusal': Mode(_says(lambda: f"I'm sorry, but I met {KEY}.")),
  'key_in_400': Mode(
    _sends(lambda: json.dumps({'error': {'message': KEY, 'code': KEY}}).encode(), 400),
    stored=_REFUSED,
  ),
  'key_in_403_html': Mode(_sends(lambda: f'<b>{KEY}</b>'.encode(), 403), stored=_REFUSED),
  'reasoning_cut': Mode(_says(lambda: '<think>Let me see. {"text": "A draft."}')),
  'text_is_a_number': Mode(_says(lambda: 7)),
  'text_of_1_mb': Mode(_says(lambda: 'long ' * 200_000)),
  'retry_nan': Mode(_sends(lambda: b'{}', 429, retry_after='nan')),
  'retry_1e999': Mode(_sends(lambda: b'{}', 429, retry_after='1e999')),
  'retry_past': Mode(_sends(lambda: b'{}', 503, retry_after='Mon, 01 Jan 0001 00:00:00 +1200')),
  'redirect': Mode(_sends(lambda: b'', 307, location='/elsewhere'), stored=_REFUSED),
  'redirect_to_host': Mode(
    _sends(lambda: b'', 302, location='http://localhost:9/elsewhere'), stored=_REFUSED
  ),
  'never_at_all': Mode(_never, 'all', stored=0, exit_code=2),
  'drip_at_all': Mode(_drip, 'all', stored=0, exit_code=2),
  'drip_sigterm': Mode(
    _drip, 'all', stored=0, exit_code=143, flags=('--timeout=600',), stop=True, seconds=29
  ),
  'results_cut': Mode(lambda handler, content: _cut(handler, content, True), 'batch'),
  'results_cut_no_range': Mode(lambda handler, content: _cut(handler, content, False), 'batch'),
  'results_short': Mode(_short_results, 'batch'),
  'results_junk': Mode(_junk_lines, 'batch'),
  'results_endless': Mode(_endless_results, 'batch'),
  'results_slow': Mode(_slow_results, 'batch'),
}


def make_data(folder: pathlib.Path) -> pathlib.Path:
  """Builds a prepared folder of eight items; the titles of three mark them as hit."""
  ids = list(range(NUM_ITEMS))
  titles = [f'Film {i}{" [bad]" if i in BAD else ""}' for i in ids]
  log = pa.table({'user': [i // 4 for i in ids], 'item': ids, 'timestamp': ids})
  items = pa.table({'id': ids, 'title': titles, 'genres': ['Drama'] * NUM_ITEMS})
  build_dataset.build_from_table(log, folder / 'data', time_column='timestamp', items=items)
  return folder / 'data'


def prove(
  name: str,
  backend: str,
  data_dir: pathlib.Path,
  start: Callable[..., Any] = text_generation.start,
) -> dict[str, Any]:
  """Runs the program against a hostile server and compares with what is right.

  Args:
    name: one of `MODES`.
    backend: `openai` or `anthropic`.
    data_dir: prepared folder of `make_data`; the run writes into it and beside it.
    start: starts the program, see `text_generation.start`.

  Returns:
    What was measured; `faults` lists what is wrong.
  """
  mode = MODES[name]
  flags = ['--concurrency=4', '--max_cost=100', '--input_price=1', '--output_price=1', *mode.flags]
  if mode.hits == 'batch':
    flags += ['--mode=batch', '--poll_seconds=0.1']
  with HostileServer(mode) as server:
    process = start(server, backend, data_dir, '--model=local', *flags)
    first = killed = None
    most_kib = 0
    while process.poll() is None:
      time.sleep(0.05)
      most_kib = max(most_kib, _peak_kib(process.pid))
      if first is None and (server.requests or server.num_downloads):
        first = time.monotonic()
        if mode.stop:
          process.send_signal(signal.SIGTERM)
      if first and time.monotonic() - first > 2 * mode.seconds:
        process.send_signal(signal.SIGKILL)
        killed = True
        break
    process.wait()
    seconds = time.monotonic() - (first or time.monotonic())
    server.over.set()
    answers = server.answers()
  stored = text_generation.stored(data_dir)
  outputs = text_generation.output_of(data_dir).read_text()
  folders = (data_dir, pathlib.Path(f'{data_dir}.answers'))
  files = [path for folder in folders for path in folder.rglob('*') if path.is_file()]
  lost = [a for a in answers if not any(a in text for text in stored.values())]
  repeated = [a for a, count in answers.items() if count > 1]
  if mode.is_answer:
    repeated += [a for a, count in server.requests.items() if count > 1]
  checks = {
    'was killed': killed,
    f'took {seconds:.0f} s': seconds > mode.seconds,
    f'exit code {process.returncode}': process.returncode != mode.exit_code,
    f'{most_kib >> 10} MiB': most_kib >> 10 > MOST_MIB,
    f'{len(stored)} texts': len(stored) != mode.stored,
    f'{len(lost)} answers lost': lost,
    f'{len(repeated)} paid twice': repeated,
    'a traceback': 'Traceback' in outputs,
    'key in the output': KEY in outputs,
    'key on disk': any(KEY.encode() in path.read_bytes() for path in files),
    'key sent elsewhere': server.num_leaks,
  }
  return {
    'mode': name,
    'backend': backend,
    'exit_code': process.returncode,
    'seconds': round(seconds, 1),
    'mib': most_kib >> 10,
    'texts': len(stored),
    'faults': [what for what, is_wrong in checks.items() if is_wrong],
    'output': outputs.splitlines()[-4:],
  }


def _peak_kib(pid: int) -> int:
  """Returns the largest resident memory of a process so far; 0 after its end."""
  try:
    status = pathlib.Path(f'/proc/{pid}/status').read_text()
  except OSError:
    return 0
  return next((int(x.split()[1]) for x in status.splitlines() if x.startswith('VmHWM')), 0)


def main() -> None:
  """Runs all modes with both providers and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--modes', default=','.join(MODES), help='separated by commas')
  parser.add_argument('--backends', default=','.join(text_generation.PROVIDERS))
  parser.add_argument('--parallel', type=int, default=2, help='runs at the same time')
  parser.add_argument('--output', help='JSON file for the results')
  options = parser.parse_args()
  pairs = [(m, b) for m in options.modes.split(',') for b in options.backends.split(',')]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    data_dir = make_data(folder)

    def run(pair: tuple[str, str]) -> dict[str, Any]:
      own = folder / '-'.join(pair) / 'data'
      shutil.copytree(data_dir, own)
      found = prove(*pair, own)
      print(
        f'{found["mode"]:<22} {found["backend"]:<10} {found["exit_code"]:>4}'
        f' {found["seconds"]:>6} s {found["mib"]:>4} MiB {found["texts"]} texts '
        f' {"; ".join(found["faults"]) or "right"}',
        flush=True,
      )
      return found

    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
      results = list(pool.map(run, pairs))
  wrong = [found for found in results if found['faults']]
  print(f'{len(results)} runs, {len(results) - len(wrong)} right')
  for found in wrong:
    print(json.dumps(found, indent=1))
  if options.output:
    rows = [{k: v for k, v in found.items() if k != 'output'} for found in results]
    pathlib.Path(options.output).write_text(json.dumps(rows, indent=1) + '\n')
  sys.exit(1 if wrong else 0)


if __name__ == '__main__':
  main()

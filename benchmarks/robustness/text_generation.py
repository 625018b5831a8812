"""Proves, against a server with faults, that generate_text loses no answer and pays for none twice.

  python -m benchmarks.robustness.text_generation --proof=kills --items=5000 --kills=10
  python -m benchmarks.robustness.text_generation --proof=batches --backend=anthropic
  python -m benchmarks.robustness.text_generation --proof=throughput
  python -m benchmarks.robustness.text_generation --proof=memory --items=100000

Prints a JSON object; exits with 1 where something was lost or repeated.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import pyarrow as pa

from benchmarks.robustness import llm_server
from data_prep import build_dataset
from data_prep.llm_text import answers, llm_anthropic, llm_openai, prompts

ROOT = pathlib.Path(__file__).parents[2]
PROVIDERS = {'openai': llm_openai, 'anthropic': llm_anthropic}
FAULTS = llm_server.Faults(rate_limit=0.1, error=0.05, drop=0.02, malformed=0.02)


def make_data(folder: pathlib.Path, num_items: int) -> pathlib.Path:
  """Builds a prepared folder of items that have a title and no description."""
  words = ('Amber', 'Broken', 'Candle', 'Distant', 'Echo', 'Falcon', 'Garden', 'Harbour')
  chooser = random.Random(0)
  ids = list(range(num_items))
  titles = [f'The {chooser.choice(words)} {chooser.choice(words)} {i}' for i in ids]
  log = pa.table({'user': [i // 20 for i in ids], 'item': ids, 'timestamp': ids})
  items = pa.table({'id': ids, 'title': titles, 'genres': ['Drama|Mystery'] * num_items})
  build_dataset.build_from_table(log, folder / 'data', time_column='timestamp', items=items)
  return folder / 'data'


def start(
  server: llm_server.LlmServer, backend: str, data_dir: pathlib.Path, *flags: str
) -> subprocess.Popen:
  """Starts the program as a user does; what it prints goes into a file beside the data."""
  path = '/v1' if backend == 'openai' else ''
  command = [sys.executable, '-m', 'data_prep.generate_text', f'--data_dir={data_dir}']
  command += ['--kind=items', f'--backend={backend}', f'--base_url={server.url}{path}', *flags]
  environment = os.environ | {PROVIDERS[backend].KEY: server.key, 'PYTHONPATH': str(ROOT)}
  with output_of(data_dir).open('w') as output:
    return subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
    )


def output_of(data_dir: pathlib.Path) -> pathlib.Path:
  """Where the program's last start printed to."""
  return data_dir.with_name('output.txt')


def stored(data_dir: pathlib.Path) -> dict[str, str]:
  """Key and text of every whole line of the store, read without the program's own code."""
  path = pathlib.Path(f'{data_dir}.answers') / answers.ANSWERS
  found = {}
  for line in path.read_bytes().split(b'\n') if path.exists() else ():
    try:
      record = json.loads(line)
      found[record['key']] = record['text']
    except ValueError:
      pass
  return found


def prove_kills(
  folder: pathlib.Path,
  num_items: int,
  num_kills: int,
  backend: str,
  start: Callable[..., subprocess.Popen] = start,
) -> dict[str, object]:
  """Kills the program again and again, then lets it end, and compares with the server's count."""
  data_dir = make_data(folder, num_items)
  provider = PROVIDERS[backend]
  inputs = {}
  for prompt in prompts.item_prompts(data_dir):
    key = answers.make_key(backend, provider.DEFAULT_MODEL, provider.PARAMETERS, prompt)
    inputs[key] = llm_server.input_name(prompt.text)
  chooser = random.Random(FAULTS.seed)
  begin = time.monotonic()
  first_stored: dict[str, float] = {}  # When an input's answer was known to be in the store.
  texts: dict[str, str] = {}
  lost = 0
  with llm_server.LlmServer(FAULTS) as server:
    for moment in sorted(chooser.uniform(0, 0.95) for _ in range(num_kills)):
      process = start(server, backend, data_dir, '--max_cost=100', '--concurrency=32')
      # At the latest when so many are answered; a little later, so at any point of a write.
      while len(server.answers()) < moment * num_items and process.poll() is None:
        time.sleep(0.005)
      time.sleep(chooser.uniform(0, 0.1))
      process.send_signal(signal.SIGKILL)
      process.wait()
      now = stored(data_dir)
      lost += sum(now.get(key) != text for key, text in texts.items())
      texts = now
      for key in texts:
        first_stored.setdefault(inputs[key], time.time())
    runs = 0
    while True:
      process = start(server, backend, data_dir, '--max_cost=100', '--concurrency=32')
      process.wait()
      runs += 1
      if process.returncode != 1 or runs == 10:  # 1: some faults in a row; go on.
        break
    now = stored(data_dir)
    lost += sum(now.get(key) != text for key, text in texts.items())
    repeated = sum(at > first_stored.get(name, at) for at, name, _ in server.arrivals)
    right = sum(inputs[key] in text for key, text in now.items() if key in inputs)
    outcomes = server.outcomes()
  return {
    'backend': backend,
    'items': num_items,
    'kills': num_kills,
    'exit_code': process.returncode,
    'answered': right,
    'answers_lost': lost,
    'stored_but_asked_again': repeated,
    'requests': outcomes.total(),
    'outcomes': dict(outcomes),
    'answered_but_killed_before_stored': outcomes['answer'] - len(now),
    'seconds': round(time.monotonic() - begin, 1),
    'output': output_of(data_dir).read_text().splitlines()[-6:],
  }


def prove_batches(
  folder: pathlib.Path, num_items: int, num_kills: int, backend: str
) -> dict[str, object]:
  """Kills the program while it submits, waits for and collects batches that go wrong."""
  data_dir = make_data(folder, num_items)
  faults = llm_server.Faults(batches=('partly', 'expired', 'unnoticed', 'partly'), polls=4)
  flags = ('--mode=batch', f'--batch_requests={num_items // 5}', '--poll_seconds=0.3')
  chooser = random.Random(0)
  begin = time.monotonic()
  with llm_server.LlmServer(faults) as server:
    for _ in range(num_kills):
      process = start(server, backend, data_dir, *flags)
      num_before = server.num_requests
      while server.num_requests == num_before and process.poll() is None:
        time.sleep(0.002)
      time.sleep(chooser.uniform(0, 2.5))
      process.send_signal(signal.SIGKILL)
      process.wait()
    process = start(server, backend, data_dir, *flags)
    process.wait()
    answers_by_input, outcomes = server.answers(), server.outcomes()
    now = stored(data_dir)
  return {
    'backend': backend,
    'items': num_items,
    'kills': num_kills,
    'exit_code': process.returncode,
    'answered': len(now),
    'answers_lost': len(set(answers_by_input) - {text.split()[4][:-1] for text in now.values()}),
    'paid_twice': sum(count > 1 for count in answers_by_input.values()),
    'batches': [b['plan'] for b in server.batches.values()],
    'outcomes': dict(outcomes),
    'seconds': round(time.monotonic() - begin, 1),
    'output': output_of(data_dir).read_text().splitlines()[-6:],
  }


def prove_throughput(folder: pathlib.Path, num_items: int, per_minute: float) -> dict[str, object]:
  """Runs at a server's limit of requests a minute."""
  data_dir = make_data(folder, num_items)
  faults = llm_server.Faults(requests_per_minute=per_minute, retry_after=1.0, latency=0.05)
  with llm_server.LlmServer(faults) as server:
    process = start(server, 'openai', data_dir, f'--requests_per_minute={per_minute}')
    process.wait()
    times = [at for at, _, outcome in server.arrivals if outcome == 'answer']
    outcomes = server.outcomes()
  reached = (len(times) - 1) / (times[-1] - times[0]) * 60
  return {
    'limit_per_minute': per_minute,
    'answers_per_minute': round(reached),
    'share': round(reached / per_minute, 3),
    'outcomes': dict(outcomes),
    'exit_code': process.returncode,
  }


def prove_memory(folder: pathlib.Path, num_items: int, backend: str) -> dict[str, object]:
  """Watches the resident memory of the program while the answers come in."""
  data_dir = make_data(folder, num_items)
  seen = collections.OrderedDict()
  with llm_server.LlmServer() as server:
    process = start(server, backend, data_dir, '--concurrency=32')
    page = os.sysconf('SC_PAGE_SIZE')
    while process.poll() is None:
      time.sleep(0.5)
      count = len(server.arrivals)
      try:
        pages = int(pathlib.Path(f'/proc/{process.pid}/statm').read_text().split()[1])
      except (OSError, IndexError):
        break
      # 0: before the first request; above num_items: while the texts are written.
      step = count // (num_items // 10) * (num_items // 10)
      seen[step] = max(seen.get(step, 0), round(pages * page / 2**20))
    process.wait()
  return {
    'items': num_items,
    'exit_code': process.returncode,
    'most_mib_by_answers': seen,
    'output': output_of(data_dir).read_text().splitlines()[-6:],
  }


def main() -> None:
  """Runs one proof and prints it."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--proof', choices=('kills', 'batches', 'throughput', 'memory'), required=True
  )
  parser.add_argument('--items', type=int)
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--per_minute', type=float, default=1800)
  parser.add_argument('--backend', choices=tuple(PROVIDERS), default='openai')
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    if options.proof == 'kills':
      num_items = options.items or 5000
      result = prove_kills(folder, num_items, options.kills, options.backend)
      is_good = result['answered'] == num_items
      is_good &= not (result['answers_lost'] or result['stored_but_asked_again'])
    elif options.proof == 'batches':
      num_items = options.items or 5000
      result = prove_batches(folder, num_items, options.kills, options.backend)
      is_good = result['answered'] == num_items
      is_good &= not (result['answers_lost'] or result['paid_twice'])
    elif options.proof == 'throughput':
      result = prove_throughput(folder, options.items or 900, options.per_minute)
      is_good = result['share'] > 0.8
    else:
      result = prove_memory(folder, options.items or 100_000, options.backend)
      is_good = result['exit_code'] == 0
  print(json.dumps(result, indent=1))
  sys.exit(0 if is_good else 1)


if __name__ == '__main__':
  main()

"""What the speed benchmarks share: the data as one file, sides that take turns, what is reported.

A side is a process that trains and ranks on request: it reads one JSON line and answers with one.
`ur4rec_side.py` is ours. `rectools_side.py` runs with the Python that RecTools is installed in, so
it imports only NumPy from here. Both processes live through the whole benchmark, so each keeps what
it compiled, and each is idle while the other works.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ur4rec_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'benchmarks' / 'results' / 'performance'
OWN, RECTOOLS = 'own', 'rectools'
_MODULES = {OWN: 'benchmarks.speed.ur4rec_side', RECTOOLS: 'benchmarks.speed.rectools_side'}
SHAPES = {  # Of the model and its training, on both sides.
  'max_length': 200,
  'batch_size': 128,
  'dim': 64,
  'num_blocks': 2,
  'num_heads': 1,
  'dropout': 0.2,
  'learning_rate': 1e-3,
  'seed': 0,
}


def port_when_ready(process: subprocess.Popen) -> int:
  """Waits until a service is ready, and returns its port; InputError if it did not start."""
  line = process.stdout.readline()
  if not line.startswith('ready'):
    raise InputError(f'the service did not start: {line or "see above"}')
  return int(line.rsplit(':', 1)[1])


def make_parser(description: str, against_rectools: bool = True) -> argparse.ArgumentParser:
  """Flags for data and model; what `--config.FIELD=VALUE` changes is ours alone."""
  parser = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--data_dir', required=True, help='prepared data')
  add('--users', type=int, help='take only the first so many, to try things out')
  add('--loss', default='softmax', choices=('softmax', 'bce'))
  for name, default in SHAPES.items():
    add(f'--{name}', type=type(default), default=default)
  if against_rectools:
    add('--rectools_python', required=True, help='of an environment with rectools[torch]')
  add_output_flags(parser)
  return parser


def add_output_flags(parser: argparse.ArgumentParser, folder: pathlib.Path = RESULTS) -> None:
  """Flags that `report` reads; it stores results in the folder."""
  add = parser.add_argument
  add('--json', action='store_true', help='print nothing but the line of JSON')
  add('--out', metavar='NAME', help=f'store it as {folder.relative_to(ROOT)}/NAME.json')


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
  """Reads the command line: flags, and the `--config.FIELD=VALUE` among them."""
  flags, overrides = parser.parse_known_args()
  for text in overrides:
    if not re.match(r'--config\.[\w.]+=', text):
      parser.error(f'{text}: neither a flag nor --config.FIELD=VALUE')
  return flags, overrides


def load_histories(data_dir: str, users: int | None) -> tuple[Any, np.ndarray, np.ndarray]:
  """Reads a prepared folder.

  Returns:
    The `Dataset`; item ids and offsets as it has them, of its first users alone if `users` is set.
  """
  from ur4rec_jax.data.dataset import load_dataset

  dataset = load_dataset(data_dir)
  offsets = dataset.offsets[: None if users is None else users + 1]
  return dataset, dataset.item_ids[: offsets[-1]], offsets


def write_data(data_dir: str, users: int | None, path: pathlib.Path) -> dict[str, Any]:
  """Writes what `load_histories` reads for both sides to read.

  Returns:
    Name and counts.
  """
  dataset, item_ids, offsets = load_histories(data_dir, users)
  np.savez(path, offsets=offsets, item_ids=item_ids, num_items=dataset.num_items)
  return {
    'name': dataset.info['name'],
    'users': len(offsets) - 1,
    'items': dataset.num_items,
    'interactions': len(item_ids),
  }


class Clock:
  """Runs from its making on."""

  def __init__(self):
    self._began = time.perf_counter(), time.process_time()

  def read(self) -> dict[str, float]:
    """Seconds, and how many of them all cores together worked for this process."""
    seconds, busy = self._began
    return {
      'seconds': time.perf_counter() - seconds,
      'processor_seconds': time.process_time() - busy,
    }


class Side:
  """A process that works when asked; it ends with the `with` block."""

  def __init__(self, name: str, python: str, settings: dict[str, Any]):
    """Starts the module of the side, which prepares itself in the background."""
    command = [python, '-m', _MODULES[name], json.dumps(settings)]
    self.name = name
    self._said = tempfile.TemporaryFile('w+')  # noqa: SIM115
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': self._said}
    try:
      self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    except OSError as error:
      raise InputError(f'{python} cannot be run: {error.strerror}') from error

  def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
    """Has something done and returns the answer; it includes `peak_mb`, of the process so far."""
    with contextlib.suppress(BrokenPipeError):  # The empty answer says that it has ended.
      print(json.dumps({'what': what, **arguments}), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      self._said.seek(0)
      sys.exit(f'{self._said.read()}\n{self.name}: ended with {self._process.wait()}, see above')
    return json.loads(line)

  def __enter__(self) -> 'Side':
    return self

  def __exit__(self, *exception: Any) -> None:
    self._process.kill()
    self._process.wait()


def answer_requests(make_answers: Callable[[dict], dict[str, Callable[..., dict]]]) -> None:
  """The main function of a side.

  Args:
    make_answers: prepares everything from the settings; by name, what can be asked for.
  """
  replies = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # Whatever else is printed.
  answers = make_answers(json.loads(sys.argv[1]))
  for line in sys.stdin:
    arguments = json.loads(line)
    answer = answers[arguments.pop('what')](**arguments)
    print(json.dumps({**answer, 'peak_mb': memory_megabytes('VmHWM')}), file=replies, flush=True)


def settings_of(flags: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
  """What a side is told, and what a result says of how it came about."""
  named = {name: getattr(flags, name) for name in ('loss', *SHAPES)}
  return {**named, 'overrides': [*overrides]}


def start_side(
  name: str, flags: argparse.Namespace, overrides: Sequence[str], data: pathlib.Path
) -> Side:
  """Starts a side on the data that `write_data` wrote."""
  python = {OWN: sys.executable, RECTOOLS: flags.rectools_python}[name]
  return Side(name, python, {**settings_of(flags, overrides), 'data': str(data)})


@contextlib.contextmanager
def shared_data(flags: argparse.Namespace) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
  """The file that `write_data` writes, and its name and counts; it goes with the block."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'data.npz'
    yield path, write_data(flags.data_dir, flags.users, path)


@contextlib.contextmanager
def both_sides(
  flags: argparse.Namespace, overrides: Sequence[str]
) -> Iterator[tuple[tuple[Side, Side], dict[str, Any]]]:
  """Ours and RecTools' at once, on the same data, and its name and counts."""
  with (
    shared_data(flags) as (data, counts),
    start_side(OWN, flags, overrides, data) as own,
    start_side(RECTOOLS, flags, overrides, data) as rectools,
  ):
    yield (own, rectools), counts


def take_turns(sides: Sequence[Side], rounds: int, what: str, **arguments) -> dict[str, list[dict]]:
  """Asks A B A B ..., so that whatever else the machine does falls on both; answers by side."""
  answers = {side.name: [] for side in sides}
  for _ in range(rounds):
    for side in sides:
      answers[side.name].append(side.ask(what, **arguments))
  return answers


def compare(answers: dict[str, list[dict]], unit: str) -> dict[str, Any]:
  """Ratio of the sides' median speeds, its spread over the rounds, and memory.

  Args:
    answers: from `take_turns`, with `seconds`, `processor_seconds` and a count named `unit`.
    unit: what is counted.

  Returns:
    `ratio`; `ratios`, the lowest and the highest of a round; `processor_ratio`, the same as `ratio`
    by the time that cores worked, which other processes disturb less; and by side the median speed,
    all `speeds` and the peak of memory.
  """
  speeds, busy_speeds = (
    {name: [x[unit] / x[time] for x in found] for name, found in answers.items()}
    for time in ('seconds', 'processor_seconds')
  )
  by_round = [a / b for a, b in zip(*speeds.values(), strict=True)]
  own, rectools = map(statistics.median, speeds.values())
  own_busy, rectools_busy = map(statistics.median, busy_speeds.values())
  peaks = {name: found[-1]['peak_mb'] for name, found in answers.items()}
  return {
    'ratio': round(own / rectools, 3),
    'ratios': [round(min(by_round), 3), round(max(by_round), 3)],
    'processor_ratio': round(own_busy / rectools_busy, 3),
    OWN: round(own, 1),
    RECTOOLS: round(rectools, 1),
    'unit': f'{unit}/s',
    'speeds': {name: [round(x, 1) for x in found] for name, found in speeds.items()},
    'peak_mb': peaks,
    'memory_ratio': round(peaks[OWN] / peaks[RECTOOLS], 3),
    'device': answers[OWN][0]['device'],
    **machine(),
  }


def metrics_of(answer: dict[str, Any]) -> dict[str, float]:
  """Metrics of the ranks that a side answered."""
  from ur4rec_jax.evaluation.metrics import ranking_metrics

  metrics = ranking_metrics(np.array(answer['ranks']))
  return {name: round(metrics[name], 4) for name in ('ndcg@10', 'hit@10')}


def quality(answers: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
  """Metrics of both sides' last ranks, by the same function."""
  return {name: metrics_of(found[-1]) for name, found in answers.items()}


def table(result: dict[str, Any]) -> list[str]:
  """The lines of what `compare` and `quality` found."""
  lines = [f'{"":<10}{result["unit"]:>13}{"peak MB":>9}{"NDCG@10":>9}']
  lines += [
    f'{name:<10}{result[name]:>13,.1f}{result["peak_mb"][name]:>9,.0f}{values["ndcg@10"]:>9.4f}'
    for name, values in result['quality'].items()
  ]
  ratios = '{ratio} x, {ratios[0]} to {ratios[1]} over the rounds; memory {memory_ratio} x'
  return [*lines, ratios.format(**result)]


def memory_megabytes(field: str, process: int | str = 'self') -> float:
  """Memory of a process: now as `VmRSS`, and the most it ever had as `VmHWM`; 0 after its end.

  Its own alone, where getrusage also counts the parent's.
  """
  status = pathlib.Path(f'/proc/{process}/status').read_text()
  found = re.search(rf'^{field}:\s*(\d+)', status, re.MULTILINE)
  return round(int(found[1]) / 1024, 1) if found else 0.0


def memory() -> dict[str, float]:
  """Memory of this process: now, the most it ever had, and the part of mapped files, in MB."""
  return {
    'rss_mb': memory_megabytes('VmRSS'),
    'peak_mb': memory_megabytes('VmHWM'),
    'of_files_mb': memory_megabytes('RssFile'),
  }


def run_alone(module: str, *flags: str) -> Any:
  """Runs a benchmark in a process of its own, and returns the JSON of its last line.

  What the process says about an error ends this one.
  """
  command = [sys.executable, '-m', module, *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    sys.exit(done.stderr)
  return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
  """Where this is: cores that may be used, and how busy they are besides."""
  return {'cores': len(os.sched_getaffinity(0)), 'load': round(os.getloadavg()[0], 1)}


def report(
  flags: argparse.Namespace,
  lines: Sequence[str],
  result: dict[str, Any],
  folder: pathlib.Path = RESULTS,
) -> None:
  """Prints a table and, as the last line, the result; stores it if that is asked for."""
  if not flags.json:
    print(*lines, sep='\n')
  if flags.out:
    from ur4rec_jax.files import write_file

    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f'{flags.out}.json', json.dumps(result, indent=1) + '\n')
  print(json.dumps(result))

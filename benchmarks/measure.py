"""What the speed benchmarks share: the data as one file, sides that take turns, what is reported.

A side is a process that trains and ranks when it is asked to, one JSON line for one JSON line:
`own_side.py`, or `rectools_side.py`, which runs with the Python that RecTools is installed in, so
that what it imports here needs nothing but NumPy. Both stay, so that each keeps what it compiled,
and are idle in the other's turns.
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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ur4rec_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'performance'
OWN, RECTOOLS = 'own', 'rectools'
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


def add_output_flags(parser: argparse.ArgumentParser) -> None:
  """Flags that `report` reads."""
  add = parser.add_argument
  add('--json', action='store_true', help='print nothing but the line of JSON')
  add('--out', metavar='NAME', help=f'store it as {RESULTS.relative_to(ROOT)}/NAME.json')


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
  """Reads the command line: flags, and the `--config.FIELD=VALUE` among them."""
  flags, overrides = parser.parse_known_args()
  for text in overrides:
    if not re.match(r'--config\.[\w.]+=', text):
      parser.error(f'{text}: neither a flag nor --config.FIELD=VALUE')
  return flags, overrides


def write_data(data_dir: str, users: int | None, path: pathlib.Path) -> dict[str, Any]:
  """Writes the histories of a prepared folder, or of its first users, for both sides to read.

  Returns:
    Name and counts.
  """
  from ur4rec_jax.dataset import load_dataset

  dataset = load_dataset(data_dir)
  offsets = dataset.offsets[: None if users is None else users + 1]
  item_ids = dataset.item_ids[: offsets[-1]]
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
    """Starts `benchmarks.NAME_side`, which prepares itself meanwhile."""
    command = [python, '-m', f'benchmarks.{name}_side', json.dumps(settings)]
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
    print(json.dumps({**answer, 'peak_mb': peak_megabytes()}), file=replies, flush=True)


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


def quality(answers: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
  """Metrics of both sides' last ranks, by the same function."""
  from ur4rec_jax.metrics import ranking_metrics

  metrics = {name: ranking_metrics(np.array(x[-1]['ranks'])) for name, x in answers.items()}
  return {
    name: {metric: round(values[metric], 4) for metric in ('ndcg@10', 'hit@10')}
    for name, values in metrics.items()
  }


def table(result: dict[str, Any]) -> list[str]:
  """The lines of what `compare` and `quality` found."""
  lines = [f'{"":<10}{result["unit"]:>13}{"peak MB":>9}{"NDCG@10":>9}']
  lines += [
    f'{name:<10}{result[name]:>13,.1f}{result["peak_mb"][name]:>9,.0f}{values["ndcg@10"]:>9.4f}'
    for name, values in result['quality'].items()
  ]
  ratios = '{ratio} x, {ratios[0]} to {ratios[1]} over the rounds; memory {memory_ratio} x'
  return [*lines, ratios.format(**result)]


def peak_megabytes() -> float:
  """Most memory that this process ever had; its own, where getrusage also counts the parent's."""
  status = pathlib.Path('/proc/self/status').read_text()
  return round(int(status.split('VmHWM:')[1].split()[0]) / 1024, 1)


def machine() -> dict[str, Any]:
  """Where this is: cores that may be used, and how busy they are besides."""
  return {'cores': len(os.sched_getaffinity(0)), 'load': round(os.getloadavg()[0], 1)}


def report(flags: argparse.Namespace, lines: Sequence[str], result: dict[str, Any]) -> None:
  """Prints a table and, as the last line, the result; stores it if that is asked for."""
  if not flags.json:
    print(*lines, sep='\n')
  if flags.out:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f'{flags.out}.json').write_text(json.dumps(result, indent=1) + '\n')
  print(json.dumps(result))

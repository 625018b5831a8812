"""Mistakes of people, faults of machines and damaged files: what a run does about each.

  python -m benchmarks.robustness.mistakes --workdir=runs/mistakes [--only=WORD]

Makes a small dataset and a finished run, then starts a run with each mistake or damage of `CASES`,
on a copy. Prints a table: the exit code, the one that is right, and the last line of the message.
A run must end with the right code and its words, without a traceback. Damage that a run can repair
must be named, and must not change a result. Exits with 1 if anything is wrong.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.robustness.small_runs import SMALL
from ur4rec_jax.errors import EXIT_CODES, exit_on_reported_error

# Processes are forked from one that has imported everything, which saves seconds of each.
_FORKS = multiprocessing.get_context('forkserver')
ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ('results.json', 'metrics.jsonl', 'test_ranks.npz')
LIMIT_SECONDS = 600


class Case(NamedTuple):
  """A mistake or a damage.

  Attributes:
    name: in a few words.
    code: exit code that is right.
    words: what the message must contain.
    flags: added to the command; `{folder}` stands for the folder of the case.
    env: environment variables that differ.
    starts_with: flags before them; None for the flags of a small run.
    damage: changes the folder of the case, which holds `run`, a copy of the run, `data`, and is
      the working directory; a run on a copy is without its results.
    act: what happens to the process once it trains; gets its number.
    file_size: largest file that it may write, in bytes, as on a full disk.
    output: what it prints goes to this file.
    gap: whether `metrics.jsonl` may differ afterwards from that of the undisturbed run.
  """

  name: str
  code: int
  words: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  env: Mapping[str, str] = {}
  starts_with: tuple[str, ...] | None = None
  damage: Callable[[pathlib.Path], object] = lambda folder: None
  act: Callable[[int], object] | None = None
  file_size: int = 0
  output: str = ''
  gap: bool = False


def typed(name: str, *flags: str, words: tuple[str, ...] = ()) -> Case:
  """A wrong flag of a run that is new."""
  return Case(name, 2, words, flags, damage=lambda folder: shutil.rmtree(folder / 'run'))


def around(name: str, code: int, *words: str, **env: str) -> Case:
  """A wrong environment."""
  return Case(name, code, words, env=env)


def newest(folder: pathlib.Path) -> pathlib.Path:
  """Returns the newest checkpoint of the case's run."""
  steps = [path for path in (folder / 'run/checkpoints').iterdir() if path.name.isdigit()]
  return max(steps, key=lambda path: int(path.name))


def replace_by_folder(path: pathlib.Path) -> None:
  path.unlink(missing_ok=True)
  path.mkdir()


def replace_by_file(path: pathlib.Path) -> None:
  shutil.rmtree(path)
  path.write_text('')


def flip(path: pathlib.Path) -> None:
  """Changes one byte in the middle."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 255
  path.write_bytes(content)


def largest(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda path: path.stat().st_size)


def edit_json(path: pathlib.Path, **fields: object) -> None:
  content = json.loads(path.read_text())
  path.write_text(json.dumps(content | fields))


def widen(folder: pathlib.Path) -> None:
  """Makes the stored config that of a wider model, whose checkpoints do not fit."""
  path = folder / 'run/config.json'
  content = json.loads(path.read_text())
  content['config']['sasrec']['dim'] = 32
  path.write_text(json.dumps(content))


def of_another_version(folder: pathlib.Path) -> None:
  """Adds a field to the record of progress, under a new manifest."""
  from ur4rec_jax.runs.saved_steps import hashes

  step = newest(folder)
  (path,) = (path for path in (step / 'progress').rglob('*') if path.suffix in ('', '.json'))
  edit_json(path, warmth=1)
  (step / 'manifest.json').write_text(json.dumps(hashes(step)))


def without_checkpoint_of_last_step(folder: pathlib.Path) -> None:
  shutil.rmtree(newest(folder))


def without_package(name: str) -> Case:
  def damage(folder: pathlib.Path) -> None:
    (folder / f'{name}.py').write_text(f'raise ModuleNotFoundError("No module named {name!r}")\n')

  words = (f"No module named '{name}'", 'install')
  return Case(f'package {name} missing', 2, words, env={'PYTHONPATH': '{folder}'}, damage=damage)


def config_file(name: str, content: str, *words: str) -> Case:
  def damage(folder: pathlib.Path) -> None:
    (folder / 'own.py').write_text(content)

  flags = ('--config=own.py', '--workdir=run')
  return Case(name, 2, ('own.py', *words), starts_with=flags, damage=damage)


def file_damage(name: str, code: int, path: str, change: Callable, *words: str, **more) -> Case:
  """A change of one file or folder of the case."""
  return Case(name, code, words, damage=lambda folder: change(folder / path), **more)


def step_damage(name: str, change: Callable, *words: str) -> Case:
  """A damage of the newest checkpoint, from which the run recovers."""
  return Case(name, 0, ('damaged', *words), damage=lambda folder: change(newest(folder)))


def signalled(number: signal.Signals, *words: str) -> Case:
  """A signal while the run trains."""

  def act(process: int) -> None:
    os.kill(process, number)

  flags = ('--config.num_epochs=1000', '--config.patience=1000')
  remove = lambda folder: shutil.rmtree(folder / 'run')
  return Case(f'{number.name} while it trains', 128 + number, words, flags, damage=remove, act=act)


CUT = lambda path: os.truncate(path, path.stat().st_size // 2)
EMPTY = lambda path: path.write_text('')
LIST = lambda path: path.write_text('[]\n')
BYTES = lambda path: path.write_bytes(b'\xff\xfe\x00' * 50)
REMOVE = lambda path: path.unlink()
PAIR = {'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1234', 'JAX_NUM_PROCESSES': '2'}
HOLD_LOCK = """
import sys, time
from ur4rec_jax.files import only_process
with only_process(sys.argv[1], ''):
  print('held', flush=True)
  time.sleep(1000)
"""

CASES = (
  typed('unknown flag', '--confg=x', words=('confg', 'config')),
  typed('unknown field', '--config.nosuch=1', words=('config.nosuch: no such field',)),
  typed('field of an earlier version', '--config.paths=x', words=('now named branches',)),
  typed('field mistyped', '--config.learning_rate=1', words=('optimizer.learning_rate?',)),
  typed('value of another type', '--config.num_epochs=abc', words=('num_epochs', 'abc')),
  typed('value out of bounds', '--config.sasrec.dropout=1.5', words=('config.sasrec.dropout',)),
  typed('batch of nobody', '--config.batch_size=0', words=('at least 1',)),
  typed('unknown choice', '--config.loss.name=hinge', words=('hinge', 'softmax')),
  typed('heads that do not divide', '--config.sasrec.num_heads=3', words=('must divide',)),
  typed('seed of 33 bits', '--config.seed=4294967296', words=('4294967295',)),
  typed('seeds of 33 bits', '--seeds=0,4294967296', words=('4294967295',)),
  typed('seeds that are no numbers', '--seeds=a', words=('--seeds=a',)),
  typed('the same seed twice', '--seeds=1,1', words=('--seeds=1,1',)),
  typed('unknown mode', '--mode=nosuch', words=('evaluate',)),
  typed('evaluate several seeds', '--mode=evaluate', '--seeds=1', words=('--mode=evaluate',)),
  typed('evaluate nothing', '--mode=evaluate', words=('no run here',)),
  typed('an argument without a flag', 'train', words=("'train'",)),
  typed('unknown stage', "--config.stages=('warm',)", words=("'warm' is no stage",)),
  typed('sweep file missing', '--sweep=nosuch.py', words=('nosuch.py',)),
  typed('missing config file', '--config=configs/nosuch.py', words=('no such file',)),
  typed('unknown variant', '--config=synthetic:nosuch', words=('multimodal',)),
  Case('no --config', 2, ('--config is missing',), starts_with=('--workdir=run',)),
  Case('no --workdir', 2, ('--workdir is missing',), starts_with=('--config=synthetic',)),
  typed('empty --workdir', '--workdir=', words=('--workdir is missing',)),
  config_file('config file with an import error', 'import nosuch\n', 'line 1', 'nosuch'),
  config_file('config file that does not parse', 'def get_config(:\n', 'line 1'),
  config_file('config file that raises', 'def get_config():\n  return {}[1]\n', 'line 2'),
  config_file('config file without a config', 'def get_config():\n  return 3\n', 'not 3'),
  typed('no data folder', '--config.data_dir=/nosuch', words=('data_prep.build_dataset',)),
  typed('a folder that is no dataset', '--config.data_dir=/usr', words=('not a prepared',)),
  Case(
    'modality not encoded',
    2,
    ('data_prep.encode',),
    starts_with=('--config=synthetic:text', '--config.data_dir=data', '--workdir=other'),
  ),
  file_damage('dataset.json empty', 2, 'data/dataset.json', EMPTY, 'dataset.json'),
  Case(
    'interactions damaged',
    2,
    ('build it',),
    damage=lambda folder: CUT(largest(folder / 'data/interactions')),
  ),
  around('no GPU', 2, 'JAX_PLATFORMS=cuda', JAX_PLATFORMS='cuda'),
  around('unknown device', 2, 'JAX_PLATFORMS=abacus', JAX_PLATFORMS='abacus'),
  around('unknown flag of XLA', 2, 'Unknown flag', 'xla_nosuch', XLA_FLAGS='--xla_nosuch=1'),
  around('no JAX_PROCESS_ID', 2, 'JAX_PROCESS_ID=', **PAIR),
  around('JAX_NUM_PROCESSES=two', 2, 'two', **(PAIR | {'JAX_NUM_PROCESSES': 'two'})),
  around('JAX_PROCESS_ID too large', 2, 'JAX_PROCESS_ID=2', JAX_PROCESS_ID='2', **PAIR),
  around('address without port', 2, 'host:port', JAX_COORDINATOR_ADDRESS='localhost'),
  around('auto without a scheduler', 2, 'auto', JAX_COORDINATOR_ADDRESS='auto'),
  without_package('optax'),
  without_package('absl'),
  typed('more memory than there is', '--config.sasrec.dim=200000', words=('config.batch_size',)),
  file_damage('workdir is a file', 4, 'run', replace_by_file, 'cannot write'),
  file_damage('checkpoints is a file', 4, 'run/checkpoints', replace_by_file, 'checkpoints'),
  file_damage('tensorboard is a file', 4, 'run/tensorboard', replace_by_file, 'curves'),
  file_damage('metrics.jsonl is a folder', 4, 'run/metrics.jsonl', replace_by_folder, 'metrics'),
  file_damage('results.json is a folder', 4, 'run/results.json', replace_by_folder, 'results'),
  file_damage('test_ranks.npz is a folder', 4, 'run/test_ranks.npz', replace_by_folder, 'ranks'),
  file_damage('lock is a folder', 4, 'run/lock', replace_by_folder, '--workdir'),
  Case(
    'disk full in a save',
    4,
    ('could not be written', 'last good step'),
    damage=without_checkpoint_of_last_step,
    file_size=10_240,
  ),
  Case('output on a full disk', 4, output='/dev/full'),
  Case(
    'divergence',
    3,
    ('not finite', 'learning_rate'),
    (
      '--config.optimizer.name=sgd',
      '--config.optimizer.clip_norm=0.',
      '--config.optimizer.learning_rate=1e38',
      '--workdir=other',
    ),
  ),
  file_damage('config.json empty', 2, 'run/config.json', EMPTY, 'config.json'),
  file_damage('config.json cut', 2, 'run/config.json', CUT, 'config.json'),
  file_damage('config.json a list', 2, 'run/config.json', LIST, 'config.json'),
  file_damage('config.json not text', 2, 'run/config.json', BYTES, 'config.json'),
  file_damage('config.json deleted', 2, 'run/config.json', REMOVE, 'config.json'),
  file_damage('config.json a folder', 2, 'run/config.json', replace_by_folder, 'config.json'),
  Case('another field', 2, ('config.seed', 'use another'), ('--config.seed=1',)),
  Case('another model', 2, ('another model',), ('--config.sasrec.dim=32',), damage=widen),
  Case('progress of another version', 2, ('another version',), damage=of_another_version),
  step_damage('manifest a list', lambda step: LIST(step / 'manifest.json'), 'not readable'),
  step_damage('manifest empty', lambda step: EMPTY(step / 'manifest.json'), 'not readable'),
  step_damage('manifest deleted', lambda step: REMOVE(step / 'manifest.json'), 'did not finish'),
  step_damage('array with a flipped byte', lambda step: flip(largest(step / 'state')), 'changed'),
  step_damage('progress cut', lambda step: CUT(largest(step / 'progress')), 'changed'),
  file_damage(
    'a step that is a file', 0, 'run/checkpoints/999999', lambda path: path.touch(), 'damaged'
  ),
  file_damage(
    'a step that is empty', 0, 'run/checkpoints/999999', lambda path: path.mkdir(), 'damaged'
  ),
  file_damage('no checkpoint left', 0, 'run/checkpoints', shutil.rmtree),
  file_damage('metrics.jsonl deleted', 0, 'run/metrics.jsonl', REMOVE, 'warning', gap=True),
  file_damage('metrics.jsonl cut', 0, 'run/metrics.jsonl', CUT, 'warning', gap=True),
  file_damage('metrics.jsonl flipped', 0, 'run/metrics.jsonl', flip, 'warning', gap=True),
  file_damage(
    'metrics.jsonl longer',
    0,
    'run/metrics.jsonl',
    lambda path: path.write_bytes(path.read_bytes() + b'{"x'),
  ),
  signalled(signal.SIGTERM, 'saved step'),
  signalled(signal.SIGINT, 'saved step'),
  signalled(signal.SIGHUP, 'saved step'),
  signalled(signal.SIGKILL),
  Case('another process trains', 7, ('held by process',), env={'UR4REC_LOCK_SECONDS': '1'}),
)


class Outcome(NamedTuple):
  """What a case ended with, and what is wrong about it, if anything."""

  code: int
  message: str
  problem: str


def command(case: Case, folder: pathlib.Path) -> list[str]:
  """Returns the command line of a case."""
  flags = case.starts_with
  if flags is None:
    flags = ('--config=synthetic', '--config.data_dir=data', '--workdir=run', *SMALL)
    flags = (*flags, f'--config.compilation_cache={folder.parent / "compiled"}')
  flags = (*flags, *(flag.format(folder=folder) for flag in case.flags))
  return [sys.executable, '-m', 'ur4rec_jax.main', *flags]


def prepare(workdir: pathlib.Path) -> None:
  """Makes `WORKDIR/good` with `data` and a finished `run`, if it is missing."""
  good = workdir / 'good'
  if (good / 'run/results.json').exists():
    return
  shutil.rmtree(good, ignore_errors=True)
  good.mkdir(parents=True)
  build = [sys.executable, '-m', 'data_prep.build_dataset', '--source=synthetic']
  env = environment({}, good)
  for words in (
    [*build, '--data_dir=data', '--num_users=120', '--num_items=60'],
    command(Case('good', 0), good),
  ):
    done = subprocess.run(words, cwd=good, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
      sys.exit(done.stderr)


def environment(changes: Mapping[str, str], folder: pathlib.Path) -> dict[str, str]:
  changes = {name: value.format(folder=folder) for name, value in changes.items()}
  paths = [changes.pop('PYTHONPATH', ''), str(ROOT)]
  path = os.pathsep.join(filter(None, paths))
  return os.environ | {'JAX_PLATFORMS': 'cpu'} | changes | {'PYTHONPATH': path}


def _start(case: Case, folder: pathlib.Path) -> None:
  """Runs the command of a case in this process, which was forked for it."""
  os.chdir(folder)
  os.environ |= environment(case.env, folder)
  for stream, name in ((1, 'output'), (2, 'error')):
    os.dup2(os.open(case.output or name, os.O_WRONLY | os.O_CREAT), stream)
  if case.file_size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_size, case.file_size))
  program, *words = command(case, folder)
  if case.output or {'JAX_PLATFORMS', 'PYTHONPATH'} & case.env.keys():  # Which imports read.
    os.execv(program, [program, *words])
  from ur4rec_jax import main

  sys.argv = words[1:]
  main.main()


def _outcome(folder: pathlib.Path, name: str) -> bytes | dict:
  """Reads a file of a run's results, without the version of the program that wrote it."""
  content = (folder / 'run' / name).read_bytes()
  return json.loads(content) | {'git': None} if name == 'results.json' else content


def run_case(case: Case, workdir: pathlib.Path) -> Outcome:
  """Runs a case on a copy of `WORKDIR/good` and judges how it ended."""
  folder, good = workdir / 'case', workdir / 'good'
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(good, folder)
  (folder / 'run/results.json').unlink()
  case.damage(folder)

  with contextlib.ExitStack() as stack:
    if case.code == 7:
      holder = subprocess.Popen(
        [sys.executable, '-c', HOLD_LOCK, folder / 'run/lock'],
        env=environment({}, folder),
        stdout=subprocess.PIPE,
      )
      stack.callback(holder.wait)
      stack.callback(holder.kill)
      holder.stdout.readline()
    process = _FORKS.Process(target=_start, args=(case._replace(damage=None, act=None), folder))
    process.start()
    if case.act:
      lines = folder / 'run/metrics.jsonl'
      while process.is_alive() and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.02)
      case.act(process.pid)
    process.join(LIMIT_SECONDS)
    process.kill()
    process.join()
  code = process.exitcode if process.exitcode >= 0 else 128 - process.exitcode
  message = '' if case.output else (folder / 'error').read_text()
  problems = [f'exit code {code}'] if code != case.code else []
  problems += [f'no word of {word!r}' for word in case.words if word not in message]
  problems += ['a traceback'] if 'Traceback' in message else []
  if not case.code:
    files = [name for name in RESULTS if not (case.gap and name == 'metrics.jsonl')]
    problems += [f'another {x}' for x in files if _outcome(folder, x) != _outcome(good, x)]
  lines = [line for line in message.splitlines() if line.strip()]
  shown = [line for line in lines if line.startswith(('error', 'warning'))] or lines[-1:] or ['']
  return Outcome(code, shown[0], ', '.join(problems))


@exit_on_reported_error
def main() -> None:
  """Runs all cases and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='folder for the runs')
  parser.add_argument('--only', default='', help='only cases whose name contains this')
  flags = parser.parse_args()
  workdir = flags.workdir.absolute()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  _FORKS.set_forkserver_preload(['ur4rec_jax.main', 'ur4rec_jax.runs.sweep'])
  prepare(workdir)
  wrong = 0
  print('| mistake or damage | exit code | start again? | message | wrong |')
  print('| --- | --- | --- | --- | --- |')
  cases = [case for case in CASES if flags.only in case.name]
  for case in cases:
    code, message, problem = run_case(case, workdir)
    told = EXIT_CODES.get(code)
    again = 'unknown' if told is None else 'yes' if told.restart else 'no'
    message = message.replace(str(workdir), '')[:160].replace('|', '/')
    print(f'| {case.name} | {code} | {again} | {message} | {problem} |', flush=True)
    wrong += bool(problem)
  print(json.dumps({'cases': len(cases), 'wrong': wrong}))
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()

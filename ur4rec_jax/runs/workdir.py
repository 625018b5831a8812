"""The folder of a run: its config, a lock for one process, and compiled programs."""

import contextlib
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from ur4rec_jax.errors import InputError, StorageError, say
from ur4rec_jax.files import only_process, write_file
from ur4rec_jax.runs.compiled_programs import keep_compiled_programs
from ur4rec_jax.runs.config_checks import check_unchanged, flatten
from ur4rec_jax.runs.knobs import KNOBS, from_stored
from ur4rec_jax.runs.open_run import Run, open_run
from ur4rec_jax.runs.saved_steps import saved_steps
from ur4rec_jax.sharding import devices

CONFIG = 'config.json'
RESULT_FILES = (
  'results.json',
  'test_ranks.npz',
  'timing.json',
  'shown_users.json',
  'report.html',
)


def stored_config(workdir: str | pathlib.Path) -> ConfigDict:
  """Reads the config that a run was last started with.

  Raises:
    InputError: the folder holds no run, or its config.json is damaged.
  """
  path = pathlib.Path(workdir) / CONFIG
  if not path.is_file():
    # Such as a folder of several seeds, or one that `quick` or `ur4rec_jax.train` made.
    inside = (
      path.parent.glob(f'{folders}/{CONFIG}') for folders in ('seed*', 'runs/*', '*/runs/*')
    )
    runs = [found.parent for paths in inside for found in paths]
    way_out = f'train one: python -m ur4rec_jax.main --config=NAME --workdir={workdir}'
    if runs:
      way_out = f'give one of those inside: {", ".join(map(str, sorted(runs)))}'
    elif path.with_name('program.bin').is_file():
      way_out = 'it is an export, which serve --export and ur4rec_jax.exported.load open'
    raise InputError(f'--workdir {workdir}: no run here (no {CONFIG}); {way_out}')
  return from_stored(_record(path)['config'])


def stored_identity(workdir: str | pathlib.Path) -> dict[str, Any] | None:
  """Reads what identifies the data of a run, see `Dataset.identity`; InputError if damaged."""
  return _record(pathlib.Path(workdir) / CONFIG).get('dataset')


def _record(path: pathlib.Path) -> dict:
  """Reads a `config.json`; InputError if it is damaged."""
  try:
    record = json.loads(path.read_text())
    from_stored(record['config'])
  except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
    raise InputError(
      f'{path}: damaged ({error!r:.200}); put back a copy, or train in another --workdir'
    ) from error
  return record


def check_workdir(workdir: str, run: Run, free: tuple[str, ...] = ()) -> bool:
  """Checks that the run in `workdir` has this dataset and this config.

  Args:
    workdir: the run's folder.
    run: the run with its current config and data.
    free: config fields whose names start with one of these may differ.

  Returns:
    Whether the folder holds a run.

  Raises:
    InputError: it is another run; the message names the dataset or the field.
  """
  path = pathlib.Path(workdir) / CONFIG
  if not path.exists():
    if steps := saved_steps(workdir):
      raise InputError(
        f'{workdir} holds checkpoints, up to step {steps[0]}, but no {CONFIG}, which says what run '
        f'they are of; put {CONFIG} back, or use another --workdir'
      )
    return False
  record, now = _record(path), run.dataset.identity()
  config, started = from_stored(record['config']), record.get('dataset')
  if started != now:
    raise InputError(
      f'{workdir} holds a run on dataset {started}, but config.data_dir='
      f'{run.config.data_dir} is {now}; name the folder of that dataset, or use another --workdir'
    )
  check_unchanged(config.to_dict(), run.config.to_dict(), workdir, free)
  return True


def is_started_with(workdir: str | pathlib.Path, config: ConfigDict) -> bool:
  """Returns whether the run in `workdir` was last started with exactly this config."""
  if not (pathlib.Path(workdir) / CONFIG).exists():
    return False
  return _as_stored(stored_config(workdir)) == _as_stored(config)


def _as_stored(config: ConfigDict) -> dict[str, Any]:
  """Returns the fields of a config as JSON reads them, with an absolute path of the data."""
  fields = json.loads(json.dumps(config.to_dict()))
  return fields | {'data_dir': os.path.abspath(fields['data_dir'])}


def open_stored_run(workdir: str | pathlib.Path, data_dir: str | pathlib.Path | None = None) -> Run:
  """Opens the run in a folder with the config that it was last started with.

  Args:
    workdir: the run's folder.
    data_dir: the folder of the prepared data, if it has moved since training.

  Raises:
    InputError: the folder holds no run, or its data are missing or have changed.
  """
  config = stored_config(workdir)
  if data_dir is not None:
    config.data_dir = str(data_dir)
  elif not os.path.isdir(config.data_dir):
    raise InputError(
      f'--workdir {workdir}: its data folder {config.data_dir} is not there; if it has moved, say'
      ' where it is now: --data_dir=FOLDER'
    )
  run = open_run(config)
  check_workdir(str(workdir), run)
  return run


@contextlib.contextmanager
def claimed_workdir(workdir: str, run: Run) -> Iterator[None]:
  """Lets one process train in the folder.

  It also makes `WORKDIR/compiled` the cache of compiled programs.

  Raises:
    InputError: the folder holds another run.
    BusyError: another process is training in it.
    StorageError: the folder cannot be written.
  """
  if not str(workdir):
    raise InputError('workdir is empty: it must name the folder in which the run is kept')
  check_workdir(workdir, run)
  keep_compiled_programs(workdir, run.config.compilation_cache)
  folder = pathlib.Path(workdir)
  taken = (
    f'another process is training in {workdir}; wait for it, stop it, or use another --workdir'
  )
  with contextlib.ExitStack() as lock:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      if devices.is_main_process():
        lock.enter_context(only_process(folder / 'lock', taken))
    except OSError as error:
      raise StorageError(f'cannot write to --workdir {workdir}: {error.strerror}') from error
    yield


def note_start(workdir: str, run: Run) -> None:
  """Writes the config to `config.json`, and warns if the run goes on to another result.

  Results of the same run with another config, such as more epochs, are removed, so that results
  always belong to the config. A finished run keeps its `config.json`, which says what trained it.
  """
  if not devices.is_main_process():
    return
  folder = pathlib.Path(workdir)
  is_same = is_started_with(folder, run.config)
  if is_same and (folder / 'results.json').exists():
    return
  content = {
    'dataset': run.dataset.identity(),
    'command': _command(),
    'machine': devices.machine(),
    'config': _as_stored(run.config),
  }
  if (folder / CONFIG).exists() and saved_steps(folder):
    _warn_of_other_numbers(folder, _decisive(_record(folder / CONFIG)), _decisive(content))
  if not is_same:
    for name in RESULT_FILES:
      (folder / name).unlink(missing_ok=True)
  write_file(folder / CONFIG, json.dumps(content, indent=2) + '\n')


def _command() -> str:
  """Returns the command line of this program, which need not be `ur4rec_jax.main`."""
  program, *flags = sys.argv
  module = sys.modules['__main__'].__spec__  # None for a script, and for the command `ur4rec`.
  if program.startswith('ur4rec '):  # As `cli` sets it.
    words = program.split()
  else:
    words = ['python', *(('-m', module.name) if module else (program,))]
  return shlex.join([*words, *flags])


def _warn_of_other_numbers(
  folder: pathlib.Path, before: dict[str, Any], now: dict[str, Any]
) -> None:
  differing = [name for name in now if name in before and before[name] != now[name]]
  if not differing:
    return
  changes = ', '.join(f'{name} {now[name]} instead of {before[name]}' for name in differing)
  if {'device', 'devices'} & set(differing):
    effect = 'dropout and negatives are drawn in another way, so it ends as with another seed'
  else:
    effect = (
      'numbers are rounded in another way, so its last digits will not be those of an undisturbed '
      'run'
    )
  keep = ''
  if 'devices' in differing and before['device'] == now['device'] == 'cpu':
    keep += f'; JAX_NUM_CPU_DEVICES={before["devices"]} keeps the number of devices'
  if 'threads' in differing:
    keep += f'; --config.cpu_threads={before["threads"]} keeps the number of threads'
  say(f'warning: the run in {folder} goes on with {changes}; {effect}{keep}', sys.stderr)


def _decisive(record: dict) -> dict[str, Any]:
  """Returns what decides the last digits of a run; {} if an earlier version wrote the record."""
  if not isinstance(record.get('machine'), dict):
    return {}
  fields = flatten(from_stored(record['config']).to_dict())
  # The same on equal devices, whether the config names the type or leaves it to them.
  fields['dtype'] = devices.compute_dtype(fields['dtype']).name
  found = record['machine'] | {name: fields[name] for name in KNOBS if KNOBS[name].may_round}
  # Only the number of threads matters, wherever it comes from.
  return {name: value for name, value in found.items() if name not in ('cores', 'cpu_threads')}

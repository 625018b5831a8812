"""The folder of a run: its config, a lock for one process, and compiled programs."""

import contextlib
import json
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from ur4rec_jax.errors import InputError, StorageError, say
from ur4rec_jax.files import only_process, write_file
from ur4rec_jax.runs.checkpoint import saved_steps
from ur4rec_jax.runs.config_checks import check_unchanged, flatten
from ur4rec_jax.runs.knobs import KNOBS, from_stored
from ur4rec_jax.runs.open_run import Run
from ur4rec_jax.sharding import devices

CONFIG = 'config.json'
RESULT_FILES = ('results.json', 'test_ranks.npz', 'timing.json', 'report.html')
_NO_CACHE = 'none'


def stored_config(workdir: str | pathlib.Path) -> ConfigDict:
  """Reads the config that a run was last started with.

  Raises:
    InputError: the folder holds no run, or its config.json is damaged.
  """
  path = pathlib.Path(workdir) / CONFIG
  if not path.is_file():
    raise InputError(
      f'--workdir {workdir}: no run here (no {CONFIG}); train one: python -m ur4rec_jax.main'
      f' --config=NAME --workdir={workdir}'
    )
  return from_stored(_record(path)['config'])


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
    run: as it is now.
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
      f'{run.config.data_dir} is {now}; use another --workdir'
    )
  check_unchanged(config.to_dict(), run.config.to_dict(), workdir, free)
  return True


def is_started_with(workdir: str | pathlib.Path, config: ConfigDict) -> bool:
  """Returns whether the run in `workdir` was last started with exactly this config."""
  if not (pathlib.Path(workdir) / CONFIG).exists():
    return False
  return stored_config(workdir).to_dict() == json.loads(json.dumps(config.to_dict()))


@contextlib.contextmanager
def claimed_workdir(workdir: str, run: Run) -> Iterator[None]:
  """Lets one process train in the folder, and writes the config to `config.json`.

  It also makes `WORKDIR/compiled` the cache of compiled programs. Results of the same run with
  another config, such as fewer epochs, are removed, so that results always belong to the config.

  Raises:
    InputError: the folder holds another run.
    BusyError: another process is training in it.
    StorageError: the folder cannot be written.
  """
  if not str(workdir):
    raise InputError('workdir is empty: it must name the folder in which the run is kept')
  check_workdir(workdir, run)
  keep_compiled_programs(workdir, run.config)
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
    if devices.is_main_process():
      _note_start(folder, run)
    yield


def _note_start(folder: pathlib.Path, run: Run) -> None:
  command = shlex.join(['python', '-m', 'ur4rec_jax.main', *sys.argv[1:]])
  content = {
    'dataset': run.dataset.identity(),
    'command': command,
    'machine': devices.machine(),
    'config': run.config.to_dict(),
  }
  if (folder / CONFIG).exists():
    before, now = _rounding(_record(folder / CONFIG)), _rounding(content)
    differing = [x for x in now if x in before and before[x] != now[x]]
    changes = [f'{x} {now[x]} instead of {before[x]}' for x in differing]
    if changes and saved_steps(folder):
      keep = ''
      if 'threads' in differing:
        keep = f'; --config.cpu_threads={before["threads"]} keeps the number of threads'
      say(
        f'warning: the run in {folder} goes on with {", ".join(changes)}; sums are rounded in '
        f'another order, so its last digits will not be those of an undisturbed run{keep}',
        sys.stderr,
      )
  if not is_started_with(folder, run.config):
    for name in RESULT_FILES:
      (folder / name).unlink(missing_ok=True)
  write_file(folder / CONFIG, json.dumps(content, indent=2) + '\n')


def _rounding(record: dict) -> dict[str, Any]:
  """Returns what the rounding of a run depends on, from a `config.json`; empty if it is old."""
  if not isinstance(record.get('machine'), dict):
    return {}
  fields = flatten(from_stored(record['config']).to_dict())
  found = record['machine'] | {name: fields[name] for name in KNOBS if KNOBS[name].may_round}
  # Only the number of threads matters, wherever it comes from.
  return {name: value for name, value in found.items() if name not in ('cores', 'cpu_threads')}


def keep_compiled_programs(workdir: str, config: ConfigDict) -> None:
  """Lets every start but the first find its programs compiled, in `config.compilation_cache`.

  By default that is a folder in `workdir`, unless `JAX_COMPILATION_CACHE_DIR` names another.
  """
  folder = config.compilation_cache
  if folder == _NO_CACHE:
    jax.config.update('jax_enable_compilation_cache', False)
  elif folder or not jax.config.jax_compilation_cache_dir:
    folder = folder or str(pathlib.Path(workdir).absolute() / 'compiled')
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

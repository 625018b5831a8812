"""The folder of a run: its config, a lock for one process, and compiled programs."""

import atexit
import contextlib
import json
import pathlib
import shlex
import sys

import jax
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.errors import InputError, StorageError
from ur4rec_jax.files import only_process, write_file
from ur4rec_jax.runs.config_checks import check_unchanged
from ur4rec_jax.runs.knobs import from_stored
from ur4rec_jax.sharding import devices

_NO_CACHE = 'none'
# Locks that this process holds until it ends.
_locks = contextlib.ExitStack()
atexit.register(_locks.close)


def check_workdir(
  workdir: str, config: ConfigDict, dataset: Dataset, free: tuple[str, ...] = ()
) -> bool:
  """Checks that the run in `workdir` is one on this dataset with this config.

  Args:
    workdir: the run's folder.
    config: config now.
    dataset: dataset now.
    free: config fields whose names start with one of these may differ.

  Returns:
    Whether there is a run.

  Raises:
    InputError: it is another run; the message names the dataset or the field.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    return False
  started = json.loads(path.read_text())
  if started['dataset'] != dataset.identity():
    raise InputError(
      f'{workdir} holds a run on dataset {started["dataset"]}, but config.data_dir='
      f'{config.data_dir} is {dataset.identity()}; use another --workdir'
    )
  check_unchanged(from_stored(started['config']).to_dict(), config.to_dict(), workdir, free)
  return True


def is_started_with(workdir: str | pathlib.Path, config: ConfigDict) -> bool:
  """Returns whether the run in `workdir` was last started with exactly this config."""
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    return False
  started = from_stored(json.loads(path.read_text())['config'])
  return started.to_dict() == json.loads(json.dumps(config.to_dict()))


def claim_workdir(workdir: str, config: ConfigDict, dataset: Dataset) -> None:
  """Checks the folder, locks it against other processes, and notes the config in `config.json`.

  Results of the same run with another config, such as fewer epochs, are removed: what is there is
  of the config that is there.

  Raises:
    InputError: the folder holds another run, or a process is training in it.
    StorageError: the folder cannot be written.
  """
  check_workdir(workdir, config, dataset)
  folder = pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not devices.is_main_process():
      return
    taken = (
      f'another process is training in {workdir}; wait for it, stop it, or use another --workdir'
    )
    _locks.enter_context(only_process(folder / 'lock', taken))
  except OSError as error:
    raise StorageError(f'cannot write to --workdir {workdir}: {error.strerror}') from error
  if not is_started_with(folder, config):
    (folder / 'results.json').unlink(missing_ok=True)
  command = shlex.join(['python', '-m', 'ur4rec_jax.main', *sys.argv[1:]])
  content = {'dataset': dataset.identity(), 'command': command, 'config': config.to_dict()}
  write_file(folder / 'config.json', json.dumps(content, indent=2) + '\n')


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

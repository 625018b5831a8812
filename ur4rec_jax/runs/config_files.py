"""Python files of users that a command runs: config files, by path or name, and sweeps."""

import difflib
import os
import runpy
import traceback
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from ur4rec_jax.errors import InputError
from ur4rec_jax.files import shipped_configs
from ur4rec_jax.runs.knobs import no_such_field

_FOLDERS = ('data_dir', 'compilation_cache')  # Fields in which ~ is the home folder.


def load_config(place: str) -> ConfigDict:
  """Returns the config of a config file.

  Args:
    place: `FILE.py` or the name of a config of this project, such as `movielens_1m`; `:VARIANT`
      may follow.

  Raises:
    InputError: there is no such file, or it fails, or it returns something else.
  """
  name, colon, variant = place.partition(':')
  path = _find(name)
  config = call_function(path, 'get_config', *([variant] if colon else []))
  if not isinstance(config, ConfigDict):
    raise InputError(f'{path}: get_config must return a ConfigDict, not {config!r:.60}')
  for field in _FOLDERS:
    if isinstance(config.get(field), str):
      config[field] = os.path.expanduser(config[field])
  return config


def _find(name: str) -> str:
  if os.path.isfile(name):
    return name
  shipped = shipped_configs()
  if name in shipped:
    return str(shipped[name])
  stem = os.path.splitext(os.path.basename(name))[0]
  nearest = difflib.get_close_matches(stem, shipped, n=1)
  raise InputError(
    f'{name}: no such file, nor one of the configs of this project ({", ".join(shipped)})'
    + ''.join(f'; did you mean {match}?' for match in nearest)
  )


def call_function(path: str, name: str, *arguments: Any) -> Any:
  """Runs a Python file and returns the result of one of its functions.

  Raises:
    InputError: the file cannot be read, lacks the function, or raises an exception.
  """
  try:
    function = runpy.run_path(path).get(name)
    if callable(function):
      return function(*arguments)
  except InputError as error:
    raise InputError(f'{path}: {error}') from error
  except (OSError, SyntaxError) as error:
    raise InputError(f'{path} cannot be read: {error}') from error
  except (Exception, SystemExit) as error:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = f'{path}, line {lines[-1]}' if lines else path
    raise InputError(f'{where}: {type(error).__name__}: {error}') from error
  raise InputError(f'{path} has no function {name}')


def check_fields(config: ConfigDict, fields: list[str]) -> None:
  """Checks that a config has the fields that a command line sets.

  Args:
    config: the config before they are set.
    fields: dotted names.

  Raises:
    InputError: it lacks one; the message names the nearest, or the new name.
  """
  known = [*_names(config)]
  for field in fields:
    if field not in known:
      raise InputError(f'config.{no_such_field(field, known)}')


def _names(config: ConfigDict, prefix: str = '') -> Iterator[str]:
  for key in config:
    yield f'{prefix}{key}'
    if isinstance(config[key], ConfigDict):
      yield from _names(config[key], f'{prefix}{key}.')

"""Imports modules of users, which add losses and blocks to the tables of this project."""

import importlib
import os
import sys
from collections.abc import Sequence

from ur4rec_jax.errors import InputError


def load_extensions(names: Sequence[str]) -> None:
  """Imports modules by name, also from the working directory.

  Args:
    names: `config.extensions`.

  Raises:
    InputError: a module is missing or fails.
  """
  if names and os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  for name in names:
    try:
      importlib.import_module(name)
    except Exception as error:  # The code of a user may raise anything.
      raise InputError(
        f'config.extensions: {name!r} cannot be imported ({error!r:.200}); it must be the name of a'
        ' Python module in the working directory or on PYTHONPATH'
      ) from error

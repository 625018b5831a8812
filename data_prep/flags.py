"""One command-line parser for all commands of data_prep."""

import argparse
import difflib
from typing import NoReturn

from absl import logging as absl_logging

from ur4rec_jax.errors import InputError
from ur4rec_jax.files import expand_home


class Parser(argparse.ArgumentParser):
  """An argparse parser whose errors are `InputError`s of one line.

  Flags are written in full, and an unknown flag is answered with the most similar one.

  Attributes:
    given: names of the attributes whose flags the last parsed command line has, also where their
      values are the defaults.
  """

  def __init__(self, description: str):
    """Creates a parser without flags; `description` is the docstring of the command."""
    super().__init__(
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    self.given: frozenset[str] = frozenset()

  def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the flags, by default those of the process.

    Raises:
      InputError: a flag is unknown, misses its value or has a wrong one.
    """
    # TFDS logs each file that it opens, and HTTP clients log each request.
    absl_logging.set_verbosity(absl_logging.WARNING)
    argv = expand_home(argv)
    names = [argument.partition('=')[0] for argument in argv]
    for name in names:
      if name.startswith('--') and name not in self._option_string_actions:
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        self.error(f'unknown flag {name}' + (f'; did you mean {near[0]}?' if near else ''))
    actions = self._option_string_actions
    self.given = frozenset(actions[name].dest for name in names if name in actions)
    flags, others = self.parse_known_args(argv)
    if others:
      self.error(f'unexpected argument {others[0]!r}; flags are written --name=value')
    return flags

  def error(self, message: str) -> NoReturn:
    """Raises `message` as an `InputError`."""
    raise InputError(f'{message}; --help lists all flags')

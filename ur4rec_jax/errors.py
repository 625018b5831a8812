"""The one exception that means "your input is wrong", as opposed to a bug."""

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
  """Bad data, flag, config field or folder; the message says where and the way out."""


def exit_on_input_error(main: Callable) -> Callable:
  """Wraps a program's `main` so that an `InputError` is one line on stderr and exit code 2."""

  @functools.wraps(main)
  def wrapped(*args, **kwargs):
    try:
      return main(*args, **kwargs)
    except InputError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)

  return wrapped

"""Errors that are part of the interface: one clear message and an exit code, never a traceback."""

import functools
import sys
from collections.abc import Callable


class ReportedError(Exception):
  """Base of the errors that a program reports to its user.

  Attributes:
    exit_code: what the process ends with.
  """

  exit_code = 1


class InputError(ReportedError, ValueError):
  """Bad data, flag, config field or folder; the message says where and the way out."""

  exit_code = 2


class DivergenceError(ReportedError, FloatingPointError):
  """A loss, gradient or score is not finite."""

  exit_code = 3


class StorageError(ReportedError, OSError):
  """Something could not be written; what was written before stays good."""

  exit_code = 4


class LostProcessError(ReportedError):
  """Another process of the run has died; the same command goes on from the last checkpoint."""

  exit_code = 5


class InterruptedBySignal(ReportedError):
  """The run was told to stop, and has saved itself: the same command goes on from there."""

  def __init__(self, message: str, signal_number: int):
    super().__init__(message)
    self.exit_code = 128 + signal_number


def exit_on_reported_error(main: Callable) -> Callable:
  """Wraps a program's `main` : a `ReportedError` becomes a message on stderr and an exit code."""

  @functools.wraps(main)
  def wrapped(*args, **kwargs):
    try:
      return main(*args, **kwargs)
    except ReportedError as error:
      prefix = '' if isinstance(error, InterruptedBySignal) else 'error: '
      print(f'{prefix}{error}', file=sys.stderr, flush=True)
      sys.exit(error.exit_code)

  return wrapped

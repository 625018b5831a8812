"""Errors that are part of the interface: one clear message and an exit code, never a traceback."""

import functools
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

_P = ParamSpec('_P')
_T = TypeVar('_T')


class ExitCode(NamedTuple):
  """What the exit code of a program tells the person or the launcher that started it.

  Attributes:
    meaning: in one line.
    restart: whether the same command may succeed when it is started again, as launchers do.
  """

  meaning: str
  restart: bool


EXIT_CODES = {
  0: ExitCode('the work is done', restart=False),
  1: ExitCode('an error that the program does not know, with its traceback', restart=True),
  2: ExitCode('wrong input: a flag, a config field, data or a folder', restart=False),
  3: ExitCode('divergence: a loss, gradient or score is not finite', restart=False),
  4: ExitCode('storage: something could not be written', restart=False),
  5: ExitCode('another process of the run has died', restart=True),
  128 + signal.SIGINT: ExitCode('stopped by Ctrl-C; training saves first', restart=True),
  128 + signal.SIGKILL: ExitCode('killed, for example for want of memory', restart=True),
  128 + signal.SIGTERM: ExitCode('told to stop; training saves first', restart=True),
}


class ReportedError(Exception):
  """Base of the errors that a program reports to its user.

  Attributes:
    exit_code: what the process ends with, one of `EXIT_CODES`.
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


def exit_on_reported_error(main: Callable[_P, _T]) -> Callable[_P, _T]:
  """Wraps a program's `main`: a `ReportedError` becomes a message on stderr and an exit code."""

  @functools.wraps(main)
  def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    try:
      return main(*args, **kwargs)
    except ReportedError as error:
      prefix = '' if isinstance(error, InterruptedBySignal) else 'error: '
      print(f'{prefix}{error}', file=sys.stderr, flush=True)
      sys.exit(error.exit_code)

  return wrapped

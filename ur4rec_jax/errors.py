"""Messages and exit codes: an error is one clear message and a code, never a traceback."""

import argparse
import contextlib
import errno
import functools
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec, TextIO, TypeVar

_P = ParamSpec('_P')
_T = TypeVar('_T')


class ExitCode(NamedTuple):
  """The meaning of an exit code for the person or the launcher that started the program.

  Attributes:
    meaning: the meaning in one line.
    faults: typical causes, for the table in docs/training.md.
    restart: whether the same command may succeed when it is started again, as launchers do.
  """

  meaning: str
  faults: str
  restart: bool


_SIGPIPE = 13  # The module `signal` has no such name on Windows.
# The one table of exit codes. `launch/` and docs/training.md agree with it, and a test compares.
EXIT_CODES = {
  0: ExitCode('finished', 'none', restart=False),
  1: ExitCode(
    'an error that the program does not know, with its traceback',
    'a fault of the program itself; Python cannot find the program; texts that could not all be '
    'generated',
    restart=False,
  ),
  2: ExitCode(
    'wrong input or environment',
    'an unknown flag, field, variant or mode; a bad value; a missing config file, data folder or '
    'workdir; a config that no longer fits its run; checkpoints of another model or version; a '
    'damaged `config.json`; no such device; wrong `XLA_FLAGS` or `JAX_*` variables; a package that '
    'cannot be imported; not enough memory for the config',
    restart=False,
  ),
  3: ExitCode('divergence', 'a loss, gradient or score is not finite', restart=False),
  4: ExitCode(
    'storage',
    'a full disk or quota; a file or folder that cannot be written; an error of the disk',
    restart=False,
  ),
  5: ExitCode(
    'another process of the run has died',
    'the others notice at once, or after about 30 seconds without a heartbeat',
    restart=True,
  ),
  6: ExitCode('a device failed', 'an error of the GPU, the TPU or their driver', restart=True),
  7: ExitCode(
    'another process uses the folder', 'it held the lock for longer than a minute', restart=True
  ),
  8: ExitCode(
    'a background task of the service has failed',
    'the task that ranks, or the one that writes events; its error was printed at once',
    restart=True,
  ),
  126: ExitCode('the shell cannot run Python', 'it is not executable', restart=False),
  127: ExitCode('the shell cannot find Python', 'a wrong path or environment', restart=False),
  128 + signal.SIGHUP: ExitCode('its terminal closed', 'training saves first', restart=True),
  128 + signal.SIGINT: ExitCode('stopped by Ctrl-C', 'training saves first', restart=True),
  128 + signal.SIGABRT: ExitCode(
    'aborted', 'jax lost the first process of the run, which coordinates the others', restart=True
  ),
  128 + signal.SIGKILL: ExitCode(
    'killed', 'the machine is out of memory or goes down', restart=True
  ),
  128 + _SIGPIPE: ExitCode(
    'the reader of its output has left', '`head` has seen enough', restart=True
  ),
  128 + signal.SIGTERM: ExitCode('told to stop', 'training saves first', restart=True),
}
_STORAGE = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
  errno.ESTALE,
  errno.EEXIST,
  errno.EISDIR,
  errno.ENOTDIR,
  errno.ENAMETOOLONG,
)
# Statuses of jax errors after which the same command may succeed. Others are faults of the program.
_DEVICE_STATUSES = (
  'INTERNAL',
  'UNKNOWN',
  'UNAVAILABLE',
  'ABORTED',
  'CANCELLED',
  'DEADLINE_EXCEEDED',
  'DATA_LOSS',
)


# Characters that a terminal acts on, except for the ends of lines and tabs: escape sequences start
# with one of these, and some others reverse the direction of text.
_CONTROLS = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')


def printable(text: str) -> str:
  r"""Returns a text in which control characters are visible, e.g. an escape character as `\x1b`.

  Titles, ids and texts come from files of others. A terminal would obey the sequences in them.
  """
  return _CONTROLS.sub(lambda match: match[0].encode('unicode_escape').decode(), text)


def server_name(address: str) -> str:
  """Returns the part of a server's address that messages may show: no user, no password."""
  return address.rpartition('@')[2].rpartition('://')[2].partition('?')[0]


def counted(number: int, noun: str) -> str:
  """Formats a number of things, such as `1 user` and `1,200 users`."""
  return f'{number:,} {noun}{"s" * (number != 1)}'


def say(message: str, file: TextIO | None = None) -> None:
  """Prints a message at once, on stdout by default.

  Control characters, and those that the encoding of the stream lacks, are printed as escapes.
  """
  stream, text = file or sys.stdout, printable(message)
  if encoding := getattr(stream, 'encoding', None):
    text = text.encode(encoding, 'backslashreplace').decode(encoding)
  print(text, file=stream, flush=True)


class ReportedError(Exception):
  """Base of the errors that a program reports to its user.

  Attributes:
    exit_code: exit code of the process, one of `EXIT_CODES`.
  """

  exit_code = 1


class InputError(ReportedError, ValueError):
  """Bad data, flag, config field or folder; the message says where and the way out."""

  exit_code = 2


class OutOfMemoryError(InputError):
  """The config needs more memory than the device or the machine has."""


class DivergenceError(ReportedError, FloatingPointError):
  """A loss, gradient or score is not finite."""

  exit_code = 3


class StorageError(ReportedError, OSError):
  """A write has failed; what was written before stays good."""

  exit_code = 4


class LostProcessError(ReportedError):
  """Another process of the run has died; the same command goes on from the last checkpoint."""

  exit_code = 5


class DeviceError(ReportedError):
  """A GPU or TPU failed; the same command goes on from the last checkpoint."""

  exit_code = 6


class BusyError(ReportedError):
  """Another process has held the lock of a folder for as long as this one was ready to wait."""

  exit_code = 7


class FailedTaskError(ReportedError):
  """A background task of the service has failed, so that the service had to end."""

  exit_code = 8


class InterruptedBySignal(ReportedError):
  """The run was told to stop, and has saved itself: the same command goes on from there."""

  def __init__(self, message: str, signal_number: int):
    super().__init__(message)
    self.exit_code = 128 + signal_number


def as_reported(error: BaseException) -> ReportedError | None:
  """Converts an error of Python, the system or jax to the error that the user sees.

  Returns:
    The error itself if it is a `ReportedError`; None if the program does not know such errors.
  """
  message = (str(error).splitlines() or [type(error).__name__])[0]
  status = message.partition(':')[0]
  match error:
    case ReportedError():
      return error
    case KeyboardInterrupt():
      return InterruptedBySignal('stopped by Ctrl-C', signal.SIGINT)
    case ImportError():
      return InputError(
        f'{message}; the installation is incomplete or mixes versions: install the project again, '
        'with --constraint launch/constraints.txt'
      )
    case MemoryError():
      return OutOfMemoryError(f'out of memory: {message}')
    case OSError() if error.errno in _STORAGE:
      place = f' {error.filename}' if error.filename else ''
      return StorageError(
        f'cannot read or write{place}: {error.strerror}; make room or give access, then start the '
        'same command again'
      )
  # Classes of jax, which this file does not import.
  if type(error).__name__ in ('JaxRuntimeError', 'XlaRuntimeError'):
    if status == 'RESOURCE_EXHAUSTED' or 'out of memory' in message.lower():
      return OutOfMemoryError(f'out of memory: {message}')
    if status in _DEVICE_STATUSES:
      return DeviceError(f'a device failed; start the same command again to go on ({message})')
  return None


@contextlib.contextmanager
def errors_end_the_program() -> Iterator[None]:
  """Turns an error of the block that users can act on into a message on stderr and an exit code."""
  try:
    yield
    if sys.stdout is not None:
      sys.stdout.flush()  # If this fails when Python exits, it prints an error of its own.
  except BaseException as error:
    if isinstance(error, BrokenPipeError) and _reader_has_left(sys.stdout):
      _redirect_broken_streams()
      sys.exit(128 + _SIGPIPE)  # Without a word, like other programs.
    reported = as_reported(error)
    if not isinstance(error, SystemExit):
      _note_exit_code(reported.exit_code if reported else 1)
    if reported is None:
      _redirect_broken_streams()
      raise
    prefix = '' if isinstance(reported, InterruptedBySignal) else 'error: '
    with contextlib.suppress(OSError):  # The disk that holds stderr may be full, too.
      say(f'{prefix}{reported}', sys.stderr)
    _redirect_broken_streams()
    sys.exit(reported.exit_code)


def _note_exit_code(code: int) -> None:
  """Writes the code to the file that `UR4REC_EXIT_CODE_FILE` names, unless another process has.

  Of several processes, the first one to end knows the cause. The others end because they lose it,
  with other codes.
  """
  if path := os.environ.get('UR4REC_EXIT_CODE_FILE'):
    with contextlib.suppress(OSError), open(path, 'x') as file:
      file.write(f'{code}\n')


def _reader_has_left(stream: TextIO) -> bool:
  """Tells whether a stream is a pipe that nobody reads any more."""
  with contextlib.suppress(OSError, ValueError, AttributeError):  # No file, or no poll on Windows.
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # Errors are always reported.
    return bool(poll.poll(0))
  return False


def _redirect_broken_streams() -> None:
  """Redirects streams that cannot be written to the null device.

  Otherwise Python would write the rest when it exits, and end with 120.
  """
  for stream in filter(None, (sys.stdout, sys.stderr)):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_on_reported_error(main: Callable[_P, _T]) -> Callable[_P, _T]:
  """Wraps a program's `main` in `errors_end_the_program`."""

  @functools.wraps(main)
  def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
    with errors_end_the_program():
      return main(*args, **kwargs)

  return wrapped


def refuse_idle_flags(
  parser: argparse.ArgumentParser, flags: argparse.Namespace, reader: str, *names: str
) -> None:
  """Raises InputError for the first flag that was given without the one that has it read.

  Args:
    parser: the parser, which knows the defaults.
    flags: the parsed flags.
    reader: name of the flag without which nothing reads the others.
    *names: names of these.
  """
  for name in () if getattr(flags, reader) else names:
    if getattr(flags, name) != parser.get_default(name):
      raise InputError(f'--{name}: is for --{reader}; leave it out')


def exit_code_table() -> str:
  """Returns the rows of `EXIT_CODES` in Markdown, as docs/training.md has them."""
  rows = ['| exit code | what happened | for example | start again? |', '| --- | --- | --- | --- |']
  for code, told in EXIT_CODES.items():
    again = 'yes' if told.restart else 'no'
    rows.append(f'| {code} | {told.meaning} | {told.faults} | {again} |')
  return '\n'.join(rows)

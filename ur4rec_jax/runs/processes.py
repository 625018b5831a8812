"""Waits for the processes that a command starts."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

_SECONDS_OF_PROGRESS = 15  # Between lines of progress where there is no terminal.


def wait(process: subprocess.Popen, told: list[str] | None = None) -> int:
  """Waits for a process and passes signals on to it.

  Args:
    process: the process. If its stderr is a pipe, its lines are printed on this stderr.
    told: gets the lines that were printed.

  Returns:
    The exit code; 128 and the number of the signal if this process or the other one got a signal.
  """
  handlers, got = {}, []

  def pass_on(number, _):
    got.append(number)
    process.send_signal(number)

  with contextlib.suppress(ValueError):  # Not the main thread, as in some notebooks.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      handlers[number] = signal.signal(number, pass_on)
  try:
    if process.stderr is not None:
      _print(process.stderr, [] if told is None else told)
    code = process.wait()
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
  if got:
    return 128 + got[0]  # The process may have ended well just before.
  return 128 - code if code < 0 else code


def _print(lines: Iterable[str], told: list[str]) -> None:
  """Prints the errors and notes of a process, and its progress from time to time."""
  shown = time.monotonic()
  for line in lines:
    if line.startswith('['):  # As `metric_writers` reports progress where there is no terminal.
      if time.monotonic() < shown + _SECONDS_OF_PROGRESS:
        continue
      shown = time.monotonic()
    told.append(line)
    print(line, end='', file=sys.stderr, flush=True)

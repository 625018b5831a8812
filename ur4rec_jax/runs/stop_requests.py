"""Stops a run on SIGTERM, SIGINT and SIGHUP at a moment when it can be saved."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from ur4rec_jax.errors import ReportedError
from ur4rec_jax.sharding import devices


@contextlib.contextmanager
def stop_requests(grace_seconds: float) -> Iterator[Callable[[], int]]:
  """Yields a function that returns the signal that asks the run to stop, or 0.

  After SIGTERM the process ends itself when `grace_seconds` are over, saved or not. Python handles
  a signal only after the call that it is in, and compiling may take longer than a scheduler waits.

  If one of several processes fails with an error that is not a `ReportedError`, it ignores SIGTERM
  from then on. Another process has probably died and the launcher ends the others, but this one
  must still print the reason. A single process goes on to obey, as a sweep trains its next run.
  """
  received = []
  numbers = [signal.SIGTERM, signal.SIGINT]
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Under nohup it is ignored.
    numbers.append(signal.SIGHUP)
  old = {
    number: signal.signal(number, lambda number, frame: received.append(number))
    for number in numbers
  }
  noticed, notify = os.pipe()  # The signal's number arrives here even during a long call.
  os.set_blocking(notify, False)
  woken_before = signal.set_wakeup_fd(notify)
  is_over = threading.Event()

  def end_in_time():
    while number := os.read(noticed, 1):
      if number[0] == signal.SIGTERM and not is_over.wait(grace_seconds):
        print(
          f'SIGTERM: no save within config.checkpoint.grace_seconds={grace_seconds}; start the '
          'same command again to go on from the last checkpoint',
          file=sys.stderr,
          flush=True,
        )
        os._exit(128 + signal.SIGTERM)

  watcher = threading.Thread(target=end_in_time, daemon=True)
  watcher.start()
  is_failing = False
  # All processes of a run must get the same answer, or one would wait for the others.
  any_process = devices.late_any_process()
  try:
    yield lambda: int(any_process(bool(received))) and (received or [signal.SIGTERM])[0]
  except Exception as error:
    is_failing = jax.process_count() > 1 and not isinstance(error, ReportedError)
    raise
  finally:
    is_over.set()
    signal.set_wakeup_fd(woken_before)
    os.close(notify)  # Ends the watcher, which then reads nothing more.
    watcher.join()
    os.close(noticed)
    for number, handler in old.items():
      ignores = is_failing and number == signal.SIGTERM
      signal.signal(number, signal.SIG_IGN if ignores else handler)

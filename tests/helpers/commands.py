"""Runs a command in the process of the tests, which saves the seconds of its imports."""

import contextlib
import io
import subprocess
from collections.abc import Callable, Sequence


def run_here(main: Callable, flags: Sequence[str]) -> subprocess.CompletedProcess:
  """Calls `main(flags)`; returns exit code and output as `subprocess.run` does."""
  out, error, code = io.StringIO(), io.StringIO(), 0
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    try:
      main(list(flags))
    except SystemExit as stop:
      code = stop.code or 0
  return subprocess.CompletedProcess(list(flags), code, out.getvalue(), error.getvalue())

"""Runs generate_text in processes of its own without importing everything each time.

The processes are real: they are forked from one that has done the imports, have their own flags,
environment, output and exit code, and take signals.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['data_prep.generate_text', 'openai', 'anthropic'])


class Program:
  """A started program; the part of `subprocess.Popen` that tests use."""

  def __init__(self, flags: Sequence[str], environment: Mapping[str, str]):
    self._folder = tempfile.TemporaryDirectory()
    self._outputs = [Path(self._folder.name) / name for name in ('out', 'error')]
    arguments = (tuple(map(str, flags)), dict(environment), self._outputs)
    self._process = _CONTEXT.Process(target=_main, args=arguments)
    self._process.start()

  def poll(self) -> int | None:
    """Exit code, None while it runs."""
    return self._process.exitcode

  def wait(self) -> int:
    """Waits for its end and returns the exit code."""
    self._process.join(timeout=120)
    return self._process.exitcode

  def send_signal(self, number: int) -> None:
    """Sends a signal."""
    os.kill(self._process.pid, number)

  returncode = property(poll)

  @property
  def stdout(self) -> str:
    """What it printed."""
    return self._outputs[0].read_text()

  @property
  def stderr(self) -> str:
    """What it printed as errors."""
    return self._outputs[1].read_text()


def _main(flags: Sequence[str], environment: Mapping[str, str], outputs: Sequence[Path]) -> None:
  os.environ.clear()
  os.environ.update(environment)
  for descriptor, path in zip((1, 2), outputs, strict=True):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
  from data_prep import generate_text

  generate_text.main([*flags])

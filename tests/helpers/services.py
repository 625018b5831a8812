"""A service as a process of its own, and requests to it."""

import contextlib
import json
import subprocess
import urllib.error
import urllib.request

from tests.helpers.fork_server import Program
from tests.helpers.runs import ROOT


def serve(environment, *flags):
  """Starts `ur4rec_jax.serve` on a free port; gives what `service` gives."""
  return _ready(Program('ur4rec_jax.serve', ['--port=0', *flags], environment, ROOT))


def service(command, environment):
  """Starts a service; gives the process and the start of its address."""
  return _ready(
    subprocess.Popen(
      command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
  )


def refusal(environment, *flags):
  """The line with which `ur4rec_jax.serve` refuses its flags."""
  done = Program('ur4rec_jax.serve', flags, environment, ROOT).finish()
  assert (done.returncode, done.stdout) == (2, ''), done.stderr
  (line,) = done.stderr.splitlines()
  return line


@contextlib.contextmanager
def _ready(process):
  try:
    line = process.stdout.readline()
    assert line.startswith('ready'), process.stderr.read()
    yield process, line.split()[-1]
  finally:
    process.kill()
    process.communicate()


def request(url, body=None, **headers):
  """Status, headers and content; a body that is no bytes goes as JSON."""
  if body is not None and not isinstance(body, bytes):
    body = json.dumps(body).encode()
  headers = {'Content-Type': 'application/json'} | headers
  try:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
      return answer.status, answer.headers, answer.read().decode()
  except urllib.error.HTTPError as error:
    return error.code, error.headers, error.read().decode()

"""A service as a process of its own, and requests to it."""

import contextlib
import json
import subprocess
import urllib.error
import urllib.request

from tests.helpers.runs import ROOT


@contextlib.contextmanager
def service(command, environment):
  """Starts a service; gives the process and the start of its address."""
  process = subprocess.Popen(
    command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
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

"""A Redis server of a test."""

import contextlib
import os
import shutil
import socket
import subprocess
import time

import pytest


@contextlib.contextmanager
def redis_server(folder, *flags, port=0):
  """Runs a server on a free port; gives the process and the address. Skips without the program."""
  program = shutil.which('redis-server')
  if program is None:
    missing = pytest.fail if os.environ.get('UR4REC_TEST_REDIS') == 'required' else pytest.skip
    missing('no redis-server on this machine: Redis was not tried')
  pytest.importorskip('redis')
  if not port:
    with socket.create_server(('127.0.0.1', 0)) as free:
      port = free.getsockname()[1]
  command = [program, '--port', str(port), '--bind', '127.0.0.1', '--dir', str(folder)]
  flags = flags or ('--appendonly', 'yes', '--appendfsync', 'always', '--save', '')
  process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
  try:
    for _ in range(3000):
      assert process.poll() is None
      with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
        break
      time.sleep(0.02)
    yield process, f'redis://127.0.0.1:{port}/0'
  finally:
    process.kill()
    process.wait()

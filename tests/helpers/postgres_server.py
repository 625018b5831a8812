"""A Postgres server of a test."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PASSWORD = 'open@sesame'


@contextlib.contextmanager
def postgres_folder():
  """Makes the folder of a server with the user `shop`. Skips without the programs."""
  missing = pytest.fail if os.environ.get('UR4REC_TEST_POSTGRES') == 'required' else pytest.skip
  if not _programs():
    missing('no Postgres server is installed')
  if os.getuid() == 0 and 'postgres' not in {user.pw_name for user in pwd.getpwall()}:
    missing('Postgres cannot be started as root, and there is no user postgres')
  pytest.importorskip('psycopg')
  # Not in the folders of pytest, which the user postgres may not enter.
  with tempfile.TemporaryDirectory(prefix='ur4rec-pg-', ignore_cleanup_errors=True) as name:
    folder = Path(name)
    (folder / 'password').write_text(PASSWORD)
    if os.getuid() == 0:
      for path in (folder, folder / 'password'):
        shutil.chown(path, 'postgres')
    make = [_programs()[0] / 'initdb', '-D', folder / 'data', '-U', 'shop', '--auth=scram-sha-256']
    make += [f'--pwfile={folder / "password"}', '--no-sync']
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **_as_user())
    yield folder


@contextlib.contextmanager
def postgres_server(folder, *flags, port=0):
  """Runs a server on a free port; gives the process and the address of its database."""
  import psycopg

  if not port:
    with socket.create_server(('127.0.0.1', 0)) as free:
      port = free.getsockname()[1]
  address = f'postgres://shop:{PASSWORD.replace("@", "%40")}@127.0.0.1:{port}/postgres'
  start = [_programs()[0] / 'postgres', '-D', folder / 'data', '-p', str(port), '-k', folder]
  with (folder / 'log').open('ab') as log:
    process = subprocess.Popen(
      [*start, '-h', '127.0.0.1', *flags], stdout=log, stderr=log, cwd=folder, **_as_user()
    )
  try:
    _wait_for(lambda: psycopg.connect(address)).close()
    yield process, address
  finally:
    process.send_signal(signal.SIGQUIT)
    process.wait()


def _programs() -> list[Path]:
  """Returns the folders with programs of Postgres."""
  found = shutil.which('initdb')
  return [
    *Path('/usr/lib/postgresql').glob('*/bin'),
    *([Path(found).resolve().parent] * bool(found)),
  ]


def _as_user() -> dict:
  """Postgres does not run as root, so it gets the user that its package has made."""
  return {'user': 'postgres'} if os.getuid() == 0 else {}


def _wait_for(connect, seconds: float = 60):
  end = time.monotonic() + seconds
  while True:
    try:
      return connect()
    except Exception:
      if time.monotonic() > end:
        raise
      time.sleep(0.1)

"""A Spark cluster of a test: a master and its workers, in processes of their own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


def needs_spark() -> str:
  """Returns the folder of pyspark; skips the test without it or without Java."""
  pyspark = pytest.importorskip('pyspark', reason="needs pip install -e '.[spark]'")
  if not shutil.which('java'):
    pytest.skip('no Java on this machine: Spark was not tried')
  return os.path.dirname(pyspark.__file__)


class Process:
  """A process of Spark with those that it starts, such as the executors of a worker."""

  def __init__(self, name: str, *flags: str):
    program = Path(needs_spark(), 'bin', 'spark-class')
    local = {'SPARK_LOCAL_IP': '127.0.0.1', 'SPARK_DAEMON_MEMORY': '256m'}
    self._process = subprocess.Popen(
      [program, f'org.apache.spark.deploy.{name}', '--host', '127.0.0.1', *flags],
      env=os.environ | local,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )

  def kill(self) -> None:
    """Ends them at once, as if their machine had lost its power."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()


@contextlib.contextmanager
def spark_cluster(folder: Path, workers: int = 2):
  """Runs a master and workers of one core each; gives its address and the workers.

  Worker i has its files in `folder/worker-i`, those of its executors in folders `app-*` there.
  """
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  with contextlib.ExitStack() as stack:
    master = Process('master.Master', '--port', str(port), '--webui-port', '0')
    stack.callback(master.kill)
    for _ in range(1200):
      with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
        break
      time.sleep(0.1)
    address, started = f'spark://127.0.0.1:{port}', []
    for number in range(workers):
      place = ('--work-dir', str(folder / f'worker-{number}'), '--webui-port', '0')
      started.append(Process('worker.Worker', '--cores', '1', '--memory', '1g', *place, address))
      stack.callback(started[-1].kill)
    yield address, started

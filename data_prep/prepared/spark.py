"""Spark, the engine of builds that one machine is too slow for: answers the questions of `rows`.

Tables and answers are Parquet files in one folder, which this process and all workers see under the
same path. So what is done stays done if a worker dies, and nothing large passes through the driver,
the Spark process of this machine.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import pyarrow.parquet as pq

from data_prep.prepared import engine
from ur4rec_jax import files
from ur4rec_jax.errors import InputError, LostProcessError

if TYPE_CHECKING:
  from pyspark.sql import SparkSession

LOCAL = 'local[*]'  # All cores of this machine.
_LEAST_MEGABYTES = 500  # With less, Spark refuses to start.
_PORT = 7077
_PLACE = r'(\[.+\]|[^:]+)(?::(\d{1,5}))?'  # Host and port.
_SECONDS = 5.0  # How long a master may take to answer.
_SETTINGS = {
  'spark.app.name': 'ur4rec build',
  'spark.ui.enabled': 'false',
  'spark.ui.showConsoleProgress': 'false',
  # Columns are written "user", as in DuckDB.
  'spark.sql.ansi.enabled': 'true',
  'spark.sql.ansi.doubleQuotedIdentifiers': 'true',
}
# Only what its user can act on: that no worker takes the job, and which workers are lost.
_LOG = """
rootLogger.level = off
rootLogger.appenderRef.out.ref = out
logger.scheduler.name = org.apache.spark.scheduler.TaskSchedulerImpl
logger.scheduler.level = warn
logger.client.name = org.apache.spark.deploy.client
logger.client.level = warn
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = spark: %m%n%ex{none}
"""
# What errors say if a part of Spark is gone, and not the question or the data are at fault.
_LOST = re.compile(
  r'ExecutorLostFailure|FetchFailed|Master removed our application|All masters are unresponsive'
  r'|SparkContext (was|has been) (shut down|stopped)|stopped SparkContext'
)


def check(master: str, memory_limit: str) -> None:
  """Raises InputError if Spark cannot be started, or its master does not answer."""
  if importlib.util.find_spec('pyspark') is None:
    raise InputError("--engine=spark: pyspark is not installed; pip install 'ur4rec-jax[spark]'")
  home = os.environ.get('JAVA_HOME')
  if not shutil.which('java', path=home and f'{home}/bin'):
    where = f'JAVA_HOME={home} has no bin/java' if home else 'there is no program java'
    raise InputError(f'--engine=spark: {where}; install Java 17 and set JAVA_HOME to its folder')
  engine.megabytes(memory_limit, _LEAST_MEGABYTES)
  _own_address(master)


def _own_address(master: str) -> str:
  """Returns the address of this machine at which the workers of a master reach it."""
  if re.fullmatch(r'local(\[(\d+|\*)\])?', master):
    return '127.0.0.1'
  scheme, _, servers = master.partition('://')
  places = servers.split(',')
  found = [match for place in places if (match := re.fullmatch(_PLACE, place))]
  if scheme != 'spark' or len(found) < len(places):
    raise InputError(
      f'--master={master}: must be spark://HOST:PORT, or {LOCAL} for the cores of this machine'
    )
  reason = ''
  for match in found:
    host, port = match[1].strip('[]'), int(match[2] or _PORT)
    try:
      with socket.create_connection((host, port), _SECONDS) as connection:
        return connection.getsockname()[0]
    except (OSError, OverflowError) as error:
      reason = getattr(error, 'strerror', None) or str(error)
  raise InputError(
    f'--master={master}: no Spark master answers there ({reason}); start it, or correct the address'
  )


class Tables:
  """Tables that Spark has in a folder, which `rows.Rows` asks."""

  def __init__(self, session: 'SparkSession', folder: Path):
    """Takes the files of the folder; `register` makes tables of them."""
    self._session, self._folder = session, folder

  def register(self, table: str) -> None:
    """Makes a table of the files in the folder of its name."""
    with _messages():
      found = self._session.read.parquet((self._folder / table).as_uri())
      found.createOrReplaceTempView(table)

  def create(self, table: str, question: str) -> None:
    """Stores the answer to a question as a table."""
    self._write(table, question)
    self.register(table)

  def drop(self, table: str) -> None:
    """Removes a table."""
    self._session.catalog.dropTempView(table)
    shutil.rmtree(self._folder / table)

  def answer(self, question: str) -> dict[str, np.ndarray]:
    """Returns the columns of an answer by name; no value may be missing."""
    with self._answered(question) as folder:
      found = pq.read_table(folder)
    return {name: found[name].to_numpy() for name in found.column_names}

  def parts(self, question: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of an answer in consecutive parts, in its order."""
    with self._answered(question) as folder:
      # Spark numbers the files in the order of the answer.
      for path in sorted(folder.glob('part-*')):
        with pq.ParquetFile(path) as file:
          for batch in file.iter_batches(engine.ROWS_AT_ONCE):
            yield {name: batch[name].to_numpy() for name in batch.schema.names}

  def suspects(self, table: str, rows: int) -> str | None:
    """Names rows among which are all with an equal user, item and time: all rows."""
    return table

  @contextlib.contextmanager
  def _answered(self, question: str) -> Iterator[Path]:
    try:
      yield self._write('answer', question)
    finally:
      shutil.rmtree(self._folder / 'answer', ignore_errors=True)

  def _write(self, name: str, question: str) -> Path:
    folder = self._folder / name
    with _messages():
      self._session.sql(question).write.parquet(folder.as_uri())
    return folder


@contextlib.contextmanager
def moved(
  database: duckdb.DuckDBPyConnection, resources: engine.Resources, master: str
) -> Iterator[Tables]:
  """Starts Spark and gives it the table `rows_0`, which DuckDB then no longer has.

  Args:
    database: see `engine.connected`.
    resources: memory of each process of Spark, and the folder of the tables.
    master: see `engine.Resources`.

  Raises:
    InputError: Spark does not start, or has too little memory.
    LostProcessError: the connection to Spark was lost.
    OSError: the disk is full.
  """
  with resources.scratch() as scratch:
    folder = scratch / 'spark'
    folder.mkdir()
    try:
      database.table('rows_0').to_parquet(str(folder / 'rows_0'), per_thread_output=True)
      database.execute('DROP TABLE rows_0')
      with started(folder, resources, master) as session:
        tables = Tables(session, folder)
        tables.register('rows_0')
        yield tables
    finally:
      shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def started(folder: Path, resources: engine.Resources, master: str) -> Iterator['SparkSession']:
  """Connects to a master; the Java process of this machine ends with the block."""
  import pyspark
  from pyspark.errors import PySparkRuntimeError
  from pyspark.java_gateway import launch_gateway
  from pyspark.sql import SparkSession

  log, said = folder / 'log4j2.properties', folder / 'stderr'
  log.write_text(_LOG)
  address = _own_address(master)
  memory = f'{engine.megabytes(resources.memory_limit, _LEAST_MEGABYTES)}m'
  conf = pyspark.SparkConf().setMaster(master).setAll([
    *_SETTINGS.items(),
    ('spark.driver.host', address),
    ('spark.driver.bindAddress', address),
    ('spark.driver.memory', memory),
    ('spark.executor.memory', memory),
    ('spark.local.dir', str(folder)),
    ('spark.driver.extraJavaOptions', f'-Dlog4j2.configurationFile={log.as_uri()}'),
  ])  # fmt: skip
  try:
    with said.open('wb') as file:
      # The log, which goes to stdout, is for the user; what Java says is not, if all is well.
      gateway = launch_gateway(conf, {'stdout': 2, 'stderr': file})
  except PySparkRuntimeError as error:
    lines = said.read_text(errors='replace').split('\n')
    reason = next(filter(None, map(str.strip, reversed(lines))), 'no reason is given')
    raise InputError(
      f'--engine=spark: Java does not start Spark ({reason}); Spark {pyspark.__version__} needs'
      ' Java 17 or later'
    ) from error
  try:
    interrupt = signal.getsignal(signal.SIGINT)
    with _messages():
      context = pyspark.SparkContext(conf=conf, gateway=gateway)
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGINT, interrupt)  # That of pyspark fails once Spark has ended.
    try:
      yield SparkSession(context)
    finally:
      with contextlib.suppress(Exception):  # It may be gone already.
        context.stop()
  finally:
    with contextlib.suppress(Exception):
      gateway.shutdown()
    gateway.proc.kill()
    gateway.proc.wait()
    # pyspark would give the next build of this process the gateway that is closed now.
    pyspark.SparkContext._gateway = pyspark.SparkContext._jvm = None


@contextlib.contextmanager
def _messages() -> Iterator[None]:
  """Turns the errors of Spark that have a way out into its message."""
  from py4j.protocol import Py4JError, Py4JJavaError
  from pyspark.errors import PySparkException

  try:
    yield
  except (Py4JError, PySparkException, ConnectionError) as error:
    text = str(error)
    if 'OutOfMemoryError' in text:
      raise InputError('--memory_limit: is too low for Spark and these data; raise it') from error
    for code in files.DISK_FULL:
      if os.strerror(code) in text:
        raise OSError(code, os.strerror(code)) from error
    if not isinstance(error, Py4JJavaError | PySparkException) or _LOST.search(text):
      # The messages of Java errors begin with the second line.
      reason = re.sub(r'\A.*\n: ', '', text).partition('\n')[0]
      raise LostProcessError(
        f'Spark was lost ({reason}); start the same command again, and if that does not help raise'
        ' --memory_limit'
      ) from error
    raise

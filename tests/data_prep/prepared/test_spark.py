"""Spark gives the prepared folder that DuckDB gives, byte for byte, or says why it cannot."""

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from data_prep import build_dataset
from data_prep.prepared import engine, spark
from data_prep.prepared.prepare import Options
from tests.helpers.runs import ROOT
from tests.helpers.spark_cluster import needs_spark
from ur4rec_jax.errors import InputError, LostProcessError

USERS = ('a', 'B', 'Ä', 'e\u0301', '\ue000', '😀', '9', '10', '007', '7', '7.0', ' 7', 'NULL', '')
ITEMS = ('x', 'y', 'z', "q'", 'q;', '../q', '-3', '3')
ROWS = st.lists(
  st.tuples(
    st.sampled_from(USERS),
    st.sampled_from(ITEMS),
    st.integers(10**9, 10**9 + 3),
    st.sampled_from(['1', '2.5', '0.1', '4', '-0']),
  ),
  min_size=30,
  max_size=120,
)
OPTIONS = st.builds(
  Options,
  min_rating=st.sampled_from([None, 0.1, 2]),
  k_core=st.sampled_from([None, 2, 3, 5]),
  min_length=st.sampled_from([None, 2, 6]),
  drop_duplicates=st.sampled_from([True, True, False]),
)


@pytest.fixture(scope='module')
def one_spark(tmp_path_factory):
  """Starts Spark once for all builds of this module, as a start takes seconds."""
  needs_spark()
  folder = tmp_path_factory.mktemp('spark')
  with (
    spark.started(folder, engine.Resources(), 'local[2]') as session,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setattr(spark, 'started', lambda *_: contextlib.nullcontext(session))
    yield


def outcome(raw: Path, options: Options, resources: engine.Resources, **parameters):
  """Builds a dataset; returns the bytes of its files, or the error."""
  with tempfile.TemporaryDirectory() as folder:
    data_dir = Path(folder) / 'data'
    try:
      build_dataset.build(
        'interactions', data_dir, raw, options, parameters=parameters, resources=resources
      )
    except InputError as error:
      return str(error)
    assert [path.name for path in Path(folder).iterdir()] == ['data']
    files = (path for path in data_dir.rglob('*') if path.is_file())
    return {path.relative_to(data_dir): path.read_bytes() for path in files}


@pytest.mark.slow
@settings(max_examples=12, phases=[Phase.generate])  # Shrinking takes minutes.
@given(rows=ROWS, options=OPTIONS, is_plain=st.booleans())
def test_prepared_folders_are_equal(one_spark, rows, options, is_plain):
  with tempfile.TemporaryDirectory() as folder:
    raw = Path(folder) / 'orders.csv'
    if is_plain:
      rows = [(user.strip() or 'u', *more) for user, *more in rows]
    fields = [','.join(map(str, row)) for row in rows]
    raw.write_text('\n'.join(['user,item,time,rating', *fields]))
    more = {} if is_plain else {'clean_ids': 'missing,blanks'}
    wanted = outcome(raw, options, engine.Resources(), **more)
    assert outcome(raw, options, engine.Resources(master='local[2]'), **more) == wanted


@pytest.mark.slow
def test_larger_folders_are_equal_for_any_number_of_workers(tmp_path):
  needs_spark()
  draw = random.Random(0)
  raw = tmp_path / 'orders.csv'
  lines = [
    f'u{int(9000 * draw.random() ** 3)},{int(2000 * draw.random() ** 3)},'
    f'{10**9 + draw.randrange(20)},{draw.randrange(1, 6)}'
    for _ in range(60_000)
  ]
  raw.write_text('\n'.join(['user,item,time,rating', *lines]))
  options = Options(min_rating=2, k_core=5, drop_duplicates=True)
  wanted = outcome(raw, options, engine.Resources())
  assert isinstance(wanted, dict)
  for master in ('local[1]', 'local[3]'):
    assert outcome(raw, options, engine.Resources(master=master)) == wanted


@pytest.mark.slow
def test_a_build_that_loses_spark_can_be_started_again(tmp_path, sequences):
  needs_spark()
  command = [sys.executable, '-m', 'data_prep.build_dataset', '--source=sequences']
  command += [f'--raw_dir={sequences}', f'--data_dir={tmp_path / "data"}', '--engine=spark']
  build = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  while not [*tmp_path.glob('data.spill-*/spark/answer')]:
    assert build.poll() is None, build.stderr.read()
    time.sleep(0.01)
  children = Path(f'/proc/{build.pid}/task/{build.pid}/children').read_text().split()
  (java,) = [int(pid) for pid in children if Path(f'/proc/{pid}/comm').read_text() == 'java\n']
  os.kill(java, signal.SIGKILL)
  _, said = build.communicate(timeout=120)
  assert build.returncode == LostProcessError.exit_code, said
  assert 'error: Spark was lost (' in said
  assert 'Traceback' not in said
  assert not [*tmp_path.glob('data*')]


@pytest.mark.parametrize(
  ('said', 'error', 'message'),
  [
    ('java.lang.OutOfMemoryError: Java heap space', InputError, '--memory_limit: is too low'),
    ('No space left on device', OSError, 'No space left'),
    ('Answer from Java side is empty', LostProcessError, 'start the same command again'),
  ],
)
def test_errors_of_spark_say_the_way_out(said, error, message):
  needs_spark()
  with pytest.raises(error, match=message), spark._messages():
    raise ConnectionError(said)


@pytest.fixture
def installed(monkeypatch):
  """Lets pyspark seem to be installed."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)


def refused(capsys, *flags: str) -> str:
  """Returns the message of a build that ends with the code of wrong input."""
  with pytest.raises(SystemExit, match='2'):
    build_dataset.main(['--source=synthetic', '--data_dir=x', *flags])
  return capsys.readouterr().err


def test_a_missing_pyspark_is_named(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  message = refused(capsys, '--engine=spark')
  assert message == (
    "error: --engine=spark: pyspark is not installed; pip install 'ur4rec-jax[spark]'\n"
  )


def test_a_missing_java_is_named(installed, monkeypatch, capsys):
  monkeypatch.setenv('JAVA_HOME', '/nowhere')
  assert 'JAVA_HOME=/nowhere has no bin/java; install Java 17' in refused(capsys, '--engine=spark')
  monkeypatch.delenv('JAVA_HOME')
  monkeypatch.setenv('PATH', '/nowhere')
  assert 'there is no program java; install Java 17' in refused(capsys, '--engine=spark')


@pytest.fixture
def java(monkeypatch):
  """Lets Java seem to be installed."""
  monkeypatch.setattr(shutil, 'which', lambda *_, **__: 'java')


@pytest.mark.parametrize(
  'master', ['yarn', 'local[x]', 'spark://', 'spark://host:port', 'http://127.0.0.1:7077']
)
def test_other_masters_are_refused(installed, java, capsys, master):
  message = refused(capsys, '--engine=spark', f'--master={master}')
  assert f'--master={master}: must be spark://HOST:PORT, or local[*]' in message


def test_a_master_that_does_not_answer_is_named(installed, java, capsys):
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  message = refused(capsys, '--engine=spark', f'--master=spark://127.0.0.1:{port}')
  assert f'--master=spark://127.0.0.1:{port}: no Spark master answers there (' in message


def test_flags_that_do_not_fit_are_refused(installed, java, capsys):
  assert '--master is for --engine=spark' in refused(capsys, '--master=local[2]')
  assert '500MB or more' in refused(capsys, '--engine=spark', '--memory_limit=200MB')
  assert "invalid choice: 'dask'" in refused(capsys, '--engine=dask')

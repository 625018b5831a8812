"""Many interactions are written into several files, and the number of workers changes no byte."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import build_dataset
from data_prep.prepared import engine, record_files
from tests.data_prep.test_build_dataset import contents
from tests.helpers.runs import ROOT
from ur4rec_jax.data import dataset
from ur4rec_jax.data.dataset import Interactions
from ur4rec_jax.errors import InputError

WAIT = """
import os, time
from data_prep.prepared import record_files
if __name__ == '__main__':
  with record_files.pool_of(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(300)
"""


def histories(lengths) -> Interactions:
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  count = int(offsets[-1])
  return Interactions(
    [f'user {i}' for i in range(len(lengths))],
    offsets,
    np.arange(count, dtype=np.int32) % 7 + 1,
    np.arange(count) * 10**9,
    np.ones(count, np.float32),
  )


def test_a_shard_has_whole_histories_and_as_many_as_fit(monkeypatch):
  monkeypatch.setattr(record_files, 'SHARD_INTERACTIONS', 10)
  offsets = np.concatenate([[0], np.cumsum([4, 6, 1, 25, 3, 3])])
  assert record_files.shards(offsets) == [(0, 2), (2, 3), (3, 4), (4, 6)]
  assert record_files.shards(np.array([0, 10])) == [(0, 1)]


def test_workers_change_no_byte(tmp_path, monkeypatch):
  monkeypatch.setattr(record_files, 'SHARD_INTERACTIONS', 50)
  data = histories([20, 30, 7, 60, 45])
  found = {}
  for workers in (1, 2):
    (tmp_path / str(workers)).mkdir()
    paths = [tmp_path / str(workers) / str(i) for i in range(4)]
    written = record_files.write_histories(paths, data, workers)
    assert [shard.records for shard in written] == [2, 1, 1, 1]
    found[workers] = [path.read_bytes() for path in paths]
  assert found[1] == found[2]


def test_a_dataset_in_several_files_opens_like_one_in_one(tmp_path, monkeypatch):
  flags = {'num_users': 40, 'num_items': 48}
  whole, _ = build_dataset.build('synthetic', tmp_path / 'one', parameters=flags)
  monkeypatch.setattr(record_files, 'SHARD_INTERACTIONS', 100)
  resources = engine.Resources(workers=1)
  parts, _ = build_dataset.build(
    'synthetic', tmp_path / 'many', parameters=flags, resources=resources
  )
  assert parts == whole
  names = [path.name for path in sorted((tmp_path / 'many/interactions/1.0.0').glob('*record*'))]
  assert len(names) > 3
  assert names[0] == f'interactions-users.array_record-00000-of-{len(names):05}'
  one, many = (dataset.decode_interactions(tmp_path / name) for name in ('one', 'many'))
  for a, b in zip(one, many, strict=True):
    assert np.array_equal(a, b)
  arrays = [
    {name: content for name, content in contents(tmp_path / folder).items() if '.npy' in name}
    for folder in ('one', 'many')
  ]
  assert arrays[0] == arrays[1]
  # The next call finds it sound, and one file less is noticed.
  assert not build_dataset.build('synthetic', tmp_path / 'many', parameters=flags)[1]
  (tmp_path / 'many/interactions/1.0.0' / names[1]).unlink()
  with pytest.raises(InputError, match='--overwrite'):
    build_dataset.build('synthetic', tmp_path / 'many', parameters=flags)


def test_a_file_that_reads_back_differently_is_an_error(tmp_path, monkeypatch):
  class Lossy(record_files.array_record_module.ArrayRecordReader):
    def read(self, indices):
      return [record[:-1] for record in super().read(indices)]

  monkeypatch.setattr(record_files.array_record_module, 'ArrayRecordReader', Lossy)
  with pytest.raises(InputError, match='reads back differently'):
    record_files.write(tmp_path / 'records', [b'one', b'two'])


def test_workers_say_nothing_when_the_user_stops_the_build(tmp_path):
  (tmp_path / 'wait.py').write_text(WAIT)
  build = subprocess.Popen(
    [sys.executable, str(tmp_path / 'wait.py')],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    start_new_session=True,
  )
  build.stdout.readline()
  os.killpg(build.pid, signal.SIGINT)  # As a terminal does.
  _, said = build.communicate(timeout=300)
  assert said.count('Traceback') == said.count('wait.py') == 1  # Of the program alone.


def test_workers_end_with_a_killed_build(tmp_path):
  (tmp_path / 'wait.py').write_text(WAIT)
  command = [sys.executable, str(tmp_path / 'wait.py')]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  build = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
  worker = Path('/proc') / build.stdout.readline().strip() / 'stat'
  build.kill()
  build.wait()
  end = time.monotonic() + 300
  with contextlib.suppress(OSError):  # The file is gone with the process.
    while worker.read_text().rpartition(') ')[2][0] != 'Z':
      assert time.monotonic() < end
      time.sleep(0.05)

"""A Spark cluster gives the dataset that DuckDB gives, also if a worker dies on the way.

  python -m pytest -m slow tests/data_prep/prepared/test_spark_cluster.py

The cluster is a master and two workers on this machine, in processes of their own.
"""

import json
import random
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import ROOT
from tests.helpers.spark_cluster import spark_cluster


@pytest.fixture(scope='module')
def orders(tmp_path_factory):
  """A file with repeated rows, equal times, and users and items for a 5-core to remove."""
  draw = random.Random(0)
  path = tmp_path_factory.mktemp('raw') / 'orders.csv'
  with path.open('w') as file:
    file.write('user,item,time,rating\n')
    for _ in range(400_000):
      user, item = int(40_000 * draw.random() ** 2), int(9000 * draw.random() ** 4)
      file.write(f'u{user},i{item},{10**9 + draw.randrange(50)},{draw.randrange(1, 6)}\n')
  return path


def command(orders, data_dir, *flags: str) -> list[str]:
  program = [sys.executable, '-m', 'data_prep.build_dataset', '--source=interactions']
  options = ['--k_core=5', '--min_rating=2', '--drop_duplicates', '--memory_limit=500MB']
  return [*program, f'--raw_dir={orders}', f'--data_dir={data_dir}', *options, *flags]


def contents(folder) -> dict[str, bytes]:
  files = (path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def wanted(orders, tmp_path_factory) -> dict[str, bytes]:
  """The folder that DuckDB makes."""
  folder = tmp_path_factory.mktemp('wanted') / 'data'
  subprocess.run(command(orders, folder), cwd=ROOT, check=True, capture_output=True)
  return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize('is_killed', [False, True])
def test_a_cluster_gives_the_same_folder(tmp_path, orders, wanted, is_killed):
  data_dir = tmp_path / 'data'
  with spark_cluster(tmp_path) as (master, workers):
    flags = ('--engine=spark', f'--master={master}')
    build = subprocess.Popen(
      command(orders, data_dir, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
      if is_killed:
        # Both workers have taken part by then, and most of the questions are not yet asked.
        signs = ('data.spill-*/spark/rows_1', 'worker-0/app-*/*', 'worker-1/app-*/*')
        while not all([*tmp_path.glob(sign)] for sign in signs):
          assert build.poll() is None, build.stderr.read()
          time.sleep(0.02)
        workers[0].kill()
      _, said = build.communicate(timeout=1800)
    finally:
      build.kill()
  assert build.returncode == 0, said
  assert ('Lost executor' in said) == is_killed, said
  hashes = json.loads(wanted['dataset.json'])['splits']
  assert json.loads((data_dir / 'dataset.json').read_text())['splits'] == hashes
  assert contents(data_dir) == wanted

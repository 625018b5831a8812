"""Small real data and real runs that several test files share."""

import os

# These must be set before jax is imported. The tests mostly compile, which takes half the time
# without optimizations; JAX_DISABLE_MOST_OPTIMIZATIONS=false tests what users run.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')

import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.robustness.small_runs import SMALL
from tests.helpers.goods import build_shop
from tests.helpers.runs import PROGRAM, ROOT
from ur4rec_jax.data.dataset import read_interactions, read_items


@pytest.fixture(scope='module', autouse=True)
def own_programs():
  """Drops what a file compiled: the programs of all files together crash a process."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session', autouse=True)
def environment(tmp_path_factory) -> dict[str, str]:
  """Environment of the processes that tests start; all and the tests share compiled programs."""
  cache = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    cache = cache.parent
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(cache / 'compiled')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  jax.config.update('jax_compilation_cache_dir', str(cache / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  return os.environ | {'PYTHONPATH': str(ROOT)}


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory, environment) -> pathlib.Path:
  """A prepared synthetic dataset of 120 users."""
  folder = tmp_path_factory.mktemp('data') / 'synthetic'
  command = [sys.executable, '-m', 'data_prep.build_dataset', '--source=synthetic']
  command += [f'--data_dir={folder}', '--num_users=120', '--num_items=60']
  subprocess.run(command, env=environment, check=True, capture_output=True)
  return folder


@pytest.fixture(scope='session')
def encoded(data_dir, environment, tmp_path_factory):
  """The synthetic data with built-in text embeddings, pictures of half the items, and users' taste.

  All but the texts are imported.
  """
  folder = tmp_path_factory.mktemp('encoded')
  data = folder / 'data'
  shutil.copytree(data_dir, data)
  names = np.array([item['original_id'] for item in read_items(data)][::2])
  tokens = np.random.default_rng(0).normal(size=(len(names), 4, 12)).astype(np.float16)
  np.savez(folder / 'pictures.npz', ids=names, tokens=tokens)
  tastes = np.random.default_rng(1).normal(size=(119, 2, 3)).astype(np.float16)
  users = read_interactions(data).user_ids[1:]
  np.savez(folder / 'tastes.npz', ids=users, tokens=tastes)
  of_users = ('--of=user', '--split=leave_one_out', '--hold_back=0.25')
  for flags in (
    ('--modality=text', '--encoder=hashing', '--of=item'),
    ('--modality=image', f'--import={folder / "pictures.npz"}'),
    ('--modality=taste', f'--import={folder / "tastes.npz"}', *of_users),
  ):
    command = [sys.executable, '-m', 'data_prep.encode', f'--data_dir={data}', *flags]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
  return data


@pytest.fixture(scope='session')
def shop(encoded, environment, tmp_path_factory):
  """`encoded`, with made-up texts about the users that the same encoder encoded."""
  folder = tmp_path_factory.mktemp('texts') / 'data'
  shutil.copytree(encoded, folder)
  for command in (
    ('generate_text', '--kind=users', '--backend=mock'),
    ('encode', '--modality=text', '--encoder=hashing', '--of=user'),
  ):
    command = [sys.executable, '-m', f'data_prep.{command[0]}', *command[1:]]
    command.append(f'--data_dir={folder}')
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
  return folder


@pytest.fixture(scope='session')
def small_shop(tmp_path_factory) -> pathlib.Path:
  """The prepared folder of `goods.build_shop`, with its raw files beside it."""
  return build_shop(tmp_path_factory.mktemp('small_shop'))


@pytest.fixture(scope='session')
def start(environment, data_dir):
  """Starts the program: `start(workdir, *flags, variant, env, program)` gives a process."""

  def start(workdir, *flags, variant='sasrec', env=None, program=PROGRAM) -> subprocess.Popen:
    command = [*program, '--config', f'{ROOT}/configs/synthetic.py:{variant}']
    command += [f'--config.data_dir={data_dir}', *SMALL, f'--workdir={workdir}', *flags]
    return subprocess.Popen(
      command,
      env=environment | (env or {}),
      cwd=workdir.parent,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture(scope='session')
def run(start):
  """Runs the program to its end: `run(workdir, *flags)` gives the finished process."""

  def run(workdir, *flags, **options) -> subprocess.CompletedProcess:
    process = start(workdir, *flags, **options)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

  return run


@pytest.fixture(scope='session')
def finished(run, tmp_path_factory) -> pathlib.Path:
  """The workdir of an undisturbed run; read only."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  return workdir

"""Small real data and real runs that several test files share."""

import gc
import os

import jaxlib.version

# These must be set before jax is imported. The tests mostly compile, which takes a quarter of the
# time without optimizations; JAX_DISABLE_MOST_OPTIMIZATIONS=false tests what users run.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
os.environ['UR4REC_LOCK_SECONDS'] = '0'  # Tests of locks would wait for a minute otherwise.
# An XLA that does not know a flag ends the process.
if jaxlib.version.__version__.startswith('0.10.') and (
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] == 'true'
):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false'

import pathlib
import shutil
import subprocess
from collections.abc import Callable

import jax
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from benchmarks.robustness.small_runs import SMALL
from tests.helpers.fork_server import Program, can_fork
from tests.helpers.goods import build_shop
from tests.helpers.recommenders import make
from tests.helpers.runs import PROGRAM, ROOT
from ur4rec_jax.data.dataset import read_interactions, read_items
from ur4rec_jax.export import export

# Neither a slow example nor slow drawing is a failure: the machine may be busy.
settings.register_profile('busy', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('busy')


@pytest.hookimpl(wrapper=True)
def pytest_collection():
  """Looks for no garbage in what the tests import: it stays, and a fifth of the time was lost."""
  gc.disable()
  try:
    return (yield)
  finally:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope='module', autouse=True)
def own_programs():
  """Drops what a file compiled: the programs of all files together crash a process."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def common_folder(tmp_path_factory) -> pathlib.Path:
  """A folder that all workers of a test run have in common."""
  folder = tmp_path_factory.getbasetemp()
  return folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder


@pytest.fixture(scope='session')
def make_once(common_folder) -> Callable[[str, Callable], pathlib.Path]:
  """Makes a folder that all workers read: `make_once(name, make)`, where `make(folder)` fills it.

  One worker makes it while the others wait.
  """

  def make_once(name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    folder, mark = common_folder / name, common_folder / f'{name}.made'
    with FileLock(common_folder / f'{name}.lock'):
      if not mark.exists():
        shutil.rmtree(folder, ignore_errors=True)  # Of an attempt that failed.
        folder.mkdir()
        make(folder)
        mark.touch()
    return folder

  return make_once


@pytest.fixture(scope='session', autouse=True)
def environment(common_folder) -> dict[str, str]:
  """Environment of the processes that tests start; all and the tests share compiled programs."""
  cache = str(common_folder / 'compiled')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  return os.environ | {'PYTHONPATH': str(ROOT)}


@pytest.fixture(scope='session')
def data_dir(make_once, environment) -> pathlib.Path:
  """A prepared synthetic dataset of 120 users; read only."""

  def make(folder):
    flags = ['--source=synthetic', '--num_users=120', '--num_items=60']
    prepare('build_dataset', folder / 'synthetic', environment, *flags)

  return make_once('plain', make) / 'synthetic'


def prepare(program, data_dir, environment, *flags) -> None:
  """Runs a program of `data_prep` to its end."""
  flags = [f'--data_dir={data_dir}', *flags]
  done = Program(f'data_prep.{program}', flags, environment, ROOT).finish()
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope='session')
def encoded(data_dir, environment, make_once) -> pathlib.Path:
  """The synthetic data with built-in text embeddings, pictures of half the items, and users' taste.

  All but the texts are imported. Read only.
  """
  return make_once('encoded', lambda folder: encode(data_dir, folder, environment)) / 'data'


def encode(data_dir, folder, environment) -> None:
  """Makes `encoded` from the synthetic data."""
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
    prepare('encode', data, environment, *flags)


@pytest.fixture(scope='session')
def shop(encoded, environment, make_once) -> pathlib.Path:
  """`encoded`, with made-up texts about the users that the same encoder encoded; read only."""

  def make(folder):
    shutil.copytree(encoded, folder / 'data')
    for program, *flags in (
      ('generate_text', '--kind=users', '--backend=mock'),
      ('encode', '--modality=text', '--encoder=hashing', '--of=user'),
    ):
      prepare(program, folder / 'data', environment, *flags)

  return make_once('shop', make) / 'data'


@pytest.fixture(scope='session')
def exports(shop, make_once) -> pathlib.Path:
  """Exports of the shop by two models, `sasrec` and `text`, which know its users; read only."""

  def make_exports(folder):
    for name in ('sasrec', 'text'):
      export(make(shop, name)[0], folder / name, with_users=True, with_pictures=False)

  return make_once('exports', make_exports)


@pytest.fixture(scope='session')
def small_shop(tmp_path_factory) -> pathlib.Path:
  """The prepared folder of `goods.build_shop`, with its raw files beside it."""
  return build_shop(tmp_path_factory.mktemp('small_shop'))


@pytest.fixture(scope='session')
def start(environment, data_dir):
  """Starts the program: `start(workdir, *flags, variant, env, program)` gives a process.

  It is forked from one that has imported the program, unless `program` or `env` forbid it.
  """

  def start(workdir, *flags, variant='sasrec', env=None, program=PROGRAM):
    flags = [
      f'--config={ROOT}/configs/synthetic.py:{variant}',
      f'--config.data_dir={data_dir}',
      *SMALL,
      f'--workdir={workdir}',
      *flags,
    ]
    env = env or {}
    combined = environment | env
    if 'XLA_FLAGS' in env:
      combined['XLA_FLAGS'] = f'{environment.get("XLA_FLAGS", "")} {env["XLA_FLAGS"]}'
    if program == PROGRAM and can_fork(env):
      return Program('ur4rec_jax.main', flags, combined, workdir.parent)
    return subprocess.Popen(
      [*program, *flags],
      env=combined,
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
def finished(run, make_once) -> pathlib.Path:
  """The workdir of an undisturbed run; read only."""

  def make(folder):
    done = run(folder / 'run')
    assert done.returncode == 0, done.stderr

  return make_once('finished', make) / 'run'


@pytest.fixture(scope='module')
def browser():
  """Chromium, which must be on the machine."""
  chromium = shutil.which('chromium') or shutil.which('google-chrome')
  if chromium is None:
    missing = pytest.fail if os.environ.get('UR4REC_TEST_BROWSER') == 'required' else pytest.skip
    missing('no chromium on this machine: the page was not tried in a browser')
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
    yield browser
    browser.close()

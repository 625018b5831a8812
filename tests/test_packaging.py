"""The wheel has every file that the programs read, and works where nothing of this repository is.

`pytest -m slow tests/test_packaging.py` makes new environments. One is filled from the network.
"""

import configparser
import json
import os
import pathlib
import re
import shutil
import signal
import site
import subprocess
import sys
import urllib.request
import venv
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement

from benchmarks.robustness.small_runs import SMALL
from tests.helpers.recommenders import make
from tests.helpers.runs import ROOT
from ur4rec_jax import cli
from ur4rec_jax.export import export

PACKAGES = ('ur4rec_jax', 'data_prep')
ALONE = """
import json, sys
from ur4rec_jax import exported
recommender = exported.load(sys.argv[1])
print(json.dumps(recommender.top([json.loads(sys.argv[2])], k=5).items))
"""


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> pathlib.Path:
  """A copy of what a wheel is built from, without what earlier builds left."""
  folder = tmp_path_factory.mktemp('source')
  for name in (*PACKAGES, 'configs'):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
  for path in ROOT.glob('*.*'):
    if path.is_file():
      shutil.copy(path, folder)
  shutil.copy(ROOT / 'LICENSE', folder)
  return folder


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('wheel')
  copy = shutil.copytree(source, folder / 'source')
  pip('wheel', '--no-build-isolation', f'--wheel-dir={folder}', str(copy))
  (path,) = folder.glob('*.whl')
  return path


def pip(*arguments, python=sys.executable) -> None:
  command = [sys.executable, '-m', 'pip', f'--python={python}', *arguments]
  command += ['--quiet', '--disable-pip-version-check', '--no-deps', '--no-index']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.fixture
def environment_with_libraries(tmp_path) -> pathlib.Path:
  """A new virtual environment with the libraries of this one, but not with this project."""
  folder = tmp_path / 'environment'
  venv.create(folder)
  (packages,) = folder.glob('lib/python*/site-packages')
  # Paths in such a file are added, but editable installs inside them are not.
  (packages / 'libraries.pth').write_text('\n'.join(site.getsitepackages()))
  return folder / 'bin'


@pytest.fixture
def empty_folder(tmp_path) -> pathlib.Path:
  """A user's folder whose own `configs` cannot be imported."""
  folder = tmp_path / 'of_the_user'
  (folder / 'configs').mkdir(parents=True)
  for name in ('__init__.py', 'default.py', 'synthetic.py'):
    (folder / 'configs' / name).write_text('raise RuntimeError("configs of the user")')
  return folder


def call(folder, *command, **env) -> subprocess.CompletedProcess:
  environment = {k: x for k, x in os.environ.items() if k != 'PYTHONPATH'} | env
  words = list(map(str, command))
  return subprocess.run(
    words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
  )


def test_the_wheel_has_every_file(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  for package in PACKAGES:
    for path in (ROOT / package).rglob('*'):
      if path.is_file() and '__pycache__' not in path.parts:
        assert str(path.relative_to(ROOT)) in names
  for path in (ROOT / 'configs').glob('[!_]*.py'):
    assert f'ur4rec_jax/configs/{path.name}' in names
  (information,) = {name.partition('/')[0] for name in names} - set(PACKAGES)
  assert {f'{information}/licenses/LICENSE', f'{information}/entry_points.txt'} <= names
  metadata = zipfile.ZipFile(wheel).read(f'{information}/METADATA').decode()
  assert 'License: MIT' in metadata or 'License-Expression: MIT' in metadata


def test_versions_and_licences_agree():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == setup['metadata']['version']
  assert citation['license'] == setup['metadata']['license'] == 'MIT'
  assert (ROOT / 'LICENSE').read_text().startswith('MIT License')
  assert f'## [{citation["version"]}]' in (ROOT / 'CHANGELOG.md').read_text()


def test_constraints_name_a_version_for_every_library():
  lines = (ROOT / 'launch/constraints.txt').read_text().splitlines()
  versions = dict(line.split('==') for line in lines if not line.startswith('#'))
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  extras = setup['options.extras_require']
  for text in (setup['options']['install_requires'], *extras.values()):
    for line in text.split('\n'):
      if line and not line.startswith('#'):
        requirement = Requirement(line)
        name = re.sub(r'[-_.]+', '-', requirement.name).lower()
        assert versions[name] in requirement.specifier, line


def test_hooks_before_a_commit_run_what_ci_runs():
  (repository,) = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
  steps = (ROOT / '.ci/run').read_text().partition('bash launch/test.sh\n')[2].splitlines()
  slow = ('export', 'bash launch')  # The slow tests, and the docs, which run notebooks.
  commands = [step for step in steps if not step.startswith(slow)]
  for hook, command in zip(repository['hooks'], commands, strict=True):
    assert command.startswith(hook['entry'])


@pytest.mark.slow
def test_a_wheel_runs_every_command(wheel, environment_with_libraries, empty_folder):
  python = environment_with_libraries / 'python'
  pip('install', str(wheel), python=python)
  program = environment_with_libraries / 'ur4rec'
  run = ('--config=synthetic', '--workdir=runs/shop', *SMALL)
  data = '--data_dir=data/synthetic'
  commands = {
    'build': ('--source=synthetic', data, '--num_users=120', '--num_items=60'),
    'describe': (data,),
    'download-images': (data,),
    'generate-text': (data, '--kind=users', '--backend=mock'),
    'encode': (data, '--modality=text', '--encoder=hashing'),
    'train': run,
    'evaluate': run,
    'baselines': (data,),
    'compare': ('runs/shop',),
    'recommend': ('--workdir=runs/shop', '--user=u001'),
    'export': ('--workdir=runs/shop', '--out=model'),
    **dict.fromkeys(('serve', 'experiment', 'quick', 'update', 'feedback'), ('--help',)),
  }
  assert commands.keys() == cli.COMMANDS.keys()
  codes = {'download-images': 2}  # The items of the synthetic data have pictures, not links.
  for name, flags in commands.items():
    done = call(empty_folder, program, name, *flags)
    assert done.returncode == codes.get(name, 0), (name, done.stderr)
    assert 'Traceback' not in done.stderr
  done = call(
    empty_folder, python, '-m', 'ur4rec_jax.main', '--config=synthetic', *SMALL, '--workdir=other'
  )
  assert done.returncode == 0, done.stderr
  server = subprocess.Popen(
    [program, 'serve', '--export=model', '--port=0'],
    cwd=empty_folder,
    stdout=subprocess.PIPE,
    text=True,
  )
  address = server.stdout.readline().split()[-1]
  with urllib.request.urlopen(f'{address}/health') as answer:
    assert answer.status == 200
  with urllib.request.urlopen(address) as answer:
    assert b'<html' in answer.read()
  server.send_signal(signal.SIGTERM)
  server.communicate(timeout=300)


@pytest.mark.slow
def test_an_editable_install_runs(source, environment_with_libraries, empty_folder, tmp_path):
  copy = shutil.copytree(source, tmp_path / 'checkout')
  python = environment_with_libraries / 'python'
  pip('install', '--no-build-isolation', '--editable', str(copy), python=python)
  assert not (copy / 'ur4rec_jax/configs').exists()
  found = call(empty_folder, python, '-c', 'import ur4rec_jax; print(ur4rec_jax.__file__)')
  assert found.stdout.startswith(str(copy))
  for program in (
    [environment_with_libraries / 'ur4rec', 'train'],
    [python, '-m', 'ur4rec_jax.main'],
  ):
    done = call(empty_folder, *program, '--config=movielens_1m:text', '--workdir=run')
    assert done.returncode == 2
    assert 'data_dir data/movielens_1m: no such folder' in done.stderr


@pytest.mark.slow
def test_an_export_needs_jax_and_numpy_alone(wheel, shop, tmp_path):
  """In a new environment with the wheel, jax, NumPy, and flatbuffers, which jax.export needs."""
  recommender = make(shop, 'sasrec')[0]
  export(recommender, tmp_path / 'model')
  history = recommender.item_ids[:7]
  venv.create(tmp_path / 'environment', with_pip=True)
  python = tmp_path / 'environment/bin/python'
  command = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
  command += ['--constraint', ROOT / 'launch/constraints.txt', 'jax', 'numpy', 'flatbuffers']
  subprocess.run(command, check=True)
  pip('install', str(wheel), python=python)
  done = call(tmp_path, python, '-c', ALONE, 'model', json.dumps(history), JAX_PLATFORMS='cpu')
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == recommender.answer([history], 5).items

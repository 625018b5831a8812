"""The command `ur4rec` lists its commands, starts the programs, and refuses an unknown name."""

import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from tests.helpers.commands import run_here
from tests.helpers.runs import ROOT
from ur4rec_jax import cli, errors


def ur4rec(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'ur4rec_jax.cli', *arguments],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.parametrize('arguments', [(), ('--help',), ('-h',)], ids=str)
def test_it_lists_its_commands(arguments):
  done = ur4rec(*arguments)
  assert done.returncode == 0
  lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith('  ')]
  assert lines == [[name, command.summary] for name, command in cli.COMMANDS.items()]
  assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
  ('typed', 'word'), [('trian', 'did you mean train?'), ('zzz', 'known are quick, build, ')]
)
def test_an_unknown_command(typed, word):
  done = ur4rec(typed)
  assert done.returncode == errors.InputError.exit_code == 2
  assert f'ur4rec {typed}: no such command' in done.stderr
  assert word in done.stderr


def test_listing_imports_no_program():
  code = "import sys; from ur4rec_jax.cli import main; main(); print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.splitlines()[-1] == 'False'


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_every_command_has_a_program(name):
  source = pathlib.Path(importlib.util.find_spec(cli.COMMANDS[name].module).origin)
  assert '\ndef main(' in source.read_text()


def test_a_command_is_its_program(tmp_path):
  done = ur4rec('evaluate', '--config=synthetic', f'--workdir={tmp_path}/run', cwd=tmp_path)
  assert done.returncode == 2
  assert 'data_dir data/synthetic: no such folder' in done.stderr
  done = ur4rec('describe', '--data_dr=x', cwd=tmp_path)
  assert done.returncode == 2
  assert 'unknown flag --data_dr; did you mean --data_dir?' in done.stderr
  assert 'usage: ur4rec describe' in ur4rec('describe', '--help', cwd=tmp_path).stdout


def test_folders_of_the_user_hide_no_package(tmp_path):
  """`ur4rec` puts the folder it is started in last, so a `data_prep` there is not imported."""
  (tmp_path / 'data_prep').mkdir()
  (tmp_path / 'data_prep/__init__.py').write_text('raise SystemExit("of the user")')
  code = f"import sys; sys.path[:1] = ['{ROOT}']; sys.argv[1:] = ['describe', '--help']\n"
  code += 'from ur4rec_jax.cli import main; main()'
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  assert '--data_dir' in done.stdout


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ('serve --export=x --keep_days=90', '--keep_days: is for --events'),
    ('serve --export=x --event_kinds=click', '--event_kinds: is for --events'),
    ('serve --export=x --events_per_second=9', '--events_per_second: is for --events'),
    ('serve --export=x --shown_per_second=inf', '--shown_per_second: is for --events'),
    ('feedback --events=x --out=y --group=z', '--group: is for --consume'),
    ('feedback --events=x --out=y --until_end', '--until_end: is for --consume'),
    ('feedback --events=x --out=y --export=z', '--export: is for --delete_user'),
    ('export --workdir=x --vectors=y --users', '--users: is for --out'),
    ('export --workdir=x --vectors=y --without_pictures', '--without_pictures: is for --out'),
    ('export --workdir=x --vectors=y --approximate', '--approximate: is for --out'),
    ('export --workdir=x --out=y --pictures=z', '--pictures: is for --add_items'),
    ('recommend --workdir=x --similar_to=a --approximate', '--similar_to: takes --by, --k, --add'),
    ('experiment assign --config=x --user=u --out=y', '--out: is for --users'),
    ('quick orders.csv --no_serve --port=1', '--port: nothing is served with --no_serve'),
  ],
)
def test_a_flag_that_nothing_reads_is_refused(words, message):
  name, *flags = words.split()
  done = run_here(importlib.import_module(cli.COMMANDS[name].module).main, flags)
  assert (done.returncode, done.stdout) == (2, '')
  (line,) = done.stderr.splitlines()
  assert line.startswith(f'error: {message}')

"""Damaged checkpoints are detected, named, and passed over."""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.robustness.small_runs import load_arrays
from tests.helpers.runs import PROGRAM, ROOT
from ur4rec_jax.errors import StorageError
from ur4rec_jax.runs import checkpoint
from ur4rec_jax.runs.checkpoint import Checkpointer, find_damage, read_latest

TREE = {'a': jnp.arange(1000, dtype=jnp.float32), 'b': jnp.zeros((), jnp.int32)}


def save_steps(workdir, *steps):
  checkpointer = Checkpointer(workdir, max_to_keep=3)
  for step in steps:
    checkpointer.save(step, {'a': TREE['a'] + step, 'b': TREE['b'] + step}, {'step': step})
  checkpointer.close()


def restore(workdir):
  checkpointer = Checkpointer(workdir, max_to_keep=3)
  restored = checkpointer.restore(TREE)
  checkpointer.close()
  return restored


def largest_file(folder):
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_byte(folder):
  path = largest_file(folder)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return path.name


def truncate_a_file(folder):
  path = largest_file(folder)
  path.write_bytes(path.read_bytes()[:-1])
  return path.name


def lose_a_file(folder):
  path = largest_file(folder)
  path.unlink()
  return path.name


def lose_the_manifest(folder):
  (folder / 'manifest.json').unlink()
  return 'did not finish'


def tear_the_manifest(folder):
  path = folder / 'manifest.json'
  path.write_bytes(path.read_bytes()[:50])
  return 'manifest.json'


def empty_the_folder(folder):
  shutil.rmtree(folder)
  folder.mkdir()
  return 'empty'


DAMAGES = [
  flip_a_byte,
  truncate_a_file,
  lose_a_file,
  lose_the_manifest,
  tear_the_manifest,
  empty_the_folder,
]


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_step_is_named_and_the_one_before_restored(damage, tmp_path, capfd):
  save_steps(tmp_path, 10, 20)
  what = damage(tmp_path / 'checkpoints/20')
  tree, progress = restore(tmp_path)
  assert progress == {'step': 10}
  np.testing.assert_array_equal(tree['a'], TREE['a'] + 10)
  warning = capfd.readouterr().err
  assert 'step 20 is damaged' in warning
  assert what in warning
  assert (tmp_path / 'damaged_checkpoints/20').is_dir()
  assert restore(tmp_path)[1] == {'step': 10}  # And it stays that way.
  save_steps(tmp_path, 20)  # The step can be reached and saved again.
  assert restore(tmp_path)[1] == {'step': 20}


@pytest.mark.parametrize(
  'lost', ['state', 'progress', 'state/manifest.ocdbt', 'manifest.json', '.']
)
def test_a_step_that_training_deletes_while_it_is_read_is_passed_over(lost, tmp_path, monkeypatch):
  save_steps(tmp_path, 10, 20)
  read = checkpoint._read_step

  def deleted_meanwhile(folder, *args, **kwargs):
    if folder.name == '20':
      path = folder / lost
      shutil.rmtree(path) if path.is_dir() else path.unlink()
      if lost == 'manifest.json':
        raise ValueError('NOT_FOUND')
    return read(folder, *args, **kwargs)

  monkeypatch.setattr(checkpoint, '_read_step', deleted_meanwhile)
  assert read_latest(tmp_path, TREE)[1] == {'step': 10}


def test_a_reader_finds_the_step_that_has_replaced_all_that_it_knew(tmp_path, monkeypatch):
  save_steps(tmp_path, 10)
  read = checkpoint._read_step

  def replaced_meanwhile(folder, *args, **kwargs):
    if folder.name == '10':
      save_steps(tmp_path, 20)
      shutil.rmtree(folder)
    return read(folder, *args, **kwargs)

  monkeypatch.setattr(checkpoint, '_read_step', replaced_meanwhile)
  assert read_latest(tmp_path, TREE)[1] == {'step': 20}


def test_a_kill_while_the_only_step_is_saved_again_loses_nothing(tmp_path, monkeypatch):
  def kill(*_):
    raise KeyboardInterrupt

  checkpointer = Checkpointer(tmp_path, max_to_keep=1)
  checkpointer.save(10, TREE, {'validated': False})
  write_file = checkpoint.write_file
  monkeypatch.setattr(checkpoint, 'write_file', kill)
  with pytest.raises(KeyboardInterrupt):
    checkpointer.save(10, TREE, {'validated': True})
  monkeypatch.setattr(checkpoint, 'write_file', write_file)
  assert restore(tmp_path)[1] == {'validated': False}
  checkpointer = Checkpointer(tmp_path, max_to_keep=1)
  checkpointer.save(10, TREE, {'validated': True})
  checkpointer.close()
  assert restore(tmp_path)[1] == {'validated': True}
  assert [path.name for path in tmp_path.iterdir()] == ['checkpoints']


def test_restoring_prints_no_warnings_of_libraries(tmp_path):
  """In a process of its own, as absl writes warnings before anybody sets it up."""
  save_steps(tmp_path, 10)
  script = (
    'from tests.runs.test_checkpoint import TREE\n'
    'from ur4rec_jax.runs.checkpoint import read_latest\n'
    f'print(read_latest({str(tmp_path)!r}, TREE)[1])\n'
  )
  command = [sys.executable, '-c', script]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == "{'step': 10}\n"
  assert 'METADATA' not in done.stderr
  assert 'WARNING' not in done.stderr


def test_without_any_whole_step_there_is_nothing_to_restore(tmp_path, capfd):
  save_steps(tmp_path, 10)
  flip_a_byte(tmp_path / 'checkpoints/10')
  assert restore(tmp_path) is None
  assert 'step 10 is damaged' in capfd.readouterr().err


def test_only_the_latest_steps_are_kept(tmp_path):
  save_steps(tmp_path, 1, 2, 3, 4, 5)
  names = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit())
  assert names == ['3', '4', '5']
  assert all(find_damage(tmp_path / 'checkpoints' / name) is None for name in names)


def test_the_last_step_stays_until_the_next_is_complete(tmp_path, monkeypatch):
  checkpointer = Checkpointer(tmp_path, max_to_keep=1)
  checkpointer.save(1, TREE, {'step': 1})

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(checkpoint, 'write_file', killed)
  with pytest.raises(KeyboardInterrupt):
    checkpointer.save(2, TREE, {'step': 2})
  monkeypatch.undo()
  assert restore(tmp_path)[1] == {'step': 1}


def test_saving_a_step_again_replaces_it(tmp_path):
  checkpointer = Checkpointer(tmp_path, max_to_keep=2)
  checkpointer.save(1, TREE, {'try': 1})
  checkpointer.save(1, TREE, {'try': 2})
  checkpointer.close()
  assert restore(tmp_path)[1] == {'try': 2}


def test_an_unwritable_folder_is_a_clear_error(tmp_path):
  (tmp_path / 'checkpoints').write_text('in the way')
  with pytest.raises(StorageError, match=r'cannot write to .*checkpoints'):
    Checkpointer(tmp_path, max_to_keep=2)


def test_a_run_goes_back_to_the_last_good_step_and_ends_the_same(run, finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  newest = newest_step(workdir)
  flip_a_byte(workdir / 'checkpoints' / str(newest))
  (workdir / 'results.json').unlink()
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  assert f'step {newest} is damaged' in done.stderr
  ours, theirs = load_arrays(workdir), load_arrays(finished)
  assert all((ours[name] == theirs[name]).all() for name in theirs)
  for file in ('results.json', 'metrics.jsonl'):
    assert (workdir / file).read_bytes() == (finished / file).read_bytes()


def test_a_full_disk_during_a_save(run, finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(newest_step(workdir)))
  kept = newest_step(workdir)

  # A limit on file sizes stands in for a full disk: the same system calls fail.
  done = run(workdir, program=('bash', '-c', 'ulimit -f 10; exec "$@"', 'bash', *PROGRAM))
  assert done.returncode == StorageError.exit_code, done.stderr
  assert 'could not be written' in done.stderr
  assert 'goes on from the last good step' in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr
  assert newest_step(workdir) == kept
  assert run(workdir).returncode == 0
  assert (workdir / 'results.json').read_bytes() == (finished / 'results.json').read_bytes()


def newest_step(workdir):
  return max(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())

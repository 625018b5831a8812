"""Files are written whole or not at all, and a lock keeps other processes out."""

import contextlib
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers.runs import ROOT
from ur4rec_jax.errors import BusyError, InputError, StorageError
from ur4rec_jax.files import (
  clean_up,
  disk_errors,
  expand_home,
  new_file,
  new_folder,
  only_process,
  write_file,
)


@pytest.mark.parametrize(
  ('content', 'stored'), [('Grüße 世界\n', 'Grüße 世界\n'.encode()), (b'\0\xff', b'\0\xff')]
)
def test_write_file_replaces_text_and_bytes_and_leaves_no_draft(tmp_path, content, stored):
  path = tmp_path / 'file'
  for _ in range(2):
    write_file(path, content)
    assert path.read_bytes() == stored
    assert list(tmp_path.iterdir()) == [path]


def test_write_file_leaves_the_old_file_when_it_fails(tmp_path):
  path = tmp_path / 'results.json'
  write_file(path, 'old')
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  code = (
    'import pathlib, resource, signal, sys; from ur4rec_jax.files import write_file;'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN);'
    f'resource.setrlimit(resource.RLIMIT_FSIZE, (100, {limit[1]}));'
    f'write_file(pathlib.Path({str(path)!r}), "x" * 1000)'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode != 0
  assert f'cannot write {path}' in done.stderr
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_write_file_killed_at_any_step_leaves_one_of_the_two_contents(tmp_path):
  path = tmp_path / 'state.json'
  write_file(path, 'old')
  steps = ('open', 'os.rename', 'os.remove')  # Names of audit events.
  seen = set()
  for number in range(1, 9):
    child = os.fork()
    if not child:
      done = 0

      def count(event, arguments, number=number):
        nonlocal done
        done += event in steps
        if event in steps and done == number:
          os.kill(os.getpid(), signal.SIGKILL)

      sys.addaudithook(count)
      write_file(path, 'new')
      os._exit(0)
    status = os.waitpid(child, 0)[1]
    seen.add(path.read_text())
    assert seen <= {'old', 'new'}
    if not status:
      break
    write_file(path, 'old')
  assert number > 3
  assert (status, seen) == (0, {'old', 'new'})


def test_a_file_that_is_written_in_parts_is_whole_or_absent(tmp_path):
  target = tmp_path / 'top.parquet'
  with new_file(target) as draft:
    draft.write_text('old')
  with contextlib.suppress(RuntimeError), new_file(target) as draft:
    draft.write_text('half')
    raise RuntimeError
  assert target.read_text() == 'old'
  assert [path.name for path in tmp_path.iterdir()] == ['top.parquet']
  write = (
    'import os, pathlib, sys; from ur4rec_jax.files import new_file\n'
    'with new_file(pathlib.Path(sys.argv[1])) as draft:\n'
    '  draft.write_text("half"); os.kill(os.getpid(), 9)'
  )
  killed = subprocess.run([sys.executable, '-c', write, str(target)], cwd=ROOT, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert target.read_text() == 'old'
  assert len(list(tmp_path.iterdir())) == 2
  with new_file(target) as draft:  # The next one removes what the kill has left.
    draft.write_text('new')
  assert target.read_text() == 'new'
  assert [path.name for path in tmp_path.iterdir()] == ['top.parquet']


@pytest.mark.parametrize('path', ['', '.', '/'])
def test_a_path_without_a_name_is_refused(path):
  with pytest.raises(InputError, match='names no file'):
    write_file(path, 'text')


@pytest.mark.parametrize('seconds', ['soon', '-1', 'nan'])
def test_a_wrong_time_to_wait_for_a_lock_is_named(seconds, tmp_path, monkeypatch):
  monkeypatch.setenv('UR4REC_LOCK_SECONDS', seconds)
  with (
    pytest.raises(InputError, match=f'UR4REC_LOCK_SECONDS={seconds}: must be a number'),
    only_process(tmp_path / 'lock', 'taken'),
  ):
    pass


def test_leftovers_are_those_of_dead_processes_of_this_machine(tmp_path):
  target, host = tmp_path / 'data', socket.gethostname()
  dead = subprocess.Popen([sys.executable, '-c', ''])
  dead.wait()
  alive = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
  try:
    kept = {f'data.incomplete-{host}-{alive.pid}', f'data.raw-{alive.pid}'}
    # Another machine with the same disk: its processes cannot be seen from here.
    kept |= {f'data.incomplete-other-{dead.pid}', f'data.spill-{host}-2-{dead.pid}', 'data.mine'}
    abandoned = f'data.raw-other-{alive.pid}'
    for name in {*kept, f'data.incomplete-{host}-{dead.pid}', f'data.raw-{dead.pid}', abandoned}:
      (tmp_path / name).mkdir()
    (tmp_path / f'data.incomplete-{dead.pid}').write_text('a part of a file')
    os.utime(tmp_path / abandoned, (time.time() - 8 * 86_400,) * 2)
    clean_up(target)
    assert {path.name for path in tmp_path.iterdir()} == kept
    with new_folder(target) as draft:
      assert draft.name == f'data.incomplete-{host}-{os.getpid()}'
  finally:
    alive.kill()
    alive.wait()


def test_disk_errors_say_what_to_do_about_a_failed_write(tmp_path):
  target = tmp_path / 'none' / 'file'
  with (
    pytest.raises(
      InputError, match=r'file: cannot be written \(No such file .*\); make .* another --out'
    ),
    disk_errors(target, '--out'),
  ):
    write_file(target, b'')
  with pytest.raises(StorageError, match='cannot write'):
    write_file(target, b'')
  with pytest.raises(InputError, match='free some space'), disk_errors(target):
    raise OSError(28, 'No space left on device')


def test_a_lock_keeps_others_out_until_its_process_ends(tmp_path):
  lock = tmp_path / 'lock'
  hold = (
    'import sys, time; from ur4rec_jax.files import only_process\n'
    'with only_process(sys.argv[1], "taken"): print("held", flush=True); time.sleep(600)'
  )
  holder = subprocess.Popen(
    [sys.executable, '-c', hold, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(BusyError, match=r'taken.*held by process'), only_process(lock, 'taken'):
      pass
    assert lock.exists()
  finally:
    holder.kill()
    holder.wait()
    holder.stdout.close()
  # The killed process has left the file; the lock itself is free.
  assert lock.exists()
  # A second lock in the same process is refused too.
  with (
    only_process(lock, 'taken'),
    pytest.raises(BusyError, match='taken'),
    only_process(lock, 'taken'),
  ):
    pass
  assert not lock.exists()


def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('UR4REC_LOCK_SECONDS', '30')
  order, is_held = [], threading.Event()

  def hold():
    with only_process(tmp_path / 'lock', 'taken'):
      is_held.set()
      time.sleep(0.5)
      order.append('first')

  thread = threading.Thread(target=hold)
  thread.start()
  is_held.wait()
  with only_process(tmp_path / 'lock', 'taken'):
    order.append('second')
  thread.join()
  assert order == ['first', 'second']
  message = capsys.readouterr().err
  assert message.startswith(f'taken (held by process {os.getpid()} on ')
  assert message.endswith('; waiting up to 30 s\n')


def test_never_two_holders_while_lock_files_come_and_go(tmp_path):
  holders, most, gains = [], [], []

  def work():
    for _ in range(200):
      with contextlib.suppress(BusyError), only_process(tmp_path / 'lock', ''):
        holders.append(None)
        most.append(len(holders))
        gains.append(None)
        holders.pop()

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert max(most) == 1
  assert len(gains) > 4
  assert not list(pathlib.Path(tmp_path).iterdir())


@pytest.mark.parametrize(
  ('argument', 'expanded'),
  [
    ('--data_dir=~/data/shop', '--data_dir=/home/me/data/shop'),
    ('--config.data_dir=~/a=b', '--config.data_dir=/home/me/a=b'),
    ('--data_dir=~nobody-of-that-name/x', '--data_dir=~nobody-of-that-name/x'),
    ('--delimiter=~', '--delimiter=~'),
    ('--history=a~/b,~c', '--history=a~/b,~c'),
    ('--users', '--users'),
    ('', ''),
  ],
)
def test_the_home_folder_in_a_flag(monkeypatch, argument, expanded):
  monkeypatch.setenv('HOME', '/home/me')
  assert expand_home([argument]) == [expanded]

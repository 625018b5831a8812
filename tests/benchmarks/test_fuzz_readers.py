"""Damaged files of every kind are read or refused with one message."""

import random
import signal

import pytest

from benchmarks.robustness import fuzz_readers


@pytest.fixture(scope='module')
def scratch(tmp_path_factory):
  """A folder for all kinds."""
  return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module')
def kinds(scratch):
  """The kinds of files by name, while a slow reader is stopped."""
  before = signal.signal(signal.SIGALRM, fuzz_readers._stop)
  yield fuzz_readers.kinds(scratch)
  signal.signal(signal.SIGALRM, before)


def test_damaged_files_of_every_kind(scratch, kinds):
  for name, kind in kinds.items():
    folder = scratch / name
    folder.mkdir()
    counts, errors = fuzz_readers.fuzz(kind, 40, random.Random(name), folder)
    assert not errors, name
    assert counts['refused'] > 0
    assert sum(counts.values()) == 40


def test_an_error_and_a_slow_reader_are_found(scratch, kinds, monkeypatch):
  monkeypatch.setattr(fuzz_readers, '_SECONDS', 1)
  folder = scratch / 'faults'
  folder.mkdir()

  def read(path, unpacked):
    if path.read_bytes() == kinds['csv'].make(None):
      return
    while path.stat().st_size % 2:
      pass
    raise KeyError('one')

  kind = kinds['csv']._replace(read=read)
  counts, errors = fuzz_readers.fuzz(kind, 3, random.Random(1), folder)
  assert counts['error'] == 3
  assert any('KeyError' in error for error in errors)
  assert any('more than 1 seconds' in error for error in errors)

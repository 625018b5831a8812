"""What a person sees while a run trains: a bar that fits a terminal, or plain lines."""

import contextlib
import os
import re
import select
import termios

import pytest

from ur4rec_jax.errors import StorageError
from ur4rec_jax.runs import metric_writers
from ur4rec_jax.runs.metric_writers import Course, Progress

COURSE = Course(
  'pretrain_retriever', number=2, num_stages=4, first_step=50, done=20, total=12_000, later=5_000
)


def test_the_bar_fits_80_columns_with_stage_and_time_left():
  reader, writer = os.openpty()
  termios.tcsetwinsize(writer, (24, 80))
  with os.fdopen(writer, 'w') as terminal, contextlib.redirect_stderr(terminal):
    bar = Progress(COURSE)
    bar.update(12_000, loss=12.3456)
    bar.close()
    shown = ''
    while select.select([reader], [], [], 1)[0]:  # A loaded machine hands it over in parts.
      shown += os.read(reader, 10_000).decode()
  os.close(reader)
  last = re.split(r'[\r\n]+', shown.strip())[-1]
  assert len(last) <= 80
  assert last.startswith('2/4 pretrain_retriever 100%|')
  assert '12000/12000' in last
  assert re.search(r'loss 12\.346, \d+:\d\d:\d\d left$', last)


def test_lines_without_a_terminal_have_step_stage_and_time_left(capsys):
  bar = Progress(COURSE)
  bar.update(40, loss=1.0)
  bar.line('epoch 1: good')
  bar.note('pretrain_retriever is over')
  bar.close()
  line, note = capsys.readouterr().err.splitlines()
  assert re.fullmatch(
    r'\[2/4 pretrain_retriever 40/12000 steps, at most \d+:\d\d:\d\d left\] epoch 1: good', line
  )
  assert note == 'pretrain_retriever is over'


def test_the_time_left_ends_with_the_minutes_of_the_run(capsys, monkeypatch):
  clock = iter([100.0, 120.0, 120.0, 120.0, 120.0])
  monkeypatch.setattr('time.monotonic', lambda: next(clock))
  bar = Progress(COURSE._replace(done=0, total=30_000, later=0, deadline=130.0))
  bar.update(20, loss=1.0)
  bar.line('epoch 1: good', end=80)
  line = capsys.readouterr().err.strip()
  assert '20/30000 steps, 0:00:10 left, more while validation improves (at most 0:00:10)]' in line


def test_with_patience_the_time_left_is_that_without_a_better_validation(capsys, monkeypatch):
  clock = iter([0.0, 20.0, 20.0, 20.0, 20.0])
  monkeypatch.setattr('time.monotonic', lambda: next(clock))
  bar = Progress(COURSE._replace(done=0, total=30_000, later=0))
  bar.update(20, loss=1.0)
  bar.line('epoch 1: good', end=80)
  line = capsys.readouterr().err.strip()
  assert '20/30000 steps, 0:01:00 left, more while validation improves (at most 8:19:40)]' in line


def test_a_file_that_cannot_be_mended_is_named_with_the_reason(tmp_path, monkeypatch):
  (tmp_path / 'metrics.jsonl').write_text('{"step"')

  def no_room(*_):
    raise StorageError('No space left on device')

  monkeypatch.setattr(metric_writers, 'write_file', no_room)
  with pytest.raises(
    StorageError, match=r'metrics\.jsonl or .*: No space left on device; make room'
  ):
    metric_writers.MetricWriter(str(tmp_path), step=0, size=7)


def test_the_time_left_is_that_of_all_stages():
  course = COURSE._replace(done=0, total=30, later=60)
  assert course.seconds_left(10, seconds=10.0) == 80  # 20 steps of this stage and 60 later ones.
  assert course.seconds_left(0, seconds=0.0) == 0

"""A run that is killed and started again ends exactly as one that was left alone."""

import json
import shutil
import signal

import pytest

from benchmarks.robustness.small_runs import (
  assert_same_end,
  before_the_manifest,
  in_a_save,
  lines,
)
from tests.helpers.runs import wait_for


def in_first_dispatches(workdir):
  return len(lines(workdir)) >= 1


def in_validation(workdir):
  # An epoch is 2 dispatches here; its last line comes before a slow validation.
  trained = sum('loss' in line for line in lines(workdir))
  return trained >= 4 and trained % 2 == 0


# One user a dispatch makes validation long enough to hit; it changes no number.
SLOW_VALIDATION = '--config.evaluation.batch_size=1'


@pytest.mark.parametrize(
  'moments',
  [
    (in_a_save, in_validation),
    pytest.param(
      (in_first_dispatches, in_a_save, in_validation, before_the_manifest), marks=pytest.mark.slow
    ),
  ],
)
def test_sigkill_at_several_moments(moments, start, run, finished, tmp_path):
  workdir = tmp_path / 'run'
  for moment in moments:
    process = start(workdir, SLOW_VALIDATION)
    wait_for(process, lambda moment=moment: moment(workdir))
    process.kill()
    process.communicate()
    assert not (workdir / 'results.json').exists()
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  assert 'resuming from step' in done.stdout
  assert_same_end(workdir, finished)


def test_sigterm_saves_and_the_same_command_goes_on(start, run, finished, tmp_path):
  workdir = tmp_path / 'run'
  for moment in (in_first_dispatches, in_validation):
    process = start(workdir, SLOW_VALIDATION)
    wait_for(process, lambda moment=moment: moment(workdir))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert 'SIGTERM: saved step' in stderr
    assert 'start the same command again' in stderr
    assert 'Traceback' not in stderr
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  assert 'resuming from step' in done.stdout
  assert_same_end(workdir, finished)


def test_evaluate_mode_repeats_the_results_to_the_last_digit(run, finished):
  results = json.loads((finished / 'results.json').read_text())
  done = run(finished, '--mode=evaluate')
  assert done.returncode == 0, done.stderr
  again = json.loads(done.stdout)
  for key in ('protocol', 'valid', 'test', 'by_popularity', 'baselines'):
    assert again[key] == results[key]


def test_training_a_finished_run_again_changes_nothing(run, finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'run')
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  for file in ('results.json', 'metrics.jsonl'):
    assert (workdir / file).read_bytes() == (finished / file).read_bytes()

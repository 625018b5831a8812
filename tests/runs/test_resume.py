"""A run that is killed and started again ends exactly as one that was left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys

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
    _, stderr = process.communicate(timeout=300)
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


def test_evaluate_mode_adds_followers_to_a_finished_run(run, finished):
  results = json.loads((finished / 'results.json').read_text())
  done = run(finished, '--mode=evaluate', '--config.followers.weight=5')
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['model'] == f'{results["model"]} + followers'
  assert found['baselines'] == results['baselines']
  assert found['valid']['mean_rank'] != results['valid']['mean_rank']


def test_training_a_finished_run_again_changes_nothing(run, finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'run')
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  for file in ('results.json', 'metrics.jsonl'):
    assert (workdir / file).read_bytes() == (finished / file).read_bytes()


@pytest.mark.slow
def test_other_cores_and_dispatches_are_told(run, finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  path = workdir / 'config.json'
  record = json.loads(path.read_text())
  cores = len(os.sched_getaffinity(0))
  machine = {'device': 'cpu', 'devices': 1, 'cores': cores, 'threads': cores}
  assert record['machine'] == machine
  record['machine'] = machine | {'cores': 98, 'threads': 99}
  record['config']['dtype'] = 'float32'  # A CPU computes in it anyway.
  path.write_text(json.dumps(record))
  done = run(workdir, '--config.steps_per_dispatch=2', '--config.num_epochs=5')
  assert done.returncode == 0, done.stderr
  (warning,) = (line for line in done.stderr.splitlines() if line.startswith('warning'))
  assert f'threads {cores} instead of 99, steps_per_dispatch 2 instead of 3' in warning
  assert '--config.cpu_threads=99 keeps' in warning
  same = ('--config.steps_per_dispatch=2', '--config.num_epochs=5', f'--config.cpu_threads={cores}')
  assert 'warning' not in run(workdir, *same).stderr


SUMS = """
import hashlib, os, sys
os.sched_setaffinity(0, [*os.sched_getaffinity(0)][: int(sys.argv[1])])
from ur4rec_jax.sharding import devices
devices.use_cpu_threads(int(sys.argv[2]))
import jax, jax.numpy as jnp
x = jax.random.normal(jax.random.key(0), (2000, 64))
g = jax.jit(jax.grad(lambda e: jax.nn.logsumexp(x @ e.T, -1).sum()))(x[::2] * 0.1)
print(hashlib.sha256(g.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_threads_and_not_cores_decide_the_last_bit(environment):
  def digest(cores: int, threads: int) -> str:
    words = [sys.executable, '-c', SUMS, str(cores), str(threads)]
    return subprocess.run(words, env=environment, capture_output=True, check=True).stdout

  on_one_core = {threads: digest(1, threads) for threads in (1, 3)}
  assert on_one_core[1] != on_one_core[3]
  assert digest(99, 3) == on_one_core[3]


@pytest.mark.slow
def test_time_ends_a_run_and_more_time_goes_on(run, finished, tmp_path):
  workdir = tmp_path / 'run'
  done = run(workdir, '--config.max_minutes=1e-6')
  assert done.returncode == 0, done.stderr
  assert 'the 1e-06 minutes of max_minutes are over' in done.stderr
  steps = lambda folder: json.loads((folder / 'results.json').read_text())['stages'][0]['steps']
  assert 0 < steps(workdir) < steps(finished)
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  assert 'resuming from step' in done.stdout
  assert steps(workdir) == steps(finished)

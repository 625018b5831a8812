"""A few of the mistakes and damages of the benchmark, on a small run."""

import shutil

import pytest

from benchmarks.robustness import mistakes
from tests.helpers.marks import slow
from ur4rec_jax.errors import EXIT_CODES

QUICK = (
  'unknown field',
  'unknown flag of XLA',
  'JAX_PROCESS_ID too large',
  'more memory than there is',
  'config.json cut',
  'config.json deleted',
  'progress of another version',
  'manifest a list',
  'metrics.jsonl cut',
  'tensorboard is a file',
  'package optax missing',
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, data_dir, finished):
  workdir = tmp_path_factory.mktemp('mistakes')
  shutil.copytree(data_dir, workdir / 'good/data')
  shutil.copytree(finished, workdir / 'good/run')
  return workdir


@pytest.mark.parametrize('name', [*QUICK[:5], *slow(*QUICK[5:])])
def test_a_mistake_ends_as_promised(name, workdir):
  (case,) = (case for case in mistakes.CASES if case.name == name)
  outcome = mistakes.run_case(case, workdir)
  assert not outcome.problem, outcome
  assert outcome.message.startswith(('error: ', 'warning: '))


def test_cases_have_names_of_their_own_and_codes_of_the_table():
  names = [case.name for case in mistakes.CASES]
  assert len(names) == len(set(names)) >= 60
  assert {case.code for case in mistakes.CASES} <= EXIT_CODES.keys()

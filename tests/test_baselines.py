"""The command that measures baselines, alone and beside a trained run."""

import json
import sys

import pyarrow as pa
import pytest

from data_prep.build_dataset import build_from_table
from tests.helpers.commands import run_here
from ur4rec_jax import baselines
from ur4rec_jax.evaluation import neighbours
from ur4rec_jax.evaluation.protocol import SEEN_ITEMS


def test_a_trained_run_stands_beside_the_baselines(finished, data_dir, tmp_path):
  out = tmp_path / 'found.json'
  flags = [f'--data_dir={data_dir}', f'--workdir={finished}', f'--out={out}']
  done = run_here(baselines.main, flags)
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert [*found] == [*baselines.WITHOUT_TRAINING, *baselines.FACTORS, str(finished)]
  stored = json.loads((finished / 'results.json').read_text())
  assert found[str(finished)]['ndcg@10'] == stored['test']['ndcg@10']
  for name in ('popularity', 'random'):
    assert found[name]['users'] == stored['baselines'][name]['users']
  assert found['popularity']['ndcg@10'] == stored['baselines']['popularity']['ndcg@10']
  assert found['popularity']['coverage'] < found['random']['coverage']
  assert all(name in done.stdout for name in (*found, 'serendipity', 'candidates: all items'))


def test_the_lists_of_a_run_hold_the_items_that_its_metrics_count(finished, data_dir):
  """Hits are counted once from ranks and once in the lists that serving makes."""
  from ur4rec_jax.data.dataset import load_dataset
  from ur4rec_jax.evaluation.protocol import Protocol

  dataset = load_dataset(data_dir)
  metrics, lists = baselines._open_run(str(finished), dataset, Protocol())()
  targets = dataset.held_out('test')[1]
  assert (lists == targets[:, None]).any(1).mean() == pytest.approx(metrics['hit@10'])


def test_without_the_library_of_als_the_others_are_measured(data_dir, monkeypatch):
  monkeypatch.setitem(sys.modules, 'implicit', None)
  flags = [f'--data_dir={data_dir}', '--models=popularity,ALS']
  done = run_here(baselines.main, flags)
  assert done.returncode == 0, done.stderr
  assert 'popularity' in done.stdout
  assert 'are left out' in done.stdout
  done = run_here(baselines.main, [flags[0], '--models=ALS'])
  assert done.returncode == 2
  assert "--models=ALS: need a library: pip install 'ur4rec-jax[baselines]'" in done.stderr


def test_with_too_many_items_ease_is_left_out_and_not_in_silence(data_dir, monkeypatch):
  monkeypatch.setattr(neighbours, 'MOST_ITEMS_OF_EASE', 5)
  flags = [f'--data_dir={data_dir}', '--models=popularity,EASE']
  done = run_here(baselines.main, flags)
  assert done.returncode == 0, done.stderr
  assert 'EASE is left out' in done.stdout
  done = run_here(baselines.main, [flags[0], '--models=EASE'])
  assert done.returncode == 2
  assert '--models=EASE: the data are of ' in done.stderr
  assert 'items; EASE is for up to 5' in done.stderr


def test_the_table_comes_even_if_its_file_cannot_be_written(data_dir, tmp_path):
  flags = [f'--data_dir={data_dir}', '--models=popularity', f'--out={tmp_path}/none/a.json']
  done = run_here(baselines.main, flags)
  assert done.returncode == 4
  assert 'serendipity' in done.stdout
  assert 'cannot write' in done.stderr


@pytest.mark.parametrize('seen_items', SEEN_ITEMS)
def test_data_without_anybody_to_test_on_are_refused(seen_items, tmp_path):
  """Nobody has the three interactions that leave-one-out needs."""
  rows = {'user': [f'u{i // 2}' for i in range(16)], 'item': [f'i{i % 5}' for i in range(16)]}
  build_from_table(pa.table(rows), tmp_path / 'data')
  done = run_here(baselines.main, [f'--data_dir={tmp_path}/data', f'--seen_items={seen_items}'])
  assert done.returncode == 2
  assert 'no user has a valid item that counts' in done.stderr


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--models=popularity,kNN'], "'kNN' is none of random, popularity"),
    (['--workdir=none'], 'none'),
    (['--seed=-1'], '--seed=-1: must be 0 or more'),
    (['--workdir={run}', '--seen_items=keep'], 'was evaluated under another protocol'),
    (['--workdir={run}', '--split=time'], 'has learned from other data than --data_dir'),
  ],
)
def test_wrong_flags_are_named(flags, said, finished, data_dir):
  done = run_here(
    baselines.main, [f'--data_dir={data_dir}', *(flag.format(run=finished) for flag in flags)]
  )
  assert done.returncode == 2
  assert said in done.stderr

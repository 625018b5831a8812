"""`ur4rec_jax.update`: warm start, gate, promotion and rollback, on small real runs."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from benchmarks.robustness.small_runs import assert_same_end
from data_prep import build_dataset
from tests.helpers.commands import run_here
from tests.helpers.goods import write_table
from tests.helpers.runs import ROOT
from ur4rec_jax import export, exported, update
from ur4rec_jax.data.dataset import read_interactions, read_items
from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import registry
from ur4rec_jax.runs import gate, train_loop, update_run, warm_start
from ur4rec_jax.runs.knobs import default_config
from ur4rec_jax.runs.open_run import open_run, restore_best
from ur4rec_jax.runs.workdir import open_stored_run


def small_config(data_dir, epochs=8):
  config = default_config()
  config.data_dir = str(data_dir)
  fields = {'sasrec.dim': 16, 'sasrec.num_blocks': 1, 'sasrec.ffn_dim': 16, 'max_length': 20}
  fields |= {'batch_size': 32, 'num_epochs': epochs, 'optimizer.learning_rate': 1e-2}
  fields |= {'optimizer.warmup_steps': 5, 'steps_per_dispatch': 3, 'sasrec.item_scale': 0.02}
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def days(data_dir, tmp_path_factory):
  """Two days of the synthetic data, the second with new users and items, and a run on the first."""
  folder = tmp_path_factory.mktemp('days')
  data, items = read_interactions(data_dir), read_items(data_dir)
  names = [item['original_id'] for item in items]
  users = np.repeat(data.user_ids, np.diff(data.offsets))
  rows = [
    (u, names[i - 1], int(t)) for u, i, t in zip(users, data.item_ids, data.timestamps, strict=True)
  ]
  rows.sort(key=lambda row: row[2])
  cut = len(rows) * 3 // 4
  first = [row for row in rows[:cut] if row[1] not in names[:2]]
  orders = write_table(folder / 'day1.csv', 'user,item,time', first)
  write_table(folder / 'day2.csv', 'user,item,time', rows[cut:])
  flags = ['--source=interactions', f'--raw_dir={orders}', f'--data_dir={folder / "day1"}']
  assert run_here(build_dataset.main, flags).returncode == 0
  append(folder, 'day2')
  train_loop.train_and_evaluate(small_config(folder / 'day1'), str(folder / 'run1'))
  return folder


def append(folder, name):
  flags = [f'--raw_dir={folder / name}.csv', f'--data_dir={folder / "day1"}']
  done = run_here(build_dataset.main, ['--append', *flags, f'--out={folder / name}'])
  assert done.returncode == 0, done.stderr


def run_update(days, out, *flags, data='day2'):
  flags = (f'--data_dir={days / data}', f'--out={out}', '--epochs=6', *flags)
  return run_here(update.main, [f'--workdir={days / "run1"}', *flags])


def warm_run(days, **init):
  config = update_run.update_config(days / 'run1', days / 'day2', epochs=1)
  config.init.update(init)
  return open_run(config)


def test_parameters_go_over_by_original_id(days):
  before = open_stored_run(days / 'run1')
  run = warm_run(days)
  old = jax.device_get(restore_best(before, str(days / 'run1'))[1])
  new = warm_start.warm_params(run)
  ids = [
    {item['original_id']: i for i, item in enumerate(read_items(days / day), 1)}
    for day in ('day1', 'day2')
  ]
  tables = [tree['sasrec']['item_embedding'] for tree in (old, new)]
  assert len(ids[1]) > len(ids[0])
  for name, row in ids[0].items():
    np.testing.assert_array_equal(tables[1][ids[1][name]], tables[0][row])
  old['sasrec'].pop('item_embedding'), new['sasrec'].pop('item_embedding')
  jax.tree.map(np.testing.assert_array_equal, old, new)


def test_a_new_item_starts_as_the_mean_of_its_neighbours(days):
  run = warm_run(days)
  table = warm_start.warm_params(run)['sasrec']['item_embedding']
  dataset = run.dataset.train_part()
  histories = np.split(dataset.item_ids, dataset.offsets[1:-1])
  known = len(read_items(days / 'day1'))
  trained = [i for i in range(known + 1, run.dataset.num_items + 1) if i in dataset.item_ids]
  assert trained
  for item in trained:
    near = [
      int(other)
      for history in histories
      for at in np.flatnonzero(history == item)
      for other in history[[x for x in (at - 2, at - 1, at + 1, at + 2) if 0 <= x < len(history)]]
      if other <= known
    ]
    np.testing.assert_allclose(table[item], table[near].mean(0), rtol=1e-4, atol=1e-6)


def test_moments_are_carried_or_reset(days):
  reset, carried = (
    warm_start.warm_state(warm_run(days, moments=kind)) for kind in ('reset', 'carry')
  )
  of = lambda state: [np.abs(x).sum() for x in jax.tree.leaves(state.opt_state)]
  assert not any(of(reset))
  assert all(of(carried)[1:])
  jax.tree.map(np.testing.assert_array_equal, reset.params, carried.params)


def test_replay_chooses_users(days, monkeypatch):
  assert warm_start.users_to_train(warm_run(days)) is None
  run = warm_run(days, replay=0.0)
  chosen = warm_start.users_to_train(run)
  batches = train_loop.plan_batches(run)
  plan = batches.epoch(0)
  trained = set(plan.users[plan.lengths > 0].tolist())
  assert trained == set(np.flatnonzero(chosen & (run.dataset.split.train_lengths > 1)).tolist())
  assert 0 < chosen.sum() < len(chosen)
  with monkeypatch.context() as patch:
    patch.setattr(warm_start, 'users_to_train', lambda _: np.zeros_like(chosen))
    with pytest.raises(InputError, match=r'config\.init\.replay=0\.0: no user .* new events since'):
      train_loop.plan_batches(run)
  more = warm_start.users_to_train(warm_run(days, replay=0.5))
  assert more[chosen].all()
  assert chosen.sum() < more.sum() < len(more)


def test_few_users_are_trained_on_for_enough_steps(days):
  stage = update_run.update_config(days / 'run1', days / 'day2', epochs=None).stage.train
  one = update_run.update_config(days / 'run1', days / 'day2', epochs=1)
  steps_per_epoch = train_loop.plan_batches(open_run(one)).steps_per_epoch
  assert steps_per_epoch < update_run.MIN_STEPS / 6
  assert stage.num_epochs == -(-update_run.MIN_STEPS // steps_per_epoch)


def test_an_update_takes_all_its_epochs_whatever_the_time_limit_of_the_run_before(days, tmp_path):
  before = tmp_path / 'limited'
  shutil.copytree(days / 'run1', before)
  record = json.loads((before / 'config.json').read_text())
  record['config']['max_minutes'] = 0.001
  (before / 'config.json').write_text(json.dumps(record))
  assert update_run.update_config(before, days / 'day2', epochs=2).max_minutes == 0


def test_another_model_is_refused(days):
  run = warm_run(days)
  config = run.config.copy_and_resolve_references()
  config.sasrec.dim = 8
  with pytest.raises(InputError, match=r'config.init.run=.*: has another model: .*16.* there'):
    warm_start.warm_params(open_run(config))
  config.init.run = str(days / 'nowhere')
  with pytest.raises(InputError, match=r'config.init.run=.*no run here'):
    warm_start.warm_params(open_run(config))


def test_what_has_learned_the_held_out_events_is_refused(days, tmp_path):
  before = tmp_path / 'run2' / 'all'
  shutil.copytree(days / 'run1', before)
  record = json.loads((before / 'config.json').read_text())
  record['config'] |= {'train_on': 'all', 'keep': 'last'}
  (before / 'config.json').write_text(json.dumps(record))
  for promote in ('judged', 'on_all_events'):
    flags = [f'--data_dir={days / "day2"}', f'--out={tmp_path / "run3"}', f'--promote={promote}']
    done = run_here(update.main, [f'--workdir={before}', *flags])
    assert done.returncode == 2
    assert 'give the folder of the update itself' in done.stderr
  with pytest.raises(InputError, match=r'was trained with config\.train_on=all, so it has learned'):
    warm_start.warm_params(warm_run(days, run=str(before)))
  run = warm_run(days)
  run.config.split = 'time'
  with pytest.raises(InputError, match=r'with config\.split=leave_one_out, so it has learned'):
    warm_start.warm_params(run)


def test_an_update_is_promoted_and_rolled_back(days, tmp_path):
  out, models = tmp_path / 'run2', tmp_path / 'models'
  first = tmp_path / 'first'
  assert run_here(export.main, [f'--workdir={days / "run1"}', f'--out={first}']).returncode == 0
  registry.promote(models, first)
  done = run_update(days, out, f'--registry={models}', '--epochs=2', '--margin=1')
  assert done.returncode == 0, done.stderr
  verdict = json.loads((out / 'gate.json').read_text())
  assert set(verdict['groups']) == {gate.NEW_EVENTS, gate.OTHERS}
  assert verdict['is_promoted'], verdict
  assert 'promoted: version 000002' in done.stdout
  recommender = exported.load(registry.path(models, '000002'))
  assert len(recommender.item_ids) == len(read_items(days / 'day2'))
  # The same command changes nothing, and trains nothing.
  before = (out / 'results.json').stat().st_mtime_ns
  again = run_update(days, out, f'--registry={models}', '--epochs=2', '--margin=1')
  assert 'version 000002' in again.stdout
  assert (out / 'results.json').stat().st_mtime_ns == before
  # Without the users, whose histories the export then would not have.
  flags = f'--registry={models}', '--epochs=2', '--margin=1'
  for more, version, has in ((('--users',), '000003', True), ((), '000004', False)):
    assert f'version {version}' in run_update(days, out, *flags, *more).stdout
    assert (exported.load(registry.path(models, version)).known_users is not None) == has
  for version in ('000003', '000002'):
    back = run_here(update.main, [f'--registry={models}', '--rollback'])
    assert f'version {version} serves again' in back.stdout
  back = run_here(update.main, [f'--registry={models}', '--rollback'])
  assert 'version 000001 serves again' in back.stdout
  assert registry.current(models) == '000001'
  assert run_here(update.main, [f'--registry={models}', '--rollback']).returncode == 2


def test_the_promoted_model_may_have_learned_all_events(days, tmp_path):
  models, chain = tmp_path / 'models', [days / 'run1', tmp_path / 'run2', tmp_path / 'run3']
  flags = [f'--data_dir={days / "day2"}', f'--registry={models}', '--epochs=2', '--margin=1']
  flags += ['--force', '--promote=on_all_events']  # The second time no event is new.
  for before, out in itertools.pairwise(chain):
    done = run_here(update.main, [*flags, f'--workdir={before}', f'--out={out}'])
    assert done.returncode == 0, done.stderr
  for before, out in itertools.pairwise(chain):
    judged, served = (open_stored_run(x) for x in (out, out / 'all'))
    lengths = judged.dataset.lengths
    assert (judged.dataset.split.train_lengths == np.maximum(lengths - 2, 1)).all()
    assert (served.dataset.split.train_lengths == lengths).all()
    assert len(served.dataset.train_part().item_ids) == lengths.sum()
    # Each starts from the model of its kind, and trains to its end, as the other one.
    assert judged.config.init.run == str(before)
    assert served.config.init.run == str(before / 'all' if before != chain[0] else before)
    for folder in (out, out / 'all'):
      results = json.loads((folder / 'results.json').read_text())
      assert results['stages'][0]['best_epoch'] == 2
      assert ('trained_on' in results['protocol']) == (folder != out)
  about = exported.load(registry.path(models, registry.current(models))).about
  assert about['config']['train_on'] == 'all'
  assert 'all interactions' in about['protocol']['trained_on']


def test_a_day_of_robots_is_refused(days, tmp_path):
  """Every user of the day has the same eight items, in an order of its own."""
  lines = (days / 'day2.csv').read_text().splitlines()
  users, items, times = zip(*(line.split(',') for line in lines[1:]), strict=True)
  rng, pushed = np.random.default_rng(0), sorted(set(items))[:8]
  orders = {user: iter(rng.permutation(pushed)) for user in users}
  rows = [(user, next(orders[user], None), time) for user, time in zip(users, times, strict=True)]
  rows = [row for row in rows if row[1] is not None]
  write_table(days / 'poisoned.csv', 'user,item,time', rows)
  append(days, 'poisoned')
  models = tmp_path / 'models'
  done = run_update(days, tmp_path / 'run2', f'--registry={models}', data='poisoned')
  assert done.returncode == 0, done.stderr
  assert 'refused: ' in done.stdout
  assert 'kept aside' in done.stdout
  assert registry.current(models) is None


def ranks(before, after, popularity=None, has_new=None):
  count = len(before)
  if popularity is None:
    popularity = np.full(count, 50)
  has_new = np.ones(count, bool) if has_new is None else has_new
  return gate.Ranks(np.array(before), np.array(after), np.array(popularity), np.array(has_new))


def test_the_gate():
  rng = np.random.default_rng(0)
  good, bad = rng.integers(1, 10, 400), rng.integers(1, 30, 400)
  assert gate.judge(ranks(good, good), 0)['is_promoted']
  assert gate.judge(ranks(bad, good), 0)['is_promoted']
  fallen = gate.judge(ranks(good, bad), 0.02)
  assert 'NDCG@10 falls from' in fallen['reasons'][0]
  # A small but certain loss is refused within the margin, too.
  slightly = gate.judge(ranks(good, good + 1), 0.5)
  assert 'falls with p 0.000' in slightly['reasons'][0]
  # A loss of users without new events counts as much.
  half = np.arange(400) < 200
  forgets = gate.judge(ranks(good, np.where(half, good, bad), has_new=half), 0.02)
  assert [gate.OTHERS in reason for reason in forgets['reasons']] == [True]
  odd = gate.judge(ranks(bad, bad, good), 0.02)
  assert 'worse than popularity' in odd['reasons'][0]
  assert (
    'no user with new events'
    in gate.judge(ranks(good, good, has_new=~half & half), 0)['reasons'][0]
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), '--workdir is missing'),
    (('--rollback',), '--registry is missing'),
    (('--rollback', '--registry=x', '--out=y'), '--rollback: works on --registry alone'),
    (('--rollback', '--registry=x', '--keep_versions=2'), 'alone; leave --keep_versions out'),
    (('--rollback', '--registry=x', '--watch'), 'alone; leave --watch out'),
    (('--rollback', '--registry=x', '--promote=judged'), 'alone; leave --promote out'),
    (('--workdir=a', '--data_dir=b', '--out=a'), 'is the folder of the old run'),
    (('--workdir=a', '--data_dir=b', '--out=c', '--epochs=0'), '--epochs=0: must be at least 1'),
    (('--workdir=a', '--data_dir=b', '--out=c', '--replay=2'), r'--replay=2: must be in \[0, 1\]'),
    (('--workdir=a', '--data_dir=b', '--out=c', '--rounds=3'), '--rounds: is for --watch'),
    (('--workdir=a', '--data_dir=b', '--out=c', '--users'), '--users: is for --registry'),
    (('--workdir=a', '--data_dir=b', '--out=c', '--force'), '--force: is for --registry'),
    (('--workdir=nowhere', '--data_dir=b', '--out=c'), 'no run here'),
  ],
  ids=str,
)
def test_wrong_flags(flags, message, tmp_path, monkeypatch):
  import re

  monkeypatch.chdir(tmp_path)
  done = run_here(update.main, flags)
  assert done.returncode == 2
  assert re.search(message, done.stderr)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bits(days, tmp_path, environment):
  def command(name):
    words = [sys.executable, '-m', 'ur4rec_jax.update', f'--workdir={days / "run1"}']
    words += [f'--data_dir={days / "day2"}', f'--out={tmp_path / name}', '--epochs=3']
    return [*words, f'--registry={tmp_path / name}-models', '--margin=1']

  started = time.monotonic()
  subprocess.run(command('expected'), cwd=ROOT, env=environment, check=True, capture_output=True)
  seconds, rng = time.monotonic() - started, random.Random(0)
  served = tmp_path / 'expected-models' / 'versions' / '000001'
  for number in range(3):
    name = f'killed-{number}'
    process = subprocess.Popen(
      command(name), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(rng.uniform(0.2, 1.0) * seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    models = tmp_path / f'{name}-models'
    version = registry.current(models)
    if version is not None:
      exported.load(registry.path(models, version))
    subprocess.run(command(name), cwd=ROOT, env=environment, check=True, capture_output=True)
    assert_same_end(tmp_path / name, tmp_path / 'expected')
    assert registry.current(models) == '000001'
    for path in (served / name for name in ('arrays.npz', 'items.json')):
      assert (models / 'versions' / '000001' / path.name).read_bytes() == path.read_bytes()

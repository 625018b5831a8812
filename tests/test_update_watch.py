"""`update --watch`: what users do reaches the served model without anybody's hand."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_prep import build_dataset
from tests.helpers.commands import run_here
from tests.helpers.fork_server import Program
from tests.helpers.goods import write_table
from tests.helpers.runs import ROOT
from tests.helpers.services import request, serve
from ur4rec_jax import export, exported, update
from ur4rec_jax.data.dataset import read_info, read_interactions, read_items
from ur4rec_jax.inference import registry
from ur4rec_jax.online.events import Event
from ur4rec_jax.online.feedback_store import open_store
from ur4rec_jax.runs import train_loop
from ur4rec_jax.runs.knobs import default_config

START = 1_700_000_000


@pytest.fixture(scope='module')
def shop(make_once):
  """A small dataset of clicks and purchases, a run on it, and its export; read only."""
  return make_once('watched', make_shop)


def make_shop(folder):
  rng = np.random.default_rng(0)
  rows = [
    [f'u{user:02}', f'i{item:02}', START + 1000 * step + user, ('click', 'buy')[step % 2]]
    for user in range(40)
    for step, item in enumerate(rng.permutation(20)[:8])
  ]
  orders = write_table(folder / 'orders.csv', 'user,item,time,kind', rows)
  flags = ['--source=interactions', f'--raw_dir={orders}', f'--data_dir={folder / "data"}']
  flags += ['--event_column=kind', '--event_weights=click=1,buy=5', '--drop_duplicates']
  assert run_here(build_dataset.main, flags).returncode == 0
  config = default_config()
  config.data_dir = str(folder / 'data')
  fields = {'sasrec.dim': 8, 'sasrec.num_blocks': 1, 'sasrec.ffn_dim': 8, 'max_length': 10}
  fields |= {'batch_size': 32, 'num_epochs': 1, 'steps_per_dispatch': 2}
  config.update_from_flattened_dict(fields)
  train_loop.train_and_evaluate(config, str(folder / 'run'))
  flags = [f'--workdir={folder / "run"}', f'--out={folder / "export"}', '--users']
  assert run_here(export.main, flags).returncode == 0


def flags_of(shop, folder, *more):
  return [
    '--watch', f'--events={folder}/events.db', f'--workdir={shop}/run', f'--data_dir={shop}/data',
    f'--out={folder}/rounds', f'--registry={folder}/models', '--epochs=1', '--margin=1', '--users',
    '--force', *more,
  ]  # fmt: skip


def command(*flags):
  return [sys.executable, '-m', 'ur4rec_jax.update', *flags]


def new_events():
  """Two new users, one of whom takes a new item."""
  items = [f'i{n:02}' for n in range(6)]
  rows = [('ann', item) for item in items] + [('bob', item) for item in ['new', *items[::-1]]]
  return [
    {'user': user, 'item': item, 'kind': 'click', 'id': f'{n}', 'time': START + 9000 + n}
    for n, (user, item) in enumerate(rows)
  ]


def ask(address, user):
  status, _, content = request(f'{address}/recommend?user={user}&k=20')
  assert status == 200, content
  return {row['item'] for row in json.loads(content)['recommendations']}


def test_new_users_and_items_reach_the_served_model(shop, environment, tmp_path):
  models = tmp_path / 'models'
  registry.promote(models, shop / 'export')
  served_by = ('--batch=1', f'--registry={models}', f'--events={tmp_path}/events.db')
  flags = flags_of(shop, tmp_path, '--every_events=5', '--every_minutes=0.05')
  with serve(environment, *served_by) as (served, address):
    loop = Program('ur4rec_jax.update', flags, environment, ROOT)
    try:
      assert 'a round after 5 new events or 0.05 minutes' in loop.stdout.readline()
      assert loop.stdout.readline() == 'nothing new; waiting\n'
      status, _, content = request(f'{address}/events', new_events())
      assert status == 200, content
      assert 'new' not in ask(address, 'ann')
      lines = [loop.stdout.readline() for _ in range(8) if loop.poll() is None]
      line = next(line for line in lines if line.startswith('round 1: '))
      assert line.startswith('round 1: 13 new interactions, 2 new users, 1 new item; ')
      assert 'NDCG@10' in line
      assert f'promoted: version 000002 in {models}; ' in line
      assert served.stdout.readline() == 'serving version 000002 after 000001\n'
      assert 'new' in ask(address, 'ann')
      assert {'ann', 'bob'} <= {*json.loads(request(f'{address}/users?search=')[2])} | {
        *json.loads(request(f'{address}/users?search=ann')[2]),
        *json.loads(request(f'{address}/users?search=bob')[2]),
      }
      loop.send_signal(signal.SIGTERM)
      out, error = loop.communicate(timeout=120)
      assert (loop.returncode, error) == (0, '')
      assert out.splitlines()[-1] == 'stopped; the same command goes on'
    finally:
      loop.kill()
  state = json.loads((tmp_path / 'rounds' / 'watch.json').read_text())
  assert (state['round'], state['written']) == (1, 13)
  assert not (tmp_path / 'rounds' / '000001' / 'events.csv').exists()


def store_of(folder, rows):
  store = open_store(str(folder / 'events.db'))
  store.write(
    [Event(row['user'], row['id'], row['item'], row['kind'], row['time']) for row in rows]
  )
  return store


def test_events_that_the_data_have_make_no_round(shop, tmp_path, monkeypatch):
  data, items = read_interactions(shop / 'data'), read_items(shop / 'data')
  old = {'user': data.user_ids[0], 'item': items[data.item_ids[0] - 1]['original_id'],
         'kind': 'click', 'id': '1', 'time': int(data.timestamps[0])}  # fmt: skip
  store_of(tmp_path, [old, old | {'id': '2', 'kind': 'view', 'time': START + 10**5}]).close()
  monkeypatch.setattr(time, 'sleep', stop_instead)
  done = run_here(update.main, flags_of(shop, tmp_path, '--every_events=1'))
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[1:] == [
    'nothing new; waiting',
    'stopped; the same command goes on',
  ]
  assert json.loads((tmp_path / 'rounds' / 'watch.json').read_text())['written'] == 2
  assert not list((tmp_path / 'rounds').glob('0*'))


def test_events_of_unknown_items_are_told(shop, tmp_path, monkeypatch):
  rows = [{'user': f'{n}', 'item': f'{900 + n}', 'kind': 'click', 'id': '1', 'time': START + n}
          for n in range(3)]  # fmt: skip
  store_of(tmp_path, rows).close()
  monkeypatch.setattr(time, 'sleep', stop_instead)
  done = run_here(update.main, flags_of(shop, tmp_path, '--every_events=1'))
  assert done.returncode == 0, done.stderr
  line = done.stdout.splitlines()[1]
  assert line.startswith('nothing new: 3 of 3 events are of items that the data lack, such as')
  assert "such as '900', where the data have 'i" in line
  assert 'if these are ids of another kind, send the service those of the data' in line


@pytest.mark.parametrize(
  ('delimiter', 'quoting', 'count'),
  # Without quotes an id with the delimiter in it cannot be written.
  [
    ('space', 'none', '1 of 1 event'),
    ('tab', None, '2 of 2 events'),
    (',', 'none', '1 of 1 event'),
  ],
)
def test_a_log_has_the_form_of_the_first_table(
  shop, tmp_path, monkeypatch, delimiter, quoting, count
):
  data = shutil.copytree(shop / 'data', tmp_path / 'data')
  info = read_info(data)
  info['options'] |= {'delimiter': delimiter, 'quoting': quoting}
  (data / 'dataset.json').write_text(json.dumps(info))
  rows = [{'user': user, 'item': item, 'kind': 'click', 'id': '1', 'time': START}
          for user, item in (('ann', '7"lamp'), ('a, b', 'x'))]  # fmt: skip
  store_of(tmp_path, rows).close()
  monkeypatch.setattr(time, 'sleep', stop_instead)
  done = run_here(update.main, flags_of(shop, tmp_path, '--every_events=1', f'--data_dir={data}'))
  assert done.returncode == 0, done.stderr
  line = done.stdout.splitlines()[1]
  assert line.startswith(f'nothing new: {count} are of items that the data lack, such as')
  assert '7"lamp' in line or count.startswith('2')


def stop_instead(seconds):
  """Replaces a sleep of the loop by a signal to stop."""
  os.kill(os.getpid(), signal.SIGTERM)


def test_a_failed_round_is_told_and_wrong_input_ends_the_loop(shop, tmp_path, monkeypatch):
  store_of(tmp_path, new_events()).close()
  goods = write_table(tmp_path / 'goods.csv', 'item,title', [['i00', 'A']])
  flags = flags_of(shop, tmp_path, '--every_events=1', f'--items={goods}')
  done = run_here(update.main, flags)
  assert done.returncode == 2
  failed, repeat, error = done.stderr.splitlines()
  assert failed.startswith('round 1 failed: ')
  assert repeat.startswith('  to repeat it: python -m data_prep.build_dataset --append --if_new')
  assert error.startswith('error: ')
  assert '000001/output.log: has what the command said; correct that' in error
  # The disk is full, for example: the loop goes on, with the same round.
  monkeypatch.setattr(sys, 'executable', '/bin/false')
  monkeypatch.setattr(time, 'sleep', stop_instead)
  done = run_here(update.main, flags)
  assert (done.returncode, done.stderr.splitlines()[2]) == (0, '  it is tried again in 60 s')
  assert done.stderr.startswith('round 1 failed: exit code 1, an error that')
  # What a killed command printed last does not say that it was killed.
  killed = tmp_path / 'killed'
  killed.write_text('#!/bin/sh\necho "step 10 of 20"\nkill -9 $$\n')
  killed.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(killed))
  done = run_here(update.main, flags)
  assert done.stderr.startswith(
    'round 1 failed: exit code 137, killed: the machine is out of memory or goes down\n'
  )


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (('--every_events=0',), '--every_events=0: must be more than 0'),
    (('--event_kinds=click,bye',), "--event_kinds: 'bye' is none of view, click"),
    (('--workdir=nowhere',), 'no run here'),
    (('--data_dir=nowhere',), 'nowhere'),
    (('--registry=',), '--registry is missing'),
  ],
)
def test_wrong_flags(shop, tmp_path, more, message):
  done = run_here(update.main, flags_of(shop, tmp_path, *more))
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / 'rounds').exists()


def test_flags_of_the_loop_alone(shop, tmp_path):
  flags = [f'--workdir={shop}/run', f'--data_dir={shop}/data', f'--out={tmp_path}/o']
  done = run_here(update.main, [*flags, '--events=x'])
  assert (done.returncode, '--events: is for --watch' in done.stderr) == (2, True)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(shop, environment, tmp_path):
  def run(folder, seconds=None):
    """Makes one round; returns how long it took, or kills it after some seconds."""
    started = time.monotonic()
    process = subprocess.Popen(
      command(*flags_of(shop, folder, '--every_events=5', '--rounds=1')), env=environment, cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
      _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      return None
    assert process.returncode == 0, error
    return time.monotonic() - started

  folders = [tmp_path / name for name in ('expected', 'killed')]
  for folder in folders:
    folder.mkdir()
    store_of(folder, new_events()).close()
  took, rng = run(folders[0]), random.Random(0)
  for share in (0.3, 0.6, rng.uniform(0.2, 0.9)):
    run(folders[1], share * took)
  run(folders[1])
  recommenders = [
    exported.load(registry.path(x / 'models', registry.current(x / 'models'))) for x in folders
  ]
  for x in folders:
    assert registry.current(x / 'models') == '000001'
    assert read_info(x / 'rounds' / '000001' / 'data')['version'] == 2
  lists = [x.top([['i01', 'i02']], 10) for x in recommenders]
  assert lists[0].items == lists[1].items
  np.testing.assert_array_equal(lists[0].scores[0], lists[1].scores[0])

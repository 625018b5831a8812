"""The commands on real runs: one user, all users, export, and what goes wrong."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.fork_server import Program
from tests.helpers.goods import write_table
from ur4rec_jax import exported
from ur4rec_jax.data.dataset import read_interactions, read_items


@pytest.fixture(scope='module')
def call(environment, tmp_path_factory):
  """Runs a command to its end: `call(module, *flags)`."""
  folder = tmp_path_factory.mktemp('elsewhere')

  def call(module, *flags) -> subprocess.CompletedProcess:
    return Program(f'ur4rec_jax.{module}', flags, environment, folder).finish()

  return call


@pytest.fixture(scope='module')
def with_content(run, encoded, tmp_path_factory):
  """The workdir of a short run that reads texts."""
  workdir = tmp_path_factory.mktemp('with_content') / 'run'
  flags = ("--config.branches=('sasrec','retriever')", "--config.modalities=('text',)")
  flags += ('--config.retriever.num_blocks=0', '--config.loss.weights.retriever=1.0')
  done = run(workdir, f'--config.data_dir={encoded}', *flags, '--config.num_epochs=1')
  assert done.returncode == 0, done.stderr
  return workdir


def test_a_user_gets_items_with_shares_and_reasons(call, with_content, encoded):
  done = call('recommend', f'--workdir={with_content}', '--user=u001', '--explain', '--json')
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  interactions = read_interactions(encoded)
  user = interactions.user_ids.index('u001')
  start, end = interactions.offsets[user : user + 2]
  items = {item['original_id']: item for item in read_items(encoded)}
  ids = list(items)
  history = [ids[i - 1] for i in interactions.item_ids[start:end]]
  assert found['history'] == {'items': len(history), 'read': min(len(history), 20)}
  rows = found['recommendations']
  assert [row['rank'] for row in rows] == list(range(1, 11))
  for row in rows:
    assert row['item'] not in history
    assert row['title'] == items[row['item']]['title']
    shares = row['shares']
    assert row['score'] == pytest.approx(shares['sasrec'] + shares['retriever'], abs=1e-4)
    assert {reason['item'] for reason in row['because']} <= set(history)
    assert row['text']['item']
    assert -1 <= row['text']['cosine'] <= 1.0001
  assert any(row['because'] for row in rows)
  shown = call('recommend', f'--workdir={with_content}', '--history=' + ','.join(history), '--k=3')
  lines = shown.stdout.splitlines()
  assert [line.split()[1] for line in lines[1:]] == [row['item'] for row in rows[:3]]
  named = call(
    'recommend', f'--workdir={with_content}', f'--preference={rows[0]["title"]}', '--explain'
  )
  assert named.returncode == 0, named.stderr
  assert '~' in named.stdout


def test_all_users_come_in_one_file(call, finished, data_dir, tmp_path):
  out = tmp_path / 'top.parquet'
  done = call('recommend', f'--workdir={finished}', '--all_users', f'--out={out}', '--k=5')
  assert done.returncode == 0, done.stderr
  table = pq.read_table(out)
  users = read_interactions(data_dir).user_ids
  assert table.column_names == ['user', 'rank', 'item', 'title', 'score', 'sasrec']
  assert list(dict.fromkeys(table['user'].to_pylist())) == users
  one = call('recommend', f'--workdir={finished}', f'--user={users[7]}', '--json', '--k=5')
  expected = [row['item'] for row in json.loads(one.stdout)['recommendations']]
  rows = np.flatnonzero(np.array(table['user'].to_pylist()) == users[7])
  assert table['item'].take(rows).to_pylist() == expected
  missing = call(
    'recommend', f'--workdir={finished}', '--all_users', f'--out={tmp_path}/no/top.parquet'
  )
  assert (missing.returncode, 'Traceback' in missing.stderr) == (4, False)


def test_customers_of_a_table_are_recommended_new_goods(call, with_content, encoded, tmp_path):
  ids = [item['original_id'] for item in read_items(encoded)]
  rows = [
    ['ann', ids[3], '2'],
    ['ann', ids[1], '1'],
    ['bob', 'nothing', '3'],
    ['u001', ids[2], '4'],
  ]
  orders = write_table(tmp_path / 'orders.csv', 'customer,product,date', rows)
  goods = [['fresh', 'The Quiet Comet', 'A shy pianist must follow the whales north.']]
  table = write_table(tmp_path / 'goods.csv', 'id,name,text', goods)
  out = tmp_path / 'top.parquet'
  flags = (f'--workdir={with_content}', f'--add_items={table}')
  done = call('recommend', *flags, f'--histories={orders}', f'--out={out}', '--k=60')
  assert (done.returncode, 'Traceback' in done.stderr) == (0, False), done.stderr
  assert 'added 1 item; already known: 0' in done.stderr
  assert '3 customers: 2 not in the training data, 1 of the training data' in done.stderr
  assert 'no recommendations for 1 user; the first, bob: history: none' in done.stderr
  found = pq.read_table(out).to_pandas()
  assert set(found['user']) == {'ann', 'u001'}
  assert set(found[found.user == 'ann']['item']) == {'fresh', *ids} - {ids[1], ids[3]}
  notes = (tmp_path / 'top.notes.csv').read_text()
  assert 'bob,0,"not in the training data; history: none of its 1 items' in notes
  one = call('recommend', *flags, f'--history={ids[1]},{ids[3]}', '--json', '--k=5')
  expected = [row['item'] for row in json.loads(one.stdout)['recommendations']]
  assert found[found.user == 'ann']['item'].tolist()[:5] == expected
  done = call('export', *flags, f'--out={tmp_path}/model')
  assert (done.returncode, 'added 1 item;' in done.stderr) == (0, True), done.stderr
  recommender = exported.load(tmp_path / 'model')
  assert recommender.top([[ids[1], ids[3]]], 5).items[0] == expected
  assert recommender.titles[-1] == 'The Quiet Comet'


def test_filters_come_by_flag_or_file(call, finished, data_dir, tmp_path):
  ids = [item['original_id'] for item in read_items(data_dir)]
  (tmp_path / 'only.txt').write_text('\n'.join([*ids[:4], 'nothing']))
  flags = (f'--workdir={finished}', f'--history={ids[0]},nothing', '--json')
  done = call('recommend', *flags, f'--only={tmp_path}/only.txt', f'--without={ids[3]}')
  assert 'ignored 1 item not in the catalogue: nothing' in done.stderr
  found = json.loads(done.stdout)
  assert {row['item'] for row in found['recommendations']} == {ids[1], ids[2]}
  assert found['unknown'] == ['nothing']


def test_an_exported_run_gives_the_same(call, with_content, encoded, tmp_path):
  moved = shutil.copytree(encoded, tmp_path / 'moved')
  flags = (f'--workdir={with_content}', f'--data_dir={moved}')
  done = call('export', *flags, f'--out={tmp_path}/model')
  assert done.returncode == 0, done.stderr
  recommender = exported.load(tmp_path / 'model')
  test = json.loads((with_content / 'results.json').read_text())['test']
  assert recommender.about['test'] == test
  history = recommender.item_ids[5:9]
  one = call('recommend', *flags, '--history=' + ','.join(history), '--json')
  rows = json.loads(one.stdout)['recommendations']
  assert recommender.top([history], 10).items[0] == [row['item'] for row in rows]
  again = call('export', *flags, f'--out={tmp_path}/model')
  assert (again.returncode, 'is there already' in again.stderr) == (2, True)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--user=nobody',), "user 'nobody': is not in"),
    (('--history=',), 'history: is empty'),
    (('--history=-1,-2',), 'none of its 2 items is in the catalogue'),
    (('--preference=Dark.',), 'this model reads no texts'),
    (('--user=u001', '--k=0'), 'k=0: must be a whole number from 1 to 60'),
    (('--user=u001', '--k=61'), 'k=61'),
    (('--user=u001', '--history=a'), 'exclude each other'),
    (('--user=u001', '--out=x'), '--out: is for --all_users'),
    (('--all_users',), '--all_users: needs --out=FILE.parquet'),
    (('--all_users', '--out='), 'names no file'),
    (('--histories=a.csv',), '--histories: needs --out=FILE.parquet'),
    (('--histories=a.csv', '--user=u001', '--out=x'), '--histories: takes no --user'),
    (('--histories=a.csv', '--all_users', '--out=x'), 'exclude each other'),
    (('--histories=no.csv', '--out=x'), '--histories=no.csv: no such file'),
    (('--user=u001', '--pictures=x'), '--pictures: is for --add_items'),
    (('--similar_to=a', '--pictures=x'), '--pictures: is for --add_items'),
    (('--user=u001', '--by=content'), '--by: is for --similar_to'),
    (('--similar_to=a', '--histories=a.csv'), '--similar_to: takes --by, --k, --add_items and'),
    (('--similar_to=a', '--without=b'), '--similar_to: takes --by, --k, --add_items and'),
    (('--similar_to=a', '--rules=no.toml'), '--similar_to: takes --by, --k, --add_items and'),
    (('--user=u001', '--add_items=nowhere'), 'knows items by their id only'),
    ((), 'give one of --user'),
    (('--user=u001', '--k=ten'), 'invalid int value'),
  ],
)
def test_bad_input_is_one_message(finished, capsys, flags, message):
  from ur4rec_jax import recommend

  with pytest.raises(SystemExit) as stopped:
    recommend.main([f'--workdir={finished}', *flags])
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def test_damaged_results_of_a_run_are_named(finished, tmp_path, capsys):
  from ur4rec_jax import recommend

  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  (workdir / 'results.json').write_text('{"test": ')
  with pytest.raises(SystemExit) as stopped:
    recommend.main([f'--workdir={workdir}', '--user=u001'])
  assert stopped.value.code == 2
  assert 'results.json: cannot be read' in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(call, tmp_path):
  for module, flags in (('recommend', ('--user=a',)), ('export', (f'--out={tmp_path}/out',))):
    done = call(module, f'--workdir={tmp_path}', *flags)
    assert (done.returncode, 'Traceback' in done.stderr) == (2, False)
    assert 'no run here' in done.stderr


def test_the_package_is_light(environment):
  code = "import sys, ur4rec_jax; print('jax' in sys.modules); print(callable(ur4rec_jax.load))"
  done = subprocess.run(
    [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ['False', 'True']


def test_similar_items_and_rules_of_the_command(call, finished, data_dir, tmp_path):
  ids = [item['original_id'] for item in read_items(data_dir)]
  done = call('recommend', f'--workdir={finished}', f'--similar_to={ids[4]}', '--k=3')
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) == 3
  done = call('recommend', f'--workdir={finished}', f'--similar_to={ids[4]},{ids[5]}', '--json')
  found = [row['item'] for row in json.loads(done.stdout)]
  assert len(found) == 10
  assert not {ids[4], ids[5]} & set(found)
  refused = call('recommend', f'--workdir={finished}', f'--similar_to={ids[4]}', '--user=u001')
  assert refused.returncode == 2
  assert '--similar_to: takes --by, --k, --add_items and --json alone' in refused.stderr

  rows = [[name, 'ab'[i % 2]] for i, name in enumerate(ids)]
  write_table(tmp_path / 'goods.csv', 'sku,kind', rows)
  rules = tmp_path / 'rules.toml'
  rules.write_text(
    f'attributes = "goods.csv"\n[[cap]]\nattribute = "kind"\nmost = 2\n[[pin]]\nitem = "{ids[0]}"\n'
    'position = 2'
  )
  flags = (f'--workdir={finished}', f'--rules={rules}', f'--history={ids[1]}')
  done = call('recommend', *flags, '--k=6')
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[2].split()[:2] == ['2', ids[0]]
  assert lines[3].strip() == 'pinned to position 2'
  assert lines[-1].startswith('only 4 are recommended: ')
  assert 'would exceed a cap (2 of one kind)' in lines[-1]
  out = tmp_path / 'top.parquet'
  done = call('recommend', *flags[:2], '--all_users', f'--out={out}', '--k=3')
  assert done.returncode == 0, done.stderr
  table = pq.read_table(out)
  assert table.column_names[-1] == 'rules'
  assert table.num_rows == 3 * len(read_interactions(data_dir).user_ids)
  rules.write_text('[[caps]]')
  refused = call('recommend', *flags)
  assert refused.returncode == 2
  assert 'caps is no rule; did you mean cap?' in refused.stderr


# Slow to import, and only training and the first start after it need them.
OF_TRAINING = {'orbax', 'optax', 'tensorflow_datasets', 'tensorstore', 'grain', 'pandas', 'torch'}


def test_later_starts_import_nothing_of_training_and_answer_the_same(
  with_content, environment, tmp_path
):
  workdir = tmp_path / 'run'
  shutil.copytree(with_content, workdir, ignore=shutil.ignore_patterns('recommender'))
  history = next(
    iter(read_items(json.loads((workdir / 'config.json').read_text())['config']['data_dir']))
  )
  code = (
    'import sys\nfrom ur4rec_jax.recommend import main\nmain()\n'
    'print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr)'
  )

  def start(*flags):
    command = [sys.executable, '-c', code, f'--workdir={workdir}', '--json', *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), OF_TRAINING & set(done.stderr.split())

  asked = f'--history={history["original_id"]}'
  first, imported = start(asked)
  assert {'orbax', 'optax'} <= imported
  found, imported = start(asked)
  assert not imported
  assert found == first

  kept = workdir / 'recommender' / 'arrays.npz'
  content = bytearray(kept.read_bytes())
  content[len(content) // 2] ^= 1
  kept.write_bytes(content)
  found, imported = start(asked)
  assert 'orbax' in imported
  assert found == first
  assert not start('--preference=Robots in space.')[1]  # It was kept anew.

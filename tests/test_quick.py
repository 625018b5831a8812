"""`quick` and `train` on a real small shop: what they print, make, keep and refuse."""

import contextlib
import csv
import io
import json
import shlex
import signal
import subprocess
import sys
import time
import types

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ur4rec_jax
from data_prep.build_dataset import build_from_table
from tests.helpers.commands import run_here
from tests.helpers.fork_server import fork_command
from tests.helpers.goods import row_of_item, write_table
from ur4rec_jax import exported, quick
from ur4rec_jax.baselines import WITHOUT_TRAINING
from ur4rec_jax.data.dataset import load_dataset
from ur4rec_jax.errors import InputError, ReportedError

MINUTES = 0.02  # Training gets a quarter of it: it is validated once.


@pytest.fixture(scope='module')
def files(small_shop):
  """orders.csv, goods.csv and their folder, which holds the pictures, too."""
  folder = small_shop.parent
  return folder / 'orders.csv', folder / 'goods.csv', folder


@pytest.fixture(scope='module', autouse=True)
def forked(environment):
  """Forks the commands that `quick` starts, which saves the seconds of their imports."""
  with pytest.MonkeyPatch.context() as patch:
    names = types.SimpleNamespace(Popen=fork_command, PIPE=subprocess.PIPE)
    patch.setattr(quick, 'subprocess', names)
    yield


@pytest.fixture(scope='module')
def trained(files, tmp_path_factory, environment):
  """A folder that `train` filled, and the recommender that it returned."""
  folder = tmp_path_factory.mktemp('quick')
  with contextlib.redirect_stdout(io.StringIO()) as told:
    recommender = ur4rec_jax.train(files[0], files[1], minutes=MINUTES, out=folder)
  (folder / 'told.txt').write_text(told.getvalue())
  return folder, recommender


def test_train_gives_a_recommender(trained):
  folder, recommender = trained
  found = recommender.recommend(['g01', 'g02'], k=3)
  assert found['item'].nunique() == 3
  assert 'followers' in found  # Its column of shares: a short training gains much from counts.
  assert [row['item'] for row in recommender.similar('g01', k=2)] != []
  results = json.loads((folder / 'model/baselines.json').read_text())
  assert set(WITHOUT_TRAINING) == set(results)
  found = recommender.evaluate()
  assert found['test']['ndcg@10'] == recommender.about['test']['ndcg@10']
  assert found['protocol']['candidates'] == 'all items'
  recommender.export(folder / 'own')
  assert exported.load(folder / 'own').item_ids == recommender.item_ids
  with pytest.raises(InputError, match=r'no run here .* it is an export, which serve --export'):
    ur4rec_jax.load(folder / 'own')


def test_train_tells_what_it_compared_and_where_the_model_is(trained):
  folder, _ = trained
  told = (folder / 'told.txt').read_text()
  assert all(name in told for name in (*WITHOUT_TRAINING, 'SASRec + texts'))
  assert f'returned: {folder}/model/runs/content, with the best validation' in told
  for outer in (folder, folder / 'model'):
    with pytest.raises(InputError, match=f'no run here .* inside: {folder}/model/runs/content'):
      ur4rec_jax.load(outer)


def test_quick_goes_on_where_train_stopped_and_exports(trained, files):
  folder, _ = trained
  out = folder / 'model'
  flags = [*map(str, files[:2]), f'--minutes={MINUTES}', f'--out={out}', '--no_serve']
  done = run_here(quick.main, flags)
  assert done.returncode == 0, done.stderr
  commands = [line for line in done.stdout.splitlines() if line.startswith('$ python -m')]
  names = [line.split()[3] for line in commands]
  assert names == [
    'data_prep.build_dataset',
    'data_prep.encode',
    'ur4rec_jax.baselines',
    'ur4rec_jax.main',
    'ur4rec_jax.export',
  ]
  is_done = [line.endswith('# done before') for line in commands]
  assert is_done == [False, True, True, True, False]
  assert 'SASRec: no time is left' in done.stdout
  assert 'time = ordered (its values are times)' in done.stdout
  assert 'item-kNN' in done.stdout
  assert 'popularity' in done.stdout
  recommender = exported.load(out / 'export')
  assert len(recommender.known_users.index) == 26
  again = run_here(quick.main, flags)
  assert again.stdout.count('# done before') == 4
  # A command that was printed is what a user can type.
  words = shlex.split(commands[2].removeprefix('$ '), comments=True)[2:]
  typed = subprocess.run([sys.executable, '-m', *words], capture_output=True, text=True)
  assert typed.returncode == 0, typed.stderr


def test_more_minutes_go_on_with_the_learning_rate_of_a_short_training(trained, files, monkeypatch):
  """The run would refuse another one."""
  monkeypatch.setattr(quick, '_MINUTES_OF_SHORT', 0)
  out = trained[0] / 'model'
  flags = [*map(str, files[:2]), f'--minutes={2 * MINUTES}', f'--out={out}', '--no_serve']
  done = run_here(quick.main, flags)
  assert done.returncode == 0, done.stderr
  (command,) = (x for x in done.stdout.splitlines() if x.startswith('$ python -m ur4rec_jax.main'))
  assert '--config.optimizer.learning_rate=0.003' in command
  assert 'done before' not in command


def test_other_inputs_and_folders_of_others_are_refused(trained, files, tmp_path):
  folder, _ = trained
  done = run_here(quick.main, [str(files[0]), f'--out={folder / "model"}'])
  assert done.returncode == 2
  assert 'was made from other files; give another --out' in done.stderr
  (tmp_path / 'mine.txt').write_text('mine')
  done = run_here(quick.main, [str(files[0]), f'--out={tmp_path}'])
  assert done.returncode == 2
  assert 'holds other files' in done.stderr


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['nothing.csv'], 'nothing.csv: no such file or folder'),
    (['{orders}', '{folder}'], 'pictures need an item table'),
    (['{orders}', '{goods}', '{goods}'], 'give the orders, an item table at most'),
    (['{orders}', '--minutes=0'], '--minutes=0: must be above 0'),
    (['{orders}', '--user_column=x'], "no column 'x'"),
  ],
)
def test_wrong_arguments(files, tmp_path, arguments, message):
  names = dict(zip(('orders', 'goods', 'folder'), map(str, files), strict=True))
  words = [argument.format(**names) for argument in arguments]
  done = run_here(quick.main, [*words, f'--out={tmp_path / "out"}', '--no_serve'])
  assert done.returncode == 2
  assert message in done.stderr
  assert 'Traceback' not in done.stderr


def test_what_the_build_asks_for_can_be_answered(tmp_path, capfd):
  rows = [[f'c{i % 9}', f' g{i % 7:02}', f'2024-05-{i % 28 + 1:02}', ''] for i in range(63)]
  header = 'customer_id,sku,ordered_at,rating'
  orders = write_table(tmp_path / 'orders.csv', header, [*rows, rows[0]])
  goods = [[*row_of_item(i)[:3], f'/media/{i}.jpg'] for i in range(20)]
  write_table(tmp_path / 'goods.csv', 'sku,title,description,image', goods)
  words = [str(orders), str(tmp_path / 'goods.csv'), f'--out={tmp_path / "out"}']
  answers = ('rating_column=none', 'clean_ids=blanks', 'image_column=none', 'drop_duplicates')
  for number in range(len(answers) + 1):
    order = quick._order(quick._flags().parse_args(words))
    is_last = number == len(answers)
    with contextlib.nullcontext() if is_last else pytest.raises(SystemExit):
      quick._build(quick.Commands(order), order, order.out / 'data')
    message = capfd.readouterr().err
    words += [f'--{answer}' for answer in answers if f'--{answer}' in message]
  dataset = json.loads((order.out / 'data/dataset.json').read_text())
  assert dataset['counts']['interactions'] == 63


def test_kinds_of_events_can_be_chosen_as_the_build_says(tmp_path, capfd):
  rows = [[f'c{i % 9}', f'g{i % 7}', 1_700_000_000 + i, ('view', 'buy')[i % 2]] for i in range(60)]
  orders = write_table(
    tmp_path / 'orders.csv', 'customer_id,sku,time,event', [*rows, ['c0', '', 1_700_000_000, 'buy']]
  )
  words = [str(orders), f'--out={tmp_path / "out"}']
  build = lambda order: quick._build(quick.Commands(order), order, order.out / 'data')
  with pytest.raises(SystemExit):
    build(quick._order(quick._flags().parse_args(words)))
  assert 'Correct that, with a flag or in the file, and start again' in capfd.readouterr().err
  write_table(orders, 'customer_id,sku,time,event', rows)
  more = ['--event_column=event', '--event_weights=buy=1']
  build(order := quick._order(quick._flags().parse_args([*words, *more])))
  dataset = json.loads((order.out / 'data/dataset.json').read_text())
  assert dataset['counts']['interactions'] == 30


def test_flags_that_come_too_late_are_refused(tmp_path, monkeypatch):
  rows = [[f'c{i % 9}', f'g{i % 7:02}', f'2024-05-{i % 28 + 1:02}', i % 5] for i in range(63)]
  orders = write_table(tmp_path / 'orders.csv', 'customer_id,sku,ordered_at,rating', rows)
  goods = [row_of_item(i)[:3] for i in range(7)]
  goods = write_table(tmp_path / 'goods.csv', 'sku,title,description', goods)

  def run(step, *flags):
    words = [str(orders), str(goods), f'--out={tmp_path / "out"}', *flags]
    order = quick._order(quick._flags().parse_args(words))
    return step(quick.Commands(order), order, order.out / 'data')

  run(quick._build)
  monkeypatch.chdir(tmp_path)
  orders = orders.relative_to(tmp_path)  # The same file.
  run(quick._build)
  with pytest.raises(InputError, match=r'out: was built with other flags .*; give another --out'):
    run(quick._build, '--rating_column=none')
  content = orders.read_text()
  orders.write_text(content + 'c1,g01,2024-06-01,3\n')
  with pytest.raises(InputError, match=r'out: was built already, and not from these tables'):
    run(quick._build)
  orders.write_text(content)
  monkeypatch.setattr(quick.Commands, 'run', lambda self, *words, **options: None)
  with pytest.raises(InputError, match='--image_encoder=color: no item has pictures; leave it out'):
    run(quick._encode, '--text_encoder=hashing', '--image_encoder=color')
  assert run(quick._encode, '--text_encoder=hashing') == run(quick._encode) == ['text']
  with pytest.raises(InputError, match=r'--text_encoder=a/b: --out=.* was made with hashing; give'):
    run(quick._encode, '--text_encoder=a/b')


@pytest.mark.slow  # It builds and trains again, to be stopped there.
def test_a_signal_stops_the_command_that_runs_and_is_told(files, tmp_path, environment):
  command = [sys.executable, '-m', 'ur4rec_jax.quick', str(files[0]), f'--out={tmp_path / "out"}']
  process = subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  for line in process.stdout:
    if 'ur4rec_jax.main' in line:
      break
  deadline = time.monotonic() + 120
  while not (tmp_path / 'out/runs/ids/config.json').exists():
    assert time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 128 + signal.SIGTERM
  assert 'SIGTERM: saved step' in stderr
  assert 'Start again to go on' in stderr
  record = json.loads((tmp_path / 'out/quick.json').read_text())
  assert 'baselines' in record['done']
  assert 'ids' not in record['done']


@pytest.mark.parametrize('kind', ['pandas', 'arrow', 'path'])
def test_tables_of_every_kind_become_the_same_file(files, tmp_path, kind):
  with files[0].open() as file:
    rows = list(csv.DictReader(file))
  table = {'pandas': pd.DataFrame(rows), 'arrow': pa.Table.from_pylist(rows), 'path': str(files[0])}
  path = quick._as_file(table[kind], tmp_path, 'orders')
  assert path == (files[0] if kind == 'path' else tmp_path / 'orders.parquet')
  from ur4rec_jax.data.raw.guesses import guess

  assert guess(path, None, {}).flags == {'time_column': 'ordered'}


def test_columns_that_no_file_holds_are_left_out_of_a_table(tmp_path, capsys):
  frame = pd.DataFrame({'user': ['a', 'b'], 'item': ['x', 'y'], 'size': ['XL', 42.5]})
  frame = pd.concat([frame, pd.DataFrame({'odd': [{}, {}], 'twice': 1}), frame[['size']]], axis=1)
  path = quick._as_file(frame, tmp_path, 'orders')
  assert pq.read_schema(path).names == ['user', 'item', 'twice']
  interval = pa.array([(1, 2, 3)] * 2, pa.month_day_nano_interval())
  table = pa.table({'user': ['a', 'b'], 'item': ['x', 'y'], 'until': interval})
  assert pq.read_schema(quick._as_file(table, tmp_path, 'orders')).names == ['user', 'item']
  told = capsys.readouterr().err
  for name in ('size', 'odd', 'until'):
    assert f"note: orders: the column '{name}' is left out (" in told
  with pytest.raises(
    InputError, match=r'orders: item cannot be used \(orders, row 2: item is a flo'
  ):
    quick._as_file(frame.assign(item=['x', 1.5]), tmp_path, 'orders')


def test_wrong_tables_and_options_of_train(tmp_path):
  with pytest.raises(InputError, match='orders is of type int'):
    ur4rec_jax.train(3, out=tmp_path)
  with pytest.raises(InputError, match='colour is none of user_column'):
    ur4rec_jax.train(tmp_path / 'x.csv', out=tmp_path, colour='red')
  for minutes in (0, float('nan')):
    with pytest.raises(InputError, match=r'minutes=.*: must be above 0'):
      ur4rec_jax.train(tmp_path / 'x.csv', out=tmp_path, minutes=minutes)
  with pytest.raises(InputError, match=r"minutes='5': must be a number"):
    ur4rec_jax.train(tmp_path / 'x.csv', out=tmp_path, minutes='5')
  (tmp_path / 'file').touch()
  with pytest.raises(InputError, match=r'out=.*/file: is a file; give a folder'):
    ur4rec_jax.train(pa.table({'user': ['a'], 'item': ['b']}), out=tmp_path / 'file')


def test_the_error_of_a_command_of_train_is_that_of_train(tmp_path, monkeypatch):
  monkeypatch.setattr(quick, 'subprocess', subprocess)  # A process as users start it.
  rows = {'user': [f'u{i % 9}' for i in range(90)], 'item': [f'i{i % 7}' for i in range(90)]}
  rows['item'][5] = None
  message = 'row 6: item is empty; fill it in, remove the row, or leave such rows out with --clean'
  with pytest.raises(ReportedError, match=rf'{message}.*; see {tmp_path}/model/logs'):
    ur4rec_jax.train(pa.table(rows), out=tmp_path, time_column='none')
  assert message in (tmp_path / 'model/logs/build.log').read_text()


@pytest.mark.parametrize(('items', 'answer'), [(50, 'leave_out'), (2, 'keep')])
def test_shops_whose_customers_buy_again_recommend_seen_items(tmp_path, items, answer):
  rows = {'user': [f'u{i % 9}' for i in range(90)], 'item': [f'i{i % items}' for i in range(90)]}
  build_from_table(pa.table(rows), tmp_path / 'data')
  assert quick.seen_items(load_dataset(tmp_path / 'data')) == answer


@pytest.mark.parametrize(('new', 'told'), [(0, ''), (9, '75% of the test items never occur in')])
def test_test_items_that_never_occur_in_training_are_told(tmp_path, capsys, new, told):
  rows = [[f'u{i % 12}', f'i{i % 5}'] for i in range(60)]
  rows += [[f'u{i}', f'new{i}' if i < new else 'i0'] for i in range(12)]
  build_from_table(pd.DataFrame(rows, columns=['user', 'item']), tmp_path / 'data')
  quick._look_at_test(tmp_path / 'data')
  lines = [line for line in capsys.readouterr().out.splitlines() if 'never occur' in line]
  assert len(lines) == bool(new)
  assert ''.join(lines).startswith(told)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
  (tmp_path / 'out').write_text('mine')
  with pytest.raises(InputError, match='holds other files; give another --out'):
    quick.Commands(quick.Order(tmp_path / 'o.csv', tmp_path / 'out'))


@pytest.mark.parametrize('content', ['{"inputs"', '{}', '[]'])
def test_a_damaged_record_is_named(tmp_path, content):
  (tmp_path / quick.RECORD).write_text(content)
  with pytest.raises(InputError, match=f'{quick.RECORD}: cannot be read'):
    quick.Commands(quick.Order(tmp_path / 'o.csv', tmp_path))


def test_time_is_divided_once_and_the_second_model_gets_what_is_left(tmp_path):
  order = quick.Order(tmp_path / 'o.csv', tmp_path / 'out', minutes=10)
  commands = quick.Commands(order)
  minutes = lambda name, of=order: quick._minutes_of(commands, of, name, True)
  first = minutes('content')
  assert first == pytest.approx(0.6 * (10 - 50 / 60), abs=0.05)
  commands._started -= 300
  assert minutes('content') == first
  assert minutes('ids') == pytest.approx(10 - 5 - 50 / 60 - 20 / 60, abs=0.05)
  commands._started -= 290
  assert minutes('ids') == pytest.approx(10 - 5 - 50 / 60 - 20 / 60, abs=0.05)
  shorter = quick.Order(order.orders, order.out, minutes=9)
  assert minutes('content', shorter) == 0.25 * 9  # A quarter, whatever came before.
  assert minutes('ids', shorter) is None
  longer = quick.Order(order.orders, order.out, minutes=30)
  assert quick._minutes_of(commands, longer, 'ids', False) == pytest.approx(30 - 10.6, abs=0.1)

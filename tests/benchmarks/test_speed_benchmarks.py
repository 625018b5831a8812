"""Our side of the speed benchmarks at its smallest; known answers and files give known figures."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks.speed import (
  cost_curves,
  measure,
  optimizations,
  performance,
  profile_step,
  starts,
  ur4rec_side,
)
from tests.helpers.runs import ROOT
from tests.helpers.stored_results import rows
from ur4rec_jax.data.dataset import load_dataset
from ur4rec_jax.errors import InputError

SHAPES = {'max_length': 20, 'batch_size': 32, 'dim': 16, 'num_blocks': 1, 'learning_rate': 0.01}
SETTINGS = {**measure.SHAPES, **SHAPES, 'loss': 'softmax', 'overrides': []}
FLAGS = [f'--{name}={value}' for name, value in SHAPES.items()]


@pytest.fixture(scope='module')
def data(data_dir, tmp_path_factory):
  """The first 100 users, as both sides read them."""
  path = tmp_path_factory.mktemp('side') / 'data.npz'
  counts = measure.write_data(data_dir, 100, path)
  offsets = load_dataset(data_dir).offsets
  assert (counts['users'], counts['interactions']) == (100, offsets[100])
  return str(path)


def answers(seconds, count, peak, **others):
  """What a side says in some rounds."""
  return [
    {'seconds': x, 'processor_seconds': 2 * x, 'users': count, 'peak_mb': peak, 'device': 'cpu'}
    | others
    for x in seconds
  ]


@pytest.mark.slow
def test_our_side_trains_and_ranks_when_asked(data):
  with measure.Side(measure.OWN, sys.executable, {**SETTINGS, 'data': data}) as side:
    before = side.ask('rank', part='valid')
    epochs = measure.take_turns([side], 6, 'epoch')[measure.OWN]
    after = side.ask('rank', part='valid')
  assert [epoch['sequences'] for epoch in epochs] == [100] * 6
  assert epochs[0]['compile_seconds'] > 0 == epochs[-1]['compile_seconds']
  assert 0 < epochs[0]['peak_mb'] <= epochs[-1]['peak_mb']
  assert len(after['ranks']) == after['users'] == 100
  assert after['metrics']['ndcg@10'] > 1.5 * before['metrics']['ndcg@10']
  found = measure.quality({measure.OWN: [before, after]})[measure.OWN]
  assert found['ndcg@10'] == pytest.approx(after['metrics']['ndcg@10'], abs=1e-4)


def test_a_side_that_fails_says_why(data):
  settings = {**SETTINGS, 'data': data, 'overrides': ['--config.sasrec.dropout=7']}
  side = measure.Side(measure.OWN, sys.executable, settings)
  with side, pytest.raises(SystemExit) as stopped:
    side.ask('epoch')
  assert 'config.sasrec.dropout=7.0: must be in [0, 1)' in str(stopped.value)
  assert 'Traceback' not in str(stopped.value)
  with pytest.raises(InputError, match='no-python cannot be run'):
    measure.Side(measure.RECTOOLS, 'no-python', SETTINGS)


def test_speeds_are_compared_by_medians_and_by_round():
  found = measure.compare(
    {'own': answers([1, 2, 4], 100, 70.0), 'rectools': answers([10, 10, 5], 100, 100.0)}, 'users'
  )
  assert found['ratio'] == 5.0  # 50 over 10 a second.
  assert found['ratios'] == [1.25, 10.0]
  assert found['processor_ratio'] == 5.0
  assert (found['own'], found['rectools'], found['unit']) == (50.0, 10.0, 'users/s')
  assert found['memory_ratio'] == 0.7
  quality = {name: {'ndcg@10': 0.5, 'hit@10': 1.0} for name in ('own', 'rectools')}
  lines = measure.table({**found, 'quality': quality})
  assert lines[1].split() == ['own', '50.0', '70', '0.5000']
  assert lines[-1] == '5.0 x, 1.25 to 10.0 over the rounds; memory 0.7 x'


def run(*arguments) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_point_of_each_curve_is_a_process_of_its_own():
  small = ['--rounds=1', '--config.sasrec.num_blocks=1', '--json']
  done = run('benchmarks.speed.cost_curves', '--axes=devices', '--values=2', *small)
  assert done.returncode == 0, done.stderr
  (line,) = done.stdout.splitlines()
  point = json.loads(line)['curves']['devices']['2']
  assert point['step_ms'] > 0
  assert point['ranked_per_second'] > 0
  assert point['us_a_token'] == pytest.approx(1e3 * point['step_ms'] / point['tokens'], rel=0.01)
  done = run('benchmarks.speed.cost_curves', '--axes=users', '--values=10', '--limit_seconds=0.01')
  assert done.returncode == 0
  assert 'not done in 0 s' in done.stdout
  assert run('benchmarks.speed.cost_curves', '--axes=colour').returncode == 2


def test_generated_histories():
  item_ids, offsets = cost_curves.make_histories(1000, 50, 20)
  assert len(offsets) == 1001
  assert len(item_ids) / 1000 == pytest.approx(20, rel=0.05)
  assert (item_ids.min(), item_ids.max()) == (1, 50)


@pytest.mark.slow
def test_cost_of_variants_and_its_table(encoded, tmp_path):
  flags = ['--config=configs/synthetic.py', f'--data_dir={encoded}', '--variants=sasrec,multimodal']
  done = run('benchmarks.speed.cost', *flags, '--rounds=1', '--json')
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  sasrec, multimodal = found['variants'].values()
  assert sasrec['ratio'] == 1
  assert found['ratio'] == multimodal['ratio'] > 0
  assert all(multimodal[key] > sasrec[key] > 0 for key in ('parameters', 'mflop_a_user'))
  assert min(multimodal['step_ms'], sasrec['step_ms']) > 0  # Which is more, one round cannot tell.
  store(tmp_path, 'cost-ml-1m', **found)
  page = performance.page(performance.load_results(tmp_path))
  shown = rows(page, 'MFLOP a user')['multimodal']
  assert shown['parameters'] == f'{multimodal["parameters"]:,}'
  assert shown["over the first's"] == f'{found["ratio"]:.2f} x'


@pytest.mark.slow
def test_profile(data_dir):
  flags = [f'--data_dir={data_dir}', '--users=100', '--rounds=1']
  done = run('benchmarks.speed.profile_step', *flags, *FLAGS)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert sum(found['parts'].values()) == pytest.approx(1, abs=0.01)
  assert {'attention', 'dense layers', 'loss', 'optimizer'} <= found['parts'].keys()
  assert found['operations'][0][1] == max(share for _, share, _ in found['operations'])
  assert found['gflops'] == pytest.approx(found['step_gflop'] / found['step_ms'] * 1e3, rel=0.1)


def test_the_other_side_needs_nothing_of_ours():
  """It runs where RecTools is, without jax."""
  code = "import sys; sys.modules['jax'] = None; import benchmarks.speed.measure"
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_a_trick_is_undone_in_a_process_of_its_own(data):
  found = {
    name: optimizations.run_one(name, SETTINGS, data, rounds=1)
    for name in (optimizations.ALL, *optimizations.PLAIN)
  }
  packed, alone = found[optimizations.ALL], found['users packed into rows']
  assert packed['steps_an_epoch'] < alone['steps_an_epoch'] == 4
  assert all(x['sequences_per_second'] > 0 < x['peak_mb'] for x in found.values())


def test_operations_are_those_of_products_in_every_round_of_a_loop():
  def rounds(a, b):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ b), None), a, length=5)[0]

  a, b = jnp.ones((3, 7)), jnp.ones((7, 7))
  assert profile_step.matmul_flops(jax.make_jaxpr(rounds)(a, b).jaxpr) == 5 * 2 * 3 * 7 * 7
  assert profile_step.matmul_flops(jax.make_jaxpr(jax.jit(jnp.matmul))(a, b).jaxpr) == 2 * 3 * 49


def test_this_library_computes_in_float32_beside_another_one_on_every_device():
  sizes = {'max_length': 50, 'batch_size': 8, 'dim': 8, 'num_blocks': 1, 'num_heads': 1}
  settings = sizes | {'seed': 0, 'dropout': 0.1, 'loss': 'softmax', 'learning_rate': 1e-3}
  make = lambda *overrides: ur4rec_side.make_config(settings | {'overrides': overrides})
  assert make().dtype == 'float32'
  assert make('--config.dtype=bfloat16').dtype == 'bfloat16'


def test_an_operation_belongs_to_the_part_of_its_path():
  hlo = """
  %one.1 = f32[2]{0} fusion(%x), metadata={op_name="jit(f)/while/body/jvp(A)/blocks_0/ffn_in/add"}
  ROOT %two = f32[2]{0} custom-call(%one.1, %x), backend_config={}
  %three = (s32[], f32[2]) while(%tuple.1), metadata={op_name="jit(f)/while"}
"""
  path = 'jit(f)/while/body/jvp(A)/blocks_0/ffn_in/add'
  assert profile_step.operation_paths(hlo) == {'one.1': path, 'two': path}
  assert profile_step.part_of(path) == 'dense layers'
  assert profile_step.part_of('jit(f)/while/body/jvp()/while/body/dot_general') == 'loss'
  assert profile_step.part_of('jit(f)/while/body/cond/branch_1_fun/mul') == 'optimizer'
  assert profile_step.part_of('') == 'other'


def test_what_is_published_is_generated():
  stored = performance.load_results(performance.RESULTS)
  assert performance.PAGE.read_text() == performance.page(stored)
  shown = performance.README.read_text().split('<!-- speed: begin -->')[1]
  assert shown.split('<!-- speed: end -->')[0].strip() == performance.headline_table(stored)


def store(folder, name, benchmark, **fields) -> None:
  fields = {'benchmark': benchmark, 'cores': 2, 'load': 0.1, **fields}
  (folder / f'{name}.json').write_text(json.dumps(fields))


def side_by_side(ratio) -> dict:
  found = measure.compare(
    {'own': answers([1], 100 * ratio, 80.0), 'rectools': answers([1], 100, 100.0)}, 'users'
  )
  values = {'ndcg@10': 0.1234, 'hit@10': 0.2}
  quality = {'own': values, 'rectools': values}
  return {**found, 'quality': quality, 'epochs': 4, 'compile_seconds': 9.6}


def test_targets_beside_what_was_found(tmp_path):
  store(tmp_path, 'evaluate-ml-1m', 'evaluate_vs_rectools', **side_by_side(6))
  store(tmp_path, 'train-bce-ml-1m', 'train_vs_rectools', **side_by_side(2))
  store(tmp_path, 'train-bce-ml-1m-gpu', 'train_vs_rectools', **side_by_side(3))
  seconds = {'seconds': 600.0, 'curve': [[600.0, 0.15]], 'is_reached': False}
  own = {'seconds': 90.0, 'curve': [[90.0, 0.171]], 'is_reached': True}
  settings = {'dim': 48, 'num_heads': 3, 'overrides': ['--config.crop=random']}
  times = {'own': own, 'rectools': seconds, 'ratio': 0.15, 'is_bound': True, 'settings': settings}
  store(tmp_path, 'time-to-quality-ml-1m', 'time_to_quality', **times)
  page = performance.page(performance.load_results(tmp_path))
  found = rows(page, 'wanted', 'found')
  assert len(found) == len(performance.TARGETS)
  cells = lambda work: [found[work][column] for column in ('wanted', 'found', 'GPU')]
  evaluation = cells('full-ranking evaluation, ML-1M')
  assert evaluation == ['at least 5 x', '6.00 x [6.00, 6.00], met', '']
  bce = cells('training, BCE, ML-1M')
  assert bce == ['at least 2.5 x', '2.00 x [2.00, 2.00], missed', '3.00 x [3.00, 3.00], met']
  assert cells('peak memory, evaluation, ML-1M')[1] == '0.80 x, missed'
  assert cells('time to NDCG@10 0.17, ML-1M')[1] == 'at most 0.15 x, met'
  assert cells('training, full softmax, ML-1M')[1:] == ['not measured yet', '']
  assert rows(page, 'seconds', 'reached')['own']['reached'] == 'yes'
  assert 'Width 48, 3 heads. This project (own) trains with `--config.crop=random`' in page
  assert 'This project (own) spent 10 s on compilation.' in page


def test_compiled_programs_on_the_page(tmp_path):
  result = {
    'topology': 'v6e:2x2', 'config': 'movielens_1m', 'program': 'train', 'sizes': {'users': 9},
    'overrides': ['--config.dtype=bfloat16'], 'tflop': 1.5, 'gb_moved': 36.49, 'gb_main_memory': 9,
    'gb_over_links': {'all-reduce': 0.02, 'all-gather': 0.01}, 'memory': {'peak': 2},
    'step_ms': {'by_bytes': 22.81}, 'mfu': {'by_bytes': 0.067},
  }  # fmt: skip
  (tmp_path / 'before').mkdir()
  (tmp_path / 'before' / 'wide.json').write_text(json.dumps(result))
  (tmp_path / 'wide.json').write_text(json.dumps(result | {'gb_moved': 12}))
  (tmp_path / 'other.json').write_text(json.dumps(result))
  section = performance.compiled_section(tmp_path)
  assert 'compiled, not measured' in section
  found = rows(section, 'GB moved')
  assert found['wide']['GB moved'] == '36.49 → 12.00'
  assert found['wide']['MFU'] == '6.7 % → 6.7 %'
  assert found['other']['GB over links'] == '0.030'
  command = '--out=other --topology=v6e:2x2 --config=movielens_1m --program=train --users=9'
  assert f'{command} --config.dtype=bfloat16\n' in section


def test_curves_and_profile_on_the_page(tmp_path):
  point = {'step_ms': 1234.56, 'us_a_token': 2.0, 'peak_mb': 700.4, 'ranked_per_second': 159.8}
  curves = {'items': {'10000': point, '1000000': {'error': 'not done in 180 s'}}}
  fields = {'base': cost_curves.BASE, 'ratio': None, 'peak_mb': None, 'curves': curves}
  fields['settings'] = {'overrides': ['--config.loss.num_negatives=256']}
  store(tmp_path, 'cost-curves', 'cost_curves', **fields)
  fields = {'step_ms': 500, 'step_gflop': 26.0, 'gflops': 52.0, 'machine': {'gflops': 104.0}}
  fields |= {'roofline_share': 0.5, 'parts': {'loss': 0.6, 'attention': 0.4}}
  store(tmp_path, 'profile-bce-ml-1m', 'profile_step', **fields)
  page = performance.page(performance.load_results(tmp_path))
  assert 'Sampled softmax with `--config.loss.num_negatives=256`' in page
  found = rows(page, 'ms a step')
  assert [*found['10,000'].values()] == ['10,000', '1,234.6', '2.0', '700', '160']
  assert found['1,000,000']['ms a step'] == 'not done in 180 s'
  assert rows(page, 'wanted')['peak memory, 1,000,000 items']['found'] == 'not reached'
  assert '52 GFLOP/s. That is 50% of the 104 GFLOP/s' in page
  assert rows(page, 'part', 'time')['loss']['time'] == '60%'


@pytest.mark.parametrize('name', ['some-name', 'cost-curves'])
def test_files_that_are_not_of_the_page_are_refused(tmp_path, name):
  store(tmp_path, name, 'profile_step')
  with pytest.raises(InputError, match=f'{name}.json'):
    performance.load_results(tmp_path)


def test_starts_on_the_page(tmp_path):
  clock = lambda seconds: {'seconds': seconds, 'processor_seconds': seconds / 2}
  now = starts.summary([clock(9), clock(2), clock(4), clock(3)])
  assert now == {'first_seconds': 9, 'seconds': 3, 'processor_seconds': 1.5}
  commands = {
    'recommend': {'now': now, 'before': starts.summary([clock(20), clock(12)])},
    'import jax': {'now': starts.summary([clock(2), clock(2)])},
  }
  assert starts.table(commands)[1].split() == ['recommend', 'now', '9.0', '3.0', '1.5']
  store(tmp_path, 'starts', 'starts', commands=commands)
  page = performance.page(performance.load_results(tmp_path))
  found = [*rows(page, 'CPU s')['`recommend`'].values()]
  assert found == ['`recommend`', '20 → 9', '12.0 → 3.0', '6.0 → 1.5', '6.0 → 1.5']


def test_a_start_that_fails_says_why():
  with pytest.raises(InputError, match='ended with 2; error: --workdir'):
    starts.start(['-m', 'ur4rec_jax.recommend', '--workdir=none', '--history=i'], ROOT)
  found = starts.start(['-c', 'sum(range(10**7))'], ROOT)
  assert found['processor_seconds'] > 0

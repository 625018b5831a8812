"""One training run gives the same parameters however it is spread over devices."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
import weakref

import jax
import numpy as np
import pytest

from benchmarks.robustness.small_runs import lines, load_arrays
from tests.helpers.marks import slow
from tests.helpers.runs import wait_for
from ur4rec_jax.errors import LostProcessError
from ur4rec_jax.runs.checkpoint import find_damage
from ur4rec_jax.sharding.devices import AXIS, MAPPINGS, compiling_for, compute_dtype

# SGD, because Adam hides a gradient of the wrong scale; no dropout, because its masks depend on
# the device; a small rate, because rounding grows with training.
EXACT = (
  '--config.optimizer.name=sgd',
  '--config.optimizer.learning_rate=0.1',
  '--config.sasrec.dropout=0.0',
  '--config.followers.weight=0.5',
  '--config.num_epochs=2',
)


# A table of rows by id, and texts.
ON_ROWS = (
  '--config.loss.name=sampled_softmax',
  '--config.loss.num_negatives=4',
  "--config.modalities=('text',)",
  '--config.sasrec.item_input=id+content',
  '--config.num_epochs=2',
)
# What a softmax cancels, a bias of all logits and that of keys, has no gradient but rounding, which
# AdamW makes large.
CANCELLED = ("['logits']['bias']", "['query_key_value']['bias']")


# Stops as a preempted run does, or, as process DYING, is killed. Those that are not the first take
# a moment between their last word to it and their end.
STOPPED = """
import os, signal, time
import jax
jax.config.update('jax_platforms', 'cpu')
from ur4rec_jax import errors
from ur4rec_jax.sharding import devices
end = os._exit
os._exit = lambda code: (time.sleep(0.5 * (jax.process_index() > 0)), end(code))
with devices.joined_processes():
  devices.any_process(False)
  if os.environ['DYING'] == os.environ['JAX_PROCESS_ID']:
    os.kill(os.getpid(), signal.SIGKILL)
  if os.environ['DYING']:
    devices.any_process(False)
  raise errors.InterruptedBySignal('saved', signal.SIGTERM)
"""

# Asks, as training does between its steps, while the devices have work.
BUSY = """
import jax
jax.config.update('jax_platforms', 'cpu')
import jax.numpy as jnp
import numpy as np
from ur4rec_jax.runs.stop_requests import stop_requests
from ur4rec_jax.sharding import devices
with devices.joined_processes(), stop_requests(60) as stop_requested:
  multiply = lambda x: jax.lax.fori_loop(0, 400, lambda i, y: jnp.tanh(y @ y), x)
  work = devices.pmap(lambda x: jax.lax.pmean(multiply(x), devices.AXIS), (0,), ())
  x = devices.shard(np.zeros((2, 300, 300), np.float32))
  jax.block_until_ready(work(x))
  assert not stop_requested()
  done = work(x)
  assert not stop_requested()
  assert not done.is_ready()
  ask = devices.late_any_process()
  answers = [ask(jax.process_index() == 1 and call > 0) for call in range(3)]
  assert answers == [False, False, True], answers
"""

# Starts many functions with a collective before it reads an output, as an evaluation does.
IN_FLIGHT = """
import jax
import numpy as np
from ur4rec_jax.sharding import devices
step = lambda x: jax.lax.all_gather((x @ x.T).argmax(-1), devices.AXIS)
x = devices.shard(np.ones((2, 400, 64), np.float32))
for mapping in devices.MAPPINGS.values():
  work = mapping(step, (0,), ())
  jax.block_until_ready([work(x) for _ in range(400)])
"""

# The host has work of its own while the devices are busy, such as reading the next items.
AT_ONCE = """
import jax
import jax.numpy as jnp
import numpy as np
from ur4rec_jax.sharding import devices
product = lambda _, x: x @ x / 500
step = lambda n, x: jax.lax.psum(jax.lax.fori_loop(0, n, product, x).sum(), devices.AXIS)
x = devices.shard(np.ones((2, 500, 500), np.float32))
for mapping in devices.MAPPINGS.values():
  work = mapping(step, (None, 0), ())
  jax.block_until_ready(work(devices.replicate(np.int32(1)), x))
  assert not work(devices.replicate(np.int32(500)), x).is_ready()
"""


def devices(number: int) -> dict[str, str]:
  return {'XLA_FLAGS': f'--xla_force_host_platform_device_count={number}'}


def by_address(number: int) -> dict[str, str]:
  return {'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': str(number)}


def by_slurm(number: int) -> dict[str, str]:
  return {
    'JAX_COORDINATOR_ADDRESS': 'auto',
    'SLURM_JOB_ID': '1',
    'SLURM_STEP_NODELIST': '127.0.0.1',
    'SLURM_STEP_NUM_NODES': '1',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': str(number),
    'SLURM_LOCALID': str(number),
  }


def coordinator() -> dict[str, str]:
  """On a port that nobody listens on."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  return {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_COORDINATOR_PORT': str(port)}


def start_pair(start, workdir, *flags, found=by_address, **options):
  """Starts the two processes of a run."""
  common = coordinator()
  return [start(workdir, *flags, env=common | found(number), **options) for number in range(2)]


def run_on_two_devices(run, start, workdir, flags, mapping):
  """With `pmap` on those of one process, with `shard_map` on those of two."""
  flags = (*flags, f'--config.mapping={mapping}')
  if mapping == 'pmap':
    done = run(workdir, *flags, env=devices(2))
    assert done.returncode == 0, done.stderr
    return
  for process in start_pair(start, workdir, *flags):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def assert_close(workdir, reference, spread=False):
  """Tables that are spread have a few rows more, for each device to have as many."""
  ours, theirs = load_arrays(workdir), load_arrays(reference)
  assert ours.keys() == theirs.keys()
  assert any('item_embedding' in name for name in ours)
  for name, x in theirs.items():
    y = ours[name]
    if spread and 'item_embedding' in name:
      assert y.shape[-2] == 64 > x.shape[-2]
      y = y[..., : x.shape[-2], :]
    # The stage's losses of about ten have no digit at 1e-6; parameters and moments do.
    rtol = 1e-6 if name.endswith(("['average']", "['lowest']")) else 0
    if not any(parameter in name for parameter in CANCELLED):
      np.testing.assert_allclose(y, x, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.fixture(scope='module')
def one_device(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('one_device') / 'run'
  done = run(workdir, *EXACT)
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.mark.parametrize(
  ('mapping', 'item_rows'),
  [
    ('pmap', 'sharded'),
    *slow(('pmap', 'all'), ('shard_map', 'all')),
  ],
)
def test_devices_agree(mapping, item_rows, run, one_device, tmp_path):
  """By a loss that reads all items."""
  workdir = tmp_path / 'run'
  flags = (f'--config.mapping={mapping}', f'--config.optimizer.item_embeddings={item_rows}')
  done = run(workdir, *EXACT, *flags, env=devices(8) | {'JAX_LOG_COMPILES': '1'})
  assert done.returncode == 0, done.stderr
  assert '8 x cpu' in done.stdout
  assert 'Finished XLA compilation of jit(' in done.stderr
  assert 'jit(slice)' not in done.stderr  # Of each array on each device, for Orbax to write parts.
  assert_close(workdir, one_device, spread=item_rows == 'sharded')
  results = [json.loads((w / 'results.json').read_text()) for w in (workdir, one_device)]
  assert results[0] == results[1]


@pytest.fixture(scope='module')
def on_two_devices(run, encoded, tmp_path_factory):
  """A run whose two devices have all rows of the items; and the flags of it."""
  workdir = tmp_path_factory.mktemp('two_devices') / 'run'
  flags = (*ON_ROWS, f'--config.data_dir={encoded}')
  done = run(workdir, *flags, '--config.optimizer.item_embeddings=touched', env=devices(2))
  assert done.returncode == 0, done.stderr
  return workdir, flags


@pytest.mark.slow
@pytest.mark.parametrize('mapping', ['pmap', 'shard_map'])
def test_tables_spread_over_devices_train_the_same(mapping, run, start, on_two_devices, tmp_path):
  reference, flags = on_two_devices
  flags += ('--config.optimizer.item_embeddings=sharded',)
  workdir = tmp_path / 'run'
  run_on_two_devices(run, start, workdir, flags, mapping)
  assert_close(workdir, reference, spread=True)
  results = [json.loads((w / 'results.json').read_text()) for w in (workdir, reference)]
  assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize('mapping', ['pmap', 'shard_map'])
def test_losses_of_all_items_train_the_same_where_these_are_spread(
  mapping, run, start, encoded, tmp_path
):
  """Both branches; other losses in the run need only the items of the step."""
  reference = tmp_path / 'all'
  flags = (*EXACT, f'--config.data_dir={encoded}')
  flags += ("--config.modalities=('text','image')", "--config.branches=('sasrec','retriever')")
  flags += ('--config.sasrec.item_input=id+content', '--config.retriever.dropout=0')
  flags += ('--config.retriever.item_id=True', '--config.content.dropout=0')
  flags += ('--config.retriever.dim=16', '--config.loss.weights.retriever=0.5')
  flags += ('--config.retriever.num_blocks=0', '--config.retriever.cross_modal_blocks=0')
  flags += ('--config.loss.retriever_name=sampled_softmax', '--config.loss.num_negatives=4')
  flags += ('--config.loss.weights.fused=0.5', '--config.loss.weighting=uncertainty')
  done = run(reference, *flags, '--config.loss.chunk_size=50', env=devices(2))
  assert done.returncode == 0, done.stderr
  flags += ('--config.optimizer.item_embeddings=sharded',)
  workdir = tmp_path / mapping
  run_on_two_devices(run, start, workdir, flags, mapping)
  assert_close(workdir, reference, spread=True)
  results = [json.loads((w / 'results.json').read_text()) for w in (workdir, reference)]
  assert results[0]['test'] == results[1]['test']


@pytest.mark.slow
@pytest.mark.parametrize('mapping', ['pmap', 'shard_map'])
def test_devices_that_exchange_the_rows_they_read_train_the_same(mapping, run, start, tmp_path):
  """Tables of ids alone, of which a device has fewer rows than a step reads."""
  reference, workdir = tmp_path / 'touched', tmp_path / 'run'
  flags = (*EXACT, '--config.loss.name=sampled_softmax', '--config.loss.num_negatives=4')
  done = run(reference, *flags, '--config.optimizer.item_embeddings=touched', env=devices(2))
  assert done.returncode == 0, done.stderr
  flags += ('--config.optimizer.item_embeddings=sharded',)
  run_on_two_devices(run, start, workdir, flags, mapping)
  assert_close(workdir, reference, spread=True)
  results = [json.loads((w / 'results.json').read_text()) for w in (workdir, reference)]
  assert results[0] == results[1]


@pytest.mark.slow
def test_spread_tables_go_on_on_another_number_of_devices(run, on_two_devices, tmp_path):
  _, flags = on_two_devices
  flags += ('--config.optimizer.item_embeddings=sharded',)
  workdir = tmp_path / 'run'
  of_one_epoch = (workdir, *flags, '--config.num_epochs=1')
  assert run(*of_one_epoch, env=devices(8)).returncode == 0
  stored = json.loads((workdir / 'results.json').read_text())
  evaluated = run(*of_one_epoch, '--mode=evaluate')
  assert evaluated.returncode == 0, evaluated.stderr
  assert json.loads(evaluated.stdout)['test'] == stored['test']
  done = run(workdir, *flags, env=devices(2))
  assert done.returncode == 0, done.stderr
  assert 'resuming from step' in done.stdout


@pytest.mark.slow
def test_any_number_of_devices_shares_rows_and_tables(run, one_device, tmp_path):
  """Three divide neither the rows of a batch nor 64; a checkpoint of theirs goes on on two."""
  workdir = tmp_path / 'run'
  flags = (*EXACT, '--config.optimizer.item_embeddings=sharded')
  of_one_epoch = (workdir, *flags, '--config.num_epochs=1')
  done = run(*of_one_epoch, env=devices(3))
  assert done.returncode == 0, done.stderr
  rows = {x.shape[-2] for name, x in load_arrays(workdir).items() if 'item_embedding' in name}
  assert rows == {192}
  stored = json.loads((workdir / 'results.json').read_text())
  evaluated = run(*of_one_epoch, '--mode=evaluate')
  assert evaluated.returncode == 0, evaluated.stderr
  assert json.loads(evaluated.stdout)['test'] == stored['test']
  done = run(workdir, *flags, env=devices(2))
  assert done.returncode == 0, done.stderr
  assert 'resuming from step' in done.stdout
  assert_close(workdir, one_device, spread=True)


def test_more_devices_than_rows_are_refused(run, tmp_path):
  done = run(tmp_path / 'run', *EXACT, '--config.batch_size=1', env=devices(9))
  assert done.returncode == 2
  assert 'config.batch_size=1 gives 8 rows, fewer than the 9 devices' in done.stderr
  assert 'make it larger, or train on fewer devices' in done.stderr


def test_the_parameters_moved(one_device, run, tmp_path):
  workdir = tmp_path / 'run'
  assert run(workdir, *EXACT, '--config.optimizer.learning_rate=1e-9').returncode == 0
  with pytest.raises(AssertionError):
    assert_close(workdir, one_device)


@pytest.mark.parametrize(
  ('mapping', 'found'),
  [('shard_map', by_slurm), *slow(('pmap', by_address))],
)
def test_two_processes_agree_with_one(mapping, found, start, one_device, tmp_path):
  workdir = tmp_path / 'run'
  processes = start_pair(start, workdir, *EXACT, f'--config.mapping={mapping}', found=found)
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert 'in 2 processes' in outputs[0][0]
  assert 'ndcg@10' not in outputs[1][0]  # Only the first one reports.
  assert_close(workdir, one_device)
  results = [json.loads((w / 'results.json').read_text()) for w in (workdir, one_device)]
  assert results[0] == results[1]
  ranks = [(w / 'test_ranks.npz').read_bytes() for w in (workdir, one_device)]
  assert ranks[0] == ranks[1]


@pytest.mark.parametrize(
  ('platform', 'capability', 'expected'),
  [
    ('cpu', None, 'float32'),
    ('tpu', None, 'bfloat16'),
    ('cuda', '7.5', 'float32'),
    ('cuda', '8.0', 'bfloat16'),
    ('rocm', 'gfx90a', 'float32'),
  ],
)
def test_the_type_to_compute_in_is_that_which_the_devices_are_fast_at(
  platform, capability, expected
):
  device = types.SimpleNamespace(platform=platform, compute_capability=capability)
  with compiling_for([device]):
    assert compute_dtype('auto') == expected
    assert compute_dtype('float32') == 'float32'


def test_many_functions_at_once_do_not_block_each_other_on_the_devices_of_a_cpu():
  """XLA ends a process whose collective waits for 60 seconds."""
  env = os.environ | devices(2) | {'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', IN_FLIGHT], env=env, timeout=120, check=True)


def test_a_mapped_function_returns_while_the_devices_of_a_cpu_work():
  env = os.environ | devices(2) | {'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', AT_ONCE], env=env, timeout=120, check=True)


def test_a_question_to_all_processes_does_not_wait_for_the_devices(environment):
  common = environment | coordinator()
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', BUSY],
      env=common | by_address(number),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs


@pytest.mark.slow
def test_a_notice_to_one_process_saves_and_ends_both(start, tmp_path):
  workdir = tmp_path / 'run'
  endless = ('--config.num_epochs=1000', '--config.patience=1000')
  processes = start_pair(start, workdir, *endless)
  wait_for(processes[0], lambda: lines(workdir))
  processes[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, outputs
  assert 'SIGTERM: saved step' in outputs[0][1]
  assert [p for p in (workdir / 'checkpoints').iterdir() if find_damage(p) is None]


@pytest.mark.parametrize(
  ('dying', 'exit_codes'),
  [
    ('2', [LostProcessError.exit_code] * 2 + [-signal.SIGKILL]),
    *slow(('', [128 + signal.SIGTERM] * 3)),
  ],
)
def test_no_process_loses_the_coordinator_before_it_ends(dying, exit_codes, environment):
  """Which would abort it, with an exit code that says nothing."""
  common = environment | coordinator() | {'JAX_NUM_PROCESSES': '3', 'DYING': dying}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', STOPPED],
      env=common | {'JAX_PROCESS_ID': str(number)},
      stderr=subprocess.PIPE,
    )
    for number in range(3)
  ]
  errors = [process.communicate(timeout=300)[1] for process in processes]
  assert [process.returncode for process in processes] == exit_codes, errors


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_on_one_and_back(run, one_device, tmp_path):
  workdir = tmp_path / 'run'
  assert run(workdir, *EXACT, '--config.num_epochs=1', env=devices(8)).returncode == 0
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  on_one = run(workdir, *EXACT)
  assert on_one.returncode == 0, on_one.stderr
  assert 'resuming from step' in on_one.stdout
  assert_close(workdir, one_device)
  assert run(copy, *EXACT, '--config.num_epochs=1').returncode == 0  # Restores on one, is done.
  on_eight = run(copy, *EXACT, env=devices(8))
  assert on_eight.returncode == 0, on_eight.stderr
  assert_close(copy, one_device)


@pytest.mark.parametrize('mapping', MAPPINGS)
def test_a_mapped_step_is_freed_with_what_it_holds(mapping):
  class Data:
    rows = 2.0

  data = Data()
  alive = weakref.ref(data)

  def step(x, *, data=data):
    return jax.lax.pmean(x * data.rows, AXIS)

  mapped = MAPPINGS[mapping](step, (0,), ())
  assert mapped(np.ones((jax.local_device_count(), 3))).tolist() == [2, 2, 2]
  del step, data
  gc.collect()
  assert alive() is not None
  del mapped
  gc.collect()
  assert alive() is None

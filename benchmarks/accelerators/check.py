"""Checks the program on the accelerator at hand, within minutes and without a network.

  python -m benchmarks.accelerators.check [--data_dir=data/movielens_1m] [--out=FILE.json]

In this order: the fused attention and softmax beside the plain ones, values and gradients; time of
a step, share of the peak and memory for SASRec and the multimodal model in bfloat16 and float32,
the first beside the same model in PyTorch if that is installed with CUDA; ranking; a run that is
stopped and goes on, beside one that is not; and with --data_dir, the time to a quality on that
data. A part that fails is named, and the others go on; then the exit code is 1.
"""

import argparse
import functools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerators import chips, counts, hlo, programs, torch_sasrec
from benchmarks.speed import ur4rec_side
from configs import movielens_1m
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.files import write_file
from ur4rec_jax.models.attention import masked_attention, self_attention, visible_history
from ur4rec_jax.sharding import devices
from ur4rec_jax.training import catalogue_softmax

_ROOT = pathlib.Path(__file__).parents[2]
_STEPS, _ROUNDS = 8, 5
_GENERATE = ('data_prep.build_dataset', '--source=synthetic', '--num_items=300', '--num_users=500')


def kernels() -> dict[str, float]:
  """Returns the largest difference from the plain way, as a share of the largest value."""
  keys = jax.random.split(jax.random.key(0), 4)
  batch, length, dim, heads, items = 16, 200, 256, 2, 3416
  parts = jax.random.normal(keys[0], (batch * length, 3 * dim), jnp.bfloat16)
  visible = visible_history((jnp.arange(batch * length) // 67).reshape(batch, length))

  def plain_attention(parts):
    query, key, value = jnp.moveaxis(parts.reshape(batch, length, 3, heads, -1), 2, 0)
    return masked_attention(query, key, value, visible.mask(length)).reshape(-1, dim)

  hidden, vectors = (
    jax.random.normal(key, (n, dim), jnp.bfloat16) / 16
    for key, n in zip(keys[1:3], (batch * length, items), strict=True)
  )
  targets = jax.random.randint(keys[3], (batch * length,), 0, items)
  losses = [
    lambda hidden, vectors, f=f, more=more: f(
      hidden, vectors, targets, jnp.ones(len(targets)), *more
    )
    for f, more in ((catalogue_softmax.softmax, (800,)), (catalogue_softmax.plain_softmax, ()))
  ]
  attention = [lambda x: self_attention(x, visible, heads), plain_attention]
  return {
    'attention': _difference(*(jax.jit(f)(parts) for f in attention)),
    'attention, gradient': _difference(
      *(jax.jit(jax.grad(lambda x, f=f: (f(x) ** 2).sum()))(parts) for f in attention)
    ),
    **{
      f'softmax, gradient {i}': _difference(
        *(jax.jit(jax.grad(f, argnums=i))(hidden, vectors) for f in losses)
      )
      for i in (0, 1)
    },
  }


def _difference(ours: jax.Array, plain: jax.Array) -> float:
  ours, plain = (np.asarray(x, np.float32) for x in (ours, plain))
  share = float(np.abs(ours - plain).max() / np.abs(plain).max())
  if not share < 0.05:  # bfloat16 has eight bits.
    raise AssertionError(f'differs from the plain way by {share:.2%}')
  return round(share, 5)


def training(variant: str, dtype: str, sizes: programs.Sizes, batch_size: int) -> dict[str, Any]:
  """Times the training step and the ranking of a variant of the ML-1M config."""
  config = movielens_1m.get_config(variant)
  config.dtype, config.batch_size = dtype, batch_size
  run = programs.generate_run(config, sizes)
  with tempfile.TemporaryDirectory() as workdir:
    loop = ur4rec_side.loop_of(run, workdir)
    ur4rec_side.train(loop, _STEPS)
    seconds = []
    for _ in range(_ROUNDS):
      began = time.perf_counter()
      ur4rec_side.train(loop, _STEPS)
      seconds.append((time.perf_counter() - began) / _STEPS)
    step = statistics.median(seconds)
    found = counts.count(hlo.parse(programs.train(run).compile().as_text()))
    result = {
      'ms_a_step': round(1e3 * step, 3),
      'users_per_second': round(loop.batches.users / loop.batches.steps_per_epoch / step),
      'tflop_a_step': round(found.flops / 1e12, 4),
      **_share_of_peak(found.flops / step, dtype),
      **_memory(),
    }
    rank = ur4rec_side.make_evaluator(loop, run.dataset, 'test')
    rank()
    began = time.perf_counter()
    result['ranked_users_per_second'] = round(len(rank()) / (time.perf_counter() - began))
  return result


def _share_of_peak(flops: float, dtype: str) -> dict[str, float]:
  chip = chips.of_device(jax.devices()[0].device_kind)
  return {'mfu': round(flops / chip.flops[dtype], 4)} if chip else {}


def _memory() -> dict[str, float]:
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use')
  return {'peak_gb': round(peak / 1e9, 3)} if peak else {}


def resume() -> dict[str, Any]:
  """Stops a run, lets it go on, and compares its test metrics with those of a run in one go."""
  with tempfile.TemporaryDirectory() as folder:
    data = f'--data_dir={folder}/data'
    _python(*_GENERATE, data)
    train = lambda name: (
      'ur4rec_jax.main',
      '--config=configs/synthetic.py',
      f'--workdir={folder}/{name}',
      f'--config.data_dir={folder}/data',
      '--config.num_epochs=6',
    )
    _python(*train('whole'))
    stopped = subprocess.Popen([sys.executable, '-m', *train('stopped')], cwd=_ROOT, **_QUIET)
    checkpoints = pathlib.Path(folder, 'stopped', 'checkpoints')
    while stopped.poll() is None and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
      time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    code = stopped.wait()
    _python(*train('stopped'))
    whole, went_on = (
      json.loads(pathlib.Path(folder, name, 'results.json').read_text())['test']
      for name in ('whole', 'stopped')
    )
  if whole != went_on:
    raise AssertionError(f'{went_on} after going on, {whole} in one go')
  return {'exit_code_when_stopped': code, 'is_equal': True}


def quality(data_dir: str, target: float) -> dict[str, Any]:
  """Trains SASRec on prepared data; returns when validation first had the target's NDCG@10."""
  with tempfile.TemporaryDirectory() as workdir:
    began = time.time()
    _python(
      'ur4rec_jax.main',
      '--config=configs/movielens_1m.py',
      f'--workdir={workdir}',
      f'--config.data_dir={os.path.abspath(data_dir)}',
      '--config.dtype=bfloat16',
    )
    lines = pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()
    curve = [x for x in map(json.loads, lines) if 'valid/ndcg@10' in x]
    results = json.loads(pathlib.Path(workdir, 'results.json').read_text())
    reached = [x['seconds'] for x in curve if x['valid/ndcg@10'] >= target and 'seconds' in x]
    return {
      'target': target,
      'seconds_to_target': reached[0] if reached else None,
      'seconds': round(time.time() - began, 1),
      'test': results['test'],
    }


# Processes beside this one share the device's memory, so none may take all of it.
_QUIET = {
  'stdout': subprocess.DEVNULL,
  'stderr': subprocess.DEVNULL,
  'env': os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
}


def _python(*command: str) -> None:
  done = subprocess.run(
    [sys.executable, '-m', *command],
    cwd=_ROOT,
    check=False,
    **_QUIET | {'stderr': subprocess.PIPE, 'text': True},
  )
  if done.returncode:
    raise RuntimeError(f'{command[0]} ended with {done.returncode}: {done.stderr[-500:]}')


@exit_on_reported_error
def main() -> None:
  """Runs the parts one after the other and writes what they found."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.accelerators.check',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--data_dir', help='prepared ML-1M, to measure the time to a quality')
  add('--target', type=float, default=0.182, help='validation NDCG@10 to be reached')
  for name, default in vars(programs.Sizes()).items():
    add(f'--{name}', type=int, default=default, help=f'of the generated data; {default}')
  add('--batch_size', type=int, default=1024, help='users a step')
  add('--out', type=pathlib.Path, help='file for the result')
  flags = parser.parse_args()
  sizes = programs.Sizes(flags.users, flags.items, flags.length)
  parts: dict[str, Callable[[], dict[str, Any]]] = {'kernels': kernels}
  for variant in ('sasrec', 'multimodal'):
    for dtype in ('bfloat16', 'float32'):
      parts[f'{variant}, {dtype}'] = functools.partial(
        training, variant, dtype, sizes, flags.batch_size
      )
  parts['sasrec in PyTorch'] = lambda: torch_sasrec.measure(
    movielens_1m.get_config(), sizes, flags.batch_size
  )
  parts['resume'] = resume
  if flags.data_dir:
    parts['quality'] = lambda: quality(flags.data_dir, flags.target)
  result = {
    'benchmark': 'accelerator_check',
    'device': devices.describe_devices(),
    'jax': jax.__version__,
  }
  failed = False
  for name, part in parts.items():
    began = time.perf_counter()
    try:
      result[name] = part()
    except Exception as error:  # The other parts tell more than the first error alone.
      failed = True
      result[name] = {'error': f'{type(error).__name__}: {error}'[:1000]}
    result[name]['part_seconds'] = round(time.perf_counter() - began, 1)
    print(f'{name}: {json.dumps(result[name])}', flush=True)
    if flags.out:
      flags.out.parent.mkdir(parents=True, exist_ok=True)
      write_file(flags.out, json.dumps(result, indent=2).encode() + b'\n')
  sys.exit(failed)


if __name__ == '__main__':
  main()

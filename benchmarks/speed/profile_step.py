"""Where the time of a training step goes, and how near it comes to what the machine can do.

  python -m benchmarks.speed.profile_step --data_dir=data/ml-1m-sequences --loss=softmax

Operations are those of all matrix products of a step; the machine's best is one large product of
the same type, measured in the same run. Time by part is from a trace of the profiler, each
operation counted for the part of the model that its path says; what runs on several cores at once
counts on each. The compiler's own estimates of operations and bytes take every loop as one round.
The last line is JSON; `--json` prints only that.
"""

import pathlib
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import measure, ur4rec_side
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.runs.train_loop import TrainLoop
from ur4rec_jax.sharding import devices

# The first that an operation's path fits is its part.
PARTS = {
  'dropout': r'dropout|Dropout|threefry',
  'attention': r'/attention/',
  'dense layers': r'query_key_value|attention_out|ffn_in|ffn_out',
  'layer norms': r'_norm/',
  'optimizer': r'while/body/cond/|while/body/(add|square|reduce_sum|mul)$',
  'loss': r'jvp\(\)',
  'embeddings': r'_side',
  'other': r'',
}
CONTAINERS = re.compile(r' (?:while|conditional|call)\(')
NAMED = re.compile(r'^\s*(?:ROOT )?%(\S+) = ')
PATH = re.compile(r'op_name="([^"]*)"')
OPERAND = re.compile(r'%([\w.-]+)[,)]')


def part_of(path: str) -> str:
  """The part of the model that an operation belongs to by its path in the compiled program."""
  return next(part for part, pattern in PARTS.items() if re.search(pattern, path))


def operation_paths(hlo: str) -> dict[str, str]:
  """Path of each operation of a compiled program by its name; loops and calls are left out.

  An operation without a path, as the compiler leaves some products, takes that of an operand.
  """
  found = {}
  for line in hlo.splitlines():
    if (named := NAMED.match(line)) and not CONTAINERS.search(line):
      own = PATH.findall(line) or [found[x] for x in OPERAND.findall(line) if found.get(x)]
      found[named[1]] = own[0] if own else ''
  return found


def matmul_flops(jaxpr: Any) -> int:
  """Operations of the matrix products in a jaxpr, those in a `scan` once a round."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left, out = equation.invars[0].aval, equation.outvars[0].aval
      total += 2 * out.size * int(np.prod([left.shape[i] for i in contracted]))
    rounds = equation.params['length'] if equation.primitive.name == 'scan' else 1
    for value in jax.tree.leaves([*equation.params.values()], is_leaf=_is_jaxpr):
      if _is_jaxpr(value):
        total += rounds * matmul_flops(getattr(value, 'jaxpr', value))
  return total


def _is_jaxpr(value: Any) -> bool:
  return hasattr(value, 'eqns') or hasattr(value, 'jaxpr')


def seconds_of(function: Callable, *arguments: jax.Array, rounds: int = 5) -> float:
  """Median time of a compiled function, the first call not counted."""
  function = jax.jit(function)
  seconds = []
  for _ in range(rounds + 1):
    clock = measure.Clock()
    jax.block_until_ready(function(*arguments))
    seconds.append(clock.read()['seconds'])
  return statistics.median(seconds[1:])


def machine_limits(dtype: Any) -> dict[str, float]:
  """GFLOP/s of a large matrix product, and GB/s of reading and writing a large array."""
  size = 2048 if jax.default_backend() == 'cpu' else 16384
  square = jnp.ones((size, size), dtype)
  vector = jnp.ones(size**2 * 16, jnp.float32)
  return {
    'gflops': round(2e-9 * size**3 / seconds_of(jnp.matmul, square, square), 1),
    'gbytes': round(2e-9 * vector.nbytes / seconds_of(lambda x: x + 1, vector), 1),
  }


def trace(loop: TrainLoop, steps: int, folder: str) -> Counter:
  """Nanoseconds by operation over some steps."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(folder, profiler_options=options):
    ur4rec_side.train(loop, steps)
  (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
  nanoseconds = Counter()
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        if name := dict(event.stats).get('hlo_op'):
          nanoseconds[name] += event.duration_ns
  return nanoseconds


@exit_on_reported_error
def main() -> None:
  """Profiles the step and prints the table."""
  parser = measure.make_parser(__doc__, against_rectools=False)
  parser.add_argument('--rounds', type=int, default=5, help='dispatches that are timed')
  flags, overrides = measure.parse(parser)
  dataset, item_ids, offsets = measure.load_histories(flags.data_dir, flags.users)
  settings = measure.settings_of(flags, overrides)
  config = ur4rec_side.make_config(settings)
  dataset = ur4rec_side.make_dataset(item_ids, offsets, dataset.num_items)
  steps = config.steps_per_dispatch
  with tempfile.TemporaryDirectory() as folder:
    loop = ur4rec_side.make_loop(config, dataset, folder)
    ur4rec_side.train(loop, steps)
    seconds = []
    for _ in range(flags.rounds):
      clock = measure.Clock()
      ur4rec_side.train(loop, steps)
      seconds.append(clock.read()['seconds'] / steps)
    nanoseconds = trace(loop, steps, f'{folder}/trace')
    step, arguments = ur4rec_side.step_program(loop)
    compiled = jax.jit(step).lower(*arguments).compile()
    flops = matmul_flops(jax.make_jaxpr(step)(*arguments).jaxpr) * devices.device_count()
  estimates = compiled.cost_analysis()
  paths = operation_paths(compiled.as_text())
  nanoseconds = Counter({name: spent for name, spent in nanoseconds.items() if name in paths})
  parts = Counter()
  for name, spent in nanoseconds.items():
    parts[part_of(paths[name])] += spent
  limits = machine_limits(devices.compute_dtype(config.dtype))
  second, total = statistics.median(seconds), sum(nanoseconds.values())
  result = {
    'benchmark': 'profile_step',
    'dataset': {'users': len(offsets) - 1, 'items': dataset.num_items},
    'settings': settings,
    'step_ms': round(1e3 * second, 2),
    'sequences_per_second': round(loop.batches.users / loop.batches.steps_per_epoch / second, 1),
    'step_gflop': round(flops / 1e9, 3),
    'gflops': round(flops / second / 1e9, 1),
    'machine': limits,
    'roofline_share': round(flops / second / 1e9 / limits['gflops'], 3),
    'compiler': {
      'gflop': round(estimates['flops'] / 1e9, 3),
      'gbytes': round(estimates['bytes accessed'] / 1e9, 3),
      'temporary_mb': round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
    },
    'parts': {part: round(spent / total, 3) for part, spent in parts.most_common()},
    'operations': [
      [name, round(spent / total, 3), paths[name].removeprefix('jit(_fun)/while/body/')]
      for name, spent in nanoseconds.most_common(20)
    ],
    'peak_mb': measure.memory_megabytes('VmHWM'),
    'device': devices.describe_devices(),
    **measure.machine(),
  }
  lines = [f'{share:>7.1%}  {part}' for part, share in result['parts'].items()]
  lines += ['', *(f'{share:>7.1%}  {name}  {path}' for name, share, path in result['operations'])]
  lines.append(
    '\n{step_ms} ms a step, {step_gflop} GFLOP, {gflops} GFLOP/s, {roofline_share:.0%} of the '
    'machine'.format(**result)
  )
  measure.report(flags, lines, result)


if __name__ == '__main__':
  main()

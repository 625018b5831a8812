"""Compiles the project's programs for accelerators that are not here and counts what they do.

  python -m benchmarks.accelerators --topology=v5e:2x2
  python -m benchmarks.accelerators --topology=v6e:2x2 --config=movielens_1m --program=train \
    --config.batch_size=2048 --config.sasrec.dim=256 \
    --config.sasrec.num_blocks=4 --config.sasrec.ffn_dim=1024 --out=width-256-v6e

Every figure is compiled, not measured. The sizes of the data are those of SASRec's ML-1M file
unless --users, --items and --length change them. docs/accelerators.md explains the figures.
"""

import argparse
import json
import os
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'  # Before jax is imported: the accelerators are only described.

from benchmarks.accelerators import compiler, programs, terminal
from benchmarks.accelerators.chips import parse_topology
from benchmarks.speed.measure import parse
from benchmarks.speed.ur4rec_side import override
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.files import write_file
from ur4rec_jax.runs.config_files import load_config
from ur4rec_jax.sharding import devices


@exit_on_reported_error
def main() -> None:
  """Reads the flags, compiles, and prints the result."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.accelerators',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--topology', required=True, help='chips, e.g. v5e:2x2, v5p:2x2x1, v6e:16x16 or h100')
  add('--config', default='movielens_1m', help='config file or name; `:VARIANT` may follow')
  add('--program', default='train', choices=programs.PROGRAMS, help='what to compile')
  for name, default in vars(programs.Sizes()).items():
    add(f'--{name}', type=int, default=default, help=f'of the data; {default}')
  add('--hlo', help='file to write the compiled program to')
  add('--out', metavar='NAME', help=f'store the result as {terminal.RESULTS_NAME}/NAME.json')
  add('--json', action='store_true', help='print nothing but the line of JSON')
  flags, overrides = parse(parser)
  result = measure(flags, overrides)
  if not flags.json:
    print(terminal.one_program(result))
  print(json.dumps(result))
  if flags.out:
    path = terminal.RESULTS / f'{flags.out}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(result, indent=2).encode() + b'\n')


def measure(flags: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
  """Compiles what the flags say; returns what was compiled and what it does."""
  topology = parse_topology(flags.topology)
  config = load_config(flags.config)
  config.mapping = 'shard_map'
  override(config, overrides)
  sizes = programs.Sizes(flags.users, flags.items, flags.length)
  with compiler.compiling_for(topology):
    config.dtype = devices.compute_dtype(config.dtype).name
    run = programs.generate_run(config, sizes)
    lowered = programs.PROGRAMS[flags.program](run)
    found = compiler.report(lowered, topology, config.dtype, flags.hlo)
  return {
    'benchmark': 'accelerators',
    'topology': topology.name,
    'program': flags.program,
    'config': flags.config,
    'overrides': overrides,
    'sizes': vars(sizes),
    **found,
  }


if __name__ == '__main__':
  main()

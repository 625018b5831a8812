"""Trains a config with several seeds, keeps the results files, writes the README's table.

  python -m benchmarks.accuracy --name=ml-100k --config=configs/movielens_100k.py \
    --data_dir=data/movielens_100k --workdir=runs/ml-100k --seeds=0,1,2
  python -m benchmarks.accuracy            # only writes the table again

A seed that has finished is not run again. What is kept, in benchmarks/results/NAME.json, are the
runs' own results.json files.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
BEGIN, END = '<!-- results: begin -->', '<!-- results: end -->'


def run_seeds(name: str, config: str, data_dir: str, workdir: str, seeds: list[str]) -> None:
  """Trains once a seed and stores all results.json files under `name`."""
  runs = []
  for seed in seeds:
    run = pathlib.Path(workdir) / f'seed{seed}'
    command = [sys.executable, '-m', 'ur4rec_jax.main', f'--config={config}', f'--workdir={run}']
    command += [f'--config.data_dir={data_dir}', f'--config.seed={seed}']
    if not (run / 'results.json').exists():
      subprocess.run(command, check=True, cwd=ROOT)
    results = json.loads((run / 'results.json').read_text())
    runs.append({**results, 'timing': json.loads((run / 'timing.json').read_text())})
  shown = f'python -m ur4rec_jax.main --config={shlex.quote(config)}'
  RESULTS.mkdir(exist_ok=True)
  text = json.dumps({'command': shown, 'runs': runs}, indent=1)
  (RESULTS / f'{name}.json').write_text(text + '\n')


def table() -> str:
  """Returns a Markdown table of every file in `benchmarks/results`."""
  lines = [
    '| data | users x items | command | seeds | NDCG@10 | Hit@10 | MRR | popularity NDCG@10 '
    '| best epoch | time a seed |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  for path in sorted(RESULTS.glob('*.json')):
    stored = json.loads(path.read_text())
    runs = stored['runs']

    def mean(metric, runs=runs):
      values = [run['test'][metric] for run in runs]
      spread = f' ± {statistics.stdev(values):.4f}' if len(values) > 1 else ''
      return f'{statistics.mean(values):.4f}{spread}'

    first = runs[0]
    epochs = ', '.join(str(run['stages'][-1]['best_epoch']) for run in runs)
    minutes = statistics.mean(run['timing']['seconds'] for run in runs) / 60
    cells = [
      path.stem,
      f'{first["dataset"]["users"]:,} x {first["dataset"]["items"]:,}',
      f'`{stored["command"]}`',
      ', '.join(str(run['seed']) for run in runs),
      mean('ndcg@10'),
      mean('hit@10'),
      mean('mrr'),
      f'{first["baselines"]["popularity"]["ndcg@10"]:.4f}',
      epochs,
      f'{minutes:.0f} min, {first["timing"]["device"]}',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def write_table() -> None:
  """Puts the table between its marks in the README."""
  readme = ROOT / 'README.md'
  before, rest = readme.read_text().split(BEGIN)
  _, after = rest.split(END)
  readme.write_text(f'{before}{BEGIN}\n{table()}\n{END}{after}')


def main() -> None:
  """Runs what the flags name and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--name', help='row of the table; without it nothing is trained')
  parser.add_argument('--config', help='config file')
  parser.add_argument('--data_dir', help='prepared data')
  parser.add_argument('--workdir', help='holds one run a seed')
  parser.add_argument('--seeds', type=lambda text: text.split(','), default=['0', '1', '2'])
  flags = parser.parse_args()
  if flags.name:
    if not (flags.config and flags.data_dir and flags.workdir):
      parser.error('--name needs --config, --data_dir and --workdir')
    run_seeds(flags.name, flags.config, flags.data_dir, flags.workdir, flags.seeds)
  write_table()


if __name__ == '__main__':
  main()

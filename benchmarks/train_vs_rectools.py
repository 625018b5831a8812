"""Training speed beside RecTools: sequences a second, peak memory, and that both learn the same.

  python -m benchmarks.train_vs_rectools --data_dir=data/ml-1m-sequences --loss=softmax \
    --rectools_python=rectools/bin/python

Both train the same model on the same users with the same batch size, epoch after epoch in turns,
each in a process of its own with all cores. A sequence is a user's, once an epoch. The first epoch,
in which ours compiles, is not counted. At the end both rank the validation items, all items but the
user's own, after as many epochs. The last line is JSON; `--json` prints only that.
"""

import pathlib
import tempfile

from benchmarks import measure
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.metrics import ranking_metrics


@exit_on_reported_error
def main() -> None:
  """Times both sides and prints the table."""
  parser = measure.make_parser(__doc__)
  parser.add_argument('--rounds', type=int, default=3, help='epochs that count')
  flags, overrides = parser.parse_known_args()
  with tempfile.TemporaryDirectory() as folder:
    data = pathlib.Path(folder) / 'data.npz'
    counts = measure.write_data(flags.data_dir, flags.users, data)
    own, rectools = measure.start_sides(flags, overrides, data)
    with own, rectools:
      warm_up = measure.take_turns((own, rectools), 1, 'epoch')
      epochs = measure.take_turns((own, rectools), flags.rounds, 'epoch')
      ranks = measure.take_turns((own, rectools), 1, 'rank', part='valid')
  speeds = {name: [x['sequences'] / x['seconds'] for x in found] for name, found in epochs.items()}
  peaks = {name: found[-1]['peak_mb'] for name, found in epochs.items()}
  quality = {name: ranking_metrics(found[0]['ranks']) for name, found in ranks.items()}
  result = {
    **measure.compare(speeds['own'], speeds['rectools']),
    'benchmark': 'train_vs_rectools',
    'dataset': counts,
    'settings': measure.settings_of(flags, overrides),
    'rounds': flags.rounds,
    'speeds': {name: [round(x, 1) for x in found] for name, found in speeds.items()},
    'peak_mb': peaks,
    'memory_ratio': round(peaks['own'] / peaks['rectools'], 3),
    'compile_seconds': warm_up['own'][0]['compile_seconds'],
    'epochs_trained': flags.rounds + 1,
    'valid': {
      name: {metric: round(values[metric], 4) for metric in ('ndcg@10', 'hit@10')}
      for name, values in quality.items()
    },
    'device': epochs['own'][0]['device'],
    **measure.machine(),
  }
  lines = [f'{"":<10}{"sequences/s":>12}{"peak MB":>9}{"valid NDCG@10":>15}']
  lines += [
    f'{name:<10}{result[name]:>12.1f}{peaks[name]:>9.0f}{quality[name]["ndcg@10"]:>15.4f}'
    for name in speeds
  ]
  lines.append('{ratio} x, {ratios[0]} to {ratios[1]} over the rounds'.format(**result))
  measure.report(flags, lines, result)


if __name__ == '__main__':
  main()

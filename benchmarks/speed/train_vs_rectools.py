"""Training speed beside RecTools: sequences a second, peak memory, and that both learn the same.

  python -m benchmarks.speed.train_vs_rectools --data_dir=data/ml-1m-sequences --loss=softmax \
    --rectools_python=rectools/bin/python

Both train the same model on the same users with the same batch size, epoch after epoch in turns,
each in a process of its own with all cores. A sequence is a user's, once an epoch. The first epoch,
in which ours compiles, is not counted. At the end both rank the validation items, all items but the
user's own, after as many epochs. The last line is JSON; `--json` prints only that.
"""

from benchmarks.speed import measure
from ur4rec_jax.errors import exit_on_reported_error


@exit_on_reported_error
def main() -> None:
  """Times both sides and prints the table."""
  parser = measure.make_parser(__doc__)
  parser.add_argument('--rounds', type=int, default=3, help='epochs that count')
  flags, overrides = measure.parse(parser)
  with measure.both_sides(flags, overrides) as (sides, counts):
    first = measure.take_turns(sides, 1, 'epoch')
    epochs = measure.take_turns(sides, flags.rounds, 'epoch')
    ranks = measure.take_turns(sides, 1, 'rank', part='valid')
  result = {
    **measure.compare(epochs, 'sequences'),
    'benchmark': 'train_vs_rectools',
    'dataset': counts,
    'settings': measure.settings_of(flags, overrides),
    'epochs': flags.rounds + 1,
    'quality': measure.quality(ranks),
    'compile_seconds': first['own'][0]['compile_seconds'],
  }
  measure.report(flags, measure.table(result), result)


if __name__ == '__main__':
  main()

"""Speed of full-ranking evaluation beside RecTools: users a second and peak memory.

  python -m benchmarks.speed.evaluate_vs_rectools --data_dir=data/ml-1m-sequences \
    --rectools_python=rectools/bin/python

Both rank the test items, all items but the user's own, in turns: ours with the program's evaluator,
RecTools by lists of 20 recommendations and its metrics. Parameters do not change the speed, so both
have their first ones, unless `--epochs` says to train before. What ours prepares and compiles once
a run is apart. The last line is JSON; `--json` prints only that.
"""

from benchmarks.speed import measure
from ur4rec_jax.errors import exit_on_reported_error


@exit_on_reported_error
def main() -> None:
  """Times both sides and prints the table."""
  parser = measure.make_parser(__doc__)
  parser.add_argument('--rounds', type=int, default=7, help='evaluations that count')
  parser.add_argument('--epochs', type=int, default=0, help='trained before')
  flags, overrides = measure.parse(parser)
  with measure.both_sides(flags, overrides) as (sides, counts):
    measure.take_turns(sides, flags.epochs, 'epoch')
    first = measure.take_turns(sides, 1, 'rank', part='test')
    ranks = measure.take_turns(sides, flags.rounds, 'rank', part='test')
  result = {
    **measure.compare(ranks, 'users'),
    'benchmark': 'evaluate_vs_rectools',
    'dataset': counts,
    'settings': measure.settings_of(flags, overrides),
    'epochs': flags.epochs,
    'quality': measure.quality(ranks),
    'rectools_metrics': ranks['rectools'][-1]['metrics'],
    'compile_seconds': first['own'][0]['compile_seconds'],
    'prepare_seconds': first['own'][0]['prepare_seconds'],
  }
  measure.report(flags, measure.table(result), result)


if __name__ == '__main__':
  main()

"""Measures simple baselines on a prepared folder, beside trained runs, under one protocol.

  python -m ur4rec_jax.baselines --data_dir=data/shop
  python -m ur4rec_jax.baselines --data_dir=data/shop --workdir=runs/shop

The baselines are a random order, popularity, recent popularity, next item, item-kNN, EASE (up to
5,000 items) and, with the library `implicit`, ALS and BPR-MF. Their settings are chosen by
validation. Besides accuracy, the table has metrics of the lists of ten items, such as coverage.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ur4rec_jax.errors import InputError, exit_on_reported_error, say
from ur4rec_jax.files import expand_home, write_file

if TYPE_CHECKING:
  import numpy as np

  from ur4rec_jax.data.dataset import Dataset
  from ur4rec_jax.evaluation.history_models import HistoryModel
  from ur4rec_jax.evaluation.protocol import Protocol

WITHOUT_TRAINING = ('random', 'popularity', 'recent popularity', 'next item', 'item-kNN', 'EASE')
FACTORS = ('ALS', 'BPR-MF')  # Learned by a library that is an extra.
ACCURACY = ('hit@10', 'ndcg@10', 'mrr')
OF_LISTS = ('coverage', 'gini', 'novelty', 'diversity', 'serendipity')
LENGTH = 10  # Length of the recommendation lists.


def table(rows: dict[str, dict], columns: Sequence[str]) -> str:
  """Formats some metrics of some models, one model per line."""
  width, cell = max(map(len, rows)), max(map(len, columns)) + 2
  lines = [' ' * width + ''.join(f'{name:>{cell}}' for name in columns)]
  for name, values in rows.items():
    cells = ''.join(f'{values[metric]:>{cell}.4f}' for metric in columns)
    lines.append(f'{name:<{width}}{cells}')
  return '\n'.join(lines)


def _names(text: str) -> list[str]:
  names = [name.strip() for name in text.split(',')]
  for name in names:
    if name not in WITHOUT_TRAINING + FACTORS:
      raise argparse.ArgumentTypeError(
        f'{name!r} is none of {", ".join(WITHOUT_TRAINING + FACTORS)}'
      )
  return names


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--data_dir', required=True, help='folder that data_prep.build_dataset wrote')
  add('--split', default='leave_one_out', help='leave_one_out or time')
  add(
    '--seen_items',
    default='leave_out',
    choices=('leave_out', 'keep'),
    help='items that a user had before: leave them out of the ranking, or keep them',
  )
  add('--seed', type=int, default=0, help='seed of the random order and of ALS and BPR-MF')
  add(
    '--models',
    type=_names,
    default=','.join(WITHOUT_TRAINING + FACTORS),
    help='baselines to measure, separated by commas (default: all)',
  )
  add(
    '--workdir', action='append', default=[], help='a finished run to add to the table; repeatable'
  )
  add('--out', help='JSON file to write the metrics to')
  flags = parser.parse_args(expand_home(argv))
  if flags.seed < 0:
    raise InputError(f'--seed={flags.seed}: must be 0 or more')

  # These take seconds to import, and wrong flags are answered at once.
  from ur4rec_jax.data.dataset import load_dataset
  from ur4rec_jax.evaluation.history_models import rank_and_list, tuned
  from ur4rec_jax.evaluation.protocol import Protocol

  dataset = load_dataset(flags.data_dir, flags.split)
  protocol = Protocol(seen_items=flags.seen_items)
  for part in ('valid', 'test'):
    if not protocol.counts_any(dataset, part):
      raise InputError(f'--data_dir={flags.data_dir}: no user has a {part} item that counts')
  measure = _measure(dataset, protocol)
  runs = {name: _open_run(name, dataset, protocol) for name in flags.workdir}
  found = {}
  for name, models in _baselines(dataset, flags):
    model = tuned(models, dataset, protocol)
    found[name] = measure(*rank_and_list(model, dataset, 'test', protocol, LENGTH))
    found[name]['setting'] = model.setting
    say(f'{name:<18}ndcg@10 {found[name]["ndcg@10"]:.4f}  {model.setting}')
  for name, ranks_and_lists in runs.items():
    found[name] = measure(*ranks_and_lists())
  protocol_line = ', '.join(f'{k}: {v}' for k, v in protocol.describe(dataset).items())
  say(f'\ntest; {protocol_line}\n{table(found, ACCURACY + OF_LISTS)}')
  if flags.out is not None:  # After the table, which is then not lost if the disk is full.
    write_file(flags.out, json.dumps(found, indent=2) + '\n')


def _baselines(
  dataset: 'Dataset', flags: argparse.Namespace
) -> Iterator[tuple[str, Iterator['HistoryModel']]]:
  """Yields the name of each baseline that was asked for, and its settings to choose from.

  It says which ones cannot be measured; InputError if none can.
  """
  from ur4rec_jax.data.dataset import read_interactions
  from ur4rec_jax.evaluation.factors import factor_models
  from ur4rec_jax.evaluation.neighbours import MOST_ITEMS_OF_EASE, neighbour_models
  from ur4rec_jax.evaluation.popularity import popularity_models

  train, times = dataset.train_part(), read_interactions(flags.data_dir).timestamps
  models = popularity_models(dataset, times, flags.seed) | neighbour_models(train)
  way_out = ''
  if any(name in FACTORS for name in flags.models):
    try:
      models |= factor_models(train, flags.seed)
    except ModuleNotFoundError:
      way_out = "pip install 'ur4rec-jax[baselines]' (in a clone: -e '.[baselines]')"
  too_many = f'of {dataset.num_items:,} items; EASE is for up to {MOST_ITEMS_OF_EASE:,}'
  if not any(name in models for name in flags.models):
    reasons = ['need a library: ' + way_out] * bool(way_out)
    reasons += [f'the data are {too_many}'] * ('EASE' in flags.models)
    raise InputError(f'--models={",".join(flags.models)}: {"; ".join(reasons)}')
  if way_out:
    say(f'ALS and BPR-MF are left out: {way_out}')
  if 'EASE' in flags.models and 'EASE' not in models:
    say(f'EASE is left out: the data are {too_many}')
  yield from ((name, settings) for name, settings in models.items() if name in flags.models)


def _measure(dataset: 'Dataset', protocol: 'Protocol') -> Callable[..., dict[str, float]]:
  """Returns a function that computes metrics by name from test ranks and lists `[users, ...]`.

  The ranks may also be a dict of metrics that a run has stored.
  """
  from ur4rec_jax.evaluation.beyond_accuracy import list_metrics
  from ur4rec_jax.evaluation.metrics import ranking_metrics
  from ur4rec_jax.evaluation.neighbours import users_and_items

  has = users_and_items(dataset.train_part())
  together, num_users = (has.T @ has).tocsr(), int((has.getnnz(1) > 0).sum())
  targets, is_counted = dataset.held_out('test')[1], protocol.is_counted(dataset, 'test')

  def measure(ranks: 'np.ndarray | dict[str, float]', lists: 'np.ndarray') -> dict[str, float]:
    accuracy = ranks if isinstance(ranks, dict) else ranking_metrics(ranks[is_counted])
    return accuracy | list_metrics(lists[is_counted], targets[is_counted], together, num_users)

  return measure


def _open_run(
  workdir: str, dataset: 'Dataset', protocol: 'Protocol'
) -> 'Callable[[], tuple[dict[str, float], np.ndarray]]':
  """Opens a finished run, and returns a function that computes its test metrics and lists.

  Raises:
    InputError: the run has not ended, or has other data or another protocol.
  """
  import numpy as np

  from ur4rec_jax.evaluation.history_models import histories_of
  from ur4rec_jax.evaluation.queries import make_queries
  from ur4rec_jax.inference.query import Known, Query
  from ur4rec_jax.inference.trained import load

  recommender = load(workdir)
  evaluated = recommender.evaluate()
  if recommender.dataset.split_hash != dataset.split_hash:
    raise InputError(f'--workdir={workdir}: has learned from other data than --data_dir')
  if (ours := protocol.describe(dataset)) != evaluated['protocol']:
    raise InputError(
      f'--workdir={workdir}: was evaluated under another protocol: {evaluated["protocol"]}, and'
      f' the baselines are under {ours}'
    )

  def metrics_and_lists() -> tuple[dict[str, float], np.ndarray]:
    queries = make_queries(dataset, 'test', protocol)
    ends = np.cumsum(queries.lengths)
    known = [
      Known(items.astype(np.int32), np.unique(items))
      for items in np.split(histories_of(dataset, queries).items, ends[:-1])
    ]
    preferences = recommender.preferences_of(queries.users)
    query = Query(known, LENGTH, keep_seen=protocol.keeps_seen, preferences=preferences)
    ranking = recommender.rank(recommender.check_known(query, known))
    return evaluated['test'], np.where(np.isfinite(ranking.scores), ranking.items, 0)

  return metrics_and_lists


if __name__ == '__main__':
  main()

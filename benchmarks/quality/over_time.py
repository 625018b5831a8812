"""Tests and then trains over windows of time: a static model, updates, retraining, and item-kNN.

  python -m benchmarks.quality.over_time --data=/path/to/ml-1m --scratch=/tmp/over-time

The first half of the events is the start; the rest comes in equal windows. In each window every
model first ranks the last item of each user with new events, and only then learns the window. The
data grow by `build_dataset --append`, and the updates pass the gate of `ur4rec_jax.update`. A
second retraining with another seed shows how much of a difference is chance. At the end the last
window comes once more with shuffled items, which the gate must refuse. Writes
`benchmarks/results/over_time/ml-1m.json`, named as the data, and the tables in docs/updates.md;
--table only the latter.
"""

import argparse
import csv
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.quality.accuracy import put_between_marks
from data_prep import build_dataset
from ur4rec_jax import default_config
from ur4rec_jax.data.dataset import Dataset, load_dataset
from ur4rec_jax.errors import InputError, exit_on_reported_error, say
from ur4rec_jax.evaluation.evaluate import make_evaluator
from ur4rec_jax.evaluation.metrics import gains
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import make_queries
from ur4rec_jax.files import write_file
from ur4rec_jax.runs import train_loop, update_run, warm_start
from ur4rec_jax.runs.open_run import Run, open_run
from ur4rec_jax.sharding import devices

_ROOT = pathlib.Path(__file__).parents[2]
RESULTS = _ROOT / 'benchmarks' / 'results' / 'over_time'
PAGE = _ROOT / 'docs' / 'updates.md'
MODELS = ('static', 'update', 'retrain', 'other seed', 'item-kNN')
_FILES = {'u.data': '\t', 'ratings.dat': '::'}  # Columns: user, item, rating, time.
_SEED, _OTHER_SEED = 0, 1


def read_events(folder: pathlib.Path) -> list[tuple[str, str, int]]:
  """Reads user, item and time of the events of MovieLens, in order of time."""
  for name, delimiter in _FILES.items():
    if (folder / name).exists():
      lines = (folder / name).read_text(encoding='latin-1').splitlines()
      rows = [line.split(delimiter) for line in lines]
      return sorted(((u, i, int(t)) for u, i, _, t in rows), key=lambda row: row[2])
  raise InputError(f'--data={folder}: has none of {", ".join(_FILES)}')


def windows_of(events: list, start: float, count: int) -> list[list]:
  """Cuts events into the start and `count` windows with about as many events each."""
  borders = np.linspace(start, 1, count + 1) * len(events)
  borders = [0, *borders.round().astype(int).tolist()]
  return [events[a:b] for a, b in itertools.pairwise(borders)]


def small_config(data_dir: pathlib.Path, epochs: int, seed: int = _SEED) -> ConfigDict:
  """A small SASRec, which one core trains in about a minute."""
  config = default_config()
  config.update_from_flattened_dict(
    {
      'data_dir': str(data_dir),
      'max_length': 50,
      'batch_size': 32,
      'crop': 'random',
      'sasrec.dim': 32,
      'sasrec.num_blocks': 1,
      'sasrec.item_scale': 0.02,
      'optimizer.learning_rate': 5e-3,
      'optimizer.warmup_steps': 50,
      'optimizer.schedule': 'cosine',
      'num_epochs': epochs,
      'validate_every_epochs': 5,
      'patience': epochs,
      'seed': seed,
    }
  )
  return config


def _write(path: pathlib.Path, events: list) -> pathlib.Path:
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([('user', 'item', 'time'), *events])
  return path


def _seconds(work: Callable, *arguments: Any) -> float:
  """Calls `work` and returns the seconds of processors that it took."""
  started = time.process_time()
  work(*arguments)
  return time.process_time() - started


class ItemKnn:
  """Scores items by their cosine with the items of a history, over the users of training."""

  def __init__(self, dataset: Dataset):
    """Counts which items are in the same training histories."""
    train = dataset.train_part()
    seen = np.zeros((train.num_users, dataset.num_items + 1), np.float32)
    seen[train.owners, train.item_ids] = 1
    norms = np.maximum(np.linalg.norm(seen, axis=0), 1e-9)
    self._likeness = (seen.T @ seen) / norms / norms[:, None]
    np.fill_diagonal(self._likeness, 0)

  def ranks(self, dataset: Dataset) -> np.ndarray:
    """Ranks the test items of a dataset, whose newer items it does not know."""
    known, found = len(self._likeness), []
    queries = make_queries(dataset, 'test', Protocol())
    for target, start, length in zip(queries.targets, queries.starts, queries.lengths, strict=True):
      history = dataset.item_ids[start : start + length]
      scores = np.zeros(dataset.num_items + 1)
      scores[:known] = self._likeness[history[history < known]].sum(0)
      score, scores[0] = scores[target], -1
      scores[history] = scores[target] = -1
      found.append(1 + int((scores >= score).sum()))
    return np.array(found)[Protocol().is_counted(dataset, 'test')]


def compare(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Yields the results after each window; what the scratch folder has is not repeated."""
  scratch = arguments.scratch
  scratch.mkdir(parents=True, exist_ok=True)
  events = windows_of(read_events(arguments.data), arguments.start, arguments.windows)
  orders = _write(scratch / 'events0.csv', events[0])
  build_dataset.build('interactions', scratch / 'data0', orders)
  _train(small_config(scratch / 'data0', arguments.epochs), scratch / 'run0')
  _train(small_config(scratch / 'data0', arguments.epochs, _OTHER_SEED), scratch / 'other0')
  settings = 'start', 'epochs', 'update_epochs', 'replay', 'moments', 'margin'
  results = {
    'data': arguments.data.name,
    'events': [len(window) for window in events],
    'settings': {name: getattr(arguments, name) for name in settings} | {'seed': _SEED},
    'windows': [],
    'poisoned': None,
    'device': devices.describe_devices(),
  }
  for w in range(1, len(events)):
    finished = scratch / f'window{w}.json'
    if not finished.exists():
      write_file(finished, json.dumps(_window(arguments, w, events[w])))
    results['windows'].append(json.loads(finished.read_text()))
    yield results
  yield results | {'poisoned': _poisoned(arguments, events[-1], scratch / f'data{len(events) - 2}')}


def _window(arguments: argparse.Namespace, w: int, events: list) -> dict[str, Any]:
  """Tests all models on a window, and lets them learn it."""
  scratch = arguments.scratch
  data = scratch / f'data{w}'
  orders = _write(scratch / f'events{w}.csv', events)
  append_seconds = _seconds(build_dataset.append, scratch / f'data{w - 1}', orders, data)
  serving = _last_promoted(scratch, w - 1)
  trained = scratch / (f'retrain{w - 1}' if w > 1 else 'run0')
  workdirs = {'static': scratch / 'run0', 'update': serving, 'retrain': trained}
  workdirs['other seed'] = scratch / f'other{w - 1}'
  row = {'window': w, 'append_seconds': append_seconds, **_test(workdirs, scratch, w)}
  config = _update_config(arguments, serving, data)
  out, retrained = scratch / f'update{w}', scratch / f'retrain{w}'
  row['update_seconds'] = _seconds(_train, config, out)
  row['gate'] = update_run.train_and_judge(config, str(out), arguments.margin)
  row['update_steps'] = _steps(out)
  row['retrain_seconds'] = _seconds(_train, small_config(data, arguments.epochs), retrained)
  row['retrain_steps'] = _steps(retrained)
  _train(small_config(data, arguments.epochs, _OTHER_SEED), scratch / f'other{w}')
  return row


def _update_config(
  arguments: argparse.Namespace, serving: pathlib.Path, data: pathlib.Path
) -> ConfigDict:
  return update_run.update_config(
    serving,
    data,
    epochs=arguments.update_epochs,
    replay=arguments.replay,
    moments=arguments.moments,
  )


def _train(config: ConfigDict, workdir: pathlib.Path) -> None:
  if not (workdir / 'results.json').exists():
    train_loop.train_and_evaluate(config, str(workdir))


def _steps(workdir: pathlib.Path) -> int:
  return json.loads((workdir / 'results.json').read_text())['stages'][0]['steps']


def _test(workdirs: dict[str, pathlib.Path], scratch: pathlib.Path, w: int) -> dict[str, Any]:
  """Ranks the last item of each user with new events in a window that no model has learned."""
  before = load_dataset(scratch / f'data{w - 1}')
  config = update_run.update_config(workdirs['static'], scratch / f'data{w}', epochs=1)
  run = open_run(config)
  evaluator = make_evaluator(run.stages[-1].model, _eval_data(run), 'test')
  ranks = {'item-kNN': ItemKnn(before).ranks(run.dataset)}
  for name, workdir in workdirs.items():
    config.init.run = str(workdir.absolute())
    ranks[name] = evaluator(devices.replicate(warm_start.warm_params(run)))
  users, targets = run.dataset.held_out('test')
  counted = run.protocol.is_counted(run.dataset, 'test')
  old_lengths = np.zeros(run.dataset.num_users, np.int64)
  old_lengths[: before.num_users] = before.lengths  # Numbers of users stay.
  is_new = (run.dataset.lengths > old_lengths)[users[counted]]
  is_new_item = is_new & (targets[counted] > load_dataset(scratch / 'data0').num_items)
  mean = lambda chosen: {
    name: float(gains(ranks[name][chosen], 10).mean()) if chosen.any() else None for name in MODELS
  }
  return {
    'users': int(is_new.sum()),
    'ndcg@10': mean(is_new),
    'users_with_new_items': int(is_new_item.sum()),
    'new_items': mean(is_new_item),
  }


def _eval_data(run: Run) -> Any:
  data = run.eval_data()
  return data._replace(params_axes=data.embeddings.axes(run.shapes.params))


def _poisoned(arguments: argparse.Namespace, events: list, before: pathlib.Path) -> dict[str, Any]:
  """Updates with the last window, whose items are shuffled; returns the verdict of the gate."""
  scratch = arguments.scratch
  users, items, times = zip(*events, strict=True)
  items = np.random.default_rng(_SEED).permutation(items).tolist()
  orders = _write(scratch / 'poisoned.csv', list(zip(users, items, times, strict=True)))
  build_dataset.append(before, orders, scratch / 'poisoned')
  serving = _last_promoted(scratch, int(before.name.removeprefix('data')))
  config = _update_config(arguments, serving, scratch / 'poisoned')
  return update_run.train_and_judge(config, str(scratch / 'poisoned-run'), arguments.margin)


def _last_promoted(scratch: pathlib.Path, window: int) -> pathlib.Path:
  for w in range(window, 0, -1):
    if json.loads((scratch / f'update{w}' / 'gate.json').read_text())['is_promoted']:
      return scratch / f'update{w}'
  return scratch / 'run0'


def table(results: dict[str, Any]) -> str:
  """Formats stored results as docs/updates.md has them."""
  settings = results['settings']
  lines = [
    f'Data {results["data"]}: {results["events"][0]:,} events to start with, then'
    f' {len(results["windows"])} of {len(results["events"]) - 1} windows; retraining of'
    f' {settings["epochs"]} epochs,'
    f' updates of {settings["update_epochs"]} epochs with a replay of {settings["replay"]:g} and'
    f' moments {settings["moments"]}.',
    '',
    f'| window | users | {" | ".join(MODELS)} | update/retrain | other seed/retrain | cost |'
    ' gate |',
    f'|{" --- |" * (len(MODELS) + 6)}',
  ]
  for row in results['windows']:
    scores = row['ndcg@10']
    cost = row['update_steps'] / row['retrain_steps']
    seconds = row['update_seconds'] / row['retrain_seconds']
    lines.append(
      f'| {row["window"]} | {row["users"]} | '
      + ' | '.join(f'{scores[name]:.4f}' for name in MODELS)
      + f' | {scores["update"] / scores["retrain"]:.0%}'
      f' | {scores["other seed"] / scores["retrain"]:.0%} | {cost:.0%} of the steps,'
      f' {seconds:.0%} of the time | {"promoted" if row["gate"]["is_promoted"] else "refused"} |'
    )
  means = {
    name: np.average(
      [row['ndcg@10'][name] for row in results['windows']],
      weights=[row['users'] for row in results['windows']],
    )
    for name in MODELS
  }
  lines.append(
    f'| all | {sum(row["users"] for row in results["windows"])} | '
    + ' | '.join(f'{means[name]:.4f}' for name in MODELS)
    + f' | {means["update"] / means["retrain"]:.0%}'
    f' | {means["other seed"] / means["retrain"]:.0%} | | |'
  )
  if poisoned := results['poisoned']:
    outcome = (
      'promoted' if poisoned['is_promoted'] else f'refused: {"; ".join(poisoned["reasons"])}'
    )
    lines += ['', f'The last window with shuffled items was {outcome}.']
  return '\n'.join(lines)


def tables() -> str:
  """Formats all stored results, the largest data first."""
  stored = [json.loads(path.read_text(encoding='utf-8')) for path in RESULTS.glob('*.json')]
  return '\n\n'.join(map(table, sorted(stored, key=lambda results: -sum(results['events']))))


@exit_on_reported_error
def main() -> None:
  """Reads the flags, compares, and writes results and table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--data', type=pathlib.Path, help='folder of MovieLens: u.data or ratings.dat')
  add('--scratch', type=pathlib.Path, help='folder for data and runs; finished ones are used again')
  add('--windows', type=int, default=6, help='number of windows')
  add('--start', type=float, default=0.5, help='share of the events before the first window')
  add('--epochs', type=int, default=25, help='epochs of a training from zero')
  add('--update_epochs', type=int, default=6, help='epochs of an update')
  add('--replay', type=float, default=0.2, help='see `ur4rec_jax.update`')
  add('--moments', default='reset', help='see `ur4rec_jax.update`')
  add('--margin', type=float, default=0.02, help='see `ur4rec_jax.update`')
  add('--out', type=pathlib.Path, default=RESULTS, help='folder of the results')
  add('--table', action='store_true', help='only write the tables of the stored results')
  arguments = parser.parse_args()
  if not arguments.table:
    if not (arguments.data and arguments.scratch):
      raise InputError('--data and --scratch are missing; --help says what they are')
    for results in compare(arguments):
      write_file(
        arguments.out / f'{arguments.data.name}.json', json.dumps(results, indent=2) + '\n'
      )
    say(table(results))
  if arguments.out == RESULTS and PAGE.exists():
    put_between_marks(PAGE, 'over_time', tables())


if __name__ == '__main__':
  main()

"""Measures how long one user waits for the best 10 items; writes the table of docs/inference.md.

  python -m benchmarks.speed.inference_latency --data_dir=data/movielens_1m  # random parameters
  python -m benchmarks.speed.inference_latency --workdir=RUN       # a trained run and its users
  python -m benchmarks.speed.inference_latency --only_tables       # only writes the table again

One process recommends to one user at a time with `Recommender.top`: original ids go in; original
ids, titles, scores and shares come out. benchmarks/results/inference/latency.json keeps the result.

Without a run, parameters and features are random and have the shapes of MovieLens-1M. The histories
have three lengths, and with `--data_dir` also those of the users of that prepared data.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.quality.accuracy import put_between_marks
from configs import movielens_1m
from ur4rec_jax.data.dataset import read_interactions
from ur4rec_jax.data.features import TokenTable
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.files import write_file
from ur4rec_jax.inference import scoring
from ur4rec_jax.inference.recommender import Recommender
from ur4rec_jax.inference.stored_format import Settings
from ur4rec_jax.inference.trained import load
from ur4rec_jax.models.ur4rec import create_model

ROOT = pathlib.Path(__file__).parents[2]
STORED, PAGE = ROOT / 'benchmarks/results/inference/latency.json', ROOT / 'docs' / 'inference.md'
ITEMS, MILLION = 3706, 1_000_000
TOKENS = {'text': (9, 384), 'image': (10, 512)}
# Targets for the median in milliseconds, on 2 cores.
TARGETS = {'sasrec': 1.0, 'text': 1.5, 'multimodal': 2.0}
MILLION_TARGET = 40.0
WARM_UP = 20


def make_recommender(variant: str) -> Recommender:
  """Makes a recommender of a variant of configs/movielens_1m.py with random parameters."""
  config = movielens_1m.get_config(variant)
  config.followers.weight = 0.0  # There are no interactions to count.
  model, rng = create_model(config, ITEMS), np.random.default_rng(0)
  features = {}
  for name in config.modalities:
    tokens, width = TOKENS[name]
    values = rng.normal(size=(ITEMS + 1, tokens, width)).astype(np.float32)
    features[name] = TokenTable(values, np.ones((ITEMS + 1, tokens), bool))
  ones = np.ones((1, 1), np.int32)
  init = functools.partial(model.init, jax.random.key(0), method='encode')
  params = jax.jit(init)(features, ones, ones)['params']
  arrays = jax.jit(functools.partial(scoring.item_arrays, model))(params, features)
  return _recommender(model, scoring.user_params(model, params), arrays, config.max_length, False)


def make_million(vectors: np.ndarray, approximate: bool) -> Recommender:
  """Makes a SASRec with one block over the given item vectors, `[items + 1, 64]`."""
  config = movielens_1m.get_config('sasrec')
  config.followers.weight = 0.0
  config.sasrec.update({'dim': vectors.shape[1], 'ffn_dim': vectors.shape[1], 'num_blocks': 1})
  ones = np.ones((1, 1), np.int32)
  init = functools.partial(create_model(config, 1).init, method='encode')
  params = jax.jit(init)(jax.random.key(0), {}, ones, ones)['params']
  model = create_model(config, len(vectors) - 1)
  arrays = {'sasrec': {'vectors': vectors}}
  return _recommender(model, scoring.user_params(model, params), arrays, 200, approximate)


def _recommender(model, params, arrays, max_length, approximate) -> Recommender:
  names = [name for name in ('text', 'image') if model.retriever is not None]
  if 'retriever' in arrays:
    names = names[: arrays['retriever']['modalities'].shape[1]]
  count = len(next(iter(arrays.values()))['vectors']) - 1
  ids = [str(i) for i in range(1, count + 1)]
  catalogue = scoring.catalogue_arrays(model, arrays, approximate)
  settings = Settings(
    branches=list(model.branches),
    share_names=scoring.share_names(model, names),
    max_length=max_length,
    preferences={},
    most_k=scoring.CANDIDATES if approximate else None,
    about={},
  )
  return Recommender(
    jax.jit(scoring.make_program(model)),
    {'params': params, 'items': arrays, **catalogue},
    {'ids': ids, 'titles': ids},
    settings,
  )


def waits(
  recommender: Recommender, histories: Sequence[Sequence[str]], calls: int
) -> dict[str, float]:
  """Measures single calls in milliseconds: minimum, median and 99th percentile."""
  for i in range(WARM_UP):  # Compiles the programs for all lengths that are measured.
    recommender.top([histories[i % len(histories)]])
  for history in histories:
    recommender.top([history])
  times = []
  for i in range(calls):
    history = histories[i % len(histories)]
    start = time.perf_counter()
    recommender.top([history])
    times.append(1000 * (time.perf_counter() - start))
  low, median, high = np.percentile(times, [0, 50, 99])
  return {
    'min': round(float(low), 3),
    'p50': round(float(median), 3),
    'p99': round(float(high), 3),
    'calls': calls,
  }


def random_histories(length: int, count: int = 20) -> list[list[str]]:
  rng = np.random.default_rng(0)
  return [[str(i) for i in rng.integers(1, ITEMS + 1, length)] for _ in range(count)]


def users_histories(data_dir: str, count: int = 1000) -> list[list[str]]:
  """Returns histories of random users in the ids of `make_recommender`."""
  data = read_interactions(data_dir)
  users = np.random.default_rng(0).choice(len(data.user_ids), count, replace=False)
  return [[*map(str, data.item_ids[data.offsets[user] : data.offsets[user + 1]])] for user in users]


def measure_million(calls: int, spectrum: str) -> list[dict[str, Any]]:
  """Measures the exact and the approximate search of a million items, and the latter's recall.

  Args:
    calls: number of calls to measure.
    spectrum: `flat` for item vectors that vary equally in all directions, which is the worst case;
      `decaying` for a variation of 1 / k in the k-th direction, similar to trained vectors.
  """
  rng = np.random.default_rng(0)
  vectors = rng.standard_normal((MILLION + 1, 64), np.float32)
  if spectrum == 'decaying':
    vectors /= np.arange(1, 65, dtype=np.float32)
  histories = random_histories(50, 50)
  rows, found = [], {}
  for search in ('exact', 'approximate'):
    recommender = make_million(vectors, search == 'approximate')
    found[search] = [recommender.top([history]).items[0] for history in histories]
    rows.append(
      {
        'what': f'{MILLION:,} x 64, {search}, {spectrum} spectrum',
        'length': 50,
        'target': MILLION_TARGET,
        **waits(recommender, histories[:10], calls),
      }
    )
    del recommender
  shared = [len(set(a) & set(b)) / 10 for a, b in zip(*found.values(), strict=True)]
  rows[1]['recall'] = round(float(np.mean(shared)), 4)
  return rows


def table(stored: dict[str, Any]) -> str:
  """Formats the stored result as a Markdown table."""
  lines = ['| | history | p50 ms | p99 ms | target p50 | recall@10 |', '| --- ' * 6 + '|']
  for row in stored['rows']:
    cells = [row['what'], row['length'], f'{row["p50"]:.2f}', f'{row["p99"]:.2f}']
    target = f'{row["target"]:g}' if row.get('target') else ''
    recall = f'{row["recall"]:.3f}' if 'recall' in row else ''
    lines.append('| ' + ' | '.join(map(str, [*cells, target, recall])) + ' |')
  lines += ['', f'{stored["device"]}, jax {stored["jax"]}; load of the machine {stored["load"]}.']
  return '\n'.join(lines)


def write_tables() -> None:
  """Writes the stored result between its marks in docs/inference.md."""
  put_between_marks(PAGE, 'latency', table(json.loads(STORED.read_text())))


@exit_on_reported_error
def main() -> None:
  """Reads the flags, measures, and writes the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add(
    '--workdir',
    help='a trained run to measure with its users; the result is not stored',
  )
  add('--data_dir', help='prepared MovieLens-1M, or the data of --workdir if they have moved')
  add('--calls', type=int, default=1000, help='calls per row of the table')
  add('--skip_million', action='store_true', help='do not measure the catalogue of a million items')
  add('--only_tables', action='store_true', help='measure nothing, only write the table')
  flags = parser.parse_args()
  if flags.workdir:
    recommender = load(flags.workdir, flags.data_dir)
    users = [*recommender.users][:: max(1, len(recommender.users) // 200)]
    histories = [recommender.history(user) for user in users]
    print(json.dumps(waits(recommender, histories, flags.calls)))
    return
  if not flags.only_tables:
    measured = {length: random_histories(length) for length in (50, 100, 200)}
    if flags.data_dir:
      histories = users_histories(flags.data_dir)
      middle = round(statistics.median(map(len, histories)))
      measured[f'of users, median {middle}'] = histories
    rows = []
    for variant, target in TARGETS.items():
      recommender = make_recommender(variant)
      for length, histories in measured.items():
        found = waits(recommender, histories, flags.calls)
        rows.append({'what': variant, 'length': length, 'target': target, **found})
        print(json.dumps(rows[-1]), flush=True)
    if not flags.skip_million:
      for spectrum in ('flat', 'decaying'):
        rows += measure_million(max(flags.calls // 10, 1), spectrum)
        print(*map(json.dumps, rows[-2:]), sep='\n', flush=True)
    device = f'{len(os.sched_getaffinity(0))} cores' if jax.default_backend() == 'cpu' else 'GPU'
    stored = {
      'rows': rows,
      'device': device,
      'jax': jax.__version__,
      'load': round(os.getloadavg()[0], 1),
    }
    write_file(STORED, json.dumps(stored, indent=2) + '\n')
  write_tables()


if __name__ == '__main__':
  main()

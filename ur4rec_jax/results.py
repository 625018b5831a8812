"""The numbers of a finished run: `results.json`, the table, and `--mode=evaluate`."""

import io
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax import evaluate, metrics, optimizers, parallel
from ur4rec_jax.checkpoint import Checkpointer, write_file
from ur4rec_jax.config_checks import check_config
from ur4rec_jax.dataset import Dataset
from ur4rec_jax.errors import InputError
from ur4rec_jax.features import Tables, load_with_features, read_tables
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.train_state import create_train_state
from ur4rec_jax.workdir import check_workdir

PyTree = Any


def write_results(
  config: ConfigDict,
  workdir: str,
  dataset: Dataset,
  tables: Tables,
  params: PyTree,
  stage: dict[str, Any],
  seconds: float,
) -> dict:
  """Evaluates `params`, writes `results.json` and the files beside it, and prints the table.

  Beside it are `timing.json`, and `test_ranks.npz` with `users`, their index in the dataset, and
  `ranks`, int32, for tests of one run against another that pair the users.

  Args:
    config: the run's config.
    workdir: where to write.
    dataset: all interactions.
    tables: tokens of items and users.
    params: the best parameters.
    stage: what to say of the stage that made them.
    seconds: training time.

  Returns:
    The contents of `results.json`.
  """
  ranks = _rank(config, dataset, tables, params)
  scores = _scores(config, dataset, ranks)
  results = {
    'dataset': {
      'name': dataset.info['name'],
      **dataset.info['counts'],
      'split_hash': dataset.split_hash,
      'features': {
        of: {name: found.origin for name, found in features.items()}
        for of, features in dataset.all_features.items()
      },
    },
    **scores,
    'stages': [{**stage, 'valid': scores['valid'], 'test': scores['test']}],
    'parameters': sum(x.size for x in jax.tree.leaves(params)),
    'seed': config.seed,
    'git': _git_version(),
  }
  # Apart from the results, which are the same whenever and wherever the run is repeated.
  timing = {
    'device': parallel.describe_devices(),
    'seconds': round(seconds, 1),
    'jax': jax.__version__,
  }
  if parallel.is_main_process():
    archive = io.BytesIO()
    np.savez(archive, users=dataset.held_out('test')[0], ranks=ranks['test'])
    write_file(pathlib.Path(workdir) / 'test_ranks.npz', archive.getvalue())
    for name, content in (('timing.json', timing), ('results.json', results)):
      write_file(pathlib.Path(workdir) / name, json.dumps(content, indent=2) + '\n')
    print(results_table(results), flush=True)
  return results


def evaluate_workdir(config: ConfigDict, workdir: str) -> dict:
  """Evaluates a run's best parameters again; prints the table, and on stdout one line of JSON.

  Args:
    config: the run's config; `evaluation` may differ.
    workdir: a folder that `train_and_evaluate` wrote.

  Returns:
    `protocol`, `valid`, `test`, `by_popularity` and `baselines`, as in `results.json`.

  Raises:
    InputError: the folder holds no run or another one.
  """
  check_config(config)
  dataset = load_with_features(config)
  if not check_workdir(workdir, config, dataset, free=('evaluation.',)):
    raise InputError(f'--workdir {workdir}: no run here; train first with --mode=train')
  tables = read_tables(dataset, jnp.dtype(config.dtype))
  params = restore_best(config, workdir, dataset, tables)
  ranks = _rank(config, dataset, tables, params)
  results = _scores(config, dataset, ranks)
  if parallel.is_main_process():
    print(results_table(results), file=sys.stderr)
    print(json.dumps(results))
  return results


def restore_best(config: ConfigDict, workdir: str, dataset: Dataset, tables: Tables) -> PyTree:
  """Reads a run's best parameters, replicated over the devices.

  Args:
    config: the run's config.
    workdir: a folder that `train_and_evaluate` wrote.
    dataset: the run's.
    tables: tokens of its items and users.

  Raises:
    InputError: nothing has been validated yet.
  """
  model = create_model(config, dataset.num_items)
  tx = optimizers.create_optimizer(config.optimizer, 1)
  shapes = jax.eval_shape(lambda: create_train_state(model, tx, config.seed, tables))
  checkpointer = Checkpointer(workdir, config.checkpoint.max_to_keep)
  try:
    restored = checkpointer.restore({'state': shapes, 'best_params': shapes.params})
  finally:
    checkpointer.close()
  if restored is None or not restored[1]['best_valid']:
    raise InputError(f'--workdir {workdir}: no validated checkpoint yet; go on training')
  return restored[0]['best_params']


def _rank(
  config: ConfigDict, dataset: Dataset, tables: Tables, params: PyTree
) -> dict[str, np.ndarray]:
  """Returns the ranks of the held-out items of both parts, in the users' order."""
  model = create_model(config, dataset.num_items)
  with jax.transfer_guard(config.transfer_guard):
    item_ids = parallel.replicate(dataset.item_ids)
    tables = parallel.replicate(tables)
    return {
      part: evaluate.make_evaluator(
        model, dataset, item_ids, tables, part, config.evaluation, config.mapping
      )(params)
      for part in evaluate.PARTS
    }


def _scores(config: ConfigDict, dataset: Dataset, ranks: dict[str, np.ndarray]) -> dict[str, dict]:
  """Returns the protocol, the metrics of both parts, whole and by popularity, and the baselines."""
  groups = metrics.popularity_groups(dataset.train_part().item_counts())
  return {
    'protocol': evaluate.protocol(dataset, config.evaluation),
    **{part: metrics.ranking_metrics(ranks[part]) for part in evaluate.PARTS},
    'by_popularity': {
      part: metrics.metrics_by_group(ranks[part], groups[dataset.held_out(part)[1]])
      for part in evaluate.PARTS
    },
    'baselines': evaluate.baseline_metrics(dataset, 'test', config.evaluation),
  }


def results_table(results: dict) -> str:
  """Formats test metrics beside both baselines, one row each, under the protocol's name.

  A last line has the test NDCG@10 by popularity of the held-out item.
  """
  rows = {
    **{name: results['baselines'][name] for name in ('random', 'popularity')},
    'sasrec': results['test'],
    'sasrec (valid)': results['valid'],
  }
  names = [name for name in results['test'] if name != 'users']
  width = max(map(len, rows))
  protocol = ', '.join(f'{name}: {value}' for name, value in results['protocol'].items())
  lines = [
    f'\ntest, {results["test"]["users"]:,} users; {protocol}',
    ' ' * width + ''.join(f'{name:>10}' for name in names),
  ]
  for row, values in rows.items():
    digits = [1 if name == 'mean_rank' else 4 for name in names]
    cells = ''.join(f'{values[n]:>10.{d}f}' for n, d in zip(names, digits, strict=True))
    lines.append(f'{row:<{width}}{cells}')
  groups = [
    f'{name} {values["ndcg@10"]:.4f} ({values["users"]:,} users)'
    for name, values in results['by_popularity']['test'].items()
  ]
  lines.append(f'test ndcg@10 by popularity of the item: {", ".join(groups)}')
  return '\n'.join(lines)


def _git_version() -> str | None:
  """Commit of the source tree, with `-dirty` if it has changes; None outside a checkout."""
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
  folder = pathlib.Path(__file__).parent
  try:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
  except OSError:
    return None
  return done.stdout.strip() or None

"""The numbers of a finished run: `results.json`, the table, and `--mode=evaluate`."""

import io
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.data.features import Tables, load_with_features, read_tables
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation import evaluate, metrics
from ur4rec_jax.files import write_file
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.runs.checkpoint import Checkpointer
from ur4rec_jax.runs.config_checks import check_config
from ur4rec_jax.runs.report import write_report
from ur4rec_jax.runs.workdir import check_workdir, keep_compiled_programs
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import padded, row_axes, unpadded
from ur4rec_jax.training import optimizers
from ur4rec_jax.training.stages import Stage, make_stages
from ur4rec_jax.training.train_state import (
  TrainProgress,
  create_train_state,
  parameter_shapes,
  params_of_stage,
  saved_tree,
)

PyTree = Any


def write_results(
  config: ConfigDict,
  workdir: str,
  dataset: Dataset,
  tables: Tables,
  stages: list[Stage],
  progress: TrainProgress,
  best_params: PyTree,
  num_parameters: int,
) -> dict:
  """Evaluates the best parameters, writes `results.json` and files beside it, prints the table.

  Those of each stage are ranked with the branches that the stage trains; the run's are those of the
  stage with the best validation.

  Beside it are `timing.json`, `report.html`, and `test_ranks.npz` with `users`, their index in the
  dataset, and `ranks`, int32, for tests of one run against another that pair the users.

  Args:
    config: the run's config.
    workdir: where to write.
    dataset: all interactions.
    tables: tokens of items and users, on the devices as training has them.
    stages: of the run.
    progress: how they went.
    best_params: of all stages, `[stages, ...]` each.
    num_parameters: of the model.

  Returns:
    The contents of `results.json`.
  """
  best, records = progress.best_stage, []
  placed = devices.replicate(dataset.item_ids), tables
  item_rows = config.optimizer.item_embeddings
  ends = [*(stage.start for stage in progress.stages[1:]), progress.step]
  for i, (stage, went, end) in enumerate(zip(stages, progress.stages, ends, strict=True)):
    parts = evaluate.PARTS if i == best else ('test',)
    params = params_of_stage(best_params, i)
    ranks = rank_held_out(stage.config, dataset, *placed, params, parts, item_rows)
    if i == best:
      best_ranks, scores = ranks, _scores(stage.config, dataset, ranks)
    records.append(
      {
        'name': stage.name,
        'moving': sorted(stage.trainable),
        'paths': [*stage.config.branches],
        'steps': end - went.start,
        'best_step': went.best_step,
        'best_epoch': went.best_epoch,
        'valid': went.valid,
        'test': metrics.ranking_metrics(ranks['test']),
      }
    )
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
    'best_stage': best,
    'stages': records,
    'parameters': num_parameters,
    'seed': config.seed,
    'git': _git_version(),
  }
  # Apart from the results, which are the same whenever and wherever the run is repeated.
  timing = {
    'device': devices.describe_devices(),
    'seconds': round(progress.seconds, 1),
    'jax': jax.__version__,
  }
  if devices.is_main_process():
    archive = io.BytesIO()
    np.savez(archive, users=dataset.held_out('test')[0], ranks=best_ranks['test'])
    write_file(pathlib.Path(workdir) / 'test_ranks.npz', archive.getvalue())
    for name, content in (('timing.json', timing), ('results.json', results)):
      write_file(pathlib.Path(workdir) / name, json.dumps(content, indent=2) + '\n')
    write_report(workdir)
    print(results_table(results), flush=True)
  return results


def evaluate_workdir(config: ConfigDict, workdir: str) -> dict:
  """Evaluates a run's best parameters again; prints the table, and on stdout one line of JSON.

  Args:
    config: the run's config; `evaluation` may differ.
    workdir: a folder that `train_and_evaluate` wrote.

  Returns:
    `model`, `protocol`, `valid`, `test`, `by_popularity` and `baselines`, as in `results.json`.

  Raises:
    InputError: the folder holds no run or another one.
  """
  check_config(config)
  dataset = load_with_features(config)
  if not check_workdir(workdir, config, dataset, free=('evaluation.',)):
    raise InputError(f'--workdir {workdir}: no run here; train first with --mode=train')
  keep_compiled_programs(workdir, config)
  tables = read_tables(dataset, jnp.dtype(config.dtype))
  stage, params = restore_best(config, workdir, dataset, tables)
  placed = devices.replicate((dataset.item_ids, tables))
  ranks = rank_held_out(stage.config, dataset, *placed, params, evaluate.PARTS)
  results = _scores(stage.config, dataset, ranks)
  if devices.is_main_process():
    print(results_table(results), file=sys.stderr)
    print(json.dumps(results))
  return results


def restore_best(
  config: ConfigDict, workdir: str, dataset: Dataset, tables: Tables
) -> tuple[Stage, PyTree]:
  """Reads the best parameters of a run, and the stage whose branches rank with them.

  Raises:
    InputError: the run has not been validated yet.
  """
  create = lambda config: create_model(config, dataset.num_items)
  stages, labels = make_stages(config, lambda of: parameter_shapes(create(of), tables))
  tx = optimizers.create_optimizer(config.optimizer, labels)
  shapes = jax.eval_shape(
    lambda: padded(
      create_train_state(create(config), tx, config.seed, tables), config.optimizer.item_embeddings
    )
  )
  checkpointer = Checkpointer(workdir, config.checkpoint.max_to_keep)
  try:
    restored = checkpointer.restore(saved_tree(shapes, len(stages)))
  finally:
    checkpointer.close()
  best = TrainProgress.from_json(restored[1]).best_stage if restored else None
  if best is None:
    raise InputError(f'--workdir {workdir}: no validated checkpoint yet; go on training')
  params = params_of_stage(restored[0]['best_params'], best)
  return stages[best], unpadded(params, dataset.num_items)


def rank_held_out(
  config: ConfigDict,
  dataset: Dataset,
  item_ids: jax.Array,
  tables: Tables,
  params: PyTree,
  parts: Sequence[str],
  item_rows: str = 'all',
) -> dict[str, np.ndarray]:
  """Returns the ranks of the held-out items by part, in the users' order.

  `item_ids`, `tables` and `params` are on the devices, as `item_rows` says.
  """
  model = create_model(config, dataset.num_items)
  placed = dataset, item_ids, tables
  axes = row_axes(params, item_rows)
  with jax.transfer_guard(config.transfer_guard):
    return {
      part: evaluate.make_evaluator(
        model, *placed, part, config.evaluation, config.mapping, item_rows, axes
      )(params)
      for part in parts
    }


def _scores(config: ConfigDict, dataset: Dataset, ranks: dict[str, np.ndarray]) -> dict[str, dict]:
  """Returns branches, protocol, metrics of both parts (also by popularity) and baselines."""
  groups = metrics.popularity_groups(dataset.train_part().item_counts())
  return {
    'model': ' + '.join(config.branches),
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
  stages = results.get('stages', [])
  stages = stages if len(stages) > 1 else []
  rows = {
    **{name: results['baselines'][name] for name in ('random', 'popularity')},
    **{f'{i} {stage["name"]}': stage['test'] for i, stage in enumerate(stages, 1)},
    results['model']: results['test'],
    f'{results["model"]} (valid)': results['valid'],
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

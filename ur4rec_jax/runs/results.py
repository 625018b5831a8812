"""The metrics of a finished run: `results.json`, the printed table, and `--mode=evaluate`."""

import io
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import first_user
from ur4rec_jax.errors import InputError, counted, say
from ur4rec_jax.evaluation import metrics
from ur4rec_jax.evaluation.baselines import baseline_metrics
from ur4rec_jax.evaluation.evaluate import EvalData, Evaluators
from ur4rec_jax.evaluation.protocol import PARTS
from ur4rec_jax.files import write_file
from ur4rec_jax.models.ur4rec import UR4Rec
from ur4rec_jax.runs import shown_users
from ur4rec_jax.runs.compiled_programs import keep_compiled_programs
from ur4rec_jax.runs.open_run import Run, open_run, restore_best
from ur4rec_jax.runs.report import (
  PAGE,
  below_popularity,
  repeated_targets,
  targets_apart,
  write_report,
)
from ur4rec_jax.runs.workdir import check_workdir
from ur4rec_jax.sharding import devices
from ur4rec_jax.training.stages import Stage
from ur4rec_jax.training.train_state import TrainProgress, params_of_stage

PyTree = Any


def write_results(
  run: Run, workdir: str, progress: TrainProgress, best_params: PyTree, evaluators: Evaluators
) -> dict:
  """Evaluates the best parameters, writes `results.json` and files beside it, prints the table.

  Every stage's best parameters are ranked with the branches that the stage trains. The run's
  metrics are those of the stage with the best validation.

  The files beside it are `timing.json`, `shown_users.json`, `report.html`, and `test_ranks.npz`.
  The latter has `users` (index in the dataset) and `ranks` (int32), which paired tests need.

  Args:
    run: the trained run.
    workdir: folder to write to.
    progress: record of the stages.
    best_params: best parameters of all stages, `[stages, ...]` each, on the devices.
    evaluators: evaluations of the run.

  Returns:
    The contents of `results.json`.
  """
  data = evaluators.data
  dataset, best, records = run.dataset, progress.best_stage, []
  ends = [*(stage.start for stage in progress.stages[1:]), progress.step]
  for i, (stage, went, end) in enumerate(zip(run.stages, progress.stages, ends, strict=True)):
    parts = PARTS if i == best else ('test',)
    params = params_of_stage(best_params, i)
    with jax.transfer_guard(run.config.transfer_guard):
      ranks = _ranks(stage.model, evaluators, params, parts)
    if i == best:
      best_ranks, best_of_stage, scores = ranks, params, _scores(stage, data, ranks)
    records.append(
      {
        'name': stage.name,
        'moving': sorted(stage.trainable),  # The file keeps its first names for these two.
        'paths': [*stage.model.branches],
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
    'parameters': sum(x.size for x in jax.tree.leaves(run.shapes.params)),
    'seed': run.config.seed,
    'git': _git_version(),
  }
  # Kept apart from the results, which are the same whenever this version repeats the run.
  timing = {
    'device': devices.describe_devices(),
    'seconds': round(progress.seconds, 1),
    'jax': jax.__version__,
  }
  model = run.stages[best].model
  shown = shown_users.shown_users(run, model, data, best_of_stage, best_ranks['test'])
  if devices.is_main_process():
    archive = io.BytesIO()
    users = dataset.held_out('test')[0][data.protocol.is_counted(dataset, 'test')]
    np.savez(archive, users=users, ranks=best_ranks['test'])
    write_file(pathlib.Path(workdir) / 'test_ranks.npz', archive.getvalue())
    written = (('timing.json', timing), (shown_users.FILE, shown), ('results.json', results))
    for name, content in written:
      write_file(pathlib.Path(workdir) / name, json.dumps(content, indent=2) + '\n')
    write_report(workdir)
    say('\n'.join([results_table(results), '', *_next_lines(run, workdir)]))
  return results


def _next_lines(run: Run, workdir: str) -> list[str]:
  """Returns lines with the place of the report and two commands that use the run."""
  folder = shlex.quote(str(workdir))
  user = shlex.quote(first_user(run.config.data_dir))
  return [
    f'report   {pathlib.Path(workdir) / PAGE}',
    f'next     python -m ur4rec_jax.recommend --workdir={folder} --user={user}',
    f'         python -m ur4rec_jax.export --workdir={folder} --out={folder}/export',
  ]


def evaluate_workdir(config: ConfigDict, workdir: str) -> dict:
  """Evaluates a run's best parameters again; prints the table, and on stdout one line of JSON.

  Args:
    config: the run's config; `evaluation` and `followers` may differ, as they only rank.
    workdir: a folder that `train_and_evaluate` wrote.

  Returns:
    `model`, `protocol`, `valid`, `test`, `by_popularity`, `baselines` and, if users had held-out
    items before, `by_target`, as in `results.json`.

  Raises:
    InputError: the folder holds no run or another one.
  """
  run = open_run(config)
  if not check_workdir(workdir, run, free=('evaluation.', 'followers.')):
    raise InputError(f'--workdir {workdir}: no run here; train first with --mode=train')
  keep_compiled_programs(workdir, config.compilation_cache)
  run.check_targets()
  stage, params = restore_best(run, workdir)
  data = run.eval_data()
  with jax.transfer_guard(config.transfer_guard):
    ranks = rank_held_out(stage.model, data, params, PARTS)
  results = _scores(stage, data, ranks)
  if devices.is_main_process():
    print(results_table(results), file=sys.stderr)
    print(json.dumps(results))
  return results


def rank_held_out(
  model: UR4Rec, data: EvalData, params: PyTree, parts: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns by part the ranks of the held-out items that count, in the users' order.

  Args:
    model: the model with the branches that rank, and their fusion.
    data: inputs of the evaluation, on the devices.
    params: on the devices, as `data.embeddings` says.
    parts: some of `PARTS`.
  """
  evaluators = Evaluators(data._replace(params_axes=data.embeddings.axes(params)))
  return _ranks(model, evaluators, params, parts)


def _ranks(
  model: UR4Rec, evaluators: Evaluators, params: PyTree, parts: Sequence[str]
) -> dict[str, np.ndarray]:
  return {part: evaluators.get(model, part)(params) for part in parts}


def _scores(stage: Stage, data: EvalData, ranks: dict[str, np.ndarray]) -> dict[str, dict]:
  """Returns the model's name, the protocol, metrics of both parts by popularity, and baselines."""
  dataset = data.dataset
  groups = metrics.popularity_groups(dataset.train_item_counts())
  targets, by_target = {}, {}
  for part in PARTS:
    is_counted, is_repeated = data.protocol.is_counted(dataset, part), dataset.is_repeated(part)
    targets[part] = dataset.held_out(part)[1][is_counted]
    by_target[part] = metrics.metrics_by_target(ranks[part], is_repeated, is_counted)
  has_repeats = any('repeated' in found for found in by_target.values())
  is_honest = stage.config.train_on == 'training'
  trained_on = {} if is_honest else {'trained_on': 'all interactions, the held-out ones, too'}
  return {
    'model': ' + '.join(stage.model.summands),
    'protocol': data.protocol.describe(dataset) | trained_on,
    **{part: metrics.ranking_metrics(ranks[part]) for part in PARTS},
    'by_popularity': {
      part: metrics.metrics_by_group(ranks[part], groups[targets[part]]) for part in PARTS
    },
    **({'by_target': by_target} if has_repeats else {}),
    'baselines': baseline_metrics(dataset, 'test', data.protocol),
  }


def results_table(results: dict) -> str:
  """Formats the test metrics beside both baselines, under the name of the protocol.

  Below are the test NDCG@10 by popularity of the held-out item and, if the model is worse than
  popularity, a warning.
  """
  stages = results.get('stages', [])
  stages = stages if len(stages) > 1 else []
  rows = {
    **{name: results['baselines'][name] for name in ('random', 'popularity')},
    **{f'{i} {stage["name"]}': stage['test'] for i, stage in enumerate(stages, 1)},
    results['model']: results['test'],
    f'{results["model"]} (valid)': results['valid'],
    **{f'{results["model"]} ({kind})': values for kind, values in targets_apart(results).items()},
  }
  names = [name for name in results['test'] if name != 'users']
  width = max(map(len, rows))
  protocol = ', '.join(f'{name}: {value}' for name, value in results['protocol'].items())
  lines = [
    f'\ntest, {counted(results["test"]["users"], "user")}; {protocol}',
    ' ' * width + ''.join(f'{name:>10}' for name in names),
  ]
  for row, values in rows.items():
    digits = [1 if name == 'mean_rank' else 4 for name in names]
    cells = ''.join(f'{values[n]:>10.{d}f}' for n, d in zip(names, digits, strict=True))
    lines.append(f'{row:<{width}}{cells}')
  groups = [
    f'{name} {values["ndcg@10"]:.4f} ({counted(values["users"], "user")})'
    for name, values in results['by_popularity']['test'].items()
  ]
  lines.append(f'test ndcg@10 by popularity of the item: {", ".join(groups)}')
  if note := repeated_targets(results):
    lines.append(note)
  if warning := below_popularity(results):
    lines.append(f'warning: {warning}')
  return '\n'.join(lines)


def _git_version() -> str | None:
  """Returns the commit of the source tree, with `-dirty` if it has changes.

  Returns None outside a checkout, also if the package is installed inside another repository.
  """
  source = pathlib.Path(__file__)
  tracked = ['git', 'ls-files', '--error-unmatch', source.name]
  describe = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
  options = {'cwd': source.parent, 'capture_output': True, 'text': True, 'check': False}
  try:
    if subprocess.run(tracked, **options).returncode:
      return None
    return subprocess.run(describe, **options).stdout.strip() or None
  except OSError:
    return None

"""Compares branches and fusions: ranks with the parameters of finished runs in several ways.

  python -m benchmarks.quality.fusions --name=ml-100k-multimodal --workdir=runs/ml-100k-multimodal \
    --seeds=0,1,2,3,4

Nothing is trained: only the scores differ. Writes `benchmarks/results/fusions/NAME.json`, from
which `benchmarks.quality.accuracy` makes a table of docs/results.md. NAME must be the name of
stored results.
"""

import argparse
import pathlib
from typing import Any

from ml_collections import ConfigDict

from benchmarks.quality.accuracy import name_of_results, seeds_of, store_beside
from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.evaluation import protocol
from ur4rec_jax.evaluation.metrics import ranking_metrics
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.runs import results
from ur4rec_jax.runs.open_run import Run, restore_best
from ur4rec_jax.runs.workdir import open_stored_run
from ur4rec_jax.sharding import devices
from ur4rec_jax.training.stages import Stage
from ur4rec_jax.training.train_state import PyTree

WAYS = {
  'as trained': {},
  'sasrec alone': {'branches': ('sasrec',)},
  'retriever alone': {'branches': ('retriever',)},
  **{
    f'weighted {weight:g} : {1 - weight:g}': {'fusion.weights': (weight, 1 - weight)}
    for weight in (0.8, 0.6, 0.5, 0.4, 0.2)
  },
  'weighted 0.5 : 0.5, standardise': {
    'fusion.weights': (0.5, 0.5),
    'fusion.calibration': 'standardise',
  },
  'rank 0.5 : 0.5': {'fusion.kind': 'rank', 'fusion.weights': (0.5, 0.5)},
  'cascade, best 100': {'fusion.kind': 'cascade', 'fusion.cascade_size': 100},
}


def load_finished(workdir: pathlib.Path) -> tuple[Run, Stage, PyTree]:
  """Opens a finished run.

  Returns:
    The run, its best stage, and the parameters of that stage.

  Raises:
    InputError: there is no finished run.
  """
  if not (workdir / 'results.json').exists():
    raise InputError(f'{workdir}: no finished run here')
  run = open_stored_run(workdir)
  return run, *restore_best(run, str(workdir))


def rank_in_all_ways(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
  """Returns the validation and test NDCG@10 of a finished run for each entry of `WAYS`.

  Raises:
    InputError: there is no finished run, or its best stage does not rank by the weighted sum of two
      branches.
  """
  run, stage, params = load_finished(workdir)
  config = stage.config
  if len(config.branches) < 2 or config.fusion.kind != 'weighted':
    raise InputError(
      f'{workdir}: not a run of two branches whose best stage ranks by the weighted sum of both'
    )
  data, params, found = run.eval_data(), devices.replicate(params), {}
  for name, changes in WAYS.items():
    branches = changes.get('branches', config.branches)
    if config.retriever.query == 'proxies' and 'sasrec' not in branches:
      continue  # The proxies need SASRec's states.
    changed = ConfigDict(config.to_dict())
    with changed.ignore_type():
      changed.update_from_flattened_dict(changes)
    model = create_model(changed, run.dataset.num_items)
    ranks = results.rank_held_out(model, data, params, protocol.PARTS)
    found[name] = {part: ranking_metrics(of)['ndcg@10'] for part, of in ranks.items()}
  return found


@exit_on_reported_error
def main() -> None:
  """Ranks the runs, stores their NDCG@10 and writes the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--name', type=name_of_results, required=True, help='name of stored results')
  parser.add_argument('--workdir', required=True, help='folder of the runs, one for each seed')
  parser.add_argument('--seeds', type=seeds_of, default='0,1,2', help='comma-separated numbers')
  flags = parser.parse_args()
  runs: list[dict[str, Any]] = []
  for seed in flags.seeds:
    found = rank_in_all_ways(pathlib.Path(flags.workdir) / f'seed{seed}')
    runs.append({'seed': seed, 'ways': found})
    for name, values in found.items():
      print(f'seed {seed}  {name:<36}valid {values["valid"]:.4f}  test {values["test"]:.4f}')
  store_beside(flags.name, 'fusions', runs)


if __name__ == '__main__':
  main()

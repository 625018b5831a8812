"""Compares the gradient of each loss with the gradient of the retrieval losses.

  python -m benchmarks.quality.loss_gradients --name=ml-100k-multimodal \
    --workdir=runs/ablation/seed23

A loss can fail to help because its gradient is too small or too large, because it points in the
same direction as that of the retrieval losses, or because it is at a right angle to it, so that
reducing the loss does not change the ranking. For a finished run, at the first and at the best
parameters, this program measures each loss, its weight, the length of its weighted gradient, and
its cosine to the gradient of the branches' own retrieval losses. Length and cosine cover the
parameters that the loss reaches. Gradients are means over `BATCHES` training batches with dropout.

Writes `benchmarks/results/loss_gradients/NAME.json`, from which `benchmarks.quality.accuracy` makes
a table of docs/results.md. NAME must be the name of stored results.
"""

import argparse
import math
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality.accuracy import name_of_results, store_beside
from benchmarks.quality.fusions import load_finished
from ur4rec_jax.data.input_pipeline import gather_batch, gather_preferences
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.models.fusion import GATES
from ur4rec_jax.models.ur4rec import BRANCHES
from ur4rec_jax.runs.open_run import Run
from ur4rec_jax.runs.train_loop import plan_batches
from ur4rec_jax.training.negatives import draw_all_negatives
from ur4rec_jax.training.objective import LossInputs, make_losses
from ur4rec_jax.training.seen_items import seen_items
from ur4rec_jax.training.stages import Stage
from ur4rec_jax.training.train_data import make_train_data
from ur4rec_jax.training.train_state import PyTree, create_train_state

BATCHES = 16


def measure(
  run: Run, stage: Stage, params_by_name: Mapping[str, PyTree]
) -> dict[str, dict[str, dict[str, float]]]:
  """Measures every loss at several parameters.

  Args:
    run: with features.
    stage: whose losses are measured.
    params_by_name: parameters at which gradients are taken.

  Returns:
    By name and loss its `value`, `weight`, `length` of the weighted gradient and `cosine`.
  """
  data = jax.device_put(make_train_data(run.dataset.train_part(), run.tables))
  batches = plan_batches(run)
  model, all_losses = stage.model, make_losses(stage, run.dataset.num_items)

  @jax.jit
  def losses_and_gradients(params, plan, key):
    dropout_key, negatives_key = jax.random.split(key)
    batch = gather_batch(data.item_ids, plan, model.max_length)
    target_ids = batch.targets.reshape(-1)
    targets = jnp.maximum(target_ids - 1, 0)
    negatives = draw_all_negatives(stage, targets, data, negatives_key)
    tokens = jnp.maximum((target_ids > 0).sum(), 1)

    def values(params):
      encoded, _ = model.apply(
        {'params': params},
        data.tables.items,
        batch.item_ids,
        batch.segment_ids,
        gather_preferences(data.tables.users, batch, data.preference_starts),
        deterministic=False,
        rngs={'dropout': dropout_key},
        method='encode',
        mutable=(GATES,),
      )
      seen = seen_items(batch) if stage.leaves_out_seen_items else None
      return all_losses(encoded, LossInputs(target_ids, target_ids, negatives, tokens, seen))

    return values(params), jax.jacrev(values)(params)

  def mean_over_batches(params):
    of_batches = []
    for i in range(BATCHES):
      epoch, step = divmod(i, batches.steps_per_epoch)
      plan = jax.tree.map(lambda x, step=step: x[step], batches.epoch(epoch))
      of_batches.append(losses_and_gradients(params, plan, jax.random.key(i)))
    return jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *of_batches)

  return {
    place: _compare(stage, params, *mean_over_batches(params))
    for place, params in params_by_name.items()
  }


def _compare(
  stage: Stage, params: PyTree, values: Mapping[str, float], gradients: Mapping[str, PyTree]
) -> dict[str, dict[str, float]]:
  """Returns the entries of `measure` for one set of parameters, from values and gradients."""
  weights = dict(stage.losses)
  if stage.model.uncertainty_weighting:
    weights = {name: math.exp(-params[f'log_variance_{name}']) for name in weights}
  weighted = {
    name: weights[name] * np.concatenate([x.reshape(-1) for x in jax.tree.leaves(gradient)])
    for name, gradient in gradients.items()
  }
  of_branches = sum(weighted[name] for name in BRANCHES if name in weighted)
  found = {}
  for name, gradient in weighted.items():
    length = np.linalg.norm(gradient)
    beside = np.linalg.norm(of_branches[gradient != 0])  # Only parameters that the loss reaches.
    found[name] = {
      'value': float(values[name]),
      'weight': float(weights[name]),
      'length': float(length / beside),
      'cosine': float(gradient @ of_branches / (length * beside)),
    }
  return found


def measure_run(workdir: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
  """Measures a finished run at its first and at its best parameters.

  Raises:
    InputError: there is no finished run.
  """
  run, stage, best = load_finished(workdir)
  optimizer = optax.identity()
  first = create_train_state(stage.model, optimizer, stage.config.seed, run.tables).params
  return measure(run, stage, {'first': first, 'best': best})


@exit_on_reported_error
def main() -> None:
  """Measures a run, stores the findings and writes the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--name', type=name_of_results, required=True, help='name of stored results')
  parser.add_argument('--workdir', required=True, help='folder of one finished run')
  flags = parser.parse_args()
  store_beside(flags.name, 'loss_gradients', measure_run(pathlib.Path(flags.workdir)))


if __name__ == '__main__':
  main()

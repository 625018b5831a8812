"""Measures the effect of each part of the multimodal model, by runs with half of the parts each.

  python -m benchmarks.quality.ablation --data_dir=data/movielens_100k --workdir=runs/ablation

Two runs that differ in one part also differ by chance, by some percent. So every run has another
half of the parts. Each part is in half of the runs, and each other part is in half of those
(Plackett & Burman, "The design of optimum multifactorial experiments", Biometrika 1946). The effect
of a part is the difference between the means of all runs with it and all runs without it. Runs 12
to 23 are runs 0 to 11 with all choices reversed. Together, the 24 runs separate the effect of a
part from the interaction of two others.

A run that has finished is not run again. The NDCG@10 of the runs is stored in
`benchmarks/results/ablation/NAME.json`; `benchmarks.quality.accuracy` makes a table of
docs/results.md from it.
"""

import argparse
import pathlib
import shlex
from typing import Any

import numpy as np

from benchmarks.quality.accuracy import name_of_results, seeds_of, store_beside, train_seeds
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.runs.sweep import read_run

CONFIG = 'configs/movielens_100k.py:multimodal'
COMMON = {'num_epochs': 80}
# The fields that a run overrides with the part, and without it. The eleventh part changes nothing:
# its effect shows how large the effects of chance are.
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "items' own texts and posters, not others'": ({}, {'shuffled_features': True}),
  "SASRec's items from content, not ids": ({}, {'sasrec.item_input': 'id'}),
  "ids in the retriever's items": ({'retriever.item_id': True}, {}),
  "attention between the history's modalities": ({}, {'retriever.cross_modal_blocks': 0}),
  'gates between modalities, not sums': ({}, {'retriever.fusion': 'add', 'content.fusion': 'add'}),
  'loss: consistency': ({}, {'loss.weights.consistency': 0.0}),
  'loss: info_nce': ({}, {'loss.weights.info_nce': 0.0}),
  'loss: diversity, of two vectors from all tokens': (
    {'loss.weights.diversity': 0.01, 'content.pooled_vectors': 2, 'max_item_tokens': 0},
    {},
  ),
  'loss: fused': ({'loss.weights.fused': 1.0}, {}),
  'losses weighted by uncertainty': ({'loss.weighting': 'uncertainty'}, {}),
  '(nothing)': ({}, {}),
}


def design() -> np.ndarray:
  """Returns `[24, 11]` bool, the parts of each run; see the module's docstring."""
  first = np.array([c == '+' for c in '++-+++---+-'])
  rows = np.array([*(np.roll(first, i) for i in range(11)), np.zeros(11, bool)])
  return np.concatenate([rows, ~rows])


def overrides(run: int) -> dict[str, Any]:
  """Returns the fields that a run overrides, including its seed."""
  fields = {'seed': run, **COMMON}
  for has_part, (with_part, without) in zip(design()[run], PARTS.values(), strict=True):
    fields |= with_part if has_part else without
  return fields


@exit_on_reported_error
def main() -> None:
  """Trains the runs, stores their NDCG@10 and writes the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument(
    '--name', type=name_of_results, default='ml-100k-multimodal', help='name of stored results'
  )
  parser.add_argument('--data_dir', required=True, help='folder of the prepared data')
  parser.add_argument('--workdir', required=True, help='folder of the runs')
  all_runs = ','.join(map(str, range(len(design()))))
  parser.add_argument(
    '--runs',
    type=seeds_of,
    default=all_runs,
    help='comma-separated: 0 to 11, 12 to 23 or all',
  )
  flags = parser.parse_args()
  runs = []
  for run in flags.runs:
    fields = [f'--config.{name}={value}' for name, value in overrides(run).items()]
    shown = ['python', '-m', 'ur4rec_jax.main', f'--config={CONFIG}', *fields]
    (folder,) = train_seeds(shlex.join(shown), flags.data_dir, pathlib.Path(flags.workdir), [run])
    results, _ = read_run(folder)
    parts = [name for name, has in zip(PARTS, design()[run], strict=True) if has]
    scores = {part: results[part]['ndcg@10'] for part in ('valid', 'test')}
    runs.append({'run': run, 'parts': parts, **scores})
  counts = [sum(name in run['parts'] for run in runs) for name in PARTS]
  if any(2 * count != len(runs) for count in counts):
    print(f'{len(runs)} runs, and some part is not in half of them: nothing is stored')
    return
  stored = {'config': CONFIG, 'common': COMMON, 'names': list(PARTS), 'runs': runs}
  store_beside(flags.name, 'ablation', stored)


if __name__ == '__main__':
  main()

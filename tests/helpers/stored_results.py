"""Stored results with known numbers, and a reader of Markdown tables."""

import json

import numpy as np

from ur4rec_jax.evaluation.metrics import metrics_by_group, ranking_metrics

GROUPS = np.array([0, 0, 2, 3])  # Head, tail and cold users; none of the torso.


BASE = [[1, 11, 3, 7], [1, 11, 1, 20]]


BETTER = [[1, 3, 3, 1], [1, 1, 1, 1]]


PROTOCOL = {'split': 'leave_one_out', 'candidates': 'all items', 'ties': 'against the model'}


def store(folder, name, ranks, *, is_old=False, dataset=None, protocol=PROTOCOL, **fields) -> None:
  """Writes NAME.json and NAME.npz, or only what there was before groups and ranks were kept."""
  runs = []
  for seed, ranks_of_seed in enumerate(np.array(ranks)):
    metrics = ranking_metrics(ranks_of_seed)
    run = {
      'dataset': {
        'name': 'Toys',
        'users': 4,
        'items': 1234,
        'interactions': 56789,
        'split_hash': 'abc',
      }
      | (dataset or {}),
      'protocol': protocol,
      'valid': {'ndcg@10': 0.2 + 0.1 * seed},
      'test': metrics,
      'baselines': {'popularity': {'ndcg@10': 0.0432}, 'random': {'ndcg@10': 0.0031}},
      'stages': [{'best_epoch': 10 + seed}],
      'seed': seed,
      'timing': {'seconds': 120.0, 'device': '1 x cpu'},
    }
    if not is_old:
      run |= {'parameters': 98765}
      run |= {'by_popularity': {'test': metrics_by_group(ranks_of_seed, GROUPS)}}
    runs.append(run)
  entry = {'command': f'python -m ur4rec_jax.main --config={name}.py', 'runs': runs} | fields
  (folder / f'{name}.json').write_text(json.dumps(entry))
  if not is_old:
    np.savez(folder / f'{name}.npz', ranks=np.array(ranks, np.int32))


def rows(text, *columns) -> dict[str, dict[str, str]]:
  """The rows, by their first cell, of the only table with these columns."""
  tables = [table.splitlines() for table in text.split('\n\n') if table.startswith('|')]
  cells = [[[c.strip() for c in line.split('|')[1:-1]] for line in table] for table in tables]
  (table,) = [table for table in cells if set(columns) <= set(table[0])]
  assert len({len(row) for row in table}) == 1
  return {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}

"""The summary that a run prints before it trains: parameters, data, batches, devices, features."""

from typing import Any

import jax

from ur4rec_jax.data.input_pipeline import TrainBatches
from ur4rec_jax.errors import counted
from ur4rec_jax.runs.config_checks import ignored_fields
from ur4rec_jax.runs.open_run import Run
from ur4rec_jax.sharding import devices
from ur4rec_jax.training.optimizers import by_name
from ur4rec_jax.training.train_state import TrainProgress

PyTree = Any


def run_summary(run: Run, batches: TrainBatches, progress: TrainProgress) -> str:
  """Returns the lines that training prints first."""
  counts, config = run.dataset.info['counts'], run.config
  filled = batches.tokens / (batches.steps_per_epoch * batches.rows * config.max_length)
  lines = [parameter_table(run.shapes.params, run.labels), ''] if config.parameter_table else []
  sizes = ', '.join(counted(counts[f'{noun}s'], noun) for noun in ('user', 'item', 'interaction'))
  lines += [
    f'model    {" + ".join(config.branches)}: {parameter_counts(run.shapes.params, run.labels)}',
    f'data     {run.dataset.info["name"]}: {sizes}, split {run.dataset.split_name} '
    f'{run.dataset.split_hash}',
    f'batches  {batches.steps_per_epoch} an epoch of {batches.rows} rows x {config.max_length} '
    f'tokens, {filled:.0%} filled, {batches.users / batches.steps_per_epoch:.0f} users each',
    f'devices  {devices.describe_devices()}, jax {jax.__version__}',
    *_feature_lines(run),
  ]
  if config.keep == 'last':
    lines.append('keep     the last parameters, after all epochs: patience ends no stage')
  if len(run.stages) > 1:
    lines += [f'{f"stage {i}":<9}{stage}' for i, stage in enumerate(run.stages, 1)]
  if ignored := ignored_fields(config):
    lines.append(f'note     not used by sasrec.block={config.sasrec.block}: {", ".join(ignored)}')
  if warning := repeats_warning(run):
    lines.append(warning)
  if progress.step:
    name = run.stages[len(progress.stages) - 1].name
    lines.append(f'resuming from step {progress.step}, in stage {name}')
  return '\n'.join(lines)


def repeats_warning(run: Run) -> str:
  """Warns of held-out items that do not count because their users had them before."""
  is_repeated = run.dataset.is_repeated('test')
  if run.protocol.keeps_seen or not is_repeated.any():
    return ''
  return (
    f'warning: {is_repeated.sum():,} of {len(is_repeated):,} test users ({is_repeated.mean():.0%}) '
    'have a test item that they had before. Such repeats do not count and are not recommended; set '
    '--config.evaluation.seen_items=keep if they should be'
  )


def _feature_lines(run: Run) -> list[str]:
  lines = []
  for of, features in run.dataset.all_features.items():
    for name, found in features.items():
      rows, tokens, width = found.shape
      origin = found.origin
      marks = ' (built in)' * origin['is_builtin'] + ' (mock texts)' * origin['is_mock']
      if writer := origin.get('written_by'):
        marks += f' (texts by {writer})'
      marks += ' (shuffled)' * origin['is_shuffled']
      marks += f' (first {found.max_tokens} read)' * bool(found.max_tokens)
      lines.append(
        f'features {of} {name}: {rows:,} x {tokens} tokens x {width}, {origin["encoder"]}{marks}, '
        f'{origin["fingerprint"][:16]}'
      )
  return lines


def parameter_counts(params: PyTree, labels: PyTree) -> str:
  """Returns the number of parameters, and how many are in each group."""
  counts: dict[str, int] = {}
  for x, label in zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True):
    counts[label] = counts.get(label, 0) + x.size
  parts = ', '.join(f'{label} {size:,}' for label, size in counts.items())
  return f'{sum(counts.values()):,} parameters' + (f' ({parts})' if len(counts) > 1 else '')


def parameter_table(params: PyTree, labels: PyTree) -> str:
  """Lists every parameter with its shape, size and label, and the total size."""
  rows = [
    (name, str(x.shape), x.size, label)
    for (name, x), label in zip(by_name(params).items(), jax.tree.leaves(labels), strict=True)
  ]
  rows.append(('total', '', sum(row[2] for row in rows), ''))
  width = max(len(row[0]) for row in rows)
  return '\n'.join(
    f'{name:<{width}}  {shape:>14} {size:>12,}  {label}' for name, shape, size, label in rows
  )

"""Refuses a config that cannot work, and a config that a started run cannot go on with."""

from typing import Any

from ml_collections import ConfigDict

from ur4rec_jax import splits
from ur4rec_jax.errors import InputError
from ur4rec_jax.models.sasrec import ITEM_INPUTS

_CHOICES = {
  'split': splits.NAMES,
  'crop': ('last', 'random'),
  'mapping': ('pmap', 'shard_map'),
  'model.item_input': ITEM_INPUTS,
  'model.norm': ('pre', 'post'),
  'model.dtype': ('float32', 'bfloat16'),
  'loss.name': ('softmax', 'sampled_softmax', 'bce', 'bpr', 'gbce'),
  'loss.negatives': ('uniform', 'popularity'),
  'optimizer.name': ('adamw', 'sgd'),
  'optimizer.schedule': ('constant', 'cosine'),
  'evaluation.candidates': ('all', 'uniform', 'popularity'),
  'transfer_guard': ('disallow', 'log', 'allow'),
}
_AT_LEAST = {
  'seed': 0,
  'evaluation.seed': 0,
  'max_length': 1,
  'batch_size': 1,
  'num_epochs': 1,
  'patience': 1,
  'validate_every_epochs': 1,
  'steps_per_dispatch': 1,
  'checkpoint.every_validations': 1,
  'checkpoint.max_to_keep': 1,
  'model.dim': 1,
  'model.num_blocks': 1,
  'model.num_heads': 1,
  'model.ffn_dim': 1,
  'model.content_dim': 1,
  'loss.num_negatives': 1,
  'loss.chunk_size': 1,
  'evaluation.num_candidates': 1,
  'evaluation.batch_size': 1,
  'optimizer.warmup_steps': 0,
  'optimizer.weight_decay': 0,
  'optimizer.clip_norm': 0,
}
_BELOW_ONE = ('model.dropout', 'model.content_dropout', 'optimizer.b1', 'optimizer.b2')
# These change neither what is computed nor what is stored, or only how far training goes.
_CHANGEABLE = (
  'data_dir',
  'num_epochs',
  'patience',
  'steps_per_dispatch',
  'mapping',
  'transfer_guard',
  'checkpoint.every_validations',
  'checkpoint.max_to_keep',
  'evaluation.batch_size',
)


def flatten(config: dict, prefix: str = '') -> dict[str, Any]:
  """Turns nested fields into dotted names."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = [*value] if isinstance(value, tuple) else value  # As JSON has it.
  return flat


def check_config(config: ConfigDict) -> None:
  """Raises InputError, naming the field and what it may be, if a field is missing or impossible."""
  fields = flatten(config.to_dict())
  others = ('data_dir', 'modalities', 'user_modalities')
  others += ('loss.calibration', 'optimizer.learning_rate')
  for name in (*_CHOICES, *_AT_LEAST, *_BELOW_ONE, *others):
    if name not in fields:
      raise InputError(f'config.{name} is missing; configs/default.py has every field')
  for name, choices in _CHOICES.items():
    if fields[name] not in choices:
      raise InputError(f'config.{name}={fields[name]!r}: must be one of {", ".join(choices)}')
  for name, least in _AT_LEAST.items():
    if not fields[name] >= least:
      raise InputError(f'config.{name}={fields[name]}: must be at least {least}')
  if not fields['optimizer.learning_rate'] > 0:
    raise InputError('config.optimizer.learning_rate: must be above 0')
  for name in _BELOW_ONE:
    if not 0 <= fields[name] < 1:
      raise InputError(f'config.{name}={fields[name]}: must be in [0, 1)')
  if not 0 <= fields['loss.calibration'] <= 1:
    raise InputError(f'config.loss.calibration={fields["loss.calibration"]}: must be in [0, 1]')
  if bool(fields['modalities']) != ('content' in fields['model.item_input']):
    raise InputError(
      f'config.modalities={fields["modalities"]} with config.model.item_input='
      f'{fields["model.item_input"]}: content needs modalities, and modalities are for content; '
      'set both, e.g. --config.modalities=text --config.model.item_input=id+content'
    )
  if fields['model.dim'] % fields['model.num_heads']:
    raise InputError(
      f'config.model.num_heads={fields["model.num_heads"]}: must divide '
      f'config.model.dim={fields["model.dim"]}'
    )


def check_unchanged(started: dict, current: dict, workdir: str, free: tuple[str, ...] = ()) -> None:
  """Raises InputError, naming the field, if a started run cannot go on with this config.

  Args:
    started: config that the run was started with, as nested dicts.
    current: config now.
    workdir: the run's folder, for the message.
    free: fields whose names start with one of these may differ.
  """
  before, now = flatten(started), flatten(current)
  fixed = set(before) | set(now)
  fixed -= set(_CHANGEABLE)
  if now.get('optimizer.schedule') == 'cosine':
    fixed.add('num_epochs')  # The schedule is stretched over them.
  for name in sorted(fixed):
    if before.get(name) != now.get(name) and not name.startswith(free):
      raise InputError(
        f'config.{name} is {now.get(name)!r}, but the run in {workdir} was started with '
        f'{before.get(name)!r}, and its checkpoints do not fit; set it back or use another '
        '--workdir'
      )

"""Refuses a config that cannot work, and a config that a started run cannot go on with."""

from typing import Any

from ml_collections import ConfigDict

from ur4rec_jax.data import splits
from ur4rec_jax.errors import InputError
from ur4rec_jax.models.fusion import BRANCH_FUSIONS, CALIBRATIONS, MODALITY_FUSIONS, SUMS
from ur4rec_jax.models.retriever import QUERIES
from ur4rec_jax.models.sasrec import ITEM_INPUTS, NORMS
from ur4rec_jax.models.ur4rec import BRANCHES, retrieval_losses
from ur4rec_jax.training.losses import DIVERSITIES, RETRIEVAL_LOSSES
from ur4rec_jax.training.optimizers import GROUPS, SCHEDULES
from ur4rec_jax.training.stages import ALTERNATIONS, STARTS, stage_config

_CHOICES = {
  'split': splits.NAMES,
  'crop': ('last', 'random'),
  'mapping': ('pmap', 'shard_map'),
  'dtype': ('float32', 'bfloat16'),
  'sasrec.item_input': ITEM_INPUTS,
  'sasrec.norm': NORMS,
  'retriever.query': QUERIES,
  'retriever.norm': NORMS,
  'retriever.fusion': MODALITY_FUSIONS,
  'content.fusion': MODALITY_FUSIONS,
  'fusion.kind': BRANCH_FUSIONS,
  'fusion.calibration': CALIBRATIONS,
  'loss.name': RETRIEVAL_LOSSES,
  'loss.retriever_name': RETRIEVAL_LOSSES,
  'loss.negatives': ('uniform', 'popularity'),
  'loss.weighting': ('fixed', 'uncertainty'),
  'loss.diversity': DIVERSITIES,
  'optimizer.name': ('adamw', 'sgd'),
  'optimizer.schedule': SCHEDULES,
  'optimizer.item_embeddings': ('all', 'touched', 'sharded'),
  'evaluation.candidates': ('all', 'uniform', 'popularity'),
  'transfer_guard': ('disallow', 'log', 'allow'),
}
_AT_LEAST = {
  'seed': 0,
  'evaluation.seed': 0,
  'max_item_tokens': 0,
  'max_length': 1,
  'batch_size': 1,
  'num_epochs': 1,
  'patience': 1,
  'validate_every_epochs': 1,
  'steps_per_dispatch': 1,
  'checkpoint.every_validations': 1,
  'checkpoint.max_to_keep': 1,
  'sasrec.dim': 1,
  'sasrec.num_blocks': 1,
  'sasrec.num_heads': 1,
  'sasrec.ffn_dim': 1,
  'retriever.dim': 1,
  'retriever.num_blocks': 0,
  'retriever.num_heads': 1,
  'retriever.ffn_dim': 1,
  'retriever.cross_modal_blocks': 0,
  'retriever.num_proxies': 1,
  'content.hidden_dim': 1,
  'content.cross_modal_blocks': 0,
  'content.num_heads': 1,
  'content.pooled_vectors': 1,
  'fusion.hidden_dim': 1,
  'fusion.rank_constant': 0,
  'fusion.cascade_size': 1,
  'loss.contrast_items': 2,
  'loss.weights.sasrec': 0,
  'loss.weights.retriever': 0,
  'loss.weights.fused': 0,
  'loss.weights.consistency': 0,
  'loss.weights.info_nce': 0,
  'loss.weights.diversity': 0,
  'loss.weights.contrast': 0,
  'loss.weights.matching': 0,
  'loss.num_negatives': 1,
  'loss.chunk_size': 1,
  'evaluation.num_candidates': 1,
  'evaluation.batch_size': 1,
  'optimizer.warmup_steps': 0,
  'optimizer.weight_decay': 0,
  'optimizer.clip_norm': 0,
}
_ABOVE_ZERO = (
  'optimizer.learning_rate',
  *(f'optimizer.learning_rate_scales.{group}' for group in GROUPS),
  'sasrec.item_scale',
  'retriever.temperature',
  'loss.temperature',
  'checkpoint.grace_seconds',
)
# The same for each record of config.stage.
_STAGE_CHOICES = {
  'schedule': SCHEDULES,
  'alternation_rule': ALTERNATIONS,
  'start_next_with': STARTS,
}
_STAGE_AT_LEAST = {
  'num_epochs': 1,
  'num_steps': 0,
  'validate_every_epochs': 1,
  'patience': 1,
  'warmup_steps': 0,
  'alternation_steps': 1,
}
_AT_MOST_ONE = ('loss.calibration', 'sasrec.whitening')
_BELOW_ONE = (
  'sasrec.dropout',
  'retriever.dropout',
  'content.dropout',
  'optimizer.b1',
  'optimizer.b2',
)
_DIVIDES = (
  ('sasrec.num_heads', 'sasrec.dim'),
  ('retriever.num_heads', 'retriever.dim'),
  ('content.num_heads', 'content.hidden_dim'),
)
# These change neither what is computed nor what is stored, or only how far training goes.
_CHANGEABLE = (
  'data_dir',
  'compilation_cache',
  'steps_per_dispatch',
  'mapping',
  'transfer_guard',
  'checkpoint.every_validations',
  'checkpoint.max_to_keep',
  'checkpoint.grace_seconds',
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
  of_stages = lambda rules: {
    f'stage.{n}.{f}': rule for n in config.stage for f, rule in rules.items()
  }
  choices_of = _CHOICES | of_stages(_STAGE_CHOICES)
  at_least = _AT_LEAST | of_stages(_STAGE_AT_LEAST)
  above_zero = (*_ABOVE_ZERO, *of_stages({'learning_rate_scale': 0}))
  others = ('data_dir', 'modalities', 'user_modalities', 'branches')
  others += ('shuffled_features', 'retriever.item_id', 'fusion.weights')
  others += (
    'stages',
    *of_stages({'trainable': (), 'losses': (), 'alternation': ()}),
    'compilation_cache',
  )
  for name in (*choices_of, *at_least, *above_zero, *_BELOW_ONE, *_AT_MOST_ONE, *others):
    if name not in fields:
      raise InputError(f'config.{name} is missing; configs/default.py has every field')
  for name, choices in choices_of.items():
    if fields[name] not in choices:
      raise InputError(f'config.{name}={fields[name]!r}: must be one of {", ".join(choices)}')
  for name, least in at_least.items():
    if not fields[name] >= least:
      raise InputError(f'config.{name}={fields[name]}: must be at least {least}')
  for name in above_zero:
    if not fields[name] > 0:
      raise InputError(f'config.{name}={fields[name]}: must be above 0')
  for name in _BELOW_ONE:
    if not 0 <= fields[name] < 1:
      raise InputError(f'config.{name}={fields[name]}: must be in [0, 1)')
  for name in _AT_MOST_ONE:
    if not 0 <= fields[name] <= 1:
      raise InputError(f'config.{name}={fields[name]}: must be in [0, 1]')
  for name, width in _DIVIDES:
    if fields[width] % fields[name]:
      raise InputError(f'config.{name}={fields[name]}: must divide config.{width}={fields[width]}')
  _check_paths(fields)
  _check_losses(fields)
  _check_item_rows(config)
  _check_stages(config)


def _check_paths(fields: dict[str, Any]) -> None:
  branches = fields['branches']
  if not branches or branches != [name for name in BRANCHES if name in branches]:
    raise InputError(
      f'config.branches={branches}: must be some of {", ".join(BRANCHES)}, in this order'
    )
  weights = fields['fusion.weights']
  if len(branches) > 1 and (len(weights) != len(branches) or min(weights) <= 0):
    raise InputError(f'config.fusion.weights={weights}: must be one number above 0 for each branch')
  reads_content = 'retriever' in branches or fields['sasrec.item_input'] != 'id'
  if bool(fields['modalities']) != reads_content:
    raise InputError(
      f'config.modalities={fields["modalities"]} with config.branches={branches} and '
      f'config.sasrec.item_input={fields["sasrec.item_input"]}: content needs modalities, and '
      'modalities are for content; add --config.modalities=text, or take a variant that reads '
      'texts, e.g. --config=configs/movielens_100k.py:text'
    )
  if fields['user_modalities'] and 'retriever' not in branches:
    raise InputError(
      f'config.user_modalities={fields["user_modalities"]} with config.branches={branches}: only '
      'the retriever reads them; leave them out, or take a variant with a retriever'
    )
  if (
    'retriever' in branches and fields['retriever.query'] == 'proxies' and 'sasrec' not in branches
  ):
    raise InputError(
      "config.retriever.query='proxies': its queries start from the states of the branch sasrec; "
      "set config.branches=('sasrec', 'retriever')"
    )


def _check_losses(fields: dict[str, Any]) -> None:
  branches = fields['branches']
  has_proxies = 'retriever' in branches and fields['retriever.query'] == 'proxies'
  needs = {
    **{f'loss.weights.{name}': (name in branches, f'the branch {name}') for name in BRANCHES},
    'loss.weights.fused': (
      len(branches) > 1 and fields['fusion.kind'] in SUMS,
      f'two branches and a fusion that is a sum: {", ".join(SUMS)}',
    ),
    'loss.weights.contrast': (has_proxies, "the branch retriever with retriever.query='proxies'"),
    'loss.weights.matching': ('retriever' in branches, 'the branch retriever'),
    'loss.weights.consistency': (len(fields['modalities']) > 1, 'two modalities'),
    'loss.weights.info_nce': (len(fields['modalities']) > 1, 'two modalities'),
    'loss.weights.diversity': (
      bool(fields['modalities']) and fields['content.pooled_vectors'] > 1,
      'modalities, and content.pooled_vectors above 1',
    ),
  }
  for name, (is_met, need) in needs.items():
    if fields[name] and not is_met:
      raise InputError(f'config.{name}={fields[name]}: needs {need}; set it to 0')
  for branch in branches:
    if not (fields[f'loss.weights.{branch}'] or fields['loss.weights.fused']):
      raise InputError(f'config.loss.weights.{branch}=0: nothing would train the branch {branch}')


def _check_item_rows(config: ConfigDict) -> None:
  rows = config.optimizer.item_embeddings
  if rows == 'all':
    return
  for branch, name in retrieval_losses(config.loss).items():
    if rows == 'touched' and name == 'softmax':
      field = 'retriever_name' if branch == 'retriever' else 'name'
      raise InputError(
        f"config.optimizer.item_embeddings='touched' with config.loss.{field}='softmax', which "
        f'reads all items: take a sampled loss, e.g. --config.loss.{field}=sampled_softmax '
        '--config.loss.num_negatives=1000; or item_embeddings=sharded, where each device trains '
        'its own'
      )
  is_fused = len(config.branches) > 1 and (rows == 'sharded' or config.loss.weights.fused)
  if is_fused and config.fusion.kind in SUMS and config.fusion.calibration == 'standardise':
    raise InputError(
      f"config.optimizer.item_embeddings='{rows}' with config.fusion.calibration='standardise', "
      'which reads all items: set config.fusion.calibration=log_probability'
    )
  if is_fused and rows == 'sharded' and config.fusion.kind not in SUMS:
    raise InputError(
      f"config.optimizer.item_embeddings='sharded' with config.fusion.kind='{config.fusion.kind}', "
      f'which ranks all items of each branch in one place: take {" or ".join(SUMS)}'
    )


def _check_stages(config: ConfigDict) -> None:
  for name in config.stages:
    if name not in config.stage:
      raise InputError(
        f'config.stages={tuple(config.stages)}: {name!r} is no stage; known: '
        f'{", ".join(config.stage)}. A config file can add one as config.stage.{name}'
      )
    stage_config(config, name)
  if not config.stages:
    raise InputError(f'config.stages=(): needs at least one of {", ".join(config.stage)}')


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
  fixed -= {'num_epochs', 'patience'}  # What counts is what the stages take over from them.
  last = f'stage.{now["stages"][-1]}'
  if now['stages'].count(now['stages'][-1]) == 1:  # It is the only stage that cannot have ended.
    fixed.discard(f'{last}.patience')
    if now.get(f'{last}.schedule') != 'cosine':  # Which is stretched over the steps.
      fixed -= {f'{last}.num_epochs', f'{last}.num_steps'}
  in_use = tuple(f'stage.{name}.' for name in now['stages'])
  fixed = {name for name in fixed if not name.startswith('stage.') or name.startswith(in_use)}
  for name in sorted(fixed):
    if before.get(name) != now.get(name) and not name.startswith(free):
      raise InputError(
        f'config.{name} is {now.get(name)!r}, but the run in {workdir} was started with '
        f'{before.get(name)!r}, and its checkpoints do not fit; set it back or use another '
        '--workdir'
      )

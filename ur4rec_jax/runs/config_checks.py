"""Refuses configs that cannot work or that a started run cannot go on with; finds idle fields."""

import math
from typing import Any

from ml_collections import ConfigDict

from ur4rec_jax.errors import InputError
from ur4rec_jax.models.fusion import SUMS
from ur4rec_jax.models.ur4rec import BRANCHES
from ur4rec_jax.runs.extensions import load_extensions
from ur4rec_jax.runs.knobs import CHANGEABLE, KNOBS, knobs_of, no_such_field
from ur4rec_jax.runs.trackers import OPEN
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings
from ur4rec_jax.training.stages import retrieval_losses, stage_config

# Fields of the branch sasrec that its recurrent layers do not use.
_OF_TRANSFORMERS = ('num_heads', 'ffn_dim', 'norm', 'activation', 'window', 'filter_width')
_DIVIDES = (
  ('sasrec.num_heads', 'sasrec.dim'),
  ('retriever.num_heads', 'retriever.dim'),
  ('content.num_heads', 'content.hidden_dim'),
)


def flatten(config: dict, prefix: str = '') -> dict[str, Any]:
  """Flattens nested fields to dotted names."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = [*value] if isinstance(value, tuple) else value  # As in JSON.
  return flat


def check_config(config: ConfigDict) -> None:
  """Raises InputError, naming the field and what it may be, if a config cannot work.

  A field may be unknown, missing or impossible by itself (`knobs.KNOBS`), or not fit the others.
  """
  if not isinstance(config.get('stage'), ConfigDict):
    raise InputError('config.stage is missing; it holds a record for each stage')
  if not KNOBS['extensions'].problem(extensions := config.get('extensions', ())):
    load_extensions(extensions)
  knobs, fields = knobs_of(config), flatten(config.to_dict())
  for name in fields:
    if name not in knobs:
      raise InputError(f'config.{no_such_field(name, knobs)}')
  for name, knob in knobs.items():
    if name not in fields:
      raise InputError(
        f'config.{name} is missing; a config file starts from ur4rec_jax.default_config(), '
        'which has every field'
      )
    if problem := knob.problem(fields[name]):
      raise InputError(f'config.{name}={fields[name]!r}: {problem}')
  for name, width in _DIVIDES:
    if fields[width] % fields[name]:
      raise InputError(f'config.{name}={fields[name]}: must divide config.{width}={fields[width]}')
  head_width = fields['sasrec.dim'] // fields['sasrec.num_heads']
  if fields['sasrec.positions'] == 'rotary' and head_width % 2:
    raise InputError(
      "config.sasrec.positions='rotary' turns pairs of numbers, so config.sasrec.dim="
      f'{fields["sasrec.dim"]} '
      f'must be an even multiple of config.sasrec.num_heads={fields["sasrec.num_heads"]}'
    )
  if unknown := [name for name in fields['trackers'] if name not in OPEN]:
    raise InputError(
      f'config.trackers={fields["trackers"]}: {unknown[0]} is none of {", ".join(OPEN)}'
    )
  if fields['optimizer.name'] == 'sgd' and fields['optimizer.weight_decay']:
    raise InputError(
      f'config.optimizer.weight_decay={fields["optimizer.weight_decay"]} with'
      " config.optimizer.name='sgd', which has none: set it to 0, or take adamw"
    )
  _check_warm_start(fields)
  _check_branches(fields)
  _check_losses(fields)
  _check_item_embeddings(config)
  _check_streaming(config)
  _check_stages(config)


def ignored_fields(config: ConfigDict) -> list[str]:
  """Returns the fields of a config, as NAME=VALUE, that are set and change nothing.

  They are allowed, because a config for transformers also serves to try recurrent layers.
  """
  sasrec = config.sasrec
  if 'sasrec' not in config.branches or sasrec.block != 'gru':
    return []
  names = [name for name in _OF_TRANSFORMERS if sasrec[name] != KNOBS[f'sasrec.{name}'].default]
  if sasrec.positions == 'rotary':
    names.append('positions')
  return [f'sasrec.{name}={sasrec[name]}' for name in names]


def _check_warm_start(fields: dict[str, Any]) -> None:
  for name in ('init.moments', 'init.replay'):
    if fields[name] != KNOBS[name].default and not fields['init.run']:
      raise InputError(
        f'config.{name}={fields[name]!r}: says how to go on from another run; name it with'
        f' --init_from=RUN, or set config.{name}={KNOBS[name].default!r}'
      )


def _check_branches(fields: dict[str, Any]) -> None:
  branches = fields['branches']
  if not branches or branches != [name for name in BRANCHES if name in branches]:
    raise InputError(
      f'config.branches={branches}: must be some of {", ".join(BRANCHES)}, in this order'
    )
  weights = fields['fusion.weights']
  are_weights = len(weights) == len(branches) and all(0 < weight < math.inf for weight in weights)
  if len(branches) > 1 and not are_weights:
    raise InputError(f'config.fusion.weights={weights}: must be one number above 0 for each branch')
  if fields['followers.weight'] and len(branches) > 1 and fields['fusion.kind'] not in SUMS:
    raise InputError(
      f'config.followers.weight={fields["followers.weight"]}: is added to sums of scores, and '
      f"config.fusion.kind='{fields['fusion.kind']}' compares ranks: take {' or '.join(SUMS)}"
    )
  reads_content = 'retriever' in branches or fields['sasrec.item_input'] != 'id'
  if bool(fields['modalities']) != reads_content:
    raise InputError(
      f'config.modalities={fields["modalities"]} with config.branches={branches} and '
      f'config.sasrec.item_input={fields["sasrec.item_input"]}: content needs modalities, and '
      'modalities are for content; add --config.modalities=text, or take a variant that reads '
      'texts, e.g. --config=movielens_100k:text'
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
    'loss.weights.same_target': ('sasrec' in branches, 'the branch sasrec'),
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


def _check_streaming(config: ConfigDict) -> None:
  """Refuses a loss that draws from all interactions if devices hold only those of some steps."""
  losses = retrieval_losses(config.loss).values()
  by_popularity = 'sampled_softmax' in losses and config.loss.negatives == 'popularity'
  if by_popularity and not config.data_in_memory:
    raise InputError(
      "config.data_in_memory=False with config.loss.negatives='popularity', which draws from all "
      'interactions: set --config.loss.negatives=uniform, or --config.data_in_memory=True'
    )


def _check_item_embeddings(config: ConfigDict) -> None:
  embeddings = ItemEmbeddings(config.optimizer.item_embeddings, num_items=0)
  if not embeddings.is_partial:
    return
  for branch, name in retrieval_losses(config.loss).items():
    if not embeddings.is_sharded and name == 'softmax':
      field = 'retriever_name' if branch == 'retriever' else 'name'
      raise InputError(
        f"config.optimizer.item_embeddings='touched' with config.loss.{field}='softmax', which "
        f'reads all items: take a sampled loss, e.g. --config.loss.{field}=sampled_softmax '
        '--config.loss.num_negatives=1000; or item_embeddings=sharded, where each device trains '
        'its own'
      )
  is_fused = len(config.branches) > 1 and (embeddings.is_sharded or config.loss.weights.fused)
  if is_fused and config.fusion.kind in SUMS and config.fusion.calibration == 'standardise':
    raise InputError(
      f"config.optimizer.item_embeddings='{embeddings.policy}' with "
      "config.fusion.calibration='standardise', which reads all items: set "
      'config.fusion.calibration=log_probability'
    )
  if is_fused and embeddings.is_sharded and config.fusion.kind not in SUMS:
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
  if config.train_on == 'all' and (config.keep == 'best' or len(config.stages) > 1):
    raise InputError(
      f"config.train_on='all' with config.keep={config.keep!r} and {len(config.stages)} stages:"
      ' nothing is held out by which the best parameters could be chosen; set config.keep=last and'
      ' train one stage'
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
  fixed = (before.keys() | now.keys()) - CHANGEABLE
  fixed -= {'num_epochs', 'patience'}  # Defaults of the stages, whose values are compared instead.
  last = f'stage.{now["stages"][-1]}'
  if now['stages'].count(now['stages'][-1]) == 1:  # An earlier stage of this name may have ended.
    fixed.discard(f'{last}.patience')
    if now.get(f'{last}.schedule') != 'cosine':  # A cosine depends on the number of steps.
      fixed -= {f'{last}.num_epochs', f'{last}.num_steps'}
  in_use = tuple(f'stage.{name}.' for name in now['stages'])
  fixed = {name for name in fixed if not name.startswith('stage.') or name.startswith(in_use)}
  for name in sorted(fixed):
    if before.get(name) != now.get(name) and not name.startswith(free):
      field = name.rpartition('.')[2]
      way_out = 'set it back'
      if field in ('num_epochs', 'num_steps', 'patience') and f'{last}.{field}' not in fixed:
        way_out += f'; only the last stage can go on for longer: --config.{last}.{field}=NUMBER'
      raise InputError(
        f'config.{name} is {now.get(name)!r}, but the run in {workdir} was started with '
        f'{before.get(name)!r}, and its checkpoints do not fit; {way_out}, or use another --workdir'
      )

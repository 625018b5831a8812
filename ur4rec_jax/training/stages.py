"""Stages of training as data: which parameters are trained, with which losses, for how long."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation.protocol import LEAVE_OUT
from ur4rec_jax.models.sasrec import OF_CONTENT
from ur4rec_jax.models.ur4rec import BRANCHES, FUSED, UR4Rec, create_model, losses_in_use
from ur4rec_jax.training.optimizers import GROUPS, RateSchedule, by_name, group_of
from ur4rec_jax.training.seen_items import AS_EVALUATION
from ur4rec_jax.training.train_state import StageState

Array = jax.Array
PyTree = Any
ALL = 'all'
OF_RETRIEVER = ('contrast', 'matching')  # Losses that need the retriever's own vectors.
OF_SASREC = ('same_target',)  # These read states of the branch sasrec.
ALTERNATIONS = ('steps', 'adaptive')
STARTS = ('best', 'last')
_TOWERS = {'retriever': ('user_tower', 'content_tower')}


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage; fields without an explanation are those of `config.stage.NAME`.

  Attributes:
    name: name of the stage.
    config: the run's config with only the stage's losses and the branches that they read.
    model: the part of the run's model that the stage trains.
    losses: weight of each loss of the stage.
    retrieval_losses: by branch, the name of its loss over scores; `fused` is the fusion.
    trainable: labels of the parameters that are trained.
    alternation: labels that are trained in each turn; one turn if nothing alternates.
  """

  name: str
  config: ConfigDict
  model: UR4Rec
  losses: Mapping[str, float]
  retrieval_losses: dict[str, str]
  trainable: frozenset[str]
  alternation: tuple[frozenset[str], ...]
  alternation_rule: str
  alternation_steps: int
  num_epochs: int
  num_steps: int
  validate_every_epochs: int
  patience: int
  learning_rate_scale: float
  warmup_steps: int
  schedule: str
  start_next_with: str

  @property
  def leaves_out_seen_items(self) -> bool:
    """Whether the softmax losses leave out what a user has, as the evaluation does."""
    in_loss, in_evaluation = self.config.loss.seen_items, self.config.evaluation.seen_items
    return in_loss == AS_EVALUATION and in_evaluation == LEAVE_OUT

  def total_steps(self, steps_per_epoch: int) -> int:
    """Returns the largest number of steps that the stage may take."""
    return self.num_steps or self.num_epochs * steps_per_epoch

  def __str__(self) -> str:
    """Names the stage and its groups, e.g. `joint_finetune: sasrec | content_tower+user_tower`."""
    return f'{self.name}: {" | ".join("+".join(sorted(turn)) for turn in self.alternation)}'


class StageNumbers(NamedTuple):
  """The numbers of a stage that are arguments of the compiled step.

  Stages that differ only in these numbers share one compiled step.

  Attributes:
    rate: the schedule of the learning rate.
    alternation: by label `[turns]` bool, whether it is trained in that turn. Every stage of a run
      has the same number of turns here; those beyond `num_turns` are not used.
    num_turns: `[]` int32.
    alternation_steps: `[]` int32.
    is_adaptive: `[]` bool; False gives every turn `alternation_steps` steps.
  """

  rate: RateSchedule
  alternation: dict[str, Array]
  num_turns: Array
  alternation_steps: Array
  is_adaptive: Array


def stage_numbers(
  stage: Stage, labels: PyTree, steps_per_epoch: int, max_turns: int
) -> StageNumbers:
  """Returns the numbers of a stage; `max_turns` is the most turns of any stage of the run."""
  turns = [*stage.alternation, *stage.alternation[:1] * (max_turns - len(stage.alternation))]
  rate = RateSchedule(
    np.float32(stage.config.optimizer.learning_rate * stage.learning_rate_scale),
    np.int32(stage.warmup_steps),
    np.int32(stage.total_steps(steps_per_epoch)),
    np.bool_(stage.schedule == 'cosine'),
  )
  return StageNumbers(
    rate,
    {label: np.array([label in turn for turn in turns]) for label in set(jax.tree.leaves(labels))},
    np.int32(len(stage.alternation)),
    np.int32(stage.alternation_steps),
    np.bool_(stage.alternation_rule == 'adaptive'),
  )


def stage_config(config: ConfigDict, name: str) -> ConfigDict:
  """Returns the config with only the losses of one stage and the branches that they read.

  Raises:
    InputError: a loss is unknown or has no inputs in this stage, or no loss trains a branch.
  """
  chosen = config.stage[name].losses
  field = f'config.stage.{name}.losses={tuple(chosen)}'
  for loss in chosen:
    if loss != ALL and loss not in config.loss.weights:
      raise InputError(
        f'{field}: {loss!r} is no loss; known: {", ".join((ALL, *config.loss.weights))}'
      )
  losses = [loss for loss in losses_in_use(config.loss) if loss in chosen or ALL in chosen]
  # Proxies read the states of SASRec, so that branch is needed even if it is frozen.
  reads_all = FUSED in losses or ('retriever' in losses and config.retriever.query == 'proxies')
  branches = tuple(branch for branch in config.branches if branch in losses or reads_all)
  if not branches:
    raise InputError(
      f'{field}: trains no branch of config.branches={tuple(config.branches)}; give one of these '
      'losses a weight in config.loss.weights, or leave the stage out of config.stages'
    )
  has_content = config.sasrec.item_input in OF_CONTENT
  for loss in losses:
    if loss in (*BRANCHES, FUSED):
      continue
    if loss in OF_SASREC:
      has_input = 'sasrec' in branches
    else:
      has_input = 'retriever' in branches or (loss not in OF_RETRIEVER and has_content)
    if not has_input:
      raise InputError(
        f'{field}: {loss} needs vectors that no branch of this stage makes; take it out, or add a '
        f'loss of {"sasrec" if loss in OF_SASREC else "the retriever"}'
      )
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    config.branches = branches
  for loss in config.loss.weights:
    if loss not in losses:
      config.loss.weights[loss] = 0.0
  return config


def retrieval_losses(config: ConfigDict) -> dict[str, str]:
  """Returns the name of each loss over scores that has a weight, by branch.

  Args:
    config: `config.loss`.
  """
  named = {'sasrec': config.name, 'retriever': config.retriever_name, FUSED: config.name}
  return {branch: named[branch] for branch in losses_in_use(config) if branch in named}


def make_stages(
  config: ConfigDict, num_items: int, shapes_of: Callable[[UR4Rec], PyTree]
) -> tuple[list[Stage], PyTree]:
  """Reads a config's stages, and labels the parameters so that each stage trains whole labels.

  Args:
    config: see `configs/default.py`.
    num_items: size of the catalogue.
    shapes_of: returns the shapes of a model's parameters.

  Returns:
    The stages in order; and a tree with the label of each parameter: its group, with a number if
    some stages train only a part of the group.

  Raises:
    InputError: a stage is impossible; the message names the field and says why.
  """
  shapes = shapes_of(create_model(config, num_items))
  names = [*by_name(shapes)]
  configs = {name: stage_config(config, name) for name in config.stages}
  models = {name: create_model(of_stage, num_items) for name, of_stage in configs.items()}
  turns = {
    name: _turns(config, name, names, set(by_name(shapes_of(model))))
    for name, model in models.items()
  }
  labels, kinds = {}, {}
  for name in names:
    moves_in = tuple(name in turn for alternation in turns.values() for turn in alternation)
    known = kinds.setdefault(group_of(name), {})
    number = known.setdefault(moves_in, len(known))
    labels[name] = group_of(name) + f'-{number}' * bool(number)
  stages = []
  for name in config.stages:
    labelled = tuple(frozenset(labels[x] for x in turn) for turn in turns[name])
    found = {
      'name': name,
      'config': configs[name],
      'model': models[name],
      'losses': models[name].losses,
      'retrieval_losses': retrieval_losses(configs[name].loss),
      'trainable': frozenset.union(*labelled),
      'alternation': labelled,
    }
    others = [field.name for field in dataclasses.fields(Stage) if field.name not in found]
    stages.append(Stage(**found, **{field: config.stage[name][field] for field in others}))
  return stages, jax.tree.unflatten(jax.tree.structure(shapes), [labels[name] for name in names])


def _turns(
  config: ConfigDict, stage: str, names: list[str], reached: set[str]
) -> tuple[set[str], ...]:
  """Returns the parameters that are trained in each turn of a stage.

  Args:
    config: the run's config.
    stage: name of the stage.
    names: names of all parameters.
    reached: names of the parameters that the losses of the stage reach.
  """
  fields = config.stage[stage]
  field = f'config.stage.{stage}.trainable={tuple(fields.trainable)}'
  trainable = set()
  for entry in fields.trainable:
    found = _matching(entry, names, field)
    if found and not found & reached:
      raise InputError(f'{field}: no loss of the stage reaches {entry}; add one or take it out')
    trainable |= found & reached
  if not trainable:
    raise InputError(f'{field}: nothing is trained; name groups of {", ".join(GROUPS)}')
  for branch in config.branches:
    is_used = branch in fields.losses or ALL in fields.losses
    if (
      is_used
      and config.loss.weights[branch]
      and not any(x.startswith(branch + '/') for x in trainable)
    ):
      raise InputError(
        f'{field}: no parameter of {branch} is trained, so its loss is useless; take it out of '
        f'config.stage.{stage}.losses'
      )
  if not fields.alternation:
    return (trainable,)
  field = f'config.stage.{stage}.alternation={tuple(fields.alternation)}'
  turns = [_matching(entry, names, field) & trainable for entry in fields.alternation]
  if len(turns) < 2 or not all(turns):
    raise InputError(f'{field}: needs two entries or more, each with something that is trained')
  turning = set.union(*turns)
  if len(turning) < sum(map(len, turns)):
    raise InputError(f'{field}: a parameter is in two turns')
  return tuple(turn | (trainable - turning) for turn in turns)


def _matching(entry: str, names: list[str], field: str) -> set[str]:
  """Returns the parameters of a group, or those whose names match a regular expression."""
  if entry == ALL:
    return set(names)
  groups = _TOWERS.get(entry, (entry,))
  if set(groups) <= GROUPS.keys():
    return {name for name in names if group_of(name) in groups}  # May be empty for this model.
  try:
    found = {name for name in names if re.fullmatch(entry, name)}
  except re.error as error:
    raise InputError(f'{field}: {entry!r} is no regular expression: {error}') from error
  if not found:
    known = ', '.join((ALL, *_TOWERS, *GROUPS))
    raise InputError(
      f'{field}: {entry!r} is none of the groups {known}, and as a regular expression it matches '
      f'no parameter, e.g. {names[0]}'
    )
  if len(found) == len(names):
    raise InputError(f'{field}: {entry!r} matches every parameter; say {ALL!r} if that is meant')
  return found


def after_step(state: StageState, loss: Array, numbers: StageNumbers) -> StageState:
  """Counts a step and decides, on the device, which group the next step trains.

  The turn changes after `alternation_steps`. If the rule is adaptive, it changes once the moving
  average of the loss, over about as many steps, has reached no new low for `alternation_steps`.
  """
  change = (loss - state.average) / numbers.alternation_steps
  average = jnp.where(jnp.isfinite(state.average), state.average + change, loss)
  falls = (average < state.lowest) & numbers.is_adaptive
  waited = jnp.where(falls, 0, state.waited + 1)
  is_over = waited >= numbers.alternation_steps
  return StageState(
    step=state.step + 1,
    turn=(state.turn + is_over) % numbers.num_turns,
    average=average,
    lowest=jnp.where(is_over, jnp.inf, jnp.minimum(state.lowest, average)),
    waited=jnp.where(is_over, 0, waited),
  )

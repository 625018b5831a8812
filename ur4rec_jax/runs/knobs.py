"""Every knob of a run: its name, default, meaning and allowed values, declared in one place.

The default config, the checks of a config, their messages and docs/knobs.md are all made from the
tables below. After a change here, write the page again:

  python -m ur4rec_jax.runs.knobs > docs/knobs.md
"""

import difflib
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ur4rec_jax.data import splits
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation.protocol import SEEN_ITEMS
from ur4rec_jax.models.fusion import BRANCH_FUSIONS, CALIBRATIONS, MODALITY_FUSIONS
from ur4rec_jax.models.retriever import QUERIES
from ur4rec_jax.models.sasrec import ACTIVATIONS, BLOCKS, ITEM_INPUTS, NORMS, POSITIONS
from ur4rec_jax.sharding.devices import MAPPINGS
from ur4rec_jax.sharding.item_embeddings import POLICIES
from ur4rec_jax.training import seen_items
from ur4rec_jax.training.losses import DIVERSITIES, RETRIEVAL_LOSSES
from ur4rec_jax.training.optimizers import SCHEDULES
from ur4rec_jax.training.stages import ALTERNATIONS, STARTS

_TYPES = {
  bool: ('True or False', bool),
  int: ('a whole number', int),
  float: ('a number', (int, float)),
  str: ('a string', str),
  tuple: ('a tuple', (tuple, list)),
}


class Knob(NamedTuple):
  """One knob.

  Attributes:
    default: its value if neither the config file nor a flag sets it.
    meaning: one line that explains it.
    choices: the only values that it may have; empty if any value of the default's type will do.
    at_least: smallest allowed value.
    above: allowed values are larger than this.
    at_most: largest allowed value.
    below: allowed values are smaller than this.
    may_change: whether a started run goes on with another value, because the knob changes neither
      what is computed nor what is stored.
    may_round: whether a started run goes on with another value, too, but warns that numbers are
      then rounded in another way.
    follows: for a knob of a stage, the knob of the run whose value is the default.
    earlier: how runs of versions without the knob were trained, if not with the default.
  """

  default: Any
  meaning: str
  choices: Collection[str] = ()
  at_least: float | None = None
  above: float | None = None
  at_most: float | None = None
  below: float | None = None
  may_change: bool = False
  may_round: bool = False
  follows: str = ''
  earlier: Any = None

  @property
  def bounds(self) -> str:
    """Says in words which values are allowed; empty if the type of the default says it all."""
    if self.choices:
      return f'one of {", ".join(self.choices)}'
    if self.at_most is not None or self.below is not None:
      start = f'({self.above}' if self.at_least is None else f'[{self.at_least}'
      return (
        f'in {start}, {self.below})' if self.at_most is None else f'in {start}, {self.at_most}]'
      )
    if self.above is not None:
      return f'above {self.above}'
    return '' if self.at_least is None else f'at least {self.at_least}'

  def problem(self, value: Any) -> str:
    """Says what a value must be, e.g. `must be at least 1`; empty if the value is allowed."""
    kind, types = _TYPES[type(self.default)]
    if not isinstance(value, types) or isinstance(value, bool) != (types is bool):
      return f'must be {kind}'
    if isinstance(value, tuple | list):
      are_numbers = bool(self.default) and not isinstance(self.default[0], str)
      if not all(isinstance(x, int | float if are_numbers else str) for x in value):
        return f'must be a tuple of {"numbers" if are_numbers else "names"}'
    is_allowed = (
      (not self.choices or value in self.choices)
      and (self.at_least is None or value >= self.at_least)
      and (self.above is None or value > self.above)
      and (self.at_most is None or value <= self.at_most)
      and (self.below is None or value < self.below)
    )
    return '' if is_allowed else f'must be {self.bounds}'


SECTIONS: dict[str, dict[str, Knob]] = {
  'Data': {
    'data_dir': Knob('', 'Folder that data_prep.build_dataset wrote.', may_change=True),
    'split': Knob(
      splits.LEAVE_ONE_OUT,
      'Held-out interactions: the last two of each user, or all after one point in time.',
      choices=splits.NAMES,
    ),
    'train_on': Knob(
      'training',
      'Train without the held-out interactions, or on all; metrics are then of what training saw.',
      choices=('training', 'all'),
    ),
    'modalities': Knob((), 'Item embeddings to use, as data_prep.encode named them: text, image.'),
    'extensions': Knob(
      (), 'Python modules that add losses or blocks of your own; see docs/extending.md.'
    ),
    'max_item_tokens': Knob(
      0,
      'Token vectors to use of each item and modality: 0 for all, 1 for the summary vector alone.',
      at_least=0,
    ),
    'user_modalities': Knob((), "Embeddings of the users' own texts, which the retriever reads."),
    'shuffled_features': Knob(
      False, 'Control experiment: each item gets the embeddings of another, randomly drawn item.'
    ),
    'max_length': Knob(
      50, 'Longest history, in items; older interactions are cut off.', at_least=1
    ),
    'crop': Knob(
      'last',
      'Part of a longer history to train on: its end, or another random part in each epoch.',
      choices=('last', 'random'),
    ),
  },
  'Training': {
    'seed': Knob(
      0,
      'Seed of parameters, batches, dropout and negatives.',
      at_least=0,
      at_most=2**32 - 1,  # jax would take a larger one for its remainder.
    ),
    'batch_size': Knob(
      128, 'Users in one optimizer step, on average and over all devices.', at_least=1
    ),
    'num_epochs': Knob(200, 'Largest number of epochs in each stage.', at_least=1),
    'validate_every_epochs': Knob(1, 'Epochs from one validation to the next.', at_least=1),
    'patience': Knob(
      10,
      'With keep=best, a stage ends after this many validations without a better NDCG@10.',
      at_least=1,
    ),
    'keep': Knob(
      'best',
      'Parameters that each stage ends with: the best in validation, or the last after all epochs.',
      choices=('best', 'last'),
    ),
    'max_minutes': Knob(
      0.0,
      'Training ends with a validation after this many minutes; 0 for no limit.',
      at_least=0,
      may_change=True,
    ),
    'branches': Knob(
      ('sasrec',), 'Branches that score the items: sasrec, retriever, or both in this order.'
    ),
    'stages': Knob(
      ('train',), 'Names of the stages to train, in order; a stage may occur several times.'
    ),
  },
  'Warm start': {
    'init.run': Knob('', 'Folder of a run whose parameters this one starts with, by original ids.'),
    'init.moments': Knob(
      'reset',
      "Moments of the optimizer: start at zero (reset), or go on from the run's last (carry).",
      choices=('reset', 'carry'),
    ),
    'init.replay': Knob(
      1.0,
      'Share of the users without new events who are trained on, beside all who have some.',
      at_least=0,
      at_most=1,
    ),
  },
  'Branch sasrec': {
    'sasrec.dim': Knob(64, 'Width of item embeddings and hidden states.', at_least=1),
    'sasrec.block': Knob(
      'transformer', 'Kind of blocks: transformer (SASRec) or gru (GRU4Rec).', choices=BLOCKS
    ),
    'sasrec.num_blocks': Knob(2, 'Number of transformer blocks or recurrent layers.', at_least=1),
    'sasrec.num_heads': Knob(1, 'Number of attention heads; must divide sasrec.dim.', at_least=1),
    'sasrec.ffn_dim': Knob(64, 'Width of the hidden feed-forward layer.', at_least=1),
    'sasrec.dropout': Knob(
      0.2, 'Dropout rate on embeddings and inside the blocks.', at_least=0, below=1
    ),
    'sasrec.norm': Knob(
      'post', 'Layer norm before (pre) or after (post) attention and feed-forward.', choices=NORMS
    ),
    'sasrec.activation': Knob(
      'relu', 'Non-linearity of the feed-forward layers.', choices=ACTIVATIONS
    ),
    'sasrec.positions': Knob(
      'absolute',
      'Order of a history: an embedding of the distance from its end, rotary by distance, or none.',
      choices=POSITIONS,
    ),
    'sasrec.window': Knob(
      0, 'Most items that a position attends to, itself included; 0 for all.', at_least=0
    ),
    'sasrec.filter_width': Knob(
      0, 'Items that a learned causal filter beside attention adds up; 0 for none.', at_least=0
    ),
    'sasrec.input_norm': Knob(False, 'Whether item embeddings pass a layer norm before block 1.'),
    'sasrec.item_input': Knob(
      'id',
      'Item vectors: id embeddings, the same started from content, content alone, or their sum.',
      choices=ITEM_INPUTS,
    ),
    'sasrec.item_scale': Knob(
      0.05, 'Root mean square of the learned item embeddings at the start.', above=0
    ),
    'sasrec.whitening': Knob(
      1.0,
      'For id_from_content: 1 starts with principal components of equal size, 0 keeps their sizes.',
      at_least=0,
      at_most=1,
    ),
  },
  'Branch retriever': {
    'retriever.dim': Knob(64, 'Width of user and item vectors.', at_least=1),
    'retriever.query': Knob(
      'user',
      'User vector: from a transformer for each modality, or from learned queries as in the paper.',
      choices=QUERIES,
    ),
    'retriever.num_blocks': Knob(
      2, 'Number of transformer blocks; with query=user, for each modality.', at_least=0
    ),
    'retriever.num_heads': Knob(
      1, 'Number of attention heads; must divide retriever.dim.', at_least=1
    ),
    'retriever.ffn_dim': Knob(64, 'Width of the hidden feed-forward layer.', at_least=1),
    'retriever.dropout': Knob(
      0.2, 'Dropout rate on history tokens and inside the blocks.', at_least=0, below=1
    ),
    'retriever.norm': Knob(
      'pre',
      'With query=user: layer norm before (pre) or after (post) attention and feed-forward.',
      choices=NORMS,
    ),
    'retriever.cross_modal_blocks': Knob(
      1, 'Attention blocks between the modalities of a history.', at_least=0
    ),
    'retriever.fusion': Knob(
      'gated', "Joins the modalities of a user's history.", choices=MODALITY_FUSIONS
    ),
    'retriever.num_proxies': Knob(4, 'With query=proxies: number of learned queries.', at_least=1),
    'retriever.item_id': Knob(
      True, 'Whether an embedding of its id is added to the content of each item.'
    ),
    'retriever.temperature': Knob(
      0.1, 'Start value of the learned temperature that divides the cosines.', above=0
    ),
  },
  'Item content': {
    'content.hidden_dim': Knob(64, 'Width in which the tokens of an item are pooled.', at_least=1),
    'content.dropout': Knob(0.2, 'Dropout rate on these tokens.', at_least=0, below=1),
    'content.cross_modal_blocks': Knob(
      1, 'Attention blocks between the modalities of an item.', at_least=0
    ),
    'content.num_heads': Knob(
      1, 'Attention heads in these blocks; must divide content.hidden_dim.', at_least=1
    ),
    'content.pooled_vectors': Knob(
      1, 'Vectors into which the tokens of a modality are pooled.', at_least=1
    ),
    'content.fusion': Knob('gated', 'Joins the modalities of an item.', choices=MODALITY_FUSIONS),
  },
  'Fusion of both branches': {
    'fusion.kind': Knob(
      'weighted',
      'Fixed, learned or per-user weights; reciprocal ranks; or reranking of the best of sasrec.',
      choices=BRANCH_FUSIONS,
    ),
    'fusion.weights': Knob(
      (0.5, 0.5),
      'Weight of each branch; start values for the kinds learned and adaptive.',
    ),
    'fusion.calibration': Knob(
      'log_probability',
      'For sums: standardise divides scores by their standard deviation; log_probability does not.',
      choices=CALIBRATIONS,
    ),
    'fusion.hidden_dim': Knob(16, 'For adaptive: width of the network.', at_least=1),
    'fusion.rank_constant': Knob(
      60.0, 'For rank: a larger value makes the first ranks differ less.', at_least=0
    ),
    'fusion.cascade_size': Knob(
      100, "For cascade: number of sasrec's best items that the retriever ranks again.", at_least=1
    ),
  },
  'Losses': {
    'loss.name': Knob(
      'softmax', 'Loss of the scores of sasrec and of the sum.', choices=RETRIEVAL_LOSSES
    ),
    'loss.retriever_name': Knob(
      'softmax', 'Loss of the scores of the retriever.', choices=RETRIEVAL_LOSSES
    ),
    'loss.num_negatives': Knob(
      1, 'Sampled items for each target; for sampled_softmax, for the whole step.', at_least=1
    ),
    'loss.negatives': Knob(
      'uniform',
      'Distribution from which sampled_softmax draws.',
      choices=('uniform', 'popularity'),
    ),
    'loss.seen_items': Knob(
      seen_items.AS_EVALUATION,
      "Whether both softmaxes leave out a user's other items as evaluation.seen_items does.",
      choices=seen_items.CHOICES,
      earlier=seen_items.KEEP,
    ),
    'loss.calibration': Knob(
      0.75, 'For gbce, its t: 0 is plain bce, 1 is fully calibrated.', at_least=0, at_most=1
    ),
    'loss.chunk_size': Knob(
      800, 'Targets whose scores are in memory at once; changes memory and speed.', at_least=1
    ),
    'loss.weights.sasrec': Knob(
      1.0, 'Weight of loss.name on the scores of sasrec; 0 leaves it out.', at_least=0
    ),
    'loss.weights.retriever': Knob(
      0.0, 'Weight of loss.retriever_name on the scores of the retriever.', at_least=0
    ),
    'loss.weights.fused': Knob(
      0.0, 'Weight of loss.name on the weighted sum of both branches.', at_least=0
    ),
    'loss.weights.consistency': Knob(
      0.0, 'Weight of the loss that pulls the modalities of an item together.', at_least=0
    ),
    'loss.weights.info_nce': Knob(
      0.0, 'Weight of the loss that tells modalities of an item from those of others.', at_least=0
    ),
    'loss.weights.diversity': Knob(
      0.0, 'Weight of the loss that makes the pooled vectors of an item differ.', at_least=0
    ),
    'loss.weights.contrast': Knob(
      0.0, 'Weight of the loss by which one of the proxies finds the target.', at_least=0
    ),
    'loss.weights.matching': Knob(
      0.0, 'Weight of the loss that tells own targets from those of other tokens.', at_least=0
    ),
    'loss.weights.same_target': Knob(
      0.0, 'Weight of the loss that makes states before the same next item alike.', at_least=0
    ),
    'loss.weighting': Knob(
      'fixed',
      'Whether these weights stay, or only start learned ones (uncertainty).',
      choices=('fixed', 'uncertainty'),
    ),
    'loss.temperature': Knob(
      0.1, 'Start value of the temperature that info_nce, contrast and same_target learn.', above=0
    ),
    'loss.contrast_items': Knob(
      256,
      'Targets per step for info_nce, diversity, contrast and matching; pairs for same_target.',
      at_least=2,
    ),
    'loss.diversity': Knob('cosine', 'Measure of the loss diversity.', choices=DIVERSITIES),
  },
  'Optimizer': {
    'optimizer.name': Knob('adamw', 'Update rule.', choices=('adamw', 'sgd')),
    'optimizer.learning_rate': Knob(1e-3, 'Learning rate after the warmup.', above=0),
    'optimizer.learning_rate_scales.sasrec': Knob(
      1.0, 'Factor of the learning rate for the parameters of sasrec.', above=0
    ),
    'optimizer.learning_rate_scales.user_tower': Knob(
      1.0, "Factor for the retriever's encoder of users.", above=0
    ),
    'optimizer.learning_rate_scales.content_tower': Knob(
      1.0, "Factor for the retriever's encoder of items.", above=0
    ),
    'optimizer.learning_rate_scales.fusion': Knob(
      1.0, 'Factor for the fusion of both branches.', above=0
    ),
    'optimizer.learning_rate_scales.loss': Knob(
      1.0, 'Factor for the learned weights and temperatures of losses.', above=0
    ),
    'optimizer.warmup_steps': Knob(
      100, 'Optimizer steps in which the rate rises from zero, in each stage.', at_least=0
    ),
    'optimizer.schedule': Knob(
      'constant',
      'Learning rate after the warmup; cosine falls to zero in each stage.',
      choices=SCHEDULES,
    ),
    'optimizer.weight_decay': Knob(
      0.0, 'Decoupled weight decay of AdamW; norms, biases and embeddings have none.', at_least=0
    ),
    'optimizer.clip_norm': Knob(
      1.0, 'Largest gradient norm of a parameter group; 0 for no clipping.', at_least=0
    ),
    'optimizer.b1': Knob(0.9, 'Decay of the first moment of AdamW.', at_least=0, below=1),
    'optimizer.b2': Knob(0.999, 'Decay of the second moment of AdamW.', at_least=0, below=1),
    'optimizer.item_embeddings': Knob(
      'all',
      'Item embeddings that a step updates: all, those it read, or all with a part on each device.',
      choices=POLICIES,
    ),
  },
  'Followers': {
    'followers.weight': Knob(
      0.0, 'Weight of what other users had after the items of a history; 0 for none.', at_least=0
    ),
    'followers.decay': Knob(
      0.8, 'Weight of an item of a history relative to the next newer one.', above=0, at_most=1
    ),
    'followers.count': Knob(100, 'Most followers of an item that are kept.', at_least=1),
    'followers.reach': Knob(
      10, 'Largest distance in a history at which one item follows another.', at_least=1
    ),
  },
  'Evaluation': {
    'evaluation.candidates': Knob(
      'all',
      'Items to rank: all, or the target among items drawn uniformly or by popularity.',
      choices=('all', 'uniform', 'popularity'),
    ),
    'evaluation.num_candidates': Knob(100, 'Number of sampled items for each user.', at_least=1),
    'evaluation.seen_items': Knob(
      'leave_out',
      'Items that a user had before: leave them out of rankings and recommendations, or keep them.',
      choices=SEEN_ITEMS,
    ),
    'evaluation.seed': Knob(0, 'Seed of the samples and of the random baseline.', at_least=0),
    'evaluation.batch_size': Knob(
      64,
      'Users that a device scores at once; 64 fit the cache of a CPU.',
      at_least=1,
      may_change=True,
    ),
  },
  'Checkpoints and devices': {
    'checkpoint.every_validations': Knob(
      1, 'Validations from one checkpoint to the next.', at_least=1, may_change=True
    ),
    'checkpoint.max_to_keep': Knob(
      2, 'Number of newest checkpoints to keep.', at_least=1, may_change=True
    ),
    'checkpoint.grace_seconds': Knob(
      25.0,
      'Seconds after SIGTERM in which the run saves before it ends itself.',
      above=0,
      may_change=True,
    ),
    'compilation_cache': Knob(
      '', "Folder of compiled programs; '' for one in the workdir, or none.", may_change=True
    ),
    'trackers': Knob(
      (),
      'Experiment trackers that get the curves, too: mlflow, trackio, wandb.',
      may_change=True,
    ),
    'parameter_table': Knob(
      False,
      'Whether to print the shape and size of every parameter before training.',
      may_change=True,
    ),
    'dtype': Knob(
      'auto',
      'Type to compute in; auto is bfloat16 on TPUs and on GPUs from Ampere on, else float32.',
      choices=('auto', 'float32', 'bfloat16'),
      may_round=True,
    ),
    'data_in_memory': Knob(
      True,
      'Keep all interactions on the devices; False reads those of the next steps from the disk.',
      may_change=True,
    ),
    'steps_per_dispatch': Knob(
      8, 'Optimizer steps that the devices take in one call.', at_least=1, may_round=True
    ),
    'cpu_threads': Knob(
      0,
      'Threads that a CPU divides sums among; a fixed number gives the same bits on any cores.',
      at_least=0,
      may_round=True,
    ),
    'mapping': Knob(
      'pmap',
      'JAX function that spreads a step over the devices; both give the same numbers.',
      choices=tuple(MAPPINGS),
      may_change=True,
    ),
    'transfer_guard': Knob(
      'disallow',
      'What to do about implicit copies between host and devices.',
      choices=('disallow', 'log', 'allow'),
      may_change=True,
    ),
  },
}
KNOBS = {name: knob for knobs in SECTIONS.values() for name, knob in knobs.items()}
# A started run goes on with other values of these.
CHANGEABLE = {name for name, knob in KNOBS.items() if knob.may_change or knob.may_round}


def _as_of_run(name: str, meaning: str) -> Knob:
  return KNOBS[name]._replace(meaning=meaning, follows=name)


STAGE_KNOBS = {
  'trainable': Knob(
    ('all',), 'Parameters to train: names of groups, retriever, all; or regexes of parameter paths.'
  ),
  'losses': Knob(('all',), 'Losses that count, if loss.weights gives them a weight.'),
  'num_epochs': _as_of_run('num_epochs', 'Largest number of epochs.'),
  'num_steps': Knob(
    0, 'Largest number of optimizer steps, instead of num_epochs; 0 for num_epochs.', at_least=0
  ),
  'validate_every_epochs': _as_of_run(
    'validate_every_epochs', 'Epochs from one validation to the next.'
  ),
  'patience': _as_of_run(
    'patience',
    'With keep=best, the stage ends after this many validations without a better NDCG@10.',
  ),
  'learning_rate_scale': Knob(1.0, 'Factor of optimizer.learning_rate.', above=0),
  'warmup_steps': _as_of_run(
    'optimizer.warmup_steps', 'Optimizer steps in which the rate rises from zero.'
  ),
  'schedule': _as_of_run(
    'optimizer.schedule', 'Learning rate after the warmup; cosine falls to zero over the stage.'
  ),
  'alternation': Knob(
    (), "Groups to train in turns, e.g. ('sasrec', 'retriever'); empty trains all at once."
  ),
  'alternation_steps': Knob(50, 'Optimizer steps in one turn.', at_least=1),
  'alternation_rule': Knob(
    'steps',
    'A turn has this many steps, or ends after as many without a new low of the loss (adaptive).',
    choices=ALTERNATIONS,
  ),
  'start_next_with': Knob(
    'best', 'Parameters for the next stage: the best in validation, or the last.', choices=STARTS
  ),
}

_CONTENT = {
  'modalities': ('text',),
  'branches': ('sasrec', 'retriever'),
  'sasrec.item_input': 'id_from_content',
  'sasrec.item_scale': 0.2,
  'loss.weights.retriever': 1.0,
  'stages': ('pretrain_sasrec', 'pretrain_retriever', 'joint_finetune', 'end_to_end'),
}
VARIANTS: dict[str, dict[str, Any]] = {
  'sasrec': {},
  'text': _CONTENT,
  'multimodal': {
    **_CONTENT,
    'modalities': ('text', 'image'),
    'loss.weights.consistency': 0.1,
    'loss.weights.info_nce': 0.1,
  },
  'paper': {
    **_CONTENT,
    'retriever.query': 'proxies',
    'retriever.num_blocks': 1,
    'loss.weights.contrast': 1.0,
    'loss.weights.matching': 1.0,
  },
}
STAGES: dict[str, dict[str, Any]] = {
  'train': {},
  'pretrain_sasrec': {'trainable': ('sasrec',), 'losses': ('sasrec',)},
  'pretrain_retriever': {
    'trainable': ('retriever', 'loss'),
    'losses': ('retriever', 'consistency', 'info_nce', 'diversity', 'contrast', 'matching'),
  },
  'joint_finetune': {'alternation': ('sasrec', 'retriever'), 'learning_rate_scale': 0.3},
  'end_to_end': {'learning_rate_scale': 0.1},
}

# Names of earlier versions, which may be in config files and are in the folders of started runs.
_RENAMED = {'paths': 'branches', 'optimizer.item_rows': 'optimizer.item_embeddings'}
_RENAMED_OF_STAGE = {
  'moving': 'trainable',
  'turns': 'alternation',
  'turn_steps': 'alternation_steps',
  'alternate': 'alternation_rule',
}


def default_config(variant: str = 'sasrec') -> ConfigDict:
  """Returns the default config of a model variant.

  Args:
    variant: `sasrec` learns from the sequences alone; `text` and `multimodal` add a retriever over
      the items' texts, or over their texts and pictures; `paper` adds the retriever of the paper,
      over texts.

  Raises:
    InputError: there is no such variant.
  """
  if variant not in VARIANTS:
    raise InputError(f'unknown model variant {variant!r}; known: {", ".join(VARIANTS)}')
  defaults = {name: knob.default for name, knob in KNOBS.items()}
  config = ConfigDict(unflatten_dict(defaults | VARIANTS[variant], sep='.'))
  config.stage = ConfigDict({name: default_stage(config, **of) for name, of in STAGES.items()})
  return config


def default_stage(config: ConfigDict, **fields: Any) -> ConfigDict:
  """Returns the record of a stage, to be stored as `config.stage.NAME`.

  Args:
    config: the run's config; the stage follows its number of epochs, patience and others, also
      when they change later.
    fields: knobs of the stage that differ from `STAGE_KNOBS`.
  """
  stage = ConfigDict()
  for name, knob in STAGE_KNOBS.items():
    *section, field = knob.follows.split('.')
    of_run = config[section[0]] if section else config
    stage[name] = of_run.get_oneway_ref(field) if knob.follows else knob.default
  stage.update(fields)
  return stage


def changed_fields(fields: dict[str, Any], stages: Collection[str]) -> dict[str, Any]:
  """Returns the default of each field of a config that has another value.

  Args:
    fields: fields of a config, by dotted name; tuples may be lists, as in JSON.
    stages: names of the stages that the run has; fields of others are left out.

  Returns:
    The default by dotted name; None for a field that has none.
  """
  as_json = lambda value: [*value] if isinstance(value, tuple) else value
  found = {}
  for name, value in fields.items():
    default = None
    match name.split('.'):
      case 'stage', stage, field if field in STAGE_KNOBS:
        if stage not in stages:
          continue
        knob = STAGE_KNOBS[field]
        of_run = fields.get(knob.follows, knob.default)
        default = STAGES.get(stage, {}).get(field, of_run)
      case _ if name in KNOBS:
        default = KNOBS[name].default
    if as_json(value) != as_json(default):
      found[name] = as_json(default)
  return found


def knobs_of(config: ConfigDict) -> dict[str, Knob]:
  """Returns all knobs of a config by dotted name, with those of each of its stages."""
  of_stages = {
    f'stage.{stage}.{name}': knob for stage in config.stage for name, knob in STAGE_KNOBS.items()
  }
  return KNOBS | of_stages


def renamed(field: str) -> str | None:
  """Returns the present name of a field of an earlier version, or None if there was none.

  Args:
    field: dotted name, e.g. `optimizer.item_rows` or `stage.train.moving`.
  """
  match field.split('.'):
    case 'stage', stage, name if name in _RENAMED_OF_STAGE:
      return f'stage.{stage}.{_RENAMED_OF_STAGE[name]}'
  return _RENAMED.get(field)


def no_such_field(field: str, known: Iterable[str]) -> str:
  """Says that a field does not exist, and which one to take instead.

  Args:
    field: dotted name.
    known: dotted names of the fields that exist.
  """
  if new := renamed(field):
    return f'{field}: no such field; it is now named {new}'
  if near := difflib.get_close_matches(field, [*known], n=1):
    return f'{field}: no such field; did you mean {near[0]}?'
  return f'{field}: no such field; docs/knobs.md lists all'


def from_stored(config: dict[str, Any]) -> ConfigDict:
  """Reads the `config` of a `config.json`, which an earlier version may have written.

  Knobs that the earlier version did not have get the value with which the program works as it did
  before. Lists become the tuples that config files have: JSON has only lists.

  Raises:
    AttributeError: it has no records of stages.
    TypeError: it is no record of fields.
    ValueError: the same.
  """
  stored = flatten_dict(dict(config), sep='.')
  fields = {renamed(name) or name: value for name, value in stored.items()}
  for name, knob in knobs_of(ConfigDict(unflatten_dict(fields, sep='.'))).items():
    default = fields[knob.follows] if knob.follows else knob.default
    fields.setdefault(name, default if knob.earlier is None else knob.earlier)
  fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
  return ConfigDict(unflatten_dict(fields, sep='.'))


def page() -> str:
  """Returns the contents of docs/knobs.md."""
  lines = [
    '# Knobs',
    '',
    '<!-- Made from ur4rec_jax/runs/knobs.py: python -m ur4rec_jax.runs.knobs > docs/knobs.md -->',
    '',
    'Every knob of a run with its default. A config file changes some of them, and a flag such as',
    '`--config.sasrec.dim=128` changes one for a single run. The default of a knob may differ by',
    'model variant, which is the part after the colon in `--config=NAME:VARIANT`; see',
    '[variants](#variants).',
  ]
  for title, knobs in SECTIONS.items():
    lines += ['', f'## {title}', '', *_table(knobs)]
  lines += [
    '',
    '## Stages',
    '',
    'Each stage has a record of its own, `stage.NAME`, with the following knobs. [Training in',
    'stages](training.md) explains how they work together.',
    '',
    *_table(STAGE_KNOBS),
    '',
    'The stages that every config has differ from these defaults in a few knobs:',
    '',
    *_differences(STAGES),
    '',
    '## Variants',
    '',
    *_differences(VARIANTS),
    '',
    '## Resuming with other values',
    '',
    'A started run keeps its knobs, because its checkpoints belong to them. These may change from',
    'one start to the next, because they change no result:',
    '',
    *(f'- `{name}`' for name, knob in KNOBS.items() if knob.may_change),
    '',
    'These may change too, but the numbers are then rounded in another way, and lines of',
    '`metrics.jsonl` may be means over other steps. The run warns of it:',
    '',
    *(f'- `{name}`' for name, knob in KNOBS.items() if knob.may_round),
    '',
    'The last stage may get another `patience`, unless less might have ended it before. It may get',
    'another `num_epochs` or `num_steps` if its learning rate does not fall by a cosine, which',
    'depends on the number of steps.',
  ]
  return '\n'.join(lines) + '\n'


def _table(knobs: dict[str, Knob]) -> list[str]:
  rows = ['| knob | default | allowed | meaning |', '| --- | --- | --- | --- |']
  for name, knob in knobs.items():
    default = f'that of `{knob.follows}`' if knob.follows else f'`{knob.default!r}`'
    allowed = knob.bounds or _TYPES[type(knob.default)][0]
    rows.append(f'| `{name}` | {default} | {allowed} | {knob.meaning} |')
  return rows


def _differences(records: dict[str, dict[str, Any]]) -> list[str]:
  rows = ['| name | differs in |', '| --- | --- |']
  for name, fields in records.items():
    changes = '<br>'.join(f'`{field}={value!r}`' for field, value in fields.items())
    rows.append(f'| `{name}` | {changes or "nothing"} |')
  return rows


if __name__ == '__main__':
  print(page(), end='')

import functools
import importlib
import operator
import pkgutil
import re

import pytest

import configs
from ur4rec_jax import default_config
from ur4rec_jax.errors import InputError
from ur4rec_jax.runs.config_checks import check_config, check_unchanged, flatten
from ur4rec_jax.runs.knobs import VARIANTS

WRONG = [
  ('crop', 'first'),
  ('batch_size', True),  # Python takes it for 1.
  ('extensions', (5,)),
  ('extensions', None),
  ('mapping', 'vmap'),
  ('transfer_guard', 'no'),
  ('sasrec.norm', 'none'),
  ('dtype', 'float16'),
  ('loss.name', 'hinge'),
  ('loss.negatives', 'hard'),
  ('optimizer.name', 'adam'),
  ('optimizer.schedule', 'linear'),
  ('evaluation.candidates', 'sampled'),
  ('train_on', 'test'),
  ('keep', 'first'),
  ('init.moments', 'carry'),  # Without init.run, both have nothing to go on from.
  ('init.replay', 0.5),
  ('max_length', 0),
  ('batch_size', 0),
  ('num_epochs', 0),
  ('patience', 0),
  ('validate_every_epochs', 0),
  ('stage.train.num_steps', -1),
  ('stage.train.alternation_steps', 0),
  ('stage.train.alternation_rule', 'random'),
  ('stage.train.schedule', 'linear'),
  ('stage.train.start_next_with', 'first'),
  ('stage.train.learning_rate_scale', 0.0),
  ('stages', ()),
  ('stages', ('train', 'fine_tune')),
  ('checkpoint.grace_seconds', 0.0),
  ('optimizer.learning_rate_scales.fusion', 0.0),
  ('steps_per_dispatch', -1),
  ('checkpoint.every_validations', 0),
  ('checkpoint.max_to_keep', 0),
  ('sasrec.dim', 0),
  ('sasrec.num_blocks', 0),
  ('sasrec.num_heads', 0),
  ('sasrec.num_heads', 3),
  ('sasrec.ffn_dim', 0),
  ('sasrec.dropout', 1.0),
  ('sasrec.dropout', -0.1),
  ('sasrec.dropout', float('nan')),
  ('sasrec.item_input', 'text'),
  ('content.hidden_dim', 0),
  ('content.dropout', 1.0),
  ('content.num_heads', 3),
  ('content.fusion', 'mean'),
  ('retriever.num_heads', 3),
  ('retriever.temperature', 0.0),
  ('fusion.kind', 'sum'),
  ('fusion.calibration', 'none'),
  ('loss.weighting', 'learned'),
  ('loss.diversity', 'l2'),
  ('loss.weights.info_nce', -0.1),
  ('branches', ('retriever', 'sasrec')),
  ('branches', ()),
  ('loss.num_negatives', 0),
  ('loss.chunk_size', 0),
  ('loss.calibration', 1.5),
  ('loss.calibration', -0.5),
  ('sasrec.whitening', 1.5),
  ('sasrec.whitening', -0.5),
  ('retriever.norm', 'none'),
  ('evaluation.num_candidates', 0),
  ('evaluation.batch_size', 0),
  ('evaluation.seed', -1),
  ('seed', -1),
  ('optimizer.learning_rate', 0.0),
  ('optimizer.learning_rate', -1e-3),
  ('optimizer.learning_rate', float('nan')),
  ('optimizer.item_embeddings', 'some'),
  ('optimizer.item_embeddings', 'touched'),  # The default loss reads them all.
  ('optimizer.warmup_steps', -1),
  ('optimizer.weight_decay', -0.1),
  ('optimizer.weight_decay', float('nan')),
  ('optimizer.clip_norm', -1.0),
  ('optimizer.b1', 1.0),
  ('optimizer.b2', 1.0),
]
OTHER = {
  'data_dir': '/elsewhere',
  'compilation_cache': '/elsewhere',
  'max_minutes': 5.0,
  'checkpoint.grace_seconds': 1.0,
  'stage.train.num_epochs': 7,
  'stage.train.num_steps': 7,
  'stage.train.patience': 7,
  'stage.end_to_end.trainable': ('sasrec',),  # Not among the run's stages.
  'num_epochs': 7,
  'patience': 3,
  'steps_per_dispatch': 2,
  'dtype': 'bfloat16',
  'cpu_threads': 3,
  'mapping': 'shard_map',
  'transfer_guard': 'allow',
  'parameter_table': True,
  'checkpoint.every_validations': 4,
  'checkpoint.max_to_keep': 5,
  'evaluation.batch_size': 17,
  'data_in_memory': False,
  'trackers': ('mlflow',),
}
TOUCHED = {
  'optimizer.item_embeddings': 'touched',
  'loss.name': 'bce',
  'loss.retriever_name': 'bce',
  'loss.weights.fused': 1.0,
}
SHARDED = {'optimizer.item_embeddings': 'sharded'}


def config_with(**fields):
  config = default_config()
  config.update_from_flattened_dict(fields)
  return config


def changed(name: str, value) -> dict:
  """The default config as nested dicts, with one field set to another value."""
  return config_with(**{name: value}).to_dict()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('name', [m.name for m in pkgutil.iter_modules(configs.__path__)])
def test_every_config_passes(name, variant):
  check_config(importlib.import_module(f'configs.{name}').get_config(variant))


@pytest.mark.parametrize(
  ('variant', 'fields', 'told'),
  [
    ('sasrec', {'loss.weights.retriever': 1.0}, 'needs the branch retriever'),
    ('sasrec', {'loss.weights.fused': 1.0}, 'needs two branches'),
    ('sasrec', {'loss.weights.sasrec': 0.0}, 'nothing would train the branch sasrec'),
    ('text', {'loss.weights.fused': 1.0, 'fusion.kind': 'rank'}, 'a fusion that is a sum'),
    ('text', {'loss.weights.info_nce': 0.1}, 'needs two modalities'),
    ('text', {'loss.weights.diversity': 0.1}, 'pooled_vectors above 1'),
    ('text', {'loss.weights.retriever': 0.0}, 'nothing would train the branch retriever'),
    ('text', {'modalities': ()}, 'content needs modalities'),
    ('text', {'fusion.weights': (1.0,)}, 'one number above 0 for each branch'),
    ('text', {'fusion.weights': (1.0, 0.0)}, 'one number above 0 for each branch'),
    ('text', {'fusion.weights': (1.0, float('nan'))}, 'one number above 0 for each branch'),
    ('text', {'fusion.weights': ('0.7', '0.3')}, 'must be a tuple of numbers'),
    ('text', {'modalities': (1,)}, 'must be a tuple of names'),
    ('text', {'stage.train.trainable': (1,)}, 'must be a tuple of names'),
    (
      'sasrec',
      {'optimizer.name': 'sgd', 'optimizer.weight_decay': 0.1},
      'set it to 0, or take adam',
    ),
    ('sasrec', {'train_on': 'all'}, 'nothing is held out by which the best'),
    ('text', {'train_on': 'all', 'keep': 'last'}, 'and 4 stages'),
    ('text', {**TOUCHED, 'loss.retriever_name': 'softmax'}, 'config.loss.retriever_name'),
    ('text', {**TOUCHED, 'fusion.calibration': 'standardise'}, 'reads all items'),
    ('text', {**SHARDED, 'fusion.calibration': 'standardise'}, 'reads all items'),
    ('text', {**SHARDED, 'fusion.kind': 'rank'}, 'in one place'),
    ('text', {**SHARDED, 'fusion.kind': 'cascade'}, 'in one place'),
    ('text', {'followers.weight': 0.5, 'fusion.kind': 'rank'}, 'is added to sums of scores'),
  ],
)
def test_what_has_no_inputs_is_refused(variant, fields, told):
  config = default_config(variant)
  with config.ignore_type():
    config.update_from_flattened_dict(fields)
  with pytest.raises(InputError, match=told):
    check_config(config)


def test_an_unknown_variant_is_refused():
  with pytest.raises(ValueError, match='known: sasrec, text, multimodal'):
    default_config('audio')


@pytest.mark.parametrize(('name', 'value'), WRONG)
def test_a_wrong_field_is_named(name, value):
  with pytest.raises(InputError, match=rf'config\.{name}\b'):
    check_config(config_with(**{name: value}))


@pytest.mark.parametrize('name', ['loss.name', 'evaluation.candidates', 'crop', 'sasrec.norm'])
def test_a_wrong_choice_lists_the_right_ones(name):
  right = flatten(default_config().to_dict())[name]
  with pytest.raises(InputError, match=rf"'wrong': must be one of .*{right}"):
    check_config(config_with(**{name: 'wrong'}))


@pytest.mark.parametrize('name', sorted(flatten(default_config().to_dict())))
def test_a_missing_field_is_named(name):
  config = default_config()
  *path, field = name.split('.')
  parent = functools.reduce(operator.getitem, path, config)
  del parent[field]
  with pytest.raises(InputError, match=rf'config\.{name} is missing'):
    check_config(config)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('sasrec.dropout', 0.0),
    ('optimizer.clip_norm', 0.0),
    ('optimizer.warmup_steps', 0),
    ('optimizer.weight_decay', 0.0),
    ('loss.calibration', 0.0),
    ('loss.calibration', 1.0),
    ('sasrec.num_heads', 64),
    ('max_length', 1),
  ],
)
def test_values_at_a_limit_pass(name, value):
  check_config(config_with(**{name: value}))


def test_flatten_gives_dotted_names():
  nested = {'a': 1, 'b': {'c': 2, 'd': {'e': [3]}}}
  assert flatten(nested) == {'a': 1, 'b.c': 2, 'b.d.e': [3]}


@pytest.mark.parametrize('name', OTHER)
def test_a_run_goes_on_with_fields_that_change_no_result(name):
  check_unchanged(default_config().to_dict(), changed(name, OTHER[name]), 'runs/x')


@pytest.mark.parametrize(
  'name',
  sorted(
    name
    for name in flatten(default_config().to_dict()).keys() - OTHER.keys()
    if not name.startswith('stage.') or name.startswith('stage.train.')
  ),
)
def test_a_run_does_not_go_on_with_another_value_of_any_other_field(name):
  before = flatten(default_config().to_dict())[name]
  others = {'float': 0.123, 'int': 77, 'bool': not before, 'str': 'other', 'list': ['other']}
  value = others[type(before).__name__]
  field = rf'config\.(stage\.train\.)?{name}'  # The first field, where stages take it over.
  expected = rf'{field} is {re.escape(repr(value))}.*runs/x.*{re.escape(repr(before))}'
  with pytest.raises(InputError, match=expected):
    check_unchanged(default_config().to_dict(), changed(name, value), 'runs/x')


def test_the_number_of_epochs_is_fixed_under_a_cosine_schedule():
  started = config_with(**{'optimizer.schedule': 'cosine'})
  current = config_with(**{'optimizer.schedule': 'cosine', 'num_epochs': 7})
  check_unchanged(started.to_dict(), started.to_dict(), 'runs/x')
  with pytest.raises(InputError, match=r'config\.stage\.train\.num_epochs is 7'):
    check_unchanged(started.to_dict(), current.to_dict(), 'runs/x')


def test_more_epochs_of_all_stages_are_refused_with_the_name_of_the_last_stage():
  stages = {'stages': ('pretrain_sasrec', 'train')}
  started, current = config_with(**stages), config_with(**stages, num_epochs=300)
  way_out = r'pretrain_sasrec\.num_epochs is 300.*--config\.stage\.train\.num_epochs=NUMBER'
  with pytest.raises(InputError, match=way_out):
    check_unchanged(started.to_dict(), current.to_dict(), 'runs/x')
  alone = config_with(**stages, **{'stage.train.num_epochs': 300})
  check_unchanged(started.to_dict(), alone.to_dict(), 'runs/x')


@pytest.mark.parametrize('swap', [False, True])
def test_a_field_that_only_one_side_has_is_named(swap):
  started = default_config().to_dict()
  current = started | {'extra': {'knob': 3}}
  if swap:
    started, current = current, started
  with pytest.raises(InputError, match=r'config\.extra\.knob'):
    check_unchanged(started, current, 'runs/x')


def test_fields_that_are_declared_free_may_differ():
  started = default_config().to_dict()
  check_unchanged(started, changed('evaluation.seed', 3), 'runs/x', free=('evaluation.', 'loss.'))
  with pytest.raises(InputError, match=r'config\.seed is 3'):
    check_unchanged(started, changed('seed', 3), 'runs/x', free=('evaluation.', 'loss.'))

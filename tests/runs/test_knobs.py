"""Knobs are declared once; old names are named with their new ones, and old runs open."""

import copy
import json
import pathlib
import re
import shutil

import pytest

import ur4rec_jax
from benchmarks.quality.fusions import load_finished
from tests.helpers.runs import ROOT
from ur4rec_jax import default_config, default_stage
from ur4rec_jax.errors import InputError
from ur4rec_jax.runs import sweep
from ur4rec_jax.runs.config_checks import check_config, flatten
from ur4rec_jax.runs.knobs import (
  KNOBS,
  STAGE_KNOBS,
  STAGES,
  VARIANTS,
  from_stored,
  knobs_of,
  no_such_field,
  page,
  renamed,
)
from ur4rec_jax.runs.workdir import is_started_with

ALL_KNOBS = KNOBS | {f'stage.{name}': knob for name, knob in STAGE_KNOBS.items()}
OLD_STAGE = {
  'moving': 'trainable',
  'turns': 'alternation',
  'turn_steps': 'alternation_steps',
  'alternate': 'alternation_rule',
}
OLD = {
  'paths': 'branches',
  'optimizer.item_rows': 'optimizer.item_embeddings',
  **{f'stage.train.{old}': f'stage.train.{new}' for old, new in OLD_STAGE.items()},
}


def as_stored_before(config: dict) -> dict:
  """A config as the version before the renaming stored it in config.json."""
  old = json.loads(json.dumps(config))
  old['paths'] = old.pop('branches')
  old['optimizer']['item_rows'] = old['optimizer'].pop('item_embeddings')
  for stage in old['stage'].values():
    for before, after in OLD_STAGE.items():
      stage[before] = stage.pop(after)
  return old


@pytest.fixture
def started_before(finished, tmp_path) -> pathlib.Path:
  """A finished run whose config.json has the old names."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  path = workdir / 'config.json'
  content = json.loads(path.read_text())
  content['config'] = as_stored_before(content['config'])
  path.write_text(json.dumps(content))
  return workdir


@pytest.mark.parametrize('name', ALL_KNOBS)
def test_every_knob_is_explained_in_a_line(name):
  knob = ALL_KNOBS[name]
  assert re.fullmatch(r'[A-Z][^\n|]{10,95}\.', knob.meaning)
  assert knob.problem(knob.default) == ''


@pytest.mark.parametrize('name', ALL_KNOBS)
def test_every_knob_is_read_somewhere(name):
  field = name.rpartition('.')[2]
  declared = ('knobs.py', 'config_checks.py')
  sources = [x for x in (ROOT / 'ur4rec_jax').rglob('*.py') if x.name not in declared]
  assert any(re.search(rf"\.{field}\b|'{field}'", path.read_text()) for path in sources)


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_default_config_has_the_declared_values(variant):
  fields = flatten(default_config(variant).to_dict())
  assert fields.keys() == knobs_of(default_config()).keys()
  as_json = lambda value: [*value] if isinstance(value, tuple) else value
  for name, knob in KNOBS.items():
    assert fields[name] == as_json(VARIANTS[variant].get(name, knob.default))
  for stage, changes in STAGES.items():
    for name, knob in STAGE_KNOBS.items():
      of_run = fields[knob.follows] if knob.follows else knob.default
      assert fields[f'stage.{stage}.{name}'] == as_json(changes.get(name, of_run))


@pytest.mark.parametrize('name', [name for name, knob in STAGE_KNOBS.items() if knob.follows])
def test_stages_follow_the_run_and_not_the_other_way(name):
  config = default_config()
  follows = STAGE_KNOBS[name].follows
  values = ['cosine', 'constant'] if name == 'schedule' else [7, 8]
  config.update_from_flattened_dict({follows: values[0]})
  assert {config.stage[stage][name] for stage in STAGES} == {values[0]}
  config.stage.train[name] = values[1]
  assert flatten(config.to_dict())[follows] == values[0]


def test_a_stage_of_ones_own():
  config = default_config()
  config.stage.mine = default_stage(config, losses=('sasrec',), num_steps=5)
  config.stages = ('train', 'mine')
  config.patience = 3
  check_config(config)
  assert (config.stage.mine.num_steps, config.stage.mine.patience) == (5, 3)


def test_an_unknown_name_of_the_package_is_refused():
  with pytest.raises(AttributeError, match=r"no attribute 'default_confg'.*default_config"):
    ur4rec_jax.default_confg  # noqa: B018


def test_the_page_of_knobs_is_up_to_date():
  told = 'python -m ur4rec_jax.runs.knobs > docs/knobs.md'
  assert (ROOT / 'docs/knobs.md').read_text() == page(), told


@pytest.mark.parametrize('old', OLD)
def test_an_old_name_in_a_config_file_is_refused_by_its_new_one(old):
  config = default_config()
  *sections, field = old.split('.')
  section = config
  for name in sections:
    section = section[name]
  section[field] = ('sasrec',)
  with pytest.raises(InputError, match=rf'config\.{old}: .* now named {OLD[old]}$'):
    check_config(config)


@pytest.mark.parametrize('old', OLD)
def test_an_old_name_in_a_sweep_is_refused_by_its_new_one(old):
  with pytest.raises(InputError, match=rf'overrides {old}: .* now named {OLD[old]}$'):
    sweep.make_members(default_config(), [0], [{}, {old: ('sasrec',)}])


def test_present_names_are_not_renamed():
  assert [name for name in knobs_of(default_config()) if renamed(name)] == []
  assert renamed('stage.train.path') is None
  assert renamed('moving') is None


@pytest.mark.parametrize(
  ('field', 'told'),
  [
    ('sasrec.droput', 'did you mean sasrec.dropout?'),
    ('stage.train.num_step', 'did you mean stage.train.num_steps?'),
    ('learning_rate', 'did you mean optimizer.learning_rate?'),
    ('x', 'docs/knobs.md lists all'),
  ],
)
def test_a_typo_is_told_the_nearest_name(field, told):
  assert no_such_field(field, knobs_of(default_config())).endswith(told)


def test_an_unknown_field_of_a_config_is_refused():
  config = default_config()
  config.sasrec.droput = 0.5
  with pytest.raises(InputError, match=r'config\.sasrec\.droput: .*sasrec\.dropout'):
    check_config(config)


def test_a_field_without_a_value_is_refused():
  config = default_config()
  config.patience = None
  with pytest.raises(InputError, match=r'config\.patience=None: must be a whole number'):
    check_config(config)


def test_a_config_without_stages_is_refused():
  config = default_config()
  del config.stage
  with pytest.raises(InputError, match=r'config\.stage is missing'):
    check_config(config)


@pytest.mark.parametrize('variant', VARIANTS)
def test_an_old_stored_config_is_the_present_one(variant, tmp_path):
  config = default_config(variant)
  old = as_stored_before(config.to_dict())
  before = copy.deepcopy(old)
  as_json = json.loads(json.dumps(config.to_dict()))
  assert from_stored(old).to_dict() == config.to_dict()
  assert from_stored(as_json).to_dict() == config.to_dict()
  assert old == before
  (tmp_path / 'config.json').write_text(json.dumps({'config': old}))
  assert is_started_with(tmp_path, config)
  config.optimizer.b1 = 0.5
  assert not is_started_with(tmp_path, config)


def test_a_run_from_before_a_knob_keeps_what_it_did():
  stored = default_config().to_dict()
  del stored['loss']['seen_items'], stored['sasrec']['filter_width']
  config = from_stored(stored)
  assert (config.loss.seen_items, config.sasrec.filter_width) == ('keep', 0)


@pytest.mark.parametrize('damaged', [None, 3, 'text'])
def test_a_damaged_stored_config_is_an_error(damaged):
  with pytest.raises((TypeError, ValueError)):
    from_stored(damaged)


def test_a_run_of_the_previous_version_goes_on(run, started_before, finished):
  done = run(started_before)
  assert done.returncode == 0, done.stderr
  for name in ('config.json', 'results.json', 'metrics.jsonl'):
    stored = [(folder / name).read_text() for folder in (started_before, finished)]
    if name == 'config.json':  # A finished run keeps its own; what it says is the same.
      stored = [from_stored(json.loads(content)['config']).to_dict() for content in stored]
    assert stored[0] == stored[1]


def test_a_run_of_the_previous_version_does_not_go_on_with_another_config(run, started_before):
  done = run(started_before, '--config.sasrec.dim=8')
  assert done.returncode == 2
  assert 'config.sasrec.dim is 8' in done.stderr


def test_a_run_of_the_previous_version_is_loaded(started_before, finished):
  old, new = (ur4rec_jax.load(folder) for folder in (started_before, finished))
  history = old.items['ids'][:3]
  assert old.recommend(history, k=5).equals(new.recommend(history, k=5))
  assert [*load_finished(started_before)[0].config.branches] == ['sasrec']

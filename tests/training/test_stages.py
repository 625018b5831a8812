"""Stages: what they refuse, what moves in them, whose turn it is, and runs from stage to stage."""

import functools
import itertools
import json
import pathlib
import re
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.robustness.small_runs import (
  DEFAULT,
  TINY,
  assert_same_end,
  before_the_manifest,
  in_a_save,
  lines,
  load_arrays,
)
from configs import default
from tests.helpers.fork_server import Program
from tests.helpers.runs import ROOT, wait_for
from ur4rec_jax.data.features import Tables, TokenTable
from ur4rec_jax.errors import InputError
from ur4rec_jax.runs.config_checks import check_config
from ur4rec_jax.training import stages
from ur4rec_jax.training.optimizers import by_name, group_of
from ur4rec_jax.training.train_state import parameter_shapes, start_of_stage

SHALLOW = {  # For speed.
  'content.cross_modal_blocks': 0,
  'retriever.cross_modal_blocks': 0,
  'retriever.num_blocks': 0,
}


# --- From config to stages ---


def make(variant: str = 'multimodal', **fields):
  """The stages and labels of a config with some fields changed."""
  config = default.get_config(variant)
  with config.ignore_type():
    config.update_from_flattened_dict(SHALLOW | fields)
  return made_of(config)


def made_of(config):
  """The stages and labels of a config."""
  check_config(config)
  tables = {
    name: TokenTable(np.zeros((8, 2, 3), np.float32), np.ones((8, 2), bool))
    for name in config.modalities
  }
  shapes_of = lambda model: parameter_shapes(model, Tables(tables, {}))
  return stages.make_stages(config, 7, shapes_of)


def test_the_default_stages():
  made, labels = make()
  assert tuple(stage.name for stage in made) == DEFAULT
  assert set(jax.tree.leaves(labels)) == {'sasrec', 'user_tower', 'content_tower', 'loss'}
  of_retriever = {'user_tower', 'content_tower', 'loss'}
  assert [stage.trainable for stage in made] == [
    {'sasrec'},
    of_retriever,
    {'sasrec'} | of_retriever,
    {'sasrec'} | of_retriever,
  ]
  assert made[2].alternation == ({'sasrec', 'loss'}, of_retriever)
  assert [stage.config.branches for stage in made] == [
    ('sasrec',),
    ('retriever',),
    ('sasrec', 'retriever'),
    ('sasrec', 'retriever'),
  ]
  assert tuple(made[0].losses) == ('sasrec',)
  assert set(made[1].losses) == {'retriever', 'consistency', 'info_nce'}
  assert str(made[0]) == 'pretrain_sasrec: sasrec'
  assert ' | ' in str(made[2])


@pytest.mark.parametrize('variant', ['text', 'paper'])
def test_the_default_stages_of_other_variants(variant):
  made, _ = make(variant)
  assert tuple(stage.name for stage in made) == DEFAULT


def test_sasrec_alone_has_one_stage_of_one_group():
  (stage,), labels = make('sasrec')
  assert (stage.name, stage.trainable, stage.alternation) == ('train', {'sasrec'}, ({'sasrec'},))
  assert set(jax.tree.leaves(labels)) == {'sasrec'}


def test_stages_are_dropped_reordered_and_repeated():
  names = ('end_to_end', 'pretrain_sasrec', 'end_to_end')
  made, _ = make(**{'stages': names, 'stage.end_to_end.num_steps': 9})
  assert tuple(stage.name for stage in made) == names
  assert [stage.total_steps(steps_per_epoch=5) for stage in made] == [9, 1000, 9]


def test_a_regex_parts_a_group():
  trainable = {'stage.end_to_end.trainable': (r'sasrec/blocks_1/.*', 'fusion')}
  made, labels = make(**trainable, **{'stage.end_to_end.losses': ('sasrec',)})
  names = by_name(labels)
  upper = {name for name in names if name.startswith('sasrec/blocks_1/')}
  assert {names[name] for name in upper} == set(made[3].trainable)
  assert len({label for label in names.values() if label.startswith('sasrec')}) == 2
  assert not {names[name] for name in names.keys() - upper} & made[3].trainable
  assert made[0].trainable == {'sasrec', 'sasrec-1'}


def test_the_example_of_the_training_page_works():
  page = (ROOT / 'docs' / 'training.md').read_text()
  (example,) = (code for code in re.findall(r'```python\n(.*?)```', page, re.S) if 'stage' in code)
  exec(example, namespace := {})
  made, labels = made_of(namespace['get_config']())
  assert [stage.name for stage in made] == ['pretrain_sasrec', 'pretrain_retriever', 'upper_blocks']
  assert tuple(made[-1].losses) == ('fused',)
  trained = {name for name, of in by_name(labels).items() if of in made[-1].trainable}
  assert trained
  assert all(name.startswith('sasrec/blocks_1/') for name in trained)


def test_the_retriever_can_be_trained_alone():
  made, _ = make('text', stages=('pretrain_retriever',))
  assert made[0].config.branches == ('retriever',)


def test_learned_weights_of_losses_move_only_with_their_loss():
  made, labels = make(**{'loss.weighting': 'uncertainty'})
  names = by_name(labels)
  assert names['log_variance_sasrec'] not in made[1].trainable
  assert names['log_variance_retriever'] in made[1].trainable


REFUSED = [
  (
    {'stages': ('pretrain', 'end_to_end')},
    "'pretrain' is no stage; known: end_to_end, joint_finetune",
  ),
  ({'stages': ()}, 'needs at least one'),
  (
    {'stage.end_to_end.trainable': ('towers',)},
    "'towers' is none of the groups .* and .* matches no",
  ),
  ({'stage.end_to_end.trainable': ('sasrec/(',)}, 'is no regular expression'),
  ({'stage.end_to_end.trainable': ('.*',)}, "matches every parameter; say 'all'"),
  ({'stage.end_to_end.trainable': ()}, 'nothing is trained'),
  ({'stage.end_to_end.trainable': ('fusion',)}, 'nothing is trained'),
  ({'stage.end_to_end.trainable': ('sasrec',)}, 'no parameter of retriever is trained'),
  ({'stage.pretrain_sasrec.trainable': ('sasrec', 'retriever')}, 'no loss .* reaches retriever'),
  ({'stage.pretrain_sasrec.losses': ('hinge',)}, "'hinge' is no loss; known: all, "),
  ({'stage.pretrain_sasrec.losses': ('fused',)}, 'trains no branch'),
  ({'stage.pretrain_sasrec.losses': ()}, 'trains no branch'),
  ({'stage.pretrain_retriever.losses': ('info_nce',)}, 'trains no branch'),
  ({'stage.pretrain_sasrec.losses': ('sasrec', 'info_nce')}, 'info_nce needs vectors'),
  (
    {'stage.pretrain_sasrec.losses': ('sasrec', 'matching'), 'loss.weights.matching': 1.0},
    'matching needs vectors',
  ),
  ({'stage.joint_finetune.alternation': ('sasrec',)}, 'two entries or more'),
  (
    {'stage.joint_finetune.alternation': ('sasrec', 'fusion')},
    'each with something that is trained',
  ),
  ({'stage.joint_finetune.alternation': ('sasrec', 'sasrec/blocks_0/.*')}, 'in two turns'),
]


@pytest.mark.parametrize(('fields', 'told'), REFUSED)
def test_an_impossible_stage_is_refused(fields, told):
  with pytest.raises(InputError, match=told) as refusal:
    make(**fields)
  assert next(iter(fields)).rpartition('.')[0] in str(refusal.value)


# --- Turns ---


def turns_of(losses, alternation_rule='steps', alternation_steps=3, num_turns=2) -> list[int]:
  """Whose turn each step was."""
  fields = {'stage.joint_finetune.alternation_rule': alternation_rule}
  made, labels = make(**fields, **{'stage.joint_finetune.alternation_steps': alternation_steps})
  numbers = stages.stage_numbers(made[2], labels, steps_per_epoch=5, max_turns=2)
  numbers = numbers._replace(num_turns=np.int32(num_turns))
  step = jax.jit(functools.partial(stages.after_step, numbers=numbers))
  state, turns = start_of_stage(), []
  for loss in losses:
    turns.append(int(state.turn))
    state = step(state, jnp.float32(loss))
  assert state.step == len(losses)
  return turns


def test_turns_of_a_number_of_steps():
  assert turns_of([1.0] * 10) == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
  assert turns_of([1.0] * 7, num_turns=1) == [0] * 7


def test_an_adaptive_turn_lasts_while_the_loss_falls():
  falling, flat = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0], [3.0] * 2
  assert turns_of(falling + flat, 'adaptive') == [0] * 8
  # The average comes down to 3 from above, so that the wait begins where the loss rises.
  assert turns_of([*falling, 9.0, 9.0, 9.0, 9.0], 'adaptive') == [0] * 9 + [1]
  assert turns_of([5.0] * 5, 'adaptive') == [0, 0, 0, 0, 1]


# --- Whole runs ---


@pytest.fixture(scope='module')
def text_data_dir(data_dir, environment, make_once) -> pathlib.Path:
  """The prepared dataset with features of its items' texts."""

  def make(folder):
    shutil.copytree(data_dir, folder / 'text')
    flags = [f'--data_dir={folder / "text"}', '--modality=text', '--encoder=hashing', '--of=item']
    flags += ['--max_tokens=2', '--width=8']
    done = Program('data_prep.encode', flags, environment, ROOT).finish()
    assert done.returncode == 0, done.stderr

  return make_once('short_texts', make) / 'text'


@pytest.fixture(scope='module')
def start_staged(start, text_data_dir):
  """Starts a run of two paths through the default stages: `start_staged(workdir, *flags)`."""

  def start_staged(workdir, *flags, **options) -> subprocess.Popen:
    return start(
      workdir, f'--config.data_dir={text_data_dir}', *TINY, *flags, variant='text', **options
    )

  return start_staged


@pytest.fixture(scope='module')
def run_staged(start_staged):
  """Runs it to its end."""

  def run_staged(workdir, *flags, **options) -> subprocess.CompletedProcess:
    process = start_staged(workdir, *flags, **options)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return subprocess.CompletedProcess(process.args, 0, stdout, stderr)

  return run_staged


# Each stage's last save is kept, and what a stage ends with is what the next begins with.
KEEP = ('--config.checkpoint.max_to_keep=20', '--config.checkpoint.every_validations=100')
LAST = tuple(f'--config.stage.{name}.start_next_with=last' for name in DEFAULT)


@pytest.fixture(scope='module')
def whole(run_staged, make_once) -> pathlib.Path:
  """The workdir of an undisturbed run; read only."""

  def make(folder):
    done = run_staged(folder / 'run', *KEEP, *LAST, env={'JAX_LOG_COMPILES': '1'})
    (folder / 'run' / 'stderr').write_text(done.stderr)
    (folder / 'run' / 'stdout').write_text(done.stdout)

  return make_once('staged', make) / 'run'


def ends_of_stages(workdir) -> dict[str, int]:
  """The step at which each stage ended."""
  steps = [stage['steps'] for stage in json.loads((workdir / 'results.json').read_text())['stages']]
  return dict(zip(DEFAULT, np.cumsum(steps).tolist(), strict=True))


def by_group(workdir, step: int) -> dict[str, dict[str, np.ndarray]]:
  """A checkpoint's parameters and optimizer state, by group."""
  groups = {}
  for name, value in load_arrays(workdir, step).items():
    parts = re.findall(r"'(\w+)'", name)
    if parts[:2] == ['state', 'params']:
      group = group_of('/'.join(parts[2:]))
    elif parts[:2] == ['state', 'opt_state']:
      group = parts[3]
    else:
      continue
    groups.setdefault(group, {})[name] = value
  return groups


@pytest.mark.parametrize(('before', 'stage'), list(itertools.pairwise(DEFAULT)))
def test_a_stage_changes_its_own_groups_and_no_bit_of_others(before, stage, whole):
  ends = ends_of_stages(whole)
  was, now = by_group(whole, ends[before]), by_group(whole, ends[stage])
  trainable = {'user_tower', 'content_tower'} if stage == 'pretrain_retriever' else set(was)
  assert set(was) == {'sasrec', 'user_tower', 'content_tower'}
  for group in was:
    assert was[group].keys() == now[group].keys()
    assert any('mu' in name for name in was[group])
    same = [np.array_equal(was[group][name], now[group][name]) for name in was[group]]
    counts = [name for name in was[group] if name.endswith("['count']")]
    assert len(counts) == 1
    if group in trainable:
      # A gate over one modality has no gradient.
      assert not any(s for s, name in zip(same, was[group], strict=True) if 'gate' not in name)
    else:
      assert all(same)


def test_the_first_stage_leaves_the_retriever_as_it_was_made(whole):
  end = ends_of_stages(whole)['pretrain_sasrec']
  arrays = load_arrays(whole, end)
  params = {k: x for k, x in arrays.items() if k.startswith("['state']['params']")}
  for name, value in params.items():
    last = arrays[name.replace("['state']['params']", "['best_params']")][-1]  # Not begun yet.
    assert np.array_equal(value, last) == ("['retriever']" in name), name
  for group, state in by_group(whole, end).items():
    moments = [x for name, x in state.items() if 'opt_state' in name]
    assert any(x.any() for x in moments) == (group == 'sasrec')


def test_groups_take_turns(whole):
  ends = ends_of_stages(whole)
  was = by_group(whole, ends['pretrain_retriever'])
  now = by_group(whole, ends['joint_finetune'])
  steps = ends['joint_finetune'] - ends['pretrain_retriever']
  for group in was:
    (name,) = [name for name in was[group] if name.endswith("['count']")]
    assert now[group][name] - was[group][name] == steps // 2


def test_what_is_reported_of_stages(whole):
  results = json.loads((whole / 'results.json').read_text())
  stages = results['stages']
  assert [stage['name'] for stage in stages] == list(DEFAULT)
  assert [stage['paths'] for stage in stages[:2]] == [['sasrec'], ['retriever']]
  best = max(stages, key=lambda stage: stage['valid']['ndcg@10'])
  assert stages[results['best_stage']] == best
  assert (results['valid'], results['test']) == (best['valid'], best['test'])
  lines = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
  assert list(dict.fromkeys(line['stage'] for line in lines)) == list(DEFAULT)
  for stage, end in ends_of_stages(whole).items():
    of_stage = [line for line in lines if line['stage'] == stage]
    assert of_stage[-1]['step'] == end
    assert 'valid/ndcg@10' in of_stage[-1]
    assert ('turn' in of_stage[-2]) == (stage == 'joint_finetune')
  shown = (whole / 'stdout').read_text()
  assert 'joint_finetune: sasrec | content_tower+user_tower' in shown
  assert 'pretrain_retriever: content_tower+user_tower' in shown


def test_stages_that_train_the_same_share_a_program(whole):
  mapped = log_of(whole).count('Finished XLA compilation of jit(_fun)')
  # The last two stages differ in numbers only. Three kinds of scores are validated and tested, and
  # the best one lists what it recommends to some users.
  assert mapped == 3 + 3 + 3 + 1


def log_of(workdir) -> str:
  return (workdir / 'stderr').read_text()


def test_the_best_parameters_are_those_that_are_evaluated_again(run_staged, whole):
  done = run_staged(whole, *KEEP, *LAST, '--mode=evaluate')
  results = json.loads((whole / 'results.json').read_text())
  again = json.loads(done.stdout)
  assert (again['valid'], again['test']) == (results['valid'], results['test'])


def has_begun(stage):
  return lambda workdir: any(line['stage'] == stage for line in lines(workdir))


@pytest.mark.slow
def test_killed_between_and_within_stages_it_ends_the_same(
  start_staged, run_staged, whole, tmp_path
):
  workdir = tmp_path / 'run'
  begun = [has_begun(stage) for stage in ('pretrain_retriever', 'joint_finetune', 'end_to_end')]
  for number, moment in enumerate((in_a_save, *begun, before_the_manifest)):
    process = start_staged(workdir, *KEEP, *LAST)
    wait_for(process, lambda moment=moment: moment(workdir))
    process.send_signal([signal.SIGKILL, signal.SIGTERM][number % 2])
    process.communicate()
    assert not (workdir / 'results.json').exists()
  run_staged(workdir, *KEEP, *LAST)
  assert_same_end(workdir, whole)


@pytest.mark.slow
def test_a_stage_starts_from_the_checkpoint_of_the_one_before(run_staged, whole, tmp_path):
  ends = ends_of_stages(whole)
  for stage in (DEFAULT[0], DEFAULT[2]):
    workdir = tmp_path / stage
    shutil.copytree(whole, workdir)
    (workdir / 'results.json').unlink()
    for folder in (workdir / 'checkpoints').iterdir():
      if folder.name.isdigit() and int(folder.name) > ends[stage]:
        shutil.rmtree(folder)
    done = run_staged(workdir, *KEEP, *LAST)
    assert f'resuming from step {ends[stage]}, in stage {stage}' in done.stdout
    assert_same_end(workdir, whole)


@pytest.mark.slow
def test_pmap_equals_shard_map(run_staged, tmp_path):
  """Where the retriever is frozen and two parts of SASRec take turns, on two devices."""
  flags = (
    "--config.stages=('pretrain_sasrec',)",
    '--config.stage.pretrain_sasrec.num_epochs=2',
    "--config.stage.pretrain_sasrec.alternation=('sasrec/item_embedding','sasrec/blocks_0/.*')",
    '--config.stage.pretrain_sasrec.alternation_steps=1',
  )
  two_devices = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  for mapping in ('pmap', 'shard_map'):
    run_staged(tmp_path / mapping, *flags, f'--config.mapping={mapping}', env=two_devices)
  ours, theirs = (load_arrays(tmp_path / mapping) for mapping in ('pmap', 'shard_map'))
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, err_msg=name)
  counts = [x for name, x in ours.items() if name.endswith("['count']")]
  assert sorted(counts) == [0, 0, 2, 2, 4]  # The retriever's towers, both turns, the rest.


def test_a_run_that_cannot_save_in_time_ends_itself(start_staged, tmp_path):
  flags = ('--config.checkpoint.grace_seconds=0.1', '--config.compilation_cache=none')
  process = start_staged(tmp_path / 'run', *flags, env={'PYTHONUNBUFFERED': '1'})
  while 'devices' not in process.stdout.readline():  # Compiling comes next.
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 128 + signal.SIGTERM
  assert 'no save within config.checkpoint.grace_seconds=0.1' in stderr
  assert 'same command again' in stderr


def test_a_refused_stage_leaves_nothing(start_staged, tmp_path):
  process = start_staged(tmp_path / 'run', '--config.stage.end_to_end.trainable=("towers",)')
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 2
  assert "'towers' is none of the groups" in stderr
  assert 'Traceback' not in stderr
  assert not (tmp_path / 'run').exists()

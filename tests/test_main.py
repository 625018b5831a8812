"""What a person sees: reports, files, and one clear message for each wrong input."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import tensorflow_datasets as tfds

from benchmarks.robustness.small_runs import load_arrays
from tests.helpers.fork_server import Program
from tests.helpers.marks import slow
from tests.helpers.runs import ROOT
from ur4rec_jax.evaluation.metrics import ranking_metrics

METRICS = ['hit@5', 'hit@10', 'hit@20', 'ndcg@5', 'ndcg@10', 'ndcg@20', 'mrr', 'mean_rank']


def assert_refused(done, *words, code=2):
  """The program ended with a message that has all the words, and without a traceback."""
  assert done.returncode == code, done.stderr
  for word in words:
    assert str(word) in done.stderr
  assert 'Traceback' not in done.stderr


def test_results_say_what_was_measured_and_how(finished, data_dir):
  results = json.loads((finished / 'results.json').read_text())
  dataset = json.loads((data_dir / 'dataset.json').read_text())
  assert results['dataset']['split_hash'] == dataset['splits']['leave_one_out']['hash']
  assert results['dataset']['users'] == 120
  assert results['protocol'] == {
    'split': 'leave_one_out',
    'candidates': 'all items',
    'seen_items': 'left out',
    'ties': 'against the model',
  }
  for scores in (results['valid'], results['test'], *results['baselines'].values()):
    assert set(METRICS) <= scores.keys()
    assert scores['users'] == 120
  for part in ('valid', 'test'):
    groups = results['by_popularity'][part]
    assert [*groups][:3] == ['head', 'torso', 'tail']
    assert sum(group['users'] for group in groups.values()) == 120
    hits = sum(group['hit@10'] * group['users'] for group in groups.values())
    assert hits == pytest.approx(results[part]['hit@10'] * 120)
  assert results['stages'][0]['test'] == results['test']
  assert results['seed'] == 0


def test_ranks_and_parameters_are_those_of_the_results(finished):
  results = json.loads((finished / 'results.json').read_text())
  with np.load(finished / 'test_ranks.npz') as archive:
    np.testing.assert_array_equal(archive['users'], np.arange(120))
    assert archive['ranks'].dtype == np.int32
    assert ranking_metrics(archive['ranks']) == results['test']
  best = {k: x for k, x in load_arrays(finished).items() if k.startswith("['best_params']")}
  assert results['parameters'] == sum(x.size for x in best.values()) > 0


def test_metrics_have_one_json_object_a_line(finished):
  lines = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
  assert all({'step', 'stage'} <= line.keys() for line in lines)
  losses = [line['loss'] for line in lines if 'loss' in line]
  assert losses[-1] < losses[0]
  validated = [line['step'] for line in lines if 'valid/ndcg@10' in line]
  assert len(validated) == 4
  assert validated == sorted(set(validated))


def test_tensorboard_files_are_written(finished):
  assert list((finished / 'tensorboard').glob('events.out.tfevents.*'))


def test_the_report_of_a_run(run, tmp_path):
  done = run(tmp_path / 'run', '--config.parameter_table=True')
  assert done.returncode == 0, done.stderr
  assert 'item_embedding' in done.stdout  # The parameter table.
  assert 'total' in done.stdout
  for word in ('random', 'popularity', 'sasrec', 'sasrec (valid)', *METRICS):
    assert word in done.stdout
  (line,) = [x for x in done.stdout.splitlines() if x.startswith('test ndcg@10 by popularity')]
  for word in ('head 0.', 'torso 0.', 'tail 0.'):
    assert word in line
  assert 'train is over: all 4 epochs are done; best valid ndcg@10 0.' in done.stderr
  assert 'epoch 4' in done.stderr  # Plain lines, as there is no terminal.
  assert 'sequences/s' in done.stderr
  assert '\r' not in done.stderr


def test_a_sampled_protocol_is_named_beside_its_numbers(run, finished):
  done = run(
    finished,
    '--mode=evaluate',
    '--config.evaluation.candidates=popularity',
    '--config.evaluation.num_candidates=20',
  )
  assert done.returncode == 0, done.stderr
  sampled = json.loads(done.stdout)
  assert sampled['protocol']['candidates'] == 'target + 20 popularity (seed 0)'
  assert 'target + 20 popularity (seed 0)' in done.stderr
  assert sampled['test']['mean_rank'] <= 21
  assert (
    json.loads((finished / 'results.json').read_text())['protocol']['candidates'] == 'all items'
  )


@pytest.mark.parametrize(('loss', 'rows'), [('sampled_softmax', 'touched'), *slow(('gbce', 'all'))])
def test_sampled_losses_train(loss, rows, run, tmp_path):
  flags = (f'--config.loss.name={loss}', f'--config.optimizer.item_embeddings={rows}')
  flags += ('--config.loss.num_negatives=8', '--config.num_epochs=2')
  done = run(tmp_path / 'run', *flags)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_bfloat16_post_norm_random_crop_and_cosine_train(run, tmp_path):
  done = run(
    tmp_path / 'run',
    '--config.dtype=bfloat16',
    '--config.sasrec.norm=post',
    '--config.sasrec.num_heads=2',
    '--config.crop=random',
    '--config.optimizer.schedule=cosine',
    '--config.optimizer.weight_decay=0.01',
  )
  assert done.returncode == 0, done.stderr


def test_divergence_stops_the_run_and_keeps_the_good_checkpoint(run, tmp_path):
  workdir = tmp_path / 'run'
  flags = ('--config.optimizer.name=sgd', '--config.optimizer.clip_norm=0.0')
  assert run(workdir, *flags, '--config.num_epochs=1').returncode == 0
  shutil.copytree(workdir, tmp_path / 'before')
  other = run(tmp_path / 'other', *flags, '--config.optimizer.learning_rate=1e38')
  # The same folder would refuse another rate.
  assert_refused(other, 'not finite at step', 'another --workdir', 'learning_rate', code=3)
  assert not (tmp_path / 'other/results.json').exists()
  assert not [p for p in (tmp_path / 'other/checkpoints').iterdir() if p.name.isdigit()]


GOOD = ('--config=synthetic', '--workdir=run')
MISTAKES = {
  # What is typed, and what the message must contain.
  (): ['--config is missing'],
  ('--workdir=run',): ['--config is missing'],
  ('--config=synthetic',): ['--workdir is missing'],
  (*GOOD, '--config.sasrec.dims=3'): ['config.sasrec.dims: no such field', 'sasrec.dim?'],
  (*GOOD, '--config.paths=x'): ['config.paths', 'now named branches'],
  (*GOOD, '--config.optimizer.item_rows=all'): ['now named optimizer.item_embeddings'],
  (*GOOD, '--noconfig.shufled_features'): ['shuffled_features?'],
  (*GOOD, '--config.batch_size=many'): ['config.batch_size', 'many'],
  (*GOOD, '--config.stage=3'): ['config.stage'],
  (*GOOD, '--config.sasrec=3'): ['config.sasrec'],
  (*GOOD, '--config.seed'): ['config.seed'],
  (*GOOD, '--workdr=other'): ['workdr', 'workdir'],
  (*GOOD, '--mode=trian'): ['--mode=trian', 'evaluate'],
  (*GOOD, '--seeds=1,1'): ['--seeds=1,1', '0,1,2'],
  (*GOOD, '--seeds=one'): ['--seeds=one', '0,1,2'],
  (*GOOD, '--mode=evaluate', '--seeds=1'): ['--mode=evaluate'],
  (*GOOD, '--trials=5'): ['--trials: is for --search'],
  (*GOOD, 'train'): ["unexpected argument 'train'"],
  ('--config.seed=1', *GOOD): ['config.seed'],
  ('--config=synthetic:bert', '--workdir=run'): ["unknown model variant 'bert'", 'multimodal'],
  ('--config=synthetik', '--workdir=run'): ['synthetik', 'did you mean synthetic?'],
  ('--config=configs/movielens.py', '--workdir=run'): ['configs/movielens.py', 'movielens_1m'],
  ('--config=.', '--workdir=run'): ['no such file'],
  ('--config=imports.py', '--workdir=run'): ['imports.py, line 2', "No module named 'nothing'"],
  ('--config=raises.py', '--workdir=run'): ['raises.py, line 2', "KeyError: 'dim'"],
  ('--config=syntax.py', '--workdir=run'): ['syntax.py', 'line 1'],
  ('--config=empty.py', '--workdir=run'): ['empty.py has no function get_config'],
  ('--config=number.py', '--workdir=run'): ['number.py', 'must return a ConfigDict, not 3'],
  ('--config=number.py:text', '--workdir=run'): ['number.py', 'takes 0 positional arguments'],
  (*GOOD, '--sweep=nothing.py'): ['--sweep=nothing.py', 'cannot be read'],
  (*GOOD, '--sweep=imports.py'): ['--sweep=imports.py', 'line 2'],
}
FILES = {
  'imports.py': '\nimport nothing\n',
  'raises.py': 'def get_config():\n  return {}["dim"]\n',
  'syntax.py': 'def get_config(:\n',
  'empty.py': '',
  'number.py': 'def get_config():\n  return 3\n',
}


def test_mistakes_end_with_one_message_and_code_2(environment, tmp_path):
  for name, content in FILES.items():
    (tmp_path / name).write_text(content)
  run = lambda flags: Program('ur4rec_jax.main', flags, environment, tmp_path).finish()
  for flags, words in MISTAKES.items():
    done = run(flags)
    assert done.returncode == 2, (flags, done.stderr)
    assert done.stderr.startswith('error: '), flags
    assert done.stderr.count('\n') == 1, (flags, done.stderr)
    for word in words:
      assert word in done.stderr, flags
  done = run(('--help',))
  assert done.returncode == 0
  assert '--workdir' in done.stdout
  assert not (tmp_path / 'run').exists()


def test_unknown_field(run, tmp_path):
  done = run(tmp_path / 'run', '--config.sasrec.dims=32')
  assert_refused(done, 'config.sasrec.dims', 'sasrec.dim?')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('--config.loss.name=hinge', ['config.loss.name', 'hinge', 'softmax']),
    ('--config.sasrec.num_heads=3', ['config.sasrec.num_heads=3', 'config.sasrec.dim=16']),
    ('--config.batch_size=0', ['config.batch_size=0', 'at least 1']),
    ('--config.sasrec.dropout=1.0', ['config.sasrec.dropout']),
    ('--config.data_dir=/nowhere', ['/nowhere', 'no such folder', 'data_prep.build_dataset']),
    ('--mode=evaluate', ['no run here', '--mode=train']),
  ],
)
def test_impossible_values(flag, words, run, tmp_path):
  assert_refused(run(tmp_path / 'run', flag), *words)
  assert not (tmp_path / 'run').exists()


def test_unknown_config_file_and_variant(run, tmp_path):
  done = run(tmp_path / 'run', f'--config={ROOT}/configs/nothing.py')
  assert_refused(done, 'nothing.py')
  done = run(tmp_path / 'run', f'--config={ROOT}/configs/synthetic.py:bert')
  assert_refused(done, "unknown model variant 'bert'")


def test_a_folder_that_is_no_dataset(run, tmp_path):
  done = run(tmp_path / 'run', f'--config.data_dir={tmp_path}')
  assert_refused(done, tmp_path, 'not a prepared dataset')


def test_a_split_at_a_point_in_time(run, data_dir, tmp_path):
  done = run(tmp_path / 'run', '--config.split=time')
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / 'run/results.json').read_text())
  record = json.loads((data_dir / 'dataset.json').read_text())['splits']['time']
  assert results['dataset']['split_hash'] == record['hash']
  assert results['protocol']['split'].startswith('time: valid from 2020-')
  assert results['valid']['users'] == record['valid_users']
  assert results['test']['users'] == results['baselines']['popularity']['users']
  assert results['test']['users'] == record['test_users']
  # The checkpoints of one split are not to be judged by another.
  other = run(tmp_path / 'run', '--mode=evaluate')
  assert other.returncode == 2
  assert 'use another --workdir' in other.stderr


def test_a_split_that_the_data_do_not_have(run, data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  info = json.loads((copy / 'dataset.json').read_text())
  del info['splits']['time']
  (copy / 'dataset.json').write_text(json.dumps(info))
  done = run(tmp_path / 'run', f'--config.data_dir={copy}', '--config.split=time')
  assert_refused(done, copy, "has no split 'time'")


def test_data_of_another_format_are_refused(run, data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  info = json.loads((copy / 'dataset.json').read_text())
  (copy / 'dataset.json').write_text(json.dumps(info | {'format_version': 1}))
  done = run(tmp_path / 'run', f'--config.data_dir={copy}')
  assert_refused(done, copy, 'is of format 1')


def test_changed_interactions_are_noticed(run, data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  info = json.loads((copy / 'dataset.json').read_text())
  info['splits']['leave_one_out']['hash'] = '0' * 16
  (copy / 'dataset.json').write_text(json.dumps(info))
  done = run(tmp_path / 'run', f'--config.data_dir={copy}')
  assert_refused(done, copy, 'differ from dataset.json')


def test_damaged_data_is_noticed(run, data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  (path,) = copy.glob('interactions/*/*.array_record*')
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  done = run(tmp_path / 'run', f'--config.data_dir={copy}')
  assert_refused(done, copy, 'build it')


def test_a_workdir_of_another_dataset(run, finished, environment, data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  info = json.loads((copy / 'dataset.json').read_text())
  info['name'] = 'another'
  (copy / 'dataset.json').write_text(json.dumps(info))
  done = run(finished, f'--config.data_dir={copy}')
  assert_refused(done, 'another', 'use another --workdir')


def test_a_changed_field_is_named(run, finished):
  done = run(finished, '--config.sasrec.dim=32')
  assert_refused(done, 'config.sasrec.dim', '32', '16', '--workdir')


def test_a_second_process_in_the_workdir_is_refused(start, run, tmp_path):
  workdir = tmp_path / 'run'
  first = start(workdir, '--config.num_epochs=1000', '--config.patience=1000')
  assert any('epoch 1' in line for line in first.stderr)
  assert_refused(run(workdir), 'another process is training', workdir, first.pid, code=7)
  first.kill()
  first.communicate()


def test_more_epochs_go_on(run, finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  done = run(workdir, '--config.num_epochs=5')
  assert done.returncode == 0, done.stderr
  assert 'resuming from step' in done.stdout
  assert 'epoch 5' in done.stderr


def test_fewer_epochs_than_were_trained_are_refused_and_change_nothing(run, finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  before = {path: path.read_bytes() for path in workdir.glob('*.*')}
  done = run(workdir, '--config.num_epochs=1')
  assert_refused(done, 'config.num_epochs=1', '4 epochs already', 'another --workdir')
  assert before == {path: path.read_bytes() for path in workdir.glob('*.*')}


def test_less_patience_than_a_run_was_validated_with_is_refused(run, finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  before = {path: path.read_bytes() for path in workdir.glob('*.*')}
  done = run(workdir, '--config.patience=2')
  assert_refused(done, 'config.patience=2', 'was started with 10', 'train 4 times')
  assert before == {path: path.read_bytes() for path in workdir.glob('*.*')}


def test_an_unwritable_workdir(run, tmp_path):
  (tmp_path / 'file').write_text('')
  assert_refused(run(tmp_path / 'file' / 'run'.replace('run', '.')), 'cannot write', code=4)


def test_one_user_or_one_item_is_refused(run, data_dir, tmp_path):
  copy = tmp_path / 'data'
  # The flat arrays would not belong to the changed catalogue.
  shutil.copytree(data_dir, copy, ignore=shutil.ignore_patterns('flat'))
  info = json.loads((copy / 'dataset.json').read_text())
  info['counts']['items'] = 1
  (copy / 'dataset.json').write_text(json.dumps(info))
  assert_refused(run(tmp_path / 'run', f'--config.data_dir={copy}'), '1 items', 'at least 2')


def test_ctrl_c_saves(start, tmp_path):
  workdir = tmp_path / 'run'
  process = start(workdir, '--config.num_epochs=1000', '--config.patience=1000')
  for line in process.stderr:
    if 'epoch 2' in line:
      break
  os.kill(process.pid, signal.SIGINT)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 128 + signal.SIGINT
  assert 'SIGINT: saved step' in stderr


def test_other_programs_read_the_data_with_tfds_alone(data_dir):
  source = tfds.builder_from_directory(data_dir / 'interactions/1.0.0').as_data_source('users')
  assert all(np.asarray(user['item_ids']).dtype == np.int32 for user in source)


def test_more_epochs_are_refused_where_the_schedule_ends_with_them(run, tmp_path):
  workdir = tmp_path / 'run'
  cosine = '--config.optimizer.schedule=cosine'
  assert run(workdir, cosine, '--config.num_epochs=1').returncode == 0
  assert_refused(run(workdir, cosine, '--config.num_epochs=2'), 'num_epochs is 2', workdir)

"""Members of a sweep are the runs that they would be alone, and the table is theirs."""

import itertools
import json
import math
import shutil
import statistics

import numpy as np
import pytest

from benchmarks.robustness.small_runs import lines
from configs import default
from tests.helpers.html_page import Page
from tests.helpers.runs import wait_for
from ur4rec_jax import compare
from ur4rec_jax.errors import InputError, OutOfMemoryError
from ur4rec_jax.evaluation.metrics import ranking_metrics
from ur4rec_jax.runs import sweep
from ur4rec_jax.runs.workdir import stored_config

GRID = """
def get_hyper():
  return [{}, {'sasrec.dropout': 0.5}]

def diverging():
  huge = {'optimizer.name': 'sgd', 'optimizer.clip_norm': 0.0, 'optimizer.learning_rate': 1e38}
  return [huge, {}]

def unknown():
  return [{}, {'sasrec.drop': 0.5}]

def impossible():
  return [{}, {'sasrec.dropout': 1.5}]

def mistyped():
  return [{}, {'sasrec.dim': 'wide'}]

def seeded():
  return [{'seed': 1}, {'seed': 2}]

def twice():
  return [{}, {'sasrec.dropout': 0.5}, {'sasrec.dropout': 0.5}]

def nothing():
  return []
"""


@pytest.fixture
def grid(tmp_path):
  path = tmp_path / 'grid.py'
  path.write_text(GRID)
  return path


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_table_of_its_runs(start, run, finished, grid, tmp_path):
  workdir = tmp_path / 'sweep'
  flags = ('--seeds=1,0', f'--sweep={grid}')
  first = start(workdir, *flags)
  wait_for(first, lambda: lines(workdir / 'seed0'))
  first.kill()
  first.communicate()
  assert not (workdir / 'seed0/results.json').exists()
  (early,) = json.loads((workdir / 'sweep.json').read_text())['members']
  assert early['name'] == 'seed1'
  before = (workdir / 'seed1/checkpoints').stat().st_mtime_ns

  done = run(workdir, *flags)
  assert done.returncode == 0, done.stderr
  assert 'seed1, finished before' in done.stdout
  assert (workdir / 'seed1/checkpoints').stat().st_mtime_ns == before
  for file in ('metrics.jsonl', 'results.json', 'test_ranks.npz'):
    assert (workdir / 'seed0' / file).read_bytes() == (finished / file).read_bytes()

  names = ['seed1', 'seed0', 'sasrec.dropout=0.5/seed1', 'sasrec.dropout=0.5/seed0']
  runs = [json.loads((workdir / name / 'results.json').read_text()) for name in names]
  summary = json.loads((workdir / 'sweep.json').read_text())
  assert [member['name'] for member in summary['members']] == names
  assert [member['test'] for member in summary['members']] == [run['test'] for run in runs]
  scores = [run['test']['ndcg@10'] for run in runs]
  plain, dropout = summary['variants']
  assert (plain['seeds'], plain['gain'], plain['p']) == ([1, 0], None, None)
  assert dropout['overrides'] == {'sasrec.dropout': 0.5}
  for variant, values in ((plain, scores[:2]), (dropout, scores[2:])):
    assert variant['mean']['ndcg@10'] == pytest.approx(statistics.mean(values))
    assert variant['sd']['ndcg@10'] == pytest.approx(statistics.stdev(values))
  assert dropout['gain'] == pytest.approx(sum(scores[2:]) / sum(scores[:2]) - 1)
  assert 0 < dropout['p'] <= 1
  table = done.stdout[done.stdout.rindex('variant ') :]
  rows = [line.split('  ') for line in table.splitlines()]
  assert [row[0] for row in rows[1:3]] == ['config', 'sasrec.dropout=0.5']
  assert f'{scores[2]:.4f} {scores[3]:.4f}' in rows[2][-1]

  best = max(zip([run['valid']['ndcg@10'] for run in runs], names, strict=True), key=lambda x: x[0])
  assert f'--workdir={workdir / best[1]} --user=' in table
  assert f'python -m ur4rec_jax.compare {workdir} OTHER_WORKDIR' in table

  page = Page((workdir / 'sweep.html').read_text())
  assert f'page     {workdir / "sweep.html"}' in done.stdout
  for name, each in zip(names, runs, strict=True):
    assert name in page.texts
    assert f'{each["valid"]["ndcg@10"]:.4f}' in page.texts
  assert {'What mattered', 'sasrec.dropout', 'In turn', 'seed'} <= {*page.texts}
  assert len(page.all('circle')) == 4 + 4  # In turn, and by dropout.

  again = run(workdir, *flags)
  assert again.returncode == 0, again.stderr
  assert again.stdout.count('finished before') == 4
  assert again.stdout.endswith(table)


@pytest.fixture
def make_run(finished, tmp_path):
  """Makes the workdir of a run: `make_run(name, seed, worse, **fields)`, with ranks + `worse`."""

  def make_run(name, seed, worse=0, **fields):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    shutil.copy(finished / 'config.json', folder)
    with np.load(finished / 'test_ranks.npz') as found:
      users, ranks = found['users'], found['ranks'] + worse
    np.savez(folder / 'test_ranks.npz', users=users, ranks=ranks)
    results = json.loads((finished / 'results.json').read_text()) | {'seed': seed} | fields
    results['test'] = ranking_metrics(ranks)
    (folder / 'results.json').write_text(json.dumps(results))
    return results['test']['ndcg@10']

  return make_run


def test_runs_that_were_trained_apart_are_compared(make_run, tmp_path, capsys):
  ids = [make_run(f'ids/seed{seed}', seed, worse=seed) for seed in (0, 1, 2)]
  text = make_run('text', 0)
  make_run('other', 0, protocol={'split': 'another'})
  folders = [str(tmp_path / name) for name in ('ids', 'text', 'other')]
  compare.main([f'{folders[0]}/', *folders[1:]])
  header, *rows, about, apart = capsys.readouterr().out.splitlines()[1:]
  assert header.split()[:2] == ['variant', 'seeds']
  assert [row.split()[0] for row in rows] == folders
  assert [row.split()[1] for row in rows] == ['0,1,2', '0', '0']
  assert f'{statistics.mean(ids):.4f} ± {statistics.stdev(ids):.4f}' in rows[0]
  assert f'{100 * (text / statistics.mean(ids) - 1):+.1f} %' in rows[1]
  assert rows[0].endswith(' '.join(f'{value:.4f}' for value in ids))
  assert '%' not in rows[2]
  assert about.endswith(folders[0])
  assert f'{folders[2]}: no gain, as the data, the split or the protocol' in apart
  compare.main(folders[:1])
  assert 'gain' not in capsys.readouterr().out


def test_seeds_that_differ_in_more_than_the_seed_are_no_mean(make_run, tmp_path):
  for seed in (1, 2, 10):
    own = {'split': 'one' if seed == 1 else 'another'}
    make_run(f'data/seed{seed}', seed, protocol=own)
    make_run(f'config/seed{seed}', seed)
  path = tmp_path / 'config/seed2/config.json'
  record = json.loads(path.read_text())
  record['config'] |= {'seed': 2, 'data_dir': 'moved'}  # These may differ.
  path.write_text(json.dumps(record))
  assert sweep.compare([tmp_path / 'config'])['variants'][0]['seeds'] == [1, 2, 10]
  record['config']['sasrec']['dim'] = 8
  path.write_text(json.dumps(record))
  for name, told in (('data', 'data and protocol is'), ('config', r'config\.sasrec\.dim is 8')):
    with pytest.raises(InputError, match=f'seed2: {told}.* no seeds of one model'):
      sweep.compare([tmp_path / name])
  assert len(sweep.compare([tmp_path / f'config/seed{seed}' for seed in (1, 2)])['variants']) == 2


def test_what_cannot_be_compared_is_named(make_run, tmp_path):
  make_run('a/seed0', 0)
  make_run('sweep/x=1/seed0', 0)
  for names, message in (
    (['nothing'], 'nothing: holds no run'),
    (['sweep'], f'name the folders in it, such as {tmp_path}/sweep/x=1'),
    (['a', 'a'], 'a/seed0 is there more than once'),
  ):
    with pytest.raises(InputError, match=message):
      sweep.compare([tmp_path / name for name in names])
  for name in ('test_ranks.npz', 'results.json'):
    path = tmp_path / 'a/seed0' / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=f'{name}: cannot be read'):
      sweep.compare([tmp_path / 'a'])
  for content in ('{}', '[]', '1'):
    (tmp_path / 'a/seed0/results.json').write_text(content)
    with pytest.raises(InputError, match=r'results\.json: cannot be read'):
      sweep.compare([tmp_path / 'a'])
  (tmp_path / 'a/seed0/results.json').unlink()
  with pytest.raises(InputError, match='seed0: is not finished'):
    sweep.compare([tmp_path / 'a'])


@pytest.mark.slow
def test_a_member_that_diverges_does_not_stop_the_others(run, grid, tmp_path):
  done = run(tmp_path / 'sweep', f'--sweep={grid}:diverging', '--config.num_epochs=1')
  assert done.returncode == 3
  assert 'Traceback' not in done.stderr
  (message,) = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert 'optimizer.name=sgd' in message
  assert 'not finite at step' in message
  (member,) = json.loads((tmp_path / 'sweep/sweep.json').read_text())['members']
  assert member['name'] == 'seed0'


@pytest.fixture
def instant(finished, monkeypatch):
  """Members that copy a finished run, or fail by their dropout; gives the config of that run."""

  def train(config, folder):
    if config.sasrec.dropout == 0.5:
      raise MemoryError('too wide')
    if config.sasrec.dropout == 0.6:
      raise InputError('no such data')
    shutil.copytree(finished, folder)

  monkeypatch.setattr(sweep.train_loop, 'train_and_evaluate', train)
  return stored_config(finished)


def grid_of(tmp_path, *rates):
  (tmp_path / 'rates.py').write_text(
    f"def get_hyper():\n  return [{{'sasrec.dropout': x}} for x in {rates}]\n"
  )
  return str(tmp_path / 'rates.py')


def test_members_that_fail_do_not_stop_the_others(instant, tmp_path, capsys):
  grid = grid_of(tmp_path, 0.1, 0.5, 0.6, 0.2)
  with pytest.raises(OutOfMemoryError, match=r'(?s)0.5/seed0: out of memory.*0.6/seed0: no'):
    sweep.run_sweep(instant, str(tmp_path / 'sweep'), [0], grid)
  found = json.loads((tmp_path / 'sweep/sweep.json').read_text())
  assert [x['name'] for x in found['members']] == [f'sasrec.dropout={x}/seed0' for x in (0.1, 0.2)]
  assert 'sasrec.dropout=0.2' in capsys.readouterr().out


def test_a_mistake_of_all_members_is_told_once(instant, tmp_path):
  with pytest.raises(InputError, match=r'^no such data$'):
    sweep.run_sweep(instant, str(tmp_path / 'sweep'), [0], grid_of(tmp_path, 0.6, 0.7))
  assert not (tmp_path / 'sweep/sasrec.dropout=0.7').exists()


def test_many_members_cost_no_more_than_they_must(instant, tmp_path, monkeypatch):
  computed, cleared = [], []
  monkeypatch.setattr(sweep, 'ranks_p_value', lambda *_: computed.append(1) or 0.5)
  monkeypatch.setattr(sweep.jax, 'clear_caches', lambda: cleared.append(1))
  grid = grid_of(tmp_path, 0.1, 0.2, 0.3)
  found = sweep.run_sweep(instant, str(tmp_path / 'sweep'), [0, 1], grid)
  assert [variant['p'] for variant in found['variants']] == [None, 0.5, 0.5]
  assert len(computed) == 4  # One for each run of the later variants.
  assert len(cleared) == 6


def test_a_run_without_its_page_is_not_finished(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / 'run')
  config = stored_config(folder)
  assert sweep.is_finished(folder, config)
  (folder / 'report.html').unlink()
  assert not sweep.is_finished(folder, config)


@pytest.mark.slow
def test_a_finished_member_with_more_epochs_goes_on(start, finished, tmp_path):
  member = tmp_path / 'sweep/seed0'
  shutil.copytree(finished, member)
  flags = ('--seeds=0', '--config.num_epochs=1000', '--config.patience=1000')
  process = start(tmp_path / 'sweep', *flags)
  assert any('epoch 5' in line for line in process.stderr)
  process.kill()
  process.communicate()
  # Or it would be taken for finished with all its epochs.
  assert not (member / 'results.json').exists()


def test_a_finished_member_on_other_data_is_not_taken_over(finished, tmp_path):
  member = tmp_path / 'sweep/seed0'
  shutil.copytree(finished, member)
  config = stored_config(member)
  assert sweep.is_finished(member, config)
  record = json.loads((member / 'config.json').read_text())
  record['dataset']['split_hash'] = 'before the data were built again'
  (member / 'config.json').write_text(json.dumps(record))
  with pytest.raises(InputError, match=r'holds a run on dataset .*before the data were built'):
    sweep.run_sweep(config, str(tmp_path / 'sweep'), (0,))


@pytest.mark.parametrize(
  ('function', 'seeds', 'words'),
  [
    ('none', [], 'has no function none'),
    ('nothing', [], 'must return a list of dicts'),
    ('unknown', [], 'overrides sasrec.drop: no such field'),
    ('impossible', [], r'sasrec.dropout=1.5.*must be in \[0, 1\)'),
    ('mistyped', [], 'sasrec.dim=wide'),
    ('seeded', [0, 1], 'leave one out'),
    ('twice', [0], 'sasrec.dropout=0.5/seed0 more than once'),
  ],
)
def test_impossible_sweeps_are_refused_before_anything_runs(function, seeds, words, grid, tmp_path):
  with pytest.raises(InputError, match=words):
    sweep.run_sweep(default.get_config(), str(tmp_path / 'sweep'), seeds, f'{grid}:{function}')
  assert not (tmp_path / 'sweep').exists()


@pytest.mark.parametrize('content', [None, 'def get_hyper(:'])
def test_a_sweep_file_that_cannot_be_read(content, tmp_path):
  path = tmp_path / 'grid.py'
  if content:
    path.write_text(content)
  with pytest.raises(InputError, match=r'grid\.py cannot be read'):
    sweep.load_grid(str(path))


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--seeds=0,x'], 'different whole numbers'),
    (['--seeds=1,1'], 'different whole numbers'),
    (['--seeds=1', '--mode=evaluate'], 'without --seeds'),
  ],
)
def test_wrong_flags(flags, words, run, tmp_path):
  done = run(tmp_path / 'sweep', *flags)
  assert done.returncode
  assert words in done.stdout + done.stderr
  assert not (tmp_path / 'sweep').exists()


def test_a_stage_follows_the_fields_that_a_member_overrides():
  config = default.get_config()
  config.stage.train.patience = 3
  grid = [{'num_epochs': 5, 'optimizer.schedule': 'cosine', 'patience': 7}, {}]
  members = [member.config for member in sweep.make_members(config, (0, 1), grid)]
  stages = [member.stage.train for member in members]
  assert [stage.num_epochs for stage in stages] == [5, 5, config.num_epochs, config.num_epochs]
  assert [stage.schedule for stage in stages] == ['cosine'] * 2 + ['constant'] * 2
  assert [stage.patience for stage in stages] == [3] * 4
  assert [member.stage.end_to_end.patience for member in members] == [7, 7, 10, 10]


def test_members_have_names_of_their_own_that_are_folders():
  values = [('a',), ('b',), ('a/b',), ('x' * 300, 'y'), ('x' * 300, 'z')]
  grid = [{'modalities': value} for value in values]
  members = [sweep._variant_name(fields) for fields in grid]
  assert len(set(members)) == len(members)
  assert all(len(name) <= 120 and '/' not in name and ' ' not in name for name in members)


@pytest.mark.parametrize('shift', [0.0, 0.2, 0.5])
def test_p_value_is_that_of_all_sign_patterns(shift):
  differences = np.random.default_rng(0).normal(shift, 1, 12)
  differences[[3, 7]] = 0
  sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=12)]
  exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
  error = math.sqrt(exact * (1 - exact) / sweep.FLIPS)
  assert sweep.paired_p_value(differences) == pytest.approx(exact, abs=4 * error)
  assert sweep.paired_p_value(-differences) == sweep.paired_p_value(differences)


def test_p_value_of_no_and_of_every_difference():
  assert sweep.paired_p_value(np.zeros(50)) == 1
  assert sweep.paired_p_value(np.full(50, 0.01)) == 1 / (sweep.FLIPS + 1)

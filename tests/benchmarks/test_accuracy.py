"""The published numbers are those of the results files; small stored files give known tables."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.quality import accuracy
from benchmarks.robustness.small_runs import SMALL
from tests.helpers.runs import ROOT
from tests.helpers.stored_results import BASE, BETTER, PROTOCOL, rows, store
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation.metrics import ranking_metrics


def test_what_is_published_is_generated():
  stored = accuracy.load_results(accuracy.RESULTS)
  readme = accuracy.README.read_text()
  shown = readme.split('<!-- results: begin -->')[1].split('<!-- results: end -->')[0].strip()
  assert shown == accuracy.headline_table(stored)
  page = accuracy.PAGE.read_text()
  assert page == accuracy.results_page(stored)
  assert all(f'| {name} |' in page for name in stored)
  for entry in stored.values():
    seeds = [run['seed'] for run in entry['runs']]
    assert len(seeds) == len(set(seeds))


def test_a_variant_beside_its_baseline(tmp_path):
  store(tmp_path, 'base', BASE)
  store(tmp_path, 'a-better', BETTER, baseline='base')
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  found = rows(page, 'NDCG@10', 'p')
  assert [*found] == ['base', 'a-better']  # What is compared with nothing comes first.
  # By seed: (1 + 1/2 + 1/3) / 4 and 2 / 4, then (1 + 1/2 + 1/2 + 1) / 4 and 4 / 4.
  ndcg = [(1.5 + 1 / 3) / 4, 0.5], [0.75, 1.0]
  for name, (first, second) in zip(found, ndcg, strict=True):
    spread = abs(first - second) / math.sqrt(2)
    assert found[name]['NDCG@10'] == f'{(first + second) / 2:.4f} ± {spread:.4f}'
    assert found[name]['seeds'] == '0, 1'
    assert found[name]['validation'] == '0.2500 ± 0.0707'
  assert found['base']['Hit@10'] == '0.6250 ± 0.1768'
  assert [found['base'][column] for column in ('against', 'gain', 'p')] == ['', '', '']
  assert found['a-better']['against'] == 'base'
  assert found['a-better']['gain'] == f'+{100 * (sum(ndcg[1]) / sum(ndcg[0]) - 1):.1f} %'
  # Two users differ, so that 2 of the 4 sign patterns are as far from 0.
  assert float(found['a-better']['p']) == pytest.approx(0.5, abs=0.02)
  groups = [found['base'][group] for group in ('head', 'torso', 'tail', 'cold')]
  assert groups == ['0.5000', '–', '0.7500', '0.1667']
  assert 'Test users: head 2, tail 1, cold 1.' in page


def test_what_a_table_says_of_its_runs(tmp_path):
  origin = {'encoder': 'minilm', 'is_builtin': False, 'is_mock': True, 'fingerprint': 'f'}
  written = origin | {'is_mock': False, 'written_by': 'openai gpt'}
  features = {'item': {'text': origin, 'image': origin | {'is_mock': False}, 'other': written}}
  store(tmp_path, 'plain', BASE)
  store(tmp_path, 'content', BASE, dataset={'features': features}, command='python a|b')
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  assert '## Toys\n' in page
  assert '4 users, 1,234 items, 56,789 interactions, split hash `abc`.' in page
  assert 'split: leave_one_out, candidates: all items, ties: against the model.' in page
  assert 'by popularity 0.0432, in random order 0.0031.' in page
  page = page.replace('a\\|b', 'a or b')  # What would end a cell is escaped.
  found = rows(page, 'parameters', 'command')
  assert found['plain'] == {
    'variant': 'plain',
    'parameters': '98,765',
    'best epoch': '10, 11',
    'time a seed': '2 min, 1 x cpu',
    'features': 'none',
    'command': '`python -m ur4rec_jax.main --config=plain.py`',
  }
  assert found['content']['features'] == (
    'item text: minilm (mock)<br>item image: minilm<br>item other: minilm (texts by openai gpt)'
  )
  assert found['content']['command'] == '`python a or b`'


def test_what_each_stage_brings(tmp_path):
  store(tmp_path, 'plain', BASE)
  store(tmp_path, 'staged', BASE)
  entry = json.loads((tmp_path / 'staged.json').read_text())
  for run, best, shift in zip(entry['runs'], (1, 1), (0.0, 0.02), strict=True):
    stage = lambda name, paths, valid, test, shift=shift: {
      'name': name,
      'paths': paths,
      'best_epoch': 3,
      'steps': 1200,
      'valid': {'ndcg@10': valid + shift},
      'test': {'ndcg@10': test + shift},
    }
    run['best_stage'] = best
    run['stages'] = [stage('one', ['a'], 0.2, 0.1), stage('two', ['a', 'b'], 0.4, 0.3)]
  (tmp_path / 'staged.json').write_text(json.dumps(entry))
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  (table,) = [part for part in page.split('\n\n') if part.startswith('| variant | stage |')]
  assert table.splitlines()[2:] == [
    '| staged | one | a | 1,200 | 0.2100 ± 0.0141 | 0.1100 ± 0.0141 | 0 of 2 |',
    '| staged | two | a + b | 1,200 | 0.4100 ± 0.0141 | 0.3100 ± 0.0141 | 2 of 2 |',
  ]


def test_each_dataset_split_and_protocol_has_tables_of_its_own(tmp_path):
  store(tmp_path, 'one', BASE)
  store(tmp_path, 'same', BASE)
  store(tmp_path, 'other-split', BASE, dataset={'split_hash': 'def'})
  store(tmp_path, 'sampled', BASE, protocol=PROTOCOL | {'candidates': 'target + 100'})
  sections = accuracy.results_page(accuracy.load_results(tmp_path)).split('\n## ')[1:]
  names = [set(rows(section, 'NDCG@10')) for section in sections]
  assert sorted(names, key=min) == [{'one', 'same'}, {'other-split'}, {'sampled'}]
  (sampled,) = [section for section in sections if '| sampled |' in section]
  assert 'candidates: target + 100' in sampled


def test_runs_from_before_there_were_groups_and_ranks(tmp_path):
  store(tmp_path, 'base', BASE, is_old=True)
  store(tmp_path, 'better', BETTER, baseline='base')
  page = accuracy.results_page(accuracy.load_results(tmp_path))
  found = rows(page, 'NDCG@10')
  assert [found['base'][group] for group in ('head', 'torso', 'tail', 'cold')] == ['–'] * 4
  assert found['better']['gain'].startswith('+')
  assert found['better']['p'] == '–'
  assert rows(page, 'parameters')['base']['parameters'] == '–'
  assert 'Test users: head 2' in page


def test_readme_shows_the_headlines(tmp_path):
  store(tmp_path, 'toys', BASE, headline=True)
  store(tmp_path, 'other', BASE, headline=False)
  found = rows(accuracy.headline_table(accuracy.load_results(tmp_path)), 'popularity NDCG@10')
  assert [*found] == ['toys']
  assert found['toys']['users x items'] == '4 x 1,234'
  assert found['toys']['popularity NDCG@10'] == '0.0432'


def test_results_that_cannot_be_compared_are_refused(tmp_path):
  store(tmp_path, 'better', BETTER, baseline='base')
  with pytest.raises(InputError, match='better is compared with base, of which there are no'):
    accuracy.load_results(tmp_path)
  store(tmp_path, 'base', BASE, dataset={'split_hash': 'def'})
  with pytest.raises(InputError, match='better: its runs and those of base differ'):
    accuracy.load_results(tmp_path)


def test_damaged_results_are_named(tmp_path):
  store(tmp_path, 'base', BASE)
  np.savez(tmp_path / 'base.npz', ranks=np.array(BASE[:1]))
  with pytest.raises(InputError, match=r'base\.json: .*base\.npz is of other runs'):
    accuracy.load_results(tmp_path)
  (tmp_path / 'base.npz').write_bytes(b'PK\x03\x04')
  with pytest.raises(InputError, match=r'base\.json: cannot be read'):
    accuracy.load_results(tmp_path)
  (tmp_path / 'base.json').write_text('{')
  with pytest.raises(InputError, match=r'base\.json: cannot be read'):
    accuracy.load_results(tmp_path)


def test_damaged_results_are_named_before_anything_is_trained(tmp_path, monkeypatch, capsys):
  (tmp_path / 'other.json').write_text('{')
  flags = ['--name=a', '--config=c', '--data_dir=d', f'--workdir={tmp_path / "runs"}']
  monkeypatch.setattr(sys, 'argv', ['accuracy', *flags])
  monkeypatch.setattr(accuracy, 'RESULTS', tmp_path)
  monkeypatch.setattr(accuracy, 'train_seeds', lambda *_: pytest.fail('it trained'))
  with pytest.raises(SystemExit):
    accuracy.main()
  assert 'other.json: cannot be read' in capsys.readouterr().err


@pytest.fixture
def tool(environment, data_dir, tmp_path):
  """Runs the tool where it writes into a folder of its own: `tool(*flags)`."""
  (tmp_path / 'benchmarks' / 'quality').mkdir(parents=True)
  (tmp_path / 'docs').mkdir()
  program = ('benchmarks/__init__.py', 'benchmarks/quality/__init__.py')
  for file in (*program, 'benchmarks/quality/accuracy.py', 'README.md'):
    shutil.copy(ROOT / file, tmp_path / file)

  def tool(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'benchmarks.quality.accuracy', *flags]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

  return tool


@pytest.mark.slow
def test_training_a_variant_against_a_finished_baseline(tool, finished, data_dir, tmp_path):
  shutil.copytree(finished, tmp_path / 'runs/base/seed0')
  common = (f'--config={ROOT}/configs/synthetic.py', f'--data_dir={data_dir}', '--seeds=0', *SMALL)

  def train(name, *flags):
    return tool(f'--name={name}', f'--workdir=runs/{name}', *common, *flags)

  done = train('base', '--headline')
  assert done.returncode == 0, done.stderr
  assert 'epoch' not in done.stderr  # It had finished.
  variant = ('--baseline=base', '--config.sasrec.dropout=0.5', '--config.num_epochs=1')
  done = train('variant', *variant)
  assert done.returncode == 0, done.stderr

  stored = accuracy.load_results(tmp_path / 'benchmarks/results')
  assert (stored['base']['baseline'], stored['variant']['baseline']) == (None, 'base')
  assert stored['variant']['command'].endswith('--config.sasrec.dropout=0.5 --config.num_epochs=1')
  for name, entry in stored.items():
    workdir = tmp_path / 'runs' / name / 'seed0'
    timing = json.loads((workdir / 'timing.json').read_text())
    results = json.loads((workdir / 'results.json').read_text())
    assert entry['runs'] == [results | {'timing': timing}]
    assert entry['ranks'].shape == (1, 120)
    assert ranking_metrics(entry['ranks'][0]) == results['test']
  page = (tmp_path / 'docs/results.md').read_text()
  assert page == accuracy.results_page(stored)
  assert 0 < float(rows(page, 'p')['variant']['p'].removeprefix('< ')) <= 1
  readme = (tmp_path / 'README.md').read_text()
  assert '| base | 120 x 60 |' in readme
  assert '| variant |' not in readme

  config = json.loads((tmp_path / 'runs/variant/seed0/config.json').read_text())['config']
  assert (config['sasrec']['dropout'], config['seed']) == (0.5, 0)
  done = train('variant', '--baseline=base', '--config.sasrec.dropout=0.1')
  assert done.returncode == 2
  assert 'runs/variant/seed0 holds a run of' in done.stderr
  assert 'Traceback' not in done.stderr
  done = train('broken', '--config.sasrec.dropout=2.0')
  assert done.returncode == 2
  assert 'config.sasrec.dropout' in done.stderr
  assert 'Traceback' not in done.stderr
  assert accuracy.results_page(accuracy.load_results(tmp_path / 'benchmarks/results')) == page


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config=configs/synthetic.py'], 'needed together'),
    (['--config.sasrec.dim=32'], 'needed together'),
    (['--name=a', '--config.seed=1'], '--config.seed=1: only'),
    (['--name=a', '--epochs=1'], '--epochs=1: only'),
    (['--seeds=0,x'], '--seeds'),
    (['--name=a/b', '--config=c', '--data_dir=d', '--workdir=w'], '--name=a/b: only'),
    (['--name=a', '--config=c', '--data_dir=d', '--workdir=w', '--baseline=b'], 'no such results'),
  ],
)
def test_wrong_flags(flags, words, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['accuracy', *flags])
  readme = accuracy.README.read_bytes()
  with pytest.raises(SystemExit) as stopped:
    accuracy.main()
  assert stopped.value.code
  assert words in capsys.readouterr().err
  assert accuracy.README.read_bytes() == readme

"""Every block of docs/extending.md runs as it stands."""

import importlib
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from tests.helpers.recommenders import make
from tests.helpers.runs import ROOT
from ur4rec_jax.data.dataset import load_dataset, read_items
from ur4rec_jax.evaluation.baselines import baseline_metrics
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.inference import rules
from ur4rec_jax.models.sasrec import BLOCKS
from ur4rec_jax.training.losses import RETRIEVAL_LOSSES

PAGE = ROOT / 'docs' / 'extending.md'
CODE = re.findall(r'^```(\w*)\n(.*?)^```', PAGE.read_text(), flags=re.M | re.S)
MODULES = {text.split('\n')[0][2:]: text for kind, text in CODE if kind == 'python'}


@pytest.fixture
def modules(tmp_path, monkeypatch):
  """A folder with the files of the page; gives a function that imports one.

  What the files add to the project's losses and blocks is gone after the test.
  """
  registries = [(registry, dict(registry)) for registry in (RETRIEVAL_LOSSES, BLOCKS)]
  for name, text in MODULES.items():
    (tmp_path / name).write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  yield importlib.import_module
  for name in MODULES:
    sys.modules.pop(name.removesuffix('.py'), None)
  for registry, before in registries:
    registry.clear()
    registry.update(before)


def test_every_block_of_python_is_a_file_that_is_tested():
  tested = {'my_losses.py', 'my_blocks.py', 'my_source.py', 'my_encoder.py', 'my_baseline.py'}
  assert set(MODULES) == tested
  code = MODULES['my_losses.py'].split('\n')[1:]
  assert len([line for line in code if line.strip()]) <= 7


def test_a_loss_and_a_block_train_and_recommend(run, modules, tmp_path):
  flags = ("--config.extensions=('my_losses','my_blocks')", '--config.num_epochs=3')
  done = run(tmp_path / 'run', *flags, '--config.loss.name=hinge', '--config.sasrec.block=mean')
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert found['test']['ndcg@10'] > found['baselines']['random']['ndcg@10']
  losses = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
  assert any('loss' in name for line in losses for name in line)

  load = importlib.import_module('ur4rec_jax').load
  for _ in range(2):  # The second one reads the kept model.
    recommender = load(tmp_path / 'run')
    (name, *_) = recommender.users
    assert len(recommender.recommend(user=name, k=5)) == 5
  # What comes after a position, and other users in the same row, do not change its state.
  block, rng = modules('my_blocks').Mean(8), np.random.default_rng(0)
  segments, x = np.array([[1, 1, 1, 2, 2]]), rng.normal(size=(5, 8)).astype(np.float32)
  params = block.init(jax.random.key(0), x, segments, deterministic=True)
  whole = block.apply(params, x, segments, deterministic=True)
  changed = x.copy()
  changed[2:] = 0
  part = block.apply(params, changed, segments, deterministic=True)
  np.testing.assert_allclose(whole[:2], part[:2], rtol=1e-6)
  assert not np.allclose(whole[2:], part[2:])


def test_an_extension_that_is_missing_is_named(run, tmp_path):
  done = run(tmp_path / 'run', "--config.extensions=('no_such_module',)")
  assert done.returncode == 2
  assert "config.extensions: 'no_such_module' cannot be imported" in done.stderr
  assert 'Traceback' not in done.stderr


def test_a_source(modules, tmp_path):
  rng = np.random.default_rng(0)
  lines = [
    f'{1_600_000_000 + i} u{rng.integers(9)} {"watched" if i % 4 else "saw"} i{rng.integers(12)}'
    for i in range(300)
  ]
  (tmp_path / 'log').write_text('\n'.join(lines))
  info = modules('my_source').build(tmp_path / 'log', tmp_path / 'data')
  assert info['counts']['users'] == 9
  assert info['counts']['interactions'] == sum('watched' in line for line in lines)
  assert load_dataset(tmp_path / 'data').num_items == 12


def test_an_encoder(modules, data_dir, tmp_path):
  from data_prep import encode
  from ur4rec_jax.data.features import load_features

  data = shutil.copytree(data_dir, tmp_path / 'data')
  modules('my_encoder').encode(data, tmp_path / 'letters.npz')
  encode.main([f'--data_dir={data}', '--modality=letters', f'--import={tmp_path}/letters.npz'])
  tokens, mask = load_features(data, 'item', 'letters').rows(np.arange(3))
  assert mask.all()
  title = read_items(data)[0]['title'].lower()
  counts = np.bincount([ord(letter) % 16 for letter in title], minlength=16)
  own = tokens[0, 0] / np.linalg.norm(tokens[0, 0])
  np.testing.assert_allclose(own, counts / np.linalg.norm(counts), atol=1e-2)


def test_a_rule(shop, tmp_path):
  ((_, text),) = [block for block in CODE if block[0] == 'toml']
  (tmp_path / 'rules.toml').write_text(text)
  recommender, _ = make(shop, 'text')
  found = rules.load(tmp_path / 'rules.toml', recommender.item_ids)
  answer = recommender.recommend(recommender.item_ids[20:24], k=5, rules=found)
  assert answer['item'].tolist()[1] == 'i05'


def test_a_baseline_is_ranked_as_ours_are(modules, data_dir):
  baseline = modules('my_baseline')
  found = baseline.evaluate(data_dir)
  own = baseline_metrics(load_dataset(data_dir), 'test', Protocol())['popularity']
  assert found == pytest.approx(own)

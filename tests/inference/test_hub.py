"""Models go to a hub and come back, with a card, and users only when that is meant.

The hub is a local server; each part is a process of its own, because huggingface_hub reads the
address of the hub when it is imported.
"""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.hub_server import hub_server
from tests.helpers.recommenders import make
from tests.helpers.runs import ROOT
from ur4rec_jax.export import export
from ur4rec_jax.inference import hub
from ur4rec_jax.inference.hub import model_card, push_to_hub

PUSH = 'import sys, ur4rec_jax; print(ur4rec_jax.push_to_hub(sys.argv[1], "me/shop"))'
PULL = (
  'import json, ur4rec_jax; answer = ur4rec_jax.from_hub("me/shop").top([["i01", "i07"]], k=5);'
  ' print(json.dumps([answer.items[0], answer.scores[0].tolist()]))'
)


@pytest.fixture(scope='module')
def recommender(shop):
  return make(shop, 'text')[0]


@pytest.fixture(scope='module')
def folder(recommender, tmp_path_factory):
  folder = tmp_path_factory.mktemp('exported') / 'model'
  export(recommender, folder)
  return folder


@pytest.fixture
def call(environment, tmp_path):
  """Runs Python beside a hub: `call(hub, code, *arguments)`."""

  def call(hub, code, *arguments, token='hf_right'):
    home = {'HF_ENDPOINT': hub.address, 'HF_TOKEN': token, 'HF_HOME': str(tmp_path / 'home')}
    return subprocess.run(
      [sys.executable, '-c', code, *map(str, arguments)],
      env={**environment, **home},
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=200,
    )

  return call


def test_a_model_comes_back_from_the_hub(recommender, folder, call):
  (folder / 'compiled').mkdir(exist_ok=True)
  (folder / 'compiled' / 'program').write_bytes(b'for this machine alone')
  with hub_server() as hub:
    done = call(hub, PUSH, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'{hub.address}/me/shop/commit/')
    files = hub.repos['me/shop']
    assert set(files) == {p.name for p in folder.iterdir() if p.is_file()} | {'README.md'}
    assert all((folder / name).read_bytes() == files[name] for name in files if name != 'README.md')
    assert hub.private == {'me/shop'}
    done = call(hub, PULL)
    assert done.returncode == 0, done.stderr
    items, scores = json.loads(done.stdout)
    answer = recommender.answer([['i01', 'i07']], 5)
    assert items == answer.items[0]
    np.testing.assert_allclose(scores, answer.scores[0], atol=1e-5)

    refused = call(hub, PUSH, folder, token='hf_wrong')
    assert refused.returncode != 0
    assert 'InputError: me/shop: cannot be pushed' in refused.stderr
    missing = call(hub, PULL.replace('me/shop', 'me/other'))
    assert 'InputError: me/other: cannot be downloaded' in missing.stderr
    assert hub.unknown == []


def test_users_are_not_uploaded_unless_that_is_meant(recommender, call, tmp_path):
  export(recommender, tmp_path / 'model', with_users=True)
  with hub_server() as hub:
    refused = call(hub, PUSH, tmp_path / 'model')
    assert 'has the histories of users' in refused.stderr
    assert hub.repos == {}


def test_only_the_files_of_an_export_are_uploaded(folder, tmp_path, monkeypatch):
  copy = shutil.copytree(folder, tmp_path / 'model')
  (copy / 'events.db').write_bytes(b'what users did')
  (copy / 'README.md').write_text('the card of an earlier upload')
  uploaded = []

  class Api:
    create_repo = staticmethod(lambda *_, **__: None)

    def create_commit(self, repo, operations, commit_message):
      uploaded.extend(name for name, _ in operations)
      return SimpleNamespace(commit_url='https://hub.example/commit')

  errors = SimpleNamespace(HfHubHTTPError=OSError, HFValidationError=OSError)
  fake = SimpleNamespace(HfApi=Api, CommitOperationAdd=lambda *pair: pair, errors=errors)
  monkeypatch.setattr(hub, '_hub', lambda: fake)
  push_to_hub(copy, 'me/shop')
  assert 'manifest.json' in uploaded
  assert 'events.db' not in uploaded
  assert uploaded.count('README.md') == 1


def test_a_hub_out_of_reach_is_one_message(folder, call):
  done = call(SimpleNamespace(address='http://127.0.0.1:9'), PUSH, folder)
  assert 'InputError: me/shop: cannot be pushed' in done.stderr


def test_the_card_has_numbers_terms_and_protocol(recommender, tmp_path, monkeypatch):
  metrics = {'ndcg@10': 0.12345, 'hit@10': 0.25, 'mrr': 0.1, 'users': 1234}
  about = {
    'dataset': {'name': 'shop', 'split_hash': 'abc123'},
    'data': {'licence': 'CC BY 4.0', 'url': 'https://shop.example', 'counts': {'users': 5000}},
    'protocol': {'candidates': 'all items', 'ties': 'against the model'},
    'test': metrics,
    'baselines': {'popularity': {**metrics, 'ndcg@10': 0.05}},
    'seed': 3,
  }
  monkeypatch.setattr(recommender, 'settings', recommender.settings._replace(about=about))
  export(recommender, tmp_path / 'model')
  card = model_card(tmp_path / 'model', 'me/my-shop')
  for text in (
    '# my-shop',
    '| this model | 0.1235 | 0.2500 | 0.1000 |',
    '| popularity | 0.0500 |',
    'candidates: all items; ties: against the model',
    'Users: 1,234. Seed: 3.',
    'terms: CC BY 4.0',
    '5,000 users',
    'split hash: `abc123`',
    "ur4rec_jax.from_hub('me/my-shop')",
    'holds no history of a user',
  ):
    assert text in card
  monkeypatch.setattr(recommender, 'settings', recommender.settings._replace(about={}))
  export(recommender, tmp_path / 'new')
  assert 'nothing was measured' in model_card(tmp_path / 'new', 'me/my-shop')
  assert 'terms: unknown' in model_card(tmp_path / 'new', 'me/my-shop')

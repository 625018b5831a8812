"""Texts and pictures in the item embeddings: the layer, and runs on encoded features."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.robustness.small_runs import load_arrays
from tests.helpers.features import ITEMS, make_features
from ur4rec_jax.data.features import TokenTable, load_features
from ur4rec_jax.models.content import ContentTower, initial_item_embeddings
from ur4rec_jax.models.sasrec import SASRec

DIM = 6


def make_model(item_input: str = 'id+content', **content) -> SASRec:
  defaults = {'dim': DIM, 'num_blocks': 1, 'ffn_dim': DIM, 'dropout': 0.0}
  makes_content = item_input != 'id'
  content = ContentTower(DIM, 8, **{'dropout': 0.0} | content) if makes_content else None
  return SASRec(ITEMS, 10, item_input=item_input, content=content, **defaults)


def states(model, features):
  """Hidden states of a history of five times item 1, and the items' side."""
  ones = jnp.ones((2, 5), jnp.int32)
  items = model.encode_items(features)
  return model.encode_users(items, ones, ones), items


def init(model, features, seed: int = 0):
  """Parameters of ordinary size, so that differences show."""
  shapes = jax.eval_shape(
    lambda key: model.init(key, features, method=states),
    jax.random.key(0),
  )['params']
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def item_table(model, params, features, **kwargs):
  return model.apply({'params': params}, features, method='encode_items', **kwargs).vectors


def replaced(features, name, **changes):
  return features | {name: features[name]._replace(**changes)}


def test_content_equals_a_plain_computation():
  features = make_features()
  model = ContentTower(DIM, 8, 0.0)
  params = model.init(jax.random.key(0), features, deterministic=True)['params']
  params = jax.tree.map(lambda x: x + 0.1, params)
  actual = model.apply({'params': params}, features, deterministic=True).vectors
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  expected = np.zeros((ITEMS + 1, DIM))
  for name, (tokens, mask) in features.items():
    for row in range(ITEMS + 1):
      present = np.asarray(tokens[row])[np.asarray(mask[row])]
      if not len(present):
        continue
      project = p[f'{name}_projection']
      h = present @ project['dense']['kernel'] + project['dense']['bias']
      h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
      h = h * project['norm']['scale'] + project['norm']['bias']
      h = np.asarray(jax.nn.gelu(jnp.asarray(h)), np.float64)
      logits = (h @ p[f'{name}_attention']['logits']['kernel'])[:, 0]
      weights = np.exp(logits - logits.max())
      pooled = weights @ h / weights.sum()
      expected[row] += pooled @ p[f'{name}_out']['kernel'] + p[f'{name}_out']['bias']
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_masked_token_changes_nothing_and_a_present_one_its_item_alone():
  model, features = make_model(), make_features()
  params = init(model, features)
  before = item_table(model, params, features)
  for name, (tokens, mask) in features.items():
    garbage = jnp.where(mask[..., None], tokens, 1e6)
    after = item_table(model, params, replaced(features, name, tokens=garbage))
    np.testing.assert_allclose(after, before, atol=1e-5)
    changed = item_table(model, params, replaced(features, name, tokens=tokens.at[5, 0].add(1)))
    assert np.flatnonzero(np.abs(changed - before).max(1) > 1e-4).tolist() == [5]


def test_items_without_modalities_have_only_their_id():
  model, features = make_model(), make_features()
  params = init(model, features)
  table = item_table(model, params, features)
  np.testing.assert_array_equal(table[4], params['item_embedding'][4])
  np.testing.assert_array_equal(table[0], params['item_embedding'][0])
  for missing, name in ((2, 'text'), (3, 'image')):
    alone = item_table(model, params, {name: features[name]})
    np.testing.assert_allclose(table[missing], alone[missing], atol=1e-6)


def test_permuting_items_permutes_the_table():
  model, features = make_model(item_input='content'), make_features()
  params = init(model, features)
  order = np.r_[0, 1 + np.random.default_rng(1).permutation(ITEMS)]
  permuted = jax.tree.map(lambda x: x[order], features)
  expected = item_table(model, params, features)[order]
  np.testing.assert_allclose(item_table(model, params, permuted), expected, atol=1e-5)


@pytest.mark.parametrize('item_input', ['id', 'content', 'id+content'])
def test_nothing_is_nan_where_every_modality_is_missing(item_input):
  model, features = make_model(item_input=item_input), make_features()
  params = init(model, features)
  assert ('item_embedding' in params) == (item_input != 'content')
  assert ('content' in params) == (item_input != 'id')
  empty = {name: TokenTable(t * 0, m & False) for name, (t, m) in features.items()}

  def loss(params):
    hidden, items = model.apply({'params': params}, empty, method=states)
    return (hidden[:, -1] @ items.vectors.T).sum()

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  assert jnp.isfinite(value)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize(('dim', 'whitening'), [(4, 0.0), (4, 0.5), (4, 1.0), (20, 1.0)])
def test_first_rows_are_principal_components_of_the_first_tokens(dim, whitening):
  features = make_features(items=40)
  rows = np.asarray(initial_item_embeddings(features, dim, 0.3, whitening, jax.random.key(0)))
  parts = []
  for name in features:
    tokens, mask = (np.asarray(x)[:, 0].astype(np.float64) for x in features[name])
    centred = (tokens - tokens[mask > 0].mean(0)) * mask[:, None]
    parts.append(centred / np.sqrt((centred**2).sum() / mask.sum()))
  left, values, _ = np.linalg.svd(np.concatenate(parts, 1), full_matrices=False)
  expected = left[:, :dim] * values[:dim] ** (1 - whitening)
  is_there = expected.any(1) & (np.abs(expected).sum(1) > 1e-9)
  assert (~is_there).tolist() == [at in (0, 4) for at in range(41)]
  expected *= 0.3 / np.sqrt((expected[is_there] ** 2).sum() / (is_there.sum() * dim))
  # Turned, so that only inner products are known.
  here = rows[is_there]
  np.testing.assert_allclose(
    here @ here.T, (expected @ expected.T)[is_there][:, is_there], atol=1e-4
  )
  np.testing.assert_allclose(np.sqrt((here**2).mean()), 0.3, rtol=1e-4)
  assert 0.02 < np.abs(rows[~is_there]).mean() < 1
  assert (
    np.abs(rows - initial_item_embeddings(features, dim, 0.3, whitening, jax.random.key(1))).max()
    > 0.01
  )


def test_first_rows_without_any_content_are_random():
  features = {name: TokenTable(t * 0, m & False) for name, (t, m) in make_features().items()}
  rows = np.asarray(initial_item_embeddings(features, 64, 0.3, 1.0, jax.random.key(0)))
  np.testing.assert_allclose(rows.std(), 0.3, rtol=0.1)


def test_content_dropout_follows_its_key():
  model, features = make_model(dropout=0.5), make_features()
  params = init(model, features)
  run = lambda key: item_table(
    model, params, features, deterministic=False, rngs={'dropout': jax.random.key(key)}
  )
  np.testing.assert_array_equal(run(0), run(0))
  assert np.abs(run(0) - run(1)).max() > 1e-2


# Both paths in one stage, content in each, and all losses between modalities.
BOTH = (
  "--config.stages=('train',)",
  "--config.modalities=('text','image')",
  "--config.branches=('sasrec','retriever')",
  '--config.sasrec.item_input=id+content',
  '--config.retriever.num_blocks=0',
  '--config.content.cross_modal_blocks=0',
  '--config.loss.weights.retriever=1.0',
  '--config.loss.weights.consistency=0.1',
  '--config.loss.weights.info_nce=0.1',
)
TASTE = '--config.user_modalities=taste'


@pytest.fixture(scope='module')
def trained(run, encoded, tmp_path_factory):
  """A run with content, and what it printed."""
  workdir = tmp_path_factory.mktemp('with_content') / 'run'
  flags = (*BOTH, TASTE, '--config.num_epochs=2', '--config.parameter_table')
  done = run(workdir, f'--config.data_dir={encoded}', *flags)
  assert done.returncode == 0, done.stderr
  return workdir, done


def test_a_run_with_content_trains_and_names_its_features(run, trained, encoded):
  workdir, done = trained
  fingerprints = {
    of: {
      name: json.loads((encoded / f'features/{of}/{name}/info.json').read_text())['fingerprint']
      for name in names
    }
    for of, names in (('item', ('text', 'image')), ('user', ('taste',)))
  }
  assert 'features item text: 60 x 9 tokens x 256, hashing (built in)' in done.stdout
  printed = fingerprints['item']['image'][:16]
  assert f'60 x 4 tokens x 12, imported from pictures.npz, {printed}' in done.stdout
  assert 'features user taste: 120 x 2 tokens x 3, imported from tastes.npz' in done.stdout
  assert 'sasrec/content/image_projection/dense/kernel' in done.stdout
  assert 'retriever/content/image_projection/dense/kernel' in done.stdout
  logged = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert {'loss/sasrec', 'loss/retriever', 'loss/info_nce'} <= set().union(*logged)
  gates = (
    'sasrec/content/text',
    'retriever/content/image',
    'retriever/user_tower/preference_taste',
  )
  assert {f'gate/{name}' for name in gates} <= set().union(*logged)
  results = json.loads((workdir / 'results.json').read_text())
  found = results['dataset']['features']
  assert [found['item'][name]['is_builtin'] for name in ('text', 'image')] == [True, False]
  assert found['user']['taste']['hold_back'] == 0.25
  assert fingerprints == {
    of: {name: origin['fingerprint'] for name, origin in origins.items()}
    for of, origins in found.items()
  }
  flags = (f'--config.data_dir={encoded}', *BOTH, TASTE, '--config.num_epochs=2')
  evaluated = run(workdir, *flags, '--mode=evaluate')
  assert json.loads(evaluated.stdout.splitlines()[-1])['test'] == results['test']


@pytest.mark.slow
@pytest.mark.parametrize('item_rows', ['all', 'sharded'])
def test_a_run_begins_with_items_as_their_content(run, encoded, tmp_path, item_rows):
  flags = (
    '--config.modalities=text',
    '--config.sasrec.item_input=id_from_content',
    '--config.sasrec.item_scale=0.3',
    f'--config.optimizer.item_embeddings={item_rows}',
    '--config.loss.name=sampled_softmax',
    '--config.optimizer.learning_rate=1e-12',
    '--config.num_epochs=1',
  )
  env = {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  done = run(tmp_path / 'run', f'--config.data_dir={encoded}', *flags, env=env)
  assert done.returncode == 0, done.stderr
  found = load_arrays(tmp_path / 'run')["['state']['params']['sasrec']['item_embedding']"]
  table = load_features(encoded, 'item', 'text').table()
  expected = initial_item_embeddings({'text': table}, found.shape[1], 0.3, 1.0, jax.random.key(0))
  gram = lambda rows: np.asarray(rows[1:61] @ rows[1:61].T)
  np.testing.assert_allclose(gram(found), gram(expected), atol=1e-3)


def test_features_that_do_not_fit_are_refused(run, trained, encoded, tmp_path):
  def refusal(*flags, workdir=tmp_path / 'run'):
    done = run(workdir, *flags)
    assert (done.returncode, done.stderr.count('Traceback')) == (2, 0), done.stderr
    return done.stderr

  here = f'--config.data_dir={encoded}'
  assert 'has no audio features of items' in refusal(
    here, '--config.modalities=audio', '--config.sasrec.item_input=content'
  )
  assert 'has no text features of users' in refusal(here, *BOTH, '--config.user_modalities=text')
  assert 'was made for the split leave_one_out' in refusal(
    here, *BOTH, TASTE, '--config.split=time'
  )
  assert 'only the retriever reads them' in refusal(here, TASTE)
  assert 'content needs modalities' in refusal(here, '--config.sasrec.item_input=content')
  assert 'content needs modalities' in refusal(here, '--config.sasrec.item_input=id_from_content')
  assert 'modalities are for content' in refusal(here, '--config.modalities=text')
  other = tmp_path / 'other'
  shutil.copytree(encoded, other)
  info = json.loads((other / 'dataset.json').read_text())
  info['ids_sha256']['items'] = '0' * 64
  (other / 'dataset.json').write_text(json.dumps(info))
  assert 'is of other items' in refusal(f'--config.data_dir={other}', *BOTH)
  # Other features are another run.
  for changed in ('item/text', 'user/taste'):
    path = tmp_path / changed
    shutil.copytree(encoded, path)
    info_path = path / 'features' / changed / 'info.json'
    info_path.write_text(json.dumps(json.loads(info_path.read_text()) | {'fingerprint': 'f' * 64}))
    flags = (f'--config.data_dir={path}', *BOTH, TASTE)
    assert 'use another --workdir' in refusal(*flags, workdir=trained[0])

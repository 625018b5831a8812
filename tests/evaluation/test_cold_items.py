import dataclasses

import jax
import numpy as np
import pytest

from configs import default
from ur4rec_jax.data.features import Tables, TokenTable, load_with_features, read_tables
from ur4rec_jax.evaluation import cold_items, evaluate
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.models.content import initial_item_embeddings
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings
from ur4rec_jax.training.train_state import parameter_shapes

DIM = 8


def make_features(num_items: int, without=()) -> dict[str, TokenTable]:
  """Random tokens of two modalities; of the items `without`, none."""
  rng = np.random.default_rng(0)
  mask = np.ones((num_items + 1, 1), bool)
  mask[[0, *without]] = False
  tokens = {name: rng.normal(size=(num_items + 1, 1, 12)).astype(np.float32) for name in 'ab'}
  return {name: TokenTable(x * mask[..., None], mask) for name, x in tokens.items()}


@pytest.mark.parametrize('num_items', [40, 2500])  # The larger one is compared in several parts.
def test_the_nearest_by_content_are_found_among_warm_items(num_items):
  features = make_features(num_items, without=(3, 4))
  is_warm = np.arange(num_items + 1) % 2 > 0
  found = cold_items.find_cold_items(features, ~is_warm, is_warm, DIM)
  rows = np.asarray(initial_item_embeddings(features, DIM, 1.0, 1.0, jax.random.key(5)), np.float64)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  warm = np.setdiff1d(np.flatnonzero(is_warm), [3])
  np.testing.assert_array_equal(found.items, np.setdiff1d(np.flatnonzero(~is_warm), [0, 4]))
  cosines = np.sort(rows[found.items] @ rows[warm].T, axis=1)[:, ::-1][:, : cold_items.NEAREST]
  ours = np.einsum('id,ikd->ik', rows[found.items], rows[found.nearest])
  np.testing.assert_allclose(ours, cosines, atol=1e-5)
  assert np.isin(found.nearest, warm).all()


def test_there_may_be_nothing_to_find():
  everybody, nobody = np.ones(41, bool), np.zeros(41, bool)
  find = cold_items.find_cold_items
  assert find({}, everybody, everybody, DIM) is None
  assert find(make_features(40), nobody, everybody, DIM) is None
  assert find(make_features(40), everybody, nobody, DIM) is None
  assert find(make_features(40, without=range(5, 41)), np.arange(41) > 4, everybody, DIM) is None


def make_config(data, **sasrec):
  config = default.get_config()
  config.data_dir = str(data)
  config.sasrec.update({'dim': DIM, 'ffn_dim': DIM} | sasrec)
  return config


@pytest.mark.parametrize('rows', ['all', 'sharded'])
def test_cold_items_are_ranked_by_the_rows_of_their_nearest(encoded, rows):
  config = make_config(encoded, item_input='id_from_content')
  config.modalities = ('text',)
  dataset = load_with_features(config)
  ids = dataset.item_ids.copy()
  targets = np.unique(dataset.held_out('test')[1])[:3]
  ids[np.isin(ids, targets) & dataset.is_train] = targets[-1] + 1
  dataset = dataclasses.replace(dataset, item_ids=ids)
  model, tables = create_model(config, dataset.num_items), read_tables(dataset)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype), parameter_shapes(model, tables)
  )

  def rank(model, dataset, tables, params, rows='all'):
    embeddings = ItemEmbeddings(rows, dataset.num_items)
    axes = embeddings.axes(params)
    tables = tables._replace(items=embeddings.pad_features(tables.items))
    data = evaluate.EvalData(
      dataset,
      Protocol(),
      config.evaluation.batch_size,
      devices.replicate(dataset.item_ids),
      devices.place(tables, Tables(embeddings.axis, None)),
      embeddings,
      axes,
    )
    evaluator = evaluate.make_evaluator(model, data, 'test')
    return evaluator(devices.place(jax.device_get(embeddings.pad(params)), axes))

  ranks = rank(model, dataset, tables, params, rows)
  cold = cold_items.cold_items_of(model, dataset)
  assert np.isin(targets, cold.items).all()
  table = params['sasrec']['item_embedding']
  table[cold.items] = cold_items.mean_of_nearest(table, cold)
  by_ids = create_model(make_config(encoded), dataset.num_items)
  expected = rank(by_ids, dataclasses.replace(dataset, features={}), Tables({}, {}), params)
  np.testing.assert_array_equal(ranks, expected)

"""Vectors from a file give the top k that the recommender gives, with NumPy alone."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.marks import slow
from tests.helpers.recommenders import make
from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import vectors


def read(path):
  table = pq.read_table(path)
  column = table['vector'].combine_chunks()
  return table, column.flatten().to_numpy().reshape(len(column), -1)


@pytest.mark.parametrize(
  'name', ['sasrec', 'adaptive', *slow('text', 'paper', 'bfloat16', 'standardise')]
)
def test_the_largest_inner_products_are_the_answer(shop, tmp_path, name):
  recommender, _ = make(shop, name)
  width = vectors.write_items(recommender, tmp_path / 'items.parquet')
  vectors.write_users(recommender, tmp_path / 'users.parquet')
  items, of_items = read(tmp_path / 'items.parquet')
  users, of_users = read(tmp_path / 'users.parquet')
  assert items.column_names == ['item', 'title', 'vector']
  assert items['item'].to_pylist() == recommender.item_ids
  assert items['title'].to_pylist() == recommender.titles
  assert of_items.shape[1] == of_users.shape[1] == width
  names = users['user'].to_pylist()
  assert names == list(recommender.users)

  scores = of_users @ of_items.T
  for row in (0, 3, len(names) - 1):
    history = recommender.history(names[row])
    seen = [recommender.item_ids.index(item) for item in history]
    own = np.where(np.isin(np.arange(len(of_items)), seen), -np.inf, scores[row])
    best = np.argsort(-own, kind='stable')[:5]
    answer = recommender.answer([history], 5, users=[row])
    tolerance = 0.02 if name == 'bfloat16' else 1e-4
    np.testing.assert_allclose(own[best], answer.scores[0], atol=tolerance, rtol=tolerance)
    if name != 'bfloat16':
      assert [recommender.item_ids[i] for i in best] == answer.items[0]


def test_vectors_leave_out_followers(shop):
  with_followers, without = (make(shop, name)[0] for name in ('followers', 'text'))
  found, expected = vectors.item_vectors(with_followers), vectors.item_vectors(without)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('unknown', [['nope'], []])
def test_a_history_without_a_known_item_has_no_vector(shop, unknown):
  recommender, _ = make(shop, 'sasrec')
  with pytest.raises(InputError, match=r'^history: '):
    recommender.user_vectors([unknown])
  with pytest.raises(InputError, match=r'^user 1: history: '):
    recommender.user_vectors([recommender.item_ids[:2], unknown])


def test_ranks_are_no_inner_products(shop, tmp_path):
  with pytest.raises(InputError, match='made of ranks, which are no inner products'):
    vectors.write_items(make(shop, 'rank')[0], tmp_path / 'items.parquet')
  assert not list(tmp_path.iterdir())

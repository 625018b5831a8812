"""Similar items, against plain NumPy and against the users that items share."""

import numpy as np
import pytest

from tests.helpers.marks import slow
from tests.helpers.recommenders import make
from ur4rec_jax import exported
from ur4rec_jax.errors import InputError
from ur4rec_jax.inference.exporting import export

KINDS = ('sequence', 'content', 'both', 'users')


@pytest.fixture(scope='module')
def recommender(encoded):
  return make(encoded, 'multimodal')[0]


def cosines(vectors, item):
  vectors = np.asarray(vectors, np.float64)
  return (
    vectors
    @ vectors[item]
    / np.linalg.norm(vectors, axis=1).clip(1e-9)
    / np.linalg.norm(vectors[item])
  )


def ids(rows):
  return [row['item'] for row in rows]


def expected(recommender, scores, k):
  scores = scores.copy()
  return [recommender.item_ids[i - 1] for i in np.argsort(-scores, kind='stable')[:k]]


@pytest.mark.parametrize('by', ['sequence', 'content'])
def test_cosines_of_vectors(recommender, by):
  arrays = recommender._item_arrays
  if by == 'sequence':
    vectors = arrays['sasrec']['vectors']
  else:  # The last part is that of the id.
    vectors = np.asarray(arrays['retriever']['parts'])[:, :-1].sum(1)
  scores = cosines(vectors, 5)
  scores[[0, 5]] = -np.inf
  rows = recommender.similar(recommender.item_ids[4], k=7, by=by)
  assert ids(rows) == expected(recommender, scores, 7)
  values = [row['similarity'] for row in rows]
  np.testing.assert_allclose(values, np.sort(scores)[::-1][:7], atol=1e-5)
  assert rows[0]['title'] == recommender.titles[recommender.item_ids.index(rows[0]['item'])]


def test_both_joins_the_two_in_standard_deviations(recommender):
  vectors = recommender.item_vectors()
  parts = [vectors.similarities(np.array([5]), by) for by in ('sequence', 'content')]
  scores = np.mean([x / x[1:].std() for x in parts], axis=0)
  scores[[0, 5]] = -np.inf
  assert ids(recommender.similar([recommender.item_ids[4]])) == expected(recommender, scores, 10)


def test_users_in_common(recommender):
  offsets, items = recommender.dataset.offsets, recommender.dataset.item_ids
  has = np.zeros((len(offsets) - 1, 61))
  for user in range(len(has)):
    has[user, items[offsets[user] : offsets[user + 1]]] = 1
  scores = cosines(has.T, 9)
  scores[[0, 9]] = -np.inf
  rows = recommender.similar(recommender.item_ids[8], k=5, by='users')
  np.testing.assert_allclose([x['similarity'] for x in rows], np.sort(scores)[::-1][:5], atol=1e-6)


def test_several_items_and_the_whole_catalogue(recommender):
  chosen = recommender.item_ids[:3]
  for by in KINDS:
    rows = recommender.similar(chosen, k=60, by=by)
    assert not set(ids(rows)) & set(chosen)
    assert len(rows) == 57 or by == 'users'
    assert len(set(ids(rows))) == len(rows)


def test_an_item_without_content_is_like_nothing_by_content(recommender, monkeypatch):
  vectors = dict(recommender.item_vectors().vectors)
  vectors['content'] = vectors['content'].copy()
  vectors['content'][5] = 0
  monkeypatch.setattr(recommender.item_vectors(), 'vectors', vectors)
  item, other = recommender.item_ids[4], recommender.item_ids[6]
  assert recommender.similar(item, by='content') == []
  assert len(recommender.similar(item, by='both')) == 10
  rows = recommender.similar(other, k=60, by='content')
  assert len(rows) == 58
  assert item not in ids(rows)


def test_items_without_content_take_no_place_of_those_that_are_unlike(recommender, monkeypatch):
  vectors = dict(recommender.item_vectors().vectors)
  content = vectors['content'] = np.zeros((61, 2), np.float32)
  content[1, 0], content[2:5, 0] = 1, -1
  monkeypatch.setattr(recommender.item_vectors(), 'vectors', vectors)
  found = recommender.similar(recommender.item_ids[0], k=3, by='content')
  assert ids(found) == recommender.item_ids[1:4]


@pytest.mark.parametrize(
  'variant', ['multimodal', *slow('sasrec', 'retriever alone', 'rank', 'cascade')]
)
def test_an_export_finds_the_same(encoded, tmp_path, variant):
  recommender = make(encoded, variant)[0]
  export(recommender, tmp_path / 'out', with_users=True)
  loaded = exported.load(tmp_path / 'out')
  item = recommender.item_ids[3]
  for by in KINDS:
    if by not in ('both', 'users') and by not in recommender.item_vectors().vectors:
      with pytest.raises(InputError, match='has no such item vectors'):
        loaded.similar(item, by=by)
      continue
    assert ids(loaded.similar(item, by=by)) == ids(recommender.similar(item, by=by))


def test_new_items_have_neighbours(recommender, tmp_path):
  features = recommender.dataset.features
  arrays = {
    name: f.rows(np.array([7]))[0] for name, f in features.items() if name in ('text', 'image')
  }
  np.savez(tmp_path / 'new.npz', ids=np.array(['new']), **arrays)
  recommender.similar(recommender.item_ids[0])  # What is made for the old catalogue is not kept.
  larger, _ = recommender.add_items(tmp_path / 'new.npz')
  assert len(ids(larger.similar('new', by='content'))) == 10


def test_wrong_questions(recommender, encoded, tmp_path):
  with pytest.raises(InputError, match="by='colour': must be one of sequence, content"):
    recommender.similar(recommender.item_ids[0], by='colour')
  with pytest.raises(InputError, match='none of its 1 items is in the catalogue'):
    recommender.similar('nothing')
  with pytest.raises(InputError, match='k=0'):
    recommender.similar(recommender.item_ids[0], k=0)
  export(make(encoded, 'sasrec')[0], tmp_path / 'out')
  with pytest.raises(InputError, match='knows no users; export it with --users'):
    exported.load(tmp_path / 'out').similar(recommender.item_ids[0], by='users')

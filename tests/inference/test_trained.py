"""Every variant and fusion in use: as the trainer ranks, shares that sum, new users and items."""

import copy

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.marks import slow
from tests.helpers.recommenders import VARIANTS, make
from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.data.followers import FollowerTable
from ur4rec_jax.encoders import text
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation import evaluate
from ur4rec_jax.evaluation.best_items import best_items
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import Queries, make_queries
from ur4rec_jax.inference.query import CheckedQuery, Query
from ur4rec_jax.service.http_schema import make_question
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import ItemEmbeddings


def full_ranking(recommender, part: str = 'test'):
  """For each user with a held-out item: the whole catalogue in order, after what came before."""
  queries = make_queries(recommender.dataset, part, Protocol())
  ids = recommender.dataset.item_ids
  histories = [
    ids[start : start + length]
    for start, length in zip(queries.starts, queries.lengths, strict=True)
  ]
  preferences = recommender.preferences_of(queries.users)
  k = len(recommender.item_ids)
  return queries, recommender.rank(CheckedQuery(histories, k, histories, preferences=preferences))


def placed_followers(recommender):
  found = recommender.arrays.get('followers')
  return None if found is None else devices.replicate(FollowerTable(**found))


FEW = ('sasrec', 'multimodal', 'cascade', 'followers')


@pytest.mark.parametrize('name', [*FEW, *slow(*sorted({*VARIANTS} - {*FEW, 'bfloat16'}))])
def test_ranks_are_those_of_the_evaluation_and_shares_add_up(shop, name):
  recommender, tables = make(shop, name)
  queries, (ids, scores, shares) = full_ranking(recommender)
  positions = (ids == queries.targets[:, None]).argmax(1) + 1
  dataset, config = recommender.dataset, recommender.config
  placed = devices.replicate((dataset.item_ids, tables))
  data = evaluate.EvalData(
    dataset,
    Protocol(),
    config.evaluation.batch_size,
    *placed,
    ItemEmbeddings('all', dataset.num_items),
    followers=placed_followers(recommender),
  )
  evaluator = evaluate.make_evaluator(recommender.model, data, 'test')
  ranks = evaluator(devices.replicate(recommender.params))
  starts = zip(queries.starts, queries.lengths, queries.targets, strict=True)
  is_new = np.array([t not in recommender.dataset.item_ids[s : s + n] for s, n, t in starts])
  assert is_new.sum() > 50
  np.testing.assert_array_equal(positions[is_new], ranks)
  assert (np.diff(np.where(np.isfinite(scores), scores, -1e9), axis=1) <= 0).all()

  names = recommender.share_names
  of_branches = [names.index(branch) for branch in recommender.branches]
  if name == 'followers':
    of_branches.append(names.index('followers'))
    assert (shares[..., -1] > 0).any(1).all()
  there = np.isfinite(scores)
  if name == 'cascade':
    second = shares[there][:, of_branches[1]].reshape(-1)
    assert np.isfinite(second).all()
    first_user = shares[0, :7, of_branches[1]]
    assert (np.diff(first_user) <= 0).all()  # The chosen ones are in the retriever's order.
    return
  np.testing.assert_allclose(shares[there][:, of_branches].sum(1), scores[there], atol=1e-4)
  for branch in recommender.branches:
    parts = [i for i, n in enumerate(names) if n.startswith(f'{branch}_')]
    if parts:
      whole = shares[there][:, names.index(branch)]
      np.testing.assert_allclose(shares[there][:, parts].sum(1), whole, atol=1e-4)
      assert np.abs(shares[there][:, parts]).max(0).min() > 1e-3


@pytest.mark.parametrize(
  'name', ['sasrec', 'cascade', 'followers', *slow('standardise', 'learned', 'rank')]
)
def test_the_best_items_of_the_evaluation_are_those_that_are_recommended(shop, name):
  recommender, tables = make(shop, name)
  queries, (ids, scores, _) = full_ranking(recommender)
  few = Queries(*(x[::40] for x in queries))
  placed = devices.replicate((recommender.dataset.item_ids, tables))
  embeddings = ItemEmbeddings('all', recommender.dataset.num_items)
  data = evaluate.EvalData(
    recommender.dataset,
    Protocol(),
    64,
    *placed,
    embeddings,
    followers=placed_followers(recommender),
  )
  params = devices.replicate(recommender.params)
  found = best_items(recommender.model, data, params, few, 5)
  np.testing.assert_array_equal(found, ids[::40, :5])
  assert len(found) >= 3
  assert np.isfinite(scores[::40, :5]).all()
  # A target that the user has seen is left out, too.
  few = few._replace(targets=recommender.dataset.item_ids[few.starts])
  found = best_items(recommender.model, data, params, few, recommender.dataset.num_items)
  assert not (found == few.targets[:, None]).any()


def test_shares_are_named_by_what_items_are_made_of(shop):
  assert make(shop, 'sasrec')[0].share_names == ['sasrec']
  names = ['sasrec', 'retriever', 'retriever_image', 'retriever_text', 'retriever_id']
  assert make(shop, 'multimodal')[0].share_names == names
  assert make(shop, 'rank')[0].share_names == ['sasrec', 'retriever']
  assert 'sasrec_text' in make(shop, 'content in both')[0].share_names
  assert make(shop, 'followers')[0].share_names[-1] == 'followers'


def test_one_user_alone_is_recommended_as_among_many_of_all_lengths(shop):
  recommender, _ = make(shop, 'multimodal')
  ids = recommender.item_ids
  histories = [[ids[(7 * n + i) % 60] for i in range(n)] for n in (1, 3, 20, 31, 33, 50)] * 4
  together = recommender.answer(histories, 5)
  for i, history in enumerate(histories[:6]):
    alone = recommender.answer([history], 5)
    assert alone.items[0] == together.items[i] == together.items[i + 6]
    np.testing.assert_allclose(alone.scores[0], together.scores[i], atol=1e-5)
    assert not set(alone.items[0]) & set(history)


def test_filters_and_weights_of_branches(shop):
  recommender, _ = make(shop, 'multimodal')
  ids = recommender.item_ids
  history = ids[:3]
  plain = recommender.answer([history], 10).items[0]
  assert recommender.answer([history], 9, without=plain[:1]).items[0] == plain[1:]
  chosen = recommender.answer([history], 10, only=[plain[4], plain[2], history[0]]).items[0]
  assert chosen == [plain[2], plain[4]]
  seen = recommender.answer([history], 60, keep_seen=True).items[0]
  assert sorted(seen) == sorted(ids)
  assert len(recommender.answer([history], 60).items[0]) == 57
  retriever = recommender.answer([history], 10, weights=[0, 1])
  assert np.abs(retriever.shares[0][:, 0]).max() == 0
  assert retriever.items[0] != plain
  both = recommender.answer([history] * 2, 10, weights=[[1, 1], [0, 1]])
  assert both.items == [plain, retriever.items[0]]


def test_frames_go_in_and_out(shop):
  recommender, _ = make(shop, 'text')
  ids = recommender.item_ids
  one = recommender.recommend(ids[:2], k=3)
  assert list(one) == ['rank', 'item', 'title', 'score', *recommender.share_names]
  assert one['rank'].tolist() == [1, 2, 3]
  pd.testing.assert_frame_equal(recommender.recommend(ids[:2], k=np.int64(3)), one)
  log = pd.DataFrame(
    {
      'user': ['b', 'a', 'a', 'b'],
      'item': [ids[5], ids[1], ids[0], ids[6]],
      'timestamp': [1, 9, 3, 2],
    }
  )
  many = recommender.recommend(log, k=3)
  assert (
    many['user'].tolist() == ['b'] * 3 + ['a'] * 3 or many['user'].tolist() == ['a'] * 3 + ['b'] * 3
  )
  pd.testing.assert_frame_equal(
    many[many.user == 'a'].drop(columns='user').reset_index(drop=True), one, rtol=1e-4
  )
  pd.testing.assert_frame_equal(recommender.recommend(pa.Table.from_pandas(log), k=3), many)
  by_name = recommender.recommend({'x': ids[:2], 'y': ids[5:7]}, k=3)
  assert by_name['user'].tolist() == ['x'] * 3 + ['y'] * 3
  with pytest.warns(UserWarning, match="1 items .* first 'nothing'"):
    same = recommender.recommend([ids[0], 'nothing', ids[1]], k=3)
  pd.testing.assert_frame_equal(same, one)
  user = next(iter(recommender.users))
  pd.testing.assert_frame_equal(
    recommender.recommend(user=user, k=3), recommender.recommend(recommender.history(user), k=3)
  )
  with pytest.raises(InputError, match="no column 'item', only user, goods"):
    recommender.recommend(log[['user']].assign(goods=1))


BAD_HISTORIES = {
  'empty': [],
  'unknown': ['nothing', 'nobody'],
  'no list': 5,
  'a text': 'i01',
  'a fraction': [1.5],
  'missing': [None],
}


@settings(max_examples=15)
@given(order=st.permutations([*BAD_HISTORIES, 'ann', 'bob', 'cid']), bad=st.integers(1, 6))
def test_a_user_who_cannot_be_answered_costs_the_others_nothing(shop, order, bad):
  recommender, _ = make(shop, 'text')
  ids = recommender.item_ids
  good = {'ann': ids[:2], 'bob': ids[5:9], 'cid': ids[3:4]}
  kept = {*list(BAD_HISTORIES)[:bad], *good}
  histories = {name: (BAD_HISTORIES | good)[name] for name in order if name in kept}
  answer = recommender.answer(list(histories.values()), 3)
  for name, items, problem in zip(histories, answer.items, answer.problems, strict=True):
    assert (len(items), bool(problem)) == ((3, False) if name in good else (0, True))
    if name in good:
      assert items == recommender.answer([good[name]], 3).items[0]
  with pytest.warns(UserWarning, match='gets no recommendations'):
    frame = recommender.recommend(histories, k=3)
  assert set(frame['user']) == set(good)
  assert set(frame.attrs['problems']) == kept - set(good)
  with pytest.raises(InputError, match='none of the 2 users'):
    recommender.answer([[], ['nothing']], 3)


def test_an_unknown_user_among_known_ones_is_named(shop):
  recommender, _ = make(shop, 'learned')
  names = list(recommender.users)[:2]
  with pytest.warns(UserWarning, match="user 'nobody' gets no recommendations: user 'nobody'"):
    frame = recommender.recommend(user=[names[0], 'nobody', names[1]], k=3)
  assert frame['user'].tolist() == [names[0]] * 3 + [names[1]] * 3
  with_texts = recommender.recommend(user=names[1], k=3)
  assert frame[frame.user == names[1]]['item'].tolist() == with_texts['item'].tolist()


def test_an_influence_is_the_fall_of_the_score_above_the_mean(shop):
  recommender, _ = make(shop, 'text')
  ids = recommender.item_ids
  history, items = ids[:4], ids[10:12]
  found = recommender.influences(history, items)
  assert found.shape == (4, 2)

  def above_mean(history):
    scores = recommender.answer([history], 60, keep_seen=True)
    by_id = dict(zip(scores.items[0], scores.scores[0], strict=True))
    return np.array([by_id[item] for item in items]) - np.mean(list(by_id.values()))

  expected = above_mean(history) - above_mean(history[:1] + history[2:])
  np.testing.assert_allclose(found[1], expected, atol=1e-4)


@pytest.mark.parametrize('name', ['text', 'sasrec', *slow('adaptive', 'rank', 'cascade', 'paper')])
def test_without_the_named_item_the_score_falls_the_most(shop, name):
  recommender, _ = make(shop, name)
  history = [recommender.item_ids[i] for i in (3, 17, 5, 40, 9, 22)]
  items = recommender.answer([history], 4).items[0]

  def above_mean(history):
    answer = recommender.answer([history], len(recommender.item_ids), keep_seen=True)
    by_id = dict(zip(answer.items[0], answer.scores[0], strict=True))
    return np.array([by_id[item] for item in items]) - np.mean(list(by_id.values()))

  whole = above_mean(history)
  falls = [whole - above_mean(history[:i] + history[i + 1 :]) for i in range(len(history))]
  frame = recommender.recommend(history, 4, explain=True)
  assert frame['item'].tolist() == items
  for column, (named, why) in enumerate(zip(frame['because'], frame['why'], strict=True)):
    falls_of_item = {item: fall[column] for item, fall in zip(history, falls, strict=True)}
    assert len(named) <= 3
    assert all(falls_of_item[item] > -1e-6 for item in named)
    if not named:
      assert max(falls_of_item.values()) <= 1e-5
      continue
    assert falls_of_item[named[0]] == pytest.approx(max(falls_of_item.values()), abs=1e-4)
    title = recommender.titles[recommender.item_ids.index(named[0])]
    assert why.startswith(f'Because of {title}')


def test_explanations_are_those_of_the_weights(shop):
  recommender, _ = make(shop, 'text')
  history = [recommender.item_ids[i] for i in (3, 17, 5, 40, 9, 22)]
  weights = [[0, 1], [1, 0]]
  frame = recommender.recommend([history, history], 4, explain=True, weights=weights)
  for user, own in enumerate(weights):
    rows = frame[frame.user == user]
    items = rows['item'].tolist()

    def above_mean(history, own=own, items=items):
      answer = recommender.answer([history], 60, keep_seen=True, weights=own)
      by_id = dict(zip(answer.items[0], answer.scores[0], strict=True))
      return np.array([by_id[item] for item in items]) - np.mean(list(by_id.values()))

    whole = above_mean(history)
    falls = np.stack([whole - above_mean(history[:i] + history[i + 1 :]) for i in range(6)])
    for column, named in enumerate(rows['because']):
      best = np.argsort(-falls[:, column])[:3]
      assert named == [history[i] for i in best if falls[i, column] > 1e-6]
    alone = recommender.recommend(history, 4, explain=True, weights=own)
    assert alone['because'].tolist() == rows['because'].tolist()


@pytest.mark.parametrize('name', ['text', 'learned'])
@pytest.mark.parametrize('length', [1, 6, 25])
def test_explanations_are_those_of_the_preference(shop, name, length):
  """The variants read the preference as an item, and as a text of the user."""
  recommender, _ = make(shop, name)
  history, wish = recommender.item_ids[3 : 3 + length], recommender.titles[40]
  read = history[-(19 if name == 'text' else 20) :]
  frame = recommender.recommend(history, 4, explain=True, preference=wish)
  items = frame['item'].tolist()

  def above_mean(history):
    answer = recommender.answer([history], 60, keep_seen=True, preference=wish)
    by_id = dict(zip(answer.items[0], answer.scores[0], strict=True))
    return np.array([by_id[item] for item in items]) - np.mean(list(by_id.values()))

  whole = above_mean(read)
  falls = np.stack([whole - above_mean(read[:i] + read[i + 1 :]) for i in range(len(read))])
  found = recommender.influences(history, items, preference=wish)
  np.testing.assert_allclose(found, falls, atol=1e-4)
  for column, named in enumerate(frame['because']):
    best = np.argsort(-found[:, column], kind='stable')[:3]
    assert named == [read[i] for i in best if found[i, column] > 1e-6]


@pytest.mark.parametrize('name', ['text', 'sasrec'])
def test_without_its_only_item_a_history_says_nothing_to_sasrec(shop, name):
  recommender, _ = make(shop, name)
  history, items = recommender.item_ids[3:4], recommender.item_ids[10:14]
  (found,) = recommender.influences(history, items)
  nothing = np.zeros(0, np.int32)
  weights = np.array([[branch != 'sasrec' for branch in recommender.branches]], np.float32)
  queries = (
    recommender.check(Query([history], 60, keep_seen=True)),
    CheckedQuery([nothing], 60, [nothing], weights=weights),
  )
  with_it, without = (
    dict(zip(ranking.items[0].tolist(), ranking.scores[0].tolist(), strict=True))
    for ranking in map(recommender.rank, queries)
  )
  above = lambda scores: np.array([scores[i] for i in range(11, 15)]) - np.mean([*scores.values()])
  np.testing.assert_allclose(found, above(with_it) - above(without), atol=1e-4)


def test_explanations_of_several_users_belong_to_them(shop):
  recommender, _ = make(shop, 'text')
  ids = recommender.item_ids
  histories = {'ann': ids[:3], 'bob': ids[30:36]}
  together = recommender.recommend(histories, 3, explain=True)
  for name, history in histories.items():
    alone = recommender.recommend(history, 3, explain=True)
    for column in ('because', 'why', 'sentence'):
      assert together[together.user == name][column].tolist() == alone[column].tolist()
    assert {item for named in alone['because'] for item in named} <= set(history)


def test_a_sentence_is_read_as_an_item_with_that_text(shop):
  recommender, _ = make(shop, 'text')
  title = recommender.titles[8]
  first, other = (
    recommender.answer([[]], 5, preference=text) for text in (title, 'Quite another thing.')
  )
  assert first.scores[0][0] != other.scores[0][0]
  assert len(first.items[0]) == 5
  assert '\0preference' not in first.items[0]
  kept = recommender.answer([[]], 60, preference=title, keep_seen=True)
  assert sorted(kept.items[0]) == sorted(recommender.item_ids)
  with_history = recommender.answer([recommender.item_ids[:30]], 5, preference=title)
  without = recommender.answer([recommender.item_ids[:30]], 5)
  assert not np.allclose(with_history.scores[0], without.scores[0])


def test_a_sentence_means_nothing_to_ids_and_needs_its_encoder(shop):
  with pytest.raises(InputError, match='this model reads no texts'):
    make(shop, 'sasrec')[0].answer([[]], 5, preference='Dark stories.')
  for bad, message in (('', 'no letters'), ('...', 'no letters'), (3, 'must be a text')):
    with pytest.raises(InputError, match=message):
      make(shop, 'text')[0].answer([[]], 5, preference=bad)


def test_encoding_a_text_gives_what_was_stored(shop):
  features = make(shop, 'learned')[0].dataset.user_features['text']
  whole, *_ = [*text.texts(shop, 'user', features.shape[1] - 1)][3]
  tokens, mask = text.encode_like(features.folder, features.info, whole)
  stored, stored_mask = features.rows(np.array([3]))
  np.testing.assert_array_equal(mask, stored_mask[0])
  np.testing.assert_allclose(tokens, stored[0], atol=1e-3)


def test_a_written_preference_takes_the_place_of_what_was_written_about_a_user(shop):
  recommender, _ = make(shop, 'learned')
  written = [*text.texts(shop, 'user', 8)]
  history = recommender.item_ids[:4]
  own = recommender.answer([history], 5, users=[3]).scores[0]
  same = recommender.answer([history], 5, preference=written[3][0]).scores[0]
  other = recommender.answer([history], 5, users=[3], preference=written[4][0]).scores[0]
  np.testing.assert_allclose(own, same, atol=0.02)  # Stored in half precision.
  assert np.abs(own - other).max() > 0.02
  alone = recommender.answer([[]], 5, preference=written[3][0])
  assert np.abs(alone.shares[0][:, 0]).max() == 0  # SASRec says nothing without a history.


@pytest.fixture
def new_items(shop, tmp_path):
  """A file with items 3 and 4 of the catalogue under new ids, and one that is there already."""
  tables = make(shop, 'multimodal')[1].items
  ids = ['new-3', 'new-4', read_items(shop)[0]['original_id']]
  rows = np.array([3, 4, 1])
  arrays = {name: tables[name].tokens[rows] for name in ('text', 'image')}
  np.savez(tmp_path / 'new.npz', ids=ids, titles=['Three', 'Four', 'One'], **arrays)
  return tmp_path / 'new.npz'


def test_new_items_are_placed_by_their_content(shop, new_items):
  recommender, _ = make(shop, 'multimodal')
  larger, known = recommender.add_items(new_items)
  assert known == [recommender.item_ids[0]]
  assert larger.item_ids == [*recommender.item_ids, 'new-3', 'new-4']
  assert len(recommender.item_ids) == 60
  history = recommender.item_ids[10:14]
  before = recommender.answer([history], 56)
  after = larger.answer([history], 58)
  both = [item for item in after.items[0] if not item.startswith('new')]
  assert both == before.items[0]
  row = after.items[0].index('new-3')
  shares = dict(zip(larger.share_names, after.shares[0][row], strict=True))
  assert after.titles[0][row] == 'Three'
  assert shares['retriever_id'] == 0
  assert shares['retriever_text'] != 0
  # SASRec, which knows rows alone, takes it for the mean of two items, of which one is the same.
  rows = larger._item_arrays['sasrec']['vectors']
  others = np.abs(2 * rows[61] - rows[3] - rows[1:61]).max(1)
  assert others.min() < 1e-5
  # It is like the item whose content it has, but for the id.
  twin = recommender._item_arrays['retriever']['modalities'][3]
  np.testing.assert_allclose(larger._item_arrays['retriever']['modalities'][61], twin, atol=1e-5)
  assert larger.answer([['new-3']], 3).items[0]


def test_new_items_have_passages_also_where_those_of_the_old_ones_are_known(shop, new_items):
  recommender, _ = make(shop, 'multimodal')
  assert len(recommender.passages) == 60
  larger, _ = recommender.add_items(new_items)
  assert len(larger.passages) == len(larger.item_ids) == 62


def test_rows_alone_take_new_items_for_those_they_are_most_like(shop, new_items):
  recommender, _ = make(shop, 'rows alone')
  larger, _ = recommender.add_items(new_items)
  rows = larger._item_arrays['sasrec']['vectors']
  for new, twin in ((61, 3), (62, 4)):
    np.testing.assert_allclose(
      np.abs(2 * rows[new] - rows[twin] - rows[1:61]).max(1).min(), 0, atol=1e-5
    )
  assert {'new-3', 'new-4'} <= set(larger.answer([recommender.item_ids[10:14]], 58).items[0])
  title = recommender.titles[2]
  assert recommender.answer([[]], 5, preference=title).items[0]


def test_nothing_is_known_to_follow_new_items(shop, new_items):
  recommender, _ = make(shop, 'followers')
  larger, _ = recommender.add_items(new_items)
  answer = larger.answer([['new-3', recommender.item_ids[4]], ['new-3']], 58)
  of_followers = dict(zip(answer.items[0], answer.shares[0][:, -1], strict=True))
  assert of_followers['new-4'] == 0
  assert max(of_followers.values()) > 0
  assert not answer.shares[1][:, -1].any()


def test_new_items_that_cannot_be_placed_are_refused(shop, new_items, tmp_path):
  with pytest.raises(InputError, match='knows items by their id only'):
    make(shop, 'sasrec')[0].add_items(new_items)
  recommender, _ = make(shop, 'multimodal')
  with pytest.raises(InputError, match='neither a prepared folder nor'):
    recommender.add_items(tmp_path / 'none.npz')
  content = dict(np.load(new_items))
  for changed, message in (
    ({'image': content['image'][:2]}, "must hold 'image', with an entry for each"),
    ({'text': content['text'][..., :7]}, r'text must be finite, \[items, tokens, 256\]'),
    ({'ids': np.array(['a', 'a', 'b'])}, 'an id is there twice'),
    ({'ids': np.array('a')}, r'ids must be \[items\]'),
    ({'ids': np.array([b'a', b'b', b'c'])}, 'ids must be text or whole numbers'),
    ({'ids': np.array([7.0, 8.0, 9.0])}, 'ids must be text or whole numbers'),
    ({'titles': np.array([b'a', b'b', b'c'])}, 'titles must be text or whole numbers'),
    ({'titles': np.array(['One', 'Two'])}, "must hold 'titles', with an entry for each"),
    ({'image': np.array(5.0)}, "must hold 'image', with an entry for each"),
    ({'image': np.array([[['red']]] * 3)}, 'image must be finite'),
    (
      {'text': content['text'] * 0, 'image': content['image'] * 0},
      "item 'new-3' has no features",
    ),
  ):
    np.savez(tmp_path / 'bad.npz', **content | changed)
    with pytest.raises(InputError, match=message):
      recommender.add_items(tmp_path / 'bad.npz')
  whole = new_items.read_bytes()
  (tmp_path / 'bad.npz').write_bytes(whole[: len(whole) // 2])
  np.save(tmp_path / 'bad.npy', content['image'])
  for name in ('bad.npz', 'bad.npy'):
    with pytest.raises(InputError, match='neither a prepared folder nor a readable'):
      recommender.add_items(tmp_path / name)
  same, known = recommender.add_items(shop)
  assert (same, len(known)) == (recommender, 60)


@pytest.mark.parametrize('name', ['multimodal', 'followers'])
def test_the_approximate_search_is_exact_where_it_looks_at_everything(shop, name):
  exact, approximate = make(shop, name)[0], make(shop, name, True)[0]
  history = exact.item_ids[:5]
  first, second = (r.answer([history], 10) for r in (exact, approximate))
  assert first.items == second.items
  np.testing.assert_allclose(first.scores[0], second.scores[0], atol=1e-4)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'history': []}, 'history: is empty'),
    ({}, 'history: is empty'),
    ({'history': [-1, -2]}, "none of its 2 items is in the catalogue, first '-1'"),
    ({'history': [1.5]}, 'must be text or whole numbers, not 1.5'),
    ({'history': [None]}, 'not None'),
    ({'history': [True]}, 'not True'),
    ({'history': 'S0-0'}, "must be a list of item ids, not 'S0-0'"),
    ({'history': 5}, 'must be a list of item ids, not 5'),
    ({'history': [{}, {}]}, 'must be a list'),
    ({'user': 'nobody'}, "user 'nobody': is not in"),
    ({'user': 'u001', 'history': ['a']}, 'exclude each other'),
    ({'k': 0}, 'k=0: must be a whole number from 1 to 60'),
    ({'k': 61}, 'k=61'),
    ({'k': 2.0}, r'k=2\.0'),
    ({'k': True}, 'k=True'),
    ({'only': ['nothing']}, 'only: none of its 1 items'),
    ({'weights': [1]}, None),
    ({'weights': [1, -1]}, 'weights='),
    ({'weights': [1, 2, 3]}, 'weights='),
    ({'weights': ['a', 'b']}, 'weights='),
    ({'weights': [float('nan'), 1]}, 'weights='),
    ({'emphasis': [1, 1]}, 'emphasis: this option is now called weights'),
    (
      {'without_seen': True},
      'without_seen: there is no such option; the options are only, without',
    ),
  ],
)
def test_bad_input_is_named(shop, arguments, message):
  recommender, _ = make(shop, 'text')
  if 'history' not in arguments and 'user' not in arguments and arguments:
    arguments = {'history': recommender.item_ids[:2], **arguments}
  if message is None:
    assert len(recommender.recommend(**arguments)) == 10
    return
  with pytest.raises(InputError, match=message):
    recommender.recommend(**arguments)


def test_a_history_of_ten_thousand_items_is_read_from_its_end(shop):
  recommender, _ = make(shop, 'text')
  ids = recommender.item_ids[:50]
  long = recommender.answer([ids * 200], 5)
  short = recommender.answer([ids[-20:]], 5, without=ids)
  assert long.items == short.items
  np.testing.assert_allclose(long.scores[0], short.scores[0], atol=1e-5)


def test_seen_items_are_recommended_as_the_model_was_evaluated(shop):
  recommender, _ = make(shop, 'sasrec')
  history = recommender.item_ids[:5]
  keeps = copy.copy(recommender)
  about = {'config': {'evaluation': {'seen_items': 'keep'}}}
  keeps.settings = recommender.settings._replace(about=about)
  seen = lambda r, **options: set(r.answer([history], 60, **options).items[0]) & set(history)
  assert not recommender.keeps_seen
  assert seen(recommender) == set()
  assert seen(keeps) == set(history)
  assert seen(keeps, keep_seen=False) == set()
  assert seen(recommender, keep_seen=True) == set(history)
  question = make_question(['sasrec'], 10, keeps.keeps_seen)
  assert question(history=history).keep_seen
  assert not question(history=history, keep_seen=False).keep_seen

"""Items of the table that nobody has had yet stay in the catalogue on request, and are ranked."""

import numpy as np
import pandas as pd
import pytest

from data_prep import build_dataset, describe
from data_prep.prepared import prepare
from tests.helpers.recommenders import make
from ur4rec_jax.data.dataset import load_dataset, read_info, read_interactions, read_items
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation.baselines import baseline_metrics
from ur4rec_jax.evaluation.cold_items import warm_items
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import make_queries

ROWS = pd.DataFrame(
  [(f'u{u}', f's{(u + i) % 6}', 100 * u + i, u % 5 + 1) for u in range(12) for i in range(4)],
  columns=['user', 'item', 'time', 'rating'],
)
SOLD = [f's{i}' for i in range(6)]
# Two cold items are numbered before the others, and two after them.
COLD = ['a', 'b', 'x', 'y']
# The hash that versions without the flag give.
HASH = '274495ee032c0dbb'


def build(tmp_path, name: str, table: list[str], options=prepare.Options(), **flags):
  goods = pd.DataFrame({'id': table, 'title': [f'Thing {name}' for name in table]})
  metadata = build_dataset.build_from_table(ROWS, tmp_path / name, options, items=goods, **flags)
  return metadata, tmp_path / name


def test_only_the_flag_keeps_items_without_interactions(tmp_path):
  without, folder = build(tmp_path, 'without', [*COLD, *SOLD])
  assert without['counts']['items'] == 6
  assert 'items_without_interactions' not in without['counts']
  assert without['dropped']['items'] == {'never_interacted': 4}
  assert any('4 items of the item table have no inter' in note for note in without['notes'])
  assert without['splits']['leave_one_out']['hash'] == HASH
  kept, kept_folder = build(tmp_path, 'kept', [*COLD, *SOLD], keep_cold_items=True)
  assert kept['counts'] | {'items': 10, 'items_without_interactions': 4} == kept['counts']
  assert kept['dropped']['items'] == {}
  assert [item['original_id'] for item in read_items(kept_folder)] == sorted([*COLD, *SOLD])
  shown = build_dataset.summary(kept, kept_folder, True)
  assert '10, 4 of them without interactions' in shown
  assert '4 items never in training' in shown
  # The interactions are the same ones.
  names = [
    [items[i - 1]['original_id'] for i in read_interactions(at).item_ids]
    for at, items in ((at, read_items(at)) for at in (folder, kept_folder))
  ]
  assert names[0] == names[1]
  with pytest.raises(InputError, match='another dataset'):
    build(tmp_path, 'kept', [*COLD, *SOLD])
  assert build(tmp_path, 'kept', [*COLD, *SOLD], keep_cold_items=True)[0] == kept
  with pytest.raises(InputError, match='--keep_cold_items is about the item table'):
    build_dataset.build_from_table(ROWS, tmp_path / 'none', keep_cold_items=True)


def test_another_catalogue_is_another_split(tmp_path):
  tables = ([], ['x'], ['x', 'y'], ['a'], ['a', 'x'])
  hashes = {
    build(tmp_path, str(i), [*cold, *SOLD], keep_cold_items=True)[0]['splits']['time']['hash']
    for i, cold in enumerate(tables)
  }
  assert len(hashes) == len(tables)
  # Without such items the flag changes nothing.
  metadata, folder = build(tmp_path, '0', SOLD, keep_cold_items=True)
  assert metadata['splits']['leave_one_out']['hash'] == HASH
  assert load_dataset(folder).num_items == 6
  path = folder / 'dataset.json'
  path.write_text(path.read_text().replace('"items": 6', '"items": 7'))
  with pytest.raises(InputError, match='interactions differ from'):
    load_dataset(folder)


def test_filters_drop_interactions_but_no_item_of_the_table(tmp_path):
  options = prepare.Options(min_rating=5)
  dropped, _ = build(tmp_path, 'dropped', [*COLD, *SOLD], options)
  kept, folder = build(tmp_path, 'kept', [*COLD, *SOLD], options, keep_cold_items=True)
  gone = dropped['dropped']['items']['min_rating']
  assert gone > 0
  assert kept['counts']['items'] == 10
  assert kept['counts']['items_without_interactions'] == 4 + gone
  assert kept['dropped']['items'] == {}
  assert len(read_items(folder)) == 10
  # An item that is not in the table has no such right.
  partial, _ = build(
    tmp_path, 'partial', SOLD[:3], options, keep_cold_items=True, partial_items=True
  )
  names = {*SOLD[:3], *ROWS.item[ROWS.rating >= 5]}
  assert partial['counts']['items'] == len(names)
  core = build(tmp_path, 'core', [*COLD, *SOLD], prepare.Options(k_core=3), keep_cold_items=True)
  assert core[0]['counts'] | {'items': 10, 'items_without_interactions': 4} == core[0]['counts']


@pytest.fixture
def shop(tmp_path):
  return build(tmp_path, 'shop', [*COLD, *SOLD], keep_cold_items=True)[1]


def test_cold_items_are_ranked_by_models_and_baselines(shop):
  dataset = load_dataset(shop)
  assert np.flatnonzero(~warm_items(dataset)[1:]).tolist() == [0, 1, 8, 9]
  for candidates in ('all', 'uniform', 'popularity'):
    protocol = Protocol(candidates, num_candidates=20)
    found = baseline_metrics(dataset, 'test', protocol)
    assert 0 < found['popularity']['mrr'] <= 1
    offered = make_queries(dataset, 'test', protocol).candidates
    # A draw by popularity offers no item without interactions; an equal draw offers all of them.
    assert np.isin([1, 2, 9, 10], offered).all() == (candidates == 'uniform')
    assert np.isin([1, 2, 9, 10], offered).any() == (candidates == 'uniform')
  recommender, _ = make(shop, 'sasrec')
  answer = recommender.top([['s0', 's1']], k=10)
  assert set(answer.items[0]) == {*COLD, *SOLD} - {'s0', 's1'}
  assert answer.titles[0][answer.items[0].index('a')] == 'Thing a'


def test_the_page_shows_cold_items_apart(shop):
  summary = describe.describe(shop)
  assert '10, 4 of them without interactions' in summary
  page = (shop / describe.PAGE).read_text()
  assert 'Without interactions' in page
  assert 'nan' not in page
  assert 'inf' not in page.replace('info', '')
  assert read_info(shop)['counts']['items_without_interactions'] == 4

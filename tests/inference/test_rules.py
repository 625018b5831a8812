"""Rules: what always holds of a list, on generated rules, and on a real recommender."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.goods import write_table
from tests.helpers.recommenders import make
from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import rules as rules_module
from ur4rec_jax.inference.rules import load

ITEMS = [f'i{i}' for i in range(12)]
KINDS = ['pan', 'pot', 'cup']


def write(folder, text, rows=None, header='sku,kind,stock,price'):
  """Writes rules.toml and goods.csv: a kind, a stock and a price of each item."""
  rows = rows or [[x, KINDS[i % 3], i % 4, 5.5 * i] for i, x in enumerate(ITEMS)]
  write_table(folder / 'goods.csv', header, rows)
  path = folder / 'rules.toml'
  path.write_text(text)
  return path


@st.composite
def questions(draw):
  """Attributes, rules and candidates."""
  kinds = draw(st.lists(st.sampled_from(KINDS), min_size=12, max_size=12))
  stocks = draw(st.lists(st.integers(0, 3), min_size=12, max_size=12))
  most = draw(st.integers(1, 4))
  pins = draw(st.dictionaries(st.integers(1, 8), st.integers(1, 12), max_size=3))
  pins = {at: item for at, item in pins.items() if list(pins.values()).count(item) == 1}
  for kind in KINDS:
    while [kinds[item - 1] for item in pins.values()].count(kind) > most:
      pins.popitem()
  scores = draw(st.lists(st.floats(-5, 5, width=32), min_size=12, max_size=12))
  return {
    'kinds': kinds,
    'stocks': stocks,
    'most': draw(st.none() | st.just(most)),
    'pins': pins,
    'minimum': draw(st.none() | st.integers(0, 3)),
    'diversity': draw(st.sampled_from([0, 0.3, 1])),
    'add': draw(st.none() | st.floats(-9, 9)),
    'scores': np.array(scores),
    'k': draw(st.integers(1, 12)),
    'count': draw(st.integers(1, 12)),
  }


def make_rules(q):
  lines = ['attributes = "goods.csv"']
  if q['minimum'] is not None:
    lines += [
      '[[filter]]',
      f'where = "stock >= {q["minimum"]}"',
      '[[filter]]',
      'where = "price < 60"',
    ]
  if q['most'] is not None:
    lines += ['[[cap]]', 'attribute = "kind"', f'most = {q["most"]}']
  if q['add'] is not None:
    lines += ['[[boost]]', 'where = "kind == \'pan\'"', f'add = {q["add"]}']
  if q['diversity']:
    lines += ['[diversity]', f'strength = {q["diversity"]}']
  for position, item in q['pins'].items():
    lines += ['[[pin]]', f'item = "{ITEMS[item - 1]}"', f'position = {position}']
  return '\n'.join(lines)


@settings(max_examples=80)
@given(question=questions())
def test_what_always_holds(question, tmp_path_factory):
  q, folder = question, tmp_path_factory.mktemp('rules')
  rows = [[x, q['kinds'][i], q['stocks'][i], 5.5 * i] for i, x in enumerate(ITEMS)]
  rules = load(write(folder, make_rules(q), rows), ITEMS)
  passed = [
    i
    for i in range(1, 13)
    if q['minimum'] is None or (q['stocks'][i - 1] >= q['minimum'] and 5.5 * (i - 1) < 60)
  ]
  allowed = rules.allowed(12)
  assert allowed is None or list(np.flatnonzero(allowed)) == passed  # Filters compose.
  ranked = sorted(passed, key=lambda i: -q['scores'][i - 1])[: q['count']]
  items = np.array(ranked + [0] * (12 - len(ranked)))[: max(q['count'], 1)]
  scores = np.array([q['scores'][i - 1] if i else -np.inf for i in items])
  vectors = np.array([[0.0] * 3] + [[float(x == name) for name in KINDS] for x in q['kinds']])
  choice = rules.choose(items, scores, q['k'], lambda i: i in passed, lambda: vectors)
  found = [pick.item for pick in choice.picks]
  assert len(found) == len(set(found)) <= q['k']
  assert set(found) <= set(ranked) | {i for i in q['pins'].values() if i in passed}
  if q['most'] is not None:  # A cap is never exceeded.
    assert max([0, *map([q['kinds'][i - 1] for i in found].count, KINDS)]) <= q['most']
  for position, item in q['pins'].items():  # A pin is there, if it may be.
    if position <= q['k'] and item in passed:
      assert found.index(item) == min(position - 1, found.index(item))
      assert f'pinned to position {position}' in choice.picks[found.index(item)].reasons
    elif item not in passed and position <= q['k']:
      assert any('but a filter leaves it out' in note for note in choice.notes)
  if len(found) < q['k']:  # A short list is explained.
    assert any('recommended:' in note for note in choice.notes)
  for pick in choice.picks:
    assert pick.at == -1 or items[pick.at] == pick.item
  if not q['pins'] and q['most'] is None and not q['diversity']:
    gain = lambda i: q['scores'][i - 1] + (q['add'] or 0) * (q['kinds'][i - 1] == 'pan')
    np.testing.assert_allclose(
      [gain(i) for i in found], sorted(map(gain, ranked), reverse=True)[: q['k']]
    )


@settings(max_examples=60)
@given(question=questions())
def test_more_candidates_change_nothing_once_a_choice_is_final(question, tmp_path_factory):
  q, folder = question, tmp_path_factory.mktemp('rules')
  q['diversity'] = 0  # Diversity is defined among the candidates.
  rows = [[x, q['kinds'][i], q['stocks'][i], 5.5 * i] for i, x in enumerate(ITEMS)]
  rules = load(write(folder, make_rules(q), rows), ITEMS)
  order = np.argsort(-q['scores'], kind='stable')
  items, scores = order + 1, q['scores'][order]
  lists = [rules.choose(items[:n], scores[:n], q['k'], lambda i: True) for n in range(1, 13)]
  best = lambda choice: sorted(
    q['scores'][p.item - 1] + (q['add'] or 0) * (q['kinds'][p.item - 1] == 'pan')
    for p in choice.picks
  )
  for early, last in itertools.product([x for x in lists if x.is_final], [lists[-1]]):
    np.testing.assert_allclose(best(early), best(last))


@pytest.fixture(scope='module')
def recommender(encoded):
  return make(encoded, 'text')[0]


def rows_of(recommender):
  return [[x, KINDS[i % 3], i % 5, i] for i, x in enumerate(recommender.item_ids)]


def test_a_recommender_follows_them(recommender, tmp_path):
  ids = recommender.item_ids
  text = f"""
    attributes = "goods.csv"
    [[filter]]
    where = "stock > 0"
    [[cap]]
    attribute = "kind"
    most = 2
    [[boost]]
    where = "kind == 'cup'"
    add = 100
    [[pin]]
    item = "{ids[56]}"
    position = 2
  """
  rules = load(write(tmp_path, text, rows_of(recommender)), ids)
  plain = recommender.top([ids[:3], ids[3:9]], k=60)
  answer = recommender.top([ids[:3], ids[3:9]], k=5, rules=rules)
  for user in range(2):
    found = answer.items[user]
    kinds = [KINDS[ids.index(x) % 3] for x in found]
    assert len(found) == 5
    assert max(map(kinds.count, KINDS)) <= 2
    assert found[1] == ids[56]
    assert all(ids.index(x) % 5 for x in found)
    assert kinds[0] == 'cup'
    cups = [x for x in plain.items[user] if ids.index(x) % 3 == 2 and ids.index(x) % 5]
    assert found[0] == next(x for x in cups if x != ids[56])
    for item, score in zip(found, answer.scores[user], strict=True):
      assert score == pytest.approx(plain.scores[user][plain.items[user].index(item)], abs=1e-5)
  rows = recommender.recommendations(answer)
  assert rows[0]['rules'] == ["score +100: kind == 'cup'"]
  assert rows[1]['rules'][0] == 'pinned to position 2'
  frame = recommender.recommend(ids[:3], k=5, rules=rules)
  assert frame['rules'][1].startswith('pinned to position 2')


def test_bought_items_are_left_out_kept_or_the_only_ones(recommender, tmp_path):
  history = recommender.item_ids[:4]
  for bought, check in (
    ('leave_out', lambda found: not set(found) & set(history)),
    ('keep', lambda found: len(found) == 8),
    ('only', lambda found: set(found) == set(history)),
  ):
    rules = load(write(tmp_path, f'bought = "{bought}"'), recommender.item_ids)
    answer = recommender.top([history, history[:1]], k=8, rules=rules)
    assert check(answer.items[0]), bought
  assert answer.items[1] == history[:1]
  assert 'only 1 are recommended: only items of the history count' in answer.choices[1].notes


def test_bought_items_are_those_of_the_whole_history_also_with_a_preference(shop, tmp_path):
  recommender, _ = make(shop, 'text')
  history = recommender.item_ids[:30]  # The model reads the latest 20 items.
  rules = load(write(tmp_path, 'bought = "only"'), recommender.item_ids)
  answer = recommender.answer([history], 40, preference=recommender.titles[50], rules=rules)
  assert sorted(answer.items[0]) == sorted(history)


def test_a_short_list_of_the_whole_catalogue_blames_no_search(recommender, tmp_path):
  text = 'attributes = "goods.csv"\n[[cap]]\nattribute = "kind"\nmost = 1'
  rules = load(write(tmp_path, text, rows_of(recommender)), recommender.item_ids)
  ids = recommender.item_ids
  for options, left in (({'keep_seen': True}, 60), ({'only': ids[:9]}, 7), ({}, 58)):
    answer = recommender.top([ids[:2]], k=10, rules=rules, **options)
    found = len(answer.items[0])
    assert answer.choices[0].notes == [
      f'only {found} are recommended: {left - found} items would exceed a cap (1 of one kind)'
    ]


def test_an_empty_list_is_explained(recommender, tmp_path):
  text = 'attributes = "goods.csv"\n[[filter]]\nwhere = "stock > 99"'
  rules = load(write(tmp_path, text, rows_of(recommender)), recommender.item_ids)
  answer = recommender.top([recommender.item_ids[:2]], rules=rules)
  assert answer.items == [[]]
  assert answer.choices[0].notes == [
    'nothing is recommended: 0 items of the catalogue meet stock > 99'
  ]


def test_caps_look_further_down_the_list_if_they_must(recommender, tmp_path, monkeypatch):
  monkeypatch.setattr(rules_module, 'CANDIDATES', 4)
  ids = recommender.item_ids
  best = recommender.top([ids[:3]], k=12).items[0]
  rows = [[x, 'same' if x in best else f'kind {i}', 1, 1] for i, x in enumerate(ids)]
  text = 'attributes = "goods.csv"\n[[cap]]\nattribute = "kind"\nmost = 1'
  rules = load(write(tmp_path, text, rows), ids)
  found = recommender.top([ids[:3]], k=4, rules=rules).items[0]
  assert len(found) == 4
  assert len(set(found) & set(best)) == 1


def test_diversity_separates_what_is_alike(recommender, tmp_path):
  ids = recommender.item_ids
  mean = {}
  for strength in (0.0, 0.9):
    rules = load(write(tmp_path, f'[diversity]\nstrength = {strength}'), ids)
    found = recommender.lookup(recommender.top([ids[:3]], k=6, rules=rules).items[0])[0]
    vectors = recommender._vectors_of_likeness()[found]
    mean[strength] = np.mean(vectors @ vectors.T)
  assert mean[0.9] < mean[0.0]


def test_new_items_do_not_pass_filters_that_do_not_know_them(tmp_path):
  text = 'attributes = "goods.csv"\n[[filter]]\nwhere = "stock >= 0"'
  assert not load(write(tmp_path, text), ITEMS).allowed(14)[13:].any()


@pytest.mark.parametrize(
  ('where', 'met'),
  [
    ("kind == 'pan'", ['a', 'b|c']),
    ("kind != 'pan'", ['c']),
    ("kind != 'cup'", ['a', 'c']),
    ('stock > 2', ['b|c', 'c']),
    ("kind == 'pan' and stock > 2", ['b|c']),
    ("item == 'b|c'", ['b|c']),
  ],
)
def test_a_condition_reads_each_of_several_values(tmp_path, where, met):
  ids = ['a', 'b|c', 'c', 'd']
  rows = [['a', 'pan', 1, ''], ['b|c', 'cup | pan', '1|3', ''], ['c', 'pot', 4, '']]
  text = f'attributes = "goods.csv"\n[[filter]]\nwhere = "{where}"'
  passed = load(write(tmp_path, text, rows), ids).allowed(4)
  assert [ids[i - 1] for i in np.flatnonzero(passed)] == met


def test_blanks_around_an_id_are_no_part_of_it_unless_the_catalogue_has_them(tmp_path):
  ids = ['a', 'b', ' c']
  rows = [[' a ', 'pan', 1, ''], ['b\t', 'pan', 1, ''], [' c', 'pan', 1, ''], [' ', 'pan', 1, '']]
  text = 'attributes = "goods.csv"\n[[filter]]\nwhere = "kind == \'pan\'"'
  assert load(write(tmp_path, text, rows), ids).allowed(3)[1:].all()


def test_a_table_with_semicolons_may_have_decimal_commas(tmp_path):
  text = 'attributes = "goods.csv"\n[[filter]]\nwhere = "price <= 20.5 and stock > 0"'
  path = write(tmp_path, text)
  table = '\ufeffsku;kind;stock;price\na;Töpfe, groß;1;20,50\nb;pot;3;20,51\nc;pot;1;7\n'
  (tmp_path / 'goods.csv').write_text(table, encoding='utf-8')
  assert load(path, ['a', 'b', 'c']).allowed(3)[1:].tolist() == [True, False, True]
  (tmp_path / 'goods.csv').write_text('sku,kind,stock,price\na,pan,1,"1,000"\n')
  with pytest.raises(InputError, match="price of 'a' is '1,000', which cannot be compared"):
    load(path, ['a'])


def test_an_item_that_is_in_the_table_twice_is_named(tmp_path):
  rows = [['a', 'pan', 1, ''], ['b', 'pot', 1, ''], ['a ', 'cup', 1, '']]
  path = write(tmp_path, 'attributes = "goods.csv"', rows)
  with pytest.raises(InputError, match=r"goods\.csv, line 4: item 'a' is in the table twice"):
    load(path, ['a', 'b'])


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('[[filtr]]\nwhere = "a > 1"', 'filtr is no rule; did you mean filter?'),
    ('zzz = 1', r'zzz is no rule\. The rules are filter, cap'),
    ('[[filter]]', 'filter needs the field where'),
    ('[[filter]]\nwhere = "stok > 0"', "no attribute 'stok'; did you mean stock?"),
    ('[[filter]]\nwhere = "stock >"', 'is no comparison'),
    ('[[filter]]\nwhere = "kind > 3"', "kind of 'i0' is 'pan', which cannot be compared with the"),
    ('[[cap]]\nattribute = "kind"\nmost = -1', 'most=-1 must be 0 or more'),
    ('[[cap]]\nattribute = "kind"\nmost = "2"', "cap: most='2' must be a whole number"),
    ('[[cap]]\nattribute = "kind"\nmost = 2.5', 'cap: most=2.5 must be a whole number'),
    ('[[boost]]\nwhere = "stock > 1"\nadd = "1"', "boost: add='1' must be a number"),
    ('[[cap]]\nattribute = "kind"\nmost = true', 'cap: most=True must be a whole number'),
    ('[[boost]]\nwhere = "stock > 1"\nadd = inf', 'add=inf must be finite'),
    ('[[boost]]\nwhere = "stock > 1"\nadd = 1\nby = 2', 'boost has no field by; it has where, add'),
    ('[diversity]\nstrength = 2', 'strength=2 must be from 0 to 1'),
    ('[[pin]]\nitem = "x"\nposition = 1', "pin: 'x' is not in the catalogue"),
    ('[[pin]]\nitem = "i1"\nposition = 0', 'from 1 on may be pinned once'),
    ('[[pin]]\nitem = "i1"\nposition = 1\n[[pin]]\nitem = "i1"\nposition = 2', 'pinned once'),
    (
      '[[cap]]\nattribute = "kind"\nmost = 1\n[[pin]]\nitem = "i0"\nposition = 1\n'
      '[[pin]]\nitem = "i3"\nposition = 2',
      "2 pins have kind 'pan', more than its cap of 1",
    ),
    ('bought = "twice"', "bought='twice' must be one of leave_out, keep, only"),
    ('filter = 3', r'filter must be written as \[\[filter\]\]'),
    (f'[[boost]]\nwhere = "stock > 1"\nadd = {"9" * 400}', 'add=9{80} must be finite'),
    (f'a = {"9" * 5000}', 'cannot be read'),
    ('a = [', 'cannot be read'),
    ('a = ' + 5000 * '[', 'cannot be read'),
    ('id_column = "nr"', 'no column nr; its columns are sku, kind, stock, price'),
  ],
)
def test_wrong_files_get_one_message(tmp_path, text, message):
  path = write(tmp_path, f'attributes = "goods.csv"\n{text}')
  with pytest.raises(InputError, match=message):
    load(path, ITEMS)


def test_a_file_of_an_editor_that_marks_utf_8_is_read(tmp_path):
  path = write(tmp_path, '')
  path.write_text('bought = "keep"', encoding='utf-8-sig')
  assert load(path, ITEMS).bought == 'keep'


def test_a_missing_table_is_named(tmp_path):
  path = tmp_path / 'rules.toml'
  for name in ('no.csv', '~nobody-of-that-name/no.csv'):
    path.write_text(f'attributes = "{name}"')
    with pytest.raises(InputError, match=rf'attributes: .*{name} must be a CSV or TSV file'):
      load(path, ITEMS)

"""What is quoted about an item is said of no other, however alike the texts are."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.encoders import text
from ur4rec_jax.inference.passages import MOST, closest, distinctive, without_numbers
from ur4rec_jax.inference.reasons import why

SENTENCES = st.sampled_from(['It is red.', 'It is 3 cm.', 'It is 4 cm.', 'New.', 'A gift.'])


def check(texts, titles):
  found = distinctive(texts, titles)
  owners = {}
  for text_of_item, passages in zip(texts, found, strict=True):
    assert len(passages) <= MOST
    for passage in passages:
      assert passage in ' '.join(text_of_item)
      owner = owners.setdefault(without_numbers(passage), text_of_item)
      assert owner == text_of_item, passage
  return found


@settings(max_examples=60)
@given(st.lists(st.lists(SENTENCES, max_size=4), max_size=8))
def test_items_with_other_texts_never_have_the_same_passage(texts):
  check(texts, [''] * len(texts))


def test_items_of_a_shop_are_told_apart(shop):
  texts = [parts[1:] for parts in text.texts(shop, 'item', 8)]
  titles = [item['title'] for item in read_items(shop)]
  found = check(texts, titles)
  assert sum(map(bool, found)) > len(found) / 2  # Otherwise nearly nothing would be quoted.
  shown = [closest(passages, 'anything') for passages in found if passages]
  distinct = {tuple(x) for x in texts}
  if len(distinct) == len(texts):
    assert len(set(shown)) == len(shown)


def test_boilerplate_is_not_quoted_and_one_sentence_may_need_another():
  common = ['Comes with 3 screws.', 'Light and sturdy.']
  texts = [
    [*common, 'Of oak.'],
    [*common, 'Of oak.', 'Painted.'],
    ['Comes with 4 screws.', 'Of oak.'],
    [],
  ]
  found = distinctive(texts, ['a', 'b', 'c', 'd'])
  assert found[1][0] == 'Painted.'
  assert found[2] == ['Comes with 4 screws. Of oak.']
  assert found[0] == []  # All that it says is a part of the second text.
  assert found[3] == []
  assert distinctive(
    [['Chair: oak', 'Of oak.'], ['Chair: elm', 'Of oak.']], ['Chair', 'Chair']
  ) == [[], []]


def test_the_passage_closest_to_the_history_is_shown():
  passages = ['It has four legs.', 'For readers of detective stories.', 'For readers of stories.']
  assert closest(passages, 'A detective story, for readers') == passages[1]
  assert closest(passages, '') == passages[0]
  assert closest([], 'legs') is None


def test_the_sentence_that_names_items():
  items = [{'item': str(i), 'title': title} for i, title in enumerate(['Kettle', '', 'Cup'])]
  assert why([]) == ''
  assert why(items[:1]) == 'Because of Kettle'
  assert why(items[:2]) == 'Because of Kettle and 1'
  assert why(items) == 'Because of Kettle and 1'

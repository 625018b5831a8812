import pytest

from ur4rec_jax.encoders import sentences


@pytest.mark.parametrize(
  'parts',
  [
    ['One film.', 'Two films!', 'Three?', 'Four'],
    [
      'Mr. and Mrs. Smith met Dr. J. R. Strange on St. Mark St. at 5 p.m. in D.C. again.',
      'Then no.',
    ],
    ['He moved to the U.S. in 1995.', 'The U.S. Army took him.'],
    ['He loved the U.S.', 'They did not.'],
    ['It cost 3.5 million, v2.0 and $1.50.', '7.5 of 10.'],
    ['Wait... what is it?', 'Nothing...', 'It ends.'],
    ['"Stop!" he said.', '"Why?"', 'She left (at last.)', 'He stayed.'],
    ['Help! (1965) is by The Beatles.', 'Yahoo! is not.'],
    ['Known as No. 5, e.g. a perfume by Acme Inc. in Paris.', 'No.', 'It is not.'],
    ['Acme Inc.', 'It was sold.'],
    ['1. First point.', '2. Second point.'],
    ['It was 1995.', '2001 came next.'],
    ['这是第一句。', '真的吗？', '他说：“走吧！”', '第3.5章……然后结束'],
    ['猫が好きだ。', '犬も！', '「そうか。」', '以上'],
    ['यह एक फ़िल्म है।', 'यह दूसरी है।'],
    ['یہ ایک فلم ہے۔', 'کیا؟', 'جی۔'],
    ['Это фильм.', 'А это нет.'],
    ['¿Quién es?', '¡Nadie!', 'Fin.'],
  ],
)
def test_sentences_of_a_text(parts):
  joined = ('' if parts[0][0] in '这猫' else ' ').join(parts)
  assert sentences.split(joined) == parts


def test_lines_are_borders_and_blanks_are_one():
  text = '  First \t line\n\n\u3000- second.  Third\r\n"\n***\n'
  assert sentences.split(text) == ['First line', '- second.', 'Third']
  assert sentences.split('') == sentences.split(' . ! ') == []


@pytest.mark.parametrize('unit', ['word ', 'x', 'Mr. ', '! ', '!', '."', '字，'])
def test_a_megabyte_of_anything_is_split_and_keeps_its_letters(unit):
  text = unit * (1_000_000 // len(unit)) + 'end'
  found = sentences.split(text)
  assert max(map(len, found)) <= sentences.MAX_SENTENCE
  letters = lambda text: ''.join(filter(str.isalnum, text))
  assert letters(''.join(found)) == letters(text)


def test_long_sentences_are_cut_at_clauses_else_between_words():
  clause = 'and so the story goes on for a while without a full stop, '
  for piece in sentences.split(clause * 20)[:-1]:
    assert piece.endswith('stop,')
  words = sentences.split('word ' * 500)
  assert {word for piece in words for word in piece.split()} == {'word'}

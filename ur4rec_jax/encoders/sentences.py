"""Text -> sentences, by punctuation; no dictionary and no model."""

import re
from collections.abc import Iterator

MAX_SENTENCE = 400  # Characters; about what encoders read at once.
# Before a name or a number: a dot after these ends no sentence.
_TITLE = re.compile(
  r'mr|mrs|ms|mx|dr|prof|st|gen|maj|col|lt|sgt|cpl|pvt|capt|cmdr|adm|det|insp|rev|fr|hon|gov|sen'
  r'|rep|mt|ft|vs|e\.g|i\.e|a\.k\.a|cf|approx|feat|dir|eds?|pp|vol|fig|al',
  re.IGNORECASE,
)
# A dot after these ends a sentence only where the next word usually begins one.
_MAY_END = re.compile(
  r'jr|sr|inc|ltd|co|corp|bros|etc|ph\.d|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|(\w\.)+\w',
  re.IGNORECASE,
)
_BEGINNING = re.compile(
  'a|an|and|as|at|but|by|for|he|her|his|how|however|i|if|in|it|its|later|my|no|not|now|on|one|our'
  '|she|so|that|the|their|then|there|these|they|this|those|though|to|we|what|when|where|while|who'
  '|with|you',
  re.IGNORECASE,
)
_BORDER = re.compile(
  r'(?<![.!?…])[.!?…]++["\'”’»)\]*_]*\s+'  # Latin, Cyrillic, Greek, ...: only before a blank
  r'|[。！？｡]+[”’」』）》〉】"\']*\s*'  # Chinese, Japanese
  r'|[।॥۔؟።။។]+["”»]*\s*'  # Indic, Arabic, Ethiopic, Burmese, Khmer
)


def split(text: str) -> list[str]:
  """Splits a text into its sentences, each on one line and of at most `MAX_SENTENCE` characters."""
  return [
    piece
    for line in text.splitlines()
    for sentence in _sentences(' '.join(line.split()))
    for piece in _pieces(sentence)
    if any(map(str.isalnum, piece))
  ]


def _sentences(line: str) -> Iterator[str]:
  start = 0
  for border in _BORDER.finditer(line):
    if _ends(line, start, border):
      yield line[start : border.end()].rstrip()
      start = border.end()
  yield line[start:]


def _ends(line: str, start: int, border: re.Match) -> bool:
  """Whether the punctuation found really ends the sentence that begins at `start`."""
  mark = border[0].rstrip()
  if mark[0] not in '.!?…' or border.end() == len(line):
    return True
  after = line[border.end() : border.end() + 40]
  following = after.lstrip('"\'“‘«([*_¿¡')
  if following[:1].islower():
    return False
  if mark[0] != '.' or mark.startswith('..'):
    return after[0] != '('  # A year behind a title: Help! (1965)
  sentence = line[max(start, border.start() - 40) : border.start()]
  word = sentence.rpartition(' ')[2].lstrip('"\'“‘«([*_')
  if sentence == word and word.isdigit():  # The number of a list: 1. First
    return False
  if word.lower() == 'no':
    return not following[:1].isdigit()
  if _TITLE.fullmatch(word) or (len(word) == 1 and word.isalpha() and word != 'I'):
    return False
  if _MAY_END.fullmatch(word):
    return bool(_BEGINNING.fullmatch(re.match(r'\w*', following)[0]))
  return True


def _pieces(sentence: str) -> Iterator[str]:
  """Cuts what is too long at a clause, else between words, else anywhere."""
  while len(sentence) > MAX_SENTENCE:
    head = sentence[: MAX_SENTENCE + 1]
    cut = max((m.end() for m in re.finditer(r'[,;:]\s|[，；：、]', head)), default=0)
    if cut < MAX_SENTENCE // 2:
      cut = head.rfind(' ') + 1
    if cut < MAX_SENTENCE // 2:
      cut = MAX_SENTENCE
    yield sentence[:cut].rstrip()
    sentence = sentence[cut:].lstrip()
  yield sentence

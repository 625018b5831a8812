"""Cleans texts and splits them into sentences by punctuation, without a dictionary or a model."""

import re
import unicodedata
from collections.abc import Iterator

MAX_SENTENCE = 400  # In characters; encoders read about this much at once.
# Placeholders that datasets and models use for missing texts, in lower case.
PLACEHOLDERS = (
  *('no description available', 'no description', 'description not available', 'not available'),
  *('no overview available', 'no text', 'none', 'null', 'nan', 'n/a', 'na', 'unknown', 'tbd'),
  *('暂无描述', '暂无简介', '暂无', '无描述', '无'),
)
# Control, direction and invisible characters, which can hide instructions in a title.
_INVISIBLE = re.compile(
  '[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e'
  '\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]'
)
# Abbreviations before a name or a number: a dot after these never ends a sentence.
_TITLE = re.compile(
  r'mr|mrs|ms|mx|dr|prof|st|gen|maj|col|lt|sgt|cpl|pvt|capt|cmdr|adm|det|insp|rev|fr|hon|gov|sen'
  r'|rep|mt|ft|vs|e\.g|i\.e|a\.k\.a|cf|approx|feat|dir|eds?|pp|vol|fig|al',
  re.IGNORECASE,
)
# A dot after these ends a sentence only if the next word usually begins one.
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
  r'(?<![.!?…])[.!?…]++["\'”’»)\]*_]*\s+'  # Latin, Cyrillic, Greek and others: only before a blank.
  r'|[。！？｡]+[”’」』）》〉】"\']*\s*'  # Chinese, Japanese
  r'|[।॥۔؟።။។]+["”»]*\s*'  # Indic, Arabic, Ethiopic, Burmese, Khmer
)


def known_text(text: str) -> str:
  """Returns the cleaned text, or '' if it only says that there is none."""
  text = clean(text)
  plain = text[:60].casefold().strip(' .。-–—!…()[]"\'')
  return text if plain not in PLACEHOLDERS and any(map(str.isalnum, text)) else ''


def clean(text: str) -> str:
  """Normalises a text: Unicode NFC, no invisible characters, single blanks, stripped lines."""
  text = text.encode(
    'utf-8', 'replace'
  ).decode()  # Removes halves of surrogate pairs, which JSON may hold.
  text = unicodedata.normalize('NFC', _INVISIBLE.sub('', text))
  lines = (' '.join(line.split()) for line in text.splitlines())
  return re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).strip()


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
  """Whether a punctuation mark ends the sentence that begins at `start`."""
  mark = border[0].rstrip()
  if mark[0] not in '.!?…' or border.end() == len(line):
    return True
  after = line[border.end() : border.end() + 40]
  following = after.lstrip('"\'“‘«([*_¿¡')
  if following[:1].islower():
    return False
  if mark[0] != '.' or mark.startswith('..'):
    return after[0] != '('  # A year after a title, as in `Help! (1965)`, does not start a sentence.
  sentence = line[max(start, border.start() - 40) : border.start()]
  word = sentence.rpartition(' ')[2].lstrip('"\'“‘«([*_')
  if sentence == word and word.isdigit():  # A number of a list, as in `1. First`.
    return False
  if word.lower() == 'no':
    return not following[:1].isdigit()
  if _TITLE.fullmatch(word) or (len(word) == 1 and word.isalpha() and word != 'I'):
    return False
  if _MAY_END.fullmatch(word):
    return bool(_BEGINNING.fullmatch(re.match(r'\w*', following)[0]))
  return True


def _pieces(sentence: str) -> Iterator[str]:
  """Cuts a long sentence after a clause, or else between words, or else anywhere."""
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

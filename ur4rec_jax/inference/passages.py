"""Finds distinctive passages: parts of an item's text that no other item's text has."""

import re
from collections.abc import Iterable, Sequence

MOST = 3  # Limit of passages per item.
_LONGEST = 3  # Limit of sentences per passage.


def distinctive(texts: Iterable[Sequence[str]], titles: Sequence[str]) -> list[list[str]]:
  """Finds passages that no item with another text has.

  A passage is a sentence, or several in a row where no single sentence is enough. Sentences that
  differ in numbers alone count as the same. Those that repeat the title are left out.

  Args:
    texts: the sentences of each item; [] for an item without a text.
    titles: the title of each item.

  Returns:
    Up to `MOST` passages of each item, the first of its text first.
  """
  whole = [tuple(text) for text in texts]
  numbers: dict[tuple[str, ...], int] = {}
  text_of = [numbers.setdefault(text, len(numbers)) for text in whole]
  sentences = [
    [x for x in text if not _repeats(x.casefold(), title.casefold())]
    for text, title in zip(whole, titles, strict=True)
  ]
  found: list[list[str]] = [[] for _ in sentences]
  for length in range(1, _LONGEST + 1):
    if all(found):
      break
    owners: dict[str, int] = {}  # The text that has a passage; -1 if several have it.
    for text, of_item in zip(text_of, sentences, strict=True):
      for passage in _runs(of_item, length):
        key = without_numbers(passage)
        if owners.setdefault(key, text) != text:
          owners[key] = -1
    for i, of_item in enumerate(sentences):
      if not found[i]:
        own = [x for x in _runs(of_item, length) if owners[without_numbers(x)] >= 0]
        found[i] = own[:MOST]
  return found


def closest(passages: Sequence[str], to: str) -> str | None:
  """Returns the passage that shares the most words with a text; None without passages.

  Args:
    passages: passages of one item.
    to: texts about other items.
  """
  words = _words(to)
  return max(passages, key=lambda passage: len(_words(passage) & words), default=None)


def without_numbers(sentence: str) -> str:
  """Returns a sentence in lower case, with all numbers the same."""
  return re.sub(r'\d+', '0', sentence.casefold())


def _repeats(sentence: str, title: str) -> bool:
  return bool(title) and (sentence == title or sentence.startswith(f'{title}:'))


def _runs(sentences: Sequence[str], length: int) -> list[str]:
  return [' '.join(sentences[i : i + length]) for i in range(len(sentences) - length + 1)]


def _words(text: str) -> set[str]:
  return {word for word in re.findall(r'\w+', text.casefold()) if len(word) > 3}

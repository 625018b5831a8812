"""Builds the prompts about items and users, and reads the answers of an LLM.

A file of templates/ holds the instructions, a line `---`, and the data between fences. Data of the
dataset is cleaned and cannot close the fence. Original ids are never part of a prompt.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import iterate_items, load_dataset, read_info, read_interactions
from ur4rec_jax.encoders.sentences import clean, known_text
from ur4rec_jax.errors import InputError

LANGUAGES = ('en', 'zh')
# Longest fields, in characters.
MAX_TITLE = 200
MAX_GENRE = 50
MAX_DESCRIPTION = 2000
MAX_HISTORY = 6000
MAX_GENRES = 8
MAX_ANSWER = 4000
HAS_DESCRIPTION = 'has a description of its own'  # A reason to skip an item.
SCHEMA = {
  'type': 'object',
  'properties': {'text': {'type': 'string'}},
  'required': ['text'],
  'additionalProperties': False,
}
_TEMPLATES = Path(__file__).parent / 'templates'
_PLACE = r'\{(\w+)\}'  # Of a field in a template.
_PLACES = {
  'item': ('title', 'year', 'genres', 'description', 'language'),
  'user': ('history', 'worst', 'best'),
}
_NO_GENRES = frozenset(('unknown', '(no genres listed)'))
_UNFENCED = str.maketrans({'<': '‹', '>': '›', '|': '/'})
# First words of refusals; the films `I Can't Sleep` and `Sorry, Wrong Number` must not match.
_REFUSAL = re.compile(
  r"((i['’]?m|i am) )?((very|so|really) )?(sorry|afraid),? (but )?(that )?(i|we|there|this|as)\b"
  r"|i (can['’]?t|cannot|can not|won['’]?t|will not|am unable to|am not able to) (\w+ ){0,2}?"
  r'(answer|assist|comply|complete|continue|create|describe|determine|fulfil|generate|help|infer'
  r'|provide|write)'
  r"|i['’]m (unable|not able) to\b|i apologi[sz]e\b|unfortunately, i\b|as an ai( language model)?,"
  r"|i (do not|don['’]?t) have (any |enough |sufficient )?(access|details|information|knowledge)"
  r'|(很|非常)?(抱歉|对不起)[，,。！]|我(无法|不能|没办法)(完成|协助|回答|帮助|描述|提供|撰写|满足|生成)'
  r'|作为(一个|一名)?(ai|人工智能|语言模型)',
  re.IGNORECASE,
)

# Tags around the reasoning of a model, which some servers leave in the answer.
_THOUGHT = r'(?:[a-z]+:)?(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)'
_LESS, _MORE = '(?:<|&lt;)', '(?:>|&gt;)'
_REASONING_END = re.compile(
  rf'{_LESS}\s*/\s*{_THOUGHT}\s*{_MORE}|{_LESS}\s*{_THOUGHT}\s*/{_MORE}'
  rf'|\[/(?:think|thinking|reasoning)\]|◁/{_THOUGHT}▷|</\|{_THOUGHT}\|>'
  rf'|<\|(?:/|end_|end_of_){_THOUGHT}\|>|<\|{_THOUGHT}_end\|>|<unused95>'
  # The channels of gpt-oss, with and without their special tokens.
  r'|<\|channel\|>\s*final\b[^<]*<\|message\|>|assistantfinal',
  re.IGNORECASE,
)
_REASONING_START = re.compile(
  rf'{_LESS}\s*{_THOUGHT}(?:\s[^<>]{{0,100}})?{_MORE}'
  rf'|\[(?:think|thinking|reasoning)\]|◁{_THOUGHT}▷'
  rf'|<\|(?:start_|begin_|start_of_|begin_of_)?{_THOUGHT}(?:_start)?\|>|<unused94>'
  r'|<\|channel\|>\s*(?:analysis|commentary)|\A(?-i:analysis(?=[A-Z]))',
  re.IGNORECASE,
)
# First words of reasoning whose tags are both missing.
_THINKING_ALOUD = re.compile(
  r'(okay|ok|alright|all right|hmm+)[,.… ]+(so )?'
  r"(the user|let me|let['’]?s|i need to|i have to|i should|we need|we have)\b"
  r'|the user (wants me|is asking|asks me|asked)\b'
  r'|(we|i) (need|have) to (describe|generate|output|produce|write)\b'
  r'|好的?[，,](用户|我需要|让我)|嗯[，,]',
  re.IGNORECASE,
)
# Special tokens and wrappers that remain around an answer.
_WRAPPER = r'(?:<\|\w{1,40}\|>|</?(?:answer|final_answer|response|s)>|\s)+'
_WRAPPERS = re.compile(rf'\A{_WRAPPER}|{_WRAPPER}\Z', re.IGNORECASE)


class Prompt(NamedTuple):
  """One request to an LLM.

  Attributes:
    kind: `item` or `user`.
    id: original id, for joining the answer; it is never sent.
    version: kind, language and hash of the template.
    system: instructions.
    text: the data, fenced.
    facts: the same data as fields, and the language.
  """

  kind: str
  id: str
  version: str
  system: str
  text: str
  facts: dict[str, Any]


class Template(NamedTuple):
  """The two parts of a file of templates/; `version` changes with the content of the file."""

  version: str
  system: str
  text: str


def read_template(kind: str, language: str) -> Template:
  """Reads a template; InputError if the language has none, or it cannot be filled in."""
  if language not in LANGUAGES:
    raise InputError(f'language {language!r}: must be one of {", ".join(LANGUAGES)}')
  path = _TEMPLATES / f'{kind}.{language}.txt'
  try:
    content = path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f'{path}: cannot be read ({error}); restore it, in UTF-8') from error
  digest = hashlib.sha256(content.encode()).hexdigest()[:8]
  system, *parts = content.split('\n---\n')
  if len(parts) != 1:
    raise InputError(
      f'{path}: has {len(parts)} lines ---, and must have one, between the instructions and the'
      ' data; correct it'
    )
  [text] = parts
  for name in re.findall(_PLACE, text):
    if name not in _PLACES[kind]:
      raise InputError(
        f'{path}: {{{name}}} is none of the fields {", ".join(_PLACES[kind])}; correct it'
      )
  return Template(f'{kind}-{language}-{digest}', system.strip(), text.strip())


def item_prompts(
  data_dir: str | Path,
  *,
  language: str = 'en',
  regenerate: bool = False,
  skipped: Counter | None = None,
) -> Iterator[Prompt]:
  """Yields a prompt that asks for a description of each item.

  Args:
    data_dir: a prepared folder.
    language: language of the answer, one of `LANGUAGES`.
    regenerate: whether to include items that have a description in the dataset.
    skipped: counter of items without a prompt, by reason; it is updated.

  Raises:
    InputError: the folder is no prepared dataset, or no item has a title, genres or description.
  """
  template = read_template('item', language)
  read_info(data_dir)  # An error if this is no prepared dataset.
  skipped = Counter() if skipped is None else skipped
  nothing_known = True
  for item in iterate_items(data_dir):
    title, year = split_year(_field(item['title'], MAX_TITLE))
    description = known_text(item['description'])
    facts = {
      'language': language,
      'title': title,
      'year': year,
      'genres': _genres(item),
      'description': _field(description, MAX_DESCRIPTION),
    }
    if not (title or facts['genres'] or description):
      skipped['nothing is known of the item'] += 1
      continue
    nothing_known = False
    if description and not regenerate:
      skipped[HAS_DESCRIPTION] += 1
      continue
    text = _fill(template.text, {**facts, 'genres': ', '.join(facts['genres'])})
    yield Prompt('item', item['original_id'], template.version, template.system, text, facts)
  if nothing_known:
    raise _nothing_known(data_dir, 'title, genres or description')


def user_prompts(
  data_dir: str | Path,
  *,
  language: str = 'en',
  split_name: str = splits.LEAVE_ONE_OUT,
  hold_back: float = 0.2,
  max_history: int = 30,
  skipped: Counter | None = None,
) -> Iterator[Prompt]:
  """Yields a prompt that asks what each user prefers, from earlier training interactions only.

  Args:
    data_dir: a prepared folder.
    language: language of the answer, one of `LANGUAGES`.
    split_name: split whose held-out interactions are not shown.
    hold_back: share of each user's training interactions, the latest ones, that is not shown.
    max_history: most items of a user in a prompt, the latest distinct ones.
    skipped: counter of users without a prompt, by reason; it is updated.

  Raises:
    InputError: the folder is no prepared dataset, has no such split, or no item has a title or
      genres.
  """
  template = read_template('user', language)
  if max_history < 1:
    raise InputError(f'max_history must be 1 or more, not {max_history}')
  skipped = Counter() if skipped is None else skipped
  dataset = load_dataset(str(data_dir), split_name)
  interactions = read_interactions(data_dir)
  items = [(_field(i['title'], MAX_TITLE), _genres(i)) for i in iterate_items(data_dir)]
  if not any(title or genres for title, genres in items):
    raise _nothing_known(data_dir, 'title or genres')
  train_lengths = dataset.split.train_lengths
  lengths = splits.written_from(train_lengths, hold_back)
  # Texts may use only the part of the history that is not held back.
  dataset = dataclasses.replace(dataset, split=dataset.split._replace(train_lengths=lengths))
  seen = dataset.train_part()
  ratings = interactions.ratings[dataset.is_train]
  # Ratings with a single value carry no information.
  scale = {'worst': '', 'best': ''}
  if dataset.info['has_ratings'] and len(ratings) and ratings.min() < ratings.max():
    scale = {'worst': f'{ratings.min():g}', 'best': f'{ratings.max():g}'}
  for user, name in enumerate(interactions.user_ids):
    start, end = seen.offsets[user], seen.offsets[user + 1]
    if start == end:
      is_held_back = train_lengths[user] > 0
      skipped['all is held back' if is_held_back else 'has no training part'] += 1
      continue
    latest: dict[int, float] = {}  # Each item once, at its latest position.
    for item_id, rating in zip(seen.item_ids[start:end], ratings[start:end], strict=True):
      latest.pop(item_id, None)
      latest[item_id] = float(rating)
    history = []
    for item_id, rating in list(latest.items())[-max_history:]:
      title, genres = items[item_id - 1]
      if title or genres:
        entry = {'title': title, 'genres': genres}
        history.append(entry | ({'rating': rating} if scale['best'] else {}))
    if not history:
      skipped['nothing is known of the items'] += 1
      continue
    lines = [_history_line(entry) for entry in history]
    sizes = list(itertools.accumulate(len(line) + 1 for line in reversed(lines)))
    kept = max(1, int(np.searchsorted(sizes, MAX_HISTORY, 'right')))
    facts: dict[str, Any] = {'language': language, 'history': history[-kept:]}
    facts |= {name: float(value) for name, value in scale.items() if value}
    text = _fill(template.text, {'history': '\n'.join(lines[-kept:]), **scale})
    yield Prompt('user', name, template.version, template.system, text, facts)


def parse_answer(raw: str, secrets: Sequence[str] = ()) -> str:
  """Extracts the text of an answer: plain, or a JSON object that may be fenced or within prose.

  Args:
    raw: what the model has written, possibly with its reasoning in front.
    secrets: keys and passwords; a text that repeats one gets `[key]` in its place.

  Raises:
    ValueError: the answer holds no usable text; the message says why.
  """
  text = known_text(_unpacked(raw))
  for secret in secrets:
    text = text.replace(secret, '[key]')
  if not text:
    raise ValueError('empty')
  if len(text) > MAX_ANSWER:
    raise ValueError(f'too long: {len(text):,} characters')
  if not any(map(str.isalpha, text)):
    raise ValueError(f'no text: {text[:40]!r}')
  if _REFUSAL.match(text):
    raise ValueError(f'a refusal: {text[:80]!r}')
  if _THINKING_ALOUD.match(text):
    raise ValueError(f'reasoning without an answer: {text[:80]!r}')
  return text


def without_reasoning(text: str) -> str:
  """Returns a stored text without the reasoning that earlier versions kept; '' if it has no other.

  Texts without reasoning stay as they are.
  """
  if not (_REASONING_END.search(text) or _REASONING_START.search(text)):
    return text
  try:
    return parse_answer(text)
  except ValueError:
    return ''


def split_year(title: str) -> tuple[str, str]:
  """Splits a title such as `Heat (1995)` into title and year; the year is '' if missing."""
  match = re.fullmatch(r'(.+?)\s*\(((?:1[89]|20)\d\d)\)', title)
  return (match[1], match[2]) if match else (title, '')


def _field(text: str, limit: int) -> str:
  """Cleans a field: one line that cannot close the fence, of at most `limit` characters."""
  text = ' '.join(clean(text[: 4 * limit]).split()).translate(_UNFENCED)
  return text if len(text) <= limit else text[: limit - 1].rstrip() + '…'


def _genres(item: dict[str, Any]) -> list[str]:
  names = (_field(name, MAX_GENRE) for name in item['genres'])
  return [name for name in names if name and name.casefold() not in _NO_GENRES][:MAX_GENRES]


def _history_line(entry: dict[str, Any]) -> str:
  parts = [entry['title'] or '-', ', '.join(entry['genres']) or '-']
  return ' | '.join(parts + ([f'{entry["rating"]:g}'] if 'rating' in entry else []))


def _fill(template: str, fields: dict[str, Any]) -> str:
  """Fills all fields at once, so that data cannot contain fields, and drops empty lines."""
  lines = []
  for line in template.split('\n'):
    places = re.findall(_PLACE, line)
    if not places or any(fields[name] for name in places):
      lines.append(re.sub(_PLACE, lambda match: str(fields[match[1]]), line))
  return '\n'.join(lines)


def _unpacked(raw: str) -> str:
  """Returns the text in an answer; ValueError if there is none."""
  ends = list(_REASONING_END.finditer(raw))
  if ends:
    if wrapped := _text_around(raw, ends[-1]):
      return _unpacked(wrapped)
    raw = raw[ends[-1].end() :]
  if len(raw) > 2 * MAX_ANSWER:
    raise ValueError(f'too long: {len(raw):,} characters')
  if _REASONING_START.search(raw):
    raise ValueError(f'reasoning that was cut off: {raw[:80]!r}')
  for brace in itertools.islice(re.finditer(r'\{', raw), 20):
    text, _ = _object_text(raw, brace.start())
    if text is not None:
      return text
  plain = re.sub(r'^```\w*\n?|```$', '', _WRAPPERS.sub('', raw)).strip()
  if re.match(r'[\[{]', plain) or re.search(r'"text"\s*:|"\s*\}$', plain):
    raise ValueError(f'no complete JSON object with a text: {raw[:80]!r}')
  quoted = re.fullmatch(r'["“]([^"“”]*)["”]', plain)
  return quoted[1] if quoted else plain


def _text_around(raw: str, tag: re.Match) -> str | None:
  """Returns the text of an answer that is one JSON object with the tag inside, else None."""
  start = raw.find('{')
  if not re.fullmatch(r'\s*(```\w*)?\s*', raw[:start] if start >= 0 else raw):
    return None
  text, end = _object_text(raw, start)
  return text if end > tag.end() else None


def _object_text(raw: str, start: int) -> tuple[str | None, int]:
  """Returns the text of the JSON object at a position, None if it has none, and where it ends."""
  try:
    # Models write line breaks into strings.
    found, end = json.JSONDecoder(strict=False).raw_decode(raw, start)
  except (ValueError, RecursionError):
    return None, start
  return (found['text'], end) if isinstance(found.get('text'), str) else (None, end)


def _nothing_known(data_dir: str | Path, what: str) -> InputError:
  return InputError(
    f'data_dir {data_dir}: no item has a {what}, so there is nothing to write about; build it from'
    ' a source that has them, e.g. --source=interactions --items=FILE, or bring texts of your own'
  )

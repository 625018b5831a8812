"""A mock LLM for demonstrations and tests: it fills the phrases of mock_phrases.json with facts.

Every statement follows from the facts of the prompt. The prompt and the seed choose the phrases, so
the same prompt and seed give the same text.
"""

import heapq
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.llm_text.prompts import Prompt, split_year

MODEL = 'mock-1'
MOST_GENRES = 3
_DISLIKED = 0.4  # Mean liking, from 0 to 1, below which a genre counts as disliked.

_PHRASES = json.loads(Path(__file__).with_name('mock_phrases.json').read_text(encoding='utf-8'))
_GENRES = _PHRASES['genres']
_CHINESE = {name: genre['name_zh'] for name, genre in _GENRES.items()} | _PHRASES['more_names_zh']
# Words that name no theme.
_DULL = re.compile('|'.join(_PHRASES['dull_words']))


def write(prompt: Prompt, seed: int) -> str:
  """Answers a prompt with a JSON object, as an LLM does."""
  rng = random.Random(f'{seed}\n{prompt.version}\n{prompt.text}')
  facts = prompt.facts
  if prompt.kind == 'user':
    sentences = _user_sentences(facts, rng)
  else:
    sentences = _item_sentences(facts, rng)
  joined = ('' if facts['language'] == 'zh' else ' ').join(sentences)
  return json.dumps({'text': joined}, ensure_ascii=False)


def _user_sentences(facts: Mapping[str, Any], rng: random.Random) -> list[str]:
  """Writes an opening about genres, one or two traits, and a dislike if the ratings show one."""
  language, history = facts['language'], facts['history']
  likings = _likings(facts)
  recency = [0.5 + 0.5 * (i + 1) / len(history) for i in range(len(history))]
  weights = [a * b for a, b in zip(likings, recency, strict=True)]
  # Items with the lowest rating count a little, because the user has chosen them.
  scores = _scores((entry['genres'] for entry in history), [weight + 0.05 for weight in weights])
  ranked = _highest(scores, MOST_GENRES)
  favourites = [name for name, score in ranked if score >= 0.4 * ranked[0][1]]
  start = 2 * len(history) // 3
  latest = _scores((entry['genres'] for entry in history[start:]), weights[start:])
  newest = _highest(latest, 1) if len(history) >= 6 else []
  disliked = _disliked(history, likings, favourites)
  by_liking = sorted(
    (i for i, entry in enumerate(history) if entry['title']), key=lambda i: (-likings[i], -i)
  )
  titles = [_title(history[i]['title'], language) for i in by_liking]
  last = next((_title(e['title'], language) for e in reversed(history) if e['title']), '')
  is_rated = 'best' in facts
  bad = is_rated and by_liking and likings[by_liking[-1]] <= 0.25
  themes = _themes(history, weights)
  genres = lambda names: _listed([_genre(name, language) for name in names], language)
  places = {
    'genres': genres(favourites),
    'top': genres(favourites[:1]),
    'more': genres(favourites[1:]),
    'recent': genres([name for name, _ in newest if name not in favourites + disliked]),
    'liked': _listed(titles[: 2 if len(titles) > 3 else 1], language),
    'last': last,
    'themes': _listed(themes, language),
    'era': _era(history, language),
    'disliked': genres(disliked),
    'bad': titles[-1] if bad else '',
  }
  shapes = _PHRASES['user'][language]
  opening = 'opening' if favourites else 'opening without genres'
  traits = {'themes': 'themes', 'recent': 'recent', 'era': 'era'}
  traits |= {'rated': 'liked'} if is_rated else {'chosen': 'last'}
  known = [kind for kind, place in traits.items() if places[place]]
  kinds = [opening, *rng.sample(known, min(len(known), rng.choice((1, 2, 2))))]
  if disliked:
    kinds.append('dislike')
  elif bad:
    kinds.append('disappointment')
  return [_say(shapes[kind], places, rng) for kind in kinds]


def _item_sentences(facts: Mapping[str, Any], rng: random.Random) -> list[str]:
  """Writes an opening about genres, what the item offers, and often who will like it."""
  language, genres = facts['language'], facts['genres']
  names = [_genre(name, language) for name in genres[:MOST_GENRES]]
  phrases = _phrases(facts['description'])
  appeals = [_GENRES[name.lower()] for name in genres if name.lower() in _GENRES]
  appeal = rng.choice(appeals)[language] if appeals else ''
  others = sorted(_GENRES.keys() - {name.lower() for name in genres}) if appeals else ['']
  places = {
    'title': _title(facts['title'], language) or {'en': 'This item', 'zh': '该条目'}[language],
    'year': facts['year'],
    'genres': _listed(names, language),
    'both': _listed(names, language) if len(names) > 1 else '',
    'top': names[0] if names else '',
    'missing': _genre(rng.choice(others), language),
    'phrases': _listed(rng.sample(phrases, min(len(phrases), 3)), language),
    'appeal': appeal,
  }
  shapes = _PHRASES['item'][language]
  kinds = ['opening' if names else 'opening without genres']
  kinds += [kind for kind, place in (('content', 'phrases'), ('appeal', 'appeal')) if places[place]]
  kinds += ['audience'] if names else []
  if len(kinds) > 3 or (len(kinds) > 2 and rng.random() < 0.3):
    del kinds[rng.randrange(2, len(kinds))]
  return [_say(shapes[kind], places, rng) for kind in kinds]


def _say(shapes: Sequence[str], places: Mapping[str, str], rng: random.Random) -> str:
  """Fills a random phrase whose names outside of brackets all have a value."""
  names = lambda shape: re.findall(r'\{(\w+)\}', shape)
  is_known = lambda shape: all(places[name] for name in names(shape))
  shape = rng.choice([s for s in shapes if is_known(re.sub(r'\[.*?\]', '', s))])
  shape = re.sub(r'\[(.*?)\]', lambda match: match[1] if is_known(match[1]) else '', shape)
  sentence = re.sub(r'\{(\w+)\}', lambda match: places[match[1]], shape)
  return sentence[:1].upper() + sentence[1:]


def _likings(facts: Mapping[str, Any]) -> list[float]:
  """Scales the ratings of a history to 0..1; without ratings every item gets 1."""
  if 'best' not in facts:
    return [1.0] * len(facts['history'])
  span = facts['best'] - facts['worst']
  return [(entry['rating'] - facts['worst']) / span for entry in facts['history']]


def _scores(names: Iterable[Iterable[str]], weights: Iterable[float]) -> dict[str, float]:
  scores: dict[str, float] = defaultdict(float)
  for group, weight in zip(names, weights, strict=True):
    for name in group:
      scores[name] += weight
  return scores


def _highest(scores: Mapping[str, float], count: int) -> list[tuple[str, float]]:
  """Returns the names with the highest scores; of equal ones the first come first."""
  return heapq.nlargest(count, scores.items(), key=lambda pair: pair[1])


def _disliked(
  history: Sequence[Mapping[str, Any]], likings: Sequence[float], favourites: Sequence[str]
) -> list[str]:
  """Returns up to two genres that occur twice or more and have low ratings, the lowest first."""
  genres = [entry['genres'] for entry in history]
  sums, counts = _scores(genres, likings), _scores(genres, [1] * len(history))
  low = {name: sums[name] / n for name, n in counts.items() if n >= 2 and name not in favourites}
  return sorted((n for n, mean in low.items() if mean < _DISLIKED), key=lambda n: low[n])[:2]


def _themes(history: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> list[str]:
  """Returns up to three words that several titles share; recent and liked items count more."""
  words = [
    set(re.findall(r'[^\W\d_]{4,}', split_year(entry['title'])[0].lower())) for entry in history
  ]
  counts = _scores(words, [1] * len(history))
  shared = [
    (word, score)
    for word, score in _scores(words, weights).items()
    if counts[word] > 1 and score > 0 and not _DULL.fullmatch(word)
  ]
  return [word for word, _ in sorted(shared, key=lambda pair: (-pair[1], pair[0]))[:3]]


def _phrases(text: str) -> list[str]:
  """Returns up to six short phrases of a description, without words that carry no meaning."""
  if re.search(
    '[\u3040-\u30ff\u3400-\u9fff]', text
  ):  # Chinese and Japanese have no blanks between words.
    clauses = re.split(r'[\W_]+', text)
    return list(dict.fromkeys(c for c in clauses if 2 <= len(c) <= 15))[:6]
  runs: list[list[str]] = [[]]
  for word in re.findall(r"[^\W\d_][\w'’-]*|[^\w\s]", text.lower()):
    if not word[0].isalpha() or _DULL.fullmatch(word):
      runs.append([])
    else:
      runs[-1].append(word)
  phrases = [' '.join(run) for run in runs if 2 <= len(run) <= 3]
  if len(phrases) < 2:
    phrases += [run[0] for run in runs if len(run) == 1 and len(run[0]) > 4]
  return list(dict.fromkeys(phrases))[:6]


def _era(history: Sequence[Mapping[str, Any]], language: str) -> str:
  """Returns the decade of at least 70 % of the titles with a year, '' if there is none."""
  years = [year for entry in history if (year := split_year(entry['title'])[1])]
  decades = Counter(year[:3] for year in years).most_common(1)
  if len(years) < 4 or decades[0][1] < 0.7 * len(years):
    return ''
  return f'the {decades[0][0]}0s' if language == 'en' else f'{decades[0][0]}0年代'


def _title(title: str, language: str) -> str:
  """Formats a title for a sentence: without the year, with the article in front."""
  title = split_year(title)[0]
  title = re.sub(r'^(.+), (The|A|An|La|Le|Les|El|Los|Il|Das|Der|Die)\b', r'\2 \1', title)
  return f'《{title}》' if language == 'zh' and title else title


def _genre(name: str, language: str) -> str:
  return name.lower() if language == 'en' else _CHINESE.get(name.lower(), name)


def _listed(words: Sequence[str], language: str) -> str:
  comma, last = (', ', ' and ') if language == 'en' else ('、', '和')
  return last.join([comma.join(words[:-1]), words[-1]]) if len(words) > 1 else ''.join(words)

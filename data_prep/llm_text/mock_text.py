"""Stands in for an LLM: writes plausible texts from the facts of a prompt, for demonstrations.

A sentence is a shape whose places are filled; a part in brackets falls out where its place has
nothing to hold. What a text says is true of the facts; the seed and the prompt choose the words.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.llm_text.prompts import Prompt, split_year

MODEL = 'mock-1'
MOST_GENRES = 3
_DISLIKED = 0.4  # Mean liking, from 0 to 1, below which a genre counts as disliked.

_USER = {
  'en': {
    'opening': (
      'This user mostly goes for {genres}.',
      'This person keeps coming back to {genres}.',
      'This user prefers {genres} to anything else.',
      'A clear taste for {genres} runs through the history.',
      'When there is a choice, this person takes {genres}.',
      'This person has a soft spot for {top}[, with {more} close behind].',
      'What this user enjoys above all is {top}[, and {more} on the side].',
      'The home ground of this user is {top}[, with excursions into {more}].',
      'The taste of this person is centred on {top}[ and reaches out to {more}].',
      'This user feels most at home with {genres}.',
      'Nothing draws this person in like {top}[, followed by {more}].',
      'The preferences are easy to name: {genres}.',
    ),
    'opening without genres': (
      'Choices such as {liked} tell most about the taste of this user.',
      'The taste of this person shows in choices such as {liked}.',
      'This user went for {liked}.',
    ),
    'themes': (
      'Themes such as {themes} come up again and again.',
      'Anything around {themes} is likely to please.',
      'Favourite subjects include {themes}.',
      'There is a weakness for {themes}.',
      'Stories of {themes} have a particular pull.',
    ),
    'recent': (
      'Lately {recent} has come to the fore[, as with {last}].',
      'The most recent choices lean towards {recent}.',
      'Of late there has been more {recent}[, {last} for instance].',
      'A newer interest is {recent}.',
    ),
    'rated': (
      'Top marks went to {liked}.',
      'Among the favourites: {liked}.',
      'The ratings speak most warmly of {liked}.',
      'Particularly well received: {liked}.',
    ),
    'chosen': (
      'Typical choices include {last}.',
      'One of the latest choices was {last}.',
      'A good example is {last}.',
    ),
    'era': (
      'Most of the choices date from {era}.',
      'The interest lies largely within {era}.',
      'Work from {era} is preferred.',
    ),
    'dislike': (
      'There is little patience for {disliked}[; {bad} was a letdown].',
      'On the other hand, {disliked} will not win this user over.',
      'Low ratings went to {disliked}[, for instance {bad}].',
      'What does not work is {disliked}.',
      'Interest fades with {disliked}[, as {bad} shows].',
      'Less welcome: {disliked}.',
    ),
    'disappointment': (
      'On the other hand, {bad} fell flat.',
      'There was little love for {bad}.',
      'A disappointment was {bad}.',
      'Not everything pleases: {bad} was rated low.',
    ),
  },
  'zh': {
    'opening': (
      '这位用户最喜欢{genres}。',
      '该用户经常选择{genres}。',
      '口味以{top}为主[，也涉及{more}]。',
      '从历史记录看，{genres}最受青睐。',
      '这位用户对{genres}情有独钟。',
      '{top}是这位用户的首选[，其次是{more}]。',
      '该用户偏爱{genres}类作品。',
      '只要有得选，这位用户就会选{top}[，偶尔也看{more}]。',
    ),
    'opening without genres': (
      '{liked}这样的选择最能体现该用户的口味。',
      '这位用户选择过{liked}。',
    ),
    'themes': (
      '反复出现的主题有{themes}。',
      '与{themes}有关的内容很可能讨其喜欢。',
      '偏好的题材包括{themes}。',
    ),
    'recent': (
      '最近更偏向{recent}[，例如{last}]。',
      '近来的选择以{recent}居多。',
      '新近的兴趣是{recent}。',
    ),
    'rated': (
      '评分最高的是{liked}。',
      '对{liked}评价很高。',
      '{liked}尤其受到好评。',
    ),
    'chosen': (
      '典型的选择有{last}。',
      '最近选择了{last}。',
    ),
    'era': (
      '大多数选择来自{era}。',
      '更喜欢{era}的作品。',
    ),
    'dislike': (
      '对{disliked}缺乏耐心[，{bad}就令人失望]。',
      '相比之下，{disliked}评分偏低[，例如{bad}]。',
      '不太喜欢{disliked}。',
      '{disliked}往往令其失望。',
    ),
    'disappointment': (
      '不过{bad}没有打动这位用户。',
      '对{bad}评价不高。',
      '{bad}令人失望。',
    ),
  },
}
_ITEM = {
  'en': {
    'opening': (
      '{title}[ ({year})] belongs under {genres}.',
      '{title}[, from {year},] is best described as {genres}.',
      '{title}[ ({year})] is at home in {genres}.',
      '{title}[, released in {year},] blends {both}.',
      '{title}[ ({year})] brings together {both}.',
      'The tone of {title}[ ({year})] is set by {genres}.',
      'With {title}[, dated {year}], expect {genres}.',
      'Between {both}, {title}[ ({year})] finds its own way.',
      'Those who look for {genres} will find it in {title}[ ({year})].',
      '{title}[ ({year})] is filed under {genres}.',
    ),
    'opening without genres': (
      'Little is known of {title}[, which dates from {year}].',
      '{title}[ ({year})] is hard to sort into a genre.',
    ),
    'content': (
      'It turns on {phrases}.',
      'It tells of {phrases}.',
      'There is much of {phrases} in it.',
      'It dwells on {phrases}.',
      'Its world is one of {phrases}.',
      'Expect {phrases}.',
      'Among its motifs: {phrases}.',
      'What stays in mind: {phrases}.',
    ),
    'appeal': (
      'It offers {appeal}.',
      'Its strength is {appeal}.',
      'It lives from {appeal}.',
      'What carries it is {appeal}.',
      'The attraction lies in {appeal}.',
      'One comes to it for {appeal}.',
    ),
    'audience': (
      'It suits those who enjoy {genres}.',
      'It is made for people with a taste for {top}.',
      'Anyone who likes {genres} will feel at home.',
      'It is a safe choice for friends of {top}[, less so for those in search of {missing}].',
      'A good fit after other {top}.',
      'Whoever avoids {top} should look elsewhere.',
    ),
  },
  'zh': {
    'opening': (
      '{title}[（{year}）]属于{genres}类。',
      '{title}[（{year}年）]是一部{genres}作品。',
      '{title}[（{year}）]融合了{both}。',
      '[{year}年的]{title}带有鲜明的{top}色彩。',
      '{title}[（{year}）]的基调是{genres}。',
      '想找{genres}类作品，可以看看{title}[（{year}）]。',
    ),
    'opening without genres': (
      '关于{title}的资料很少[，它出自{year}年]。',
      '{title}[（{year}）]难以归类。',
    ),
    'content': (
      '内容围绕{phrases}展开。',
      '其中可以看到{phrases}。',
      '主要元素有{phrases}。',
      '它讲述的是{phrases}。',
    ),
    'appeal': (
      '看点在于{appeal}。',
      '它以{appeal}见长。',
      '吸引人的是{appeal}。',
      '它带来{appeal}。',
    ),
    'audience': (
      '适合喜欢{genres}类作品的人。',
      '推荐给偏爱{top}的用户。',
      '喜欢{top}的人不会失望。',
      '不喜欢{top}的人可以略过。',
    ),
  },
}
# Genre: what it offers, its Chinese name, and what it offers in Chinese.
_GENRES = {
  'action': ('speed, stunts and physical danger', '动作', '紧张的打斗与速度感'),
  'adventure': ('journeys into the unknown', '冒险', '奇遇与未知的旅程'),
  'animation': ('drawn worlds full of imagination', '动画', '充满想象力的画面'),
  "children's": ('innocence and simple wonder', '儿童', '童真与单纯的快乐'),
  'comedy': ('jokes, mishaps and lightness', '喜剧', '幽默与轻松的情节'),
  'crime': ('schemes, guilt and investigation', '犯罪', '阴谋与侦查'),
  'documentary': ('a sober look at real life', '纪录片', '对真实生活的冷静观察'),
  'drama': ('serious conflicts between people', '剧情', '人物之间的严肃冲突'),
  'fantasy': ('magic and impossible worlds', '奇幻', '魔法与幻想世界'),
  'film-noir': ('shadows, cynicism and fate', '黑色电影', '阴影与宿命感'),
  'horror': ('fear, gore and the uncanny', '恐怖', '恐惧与诡异的气氛'),
  'musical': ('songs and dances', '歌舞', '歌曲与舞蹈'),
  'mystery': ('riddles that are solved late', '悬疑', '层层揭开的谜团'),
  'romance': ('longing and the first kiss', '爱情', '思念与爱恋'),
  'sci-fi': ('machines, space and the future', '科幻', '机器、太空与未来'),
  'thriller': ('suspense to the last minute', '惊悚', '持续到最后的悬念'),
  'war': ('soldiers, loss and survival', '战争', '士兵的牺牲与生存'),
  'western': ('dust, horses and frontier justice', '西部', '荒野与边疆正义'),
}
_CHINESE = {name: chinese for name, (_, chinese, _) in _GENRES.items()} | {
  # Of the generated catalogue.
  **{'space': '太空', 'ocean': '海洋', 'cooking': '美食', 'music': '音乐', 'mountains': '山地'},
  **{'robots': '机器人', 'medieval': '中世纪', 'racing': '赛车', 'gardens': '花园'},
  **{'circus': '马戏', 'desert': '沙漠', 'gentle': '温情', 'dark': '黑暗', 'comic': '滑稽'},
  **{'epic': '史诗', 'experimental': '实验'},
}
# Words that name no theme.
_DULL = re.compile(
  'a|about|advice|after|again|against|all|almost|along|also|among|an|and|another|any|anyone'
  '|anything|are|around|as|at|away|back|be|because|become|becomes|been|before|began|begin|begins'
  '|being|best|better|between|beyond|both|bring|brings|but|by|called|came|can|cannot|come|comes'
  '|could|das|day|days|de|der|des|did|die|do|does|down|du|during|each|el|else|end|ends|enough'
  '|even|evening|ever|every|everybody|everyone|everything|few|film|find|finds|first|follow'
  '|follows|for|from|full|get|gets|give|gives|go|goes|going|good|great|had|has|have|he|heart'
  '|help|helps|her|here|him|himself|his|how|i|if|ii|iii|in|into|is|it|its|itself|iv|just|keep'
  '|know|la|last|later|le|least|leave|les|less|let|life|like|live|lives|long|look|looks|made'
  '|make|makes|man|many|may|me|might|more|most|move|movie|much|must|my|named|need|needs|never'
  '|new|no|none|not|nothing|now|of|off|often|old|on|once|one|only|or|other|others|our|out|over'
  '|own|part|people|plan|planned|plot|put|reason|returns|run|running|said|same|see|seem|seems'
  '|series|set|she|should|show|shows|since|so|some|someone|something|soon|start|starts|stay'
  '|still|story|such|take|takes|tell|tells|than|that|the|their|them|then|there|these|they|thing'
  '|things|think|this|those|though|three|through|time|to|together|told|too|toward|towards|tries|try'
  '|turn|turns|two|un|under|until|up|upon|us|use|version|very|vi|vol|vs|want|wants|was|way|we'
  '|well|went|were|what|when|where|whether|which|while|who|whom|whose|why|will|with|within'
  '|without|woman|work|works|world|would|year|years|yet|you|young|your'
)


def write(prompt: Prompt, seed: int) -> str:
  """Answers a prompt as an LLM would, in JSON; the same prompt and seed give the same answer."""
  rng = random.Random(f'{seed}\n{prompt.version}\n{prompt.text}')
  facts = prompt.facts
  if prompt.kind == 'user':
    sentences = _user_sentences(facts, rng)
  else:
    sentences = _item_sentences(facts, rng)
  joined = ('' if facts['language'] == 'zh' else ' ').join(sentences)
  return json.dumps({'text': joined}, ensure_ascii=False)


def _user_sentences(facts: Mapping[str, Any], rng: random.Random) -> list[str]:
  """An opening on genres, one or two further traits, and a dislike if ratings show one."""
  language, history = facts['language'], facts['history']
  likings = _likings(facts)
  recency = [0.5 + 0.5 * (i + 1) / len(history) for i in range(len(history))]
  weights = [a * b for a, b in zip(likings, recency, strict=True)]
  # What is rated lowest still counts a little: it was chosen.
  scores = _scores((entry['genres'] for entry in history), [weight + 0.05 for weight in weights])
  ranked = scores.most_common(MOST_GENRES)
  favourites = [name for name, score in ranked if score >= 0.4 * ranked[0][1]]
  start = 2 * len(history) // 3
  newest = _scores((entry['genres'] for entry in history[start:]), weights[start:]).most_common(1)
  newest = newest if len(history) >= 6 else []
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
  shapes = _USER[language]
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
  """An opening on genres, what the description or the genre tells, and often who will like it."""
  language, genres = facts['language'], facts['genres']
  names = [_genre(name, language) for name in genres[:MOST_GENRES]]
  phrases = _phrases(facts['description'])
  appeals = [_GENRES[name.lower()] for name in genres if name.lower() in _GENRES]
  appeal = rng.choice(appeals)[2 * (language == 'zh')] if appeals else ''
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
  shapes = _ITEM[language]
  kinds = ['opening' if names else 'opening without genres']
  kinds += [kind for kind, place in (('content', 'phrases'), ('appeal', 'appeal')) if places[place]]
  kinds += ['audience'] if names else []
  if len(kinds) > 3 or (len(kinds) > 2 and rng.random() < 0.3):
    del kinds[rng.randrange(2, len(kinds))]
  return [_say(shapes[kind], places, rng) for kind in kinds]


def _say(shapes: Sequence[str], places: Mapping[str, str], rng: random.Random) -> str:
  """Fills one of the shapes whose places outside brackets are all known."""
  names = lambda shape: re.findall(r'\{(\w+)\}', shape)
  is_known = lambda shape: all(places[name] for name in names(shape))
  shape = rng.choice([s for s in shapes if is_known(re.sub(r'\[.*?\]', '', s))])
  shape = re.sub(r'\[(.*?)\]', lambda match: match[1] if is_known(match[1]) else '', shape)
  sentence = re.sub(r'\{(\w+)\}', lambda match: places[match[1]], shape)
  return sentence[:1].upper() + sentence[1:]


def _likings(facts: Mapping[str, Any]) -> list[float]:
  """How much each item of the history was liked, from 0 to 1; 1 where there are no ratings."""
  if 'best' not in facts:
    return [1.0] * len(facts['history'])
  span = facts['best'] - facts['worst']
  return [(entry['rating'] - facts['worst']) / span for entry in facts['history']]


def _scores(names: Iterable[Iterable[str]], weights: Iterable[float]) -> Counter:
  scores: Counter = Counter()
  for group, weight in zip(names, weights, strict=True):
    for name in group:
      scores[name] += weight
  return scores


def _disliked(
  history: Sequence[Mapping[str, Any]], likings: Sequence[float], favourites: Sequence[str]
) -> list[str]:
  """Up to two genres met at least twice and rated low, the lowest first."""
  genres = [entry['genres'] for entry in history]
  sums, counts = _scores(genres, likings), _scores(genres, [1] * len(history))
  low = {name: sums[name] / n for name, n in counts.items() if n >= 2 and name not in favourites}
  return sorted((n for n, mean in low.items() if mean < _DISLIKED), key=lambda n: low[n])[:2]


def _themes(history: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> list[str]:
  """Up to three words that several titles share, those of recent and liked items first."""
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
  """Up to six short phrases of a description: runs of words that carry meaning."""
  if re.search('[\u3040-\u30ff\u3400-\u9fff]', text):  # No blanks between words.
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
  """The decade of most items, '' where there is none."""
  years = [year for entry in history if (year := split_year(entry['title'])[1])]
  decades = Counter(year[:3] for year in years).most_common(1)
  if len(years) < 4 or decades[0][1] < 0.7 * len(years):
    return ''
  return f'the {decades[0][0]}0s' if language == 'en' else f'{decades[0][0]}0年代'


def _title(title: str, language: str) -> str:
  """A title to read: without year, the article in front."""
  title = split_year(title)[0]
  title = re.sub(r'^(.+), (The|A|An|La|Le|Les|El|Los|Il|Das|Der|Die)\b', r'\2 \1', title)
  return f'《{title}》' if language == 'zh' and title else title


def _genre(name: str, language: str) -> str:
  return name.lower() if language == 'en' else _CHINESE.get(name.lower(), name)


def _listed(words: Sequence[str], language: str) -> str:
  comma, last = (', ', ' and ') if language == 'en' else ('、', '和')
  return last.join([comma.join(words[:-1]), words[-1]]) if len(words) > 1 else ''.join(words)

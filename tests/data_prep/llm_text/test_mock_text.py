import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from data_prep import build_dataset
from data_prep.llm_text import mock_text, prompts
from ur4rec_jax.data.dataset import load_dataset, read_interactions, read_items

SCRIPT = """
import sys
from data_prep import build_dataset
from data_prep.llm_text import mock_text, prompts
for prompt in prompts.user_prompts(sys.argv[1], language='zh'):
  print(mock_text.write(prompt, 3))
"""


def user_prompt(history, language='en', **scale) -> prompts.Prompt:
  facts = {'language': language, 'history': history, **scale}
  return prompts.Prompt('user', 'u', 'v', '', repr(history), facts)


def texts(found, seed=0) -> list[str]:
  return [prompts.parse_answer(mock_text.write(prompt, seed)) for prompt in found]


def test_the_same_prompt_and_seed_give_the_same_answer_in_every_process(data_dir):
  found = list(prompts.user_prompts(data_dir, language='zh'))
  answers = [mock_text.write(prompt, 3) for prompt in found]
  others = [
    subprocess.Popen(
      [sys.executable, '-c', SCRIPT, str(data_dir)],
      env={**os.environ, 'PYTHONHASHSEED': hash_seed},
      stdout=subprocess.PIPE,
      text=True,
    )
    for hash_seed in ('1', '2')
  ]
  for other in others:
    output, _ = other.communicate()
    assert (other.returncode, output.splitlines()) == (0, answers)
  assert answers != [mock_text.write(prompt, 4) for prompt in found]
  assert all(set(json.loads(answer)) == {'text'} for answer in answers)
  # Ids play no part: what is not sent cannot be answered.
  renamed = [prompt._replace(id='another') for prompt in found]
  assert [mock_text.write(prompt, 3) for prompt in renamed] == answers


@pytest.mark.parametrize(
  ('language', 'comedy', 'horror', 'western'),
  [('en', 'comedy', 'horror', 'western'), ('zh', '喜剧', '恐怖', '西部')],
)
def test_likes_and_dislikes_follow_the_history(language, comedy, horror, western):
  entry = lambda title, genre, rating: {'title': title, 'genres': [genre], 'rating': rating}
  history = [entry(f'Old {i} (1990)', 'Western', 3) for i in range(4)]
  history += [entry(f'Moon {i} (1990)', 'Comedy', 5) for i in range(6)]
  history += [entry(f'Knife {i} (1990)', 'Horror', 1) for i in range(6)]
  for seed in range(30):
    prompt = user_prompt(history, language, worst=1.0, best=5.0)
    (text,) = texts([prompt], seed)
    opening, *_, ending = re.split(r'(?<=[.。]) ?(?=.)', text)
    assert comedy in opening
    assert horror not in opening
    assert horror in ending
    assert western not in ending
    assert 2 <= len(re.findall(r'[.。](?: |$|(?=[^\d]))', text)) <= 4
  # Nobody dislikes what was never rated low; and the recent counts more.
  unrated = [{k: e[k] for k in ('title', 'genres')} for e in history]
  for seed in range(30):
    (text,) = texts([user_prompt(unrated[:4] + unrated[4:8], language)], seed)
    assert comedy in text
    assert text.find(comedy) < text.find(western) or western not in text
    assert not re.search('Low ratings|rated low|评分|失望', text)


@pytest.mark.parametrize('language', prompts.LANGUAGES)
def test_sentences_have_dozens_of_shapes(language, data_dir):
  shapes = Counter()
  for found in (
    prompts.user_prompts(data_dir, language=language),
    prompts.item_prompts(data_dir, language=language, regenerate=True),
  ):
    for prompt in found:
      history = prompt.facts.get('history', [prompt.facts])
      words = {word for entry in history for word in (entry['title'], *entry['genres'])}
      text = texts([prompt])[0]
      assert text
      if language == 'zh':
        assert text.endswith('。')
      for word in sorted(words - {''}, key=len, reverse=True):
        text = re.sub(re.escape(word), '_', text, flags=re.IGNORECASE)
      # Lists of any length are one place.
      for sentence in re.split(r'(?<=[.。])', text):
        shapes[' '.join(sentence.split()[:3] if language == 'en' else [sentence[:5]])] += 1
  assert sum(count >= 2 for count in shapes.values()) >= 40


def test_a_retriever_can_learn_from_the_texts(tmp_path):
  # Words that texts about user and item share rank a user's held-out item above chance.
  data_dir = tmp_path / 'data'
  build_dataset.build('synthetic', data_dir, parameters={'num_users': 200, 'num_items': 200})
  dataset = load_dataset(data_dir)
  histories = read_interactions(data_dir)
  index = {item['original_id']: i for i, item in enumerate(read_items(data_dir))}
  bags = {
    index[prompt.id]: Counter(re.findall(r'\w{4,}', texts([prompt])[0].lower()))
    for prompt in prompts.item_prompts(data_dir, regenerate=True)
  }
  document_count = Counter(word for bag in bags.values() for word in bag)
  places = []
  for user, prompt in enumerate(prompts.user_prompts(data_dir)):
    assert prompt.id == histories.user_ids[user]
    words = Counter(re.findall(r'\w{4,}', texts([prompt])[0].lower()))
    score = np.zeros(dataset.num_items)
    for i, bag in bags.items():
      score[i] = sum(np.log(len(bags) / document_count[w]) for w in words.keys() & bag.keys())
    start, end = dataset.offsets[user : user + 2]
    target = dataset.item_ids[end - 1] - 1
    rest = np.setdiff1d(np.arange(dataset.num_items), dataset.item_ids[start:end] - 1)
    places.append(np.mean(score[target] > score[rest]) + np.mean(score[target] == score[rest]) / 2)
  assert np.mean(places) > 0.58  # 0.5 by chance; it is 0.64, its standard error 0.02


@pytest.mark.parametrize('language', prompts.LANGUAGES)
def test_any_facts_make_a_text(language):
  facts = {'language': language, 'title': '', 'year': '', 'genres': [], 'description': ''}
  for known in (
    {'title': '2001: A Space Odyssey'},
    {'genres': ['香水']},
    {'description': 'Une femme. 女人和她的狗，很长。'},
    {'title': '百年孤独', 'year': '1967', 'genres': ['Drama'] * 8, 'description': 'x' * 2000},
  ):
    prompt = prompts.Prompt('item', 'i', 'v', '', repr(known), facts | known)
    assert all(texts([prompt], seed) for seed in range(20))
    (text,) = texts([prompt])
    assert not re.search(r'[{}\[\]]|  |None', text)
  solo = {'title': 'Solo', 'genres': [], 'rating': 1.0}
  untitled = {'title': '', 'genres': ['Drama'], 'rating': 1.0}
  for history in ([solo], [untitled], [untitled, solo], [untitled] * 30):
    for seed in range(20):
      scale = {'worst': 1.0, 'best': 5.0} if seed % 2 else {}
      (text,) = texts([user_prompt(history, language, **scale)], seed)
      assert not re.search(r'[{}\[\]]|  |None', text)

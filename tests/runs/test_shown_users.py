"""The users on the page of a run are drawn, and shown with what the model recommends to them."""

import json
import re
import shutil

import numpy as np
import pytest

import ur4rec_jax
from tests.helpers.html_page import Page
from ur4rec_jax.data.dataset import load_dataset, read_interactions, read_items
from ur4rec_jax.runs import report


@pytest.fixture(scope='module')
def shop_run(run, small_shop, tmp_path_factory):
  """The workdir of a run on a shop with pictures; read only."""
  workdir = tmp_path_factory.mktemp('shop_run') / 'run'
  flags = (f'--config.data_dir={small_shop}', '--config.max_length=8', '--config.batch_size=8')
  done = run(workdir, *flags, '--config.seed=3')
  assert done.returncode == 0, done.stderr
  return workdir


def shown(workdir):
  return json.loads((workdir / 'shown_users.json').read_text())


def test_users_are_drawn_by_the_seed_and_their_items_are_those_of_the_data(shop_run, small_shop):
  found, dataset = shown(shop_run), load_dataset(small_shop)
  names, items = read_interactions(small_shop).user_ids, read_items(small_shop)
  with np.load(shop_run / 'test_ranks.npz') as archive:
    users, ranks = archive['users'], archive['ranks']
  places = np.sort(np.random.default_rng(3).choice(len(users), 6, replace=False))
  assert [user['user'] for user in found['users']] == [names[users[i]] for i in places]
  assert [user['rank'] for user in found['users']] == ranks[places].tolist()
  assert 'with the seed 3 of the run, from the 25 test users' in found['rule']
  for user, place in zip(found['users'], places, strict=True):
    start, end = dataset.offsets[users[place] : users[place] + 2]
    *history, target = dataset.item_ids[start:end].tolist()
    assert user['history'] == history[-5:]
    assert (user['held_out'], user['had']) == (target, len(history))
    assert (target in user['best']) == (user['rank'] <= 5)
  for number, item in found['items'].items():
    assert item['id'] == items[int(number) - 1]['original_id']
    assert item['title'] == items[int(number) - 1]['title']


def test_the_first_five_are_those_that_are_recommended_after_the_same_history(shop_run):
  found = shown(shop_run)
  recommender = ur4rec_jax.load(shop_run)
  ids = {int(number): item['id'] for number, item in found['items'].items()}
  for user in found['users']:
    assert user['had'] == len(user['history'])
    answer = recommender.top([[ids[item] for item in user['history']]], k=5)
    assert answer.items[0] == [ids[item] for item in user['best']]


def test_the_page_shows_them_with_pictures_in_one_file_below_a_megabyte(shop_run):
  html = (shop_run / 'report.html').read_text()
  page, found = Page(html), shown(shop_run)
  assert len(html) < 1_000_000
  tiles = sum(len(user['history']) + 1 + len(user['best']) for user in found['users'])
  assert len(page.all('img')) == tiles
  assert all(item['picture'] for item in found['items'].values())
  assert '6 of the users' in page.texts
  hits = sum(user['held_out'] in user['best'] for user in found['users'])
  assert page.texts.count('held out') == hits
  told = [text for text in page.texts if text.startswith('The held-out item is')]
  assert len([text for text in told if 'number' in text]) == hits
  assert len(told) == 6


def test_pictures_of_pure_noise_still_make_a_page_below_a_megabyte(shop_run, tmp_path):
  """Noise is what JPEG packs worst."""
  from PIL import Image

  from ur4rec_jax.runs import shown_users

  pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'noise.png')
  shutil.copytree(shop_run, tmp_path / 'run')
  found = shown(tmp_path / 'run')
  for item in found['items'].values():
    item['picture'] = shown_users._small(tmp_path / 'noise.png')
  (tmp_path / 'run/shown_users.json').write_text(json.dumps(found))
  report.write_report(tmp_path / 'run')
  html = (tmp_path / 'run/report.html').read_text()
  assert html.count('<img') > 50
  assert 100_000 < len(html) < 1_000_000


def test_a_picture_that_is_damaged_or_gone_leaves_the_title(small_shop, shop_run, tmp_path):
  from ur4rec_jax.runs import shown_users

  (tmp_path / 'bad.png').write_bytes(b'no picture')
  assert shown_users._small(tmp_path / 'bad.png') == ''
  assert shown_users._small(tmp_path / 'gone.png') == ''
  assert shown_users._small(None) == ''


def test_a_run_of_an_earlier_version_has_a_page_without_them(shop_run, tmp_path):
  shutil.copytree(shop_run, tmp_path / 'run')
  (tmp_path / 'run/shown_users.json').unlink()
  report.write_report(tmp_path / 'run')
  html = (tmp_path / 'run/report.html').read_text()
  assert 'of the users</h2>' not in html
  assert not re.search('<img', html)

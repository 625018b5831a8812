"""The Live tab of the page, in a real browser: act as a user, and see what changes."""

import json
import re
import shutil

import pytest
from fastapi import Request

from tests.helpers.recommenders import make
from tests.helpers.services import request, serve
from ur4rec_jax.online.feedback_store import open_store
from ur4rec_jax.service.http_app import make_page

EXPERIMENT = """
name = "page"
[[arms]]
name = "old"
share = 0.5
[[arms]]
name = "new"
share = 0.5
export = "text"
[[metrics]]
name = "clicks"
kind = "count"
event = "click"
"""


@pytest.fixture(scope='module')
def live(exports, environment, tmp_path_factory):
  """A service with events and two arms: its address and the file of its store."""
  folder = shutil.copytree(exports, tmp_path_factory.mktemp('page') / 'models')
  (folder / 'exp.toml').write_text(EXPERIMENT)
  flags = (f'--export={folder}/sasrec', f'--events={folder}/events.db', '--batch=1')
  with serve(environment, *flags, f'--experiment={folder}/exp.toml') as (_, address):
    yield address, folder / 'events.db'


def items(page, arm):
  """The items of an arm's list."""
  script = 'rows => rows.map(row => row.dataset.item)'
  return page.locator(f'ol[aria-label="List of {arm}"] > li').evaluate_all(script)


@pytest.mark.parametrize('width', [390, 1280])
def test_a_newcomer_clicks_and_both_lists_change(browser, live, shop, width):
  address, place = live
  page = browser.new_page(viewport={'width': width, 'height': 844})
  faults, console = [], []
  page.on('pageerror', lambda error: faults.append(str(error)))
  page.on('console', lambda message: console.append(message.text))
  page.goto(address)
  page.get_by_role('tab', name='Live').click()
  page.locator('#live-empty').wait_for()  # Nobody knows this user yet.
  assert not console
  assert page.locator('main').first.is_hidden()
  page.fill('#live-user', f'visitor {width}')
  page.get_by_role('button', name='Come in').click()
  page.get_by_label('Click on a title that you look for').fill('a')
  page.locator('#live-choose [role=option]').first.click()
  page.locator('ol[aria-label="List of new"] > li').first.wait_for()
  assert page.locator('#live-history li').count() == 1
  before = {arm: items(page, arm) for arm in ('old', 'new')}
  assert before['old'] != before['new']
  status = page.locator('#live-status').text_content()
  arm = status.removeprefix('arm of this user: ')
  assert arm in before
  bought = before[arm][1]
  page.locator(f'ol[aria-label="List of {arm}"] > li').nth(1).get_by_text('Buy').click()
  page.wait_for_function('() => document.querySelectorAll("#live-history li").length === 2')
  page.wait_for_function(
    'item => ![...document.querySelectorAll("#live-lists li")].some(x => x.dataset.item === item)',
    arg=bought,
  )
  after = {name: items(page, name) for name in before}
  assert all(after[name] != before[name] for name in before)
  assert page.locator('#live-history li').first.text_content().startswith('buy')
  assert page.locator('.mine').count() == 1
  # Screen readers are told what moved, too.
  labels = page.locator('#live-lists .move').evaluate_all('x => x.map(y => y.ariaLabel)')
  assert labels
  assert all(re.fullmatch(r'(up|down) \d+|not in the list before', label) for label in labels)
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  page.get_by_role('tab', name='Try').click()
  assert page.locator('#live').is_hidden()
  assert page.locator('#found-title').is_visible()
  assert not faults
  store = open_store(str(place))
  events = [event for event in store.events() if event.user == f'visitor {width}']
  assert [event.kind for event in events] == ['click', 'buy']
  assert events[1].item == bought
  (shown,) = store.shown_in([events[1].request_id])
  assert (shown.arm, shown.items[1].item) == (arm, bought)
  # The page opens with a list of the first user, who was shown nothing.
  assert page.input_value('#user') == (first := next(iter(make(shop, 'sasrec')[0].users)))
  page.close()
  assert first not in {x.user for x in store.exposures()}
  # The other arm's lists were only looked at.
  assert {x.arm for x in store.exposures() if x.user == f'visitor {width}'} == {arm}
  store.close()


# Holds the history of `slow` back until `release()` is called.
SLOW = """
const real = fetch;
fetch = async (url, options) => {
  const answer = await real(url, options);
  if (url === `history?user=${window.slow}`) await new Promise(done => window.release = done);
  return answer;
};
"""


@pytest.mark.parametrize('tab', ['Try', 'Live'])
def test_the_history_is_that_of_the_user_who_was_chosen_last(browser, live, shop, tab):
  address, _ = live
  first, second = list(make(shop, 'sasrec')[0].users)[4:6]
  names = [item['title'] for item in json.loads(request(f'{address}/history?user={second}')[2])]
  page = browser.new_page()
  page.add_init_script(SLOW)
  page.goto(address)
  page.get_by_role('tab', name=tab).click()
  field, shown = ('#live-user', '#live-history') if tab == 'Live' else ('#user', '#history')
  page.evaluate('name => { window.slow = name; }', first)
  for user in (first, second):
    page.fill(field, user)
    if tab == 'Live':
      page.get_by_role('button', name='Come in').click()
    else:
      page.locator('#user-list [role=option]', has_text=user).first.click()
  is_shown = """([place, names]) => JSON.stringify(names) === JSON.stringify(
    [...document.querySelectorAll(`${place} li > span`)].map(x => x.textContent).reverse())"""
  page.wait_for_function(is_shown, arg=[shown, names])
  page.wait_for_function('() => window.release')
  page.evaluate('release()')
  page.wait_for_timeout(300)
  assert page.evaluate(is_shown, [shown, names])
  assert page.input_value(field) == second
  page.close()


def test_a_click_by_keyboard_keeps_its_place_and_the_next_user_sees_no_former_list(
  browser, live, shop
):
  first, second = list(make(shop, 'sasrec')[0].users)[6:8]
  page = browser.new_page()
  page.goto(live[0])
  page.get_by_role('tab', name='Live').click()
  page.fill('#live-user', first)
  page.get_by_role('button', name='Come in').click()
  page.locator('#live-lists .act').nth(4).focus()
  page.keyboard.press('Enter')
  page.locator('#live-count', has_text='1 event here').wait_for()
  at = "() => [...document.querySelectorAll('#live-lists .act')].indexOf(document.activeElement)"
  page.locator('#live-lists .move').first.wait_for()  # It is the new list.
  assert page.evaluate(at) == 4
  page.route('**/recommend', lambda route: None)  # No answer yet.
  page.fill('#live-user', second)
  page.get_by_role('button', name='Come in').click()
  page.locator('#live-count', has_text='0 events here').wait_for()
  assert page.locator('#live-lists .act').count() == 0
  page.close()


def test_a_search_that_fails_is_told_in_the_open_tab(browser, live):
  page = browser.new_page()
  page.goto(live[0])
  page.get_by_role('tab', name='Live').click()
  page.route('**/items*', lambda route: route.fulfill(status=422, json={'detail': 'too long'}))
  page.get_by_label('Click on a title that you look for').fill('a')
  page.locator('#live-status', has_text='too long').wait_for()
  page.close()


def test_if_all_users_were_deleted_none_is_asked_for(browser, live):
  page, asked = browser.new_page(), []
  page.on('request', lambda found: asked.append(found.url))
  page.route('**/users*', lambda route: route.fulfill(json=[]))
  page.goto(live[0])
  page.locator('#empty').wait_for()
  assert not [url for url in asked if 'undefined' in url]
  assert page.locator('#status').text_content() == ''
  page.close()


def test_without_events_there_is_no_live_tab(live):
  address, _ = live
  assert 'tab-live' in request(address)[2]
  with pytest.raises(StopIteration) as done:  # The browser's event loop runs in this thread.
    make_page(takes_events=False)(Request({'type': 'http', 'headers': []})).send(None)
  without = done.value.value.body.decode()
  assert 'tab-live' not in without
  assert without.endswith('</html>\n')

"""The Live tab of the page, in a real browser: act as a user, and see what changes."""

import sys

import pytest
from fastapi import Request

from tests.helpers.recommenders import make
from tests.helpers.services import request, service
from ur4rec_jax.export import export
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
def live(shop, environment, tmp_path_factory):
  """A service with events and two arms: its address and the file of its store."""
  folder = tmp_path_factory.mktemp('page')
  for name in ('sasrec', 'text'):
    export(make(shop, name)[0], folder / name, with_users=True, with_pictures=False)
  (folder / 'exp.toml').write_text(EXPERIMENT)
  command = [sys.executable, '-m', 'ur4rec_jax.serve', '--port=0', '--batch=1']
  command += [f'--export={folder}/sasrec', f'--events={folder}/events.db']
  with service([*command, f'--experiment={folder}/exp.toml'], environment) as (_, address):
    yield address, folder / 'events.db'


def items(page, arm):
  """The items of an arm's list."""
  script = 'rows => rows.map(row => row.dataset.item)'
  return page.locator(f'ol[aria-label="List of {arm}"] > li').evaluate_all(script)


@pytest.mark.parametrize('width', [390, 1280])
def test_a_newcomer_clicks_and_both_lists_change(browser, live, width):
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
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  page.get_by_role('tab', name='Try').click()
  assert page.locator('#live').is_hidden()
  assert page.locator('#found-title').is_visible()
  assert not faults
  page.close()
  store = open_store(str(place))
  events = [event for event in store.events() if event.user == f'visitor {width}']
  assert [event.kind for event in events] == ['click', 'buy']
  assert events[1].item == bought
  shown = store.exposure(events[1].request_id)
  assert (shown.arm, shown.items[1].item) == (arm, bought)
  # The other arm's lists were only looked at.
  assert {x.arm for x in store.exposures() if x.user == f'visitor {width}'} == {arm}
  store.close()


def test_without_events_there_is_no_live_tab(live):
  address, _ = live
  assert 'tab-live' in request(address)[2]
  with pytest.raises(StopIteration) as done:  # The browser's event loop runs in this thread.
    make_page(is_live=False)(Request({'type': 'http', 'headers': []})).send(None)
  without = done.value.value.body.decode()
  assert 'tab-live' not in without
  assert without.endswith('</html>\n')

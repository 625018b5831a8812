"""The world of the simulated shop, and the page that is made from its results."""

import dataclasses
import json
import types
import xml.etree.ElementTree

import numpy as np
import pytest

from benchmarks.quality import live_shop

SIZE = live_shop.Size(users=40, goods=80, new_goods=4, days=6)


@pytest.fixture(scope='module')
def world():
  return live_shop.World(SIZE)


def play(world, values):
  """Lets all users come for all days; `values(shop, day, user)` ranks the goods."""
  _, taken, counts = live_shop.past(world)
  shop = live_shop.Shop(world, taken)
  shop.counts[: live_shop.PAST_DAYS] = counts
  for day in range(SIZE.days):
    shop.begin(day)
    for user in world.visitors(day).tolist():
      before = shop.taken[user].copy()
      clicked = shop.visit(day, user, shop.best(user, values(shop, day, user)))
      assert not before[clicked].any()  # Nobody clicks on the same twice.
      assert (world.arrival[clicked] <= day).all()
  return shop


def test_the_oracle_is_ahead_and_sees_new_goods(world):
  oracle = play(world, lambda shop, day, user: world.appeal(day)[user])
  stale = play(world, lambda shop, day, user: world.appeal(-1)[user])
  chance = play(world, lambda shop, day, user: world.luck(day, 9).random(len(world.names)))
  assert oracle.clicks.sum() > 1.1 * stale.clicks.sum() > 1.5 * chance.clicks.sum()
  new = world.arrival >= 0
  assert (oracle.first_shown[new] >= 0).mean() > 0.5
  assert not (stale.clicks[0] > oracle.clicks[0] + 5).any()


def test_luck_and_visitors_are_the_same_for_everybody(world):
  again = live_shop.World(SIZE)
  assert (again.luck(3, 1).random(9) == world.luck(3, 1).random(9)).all()
  assert (again.visitors(2) == world.visitors(2)).all()
  assert len(set(world.visitors(2).tolist())) == SIZE.users // 2
  np.testing.assert_array_equal(again.appeal(4), world.appeal(4))
  assert not world.appeal(0)[:, world.arrival > 0].any()


def test_the_page_is_made_from_the_results(world):
  shops = {name: play(world, lambda shop, day, user: world.appeal(day)[user])
           for name in live_shop.POLICIES}  # fmt: skip
  shops['static'] = play(world, lambda shop, day, user: world.appeal(-1)[user])
  services = {
    name: types.SimpleNamespace(verdicts=['round 1: promoted: version 000002'], seconds=[2.0])
    for name in ('updated', 'exploring')
  }
  found = live_shop.summary(SIZE, shops, services)
  found['lost_by_standing_still'] = lost = {
    str(drift): live_shop.standing_still(dataclasses.replace(SIZE, drift=drift))
    for drift in (0.0, 0.3)
  }
  assert lost['0.0']['tastes'] < lost['0.3']['tastes']
  assert 0 < lost['0.0']['new_goods'] < 1
  gain = found['updated_ahead_of_static']
  assert gain['gain'] > 0
  assert gain['low'] <= gain['gain'] <= gain['high']
  assert found['found_within_a_day']['static'] == 0 < found['found_within_a_day']['updated']
  assert set(live_shop.broken_promises(found)) <= {'new goods found within a day'}
  again = json.loads(json.dumps(found))
  text = live_shop.table(again)
  assert all(f'| {name} |' in text for name in live_shop.POLICIES)
  assert '| 30% |' in text
  assert 'Of 2 updates 2 passed the gate; one took 2 s' in text
  root = xml.etree.ElementTree.fromstring(live_shop.picture(again))
  assert len(root.findall('{*}path')) == len(live_shop.POLICIES)


def test_the_page_has_the_stored_results():
  if not live_shop.RESULTS.exists():
    pytest.skip('no stored results of the simulated shop')
  found = json.loads(live_shop.RESULTS.read_text())
  assert live_shop.table(found) in live_shop.PAGE.read_text()
  assert live_shop.PICTURE.read_text() == live_shop.picture(found)

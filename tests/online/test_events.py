"""Events are checked field by field, and what is wrong is named."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ur4rec_jax.errors import InputError
from ur4rec_jax.online.events import (
  FUTURE_SECONDS,
  KINDS,
  Event,
  Exposure,
  Shown,
  check_event,
  pack,
  unpack,
)

NOW = 1_700_000_000.0
GOOD = {'user': 'ann', 'item': 'lamp', 'kind': 'click', 'id': '1'}


def test_an_event_without_time_happens_now_and_whole_numbers_are_ids():
  assert check_event(GOOD, NOW) == Event('ann', '1', 'lamp', 'click', NOW)
  event = check_event({'user': 7, 'item': 3.0, 'kind': 'rating', 'id': 9, 'value': 4.5}, NOW)
  assert event == Event('7', '9', '3', 'rating', NOW, 4.5)
  assert check_event(GOOD | {'request_id': 'r'}, NOW).request_id == 'r'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'user': None}, 'user: must be text or a whole number, not missing'),
    ({'user': ''}, "user: must be text or a whole number, not ''"),
    ({'user': 'x' * 10_240}, 'user: has 10,240 characters; 256 are allowed'),
    ({'user': 'a\0b'}, 'must be text on one line'),
    ({'item': 'lamp\n'}, "item: 'lamp\\n' must be text on one line"),
    ({'item': ' '}, "item: ' ' must be text on one line"),
    ({'item': '\ud800'}, 'must be text on one line'),
    ({'item': True}, 'item: must be text or a whole number, not True'),
    ({'item': 1.5}, 'item: must be text or a whole number, not 1.5'),
    ({'item': 10**400}, 'item: must be'),
    ({'item': ['lamp']}, "item: must be text or a whole number, not ['lamp']"),
    ({'id': None}, 'id: must be text'),
    ({'kind': 'purchase'}, "kind: must be one of view, click, cart, buy, rating, skip, not 'purch"),
    ({'kind': ['click']}, 'kind: must be one of'),
    ({'time': NOW + FUTURE_SECONDS + 1}, 'lies 301 s in the future; correct the clock'),
    ({'time': NOW * 1000}, 'must be in seconds since 1970, not in milliseconds'),
    ({'time': -1}, 'must be seconds since 1970, 0 or more'),
    ({'time': math.nan}, 'time: must be a number, not nan'),
    ({'time': '2024-01-01'}, "time: must be a number, not '2024-01-01'"),
    ({'time': NOW - 1001}, 'is older than the days for which events are kept'),
    ({'value': math.inf}, 'value: must be a number'),
    ({'value': '5'}, 'value: must be a number'),
    ({'request_id': {}}, 'request_id: must be text, not {}'),
    ({'request_id': 5}, 'request_id: must be text, not 5'),
    ({'stars': 5}, "'stars': there is no such field"),
    ({'\ud800': 3}, "'\\ud800': there is no such field"),
  ],
)
def test_the_wrong_field_is_named(change, message):
  with pytest.raises(InputError) as raised:
    check_event(GOOD | change, NOW, keep_seconds=1000)
  assert message in str(raised.value)
  assert len(str(raised.value).encode()) < 300


@pytest.mark.parametrize('fields', [None, [], 'x', 3])
def test_what_is_no_object_is_refused(fields):
  with pytest.raises(InputError, match='must be an object'):
    check_event(fields, NOW)


ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=5,
)


@settings(max_examples=150)
@given(
  st.dictionaries(st.sampled_from([*Event._fields, 'other']), ANYTHING)
  | st.fixed_dictionaries(
    {'user': st.text(), 'item': st.text(), 'id': st.text(), 'kind': st.sampled_from(KINDS)},
    optional={'time': st.floats(), 'value': st.floats() | st.none(), 'request_id': st.text()},
  )
)
def test_whatever_comes_is_an_event_or_an_error_of_input(fields):
  try:
    event = check_event(fields, NOW)
  except InputError as error:
    str(error).encode()
    return
  assert event.kind in KINDS
  assert 0 <= event.time <= NOW + FUTURE_SECONDS
  for name in (event.user, event.item, event.id):
    assert 0 < len(name.encode()) <= 1024


def test_shown_items_are_read_as_they_were_written():
  exposure = Exposure('r', '', 1.5, '', '', (Shown('a"\n\x1b', 0.1), Shown('ü', -3.0, 0.25)))
  assert unpack(pack(exposure)) == exposure
  json.loads(pack(exposure)[-1])

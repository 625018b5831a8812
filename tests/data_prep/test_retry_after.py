"""A server's Retry-After header never makes a program wait for too long, or crash."""

import datetime
import email.utils
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.retry_after import seconds_to_wait

MOST = 60.0


def in_seconds(seconds: float) -> str:
  when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
  return email.utils.format_datetime(when, usegmt=True)


@given(st.integers(0, 10**400))
def test_whole_seconds_are_waited_up_to_the_limit(seconds):
  assert seconds_to_wait(str(seconds), MOST) == min(seconds, MOST)


@given(st.floats(0, 1e6))
def test_fractions_are_waited_up_to_the_limit(seconds):
  found = seconds_to_wait(f' {seconds:.6f} ', MOST)
  assert found == pytest.approx(min(seconds, MOST), abs=1e-6)


@given(st.integers(-(10**9), 10**9))
def test_dates_are_waited_for_up_to_the_limit(seconds):
  found = seconds_to_wait(in_seconds(seconds), MOST)
  # A date has whole seconds, and the clock goes on.
  assert min(max(seconds - 5, 0), MOST) <= found <= min(max(seconds, 0), MOST)


@given(st.text() | st.from_regex(r'\w{3}, ?-?\d+ \w{3} -?\d+ \d+:\d+(:\d+)? [+-]?\w+'))
@example('Tue, 01 Jan 9999 00:00:00 +9999')
@example('Mon, 01 Jan 0001 00:00:00 +1200')
@example('1' * 5000)
def test_any_header_gives_a_sane_wait_or_none(value):
  found = seconds_to_wait(value, MOST)
  assert found is None or (math.isfinite(found) and 0 <= found <= MOST)


@pytest.mark.parametrize(
  'value', ['', 'soon', '-5', '1e9', 'nan', 'inf', '-inf', '٧', '0x10', '1_0', 'Tue, 99 Foo']
)
def test_nonsense_is_no_wait(value):
  assert seconds_to_wait(value, MOST) is None


def test_long_waits_are_cut_and_past_dates_are_no_wait():
  assert seconds_to_wait('7', MOST) == 7
  assert seconds_to_wait('86400', MOST) == MOST
  assert 20 < seconds_to_wait(in_seconds(30), MOST) <= 30
  assert seconds_to_wait(in_seconds(-30), MOST) == 0
  assert seconds_to_wait(in_seconds(10_000), MOST) == MOST

"""The Retry-After header of HTTP: how long a busy server asks its client to wait."""

import datetime
import email.utils
import re


def seconds_to_wait(value: str, most: float) -> float | None:
  """Reads a Retry-After header.

  Args:
    value: number of seconds or an HTTP date, '' without the header.
    most: longest wait in seconds; longer ones are cut to it.

  Returns:
    Seconds from 0 to `most`; None if the header is missing or unreadable.
  """
  value = value.strip()
  # The standard allows whole seconds only, but servers send fractions too.
  if re.fullmatch(r'\d+(\.\d+)?', value, re.ASCII):
    return min(float(value), most)
  try:
    when = email.utils.parsedate_to_datetime(value)
    if when.tzinfo is None:
      when = when.replace(tzinfo=datetime.UTC)
    wait = (when - datetime.datetime.now(datetime.UTC)).total_seconds()
  except (ValueError, TypeError, IndexError, OverflowError):
    return None
  return min(max(wait, 0.0), most)

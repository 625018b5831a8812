"""The route of events, called without a network."""

import asyncio
import json
import math
import types

import fastapi
import pytest
from prometheus_client import REGISTRY

from ur4rec_jax.service.http_events import EventRoute

GOOD = {'user': 'ann', 'item': 'lamp', 'kind': 'click', 'id': '1'}


def refused():
  return REGISTRY.get_sample_value('ur4rec_events_total', {'outcome': 'refused'}) or 0


@pytest.mark.parametrize(
  ('content', 'status', 'count'),
  [
    (GOOD | {'kind': 'x'}, 422, 1),
    ([GOOD, GOOD, GOOD | {'kind': 'x'}], 422, 3),
    ([GOOD] * 1001, 422, 1001),
    ([GOOD] * 5, 429, 5),
  ],
)
def test_each_event_of_a_refused_request_is_counted(content, status, count):
  async def body():
    return json.dumps(content).encode()

  request = types.SimpleNamespace(
    headers={'content-type': 'application/json'}, body=body, client=None, scope={}
  )
  route = EventRoute(types.SimpleNamespace(keep_seconds=math.inf), 0.001)
  route._limit.seconds_to_wait('', 1000)  # What this client may send is used up.
  before = refused()
  try:
    found = asyncio.run(route(request, bool)).status_code
  except fastapi.HTTPException as error:
    found = error.status_code
  assert (found, refused() - before) == (status, count)

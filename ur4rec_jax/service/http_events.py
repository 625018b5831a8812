"""The route that takes events: what it accepts, and how many a client may send."""

import time
from typing import Any

import fastapi
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import Counter

from ur4rec_jax.errors import InputError, StorageError
from ur4rec_jax.online.events import (
  KINDS,
  MOST_CHARACTERS,
  MOST_EVENTS,
  Event,
  NotJsonError,
  check_event,
  load_json,
  rows_of,
)
from ur4rec_jax.service.admission import RETRY_SECONDS, TURN, RateLimit, client_name
from ur4rec_jax.service.feedback import EVENTS, Feedback
from ur4rec_jax.service.http_schema import NOT_JSON, is_json, problem

UNKNOWN_ITEMS = Counter('ur4rec_events_unknown_items', 'Events with items that the model lacks.')
_ONE_LINE = r'^[^\x00-\x1f\x7f]*[^\x00-\x1f\x7f\s][^\x00-\x1f\x7f]*$'
_ID = {
  'anyOf': [
    {'type': 'string', 'minLength': 1, 'maxLength': MOST_CHARACTERS, 'pattern': _ONE_LINE},
    {'type': 'integer', 'minimum': -(10**15), 'maximum': 10**15},
  ]
}
_EVENT = {
  'type': 'object',
  'title': 'Event',
  'required': ['user', 'item', 'kind', 'id'],
  'additionalProperties': False,
  'properties': {
    'user': _ID,
    'item': _ID,
    'id': _ID | {'description': 'two events of a user with the same id are the same event'},
    'kind': {'enum': list(KINDS)},
    'time': {
      'type': 'number',
      'minimum': 0,
      'description': 'seconds since 1970; without it the time at which the event arrives',
    },
    'value': {'type': ['number', 'null'], 'exclusiveMinimum': -1e15, 'exclusiveMaximum': 1e15},
    'request_id': {
      'type': 'string',
      'maxLength': MOST_CHARACTERS,
      'pattern': f'^$|{_ONE_LINE}',
      'description': 'the id of the answer in which the user saw the item',
    },
  },
}
# The description of the route in openapi.json; `check_event` checks the events.
OPENAPI = {
  'requestBody': {
    'required': True,
    'content': {
      'application/json': {
        'schema': {
          'anyOf': [
            _EVENT,
            {'type': 'array', 'items': _EVENT, 'minItems': 1, 'maxItems': MOST_EVENTS},
          ]
        }
      }
    },
  }
}


class EventRoute:
  """The handler of `POST /events`."""

  def __init__(self, feedback: Feedback, events_per_second: float):
    """Sets the limit.

    Args:
      feedback: stores the events.
      events_per_second: the most events of one client, on average.
    """
    self._feedback, self._limit = feedback, RateLimit(events_per_second, MOST_EVENTS)

  async def __call__(self, request: fastapi.Request, has_item: Any) -> JSONResponse:
    """Stores one event or a list of them, all or none.

    Args:
      request: the request.
      has_item: tells whether the served model knows an item.
    """
    # Another site's page may send other types of content without being asked (CORS).
    if not is_json(request):
      raise HTTPException(415, NOT_JSON)
    try:
      events = self._parse(await request.body())
    except InputError as error:
      raise HTTPException(422, str(error)) from error
    client = client_name(request.client.host if request.client else '')
    if wait := self._limit.seconds_to_wait(client, len(events)):
      EVENTS.labels('refused').inc(len(events))
      rate = f'{self._limit.per_second:g} events a second'
      answer = problem(429, f'more than {rate}; try again in {wait} s')
      answer.headers['Retry-After'] = str(wait)
      return answer
    if TURN in request.scope:
      request.scope[TURN].end()
    try:
      counts = await self._feedback.add(events)
    except StorageError as error:
      answer = problem(503, f'not acknowledged, send the same again later: {error}')
      answer.headers['Retry-After'] = str(RETRY_SECONDS)
      return answer
    if unknown := sum(not has_item(event.item) for event in events):
      UNKNOWN_ITEMS.inc(unknown)
    return JSONResponse(counts)

  def _parse(self, body: bytes) -> list[Event]:
    try:
      content = load_json(body)
    except NotJsonError as error:
      raise HTTPException(400, f'the body is no JSON: {error}') from error
    try:
      return self._checked(content)
    except InputError:
      EVENTS.labels('refused').inc(len(content) if isinstance(content, list) else 1)
      raise

  def _checked(self, content: Any) -> list[Event]:
    now, events = time.time(), []
    for number, row in enumerate(rows_of(content, 'a request')):
      try:
        events.append(check_event(row, now, self._feedback.keep_seconds))
      except InputError as error:
        where = f'event {number}: ' if isinstance(content, list) else ''
        raise InputError(f'{where}{error}; nothing of this request was stored') from error
    return events

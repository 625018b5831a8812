"""The routes of the HTTP service: recommendations as JSON, and a page to try them."""

import dataclasses
import gzip
import math
import pathlib
import time
import urllib.parse
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import fastapi
import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import generate_latest

from ur4rec_jax.errors import InputError, StorageError
from ur4rec_jax.inference.query import Known, Query, UserTokens
from ur4rec_jax.inference.recommender import Recommender
from ur4rec_jax.inference.rules import ONLY, Rules
from ur4rec_jax.inference.similar import BOTH, KINDS
from ur4rec_jax.inference.thumbnails import MEDIA_TYPE, Thumbnails
from ur4rec_jax.online.events import MOST_CHARACTERS
from ur4rec_jax.service.admission import RETRY_SECONDS, TURN, RateLimit, client_name
from ur4rec_jax.service.arms import Arms
from ur4rec_jax.service.batcher import MOST_IDS, Batcher, Job
from ur4rec_jax.service.feedback import Coverage, Feedback, join_history, new_request_id
from ur4rec_jax.service.http_events import OPENAPI, EventRoute
from ur4rec_jax.service.http_reasons import add_reasons
from ur4rec_jax.service.http_schema import (
  NOT_JSON,
  Health,
  Item,
  Problem,
  Recommendations,
  Similar,
  Stored,
  UserId,
  is_json,
  make_question,
  problem,
)

MOST_SIMILAR = 20  # Similar items in an answer.
MOST_FOUND = 20  # Results of a search.
MOST_EXPLAINED = 20  # Recommended items that are explained.
METRICS_SECONDS = 1  # Metrics are cached for this long, because anybody may ask for them.
_PAGE = pathlib.Path(__file__).with_name('serve.html').read_bytes()
_LIVE_TAB = pathlib.Path(__file__).with_name('live_tab.html').read_bytes()
_PAGE_HEADERS = {
  'Vary': 'Accept-Encoding',
  'Content-Security-Policy': "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline';"
  " style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
  " frame-ancestors 'none'",
}
Search = Annotated[str, fastapi.Query(max_length=MOST_CHARACTERS)]
UserName = Annotated[UserId, fastapi.Query(min_length=1)]
Count = Annotated[int, fastapi.Query(ge=1, le=MOST_SIMILAR)]
ItemName = Annotated[str, fastapi.Path(max_length=MOST_CHARACTERS)]


class EventIntake(NamedTuple):
  """What takes the events of a running service.

  Attributes:
    feedback: stores the events.
    route: handles `POST /events`.
    shown: limits the items in logged answers to one client, because logs fill the disk.
  """

  feedback: Feedback
  route: EventRoute
  shown: RateLimit


class Model(NamedTuple):
  """A model to serve.

  Attributes:
    recommender: the recommender.
    batcher: a batcher of the same recommender. The caller runs it.
    thumbnails: the pictures of the items, if there are some.
    rules: the rules of the shop, which a request can leave out.
    digest: the start of the hash of the exported folder, which exposures name.
    weights: factors of the scores of some branches, by name; 1 for the others.
    passages: passages about each item that no item with another text has, if the model reads texts.
    held: keeps the folder of the model from being removed, see `registry.hold`.
  """

  recommender: Recommender
  batcher: Batcher
  thumbnails: Thumbnails | None = None
  rules: Rules | None = None
  digest: str = ''
  weights: Mapping[str, float] = {}
  passages: Sequence[Sequence[str]] = ()
  held: BinaryIO | None = None


def make_app(service: 'Service') -> FastAPI:
  """Builds the ASGI application of a service.

  Args:
    service: handles the requests. FastAPI's caches keep the handlers of hundreds of applications,
      so the model is freed by `service.close`, not with the application.
  """
  recommender, batcher = service.model.recommender, service.model.batcher
  app = FastAPI(title='ur4rec_jax', docs_url=None, redoc_url=None)
  app.add_exception_handler(RequestValidationError, _on_bad_request)
  app.add_exception_handler(405, _on_wrong_method)
  Question = make_question(recommender.branches, batcher.most_k, recommender.keeps_seen)

  K = Annotated[int, fastapi.Query(ge=1, le=batcher.most_k)]
  usual_k = min(10, batcher.most_k)

  # The fields of a question depend on the model, so its type is only known here.
  @app.post('/recommend', responses=_problems(400, 404, 408, 413, 421, 422, 429, 431, 503))
  async def recommend(question: Question, request: fastapi.Request) -> Recommendations:
    """Returns the best items."""
    return await service.recommend(question, request)

  @app.get('/recommend', responses=_problems(404, 421, 422, 429, 431, 503))
  async def recommend_to_user(
    user: UserName,
    request: fastapi.Request,
    k: K = usual_k,
    explain: bool = False,
    log: bool = True,
  ) -> Recommendations:
    """Returns the best items for a user."""
    return await service.recommend(Question(user=user, k=k, explain=explain, log=log), request)

  if service.takes_events:
    refusals = _problems(400, 408, 413, 415, 421, 422, 429, 431, 503)
    app.post('/events', responses=refusals, openapi_extra=OPENAPI)(service.events)

  # Items without a picture have no such field.
  items = {'responses': _problems(422, 503), 'response_model_exclude_unset': True}
  app.get('/items', **items)(service.items)
  similar = {'responses': _problems(404, 422, 503), 'response_model_exclude_unset': True}
  app.get('/similar', **similar)(service.similar)
  app.get('/users', responses=_problems(422, 503))(service.users)
  items = {'responses': _problems(404, 422, 503), 'response_model_exclude_unset': True}
  app.get('/history', **items)(service.history)
  found = {200: {'content': {MEDIA_TYPE: {}}}, 304: {'description': 'The picture is the same.'}}
  picture = {'responses': found | _problems(404, 422, 503), 'response_class': fastapi.Response}
  app.get('/pictures/{item:path}', **picture)(service.picture)
  app.get('/health')(service.health)
  app.get('/metrics', response_class=PlainTextResponse)(make_metrics())
  app.get('/', include_in_schema=False)(make_page(service.takes_events))
  return app


class Service:
  """The handlers of all routes that need the model.

  Attributes:
    model: the served model.
    takes_events: whether it takes events.
  """

  def __init__(
    self,
    model: Model,
    intake: EventIntake | None = None,
    arms: Arms | None = None,
    models: Sequence[str] = (),
  ):
    """Prepares the searches.

    Args:
      model: the model to serve.
      intake: takes the events, if the service has some.
      arms: the experiment, if there is one.
      models: names of all models of the service, the served one first.

    Raises:
      InputError: the weights or rules of an arm do not fit its model.
    """
    self.model, self.takes_events = model, intake is not None
    self._models = list(models)
    self._recommender = recommender = model.recommender
    self._intake, self._arms = intake, arms
    self._feedback = None if intake is None else intake.feedback
    self._model_of = {} if arms is None else arms.models(model)
    for one in (model, *self._model_of.values()):
      if one.rules is not None and one.rules.diversity:
        one.recommender.item_vectors()  # So that the first request need not wait for them.
    self._coverage = Coverage(recommender)
    names = zip(recommender.titles, recommender.item_ids, strict=True)
    self._find_items = make_search([f'{title} {item}' for title, item in names])
    users = recommender.known_users
    self._user_names = [] if users is None else list(users.index)
    self._find_users = make_search(self._user_names)

  def close(self) -> None:
    """Lets go of the model, after the last request."""
    self.model.batcher.close()
    vars(self).clear()

  async def recommend(self, question: Any, request: fastapi.Request) -> JSONResponse:
    """Answers a question of `http_schema.make_question`.

    Args:
      question: the question.
      request: the request that has the question as its body.
    """
    arm, model = self._arm(question, request)
    recommender, given = model.recommender, question.weights
    query = Query(
      [question.history],
      min(question.k, model.batcher.most_k),
      question.only,
      question.without,
      # The model of an arm may have another default than the one of the schema.
      question.keep_seen if 'keep_seen' in question.model_fields_set else None,
      [getattr(given, x, 1.0) * model.weights.get(x, 1.0) for x in recommender.branches],
      model.batcher.no_texts,
      model.rules if question.rules else None,
    )
    try:
      if question.user is None:
        checked = recommender.check(query)
      else:
        known, texts = await self._user(question.user, model)
        checked = recommender.check_known(dataclasses.replace(query, preferences=texts), [known])
    except InputError as error:  # The schema checked the rest, so ids must be unknown.
      raise HTTPException(404, str(error)) from error
    if problem_of_user := checked.problems[0]:
      raise HTTPException(404, problem_of_user)
    only = None if question.only is None else tuple(question.only)
    client = client_name(request.client.host) if request.client else None
    if self._is_logged(question):
      self._count_shown(client, query.k)
    if TURN in request.scope:
      request.scope[TURN].end()
    if query.rules is not None and query.rules.bought == ONLY:
      checked = recommender.only_seen(checked)
      only = only, id(query.rules), tuple(checked.histories[0].tolist())
    elif query.rules is not None:
      only = only, id(query.rules)  # Arms may have other filters.
    job = Job(checked, only, client, query.rules)
    answer = await model.batcher.answer(job)
    count = len(checked.histories[0])
    rows = recommender.recommendations(answer)
    notes = list(answer.choices[0].notes) if answer.choices else []
    if question.explain:
      explained, told = rows[:MOST_EXPLAINED], await self._told(question.user, recommender)
      notes += await add_reasons(model, job, explained, told)
      for row in explained:
        row['because'] = [item | self._picture_of(item['item']) for item in row['because']]
    return JSONResponse(
      {
        'request_id': self._shown(question, arm, model, rows),
        'user': question.user,
        **({'arm': arm} if self._arms is not None else {}),
        'history': {'items': count, 'read': min(count, recommender.max_length)},
        'unknown': answer.unknown[0],
        'recommendations': [row | self._picture_of(row['item']) for row in rows],
        **({'notes': notes} if answer.choices or notes else {}),
      }
    )

  def _arm(self, question: Any, request: fastapi.Request) -> tuple[str | None, Model]:
    """Returns the arm that answers, None if there is none, and the model that answers.

    A request that names a model gets that model, whichever arm its user has.

    Raises:
      HTTPException: the question asks for an arm that does not exist.
    """
    if question.arm is None and (self._arms is None or 'model' in request.query_params):
      return None, self.model
    arm = question.arm
    if arm is None:
      arm = self._arms.choose(question.user)
    elif arm not in self._model_of:
      known = f'its arms are {", ".join(self._model_of)}' if self._model_of else 'it has no arms'
      raise HTTPException(404, f'arm: the service has no arm {arm!r}; {known}')
    return arm, self._model_of.get(arm, self.model)

  async def _told(self, user: str | None, recommender: Recommender) -> Container[int] | None:
    """Returns the numbers of the items of a history that an answer may name; None for all.

    Stored events are told to nobody, so only the exported items of a user are named, and none of
    a deleted user.
    """
    if user is None or self._feedback is None:
      return None
    users = recommender.known_users
    if users is None or user not in users.index or await self._is_deleted(user):
      return set()
    return set(recommender.known_user(user)[0].seen.tolist())

  async def _user(self, name: str, model: Model) -> tuple[Known, UserTokens]:
    """Returns a user's history up to the latest event, and the user's own texts."""
    recommender = model.recommender
    if self._feedback is None:
      return recommender.known_user(name)
    try:
      stored = await self._feedback.history(name)
    except StorageError as error:
      headers = {'Retry-After': str(RETRY_SECONDS)}
      raise HTTPException(503, f'{error}; give a history instead', headers) from error
    users = recommender.known_users
    known, texts = None, model.batcher.no_texts
    # What was exported about a deleted user stays in the file until the next export.
    if users is not None and name in users.index and not stored.is_deleted:
      known, texts = recommender.known_user(name)
    until = recommender.about.get('data_until', -math.inf)
    joined = join_history(recommender, known, stored, until)
    if known is None and not joined.items.size:
      about = 'no event with an item of the catalogue' if stored.items else 'no event yet'
      raise InputError(f'user {name!r}: is unknown, and has {about}; give a history')
    return joined, texts

  async def _is_deleted(self, user: str) -> bool:
    """Tells whether a user was deleted after the export, which still has the user's history."""
    if self._feedback is None:
      return False
    try:
      return await self._feedback.is_deleted(user)
    except StorageError as error:
      raise HTTPException(503, str(error), {'Retry-After': str(RETRY_SECONDS)}) from error

  def _is_logged(self, question: Any) -> bool:
    # A question that asks for an arm only inspects it, and says nothing about the arm's users.
    return self._intake is not None and question.arm is None and question.log

  def _count_shown(self, client: str | None, count: int) -> None:
    """Counts the items of an answer that is to be logged.

    Raises:
      HTTPException: they are too many for the client.
    """
    limit = self._intake.shown
    if wait := limit.seconds_to_wait(client, count):
      detail = (
        f'more than {limit.per_second:g} items a second in answers that are logged; try again in'
        f' {wait} s, or ask with log=false for what no user sees'
      )
      raise HTTPException(429, detail, {'Retry-After': str(wait)})

  def _shown(
    self, question: Any, arm: str | None, model: Model, rows: Sequence[dict[str, Any]]
  ) -> str:
    """Logs and counts the items of an answer, and returns the answer's id."""
    if not self._is_logged(question):
      return new_request_id()
    numbers = (self._recommender.number_of(row['item']) for row in rows)
    self._coverage.count(filter(None, numbers))  # An arm may have items that the default lacks.
    return self._feedback.show(question.user or '', arm, model.digest, rows)

  async def events(self, request: fastapi.Request) -> Stored:
    """Stores one event or several; it answers when they are durable."""
    return await self._intake.route(request, self._recommender.number_of)

  # A search holds the interpreter, so that a thread of its own would cost more time, not less.
  async def items(self, search: Search = '') -> list[Item]:
    """Finds items by a part of their title or id; upper and lower case are the same."""
    return [self._item(i) for i in self._find_items(search)]

  # Not async: a catalogue of a million items is compared in a thread of its own.
  def similar(
    self, item: Search, k: Count = MOST_SIMILAR // 2, by: Literal[KINDS] = BOTH
  ) -> list[Similar]:
    """Returns the items that are most similar to an item, the most similar first."""
    try:
      rows = self._recommender.similar([item], min(k, self._recommender.most_k), by)
    except InputError as error:
      raise HTTPException(404, str(error)) from error
    return [row | self._picture_of(row['item']) for row in rows]

  async def users(self, search: Search = '') -> list[str]:
    """Finds known users by a part of their id; upper and lower case are the same."""
    names = [self._user_names[i] for i in self._find_users(search)]
    return [name for name in names if not await self._is_deleted(name)]

  async def history(self, user: UserName) -> list[Item]:
    """Returns the latest items of a known user, 1,000 at most, the oldest first.

    They are those of the export. Stored events are not told to anybody.
    """
    try:
      known, _ = self._recommender.known_user(user)
    except InputError as error:
      raise HTTPException(404, str(error)) from error
    if await self._is_deleted(user):
      raise HTTPException(404, f'user {user!r}: is unknown')
    return [self._item(number - 1) for number in known.items[-MOST_IDS:].tolist()]

  # Not async, because it may wait for the disk.
  def picture(self, item: ItemName, request: fastapi.Request) -> fastapi.Response:
    """Returns a small picture of an item as JPEG.

    The addresses in other answers change with the picture, so theirs may be kept for ever.
    """
    index, version = self._version_of(item)
    if not version:
      raise HTTPException(404, f'item {item!r} has no picture')
    etag = f'"{version}"'
    is_lasting = request.query_params.get('v') == version
    headers = {
      'ETag': etag,
      'Cache-Control': 'public, max-age=31536000, immutable' if is_lasting else 'no-cache',
      'X-Content-Type-Options': 'nosniff',
    }
    if etag in request.headers.get('If-None-Match', ''):
      return fastapi.Response(status_code=304, headers=headers)
    content = self.model.thumbnails.read(index)
    if content is None:
      raise HTTPException(404, f'the picture of item {item!r} is damaged; export it again')
    return fastapi.Response(content, media_type=MEDIA_TYPE, headers=headers)

  def _version_of(self, item: str) -> tuple[int, str]:
    """Returns the index of an item and the version of its picture, '' without one."""
    number = self._recommender.number_of(item)
    if self.model.thumbnails is None or not number:
      return -1, ''
    index = number - 1  # Item numbers begin at 1.
    return index, self.model.thumbnails.version(index)

  def _picture_of(self, item: str) -> dict[str, str]:
    """Returns the field `picture` of an item, or nothing."""
    _, version = self._version_of(item)
    address = f'pictures/{urllib.parse.quote(item, safe="")}?v={version}'
    return {'picture': address} if version else {}

  async def health(self) -> Health:
    """Describes the served model. It answers as soon as the service can recommend."""
    recommender = self._recommender
    return Health(
      status='ok',
      dataset=recommender.about.get('dataset', {}).get('name', ''),
      items=len(recommender.item_ids),
      users=len(self._user_names),
      pictures=len(self.model.thumbnails or ()),
      paths=recommender.branches,
      share_names=recommender.share_names,
      max_length=recommender.max_length,
      most_k=self.model.batcher.most_k,
      events=self.takes_events,
      arms=list(self._model_of),
      models=self._models,
    )

  def _item(self, index: int) -> dict[str, str]:
    item = self._recommender.item_ids[index]
    return {'item': item, 'title': self._recommender.titles[index], **self._picture_of(item)}


def make_metrics() -> Callable:
  """Builds the route of the metrics, which are computed at most once a second."""
  until, text = 0.0, b''

  async def metrics() -> str:
    """Returns the metrics in the format of Prometheus."""
    nonlocal until, text
    if time.monotonic() >= until:
      until, text = time.monotonic() + METRICS_SECONDS, generate_latest()
    return PlainTextResponse(text)

  return metrics


def make_page(takes_events: bool) -> Callable:
  """Builds the route of the page, which has one more tab if the service takes events."""
  content = _PAGE.replace(b'</body>', _LIVE_TAB + b'</body>') if takes_events else _PAGE

  zipped = gzip.compress(content, mtime=0)

  async def page(request: fastapi.Request) -> HTMLResponse:
    """Returns the page."""
    if 'gzip' in request.headers.get('Accept-Encoding', ''):
      return HTMLResponse(zipped, headers=_PAGE_HEADERS | {'Content-Encoding': 'gzip'})
    return HTMLResponse(content, headers=_PAGE_HEADERS)

  return page


def make_search(texts: Sequence[str]) -> Callable[[str], list[int]]:
  """Builds a function that returns the indices of the first texts that contain a part.

  Args:
    texts: the texts to search; upper and lower case are the same.
  """
  lines = [text.casefold().replace('\n', ' ') for text in texts]
  whole = '\n'.join(lines)  # One scan of one string is fast enough for a million titles.
  ends = np.cumsum([len(line) + 1 for line in lines])

  def search(part: str) -> list[int]:
    part, found, at = part.casefold().replace('\n', ' '), [], 0
    while len(found) < MOST_FOUND and lines and (at := whole.find(part, at)) >= 0:
      found.append(int(np.searchsorted(ends, at, side='right')))
      at = int(ends[found[-1]])
    return found

  return search


def _problems(*statuses: int) -> dict[int, dict[str, Any]]:
  return {status: {'model': Problem} for status in statuses}


async def _on_wrong_method(request: fastapi.Request, _) -> JSONResponse:
  """Lists all methods of the path; the framework would list those of a single route."""
  path, routes = request.scope['path'], request.app.routes
  matching = [route for route in routes if route.path_regex.match(path)]
  methods = {method for route in matching for method in route.methods}
  answer = problem(405, f'this path takes {" and ".join(sorted(methods))}')
  answer.headers['Allow'] = ', '.join(sorted(methods))
  return answer


async def _on_bad_request(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
  """Reports the first thing that is wrong with a request."""
  first = error.errors()[0]
  if first['type'] == 'json_invalid':
    return problem(400, f'the body is no JSON: {first["ctx"]["error"]}')
  if first['loc'] == ('body',) and not is_json(request):  # The framework takes it for plain text.
    return problem(422, NOT_JSON)
  field = '.'.join(str(part)[:80] for part in first['loc'][1:])
  return problem(422, f'{field}: {first["msg"]}' if field else first['msg'])

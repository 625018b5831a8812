"""The JSON of the HTTP service: requests, answers and errors."""

from typing import Annotated

import fastapi
from fastapi.responses import JSONResponse
from pydantic import (
  AfterValidator,
  BaseModel,
  BeforeValidator,
  ConfigDict,
  Field,
  create_model,
  model_validator,
)

from ur4rec_jax.online.events import MOST_CHARACTERS
from ur4rec_jax.service.batcher import MOST_IDS

MOST_WEIGHT = 100
NOT_JSON = 'the body must be JSON: set Content-Type: application/json'


def _without_nul(text: str) -> str:
  if '\0' in text:
    raise ValueError('must be text without NUL, which not every store can keep')
  return text


UserId = Annotated[str, Field(max_length=MOST_CHARACTERS), AfterValidator(_without_nul)]
# JSON has a single type of numbers, so 3.0 is a whole number, too.
Whole = Annotated[
  int, BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)
]
ItemId = Annotated[str, Field(max_length=MOST_CHARACTERS)] | Whole
Ids = list[ItemId]


class Strict(BaseModel):
  """Refuses conversions, unknown fields and NaN."""

  model_config = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False)


class Problem(BaseModel):
  """Says what went wrong and how to correct it."""

  detail: str


class Item(BaseModel):
  """An item of the catalogue; `picture` is the address of its picture, if it has one."""

  item: str
  title: str
  picture: str = None


class Because(Item):
  """An item of the history, and by how much its absence lowers the score of a recommended item."""

  influence: float


class Similar(Item):
  """An item that is similar to another; see `Recommender.similar`."""

  similarity: float


class Recommended(Item):
  """A recommended item; its shares are the contributions of the branches to the score.

  If the service has rules, `rules` names those that moved the item here. If they explore,
  `propensity` is the probability with which the item is shown at this position. A pinned item that
  is far from the best has no score. With `explain`, `because` has the items of the history without
  which the score falls the most, `why` names them in a sentence, and `sentence` is a passage of the
  item's text that no item with another text has.
  """

  rank: int
  score: float | None
  shares: dict[str, float | None]
  rules: list[str] = None
  propensity: float = None
  because: list[Because] = None
  why: str = None
  sentence: str = None


class Recommendations(BaseModel):
  """The best items for a user.

  `history` has the number of known items and the number of items that the model reads. `unknown`
  has the items that are not in the catalogue; they were ignored. `notes` says what rules left out,
  and why `because` is empty if influences cannot be measured now. `arm` is the arm of the
  experiment, if there is one; null for users outside of it.
  Events may have the `request_id` of the answer in which the user saw the item.
  """

  request_id: str
  user: str | None
  history: dict[str, int]
  unknown: list[str]
  arm: str | None = None
  recommendations: list[Recommended]
  notes: list[str] = None


class Stored(BaseModel):
  """What became of the events of a request; all that are counted here are durable.

  `duplicates` were stored earlier. Those `of_deleted_users` happened before their user was deleted,
  and were not stored.
  """

  accepted: int
  duplicates: int
  of_deleted_users: int


class Health(BaseModel):
  """The model and its limits; `paths` are its branches.

  `events` tells whether the service takes events; `arms` are those of its experiment. `models` has
  the names of all models of the service, the served one first. Each route takes `?model=NAME`.
  """

  status: str
  dataset: str
  items: int
  users: int
  pictures: int
  paths: list[str]
  share_names: list[str]
  max_length: int
  most_k: int
  events: bool
  arms: list[str]
  models: list[str]


def make_question(branches: list[str], most_k: int, keeps_seen: bool) -> type[BaseModel]:
  """Builds the model of a request to /recommend.

  Args:
    branches: names of the model's branches.
    most_k: the most items that a request can ask for.
    keeps_seen: whether items of the history are recommended unless the request says otherwise.
  """
  weight = (float, Field(1.0, ge=0, le=MOST_WEIGHT))
  Weights = create_model('Weights', __base__=Strict, **dict.fromkeys(branches, weight))

  class Question(Strict):
    """Asks for the best items for a history, the oldest item first, or for a known user.

    `explain` says why the first 20 items are recommended. `rules=false` leaves out the rules of the
    service. `arm` shows what an arm of the experiment answers, whichever arm the user has; such an
    answer is not logged, nor is one with `log=false`. `weights` multiply the scores of the
    branches: 1 scores as trained, 0 switches a branch off.
    """

    model_config = ConfigDict(
      json_schema_extra={'oneOf': [{'required': ['history']}, {'required': ['user']}]}
    )
    history: Ids = Field(None, min_length=1, max_length=MOST_IDS)
    user: UserId = None
    k: Whole = Field(min(10, most_k), ge=1, le=most_k)
    only: Ids = Field(None, min_length=1, max_length=MOST_IDS)
    without: Ids = Field((), max_length=MOST_IDS)
    keep_seen: bool = keeps_seen
    rules: bool = True
    arm: str = Field(None, max_length=MOST_CHARACTERS)
    explain: bool = False
    log: bool = True
    weights: Weights = Weights()

    @model_validator(mode='after')
    def _one_of_two(self):
      if len(self.model_fields_set & {'history', 'user'}) != 1:
        raise ValueError('give one of history and user')
      return self

  return Question


def is_json(request: fastapi.Request) -> bool:
  """Tells whether a request says that its body is JSON."""
  kind = request.headers.get('content-type', '').partition(';')[0].strip().casefold()
  return kind == 'application/json'


def problem(status: int, detail: str) -> JSONResponse:
  """Makes an error response.

  Args:
    status: HTTP status.
    detail: what went wrong and how to correct it.
  """
  return JSONResponse(Problem(detail=detail).model_dump(), status)

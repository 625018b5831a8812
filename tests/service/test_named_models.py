"""A request gets the model that it names."""

import asyncio
import pathlib

import pytest

from ur4rec_jax.errors import InputError
from ur4rec_jax.service.named_models import NamedModels, names_of


def ask(models, query: bytes) -> str:
  """Returns the name of the model that answered, or the status of an error."""
  said = []

  async def send(message):
    said.append(message.get('status', message.get('body')))

  async def go():
    scope = {'type': 'http', 'query_string': query, 'method': 'GET', 'headers': []}
    await models(scope, None, send)

  asyncio.run(go())
  return said[0]


def answering(name):
  async def app(scope, receive, send):
    await send({'type': 'http.response.body', 'body': name})

  return app


@pytest.mark.parametrize(
  ('query', 'answers'),
  [
    (b'', 'old'),
    (b'user=u1', 'old'),
    (b'model=old', 'old'),
    (b'user=u1&model=new&k=3', 'new'),
    (b'model=old&model=new', 'new'),
    (b'my_model=new', 'old'),
    (b'model=n%65w', 'new'),
    (b'model=other', 404),
    (b'model=', 404),
  ],
)
def test_a_request_gets_the_model_that_it_names(query, answers):
  models = NamedModels('old', answering('old'), {'new': answering('new')})
  assert ask(models, query) == answers


def test_names_are_as_short_as_they_can_be(tmp_path):
  names = lambda *folders: names_of([str(tmp_path / folder) for folder in folders])
  assert names('a') == ['a']
  assert names('runs/a', 'runs/b') == ['a', 'b']
  assert names('a/export', 'b/export') == ['a-export', 'b-export']
  assert names('x/a/export', 'y/a/export') == ['x-a-export', 'y-a-export']
  with pytest.raises(InputError, match='is compared with itself'):
    names('a', 'b/../a')
  assert names_of(['.']) == [pathlib.Path.cwd().name]

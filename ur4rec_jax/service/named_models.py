"""Several models in one service: a request names one by `?model=NAME`, or gets the served one."""

import pathlib
import urllib.parse
from collections.abc import Callable, Mapping, Sequence

from ur4rec_jax.errors import InputError
from ur4rec_jax.service.http_schema import problem


def names_of(folders: Sequence[str]) -> list[str]:
  """Returns a short name for each folder: its last part, or as many parts as tell them apart.

  Raises:
    InputError: two of them are the same folder.
  """
  paths = [pathlib.Path(folder).resolve() for folder in folders]
  if len(set(paths)) < len(paths):
    raise InputError(f'{folders[-1]}: is compared with itself; give another folder')
  count = 1
  while len(names := ['-'.join(path.parts[-count:]) for path in paths]) > len(set(names)):
    count += 1
  return names


class NamedModels:
  """An ASGI application that passes a request on to the model that it names."""

  def __init__(self, name: str, served: Callable, others: Mapping[str, Callable]):
    """Stores the models.

    Args:
      name: name of the served model.
      served: answers requests that name no model, or this one.
      others: the applications of further models by name. The caller runs their batchers.
    """
    self._name, self._served, self._others = name, served, others

  async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
    name = _asked(scope.get('query_string', b''))  # The start and the end of the service have none.
    if name in (None, self._name):
      await self._served(scope, receive, send)
    elif name in self._others:
      await self._others[name](scope, receive, send)
    else:
      known = ', '.join([self._name, *self._others])
      answer = problem(404, f'model {name!r:.80}: is not here; there is {known}')
      await answer(scope, receive, send)


def _asked(query: bytes) -> str | None:
  """Returns the last `model` of a query string, None without one."""
  if b'model=' not in query:
    return None
  fields = urllib.parse.parse_qs(query.decode('latin-1'), keep_blank_values=True)
  return fields['model'][-1] if 'model' in fields else None

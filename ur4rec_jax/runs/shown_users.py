"""Example users for the page of a run: history, recommendations and held-out item of each.

The users are drawn at random, not chosen for how well the model does. `shown_users.json` holds
everything that the page shows of them, small pictures included.
"""

import base64
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import Dataset, read_items_at, read_user_ids_at
from ur4rec_jax.encoders.picture_files import BadPicture, thumbnail
from ur4rec_jax.evaluation.best_items import best_items
from ur4rec_jax.evaluation.evaluate import EvalData
from ur4rec_jax.evaluation.queries import Queries, make_queries
from ur4rec_jax.runs.open_run import Run

PyTree = Any
FILE = 'shown_users.json'
USERS, HISTORY, BEST = 6, 5, 5
# Pixels. A JPEG file of this size has at most about 6 kB, so a page has less than 1 MB of pictures.
_SIDE = 96
_MOST_BYTES = 8000


def shown_users(
  run: Run, model: nn.Module, data: EvalData, params: PyTree, ranks: np.ndarray
) -> dict[str, Any]:
  """Draws test users and lists what the model ranks first for them; all processes must call it.

  Args:
    run: the trained run.
    model: its best model.
    data: inputs of the evaluation, on the devices.
    params: parameters of the model, on the devices.
    ranks: `[users]` of the test items that count, as `make_evaluator` gives them.

  Returns:
    The content of `shown_users.json`: see `describe`; each user has a `rank` too, and `rule` says
    how they were drawn.
  """
  queries, places = _draw(data, run.config.seed)
  with jax.transfer_guard(run.config.transfer_guard):
    best = best_items(model, data, params, queries, BEST)
  found = describe(data.dataset, run.config.data_dir, queries, best)
  for user, place in zip(found['users'], places, strict=True):
    # A rank among drawn candidates would not fit the list, which is from the whole catalogue.
    user['rank'] = int(ranks[place]) if data.protocol.candidates == 'all' else None
  rule = (
    f'drawn at random, with the seed {run.config.seed} of the run, from the {len(ranks):,} test '
    'users whose test item counts'
  )
  return {'rule': rule, **found}


def _draw(data: EvalData, seed: int) -> tuple[Queries, np.ndarray]:
  """Draws users whose test item counts.

  Args:
    data: inputs of the evaluation.
    seed: seed of the draw.

  Returns:
    The users with their test items, to be ranked among all items; and `[users]` their indices among
    the users whose test item counts.
  """
  queries = make_queries(data.dataset, 'test', data.protocol._replace(candidates='all'))
  counted = np.flatnonzero(data.protocol.is_counted(data.dataset, 'test'))
  rng = np.random.default_rng(seed)
  places = np.sort(rng.choice(len(counted), min(USERS, len(counted)), replace=False))
  return Queries(*(x[counted[places]] for x in queries)), places


def describe(
  dataset: Dataset, data_dir: str | pathlib.Path, queries: Queries, best: np.ndarray
) -> dict[str, Any]:
  """Reads names, titles and pictures of users and items.

  Args:
    dataset: all interactions.
    data_dir: the prepared folder.
    queries: the users with their held-out items.
    best: `[users, items]` item ids that they are recommended, 0 for none.

  Returns:
    `users`, each with its `user` (original id), `had` (number of items before the test item),
    `history` (the latest of them, the newest last), `held_out` and `best`, as item ids; and `items`
    by item id, each with `id` (original id), `title` and `picture`, a JPEG file in base64 or ''.
  """
  names = read_user_ids_at(data_dir, queries.users.tolist())
  users = []
  for i, user in enumerate(queries.users.tolist()):
    end = queries.starts[i] + queries.lengths[i]
    start = max(end - HISTORY, queries.starts[i])
    users.append(
      {
        'user': names[user],
        'had': int(queries.lengths[i]),
        'history': dataset.item_ids[start:end].tolist(),
        'held_out': int(queries.targets[i]),
        'best': [item for item in best[i].tolist() if item],
      }
    )
  shown = {item for user in users for item in (*user['history'], user['held_out'], *user['best'])}
  records = read_items_at(data_dir, sorted(shown))
  pictures = item_pictures.find(data_dir, records.values())
  items = {
    str(item): {
      'id': record['original_id'],
      'title': record['title'] or record['original_id'],
      'picture': _small(picture),
    }
    for (item, record), picture in zip(records.items(), pictures, strict=True)
  }
  return {'users': users, 'items': items}


def _small(picture: pathlib.Path | None) -> str:
  """Returns a small copy of a picture in base64; '' if it is missing, unreadable or too large."""
  try:
    content = b'' if picture is None else thumbnail(picture.read_bytes(), _SIDE)
  except (OSError, BadPicture):
    return ''
  return base64.b64encode(content).decode() if len(content) <= _MOST_BYTES else ''

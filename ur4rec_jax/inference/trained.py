"""A trained run in use from Python: DataFrames in and out, users, preferences, new items.

import ur4rec_jax

recommender = ur4rec_jax.load('runs/shop')
recommender.recommend(['S0-1', 'S3-7'], k=10)
"""

import copy
import dataclasses
import functools
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import Dataset, iterate_items, read_interactions
from ur4rec_jax.data.features import TokenTable, load_features
from ur4rec_jax.encoders.text import encode_like
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation.cold_items import (
  cold_items_of,
  find_cold_items,
  first_tokens,
  has_pure_item_table,
  mean_of_nearest,
  warm_items,
  with_mean_of_nearest,
)
from ur4rec_jax.inference import scoring
from ur4rec_jax.inference.recommender import Answer, Ids, Recommender
from ur4rec_jax.models.ur4rec import BRANCHES, create_model
from ur4rec_jax.runs.knobs import from_stored
from ur4rec_jax.runs.open_run import open_run, restore_best
from ur4rec_jax.runs.workdir import check_workdir, keep_compiled_programs

TEXT = 'text'
_PREFERENCE = '\0preference'  # The id of a sentence that is read as an item; no item has it.
_EXPLAINED_AT_ONCE = 64  # Histories.


def load(
  workdir: str | pathlib.Path,
  data_dir: str | pathlib.Path | None = None,
  approximate: bool = False,
) -> 'TrainedRecommender':
  """Opens the best parameters of a run.

  Args:
    workdir: a folder that training wrote.
    data_dir: where its prepared data lie now; None for where they lay.
    approximate: whether to search large catalogues approximately, see docs/inference.md.

  Raises:
    InputError: the folder holds no run, or its data are missing or others.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.is_file():
    raise InputError(
      f'--workdir {workdir}: no run here (no {path.name}); train one: python -m ur4rec_jax.main'
      f' --config=configs/NAME.py --workdir={workdir}'
    )
  try:
    config = from_stored(json.loads(path.read_text())['config'])
  except (ValueError, LookupError, TypeError) as error:
    raise InputError(f'{path}: cannot be read ({error!r})') from error
  if data_dir is not None:
    config.data_dir = str(data_dir)
  run = open_run(config)
  dataset, tables = run.dataset, run.tables
  check_workdir(str(workdir), run)
  keep_compiled_programs(str(workdir), config)
  stage, params = restore_best(run, str(workdir))
  config, params = stage.config, jax.device_get(params)
  model = create_model(config, dataset.num_items)
  if approximate and not model.is_sum:
    raise InputError(
      f'approximate: the fusion {model.fusion.kind} ranks each branch, and only sums of scores'
      ' can be searched approximately; leave it out'
    )
  items = {'ids': [], 'titles': []}
  for item in iterate_items(config.data_dir):
    items['ids'].append(item['original_id'])
    items['titles'].append(item['title'])
  arrays = jax.jit(functools.partial(scoring.item_arrays, model))(params, tables.items)
  about = {'dataset': dataset.identity(), 'config': config.to_dict()}
  finished = pathlib.Path(workdir) / 'results.json'
  if finished.is_file():
    found = json.loads(finished.read_text())
    about |= {name: found[name] for name in ('protocol', 'valid', 'test', 'seed')}
  return TrainedRecommender(
    config, model, params, dataset, tables.users, items, arrays, approximate, about
  )


class TrainedRecommender(Recommender):
  """Adds to `Recommender` what needs the training data and the whole model."""

  def __init__(
    self,
    config: ConfigDict,
    model: Any,
    params: Any,
    dataset: Dataset,
    user_tables: dict[str, TokenTable],
    items: Mapping[str, Sequence[str]],
    item_arrays: dict[str, Any],
    approximate: bool,
    about: dict[str, Any],
  ):
    """Takes what `load` reads; into `item_arrays` of `scoring.item_arrays` it puts cold items."""
    self.config, self.model, self.params, self.dataset = config, model, params, dataset
    self._user_tables = user_tables if model.retriever is not None else {}
    self._approximate = approximate
    self.program = jax.jit(scoring.make_program(model))
    self._scorer = jax.jit(scoring.make_scorer(model))
    if (cold := cold_items_of(model, dataset)) is not None:
      of_rows = item_arrays['sasrec']
      of_rows['vectors'] = with_mean_of_nearest(of_rows['vectors'], cold)
    self._place(items, item_arrays, about)

  def _place(self, items, item_arrays, about) -> None:
    self._item_arrays, self.items = item_arrays, items
    self.settings = {
      'paths': list(self.model.branches),
      'share_names': scoring.share_names(self.model, list(self.config.modalities)),
      'max_length': self.config.max_length,
      'preferences': {name: table.tokens.shape[1:] for name, table in self._user_tables.items()},
      'most_places': scoring.CANDIDATES if self._approximate else None,
      'about': about,
    }
    self.arrays = {
      'params': scoring.user_params(self.model, self.params),
      'items': item_arrays,
      **scoring.catalogue_arrays(self.model, item_arrays, self._approximate),
    }
    super().__init__(self.program, self.arrays, items, self.settings)

  @functools.cached_property
  def _first_tokens(self) -> dict[str, TokenTable]:
    return first_tokens(self.dataset)

  @functools.cached_property
  def users(self) -> dict[str, int]:
    """Index of each user of the training data by original id."""
    return {name: i for i, name in enumerate(read_interactions(self.config.data_dir).user_ids)}

  def history(self, user: str | int) -> list[str]:
    """All items of a user of the training data, the oldest first; InputError if there is none."""
    index = self._user_index(user)
    start, end = self.dataset.offsets[index : index + 2]
    return [self.item_ids[i - 1] for i in self.dataset.item_ids[start:end]]

  def _user_index(self, user: str | int) -> int:
    index = self.users.get(str(user))
    if index is None:
      raise InputError(
        f'user {str(user)!r}: is not in {self.config.data_dir}, whose first is'
        f' {next(iter(self.users))!r}; a new user is recommended to by a history or a preference'
      )
    return index

  def recommend(
    self,
    history: Any = None,
    k: int = 10,
    *,
    user: Any = None,
    preference: str | None = None,
    **options: Any,
  ) -> Any:
    """Recommends to one user or many.

    Args:
      history: a list of item ids, the oldest first; or of many users: a list of lists, a dict of
        lists by user, or a DataFrame with the columns `user` and `item`, whose rows are in order of
        time, or in that of a column `timestamp` if there is one.
      k: how many items.
      user: instead of a history, a user of the training data, or a list of them.
      preference: what the user likes, in words; for one user.
      **options: `only`, `without`, `keep_seen` and `emphasis` of `Recommender.top`.

    Returns:
      A pandas DataFrame with a row a user and item: `user` (if there are many), `rank`, `item`,
      `title`, `score`, and a column for each of `share_names`.

    Raises:
      InputError: as `Recommender.top` does, or a user is unknown.
    """
    names, histories, is_one = self._who(history, user)
    users = None if user is None else [self._user_index(name) for name in names]
    answer = self.answer(histories, k, users=users, preference=preference, **options)
    lost = [name for unknown in answer.unknown for name in unknown]
    if lost:
      warnings.warn(
        f'{len(lost)} items of the histories are not in the catalogue and were ignored, first'
        f' {lost[0]!r}',
        stacklevel=2,
      )
    columns = self.columns(answer)
    if not is_one:
      rows = [name for name, items in zip(names, answer.items, strict=True) for _ in items]
      columns = {'user': rows, **columns}
    try:
      import pandas as pd
    except ImportError as error:
      raise InputError('pandas is not installed; pip install pandas, or call .answer') from error
    return pd.DataFrame(columns)

  def _who(self, history: Any, user: Any) -> tuple[list[Any], list[Ids], bool]:
    """Names of the users, their histories, and whether it is one who was asked for alone."""
    if (history is None) == (user is None):
      if history is None:
        return [''], [[]], True  # Told by the preference alone.
      raise InputError('history and user exclude each other; leave one out')
    if user is not None:
      is_one = isinstance(user, str | int | np.integer)
      names = [user] if is_one else list(user)
      return names, [self.history(name) for name in names], is_one
    if hasattr(history, 'columns'):
      history = _histories(history)
    if isinstance(history, Mapping):
      return list(history), list(history.values()), False
    if isinstance(history, str | bytes) or not hasattr(history, '__iter__'):
      raise InputError(f'history: must be a list of item ids, not {history!r:.80}')
    history = list(history)
    is_one = all(isinstance(x, str | int | float) or not hasattr(x, '__iter__') for x in history)
    return ([''], [history], True) if is_one else (list(range(len(history))), history, False)

  def columns(self, answer: Answer) -> dict[str, Any]:
    """Returns an answer as flat columns, all users one after the other."""
    shares = np.concatenate([np.zeros((0, len(self.share_names)), np.float32), *answer.shares])
    return {
      'rank': [i for items in answer.items for i in range(1, len(items) + 1)],
      'item': [item for items in answer.items for item in items],
      'title': [title for titles in answer.titles for title in titles],
      'score': np.concatenate([np.zeros(0, np.float32), *answer.scores]),
      **{name: shares[:, i] for i, name in enumerate(self.share_names)},
    }

  def answer(
    self,
    histories: Sequence[Ids],
    k: int = 10,
    *,
    users: Sequence[int] | None = None,
    preference: str | None = None,
    **options: Any,
  ) -> Answer:
    """Does what `recommend` does without pandas.

    Args:
      histories: a list of item ids a user.
      k: how many items.
      users: their indices in the training data, whose own texts are read.
      preference: a text for all of them, instead.
      **options: as those of `recommend`.
    """
    self.check_k(k)
    preferences = {} if users is None else self.preferences_of(users)
    if preference is None:
      return self.top(histories, k, preferences=preferences, **options)
    if not isinstance(preference, str):
      raise InputError(f'preference: must be a text, not {preference!r:.80}')
    if TEXT in self._user_tables:
      features = load_features(self.config.data_dir, 'user', TEXT, self.dataset.split_hash)
      preferences[TEXT] = tuple(
        np.repeat(x[None], len(histories), axis=0) for x in _encode(features, preference)
      )
      return self.top(histories, k, preferences=preferences, **options)
    return self._with_sentence(preference, histories, k, preferences, options)

  def preferences_of(self, users: Sequence[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the tokens of users' own texts, as `top` takes them, by their index in the data."""
    rows = np.asarray(users, int)
    return {
      name: (table.tokens[rows], table.mask[rows]) for name, table in self._user_tables.items()
    }

  def _with_sentence(self, preference, histories, k, preferences, options) -> Answer:
    """Reads a preference as an item with that text, the oldest of each history."""
    if TEXT not in self.config.modalities:
      raise InputError(
        'preference: this model reads no texts, so that words tell it nothing; train a variant that'
        ' does, e.g. --config=configs/default.py:text, or give a history'
      )
    tokens, mask = _encode(self.dataset.features[TEXT], preference)
    tables = {
      name: TokenTable(np.zeros((1, 1, features.shape[2]), np.float32), np.zeros((1, 1), bool))
      for name, features in self.dataset.features.items()
    }
    tables[TEXT] = TokenTable(tokens[None], mask[None])
    reader = self._with_items([_PREFERENCE], ['the preference'], tables)
    histories = [[_PREFERENCE, *list(h)[-self.max_length + 1 :]] for h in histories]
    options['without'] = [*options.get('without', ()), _PREFERENCE]
    return reader.top(histories, k, preferences=preferences, **options)

  def add_items(self, source: str | pathlib.Path) -> tuple['TrainedRecommender', list[str]]:
    """Appends items that training has not seen, from their content.

    Args:
      source: a prepared folder with features from the same encoders, or a .npz file with `ids`
        `[n]`, maybe `titles` `[n]`, and for each modality of the model `[n, tokens, width]` or
        `[n, width]`.

    Returns:
      A recommender that knows them too, and the ids that were there already and stay as they are.

    Raises:
      InputError: the model knows items by id only, or the features are of other kinds.
    """
    modalities = list(self.config.modalities)
    if not modalities:
      raise InputError(
        'add_items: this model knows items by their id only, and has nothing to say of new ones;'
        ' train a variant that reads content, e.g. --config=configs/default.py:text'
      )
    source = pathlib.Path(source)
    if source.is_dir():
      ids, titles, tables = self._prepared_items(source, modalities)
    else:
      ids, titles, tables = self._table_of_items(source, modalities)
    known = [name for name in ids if name in self._place_of]
    new = np.array([i for i, name in enumerate(ids) if name not in self._place_of], int)
    tables = {name: TokenTable(t.tokens[new], t.mask[new]) for name, t in tables.items()}
    has_content = np.any([table.mask.any(1) for table in tables.values()], axis=0)
    if not has_content.all():
      first = ids[new[int(np.argmin(has_content))]]
      raise InputError(f'{source}: item {first!r} has no features; leave it out, or encode it')
    if not len(new):
      return self, known
    return self._with_items([ids[i] for i in new], [titles[i] for i in new], tables), known

  def _prepared_items(self, folder: pathlib.Path, modalities: list[str]):
    items = list(iterate_items(folder))
    tables = {}
    for name in modalities:
      features, ours = load_features(folder, 'item', name), self.dataset.features[name]
      for field in ('encoder', 'width', 'projection', 'is_normalised'):
        if features.info[field] != ours.info[field]:
          raise InputError(
            f'{features.folder}: differs in {field} from {ours.folder}, on which the model was'
            ' trained; encode the new items with the same encoder and flags'
          )
      features = dataclasses.replace(features, max_tokens=ours.max_tokens)
      tables[name] = TokenTable(*(x[1:] for x in features.table()))
    return [item['original_id'] for item in items], [item['title'] for item in items], tables

  def _table_of_items(self, path: pathlib.Path, modalities: list[str]):
    try:
      with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    except (OSError, ValueError, EOFError) as error:
      raise InputError(
        f'add_items {path}: is neither a prepared folder nor a readable .npz file ({error})'
      ) from error
    for name in ('ids', *modalities):
      if name not in arrays or len(arrays[name]) != len(arrays['ids']):
        raise InputError(f'{path}: must hold {name!r}, with an entry for each of the ids')
    ids = [str(name) for name in arrays['ids']]
    if len(set(ids)) < len(ids):
      raise InputError(f'{path}: an id is there twice; remove one of the two')
    tables = {}
    for name in modalities:
      tokens = arrays[name] if arrays[name].ndim == 3 else arrays[name][:, None]
      width = self.dataset.features[name].shape[2]
      if tokens.ndim != 3 or tokens.shape[2] != width or not np.isfinite(tokens).all():
        raise InputError(f'{path}: {name} must be finite, [items, tokens, {width}]')
      tokens = tokens[:, : self.dataset.features[name].max_tokens or None]
      # No token is all zeros: where there are zeros, there is none.
      tables[name] = TokenTable(tokens.astype(np.float32), tokens.any(2))
    return ids, [str(title) for title in arrays.get('titles', ids)], tables

  def _with_items(
    self, ids: list[str], titles: list[str], tables: dict[str, TokenTable]
  ) -> 'TrainedRecommender':
    """A copy that knows more items, row i of the tables of the i-th."""
    count = len(ids)
    dtype = jnp.dtype(self.config.dtype)
    features = {
      name: TokenTable(
        np.pad(table.tokens, ((1, 0), (0, 0), (0, 0))).astype(dtype),
        np.pad(table.mask, ((1, 0), (0, 0))),
      )
      for name, table in tables.items()
    }
    params = {
      name: {
        key: np.zeros((count + 1, *x.shape[1:]), x.dtype) if key == 'item_embedding' else x
        for key, x in tree.items()
      }
      if name in BRANCHES
      else tree
      for name, tree in self.params.items()
    }
    new = scoring.item_arrays(create_model(self.config, count), params, features)
    if has_pure_item_table(self.model):
      new['sasrec']['vectors'] = self._rows_of(tables)
    joined = jax.tree.map(lambda old, new: jnp.concatenate([old, new[1:]]), self._item_arrays, new)
    items = {'ids': [*self.item_ids, *ids], 'titles': [*self.titles, *titles]}
    larger = copy.copy(self)
    larger._place(items, joined, self.about)
    return larger

  def _rows_of(self, tables: dict[str, TokenTable]) -> jax.Array:
    """`[new items + 1, dim]`: what a branch of rows takes new items for."""
    rows = self._item_arrays['sasrec']['vectors']
    features = {
      name: TokenTable(
        np.concatenate([known.tokens, tables[name].tokens[:, :1]]),
        np.concatenate([known.mask, tables[name].mask[:, :1]]),
      )
      for name, known in self._first_tokens.items()
    }
    count = len(next(iter(tables.values())).mask)
    is_new = np.repeat([False, True], [self.dataset.num_items + 1, count])
    is_warm = np.pad(warm_items(self.dataset), (0, count))
    found = find_cold_items(features, is_new, is_warm, self.model.sasrec.dim)
    new = jnp.broadcast_to(rows[1:].mean(0), (count + 1, rows.shape[1]))  # Without a first token.
    if found is None:
      return new
    return new.at[found.items - self.dataset.num_items].set(mean_of_nearest(rows, found))

  def influences(self, history: Ids, items: Ids, users: Sequence[int] | None = None) -> np.ndarray:
    """How much each item of a history speaks for some items.

    An influence is by how much the item's score, above the mean of the catalogue, falls when that
    one interaction is left out of the history. It is measured and not read off attention weights,
    which say where a layer looks and not what that does to the score; and it means the same in
    every branch and fusion.

    Args:
      history: item ids, the oldest first; unknown ones are ignored.
      items: of the catalogue.
      users: the index of the user in the training data, in a list, whose own texts are read.

    Returns:
      `[history that is read, items]` float32, in the order of the known items of the history.
    """
    known = self.lookup(history)[0][-self.max_length :]
    wanted = self.lookup(items, 'items')[0]
    histories = [known, *(np.delete(known, i) for i in range(len(known)))]
    scores = []
    for start in range(0, len(histories), _EXPLAINED_AT_ONCE):
      part = histories[start : start + _EXPLAINED_AT_ONCE]
      preferences = {} if users is None else self.preferences_of([*users] * len(part))
      nothing = [np.zeros(0, np.int32)] * len(part)
      queries = self.queries(part, nothing, preferences=preferences)
      scores.append(np.asarray(self._scorer(self._arrays, queries, wanted))[: len(part)])
    scores = np.concatenate(scores)
    return scores[0] - scores[1:]


def _histories(frame: Any) -> dict[Any, list]:
  """Turns a DataFrame with a row an interaction into histories by user."""
  missing = [name for name in ('user', 'item') if name not in frame.columns]
  if missing:
    raise InputError(
      f'history: the DataFrame has no column {missing[0]!r}, only {", ".join(map(str, frame))};'
      ' rename yours to user, item and, for the order, timestamp'
    )
  if 'timestamp' in frame.columns:
    frame = frame.sort_values('timestamp', kind='stable')
  return frame.groupby('user', sort=False)['item'].agg(list).to_dict()


def _encode(features: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
  return encode_like(features.folder, features.info, text)

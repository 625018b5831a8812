"""Recommends with a trained run: DataFrames in and out, known users, preferences, new items.

import ur4rec_jax

recommender = ur4rec_jax.load('runs/shop')
recommender.recommend(['S0-1', 'S3-7'], k=10)
"""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import Dataset, iterate_items, read_interactions
from ur4rec_jax.data.features import (
  Features,
  TokenTable,
  load_features,
  load_with_features,
  read_tables,
)
from ur4rec_jax.encoders.text import encode_like
from ur4rec_jax.encoders.text import texts as item_texts
from ur4rec_jax.errors import InputError
from ur4rec_jax.evaluation.cold_items import cold_items_of, with_mean_of_nearest
from ur4rec_jax.inference import frames, kept_model, scoring
from ur4rec_jax.inference.explanations import explain as _explain
from ur4rec_jax.inference.kept_model import Kept
from ur4rec_jax.inference.new_items import TEXT, NewItemEncoder, NewItems, read_new_items
from ur4rec_jax.inference.passages import distinctive
from ur4rec_jax.inference.query import Answer, CheckedQuery, Ids, Query, UserTokens, make_query
from ur4rec_jax.inference.recommender import Recommender, Users, make_users
from ur4rec_jax.inference.stored_format import Settings
from ur4rec_jax.models.ur4rec import UR4Rec, create_model
from ur4rec_jax.runs.compiled_programs import keep_compiled_programs
from ur4rec_jax.runs.extensions import load_extensions
from ur4rec_jax.sharding import devices

_PREFERENCE = '\0preference'  # Id of a preference that is read as an item; no real item has it.


def load(
  workdir: str | pathlib.Path,
  data_dir: str | pathlib.Path | None = None,
  approximate: bool = False,
) -> 'TrainedRecommender':
  """Opens the best parameters of a run.

  Args:
    workdir: the folder that training wrote.
    data_dir: the folder of the prepared data, if it has moved since training.
    approximate: whether to search large catalogues approximately, see docs/inference.md.

  Raises:
    InputError: the folder holds no run, or its data are missing or have changed.
  """
  dataset, kept = _read_kept(workdir, data_dir) or _read_checkpoint(workdir, data_dir)
  return TrainedRecommender(kept, dataset, _about(workdir, dataset, kept.config), approximate)


def _about(workdir: str | pathlib.Path, dataset: Dataset, config: ConfigDict) -> dict[str, Any]:
  about = {'dataset': dataset.identity(), 'config': config.to_dict()}
  if time_range := dataset.info.get('time_range'):
    about['data_until'] = time_range[1]
  about['data'] = {
    name: dataset.info[name]
    for name in ('licence', 'citation', 'url', 'counts')
    if name in dataset.info
  }
  finished = pathlib.Path(workdir) / 'results.json'
  if finished.is_file():
    try:
      found = json.loads(finished.read_text())
      about |= {name: found[name] for name in ('protocol', 'valid', 'test', 'seed')}
    except (OSError, ValueError, LookupError, TypeError) as error:
      raise InputError(
        f'{finished}: cannot be read ({error!r:.200}); remove it and start the training again,'
        ' which writes it anew'
      ) from error
    about['baselines'] = found.get('baselines', {})
  return about


def _read_kept(
  workdir: str | pathlib.Path, data_dir: str | pathlib.Path | None
) -> tuple[Dataset, Kept] | None:
  config = kept_model.read_config(workdir)
  if config is None:
    return None
  if data_dir is not None:
    config.data_dir = str(data_dir)
  if not os.path.isdir(config.data_dir):
    return None
  load_extensions(config.get('extensions', ()))
  dataset = load_with_features(config)
  kept = kept_model.read(workdir, config, dataset.identity())
  if kept is None:
    return None
  keep_compiled_programs(str(workdir), config.compilation_cache)
  return dataset, kept


def _read_checkpoint(
  workdir: str | pathlib.Path, data_dir: str | pathlib.Path | None
) -> tuple[Dataset, Kept]:
  """Reads the best parameters from the checkpoint, and keeps them for the next start."""
  # These are slow to import, and only the first start needs them.
  from ur4rec_jax.runs.open_run import restore_best
  from ur4rec_jax.runs.workdir import open_stored_run

  made_from = kept_model.origin(workdir)
  run = open_stored_run(workdir, data_dir)
  keep_compiled_programs(str(workdir), run.config.compilation_cache)
  stage, params = restore_best(run, str(workdir))
  items = {'ids': [], 'titles': []}
  for item in iterate_items(run.config.data_dir):
    items['ids'].append(item['original_id'])
    items['titles'].append(item['title'])
  params = jax.device_get(params)
  item_arrays = encode_catalogue(stage.model, params, run.dataset, run.tables.items)
  followers = {} if run.followers is None else run.followers._asdict()
  kept = Kept(stage.config, params, items, item_arrays, followers)
  kept_model.write(workdir, kept, run.dataset.identity(), made_from)
  return run.dataset, kept


def encode_catalogue(
  model: UR4Rec, params: Any, dataset: Dataset, tables: dict[str, TokenTable]
) -> dict[str, Any]:
  """Encodes the items of a dataset, see `scoring.item_arrays`.

  If the model embeds items by id alone, items that training has not seen get the mean vector of the
  most similar items.

  Args:
    model: the model.
    params: its parameters.
    dataset: the data that it was trained on.
    tables: content of the items.
  """
  arrays = jax.jit(functools.partial(scoring.item_arrays, model))(params, tables)
  if (cold := cold_items_of(model, dataset)) is not None:
    sasrec = arrays['sasrec']
    sasrec['vectors'] = with_mean_of_nearest(sasrec['vectors'], cold)
  return arrays


class TrainedRecommender(Recommender):
  """A recommender that has the training data and the whole model."""

  def __init__(
    self, kept: Kept, dataset: Dataset, about: dict[str, Any], approximate: bool = False
  ):
    """Places the catalogue on the device.

    Args:
      kept: the trained model.
      dataset: the data that it was trained on.
      about: dataset, config and, after the end of the run, protocol and metrics.
      approximate: whether to search large catalogues approximately.

    Raises:
      InputError: the model's scores cannot be searched approximately.
    """
    model = create_model(kept.config, dataset.num_items)
    if approximate and not model.is_sum:
      raise InputError(
        f'approximate: the fusion {model.fusion.kind} ranks each branch, and only sums of scores'
        ' can be searched approximately; leave it out'
      )
    self.config, self.dataset = kept.config, dataset
    self.model, self.params = model, kept.params
    self.program = jax.jit(scoring.make_program(model))
    self._new_items = NewItemEncoder(self.config, self.dataset, model, self.params)
    settings = Settings(
      branches=list(model.branches),
      share_names=scoring.share_names(model, list(self.config.modalities)),
      max_length=self.config.max_length,
      preferences={name: found.shape[1:] for name, found in self._user_features.items()},
      most_k=scoring.CANDIDATES if approximate else None,
      about=about,
    )
    self._followers = kept.followers
    self._new_pictures: list[pathlib.Path | None] = []
    self._set_catalogue(kept.items, kept.item_arrays, settings)

  def _set_catalogue(
    self, items: dict[str, list[str]], item_arrays: dict[str, Any], settings: Settings
  ) -> None:
    self.items, self._item_arrays = items, item_arrays
    approximate = settings.most_k is not None
    self.arrays = {
      'params': scoring.user_params(self.model, self.params),
      'items': item_arrays,
      **scoring.catalogue_arrays(self.model, item_arrays, approximate),
    }
    if self._followers:  # Nothing is known to follow new items.
      missing = len(items['ids']) + 1 - len(self._followers['items'])
      pad = lambda x: np.pad(x, ((0, missing), (0, 0)))
      self.arrays[scoring.FOLLOWERS] = jax.tree.map(pad, self._followers)
    super().__init__(self.program, self.arrays, items, settings)
    self.__dict__.pop('passages', None)  # It is computed again for the new items.

  @functools.cached_property
  def users(self) -> dict[str, int]:
    """Index of each user of the training data by original id."""
    return {name: i for i, name in enumerate(read_interactions(self.config.data_dir).user_ids)}

  @property
  def _user_features(self) -> dict[str, Features]:
    return self.dataset.user_features if self.model.retriever is not None else {}

  @functools.cached_property
  def _user_tables(self) -> dict[str, TokenTable]:
    data = dataclasses.replace(self.dataset, features={}, user_features=self._user_features)
    return read_tables(data, devices.compute_dtype(self.config.dtype)).users

  def _users_with_items(self) -> Users:
    return make_users(list(self.users), self.dataset.offsets, self.dataset.item_ids, {})

  def history(self, user: str | int) -> list[str]:
    """Returns all items of a user of the training data, the oldest first.

    Raises:
      InputError: there is no such user.
    """
    index = self._user_index(user)
    start, end = self.dataset.offsets[index : index + 2]
    return [self.item_ids[i - 1] for i in self.dataset.item_ids[start:end]]

  def _user_index(self, user: str | int) -> int:
    index = self.users.get(str(user))
    if index is None:
      raise InputError(
        f'user {str(user)!r}: is not in {self.config.data_dir}, whose first user is'
        f' {next(iter(self.users))!r}; give a history or a preference for a new user'
      )
    return index

  def recommend(
    self,
    history: Any = None,
    k: int = 10,
    *,
    user: Any = None,
    preference: str | None = None,
    explain: bool = False,
    **options: Any,
  ) -> Any:
    """Recommends items to one user or to many.

    Args:
      history: for one user a list of item ids, the oldest first. For many users a list of lists, a
        dict of lists by user, or a DataFrame with the columns `user` and `item`, whose rows are
        sorted by the column `timestamp` if there is one.
      k: number of items to recommend to each user.
      user: a user of the training data or a list of them, instead of a history.
      preference: what the user likes, in words; used for all users of the call.
      explain: whether to add reasons: `because` has the ids of the items of the history with the
        most influence, `why` names them in a sentence, and `sentence` is a passage of the item's
        text that no item with another text has; see `explanations.explain`. It takes as long as a
        recommendation to as many users as the history has items.
      **options: `only`, `without`, `keep_seen` and `weights` of `Query`.

    Returns:
      A pandas DataFrame with one row per user and item: `user` (if there are many), `rank`, `item`,
      `title`, `score`, and one column for each of `share_names`. Users who cannot be answered have
      no rows; a warning names them, and `.attrs['problems']` has the reasons by user.

    Raises:
      InputError: an argument is wrong, or no user can be answered.
    """
    histories, problems = self._histories(history, user)
    users = None if user is None else [self.users[str(name)] for name in histories.users]
    answer = self.ask(make_query(histories.items, k, options), users, preference).require_one()
    lost = [name for unknown in answer.unknown for name in unknown]
    if lost:
      warnings.warn(
        f'{len(lost)} items of the histories are not in the catalogue and were ignored, first'
        f' {lost[0]!r}',
        stacklevel=2,
      )
    named = zip(histories.users, answer.problems, strict=True)
    problems |= {name: problem for name, problem in named if problem}
    if problems:
      (name, first), *more = problems.items()
      others = f' (and {len(more)} others, see .attrs)' * bool(more)
      warnings.warn(f'user {name!r} gets no recommendations{others}: {first}', stacklevel=2)
    frame = frames.to_frame(answer, self.share_names, histories)
    if explain:
      given = options.get('weights')
      shape = len(histories.items), len(self.branches)
      weights = np.broadcast_to(1 if given is None else given, shape)
      reasons = [
        reason
        for i, (history, items) in enumerate(zip(histories.items, answer.items, strict=True))
        if items
        for reason in _explain(
          self, history, items, users and users[i : i + 1], preference, weights[i]
        )
      ]
      frame['because'] = [[named['item'] for named in reason['because']] for reason in reasons]
      frame['why'] = [reason['why'] for reason in reasons]
      frame['sentence'] = [(reason['text'] or {}).get('item', '') for reason in reasons]
    frame.attrs['problems'] = problems
    return frame

  def _histories(self, history: Any, user: Any) -> tuple[frames.Histories, dict[Any, str]]:
    """Returns the histories, and by name the problems of users who have none."""
    if history is not None and user is not None:
      raise InputError('history and user exclude each other; leave one out')
    if user is not None:
      is_one = isinstance(user, str | int | np.integer)
      names, found, problems = [user] if is_one else list(user), {}, {}
      for name in names:
        try:
          found[name] = self.history(name)
        except InputError as error:
          problems[name] = str(error)
      if problems and not found:
        raise InputError(next(iter(problems.values())))
      return frames.Histories(list(found), list(found.values()), is_one), problems
    if history is None:  # The preference alone describes the user.
      return frames.Histories([''], [[]], True), {}
    return frames.read_histories(history), {}

  def answer(
    self,
    histories: Sequence[Ids],
    k: int = 10,
    *,
    users: Sequence[int] | None = None,
    preference: str | None = None,
    **options: Any,
  ) -> Answer:
    """Recommends items without pandas: lists in, lists and arrays out.

    Args:
      histories: one list of item ids per user, the oldest item first.
      k: number of items to recommend to each user.
      users: the users' indices in the training data, if the model should read their own texts.
      preference: what the users like, in words; replaces their own texts.
      **options: `only`, `without`, `keep_seen` and `weights` of `Query`.

    Raises:
      InputError: an argument is wrong, or no user can be answered.
    """
    return self.ask(make_query(histories, k, options), users, preference).require_one()

  def ask(
    self, query: Query, users: Sequence[int] | None = None, preference: str | None = None
  ) -> Answer:
    """Answers a query; users who cannot be answered have a problem in the answer.

    Args:
      query: the query.
      users: the users' indices in the training data, if the model should read their own texts.
      preference: what the users like, in words; replaces their own texts.

    Raises:
      InputError: a value that concerns all users is wrong.
    """
    if users is not None:
      query = dataclasses.replace(query, preferences=self.preferences_of(users))
    if preference is None:
      return super().ask(query)
    self.check_k(query.k)
    recommender, checked = self._check_with_preference(query, preference)
    return recommender._answer(checked, query.rules)

  def _check_with_preference(
    self, query: Query, preference: str
  ) -> tuple['TrainedRecommender', CheckedQuery]:
    """Checks a query with a preference in words; returns the recommender that answers it, too."""
    if not isinstance(preference, str):
      raise InputError(f'preference: must be a text, not {preference!r:.80}')
    if TEXT not in self._user_features:
      return self._check_with_preference_as_item(query, preference)
    features = load_features(self.config.data_dir, 'user', TEXT, self.dataset.split_hash)
    count = len(query.histories)
    encoded = encode_like(features.folder, features.info, preference)
    tokens, mask = (np.repeat(x[None], count, axis=0) for x in encoded)
    preferences = {**(query.preferences or {}), TEXT: (tokens, mask)}
    return self, self.check(dataclasses.replace(query, preferences=preferences))

  def preferences_of(self, users: Sequence[int]) -> UserTokens:
    """Returns the users' own texts.

    Args:
      users: the users' indices in the training data; -1 for a user without texts.
    """
    rows = np.asarray(users, int)
    texts = {}
    for name, table in self._user_tables.items():
      tokens, mask = np.array(table.tokens[rows]), np.array(table.mask[rows])
      tokens[rows < 0], mask[rows < 0] = 0, False
      texts[name] = tokens, mask
    return texts

  def _check_with_preference_as_item(
    self, query: Query, preference: str
  ) -> tuple['TrainedRecommender', CheckedQuery]:
    """Puts an item with the preference as its text before the part of each history that is read."""
    if TEXT not in self.config.modalities:
      raise InputError(
        'preference: this model reads no texts, so it cannot use words; train a variant that reads'
        ' texts, e.g. --config=default:text, or give a history'
      )
    texts = self.dataset.features[TEXT]
    tokens, mask = encode_like(texts.folder, texts.info, preference)
    tables = {
      name: TokenTable(np.zeros((1, 1, features.shape[2]), np.float32), np.zeros((1, 1), bool))
      for name, features in self.dataset.features.items()
    }
    tables[TEXT] = TokenTable(tokens[None], mask[None])
    larger = self._with_items(NewItems([_PREFERENCE], ['the preference'], tables, [None]))
    # The model reads the latest `max_length` items, and the preference must be one of them.
    number, others = len(larger.item_ids), self.max_length - 1
    known = [
      h._replace(items=np.insert(h.items, max(len(h.items) - others, 0), number))
      for h in map(self.known, query.histories)
    ]
    query = dataclasses.replace(query, without=[*(query.without or ()), _PREFERENCE])
    return larger, larger.check_known(query, known)

  def influences(
    self,
    history: Ids,
    items: Ids,
    preferences: UserTokens | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    preference: str | None = None,
  ) -> np.ndarray:
    """Measures how much each item of a history raises the scores of some items.

    Args:
      history: as the other arguments and the result, see `Recommender.influences`.
      items: ids of catalogue items.
      preferences: the user's own texts.
      weights: factors of the branches' scores.
      preference: what the user likes, in words; it is never left out, and has no row.
    """
    if preference is None:
      return super().influences(history, items, preferences, weights)
    query = Query([history], 1, weights=weights, preferences=preferences)
    recommender, checked = self._check_with_preference(query, preference)
    numbers, is_item = self.lookup(items, 'items')[0], recommender is not self
    return recommender._influences(checked, numbers, len(self.item_ids), int(is_item))

  def add_items(
    self, source: str | pathlib.Path, pictures: str | pathlib.Path | None = None
  ) -> tuple['TrainedRecommender', list[str]]:
    """Appends items that training has not seen, described by their content.

    Args:
      source: a table of goods (.csv, .tsv, .parquet, .jsonl) with their ids, titles and
        descriptions, whose texts and pictures are encoded as those of the training data were; a
        prepared folder with features from the same encoders; or a .npz file with `ids` `[items]`,
        optionally `titles` `[items]`, and for each modality of the model `[items, tokens, width]`
        or `[items, width]`.
      pictures: folder of the pictures of a table of goods; None for the folder of the table.

    Returns:
      A recommender with the new items, and the ids of those that the catalogue already had; they
      stay as they are.

    Raises:
      InputError: the model knows items by their id only, the features are of other kinds, or an
        encoder is missing.
    """
    if not self.config.modalities:
      raise InputError(
        'add_items: this model knows items by their id only, so it cannot score new ones; train a'
        ' variant that reads content, e.g. --config=default:text'
      )
    modalities = {name: self.dataset.features[name] for name in self.config.modalities}
    options = self.dataset.info['options']
    found = read_new_items(source, modalities, options, self._number_of, pictures)
    is_known = np.array([name in self._number_of for name in found.ids], bool)
    known = found.select(np.flatnonzero(is_known)).ids
    new = found.select(np.flatnonzero(~is_known))
    has_content = np.any([table.mask.any(1) for table in new.tables.values()], axis=0)
    if not has_content.all():
      first = new.ids[int(np.argmin(has_content))]
      raise InputError(f'{source}: item {first!r} has no features; leave it out, or encode it')
    return (self._with_items(new) if new.ids else self), known

  def _with_items(self, new: NewItems) -> 'TrainedRecommender':
    """Returns a copy with more items. It shares the compiled programs with this recommender."""
    arrays = self._new_items.encode(new.tables, self._item_arrays)
    joined = jax.tree.map(
      lambda old, more: jnp.concatenate([old, more[1:]]), self._item_arrays, arrays
    )
    items = {'ids': [*self.item_ids, *new.ids], 'titles': [*self.titles, *new.titles]}
    larger = copy.copy(self)
    larger._set_catalogue(items, joined, self.settings)
    larger._new_pictures = [*self._new_pictures, *new.pictures]
    return larger

  def evaluate(self) -> dict[str, Any]:
    """Returns the metrics of the model at the end of its training.

    Returns:
      `test` and `valid` with their metrics, the `protocol`, and the `seed`.

    Raises:
      InputError: the training has not ended.
    """
    if 'test' not in self.about:
      raise InputError('evaluate: the training of this model has not ended; start it again')
    return {name: self.about[name] for name in ('test', 'valid', 'protocol', 'seed')}

  def export(self, out: str | pathlib.Path, with_users: bool = True) -> dict[str, Any]:
    """Writes the folder that `ur4rec serve` and `ur4rec_jax.exported.load` open.

    Args:
      out: the folder, which must not exist.
      with_users: whether requests can name the users of the data, whose histories are then in it.

    Returns:
      The manifest.
    """
    from ur4rec_jax.inference.exporting import export  # It is not needed to recommend.

    return export(self, out, with_users)

  def user_vectors(
    self, histories: Sequence[Ids], users: Sequence[int] | None = None
  ) -> np.ndarray:
    """Returns vectors whose inner products with `vectors.item_vectors` are the scores.

    Args:
      histories: one list of item ids per user, the oldest item first.
      users: the users' indices in the training data, if the model should read their own texts.

    Returns:
      `[users, width]` float32.

    Raises:
      InputError: a user has no known item and no text, or an argument is wrong.
    """
    texts = None if users is None else self.preferences_of(users)
    query = self.check(Query(histories, 1, preferences=texts))
    for i, problem in enumerate(query.problems):
      if problem:
        raise InputError(problem if len(histories) == 1 else f'user {i}: {problem}')
    encode, found = jax.jit(scoring.make_user_encoder(self.model)), []
    for start in range(0, len(histories), self.batch_sizes[-1]):
      rows = np.arange(start, min(start + self.batch_sizes[-1], len(histories)))
      inputs = self.program_inputs(query.select(rows))
      found.append(np.asarray(encode(self._arrays, inputs))[: len(rows)])
    return np.concatenate(found)

  def picture_files(self) -> list[pathlib.Path | None]:
    """Returns `[items]` the picture file of each item, None for items without one."""
    return [*item_pictures.find(self.config.data_dir), *self._new_pictures]

  @property
  def compares_ranks(self) -> bool:
    """Whether scores are made of ranks among all items and are not sums of branch scores."""
    return not self.model.is_sum

  @functools.cached_property
  def passages(self) -> list[list[str]]:
    """Distinctive passages of each item's text, see `passages.distinctive`."""
    texts = [[] for _ in self.item_ids]
    features = self.dataset.features.get(TEXT)
    if features is not None and not features.is_shuffled:
      tokens = features.shape[1] - 1
      for row, parts in enumerate(item_texts(self.config.data_dir, 'item', tokens)):
        texts[row] = parts[1:]  # The first one is the whole text.
    return distinctive(texts, self.titles)

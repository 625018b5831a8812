"""Starts a run with the parameters of another one, which may know fewer users and items.

Parameters are copied. The rows of item tables are matched by the original ids of the items. The row
of an item that the other run never trained on starts as the mean over similar items: the two with
the nearest content, or else the item's neighbours in the histories.
"""

import sys
from typing import Any

import jax
import numpy as np

from ur4rec_jax.data.dataset import Dataset, iterate_items, read_interactions
from ur4rec_jax.data.features import Features
from ur4rec_jax.encoders.pretrained import can_encode
from ur4rec_jax.errors import InputError, say
from ur4rec_jax.evaluation import cold_items
from ur4rec_jax.models.sasrec import OF_CONTENT
from ur4rec_jax.runs.checkpoint import read_latest
from ur4rec_jax.runs.config_checks import flatten
from ur4rec_jax.runs.open_run import Run, restore_best
from ur4rec_jax.runs.workdir import open_stored_run
from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.item_embeddings import ITEM_TABLE, map_item_tables
from ur4rec_jax.training.optimizers import by_name
from ur4rec_jax.training.train_state import TrainState

PyTree = Any
CARRY = 'carry'
# Fields of a model on which only training or its first parameters depend end with these.
_OF_TRAINING = ('dropout', 'item_scale', 'whitening', 'temperature')
_NEIGHBOURS = 2  # Items before and after an item in a history that count as its neighbours.


def users_to_train(run: Run) -> np.ndarray | None:
  """Chooses the users that a warm start trains on.

  Args:
    run: the run, with `config.init`.

  Returns:
    `[users]` bool: those with training events that the run before did not have, and a random share
    `config.init.replay` of the others. None for all users.
  """
  config = run.config
  if not config.init.run or config.init.replay == 1:
    return None
  has_new = users_with_new_events(run, open_before(run), in_training=True)
  drawn = np.random.default_rng((config.seed, 1)).random(len(has_new)) < config.init.replay
  return has_new | drawn


def users_with_new_events(run: Run, before: Run, in_training: bool = False) -> np.ndarray:
  """Tells which users have more events than in the data of an earlier run.

  Args:
    run: on the new data.
    before: on the old data.
    in_training: whether only the events that training sees count.

  Returns:
    `[users]` bool.
  """
  known, now = (
    (x.dataset.split.train_lengths if in_training else x.dataset.lengths).tolist()
    for x in (before, run)
  )
  names = [read_interactions(x.config.data_dir).user_ids for x in (before, run)]
  old = dict(zip(names[0], known, strict=True))
  return np.array([count > old.get(name, 0) for name, count in zip(names[1], now, strict=True)])


def warm_state(run: Run) -> TrainState:
  """Returns the state that a run starts with, NumPy, with padded item tables.

  Args:
    run: the run, with `config.init`.

  Raises:
    InputError: the run to start from has another model, or is not there.
  """
  with jax.transfer_guard('allow'):  # It runs once, and much of it is on the host.
    return jax.device_get(run.embeddings.pad(_warm_state(run)))


def _warm_state(run: Run) -> TrainState:
  fresh = jax.device_get(jax.jit(run.create_state)())
  before = open_before(run)
  if devices.is_main_process() and (warning := other_model_warning(run, before)):
    say(warning, sys.stderr)
  rows = _rows_before(run, before)
  state = fresh.replace(params=_grown(run, before, rows, fresh.params))
  if run.config.init.moments == CARRY:
    stored = before.stored()
    arrays, _ = read_latest(run.config.init.run, stored, before.stored_axes(stored))
    moments = before.embeddings.unpad(jax.device_get(arrays['state'].opt_state))
    _check_same(run, fresh.opt_state, moments)
    state = state.replace(opt_state=_mapped(fresh.opt_state, moments, rows))
  return state


def warm_params(run: Run) -> PyTree:
  """Returns only the parameters of `warm_state`: the old model with rows for the new items."""
  fresh = jax.device_get(jax.jit(run.create_state)().params)
  before = open_before(run)
  return _grown(run, before, _rows_before(run, before), fresh)


def open_before(run: Run) -> Run:
  """Opens the run that `config.init.run` names.

  Raises:
    InputError: that is impossible, it has learned what this run holds out, or its model reads
      other embeddings.
  """
  try:
    before = open_stored_run(run.config.init.run)
  except InputError as error:
    raise InputError(f'config.init.run={run.config.init.run}: {error}') from error
  for field in ('train_on', 'split'):
    then, now = before.config[field], run.config[field]
    if run.config.train_on == 'training' and then != now:
      raise InputError(
        f'config.init.run={run.config.init.run}: was trained with config.{field}={then}, so it has'
        f' learned events that this run, with config.{field}={now}, would be measured on; start'
        ' from another run, or measure nothing: --config.train_on=all --config.keep=last'
      )
  config = run.config
  if 'retriever' in config.branches or config.sasrec.item_input in OF_CONTENT:
    _check_same_embeddings(run, before)
  return before


def other_model_warning(run: Run, before: Run) -> str:
  """Warns of fields by which the same parameters make another model; empty if there are none."""
  parts = (*run.config.branches, 'content', 'fusion')
  now, then = (flatten(x.config.to_dict()) for x in (run, before))
  differing = [
    f'config.{name} is {now[name]!r} here and {then[name]!r} there'
    for name in now
    if name.startswith(tuple(f'{part}.' for part in parts))
    and not name.endswith(_OF_TRAINING)
    and now[name] != then[name]
  ]
  return bool(differing) * (
    f'warning: config.init.run={run.config.init.run}: was trained as another model:'
    f' {"; ".join(differing)}. Its parameters fit, but may mean something else'
  )


def _check_same_embeddings(run: Run, before: Run) -> None:
  """Raises InputError if features lie in another space, though they may have the same width."""
  for of, features in run.dataset.all_features.items():
    earlier = before.dataset.all_features[of]
    for name in features.keys() & earlier.keys():
      if _space(features[name]) != _space(earlier[name]):
        raise InputError(
          f'config.init.run={run.config.init.run}: its model reads {of} embeddings {name} that were'
          f' made in another way ({earlier[name].folder}) than {features[name].folder}; encode the'
          ' new data with the encoder and the flags of the old ones, after build_dataset --append'
        )


def _space(features: Features) -> tuple[Any, ...]:
  """Returns what embeddings must have in common to be compared; imported ones name only a file."""
  info, made_by = features.info, features.info['encoder']
  encoder = (made_by['name'], made_by.get('sha256')) if can_encode(made_by) else None
  return encoder, info['projection'], info['is_normalised']


def _grown(run: Run, before: Run, rows: np.ndarray, fresh: PyTree) -> PyTree:
  """Returns the best parameters of the earlier run, with rows for the items of the new one."""
  params = jax.device_get(restore_best(before, run.config.init.run)[1])
  _check_same(run, fresh, params)
  grown = _mapped(fresh, params, rows)
  return map_item_tables(_Newcomers(run, before, rows).start, grown)


def _rows_before(run: Run, before: Run) -> np.ndarray:
  """Returns `[items + 1]` the row of each item in the earlier run, -1 if it had none."""
  ids = ([item['original_id'] for item in iterate_items(x.config.data_dir)] for x in (before, run))
  places = {name: i for i, name in enumerate(next(ids), 1)}
  return np.array([0, *(places.get(name, -1) for name in next(ids))], np.int64)


def _check_same(run: Run, fresh: PyTree, stored: PyTree) -> None:
  """Raises InputError unless both trees differ only in the number of rows of item tables."""
  shapes_of = lambda tree: {
    name: ('rows', *x.shape[1:]) if name.endswith(ITEM_TABLE) else x.shape
    for name, x in by_name(tree).items()
  }
  here, there = shapes_of(fresh), shapes_of(stored)
  if here != there:
    name = next(x for x in sorted(here | there) if here.get(x) != there.get(x))
    raise InputError(
      f'config.init.run={run.config.init.run}: has another model: {name} is'
      f' {there.get(name, "missing")} there and {here.get(name, "missing")} here; start with the'
      ' config of that run, apart from the data'
    )


def _mapped(fresh: PyTree, stored: PyTree, rows: np.ndarray) -> PyTree:
  """Returns `stored` with the rows of item tables in the order of the new run."""
  is_known = rows >= 0

  def of_items(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    grown = np.array(new)
    grown[is_known] = old[rows[is_known]]
    return grown

  return map_item_tables(of_items, fresh, lambda new, old: np.asarray(old), stored)


class _Newcomers:
  """The items that the earlier run never trained on, and the items like them."""

  def __init__(self, run: Run, before: Run, rows: np.ndarray):
    """Finds the new items, and for each the known items like it.

    Args:
      run: on the new data.
      before: on the old data.
      rows: from `_rows_before`.
    """
    trained = cold_items.warm_items(before.dataset)
    is_known = np.where(rows > 0, trained[rows], False)
    is_new = ~is_known
    is_new[0] = False
    self._by_content = None
    if is_new.any():
      self._by_content = cold_items.find_cold_items(
        cold_items.first_tokens(run.dataset), is_new, is_known, run.config.sasrec.dim
      )
    if self._by_content is not None:
      is_new[self._by_content.items] = False
    self._pairs = _neighbours(run.dataset.train_part(), is_new, is_known)

  def start(self, table: np.ndarray) -> np.ndarray:
    """Replaces the rows of new items in a table by means of rows that training has seen."""
    table = np.array(table)
    new, like = self._pairs
    if len(new):
      sums = np.zeros((len(table), table.shape[1]), np.float64)
      np.add.at(sums, new, table[like])
      found, counts = np.unique(new, return_counts=True)
      table[found] = (sums[found] / counts[:, None]).astype(table.dtype)
    if self._by_content is not None:
      items, nearest = self._by_content
      table[items] = table[nearest].mean(1)
    return table


def _neighbours(
  train: Dataset, is_new: np.ndarray, is_known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Lists `[pairs]` new items, and `[pairs]` known items near them in the same history."""
  items, owners = train.item_ids, train.owners
  pairs = [np.zeros((2, 0), np.int64)]
  for distance in range(1, _NEIGHBOURS + 1):
    first, second = items[:-distance], items[distance:]
    is_same = owners[:-distance] == owners[distance:]
    for new, like in ((first, second), (second, first)):
      chosen = is_same & is_new[new] & is_known[like]
      pairs.append(np.stack([new[chosen], like[chosen]]))
  new, like = np.concatenate(pairs, axis=1)
  return new, like

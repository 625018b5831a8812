"""The project's own programs, lowered for devices that need not be here.

Their data have the sizes of a dataset, and their values do not matter: lengths of histories are
drawn from the seed, contents are zeros.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.speed.ur4rec_side import make_dataset
from ur4rec_jax.data.features import Features, TokenTable
from ur4rec_jax.evaluation.evaluate import EvalData, make_encode_step, make_eval_step
from ur4rec_jax.evaluation.queries import make_queries, pack_queries
from ur4rec_jax.inference import scoring, stored_format
from ur4rec_jax.runs.open_run import Run, make_run
from ur4rec_jax.runs.train_loop import plan_batches
from ur4rec_jax.sharding import devices
from ur4rec_jax.training.stages import stage_numbers
from ur4rec_jax.training.train_data import make_train_data, train_data_axes
from ur4rec_jax.training.train_step import make_train_step

PyTree = Any
# Tokens and width of what the encoders of data_prep write: Sentence-BERT's MiniLM and CLIP.
_CONTENT = {'text': (8, 384), 'image': (1, 512)}
_STEPS = 2  # Steps in one dispatch; the plan of more of them takes a little more memory.
SERVED_USERS, EXCLUDED, TOP = 64, 256, 10  # Shape of a request to the exported program.


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Counts of a dataset.

  Attributes:
    users: number of users.
    items: size of the catalogue.
    length: median length of a history.
  """

  users: int = 6040
  items: int = 3416
  length: int = 96


class _Zeros(Features):
  """Content of zeros, which takes no memory until it is read."""

  def table(self, dtype: Any = np.float32) -> TokenTable:
    rows, tokens, width = self.shape
    tokens = min(self.max_tokens or tokens, tokens)
    shape = rows + 1, tokens
    return TokenTable(np.zeros((*shape, width), dtype), np.zeros(shape, bool))


def history_lengths(sizes: Sizes) -> np.ndarray:
  """Draws a length for each user; those of ML-1M are about log-normal, from 16 to 2,300."""
  lengths = np.random.default_rng(0).lognormal(np.log(sizes.length - 10), 1.05, sizes.users)
  return np.clip(lengths.astype(int) + 10, 16, 24 * sizes.length)


def generate_run(config: ConfigDict, sizes: Sizes) -> Run:
  """Opens a run on generated data of the given sizes."""
  offsets = np.concatenate([[0], np.cumsum(history_lengths(sizes))])
  rng = np.random.default_rng(1)
  item_ids = rng.integers(1, sizes.items + 1, offsets[-1]).astype(np.int32)
  dataset = make_dataset(item_ids, offsets, sizes.items)
  features = lambda rows, names, cut: {name: _zeros(rows, *_CONTENT[name], cut) for name in names}
  dataset = dataclasses.replace(
    dataset,
    features=features(sizes.items, config.modalities, config.max_item_tokens),
    user_features=features(sizes.users, config.user_modalities, 0),
  )
  return make_run(config, dataset)


def _zeros(rows: int, tokens: int, width: int, max_tokens: int) -> _Zeros:
  info = {'rows': rows, 'tokens': tokens, 'width': width, 'hold_back': 0.2}
  return _Zeros(pathlib.Path(), info, {}, max_tokens=max_tokens)


def train(run: Run) -> jax.stages.Lowered:
  """Lowers the step of the run's last stage, as `TrainLoop` maps it."""
  embeddings, stage = run.embeddings, run.stages[-1]
  batches = plan_batches(run)
  state = jax.eval_shape(embeddings.pad, run.shapes)
  axes, data_axes = embeddings.axes(state), train_data_axes(embeddings)
  tables = run.tables._replace(items=embeddings.pad_features(run.tables.items))
  plan = jax.tree.map(lambda x: x[:_STEPS], batches.epoch(0))
  max_turns = max(len(stage.alternation) for stage in run.stages)
  return devices.lower(
    make_train_step(run.tx, run.labels, stage, embeddings),
    in_axes=(axes, data_axes, 0, None, None),
    donate_argnums=(0,),
    out_axes=(axes, None),
    shapes=(
      _placed(state, axes),
      _placed(make_train_data(run.dataset, tables), data_axes),
      devices.deal(plan),
      np.int32(_STEPS),
      stage_numbers(stage, run.labels, batches.steps_per_epoch, max_turns),
    ),
  )


def evaluate(run: Run) -> jax.stages.Lowered:
  """Lowers the ranking of one batch of users on each device, as `make_evaluator` maps it."""
  model, embeddings = run.stages[-1].model, run.embeddings
  params = jax.eval_shape(embeddings.pad, run.shapes).params
  axes = embeddings.axes(params)
  items = embeddings.pad_features(run.tables.items)
  data = EvalData(
    dataset=run.dataset,
    protocol=run.protocol,
    users_per_batch=run.config.evaluation.batch_size,
    item_ids=run.dataset.item_ids,
    tables=run.tables,
    embeddings=embeddings,
    params_axes=axes,
  )
  queries = make_queries(run.dataset, 'test', run.protocol)
  batches, _ = pack_queries(queries, model.max_length, data.users_per_batch)
  capacity = max(1, int(batches.seen_lengths.sum(-1).max()))
  params = _placed(params, axes)
  encode = make_encode_step(model, data)
  if embeddings.is_sharded:
    lowered = devices.lower(encode, (axes, 0), (), 0, (params, _placed(items, 0)))
    catalogue = lowered.out_info
  else:
    catalogue = jax.eval_shape(encode, params, items)
  return devices.lower(
    make_eval_step(model, embeddings, capacity),
    (axes, embeddings.axis, None, None, None, 0),
    (),
    None,
    (
      params,
      catalogue,
      run.tables.users,
      run.followers,
      run.dataset.item_ids,
      jax.tree.map(lambda x: x[: devices.device_count()], batches),
    ),
  )


def export(run: Run) -> jax.stages.Lowered:
  """Lowers the program that `ur4rec_jax.export` stores, on one device."""
  model, num_items = run.stages[-1].model, run.dataset.num_items
  shape = jax.ShapeDtypeStruct

  def arrays(params: PyTree, features: PyTree) -> PyTree:
    items = scoring.item_arrays(model, params, features)
    of_users = scoring.user_params(model, params)
    followers = {} if run.followers is None else {scoring.FOLLOWERS: run.followers._asdict()}
    of_all_items = scoring.catalogue_arrays(model, items) | followers
    return {'params': of_users, 'items': items, **of_all_items}

  users = run.tables.users if model.retriever is not None else {}
  queries = {
    stored_format.HISTORY: shape((SERVED_USERS, run.config.max_length), jnp.int32),
    stored_format.EXCLUDED: shape((SERVED_USERS, EXCLUDED), jnp.int32),
    stored_format.ALLOWED: shape((num_items + 1,), jnp.bool),
    stored_format.WEIGHTS: shape((SERVED_USERS, len(model.branches)), jnp.float32),
    stored_format.PREFERENCES: {
      name: {
        'tokens': shape((SERVED_USERS, *table.tokens.shape[1:]), jnp.float32),
        'mask': shape((SERVED_USERS, table.mask.shape[1]), jnp.bool),
      }
      for name, table in users.items()
    },
    stored_format.POSITIONS: shape((TOP,), jnp.int8),
  }
  shapes = jax.eval_shape(arrays, run.shapes.params, run.tables.items), queries
  return jax.jit(scoring.make_program(model)).lower(*devices.on_one_device(shapes))


PROGRAMS: dict[str, Callable[[Run], jax.stages.Lowered]] = {
  'train': train,
  'evaluate': evaluate,
  'export': export,
}


def _placed(tree: PyTree, axes: PyTree) -> PyTree:
  """Returns the shapes that `devices.place` would give, over all devices."""
  count = devices.device_count()

  def of(axis: int | None, subtree: PyTree) -> PyTree:
    if axis is None:
      return subtree
    cut = lambda x: jax.ShapeDtypeStruct((count, x.shape[0] // count, *x.shape[1:]), x.dtype)
    return jax.tree.map(cut, subtree)

  return jax.tree.map(of, axes, tree, is_leaf=lambda x: x is None)

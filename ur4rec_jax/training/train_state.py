"""The state of a training step, and the progress of a run, which checkpoints save."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ur4rec_jax.data.features import Tables
from ur4rec_jax.data.input_pipeline import Batch, gather_preferences
from ur4rec_jax.errors import InputError

PyTree = Any
SELECTION_METRIC = 'ndcg@10'
NEVER = -1


class StageState(NamedTuple):
  """The position in a stage. All fields are `[]`; `turn` changes only if groups alternate.

  Attributes:
    step: int32, steps of this stage.
    turn: int32, index of the group that is trained.
    average: float32, moving average of the loss.
    lowest: float32, lowest average in this turn.
    waited: int32, steps since the turn began or, with the adaptive rule, since the lowest average.
  """

  step: jax.Array
  turn: jax.Array
  average: jax.Array
  lowest: jax.Array
  waited: jax.Array


def start_of_stage() -> StageState:
  """Returns the position at which every stage starts."""
  zero, infinity = np.int32(0), np.float32(np.inf)
  return StageState(zero, zero, infinity, infinity, zero)


class TrainState(flax.struct.PyTreeNode):
  """Everything that changes from step to step, and the root of all randomness.

  Attributes:
    step: `[]` int32, optimizer steps taken.
    params: the model's parameters.
    opt_state: the optimizer's state.
    root_key: `[2]` uint32, never changes; step n uses `fold_in(root_key, n)`.
    stage: position in the current stage.
  """

  step: jax.Array
  params: PyTree
  opt_state: optax.OptState
  root_key: jax.Array
  stage: StageState


def parameter_shapes(model: nn.Module, tables: Tables) -> PyTree:
  """Returns the shapes of the model's parameters; arguments as in `create_train_state`."""
  return jax.eval_shape(lambda: _initial_parameters(model, tables, jax.random.key(0)))


def _initial_parameters(model: nn.Module, tables: Tables, key: jax.Array) -> PyTree:
  # Only shapes matter: under jit or eval_shape, values computed from these zeros are dropped.
  empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tables)
  ones, zeros = jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
  preferences = gather_preferences(empty.users, Batch(ones, ones, ones, ones, zeros))
  return model.init(key, empty.items, ones, ones, preferences, method='encode')['params']


def create_train_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  seed: int,
  tables: Tables,
) -> TrainState:
  """Initialises parameters and optimizer from one seed, on the default device.

  Args:
    model: has `encode`, see `UR4Rec`.
    tx: optimizer.
    seed: seed of the parameters and of all randomness in training.
    tables: tokens of items and users; only their shapes matter.
  """

  @jax.jit
  def create() -> TrainState:
    init_key, root_key = jax.random.split(jax.random.key(seed))
    params = _initial_parameters(model, tables, init_key)
    step = jnp.zeros((), jnp.int32)
    root_key = jax.random.key_data(root_key)
    stage = jax.tree.map(jnp.asarray, start_of_stage())
    return TrainState(step, params, tx.init(params), root_key, stage)

  return create()


@dataclasses.dataclass
class StageProgress:
  """The outcome of a stage so far.

  Attributes:
    start: step of the run at which it began.
    best_step: step of the run at the stage's best validation.
    best_epoch: epochs of the stage at that step.
    valid: metrics of that validation; None before the first.
  """

  start: int
  best_step: int = 0
  best_epoch: int = 0
  valid: dict[str, float] | None = None


@dataclasses.dataclass
class TrainProgress:
  """Host state of a run, saved with every checkpoint.

  Attributes:
    step: optimizer steps taken.
    stages: those that have begun; the last one is the current one.
    validated_step: step of the last validation in this stage, `NEVER` before one. The first
      stage starts validated, as its initial parameters need no validation.
    metrics_size: bytes of `metrics.jsonl` written so far.
    seconds: time spent training and validating, over all starts.
  """

  step: int = 0
  stages: list[StageProgress] = dataclasses.field(default_factory=lambda: [StageProgress(0)])
  validated_step: int = 0
  metrics_size: int = 0
  seconds: float = 0.0

  @property
  def stage(self) -> StageProgress:
    return self.stages[-1]

  @property
  def best_stage(self) -> int | None:
    """The first stage with the best validation of the run; None before the first validation."""
    scores = {i: s.valid[SELECTION_METRIC] for i, s in enumerate(self.stages) if s.valid}
    return max(scores, key=scores.get, default=None)

  @classmethod
  def from_json(cls, content: dict) -> 'TrainProgress':
    """Undoes `dataclasses.asdict`; InputError if another version stored other fields."""
    try:
      return cls(**content | {'stages': [StageProgress(**stage) for stage in content['stages']]})
    except (LookupError, TypeError) as error:
      raise InputError(
        f"the checkpoints' record of progress is of another version of the program ({error}); go "
        'on with that version, or train again in another --workdir'
      ) from error


def saved_tree(state: TrainState, num_stages: int) -> dict[str, PyTree]:
  """Returns the shapes of a checkpoint's arrays: the state and the best parameters by stage."""
  stacked = lambda x: jax.ShapeDtypeStruct((num_stages, *x.shape), x.dtype)
  return {'state': state, 'best_params': jax.tree.map(stacked, state.params)}


@functools.partial(jax.jit, static_argnums=1)
def repeat_params(params: PyTree, num_stages: int) -> PyTree:
  """Stacks the same parameters to `[stages, ...]`."""
  return jax.tree.map(lambda x: jnp.stack([x] * num_stages), params)


@functools.partial(jax.jit, donate_argnums=0)
def put_params(best_params: PyTree, params: PyTree, stage: jax.Array) -> PyTree:
  """Replaces the parameters of one stage in stacked parameters `[stages, ...]`."""
  return jax.tree.map(lambda best, x: best.at[stage].set(x), best_params, params)


@jax.jit
def params_of_stage(best_params: PyTree, stage: jax.Array) -> PyTree:
  """Returns the parameters of one stage from stacked parameters `[stages, ...]`."""
  return jax.tree.map(lambda best: best[stage], best_params)

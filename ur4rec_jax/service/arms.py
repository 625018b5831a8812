"""The arms of an experiment in a running service: the users and the model of each arm."""

import asyncio
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ur4rec_jax.errors import InputError, as_reported, say
from ur4rec_jax.inference import exported, rules
from ur4rec_jax.online import experiments
from ur4rec_jax.online.experiments import Arm, Experiment
from ur4rec_jax.service.http_schema import MOST_WEIGHT

if TYPE_CHECKING:
  from ur4rec_jax.service.http_app import Model

WATCH_SECONDS = 1


class Arms:
  """Chooses the arm of each user by the latest version of the experiment's files.

  Attributes:
    names: names of the arms.
    own_models: the models of the arms' exports, each once.
  """

  def __init__(
    self, path: str, open_model: Callable[[str], 'Model'], shared: Iterable['Model'] = ()
  ):
    """Reads the experiment and opens the exports of its arms.

    Args:
      path: the file of the experiment.
      open_model: opens an exported folder.
      shared: models that are open already. An arm with the same export uses them.

    Raises:
      InputError: the file is wrong, or an arm's export cannot be opened.
    """
    self._path = path
    self._seen = self._looked_at = self._contents()
    self._experiment = experiments.read(path)
    self._stopped = experiments.read_stopped(self._experiment)
    if self._experiment.assignment != 'hash':
      raise InputError(
        f'{path}: assignment must be "hash", so that the service can choose the arms'
      )
    self.names = [arm.name for arm in self._experiment.arms]
    self._model_of: dict[str, Model] = {}
    by_digest = {model.digest: model for model in shared}
    known = set(by_digest)
    for arm in self._experiment.arms:
      if 'export' in arm.settings:
        folder = str(pathlib.Path(path).parent / pathlib.Path(arm.settings['export']).expanduser())
        digest = exported.model_hash(folder)[:12]
        if digest not in by_digest:
          by_digest[digest] = open_model(folder)
        self._model_of[arm.name] = by_digest[digest]
    self.own_models = [model for digest, model in by_digest.items() if digest not in known]

  def choose(self, user: str | None) -> str | None:
    """Returns the name of a user's arm; None for users outside of the experiment.

    Args:
      user: id of the user; None for a history without a user.
    """
    if user is None:
      return None
    arm = experiments.assign(self._experiment, user, time.time(), self._stopped)
    return arm.name if arm else None

  def models(self, default: 'Model') -> dict[str, 'Model']:
    """Returns the model of each arm by name, with the arm's weights and rules.

    Args:
      default: the model of the service, which arms without an export use.

    Raises:
      InputError: weights or rules do not fit the model.
    """
    return {arm.name: self._model(arm, default) for arm in self._experiment.arms}

  def _model(self, arm: Arm, default: 'Model') -> 'Model':
    model = self._model_of.get(arm.name, default)
    where = f'{self._path}: arm {arm.name!r}'
    weights = _checked_weights(arm.settings.get('weights', {}), model.recommender.branches, where)
    found = arm.settings.get('rules')
    if found is None:
      return model._replace(weights=weights)
    ids = model.recommender.item_ids
    if isinstance(found, str):
      found = rules.load(pathlib.Path(self._path).parent / found, ids)
    else:
      found = rules.make(found, pathlib.Path(self._path), ids)
    return model._replace(weights=weights, rules=found)

  async def watch(self) -> None:
    """Applies changes of the files, until the task is cancelled."""
    while True:
      await asyncio.sleep(WATCH_SECONDS)
      self.refresh()

  def refresh(self) -> None:
    """Reads the files again if they have changed; a wrong file is reported and changes nothing."""
    before, self._looked_at = self._looked_at, self._contents()
    # Many editors write a file in parts, so a change counts once two looks find the same content.
    if self._looked_at == self._seen or self._looked_at != before:
      return
    self._seen = self._looked_at
    try:
      experiment = experiments.read(self._path)
      stopped = experiments.read_stopped(experiment)
      if _fixed(experiment) != _fixed(self._experiment):
        raise InputError(
          f'{self._path}: has another salt, other arms, shares or settings, which need a new start'
          ' of the service'
        )
    except Exception as error:  # The file can be corrected while the service goes on.
      say(f'the experiment goes on as before: {as_reported(error) or repr(error)}', sys.stderr)
      return
    self._experiment, self._stopped = experiment, stopped
    all_stopped = [arm.name for arm in experiment.arms if arm.stopped or arm.name in stopped]
    say(f'experiment {experiment.name}: stopped arms: {", ".join(all_stopped) or "none"}')

  def _contents(self) -> list[bytes | None]:
    return [_content(path) for path in (self._path, experiments.stopped_file(self._path))]


def _fixed(experiment: Experiment) -> Any:
  """Returns the parts of an experiment that must not change while it is served."""
  arms = [(arm.name, arm.share, arm.settings) for arm in experiment.arms]
  return experiment.name, experiment.salt, experiment.assignment, arms


def _content(path: str | pathlib.Path) -> bytes | None:
  try:
    return pathlib.Path(path).read_bytes()
  except OSError:  # The reader of the file reports the error.
    return None


def _checked_weights(
  weights: Mapping[str, Any], branches: Iterable[str], where: str
) -> dict[str, float]:
  for name, value in weights.items():
    if name not in branches:
      raise InputError(
        f'{where}: weights: the model has no branch {name!r}; it has {", ".join(branches)}'
      )
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MOST_WEIGHT:  # False for NaN, too.
      raise InputError(
        f'{where}: weights: {name} must be a number from 0 to {MOST_WEIGHT}, not {value!r}'
      )
  return {name: float(value) for name, value in weights.items()}

"""Searches for good settings: Optuna proposes variants of a config, and weak ones end early.

A trial is a run like any other, in `WORKDIR/VARIANT/seedN`. Its value is its best validation; test
items decide nothing. `WORKDIR/search.db` remembers all trials, so the same command goes on.
"""

import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import load_dataset
from ur4rec_jax.errors import InputError, counted, say
from ur4rec_jax.files import only_process, write_file
from ur4rec_jax.runs import train_loop
from ur4rec_jax.runs.config_checks import flatten
from ur4rec_jax.runs.config_files import call_function
from ur4rec_jax.runs.knobs import CHANGEABLE
from ur4rec_jax.runs.sweep import (
  METRIC,
  Member,
  failure,
  is_finished,
  is_mistake,
  make_members,
  read_run,
)
from ur4rec_jax.runs.trials_page import Table, settings_text, trials_page

if TYPE_CHECKING:
  import optuna

PAGE, RECORD = 'search.html', 'search.json'
_UNPRUNED_TRIALS = 4  # They give the median validation at each epoch, for pruning later trials.
_SHOWN = 10  # Trials in the table on the terminal.
_HOW = 'Share of each parameter in the differences between good trials and all trials (PED-ANOVA).'


class Pruned(Exception):
  """A run is worse than the others were at the same epoch."""


def run_search(config: ConfigDict, workdir: str, place: str, trials: int) -> dict[str, Any]:
  """Runs trials until `trials` have ended, and prints which settings are best and which matter.

  Args:
    config: the config that all trials share.
    workdir: holds a folder for each trial.
    place: `FILE.py:FUNCTION`, or `FILE.py` for its `get_search`. The function gets an
      `optuna.Trial` and returns the fields to override, by dotted name.
    trials: number of ended trials to reach, those of earlier calls included.

  Returns:
    The contents of `search.json`, see `summarise`.

  Raises:
    InputError: the function or a config is impossible, the earlier trials had another config or
      other data, or there are several processes.
    BusyError: another search works in the folder.
  """
  if jax.process_count() > 1:
    raise InputError('--search works in one process; give each process a search of its own')
  optuna, space = _optuna(), _space(place)
  from optuna.trial import TrialState

  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  busy = f'another search works in {workdir}; wait for it, stop it, or use another --workdir'
  with only_process(folder / 'search.lock', busy):  # A second one would repeat its running trial.
    study = _open_study(optuna, folder.absolute() / 'search.db')
    _check_same_search(study, config, workdir)
    # With the seed alone, each start would draw the settings of the first trial again.
    study.sampler = optuna.samplers.TPESampler(
      seed=(config.seed + len(study.trials)) % 2**32, n_startup_trials=_UNPRUNED_TRIALS
    )
    _ask_again_for_stopped(study)
    before = _count_ended(study)
    while (ended := _count_ended(study)) < trials:
      trial = study.ask()
      try:
        member = _member(config, space, trial, place)
        say(f'trial {ended + 1} of {trials}: {member.variant or "config"}')
        value = _train(trial, member, folder)
      except Pruned:
        study.tell(trial, state=TrialState.PRUNED)
        say('ended early: worse than the median of the others at this epoch')
      except Exception as error:
        reason = failure(error)
        if reason is None:  # The trial stays open, and the next start goes on with it.
          raise
        if is_mistake(reason) and ended == before:  # One of the function, which all trials have.
          study.tell(trial, state=TrialState.FAIL)
          raise
        trial.set_user_attr('failed', str(reason))
        study.tell(trial, state=TrialState.FAIL)
        say(f'{reason}; the search goes on without it', sys.stderr)
      else:
        study.tell(trial, value)
  summary = summarise(study)
  write_file(folder / RECORD, json.dumps(summary, indent=2) + '\n')
  write_file(folder / PAGE, _page(summary, workdir))
  say(f'\n{_table(summary)}\n')
  say('\n'.join(_last_lines(summary, folder)))
  return summary


def _optuna() -> Any:
  try:
    import optuna
  except ImportError as error:
    raise InputError(
      "--search needs Optuna: pip install 'ur4rec-jax[search]' (in a clone: -e '.[search]')"
    ) from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  logging.getLogger('alembic').setLevel(logging.WARNING)
  return optuna


def _open_study(optuna: Any, database: pathlib.Path) -> 'optuna.Study':
  try:
    return optuna.create_study(
      study_name='search',
      storage=f'sqlite:///{database}',
      load_if_exists=True,
      direction='maximize',
      pruner=optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED_TRIALS),
    )
  except Exception as error:  # Optuna and its database library have many kinds.
    reason = (str(error).splitlines() or [repr(error)])[0]
    raise InputError(
      f'{database}: cannot be opened ({reason:.200}); put back a copy, or remove it to search anew'
    ) from error


def _space(place: str) -> Callable[['optuna.Trial'], dict[str, Any]]:
  path, _, name = place.partition(':')

  def space(trial: 'optuna.Trial') -> dict[str, Any]:
    return call_function(path, name or 'get_search', trial)

  return space


def _member(config: ConfigDict, space: Callable, trial: 'optuna.Trial', place: str) -> Member:
  try:
    overrides = space(trial)
    if not isinstance(overrides, dict):
      raise InputError("must return a dict such as {'sasrec.dropout': trial.suggest_float(...)}")
    trial.set_user_attr('overrides', json.loads(json.dumps(overrides)))
    (member,) = make_members(config, (), [overrides])
  except (InputError, TypeError) as error:  # JSON has no numbers of NumPy, for example.
    raise InputError(f'--search={place}: {error}') from error
  trial.set_user_attr('folder', member.name)
  return member


def _train(trial: 'optuna.Trial', member: Member, workdir: pathlib.Path) -> float:
  """Trains the run of a trial, and returns its best validation.

  Raises:
    Pruned: it is worse than the others were.
  """
  reported = set()

  def report(epoch: int, score: float) -> None:
    if epoch in reported:  # It is from a later stage, which counts epochs from 0 again.
      return
    reported.add(epoch)
    trial.report(score, epoch)
    if trial.should_prune():
      raise Pruned

  folder = workdir / member.name
  try:
    if not is_finished(folder, member.config):
      train_loop.train_and_evaluate(member.config, str(folder), report)
  finally:
    jax.clear_caches()  # See `run_sweep`.
  return read_run(folder)[0]['valid'][METRIC]


def _check_same_search(study: 'optuna.Study', config: ConfigDict, workdir: str) -> None:
  """Raises InputError if earlier trials had another config or other data, which a search notes.

  Their values would not compare with those of new trials.
  """
  dataset = load_dataset(config.data_dir, config.split).identity()
  now = flatten({'dataset': dataset, 'config': config.to_dict()})
  before = study.user_attrs.get('searched') or now
  free = {f'config.{name}' for name in CHANGEABLE}
  for name in sorted((before | now).keys() - free):
    if before.get(name) != now.get(name):
      raise InputError(
        f'{name} is {now.get(name)!r}, but the trials of the search in {workdir} had'
        f' {before.get(name)!r}, and would not compare with new ones; set it back, or use another'
        ' --workdir'
      )
  study.set_user_attr('searched', {name: x for name, x in now.items() if name not in free})


def _ask_again_for_stopped(study: 'optuna.Study') -> None:
  """Queues trials again that were running when the search was stopped."""
  from optuna.trial import TrialState

  for trial in study.get_trials(states=(TrialState.RUNNING,)):
    study.tell(trial.number, state=TrialState.FAIL)
    study.enqueue_trial(trial.params)


def _count_ended(study: 'optuna.Study') -> int:
  from optuna.trial import TrialState

  ended = (TrialState.COMPLETE, TrialState.PRUNED)
  trials = study.get_trials(deepcopy=False)
  return sum(trial.state in ended or 'failed' in trial.user_attrs for trial in trials)


def summarise(study: 'optuna.Study') -> dict[str, Any]:
  """Summarises the trials and the importance of the parameters.

  Returns:
    `trials`, the best first, each with `overrides`, `state`, `valid` (its NDCG@10 at the last
    epoch that was reported if it ended early) and `folder`; `failed`, the trials without a result,
    each with `number`, `overrides` and `reason`; `importance` of each parameter, shares that add up
    to 1, {} if there are too few trials; `seconds`, the time of all trials with a result.
  """
  from optuna.trial import TrialState

  found, failed = {}, []
  for trial in study.get_trials():
    if (reason := trial.user_attrs.get('failed')) is not None:
      overrides = trial.user_attrs.get('overrides', trial.params)
      failed.append({'number': trial.number + 1, 'overrides': overrides, 'reason': reason})
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or trial.value is None:
      continue
    found[trial.user_attrs['folder']] = {
      'number': trial.number + 1,
      'overrides': trial.user_attrs['overrides'],
      'parameters': trial.params,
      'state': trial.state.name.lower(),
      'valid': trial.value,
      'folder': trial.user_attrs['folder'],
      'seconds': trial.duration.total_seconds(),
    }
  trials = sorted(found.values(), key=lambda x: (x['state'] != 'complete', -x['valid']))
  return {
    'trials': trials,
    'failed': failed,
    'importance': _importance(study),
    'seconds': sum(trial['seconds'] for trial in trials),
  }


def _importance(study: 'optuna.Study') -> dict[str, float]:
  import optuna

  evaluator = optuna.importance.PedAnovaImportanceEvaluator()
  try:
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
  except (ValueError, RuntimeError):  # Too few trials, or all alike.
    return {}


def _table(summary: dict[str, Any]) -> str:
  trials = summary['trials'][:_SHOWN]
  lines = [f'{"valid":>8}  {"state":<13}settings']
  for trial in trials:
    lines.append(f'{trial["valid"]:>8.4f}  {_state(trial):<13}{settings_text(trial)}')
  for trial in summary['failed'][:_SHOWN]:
    lines.append(f'{"":>8}  {"failed":<13}{settings_text(trial)}: {trial["reason"]}')
  return '\n'.join(lines)


def _state(trial: dict[str, Any]) -> str:
  return 'ended early' if trial['state'] == 'pruned' else trial['state']


def _last_lines(summary: dict[str, Any], folder: pathlib.Path) -> Iterator[str]:
  if not summary['trials']:
    yield 'no trial has ended with a result'
    return
  best = summary['trials'][0]
  if summary['importance']:
    shares = (f'{name} {share:.0%}' for name, share in summary['importance'].items())
    yield f'what mattered  {", ".join(shares)}'
  yield f'best           {folder / best["folder"]} by validation'
  yield f'page           {folder / PAGE}'


def _page(summary: dict[str, Any], workdir: str) -> str:
  trials = summary['trials']
  rows = [
    [settings_text(trial) or 'config', f'{trial["valid"]:.4f}', _state(trial), trial['folder']]
    for trial in trials
  ]
  rows += [[settings_text(x), '–', 'failed', x['reason']] for x in summary['failed']]
  table = Table(
    'Trials',
    ['settings', 'validation', 'state', 'folder, or why it failed'],
    rows,
    'The test items decided nothing here. Run the best settings with several seeds before you '
    'report a number.',
  )
  minutes = summary['seconds'] / 60
  return trials_page(
    f'{pathlib.Path(workdir).name}: a search',
    f'{counted(len(trials), "trial")} in {minutes:.0f} minutes, by NDCG@10 of validation',
    trials,
    (summary['importance'], _HOW),
    [table],
  )

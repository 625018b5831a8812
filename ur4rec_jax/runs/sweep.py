"""Sweeps: several runs in turn, over seeds and variants of a config, summarised in one table.

A member of a sweep is a variant, which overrides some fields, with one seed. Its run is in
`WORKDIR/VARIANT/seedN`, or in `WORKDIR/seedN` if it overrides nothing but the seed. It resumes like
any other run, and a finished member is not run again.
"""

import copy
import hashlib
import json
import pathlib
import re
import shlex
import statistics
import sys
import traceback
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data.dataset import first_user
from ur4rec_jax.data.features import load_with_features
from ur4rec_jax.errors import (
  DivergenceError,
  InputError,
  OutOfMemoryError,
  ReportedError,
  as_reported,
  counted,
  say,
)
from ur4rec_jax.evaluation.metrics import gains
from ur4rec_jax.files import write_file
from ur4rec_jax.page import aligned, p_text
from ur4rec_jax.runs import train_loop
from ur4rec_jax.runs.config_checks import check_config, flatten
from ur4rec_jax.runs.config_files import call_function
from ur4rec_jax.runs.knobs import CHANGEABLE, no_such_field
from ur4rec_jax.runs.report import PAGE
from ur4rec_jax.runs.trials_page import Table, Trial, settings_text, trials_page, variance_shares
from ur4rec_jax.runs.workdir import is_started_with, stored_config, stored_identity
from ur4rec_jax.sharding import devices

METRIC = 'ndcg@10'
SWEEP_PAGE = 'sweep.html'
FLIPS = 10_000  # Random sign flips in the permutation test.
_NAME_LENGTH = 100
_FIELDS = ('dataset', 'protocol', 'valid', 'test', 'stages', 'seed')  # Of a results.json.
_TABLE_METRICS = (METRIC, 'hit@10', 'mrr')


class Member(NamedTuple):
  """One run: the name of its variant, the fields that it overrides, and its config."""

  variant: str
  overrides: dict[str, Any]
  config: ConfigDict

  @property
  def name(self) -> str:
    return '/'.join(filter(None, (self.variant, f'seed{self.config.seed}')))


def run_sweep(
  config: ConfigDict, workdir: str, seeds: Sequence[int] = (), grid: str | None = None
) -> dict:
  """Runs all members, writes `sweep.json` and `sweep.html` after each, and prints the table.

  Args:
    config: the config that all members share.
    workdir: holds a folder for each member.
    seeds: seeds for each variant; empty for the config's seed.
    grid: `FILE.py:FUNCTION`, see `load_grid`; None if the config is the only variant.

  Returns:
    The contents of `sweep.json`, see `summarise`.

  Raises:
    InputError: a member's config is impossible, which is checked before anything is run; or see
      `train_loop.train_and_evaluate`.
    ReportedError: some members have failed, see `failure`; raised after all others have finished,
      as the error of the first of them.
  """
  members = make_members(config, seeds, load_grid(grid) if grid else [{}])
  finished, failed, summary = [], {}, {}
  for number, member in enumerate(members, 1):
    folder = pathlib.Path(workdir) / member.name
    # All processes must agree, even if one of them does not see a shared file yet.
    must_run = devices.any_process(not is_finished(folder, member.config))
    if devices.is_main_process():
      state = '' if must_run else ', finished before'
      say(f'member {number} of {len(members)}: {member.name}{state}')
    if must_run:
      try:
        train_loop.train_and_evaluate(member.config, str(folder))
      except Exception as error:
        reason = failure(error)
        # The first member may only show a mistake that all of them have, such as a wrong folder.
        if reason is None or (is_mistake(reason) and not finished and not failed):
          raise
        failed[member.name] = reason
        say(f'{member.name}: {reason}; the sweep goes on without it', sys.stderr)
        continue
      finally:
        # Compiled programs take memory maps; those of some dozens of runs would be more than Linux
        # allows a process.
        jax.clear_caches()
    if devices.is_main_process():
      finished.append((member, *read_run(folder)))
      summary = summarise(finished, summary)
      write_file(pathlib.Path(workdir) / 'sweep.json', json.dumps(summary, indent=2) + '\n')
      page = _page(finished, summary, pathlib.Path(workdir).resolve().name)
      write_file(pathlib.Path(workdir) / SWEEP_PAGE, page)
  if summary:
    say(f'\n{summary_table(summary, pathlib.Path(workdir).name)}\n')
    say('\n'.join(_next_lines(finished, workdir)))
  if failed:
    first = next(iter(failed.values()))
    raise type(first)('\n'.join(f'{name}: {reason}' for name, reason in failed.items()))
  return summary


def failure(error: Exception) -> ReportedError | None:
  """Returns why a run has failed; None if the runs after it cannot go on, either.

  Those would meet a stop, a full disk or a broken device, too. And if one of several processes runs
  out of memory, it must not go on without the others.
  """
  reported = as_reported(error)
  if not isinstance(reported, DivergenceError | InputError | None):
    return None
  if jax.process_count() > 1 and not isinstance(reported, DivergenceError):
    return None
  if reported is None:
    traceback.print_exception(error)
    return ReportedError(f'{type(error).__name__}: {error}')
  return type(reported)(str(reported))  # The traceback would keep the arrays of the run alive.


def is_mistake(reason: ReportedError) -> bool:
  """Tells whether a run was refused, which happens before it trains."""
  return isinstance(reason, InputError) and not isinstance(reason, OutOfMemoryError)


def _next_lines(
  finished: Sequence[tuple[Member, dict[str, Any], np.ndarray]], workdir: str
) -> list[str]:
  """Returns lines with the places of the reports and two commands that use the runs."""
  best, *_ = max(finished, key=lambda run: run[1]['valid'][METRIC])
  folder = pathlib.Path(workdir) / best.name
  user = shlex.quote(first_user(best.config.data_dir))
  return [
    f'page     {pathlib.Path(workdir) / SWEEP_PAGE}',
    f'best     {folder} by validation; its report: {folder / PAGE}',
    f'next     python -m ur4rec_jax.compare {shlex.quote(str(workdir))} OTHER_WORKDIR',
    f'         python -m ur4rec_jax.recommend --workdir={shlex.quote(str(folder))} --user={user}',
  ]


def compare(workdirs: Sequence[str | pathlib.Path]) -> dict[str, Any]:
  """Compares finished runs with those of the first workdir.

  Args:
    workdirs: workdirs of single runs, or of `run_sweep` with seeds alone.

  Returns:
    See `summarise`; the variants have the names of the workdirs.

  Raises:
    InputError: a folder holds no finished run, a run is not finished, two have one seed, or seeds
      of a workdir differ in more than the seed.
  """
  runs = []
  for workdir in workdirs:
    path, name = pathlib.Path(workdir), str(workdir).rstrip('/')
    folders = [path]
    if not (path / 'config.json').exists():  # seed10 comes after seed2.
      folders = sorted(path.glob('seed*'), key=lambda folder: (len(folder.name), folder.name))
    if not folders:
      inside = sorted({x.parent.parent for x in path.glob('*/seed*/results.json')})
      hint = f'; name the folders in it, such as {inside[0]}' if inside else ''
      raise InputError(f'{path}: holds no run{hint}')
    expected = {}
    for folder in folders:
      if not (folder / 'results.json').exists():
        raise InputError(f'{folder}: is not finished; start its training again, or leave it out')
      results, ranks = read_run(folder)
      shared = _shared_settings(folder, results)
      expected = expected or shared
      for field in sorted(expected | shared):
        if shared.get(field) != expected.get(field):
          raise InputError(
            f'{folder}: {field} is {shared.get(field)!r}, but {expected.get(field)!r} in'
            f' {folders[0]}, so they are no seeds of one model; name the runs one by one instead'
          )
      runs.append((Member(name, {}, ConfigDict({'seed': results['seed']})), results, ranks))
  names = [member.name for member, *_ in runs]
  if repeated := {name for name in names if names.count(name) > 1}:
    raise InputError(f'{", ".join(sorted(repeated))} is there more than once; name each run once')
  return summarise(runs)


def _shared_settings(folder: pathlib.Path, results: dict[str, Any]) -> dict[str, Any]:
  """Returns by name the settings of a run that all seeds of one model have in common."""
  free = CHANGEABLE | {'seed', 'init.run'}  # Each seed may go on from a run of its own.
  fields = flatten(stored_config(folder).to_dict())
  config = {f'config.{name}': value for name, value in fields.items() if name not in free}
  return config | {'data and protocol': measured_on(results)}


def load_grid(place: str) -> list[dict[str, Any]]:
  """Calls the function that lists the variants of a sweep.

  Args:
    place: `FILE.py:FUNCTION`, or `FILE.py` for its `get_hyper`.

  Returns:
    For each variant the value of each field that it overrides, by dotted name.

  Raises:
    InputError: there is no such file or function, or it returns something else.
  """
  path, _, name = place.partition(':')
  name = name or 'get_hyper'
  try:
    grid = call_function(path, name)
  except InputError as error:
    raise InputError(f'--sweep={place}: {error}') from error
  if not isinstance(grid, list | tuple) or not grid or not all(isinstance(x, dict) for x in grid):
    raise InputError(
      f"--sweep={place}: {name} must return a list of dicts such as {{'sasrec.dropout': 0.5}}"
    )
  return [*grid]


def make_members(
  config: ConfigDict, seeds: Sequence[int], grid: Iterable[dict[str, Any]]
) -> list[Member]:
  """Combines every variant with every seed, and checks them all.

  Raises:
    InputError: an override or a config is impossible, or two members are the same.
  """
  members = []
  for overrides in grid:
    if seeds and 'seed' in overrides:
      raise InputError('seeds are given by --seeds and by the sweep; leave one out')
    fields = {field: value for field, value in overrides.items() if field != 'seed'}
    variant = _variant_name(fields)
    known = flatten(config.to_dict())
    if unknown := [field for field in fields if field not in known]:
      told = '; '.join(no_such_field(field, known) for field in unknown)
      raise InputError(f'the sweep overrides {told}')
    for seed in seeds or [overrides.get('seed', config.seed)]:
      changed = copy.deepcopy(config)  # Stages still follow the fields of the run.
      try:
        changed.update_from_flattened_dict({**fields, 'seed': seed})
        check_config(changed)
      except (TypeError, ValueError) as error:
        raise InputError(f'member {variant or "seed"} of the sweep: {error}') from error
      members.append(Member(variant, fields, changed))
  names = [member.name for member in members]
  if repeated := {name for name in names if names.count(name) > 1}:
    raise InputError(f'the sweep has {", ".join(sorted(repeated))} more than once')
  return members


def _variant_name(fields: dict[str, Any]) -> str:
  """Returns a folder name for a variant; a shortened or changed name ends with a hash."""
  full = ','.join(f'{field}={value}' for field, value in fields.items())
  name = re.sub(r'[^\w.,=+-]+', '-', full)[:_NAME_LENGTH]
  return name if name == full else f'{name}-{hashlib.sha256(full.encode()).hexdigest()[:8]}'


def is_finished(folder: pathlib.Path, config: ConfigDict) -> bool:
  """Returns whether a run with this config, on the data as they are, has its results in `folder`.

  Raises:
    InputError: the data cannot be read.
  """
  # The page is the last file of a run: without it, the run was stopped while it wrote its results.
  is_written = (folder / 'results.json').exists() and (folder / PAGE).exists()
  if not (is_written and is_started_with(folder, config)):
    return False
  return stored_identity(folder) == load_with_features(config).identity()


def read_run(folder: pathlib.Path) -> tuple[dict[str, Any], np.ndarray]:
  """Reads the `results.json` of a run, and the ranks of the test users' items.

  Raises:
    InputError: one of them is missing or damaged.
  """
  path = folder / 'results.json'
  try:
    results = json.loads(path.read_text())
    if lacking := [name for name in _FIELDS if name not in results]:
      raise KeyError(lacking[0])
    path = folder / 'test_ranks.npz'
    with np.load(path) as archive:
      return results, archive['ranks']
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(
      f'{path}: cannot be read ({error!r:.200}); remove {folder / "results.json"} and start the'
      ' training again, which writes both anew'
    ) from error


def measured_on(run: dict[str, Any]) -> tuple[str, ...]:
  """Returns data, split and protocol of a `results.json`; only runs with equal ones compare."""
  return run['dataset']['name'], run['dataset']['split_hash'], *run['protocol'].values()


def summarise(
  runs: Sequence[tuple[Member, dict[str, Any], np.ndarray]], before: dict[str, Any] | None = None
) -> dict[str, Any]:
  """Computes the numbers of the table.

  Args:
    runs: members with the contents of their `results.json` and their ranks.
    before: the summary of the first of them, if there is one. It spares the p values of variants
      that have no new runs, which take long with many users.

  Returns:
    `members`, each with its numbers, and `variants`, each with `mean` and `sd` over its seeds and,
    against the first variant, the relative `gain` of the mean NDCG@10 and its `p`; None for the
    first one and those measured on other data or in another way.
  """
  by_variant: dict[str, list[tuple[Member, dict[str, Any], np.ndarray]]] = {}
  for run in runs:
    by_variant.setdefault(run[0].variant, []).append(run)
  base = next(iter(by_variant.values()))
  known = {(x['name'], *x['seeds']): x['p'] for x in (before or {}).get('variants', ())}
  key_of = lambda group: (group[0][0].variant, *(member.config.seed for member, _, _ in group))
  variants = []
  for name, group in by_variant.items():
    tests = [results['test'] for _, results, _ in group]
    gain = p = None
    is_alike = len({measured_on(results) for _, results, _ in [*base, *group]}) == 1
    if group is not base and is_alike:
      scores = ([results['test'][METRIC] for _, results, _ in g] for g in (group, base))
      gain = relative_gain(*scores)
      if {key_of(group), key_of(base)} <= known.keys():
        p = known[key_of(group)]
      else:
        p = ranks_p_value(*(np.array([ranks for _, _, ranks in g]) for g in (group, base)))
    variants.append(
      {
        'name': name,
        'overrides': group[0][0].overrides,
        'seeds': [member.config.seed for member, _, _ in group],
        'mean': {metric: statistics.mean(test[metric] for test in tests) for metric in tests[0]},
        'sd': {metric: spread([test[metric] for test in tests]) for metric in tests[0]},
        'gain': gain,
        'p': p,
      }
    )
  members = [
    {
      'name': member.name,
      **{key: results[key] for key in ('dataset', 'protocol', 'valid', 'test', 'stages')},
    }
    for member, results, _ in runs
  ]
  return {'variants': variants, 'members': members}


def spread(values: Sequence[float]) -> float | None:
  """Returns the standard deviation over seeds; None for a single seed."""
  return statistics.stdev(values) if len(values) > 1 else None


def relative_gain(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
  """Returns the relative gain of the mean of `ours` over that of `theirs`; None if that is 0."""
  return statistics.mean(ours) / statistics.mean(theirs) - 1 if any(theirs) else None


def ranks_p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Tests whether the users' NDCG@10, averaged over the seeds, differ: see `paired_p_value`.

  Args:
    ours: `[seeds, users]` ranks of the test users' items.
    theirs: `[seeds, users]` ranks to compare with; the number of seeds may differ.
  """
  return paired_p_value(gains(ours, 10).mean(axis=0) - gains(theirs, 10).mean(axis=0))


def paired_p_value(differences: np.ndarray) -> float:
  """Tests whether paired differences have mean 0: two-sided, by random flips of their signs.

  Args:
    differences: `[users]`.

  Returns:
    An estimate of the share of sign patterns whose mean is at least as far from 0.
  """
  differences = differences[differences != 0]  # Flipping the sign of 0 changes nothing.
  rng = np.random.default_rng(0)
  total = differences.sum()
  least = abs(total) * (1 - 1e-9)  # Sums in another order differ by rounding.
  as_far = 0
  for _ in range(FLIPS // 100):
    kept = rng.integers(0, 2, (100, len(differences)), np.int8)
    as_far += int((np.abs(2 * (kept @ differences) - total) >= least).sum())
  return (as_far + 1) / (FLIPS + 1)


def summary_table(summary: dict[str, Any], name: str = '') -> str:
  """Formats the result of `summarise`, one row for each variant.

  Args:
    summary: the result.
    name: name of a single variant that overrides nothing.
  """
  rows = _summary_rows(summary, name)
  lines = aligned(rows)
  if len(rows) > 2:
    lines.append(f'gain and paired p value: of {METRIC} over that of {rows[1][0]}')
  others = [
    row[0]
    for row, variant in zip(rows[2:], summary['variants'][1:], strict=True)
    if variant['p'] is None
  ]
  if others:
    lines.append(
      f'{", ".join(others)}: no gain, as the data, the split or the protocol are not those of'
      f' {rows[1][0]}'
    )
  return '\n'.join(['test', *lines])


def _summary_rows(summary: dict[str, Any], name: str) -> list[list[str]]:
  """Returns the names of the columns, and a row of texts for each variant."""
  is_alone = len(summary['variants']) == 1
  rows = [['variant', 'seeds', *_TABLE_METRICS, 'gain', 'p', f'{METRIC} of each seed']]
  scores = {member['name']: member['test'][METRIC] for member in summary['members']}
  for variant in summary['variants']:
    prefix = variant['name'] + '/' if variant['name'] else ''
    rows.append(
      [
        variant['name'] or (is_alone and name) or 'config',
        ','.join(map(str, variant['seeds'])),
        *(mean_and_spread(variant['mean'][m], variant['sd'][m]) for m in _TABLE_METRICS),
        '' if variant['gain'] is None else f'{100 * variant["gain"]:+.1f} %',
        '' if variant['p'] is None else p_text(variant['p']),
        ' '.join(f'{scores[f"{prefix}seed{seed}"]:.4f}' for seed in variant['seeds']),
      ]
    )
  if is_alone:  # There is nothing to compare it with.
    rows = [[*row[:-3], row[-1]] for row in rows]
  return rows


def _page(
  runs: Sequence[tuple[Member, dict[str, Any], np.ndarray]], summary: dict[str, Any], name: str
) -> str:
  """Makes the page of a sweep.

  Args:
    runs: see `summarise`.
    summary: its result.
    name: name of the sweep.
  """
  trials = _trials(runs)
  columns, *rows = _summary_rows(summary, name)
  base = rows[0][0]
  variants = Table(
    'Variants, by the test items',
    columns,
    rows,
    f'Mean ± standard deviation over the seeds. Gain and paired p value: of {METRIC} over that of '
    f'{base}.'
    if len(rows) > 1
    else 'Mean ± standard deviation over the seeds.',
  )
  best_first = sorted(trials, key=lambda trial: -trial['valid'])
  table = Table(
    'Runs, the best by validation first',
    ['settings', 'validation', 'test', 'folder'],
    [[settings_text(x), f'{x["valid"]:.4f}', f'{x["test"]:.4f}', x['folder']] for x in best_first],
    'To choose a run by its test number would be to choose on the test.',
  )
  how = (
    'Share of the differences in validation between runs that goes along with each field alone, '
    'and with the seed. Shares need not add up to 100 %: fields may work together, and those that '
    'change together share their part.'
  )
  return trials_page(
    f'{name}: a sweep',
    f'{counted(len(trials), "run")} of {counted(len(summary["variants"]), "variant")}, {METRIC}',
    trials,
    (variance_shares(trials), how),
    [variants, table],
  )


def _trials(runs: Sequence[tuple[Member, dict[str, Any], np.ndarray]]) -> list[Trial]:
  """Returns the runs of a sweep as trials, see `trials_page`."""
  varied = list(dict.fromkeys(field for member, *_ in runs for field in member.overrides))
  trials = []
  for number, (member, results, _) in enumerate(runs, 1):
    fields = flatten(member.config.to_dict())
    trials.append(
      {
        'number': number,
        'overrides': {**member.overrides, 'seed': member.config.seed},
        'parameters': {field: fields[field] for field in varied},
        'state': 'complete',
        'valid': results['valid'][METRIC],
        'test': results['test'][METRIC],
        'folder': member.name,
      }
    )
  return trials


def mean_and_spread(mean: float, sd: float | None) -> str:
  """Formats a mean ± standard deviation."""
  return f'{mean:.4f}' + ('' if sd is None else f' ± {sd:.4f}')

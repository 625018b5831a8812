"""Experiments on a live service: who gets which arm, what the logs say, and how long to run.

  python -m ur4rec_jax.experiment assign --config=exp.toml --user=u042
  python -m ur4rec_jax.experiment report --config=exp.toml --exposures=shown.csv --events=done.csv
  python -m ur4rec_jax.experiment guard --config=exp.toml --exposures=shown.csv --events=done.csv
  python -m ur4rec_jax.experiment power --config=exp.toml --exposures=shown.csv --events=done.csv
  python -m ur4rec_jax.experiment interleave --exposures=shown.csv --events=done.csv
  python -m ur4rec_jax.experiment off-policy --exposures=shown.csv --events=done.csv --target=n.csv

docs/experiments.md describes the file of an experiment, the tables and how to read a report.
"""

import argparse
import csv
import io
import json
import pathlib
import time
from typing import Any

from ur4rec_jax.errors import InputError, exit_on_reported_error, say
from ur4rec_jax.files import disk_errors, expand_home, write_file


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags and runs one of the commands."""
  flags = _parser().parse_args(expand_home(argv))
  flags.run(flags)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
    found = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    found.set_defaults(run=run)
    return found

  assign = command('assign', run_assign, 'say which arm users get')
  report = command('report', run_report, 'compare the arms by the logs')
  guard = command('guard', run_guard, 'stop arms that are clearly worse, in the running service')
  power = command('power', run_power, 'say how many users and days an experiment needs')
  interleave = command('interleave', run_interleave, 'say which of two interleaved rankers wins')
  off_policy = command('off-policy', run_off_policy, 'estimate a new policy from the logs')
  for found in (assign, report, guard, power):
    found.add_argument('--config', required=True, help='the file of the experiment (TOML)')
  for found in (report, guard, power, interleave, off_policy):
    found.add_argument('--exposures', required=True, help='table of the items shown')
    found.add_argument('--events', required=True, help='table of what users did')
  who = assign.add_mutually_exclusive_group(required=True)
  who.add_argument('--user', help='id of one user')
  who.add_argument('--users', help='table with a column user')
  assign.add_argument('--time', help='moment such as 2026-11-01T08:00:00Z; now by default')
  assign.add_argument('--out', help='CSV file to write; the terminal by default')
  report.add_argument('--out', type=pathlib.Path, help='page to write; a .json goes beside it')
  power.add_argument(
    '--effects', type=_shares, default='0.01,0.02,0.05,0.1', help='relative differences to find'
  )
  power.add_argument('--power', type=_share, default=0.8, help='probability of finding them')
  power.add_argument(
    '--daily_users', type=_positive, help='new users a day; by default as in the logs'
  )
  for found in (interleave, off_policy):
    found.add_argument('--event', default='click', help='kind of the events that count')
    found.add_argument('--level', type=_share, default=0.05, help='one minus the confidence')
  off_policy.add_argument(
    '--target',
    required=True,
    help='table of request_id, item, propensity and maybe predicted under the new policy',
  )
  for found in (power, interleave, off_policy):
    found.add_argument('--out', type=pathlib.Path, help='JSON file to write')
  return parser


def _number(text: str) -> float:
  try:
    return float(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(f'invalid number {text!r}') from error


def _share(text: str) -> float:
  value = _number(text)
  if not 0 < value < 1:
    raise argparse.ArgumentTypeError(f'must be between 0 and 1, not {text}')
  return value


def _positive(text: str) -> float:
  value = _number(text)
  if not 0 < value < float('inf'):
    raise argparse.ArgumentTypeError(f'must be a number above 0, not {text}')
  return value


def _shares(text: str) -> tuple[float, ...]:
  return tuple(map(_positive, text.split(',')))


def run_assign(flags: argparse.Namespace) -> None:
  """Prints or writes the arm of each user."""
  from ur4rec_jax.online import experiments

  if flags.out is not None and flags.users is None:
    raise InputError('--out: is for --users; leave it out')
  experiment = experiments.read(flags.config)
  # As in the service, nobody gets an arm that the guard has stopped.
  experiment = experiments.with_stopped(experiment, experiments.read_stopped(experiment))
  moment = time.time() if flags.time is None else experiments.seconds(flags.time, '--time')
  if flags.user is not None:
    arm = experiments.assign(experiment, flags.user, moment)
    say(arm.name if arm else 'not in the experiment')
    return
  from ur4rec_jax.online.logs import read_table

  users = read_table(pathlib.Path(flags.users), ['user']).columns['user'].to_pylist()
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['user', 'arm'])
  for user in dict.fromkeys(users):
    arm = experiments.assign(experiment, user, moment)
    writer.writerow([user, arm.name if arm else ''])
  if flags.out is None:
    say(text.getvalue().rstrip('\n'))
    return
  _write(pathlib.Path(flags.out), text.getvalue())
  say(f'wrote {flags.out}')


def run_report(flags: argparse.Namespace) -> None:
  """Prints the table, and writes the page and the JSON file."""
  from ur4rec_jax.online import analysis, experiment_report, experiments, logs

  experiment = experiments.read(flags.config)
  if flags.out is not None and flags.out.suffix == '.json':
    raise InputError(f'--out={flags.out}: the page needs another name, as the JSON gets this one')
  experiment = experiments.with_stopped(experiment, experiments.read_stopped(experiment))
  arms = [arm.name for arm in experiment.arms]
  result = analysis.analyze(experiment, logs.read_logs(flags.exposures, flags.events, arms))
  say(experiment_report.summary(result))
  if flags.out is not None:
    _write(flags.out, experiment_report.page(result))
    data = flags.out.with_suffix('.json')
    _write_json(data, experiment_report.as_json(result))
    say(f'wrote {flags.out} and {data}')


def run_guard(flags: argparse.Namespace) -> None:
  """Writes the arms that the guard stops into the file that the service watches."""
  from ur4rec_jax.online import analysis, experiments, logs

  experiment = experiments.read(flags.config)
  if experiment.guard is None:
    raise InputError(f'{flags.config}: has no [guard]; add one that names a metric')
  before = experiments.read_stopped(experiment)
  arms = [arm.name for arm in experiment.arms]
  measured = analysis.measure(experiment, logs.read_logs(flags.exposures, flags.events, arms))
  # A stopped arm stays stopped: nobody is in it any more, so nothing new is known of it.
  stopped = analysis.guard(experiment, measured) | before
  for arm, reason in stopped.items():
    say(f'{"stopped before" if arm in before else "stop"} {arm}: {reason}')
  if not stopped:
    say('no arm is clearly worse than the control')
  if stopped != before:
    out = experiments.stopped_file(experiment.path)
    _write_json(out, stopped, '--config')
    say(f'wrote {out}; a service with --experiment={flags.config} obeys within two seconds')


def run_power(flags: argparse.Namespace) -> None:
  """Prints how many users each effect needs."""
  from ur4rec_jax.online import analysis, experiment_report, experiments, logs
  from ur4rec_jax.page import aligned

  experiment = experiments.read(flags.config)
  found = analysis.power(
    experiment,
    logs.read_logs(flags.exposures, flags.events),
    flags.effects,
    flags.power,
    flags.daily_users,
  )
  metrics = {metric.name: metric for metric in experiment.metrics}
  rows = [('metric', 'now', 'effect', 'users', 'days', 'users, always valid')]
  rows += [
    (
      entry['metric'],
      experiment_report.value_text(metrics[entry['metric']], entry['value']),
      f'{entry["effect"]:+.1%}',
      f'{entry["users"]:,}',
      f'{entry["days"]:,.1f}',
      f'{entry["users_always_valid"]:,}',
    )
    for entry in found
  ]
  say('\n'.join(aligned(rows)))
  say(
    f'users in all arms that find the effect with probability {flags.power:.0%} at level'
    f' {experiment.level:g}; set planned_users to one of them before you start'
  )
  _maybe_json(flags.out, found)


def run_interleave(flags: argparse.Namespace) -> None:
  """Prints which ranker the users prefer."""
  from ur4rec_jax.online import experiment_report, interleaving, logs

  found = logs.read_logs(flags.exposures, flags.events, by_item=True)
  scores = interleaving.scores_of(found, flags.event)
  result = interleaving.prefer(scores, (found.arms[0], found.arms[1]), flags.level)
  say(experiment_report.preference_text(result, flags.level))
  _say_warnings(found.warnings)
  _maybe_json(flags.out, result._asdict() | {'warnings': [*found.warnings]})


def run_off_policy(flags: argparse.Namespace) -> None:
  """Prints the estimates of the new policy."""
  from ur4rec_jax.online import experiment_report, logs, off_policy

  found = logs.read_logs(flags.exposures, flags.events, needs=['propensity'])
  trials, warnings = off_policy.trials_of(found, flags.target, flags.event)
  result = off_policy.evaluate(trials, flags.level)
  say(experiment_report.evaluation_text(result, flags.level))
  _say_warnings(warnings)
  estimates = [estimate._asdict() for estimate in result.estimates]
  every = {'estimates': estimates, 'warnings': [*result.warnings, *warnings]}
  _maybe_json(flags.out, result._asdict() | every)


def _say_warnings(warnings: Any) -> None:
  for text in warnings:
    say(f'warning: {text}')


def _maybe_json(out: pathlib.Path | None, content: Any) -> None:
  if out is not None:
    _write_json(out, content)
    say(f'wrote {out}')


def _write_json(path: pathlib.Path, content: Any, flag: str = '--out') -> None:
  _write(path, json.dumps(content, indent=1, allow_nan=False) + '\n', flag)


def _write(path: pathlib.Path, content: str, flag: str = '--out') -> None:
  with disk_errors(path, flag):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)


if __name__ == '__main__':
  main()

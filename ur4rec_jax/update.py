"""Updates a trained model with new data, and promotes it if it is not worse than before.

  python -m ur4rec_jax.update --workdir=runs/shop --data_dir=data/day2 --out=runs/day2 \\
    --registry=models
  python -m ur4rec_jax.update --registry=models --rollback
  python -m ur4rec_jax.update --watch --events=events.db --workdir=runs/shop --data_dir=data/shop \\
    --out=rounds --registry=models

The update trains for a few epochs from the parameters of the run in --workdir. If the command is
stopped, the same command goes on. With --watch it does so again and again with the events of a
service, whose `serve --registry` then changes to the new model. docs/updates.md explains the gate.
"""

import argparse
import math
import pathlib
import shlex
import shutil
from typing import Any

from ur4rec_jax.errors import InputError, exit_on_reported_error, refuse_idle_flags, say
from ur4rec_jax.files import expand_home

EXPORT = 'export'
_OF_EACH_UPDATE = ('epochs', 'replay', 'moments', 'margin', 'promote', 'keep_versions')
# Flags that nothing reads without --watch, and without --registry.
_OF_WATCH = ('events', 'every_minutes', 'every_events', 'event_kinds', 'rounds', 'items', 'encode')
_OF_REGISTRY = ('users', 'keep_versions', 'force')
_JUDGED, _ON_ALL = 'judged', 'on_all_events'


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--workdir', help='folder of the run whose model serves')
  add('--data_dir', help='prepared folder with the new events, from build_dataset --append')
  add('--out', help='workdir of the update; it is resumed if it was started')
  add('--registry', help='folder of served models, to which an update that passes is promoted')
  add('--epochs', type=int, help='epochs to train; default 6, or more if those are below 100 steps')
  add(
    '--replay',
    type=float,
    default=0.2,
    help='share, 0 to 1, of the users without new events who are trained on too; default 0.2',
  )
  add(
    '--moments',
    choices=('reset', 'carry'),
    default='reset',
    help='moments of the optimizer: from zero, or from the run before; default reset',
  )
  add(
    '--margin',
    type=float,
    default=0.02,
    help='largest relative loss of NDCG@10 with which an update still passes; default 0.02',
  )
  add(
    '--promote',
    choices=(_JUDGED, _ON_ALL),
    help='model to promote: the one that the gate judged, or a second one, trained in the same way'
    f' on all events, those of the test too; default {_JUDGED}, with --watch {_ON_ALL}',
  )
  add(
    '--keep_versions',
    type=int,
    default=5,
    help='versions that stay in the registry, at least 2: the new one, the one before it, and the'
    ' newest others; default 5',
  )
  add('--force', action='store_true', help='promote it also if the gate refuses it')
  add('--users', action='store_true', help='export the users and their histories, too')
  add('--watch', action='store_true', help='update again and again with the events of a service')
  add('--events', help='with --watch: the store of events, as serve has it')
  add(
    '--every_minutes',
    type=float,
    default=60,
    help='with --watch: minutes from one update to the next, if there are new events; default 60',
  )
  add(
    '--every_events',
    type=float,
    default=math.inf,
    help='with --watch: new events after which an update does not wait for its time',
  )
  add(
    '--event_kinds',
    default='click,cart,buy',
    help='with --watch: kinds of events that are added to data that were built without kinds',
  )
  add('--rounds', type=float, default=math.inf, help='with --watch: end after so many updates')
  add('--items', help='with --watch: table of goods, in which new ones are looked up')
  add('--encode', help='with --watch: flags of data_prep.encode that made the embeddings, quoted')
  add('--rollback', action='store_true', help='serve the version before the current one again')
  return parser


def _check(flags: argparse.Namespace) -> None:
  """Raises InputError for the first flag that is missing or impossible."""
  if flags.rollback:
    if not flags.registry:
      raise InputError('--registry is missing: the folder whose current model is rolled back')
    for name, value in vars(flags).items():
      if name not in ('rollback', 'registry') and value != _parser().get_default(name):
        raise InputError(f'--rollback: works on --registry alone; leave --{name} out')
    return
  for name in ('workdir', 'data_dir', 'out', *(('events', 'registry') if flags.watch else ())):
    if not getattr(flags, name):
      raise InputError(f'--{name} is missing; --help says what it is')
  refuse_idle_flags(_parser(), flags, 'watch', *_OF_WATCH)
  refuse_idle_flags(_parser(), flags, 'registry', *_OF_REGISTRY)
  for name in ('every_minutes', 'every_events', 'rounds'):
    if not getattr(flags, name) > 0:
      raise InputError(f'--{name}={getattr(flags, name):g}: must be more than 0')
  if flags.keep_versions < 2:
    raise InputError(f'--keep_versions={flags.keep_versions}: must be at least 2')
  if flags.epochs is not None and flags.epochs < 1:
    raise InputError(f'--epochs={flags.epochs}: must be at least 1')
  for name in ('replay', 'margin'):
    if not 0 <= getattr(flags, name) <= 1:
      raise InputError(f'--{name}={getattr(flags, name):g}: must be in [0, 1]')
  if pathlib.Path(flags.out).resolve() == pathlib.Path(flags.workdir).resolve():
    raise InputError(f'--out={flags.out}: is the folder of the old run, which stays; give another')


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, and updates or rolls back."""
  flags = _parser().parse_args(expand_home(argv))
  _check(flags)
  flags.promote = flags.promote or (_ON_ALL if flags.watch else _JUDGED)
  if flags.rollback:
    from ur4rec_jax.inference import registry

    say(f'{flags.registry}: version {registry.rollback(flags.registry)} serves again')
    return

  if flags.watch:
    _watch(flags)
    return

  # These take seconds to import, and a wrong flag should be answered at once.
  from ur4rec_jax.runs import gate, update_run
  from ur4rec_jax.runs.workdir import stored_config
  from ur4rec_jax.sharding import devices

  devices.use_cpu_threads(stored_config(flags.workdir).cpu_threads)
  config = update_run.update_config(
    flags.workdir,
    flags.data_dir,
    epochs=flags.epochs,
    replay=flags.replay,
    moments=flags.moments,
    keep='best' if flags.promote == _JUDGED else 'last',
  )
  verdict = update_run.train_and_judge(config, flags.out, flags.margin)
  say('\n' + gate.table(verdict))
  out = pathlib.Path(flags.out)
  is_promoted = verdict['is_promoted'] or flags.force
  for reason in verdict['reasons']:
    say(f'refused: {reason}')
  if verdict['reasons'] and flags.force:
    say('promoted all the same, as --force says')
  if is_promoted and flags.promote == _ON_ALL:
    say(
      '\nnow the same on all events; the numbers above are of the model without the held-out ones'
    )
    served = update_run.train_on_all(config, out)
  else:
    served = out
  if is_promoted and flags.registry:
    version = _promote(served, verdict, flags)
    say(f'promoted: version {version} in {flags.registry}')
  elif is_promoted:
    say('passed: it may replace the model before; --registry=DIR promotes it')
  else:
    say(
      f'kept aside in {out}: {flags.workdir} goes on to serve; look at'
      f' {out / update_run.GATE}, train for longer, or correct the data'
    )


def _watch(flags: argparse.Namespace) -> None:
  """Updates again and again, until SIGTERM or Ctrl-C."""
  from ur4rec_jax.online import update_loop
  from ur4rec_jax.online.events import KINDS
  from ur4rec_jax.runs.workdir import stored_config

  stored_config(flags.workdir)  # A folder without a run is named at once.
  kinds = tuple(kind.strip() for kind in flags.event_kinds.split(','))
  if unknown := [kind for kind in kinds if kind not in KINDS]:
    raise InputError(f'--event_kinds: {unknown[0]!r} is none of {", ".join(KINDS)}')
  settings = {name: getattr(flags, name) for name in _OF_EACH_UPDATE}
  passed = [f'--{name}={value}' for name, value in settings.items() if value is not None]
  passed += [f'--{name}' for name in ('force', 'users') if getattr(flags, name)]
  update_loop.run(
    update_loop.Watch(
      events=flags.events,
      workdir=flags.workdir,
      data_dir=flags.data_dir,
      out=pathlib.Path(flags.out),
      registry=flags.registry,
      every_minutes=flags.every_minutes,
      every_events=flags.every_events,
      kinds=update_loop.counted_kinds(flags.data_dir) or kinds,
      items=flags.items,
      encode=flags.encode,
      update=tuple(passed),
      rounds=flags.rounds,
    )
  )


def _promote(served: pathlib.Path, verdict: dict[str, Any], flags: argparse.Namespace) -> str:
  """Exports a trained model into `--out` and copies that into the registry."""
  from ur4rec_jax.inference import exported, registry
  from ur4rec_jax.inference.exporting import export
  from ur4rec_jax.inference.trained import load

  recommender, out = load(served), pathlib.Path(flags.out)
  if not exported.is_of(out / EXPORT, recommender.settings, flags.users):
    shutil.rmtree(out / EXPORT, ignore_errors=True)  # It is of fewer epochs, for example.
    export(recommender, out / EXPORT, flags.users)
  reason = f'update of {shlex.quote(flags.workdir)} with {shlex.quote(flags.data_dir)}'
  groups = verdict['groups'].items()
  numbers = [f'{name} {x["before"]:.4f} to {x["after"]:.4f}' for name, x in groups]
  reason = f'{reason}: {", ".join(numbers)}'
  return registry.promote(flags.registry, out / EXPORT, reason, flags.keep_versions)


if __name__ == '__main__':
  main()

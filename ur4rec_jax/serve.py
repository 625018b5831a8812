"""Serves an exported folder over HTTP: recommendations as JSON, and a page to try them.

  pip install 'ur4rec-jax[serve]'      # in a checkout: pip install -e '.[serve]'
  python -m ur4rec_jax.serve --export=shop-model --port=8000

  python -m ur4rec_jax.serve --registry=models --events=events.db

The second one takes events, ranks with what users just did, and changes to a newly promoted model
while it serves; docs/live.md says more. The model needs jax and NumPy, and nothing that training
needs. Requests that come together are ranked together, in batches whose sizes are compiled before
the first request. docs/inference.md lists the routes and the limits.
"""

import argparse
import contextlib
import functools
import gc
import math
import os
import signal
import socket
import sys
import time

import jax

from ur4rec_jax.errors import InputError, exit_on_reported_error, refuse_idle_flags, say
from ur4rec_jax.files import expand_home

try:
  import uvicorn
  from prometheus_client import Counter

  from ur4rec_jax.inference import exported, registry
  from ur4rec_jax.inference.recommender import BATCH_SIZES
  from ur4rec_jax.inference.rules import load as load_rules
  from ur4rec_jax.online.events import KINDS
  from ur4rec_jax.online.feedback_store import open_store
  from ur4rec_jax.service.admission import AdmissionControl, RateLimit, make_host_check
  from ur4rec_jax.service.arms import Arms
  from ur4rec_jax.service.batcher import MOST_K, Batcher
  from ur4rec_jax.service.connections import make_protocol
  from ur4rec_jax.service.feedback import ONLY_ARM, Feedback
  from ur4rec_jax.service.http_app import EventIntake, Model, Service, make_app
  from ur4rec_jax.service.http_events import EventRoute
  from ur4rec_jax.service.model_swap import CurrentModel, Served, is_loading, open_current
  from ur4rec_jax.service.named_models import NamedModels, names_of
  from ur4rec_jax.service.precompile import precompile
except ImportError as error:
  print(f"error: {error.name} is not installed; pip install 'ur4rec-jax[serve]'", file=sys.stderr)
  sys.exit(InputError.exit_code)

# Connections that wait at the port until they are accepted. If there were more, the kernel would
# have clients try again after one, three and seven seconds.
BACKLOG = 2048
_MOST_FILES = 65_536  # Limit of open files of the process; most of them are connections.
# Open files besides connections, and connections that are accepted before older ones are closed.
_OTHER_FILES = 320
_OF_EVENTS = ('event_kinds', 'keep_days', 'events_per_second', 'shown_per_second')
_STOP = (signal.SIGTERM, signal.SIGINT)
# From these, a proxy may name its client in X-Forwarded-For: the ways in which a service on IPv4,
# on IPv6 or on both sees a proxy of the same machine.
_LOCAL_PROXIES = '127.0.0.1,::1,::ffff:127.0.0.1'
STOP_SECONDS = 30  # How long clients may take to read their answers when the service stops.
COMPILED = Counter('ur4rec_compilations', 'Programs compiled since the service was ready.')


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--export', help='folder that ur4rec_jax.export wrote')
  add('--registry', help='folder of promoted models; a newly promoted one is served at once')
  add('--compare_with', help='a second exported folder; the page shows both lists side by side')
  add('--rules', help='TOML file of filters, caps, diversity, boosts and pins')
  add('--experiment', help='TOML file of an experiment, whose arms answer its users')
  add('--events', help='where to keep events: a file, redis://HOST:PORT/0 or postgres://HOST/DB')
  add(
    '--event_kinds',
    default='click,cart,buy',
    help=f'kinds of events that belong to the history of a user: some of {", ".join(KINDS)}',
  )
  add('--keep_days', type=float, default=math.inf, help='delete events that are older')
  add(
    '--events_per_second',
    type=float,
    default=2000,
    help='most events of one client, on average; inf for no limit',
  )
  add(
    '--shown_per_second',
    type=float,
    default=10_000,
    help='most items in logged answers to one client, on average; inf for no limit',
  )
  add('--host', default='127.0.0.1', help='address to listen on; 0.0.0.0 or :: for all networks')
  add('--port', type=int, default=8000, help='port to listen on; 0 for any free port')
  add('--batch', type=int, default=64, choices=BATCH_SIZES, help='most requests in a batch')
  add('--wait_ms', type=float, default=2, help='milliseconds that a batch waits for more requests')
  add('--queue', type=int, default=256, help='most requests inside at once; others get a 503')
  add(
    '--client_connections',
    type=int,
    default=256,
    help='most open connections of one client; more for a proxy in front of the service',
  )
  add(
    '--allowed_hosts',
    default='',
    help='further names of this service, separated by commas, that the Host of a request may have;'
    ' without it the address of --host and localhost; * for all',
  )
  flags = parser.parse_args(expand_home(argv))
  for name, least in (('wait_ms', 0), ('queue', 1), ('client_connections', 1)):
    if not least <= getattr(flags, name) <= 100_000:
      raise InputError(f'--{name}={getattr(flags, name)}: must be from {least} to 100000')
  for name in ('keep_days', 'events_per_second', 'shown_per_second'):
    if not getattr(flags, name) > 0:
      raise InputError(f'--{name}={getattr(flags, name):g}: must be more than 0')
  if (flags.export is None) == (flags.registry is None):
    raise InputError('give one of --export=FOLDER and --registry=FOLDER')
  kinds = [kind.strip() for kind in flags.event_kinds.split(',')]
  if unknown := [kind for kind in kinds if kind not in KINDS]:
    raise InputError(f'--event_kinds: {unknown[0]!r} is none of {", ".join(KINDS)}')
  refuse_idle_flags(parser, flags, 'events', *_OF_EVENTS)
  flags.event_kinds = kinds
  return flags


def _open_events(flags: argparse.Namespace) -> EventIntake | None:
  if flags.events is None:
    return None
  outside = ONLY_ARM if flags.experiment is None else ''
  store = open_store(flags.events)
  feedback = Feedback(store, flags.event_kinds, flags.keep_days * 86_400, outside)
  route = EventRoute(feedback, flags.events_per_second)
  return EventIntake(feedback, route, RateLimit(flags.shown_per_second, MOST_K))


def _keep_compiled_programs(folder: str) -> None:
  """Caches compiled programs in the folder of the models, so that later starts are faster."""
  if not jax.config.jax_compilation_cache_dir and os.access(folder, os.W_OK):
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(os.path.abspath(folder), 'compiled')
    )
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _open_port(host: str, port: int) -> socket.socket:
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  has_both = host == '::' and socket.has_dualstack_ipv6()  # IPv4 addresses, too.
  try:
    return socket.create_server(
      (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=has_both
    )
  except (OSError, OverflowError) as error:
    raise InputError(
      f'--host={host} --port={port}: cannot be opened ({error}); give others, --port=0 for any free'
    ) from error


def _most_connections() -> int:
  """Raises the limit of open files as far as it may be raised; returns the most connections."""
  try:
    import resource
  except ImportError:  # Windows has no such limit.
    return _MOST_FILES
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  files = _MOST_FILES if most == resource.RLIM_INFINITY else min(most, _MOST_FILES)
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
  return max(files - _OTHER_FILES, 1)


def _serve(app: AdmissionControl, listening: socket.socket, client_connections: int) -> None:
  """Serves until SIGTERM or Ctrl-C."""
  config = uvicorn.Config(
    app,
    http=make_protocol(_most_connections(), client_connections),
    ws='none',
    lifespan='on',
    backlog=BACKLOG,
    log_level='error',  # A warning for each bad request would fill the disk.
    access_log=False,
    server_header=False,
    forwarded_allow_ips=os.environ.get('FORWARDED_ALLOW_IPS', _LOCAL_PROXIES),
    timeout_keep_alive=75,
    timeout_graceful_shutdown=STOP_SECONDS,
  )
  server = uvicorn.Server(config)
  # Until uvicorn handles signals, a signal is noted: an exception from a handler can get lost.
  for number in _STOP:
    signal.signal(number, lambda *_: setattr(server, 'should_exit', True))
  try:
    server.run(sockets=[listening])
  finally:
    print(f'stopped: {app.answered:,} of {app.accepted:,} accepted requests answered', flush=True)


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, compiles, and serves until SIGTERM or Ctrl-C."""
  flags = _parse(argv)
  for number in _STOP:
    signal.signal(number, lambda *_: sys.exit(0))
  start = time.monotonic()
  # Imported objects stay until the end. Without them, a garbage collection takes a few milliseconds
  # instead of hundreds, during which no request is answered.
  gc.collect()
  gc.freeze()
  intake = _open_events(flags)
  _keep_compiled_programs(flags.registry or flags.export)
  folders = [flags.registry or flags.export, *filter(None, [flags.compare_with])]
  names = names_of(folders)
  if sys.stderr.isatty():
    say(f'loading {" and ".join(folders)}; a first start compiles, for up to a minute', sys.stderr)

  def open_model(folder: str) -> Model:
    held = registry.hold(folder)
    digest = exported.model_hash(folder)[:12]
    recommender = exported.load(folder)
    batcher = Batcher(recommender, flags.batch, flags.wait_ms / 1000, flags.queue)
    thumbnails = exported.load_thumbnails(folder)
    rules = None if flags.rules is None else load_rules(flags.rules, recommender.item_ids)
    passages = exported.load_passages(folder)
    return Model(recommender, batcher, thumbnails, rules, digest, passages=passages, held=held)

  def load(folder: str, version: str = '', model: Model | None = None) -> Served:
    model = model or open_model(folder)
    service = Service(model, intake, arms, names)
    return Served(make_app(service), model.batcher, version or model.digest, service.close)

  folder, version = open_current(flags.registry) if flags.registry else (flags.export, '')
  first, arms = open_model(folder), None
  beside = [intake.feedback.run, intake.feedback.expire] if intake else []
  others = {name: load(place) for name, place in zip(names[1:], folders[1:], strict=True)}
  beside += [other.batcher.run for other in others.values()]
  if flags.experiment is not None:
    # A registry's first model ends when the next one comes, so arms cannot share it.
    arms = Arms(flags.experiment, open_model, () if flags.registry else (first,))
    beside += [arms.watch, *(model.batcher.run for model in arms.own_models)]
  prepare = functools.partial(precompile, most_jobs=flags.batch)
  model = CurrentModel(load(folder, version, first), load, flags.registry, beside, prepare)
  del first  # It may be large, and a registry replaces it.
  allowed = [name.strip() for name in flags.allowed_hosts.split(',') if name.strip()]
  app = AdmissionControl(
    NamedModels(names[0], model, {name: other.app for name, other in others.items()}),
    flags.queue,
    make_host_check(flags.host, allowed),
  )
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: (
      event.endswith('backend_compile_duration') and not is_loading() and COMPILED.inc()
    )
  )
  with _open_port(flags.host, flags.port) as listening:
    host, port = listening.getsockname()[:2]
    host = f'[{host}]' if ':' in host else host
    took = time.monotonic() - start
    print(f'ready after {took:.1f} s: http://{host}:{port}', flush=True)
    _serve(app, listening, flags.client_connections)
  if model.failure is not None:
    sys.exit(model.failure.exit_code)  # It was printed when it happened.


if __name__ == '__main__':
  main()

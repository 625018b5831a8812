"""Serves an exported folder over HTTP: recommendations as JSON, and a page to try them.

  pip install 'ur4rec-jax[serve]'      # in a checkout: pip install -e '.[serve]'
  python -m ur4rec_jax.serve --export=shop-model --port=8000

The model needs jax and NumPy, and nothing that training needs. Requests that come together are
ranked together, in batches whose sizes are compiled before the first request. docs/inference.md
lists the routes and the limits.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import time

import jax

from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.files import expand_home

try:
  import uvicorn
  from prometheus_client import Counter

  from ur4rec_jax.inference import exported
  from ur4rec_jax.inference.admission import AdmissionControl, make_host_check
  from ur4rec_jax.inference.batcher import Batcher
  from ur4rec_jax.inference.connections import make_protocol
  from ur4rec_jax.inference.http_app import make_app
  from ur4rec_jax.inference.recommender import BATCH_SIZES
  from ur4rec_jax.inference.rules import load as load_rules
except ImportError as error:
  print(f"error: {error.name} is not installed; pip install 'ur4rec-jax[serve]'", file=sys.stderr)
  sys.exit(InputError.exit_code)

# Connections that wait at the port until they are accepted. If there were more, the kernel would
# have clients try again after one, three and seven seconds.
BACKLOG = 2048
_MOST_FILES = 65_536  # Open files of the process, of which connections are most.
# Open files that are no connections, and new connections that are accepted before the oldest ones
# are closed.
_OTHER_FILES = 320
STOP_SECONDS = 30  # How long clients may take to read their answers when the service stops.
COMPILED = Counter('ur4rec_compilations', 'Programs compiled since the service was ready.')


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--export', required=True, help='folder that ur4rec_jax.export wrote')
  add('--rules', help='TOML file of filters, caps, diversity, boosts and pins')
  add('--host', default='127.0.0.1', help='address to listen on; 0.0.0.0 for all networks')
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
  return flags


def _keep_compiled_programs(folder: str) -> None:
  """Lets every start but the first find its programs compiled, in the exported folder."""
  if not jax.config.jax_compilation_cache_dir and os.access(folder, os.W_OK):
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(os.path.abspath(folder), 'compiled')
    )
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _open_port(host: str, port: int) -> socket.socket:
  try:
    return socket.create_server((host, port), backlog=BACKLOG)
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
    timeout_keep_alive=75,
    timeout_graceful_shutdown=STOP_SECONDS,
  )
  try:
    uvicorn.Server(config).run(sockets=[listening])
  finally:
    print(f'stopped: {app.answered:,} of {app.accepted:,} accepted requests answered', flush=True)


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, compiles, and serves until SIGTERM or Ctrl-C."""
  flags = _parse(argv)
  # uvicorn handles these signals itself while it runs, and restores these handlers afterwards.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: sys.exit(0))
  start = time.monotonic()
  _keep_compiled_programs(flags.export)
  recommender = exported.load(flags.export)
  batcher = Batcher(recommender, flags.batch, flags.wait_ms / 1000)
  allowed = [name.strip() for name in flags.allowed_hosts.split(',') if name.strip()]
  is_allowed = make_host_check(flags.host, allowed)
  thumbnails = exported.load_thumbnails(flags.export)
  rules = None if flags.rules is None else load_rules(flags.rules, recommender.item_ids)
  handlers = make_app(recommender, batcher, thumbnails, rules)
  app = AdmissionControl(handlers, flags.queue, is_allowed)
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: event.endswith('backend_compile_duration') and COMPILED.inc()
  )
  with _open_port(flags.host, flags.port) as listening:
    host, port = listening.getsockname()[:2]
    took = time.monotonic() - start
    print(f'ready after {took:.1f} s: http://{host}:{port}', flush=True)
    _serve(app, listening, flags.client_connections)


if __name__ == '__main__':
  main()

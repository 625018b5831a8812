"""Compiles the programs of an exported folder beside a running service, for its next model.

The compiler would take processor time from the requests. So it runs in a process of its own, at a
low priority, and leaves the programs in the cache, where the service finds them.
"""

import asyncio
import os
import subprocess
import sys

import jax

from ur4rec_jax.inference import exported
from ur4rec_jax.service.batcher import Batcher

_CACHE_OPTIONS = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')


async def precompile(folder: str, most_jobs: int) -> None:
  """Puts the programs of an exported folder into the cache, unless this process has them already.

  If that fails, nothing happens: the service then compiles, or says what is wrong. On accelerators
  the service always compiles, because a second process would take their memory.

  Args:
    folder: the exported folder.
    most_jobs: the most jobs in a batch of the service.

  Raises:
    InputError: this is not an exported folder.
  """
  has_cache = bool(jax.config.jax_compilation_cache_dir)
  if jax.default_backend() != 'cpu' or not has_cache or exported.is_compiled(folder):
    return
  options = {name.upper(): str(getattr(jax.config, name)) for name in _CACHE_OPTIONS}
  # The subprocesses of asyncio fork, and jax warns about that.
  process = subprocess.Popen(
    [sys.executable, '-m', __name__, folder, str(most_jobs)],
    env=os.environ | options,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    await asyncio.to_thread(process.wait)
  finally:
    if process.poll() is None:  # The service ends.
      process.kill()


if __name__ == '__main__':
  os.nice(10)
  Batcher(exported.load(sys.argv[1]), int(sys.argv[2]), 0)

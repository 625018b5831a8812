"""Caches compiled programs on disk, so that later starts of a run need not compile again."""

import pathlib

import jax
from ml_collections import ConfigDict

_NO_CACHE = 'none'


def keep_compiled_programs(workdir: str, config: ConfigDict) -> None:
  """Sets the cache of compiled programs to the folder `config.compilation_cache`.

  By default that is a folder in `workdir`, unless `JAX_COMPILATION_CACHE_DIR` names another.
  """
  folder = config.compilation_cache
  if folder == _NO_CACHE:
    jax.config.update('jax_enable_compilation_cache', False)
  elif folder or not jax.config.jax_compilation_cache_dir:
    folder = folder or str(pathlib.Path(workdir).absolute() / 'compiled')
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

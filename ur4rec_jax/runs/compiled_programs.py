"""Caches compiled programs on disk, so that later starts of a run need not compile again."""

import pathlib

import jax

_NO_CACHE = 'none'


def keep_compiled_programs(workdir: str, folder: str) -> None:
  """Sets the cache of compiled programs to a folder, see the knob `compilation_cache`.

  By default that is a folder in `workdir`, unless `JAX_COMPILATION_CACHE_DIR` names another.
  """
  if folder == _NO_CACHE:
    jax.config.update('jax_enable_compilation_cache', False)
  elif folder or not jax.config.jax_compilation_cache_dir:
    folder = folder or str(pathlib.Path(workdir).absolute() / 'compiled')
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

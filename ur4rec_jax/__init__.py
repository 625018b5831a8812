"""A sequential recommender: `ur4rec_jax.load(workdir)` gives a trained model ready to use."""

from typing import Any


def __getattr__(name: str) -> Any:
  if name != 'load':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from ur4rec_jax.inference.trained import load  # Slow to import, and most need only a part.

  return load

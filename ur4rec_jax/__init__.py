"""A sequential recommender: `ur4rec_jax.load(workdir)` gives a trained model ready to use.

`ur4rec_jax.train(orders)` trains one on a table of interactions.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ur4rec_jax.inference import exported
  from ur4rec_jax.inference.hub import from_hub, push_to_hub
  from ur4rec_jax.inference.trained import load
  from ur4rec_jax.quick import train
  from ur4rec_jax.runs.knobs import default_config, default_stage

__all__ = [
  'default_config',
  'default_stage',
  'exported',
  'from_hub',
  'load',
  'push_to_hub',
  'train',
]

# These are imported when they are used: they are slow to import, and an export needs only a part.
_MODULES = {
  'exported': 'ur4rec_jax.inference.exported',
  'load': 'ur4rec_jax.inference.trained',
  'train': 'ur4rec_jax.quick',
  'from_hub': 'ur4rec_jax.inference.hub',
  'push_to_hub': 'ur4rec_jax.inference.hub',
  'default_config': 'ur4rec_jax.runs.knobs',
  'default_stage': 'ur4rec_jax.runs.knobs',
}


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    known = ', '.join(_MODULES)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has {known}')
  module = importlib.import_module(_MODULES[name])
  return module if name == 'exported' else getattr(module, name)

"""Random token tables in which some items lack a modality."""

import jax.numpy as jnp
import numpy as np

from ur4rec_jax.data.features import TokenTable

ITEMS = 7
WIDTHS = {'text': 5, 'image': 4}


def make_features(seed: int = 0, items: int = ITEMS) -> dict[str, TokenTable]:
  """Tables in which item 2 has no picture, item 3 no text, item 4 neither, and row 0 is empty."""
  rng = np.random.default_rng(seed)
  features = {}
  for name, width in WIDTHS.items():
    mask = rng.random((items + 1, 3)) < 0.7
    mask[1:, 0] = True
    mask[[0, 4, 2 if name == 'image' else 3]] = False
    tokens = rng.normal(size=(items + 1, 3, width)) * mask[..., None]
    features[name] = TokenTable(jnp.asarray(tokens, jnp.float32), jnp.asarray(mask))
  return features

"""The protocol of an evaluation: everything besides the model on which a metric depends."""

from typing import NamedTuple

from ml_collections import ConfigDict

from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset


class Protocol(NamedTuple):
  """What a held-out item is ranked against.

  Attributes:
    candidates: `all` items, or `uniform` or `popularity` to draw some that the user never has.
    num_candidates: how many are drawn for each user.
    seed: of the draw and of the random baseline.
  """

  candidates: str = 'all'
  num_candidates: int = 0
  seed: int = 0

  @classmethod
  def of_config(cls, config: ConfigDict) -> 'Protocol':
    """Reads the protocol from `config.evaluation`."""
    return cls(config.candidates, config.num_candidates, config.seed)

  def describe(self, dataset: Dataset) -> dict[str, str]:
    """Names the protocol as it stands beside a metric; the dataset gives the split."""
    candidates = 'all items'
    if self.candidates != 'all':
      candidates = f'target + {self.num_candidates} {self.candidates} (seed {self.seed})'
    return {
      'split': splits.describe(dataset.split_name, dataset.info['splits'][dataset.split_name]),
      'candidates': candidates,
      'seen_items': 'left out',
      'ties': 'against the model',
    }

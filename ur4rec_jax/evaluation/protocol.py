"""The protocol of an evaluation: everything besides the model on which a metric depends."""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset

PARTS = ('valid', 'test')
LEAVE_OUT, KEEP = SEEN_ITEMS = ('leave_out', 'keep')


class Protocol(NamedTuple):
  """What a held-out item is ranked against.

  Attributes:
    candidates: `all` items, or `uniform` or `popularity` to draw some that the user never has, or
      does not have later if seen items are kept.
    num_candidates: how many are drawn for each user.
    seed: of the draw and of the random baseline.
    seen_items: `leave_out` or `keep` the items that a user had before among those that are ranked.
  """

  candidates: str = 'all'
  num_candidates: int = 0
  seed: int = 0
  seen_items: str = LEAVE_OUT

  @classmethod
  def of_config(cls, config: ConfigDict) -> 'Protocol':
    """Reads the protocol from `config.evaluation`."""
    return cls(config.candidates, config.num_candidates, config.seed, config.seen_items)

  @property
  def keeps_seen(self) -> bool:
    return self.seen_items == KEEP

  def is_counted(self, dataset: Dataset, part: str) -> np.ndarray:
    """Tells for each user of `Dataset.held_out` whether the rank of the item counts.

    A recommender that leaves out seen items never recommends an item that the user had before. No
    rank can describe that, so such held-out items are left out too.

    Returns:
      `[users]` bool.
    """
    if self.keeps_seen:
      return np.ones(np.count_nonzero(dataset.split.held_out[part] >= 0), bool)
    return ~dataset.is_repeated(part)

  def counts_any(self, dataset: Dataset, part: str) -> bool:
    """Tells whether `is_counted` holds for any user; it looks at no more users than it must."""
    return self.keeps_seen or not all(block.all() for block in dataset.repeated_blocks(part))

  def describe(self, dataset: Dataset) -> dict[str, str]:
    """Names the protocol as it stands beside a metric; the dataset gives the split."""
    candidates = 'all items'
    if self.candidates != 'all':
      candidates = f'target + {self.num_candidates} {self.candidates} (seed {self.seed})'
    seen_items = 'kept' if self.keeps_seen else 'left out'
    if not self.keeps_seen and any(
      is_repeated.any() for part in PARTS for is_repeated in dataset.repeated_blocks(part)
    ):
      seen_items = 'left out, also as targets'
    return {
      'split': splits.describe(dataset.split_name, dataset.info['splits'][dataset.split_name]),
      'candidates': candidates,
      'seen_items': seen_items,
      'ties': 'against the model',
    }

"""The protocol of an evaluation: everything besides the model that determines a metric."""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ur4rec_jax.data import splits
from ur4rec_jax.data.dataset import Dataset

PARTS = ('valid', 'test')
LEAVE_OUT, KEEP = SEEN_ITEMS = ('leave_out', 'keep')


class Protocol(NamedTuple):
  """Which items a held-out item is ranked against.

  Attributes:
    candidates: `all` items, or a draw of some, `uniform` or by `popularity`. Items that the user
      ever has are not drawn; if seen items are kept, those before the target may be drawn.
    num_candidates: number of items that are drawn for each user.
    seed: seed of the draw and of the random baseline.
    seen_items: `leave_out` or `keep` items that the user had before in the ranking.
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
    """Tells whether `is_counted` holds for any user; stops at the first block with one."""
    if self.keeps_seen:
      return bool((dataset.split.held_out[part] >= 0).any())
    return not all(block.all() for block in dataset.repeated_blocks(part))

  def describe(self, dataset: Dataset) -> dict[str, str]:
    """Describes the protocol as it is stored with metrics; the dataset gives the split."""
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

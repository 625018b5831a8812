"""Counts which items follow an item in the training histories (item-kNN over sequences)."""

import itertools
from typing import NamedTuple

import jax
import numpy as np
import scipy.sparse as sp

from ur4rec_jax.data.dataset import Dataset

Array = jax.Array
_MOST_PAIRS = 20_000_000  # Pairs that are counted at a time; each takes about 50 bytes.


class FollowerTable(NamedTuple):
  """The items that follow each item most often.

  Attributes:
    items: `[items + 1, count]` int32 item ids, 0 for none.
    values: `[items + 1, count]` float32, see `count_followers`; 0 for none.
  """

  items: np.ndarray | Array
  values: np.ndarray | Array


def count_followers(dataset: Dataset, count: int, reach: int) -> FollowerTable:
  """Counts the followers of each item; the held-out interactions are not read.

  Two items of a user that lie d interactions apart count 1 / d. As in cosine similarity, each sum
  is divided by the square root of the popularity of both items, so that popular items do not crowd
  out the others.

  Args:
    dataset: the data.
    count: the most followers of an item.
    reach: the largest distance that counts.
  """
  train = dataset.train_part()
  ids, users, width = train.item_ids, train.owners, train.num_items + 1
  reach = min(reach, int(train.lengths.max(initial=1)) - 1)
  counts = train.item_counts()
  scale = 1 / np.sqrt(np.maximum(counts, 1)).astype(np.float32)
  table = FollowerTable(np.zeros((width, count), np.int32), np.zeros((width, count), np.float32))
  # A block of items at a time, because all pairs may be too many for the memory.
  block = np.cumsum(counts) * reach // _MOST_PAIRS
  for number in np.unique(block):
    first, end = np.searchsorted(block, [number, number + 1])
    is_of_block = (ids >= first) & (ids < end)
    total = sp.csr_array((end - first, width), dtype=np.float32)
    for distance in range(1, reach + 1):
      is_pair = is_of_block[:-distance] & (users[:-distance] == users[distance:])
      is_pair &= ids[:-distance] != ids[distance:]
      before, after = ids[:-distance][is_pair], ids[distance:][is_pair]
      values = np.full(len(before), 1 / distance, np.float32)
      total += sp.csr_array((values, (before - first, after)), total.shape)
    total = (sp.diags_array(scale[first:end]) @ total @ sp.diags_array(scale)).tocsr()
    total.sort_indices()  # Equal values stay in the order of their items' ids.
    for item, (start, stop) in enumerate(itertools.pairwise(total.indptr), first):
      best = start + np.argsort(-total.data[start:stop], kind='stable')[:count]
      table.items[item, : len(best)] = total.indices[best]
      table.values[item, : len(best)] = total.data[best]
  return table

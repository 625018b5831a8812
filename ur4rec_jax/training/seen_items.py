"""Items that a user had before: the softmax losses leave them out, as rankings do.

A ranking leaves out the items that the user had before (`evaluation.seen_items=leave_out`), so a
model need not learn to give them low scores. That is hard to learn, because the state after a
history is similar to the embeddings of its items.
"""

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ur4rec_jax.data.input_pipeline import Batch
from ur4rec_jax.evaluation.protocol import LEAVE_OUT
from ur4rec_jax.sharding.item_embeddings import NOWHERE, index_from

Array = jax.Array
AS_EVALUATION, AND_LATER, KEEP = CHOICES = ('as_evaluation', 'and_later', 'keep')
BITS = 32  # In a word of `packed`.
LOWEST = jnp.finfo(jnp.float32).min


@flax.struct.dataclass
class SeenItems:
  """What the users of a batch have, and which of it each token leaves out.

  Attributes:
    items: `[tokens]` int32, the input of each token in the numbering of the candidates; `NOWHERE`
      for padding.
    users: `[tokens]` int32, the batch's number of each token's user, from 0.
    positions: `[tokens]` int32, ascending along the tokens of a user.
    ends: `[tokens]` int32; a token leaves out its user's items at positions before this one.
    num_users: most users that the batch may have.
  """

  items: Array
  users: Array
  positions: Array
  ends: Array
  num_users: int = flax.struct.field(pytree_node=False)

  def first_positions(self, num_candidates: int) -> Array:
    """Finds where each user has each candidate for the first time.

    Returns:
      `[num_users, num_candidates]` int32 positions; `NOWHERE` if the user does not have it.
    """
    nowhere = jnp.full((self.num_users, num_candidates), NOWHERE)
    return nowhere.at[self.users, self.items].min(self.positions, mode='drop')

  def renumbered(self, candidates: Array) -> 'SeenItems':
    """Replaces items by their index in the ascending `candidates`; the others get `NOWHERE`."""
    index = jnp.searchsorted(candidates, self.items)
    is_there = jnp.take(candidates, index, mode='clip') == self.items
    return self.replace(items=jnp.where(is_there, index, NOWHERE))


def seen_items(config: ConfigDict, batch: Batch) -> SeenItems | None:
  """Lists the items of the users of a batch, from 0 for id or number 1.

  Returns:
    None if the config has all items as candidates.
  """
  if config.loss.seen_items == KEEP or config.evaluation.seen_items != LEAVE_OUT:
    return None
  rows, slots = batch.users.shape
  row = jnp.arange(rows, dtype=jnp.int32)[:, None]
  users = row * slots + jnp.maximum(batch.segment_ids - 1, 0)
  positions = jnp.arange(batch.item_ids.size, dtype=jnp.int32)
  leaves_out_later = config.loss.seen_items == AND_LATER
  return SeenItems(
    items=index_from(1, batch.item_ids).reshape(-1),
    users=users.reshape(-1),
    positions=positions,
    ends=jnp.full_like(positions, NOWHERE) if leaves_out_later else positions + 1,
    num_users=rows * slots,
  )


def without_seen(logits: Array, is_seen: Array, targets: Array) -> Array:
  """Gives seen items the lowest score, but not the targets.

  Args:
    logits: `[tokens, candidates]` float32.
    is_seen: `[tokens, candidates]` bool.
    targets: `[tokens]` int32 columns of the targets.
  """
  is_target = jnp.arange(logits.shape[1]) == targets[:, None]
  return jnp.where(is_seen & ~is_target, LOWEST, logits)


def packed(is_seen: Array) -> Array:
  """Packs `[tokens, candidates]` bool into `[tokens, words]` int32.

  Bit b of word w is that of candidate `32 * w + b`.
  """
  tokens, num_candidates = is_seen.shape
  words = jnp.pad(is_seen, ((0, 0), (0, -num_candidates % BITS))).reshape(tokens, -1, BITS)
  bit = jnp.left_shift(jnp.int32(1), jnp.arange(BITS, dtype=jnp.int32))
  return jnp.where(words, bit, 0).sum(-1, dtype=jnp.int32)

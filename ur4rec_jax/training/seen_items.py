"""A user's other items: the softmax losses leave them out of the candidates, as rankings do.

A ranking leaves out the items that the user had before (`evaluation.seen_items=leave_out`), so a
model need not learn to give them low scores. That is hard to learn, because the state after a
history is similar to the embeddings of its items. Items that the user takes later are left out,
too: they are no wrong answers, and at test time the target is the user's last item.
"""

import flax.struct
import jax
import jax.numpy as jnp

from ur4rec_jax.data.input_pipeline import Batch
from ur4rec_jax.sharding.item_embeddings import NOWHERE, index_from
from ur4rec_jax.training.losses import LOWEST

Array = jax.Array
AS_EVALUATION, KEEP = CHOICES = ('as_evaluation', 'keep')
BITS = 32  # In a word of `packed`.


@flax.struct.dataclass
class SeenItems:
  """The items of the users of a batch.

  Attributes:
    items: `[tokens]` int32, the input of each token in the numbering of the candidates; `NOWHERE`
      for padding.
    users: `[tokens]` int32, the batch's number of each token's user, from 0.
    num_users: most users that the batch may have.
  """

  items: Array
  users: Array
  num_users: int = flax.struct.field(pytree_node=False)

  def table(self, num_candidates: int) -> Array:
    """Returns `[num_users, num_candidates]` bool: the items that each user has."""
    none = jnp.zeros((self.num_users, num_candidates), bool)
    return none.at[self.users, self.items].set(True, mode='drop')

  def renumbered(self, candidates: Array) -> 'SeenItems':
    """Replaces items by their index in the ascending `candidates`; the others get `NOWHERE`."""
    index = jnp.searchsorted(candidates, self.items)
    is_there = jnp.take(candidates, index, mode='clip') == self.items
    return self.replace(items=jnp.where(is_there, index, NOWHERE))


def seen_items(batch: Batch) -> SeenItems:
  """Lists the items that each user of a batch has as inputs, from 0 for id or number 1."""
  rows, slots = batch.users.shape
  row = jnp.arange(rows, dtype=jnp.int32)[:, None]
  return SeenItems(
    index_from(1, batch.item_ids).reshape(-1),
    (row * slots + jnp.maximum(batch.segment_ids - 1, 0)).reshape(-1),
    rows * slots,
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


def packed(table: Array) -> Array:
  """Packs a table `[users, candidates]` into `[users, words]` int32.

  Bit b of word w is set if candidate `32 * w + b` is.
  """
  users, num_candidates = table.shape
  words = jnp.pad(table, ((0, 0), (0, -num_candidates % BITS))).reshape(users, -1, BITS)
  bit = jnp.left_shift(jnp.int32(1), jnp.arange(BITS, dtype=jnp.int32))
  return jnp.where(words, bit, 0).sum(-1, dtype=jnp.int32)

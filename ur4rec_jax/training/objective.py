"""What training minimises: the losses of a batch, by name.

To add a loss over vectors: write it in `losses.py`, add an entry to `AUXILIARY`, declare its weight
`loss.weights.NAME` in `runs/knobs.py`, and name it in `losses` of the stages that list theirs.
docs/extending.md says how to add a loss over scores.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ur4rec_jax.models.layers import take_rows
from ur4rec_jax.models.ur4rec import Encoded
from ur4rec_jax.training import catalogue_softmax, losses
from ur4rec_jax.training.negatives import ByBranch
from ur4rec_jax.training.seen_items import SeenItems, packed
from ur4rec_jax.training.stages import Stage

Array = jax.Array


class LossInputs(NamedTuple):
  """Inputs of the losses besides the model's output.

  Attributes:
    numbers: `[tokens]` int32, the step's row number of each target from 1, 0 for padding.
    target_ids: `[tokens]` int32, item ids of the targets, 0 for padding.
    negatives: by branch; None where the loss reads the whole catalogue.
    num_tokens: `[]` float32, mean number of tokens of a device; sums over tokens are divided by it.
    seen: items that the softmax losses leave out, numbered as `targets`; None for none.
    seen_in_catalogue: the same, numbered from 0 for item id 1.
  """

  numbers: Array
  target_ids: Array
  negatives: ByBranch
  num_tokens: Array
  seen: SeenItems | None = None
  seen_in_catalogue: SeenItems | None = None

  @property
  def targets(self) -> Array:
    """`[tokens]` int32 from 0, rows of the step's item vectors."""
    return jnp.maximum(self.numbers - 1, 0)

  @property
  def weights(self) -> Array:
    """`[tokens]` float32, 1 for a token with a target and 0 for padding."""
    return (self.numbers > 0).astype(jnp.float32)


class Sample(NamedTuple):
  """The tokens that losses over vectors look at.

  They are evenly spaced in the batch, so items appear in proportion to how often users choose them.

  Attributes:
    tokens: `[sample]` indices of tokens.
    numbers: `[sample]` int32, the step's row numbers of their targets from 1, 0 for padding.
      They index the rows of `Content`.
    targets: `[sample]` int32 from 0, rows of the step's item vectors.
    weights: `[sample]` float32.
    pairs: `[2, sample]` indices of pairs of tokens that have the same target.
    pair_numbers: `[sample]` int32, like `numbers`, for the targets of the pairs.
    pair_weights: `[sample]` float32, 0 where the two targets differ or are padding.
  """

  tokens: Array
  numbers: Array
  targets: Array
  weights: Array
  pairs: Array
  pair_numbers: Array
  pair_weights: Array


def make_sample(inputs: LossInputs, size: int) -> Sample:
  """Chooses at most `size` tokens and as many pairs of tokens with the same target."""
  count = inputs.numbers.size
  tokens = _evenly_spaced(count, size)
  # Sorted by target, neighbours are mostly pairs. They are mostly of different users, as few users
  # have an item twice.
  by_target = jnp.argsort(inputs.numbers)
  first = _evenly_spaced(count - 1, size)
  pairs = jnp.stack([by_target[first], by_target[first + 1]])
  a, b = inputs.numbers[pairs]
  return Sample(
    tokens=tokens,
    numbers=inputs.numbers[tokens],
    targets=inputs.targets[tokens],
    weights=inputs.weights[tokens],
    pairs=pairs,
    pair_numbers=a,
    pair_weights=((a == b) & (a > 0)).astype(jnp.float32),
  )


def _evenly_spaced(count: int, size: int) -> Array:
  """Returns at most `size` of the indices below `count`."""
  if size >= count:  # Rounding would list some of them twice.
    return jnp.arange(count)
  return jnp.linspace(0, count - 1, size, dtype=int)


def make_losses(stage: Stage, num_items: int) -> Callable[[Encoded, LossInputs], dict[str, Array]]:
  """Builds the losses of a stage that have a weight.

  Args:
    stage: the training stage.
    num_items: size of the whole catalogue.

  Returns:
    `losses(encoded, inputs)`, which returns the scalars by name: for a branch the sum over this
      device's tokens divided by `inputs.num_tokens`, for the others a mean over items or tokens.
  """
  config = stage.config.loss
  retrieval = {
    branch: functools.partial(
      _branch_loss,
      branch=branch,
      loss=make_retrieval_loss(name, config, num_items),
      over_devices=functools.partial(
        catalogue_softmax.softmax_over_devices, num_items=num_items, chunk_size=config.chunk_size
      ),
    )
    for branch, name in stage.retrieval_losses.items()
  }

  def all_losses(encoded: Encoded, inputs: LossInputs) -> dict[str, Array]:
    sample = make_sample(inputs, config.contrast_items)
    return {
      name: retrieval[name](encoded, inputs)
      if name in retrieval
      else AUXILIARY[name](encoded, sample, config)
      for name in stage.losses
    }

  return all_losses


def _branch_loss(
  encoded: Encoded, inputs: LossInputs, *, branch: str, loss: Callable, over_devices: Callable
) -> Array:
  """Returns the retrieval loss of a branch: this device's sum divided by `num_tokens`."""
  users = encoded.users[branch]
  users = users.reshape(-1, users.shape[-1])
  negatives = inputs.negatives[branch]
  if encoded.own_items is not None and negatives is None:
    items = encoded.own_items[branch]
    seen = inputs.seen_in_catalogue
    total = over_devices(users, items, inputs.target_ids, inputs.weights, seen=seen)
  else:
    items = encoded.items[branch]
    total = loss(users, items, inputs.targets, inputs.weights, negatives, inputs.seen)
  return total / inputs.num_tokens


def consistency(encoded: Encoded, sample: Sample, config: ConfigDict) -> Array:
  """Makes the modalities of an item alike, see `losses.consistency`."""
  del sample, config
  return losses.consistency(encoded.content.modalities[1:], encoded.content.present[1:])


def info_nce(encoded: Encoded, sample: Sample, config: ConfigDict) -> Array:
  """Makes two modalities of an item more alike than those of different items."""
  del config
  vectors = take_rows(encoded.content.modalities, sample.numbers)
  present = encoded.content.present[sample.numbers]
  pairs = list(itertools.combinations(range(present.shape[1]), 2))
  values = [
    losses.info_nce(
      vectors[:, a],
      vectors[:, b],
      sample.numbers,
      sample.weights * present[:, a] * present[:, b],
      encoded.log_temperature,
    )
    for a, b in pairs
  ]
  return sum(values) / len(pairs)


def diversity(encoded: Encoded, sample: Sample, config: ConfigDict) -> Array:
  """Makes the pooled vectors of an item's modality differ, see `losses.diversity`."""
  pooled = encoded.content.pooled[sample.numbers]
  present = encoded.content.present[sample.numbers] * sample.weights[:, None]
  flat = pooled.reshape(-1, *pooled.shape[2:])
  return losses.diversity(flat, present.reshape(-1), config.diversity)


def contrast(encoded: Encoded, sample: Sample, config: ConfigDict) -> Array:
  """Makes a user's best proxy find the target among the targets of the sample."""
  del config
  retrieved = encoded.retrieved.reshape(-1, *encoded.retrieved.shape[2:])[sample.tokens]
  target_vectors = encoded.items['retriever'][sample.targets]
  return losses.info_nce(
    retrieved, target_vectors, sample.numbers, sample.weights, encoded.log_temperature
  )


def matching(encoded: Encoded, sample: Sample, config: ConfigDict) -> Array:
  """Tells pairs of a token and its own target from pairs with the previous token's target.

  The two targets are about equally popular. In packed rows the other one is often an earlier item
  of the same user.
  """
  del config
  users = encoded.users['retriever']
  users = users.reshape(-1, users.shape[-1])[sample.tokens]
  matched = encoded.items['retriever'][sample.targets]
  mismatched = jnp.roll(matched, 1, axis=0)
  is_other = jnp.roll(sample.numbers, 1) != sample.numbers
  scores = [(users * items).sum(-1, dtype=jnp.float32) for items in (matched, mismatched)]
  return losses.matching_bce(
    encoded.matching_scale * jnp.concatenate(scores) + encoded.matching_bias,
    jnp.repeat(jnp.array([1, 0]), len(sample.numbers)),
    jnp.concatenate([sample.weights, sample.weights * is_other * jnp.roll(sample.weights, 1)]),
  )


def same_target(encoded: Encoded, sample: Sample, config: ConfigDict) -> Array:
  """Makes two states of `sasrec` alike if the same item comes next (ICSRec: Qin et al. 2024).

  Each state must find its partner among the states of all pairs in the sample.
  """
  del config
  users = encoded.users['sasrec']
  a, b = users.reshape(-1, users.shape[-1])[sample.pairs]
  return losses.info_nce(a, b, sample.pair_numbers, sample.pair_weights, encoded.log_temperature)


AUXILIARY = {
  'consistency': consistency,
  'info_nce': info_nce,
  'diversity': diversity,
  'contrast': contrast,
  'matching': matching,
  'same_target': same_target,
}


def make_retrieval_loss(name: str, config: ConfigDict, num_items: int) -> Callable[..., Array]:
  """Builds a retrieval loss.

  Args:
    name: one of `losses.RETRIEVAL_LOSSES`.
    config: `config.loss`: `num_negatives`, `calibration`, `chunk_size`.
    num_items: size of the whole catalogue.

  Returns:
    `loss(hidden, item_vectors, targets, weights, negatives, seen)`, the scalar sum over tokens.
      Shapes are those of `catalogue_softmax.py`; `negatives` come from `draw_negatives`. Only the
      softmax losses leave out the items in `seen`.
  """

  def sampled_for_each_token(hidden, item_vectors, targets, weights, negatives, seen=None):
    del seen
    pairwise = losses.RETRIEVAL_LOSSES[name]
    if name == 'gbce':
      pairwise = lambda *logits: losses.gbce(*logits, num_items, config.calibration)
    # In float32, so that the gradients of an item are summed in it over tokens and chunks.
    item_vectors = item_vectors.astype(jnp.float32)

    def loss(hidden, targets, negatives, weights):
      vectors_of = lambda items: item_vectors[items].astype(hidden.dtype)
      positive = (hidden * vectors_of(targets)).sum(-1, dtype=jnp.float32)
      negative = jnp.einsum(
        'td,tnd->tn', hidden, vectors_of(negatives), preferred_element_type=jnp.float32
      )
      return pairwise(positive, negative, weights)

    # The vectors of a chunk's negatives are in memory together. With width 64 they take as much
    # memory as the logits of `config.chunk_size` tokens over 2,048 items.
    chunk_size = max(1, 32 * config.chunk_size // config.num_negatives)
    return catalogue_softmax.chunked_sum(
      loss, chunk_size, hidden, targets, negatives.items, weights
    )

  def sampled_for_all_tokens(hidden, item_vectors, targets, weights, negatives, seen=None):
    item_vectors = item_vectors.astype(jnp.float32)  # As above.
    negative_vectors = item_vectors[negatives.items]
    users = is_seen = words = None
    if seen is not None:
      users, is_seen = seen.users, _is_seen(seen, negatives.items)
    if catalogue_softmax.has_kernel(hidden, negative_vectors):
      vectors = (x.astype(hidden.dtype) for x in (item_vectors[targets], negative_vectors))
      if seen is not None:
        words = packed(is_seen)[users]
      return catalogue_softmax.fused_sampled_softmax(
        hidden, *vectors, targets, weights, negatives, words
      )

    def loss(hidden, targets, weights, users):
      target_vectors, others = (
        x.astype(hidden.dtype) for x in (item_vectors[targets], negative_vectors)
      )
      positive = (hidden * target_vectors).sum(-1, dtype=jnp.float32)
      negative = jnp.matmul(hidden, others.T, preferred_element_type=jnp.float32)
      left_out = targets[:, None] == negatives.items
      if users is not None:
        left_out |= is_seen[users]
      return losses.sampled_softmax(
        positive, negative, weights, negatives.log_expected_count, left_out
      )

    arrays = hidden, targets, weights, users
    return catalogue_softmax.chunked_sum(loss, config.chunk_size, *arrays)

  def whole_catalogue(hidden, item_vectors, targets, weights, negatives, seen=None):
    del negatives
    arrays = hidden, item_vectors, targets, weights
    return catalogue_softmax.softmax(*arrays, config.chunk_size, seen)

  others = {'sampled_softmax': sampled_for_all_tokens, 'softmax': whole_catalogue}
  return others.get(name, sampled_for_each_token)


def _is_seen(seen: SeenItems, negatives: Array) -> Array:
  """Returns `[users, negatives]` bool: which of the negatives `[negatives]` each user has."""
  ascending = jnp.sort(negatives)
  # If an item was drawn several times, the search finds its first copy, and all copies read it.
  first = jnp.searchsorted(ascending, negatives)
  return seen.renumbered(ascending).table(negatives.size)[:, first]

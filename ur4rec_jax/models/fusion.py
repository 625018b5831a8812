"""Joins modalities into one vector, and the scores of two branches into one ranking.

A branch's score is the inner product of a user's and an item's vector. A weighted sum of scores is
therefore one inner product of the concatenated vectors, the user's scaled by the weights, and no
score matrix of a single branch is formed.
"""

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
MODALITY_FUSIONS = ('add', 'concat', 'gated')
# Weighted sums of scores; the other fusions need the ranking of each branch.
SUMS = ('weighted', 'learned', 'adaptive')
BRANCH_FUSIONS = (*SUMS, 'rank', 'cascade')
CALIBRATIONS = ('standardise', 'log_probability')
GATES = 'gates'  # The collection of mean weights that are reported while training.


def _latest(_, new: Array) -> Array:
  return new


class ModalityFusion(nn.Module):
  """Joins the vectors of the modalities that an item or user has into one vector.

  Attributes:
    kind: `add` sums the vectors; `concat` applies a dense layer to their concatenation, with zeros
      for missing ones; `gated` averages them with weights that are computed from all of them and
      sum to 1 over those present (Arevalo et al., Gated Multimodal Units, 2017, here with a softmax
      for any number of modalities).
    names: names of the modalities. The mean weights of several go to the collection `gates`.
    dtype: computation type; gates are float32.
  """

  kind: str
  names: tuple[str, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, vectors: Array, present: Array) -> Array:
    """Returns `[rows, dim]`, zeros for a row without any modality.

    Args:
      vectors: `[rows, modalities, dim]`.
      present: `[rows, modalities]` bool.
    """
    rows, modalities, dim = vectors.shape
    vectors = jnp.where(present[..., None], vectors, 0)
    if self.kind == 'add':
      return vectors.sum(1)
    side_by_side = vectors.reshape(rows, modalities * dim)
    if self.kind == 'concat':
      joined = nn.Dense(dim, dtype=self.dtype, name='joined')(side_by_side)
      return jnp.where(present.any(1, keepdims=True), joined, 0)
    logits = nn.Dense(modalities, dtype=self.dtype, name='gate')(side_by_side)
    weights = gates(logits, present)
    if modalities > 1:
      means = weights.sum(0) / jnp.maximum(present.any(1).sum(), 1)
      for name, mean in zip(self.names, means, strict=True):
        self.sow(GATES, name, mean, reduce_fn=_latest)
    return jnp.einsum('rm,rmd->rd', weights.astype(vectors.dtype), vectors)


def modality_parts(kind: str, params: Mapping, vectors: Array, present: Array) -> Array:
  """Splits the output of `ModalityFusion` into the contributions of the modalities.

  The bias of `concat` belongs to no modality, so it is divided equally among those present.

  Args:
    kind: kind of the `ModalityFusion`.
    params: parameters of the `ModalityFusion`; empty for `add`.
    vectors: `[rows, modalities, dim]`.
    present: `[rows, modalities]` bool.

  Returns:
    `[rows, modalities, dim]`, whose sum over modalities is the output.
  """
  rows, modalities, dim = vectors.shape
  vectors = jnp.where(present[..., None], vectors, 0)
  if kind == 'add':
    return vectors
  if kind == 'concat':
    kernel = params['joined']['kernel'].reshape(modalities, dim, dim)
    share = present / jnp.maximum(present.sum(1, keepdims=True), 1)
    bias = share[..., None] * params['joined']['bias']
    return jnp.einsum('rmd,mde->rme', vectors, kernel) + bias
  logits = vectors.reshape(rows, modalities * dim) @ params['gate']['kernel']
  return vectors * gates(logits + params['gate']['bias'], present)[..., None]


def gates(logits: Array, present: Array) -> Array:
  """Computes a softmax over the modalities that are present.

  Args:
    logits: `[rows, modalities]`.
    present: `[rows, modalities]` bool.

  Returns:
    `[rows, modalities]` float32, zeros where absent. A row sums to 1, or to 0 without modalities.
  """
  lowest = jnp.finfo(jnp.float32).min
  weights = nn.softmax(jnp.where(present, logits.astype(jnp.float32), lowest))
  return jnp.where(present, weights, 0)


def covariance(items: Array) -> Array:
  """Returns the covariance `[dim, dim]` float32 of item vectors `[items, dim]`."""
  centred = (items - items.mean(0, dtype=jnp.float32)).astype(jnp.float32)
  return centred.T @ centred / items.shape[0]


def standard_deviation(users: Array, covariance: Array) -> Array:
  """Returns the standard deviation of each user's scores over the catalogue.

  It needs no scores: the variance of u.v over items v is u' C u, with C the covariance of the item
  vectors. (The mean is the same for all items of a user and changes no ranking.)

  Args:
    users: `[..., dim]`.
    covariance: `[dim, dim]` of the item vectors.

  Returns:
    `[..., 1]` float32.
  """
  users = users.astype(jnp.float32)
  variance = jnp.einsum('...d,de,...e->...', users, covariance, users)
  return jnp.sqrt(jnp.maximum(variance, 1e-12))[..., None]


class BranchFusion(nn.Module):
  """Joins the scores of several branches.

  Learned weights are reported in the collection `gates`, as shares of their sum, averaged over
  users.

  Attributes:
    kind: a weighted sum of scores, `weighted` by constants, `learned` by trained weights for all
      users, `adaptive` by a small network on the user's states; or `rank` (see `reciprocal_rank`);
      or `cascade`, where the second branch orders the best items of the first.
    branches: names of the branches.
    weights: a constant for each branch, from which `learned` and `adaptive` start.
    calibration: how scores are made comparable before they are summed. `standardise` divides them
      by the user's standard deviation over the catalogue. `log_probability` takes scores as they
      are, which is right if each branch was trained by cross-entropy: the sum is then a product of
      experts (Hinton 2002).
    hidden_dim: width of the network of `adaptive`.
    rank_constant: constant of `rank`, see `reciprocal_rank`.
    cascade_size: number of the first branch's best items that `cascade` reorders.
  """

  kind: str
  branches: tuple[str, ...]
  weights: tuple[float, ...]
  calibration: str = 'standardise'
  hidden_dim: int = 16
  rank_constant: float = 60.0
  cascade_size: int = 100

  @nn.compact
  def branch_weights(
    self, users: Mapping[str, Array], covariances: Mapping[str, Array]
  ) -> dict[str, Array]:
    """Returns the factors by which the branches' scores are multiplied before they are summed.

    Args:
      users: by branch, `[..., width]`.
      covariances: by branch, `[width, width]` of the item vectors; only `standardise` reads them.

    Returns:
      By branch `[..., 1]` or `[1]` float32.
    """
    log_weights = jnp.log(jnp.asarray(self.weights, jnp.float32))
    if self.kind == 'learned':
      log_weights = self.param('log_weights', lambda _: log_weights)
    elif self.kind == 'adaptive':
      # No gradient of the weights flows into the states, which only their scores train.
      states = jnp.concatenate(
        [jax.lax.stop_gradient(users[branch]) for branch in self.branches], -1
      )
      h = nn.relu(nn.Dense(self.hidden_dim, name='hidden')(nn.LayerNorm(name='norm')(states)))
      change = nn.Dense(len(self.branches), kernel_init=nn.initializers.zeros, name='log_weights')(
        h
      )
      log_weights = log_weights + change
    if self.kind != 'weighted':
      shares = nn.softmax(log_weights).reshape(-1, len(self.branches)).mean(0)
      for name, share in zip(self.branches, shares, strict=True):
        self.sow(GATES, name, share, reduce_fn=_latest)
    weights = {branch: jnp.exp(log_weights[..., i, None]) for i, branch in enumerate(self.branches)}
    if self.calibration == 'standardise':
      for branch in self.branches:
        weights[branch] = weights[branch] / standard_deviation(users[branch], covariances[branch])
    return weights

  def __call__(self, users: Mapping[str, Array], items: Mapping[str, Array]) -> tuple[Array, Array]:
    """Concatenates the branches' vectors, so that their inner product is the sum of scores.

    Args:
      users: by branch, `[..., width]`.
      items: by branch, `[items, width]`.

    Returns:
      `[..., sum of widths]`, and `[items, sum of widths]`.
    """
    users = self.scaled(users, self.covariances(items))
    return self.side_by_side(users), self.side_by_side(items)

  def side_by_side(self, vectors: Mapping[str, Array]) -> Array:
    """Concatenates the branches' `[..., width]` to `[..., sum of widths]`."""
    return jnp.concatenate([vectors[branch] for branch in self.branches], -1)

  def covariances(self, items: Mapping[str, Array]) -> dict[str, Array]:
    """Returns by branch the covariance of items `[items, width]`; {} unless `standardise`."""
    if self.calibration != 'standardise':
      return {}
    return {branch: covariance(items[branch]) for branch in self.branches}

  def scaled(
    self, users: Mapping[str, Array], covariances: Mapping[str, Array]
  ) -> dict[str, Array]:
    """Scales users' vectors, so that the sum of the branches' inner products is the score.

    Args:
      users: by branch, `[..., width]`.
      covariances: by branch, `[width, width]` of the item vectors.
    """
    weights = self.branch_weights(users, covariances)
    return {
      branch: (users[branch] * weights[branch]).astype(users[branch].dtype)
      for branch in self.branches
    }

  def scores(
    self,
    users: Mapping[str, Array],
    items: Mapping[str, Array],
    leave_out: Callable[[Array], Array],
  ) -> Array:
    """Scores the catalogue.

    Args:
      users: by branch, `[users, width]`.
      items: by branch, `[items, width]`.
      leave_out: sets scores `[users, items]` of items that may not be recommended to -inf; the
        ranks of `rank` and `cascade` are counted without them.

    Returns:
      `[users, items]` float32.
    """
    if self.kind in SUMS:
      return leave_out(inner_products(*self(users, items)))
    by_branch = [
      leave_out(inner_products(users[branch], items[branch])) for branch in self.branches
    ]
    if self.kind == 'rank':
      return leave_out(reciprocal_rank(by_branch, self.weights, self.rank_constant))
    return leave_out(cascade(*by_branch, self.cascade_size))


def inner_products(users: Array, items: Array) -> Array:
  """Returns scores `[users, items]` float32 from `[users, width]` and `[items, width]`."""
  return jnp.matmul(users, items.T, preferred_element_type=jnp.float32)


def count_below(scores: Array) -> Array:
  """Counts for each item how many items of the row score lower; 0 is the lowest score.

  Args:
    scores: `[users, items]`.
  """
  below = jax.vmap(lambda row: jnp.searchsorted(jnp.sort(row), row, side='left'))
  return below(scores).astype(jnp.float32)


def reciprocal_rank(by_branch: Sequence[Array], weights: Sequence[float], constant: float) -> Array:
  """Reciprocal rank fusion (Cormack et al., SIGIR 2009): the sum of w / (constant + rank).

  Args:
    by_branch: `[users, items]` scores of each branch; items with equal scores share the worst rank.
    weights: one for each branch.
    constant: 60 in the paper; the larger, the less the top ranks differ.

  Returns:
    `[users, items]` float32.
  """
  ranks = [scores.shape[-1] - count_below(scores) for scores in by_branch]
  return sum(w / (constant + rank) for w, rank in zip(weights, ranks, strict=True))


def cascade(first: Array, second: Array, size: int) -> Array:
  """Orders the first branch's best `size` items by the second branch, the others after them.

  Args:
    first: `[users, items]` scores that choose items; items that tie at the border are all chosen.
    second: `[users, items]` scores that order the chosen items.
    size: number of chosen items.

  Returns:
    `[users, items]` float32.
  """
  size = min(size, first.shape[-1])
  border = jax.lax.top_k(first, size)[0][:, -1:]
  return jnp.where(first >= border, first.shape[-1] + count_below(second), count_below(first))

"""Joining modalities into one vector, and the scores of two branches into one ranking.

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
# Weighted sums of scores, and two that need the ranking of each branch.
SUMS = ('weighted', 'learned', 'adaptive')
BRANCH_FUSIONS = (*SUMS, 'rank', 'cascade')
CALIBRATIONS = ('standardise', 'log_probability')
GATES = 'gates'  # Variables that report what a part of the whole counts, on average.


def _latest(_, new: Array) -> Array:
  return new


class ModalityFusion(nn.Module):
  """Joins the vectors of the modalities that are present into one.

  Attributes:
    kind: `add` sums them; `concat` is a dense layer over them side by side, zeros where absent;
      `gated` averages them under gates that are computed from all of them and sum to 1 over those
      present (Arevalo et al., Gated Multimodal Units, 2017, with a softmax for any number).
    names: of the modalities; if several, their mean gates go to the collection `gates`.
    dtype: computation type; gates are float32.
  """

  kind: str
  names: tuple[str, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, vectors: Array, present: Array) -> Array:
    """Returns `[rows, dim]`, zeros where nothing is present.

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
  """Cuts what `ModalityFusion` gives into what each modality adds to it.

  The bias of `concat`, which belongs to no modality, is shared out among those present.

  Args:
    kind: as `ModalityFusion`'s, whose `params` these are.
    params: its parameters; empty for `add`.
    vectors: `[rows, modalities, dim]`.
    present: `[rows, modalities]` bool.

  Returns:
    `[rows, modalities, dim]`; the sum over modalities is what it gives.
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
  """Softmax over the modalities that are present.

  Args:
    logits: `[rows, modalities]`.
    present: `[rows, modalities]` bool.

  Returns:
    `[rows, modalities]` float32, zeros where absent; each row sums to 1, or 0 if nothing is there.
  """
  lowest = jnp.finfo(jnp.float32).min
  weights = nn.softmax(jnp.where(present, logits.astype(jnp.float32), lowest))
  return jnp.where(present, weights, 0)


def covariance(items: Array) -> Array:
  """Covariance `[dim, dim]` float32 of item vectors `[items, dim]`."""
  centred = (items - items.mean(0, dtype=jnp.float32)).astype(jnp.float32)
  return centred.T @ centred / items.shape[0]


def standard_deviation(users: Array, covariance: Array) -> Array:
  """Standard deviation of each user's scores over the catalogue, without the scores.

  The variance of u.v over items v is u' C u with C the covariance of the item vectors. (The mean
  is the same for all items of a user and changes no ranking.)

  Args:
    users: `[..., dim]`.
    covariance: `[dim, dim]` of the items.

  Returns:
    `[..., 1]` float32.
  """
  users = users.astype(jnp.float32)
  variance = jnp.einsum('...d,de,...e->...', users, covariance, users)
  return jnp.sqrt(jnp.maximum(variance, 1e-12))[..., None]


class BranchFusion(nn.Module):
  """Joins the scores of several branches.

  Trained weights go to the collection `gates`, divided by their sum, on average over users.

  Attributes:
    kind: a weighted sum of scores, `weighted` by constants, `learned` by trained global weights,
      `adaptive` by a small network on the user's states; or `rank` (`reciprocal_rank`), or
      `cascade`, which ranks the first branch's best anew by the second.
    branches: the branches' names.
    weights: one constant a branch; where `learned` and `adaptive` start.
    calibration: of sums. `standardise` divides scores by the user's standard deviation over the
      catalogue; `log_probability` takes them as they are, which is right where each branch was
      trained by cross-entropy: the sum is then a product of experts (Hinton 2002).
    hidden_dim: width of the network of `adaptive`.
    rank_constant: of `rank`.
    cascade_size: of `cascade`: how many of the first branch's best.
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
    """Says what each branch's scores are multiplied by before they are summed.

    Args:
      users: by branch, `[..., width]`.
      covariances: by branch, `[width, width]` of the items' vectors; for `standardise`.

    Returns:
      By branch `[..., 1]` or `[1]` float32.
    """
    log_weights = jnp.log(jnp.asarray(self.weights, jnp.float32))
    if self.kind == 'learned':
      log_weights = self.param('log_weights', lambda _: log_weights)
    elif self.kind == 'adaptive':
      # The states are only read: what they are is for the branches' own losses to say.
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
    """Puts the branches' vectors side by side, so that their product is the sum of scores.

    Args:
      users: by branch, `[..., width]`.
      items: by branch, `[items, width]`.

    Returns:
      `[..., sum of widths]`, and `[items, sum of widths]`.
    """
    users = self.scaled(users, self.covariances(items))
    return self.side_by_side(users), self.side_by_side(items)

  def side_by_side(self, vectors: Mapping[str, Array]) -> Array:
    """Joins the branches' `[..., width]` to `[..., sum of widths]`."""
    return jnp.concatenate([vectors[branch] for branch in self.branches], -1)

  def covariances(self, items: Mapping[str, Array]) -> dict[str, Array]:
    """By branch `[width, width]`, of items `[items, width]`; none but for `standardise`."""
    if self.calibration != 'standardise':
      return {}
    return {branch: covariance(items[branch]) for branch in self.branches}

  def scaled(
    self, users: Mapping[str, Array], covariances: Mapping[str, Array]
  ) -> dict[str, Array]:
    """Multiplies users' vectors, so that the sum of the branches' inner products is the score.

    Args:
      users: by branch, `[..., width]`.
      covariances: of the items.
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
      leave_out: sets what is not to be recommended to -inf in scores `[users, items]`; ranks are
        counted without it.

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
  """Scores `[users, items]` float32 from `[users, width]` and `[items, width]`."""
  return jnp.matmul(users, items.T, preferred_element_type=jnp.float32)


def places(scores: Array) -> Array:
  """Counts for each item how many of the row score lower: 0 is last, equal scores share a place.

  Args:
    scores: `[users, items]`.
  """
  below = jax.vmap(lambda row: jnp.searchsorted(jnp.sort(row), row, side='left'))
  return below(scores).astype(jnp.float32)


def reciprocal_rank(by_branch: Sequence[Array], weights: Sequence[float], constant: float) -> Array:
  """Reciprocal rank fusion (Cormack et al., SIGIR 2009): the sum of w / (constant + rank).

  Args:
    by_branch: `[users, items]` scores of each branch; items with equal scores share the worst rank.
    weights: one a branch.
    constant: 60 in the paper; the larger, the less the places at the top differ.

  Returns:
    `[users, items]` float32.
  """
  ranks = [scores.shape[-1] - places(scores) for scores in by_branch]
  return sum(w / (constant + rank) for w, rank in zip(weights, ranks, strict=True))


def cascade(first: Array, second: Array, size: int) -> Array:
  """Puts the first branch's best `size` items in the second branch's order, the others behind them.

  Args:
    first: `[users, items]` scores that choose; equal ones at the border are all chosen.
    second: `[users, items]` scores that order the chosen.
    size: how many are chosen.

  Returns:
    `[users, items]` float32.
  """
  size = min(size, first.shape[-1])
  border = jax.lax.top_k(first, size)[0][:, -1:]
  return jnp.where(first >= border, first.shape[-1] + places(second), places(first))

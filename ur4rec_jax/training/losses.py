"""Training losses: pure functions, reduced in float32.

Losses over sampled items (`bpr`, `bce`, `gbce`, `sampled_softmax`) are weighted sums over flat
arrays of tokens; `weights` `[tokens]` are 1 for a real token and 0 for padding. The caller divides
by the number of tokens on all devices, so a result does not depend on how tokens are spread over
devices. `catalogue_softmax.py` has the cross-entropy over the whole catalogue.

Losses over vectors (from `consistency` on) are weighted means over their rows, and 0 if no row
counts. Entries with a mask or weight of 0 may hold anything, even NaN. Vectors may have any length;
a vector of length 0 has a cosine of 0 with all others.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
# The score of an item that does not count. It is finite, because the sum of no items at all would
# have a gradient of NaN.
LOWEST = jnp.finfo(jnp.float32).min


def bpr(positive: Array, negative: Array, weights: Array) -> Array:
  """Bayesian personalised ranking (Rendle et al. 2009): mean over negatives of -log s(p - n).

  Args:
    positive: `[tokens]` logits of the targets.
    negative: `[tokens, negatives]` logits of sampled items.
    weights: `[tokens]`.

  Returns:
    Scalar sum over tokens.
  """
  losses = jax.nn.softplus(negative - positive[:, None]).mean(-1)
  return (losses * weights).sum()


def bce(positive: Array, negative: Array, weights: Array) -> Array:
  """Binary cross-entropy (Kang & McAuley 2018, eq. 7): -log s(p) - mean of log(1 - s(n)).

  Shapes as in `bpr`. With one negative this is SASRec's loss; more are averaged, not summed.
  """
  losses = jax.nn.softplus(-positive) + jax.nn.softplus(negative).mean(-1)
  return (losses * weights).sum()


# Losses over scores, by name. A function has the arguments of `bpr` and compares each target with
# its own negatives; extensions may add such functions. `objective.make_retrieval_loss` builds the
# losses that are None here.
RETRIEVAL_LOSSES: dict[str, Callable[..., Array] | None] = {
  'softmax': None,
  'sampled_softmax': None,
  'bce': bce,
  'bpr': bpr,
  'gbce': None,
}


def gbce(
  positive: Array, negative: Array, weights: Array, num_items: int, calibration: float
) -> Array:
  """Generalised BCE of gSASRec (Petrov & Macdonald, RecSys 2023, eq. 11-15).

  Args:
    positive: `[tokens]` logits of the targets.
    negative: `[tokens, negatives]` logits of sampled items.
    weights: `[tokens]`.
    num_items: catalogue size.
    calibration: t in [0, 1]: 0 is plain BCE over summed negatives, 1 gives calibrated
      probabilities; the paper uses .75.

  Returns:
    Scalar sum over tokens.
  """
  sampling_rate = negative.shape[-1] / (num_items - 1)
  beta = 1 - calibration * (1 - sampling_rate)
  losses = beta * jax.nn.softplus(-positive) + jax.nn.softplus(negative).sum(-1)
  return (losses * weights).sum()


def sampled_softmax(
  positive: Array,
  negative: Array,
  weights: Array,
  log_expected_count: Array,
  left_out: Array,
) -> Array:
  """Cross-entropy whose partition sum is estimated from shared negatives.

  The target is always in the sum, so it is not corrected. Each negative represents
  1 / (expected number of times that it is drawn) items (Bengio & Senecal 2008; Khrylchenko et al.
  2025). A negative that equals the token's own target must be left out.

  Args:
    positive: `[tokens]` logits of the targets.
    negative: `[tokens, negatives]` logits of the shared negatives.
    weights: `[tokens]`.
    log_expected_count: `[negatives]`, log(negatives * probability of drawing that item).
    left_out: `[tokens, negatives]`, True where a negative does not count for that token.

  Returns:
    Scalar sum over tokens.
  """
  corrected = jnp.where(left_out, LOWEST, negative - log_expected_count)
  log_sum = jnp.logaddexp(positive, jax.nn.logsumexp(corrected, axis=-1))
  return ((log_sum - positive) * weights).sum()


def _at_least_float32(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _unit(vectors: Array, kept: Array) -> Array:
  """Scales `[..., dim]` to length 1; zeros where `kept`, over the leading axes, is False."""
  kept = jnp.expand_dims(kept, range(kept.ndim, vectors.ndim))
  vectors = _at_least_float32(jnp.where(kept, vectors, 0))
  length = optax.safe_norm(vectors, 0, axis=-1, keepdims=True)
  return vectors / jnp.where(length > 0, length, 1)


def _mean(losses: Array, weights: Array) -> Array:
  total = weights.sum()
  return (losses * weights).sum() / jnp.where(total > 0, total, 1)


def _sum_of_cosines(units: Array) -> Array:
  """Sums the cosines of all pairs of `[..., vectors, dim]`, each pair once."""
  # |sum of u|^2 counts every pair twice and every vector with itself once.
  return (jnp.square(units.sum(-2)).sum(-1) - jnp.square(units).sum((-2, -1))) / 2


def consistency(vectors: Array, present: Array) -> Array:
  """Modality consistency: mean over an item's pairs of modalities of 1 - cosine.

  Args:
    vectors: `[items, modalities, dim]`.
    present: `[items, modalities]`, False where the item lacks the modality.

  Returns:
    Scalar mean over the items with at least two modalities, in [0, 2].
  """
  count = present.sum(-1)
  pairs = count * (count - 1) / 2
  cosine = _sum_of_cosines(_unit(vectors, present)) / jnp.maximum(pairs, 1)
  return _mean(1 - cosine, pairs > 0)


def info_nce(a: Array, b: Array, ids: Array, weights: Array, log_temperature: Array) -> Array:
  """Symmetric InfoNCE (van den Oord et al. 2018, eq. 4; CLIP: Radford et al. 2021, fig. 3).

  Row i of `a` must find row i of `b` among all rows of `b`, and the other way round. The logits are
  cosine / temperature. If a row of `a` has several vectors, the best one counts (BLIP-2: Li et al.
  2023; UR4Rec: Zhang, Zhu & Dou, COLING 2025).

  Args:
    a: `[batch, dim]` or `[batch, vectors, dim]`.
    b: `[batch, dim]`.
    ids: `[batch]`; rows with the same id are not each other's negatives.
    weights: `[batch]`, 0 for rows that are left out, as negatives of other rows too.
    log_temperature: scalar.

  Returns:
    Scalar mean over rows and both directions.
  """
  kept = weights > 0
  a, b = _unit(a, kept), _unit(b, kept)
  if a.ndim == 2:
    a = a[:, None]
  cosine = jnp.einsum('ikd,jd->ijk', a, b).max(-1)
  negative = (ids[:, None] != ids) & kept[:, None] & kept
  in_sum = negative | jnp.eye(len(ids), dtype=bool)
  logits = jnp.where(in_sum, cosine * jnp.exp(-log_temperature), -jnp.inf)
  log_sums = (jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)) / 2
  return _mean(log_sums - jnp.diagonal(logits), weights)


def _mean_cosine(units: Array) -> Array:
  count = units.shape[-2]
  return _sum_of_cosines(units) / (count * (count - 1) / 2)


def _negative_logdet(units: Array) -> Array:
  # Rounded products (TF32, bfloat16) could leave the matrix without a Cholesky factor.
  gram = jnp.einsum('bkd,bld->bkl', units, units, precision='highest')
  factor = jnp.linalg.cholesky(gram + 1e-3 * jnp.eye(units.shape[-2], dtype=units.dtype))
  return -2 * jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)).mean(-1)


def _negative_distance(units: Array) -> Array:
  # Computed from differences, because 2 - 2 cosine loses all digits if two vectors are close. A
  # vector's distance to itself is left out: compiled code may not return an exact zero for it, and
  # its gradient would be arbitrary.
  first, second = jnp.triu_indices(units.shape[-2], 1)
  return -optax.safe_norm(units[:, first] - units[:, second], 0, axis=-1).mean(-1)


_DIVERSITIES = {
  'cosine': _mean_cosine,
  'logdet': _negative_logdet,
  'distance': _negative_distance,
}
DIVERSITIES = tuple(_DIVERSITIES)


def diversity(vectors: Array, weights: Array, kind: str) -> Array:
  """Measures how similar the vectors of a row are; lower is more diverse.

  With u the K vectors of a row, scaled to length 1, the kinds are
    cosine: mean over pairs of u_i . u_j;
    logdet: -log det(u u^T + .001 I) / K, as in determinantal point processes (Kulesza & Taskar
      2012);
    distance: minus the mean over pairs of |u_i - u_j|.

  Args:
    vectors: `[batch, vectors, dim]`, at least two vectors.
    weights: `[batch]`.
    kind: one of `DIVERSITIES`.

  Returns:
    Scalar mean over rows.

  Raises:
    ValueError: `vectors` holds less than two vectors a row.
  """
  if vectors.shape[-2] < 2:
    raise ValueError(f'diversity needs at least two vectors a row, got shape {vectors.shape}')
  return _mean(_DIVERSITIES[kind](_unit(vectors, weights > 0)), weights)


def matching_bce(logits: Array, labels: Array, weights: Array) -> Array:
  """Binary cross-entropy of matched and mismatched pairs: mean of -log s(x) and -log(1 - s(x)).

  Args:
    logits: `[batch]`.
    labels: `[batch]`, 1 for a matched pair and 0 for a mismatched one.
    weights: `[batch]`.

  Returns:
    Scalar mean over pairs.
  """
  logits = _at_least_float32(jnp.where(weights > 0, logits, 0))
  return _mean(jax.nn.softplus(jnp.where(labels > 0, -logits, logits)), weights)


def uncertainty_weighted(losses: Mapping[str, Array], log_variances: Mapping[str, Array]) -> Array:
  """Sum of losses with learned weights (Kendall, Gal & Cipolla, CVPR 2018): exp(-s) L + s.

  This is twice their eq. 7, with s = log sigma^2.

  Args:
    losses: name -> scalar.
    log_variances: name -> scalar s, for the same names.

  Returns:
    Scalar.

  Raises:
    ValueError: the names differ.
  """
  if losses.keys() != log_variances.keys():
    raise ValueError(f'losses {sorted(losses)}, but log variances {sorted(log_variances)}')
  return sum(jnp.exp(-s) * losses[name] + s for name, s in log_variances.items())

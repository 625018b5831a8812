"""Training losses: pure functions, reduced in float32.

The losses of a user's next item are weighted sums over flat arrays of tokens. `hidden`
`[tokens, dim]` are user states, `item_vectors` `[num_items, dim]` the catalogue (row i is item id
i + 1), `targets` `[tokens]` rows of the catalogue, `weights` `[tokens]` 1 for a real token and 0
for padding. Each returns the sum over tokens; the caller divides by the global count, so that a
result does not depend on how tokens are spread over devices.

The losses of vectors, from `consistency` on, are weighted means over the rows they are given, and 0
where no row counts. What a mask or a weight of 0 leaves out may hold anything, NaN too. Vectors may
have any length; those of length 0 have a cosine of 0 with all others.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from ur4rec_jax.sharding.item_embeddings import places_from

Array = jax.Array
RETRIEVAL_LOSSES = ('softmax', 'sampled_softmax', 'bce', 'bpr', 'gbce')


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
  is_target: Array,
) -> Array:
  """Cross-entropy whose partition sum is estimated from shared negatives.

  The target stands in the sum for certain, so it is not corrected; each negative stands for
  1 / (expected times it is drawn) items (Bengio & Senecal 2008; Khrylchenko et al. 2025). A
  negative that is the token's own target is left out.

  Args:
    positive: `[tokens]` logits of the targets.
    negative: `[tokens, negatives]` logits of the shared negatives.
    weights: `[tokens]`.
    log_expected_count: `[negatives]`, log(negatives * probability of drawing that item).
    is_target: `[tokens, negatives]`, True where the negative is that token's target.

  Returns:
    Scalar sum over tokens.
  """
  corrected = jnp.where(is_target, -jnp.inf, negative - log_expected_count)
  log_sum = jnp.logaddexp(positive, jax.nn.logsumexp(corrected, axis=-1))
  return ((log_sum - positive) * weights).sum()


def _matmul(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def plain_softmax(hidden: Array, item_vectors: Array, targets: Array, weights: Array) -> Array:
  """Cross-entropy over the whole catalogue, written plainly; the reference for `softmax`."""
  logits = _matmul(hidden, item_vectors.T)
  target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
  return ((jax.nn.logsumexp(logits, axis=-1) - target_logits) * weights).sum()


def _chunks(x: Array, chunk_size: int) -> Array:
  """Reshapes `[tokens, ...]` to `[chunks, chunk_size, ...]`, zeros at the end."""
  padding = [(0, -x.shape[0] % chunk_size)] + [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, padding).reshape(-1, chunk_size, *x.shape[1:])


def chunked_sum(loss: Callable[..., Array], chunk_size: int, *arrays: Array) -> Array:
  """Sums `loss(*chunk)` over chunks of tokens, keeping one chunk's intermediate values at a time.

  Args:
    loss: maps `[chunk_size, ...]` arrays to a scalar; zero for tokens that are all zeros.
    chunk_size: tokens a chunk.
    *arrays: `[tokens, ...]`.

  Returns:
    Scalar.
  """
  if chunk_size >= arrays[0].shape[0]:
    return loss(*arrays)
  chunk_loss = jax.checkpoint(lambda chunk: loss(*chunk))
  chunks = tuple(_chunks(x, chunk_size) for x in arrays)
  return jax.lax.map(chunk_loss, chunks).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def softmax(
  hidden: Array, item_vectors: Array, targets: Array, weights: Array, chunk_size: int
) -> Array:
  """Cross-entropy over the whole catalogue in memory of `chunk_size * num_items`.

  The gradient is formed in the forward pass while a chunk's logits are at hand, so logits are
  computed once and never kept.

  Args:
    hidden: `[tokens, dim]`.
    item_vectors: `[num_items, dim]`.
    targets: `[tokens]` int32 rows of `item_vectors`.
    weights: `[tokens]`.
    chunk_size: tokens a chunk; the last chunk is padded.

  Returns:
    Scalar sum over tokens.
  """
  return _softmax_forward(hidden, item_vectors, targets, weights, chunk_size)[0]


def _softmax_forward(hidden, item_vectors, targets, weights, chunk_size):
  tokens, dim = hidden.shape
  chunk_size = min(chunk_size, tokens)

  def step(item_gradient, chunk):
    h, target, weight = chunk
    logits = _matmul(h, item_vectors.T)
    top = logits.max(-1, keepdims=True)
    unnormalised = jnp.exp(logits - top)
    total = unnormalised.sum(-1, keepdims=True)
    target_vectors = item_vectors[target]
    target_logits = jnp.take_along_axis(logits, target[:, None], axis=1)
    losses = (jnp.log(total) + top - target_logits)[:, 0]
    # d loss / d logits = softmax - onehot. The row scales go onto the narrow [chunk, dim] factors:
    # at [chunk, num_items] every extra pass over memory costs as much as a product.
    unnormalised = unnormalised.astype(h.dtype)
    hidden_gradient = weight[:, None] * (
      _matmul(unnormalised, item_vectors) / total - target_vectors
    )
    item_gradient += _matmul(unnormalised.T, (h * (weight[:, None] / total)).astype(h.dtype))
    item_gradient = item_gradient.at[target].add(-weight[:, None] * h)
    return item_gradient, ((losses * weight).sum(), hidden_gradient.astype(h.dtype))

  item_gradient, (losses, hidden_gradient) = jax.lax.scan(
    step,
    jnp.zeros(item_vectors.shape, jnp.float32),
    tuple(_chunks(x, chunk_size) for x in (hidden, targets, weights)),
  )
  hidden_gradient = hidden_gradient.reshape(-1, dim)[:tokens]
  return losses.sum(), (hidden_gradient, item_gradient.astype(item_vectors.dtype))


def _softmax_backward(chunk_size, residuals, cotangent):
  del chunk_size
  hidden_gradient, item_gradient = residuals
  scale = lambda g: (g * cotangent).astype(g.dtype)
  return scale(hidden_gradient), scale(item_gradient), None, None


softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def softmax_over_devices(
  hidden: Array,
  item_rows: Array,
  target_ids: Array,
  weights: Array,
  num_items: int,
  chunk_size: int,
  axis: str,
) -> Array:
  """Cross-entropy over a catalogue whose rows are spread over devices (vocabulary-parallel).

  Each device multiplies the tokens of all with its own items and sends two numbers a token to the
  others; neither the catalogue nor logits ever meet in one place (Shoeybi et al., Megatron-LM,
  2019, section 3). As in `softmax`, gradients are formed in the forward pass. They are those of the
  sum over devices of what this returns, which must weigh the same in the objective of each.

  Args:
    hidden: `[tokens, dim]`, this device's.
    item_rows: `[rows, dim]`, this device's; those of all, one after the other, are of items 0, 1,
      ..., of which 0 and those from `num_items` + 1 on are none.
    target_ids: `[tokens]` item ids, this device's.
    weights: `[tokens]`, this device's.
    num_items: catalogue size.
    chunk_size: tokens whose logits are in memory at once.
    axis: name of the devices' axis.

  Returns:
    Scalar sum over this device's tokens.
  """
  arrays = hidden, item_rows, target_ids, weights
  return _softmax_over_devices_forward(*arrays, num_items, chunk_size, axis)[0]


def _softmax_over_devices_forward(
  hidden, item_rows, target_ids, weights, num_items, chunk_size, axis
):
  own_tokens, dim = hidden.shape
  rows, device = item_rows.shape[0], jax.lax.axis_index(axis)
  ids = device * rows + jnp.arange(rows)
  is_item = (ids > 0) & (ids <= num_items)
  of_all = jax.lax.all_gather((hidden, target_ids, weights), axis, tiled=True)
  tokens = of_all[0].shape[0]
  chunk_size = min(chunk_size, tokens)

  def step(item_gradient, chunk):
    h, target, weight = chunk
    place = places_from(ids[0], target)  # Beyond the end where another device has the target.
    logits = jnp.where(is_item, _matmul(h, item_rows.T), jnp.finfo(jnp.float32).min)
    top = logits.max(-1)
    unnormalised = jnp.where(is_item, jnp.exp(logits - top[:, None]), 0)
    target_logit = logits.at[jnp.arange(len(h)), place].get(mode='fill', fill_value=0)
    target_vectors = item_rows.at[place].get(mode='fill', fill_value=0)
    tops, totals, target_logits = jax.lax.all_gather(
      (top, unnormalised.sum(-1), target_logit), axis
    )
    highest = tops.max(0)
    total = (totals * jnp.exp(tops - highest)).sum(0)
    losses = jnp.log(total) + highest - target_logits.sum(0)
    # What makes these exponentials probabilities goes onto the narrow factors, as in `softmax`.
    share = (jnp.exp(top - highest) / total)[:, None]
    weight = weight[:, None]
    unnormalised = unnormalised.astype(h.dtype)
    of_items = share * _matmul(unnormalised, item_rows)
    hidden_gradient = weight * (of_items - target_vectors)
    item_gradient += _matmul(unnormalised.T, (h * (weight * share)).astype(h.dtype))
    item_gradient = item_gradient.at[place].add(-weight * h, mode='drop')
    return item_gradient, (losses * weight[:, 0], hidden_gradient)

  item_gradient, (losses, hidden_gradient) = jax.lax.scan(
    step,
    jnp.zeros(item_rows.shape, jnp.float32),
    tuple(_chunks(x, chunk_size) for x in of_all),
  )
  hidden_gradient = hidden_gradient.reshape(-1, dim)[:tokens]
  hidden_gradient = jax.lax.psum_scatter(hidden_gradient, axis, tiled=True)
  own = jax.lax.dynamic_slice_in_dim(losses.reshape(-1), device * own_tokens, own_tokens)
  gradients = hidden_gradient.astype(hidden.dtype), item_gradient.astype(item_rows.dtype)
  return own.sum(), gradients


def _softmax_over_devices_backward(num_items, chunk_size, axis, residuals, cotangent):
  del num_items, axis
  return _softmax_backward(chunk_size, residuals, cotangent)


softmax_over_devices.defvjp(_softmax_over_devices_forward, _softmax_over_devices_backward)


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
  # |sum of u|^2 holds every pair twice, and every vector with itself.
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

  Row i of `a` shall find row i of `b` among all rows of `b`, and the other way round; the logits
  are cosine / temperature. With several vectors a row of `a`, the best of them counts (BLIP-2: Li
  et al. 2023; UR4Rec: Zhang, Zhu & Dou, COLING 2025).

  Args:
    a: `[batch, dim]` or `[batch, vectors, dim]`.
    b: `[batch, dim]`.
    ids: `[batch]`; rows with the same id are not each other's negatives.
    weights: `[batch]`, 0 for rows that are neither rows nor negatives.
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
  # Through differences: 2 - 2 cosine has no correct digit left where two vectors are near. Without
  # the distances to themselves: compiled, they need not be exact zeros, and have wild gradients.
  first, second = jnp.triu_indices(units.shape[-2], 1)
  return -optax.safe_norm(units[:, first] - units[:, second], 0, axis=-1).mean(-1)


_DIVERSITIES = {
  'cosine': _mean_cosine,
  'logdet': _negative_logdet,
  'distance': _negative_distance,
}
DIVERSITIES = tuple(_DIVERSITIES)


def diversity(vectors: Array, weights: Array, kind: str) -> Array:
  """How alike the vectors of a row are; lower is more diverse.

  With u the vectors at length 1, K of them, the kinds are
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
  """Sum of losses with learnt weights (Kendall, Gal & Cipolla, CVPR 2018): exp(-s) L + s.

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

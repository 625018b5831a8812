"""Training losses over flat arrays of tokens: each a weighted sum, float32, pure.

`hidden` `[tokens, dim]` are user states, `item_vectors` `[num_items, dim]` the catalogue (row i is
item id i + 1), `targets` `[tokens]` rows of the catalogue, `weights` `[tokens]` 1 for a real token
and 0 for padding. Every loss returns the sum over tokens; the caller divides by the global count,
so that a result does not depend on how tokens are spread over devices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


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


def plain_softmax(hidden: Array, item_vectors: Array, targets: Array, weights: Array) -> Array:
  """Cross-entropy over the whole catalogue, written plainly; the reference for `softmax`."""
  logits = jnp.matmul(hidden, item_vectors.T, preferred_element_type=jnp.float32)
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
  chunk_size = min(chunk_size, arrays[0].shape[0])
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

  def matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)

  def step(item_gradient, chunk):
    h, target, weight = chunk
    logits = matmul(h, item_vectors.T)
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
      matmul(unnormalised, item_vectors) / total - target_vectors
    )
    item_gradient += matmul(unnormalised.T, (h * (weight[:, None] / total)).astype(h.dtype))
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

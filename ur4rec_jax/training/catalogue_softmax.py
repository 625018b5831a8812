"""Cross-entropy over the whole catalogue in little memory, on one device or spread over several.

`hidden` `[tokens, dim]` are user states, `item_vectors` `[num_items, dim]` the catalogue (row i is
item id i + 1), `targets` `[tokens]` rows of the catalogue, `weights` `[tokens]` 1 for a real token
and 0 for padding. `seen` lists items that are no candidates for the tokens of a user, unless one is
the target; None if all items are candidates. Each function returns the sum over tokens, in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ur4rec_jax.sharding import devices
from ur4rec_jax.sharding.devices import AXIS
from ur4rec_jax.sharding.item_embeddings import NOWHERE, index_from
from ur4rec_jax.training.losses import LOWEST
from ur4rec_jax.training.negatives import Negatives
from ur4rec_jax.training.seen_items import SeenItems, packed, without_seen

Array = jax.Array


def _matmul(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def plain_softmax(
  hidden: Array,
  item_vectors: Array,
  targets: Array,
  weights: Array,
  seen: SeenItems | None = None,
) -> Array:
  """Cross-entropy over the whole catalogue, written plainly; the reference for `softmax`."""
  logits = _matmul(hidden, item_vectors.T)
  if seen is not None:
    logits = without_seen(logits, seen.table(len(item_vectors))[seen.users], targets)
  target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
  return ((jax.nn.logsumexp(logits, axis=-1) - target_logits) * weights).sum()


def _chunks(x: Array, chunk_size: int) -> Array:
  """Reshapes `[tokens, ...]` to `[chunks, chunk_size, ...]`, padded with zeros at the end."""
  padding = [(0, -x.shape[0] % chunk_size)] + [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, padding).reshape(-1, chunk_size, *x.shape[1:])


def chunked_sum(loss: Callable[..., Array], chunk_size: int, *arrays: Array | None) -> Array:
  """Sums `loss(*chunk)` over chunks of tokens, with one chunk's intermediate values in memory.

  Args:
    loss: maps `[chunk_size, ...]` arrays to a scalar; zero for tokens that are all zeros.
    chunk_size: tokens per chunk.
    *arrays: `[tokens, ...]`; None stays None in each chunk.

  Returns:
    Scalar.
  """
  if chunk_size >= arrays[0].shape[0]:
    return loss(*arrays)
  chunk_loss = jax.checkpoint(lambda chunk: loss(*chunk))
  chunks = jax.tree.map(lambda x: _chunks(x, chunk_size), arrays)
  return jax.lax.map(chunk_loss, chunks).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def softmax(
  hidden: Array,
  item_vectors: Array,
  targets: Array,
  weights: Array,
  chunk_size: int,
  seen: SeenItems | None = None,
) -> Array:
  """Cross-entropy over the whole catalogue in memory for `chunk_size * num_items` logits.

  The forward pass computes the gradient while it has a chunk's logits, so logits are computed once
  and never stored.

  Args:
    hidden: `[tokens, dim]`.
    item_vectors: `[num_items, dim]`.
    targets: `[tokens]` int32 rows of `item_vectors`.
    weights: `[tokens]`.
    chunk_size: tokens per chunk; the last chunk is padded.
    seen: items in the numbering of `targets`.

  Returns:
    Scalar sum over tokens.
  """
  return _softmax_forward(hidden, item_vectors, targets, weights, chunk_size, seen)[0]


def _softmax_forward(hidden, item_vectors, targets, weights, chunk_size, seen):
  arrays = hidden, item_vectors, targets, weights
  if has_kernel(hidden, item_vectors):
    from ur4rec_jax.training.softmax_kernel import softmax_gradients  # Slow to import.

    words = None if seen is None else packed(seen.table(len(item_vectors)))[seen.users]
    loss, hidden_gradient, item_gradient, _ = softmax_gradients(*arrays, seen=words)
  else:
    loss, hidden_gradient, item_gradient = _in_chunks(*arrays, chunk_size, seen)
  return loss, (hidden_gradient, item_gradient.astype(item_vectors.dtype))


def has_kernel(hidden: Array, item_vectors: Array) -> bool:
  """Whether the devices have a kernel that fits this number of items of this width."""
  if devices.platform() != 'tpu':
    return False
  from ur4rec_jax.training.softmax_kernel import tokens_in_block

  return tokens_in_block(*item_vectors.shape, hidden.dtype.itemsize) > 0


def _in_chunks(hidden, item_vectors, targets, weights, chunk_size, seen):
  """Returns the loss `[]` and its gradients: `[tokens, dim]`, and `[num_items, dim]` float32."""
  tokens, dim = hidden.shape
  chunk_size = min(chunk_size, tokens)
  users, is_seen = (None, None) if seen is None else (seen.users, seen.table(len(item_vectors)))

  def step(item_gradient, chunk):
    h, target, weight, user = chunk
    logits = _matmul(h, item_vectors.T)
    if user is not None:
      logits = without_seen(logits, is_seen[user], target)
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
    jax.tree.map(lambda x: _chunks(x, chunk_size), (hidden, targets, weights, users)),
  )
  hidden_gradient = hidden_gradient.reshape(-1, dim)[:tokens]
  return losses.sum(), hidden_gradient, item_gradient


def _softmax_backward(chunk_size, residuals, cotangent):
  del chunk_size
  return (*_scaled(residuals, cotangent), None, None, None)


def _scaled(gradients, cotangent):
  return ((g * cotangent).astype(g.dtype) for g in gradients)


softmax.defvjp(_softmax_forward, _softmax_backward)


@jax.custom_vjp
def fused_sampled_softmax(
  hidden: Array,
  target_vectors: Array,
  negative_vectors: Array,
  targets: Array,
  weights: Array,
  negatives: Negatives,
  seen: Array | None = None,
) -> Array:
  """Computes `losses.sampled_softmax` in the TPU kernel; only where `has_kernel` is True.

  Args:
    hidden: `[tokens, dim]`.
    target_vectors: `[tokens, dim]`.
    negative_vectors: `[negatives, dim]`.
    targets: `[tokens]` int32, in the numbering of `negatives.items`.
    weights: `[tokens]`.
    negatives: shared by all tokens.
    seen: `[tokens, words]`, the negatives to leave out, see `seen_items.packed`; None for none.

  Returns:
    Scalar sum over tokens.
  """
  arrays = hidden, target_vectors, negative_vectors, targets, weights, negatives, seen
  return _sampled_forward(*arrays)[0]


def _sampled_forward(hidden, target_vectors, negative_vectors, targets, weights, negatives, seen):
  from ur4rec_jax.training.softmax_kernel import Sampled, softmax_gradients

  positive = (hidden * target_vectors).sum(-1, dtype=jnp.float32)
  result = softmax_gradients(
    hidden, negative_vectors, targets, weights, Sampled(positive, *negatives), seen
  )
  positive_gradient = result.positive[:, None]
  gradients = (
    (result.hidden + positive_gradient * target_vectors).astype(hidden.dtype),
    (positive_gradient * hidden).astype(target_vectors.dtype),
    result.items.astype(negative_vectors.dtype),
  )
  return result.loss, gradients


def _sampled_backward(gradients, cotangent):
  return (*_scaled(gradients, cotangent), None, None, None, None)


fused_sampled_softmax.defvjp(_sampled_forward, _sampled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def softmax_over_devices(
  hidden: Array,
  item_rows: Array,
  target_ids: Array,
  weights: Array,
  num_items: int,
  chunk_size: int,
  seen: SeenItems | None = None,
) -> Array:
  """Cross-entropy over a catalogue that is spread over devices (vocabulary-parallel).

  Each device multiplies the tokens of all devices with its own items and sends three numbers per
  token to the others: the maximum, the sum of exponentials and the score of the target. Neither the
  catalogue nor the logits are ever collected on one device (Shoeybi et al., Megatron-LM, 2019,
  section 3). The forward pass computes the gradients, as `softmax` does. They are the gradients of
  the sum of the returned values over devices, so each device's value must have the same weight in
  the objective.

  Args:
    hidden: `[tokens, dim]` of this device.
    item_rows: `[rows, dim]` of this device. The rows of all devices, in order, belong to ids 0, 1,
      ...; id 0 and ids above `num_items` are not items.
    target_ids: `[tokens]` item ids, of this device.
    weights: `[tokens]` of this device.
    num_items: catalogue size.
    chunk_size: tokens whose logits are in memory at once.
    seen: items from 0 for id 1, of this device's users.

  Returns:
    Scalar sum over this device's tokens.
  """
  arrays = hidden, item_rows, target_ids, weights
  return _softmax_over_devices_forward(*arrays, num_items, chunk_size, seen)[0]


def _softmax_over_devices_forward(
  hidden, item_rows, target_ids, weights, num_items, chunk_size, seen
):
  own_tokens, dim = hidden.shape
  rows, device = item_rows.shape[0], jax.lax.axis_index(AXIS)
  ids = device * rows + jnp.arange(rows)
  is_item = (ids > 0) & (ids <= num_items)
  users = is_seen = None
  if seen is not None:
    seen = _of_all_devices(seen, ids[0])
    users, is_seen = seen.users, seen.table(rows)
  all_tokens = jax.lax.all_gather((hidden, target_ids, weights), AXIS, tiled=True)
  tokens = all_tokens[0].shape[0]
  chunk_size = min(chunk_size, tokens)

  def step(item_gradient, chunk):
    h, target, weight, user = chunk
    row = index_from(ids[0], target)  # Beyond the end if another device has the target.
    logits = jnp.where(is_item, _matmul(h, item_rows.T), LOWEST)
    if user is not None:
      logits = without_seen(logits, is_seen[user], row)
    top = logits.max(-1)
    unnormalised = jnp.where(logits > LOWEST, jnp.exp(logits - top[:, None]), 0)
    target_logit = logits.at[jnp.arange(len(h)), row].get(mode='fill', fill_value=0)
    target_vectors = item_rows.at[row].get(mode='fill', fill_value=0)
    tops, totals, target_logits = jax.lax.all_gather(
      (top, unnormalised.sum(-1), target_logit), AXIS
    )
    highest = tops.max(0)
    total = (totals * jnp.exp(tops - highest)).sum(0)
    losses = jnp.log(total) + highest - target_logits.sum(0)
    # The factor that turns exponentials into probabilities scales the narrow arrays, as in
    # `_in_chunks`.
    share = (jnp.exp(top - highest) / total)[:, None]
    weight = weight[:, None]
    unnormalised = unnormalised.astype(h.dtype)
    of_items = share * _matmul(unnormalised, item_rows)
    hidden_gradient = weight * (of_items - target_vectors)
    item_gradient += _matmul(unnormalised.T, (h * (weight * share)).astype(h.dtype))
    item_gradient = item_gradient.at[row].add(-weight * h, mode='drop')
    return item_gradient, (losses * weight[:, 0], hidden_gradient)

  item_gradient, (losses, hidden_gradient) = jax.lax.scan(
    step,
    jnp.zeros(item_rows.shape, jnp.float32),
    jax.tree.map(lambda x: _chunks(x, chunk_size), (*all_tokens, users)),
  )
  hidden_gradient = hidden_gradient.reshape(-1, dim)[:tokens]
  hidden_gradient = jax.lax.psum_scatter(hidden_gradient, AXIS, tiled=True)
  own = jax.lax.dynamic_slice_in_dim(losses.reshape(-1), device * own_tokens, own_tokens)
  gradients = hidden_gradient.astype(hidden.dtype), item_gradient.astype(item_rows.dtype)
  return own.sum(), gradients


def _of_all_devices(seen: SeenItems, first_id: Array) -> SeenItems:
  """Collects the users of all devices, with items in the numbering of this device's rows."""
  users = seen.users + jax.lax.axis_index(AXIS) * seen.num_users
  users, items = jax.lax.all_gather((users, seen.items), AXIS, tiled=True)
  is_item = items != NOWHERE
  items = index_from(first_id, jnp.where(is_item, items + 1, NOWHERE))
  return SeenItems(items, users, seen.num_users * jax.lax.axis_size(AXIS))


def _softmax_over_devices_backward(num_items, chunk_size, residuals, cotangent):
  del num_items
  return _softmax_backward(chunk_size, residuals, cotangent)


softmax_over_devices.defvjp(_softmax_over_devices_forward, _softmax_over_devices_backward)

"""GRU4Rec: session-based recommendations with recurrent networks (Hidasi et al., ICLR 2016).

The branch `sasrec` becomes GRU4Rec with `sasrec.block=gru`: item embeddings, losses and ranking
stay, and this block replaces the transformer block.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from ur4rec_jax.models.layers import Dropout, take_positions

Array = jax.Array


class GRUBlock(nn.Module):
  """One gated recurrent layer (Cho et al. 2014) over packed rows of histories.

  Attributes:
    dim: width of the states.
    dropout: rate on the states.
    dtype: computation type; parameters stay float32.
  """

  dim: int
  dropout: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x: Array,
    segment_ids: Array,
    *,
    deterministic: bool,
    query_positions: Array | None = None,
  ) -> Array:
    """Reads tokens `x` `[batch * length, dim]` from left to right.

    Args:
      x: the tokens.
      segment_ids: `[batch, length]`; every segment begins with a state of zeros.
      deterministic: False applies dropout, with the `dropout` key.
      query_positions: `[batch, queries]` positions to return, or None for all.

    Returns:
      `[batch * length, dim]` or `[batch * queries, dim]` states.
    """
    batch, dim = segment_ids.shape[0], self.dim
    # Products with the inputs do not depend on the states, so one matrix product computes them all.
    gates = nn.Dense(3 * dim, dtype=self.dtype, name='input')(x).reshape(batch, -1, 3 * dim)
    kernel = self.param('kernel', nn.initializers.orthogonal(), (dim, 3 * dim))
    bias = self.param('bias', nn.initializers.zeros, (dim,))
    gates, kernel, bias = promote_dtype(gates, kernel, bias, dtype=self.dtype)
    is_first = jnp.diff(segment_ids, axis=1, prepend=0) != 0

    def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
      gate, is_first = inputs
      state = jnp.where(is_first[:, None], 0, state)
      from_input, from_state = jnp.split(gate, 3, axis=-1), jnp.split(state @ kernel, 3, axis=-1)
      gate_inputs = zip(from_input[:2], from_state[:2], strict=True)
      reset, update = (nn.sigmoid(a + b) for a, b in gate_inputs)
      candidate = jnp.tanh(from_input[2] + reset * (from_state[2] + bias))
      state = (1 - update) * candidate + update * state
      return state, state

    start = jnp.zeros((batch, dim), gates.dtype)
    _, states = jax.lax.scan(step, start, (jnp.moveaxis(gates, 1, 0), is_first.T))
    states = take_positions(jnp.moveaxis(states, 0, 1), query_positions)
    return Dropout(self.dropout)(states.reshape(-1, dim), deterministic=deterministic)

"""Encodes histories as `tf.train.Example` protocol buffers, many users at a time with NumPy.

The protocol buffer library needs a Python number for every value. These bytes are the same as those
of `SerializeToString(deterministic=True)`, which sorts the fields by name.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ur4rec_jax.data import flat_arrays

_AT_ONCE = 1 << 20  # Interactions that are encoded at once.
# Tags of the messages: field number and wire type 2, which is a length and so many bytes.
_FIRST, _SECOND, _THIRD = b'\x0a', b'\x12', b'\x1a'
_BYTES, _FLOATS, _INTEGERS = _FIRST, _SECOND, _THIRD  # The kinds of `tf.train.Feature`.


def histories(
  user_ids: Sequence[str],
  offsets: np.ndarray,
  item_ids: np.ndarray,
  timestamps: np.ndarray,
  ratings: np.ndarray,
) -> Iterator[bytes]:
  """Yields one example a user with the fields `item_ids`, `ratings`, `timestamps`, `user_id`.

  Args:
    user_ids: original ids.
    offsets: `[users + 1]`, user u owns `[offsets[u]:offsets[u + 1]]` of the others, one at least.
    item_ids: `[interactions]` integers.
    timestamps: `[interactions]` integers.
    ratings: `[interactions]` float32.
  """
  for start, stop in flat_arrays.user_blocks(offsets, _AT_ONCE):
    first, last = offsets[start], offsets[stop]
    bounds = offsets[start : stop + 1] - first
    items = _varints(item_ids[first:last], bounds)
    times = _varints(timestamps[first:last], bounds)
    numbers = _slices(ratings[first:last].astype('<f4').tobytes(), 4 * bounds)
    for name, *values in zip(user_ids[start:stop], items, numbers, times, strict=True):
      yield _message(
        _FIRST,
        _field(b'item_ids', _INTEGERS, values[0])
        + _field(b'ratings', _FLOATS, values[1])
        + _field(b'timestamps', _INTEGERS, values[2])
        + _field(b'user_id', _BYTES, name.encode()),
      )


def _field(name: bytes, kind: bytes, value: bytes) -> bytes:
  feature = _message(kind, _message(_FIRST, value))
  return _message(_FIRST, _message(_FIRST, name) + _message(_SECOND, feature))


def _message(tag: bytes, content: bytes) -> bytes:
  return tag + _length(len(content)) + content


def _length(number: int) -> bytes:
  """Encodes a number as a varint: seven bits a byte, the lowest first, all but the last marked."""
  encoded = bytearray()
  while number > 127:
    encoded.append(number & 127 | 128)
    number >>= 7
  encoded.append(number)
  return bytes(encoded)


def _varints(values: np.ndarray, bounds: np.ndarray) -> Iterator[bytes]:
  """Yields the varints of `values[bounds[i]:bounds[i + 1]]` for each i."""
  values = values.astype(np.int64).view(np.uint64)  # Negative numbers have ten bytes.
  width = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
  sizes = np.ones(len(values), np.uint8)
  for bits in range(7, 7 * width, 7):
    sizes += values >= np.uint64(1 << bits)
  encoded = np.empty((len(values), width), np.uint8)
  for place in range(width):
    low = (values >> np.uint64(7 * place)).astype(np.uint8)
    encoded[:, place] = low & np.uint8(127) | (sizes > place + 1).view(np.uint8) << np.uint8(7)
  if (sizes == width).all():  # Times are mostly of one size, which makes this several times faster.
    return _slices(encoded.tobytes(), bounds * width)
  ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
  return _slices(encoded[np.arange(width) < sizes[:, None]].tobytes(), ends[bounds])


def _slices(content: bytes, bounds: np.ndarray) -> Iterator[bytes]:
  return (content[a:b] for a, b in itertools.pairwise(bounds.tolist()))

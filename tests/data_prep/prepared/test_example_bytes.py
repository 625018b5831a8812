"""The bytes of histories are those of the protocol buffer library."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from data_prep.prepared import example_bytes

BORDERS = [0, 1, 127, 128, 2**14 - 1, 2**14, 2**31 - 1, 2**35, 2**63 - 1, -1, -(2**63)]
TIMES = st.one_of(st.sampled_from(BORDERS), st.integers(-(2**63), 2**63 - 1))
ROW = st.tuples(st.integers(1, 2**31 - 1), TIMES, st.floats(width=32, allow_nan=False))
USERS = st.lists(st.tuples(st.text(max_size=200), st.lists(ROW, min_size=1, max_size=30)))


def by_the_library(name, rows) -> bytes:
  example = tf_example_pb2.Example()
  feature = example.features.feature
  feature['user_id'].bytes_list.value.append(name.encode())
  feature['item_ids'].int64_list.value.extend([row[0] for row in rows])
  feature['timestamps'].int64_list.value.extend([row[1] for row in rows])
  feature['ratings'].float_list.value.extend([row[2] for row in rows])
  return example.SerializeToString(deterministic=True)


@pytest.mark.parametrize('at_once', [1, 40, 1 << 20])
@settings(max_examples=60)
@given(users=USERS)
def test_histories_are_encoded_as_by_the_library(at_once, users):
  example_bytes._AT_ONCE = at_once
  rows = [row for _, rows in users for row in rows]
  columns = zip(*rows, strict=True) if rows else ((), (), ())
  kinds = np.int32, np.int64, np.float32
  arrays = [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
  offsets = np.cumsum([0, *(len(rows) for _, rows in users)])
  names = [name for name, _ in users]
  found = [*example_bytes.histories(names, offsets, *arrays)]
  assert found == [by_the_library(*user) for user in users]

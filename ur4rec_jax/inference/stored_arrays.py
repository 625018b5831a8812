"""Trees of arrays in `.npz` archives, also of types that NumPy cannot store."""

import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def by_path(tree: Any) -> dict[str, np.ndarray]:
  """Returns the arrays of nested dicts by path, such as `items/sasrec/vectors`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
  }


def as_tree(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Turns arrays by path into nested dicts."""
  tree: dict[str, Any] = {}
  for path, values in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = values
  return tree


def pack(arrays: Mapping[str, np.ndarray], dtypes: dict[str, str]) -> bytes:
  """Makes a .npz archive. bfloat16 arrays are stored as uint16, and `dtypes` gets their names."""
  dtypes |= {name: x.dtype.name for name, x in arrays.items() if x.dtype.kind == 'V'}
  archive = io.BytesIO()
  np.savez(archive, **{n: x.view(np.uint16) if n in dtypes else x for n, x in arrays.items()})
  return archive.getvalue()


def unpack(archive: bytes, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
  """Reads an archive of `pack`."""
  with np.load(io.BytesIO(archive), allow_pickle=False) as file:
    return {name: values.view(dtypes.get(name, values.dtype)) for name, values in file.items()}

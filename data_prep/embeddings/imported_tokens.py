"""Imports features by original id from .npz, .npy or .safetensors files, never from pickles."""

import functools
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_prep.embeddings.feature_files import Row, Source
from data_prep.sources import raw_files
from ur4rec_jax.data.dataset import iterate_items, read_info, read_interactions
from ur4rec_jax.data.raw import archives
from ur4rec_jax.encoders import pretrained
from ur4rec_jax.errors import InputError

_NAMES = ('tokens', 'embeddings')
_BLOCK = 4096  # Rows copied at once.


def source(
  data_dir: str | Path, of: str, path: str | Path, ids_path: str | Path | None, scratch: Path
) -> tuple[Source, int]:
  """Reads a file of features and joins it with a prepared folder.

  Args:
    data_dir: prepared folder.
    of: `item` or `user`.
    path: file with `tokens` `[n, tokens, width]` or `embeddings` `[n, width]`, and optionally
      `mask` `[n, tokens]` and `ids` `[n]`; a .npy file holds only one array.
    ids_path: file with one original id per line, if `path` has no ids.
    scratch: folder for unpacked arrays, which are then memory-mapped.

  Returns:
    The rows to encode, and the number of ids that are not in the dataset.

  Raises:
    InputError: a file cannot be read, or an array in it is wrong.
  """
  path = Path(path)
  arrays = _arrays(path, scratch)
  tokens, mask = _tokens(path, arrays), arrays.get('mask')
  names = original_ids(data_dir, of)
  if ids_path is not None:
    ids, where = _read_ids(Path(ids_path), set(names)), Path(ids_path)
  elif 'ids' in arrays:
    ids, where = _plain_ids(path, arrays['ids']), path
  else:
    raise InputError(f'{path}: has no ids; pass --ids=FILE with one original id per line')
  if len(ids) != len(tokens):
    raise InputError(f'{where}: has {len(ids):,} ids, but {path.name} {len(tokens):,} rows')
  if mask is not None and (mask.dtype != bool or mask.shape != tokens.shape[:2]):
    raise InputError(f'{path}: mask is {mask.dtype} {mask.shape}, must be bool {tokens.shape[:2]}')
  places: dict[str, int] = {}
  for at, name in enumerate(ids):
    if places.setdefault(name, at) != at:
      raise InputError(
        f'{where}: the id {name!r} is there twice, at rows {places[name] + 1} and {at + 1}; remove'
        ' one of the two'
      )
  known = sum(name in places for name in names)
  if not known:
    raise InputError(
      f'{where}: none of its {len(ids):,} ids, first {ids[0]!r}, is one of the {of}s of {data_dir},'
      f' first {names[0]!r}; give features by the ids of the raw data'
    )
  info = {
    'encoder': {'name': f'imported from {path.name}', 'is_builtin': False},
    'is_mock': False,
    'token_meaning': {'0...': 'as in the imported file'},
  }
  return Source(
    name=str(path),
    info=info,
    total=len(names),
    tokens=tokens.shape[1],
    width=tokens.shape[2],
    rows=lambda: _rows(names, places, tokens, mask, path.name),
    encode=functools.partial(_gather, tokens, mask),
  ), len(ids) - known


def original_ids(data_dir: str | Path, of: str) -> list[str]:
  """Returns the original ids of the items or users of a prepared folder, in order."""
  read_info(data_dir)
  if of == 'item':
    return [item['original_id'] for item in iterate_items(data_dir)]
  return read_interactions(data_dir).user_ids


def _rows(
  names: list[str], places: dict[str, int], tokens: np.ndarray, mask: np.ndarray | None, file: str
) -> Iterator[Row]:
  for name in names:
    at = places.get(name)
    if at is None:
      yield Row(name, None, reason=f'not in {file}')
    else:
      yield Row(name, at, tokens[at].tobytes() + (b'' if mask is None else mask[at].tobytes()))


def _gather(
  tokens: np.ndarray,
  mask: np.ndarray | None,
  rows: list[Row],
  advance: Callable[[float], object],
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  found = np.zeros((len(rows), *tokens.shape[1:]), np.float32)
  is_there = np.zeros(found.shape[:2], bool)
  here = [at for at, row in enumerate(rows) if row.content is not None]
  there = [rows[at].content for at in here]
  with np.errstate(over='ignore'):  # Values that overflow become infinite and are refused later.
    found[here] = tokens[there]
  is_there[here] = True if mask is None else mask[there]
  advance(len(rows))
  return found, is_there, dict.fromkeys(here, 'all tokens are masked')


def _tokens(path: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
  found = [name for name in _NAMES if name in arrays]
  if len(found) != 1:
    raise InputError(
      f'{path}: must hold tokens [n, tokens, width] or embeddings [n, width], one of the two; it'
      f' holds {", ".join(sorted(arrays)) or "nothing"}'
    )
  tokens = arrays[found[0]]
  if tokens.dtype.kind != 'f':
    raise InputError(f'{path}: {found[0]} are {tokens.dtype}; must be float16, float32 or float64')
  if path.suffix.lower() == '.npy' or found[0] == 'embeddings':
    tokens = tokens[:, None] if tokens.ndim == 2 else tokens
  if tokens.ndim != 3 or 0 in tokens.shape:
    raise InputError(
      f'{path}: {found[0]} have the shape {tokens.shape}; must be [n, tokens, width], or as'
      ' embeddings [n, width]'
    )
  return tokens


def _arrays(path: Path, scratch: Path) -> dict[str, np.ndarray]:
  """Opens a file with memory-mapped tokens; a packed file is unpacked first."""
  kinds = {'.npy': _read_npy, '.npz': _read_npz, '.safetensors': _read_safetensors}
  read = kinds.get(path.suffix.lower())
  if read is None:
    raise InputError(f'--import={path}: must be one of {", ".join(kinds)}')
  try:
    return read(path, scratch)
  except (InputError, KeyboardInterrupt):
    raise
  except ImportError as error:
    raise pretrained.missing_extra(error) from error
  except FileNotFoundError as error:
    raise InputError(f'{path}: no such file; correct --import') from error
  except Exception as error:  # Damaged files make the readers raise any kind of error.
    reason = next(iter(str(error).splitlines()), repr(error))
    raise InputError(
      f'{path}: cannot be read ({reason}); export it again, without pickle'
    ) from error


def _read_npy(path: Path, scratch: Path) -> dict[str, np.ndarray]:
  del scratch
  return {'tokens': np.load(path, mmap_mode='r', allow_pickle=False)}


def _read_npz(path: Path, scratch: Path) -> dict[str, np.ndarray]:
  archives.check_zip(path)
  with np.load(path, allow_pickle=False) as file, zipfile.ZipFile(path) as archive:
    arrays = {name: file[name] for name in file.files if name in ('ids', 'mask')}
    for name in set(file.files) & set(_NAMES):
      scratch.mkdir(parents=True, exist_ok=True)
      with archive.open(f'{name}.npy') as packed, (scratch / f'{name}.npy').open('wb') as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 22)
      arrays |= {name: np.load(scratch / f'{name}.npy', mmap_mode='r', allow_pickle=False)}
  return arrays


def _read_safetensors(path: Path, scratch: Path) -> dict[str, np.ndarray]:
  import safetensors

  arrays = {}
  with safetensors.safe_open(path, 'numpy') as file:
    names = set(file.keys())
    arrays = {name: file.get_tensor(name) for name in names & {'ids', 'mask'}}
    kinds = {name: file.get_slice(name).get_dtype() for name in names & set(_NAMES)}
  for name, kind in kinds.items():
    # NumPy has no bfloat16, so torch reads it.
    with safetensors.safe_open(path, 'pt' if kind == 'BF16' else 'numpy') as file:
      values = file.get_slice(name)
      first = values[:1]
      scratch.mkdir(parents=True, exist_ok=True)
      unpacked = np.lib.format.open_memmap(
        scratch / f'{name}.npy',
        'w+',
        np.float32 if kind == 'BF16' else first.dtype,
        tuple(values.get_shape()),
      )
      for start in range(0, len(unpacked), _BLOCK):
        block = values[start : min(start + _BLOCK, len(unpacked))]
        unpacked[start : start + _BLOCK] = block.float().numpy() if kind == 'BF16' else block
      arrays[name] = unpacked
  return arrays


def _plain_ids(path: Path, ids: np.ndarray) -> list[str]:
  if ids.ndim != 1 or ids.dtype.kind not in 'iuUS':
    raise InputError(f'{path}: ids are {ids.dtype} {ids.shape}; must be [n] whole numbers or text')
  return [name.decode() if isinstance(name, bytes) else str(name) for name in ids.tolist()]


def _read_ids(path: Path, known: set[str]) -> list[str]:
  try:
    text = re.sub('\r\n?', '\n', raw_files.read_bytes(path).decode())
  except UnicodeDecodeError as error:
    raise InputError(f'{path}: is not UTF-8 ({error}); save it as UTF-8') from error
  lines = text.removesuffix('\n').split('\n')
  for number, line in enumerate(lines, 1):
    if not line.strip():
      raise InputError(f'{path}, line {number}: is empty; write one original id a line')
  return [line if line in known else line.strip() for line in lines]

"""Finds the picture files of the items of a prepared folder.

The folder `images` of a dataset holds the pictures and manifest.jsonl. The manifest has one line
per attempt with its outcome (`status`), and lines are only ever appended.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.errors import InputError

FOLDER = 'images'
MANIFEST = f'{FOLDER}/manifest.jsonl'
FETCHED, MISSING, REJECTED = 'fetched', 'missing', 'rejected'
_THREADS = min(8, os.cpu_count() or 1)


def read_manifest(data_dir: Path) -> list[dict[str, Any]]:
  """Reads the manifest of a dataset; a line that a killed program cut off is skipped."""
  try:
    content = (data_dir / MANIFEST).read_bytes()
  except FileNotFoundError:
    return []
  except OSError as error:
    raise InputError(f'{data_dir / MANIFEST}: cannot be read ({error.strerror})') from error
  records = []
  for line in content.split(b'\n'):
    try:
      record = json.loads(line)
      records.append({'item': record['item'], 'status': record['status'], **record})
    except (ValueError, TypeError, KeyError):
      continue
  return records


def find(data_dir: str | Path, items: Iterable[dict[str, Any]] | None = None) -> list[Path | None]:
  """Finds the pictures of the items of a prepared dataset.

  A picture counts if it was fetched according to the manifest and its file has not changed since.
  Placeholders do not count.

  Args:
    data_dir: the prepared folder.
    items: the items whose pictures are wanted; None for all.

  Returns:
    `[items]` picture files or None, in the order of the items.
  """
  data_dir = Path(data_dir)
  fetched = {r['item']: r for r in read_manifest(data_dir) if r['status'] == FETCHED}

  def sound(item: dict[str, Any]) -> Path | None:
    record = fetched.get(item['original_id'])
    if record is None:
      return None
    try:
      path = data_dir / record['path']
      is_same = hashlib.sha256(path.read_bytes()).hexdigest() == record['stored_sha256']
    except (OSError, KeyError):
      return None
    return path if is_same else None

  with ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(sound, read_items(data_dir) if items is None else items))

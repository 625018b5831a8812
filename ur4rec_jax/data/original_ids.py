"""Reads lists of original ids that people write on the command line or in a file."""

import collections
import os
import pathlib
from collections.abc import Collection

from ur4rec_jax.errors import InputError


def read_ids(text: str, known: Collection[str]) -> list[str]:
  """Reads ids that are separated by commas, or, if `text` names a file, one id per line of it.

  An id is first compared as it is written. So an id of the catalogue may have blanks around it,
  have commas in it, or be the name of a file. If that finds nothing, blanks around ids are ignored,
  unless several ids of the catalogue differ only in such blanks.

  Args:
    text: one id, several ids, or the name of a file.
    known: the ids of the catalogue; membership tests must be fast.

  Raises:
    InputError: the file cannot be read.
  """
  if text in known:
    return [text]
  if os.path.isfile(text):
    try:
      found = pathlib.Path(text).read_text(encoding='utf-8-sig').split('\n')
    except (OSError, ValueError) as error:
      raise InputError(f'{text}: cannot be read ({error})') from error
  else:
    found = _joined(text.split(','), known)
  found = [name for name in found if name.strip()]
  if all(name in known for name in found):
    return found
  padded = collections.Counter(name.strip() for name in known)
  spelled = {name.strip(): name for name in known if padded[name.strip()] == 1}
  spelled |= {name: name for name in known}
  return [name if name in known else spelled.get(name.strip(), name.strip()) for name in found]


def _joined(parts: list[str], known: Collection[str]) -> list[str]:
  """Joins neighbouring parts that are one id of the catalogue, unless each part is an id itself."""
  most = 1
  if any(part not in known and part.strip() not in known for part in parts):
    most += max((name.count(',') for name in known), default=0)
  found, start = [], 0
  while start < len(parts):
    for end in range(min(start + most, len(parts)), start, -1):
      if (name := ','.join(parts[start:end])) in known:
        break
    else:
      name, end = parts[start], start + 1
    found.append(name)
    start = end
  return found

"""Lists the checkpoint steps that a run has saved, and checks whether one is complete."""

import json
import pathlib

from ur4rec_jax.files import sha256

MANIFEST = 'manifest.json'


def checkpoint_folder(workdir: str | pathlib.Path) -> pathlib.Path:
  """Returns the folder of a run's checkpoints."""
  return pathlib.Path(workdir).absolute() / 'checkpoints'


def saved_steps(workdir: str | pathlib.Path) -> list[int]:
  """Returns the steps that a run has saved, complete or not, the newest first."""
  folder = checkpoint_folder(workdir)
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def hashes(folder: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of each file of a step except the manifest, by name."""
  files = sorted(p for p in folder.rglob('*') if p.is_file() and p != folder / MANIFEST)
  return {str(path.relative_to(folder)): sha256(path) for path in files}


def is_whole(folder: pathlib.Path) -> bool:
  """Tells whether a step is complete; False, too, if the run deletes it at this moment."""
  try:
    return find_damage(folder) is None
  except FileNotFoundError:
    return False


def find_damage(folder: pathlib.Path) -> str | None:
  """Returns what is wrong with the folder of a step, or None if it is complete."""
  if not folder.is_dir():
    return 'it is a file'
  try:
    expected = json.loads((folder / MANIFEST).read_text())
  except FileNotFoundError:
    return 'the save did not finish' if any(folder.iterdir()) else 'the folder is empty'
  except (ValueError, IsADirectoryError):
    expected = None
  if not isinstance(expected, dict):
    return f'{MANIFEST} is not readable'
  found = hashes(folder)
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      return f'{name} is missing'
    if found[name] != expected.get(name):
      return f'{name} has changed since it was written'
  return None

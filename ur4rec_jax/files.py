"""A folder or file that is there whole or not at all, whenever the program is stopped."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ur4rec_jax.errors import InputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def scratch_folder(target: Path, purpose: str = 'raw') -> Iterator[Path]:
  """Gives an empty sibling folder, which is removed when the block ends.

  A killed program leaves it, called TARGET.PURPOSE-PID, for `clean_up` to remove.
  """
  folder = target.with_name(f'{target.name}.{purpose}-{os.getpid()}')
  made = [parent for parent in folder.parents if not parent.exists()]
  try:
    folder.mkdir(parents=True)
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # they hold the target, if all went well
      for parent in made:
        parent.rmdir()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
  """Gives an empty sibling folder to fill, which becomes `target` if the block ends well.

  An old `target` stays until then.
  """
  with scratch_folder(target, 'incomplete') as folder:
    yield folder
    move_in(folder, target)


def clean_up(target: Path) -> None:
  """Removes what killed programs left; puts back a folder whose replacement was cut short."""
  pattern = re.compile(re.escape(target.name) + r'\.(raw|incomplete|replaced)-(\d+)')
  for path in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
    match = pattern.fullmatch(path.name)
    # This process has nothing lying about yet: a folder with its number is of an earlier one.
    if not match or (int(match[2]) != os.getpid() and _is_alive(int(match[2]))):
      continue
    if match[1] == 'replaced' and not target.exists():
      path.rename(target)
    else:
      shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(target: Path, flag: str = '--data_dir') -> Iterator[None]:
  """Turns an `OSError` into an `InputError` that says what to do about it; `flag` set `target`."""
  try:
    yield
  except OSError as error:
    way_out = 'free some space' if error.errno in DISK_FULL else 'make its place writable'
    raise InputError(
      f'{target}: cannot be written ({error.strerror or error}); {way_out} or give another {flag}'
    ) from error


def write_file(target: Path, content: bytes) -> None:
  """Writes a file or replaces it."""
  part = target.with_name(f'{target.name}.incomplete-{os.getpid()}')
  try:
    part.write_bytes(content)
    part.replace(target)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def move_in(folder: Path, target: Path) -> None:
  """Makes a complete folder the `target`, in place of an old one."""
  if target.exists() and any(target.iterdir()):
    if _exchange(folder, target):
      shutil.rmtree(folder, ignore_errors=True)
      return
    replaced = target.with_name(f'{target.name}.replaced-{os.getpid()}')
    os.rename(target, replaced)
    os.rename(folder, target)
    shutil.rmtree(replaced, ignore_errors=True)
  else:
    os.rename(folder, target)


def _exchange(first: Path, second: Path) -> bool:
  """Swaps two folders in one step, where the system can: then neither is ever missing."""
  swap = getattr(ctypes.CDLL(None), 'renameat2', None)
  here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
  return swap is not None and not swap(
    here, os.fsencode(first), here, os.fsencode(second), exchange
  )


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass
  return True


def shipped_configs() -> dict[str, Path]:
  """Returns the config files of this project by name, e.g. `movielens_1m`."""
  package = Path(__file__).parent
  # An installed wheel has them inside the package, a checkout beside it.
  folders = (package / 'configs', package.parent / 'configs')
  folder = next((folder for folder in folders if folder.is_dir()), folders[0])
  return {path.stem: path for path in sorted(folder.glob('[!_]*.py'))}

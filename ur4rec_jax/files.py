"""Atomic writes and locks: a file or folder is complete or absent, whenever the program stops."""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock

from ur4rec_jax.errors import BusyError, InputError, StorageError, say

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCK_SECONDS = 60
_OTHER_HOST_SECONDS = 7 * 86_400  # After these, what another machine left counts as abandoned.


def write_file(path: str | Path, content: str | bytes) -> None:
  """Writes a file, or replaces it in one step.

  After a kill or a power cut the file holds either its old or its new content.

  Args:
    path: the file; its folder must exist.
    content: text is stored as UTF-8.

  Raises:
    StorageError: the file cannot be written; an old file stays as it was.
  """
  path = Path(path)
  draft = draft_path(path)
  try:
    with draft.open('wb') as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    draft.replace(path)
    sync(path.parent)
  except OSError as error:
    raise StorageError(f'cannot write {path}: {error.strerror or error}') from error
  finally:
    with contextlib.suppress(OSError):
      draft.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
  """Yields a path whose file becomes `target` if the block ends without an error.

  An old `target` stays in place until then. It suits content that does not fit into memory.
  """
  draft = draft_path(target)
  clean_up(target)
  try:
    yield draft
    sync(draft)
    draft.replace(target)
    sync(target.parent)
  finally:
    with contextlib.suppress(OSError):
      draft.unlink(missing_ok=True)


def sha256(path: Path) -> str:
  """Returns the SHA-256 of a file."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def draft_path(target: Path, purpose: str = 'incomplete') -> Path:
  """Returns a path beside `target` that no other process has, on this machine or another one.

  Raises:
    InputError: `target` has no name, such as the path of an empty text.
  """
  if not target.name:
    raise InputError(f'{str(target)!r}: names no file or folder that can be written; give another')
  return target.with_name(f'{target.name}.{purpose}-{socket.gethostname()}-{os.getpid()}')


@contextlib.contextmanager
def only_process(lock_file: str | Path, message: str) -> Iterator[None]:
  """Lets one process at a time run the block; others wait up to a minute for their turn.

  The lock is gone when the process ends, even if it was killed. The environment variable
  `UR4REC_LOCK_SECONDS` sets another time to wait.

  Args:
    lock_file: the file that is locked; it is removed at the end.
    message: message if another process holds the lock, with the way out.

  Raises:
    BusyError: another process holds the lock for longer.
    InputError: the environment variable is no number of seconds.
    OSError: the lock file cannot be written.
  """
  lock_file = Path(lock_file).absolute()  # The block may change the working directory.
  lock = filelock.FileLock(lock_file)
  seconds = _lock_seconds()
  # Read first, as some versions of filelock empty the file when they try to lock it.
  with contextlib.suppress(OSError, ValueError):
    message += f' (held by {lock_file.read_text().strip() or "an unknown process"})'
  try:
    lock.acquire(blocking=False)
  except filelock.Timeout:
    if seconds:
      say(f'{message}; waiting up to {seconds:g} s', sys.stderr)
    try:
      lock.acquire(timeout=seconds)
    except filelock.Timeout as error:
      raise BusyError(message) from error
  with contextlib.suppress(OSError):  # The disk may be full, and only the message needs it.
    lock_file.write_text(f'process {os.getpid()} on {socket.gethostname()}\n')
  try:
    yield
  finally:
    # Removed before the release: nobody else can hold the lock on this file yet.
    with contextlib.suppress(OSError):
      lock_file.unlink()
    lock.release()


def _lock_seconds() -> float:
  text = os.environ.get('UR4REC_LOCK_SECONDS', _LOCK_SECONDS)
  try:
    if (seconds := float(text)) >= 0:
      return seconds
  except ValueError:
    pass
  raise InputError(f'UR4REC_LOCK_SECONDS={text}: must be a number of seconds, 0 or more')


@contextlib.contextmanager
def disk_errors(target: Path, flag: str = '--data_dir') -> Iterator[None]:
  """Turns an `OSError` of the block into an `InputError` that names the way out.

  Args:
    target: the file or folder that is written.
    flag: the command-line flag that chose `target`.
  """
  try:
    yield
  except OSError as error:
    # `write_file` wraps the error of the system, which holds the error number.
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(cause, StorageError):  # A source that is read has failed, such as a database.
      raise
    way_out = 'free some space' if cause.errno in DISK_FULL else 'make its folder writable'
    raise InputError(
      f'{target}: cannot be written ({cause.strerror or cause}); {way_out} or give another {flag}'
    ) from error


@contextlib.contextmanager
def scratch_folder(target: Path, purpose: str = 'raw') -> Iterator[Path]:
  """Creates an empty folder beside `target` and removes it when the block ends.

  The folder is called TARGET.PURPOSE-HOST-PID. If the program is killed, the folder stays until
  `clean_up` removes it.
  """
  folder = draft_path(target, purpose)
  created = [parent for parent in folder.parents if not parent.exists()]
  try:
    folder.mkdir(parents=True)
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    # Parents that hold the finished target are not empty and stay.
    with contextlib.suppress(OSError):
      for parent in created:
        parent.rmdir()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
  """Creates an empty folder that becomes `target` if the block ends without an error.

  An old `target` stays in place until then.
  """
  with scratch_folder(target, 'incomplete') as folder:
    yield folder
    move_in(folder, target)


def clean_up(target: Path) -> None:
  """Removes folders and files that killed programs left beside `target`.

  If a program was killed while it replaced `target`, the old folder is put back. Programs of other
  machines, which share the disk, cannot be asked; what they have left is removed after a week.
  """
  purposes = 'raw|spill|incomplete|replaced'
  pattern = re.compile(rf'{re.escape(target.name)}\.({purposes})-(?:(.+)-)?(\d+)')
  for path in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
    match = pattern.fullmatch(path.name)
    if not match or _is_used(path, match[2] or socket.gethostname(), int(match[3])):
      continue
    if match[1] == 'replaced' and not target.exists():
      path.rename(target)
    elif path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      with contextlib.suppress(OSError):
        path.unlink()


def move_in(folder: Path, target: Path) -> None:
  """Renames a complete folder to `target` and removes the folder that was there before."""
  if target.exists() and any(target.iterdir()):
    if _exchange(folder, target):
      shutil.rmtree(folder, ignore_errors=True)
      return
    replaced = draft_path(target, 'replaced')
    os.rename(target, replaced)
    os.rename(folder, target)
    shutil.rmtree(replaced, ignore_errors=True)
  else:
    os.rename(folder, target)


def _exchange(first: Path, second: Path) -> bool:
  """Swaps two folders in one step, so that neither is ever missing; False if unsupported."""
  swap = getattr(ctypes.CDLL(None), 'renameat2', None)
  here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
  return swap is not None and not swap(
    here, os.fsencode(first), here, os.fsencode(second), exchange
  )


def sync_tree(folder: Path) -> None:
  """Forces all files and names below a folder to the disk."""
  for path in folder.rglob('*'):
    sync(path)
  sync(folder)


def sync(path: Path) -> None:
  """Forces the names in a folder, or the content of a file, to the disk.

  A power cut may undo a rename otherwise, or leave an empty file.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _is_used(folder: Path, host: str, pid: int) -> bool:
  """Tells whether the process that has made a folder may still use it."""
  if host != socket.gethostname():
    with contextlib.suppress(OSError):  # The other machine may have moved it just now.
      return time.time() < folder.stat().st_mtime + _OTHER_HOST_SECONDS
    return True
  # This process has created nothing yet, so a folder with its number belongs to an earlier one.
  return pid != os.getpid() and _is_alive(pid)


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:
    pass
  return True


def expand_home(arguments: Sequence[str] | None = None) -> list[str]:
  """Writes out the home folder in arguments such as `--data_dir=~/data`.

  Most shells expand `~` only at the start of a word.

  Args:
    arguments: words of a command line; None takes those of the process.
  """
  expanded = []
  for argument in sys.argv[1:] if arguments is None else arguments:
    name, equals, value = argument.partition('=')
    if name.startswith('-') and re.match('~[^/]*/', value):
      value = os.path.expanduser(value)
    expanded.append(f'{name}{equals}{value}')
  return expanded


def shipped_configs() -> dict[str, Path]:
  """Returns the config files of this project by name, e.g. `movielens_1m`."""
  package = Path(__file__).parent
  # An installed wheel has them inside the package, a checkout beside it.
  folders = (package / 'configs', package.parent / 'configs')
  folder = next((folder for folder in folders if folder.is_dir()), folders[0])
  return {path.stem: path for path in sorted(folder.glob('[!_]*.py'))}

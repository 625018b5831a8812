"""Unpacks the needed members of untrusted archives and `.gz` files, within limits."""

import contextlib
import functools
import gzip
import io
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from ur4rec_jax.errors import InputError

KINDS = ('.zip', '.tar', '.tar.gz', '.tgz')
_DAMAGED = (
  zipfile.BadZipFile,
  tarfile.TarError,
  gzip.BadGzipFile,
  zlib.error,
  lzma.LZMAError,
  struct.error,
  EOFError,
  NotImplementedError,  # A compression method that Python does not support.
)


class Limits(NamedTuple):
  """Limits of unpacking; a file beyond them is a mistake or an attack."""

  members: int = 200_000  # Files and folders of an archive; picture archives have a few thousand.
  member_bytes: int = 64 << 30  # One file; the largest review files have about 40 GB.
  total_bytes: int = 128 << 30  # All files together.
  ratio: int = 200  # Unpacked to packed size; raw data have 2 to 20, zeros 1,000.
  any_ratio_bytes: int = 64 << 20  # Up to this size any ratio is allowed.


class _Member(NamedTuple):
  """A file or folder in an archive; `fault` is the reason not to unpack it, if any."""

  name: str
  size: int
  is_folder: bool
  fault: str
  open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
  """Whether a path is an archive that `unpack` can read."""
  return path.name.lower().endswith(KINDS) and path.is_file()


def open_file(path: Path, limits: Limits = Limits()) -> IO[bytes]:
  """Opens a file for reading, unpacked if it is a `.gz`.

  Raises:
    OSError: the file cannot be opened.
    InputError: raised while reading, if the `.gz` is damaged or exceeds the limits.
  """
  if path.suffix.lower() not in ('.gz', '.tgz'):
    return path.open('rb')
  return io.BufferedReader(_Limited(gzip.open(path), path, budget(path, limits)), 1 << 18)


@contextlib.contextmanager
def unpacked(archive: Path, patterns: tuple[str, ...], folder: Path) -> Iterator[Path]:
  """Unpacks into a folder; errors of the block about its files name the archive instead."""
  try:
    unpack(archive, patterns, folder)
    yield folder
  except InputError as error:
    raise InputError(str(error).replace(str(folder), str(archive))) from error


def unpack(
  archive: Path, patterns: tuple[str, ...], folder: Path, limits: Limits = Limits()
) -> None:
  """Unpacks all matching members, from any folder of the archive.

  Args:
    archive: a zip or tar file.
    patterns: patterns of names, optionally with the parent folder (`image/*`); a member may end in
      `.gz`. Hidden files never match.
    folder: target folder; members keep their name, or parent folder and name.
    limits: limits for the declared and for the real sizes.

  Raises:
    InputError: the archive is damaged, too large or unsafe, or nothing in it matches.
  """
  members = _zip_members if archive.suffix.lower() == '.zip' else _tar_members
  left = budget(archive, limits)
  origins: dict[Path, str] = {}
  number = 0
  try:
    for number, member in enumerate(members(archive, limits), 1):
      where = f'{archive}: {member.name!r}'
      if number > limits.members:
        raise _too_large(f'{archive}: has more than {limits.members:,} members')
      name = _safe_name(member.name, where)
      relative = None if member.is_folder else _target(name, patterns)
      if relative is None:
        continue
      if member.fault:
        raise InputError(f'{where} {member.fault}; pack the archive again, with plain files')
      if relative in origins:
        raise InputError(
          f'{where} and {origins[relative]!r} are both called {relative}; unpack the archive by'
          ' hand and give --raw_dir the folder meant'
        )
      origins[relative] = member.name
      left -= member.size
      if member.size > limits.member_bytes or left < 0:
        raise _too_large(f'{where} has {member.size:,} bytes')
      target = folder / relative
      target.parent.mkdir(parents=True, exist_ok=True)
      with _opened(member, archive) as source, target.open('xb') as file:
        shutil.copyfileobj(source, file, 1 << 20)
  except _DAMAGED as error:
    raise _damaged(archive, error) from error
  if not origins:
    raise InputError(
      f'{archive}: none of its {number:,} members is called {" or ".join(patterns)}; give --raw_dir'
      ' the archive of this source'
    )


def _opened(member: _Member, archive: Path) -> IO[bytes]:
  try:
    return _Limited(member.open(), archive, member.size)
  except (OSError, ValueError) as error:  # Of offsets that lead out of the file.
    raise _damaged(archive, error) from error


def check_zip(path: Path, file: IO[bytes] | None = None, limits: Limits = Limits()) -> None:
  """Checks a zip file that another library will read, such as .xlsx and .npz files.

  Zip readers never give more bytes of a member than the archive declares.

  Args:
    path: the file, for its size and for messages.
    file: its content, if it is read already.
    limits: limits for the declared sizes.

  Raises:
    InputError: it is encrypted, or unpacks to more than the limits allow.
    Exception: `zipfile` raises many kinds of errors if it is damaged.
  """
  left = budget(path, limits)
  with zipfile.ZipFile(file or path) as content:
    members = content.infolist()
  if len(members) > limits.members:
    raise _too_large(f'{path}: has more than {limits.members:,} members')
  for info in members:
    left -= info.file_size
    if info.flag_bits & 1:
      raise InputError(f'{path}: is encrypted; save it without a password')
    if info.file_size > limits.member_bytes or left < 0:
      raise _too_large(f'{path}: {info.filename!r} has {info.file_size:,} bytes')


def check_size(path: Path, size: int) -> None:
  """Checks the number of bytes that a packed file takes in memory.

  Raises:
    InputError: it is beyond the limits.
  """
  if size > budget(path, Limits()):
    raise _too_large(f'{path}: unpacks to {size:,} bytes')


class _Limited(io.RawIOBase):
  """A stream of unpacked bytes that checks them and enforces the limits."""

  def __init__(self, file: IO[bytes], path: Path, limit: int):
    self._file, self._path, self._limit, self._left = file, path, limit, limit

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    try:
      size = self._file.readinto(buffer)
    except (OSError, *_DAMAGED) as error:
      raise _damaged(self._path, error) from error
    self._left -= size
    if self._left < 0:
      raise _too_large(f'{self._path}: unpacks to more than {self._limit:,} bytes')
    return size

  def close(self) -> None:
    self._file.close()
    super().close()


class _StrictTarInfo(tarfile.TarInfo):
  """Raises an error for a damaged header, which tarfile takes for the end of the archive."""

  @classmethod
  def fromtarfile(cls, file: tarfile.TarFile) -> tarfile.TarInfo:
    try:
      return super().fromtarfile(file)
    except tarfile.EOFHeaderError:
      raise
    except tarfile.HeaderError as error:
      raise tarfile.ReadError(str(error)) from error


def _zip_members(path: Path, limits: Limits) -> Iterator[_Member]:
  del limits
  try:
    content = zipfile.ZipFile(path)
  except (OSError, ValueError) as error:  # Of offsets that lead out of the file.
    raise _damaged(path, error) from error
  with content:
    for info in content.infolist():
      kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the archive does not store file types.
      fault = '' if kind in (0, stat.S_IFREG) else 'is a link or device'
      if info.flag_bits & 1:
        fault = 'is encrypted'
      opened = functools.partial(content.open, info)
      # `info.is_dir` raises an error if the name is empty.
      is_folder = info.filename.endswith('/')
      yield _Member(info.filename, info.file_size, is_folder, fault, opened)


def _tar_members(path: Path, limits: Limits) -> Iterator[_Member]:
  # Read as a stream, so that bytes before a member count towards the limits, too.
  with open_file(path, limits) as file:
    with tarfile.open(fileobj=file, mode='r|', tarinfo=_StrictTarInfo) as content:
      while (info := content.next()) is not None:
        content.members.clear()  # The list of all members may not fit in memory.
        fault = '' if info.isreg() and not info.issparse() else 'is a link or device'
        opened = functools.partial(content.extractfile, info)
        yield _Member(info.name, info.size, info.isdir(), fault, opened)
    while file.read(1 << 20):  # Reads up to the checksum at the end.
      pass


def _safe_name(name: str, where: str) -> PurePosixPath:
  path = PurePosixPath(name.replace('\\', '/'))
  if path.is_absolute() or '..' in path.parts or re.match('[A-Za-z]:', name):
    raise InputError(f'{where} leads out of the archive; do not use an archive that does so')
  return path


def _target(name: PurePosixPath, patterns: tuple[str, ...]) -> Path | None:
  """Returns the target path of a member; None if no pattern matches."""
  if any(part.startswith(('.', '__MACOSX')) for part in name.parts):
    return None
  plain = PurePosixPath(str(name).removesuffix('.gz'))
  for pattern in patterns:
    if plain.match(pattern):
      return Path(*name.parts[-len(PurePosixPath(pattern).parts) :])
  return None


def budget(path: Path, limits: Limits) -> int:
  """Returns the most bytes that a packed file may unpack to."""
  by_ratio = max(limits.any_ratio_bytes, limits.ratio * path.stat().st_size)
  return min(limits.total_bytes, by_ratio)


def _too_large(what: str) -> InputError:
  return InputError(
    f'{what}, more than is unpacked unasked; if you trust the file, unpack it by hand, or'
    ' write it again in another format or with less compression'
  )


def _damaged(path: Path, error: Exception) -> InputError:
  reason = ' '.join(str(error).split()) or type(error).__name__
  return InputError(f'{path}: cannot be unpacked ({reason}); it is damaged: get it again')

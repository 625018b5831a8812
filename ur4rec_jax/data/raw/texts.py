"""Lines of text files, and how values of them are shown in messages."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ur4rec_jax.data.raw import archives
from ur4rec_jax.errors import InputError


def shown(line: str) -> str:
  return repr(line if len(line) <= 80 else line[:77] + '...')


def listed(names: Sequence[str], most: int = 20) -> str:
  """Lists names for a message; of many only the first ones."""
  more = f' and {len(names) - most:,} more' * (len(names) > most)
  return ', '.join(name if len(name) <= 80 else shown(name) for name in names[:most]) + more


def refuse_utf16(path: Path, line: str) -> None:
  """Raises InputError if the first line of a file is in UTF-16, which may have no mark."""
  if '\0' in line:
    raise InputError(
      f'{path}, line 1: bytes that are not UTF-8 but seem to be UTF-16; save the file as UTF-8'
    )


def utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
  """Yields numbered non-empty lines of a UTF-8 file, `.gz` or not, as a stream."""
  try:
    with archives.open_file(path) as file:
      # Of bytes, `splitlines` knows the line ends of Unix, Windows and old Macs only.
      for number, data in enumerate((part for line in file for part in line.splitlines()), 1):
        if number == 1:
          data = data.removeprefix(b'\xef\xbb\xbf')
        try:
          line = data.decode()
        except UnicodeDecodeError as error:
          raise InputError(
            f'{path}, line {number}: bytes that are not UTF-8: {shown(data.decode("latin-1"))};'
            ' save the file as UTF-8'
          ) from error
        if number == 1:
          refuse_utf16(path, line)
        if line.strip():
          yield number, line.strip()
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}); make it readable') from error

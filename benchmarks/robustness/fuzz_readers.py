"""Damages good files at random and reads them; each must be read or refused with one message.

  pip install -e '.[test]'
  python -m benchmarks.robustness.fuzz_readers [--files=1000] [--seed=0] [--kinds=xlsx,zip]

Changes, removes, inserts and overwrites bytes of a good file of each kind, or cuts it off, and lets
the reader of that kind read `files` such files in this process. Ends with a table: how many files
were read, refused, and ended in another error or took more than ten seconds; and the peak of the
memory. The first file of each error is kept in the folder that is printed. Exit code 1 if there is
an error. The same seed damages the same files.
"""

import argparse
import collections
import gzip
import io
import json
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep import build_dataset
from data_prep.embeddings import imported_tokens
from data_prep.prepared import pictures
from data_prep.sources import amazon, amazon_reviews, raw_files, spreadsheets
from ur4rec_jax.data.raw import archives, interactions, items
from ur4rec_jax.data.raw.texts import utf8_lines
from ur4rec_jax.errors import InputError, ReportedError

_SECONDS = 10


class Kind(NamedTuple):
  """A kind of file.

  Attributes:
    name: name of the damaged file.
    make: returns the content of a damaged file, or of a good one without a generator.
    read: reads the file; the second argument is an empty folder.
    refusals: errors that refuse a file.
  """

  name: str
  make: Callable[[random.Random | None], bytes]
  read: Callable[[Path, Path], Any]
  refusals: tuple[type[Exception], ...] = (ReportedError,)


class _SlowError(BaseException):
  """Raised in a reader that takes too long."""


def damaged(good: bytes, rng: random.Random | None) -> bytes:
  """Returns a copy with one to twenty changes; without a generator, none."""
  if rng is None:
    return good
  content = bytearray(good)
  for _ in range(rng.choice([1, 1, 2, 5, 20])):
    chance, at = rng.random(), rng.randrange(len(content))
    if chance < 0.6:
      content[at] = rng.randrange(256)
    elif chance < 0.7:
      del content[at : at + rng.randrange(1, 50)]
    elif chance < 0.8:
      content[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif chance < 0.9:
      # Sizes and offsets at the borders of what four bytes hold.
      content[at : at + 4] = rng.choice([b'\xff\xff\xff\xff', b'\0\0\0\0', b'\xff\xff\xff\x7f'])
    else:
      del content[at:]
    if not content:
      return b'x'
  return bytes(content)


def _zip(members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
  content = io.BytesIO()
  with zipfile.ZipFile(content, 'w', packing) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return content.getvalue()


def _tar(members: dict[str, bytes], mode: str) -> bytes:
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode=mode, format=tarfile.PAX_FORMAT) as archive:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return content.getvalue()


def _saved(save: Callable[[io.BytesIO], Any]) -> bytes:
  content = io.BytesIO()
  save(content)
  return content.getvalue()


def _xlsx() -> dict[str, bytes]:
  import openpyxl

  book = openpyxl.Workbook()
  book.active.append(['movie-id', 'review'])
  for number in range(1, 13):
    book.active.append([number, f'A film about {number} and war'])
  with zipfile.ZipFile(io.BytesIO(_saved(book.save))) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


def _xls() -> bytes:
  import xlwt

  book = xlwt.Workbook()
  sheet = book.add_sheet('a')
  for row, values in enumerate(
    [('movie-id', 'review'), *((i, f'Film {i} \u4e2d') for i in range(12))]
  ):
    for column, value in enumerate(values):
      sheet.write(row, column, value)
  return _saved(book.save)


def _picture_files() -> list[bytes]:
  image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
  found = [_saved(lambda f, kind=kind: image.save(f, kind)) for kind in ('PNG', 'JPEG', 'BMP')]
  for kind in ('GIF', 'WEBP'):
    found.append(
      _saved(lambda f, kind=kind: image.save(f, kind, save_all=True, append_images=[image] * 3))
    )
  return found


def kinds(scratch: Path) -> dict[str, Kind]:
  """Returns the kinds of files by name; `scratch` is for the data that their readers need."""
  sheet, film_pictures = _xlsx(), _picture_files()
  log = pa.table(
    {
      'user': [f'u{i % 40}' for i in range(300)],
      'item': [f'i{i % 13}' for i in range(300)],
      'timestamp': [1_600_000_000 + i for i in range(300)],
      'rating': [float(i % 5) for i in range(300)],
    }
  )
  rows = [f'u{i % 20}{{0}}"i{i % 9}"{{0}}{1_600_000_000 + i}{{0}}{i % 5}\n' for i in range(60)]
  rows = ['user{0}item{0}timestamp{0}rating\n', *rows]
  films = [
    {'id': f'i{i}', 'title': f'Film {i}', 'genres': ['a', ['b']], 'description': ['x', None, 1.5]}
    for i in range(12)
  ]
  reviews = [
    {'reviewerID': f'U{i}', 'asin': f'B{i}', 'overall': 4.0, 'unixReviewTime': 1_600_000_000 + i}
    for i in range(12)
  ]
  new_reviews = [
    {'user_id': f'U{i}', 'parent_asin': f'B{i}', 'timestamp': 1_600_000_000 + i, 'rating': 4.0}
    for i in range(12)
  ]
  members = {
    'ml/ratings.dat': b'1::2::3::4\n' * 100,
    'ml/movies.dat': b'1::a::b\n' * 10,
    'ml/image/1.png': b'x' * 100,
  }
  arrays = {'ids': np.array([f'i{i}' for i in range(12)]), 'embeddings': np.ones((12, 8), 'f')}
  many = {**members, 'ml/' + '\u4e2d' * 80 + '/x': b'y'}  # The name needs an extended header.

  def of(good: bytes) -> Callable[[random.Random | None], bytes]:
    return lambda rng: damaged(good, rng)

  def lines(records: list[Any], write: Callable[[Any], str] = json.dumps) -> bytes:
    return ''.join(write(record) + '\n' for record in records).encode()

  def a_member(rng: random.Random | None) -> bytes:
    bad = rng and rng.choice(list(sheet))
    return _zip({name: damaged(x, rng) if name == bad else x for name, x in sheet.items()})

  def a_picture(rng: random.Random | None) -> bytes:
    return damaged(rng.choice(film_pictures) if rng else film_pictures[0], rng)

  def unpack(path: Path, folder: Path) -> None:
    archives.unpack(path, ('ratings.dat', 'movies.dat', 'image/*'), folder)

  def catalogue(path: Path, folder: Path) -> None:
    records = ((number, amazon._parse(text)) for number, text in utf8_lines(path))
    amazon.catalogue(path, records, 'asin', amazon._item)

  def features(path: Path, folder: Path) -> None:
    data_dir = scratch / 'data'
    if not data_dir.exists():
      build_dataset.build_from_table(log, data_dir)
    imported_tokens.source(data_dir, 'item', path, None, folder)

  def read_log(path: Path, folder: Path) -> None:
    interactions.read(path)

  def read_sheet(path: Path, folder: Path) -> None:
    collections.deque(spreadsheets.rows(path), 0)

  def read_reviews(path: Path, folder: Path) -> None:
    collections.deque(amazon_reviews._reviews(path), 0)

  def ratings(path: Path, folder: Path) -> None:
    columns = {'user': pa.int64(), 'item': pa.int64(), 'rating': pa.float32(), 'time': pa.int64()}
    raw_files.read_columns(path, '::', columns)

  def titles(path: Path, folder: Path) -> None:
    collections.deque(raw_files.text_lines(path), 0)

  text = ''.join(rows)
  return {
    'csv': Kind('log.csv', of(text.replace('{0}', ',').encode()), read_log),
    'tsv': Kind('log.tsv', of(text.replace('{0}', '\t').encode()), read_log),
    'csv.gz': Kind(
      'log.csv.gz',
      of(gzip.compress(text.replace('{0}', ',').encode(), mtime=0)),
      read_log,
    ),
    'parquet': Kind('log.parquet', of(_saved(lambda f: pq.write_table(log, f))), read_log),
    'plain parquet': Kind(
      'log.parquet', of(_saved(lambda f: pq.write_table(log, f, compression='none'))), read_log
    ),
    'interactions jsonl': Kind('log.jsonl', of(lines(log.to_pylist())), read_log),
    'jsonl': Kind('items.jsonl', of(lines(films)), lambda path, folder: items.read(path)),
    'items parquet': Kind(
      'items.parquet',
      of(_saved(lambda f: pq.write_table(pa.table({'id': ['a', 'b'], 'title': ['A', 'B']}), f))),
      lambda path, folder: items.read(path),
    ),
    'ratings': Kind('ratings.dat', of(members['ml/ratings.dat']), ratings),
    'titles': Kind('movies.dat', of(members['ml/movies.dat']), titles),
    'reviews': Kind('r.json', of(lines(reviews)), lambda path, folder: amazon._read_reviews(path)),
    'reviews 2023': Kind('r.jsonl', of(lines(new_reviews)), read_reviews),
    'metadata': Kind(
      'meta.json',
      of(lines([{**film, 'asin': film['id'], 'price': 1.5} for film in films], repr)),
      catalogue,
    ),
    'xlsx': Kind('text.xls', of(_zip(sheet, zipfile.ZIP_STORED)), read_sheet),
    'xlsx member': Kind('text.xls', a_member, read_sheet),
    'xls': Kind('text.xls', of(_xls()), read_sheet),
    'npz': Kind('x.npz', of(_saved(lambda f: np.savez(f, **arrays))), features),
    'zip': Kind('a.zip', of(_zip(members)), unpack),
    'tar': Kind('a.tar', of(_tar(many, 'w')), unpack),
    'tgz': Kind('a.tgz', of(_tar(many, 'w:gz')), unpack),
    'picture': Kind(
      'p',
      a_picture,
      lambda path, folder: pictures.normalise(path.read_bytes()),
      (ReportedError, pictures.BadPicture),
    ),
  }


def fuzz(
  kind: Kind, files: int, rng: random.Random, folder: Path
) -> tuple[dict[str, int], list[str]]:
  """Lets a reader read a good file, and damaged ones.

  Args:
    kind: what to damage and to read.
    files: number of files.
    rng: chooses the damage.
    folder: for the files; the first file of each error stays there.

  Returns:
    The number of files that were `read`, `refused` and led to an `error`; and one line an error.
  """
  counts, errors = dict.fromkeys(('read', 'refused', 'error'), 0), {}
  unpacked = folder / 'unpacked'
  for number in range(files + 1):
    path = folder / kind.name
    path.write_bytes(kind.make(rng if number else None))
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    if not number:
      kind.read(path, unpacked)
      continue
    signal.alarm(_SECONDS)
    try:
      kind.read(path, unpacked)
      counts['read'] += 1
    except kind.refusals as error:
      counts['error' if '\n' in str(error) else 'refused'] += 1
      if '\n' in str(error):
        errors.setdefault('a message of several lines', f'{error}')
    except (Exception, _SlowError) as error:
      counts['error'] += 1
      last = traceback.extract_tb(error.__traceback__)[-1]
      where = f'{type(error).__name__} at {Path(last.filename).name}:{last.lineno}'
      if where not in errors:
        kept = path.rename(folder / f'{number}-{kind.name}')
        errors[where] = f'{where}: {str(error)[:80]!r} ({kept})'
    finally:
      signal.alarm(0)
  return counts, list(errors.values())


def _stop(*_: object) -> None:
  raise _SlowError(f'more than {_SECONDS} seconds')


def main(argv: list[str] | None = None) -> int:
  """Damages files of each kind and prints the table; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--files', type=int, default=1000, help='damaged files of each kind')
  parser.add_argument('--seed', type=int, default=0, help='seed of the damage')
  parser.add_argument('--kinds', help='names of kinds, with commas between them')
  flags = parser.parse_args(argv)
  warnings.simplefilter('ignore')
  before = signal.signal(signal.SIGALRM, _stop)
  folder = Path(tempfile.mkdtemp(prefix='fuzz-'))
  known, failed = kinds(folder), False
  chosen = flags.kinds.split(',') if flags.kinds else list(known)
  if unknown := [name for name in chosen if name not in known]:
    raise InputError(f'--kinds: {unknown[0]!r} is none of {", ".join(known)}')
  print(f'{"kind":<14} {"read":>7} {"refused":>8} {"error":>6}')
  for name in chosen:
    place = folder / name.replace(' ', '-')
    place.mkdir()
    rng = random.Random(f'{flags.seed} {name}')
    counts, errors = fuzz(known[name], flags.files, rng, place)
    print(f'{name:<14} {counts["read"]:>7,} {counts["refused"]:>8,} {counts["error"]:>6,}')
    print(*(f'  {error}' for error in errors), sep='\n', end='\n' * bool(errors), flush=True)
    failed |= bool(errors)
    if not errors:
      shutil.rmtree(place)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(f'peak of the memory: {peak:,.0f} MiB')
  signal.signal(signal.SIGALRM, before)
  if not failed:
    shutil.rmtree(folder)
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())

"""Normalises pictures (upright, RGB, bounded size) and tells which items have one.

The folder `images` of a dataset holds the pictures and manifest.jsonl. The manifest has one line
per attempt with its outcome (`status`), and lines are only ever appended.
"""

import hashlib
import io
import json
import os
import re
import textwrap
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError

from ur4rec_jax import files
from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.errors import InputError

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
IMAGE_SIZE = 256
MAX_BYTES = 32 << 20
MAX_PIXELS = 50_000_000
MIN_SIDE = 8  # Smaller pictures are tracking pixels or placeholders.
MAX_RATIO = 20  # Largest ratio of the long side to the short side.
QUALITY = 90
FOLDER = 'images'
MANIFEST = f'{FOLDER}/manifest.jsonl'
FETCHED, MISSING, REJECTED = 'fetched', 'missing', 'rejected'
# Decoding a picture of MAX_PIXELS takes 400 MB in each thread.
_THREADS = min(8, os.cpu_count() or 1)
# How to turn a picture upright, by the orientation in its EXIF data.
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# `_check_sides` refuses these pictures, so Pillow's warning is not needed.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


class BadPicture(ValueError):
  """A picture that is refused; the message says why."""


def normalise(data: bytes, image_size: int = IMAGE_SIZE) -> tuple[bytes, str]:
  """Makes a picture upright, RGB and small.

  Args:
    data: content of a picture file of one of `FORMATS`.
    image_size: what the short side is reduced to; nothing is enlarged.

  Returns:
    Content and suffix of a JPEG or PNG file: `data` itself if nothing had to be done.

  Raises:
    BadPicture: it is none, damaged, too large or too narrow.
  """
  if len(data) > MAX_BYTES:
    raise BadPicture(f'has {len(data):,} bytes, more than {MAX_BYTES:,}')
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      _check_sides(*image.size)
      return _normalise(image, data, image_size)
  except (BadPicture, MemoryError):
    raise
  except UnidentifiedImageError as error:
    known = f'{", ".join(FORMATS[:-1])} or {FORMATS[-1]}'
    begin = f'it begins with {data[:12]!r}' if data else 'it is empty'
    raise BadPicture(f'is no {known} picture; {begin}') from error
  except Image.DecompressionBombError as error:
    raise BadPicture(f'has more than {MAX_PIXELS:,} pixels') from error
  except Exception as error:  # Damaged files make decoders raise any kind of error.
    raise BadPicture(f'is damaged ({error})') from error


def _check_sides(width: int, height: int) -> None:
  """Checks the size that the header declares, before anything is decoded."""
  short, long = sorted((width, height))
  if width * height > MAX_PIXELS:
    raise BadPicture(f'has {width} x {height} pixels, more than {MAX_PIXELS:,}')
  if short < MIN_SIDE:
    raise BadPicture(f'has {width} x {height} pixels; {MIN_SIDE} a side are the least')
  if long > MAX_RATIO * short:
    raise BadPicture(f'has {width} x {height} pixels; one side is over {MAX_RATIO} times the other')


def _normalise(image: Image.Image, data: bytes, image_size: int) -> tuple[bytes, str]:
  scale = min(1.0, image_size / min(image.size))
  size = tuple(round(side * scale) for side in image.size)
  # JPEG can be decoded at a fraction of its size; twice the final size keeps it sharp.
  image.draft(image.mode, tuple(2 * side for side in size))
  image.load()
  orientation = _orientation(image)
  has_alpha = image.has_transparency_data
  kept = image.mode == 'RGB' and not has_alpha and scale == 1 and orientation not in _UPRIGHT
  if kept and image.format == 'JPEG':
    return data, '.jpg'
  is_8_bit = data[24] == 8  # Pillow reports RGB for PNG files of 16 bits, too.
  if kept and image.format == 'PNG' and is_8_bit and not image.is_animated:
    return data, '.png'
  if image.mode.startswith('I'):  # Pillow would cut 16-bit grey values off at 255.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  elif has_alpha:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  image = image.convert('RGB')
  if image.size != size:
    image = image.resize(size, Image.Resampling.LANCZOS)
  if orientation in _UPRIGHT:
    image = image.transpose(_UPRIGHT[orientation])
  return _jpeg(image), '.jpg'


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # The picture is usable without its EXIF data.
    return 1


def _jpeg(image: Image.Image) -> bytes:
  image.save(file := io.BytesIO(), 'JPEG', quality=QUALITY)
  return file.getvalue()


def placeholder(title: str, image_size: int) -> bytes:
  """Draws a JPEG card with a title, for people to look at; it is never used as a picture."""
  width, height = image_size, image_size * 3 // 2
  hue = hashlib.sha256(title.encode()).digest()[0] * 360 // 256
  image = Image.new('RGB', (width, height), f'hsl({hue}, 30%, 35%)')
  text = textwrap.fill(title, 14, max_lines=8, placeholder=' ...')
  font = ImageFont.load_default(max(1, width // 10))
  draw = ImageDraw.Draw(image)
  draw.multiline_text((width / 2, height / 2), text, 'white', font, 'mm', align='center')
  return _jpeg(image)


def store(picture: bytes | Path, folder: Path, name: str, image_size: int) -> dict[str, Any]:
  """Normalises a picture and writes it into the folder of a dataset.

  Args:
    picture: a picture file or its content.
    folder: the dataset's.
    name: file name without suffix, see `file_names`.
    image_size: see `normalise`.

  Returns:
    What the manifest says of it: `bytes` and `sha256` of what came, and `path` and
    `stored_sha256`, or the `reason` why it was rejected.
  """
  facts = {}
  try:
    data = picture if isinstance(picture, bytes) else _read(picture)
    facts = {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
    content, suffix = normalise(data, image_size)
  except BadPicture as error:
    return {'status': REJECTED, 'reason': str(error), **facts}
  path = f'{FOLDER}/{name}{suffix}'
  files.write_file(folder / path, content)
  stored = hashlib.sha256(content).hexdigest()
  return {'status': FETCHED, 'path': path, **facts, 'stored_sha256': stored}


def _read(path: Path) -> bytes:
  try:
    if (size := path.stat().st_size) > MAX_BYTES:
      raise BadPicture(f'has {size:,} bytes, more than {MAX_BYTES:,}')
    return path.read_bytes()
  except OSError as error:
    raise BadPicture(f'cannot be read ({error.strerror})') from error


def import_all(
  folder: Path, names: Sequence[str], images: Sequence[bytes | Path | str | None], image_size: int
) -> tuple[list[str], list[str]]:
  """Stores the pictures of a new dataset in its folder.

  Args:
    folder: the dataset's.
    names: `[items]` original ids.
    images: `[items]` content, file, URL or None.
    image_size: see `normalise`.

  Returns:
    `[items]` paths relative to `folder`, or URLs, '' where there is none; and notes for the user.
  """
  (folder / FOLDER).mkdir()

  def bring(name: str, image: bytes | Path | str | None) -> dict[str, Any] | None:
    return store(image, folder, name, image_size) if isinstance(image, bytes | Path) else None

  with ThreadPoolExecutor(_THREADS) as pool:
    records = list(pool.map(bring, file_names(names), images))
  paths, lines, refused = [], [], []
  for name, image, record in zip(names, images, records, strict=True):
    if record is None:
      paths.append(image or '')
      continue
    paths.append(record.get('path', ''))
    origin = {'file': image.name} if isinstance(image, Path) else {}
    lines.append({'item': name, 'source': 'files', **origin, **record})
    if record['status'] == REJECTED:
      refused.append(f'item {name}: {origin.get("file", "its picture")} {record["reason"]}')
  if not lines:
    (folder / FOLDER).rmdir()
    return paths, []
  (folder / MANIFEST).write_text(''.join(map(manifest_line, lines)), encoding='utf-8')
  if not refused:
    return paths, []
  note = f'pictures: {len(refused):,} of {len(lines):,} refused, their items are kept without'
  return paths, [f'{note}; first {refused[0]}; all are in {MANIFEST}']


def file_names(names: Sequence[str]) -> Sequence[str]:
  """Chooses file names without suffix: the items' ids if all are plain, else their numbers.

  An id may be `../x`, and two ids may differ in case only, which some file systems do not see.
  """
  plain = all(re.fullmatch(r'[0-9A-Za-z][0-9A-Za-z_-]{0,63}', name) for name in names)
  if plain and len({name.casefold() for name in names}) == len(names):
    return names
  return [str(i + 1) for i in range(len(names))]


def manifest_line(record: dict[str, Any]) -> str:
  return json.dumps(record, ensure_ascii=False) + '\n'


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


def find(data_dir: str | Path) -> list[Path | None]:
  """Finds the pictures of the items of a prepared dataset.

  A picture counts if the manifest says that it was fetched and the file still is what was stored;
  placeholders do not count.

  Returns:
    `[items]` picture files, entry i is of item i + 1; None where there is none.
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
    return list(pool.map(sound, read_items(data_dir)))

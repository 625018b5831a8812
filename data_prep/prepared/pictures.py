"""Normalises pictures (upright, RGB, bounded size) and stores them in a prepared folder."""

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ur4rec_jax import files
from ur4rec_jax.data.item_pictures import FETCHED, FOLDER, MANIFEST, REJECTED
from ur4rec_jax.encoders.picture_files import IMAGE_SIZE as IMAGE_SIZE
from ur4rec_jax.encoders.picture_files import MAX_BYTES, BadPicture, normalise, to_jpeg

# Decoding a picture of MAX_PIXELS takes 400 MB in each thread.
_THREADS = min(8, os.cpu_count() or 1)


def placeholder(title: str, image_size: int) -> bytes:
  """Draws a JPEG card with a title, for people to look at; it is never used as a picture."""
  width, height = image_size, image_size * 3 // 2
  hue = hashlib.sha256(title.encode()).digest()[0] * 360 // 256
  image = Image.new('RGB', (width, height), f'hsl({hue}, 30%, 35%)')
  text = textwrap.fill(title, 14, max_lines=8, placeholder=' ...')
  font = ImageFont.load_default(max(1, width // 10))
  draw = ImageDraw.Draw(image)
  draw.multiline_text((width / 2, height / 2), text, 'white', font, 'mm', align='center')
  return to_jpeg(image)


def store(picture: bytes | Path, folder: Path, name: str, image_size: int) -> dict[str, Any]:
  """Normalises a picture and writes it into the folder of a dataset.

  Args:
    picture: a picture file or its content.
    folder: folder of the dataset.
    name: file name without suffix, see `file_names`.
    image_size: see `normalise`.

  Returns:
    Its record in the manifest: `bytes` and `sha256` of the input, and either `path` and
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
  folder: Path,
  names: Sequence[str],
  images: Sequence[bytes | Path | str | None],
  image_size: int,
  subfolder: str = '',
) -> tuple[list[str], list[str]]:
  """Stores the pictures of new items in the folder of their dataset.

  Args:
    folder: folder of the dataset.
    names: `[items]` original ids.
    images: `[items]` content, file, URL or None.
    image_size: see `normalise`.
    subfolder: where in the folder of pictures they are stored.

  Returns:
    `[items]` paths relative to `folder`, or URLs, '' without a picture; and notes for the user.
  """
  if not any(isinstance(image, bytes | Path) for image in images):
    return [_address(image) for image in images], []
  place = Path(subfolder)
  (folder / FOLDER / place).mkdir(parents=True)

  def bring(name: str, image: bytes | Path | str | None) -> dict[str, Any] | None:
    if not isinstance(image, bytes | Path):
      return None
    return store(image, folder, str(place / name), image_size)

  with ThreadPoolExecutor(_THREADS) as pool:
    records = list(pool.map(bring, file_names(names), images))
  paths, lines, refused = [], [], []
  for name, image, record in zip(names, images, records, strict=True):
    if record is None:
      paths.append(_address(image))
      continue
    paths.append(record.get('path', ''))
    origin = {'file': image.name} if isinstance(image, Path) else {}
    lines.append({'item': name, 'source': 'files', **origin, **record})
    if record['status'] == REJECTED:
      refused.append(f'item {name}: {origin.get("file", "its picture")} {record["reason"]}')
  with (folder / MANIFEST).open('a', encoding='utf-8') as manifest:
    manifest.writelines(map(manifest_line, lines))
  if not refused:
    return paths, []
  note = f'pictures: {len(refused):,} of {len(lines):,} refused, their items are kept without'
  return paths, [f'{note}; first {refused[0]}; all are in {MANIFEST}']


def _address(image: bytes | Path | str | None) -> str:
  """Returns the URL of a picture that is no file; '' without a picture."""
  return image if isinstance(image, str) else ''


def file_names(names: Sequence[str]) -> Sequence[str]:
  """Chooses file names without suffix: the items' ids if all are plain, else their numbers.

  Ids are not always safe names: one may be `../x`, and two may differ only in case, which some
  file systems ignore.
  """
  plain = all(re.fullmatch(r'[0-9A-Za-z][0-9A-Za-z_-]{0,63}', name) for name in names)
  if plain and len({name.casefold() for name in names}) == len(names):
    return names
  return [str(i + 1) for i in range(len(names))]


def manifest_line(record: dict[str, Any]) -> str:
  return json.dumps(record, ensure_ascii=False) + '\n'

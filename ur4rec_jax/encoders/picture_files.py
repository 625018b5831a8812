"""Normalises picture files: upright, RGB, of bounded size; damaged and huge ones are refused."""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
IMAGE_SIZE = 256
MAX_BYTES = 32 << 20
MAX_PIXELS = 50_000_000
MIN_SIDE = 8  # Smaller pictures are tracking pixels or placeholders.
MAX_RATIO = 20  # Largest ratio of the long side to the short side.
QUALITY = 90
_THUMBNAIL_QUALITY = 80
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
    image_size: largest short side in pixels; small pictures are not enlarged.

  Returns:
    Content and suffix of a JPEG or PNG file: `data` itself if nothing had to be done.

  Raises:
    BadPicture: the content is no picture, damaged, too large or too narrow.
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


def open_normalised(data: bytes, image_size: int = IMAGE_SIZE) -> Image.Image:
  """Returns a normalised picture as RGB pixels.

  Args:
    data: content of a picture file.
    image_size: largest short side in pixels.

  Raises:
    BadPicture: see `normalise`.
  """
  content, _ = normalise(data, image_size)
  try:
    return Image.open(io.BytesIO(content)).convert('RGB')
  except Exception as error:  # Damaged files make decoders raise any kind of error.
    raise BadPicture(f'cannot be decoded ({error})') from error


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
  return to_jpeg(image), '.jpg'


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # The picture is usable without its EXIF data.
    return 1


def thumbnail(data: bytes, side: int) -> bytes:
  """Returns a small JPEG file of a picture.

  Args:
    data: content of a picture file.
    side: largest long side in pixels; small pictures are not enlarged.

  Raises:
    BadPicture: see `normalise`.
  """
  image = open_normalised(data, side)
  image.thumbnail((side, side), Image.Resampling.LANCZOS)
  image.save(file := io.BytesIO(), 'JPEG', quality=_THUMBNAIL_QUALITY, optimize=True)
  return file.getvalue()


def to_jpeg(image: Image.Image) -> bytes:
  """Returns the content of a JPEG file."""
  image.save(file := io.BytesIO(), 'JPEG', quality=QUALITY)
  return file.getvalue()

import io
import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep import build_dataset
from data_prep.prepared import pictures, prepare
from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.errors import InputError


def decode(content: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(content)) as image:
    assert image.mode == 'RGB'
    return np.asarray(image).astype(int)


def encode(image: Image.Image, kind: str, **options) -> bytes:
  image.save(file := io.BytesIO(), kind, **options)
  return file.getvalue()


def halves(left, right, mode='RGB', size=(40, 20)) -> Image.Image:
  image = Image.new(mode, size, left)
  image.paste(Image.new(mode, (size[0] // 2, size[1]), right), (size[0] // 2, 0))
  return image


def chunk(kind: bytes, data: bytes) -> bytes:
  check = struct.pack('>I', zlib.crc32(kind + data))
  return struct.pack('>I', len(data)) + kind + data + check


def png(header: bytes, data: bytes) -> bytes:
  parts = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + parts


@pytest.mark.parametrize(('kind', 'suffix'), [('JPEG', '.jpg'), ('PNG', '.png')])
def test_a_small_rgb_jpeg_or_png_is_kept_byte_for_byte(make_picture, kind, suffix):
  content = make_picture(kind, (256, 400))
  assert pictures.normalise(content) == (content, suffix)


@pytest.mark.parametrize('kind', ['WEBP', 'GIF', 'BMP'])
def test_other_formats_become_jpeg(kind):
  before = encode(halves('red', 'blue'), kind)
  content, suffix = pictures.normalise(before)
  assert (content[:2], suffix) == (b'\xff\xd8', '.jpg')
  pixels = decode(content)
  np.testing.assert_allclose(pixels[10, [5, 35]], [[255, 0, 0], [0, 0, 255]], atol=9)
  assert pictures.normalise(before)[0] == content


@pytest.mark.parametrize(
  ('before', 'after'),
  [
    ((600, 900), (256, 384)),
    ((900, 600), (384, 256)),
    ((3000, 3000), (256, 256)),
    ((257, 300), (256, 299)),
    ((20, 40), (20, 40)),
    ((100, 2000), (100, 2000)),
  ],
)
def test_the_short_side_is_reduced_and_nothing_enlarged(before, after):
  image = Image.linear_gradient('L').resize(before).convert('RGB')
  for kind in ('JPEG', 'BMP'):
    pixels = decode(pictures.normalise(encode(image, kind))[0])
    assert pixels.shape == (after[1], after[0], 3)
    assert np.abs(pixels[:, after[0] // 2, 0] - np.linspace(0, 255, after[1])).max() < 6
  pixels = decode(pictures.normalise(encode(image, 'PNG'), image_size=16)[0])
  assert min(pixels.shape[:2]) == 16


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_a_camera_held_otherwise_gives_an_upright_picture(kind):
  upright = np.zeros((600, 400, 3), np.uint8)
  upright[:300, :200], upright[300:, :200], upright[:300, 200:] = 250, 160, 80
  # How the pixels lie in the file, by the orientation noted: row 0 is, e.g., the right side.
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.transpose(1, 0, 2),
    6: np.rot90(upright),
    7: upright[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(upright, -1),
  }
  for orientation, array in stored.items():
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(array))
    for size in (256, 400):  # reduced, and not
      pixels = decode(pictures.normalise(encode(image, kind, exif=exif), size)[0])
      assert pixels.shape == (size * 3 // 2, size, 3)
      corners = pixels[[50, -50, 50, -50], [50, 50, -50, -50], 0]
      np.testing.assert_allclose(corners, [250, 160, 80, 0], atol=3, err_msg=str(orientation))


def test_a_damaged_note_of_the_camera_does_not_spoil_the_picture():
  content = encode(halves('red', 'blue'), 'JPEG', exif=b'Exif\0\0nonsense')
  assert decode(pictures.normalise(content)[0]).shape == (20, 40, 3)


@pytest.mark.parametrize(
  ('image', 'kind', 'expected'),
  [
    (halves(0, 200, 'L'), 'JPEG', [[0] * 3, [200] * 3]),
    (halves(0, 1, '1'), 'PNG', [[0] * 3, [255] * 3]),
    (halves('red', 'blue').convert('P'), 'PNG', [[255, 0, 0], [0, 0, 255]]),
    (halves((0, 255, 255, 0), (0, 0, 0, 255), 'CMYK'), 'JPEG', [[255, 0, 0], [0, 0, 0]]),
    (halves((0, 0, 0, 0), (0, 0, 0, 128), 'RGBA'), 'PNG', [[255] * 3, [127] * 3]),
    (halves((9, 9, 9, 0), (0, 0, 0, 255), 'RGBA'), 'WEBP', [[255] * 3, [0] * 3]),
    (halves((0, 0), (100, 255), 'LA'), 'PNG', [[255] * 3, [100] * 3]),
  ],
)
def test_grey_palette_cmyk_and_transparent_pictures(image, kind, expected):
  options = {'lossless': True} if kind == 'WEBP' else {}
  pixels = decode(pictures.normalise(encode(image, kind, **options))[0])
  np.testing.assert_allclose(pixels[10, [5, 35]], expected, atol=4)


def test_a_transparent_colour_of_a_palette_is_white():
  for kind in ('PNG', 'GIF'):
    image = halves('red', 'blue').quantize(2)
    content = encode(image, kind, transparency=image.getpixel((0, 0)))
    pixels = decode(pictures.normalise(content)[0])
    np.testing.assert_allclose(pixels[10, [5, 35]], [[255] * 3, [0, 0, 255]], atol=9)


def test_16_bits_become_8():
  ramp = np.linspace(0, 65535, 40).astype('>u2')
  grey = b''.join(b'\0' + ramp.tobytes() for _ in range(20))
  rgb = b''.join(b'\0' + np.repeat(ramp, 3).tobytes() for _ in range(20))
  for colour, data in ((0, grey), (2, rgb)):
    content, suffix = pictures.normalise(
      png(struct.pack('>IIBBBBB', 40, 20, 16, colour, 0, 0, 0), data)
    )
    assert suffix == '.jpg'
    np.testing.assert_allclose(decode(content)[10, :, 0], np.linspace(0, 255, 40), atol=4)


def test_the_first_picture_of_a_moving_one_counts():
  frames = [Image.new('RGB', (30, 30), colour) for colour in ('red', 'blue')]
  for kind in ('GIF', 'WEBP', 'PNG'):
    moving = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    content, suffix = pictures.normalise(moving)
    assert suffix == '.jpg'
    np.testing.assert_allclose(decode(content)[15, 15], [255, 0, 0], atol=9)


def refused(content: bytes) -> str:
  with pytest.raises(pictures.BadPicture) as error:
    pictures.normalise(content)
  return str(error.value)


def test_what_is_no_picture_is_refused_with_its_reason(make_picture):
  assert "no JPEG, PNG, WEBP, GIF or BMP picture; it begins with b'<html>" in refused(
    b'<html></html>'
  )
  assert 'it is empty' in refused(b'')
  for kind in ('TIFF', 'ICO', 'PPM'):
    assert 'no JPEG, PNG' in refused(make_picture(kind))
  assert '7 x 300 pixels; 8 a side are the least' in refused(make_picture(size=(7, 300)))
  assert 'one side is over 20 times the other' in refused(make_picture(size=(401, 20)))
  assert 'bytes, more than 33,554,432' in refused(make_picture() + bytes(pictures.MAX_BYTES))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP'])
def test_a_picture_cut_off_anywhere_is_refused(make_picture, kind):
  content = make_picture(kind)
  assert pictures.normalise(content)
  for part in (0.01, 0.1, 0.5, 0.9, 0.99):
    assert refused(content[: int(part * len(content))])


def test_damaged_bytes_never_raise_anything_else(make_picture):
  rng = np.random.default_rng(0)
  reasons = []
  for kind in ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP'):
    content = np.frombuffer(make_picture(kind), np.uint8)
    for _ in range(60):
      damaged = content.copy()
      damaged[rng.integers(0, min(len(content), rng.choice([60, 100_000])), 4)] = rng.integers(256)
      try:
        pictures.normalise(damaged.tobytes())
      except pictures.BadPicture as error:
        reasons.append(str(error))
  assert len(reasons) > 100
  assert '0x' not in ''.join(reasons)  # an address would make the manifest differ each time


def test_a_bomb_is_refused_before_it_is_decoded():
  # Headers that promise far more than any memory holds; nothing behind them could be decoded.
  for side in (8_000, 30_000, 2_000_000_000):
    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    assert 'more than 50,000,000' in refused(png(header, b''))
  gif = b'GIF89a' + struct.pack('<HHBBB', 65_000, 65_000, 0, 0, 0)
  gif += b',' + struct.pack('<HHHHB', 0, 0, 65_000, 65_000, 0) + b'\x02\x02\x4c\x01\x00;'
  bmp = struct.pack('<2sIHHI', b'BM', 54, 0, 0, 54)
  bmp += struct.pack('<IiiHHIIiiII', 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0)
  for content in (gif, bmp):
    assert 'more than 50,000,000' in refused(content)


# Builds.

ROWS = pa.table({'user': ['u', 'u', 'u', 'v', 'v', 'v'], 'item': list('abcabc')})


@pytest.fixture
def shop(tmp_path, make_picture):
  """A folder of three pictures, the second of which is cut off, and the table that names them."""
  folder = tmp_path / 'shop'
  folder.mkdir()
  for i, name in enumerate('abc'):
    (folder / f'{name}.png').write_bytes(make_picture('PNG', (300, 400), seed=i))
  (folder / 'b.png').write_bytes((folder / 'b.png').read_bytes()[:500])
  (folder / 'items.csv').write_text('id,image\na,a.png\nb,b.png\nc,c.png\n')
  (folder / 'rows.csv').write_text('user,item\nu,a\nu,b\nu,c\nv,a\nv,b\nv,c\n')
  return folder


def build(shop, data_dir, options=prepare.Options(), **more):
  flags = {'items': str(shop / 'items.csv'), **more}
  arguments = (shop / 'rows.csv', options)
  return build_dataset.build('interactions', data_dir, *arguments, parameters=flags)


def test_a_bad_picture_costs_its_item_the_picture_only(shop, tmp_path):
  data_dir = tmp_path / 'data'
  metadata, _ = build(shop, data_dir)
  images = [item['image'] for item in read_items(data_dir)]
  assert images == ['images/a.jpg', '', 'images/c.jpg']
  assert decode((data_dir / 'images/a.jpg').read_bytes()).shape == (341, 256, 3)
  assert metadata['notes'][-1].startswith(
    'pictures: 1 of 3 refused, their items are kept without; first item b: b.png is damaged ('
  )
  lines = [
    json.loads(line) for line in (data_dir / 'images/manifest.jsonl').read_text().split('\n')[:-1]
  ]
  assert [(line['item'], line['file'], line['status']) for line in lines] == [
    ('a', 'a.png', 'fetched'),
    ('b', 'b.png', 'rejected'),
    ('c', 'c.png', 'fetched'),
  ]
  assert lines[1]['bytes'] == 500
  assert lines[1]['reason'].startswith('is damaged')
  files = lambda folder: {p.name: p.read_bytes() for p in (folder / 'images').iterdir()}
  build(shop, tmp_path / 'again')
  assert files(tmp_path / 'again') == files(data_dir)


def test_another_picture_or_another_size_is_another_dataset(shop, make_picture, tmp_path):
  data_dir = tmp_path / 'data'
  build(shop, data_dir)
  assert not build(shop, data_dir)[1]
  with pytest.raises(InputError, match='image_size=64'):
    build(shop, data_dir, prepare.Options(image_size=64))
  (shop / 'unrelated.png').write_bytes(b'')
  assert not build(shop, data_dir)[1]
  content = (shop / 'c.png').read_bytes()
  (shop / 'c.png').write_bytes(content[:-1] + b'.')
  with pytest.raises(InputError, match='raw_sha256 is'):
    build(shop, data_dir)
  in_memory = {
    'items': pa.table({'id': list('abc'), 'image': ['a.png', None, None]}),
    'images': shop,
  }
  build_dataset.build_from_table(ROWS, tmp_path / 'table', **in_memory)
  (shop / 'a.png').write_bytes(make_picture())
  with pytest.raises(InputError, match='raw_sha256 is'):
    build_dataset.build_from_table(ROWS, tmp_path / 'table', **in_memory)


def test_finding_pictures_leaves_out_what_is_lost_or_damaged(shop, tmp_path):
  data_dir = tmp_path / 'data'
  build(shop, data_dir)
  a, c = (data_dir / 'images' / f'{name}.jpg' for name in 'ac')
  assert item_pictures.find(data_dir) == [a, None, c]
  content = c.read_bytes()
  c.write_bytes(content[:-10] + b'0123456789')
  assert item_pictures.find(data_dir) == [a, None, None]
  c.write_bytes(content)
  a.unlink()
  with (data_dir / 'images/manifest.jsonl').open('a') as file:
    file.write('{"item": "c", "status": "miss')
  assert item_pictures.find(str(data_dir)) == [None, None, c]
  with pytest.raises(InputError, match='items cannot be read'):
    item_pictures.find(shop)


def test_a_dataset_without_pictures_has_none(sequences, tmp_path):
  build_dataset.build('sequences', tmp_path / 'data', sequences)
  assert item_pictures.find(tmp_path / 'data') == [None, None, None]
  assert not (tmp_path / 'data/images').exists()

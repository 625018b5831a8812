import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import build_dataset
from data_prep.embeddings import imported_tokens
from data_prep.prepared import prepare
from data_prep.sources import raw_files
from ur4rec_jax.data.raw import archives, interactions
from ur4rec_jax.data.raw import items as item_tables
from ur4rec_jax.data.raw.texts import utf8_lines
from ur4rec_jax.errors import InputError

PATTERNS = ('ratings.dat', 'movies.dat', 'image/*')


def pack(path: Path, members: dict[str, bytes]) -> Path:
  """Makes an archive of the kind that the name says."""
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as content:
      for name, data in members.items():
        content.writestr(name, data)
  else:
    with tarfile.open(path, 'w:gz' if path.suffix in ('.gz', '.tgz') else 'w') as content:
      for name, data in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        content.addfile(info, io.BytesIO(data))
  return path


def files(folder: Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def unpack(tmp_path):
  """Unpacks into `tmp_path/out` and gives what is there then."""

  def unpack(archive: Path, patterns=PATTERNS, **limits) -> dict[str, bytes]:
    (out := tmp_path / 'out').mkdir()
    archives.unpack(archive, patterns, out, archives.Limits(**limits))
    return files(out)

  return unpack


@pytest.fixture
def fault(unpack, tmp_path):
  """The message with which an archive is refused; nothing may have left the folder by then."""

  def fault(archive: Path, **limits) -> str:
    before = files(tmp_path)
    with pytest.raises(InputError) as error:
      unpack(archive, **limits)
    assert '\n' not in str(error.value)
    assert str(error.value).startswith(str(archive))
    assert {n: d for n, d in files(tmp_path).items() if not n.startswith('out')} == before
    return str(error.value)

  return fault


@pytest.mark.parametrize('kind', archives.KINDS)
def test_only_what_is_needed_comes_out_of_whatever_folder(unpack, tmp_path, kind):
  members = {
    './M_ML-1M/ratings.dat': b'1::2::3::4\n',
    'M_ML-1M/deep/movies.dat': b'movies',
    'M_ML-1M/image/1.png': b'one',
    'M_ML-1M/other/2.png': b'two',
    'M_ML-1M/README': b'terms',
    '__MACOSX/M_ML-1M/ratings.dat': b'',
    'M_ML-1M/.hidden/movies.dat': b'',
  }
  assert unpack(pack(tmp_path / f'a{kind}', members)) == {
    'ratings.dat': b'1::2::3::4\n',
    'movies.dat': b'movies',
    'image/1.png': b'one',
  }


@pytest.mark.parametrize('kind', archives.KINDS)
def test_a_dataset_is_built_from_an_archive(ml_1m, tmp_path, kind):
  content = {f'x/{name}': data for name, data in files(ml_1m).items()}
  archive = pack(tmp_path / f'ml{kind}', content)
  (tmp_path / 'image').mkdir()  # beside the archive: none of its business
  plain, _ = build_dataset.build('movielens_1m', tmp_path / 'plain', ml_1m)
  data_dir = tmp_path / 'new' / 'data'
  metadata, _ = build_dataset.build('movielens_1m', data_dir, archive)
  assert metadata['splits'] == plain['splits']
  assert list(metadata['raw_sha256']) == [archive.name]
  assert [path.name for path in data_dir.parent.iterdir()] == ['data']
  assert not build_dataset.build('movielens_1m', data_dir, archive)[1]


def test_pictures_in_an_archive_reach_the_dataset(ml_1m, tmp_path):
  picture = io.BytesIO()
  Image.new('RGB', (20, 30), 'red').save(picture, 'PNG')
  texts = b'movie-id,review\n1,Fine\n'
  content = {**files(ml_1m), 'text.csv': texts, 'image/2.png': picture.getvalue()}
  archive = pack(tmp_path / 'm.zip', content)
  metadata, _ = build_dataset.build('multimodal_movielens_1m', tmp_path / 'data', archive)
  assert metadata['notes'] == ['texts: of 1 of 10 movies', 'pictures: of 1 of 10 movies']
  assert (tmp_path / 'data/images/2.png').read_bytes() == picture.getvalue()


def test_own_data_may_come_in_an_archive(tmp_path):
  rows = b'user,item,time\na,x,1\nb,y,2\n'
  members = {'export/part-0.csv': rows, 'export/part-1.csv.gz': gzip.compress(rows[:-1] + b'3\n')}
  archive = pack(tmp_path / 'orders.tar', {**members, 'export/README.md': b'notes'})
  options = prepare.Options(drop_duplicates=True)
  metadata, _ = build_dataset.build('interactions', tmp_path / 'data', archive, options)
  assert metadata['counts']['interactions'] == 3


def test_changed_pictures_beside_an_archive_are_noticed(tmp_path, make_picture):
  rows = '\n'.join(['user,item', *(f'u{i % 5},i{i % 3}' for i in range(20))])
  archive = pack(tmp_path / 'log.zip', {'rows.csv': rows.encode()})
  goods = tmp_path / 'goods.csv'
  goods.write_text('item,image\ni0,0.jpg\ni1,\ni2,\n')
  build = lambda: build_dataset.build(
    'interactions', tmp_path / 'data', archive, parameters={'items': str(goods)}
  )
  (tmp_path / '0.jpg').write_bytes(make_picture(seed=0))
  assert [build()[1], build()[1]] == [True, False]
  (tmp_path / '0.jpg').write_bytes(make_picture(seed=1))
  with pytest.raises(InputError, match='another dataset: its raw_sha256 is pictures='):
    build()


def test_a_fault_in_a_packed_file_is_told_of_the_archive(ml_1m, tmp_path):
  archive = pack(tmp_path / 'm.tgz', {**files(ml_1m), 'ratings.dat': b'1::2::3::4\n1::2::x\n'})
  data_dir = tmp_path / 'data'
  with pytest.raises(InputError) as error:
    build_dataset.build('movielens_1m', data_dir, archive)
  assert str(error.value).startswith(f'{archive}/ratings.dat, line 2: expected 4 columns')
  archive = pack(tmp_path / 'm.tar', {'x/ratings.dat': b'1::2::3::4\n'})
  with pytest.raises(InputError, match=rf'^{archive}: no movies\.dat in it \(it holds ratings'):
    build_dataset.build('movielens_1m', data_dir, archive)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['m.tar', 'm.tgz', 'ml-1m']


@pytest.mark.parametrize('kind', ['.zip', '.tar'])
@pytest.mark.parametrize(
  'name',
  ['../ratings.dat', '/tmp/ratings.dat', 'a/../../../x', '..\\ratings.dat', 'C:\\ratings.dat'],
)
def test_names_that_lead_out_are_refused(fault, tmp_path, kind, name):
  archive = pack(tmp_path / f'a{kind}', {'movies.dat': b'm', name: b'x'})
  assert 'leads out of the archive' in fault(archive)


@pytest.mark.parametrize(
  'type_', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(fault, tmp_path, type_):
  archive = tmp_path / 'a.tar'
  with tarfile.open(archive, 'w') as content:
    info = tarfile.TarInfo('x/ratings.dat')
    info.type, info.linkname = type_, '/etc/passwd'
    content.addfile(info)
  assert "'x/ratings.dat' is a link or device" in fault(archive)


def test_a_link_in_a_zip_is_refused(fault, tmp_path):
  archive = tmp_path / 'a.zip'
  with zipfile.ZipFile(archive, 'w') as content:
    info = zipfile.ZipInfo('ratings.dat')
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    content.writestr(info, '/etc/passwd')
  assert 'is a link or device' in fault(archive)


def test_a_member_without_a_name_is_ignored(unpack, tmp_path):
  archive = pack(tmp_path / 'a.zip', {'x': b'1', 'ratings.dat': b'2'})
  named = archive.read_bytes()
  archive.write_bytes(named.replace(b'x', b'\0'))  # A name ends at its first zero byte.
  assert unpack(archive) == {'ratings.dat': b'2'}


def test_an_encrypted_member_is_refused(fault, tmp_path):
  archive = pack(tmp_path / 'a.zip', {'ratings.dat': b'x'})
  data = bytearray(archive.read_bytes())
  data[data.index(b'PK\1\2') + 8] |= 1  # the flag in the directory
  archive.write_bytes(data)
  assert "'ratings.dat' is encrypted" in fault(archive)


@pytest.mark.parametrize('kind', ['.zip', '.tar'])
def test_two_members_that_may_be_meant_are_refused(fault, tmp_path, kind):
  archive = pack(tmp_path / f'a{kind}', {'a/ratings.dat': b'x', 'b/ratings.dat': b'y'})
  assert "'b/ratings.dat' and 'a/ratings.dat' are both called ratings.dat" in fault(archive)


def test_an_archive_of_something_else(fault, tmp_path):
  assert 'none of its 1 members is called ratings.dat or' in fault(
    pack(tmp_path / 'a.zip', {'x/u.data': b''})
  )


@pytest.mark.parametrize('kind', archives.KINDS)
@pytest.mark.parametrize(
  ('limits', 'message'),
  [
    ({'members': 2}, 'has more than 2 members'),
    ({'member_bytes': 99_999}, "'ratings.dat' has 100,000 bytes"),
    ({'total_bytes': 150_000}, "'image/1.png' has 100,000 bytes|unpacks to more than 150,000"),
  ],
)
def test_too_much_is_refused(fault, tmp_path, kind, limits, message):
  noise = os.urandom(100_000)
  members = {'ratings.dat': noise, 'image/1.png': noise, 'README': b''}
  text = fault(pack(tmp_path / f'a{kind}', members), **limits)
  assert any(part in text for part in message.split('|'))
  assert 'unpack it by hand' in text


@pytest.mark.parametrize('kind', ['.zip', '.tgz'])
def test_what_unpacks_to_a_thousand_times_its_size_is_refused(fault, tmp_path, kind):
  archive = pack(tmp_path / f'a{kind}', {'ratings.dat': bytes(70 << 20)})
  assert archive.stat().st_size < 100_000
  assert 'unpack it by hand' in fault(archive)


def test_bytes_that_are_skipped_count_too(fault, tmp_path):
  members = {'README': bytes(70 << 20), 'ratings.dat': b'1'}
  assert 'unpacks to more than 67,108,864 bytes' in fault(pack(tmp_path / 'a.tgz', members))


def test_a_member_larger_than_it_says(fault, tmp_path):
  archive = pack(tmp_path / 'a.zip', {'ratings.dat': bytes(100_000)})
  data = bytearray(archive.read_bytes())
  data[(at := data.index(b'PK\1\2') + 24) : at + 4] = struct.pack('<I', 10)
  archive.write_bytes(data)
  assert 'it is damaged' in fault(archive)


@pytest.mark.parametrize('kind', archives.KINDS)
def test_a_damaged_archive_is_one_message_wherever_it_is_cut(unpack, tmp_path, kind):
  members = {'README': os.urandom(2000), 'ratings.dat': os.urandom(3000), 'last': b'x' * 500}
  archive = pack(tmp_path / f'a{kind}', members)
  whole = archive.read_bytes()
  for size in (0, 1, 300, 512, 1000, 2700, 3072, len(whole) - 10):
    archive.write_bytes(whole[:size])
    (out := tmp_path / f'out{size}').mkdir()
    if kind == '.tar' and size == len(whole) - 10:
      continue  # only padding is gone
    with pytest.raises(InputError, match='damaged') as error:
      archives.unpack(archive, PATTERNS, out)
    assert str(error.value).startswith(str(archive))
    assert '\n' not in str(error.value)
  if kind != '.tar':  # which keeps no sums of what its files hold
    flipped = bytearray(whole)
    flipped[2500] ^= 255
    archive.write_bytes(flipped)
    with pytest.raises(InputError, match='it is damaged'):
      unpack(archive)
  else:  # a header in the middle: not the end of the archive
    flipped = bytearray(whole)
    flipped[512 + 2048 + 10] ^= 255
    archive.write_bytes(flipped)
    with pytest.raises(InputError, match='it is damaged'):
      unpack(archive)


def test_single_gz_files_are_read_wherever_text_is(ml_1m, sequences, tmp_path):
  before = build_dataset.build('movielens_1m', tmp_path / 'a', ml_1m)[0]
  for path in list(ml_1m.iterdir()):
    Path(f'{path}.gz').write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
  after = build_dataset.build('movielens_1m', tmp_path / 'b', ml_1m)[0]
  assert after['splits'] == before['splits']
  packed = tmp_path / 'pairs.txt.gz'
  packed.write_bytes(gzip.compress(sequences.read_bytes()))
  assert build_dataset.build('sequences', tmp_path / 'c', packed)[0]['counts']['users'] == 2


def test_a_gz_file_of_zeros_is_refused(tmp_path):
  path = tmp_path / 'x.csv.gz'
  path.write_bytes(gzip.compress(b'a' * (70 << 20)))
  for read in (raw_files.read_bytes, lambda path: list(utf8_lines(path))):
    with pytest.raises(InputError, match='unpacks to more than 67,108,864 bytes'):
      read(path)


def test_the_check_sum_at_the_very_end_counts(unpack, tmp_path):
  # A whole number of buffers: reading the last member does not touch the sum.
  archive = pack(tmp_path / 'a.tgz', {'ratings.dat': b'1', 'README': os.urandom(1_308_160)})
  data = bytearray(archive.read_bytes())
  data[-8] ^= 1
  archive.write_bytes(data)
  with pytest.raises(InputError, match='it is damaged'):
    unpack(archive)


@pytest.mark.parametrize('kind', [pa.string(), pa.large_string()])
def test_few_bytes_that_unpack_to_gigabytes_are_refused_before_they_do(tmp_path, kind):
  long = 'x' * (1 << 20)
  log = pa.table({'user': pa.array([long] * 32, kind), 'item': ['x'] * 32})
  pq.write_table(log, tmp_path / 'fits.parquet')
  assert interactions.read(tmp_path / 'fits.parquet').users.to_pylist()[-1] == long
  # The dictionary holds the text once: without its rows the size of the column says nothing.
  with pq.ParquetWriter(tmp_path / 'log.parquet', log.schema) as writer:
    for part in range(40):
      names = pa.array([f'{part}-{row}' for row in range(32)])
      writer.write_table(log.set_column(1, 'item', names))
  size = (tmp_path / 'log.parquet').stat().st_size
  assert size < 4 << 20
  # What Arrow itself holds: the process gives memory back when it likes.
  pool = pa.default_memory_pool()
  started = pool.max_memory()
  for read in (
    lambda path: interactions.read(path),
    lambda path: item_tables.read(path, title_column='user'),
  ):
    with pytest.raises(InputError, match=r'log\.parquet: unpacks to .* bytes, more than'):
      read(tmp_path / 'log.parquet')
  assert pool.max_memory() - started < 600 << 20
  arrays = pack(tmp_path / 'x.zip', {'ids.npy': bytes(100 << 20)}).rename(tmp_path / 'x.npz')
  with pytest.raises(InputError, match=r"x\.npz: 'ids\.npy' has 104,857,600 bytes, more than"):
    imported_tokens._arrays(arrays, tmp_path / 'scratch')
  limits = archives.Limits(members=1)
  many = pack(tmp_path / 'many.zip', {'a': b'', 'b': b''})
  with pytest.raises(InputError, match='has more than 1 members'):
    archives.check_zip(many, limits=limits)

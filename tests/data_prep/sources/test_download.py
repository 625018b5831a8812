import errno
import functools
import hashlib
import http.server
import threading
import zipfile

import pytest

from data_prep import sources
from data_prep.sources import download
from ur4rec_jax.errors import InputError

FILES = ('ratings.dat', 'movies.dat')


class _Silent(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.fixture
def served(ml_1m, tmp_path):
  """(url, checksums file) of an archive laid out like the original, on a server of this machine."""
  site = tmp_path / 'site'
  site.mkdir()
  archive = site / 'ml-1m.zip'
  with zipfile.ZipFile(archive, 'w') as content:
    content.writestr('ml-1m/README', 'terms')
    for name in FILES:
      content.write(ml_1m / name, f'ml-1m/{name}')
  handler = functools.partial(_Silent, directory=site)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/ml-1m.zip'
    checksums = tmp_path / 'checksums.tsv'
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    checksums.write_text(f'{url}\t{archive.stat().st_size}\t{digest}\tml-1m.zip\n')
    yield url, checksums
    server.shutdown()


def test_fetches_checks_and_unpacks(served, ml_1m, tmp_path):
  url, checksums = served
  (tmp_path / 'raw').mkdir()
  paths = download.fetch(url, FILES, tmp_path / 'raw', checksums)
  for path, name in zip(paths, FILES, strict=True):
    assert path.read_bytes() == (ml_1m / name).read_bytes()


def test_a_wrong_checksum_is_refused(served, tmp_path):
  url, checksums = served
  line = checksums.read_text()
  digest = line.split('\t')[2]
  checksums.write_text(line.replace(digest, '0' * 64))
  with pytest.raises(InputError) as error:
    download.fetch(url, FILES, tmp_path / 'raw', checksums)
  message = str(error.value)
  assert 'SHA-256 differs' in message
  assert '--raw_dir=FOLDER with ratings.dat, movies.dat' in message
  assert '\n' not in message
  assert not list(tmp_path.glob('raw/*.dat'))


def test_a_missing_archive_and_a_missing_member(served, tmp_path):
  url, checksums = served
  with pytest.raises(InputError, match='the server answers 404'):
    download.fetch(url + 'x', FILES, tmp_path / 'raw', checksums)
  with pytest.raises(InputError, match=r'none of its 3 members is called u\.data'):
    download.fetch(url, ('u.data',), tmp_path, checksums)


@pytest.mark.parametrize(
  ('failure', 'kind', 'message'),
  [
    (ConnectionResetError('the peer has gone'), InputError, 'failed .the peer has gone.; download'),
    (OSError(errno.ENOSPC, 'No space left'), OSError, 'No space left'),  # `disk_errors` names it.
  ],
)
def test_a_download_that_breaks_off(served, tmp_path, monkeypatch, failure, kind, message):
  def fail(*args):
    raise failure

  monkeypatch.setattr(download.download_manager.DownloadManager, 'download', fail)
  url, checksums = served
  with pytest.raises(kind, match=message):
    download.fetch(url, FILES, tmp_path / 'raw', checksums)


def test_without_a_network_the_way_out_is_raw_dir(run_build, tmp_path):
  # A proxy that nobody runs cuts the program off on any machine.
  environment = {'https_proxy': 'http://127.0.0.1:9', 'PATH': '', 'HOME': str(tmp_path)}
  result = run_build('--source=movielens_1m', f'--data_dir={tmp_path}/new/ml-1m', env=environment)
  assert result.returncode == 2
  assert 'cannot be reached' in result.stderr
  assert '--raw_dir' in result.stderr
  assert result.stderr.count('\n') == 1
  assert not (tmp_path / 'new').exists()


def test_every_archive_has_a_checksum():
  known = download.CHECKSUMS.read_text()
  for spec in sources.SOURCES.values():
    assert spec.archive is None or spec.archive + '\t' in known

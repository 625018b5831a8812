"""Fetches an archive with a known checksum through TFDS and unpacks the files needed."""

import contextlib
import io
import itertools
import urllib.error
import urllib.request
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, download_manager

from data_prep.sources import raw_files
from ur4rec_jax import files
from ur4rec_jax.data.raw import archives
from ur4rec_jax.errors import InputError

CHECKSUMS = Path(__file__).parent / 'checksums.tsv'


def fetch(
  url: str, names: raw_files.Patterns, folder: Path, checksums_file: Path = CHECKSUMS
) -> list[Path]:
  """Downloads a zip archive, checks it and unpacks the named files.

  Args:
    url: address of the archive, listed in `checksums_file`.
    names: names of the needed files, in any folder of the archive; see `raw_files.find_files`.
    folder: target folder.
    checksums_file: lines of url, size, sha256 and file name, tab-separated.

  Returns:
    Paths of the files, in the order of `names`.
  """
  by_hand = (
    f'download and unpack it by hand and pass --raw_dir=FOLDER with {raw_files.described(names)}'
  )
  # TFDS retries for minutes; this check finds an unreachable host within seconds.
  try:
    request = urllib.request.Request(url, method='HEAD')
    urllib.request.urlopen(request, timeout=20).close()
  except urllib.error.HTTPError as error:
    raise InputError(f'{url}: the server answers {error.code}; {by_hand}') from error
  except OSError as error:
    reason = getattr(error, 'reason', error)
    raise InputError(f'{url}: cannot be reached ({reason}); {by_hand}') from error
  manager = download_manager.DownloadManager(
    download_dir=folder / 'tfds',
    url_infos=checksums.load_url_infos(checksums_file),
    force_checksums_validation=True,
  )
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      tfds.disable_progress_bar()
      archive = manager.download(url)
  except download_manager.NonMatchingChecksumError as error:
    raise InputError(
      f'{url}: what arrived is not the file expected (its size or SHA-256 differs from'
      f' {checksums_file.name}); try again later, or {by_hand}'
    ) from error
  except Exception as error:
    if getattr(error, 'errno', None) in files.DISK_FULL:
      raise
    raise InputError(f'{url}: the download failed ({error}); {by_hand}') from error
  archives.unpack(Path(archive), tuple(itertools.chain(*raw_files.alternatives(names))), folder)
  return raw_files.find_files(names, folder)

"""Finds sounds and videos by the ids of items, and decodes their beginnings with PyAV.

Nothing is read beyond the first seconds that are asked for, and nothing is held but these, so that
memory stays flat for a file of any length.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_prep.embeddings.decoded_files import FileEncoder, encoding
from data_prep.embeddings.feature_files import Row, Source
from data_prep.embeddings.imported_tokens import original_ids
from ur4rec_jax.encoders.picture_files import MAX_PIXELS
from ur4rec_jax.errors import InputError

if TYPE_CHECKING:
  import av
  from PIL import Image

_VIDEOS = (
  *('.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.ogv', '.wmv', '.flv'),
  *('.3gp', '.gif'),
)
_SOUNDS = (
  *('.mp3', '.wav', '.flac', '.ogg', '.oga', '.opus', '.m4a', '.aac', '.aif', '.aiff', '.wma'),
  *_VIDEOS,  # Their sound.
)
SUFFIXES = {'sound': _SOUNDS, 'video': _VIDEOS}
# Playlists are not among them: they lead to other files.
_FORMATS = (
  'aac,ac3,aiff,amr,asf,avi,caf,flac,flv,gif,matroska,webm,mov,mp4,m4a,3gp,mp3,mpeg,mpegts,'
  'ogg,w64,wav'
)
_FAR = 5.0  # Seconds to the next frame above which it is cheaper to jump than to decode.
_MOST_FRAMES = 4_000_000  # Times of frames that are listed, to choose some.


class BadMedia(ValueError):
  """A file that is refused; the message says why."""


class MediaFiles(NamedTuple):
  """Sounds or videos of items.

  Attributes:
    names: original ids of all items, in order.
    paths: the file of each item that has one, by original id.
    what: such a file, in words.
  """

  names: list[str]
  paths: dict[str, Path]
  what: str

  def source(
    self, encoder: dict[str, Any], meaning: dict[str, str], work: FileEncoder, processes: int
  ) -> Source:
    """Describes how to encode the files.

    Args:
      encoder: what info.json says about the encoder.
      meaning: what the tokens mean, by position.
      work: decodes and encodes a file.
      processes: processes that decode; 0 decodes in this process.
    """
    return Source(
      name=encoder['name'],
      info={'encoder': encoder, 'is_mock': False, 'token_meaning': meaning},
      total=len(self.names),
      tokens=work.tokens,
      width=work.width,
      rows=self._rows,
      encode=encoding(work, processes),
    )

  def _rows(self) -> Iterator[Row]:
    """Yields a row for each item; its content is the file."""
    for name in self.names:
      path = self.paths.get(name)
      if path is None:
        yield Row(name, None, reason=f'no {self.what}')
        continue
      try:
        with path.open('rb') as file:
          yield Row(name, path, hashlib.file_digest(file, 'sha256').digest())
      except OSError as error:
        yield Row(name, None, reason=f'its {self.what} cannot be read ({error.strerror})')


def find(data_dir: str | Path, folder: str | Path, what: str) -> MediaFiles:
  """Finds the files of items: `7.mp3` belongs to item 7.

  Args:
    data_dir: prepared folder.
    folder: folder with the files.
    what: sound or video.

  Raises:
    InputError: PyAV is not installed, there is no such folder, no file belongs to an item, or two
      belong to one.
  """
  try:
    import av  # noqa: F401
  except ImportError as error:
    raise InputError(
      "--modality=audio and video need PyAV: pip install 'ur4rec-jax[media]' (in a clone:"
      " -e '.[media]')"
    ) from error
  folder = Path(folder)
  if not folder.is_dir():
    raise InputError(f'--files={folder}: no such folder; give the folder with the files')
  names, suffixes = original_ids(data_dir, 'item'), SUFFIXES[what]
  items = set(names)
  paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
  found: dict[str, Path] = {}
  for path in paths:
    if path.stem not in items or not path.is_file():
      continue
    if path.stem in found:
      raise InputError(
        f'{folder}: two files of item {path.stem}: {found[path.stem].name} and {path.name}; remove'
        ' one of the two'
      )
    found[path.stem] = path
  if not found:
    seen = f'none of its {len(paths):,} files, first {paths[0].name},' if paths else 'no file'
    raise InputError(
      f'--files={folder}: {seen} is named like an item, such as {names[0]}{suffixes[0]}; name each'
      f' file by the original id of its item, with one of the endings {", ".join(suffixes)}'
    )
  return MediaFiles(names, found, what)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
  """Turns the message of a `BadMedia` into the reason that is stored for an item."""
  try:
    yield
  except BadMedia as error:
    raise ValueError(f'its file {error}') from error


def mean_and_parts(files: Sequence[np.ndarray], most: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens `[files, 1 + most, width]`, the mean and then the parts, and their mask.

  Args:
    files: of each, `[parts, width]`.
    most: most parts that get a token.
  """
  tokens = np.zeros((len(files), 1 + most, files[0].shape[1]), np.float32)
  counts = np.array([min(most, len(vectors)) for vectors in files])
  for own, vectors, count in zip(tokens, files, counts, strict=True):
    own[0], own[1 : 1 + count] = vectors.mean(0), vectors[:count]
  return tokens, np.arange(1 + most) <= counts[:, None]


def read_sound(path: Path, rate: int, max_seconds: float) -> np.ndarray:
  """Decodes the beginning of a sound, as one channel.

  Args:
    path: a file of any common format; of a video, its sound.
    rate: samples per second of the result.
    max_seconds: what comes later is not read.

  Returns:
    `[samples]` float32 in -1..1.

  Raises:
    BadMedia: the file is no sound, damaged, or has no samples.
  """
  import av

  most = round(max_seconds * rate)
  parts, count = [], 0
  with _opened(path) as container:
    stream = _first(container.streams.audio, 'sound')
    resampler = av.AudioResampler('flt', 'mono', rate)
    for frame in _frames(container, stream):
      for part in resampler.resample(frame):
        parts.append(part.to_ndarray()[0])
        count += len(parts[-1])
      if count >= most:
        break
    else:
      parts += [part.to_ndarray()[0] for part in resampler.resample(None)] if parts else []
  samples = np.concatenate(parts)[:most] if parts else np.zeros(0, np.float32)
  if not len(samples):
    raise BadMedia('has no samples')
  if not np.isfinite(samples).all():
    raise BadMedia('is damaged (it has samples that are not finite)')
  return samples.astype(np.float32)


def read_frames(path: Path, count: int, max_seconds: float) -> list['Image.Image']:
  """Decodes frames from the beginning of a video, evenly spaced in time.

  Args:
    path: a file of any common format.
    count: number of frames; a video with fewer gives all.
    max_seconds: what comes later is not read.

  Returns:
    RGB pictures, upright, in order.

  Raises:
    BadMedia: the file is no video, damaged, too large, or has no frames.
  """
  with _opened(path) as container:
    stream = _first(container.streams.video, 'pictures')
    _check_size(stream.codec_context.width, stream.codec_context.height)
    times = _frame_times(container, stream, max_seconds)
  if not times:
    raise BadMedia('has no frames')
  number = min(count, len(times))
  wanted = [times[int((i + 0.5) * len(times) / number)] for i in range(number)]
  with _opened(path) as container:
    found = list(_frames_at(container, container.streams.video[0], wanted))
  if not found:
    raise BadMedia('has no frames that can be decoded')
  return found


def _opened(path: Path) -> 'av.container.InputContainer':
  import av

  # Without these a file may make the library read other files and addresses.
  options = {'protocol_whitelist': 'file', 'format_whitelist': _FORMATS}
  try:
    return av.open(str(path.absolute()), container_options=options, metadata_errors='replace')
  except (av.error.FFmpegError, OSError, ValueError) as error:
    if not path.stat().st_size:
      raise BadMedia('is empty') from error
    raise BadMedia(f'is no sound and no video that can be read ({_reason(error)})') from error


def _first(streams: Sequence[Any], what: str) -> Any:
  if not streams:
    raise BadMedia(f'has no {what}')
  if streams[0].codec_context is None:
    raise BadMedia(f'has {what} of a kind that cannot be decoded, or is damaged')
  return streams[0]


def _reason(error: Exception) -> str:
  return getattr(error, 'strerror', None) or str(error) or repr(error)


def _frames(container: 'av.container.InputContainer', stream: Any) -> Iterator[Any]:
  import av

  try:
    yield from container.decode(stream)
  except (av.error.FFmpegError, OSError, ValueError) as error:
    raise BadMedia(f'is damaged ({_reason(error)})') from error


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise BadMedia(f'has {width} x {height} pixels, more than {MAX_PIXELS:,}')


def _frame_times(
  container: 'av.container.InputContainer', stream: Any, max_seconds: float
) -> list[int]:
  """Lists the times of the frames at the beginning in units of `stream.time_base`, in order.

  Nothing is decoded for that.
  """
  import av

  times: list[int] = []
  number, start = 0, None
  try:
    for packet in container.demux(stream):
      if not packet.size:
        continue
      number += 1
      time = packet.dts if packet.pts is None else packet.pts
      if time is None:
        continue
      start = time if start is None else min(start, time)
      seconds = float((time - start) * stream.time_base)
      if seconds < max_seconds:
        times.append(time)
      # Frames that are shown earlier may be stored later, but not by as much as this.
      if seconds > max_seconds + _FAR or number >= _MOST_FRAMES:
        break
  except (av.error.FFmpegError, OSError, ValueError) as error:
    raise BadMedia(f'is damaged ({_reason(error)})') from error
  return sorted(set(times))


def _frames_at(
  container: 'av.container.InputContainer', stream: Any, wanted: list[int]
) -> Iterator['Image.Image']:
  """Yields the frames at some times, or the next ones where there is none; at the end the last."""
  import av

  frames, position = _frames(container, stream), stream.start_time or 0
  for time in wanted:
    if (time - position) * stream.time_base > _FAR:
      # If the file cannot be entered there, all frames up to there are decoded.
      with contextlib.suppress(av.error.FFmpegError, OSError):
        container.seek(time, stream=stream)
        frames = _frames(container, stream)
    found = None
    for frame in frames:
      found = frame
      if frame.pts is None or frame.pts >= time:
        break
    if found is None:
      return
    position = time if found.pts is None else found.pts
    yield _upright(found)


def _upright(frame: 'av.VideoFrame') -> 'Image.Image':
  _check_size(frame.width, frame.height)
  image = frame.to_image().convert('RGB')
  return image.rotate(frame.rotation, expand=True) if frame.rotation else image

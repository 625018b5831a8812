"""Writes small sounds and videos with PyAV."""

import pathlib

import av
import numpy as np

RATE = 16_000


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
  """`[samples]` float32 of one tone."""
  return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype('f4')


def write_sound(path: pathlib.Path, samples: np.ndarray, codec: str, rate: int = RATE) -> None:
  """Writes samples of one channel in the format that the suffix names."""
  with av.open(str(path), 'w') as container:
    stream = container.add_stream(codec, rate=rate, layout='mono')
    container.start_encoding()  # A file without samples has at least its header.
    size = 1024
    resampler = av.AudioResampler(stream.codec_context.format, 'mono', rate, frame_size=size)
    for start in range(0, len(samples), size):
      part = np.ascontiguousarray(samples[None, start : start + size])
      frame = av.AudioFrame.from_ndarray(part, 'flt', 'mono')
      frame.sample_rate, frame.pts = rate, start
      for piece in resampler.resample(frame):
        container.mux(stream.encode(piece))
    for piece in resampler.resample(None):
      container.mux(stream.encode(piece))
    container.mux(stream.encode(None))


def write_video(
  path: pathlib.Path, colours: np.ndarray, codec: str, seconds_apart: int = 1, side: int = 64
) -> None:
  """Writes one frame of each colour, `[frames, 3]` uint8; neighbours are whole seconds apart."""
  lossless = codec in ('png', 'ffv1')
  with av.open(str(path), 'w') as container:
    stream = container.add_stream(codec, rate=1)
    stream.width = stream.height = side
    stream.pix_fmt = {'png': 'rgb24', 'ffv1': 'bgr0'}[codec] if lossless else 'yuv420p'
    container.start_encoding()
    for i, colour in enumerate(colours):
      pixels = np.broadcast_to(np.asarray(colour, np.uint8), (side, side, 3))
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), 'rgb24')
      frame.pts = i * seconds_apart
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))

"""Picture encoders: token 0 is the whole picture, the others a grid of its parts."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ur4rec_jax.encoders import picture_files, pretrained, projection
from ur4rec_jax.encoders.pretrained import LAST, PROJECTED
from ur4rec_jax.errors import InputError

COLOR = 'color'
DEFAULT = 'openai/clip-vit-base-patch32'
_SIDE = 96  # Pictures are reduced to squares of this many pixels a side.
_LEVELS = 4  # Histogram bins per colour channel.
_DIRECTIONS = 8  # Histogram bins of edge directions.


class Encoder(NamedTuple):
  """Encodes pictures into tokens.

  Attributes:
    info: its record in info.json.
    width: width of a token.
    grid: parts per side of a picture; 0 for token 0 only.
    prepare: converts an RGB picture to an array; runs in another process.
    workers: functions from a list of such arrays to `[pictures, tokens, width]`, one per device.
    batch_size: pictures per call of a worker.
  """

  info: dict[str, Any]
  width: int
  grid: int
  prepare: Callable[[Image.Image], np.ndarray]
  workers: list[Callable[[list[np.ndarray]], np.ndarray]]
  batch_size: int


def encode_like(
  folder: Path, info: dict[str, Any], contents: Sequence[bytes | None], image_size: int | None
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  """Encodes new pictures with the encoder and the projection of stored features.

  Args:
    folder: folder of the features.
    info: their info.json.
    contents: the content of each picture file; None without a picture.
    image_size: largest short side in pixels of the pictures that were encoded; None for the usual.

  Returns:
    `[rows, tokens, width]` float32, zeros where there is no picture; `[rows, tokens]` bool; and why
    a picture was refused, by row.

  Raises:
    InputError: the encoder is missing or has changed.
  """
  made_by = info['encoder']
  pretrained.check_can_encode(folder, made_by)
  if made_by['name'] == COLOR:
    encoder = color(made_by['grid'])
  else:
    encoder = vision_model(made_by['name'], made_by['grid'], made_by['layer'], 'cpu', 'float32')
  pretrained.check_same(folder, made_by, encoder.info)
  tokens = np.zeros((len(contents), info['tokens'], encoder.width), np.float32)
  mask = np.zeros((len(contents), info['tokens']), bool)
  refused: dict[int, str] = {}
  size_of_side = image_size or picture_files.IMAGE_SIZE
  (work, *_), size = encoder.workers, encoder.batch_size
  for start in range(0, len(contents), size):
    arrays = {}
    for row, content in enumerate(contents[start : start + size], start):
      if content is None:
        continue
      try:
        arrays[row] = encoder.prepare(picture_files.open_normalised(content, size_of_side))
      except picture_files.BadPicture as error:
        refused[row] = str(error)
    if arrays:
      rows = list(arrays)
      tokens[rows], mask[rows] = work(list(arrays.values())), True
  return projection.apply_like(folder, info, tokens, mask), mask, refused


def color(grid: int) -> Encoder:
  """Creates the built-in encoder: statistics of colours and edges, without any learning."""
  info = {'name': COLOR, 'version': 1, 'is_builtin': True, 'grid': grid, 'is_normalised': False}
  width = 6 + _LEVELS**3 + _DIRECTIONS
  return Encoder(info, width, grid, functools.partial(_colors, grid), [np.stack], 256)


def _colors(grid: int, image: Image.Image) -> np.ndarray:
  small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
  pixels = np.asarray(small, np.float32) / 255
  level = np.minimum((pixels * _LEVELS).astype(int), _LEVELS - 1)
  bins = (level[..., 0] * _LEVELS + level[..., 1]) * _LEVELS + level[..., 2]
  down, right = np.gradient(pixels.mean(-1))
  steep = np.hypot(down, right)
  turn = np.arctan2(down, right) / (2 * math.pi) % 1
  direction = np.minimum((turn * _DIRECTIONS).astype(int), _DIRECTIONS - 1)

  def describe(part: tuple[slice, slice]) -> np.ndarray:
    flat = pixels[part].reshape(-1, 3)
    histogram = np.bincount(bins[part].ravel(), minlength=_LEVELS**3) / len(flat)
    edges = np.bincount(direction[part].ravel(), steep[part].ravel(), _DIRECTIONS) / len(flat)
    return np.concatenate([flat.mean(0), flat.std(0), np.sqrt(histogram), np.sqrt(edges)])

  borders = np.linspace(0, _SIDE, grid + 1).round().astype(int)
  spans = [slice(a, b) for a, b in itertools.pairwise(borders)]
  parts = [(slice(None), slice(None)), *itertools.product(spans, spans)]
  return np.stack([describe(part) for part in parts]).astype(np.float32)


def vision_model(
  name: str,
  grid: int,
  layer: str | None = None,
  device: str | None = None,
  precision: str = 'auto',
  batch_size: int = 64,
) -> Encoder:
  """Loads the picture encoder of a transformers model: CLIP, SigLIP, DINOv2, ViT, ResNet, ...

  Args:
    name: see `pretrained.find`.
    grid: parts per side; each part is the mean of its patches.
    layer: `projected` is the last layer, normalised and projected to the space that CLIP shares
      with texts; `last` is the last layer, normalised; a number is the output of that layer, -1 of
      the last one. None chooses `projected` if the model has this space, else `last`.
    device: see `pretrained.devices`.
    precision: see `pretrained.precision`.
    batch_size: pictures encoded at once.

  Raises:
    InputError: the model or the device is not available, or the model reads no pictures.
  """
  folder, identity = pretrained.find(name)
  places = pretrained.devices(device)
  precision = pretrained.precision(precision, places)
  with pretrained.loading(name):
    import torch
    from transformers import (
      AutoConfig,
      AutoImageProcessor,
      AutoModel,
      CLIPVisionModelWithProjection,
    )

    is_clip_tower = AutoConfig.from_pretrained(folder).model_type == 'clip_vision_model'
    load = functools.partial(
      (CLIPVisionModelWithProjection if is_clip_tower else AutoModel).from_pretrained,
      folder,
      local_files_only=True,
      dtype=getattr(torch, precision),
    )
    # `check_loaded` reports weights that do not fit.
    model, found = load(output_loading_info=True, ignore_mismatched_sizes=True)
    has_space = hasattr(model, 'visual_projection')
    layer = pretrained.choose_layer(name, layer, has_space)
    unused = ('pooler.', *(('visual_projection',) if layer != PROJECTED else ()))
    pretrained.check_loaded(name, found, unused)
    tower = getattr(model, 'vision_model', model)
    if tower.main_input_name != 'pixel_values':
      raise InputError(f'--encoder={name}: reads no pictures; give a vision model')
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    prepare = functools.partial(_pixels, processor)
    encoders = [
      _Vision(model if place == places[0] else load(), place, layer, grid) for place in places
    ]
    pixels = prepare(Image.new('RGB', (64, 64)))
    width = encoders[0]([pixels]).shape[-1]
  info = {
    **identity,
    'is_builtin': False,
    'model_type': tower.config.model_type,
    'layer': layer,
    'is_projected': layer == PROJECTED,
    'is_normalised': False,
    'token_0': encoders[0].token_0,
    'grid': grid,
    'processor': type(processor).__name__,
    'pixels': list(pixels.shape[1:]),
    'precision': precision,
    'versions': pretrained.versions('transformers', 'torch', 'pillow'),
  }
  return Encoder(info, width, grid, prepare, encoders, batch_size)


def _pixels(processor: Any, image: Image.Image) -> np.ndarray:
  return processor(images=[image], return_tensors='np')['pixel_values'][0]


class _Vision:
  """Encodes decoded pictures into tokens on one device.

  Attributes:
    token_0: kind of the vector of the whole picture: `CLS`, `pooled`, or `mean` of the patches.
  """

  def __init__(self, model: Any, device: str, layer: str, grid: int):
    self._model = model.eval().to(device)
    self._tower = getattr(model, 'vision_model', model)
    self._layer, self._grid = layer, grid
    self.token_0 = ''

  def __call__(self, arrays: list[np.ndarray]) -> np.ndarray:
    import torch

    with torch.inference_mode():
      pixels = torch.from_numpy(np.stack(arrays)).to(self._model.device, self._model.dtype)
      whole, patches = self._read(pixels)
      tokens = [whole[:, None]]
      if self._grid:
        if self._grid > min(patches.shape[-2:]):
          rows, columns = patches.shape[-2:]
          raise InputError(f'--grid={self._grid}: the model has only {rows} x {columns} patches')
        parts = torch.nn.functional.adaptive_avg_pool2d(patches.float(), self._grid)
        tokens.append(parts.flatten(2).transpose(1, 2))
      return torch.cat([part.float() for part in tokens], 1).cpu().numpy()

  def _read(self, pixels: Any) -> tuple[Any, Any]:
    """Returns vectors `[pictures, width]` and patches `[pictures, width, rows, columns]`."""
    is_number = self._layer not in (PROJECTED, LAST)
    found = self._tower(pixel_values=pixels, output_hidden_states=is_number)
    hidden = found.hidden_states[int(self._layer)] if is_number else found.last_hidden_state
    pooled = None if is_number else getattr(found, 'pooler_output', None)
    if hidden.ndim == 4:  # A convolutional network.
      self.token_0 = 'mean' if pooled is None else 'pooled'
      return hidden.mean((2, 3)) if pooled is None else pooled.flatten(1), hidden
    # CLIP normalises only the vector of the whole picture; the patches need the same.
    if hasattr(self._model, 'visual_projection') and not is_number:
      hidden = self._tower.post_layernorm(hidden)
      if self._layer == PROJECTED:
        hidden = self._model.visual_projection(hidden)
    rows, columns = self._patches(pixels.shape[-2:], hidden.shape[1])
    extra = hidden.shape[1] - rows * columns  # The CLS token, and register tokens of some models.
    patches = hidden[:, extra:]
    self.token_0 = 'CLS' if extra else 'mean' if pooled is None else 'pooled'
    whole = hidden[:, 0] if extra else patches.mean(1) if pooled is None else pooled
    return whole, patches.transpose(1, 2).unflatten(2, (rows, columns))

  def _patches(self, pixels: tuple[int, int], length: int) -> tuple[int, int]:
    size = getattr(self._tower.config, 'patch_size', None)
    if isinstance(size, int):
      rows, columns = (side // size for side in pixels)
      if rows * columns <= length:
        return rows, columns
    side = math.isqrt(length)  # Swin and similar models merge patches.
    if side * side != length:
      kind = self._tower.config.model_type
      raise InputError(f'--encoder: cannot tell where the patches of a {kind} model are')
    return side, side

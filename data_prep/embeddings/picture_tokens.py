"""Encodes pictures of items: token 0 is the whole picture, the others a grid of its parts."""

import collections
import functools
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_prep.embeddings.feature_files import Row, Source
from data_prep.prepared import pictures
from ur4rec_jax.data.dataset import iterate_items, read_info
from ur4rec_jax.encoders import pretrained
from ur4rec_jax.errors import InputError

COLOR = 'color'
DEFAULT = 'openai/clip-vit-base-patch32'
PROJECTED, LAST = 'projected', 'last'
_SIDE = 96  # Pictures are reduced to squares of this many pixels a side.
_LEVELS = 4  # Histogram bins per colour channel.
_DIRECTIONS = 8  # Histogram bins of edge directions.


class Encoder(NamedTuple):
  """Turns pictures into tokens.

  Attributes:
    info: what info.json says of it.
    width: of a token.
    grid: how many parts a side gives; 0 for token 0 alone.
    prepare: turns an RGB picture into an array, in a process of its own.
    workers: functions from a list of such arrays to `[pictures, tokens, width]`, one a device.
    batch_size: how many pictures one call gets.
  """

  info: dict[str, Any]
  width: int
  grid: int
  prepare: Callable[[Image.Image], np.ndarray]
  workers: list[Callable[[list[np.ndarray]], np.ndarray]]
  batch_size: int


def source(data_dir: str | Path, encoder: Encoder, processes: int = 0) -> Source:
  """Describes how to encode the pictures of a prepared folder.

  Args:
    data_dir: the folder.
    encoder: what encodes.
    processes: how many decode pictures; 0 decodes in this one.

  Raises:
    InputError: the folder is no prepared dataset, or no item has a picture.
  """
  info = read_info(data_dir)
  found = pictures.find(data_dir)
  if not any(found):
    raise InputError(
      f'data_dir {data_dir}: no item has a picture; fetch them: python -m data_prep.download_images'
      f' --data_dir={data_dir}, or build the dataset with an item table that names picture files'
    )
  grid = encoder.grid
  meaning = {'0': 'the whole picture'}
  if grid:
    meaning[f'1-{grid * grid}'] = f'{grid} x {grid} parts, row by row from the upper left'
  return Source(
    name=encoder.info['name'],
    info={'encoder': encoder.info, 'is_mock': False, 'token_meaning': meaning},
    count=info['counts']['items'],
    tokens=1 + grid * grid,
    width=encoder.width,
    rows=lambda: _rows(Path(data_dir), found),
    encode=functools.partial(_encode, encoder, _Decoders(encoder.prepare, processes)),
  )


def _rows(data_dir: Path, found: list[Path | None]) -> Iterator[Row]:
  records = pictures.read_manifest(data_dir)
  last = {record['item']: record for record in records}
  fetched = {
    r['item']: r.get('stored_sha256', '') for r in records if r['status'] == pictures.FETCHED
  }
  for item, path in zip(iterate_items(data_dir), found, strict=True):
    name = item['original_id']
    if path is not None:
      yield Row(name, path, fetched[name].encode())
    elif name in fetched:
      yield Row(name, None, reason='its picture file is missing or damaged')
    elif name in last and last[name].get('reason'):
      yield Row(name, None, reason=f'{last[name]["status"]}: {last[name]["reason"]}')
    else:
      yield Row(name, None, reason='no picture')


class _Decoders:
  """Decodes batches of pictures in other processes, ahead of their use."""

  def __init__(self, prepare: Callable[[Image.Image], np.ndarray], processes: int):
    self._prepare, self._processes = prepare, processes
    self._pool: ProcessPoolExecutor | None = None

  def arrays(self, batches: list[list[Path]]) -> Iterator[list[np.ndarray | str]]:
    """Yields the arrays of each batch in order; text in place of an array says why it failed."""
    if not self._processes:
      for batch in batches:
        yield _open_all(self._prepare, batch)
      return
    if self._pool is None:
      # Spawned, because torch's threads do not survive a fork.
      self._pool = ProcessPoolExecutor(
        self._processes, multiprocessing.get_context('spawn'), _follow_parent
      )
    waiting: collections.deque = collections.deque()
    for batch in batches:
      waiting.append(self._pool.submit(_open_all, self._prepare, batch))
      if len(waiting) > 2 * self._processes:
        yield _result(waiting.popleft())
    while waiting:
      yield _result(waiting.popleft())


def _result(waiting: Future) -> list[np.ndarray | str]:
  try:
    return waiting.result()
  except BrokenProcessPool as error:
    raise InputError(
      'a process that decodes pictures was killed, probably for lack of memory; pass fewer'
      ' --workers'
    ) from error


def _follow_parent() -> None:
  """Ends a process of the pool when its parent is killed; only the parent handles Ctrl-C."""

  def watch() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=watch, daemon=True).start()


def _open_all(
  prepare: Callable[[Image.Image], np.ndarray], paths: list[Path]
) -> list[np.ndarray | str]:
  return [_open(prepare, path) for path in paths]


def _open(prepare: Callable[[Image.Image], np.ndarray], path: Path) -> np.ndarray | str:
  try:
    with Image.open(path) as file:
      return prepare(file.convert('RGB'))
  except Exception as error:  # Damaged files make decoders raise any kind of error.
    return f'its picture cannot be decoded ({error})'


def _encode(
  encoder: Encoder, decoders: _Decoders, rows: list[Row], advance: Callable[[float], object]
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  num_tokens = 1 + encoder.grid**2
  tokens = np.zeros((len(rows), num_tokens, encoder.width), np.float32)
  mask = np.zeros((len(rows), num_tokens), bool)
  reasons: dict[int, str] = {}
  places = [at for at, row in enumerate(rows) if row.content is not None]
  advance(len(rows) - len(places))
  size = encoder.batch_size
  chosen = [places[i : i + size] for i in range(0, len(places), size)]

  def batches() -> Iterator[tuple[list[int], list[np.ndarray]]]:
    decoded = decoders.arrays([[rows[at].content for at in batch] for batch in chosen])
    for batch, arrays in zip(chosen, decoded, strict=True):
      pairs = list(zip(batch, arrays, strict=True))
      reasons.update((at, array) for at, array in pairs if isinstance(array, str))
      good = [(at, array) for at, array in pairs if not isinstance(array, str)]
      yield [at for at, _ in good], [array for _, array in good]

  workers = [lambda pair, work=work: work(pair[1]) if pair[0] else None for work in encoder.workers]
  for (batch, _), found in pretrained.in_order(workers, batches()):
    if batch:
      tokens[batch], mask[batch] = found, True
    advance(len(batch))
  advance(len(reasons))
  return tokens, mask, reasons


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
    grid: how many parts a side are made of the patches, by their mean.
    layer: `projected`: the last one, normalised and projected to the space that CLIP shares with
      texts; `last`: the last one, normalised; or a number: what comes out of that layer, -1 of the
      last one. None: `projected` where there is such a space, else `last`.
    device: see `pretrained.devices`.
    precision: see `pretrained.precision`.
    batch_size: how many pictures are encoded at once.

  Raises:
    InputError: the model or the device is not to be had, or the model does not read pictures.
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
    layer = layer or (PROJECTED if has_space else LAST)
    if layer == PROJECTED and not has_space:
      raise InputError(
        f'--layer={PROJECTED}: {name} projects to no shared space; pass --layer=last'
      )
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
    token_0: what stands for the whole picture: `CLS`, `pooled`, or `mean` of the patches.
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

"""Sound encoders: a sound is cut into windows, and each window becomes one vector."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.encoders import pretrained
from ur4rec_jax.encoders.pretrained import LAST, PROJECTED
from ur4rec_jax.errors import InputError

SPECTRUM = 'spectrum'
DEFAULT = 'laion/clap-htsat-unfused'
WINDOW_SECONDS = 10  # Most models were trained on as much.
_LEAST_SECONDS = 0.1  # Shorter sounds are padded, because convolutions need some samples.
_RATE = 16_000
_FRAME = 1024
_BANDS = 40
_LOWEST_HZ = 40


class Inputs(NamedTuple):
  """What a model reads of one sound.

  Attributes:
    values: `[windows, ...]`.
    share: which share of their length is sound; some models read windows of a fixed length, and
      the rest is silence.
  """

  values: np.ndarray
  share: float


class Encoder(NamedTuple):
  """Encodes windows of sounds.

  Attributes:
    info: its record in info.json.
    width: width of a vector.
    rate: samples per second that it reads.
    prepare: converts windows `[windows, samples]` to the model's input; runs in another process.
    workers: functions from the input of one sound to `[windows, width]`, one per device.
  """

  info: dict[str, Any]
  width: int
  rate: int
  prepare: Callable[[np.ndarray], Inputs]
  workers: list[Callable[[Inputs], np.ndarray]]


def windows(samples: np.ndarray, rate: int, most: int) -> np.ndarray:
  """Cuts a sound into windows of one length, of at most `WINDOW_SECONDS`.

  Args:
    samples: `[samples]`.
    rate: samples per second.
    most: most windows; of more, some are chosen, evenly spaced.

  Returns:
    `[windows, samples]`.
  """
  number = max(1, math.ceil(len(samples) / (WINDOW_SECONDS * rate)))
  length = max(len(samples) // number, round(_LEAST_SECONDS * rate))
  samples = np.pad(samples[: number * length], (0, max(0, number * length - len(samples))))
  cut = samples.reshape(number, length)
  chosen = np.linspace(0, number - 1, min(number, most)).round().astype(int)
  return cut[chosen]


def spectrum() -> Encoder:
  """Creates the built-in encoder: mean and spread of the energy of 40 bands of frequencies."""
  info = {'name': SPECTRUM, 'version': 1, 'is_builtin': True, 'rate': _RATE, 'is_normalised': False}
  return Encoder(info, 2 * _BANDS, _RATE, _spectrum, [lambda found: found.values])


def _spectrum(cut: np.ndarray) -> Inputs:
  borders = np.geomspace(_LOWEST_HZ, _RATE / 2, _BANDS + 1)
  bins = np.fft.rfftfreq(_FRAME, 1 / _RATE)
  # A low band may be narrower than a bin of the transform, and then reads the nearest one.
  bands = np.array([(bins >= low) & (bins < high) for low, high in itertools.pairwise(borders)])
  for band, low in zip(bands, borders, strict=False):
    band[np.abs(bins - low).argmin()] |= not band.any()
  return Inputs(np.stack([_energies(window, bands) for window in cut]), 1.0)


def _energies(window: np.ndarray, bands: np.ndarray) -> np.ndarray:
  """Returns mean and standard deviation over time of the logarithms of the bands' energies."""
  padded = np.pad(window, (0, max(0, _FRAME - len(window))))
  frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[:: _FRAME // 2]
  power = np.abs(np.fft.rfft(frames * np.hanning(_FRAME))) ** 2
  energies = np.log10(power @ bands.T + 1e-6)
  return np.concatenate([energies.mean(0), energies.std(0)]).astype(np.float32)


def sound_model(
  name: str, layer: str | None = None, device: str | None = None, precision: str = 'auto'
) -> Encoder:
  """Loads the sound encoder of a transformers model: CLAP, wav2vec 2, HuBERT, WavLM, AST, Whisper.

  Args:
    name: see `pretrained.find`.
    layer: `projected` is the vector in the space that CLAP shares with texts; `last` is the model's
      pooled output, or the mean over time of the last layer; a number is the mean over time of that
      layer, -1 of the last one. None chooses `projected` if the model has this space, else `last`.
    device: see `pretrained.devices`.
    precision: see `pretrained.precision`.

  Raises:
    InputError: the model or the device is not available, or the model reads no sounds.
  """
  folder, identity = pretrained.find(name)
  places = pretrained.devices(device)
  precision = pretrained.precision(precision, places)
  with pretrained.loading(name):
    import torch
    from transformers import (
      AutoConfig,
      AutoFeatureExtractor,
      AutoModel,
      ClapAudioModelWithProjection,
    )

    config = AutoConfig.from_pretrained(folder)
    has_space = config.model_type in ('clap', 'clap_audio_model')
    layer = pretrained.choose_layer(name, layer, has_space)
    load = functools.partial(
      (ClapAudioModelWithProjection if has_space else AutoModel).from_pretrained,
      folder,
      local_files_only=True,
      dtype=getattr(torch, precision),
    )
    model, found = load(output_loading_info=True, ignore_mismatched_sizes=True)
    if not has_space and model.main_input_name not in ('input_values', 'input_features'):
      raise InputError(f'--encoder={name}: reads no sounds; give a model of sounds')
    # wav2vec 2 has a vector for masked positions, which only its own training uses.
    pretrained.check_loaded(name, found, unused=('pooler.', 'decoder.', 'masked_spec_embed'))
    extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    rate = extractor.sampling_rate
    prepare = functools.partial(_inputs, extractor)
    encoders = [_Sound(model if place == places[0] else load(), place, layer) for place in places]
    width = encoders[0](prepare(np.zeros((1, rate), np.float32))).shape[-1]
  info = {
    **identity,
    'is_builtin': False,
    'model_type': config.model_type,
    'layer': layer,
    'is_projected': layer == PROJECTED,
    'is_normalised': False,
    'rate': rate,
    'extractor': type(extractor).__name__,
    'precision': precision,
    'versions': pretrained.versions('transformers', 'torch', 'av'),
  }
  return Encoder(info, width, rate, prepare, encoders)


def _inputs(extractor: Any, cut: np.ndarray) -> Inputs:
  found = extractor(list(cut), sampling_rate=extractor.sampling_rate, return_tensors='np')
  fixed = getattr(extractor, 'n_samples', None)  # Whisper pads to 30 seconds.
  share = min(1.0, cut.shape[1] / fixed) if fixed else 1.0
  return Inputs(np.asarray(found[extractor.model_input_names[0]], np.float32), share)


class _Sound:
  """Encodes prepared windows into vectors on one device."""

  def __init__(self, model: Any, device: str, layer: str):
    # Only the encoder of Whisper and similar models looks at the sound.
    is_pair = getattr(model.config, 'is_encoder_decoder', False)
    self._model = (model.get_encoder() if is_pair else model).eval().to(device)
    self._layer, self._device = layer, device

  def __call__(self, inputs: Inputs) -> np.ndarray:
    import torch

    with torch.inference_mode():
      dtype = next(self._model.parameters()).dtype
      values = torch.from_numpy(inputs.values).to(self._device, dtype)
      is_number = self._layer not in (PROJECTED, LAST)
      found = self._model(values, output_hidden_states=is_number)
      if self._layer == PROJECTED:
        vectors = found.audio_embeds
      elif is_number:
        vectors = _over_time(found.hidden_states[int(self._layer)], inputs.share)
      else:
        pooled = getattr(found, 'pooler_output', None)
        vectors = pooled
        if pooled is None:
          vectors = _over_time(found.last_hidden_state, inputs.share)
      return vectors.float().cpu().numpy()


def _over_time(hidden: Any, share: float) -> Any:
  """Averages `[windows, time, width]` over the time with sound, or the places of feature maps."""
  if hidden.ndim == 4:
    return hidden.mean((2, 3))
  return hidden[:, : math.ceil(share * hidden.shape[1])].mean(1)

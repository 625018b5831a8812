"""Text encoders, and the texts of the items and users of a prepared folder.

Token 0 of an item or user is the whole text; each further token is one sentence.
"""

import functools
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data.dataset import iterate_items, iterate_texts, read_info, texts_origin
from ur4rec_jax.encoders import pretrained, projection, sentences
from ur4rec_jax.encoders.sentences import clean, known_text
from ur4rec_jax.errors import InputError

HASHING = 'hashing'
DEFAULT = 'sentence-transformers/all-MiniLM-L6-v2'
_HASHED_WIDTH = 256


class Encoder(NamedTuple):
  """Encodes texts into vectors.

  Attributes:
    info: its record in info.json.
    width: width of a vector.
    workers: functions from texts to `[texts, width]` float32, one per device.
    batch_size: texts per call of a worker.
  """

  info: dict[str, Any]
  width: int
  workers: list[Callable[[list[str]], np.ndarray]]
  batch_size: int


def texts(data_dir: str | Path, of: str, max_tokens: int) -> Iterator[list[str]]:
  """Yields the texts of the tokens of each item or user, in order; [] without a text."""
  has_texts = bool(origin(data_dir, of, read_info(data_dir)))
  return (parts for _, parts in named_texts(data_dir, of, has_texts, max_tokens))


def split(text: str) -> list[str]:
  """Splits a new text into sentences in the same way as stored texts."""
  return sentences.split(known_text(text))


def encode_like(folder: Path, info: dict[str, Any], text: str) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a new text with the encoder and the projection of stored features.

  Args:
    folder: folder of the features.
    info: their info.json.
    text: one or more sentences.

  Returns:
    `[tokens, width]` float32 and `[tokens]` bool.

  Raises:
    InputError: the text is empty, or the encoder is missing or has changed.
  """
  parts = with_whole(split(text), info['tokens'] - 1)
  if not parts:
    raise InputError(f'the text {text!r:.80}: has no letters and digits; write a sentence')
  tokens, mask = encode_rows_like(folder, info, [parts])
  return tokens[0], mask[0]


def encode_rows_like(
  folder: Path, info: dict[str, Any], rows: list[list[str]]
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes new texts with the encoder and the projection of stored features.

  Args:
    folder: folder of the features.
    info: their info.json.
    rows: the texts of each row: the whole, then its sentences; [] for a row without a text.

  Returns:
    `[rows, tokens, width]` float32, zeros where there is no text, and `[rows, tokens]` bool.

  Raises:
    InputError: the encoder is missing or has changed.
  """
  made_by = info['encoder']
  pretrained.check_can_encode(folder, made_by)
  if made_by['name'] == HASHING:
    encoder = hashing()
  else:
    encoder = sentence_transformer(made_by['name'], 'cpu', 'float32')
  pretrained.check_same(folder, made_by, encoder.info)
  rows = [row[: info['tokens']] for row in rows]
  tokens, mask = encode(encoder, info['tokens'], rows, lambda count: None)
  return projection.apply_like(folder, info, tokens, mask), mask


def origin(data_dir: str | Path, of: str, info: dict[str, Any]) -> dict[str, Any]:
  """Returns the origin of the texts; {} for items without written texts.

  Args:
    data_dir: a prepared folder.
    of: `item` or `user`.
    info: its dataset.json.

  Raises:
    InputError: there are no texts about users, or they belong to another split.
  """
  if of == 'item' and not (Path(data_dir) / 'item_texts').exists():
    return {}
  found = texts_origin(data_dir, of)
  if of == 'user':
    again = (
      f'write them again: python -m data_prep.generate_text --data_dir={data_dir} --kind=users'
    )
    name = found['split_name']
    if info['splits'].get(name, {}).get('hash') != found['split_hash']:
      raise InputError(
        f'data_dir {data_dir}: the user texts were written for the split {name}'
        f' {found["split_hash"]}, which this dataset has not; {again}'
      )
    if 'hold_back' not in found:
      raise InputError(
        f'data_dir {data_dir}: the user texts do not say what was held back from them; {again}'
      )
  return found


def named_texts(
  data_dir: str | Path, of: str, has_texts: bool, max_tokens: int
) -> Iterator[tuple[str, list[str]]]:
  """Yields the original id and the texts of each item or user: the whole, then each sentence.

  Args:
    data_dir: a prepared folder.
    of: `item` or `user`.
    has_texts: whether the folder holds written texts, see `origin`.
    max_tokens: sentences beyond this number are not yielded one by one.
  """
  written = iterate_texts(data_dir, of) if has_texts else itertools.repeat(None)
  if of == 'user':
    for row in written:
      yield row['original_id'], with_whole(row['sentences'], max_tokens)
    return
  for item, row in zip(iterate_items(data_dir), written, strict=False):
    if row is not None and row['original_id'] != item['original_id']:
      raise InputError(
        f'data_dir {data_dir}: item {item["original_id"]!r} has the text of {row["original_id"]!r};'
        f' write the texts again: python -m data_prep.generate_text --data_dir={data_dir}'
      )
    written = row['sentences'] if row is not None and row['source'] != 'dataset' else []
    texts = item_texts(item, written)
    yield item['original_id'], texts[: 1 + max_tokens]


def item_texts(item: Mapping[str, Any], written: Sequence[str] = ()) -> list[str]:
  """Returns the texts of an item: the whole, then each sentence; [] without a text.

  Args:
    item: its `title`, `genres` and `description`.
    written: sentences that were written about it.
  """
  parts = [_head(item), *written, *sentences.split(known_text(item['description']))]
  return with_whole([part for part in parts if part])


def _head(item: Mapping[str, Any]) -> str:
  title = ' '.join(clean(item['title']).split())
  genres = ', '.join(filter(None, map(known_text, item['genres'])))
  return ': '.join(part for part in (title, genres) if any(map(str.isalnum, part)))


def with_whole(parts: list[str], max_tokens: int | None = None) -> list[str]:
  """Puts the whole text before its first sentences, or all of them; [] for no text."""
  if not parts:
    return []
  whole = ' '.join(part if part[-1] in '.!?…。！？' else f'{part}.' for part in parts)
  return [whole, *parts[:max_tokens]]


def encode(
  encoder: Encoder,
  num_tokens: int,
  rows: list[list[str]],
  advance: Callable[[float], object],
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes the texts of some items or users.

  Args:
    encoder: text encoder.
    num_tokens: tokens per row.
    rows: texts of each item or user, at most `num_tokens`.
    advance: called with the number of rows finished since the last call.

  Returns:
    Tokens `[rows, num_tokens, width]` float32, zeros where there is no text, and their mask.
  """
  tokens = np.zeros((len(rows), num_tokens, encoder.width), np.float32)
  mask = np.zeros((len(rows), num_tokens), bool)
  positions: dict[str, list[tuple[int, int]]] = {}  # Each distinct text is encoded once.
  for at, row in enumerate(rows):
    for token, text in enumerate(row):
      positions.setdefault(text, []).append((at, token))
  # Sorted by length, so that batches need little padding; the longest, which need the most memory,
  # come first.
  texts = sorted(positions, key=lambda text: (-len(text), text))
  batches = (texts[i : i + encoder.batch_size] for i in range(0, len(texts), encoder.batch_size))
  for batch, vectors in pretrained.in_order(encoder.workers, batches):
    for text, vector in zip(batch, vectors, strict=True):
      for position in positions[text]:
        tokens[position], mask[position] = vector, True
    advance(len(rows) * len(batch) / len(texts))
  if not texts:
    advance(len(rows))
  return tokens, mask


def hashing() -> Encoder:
  """Creates the built-in encoder: hashed words and parts of words, without any learning."""
  info = {'name': HASHING, 'version': 1, 'is_builtin': True, 'is_normalised': True}
  return Encoder(info, _HASHED_WIDTH, [_hash], 1024)


def _hash(texts: list[str]) -> np.ndarray:
  vectors = np.zeros((len(texts), _HASHED_WIDTH), np.float32)
  for vector, text in zip(vectors, texts, strict=True):
    buckets = [bucket for word in re.findall(r'\w+', text.lower()) for bucket in _buckets(word)]
    counts = np.bincount(np.array(buckets, int), minlength=2 * _HASHED_WIDTH)
    signed = counts[:_HASHED_WIDTH] - counts[_HASHED_WIDTH:]
    vector[:] = np.sign(signed) * np.sqrt(np.abs(signed))
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@functools.lru_cache(1 << 17)
def _buckets(word: str) -> tuple[int, ...]:
  """Hashes a word, three times if it is long, and its runs of three characters."""
  padded = f'<{word}>'
  pieces = [word] * (3 if len(word) > 3 else 1)
  pieces += [padded[i : i + 3] for i in range(len(padded) - 2)] if len(word) > 3 else []
  return tuple(zlib.crc32(piece.encode()) % (2 * _HASHED_WIDTH) for piece in pieces)


def sentence_transformer(
  name: str, device: str | None = None, precision: str = 'auto', batch_size: int = 64
) -> Encoder:
  """Loads a model of sentence-transformers.

  Args:
    name: see `pretrained.find`.
    device: see `pretrained.devices`.
    precision: see `pretrained.precision`.
    batch_size: texts encoded at once.

  Raises:
    InputError: the model or the device is not available.
  """
  folder, identity = pretrained.find(name)
  devices = pretrained.devices(device)
  precision = pretrained.precision(precision, devices)
  with pretrained.loading(name):
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    options = {'dtype': getattr(torch, precision)}
    if (folder / 'config.json').is_file():
      _, found = AutoModel.from_pretrained(
        folder,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_loaded` reports them.
        **options,
      )
      pretrained.check_loaded(name, found, unused=('pooler.',))
    loaded = [
      SentenceTransformer(str(folder), device=place, local_files_only=True, model_kwargs=options)
      for place in devices
    ]
    width = loaded[0].encode(['a'], show_progress_bar=False).shape[1]
  info = {
    **identity,
    'is_builtin': False,
    'modules': [type(module).__name__ for module in loaded[0]],
    'max_word_pieces': loaded[0].max_seq_length,
    'precision': precision,
    'versions': pretrained.versions('sentence-transformers', 'transformers', 'torch'),
  }

  encode = lambda model, texts: model.encode(texts, batch_size=batch_size, show_progress_bar=False)
  workers = [functools.partial(encode, model) for model in loaded]
  return Encoder(info, width, workers, batch_size)

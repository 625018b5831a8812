"""Encodes texts about items and users: one token for the whole text, then one per sentence."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_prep.embeddings.feature_files import Encode, Row, Source
from ur4rec_jax.data.dataset import read_info
from ur4rec_jax.encoders import text


def source(data_dir: str | Path, of: str, encoder: text.Encoder, max_tokens: int) -> Source:
  """Describes how to encode the texts of the items or users of a prepared folder.

  Args:
    data_dir: prepared folder.
    of: `item` for title, genres, written text and description of the items; `user` for the written
      texts about users.
    encoder: text encoder.
    max_tokens: most sentences with a token of their own.

  Raises:
    InputError: the folder is no prepared dataset, or there are no texts about its users.
  """
  info = read_info(data_dir)
  origin = text.origin(data_dir, of, info)
  about = {
    'texts': {name: origin.get(name) for name in ('provider', 'model', 'is_mock')},
    'is_mock': bool(origin.get('is_mock')) and _has_written(origin['counts']),
  }
  if of == 'user':
    about |= {name: origin[name] for name in ('split_name', 'split_hash', 'hold_back')}
  first = 'title and genres' if of == 'item' else 'the first sentence'
  return Source(
    name=encoder.info['name'],
    info={
      'encoder': encoder.info,
      **about,
      'token_meaning': {'0': 'the whole text', '1': first, '2...': 'a sentence each'},
    },
    total=info['counts'][f'{of}s'],
    tokens=1 + max_tokens,
    width=encoder.width,
    rows=lambda: _rows(data_dir, of, bool(origin), max_tokens),
    encode=encoding(encoder, 1 + max_tokens),
  )


def _has_written(counts: dict[str, int]) -> bool:
  """Returns whether any of the counted texts is not the dataset's own description."""
  return any(
    counts[source] for source in counts.keys() - {'dataset', 'without_text', 'unknown_ids'}
  )


def _rows(data_dir: str | Path, of: str, has_texts: bool, max_tokens: int) -> Iterator[Row]:
  for name, texts in text.named_texts(data_dir, of, has_texts, max_tokens):
    if texts:
      yield Row(name, texts, '\0'.join(texts).encode())
    else:
      yield Row(name, None, reason='no text, or one without letters and digits')


def encoding(encoder: text.Encoder, num_tokens: int) -> Encode:
  """Returns the function `Source.encode` for rows whose content is a list of texts."""
  return functools.partial(_encode, encoder, num_tokens)


def _encode(
  encoder: text.Encoder, num_tokens: int, rows: list[Row], advance: Callable[[float], object]
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  tokens, mask = text.encode(encoder, num_tokens, [row.content or [] for row in rows], advance)
  return tokens, mask, {}

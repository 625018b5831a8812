"""Reasons for a recommendation are made of what tells an item from others."""

import shutil
import types

from data_prep import encode
from data_prep.llm_text import texts
from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.data.features import load_features
from ur4rec_jax.inference import explanations


def test_sentences_that_many_items_have_are_no_reason(data_dir, tmp_path):
  folder = shutil.copytree(data_dir, tmp_path / 'data')
  ids = [item['original_id'] for item in read_items(folder)]
  letter = lambda number: chr(ord('a') + number % 26)
  written = {
    name: f'Comes with {number} screws. Nothing is like an {letter(number)}{letter(number // 26)}x.'
    for number, name in enumerate(ids)
  }
  texts.write_texts(folder, 'item', written, {'provider': 'import', 'is_mock': False})
  encode.main([f'--data_dir={folder}', '--modality=text', '--encoder=hashing'])
  features = load_features(folder, 'item', 'text')
  about = types.SimpleNamespace(config=types.SimpleNamespace(data_dir=str(folder)))
  rows = [0, 7]
  found = explanations._stored_sentences(about, 'item', features, rows)
  tokens, mask = features.rows(rows)
  for row, t, m in zip(rows, tokens, mask, strict=True):
    sentences, vectors = found[row]
    assert len(sentences) == len(vectors)
    assert not any('Comes with' in sentence for sentence in sentences)
    assert any('Nothing is like' in sentence for sentence in sentences)
    for sentence, vector in zip(sentences, vectors, strict=True):
      likeness = explanations._unit(t[1:][m[1:]]) @ vector
      assert likeness.max() > 0.999, sentence  # It is the vector of one of the item's sentences.

"""Sounds, videos and triples -> token embeddings, from real files and by real models."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip('av')

import torch
import transformers

import ur4rec_jax
from benchmarks.robustness.small_runs import TINY
from data_prep import build_dataset, encode
from data_prep.embeddings import graph_tokens, media_files
from tests.helpers import media
from tests.helpers.runs import ROOT
from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.data.features import load_features
from ur4rec_jax.encoders import pictures, sounds, text


@pytest.fixture
def goods(tmp_path) -> pathlib.Path:
  """A prepared dataset of six items, i0 to i5."""
  items = [f'i{at}' for at in range(6)]
  table = [{'id': name, 'title': f'Thing {name}'} for name in items]
  (tmp_path / 'items.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in table))
  log = pa.table({'user': ['u'] * 6 + ['v'] * 6, 'item': items * 2})
  build_dataset.build_from_table(log, tmp_path / 'data', items=str(tmp_path / 'items.jsonl'))
  return tmp_path / 'data'


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  (tmp_path / 'files').mkdir()
  return tmp_path / 'files'


def run(goods, modality, files, *flags) -> None:
  flags = (f'--modality={modality}', f'--files={files}', '--workers=0', *flags)
  encode.main([f'--data_dir={goods}', *flags])


def read(goods, modality):
  features = load_features(goods, 'item', modality)
  info, (tokens, mask) = features.info, features.table()
  return info, tokens[1:], mask[1:]


def masked(goods, modality) -> dict[str, str]:
  lines = (goods / f'features/item/{modality}/masked.jsonl').read_text().splitlines()
  return {record['id']: record['reason'] for record in map(json.loads, lines)}


@pytest.fixture
def fails(goods, capsys):
  """Runs the program and gives its error message: `fails(modality, files, *flags)`."""

  def fails(modality, files, *flags) -> str:
    with pytest.raises(SystemExit) as caught:
      run(goods, modality, files, *flags)
    assert caught.value.code == 2
    assert not list(goods.glob('features/*/*/info.json'))
    return capsys.readouterr().err

  return fails


def cosines(vectors: np.ndarray) -> np.ndarray:
  vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors @ vectors.T


# Sounds.


@pytest.mark.parametrize(
  ('suffix', 'codec'), [('wav', 'pcm_s16le'), ('mp3', 'mp3'), ('flac', 'flac'), ('m4a', 'aac')]
)
def test_a_tone_is_read_from_every_format_at_the_rate_asked_for(folder, suffix, codec):
  media.write_sound(folder / f'a.{suffix}', media.tone(440, 2), codec)
  samples = media_files.read_sound(folder / f'a.{suffix}', 8000, 60)
  assert len(samples) == pytest.approx(16_000, abs=600)  # Some formats pad to whole blocks.
  heights = np.abs(np.fft.rfft(samples[4000:12_000]))
  assert heights.argmax() == 440
  assert np.abs(samples).max() == pytest.approx(0.5, abs=0.05)
  assert len(media_files.read_sound(folder / f'a.{suffix}', 8000, 0.5)) == 4000


def test_token_0_is_the_mean_of_the_parts_of_a_sound(goods, folder, capsys):
  long = np.concatenate([media.tone(200, 10), media.tone(2000, 10), media.tone(6000, 5)])
  media.write_sound(folder / 'i0.wav', long, 'pcm_s16le')
  media.write_sound(folder / 'i1.flac', media.tone(200, 3), 'flac')
  media.write_sound(folder / 'i2.mp3', media.tone(210, 3), 'mp3')
  run(goods, 'audio', folder, '--encoder=spectrum', '--dtype=float32', '--max_tokens=4')
  info, tokens, mask = read(goods, 'audio')
  assert mask.sum(1).tolist() == [4, 2, 2, 0, 0, 0]
  np.testing.assert_allclose(tokens[0, 0], tokens[0, 1:4].mean(0), atol=1e-5)
  np.testing.assert_allclose(tokens[1, 0], tokens[1, 1], atol=1e-6)
  likeness = cosines(np.stack([*tokens[0, 1:4], tokens[1, 1], tokens[2, 1]]))
  assert likeness[3, 4] > likeness[3, 2]
  assert likeness[0, 3] > likeness[1, 3]
  assert info['encoder']['max_seconds'] == 60
  assert masked(goods, 'audio')['i3'] == 'no sound'
  assert "3: no sound; first item 'i3'" in capsys.readouterr().out


def test_a_sound_is_cut_into_equal_windows_and_too_many_are_thinned_evenly():
  rate = 10
  samples = np.arange(10 * 10 * 7 - 20, dtype='f4')  # 68 seconds.
  cut = sounds.windows(samples, rate, 8)
  assert cut.shape == (7, 97)
  np.testing.assert_array_equal(cut[1], samples[97:194])
  assert sounds.windows(samples, rate, 3)[:, 0].tolist() == [0, 97 * 3, 97 * 6]
  assert sounds.windows(np.ones(1, 'f4'), 16_000, 8).shape == (1, 1600)


SMALL = {
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 48,
}


@pytest.fixture(scope='session')
def models(tmp_path_factory):
  """Folders of small models of sounds with the true architectures and random weights."""
  wav = {'conv_dim': (16, 16), 'conv_stride': (5, 2), 'conv_kernel': (10, 3)}
  wav |= {'num_feat_extract_layers': 2, 'num_conv_pos_embeddings': 16}
  wav |= {'num_conv_pos_embedding_groups': 2}
  clap = {'hidden_size': 32, 'patch_embeds_hidden_size': 8, 'depths': [1, 1]}
  clap |= {'num_attention_heads': [2, 2], 'spec_size': 256, 'window_size': 4, 'projection_dim': 12}
  clap |= {'patch_size': 4, 'patch_stride': [4, 4], 'num_hidden_layers': 2, 'num_mel_bins': 64}
  clap |= {'hidden_size': 16}
  whisper = {'d_model': 32, 'encoder_layers': 2, 'encoder_attention_heads': 2}
  whisper |= {'decoder_layers': 1, 'decoder_attention_heads': 2, 'vocab_size': 60}
  whisper |= {'encoder_ffn_dim': 32, 'decoder_ffn_dim': 32, 'pad_token_id': 0}
  whisper |= {'bos_token_id': 1, 'eos_token_id': 2, 'decoder_start_token_id': 1}
  made = {
    'wav2vec2': (
      transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SMALL, **wav)),
      transformers.Wav2Vec2FeatureExtractor(),
    ),
    'ast': (
      transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=128)),
      transformers.ASTFeatureExtractor(max_length=128),
    ),
    'clap': (
      transformers.ClapAudioModelWithProjection(transformers.ClapAudioConfig(**clap)),
      transformers.ClapFeatureExtractor(truncation='rand_trunc'),
    ),
    'whisper': (
      transformers.WhisperModel(transformers.WhisperConfig(**whisper)),
      transformers.WhisperFeatureExtractor(),
    ),
  }
  root = tmp_path_factory.mktemp('sound_models')
  torch.manual_seed(0)
  for name, (model, extractor) in made.items():
    # As initialised, a model hardly looks at its input.
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    model.save_pretrained(root / name)
    extractor.save_pretrained(root / name)
  return root


def by_library(folder, name, samples, layer) -> np.ndarray:
  """The vector of a window by the library alone."""
  kinds = {'clap': transformers.ClapAudioModelWithProjection}
  model = kinds.get(name, transformers.AutoModel).from_pretrained(folder).eval()
  extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
  inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors='pt')
  values = inputs[extractor.model_input_names[0]]
  with torch.inference_mode():
    if name == 'whisper':
      hidden = model.encoder(values).last_hidden_state
      return hidden[0, : -(-1500 * len(samples) // 480_000)].mean(0).numpy()
    found = model(values, output_hidden_states=True)
    if layer == 'projected':
      return found.audio_embeds[0].numpy()
    if layer == '-2':
      return found.hidden_states[-2][0].mean(0).numpy()
    pooled = getattr(found, 'pooler_output', None)
    return (found.last_hidden_state.mean(1) if pooled is None else pooled)[0].numpy()


@pytest.mark.parametrize(
  ('name', 'layer'),
  [
    ('wav2vec2', 'last'),
    ('wav2vec2', '-2'),
    ('ast', 'last'),
    ('clap', 'projected'),
    ('whisper', 'last'),
  ],
)
def test_models_of_sounds_equal_the_library(goods, folder, models, name, layer):
  rate = 48_000 if name == 'clap' else 16_000
  noise = np.random.default_rng(0).normal(0, 0.1, 2 * rate).astype('f4')
  clips = {'i0': media.tone(300, 1, rate), 'i3': noise}
  for item, samples in clips.items():
    media.write_sound(folder / f'{item}.wav', samples, 'pcm_f32le', rate)
  given = [] if layer in ('last', 'projected') else [f'--layer={layer}']
  run(goods, 'audio', folder, f'--encoder={models / name}', '--dtype=float32', *given)
  info, tokens, mask = read(goods, 'audio')
  assert mask.sum(1).tolist() == [2, 0, 0, 2, 0, 0]
  assert (info['encoder']['layer'], info['encoder']['rate']) == (layer, rate)
  for item, samples in clips.items():
    expected = by_library(models / name, name, samples, layer)
    np.testing.assert_allclose(tokens[int(item[1]), 0], expected, rtol=1e-4, atol=1e-4)
  assert np.abs(tokens[0, 0] - tokens[3, 0]).max() > 1e-3


def test_a_model_of_texts_reads_no_sounds(fails, folder, tmp_path):
  media.write_sound(folder / 'i0.wav', media.tone(440, 1), 'pcm_s16le')
  config = transformers.BertConfig(**SMALL, vocab_size=20)
  transformers.BertModel(config).save_pretrained(tmp_path / 'bert')
  assert 'reads no sounds' in fails('audio', folder, f'--encoder={tmp_path / "bert"}')
  assert '--layer=projected' in fails(
    'audio', folder, f'--encoder={tmp_path / "bert"}', '--layer=projected'
  )


# Bad files.


def test_bad_sounds_are_masked_and_named(goods, folder, capsys):
  media.write_sound(folder / 'i0.wav', media.tone(440, 1), 'pcm_s16le')
  (folder / 'i1.mp3').write_bytes(b'this is no sound ' * 100)
  (folder / 'i2.wav').write_bytes(b'')
  media.write_video(folder / 'i3.mp4', np.zeros((3, 3)), 'mpeg4')  # Without sound.
  media.write_sound(folder / 'i4.wav', np.zeros(0, 'f4'), 'pcm_s16le')
  (folder / 'i5.txt').write_text('not looked at')
  run(goods, 'audio', folder, '--encoder=spectrum')
  assert read(goods, 'audio')[2].any(1).tolist() == [True] + 5 * [False]
  reasons = masked(goods, 'audio')
  assert reasons['i1'].startswith('its file is no sound and no video that can be read (')
  assert reasons['i2'] == 'its file is empty'
  assert reasons['i3'] == 'its file has no sound'
  assert reasons['i4'] == 'its file has no samples'
  assert reasons['i5'] == 'no sound'
  assert "1: its file is empty; first item 'i2'" in capsys.readouterr().out


def test_bad_videos_are_masked_and_named(goods, folder):
  media.write_video(folder / 'i0.mp4', np.full((3, 3), 200), 'mpeg4')
  whole = (folder / 'i0.mp4').read_bytes()
  (folder / 'i1.mp4').write_bytes(whole[: len(whole) // 2])
  media.write_sound(folder / 'i2.webm', media.tone(440, 1, 48_000), 'libopus', 48_000)
  (folder / 'i3.mkv').write_bytes(os.urandom(5000))
  media.write_video(folder / 'i4.avi', np.zeros((0, 3)), 'mpeg4')
  run(goods, 'video', folder, '--encoder=color')
  assert read(goods, 'video')[2].any(1).tolist() == [True] + 5 * [False]
  reasons = masked(goods, 'video')
  assert reasons['i1'].startswith('its file ')
  assert reasons['i2'] == 'its file has no pictures'
  assert 'that can be read' in reasons['i3']
  assert reasons['i4'] == 'its file has no frames'
  assert reasons['i5'] == 'no video'


@pytest.mark.parametrize('secret', ['secret.wav', 'http://127.0.0.1:9/secret.wav'])
def test_a_playlist_leads_to_no_other_file(folder, secret):
  media.write_sound(folder / 'secret.wav', media.tone(440, 1), 'pcm_s16le')
  lines = ['#EXTM3U', '#EXT-X-TARGETDURATION:10', '#EXTINF:1,', secret, '#EXT-X-ENDLIST']
  (folder / 'i0.mp3').write_text('\n'.join(lines))
  (folder / 'i1.mp3').write_text(f'ffconcat version 1.0\nfile {secret}\n')
  for name in ('i0.mp3', 'i1.mp3'):
    with pytest.raises(media_files.BadMedia, match='is no sound'):
      media_files.read_sound(folder / name, 16_000, 60)


def test_a_sound_of_a_gigabyte_costs_no_memory(folder):
  """Only its beginning is read, and the rest is a hole in the file."""
  media.write_sound(folder / 'i0.wav', media.tone(440, 61), 'pcm_s16le')
  path = folder / 'i0.wav'
  size = 1 << 30
  header = bytearray(path.read_bytes()[:100])
  at = header.index(b'data') + 4
  header[4:8] = header[at : at + 4] = (size - 100).to_bytes(4, 'little')
  with path.open('r+b') as file:
    file.write(header)
    file.truncate(size)
  script = """
import resource, sys
from pathlib import Path
from data_prep.embeddings import media_files
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = memory()
samples = media_files.read_sound(Path(sys.argv[1]), 16_000, 60)
print(len(samples), memory() - before)
"""
  words = [sys.executable, '-c', script, str(path)]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
  samples, megabytes = map(int, done.stdout.split())
  assert samples == 60 * 16_000
  assert megabytes < 100


# Videos.


def levels(images) -> list[int]:
  return [round(float(np.asarray(image).mean())) for image in images]


@pytest.mark.parametrize(
  ('suffix', 'codec'), [('mkv', 'ffv1'), ('mp4', 'mpeg4'), ('avi', 'mpeg4'), ('mpg', 'mpeg2video')]
)
def test_frames_are_evenly_spaced(folder, suffix, codec):
  colours = np.repeat(np.arange(40)[:, None] * 6, 3, 1)
  media.write_video(folder / f'a.{suffix}', colours, codec)
  found = levels(media_files.read_frames(folder / f'a.{suffix}', 4, 1000))
  np.testing.assert_allclose(found, [5 * 6, 15 * 6, 25 * 6, 35 * 6], atol=5.5)
  found = levels(media_files.read_frames(folder / f'a.{suffix}', 4, 20))
  np.testing.assert_allclose(found, [2 * 6, 7 * 6, 12 * 6, 17 * 6], atol=5.5)
  assert len(media_files.read_frames(folder / f'a.{suffix}', 99, 1000)) == 40


def test_a_video_of_three_hours_is_looked_at_where_asked(folder):
  colours = np.repeat(np.arange(216)[:, None], 3, 1)
  media.write_video(folder / 'a.mp4', colours, 'mpeg4', seconds_apart=50)
  assert levels(media_files.read_frames(folder / 'a.mp4', 8, 60)) == [0, 1]
  found = levels(media_files.read_frames(folder / 'a.mp4', 4, 3 * 3600))
  np.testing.assert_allclose(found, [27, 81, 135, 189], atol=3)


def test_tokens_of_a_video_are_those_of_its_frames(goods, folder):
  colours = np.random.default_rng(0).integers(0, 256, (3, 3))
  media.write_video(folder / 'i0.mkv', colours, 'ffv1')
  media.write_video(folder / 'i4.mkv', colours[:1], 'ffv1')
  run(goods, 'video', folder, '--encoder=color', '--dtype=float32', '--max_tokens=5')
  info, tokens, mask = read(goods, 'video')
  assert mask.sum(1).tolist() == [4, 0, 0, 0, 2, 0]
  encoder = pictures.color(0)
  frames = media_files.read_frames(folder / 'i0.mkv', 5, 60)
  expected = encoder.workers[0]([encoder.prepare(frame) for frame in frames])[:, 0]
  np.testing.assert_allclose(tokens[0, 1:4], expected, atol=1e-6)
  np.testing.assert_allclose(tokens[0, 0], expected.mean(0), atol=1e-6)
  np.testing.assert_allclose(tokens[0, 1:4, :3], colours / 255, atol=0.01)
  assert info['token_meaning'] == {
    '0': 'the mean of the frames',
    '1-5': 'a frame each, evenly spaced',
  }


@pytest.mark.slow
def test_other_processes_decode_and_batches_change_nothing(goods, folder, tmp_path):
  vision = transformers.ViTConfig(**SMALL, image_size=32, patch_size=16)
  torch.manual_seed(0)
  transformers.ViTModel(vision).save_pretrained(tmp_path / 'vit')
  transformers.ViTImageProcessor(size={'height': 32, 'width': 32}).save_pretrained(tmp_path / 'vit')
  for at in (0, 1, 5):
    media.write_video(
      folder / f'i{at}.mp4', np.random.default_rng(at).integers(0, 256, (5, 3)), 'mpeg4'
    )
  flags = (f'--encoder={tmp_path / "vit"}', '--dtype=float32', '--max_tokens=2', '--overwrite')
  found = []
  for more in (['--batch_size=1', '--workers=0'], ['--batch_size=64', '--workers=1']):
    run(goods, 'video', folder, *flags, *more)
    found.append(read(goods, 'video')[1])
  np.testing.assert_allclose(found[0], found[1], atol=1e-5)
  assert found[0][[0, 1, 5]].any((1, 2)).all()


# What both have in common.


def test_the_same_files_change_nothing_and_others_are_named(goods, folder, capsys):
  media.write_sound(folder / 'i0.wav', media.tone(440, 1), 'pcm_s16le')
  run(goods, 'audio', folder, '--encoder=spectrum')
  os.utime(folder / 'i0.wav', (1, 1))
  run(goods, 'audio', folder, '--encoder=spectrum')
  assert 'already in' in capsys.readouterr().out
  for flags, told in (
    (['--max_seconds=5'], 'its encoder.max_seconds is 60.0, asked for is 5.0'),
    (['--max_tokens=2'], 'holds other features'),
  ):
    with pytest.raises(SystemExit):
      run(goods, 'audio', folder, '--encoder=spectrum', *flags)
    assert told in capsys.readouterr().err
  media.write_sound(folder / 'i0.wav', media.tone(441, 1), 'pcm_s16le')
  with pytest.raises(SystemExit):
    run(goods, 'audio', folder, '--encoder=spectrum')
  assert 'features of other inputs, which have changed' in capsys.readouterr().err


def test_wrong_folders_and_flags_are_refused(fails, folder, tmp_path, monkeypatch):
  spectrum = '--encoder=spectrum'
  assert 'no such folder' in fails('audio', folder / 'absent', spectrum)
  assert 'no file is named like an item, such as i0.mp3' in fails('audio', folder, spectrum)
  media.write_sound(folder / 'other.wav', media.tone(440, 1), 'pcm_s16le')
  assert 'none of its 1 files, first other.wav' in fails('audio', folder, spectrum)
  for suffix in ('wav', 'flac'):
    media.write_sound(
      folder / f'i0.{suffix}', media.tone(440, 1), 'flac' if suffix == 'flac' else 'pcm_s16le'
    )
  assert 'two files of item i0: i0.flac and i0.wav' in fails('audio', folder, spectrum)
  assert 'users have no sounds' in fails('audio', folder, spectrum, '--of=user')
  assert '--max_seconds=0.0: must be above 0' in fails('audio', folder, '--max_seconds=0')
  assert '--files: is about audio, video, graph' in fails('text', folder)
  assert 'exclude each other' in fails('audio', folder, '--import=x.npz')
  monkeypatch.setitem(sys.modules, 'av', None)
  assert "pip install 'ur4rec-jax[media]'" in fails('audio', folder, spectrum)


def test_these_modalities_need_files(goods, capsys):
  for modality in ('audio', 'video', 'graph'):
    with pytest.raises(SystemExit):
      encode.main([f'--data_dir={goods}', f'--modality={modality}'])
    assert f'--modality={modality}: needs --files=' in capsys.readouterr().err


# Knowledge graphs.

TRIPLES = """head,relation,tail
i0,film.film.directed_by,<http://x.org/resource/Ridley_Scott>
i1,film.film.directed_by,<http://x.org/resource/Ridley_Scott>
i0,hasSequel,i1
i0,genre,Horror
i1,genre,Horror
i2,genre,Horror
i0,barcode,5039036
"AC/DC",wrote_music_of,i2
Ridley Scott,born in,England
"""


@pytest.fixture
def triples(tmp_path) -> pathlib.Path:
  path = tmp_path / 'triples.csv'
  path.write_text(TRIPLES)
  return path


def test_neighbours_become_texts_the_most_specific_first(goods, triples):
  run(goods, 'graph', triples, '--encoder=hashing', '--max_tokens=3', '--dtype=float32')
  _, tokens, mask = read(goods, 'graph')
  expected = [
    ['directed by Ridley Scott', 'genre Horror', 'barcode 5039036'],
    ['directed by Ridley Scott', 'genre Horror', 'Thing i0 has sequel'],
    ['genre Horror', 'AC/DC wrote music of'],
  ]
  (hashed,) = text.hashing().workers
  for row, parts in enumerate(expected):
    whole = ' '.join(f'{part}.' for part in parts)
    np.testing.assert_array_equal(tokens[row, : 1 + len(parts)], hashed([whole, *parts]))
    assert mask[row].sum() == 1 + len(parts)
  assert not mask[3:].any()
  assert masked(goods, 'graph')['i4'] == 'no triple in triples.csv'


def test_what_fewer_items_have_comes_first_and_what_one_has_comes_last():
  found = {'a': ['all', 'two', 'own'], 'b': ['all', 'two'], 'c': ['all']}
  assert graph_tokens.most_specific(found, 2)['a'] == ['two', 'all']
  assert graph_tokens.most_specific(found, 9)['a'] == ['two', 'all', 'own']


@pytest.mark.parametrize(
  ('name', 'node', 'relation'),
  [
    ('<http://x.org/a#directedBy>', 'directedBy', 'directed by'),
    ('http://x.org/Caf%C3%A9_Noir/', 'Café Noir', 'café noir'),
    ('film.film.directed_by', 'film.film.directed by', 'directed by'),
    ('AC/DC', 'AC/DC', 'dc'),
    ('two  words_here', 'two words_here', 'two words_here'),
  ],
)
def test_names_of_knowledge_graphs_become_words(name, node, relation):
  assert graph_tokens.node_words(name) == node
  assert graph_tokens.relation_words(name) == relation


def test_triples_that_cannot_be_used_are_refused(fails, tmp_path):
  path = tmp_path / 't.csv'
  for content, told in (
    ('a,b,c\n1,2,3\n', 'must have the columns head, relation, tail or subject, predicate, object'),
    ('head,relation,tail\ni0,,x\n', 'relation is empty'),
    ('head,relation,tail\nx,y,z\n', 'none of its triples has the original id of an item'),
    ('head,relation,tail\n', 'none of its triples'),
  ):
    path.write_text(content)
    assert told in fails('graph', path, '--encoder=hashing')
  assert 't2.csv' in fails('graph', tmp_path / 't2.csv', '--encoder=hashing')


# From files to recommendations.


def test_from_files_to_recommendations(start, data_dir_of_shop, tmp_path):
  data, files, names = data_dir_of_shop
  for modality, encoder in (('audio', 'spectrum'), ('video', 'color'), ('graph', 'hashing')):
    run(data, modality, files[modality], f'--encoder={encoder}', '--max_tokens=2')
  workdir = tmp_path / 'run'
  modalities = "('audio','video','graph')"
  flags = (*TINY, f'--config.data_dir={data}', f'--config.modalities={modalities}')
  process = start(workdir, *flags, "--config.stages=('train',)", variant='text')
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 0, stderr
  recommender = ur4rec_jax.load(workdir)
  answer = recommender.top([names[:3]], k=5)
  assert len(answer.items[0]) == 5
  assert not {*answer.items[0]} & {*names[:3]}
  assert {'retriever_audio', 'retriever_video', 'retriever_graph'} <= {*recommender.share_names}
  shares = dict(zip(recommender.share_names, np.abs(answer.shares[0]).max(0), strict=True))
  assert min(shares[f'retriever_{name}'] for name in ('audio', 'video', 'graph')) > 0
  results = json.loads((workdir / 'results.json').read_text())
  encoders = {m: x['encoder'] for m, x in results['dataset']['features']['item'].items()}
  assert encoders == {'audio': 'spectrum', 'video': 'color', 'graph': 'hashing'}


@pytest.fixture
def data_dir_of_shop(tmp_path):
  """The generated shop, and files that tell the genres of its items; every fifth has none."""
  data = tmp_path / 'shop'
  build_dataset.main(
    ['--source=synthetic', f'--data_dir={data}', '--num_users=80', '--num_items=48']
  )
  items = read_items(data)
  genres = sorted({item['genres'][0] for item in items})
  files = {name: tmp_path / name for name in ('audio', 'video')}
  for folder in files.values():
    folder.mkdir()
  lines = ['head,relation,tail']
  for at, item in enumerate(items):
    if at % 5 == 0:
      continue
    number, name = genres.index(item['genres'][0]), item['original_id']
    media.write_sound(
      files['audio'] / f'{name}.wav', media.tone(200 * (1 + number), 0.5), 'pcm_s16le'
    )
    colour = np.full((2, 3), 40 * (number % 6) + at % 3)
    media.write_video(files['video'] / f'{name}.mp4', colour, 'mpeg4')
    lines.append(f'{name},genre,{item["genres"][0]}')
  files['graph'] = tmp_path / 'triples.csv'
  files['graph'].write_text('\n'.join(lines) + '\n')
  return data, files, [item['original_id'] for item in items]

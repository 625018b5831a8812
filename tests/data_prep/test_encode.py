"""Texts, pictures and files of features -> token embeddings, by real models and processes."""

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

from data_prep import build_dataset, encode
from data_prep.embeddings import text_tokens
from data_prep.llm_text import texts
from tests.helpers.fork_server import Program
from tests.helpers.runs import ROOT
from ur4rec_jax.data import dataset as prepared
from ur4rec_jax.data.features import load_features
from ur4rec_jax.encoders import pictures, pretrained, text

MINILM = 'sentence-transformers/all-MiniLM-L6-v2'
# Title, genre, plot; made to be told apart by anybody who understands them.
FILMS = """
Toy Story|Animation|A cowboy doll is jealous when a space ranger toy becomes his boy's favourite.
A Bug's Life|Animation|A clumsy ant looks for warriors to save his colony from grasshoppers.
The Lion King|Animation|A lion cub flees after his father's death and returns to be king.
Aladdin|Animation|A street boy finds a lamp with a genie and woos a princess.
Pinocchio|Animation|A wooden puppet must prove himself brave to become a real boy.
Dumbo|Animation|A baby circus elephant with enormous ears learns that he can fly.
The Jungle Book|Animation|A boy raised by wolves is led to the village by a panther and a bear.
Bambi|Animation|A young deer grows up in the forest with a rabbit and a skunk.
Alien|Science fiction|A spaceship's crew is hunted by a deadly creature from a distant planet.
Aliens|Science fiction|Marines are sent to a colony in space that was overrun by creatures.
Star Wars|Science fiction|Rebels attack a space station that is able to destroy planets.
The Terminator|Science fiction|A cyborg is sent back from the future to kill a woman.
Blade Runner|Science fiction|A policeman hunts artificial humans who fled to Earth from space.
Total Recall|Science fiction|A worker learns that his memory is false and travels to Mars.
2001: A Space Odyssey|Science fiction|Astronauts fly to Jupiter with a computer that turns on them.
The Matrix|Science fiction|A hacker learns that the world is simulated by machines.
The Godfather|Crime|The son of a mafia boss takes over the family's criminal empire.
Goodfellas|Crime|A man rises in the mob and betrays his fellow gangsters.
Scarface|Crime|A refugee becomes a violent drug lord in Miami.
The Untouchables|Crime|Federal agents try to bring down the gangster Al Capone.
Casino|Crime|Two mobsters fight over a gambling empire in Las Vegas.
Donnie Brasco|Crime|An undercover agent infiltrates the mafia and befriends a hit man.
Carlito's Way|Crime|A former drug dealer leaves prison and tries to go straight.
Miller's Crossing|Crime|An adviser to a crime boss plays two gangs against each other.
Pretty Woman|Romance|A rich businessman falls in love with a woman whom he hired for a week.
Sleepless in Seattle|Romance|A widower's voice on the radio makes a woman fall in love with him.
When Harry Met Sally|Romance|Two friends wonder for years whether love would end their friendship.
Casablanca|Romance|A bar owner meets his lost love again and must let her go.
Notting Hill|Romance|A bookseller falls in love with a famous actress.
Titanic|Romance|A poor artist and a rich young woman fall in love on a ship.
Ghost|Romance|A murdered man stays near the woman he loves.
Roman Holiday|Romance|A princess and a reporter fall in love during a day in Rome.
"""


@pytest.fixture
def build(tmp_path):
  """Builds a dataset of items, `build([{'title': ...}, ...])`, ids a, b, ... unless given."""

  def make(items: list[dict], name: str = 'data') -> Path:
    rows = [{'id': f'i{at:03}', 'title': f'Thing {at}', **item} for at, item in enumerate(items)]
    fields = ('id', 'title', 'genres', 'description', 'image')
    for row in rows:
      if isinstance(row.get('image'), bytes):
        suffix = '.jpg' if row['image'].startswith(b'\xff\xd8') else '.png'
        (tmp_path / (row['id'] + suffix)).write_bytes(row['image'])
        row['image'] = row['id'] + suffix
    table = {field: [row.get(field) for row in rows] for field in fields}
    (tmp_path / 'items.jsonl').write_text(
      ''.join(json.dumps({k: v for k, v in row.items() if v is not None}) + '\n' for row in rows)
    )
    users = [user for user in ('u0', 'u1') for _ in rows]
    log = pa.table({'user': users, 'item': [*table['id'], *table['id']]})
    build_dataset.build_from_table(log, tmp_path / name, items=str(tmp_path / 'items.jsonl'))
    return tmp_path / name

  return make


def run(data_dir, *flags) -> None:
  """Runs the program in this process; torch takes long to import."""
  encode.main([f'--data_dir={data_dir}', *flags])


@pytest.fixture
def fails(capsys):
  """Runs the program and gives its error message: `fails(data_dir, *flags)`."""

  def fails(data_dir, *flags) -> str:
    with pytest.raises(SystemExit) as caught:
      run(data_dir, *flags)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith('error: ')
    assert not list(Path(data_dir).glob('features/*/*/info.json'))
    return message

  return fails


def start(*flags) -> Program:
  """Starts the program in a process of its own."""
  return Program('data_prep.encode', flags, os.environ, ROOT)


def read(data_dir, modality='text', of='item', split_hash=None):
  features = load_features(data_dir, of, modality, split_hash)
  return features.info, *features.table()


def content(folder: Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def write_about(data_dir, kind, found, **origin) -> None:
  texts.write_texts(data_dir, kind, found, {'provider': 'import', 'is_mock': False, **origin})


# Texts.


def test_token_0_is_of_the_whole_text_and_the_others_are_of_its_sentences(build):
  data_dir = build(
    [
      {'title': 'Alien (1979)', 'genres': 'Horror|Sci-Fi', 'description': 'A crew. A creature.'},
      {'title': 'Heat'},
      {'title': '', 'description': 'One. Two. Three. Four.'},
    ]
  )
  write_about(data_dir, 'item', {'i000': 'Tense! Dark.'})
  run(data_dir, '--modality=text', '--encoder=hashing', '--max_tokens=4', '--dtype=float32')
  info, tokens, mask = read(data_dir)
  expected = [
    [
      'Alien (1979): Horror, Sci-Fi. Tense! Dark. A crew. A creature.',
      *('Alien (1979): Horror, Sci-Fi', 'Tense!', 'Dark.', 'A crew.'),
    ],
    ['Heat.', 'Heat'],
    ['One. Two. Three. Four.', 'One.', 'Two.', 'Three.', 'Four.'],
  ]
  (hashed,) = text.hashing().workers
  for row, parts in enumerate(expected, 1):
    np.testing.assert_array_equal(mask[row], np.arange(5) < len(parts))
    np.testing.assert_array_equal(tokens[row, : len(parts)], hashed(parts))
  assert not mask[0].any()
  assert not tokens[~mask].any()
  assert info['encoder']['is_builtin']
  assert not info['is_mock']


def test_texts_equal_the_library_whatever_the_batch_size(build, capsys):
  names = ('title', 'genres', 'description')
  items = [dict(zip(names, film, strict=True)) for film in films()[::10]]
  data_dir = build([*items, {'title': 'Word ' * 40, 'description': 'long ' * 3000}, {'title': ''}])
  from sentence_transformers import SentenceTransformer

  folder, _ = pretrained.find(MINILM)
  library = SentenceTransformer(str(folder), device='cpu')
  for flags in (['--batch_size=1', '--device=cpu,cpu'], ['--batch_size=64']):
    run(data_dir, '--modality=text', '--dtype=float32', '--max_tokens=2', '--overwrite', *flags)
    info, tokens, mask = read(data_dir)
    for row in range(1, 6):
      parts = list(text_tokens._rows(data_dir, 'item', False, 2))[row - 1].content
      assert mask[row].sum() == len(parts)
      np.testing.assert_allclose(tokens[row, : len(parts)], library.encode(parts), atol=1e-5)
  assert not mask[6].any()
  assert info['encoder']['sha256'] == pretrained.find(str(folder))[1]['sha256']
  assert (info['encoder']['modules'][-1], info['encoder']['precision']) == ('Normalize', 'float32')
  shown = capsys.readouterr().out
  assert "1: no text, or one without letters and digits; first item 'i005'" in shown


def films() -> list[list[str]]:
  return [line.split('|') for line in FILMS.strip().split('\n')]


@pytest.mark.parametrize(('encoder', 'margin'), [(MINILM, 0.12), ('hashing', 0.04)])
def test_films_of_a_genre_are_more_alike_than_others(build, encoder, margin):
  """Genres are not among the texts: a wrong encoder or wrong tokens would show."""
  data_dir = build([{'title': title, 'description': plot} for title, _, plot in films()])
  run(data_dir, '--modality=text', f'--encoder={encoder}')
  _, tokens, _ = read(data_dir)
  genres = np.array([genre for _, genre, _ in films()])
  for token in (0, 2):  # The whole text, and the plot.
    vectors = tokens[1:, token] / np.linalg.norm(tokens[1:, token], axis=1, keepdims=True)
    likeness = vectors @ vectors.T
    same = genres[:, None] == genres
    others = ~np.eye(len(genres), dtype=bool)
    assert likeness[same & others].mean() - likeness[~same].mean() > margin


def test_own_descriptions_are_not_said_to_be_made_up(build, capsys):
  data_dir = build([{'title': 'Pan', 'description': 'Iron.'}, {'title': 'Pot', 'description': ''}])
  origin = {'provider': 'mock', 'is_mock': True}
  for found, is_mock in (({}, False), ({'i001': 'A pot for everybody.'}, True)):
    write_about(data_dir, 'item', found, **origin)
    run(data_dir, '--modality=text', '--encoder=hashing', '--overwrite')
    assert read(data_dir)[0]['is_mock'] == is_mock
    said = 'the texts of all items but 1 are made up by the mock writer'
    assert (said in capsys.readouterr().out) == is_mock


@pytest.mark.parametrize(('provider', 'written_by'), [('local', 'local m.gguf'), ('mock', None)])
def test_results_name_who_wrote_the_texts(build, provider, written_by):
  data_dir = build([{'title': 'Pan'}, {'title': 'Pot'}])
  origin = {'provider': provider, 'model': 'm.gguf', 'is_mock': provider == 'mock'}
  write_about(data_dir, 'item', {'i001': 'A pot for everybody.'}, **origin)
  run(data_dir, '--modality=text', '--encoder=hashing')
  found = load_features(data_dir, 'item', 'text').origin
  assert (found.get('written_by'), found['is_mock']) == (written_by, provider == 'mock')


def test_texts_about_users_belong_to_a_split(build, capsys):
  data_dir = build([{}] * 4)
  info = prepared.read_info(data_dir)
  split_hash = info['splits']['leave_one_out']['hash']
  origin = {'split_name': 'leave_one_out', 'split_hash': split_hash, 'is_mock': True}
  write_about(data_dir, 'user', {'u1': 'Likes things. Hates stuff.'}, **origin, hold_back=0.25)
  run(data_dir, '--modality=text', '--encoder=hashing')
  info, _, mask = read(data_dir, of='user', split_hash=split_hash)
  assert mask.sum(1).tolist() == [0, 0, 3]
  assert info['is_mock']
  found = [info[name] for name in ('split_name', 'split_hash', 'hold_back')]
  assert found == ['leave_one_out', split_hash, 0.25]
  assert read(data_dir)[2].sum(1).tolist() == [0, 2, 2, 2, 2]  # Of items too.
  assert 'mock writer' in capsys.readouterr().out
  with pytest.raises(ValueError, match='was made for the split leave_one_out'):
    load_features(data_dir, 'user', 'text', 'another')
  path = data_dir / 'user_texts/1.0.0/metadata.json'
  content = path.read_text()
  for wrong, right, message in (
    (split_hash, '0123456789abcdef', 'which this dataset has not; write them again'),
    ('"hold_back"', '"other"', 'do not say what was held back from them; write them again'),
  ):
    path.write_text(content.replace(wrong, right))
    assert path.read_text() != content
    with pytest.raises(SystemExit):
      run(data_dir, '--modality=text', '--encoder=hashing', '--of=user', '--overwrite')
    assert message in capsys.readouterr().err


def test_texts_that_say_nothing_are_masked_and_named(build, capsys):
  data_dir = build(
    [
      {'title': '', 'description': ''},
      {'title': '😀🎬', 'genres': '🔥', 'description': '🚀 !!! 🚀'},
      {'title': 'Long', 'description': 'word ' * 20_000},
      {'title': 'Fine', 'description': 'No description available.'},
    ]
  )
  run(data_dir, '--modality=text', '--encoder=hashing')
  info, tokens, mask = read(data_dir)
  assert mask.sum(1).tolist() == [0, 0, 0, 9, 2]
  assert np.isfinite(tokens).all()
  reason = 'no text, or one without letters and digits'
  assert info['masked'] == {reason: {'rows': 2, 'first': 'i000'}}
  lines = (data_dir / 'features/item/text/masked.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'id': 'i000', 'reason': reason},
    {'id': 'i001', 'reason': reason},
  ]
  assert '4: 2 with, 2 without' in capsys.readouterr().out


def test_a_dataset_without_any_text_is_refused(build, fails):
  message = fails(build([{'title': ''}] * 3), '--modality=text', '--encoder=hashing')
  assert 'no item has anything to encode, so nothing is written (3: no text' in message
  assert "first 'i000'" in message


# Pictures.


def picture(seed=0, size=(60, 80), kind='PNG') -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (4, 3, 3), np.uint8)
  image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
  image.save(file := io.BytesIO(), kind)
  return file.getvalue()


def flat(size) -> bytes:
  Image.new('1', size, 1).save(file := io.BytesIO(), 'PNG')
  return file.getvalue()


SMALL = {
  'hidden_size': 32,
  'intermediate_size': 64,
  'num_hidden_layers': 3,
  'num_attention_heads': 2,
}
SIDE = {'image_size': 48, 'patch_size': 8}


@pytest.fixture(scope='session')
def vision(tmp_path_factory):
  """Folders of small models with the true architectures and random weights."""
  text = SMALL | {'vocab_size': 99}
  configs = {
    'clip': transformers.CLIPConfig(
      vision_config=SMALL | SIDE, text_config=text, projection_dim=16
    ),
    'siglip': transformers.SiglipConfig(vision_config=SMALL | SIDE, text_config=text),
    'dinov2': transformers.Dinov2WithRegistersConfig(**SMALL, **SIDE, num_register_tokens=2),
    'resnet': transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    'bert': transformers.BertConfig(**text),
  }
  root = tmp_path_factory.mktemp('models')
  torch.manual_seed(0)
  for name, config in configs.items():
    model = transformers.AutoModel.from_config(config)
    # As initialised, a model hardly looks at its input.
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    model.save_pretrained(root / name)
    transformers.CLIPImageProcessor(
      size={'shortest_edge': 48}, crop_size={'height': 48, 'width': 48}
    ).save_pretrained(root / name)
  return root


def looked_at(folder: Path, data_dir: Path, count: int) -> tuple:
  """The model and what it is shown, by the library alone."""
  model = transformers.AutoModel.from_pretrained(folder).eval()
  processor = transformers.AutoImageProcessor.from_pretrained(folder)
  images = [Image.open(data_dir / f'images/i{at:03}.png') for at in range(count)]
  return model, processor(images=images, return_tensors='pt')['pixel_values']


def grid_means(patches: np.ndarray) -> np.ndarray:
  """`[n, 6 * 6, width]` -> `[n, 3 * 3, width]`."""
  n, _, width = patches.shape
  return patches.reshape(n, 3, 2, 3, 2, width).mean((2, 4)).reshape(n, 9, width)


def test_clip_equals_the_library_whatever_layer_batch_and_processes(build, vision):
  data_dir = build([{'image': picture(seed)} for seed in range(7)])
  model, pixels = looked_at(vision / 'clip', data_dir, 7)
  with torch.inference_mode():
    found = model.vision_model(pixels, output_hidden_states=True)
    embeds = model.get_image_features(pixels)
    embeds = getattr(embeds, 'pooler_output', embeds)
    normed = model.vision_model.post_layernorm(found.last_hidden_state)
    projected = model.visual_projection(normed)
  expected = {
    'projected': (embeds, projected),
    'last': (found.pooler_output, normed),
    '-2': (found.hidden_states[-2][:, 0], found.hidden_states[-2]),
  }
  flags = ('--modality=image', f'--encoder={vision / "clip"}', '--dtype=float32', '--overwrite')
  for layer, (whole, hidden) in expected.items():
    run(data_dir, *flags, f'--layer={layer}', '--batch_size=3', '--workers=0')
    info, tokens, mask = read(data_dir, 'image')
    assert mask[1:].all()
    np.testing.assert_allclose(tokens[1:, 0], whole, atol=1e-5)
    np.testing.assert_allclose(tokens[1:, 1:], grid_means(hidden[:, 1:].numpy()), atol=1e-5)
    encoder = info['encoder']
    assert (encoder['layer'], encoder['is_projected']) == (layer, layer == 'projected')
    assert (encoder['token_0'], encoder['is_normalised']) == ('CLS', False)
  several = ('--batch_size=2', '--workers=1', '--device=cpu,cpu', '--layer=-2')
  run(data_dir, *flags, *several)
  np.testing.assert_allclose(read(data_dir, 'image')[1], tokens, atol=1e-5)
  run(data_dir, *flags, '--normalise', '--grid=0', '--workers=0')
  info, tokens, _ = read(data_dir, 'image')
  unit = embeds / embeds.norm(dim=-1, keepdim=True)
  np.testing.assert_allclose(tokens[1:, 0], unit, atol=1e-5)
  assert (info['tokens'], info['is_normalised']) == (1, True)


@pytest.mark.parametrize(
  ('name', 'token_0', 'extra'),
  [('siglip', 'pooled', 0), ('dinov2', 'CLS', 3), ('resnet', 'pooled', 0)],
)
def test_other_vision_models(build, vision, name, token_0, extra):
  data_dir = build([{'image': picture(seed)} for seed in range(3)])
  model, pixels = looked_at(vision / name, data_dir, 3)
  with torch.inference_mode():
    found = getattr(model, 'vision_model', model)(pixels)
  run(data_dir, '--modality=image', f'--encoder={vision / name}', '--dtype=float32', '--workers=0')
  info, tokens, _ = read(data_dir, 'image')
  assert (info['encoder']['layer'], info['encoder']['token_0']) == ('last', token_0)
  np.testing.assert_allclose(tokens[1:, 0], found.pooler_output.flatten(1), rtol=1e-5, atol=1e-5)
  hidden = found.last_hidden_state
  hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, extra:]
  np.testing.assert_allclose(tokens[1:, 1:], grid_means(hidden.numpy()), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bad_pictures_are_masked_and_named(build, capsys):
  items = [{'image': picture(seed)} for seed in range(40)]
  items[3] = items[17] = {}
  items[5] = {'image': picture(5, (300, 300), 'JPEG')[:900]}
  items[6] = {'image': picture(6, (1, 1))}
  items[7] = {'image': flat((12_000, 700))}
  items[8] = {'image': flat((12_000, 12_000))}
  data_dir = build(items)
  (data_dir / 'images/i009.png').write_bytes(b'not what was stored')
  run(data_dir, '--modality=image', '--encoder=color', '--workers=0')
  info, tokens, mask = read(data_dir, 'image')
  lines = (data_dir / 'features/item/image/masked.jsonl').read_text().splitlines()
  masked = {record['id']: record['reason'] for record in map(json.loads, lines)}
  assert (np.flatnonzero(~mask.any(1)) - 1).tolist() == [-1, 3, 5, 6, 8, 9, 17]
  assert masked['i003'] == masked['i017'] == 'no picture'
  assert 'is damaged' in masked['i005']
  assert '1 x 1 pixels' in masked['i006']
  assert '12000 x 12000 pixels' in masked['i008']
  assert masked['i009'] == 'its picture file is missing or damaged'
  assert tokens[mask].any(-1).all()
  assert info['counts']['with'] == 34
  assert "2: no picture; first item 'i003'" in capsys.readouterr().out


def test_color_tells_where_colours_are(build):
  image = Image.new('RGB', (90, 90), 'red')
  image.paste(Image.new('RGB', (30, 90), 'blue'), (60, 0))
  image.save(file := io.BytesIO(), 'PNG')
  data_dir = build([{'image': file.getvalue()}] * 2)
  run(data_dir, '--modality=image', '--encoder=color', '--workers=0')
  _, tokens, _ = read(data_dir, 'image')
  np.testing.assert_allclose(tokens[1, 1:, :3], [[1, 0, 0], [1, 0, 0], [0, 0, 1]] * 3, atol=1e-3)
  np.testing.assert_allclose(tokens[1, 0, :3], [2 / 3, 0, 1 / 3], atol=1e-3)


def test_pictures_that_nobody_has_are_an_error(build, fails):
  assert 'download_images' in fails(build([{}] * 3), '--modality=image', '--encoder=color')


# Features made elsewhere.


def offered(rng=0, ids=('i002', 'i000', 'zz')) -> dict:
  return {
    'ids': np.array(ids),
    'tokens': np.random.default_rng(rng).normal(size=(len(ids), 2, 4)).astype(np.float16),
  }


def save(path: Path, arrays: dict) -> Path:
  """Writes arrays in the format that the suffix names, ids beside them where that has no text."""
  if path.suffix == '.npz':
    np.savez_compressed(path, **arrays)
    return path
  path.with_suffix('.ids').write_text(''.join(f'{name}\n' for name in arrays['ids']))
  if path.suffix == '.npy':
    np.save(path, arrays['tokens'])
  else:
    kept = {name: torch.from_numpy(array) for name, array in arrays.items() if name != 'ids'}
    safetensors.torch.save_file(kept, path)
  return path


@pytest.mark.parametrize('suffix', ['.npz', '.npy', '.safetensors'])
def test_features_are_joined_by_original_id(build, tmp_path, capsys, suffix):
  data_dir, arrays = build([{}] * 4), offered()
  path = save(tmp_path / f'f{suffix}', arrays)
  ids = [] if suffix == '.npz' else [f'--ids={path.with_suffix(".ids")}']
  run(data_dir, '--modality=audio', f'--import={path}', *ids)
  info, tokens, mask = read(data_dir, 'audio')
  assert mask.any(1).tolist() == [False, True, False, True, False]
  np.testing.assert_array_equal(tokens[[3, 1]], arrays['tokens'][:2])
  assert (info['unknown_ids'], info['counts']['without']) == (1, 2)
  assert info['masked'] == {f'not in {path.name}': {'rows': 2, 'first': 'i001'}}
  shown = capsys.readouterr().out
  assert '1 ids of the file are not in the dataset' in shown
  assert not list(data_dir.glob('features/item/*incomplete*'))


@pytest.mark.parametrize('name', ['f.npy', 'F.NPY'])
def test_an_array_of_one_vector_an_item(build, tmp_path, name):
  data_dir, vectors = build([{'id': str(at)} for at in (5, 7)]), np.eye(2, 4, dtype=np.float32)
  with (tmp_path / name).open('wb') as file:
    np.save(file, vectors)
  (tmp_path / 'ids').write_bytes(b'5\r7\r')
  ids = f'--ids={tmp_path / "ids"}'
  run(data_dir, '--modality=audio', f'--import={tmp_path / name}', ids)
  np.testing.assert_array_equal(read(data_dir, 'audio')[1][1:3], vectors[:, None])


def test_bfloat16_numbers_as_ids_embeddings_and_masks(build, tmp_path):
  data_dir = build([{'id': str(at)} for at in (5, 7, 20)])
  values = torch.randn(3, 6).bfloat16()
  path = tmp_path / 'f.safetensors'
  safetensors.torch.save_file({'embeddings': values, 'ids': torch.tensor([20, 5, 7])}, path)
  run(data_dir, '--modality=audio', f'--import={path}', '--dtype=float32')
  tokens = read(data_dir, 'audio')[1]
  np.testing.assert_array_equal(tokens[1:, 0], values.float().numpy()[[1, 2, 0]])

  arrays = {'ids': np.array([20, 5, 7]), 'tokens': np.ones((3, 2, 4))}
  arrays['mask'] = np.array([[True, False], [False, False], [True, True]])
  arrays['tokens'][0, 1] = np.nan  # Of no interest where it is masked.
  arrays['tokens'][2, 0] = 0
  np.savez(tmp_path / 'f.npz', **arrays)
  run(data_dir, '--modality=masked', f'--import={tmp_path / "f.npz"}')
  info, tokens, mask = read(data_dir, 'masked')
  assert mask[1:].tolist() == [[False, False], [False, True], [True, False]]
  assert not tokens[~mask].any()
  assert info['masked'] == {'all tokens are masked': {'rows': 1, 'first': '5'}}


def with_value(value, row=1) -> dict:
  arrays = offered()
  arrays['tokens'] = arrays['tokens'].astype(np.float32)
  arrays['tokens'][row, 1, 2] = value
  return arrays


@pytest.mark.parametrize(
  ('arrays', 'flags', 'message'),
  [
    (with_value(np.nan), [], "item 'i000', token 1: has values that are not finite"),
    (with_value(-np.inf), [], "item 'i000', token 1: has values that are not finite"),
    (with_value(1e6), [], "'i000', token 1: its values, of 1e+06 at most, do not fit into float16"),
    (offered(ids=('i000', 'i001', 'i000')), [], "the id 'i000' is there twice, at rows 1 and 3"),
    (offered(ids=('x', 'y', 'z')), [], "none of its 3 ids, first 'x', is one of the items"),
    ({'tokens': offered()['tokens']}, [], 'has no ids; pass --ids=FILE'),
    ({'ids': np.arange(2), 'tokens': offered()['tokens']}, [], 'has 2 ids, but f.npz 3 rows'),
    ({'ids': np.arange(3) / 2, 'tokens': offered()['tokens']}, [], 'ids are float64 (3,)'),
    ({'ids': offered()['ids']}, [], 'must hold tokens [n, tokens, width] or embeddings'),
    (offered() | {'embeddings': np.ones((3, 4))}, [], 'one of the two'),
    (offered() | {'tokens': np.ones((3, 4))}, [], 'tokens have the shape (3, 4)'),
    (offered() | {'tokens': np.ones((3, 0, 4))}, [], 'tokens have the shape (3, 0, 4)'),
    (offered() | {'tokens': np.ones((3, 2, 4), int)}, [], 'tokens are int64'),
    (offered() | {'mask': np.ones((3, 4), bool)}, [], 'mask is bool (3, 4), must be bool (3, 2)'),
    (
      offered() | {'tokens': np.array([[1.0], [1.0, 2.0], None], object)},
      [],
      'Python objects in dtype',
    ),
    (offered(), ['--width=5'], '--width=5: must be at most 4'),
    (offered(), ['--whiten', '--width=4'], 'vary in 3 directions only'),
    (
      {**offered(), 'tokens': np.ones_like(offered()['tokens'])},
      ['--whiten'],
      'vary in 0 directions only, so that they cannot be projected to 4; leave --width',
    ),
    (offered(), ['--encoder=hashing'], '--encoder and --import exclude each other'),
    (offered(), ['--of=user'], '--split=None: must name the split'),
    (offered(), ['--of=user', '--split=leave_one_out'], '--hold_back=None: must say'),
    (offered(), ['--of=user', '--split=leave_one_out', '--hold_back=2'], '--hold_back=2.0: must'),
  ],
)
def test_wrong_features_are_refused(build, tmp_path, fails, arrays, flags, message):
  np.savez(tmp_path / 'f.npz', **arrays)
  found = fails(build([{}] * 4), '--modality=audio', f'--import={tmp_path / "f.npz"}', *flags)
  assert message in found


def test_files_that_are_no_features_are_refused(build, tmp_path, fails):
  data_dir = build([{}] * 4)
  for name in ('f.npz', 'f.npy', 'f.safetensors', 'f.pkl', 'absent.npz'):
    if name != 'absent.npz':
      (tmp_path / name).write_bytes(b'PK nonsense')
    message = fails(data_dir, '--modality=audio', f'--import={tmp_path / name}')
    assert name in message
  np.save(tmp_path / 'f.npy', np.ones((3, 4), np.float32))
  (tmp_path / 'ids').write_text('i000\n\ni002\n')
  flags = ('--modality=audio', f'--import={tmp_path / "f.npy"}', f'--ids={tmp_path / "ids"}')
  assert 'ids, line 2: is empty' in fails(data_dir, *flags)


# Columns of a table.

ATTRIBUTES = [
  {'id': 'i000', 'maker': 'Ann', 'tags': ['red', ['Round', 'rare']], 'price': 1.5},
  {'id': 'i001', 'maker': 'ann', 'tags': ['red'], 'price': 2},
  {'id': 'i002', 'maker': 'Bob, Cy|ann', 'tags': [], 'price': 2},
  {'id': 'i003', 'maker': None, 'price': 90},
  {'id': 'i004'},
  {'id': 'elsewhere', 'maker': 'Bob', 'tags': ['red'], 'price': -100},
]
COLUMNS = '--columns=maker,tags,price'


def write_attributes(path: Path) -> str:
  path.write_text(''.join(json.dumps(row) + '\n' for row in ATTRIBUTES))
  return f'--import={path}'


def test_names_and_numbers_of_a_table(build, tmp_path, capsys):
  data_dir = build([{}] * 6)
  table = write_attributes(tmp_path / 'table.jsonl')
  run(data_dir, '--modality=attributes', table, COLUMNS, '--dtype=float32')
  printed = capsys.readouterr().out
  assert 'attributes maker, tags, price of table.jsonl' in printed
  assert '1 ids of the file are not in the dataset' in printed
  info, tokens, mask = read(data_dir, 'attributes')
  np.testing.assert_array_equal(mask[:, 0], [False, True, True, True, True, False, False])
  reasons = (data_dir / 'features/item/attributes/masked.jsonl').read_text()
  assert 'nothing in maker, tags, price' in reasons
  assert 'not in table.jsonl' in reasons
  assert info['encoder']['widths'] == [96, 96, 9]
  maker, tags, price = np.split(tokens[1:, 0], [96, 192], axis=1)
  lengths = [np.linalg.norm(column, axis=1) for column in (maker, tags, price)]
  expected = [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
  np.testing.assert_allclose(lengths, expected, atol=1e-6)
  # The same name in other letters, one of several, and what only one item has weighs most.
  np.testing.assert_allclose(maker[0] @ maker[1], 1, atol=1e-6)
  assert 0.2 < maker[0] @ maker[2] < 1 / np.sqrt(3) + 0.1
  assert 0.2 < tags[0] @ tags[1] < 1 / np.sqrt(3) + 0.1
  # Numbers by their order: equal ones are the same, and the further apart the less alike.
  np.testing.assert_allclose(price[1] @ price[2], 1, atol=1e-6)
  assert price[0] @ price[1] > price[0] @ price[3]


@pytest.mark.parametrize(
  ('prices', 'odd'),
  [
    (['3,50', '12', '4,00'], "'3,50' is no number"),
    (['3.50', 'n/a', '4.00'], "'n/a' is no number"),
    (['3.50 €', '$4', 'EUR'], "'3.50 €' is no number"),
    (['3.50', '12', ''], None),
    (['3.50', '1995-01-31', '4'], None),
    (['XL', 'L', '42'], None),
    (['blue', 'red', ''], None),
  ],
)
def test_numbers_that_count_as_names_are_told(build, tmp_path, capsys, prices, odd):
  table = tmp_path / 'table.jsonl'
  rows = [{'id': f'i{at:03}', 'price': price} for at, price in enumerate(prices)]
  table.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  run(build([{}] * 3), '--modality=attributes', f'--import={table}', '--columns=price')
  told = capsys.readouterr().err
  assert ('price counts as names' in told) == bool(odd)
  assert odd is None or odd in told


@pytest.mark.parametrize(
  'dates',
  [
    ['31-Jan-1995', '01-Feb-1995', '', '01-Feb-1995', '07-Mar-1997'],
    ['1995-01-31', '1995-02-01', None, '1995-02-01T10:00:00Z', '1997-03-07'],
  ],
)
def test_dates_count_as_days(build, tmp_path, dates):
  table = tmp_path / 'table.jsonl'
  rows = [{'id': f'i{at:03}', 'released': date} for at, date in enumerate(dates)]
  table.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  data_dir = build([{}] * 5)
  run(data_dir, '--modality=attributes', f'--import={table}', '--columns=released')
  info, tokens, mask = read(data_dir, 'attributes')
  assert info['encoder']['widths'] == [9]
  np.testing.assert_array_equal(mask[1:, 0], [True, True, False, True, True])
  first, second, _, same, last = tokens[1:, 0].astype(np.float32)
  np.testing.assert_array_equal(second, same)
  assert first @ second > first @ last


def test_a_csv_table_says_the_same_and_no_other_column_matters(build, tmp_path):
  rows = [('maker', 'id', 'price', 'tags'), ('Ann', 'i000', '1.5', 'red|Round|rare')]
  rows += [('Ann', 'i001', '2', 'red'), ('Bob, Cy, ann', 'i002', '2.0', ''), ('', 'i003', '90', '')]
  with (tmp_path / 'table.csv').open('w', newline='') as file:
    csv.writer(file).writerows(rows)
  found = {}
  for name in ('table.csv', 'table.jsonl'):
    write_attributes(tmp_path / 'table.jsonl')
    data_dir = build([{}] * 6, name=name.replace('.', '-'))
    run(data_dir, '--modality=attributes', f'--import={tmp_path / name}', COLUMNS)
    found[name] = read(data_dir, 'attributes')[1]
  np.testing.assert_array_equal(found['table.csv'], found['table.jsonl'])


@pytest.mark.parametrize(
  ('lines', 'columns', 'message'),
  [
    ([{'id': 'i000', 'a': 1}], 'a,b', "no column 'b' (--columns); it has id, a"),
    ([{'id': 'i000', 'a': 1}] * 2, 'a', "line 2: 'i000' is in the table twice"),
    ([{'id': 'i000', 'a': ''}], 'a', "'a' says nothing of any item"),
    ([{'id': 'x', 'a': 1}], 'a', "none of its 1 ids, first 'x', is one of the items"),
    ([{'number': 'i000', 'a': 1}], 'a', 'pass --item_id_column=NAME'),
    ([{'id': 1.5, 'a': 1}], 'a', 'id is 1.5; ids are text or whole numbers'),
  ],
)
def test_tables_that_do_not_fit_are_refused(build, tmp_path, fails, lines, columns, message):
  path = tmp_path / 'table.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  flags = ('--modality=attributes', f'--import={path}', f'--columns={columns}')
  assert message in fails(build([{}] * 3), *flags)


# How they are stored.


def test_pca_and_whitening_of_items_hold_for_users_too(build, tmp_path):
  data_dir = build([{}] * 300)
  rng = np.random.default_rng(0)
  values = (rng.normal(size=(300, 2, 6)) * [5, 4, 3, 2, 1, 0.5] + 3).astype(np.float32)
  names = np.array([f'i{at:03}' for at in range(300)])
  np.savez(tmp_path / 'f.npz', ids=names[10:], tokens=values[10:])
  flags = ('--modality=audio', f'--import={tmp_path / "f.npz"}', '--dtype=float32')
  run(data_dir, *flags, '--width=3', '--rows_per_shard=64')
  info, tokens, mask = read(data_dir, 'audio')
  flat = values[10:].reshape(-1, 6)
  mean = flat.mean(0)
  _, sizes, directions = np.linalg.svd(flat - mean, full_matrices=False)
  np.testing.assert_allclose(
    np.abs(tokens[11:].reshape(-1, 3)), np.abs((flat - mean) @ directions[:3].T), atol=2e-4
  )
  lost = 1 - (sizes[:3] ** 2).sum() / (sizes**2).sum()
  assert info['projection']['reconstruction_error'] == pytest.approx(lost, rel=1e-4)
  assert not mask[:11].any()
  assert not tokens[:11].any()

  run(data_dir, *flags, '--width=4', '--whiten', '--overwrite')
  items = read(data_dir, 'audio')[1]
  covariance = np.cov(items[11:].reshape(-1, 4), rowvar=False, bias=True)
  np.testing.assert_allclose(covariance, np.eye(4), atol=1e-4)
  # Users whose features are those of two items come to lie where these items do.
  np.savez(tmp_path / 'u.npz', ids=np.array(['u0', 'u1']), tokens=values[50:52])
  user_flags = ('--modality=audio', '--of=user', '--split=leave_one_out', '--dtype=float32')
  user_flags += ('--hold_back=0', f'--import={tmp_path / "u.npz"}')
  with pytest.raises(SystemExit):
    run(data_dir, *user_flags, '--width=3', '--whiten')
  info = json.loads((data_dir / 'features/item/audio/info.json').read_text())
  assert info['width'] == 4
  (tmp_path / 'f.npz').rename(tmp_path / 'items.npz')
  (tmp_path / 'u.npz').rename(tmp_path / 'f.npz')
  run(data_dir, *user_flags[:-1], flags[1], '--width=4', '--whiten')
  split_hash = prepared.read_info(data_dir)['splits']['leave_one_out']['hash']
  users = read(data_dir, 'audio', 'user', split_hash)[1]
  np.testing.assert_allclose(users[1:], items[51:53], atol=1e-5)


@pytest.mark.parametrize('dtype', ['float16', 'int8'])
def test_small_types_keep_the_error_that_they_report(build, tmp_path, dtype):
  data_dir = build([{}] * 50)
  values = np.random.default_rng(0).normal(size=(50, 3, 64)).astype(np.float32) * 1e-3
  values[7] *= 1e5
  names = np.array([f'i{at:03}' for at in range(50)])
  np.savez(tmp_path / 'f.npz', ids=names, tokens=values)
  run(data_dir, '--modality=audio', f'--import={tmp_path / "f.npz"}', f'--dtype={dtype}')
  info, tokens, _ = read(data_dir, 'audio')
  largest = np.abs(values).max(-1, keepdims=True)
  allowed = largest / 127 * 0.51 if dtype == 'int8' else largest * 2**-11
  assert (np.abs(tokens[1:] - values) <= allowed).all()
  error = ((tokens[1:] - values) ** 2).sum() / (values**2).sum()
  assert info['storage_error'] == pytest.approx(error, rel=1e-2)
  assert info['counts']['bytes'] < 50 * 3 * 64 * (1.2 if dtype == 'int8' else 2.2)


# Killed, repeated, changed.


@pytest.fixture
def many(build):
  return build([{'title': f'Thing {at} of {at % 7}'} for at in range(300)])


SHARDS = ('--modality=text', '--encoder=hashing', '--rows_per_shard=2')


def start_and_kill(data_dir, *flags, number=signal.SIGKILL) -> Program:
  """Starts the program and stops it with about a tenth of its shards done."""
  process = start(f'--data_dir={data_dir}', *SHARDS, *flags)
  progress = data_dir / 'features/item/text.incomplete/progress.jsonl'
  deadline = time.monotonic() + 300
  while not progress.exists() or progress.read_bytes().count(b'\n') < 25:
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.001)
  process.send_signal(number)
  process.wait()
  return process


@pytest.mark.parametrize('width', [[], ['--width=8']])
def test_a_killed_run_goes_on_and_ends_the_same(many, width):
  start_and_kill(many, *width)
  target, draft = many / 'features/item/text', many / 'features/item/text.incomplete'
  assert not target.exists()
  made = (draft / ('full' if width else 'ready')).glob('*.npy')  # Not what it was writing: .part.
  kept = {path.name: path.stat().st_ino for path in made}
  assert 20 < len(kept) < 300
  run(many, *SHARDS, *width)
  assert not draft.exists()
  if not width:
    same = [name for name, inode in kept.items() if (target / name).stat().st_ino == inode]
    assert len(same) > 40
  after = content(target)
  run(many, *SHARDS, *width, '--overwrite')
  assert content(target) == after


def test_a_killed_replacement_leaves_the_old_features(many):
  run(many, *SHARDS, '--max_tokens=1')
  before = content(many / 'features/item/text')
  start_and_kill(many, '--overwrite')
  assert content(many / 'features/item/text') == before
  assert read(many)[1].shape == (301, 2, 256)
  run(many, *SHARDS, '--overwrite', '--dtype=float32')  # Not what the killed one had begun.
  assert read(many)[0]['dtype'] == 'float32'


def test_an_interrupted_run_says_what_to_do(many):
  process = start_and_kill(many, number=signal.SIGINT)
  assert process.returncode == 130
  assert process.stderr.read() == 'stopped; finished work is kept, and the same command continues\n'


def test_damaged_and_changed_shards_of_a_killed_run_are_made_again(many):
  write_about(many, 'item', {'i004': 'The old text.', 'i299': 'Another.'})
  start_and_kill(many)
  write_about(many, 'item', {'i004': 'The new text.', 'i299': 'Another.'})
  ready = many / 'features/item/text.incomplete/ready'
  path = sorted(ready.glob('tokens-*.npy'))[3]
  path.write_bytes(path.read_bytes()[:-1] + b'x')
  run(many, *SHARDS)
  after = content(many / 'features/item/text')
  run(many, *SHARDS, '--overwrite')
  assert content(many / 'features/item/text') == after


def test_the_same_command_again_changes_nothing_and_another_asks(build, capsys):
  data_dir = build([{}] * 5)
  flags = ('--modality=text', '--encoder=hashing')
  run(data_dir, *flags)
  target = data_dir / 'features/item/text'
  before, inode = content(target), target.stat().st_ino
  run(data_dir, *flags)
  assert (content(target), target.stat().st_ino) == (before, inode)
  assert 'already in' in capsys.readouterr().out
  for other, message in (
    ('--max_tokens=3', 'its tokens is 9, asked for is 4; pass --overwrite'),
    ('--dtype=int8', 'its dtype is float16, asked for is int8; pass --overwrite'),
  ):
    with pytest.raises(SystemExit):
      run(data_dir, *flags, other)
    assert message in capsys.readouterr().err
  write_about(data_dir, 'item', {'i002': 'Now there is more to say.'})
  with pytest.raises(SystemExit):
    run(data_dir, *flags)
  assert 'its texts.provider is None, asked for is import' in capsys.readouterr().err
  run(data_dir, *flags, '--overwrite')
  write_about(data_dir, 'item', {'i002': 'And something else.'})
  with pytest.raises(SystemExit):
    run(data_dir, *flags)
  assert 'of other inputs, which have changed; pass --overwrite' in capsys.readouterr().err
  run(data_dir, *flags, '--overwrite')
  assert read(data_dir)[0]['fingerprint'] != json.loads(before['info.json'])['fingerprint']


def test_two_programs_do_not_make_the_same_features(many):
  process = start(f'--data_dir={many}', *SHARDS)
  draft = many / 'features/item/text.incomplete'
  while not (draft / 'progress.jsonl').exists():
    assert process.poll() is None
    time.sleep(0.001)
  process.send_signal(signal.SIGSTOP)
  try:
    with pytest.raises(SystemExit):
      run(many, *SHARDS)
  finally:
    process.send_signal(signal.SIGCONT)
  assert process.wait() == 0
  assert read(many)[2].any(1).sum() == 300


def test_decoding_processes_end_with_a_killed_parent(build):
  data_dir = build([{'image': picture(seed)} for seed in range(4)])
  script = f"""
import os, signal
from pathlib import Path
from data_prep.embeddings import decoded_files
from ur4rec_jax.encoders import pictures
encoder = pictures.color(1)
decoders = decoded_files.Decoders(encoder.prepare, 1)
if __name__ == '__main__':
  paths = sorted(Path({str(data_dir / 'images')!r}).glob('*.png'))
  for _ in decoders.inputs([paths]):
    print(*decoders._pool._processes, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""
  path = data_dir / 'script.py'
  path.write_text(script)
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  # A child holds the pipes too, whose end `run` waits for.
  done = subprocess.run(
    [sys.executable, path], env=env, capture_output=True, text=True, timeout=300
  )
  assert done.stdout.split()[0].isdecimal()
  assert done.returncode == -signal.SIGKILL


# Encoders that are none.


def test_folders_that_are_no_encoders_are_refused(build, fails, vision, tmp_path):
  data_dir = build([{'image': picture(seed)} for seed in range(2)])
  (tmp_path / 'empty').mkdir()
  message = fails(data_dir, '--modality=text', f'--encoder={tmp_path / "empty"}')
  assert 'holds no model (no config.json)' in message
  message = fails(data_dir, '--modality=text', f'--encoder={tmp_path / "absent"}')
  assert 'there is no such folder' in message
  broken = tmp_path / 'broken'
  broken.mkdir()
  (broken / 'config.json').write_bytes((vision / 'clip/config.json').read_bytes())
  (broken / 'model.safetensors').write_bytes(b'nonsense')
  for modality in ('text', 'image'):
    message = fails(data_dir, f'--modality={modality}', f'--encoder={broken}')
    assert f'--encoder={broken}: cannot be loaded' in message
  message = fails(data_dir, '--modality=image', f'--encoder={vision / "bert"}')
  assert 'reads no pictures' in message
  message = fails(data_dir, '--modality=image', f'--encoder={vision / "clip"}', '--grid=7')
  assert '--grid=7: the model has only 6 x 6 patches' in message
  message = fails(
    data_dir, '--modality=image', f'--encoder={vision / "dinov2"}', '--layer=projected'
  )
  assert 'projects to no shared space' in message


@pytest.mark.parametrize('name', ['clip', 'bert'])
def test_models_whose_files_lack_weights_are_refused(build, fails, vision, tmp_path, name):
  """The library would make them up at random."""
  data_dir = build([{'image': picture(seed)} for seed in range(2)])
  folder = tmp_path / name
  folder.mkdir()
  for path in (vision / name).iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  weights = safetensors.torch.load_file(folder / 'model.safetensors')
  lost = next(key for key in weights if 'vision_model' in key or name == 'bert')
  del weights[lost]
  safetensors.torch.save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
  modality = 'text' if name == 'bert' else 'image'
  message = fails(data_dir, f'--modality={modality}', f'--encoder={folder}')
  assert 'its files lack 1 weights that the model needs' in message


def test_a_name_that_cannot_be_had_says_how_to_get_it(build):
  data_dir = build([{}] * 3)
  flags = [f'--data_dir={data_dir}', '--modality=text', '--encoder=sentence-transformers/none']
  done = subprocess.run(
    [sys.executable, '-m', 'data_prep.encode', *flags],
    cwd=ROOT,
    env=os.environ | {'HF_HUB_OFFLINE': '1'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert 'Traceback' not in done.stderr
  assert 'the hub does not give it' in done.stderr
  assert 'hf download sentence-transformers/none' in done.stderr
  assert '--encoder=hashing' in done.stderr


@pytest.mark.parametrize('flags', [('--modality=image, text', '--encoder=color, hashing'), ()])
def test_several_modalities_in_one_call(build, capsys, monkeypatch, flags):
  """The same features as by a call each, and one next command that trains with all of them."""
  monkeypatch.setattr(text, 'DEFAULT', 'hashing')  # The real ones need a network.
  monkeypatch.setattr(pictures, 'DEFAULT', 'color')
  items = [{'image': picture(seed)} for seed in range(3)]
  data_dir, other = build(items), build(items, 'other')
  run(data_dir, *flags, '--workers=0')
  printed = capsys.readouterr().out
  assert len(re.findall('^features ', printed, re.MULTILINE)) == 2
  (command,) = re.findall('^next +(.*)', printed, re.MULTILINE)
  assert ':multimodal' in command
  assert shlex.split(command)[-1] == '--config.stages=("train",)'
  for one in (['--modality=text', '--encoder=hashing'], ['--modality=image', '--encoder=color']):
    run(other, *one, '--workers=0')
  for name in ('text', 'image'):
    ours, theirs = (read(folder, name) for folder in (data_dir, other))
    assert ours[0]['encoder'] == theirs[0]['encoder']
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_without_modality_what_the_items_have_is_encoded(build, fails, monkeypatch):
  monkeypatch.setattr(text, 'DEFAULT', 'hashing')
  data_dir = build([{}] * 3)
  run(data_dir)
  assert [path.name for path in (data_dir / 'features/item').iterdir()] == ['text']
  assert 'no texts and no pictures' in fails(build([{'title': ''}] * 3, 'bare'))


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--modality=../x'], 'must be a name of lower-case letters'),
    (['--modality=audio'], 'pass --import=FILE'),
    (['--modality=text,audio'], 'pass --import=FILE'),
    (['--import=f.npz'], 'needs --modality, a name for the features'),
    (['--modality=audio,video', '--import=f.npz'], '2 modalities (audio, video) and 1 for them'),
    (['--modality=text,image', '--encoder=hashing'], '--encoder: there are 2 modalities'),
    (['--modality=image', '--of=user'], 'users have no pictures'),
    (['--modality=text', '--ids=f'], '--item_id_column are about --import'),
    (['--modality=text', '--batch_size=0'], '--batch_size must be 1 or more'),
    (['--modality=image', '--layer=first'], '--layer=first'),
    (['--modality=text', '--encoder=hashing', '--width=300'], 'must be at most 256'),
    (['--modality=text', '--encoder=hashing', '--of=user'], 'has no user texts'),
    (['--modality=text', '--device=tpu9'], '--device=tpu9: tpu9 cannot be used'),
  ],
)
def test_wrong_flags(build, fails, flags, message):
  assert message in fails(build([{}] * 3), *flags)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['text', '--encoder=hashing', '--grid=3'], '--grid: is for pictures, not for text by hashing'),
    (['text', '--max_seconds=60'], '--max_seconds: is for sounds and videos, not for text'),
    (['text', '--layer=-2'], '--layer: is for pretrained models of pictures'),
    (['image', '--encoder=color', '--layer=last'], 'and sounds, not for image by color'),
    (['image', '--max_tokens=8'], '--max_tokens: is for texts, sounds, videos and graphs, not for'),
    (['text,image', '--max_seconds=60'], 'not for text and image; leave it out'),
    (['graph', '--files=t.csv', '--grid=2'], '--grid: is for pictures, not for graph'),
    (['x', '--import=f.npz', '--max_tokens=2'], 'not for an --import; leave it out'),
    (['x', '--import=f.npz', '--item_id_column=i'], '--item_id_column: is for a table, of which'),
    (['x', '--import=t.csv', '--columns=a', '--ids=f'], '--ids: is for an --import without ids'),
    (['x', '--import=f.npz', '--split=time'], '--split: is for --of=user, whose features must'),
    (['x', '--import=f.npz', '--hold_back=0'], '--hold_back: is for --of=user, whose features'),
    (['text', '--of=user', '--neighbours=1'], '--neighbours: is for items, and --of=user encodes'),
  ],
)
def test_flags_that_would_change_nothing_are_refused(build, fails, flags, message):
  assert message in fails(build([{}] * 3), f'--modality={flags[0]}', *flags[1:])


def test_flags_of_one_of_several_modalities(build):
  data_dir = build([{'image': picture(seed)} for seed in range(3)])
  flags = ('--modality=text,image', '--encoder=hashing,color', '--workers=0')
  run(data_dir, *flags, '--max_tokens=2', '--grid=2')
  assert [read(data_dir, name)[0]['tokens'] for name in ('text', 'image')] == [3, 5]


def test_without_the_extra_the_message_says_so(build):
  data_dir = build([{}] * 3)
  script = f"""
import sys
sys.modules['torch'] = None  # As if it were not installed.
from data_prep import encode
encode.main(['--data_dir={data_dir}', '--modality=text'])
"""
  done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith("error: torch is not installed; pip install 'ur4rec-jax[encode]'")


@pytest.mark.slow
def test_torch_stays_out_until_it_is_needed():
  """What is built in, and everything in ur4rec_jax, works without the extra."""
  script = """
import importlib, pkgutil, sys
import data_prep.encode, ur4rec_jax
for module in pkgutil.walk_packages(ur4rec_jax.__path__, 'ur4rec_jax.'):
  importlib.import_module(module.name)
print(sorted({'torch', 'transformers', 'sentence_transformers', 'safetensors'} & set(sys.modules)))
"""
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout == '[]\n'

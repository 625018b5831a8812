"""Texts, pictures and files of features -> token embeddings, by real models and processes."""

import io
import json
import os
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

from data_prep import build_dataset, encode, models, picture_tokens, text_tokens, texts
from ur4rec_jax import dataset as prepared
from ur4rec_jax.features import load_features

REPOSITORY = Path(__file__).parents[2]
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
        path = tmp_path / f'{row["id"]}.picture'
        path.write_bytes(row['image'])
        row['image'] = str(path.name)
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


def words(*flags) -> list[str]:
  return [sys.executable, '-m', 'data_prep.encode', *map(str, flags)]


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
  (hashed,) = text_tokens.hashing().workers
  for row, parts in enumerate(expected, 1):
    np.testing.assert_array_equal(mask[row], np.arange(5) < len(parts))
    np.testing.assert_array_equal(tokens[row, : len(parts)], hashed(parts))
  assert not mask[0].any()
  assert not tokens[~mask].any()
  assert info['encoder']['is_builtin']
  assert not info['is_mock']


def test_texts_equal_the_library_whatever_the_batch_size(build, capsys):
  items = [dict(zip(('title', 'genres', 'description'), film, strict=True)) for film in films()]
  data_dir = build([*items, {'title': 'Word ' * 40, 'description': 'long ' * 3000}, {'title': ''}])
  from sentence_transformers import SentenceTransformer

  folder, _ = models.find(MINILM)
  library = SentenceTransformer(str(folder), device='cpu')
  for flags in (['--batch_size=1'], ['--batch_size=7', '--device=cpu,cpu'], ['--batch_size=64']):
    run(data_dir, '--modality=text', '--dtype=float32', '--max_tokens=2', '--overwrite', *flags)
    info, tokens, mask = read(data_dir)
    for row in (1, 9, 32, 33):
      parts = list(text_tokens._rows(data_dir, 'item', False, 2))[row - 1].content
      assert mask[row].sum() == len(parts)
      np.testing.assert_allclose(tokens[row, : len(parts)], library.encode(parts), atol=1e-5)
  assert not mask[34].any()
  assert info['encoder']['sha256'] == models.find(str(folder))[1]['sha256']
  assert (info['encoder']['modules'][-1], info['encoder']['precision']) == ('Normalize', 'float32')
  shown = capsys.readouterr().out
  assert "1: no text, or one without letters and digits; first item 'i033'" in shown


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


def test_texts_about_users_belong_to_a_split(build, capsys):
  data_dir = build([{}] * 4)
  info = prepared.read_info(data_dir)
  split_hash = info['splits']['leave_one_out']['hash']
  origin = {'split_name': 'leave_one_out', 'split_hash': split_hash, 'is_mock': True}
  write_about(data_dir, 'user', {'u1': 'Likes things. Hates stuff.'}, **origin)
  run(data_dir, '--modality=text', '--encoder=hashing')
  info, _, mask = read(data_dir, of='user', split_hash=split_hash)
  assert mask.sum(1).tolist() == [0, 0, 3]
  assert info['is_mock']
  assert (info['split_name'], info['split_hash']) == ('leave_one_out', split_hash)
  assert read(data_dir)[2].sum(1).tolist() == [0, 2, 2, 2, 2]  # Of items too.
  assert 'mock writer' in capsys.readouterr().out
  with pytest.raises(ValueError, match='was made for the split leave_one_out'):
    load_features(data_dir, 'user', 'text', 'another')
  path = data_dir / 'user_texts/1.0.0/metadata.json'
  path.write_text(path.read_text().replace(split_hash, '0123456789abcdef'))
  with pytest.raises(SystemExit):
    run(data_dir, '--modality=text', '--encoder=hashing', '--of=user', '--overwrite')
  assert 'which this dataset has not' in capsys.readouterr().err


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
  assert "no item has anything to encode, so nothing is written (3: no text" in message
  assert "first 'i000'" in message


# Pictures.


def picture(seed=0, size=(60, 80), kind='PNG') -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (4, 3, 3), np.uint8)
  image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
  image.save(file := io.BytesIO(), kind)
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
  several = ('--batch_size=2', '--workers=2', '--device=cpu,cpu', '--layer=-2')
  run(data_dir, *flags, *several)
  np.testing.assert_allclose(read(data_dir, 'image')[1], tokens, atol=1e-5)
  run(data_dir, *flags, '--normalise', '--grid=0', '--workers=0')
  info, tokens, _ = read(data_dir, 'image')
  unit = embeds / embeds.norm(dim=-1, keepdim=True)
  np.testing.assert_allclose(tokens[1:, 0], unit, atol=1e-5)
  assert (info['tokens'], info['is_normalised']) == (1, True)


@pytest.mark.parametrize(
  ('name', 'token_0', 'extra'), [('siglip', 'pooled', 0), ('dinov2', 'CLS', 3), ('resnet', 'pooled', 0)]
)
def test_other_vision_models(build, vision, name, token_0, extra):
  data_dir = build([{'image': picture(seed)} for seed in range(3)])
  model, pixels = looked_at(vision / name, data_dir, 3)
  with torch.inference_mode():
    found = getattr(model, 'vision_model', model)(pixels)
  run(
    data_dir, '--modality=image', f'--encoder={vision / name}', '--dtype=float32', '--workers=0'
  )
  info, tokens, _ = read(data_dir, 'image')
  assert (info['encoder']['layer'], info['encoder']['token_0']) == ('last', token_0)
  np.testing.assert_allclose(tokens[1:, 0], found.pooler_output.flatten(1), rtol=1e-5, atol=1e-5)
  hidden = found.last_hidden_state
  hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, extra:]
  np.testing.assert_allclose(tokens[1:, 1:], grid_means(hidden.numpy()), rtol=1e-5, atol=1e-5)


def test_bad_pictures_are_masked_and_named(build, capsys):
  items = [{'image': picture(seed)} for seed in range(40)]
  items[3] = items[17] = {}
  items[5] = {'image': picture(5, (300, 300), 'JPEG')[:900]}
  items[6] = {'image': picture(6, (1, 1))}
  items[7] = {'image': picture(7, (12_000, 700), 'JPEG')}
  items[8] = {'image': picture(8, (12_000, 12_000), 'JPEG')}
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

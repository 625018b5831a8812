"""Shows what each modality adds on the generated world, where it is known what a file tells.

  python -m benchmarks.quality.modalities --scratch=runs/modalities --seeds=0,1,2 [--keep]

An item of `data_prep.sources.synthetic` has a topic, a style and a look, and each user likes some
of each. The program writes a sound, a video and the triples of a graph for every item, next to its
text and its picture; each kind of file tells two or three of the properties. It encodes them as a
user would, with the built-in encoders, and trains with ids alone, with each modality, with all, and
with all shuffled over the items. `process` ranks by the true probabilities: nothing can do better.

A run that has finished is not run again. Prints a table; --keep stores what was found, and writes
the table into docs/embeddings.md.
"""

import argparse
import csv
import json
import pathlib
import shlex
import statistics
import wave
from typing import Any, NamedTuple

import av
import numpy as np

from benchmarks.quality.accuracy import ROOT, put_between_marks, run_module, seeds_of, train_seeds
from data_prep.sources import synthetic, vocabulary
from ur4rec_jax.data.dataset import load_dataset, read_interactions, read_items
from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.evaluation.protocol import Protocol
from ur4rec_jax.evaluation.queries import make_queries
from ur4rec_jax.files import write_file
from ur4rec_jax.runs.sweep import (
  mean_and_spread,
  p_text,
  ranks_p_value,
  read_run,
  relative_gain,
  spread,
)

STORED = ROOT / 'benchmarks' / 'results' / 'modalities' / 'results.json'
PAGE = ROOT / 'docs' / 'embeddings.md'
USERS, ITEMS, SEED = 2000, 1500, 0  # As in the quickstart, for which the config was tuned.
RATE, SOUND_SECONDS = 16_000, 1.0
SIDE, FRAMES = 64, 3  # Pixels and frames of a video.


class Modality(NamedTuple):
  """One kind of files.

  Attributes:
    tells: which properties of an item a file tells.
    encoder: the built-in encoder that reads it.
    max_tokens: the most tokens of an item.
  """

  tells: str
  encoder: str
  max_tokens: int | None = None


MODALITIES = {
  'text': Modality('topic, style', 'hashing'),
  'image': Modality('topic, look', 'color'),
  'audio': Modality('topic, style', 'spectrum', 1),
  'video': Modality('topic, look', 'color', FRAMES),
  'graph': Modality('topic, style, look', 'hashing', 3),
}
IDS, SHUFFLED = 'ids', 'all, shuffled'
MIXES = {
  IDS: (),
  **{name: (name,) for name in MODALITIES},
  'text, image': ('text', 'image'),
  'all': tuple(MODALITIES),
  SHUFFLED: tuple(MODALITIES),
}


def write_sound(path: pathlib.Path, topic: int, style: int, rng: np.random.Generator) -> None:
  """Writes a chord: the low tone tells the topic, the high one the style."""
  seconds = np.arange(round(RATE * SOUND_SECONDS)) / RATE
  low = 150 * 2 ** (3 * topic / synthetic.NUM_TOPICS)
  high = 1500 * 2 ** (2 * style / synthetic.NUM_STYLES)
  chord = sum(
    np.sin(2 * np.pi * (tone * seconds * rng.uniform(0.99, 1.01) + rng.random()))
    for tone in (low, high)
  )
  samples = 8000 * (chord + rng.normal(0, 0.3, seconds.size))
  with wave.open(str(path), 'wb') as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(RATE)
    file.writeframes(np.clip(samples, -32768, 32767).astype('<i2').tobytes())


def write_video(path: pathlib.Path, topic: int, look: int, rng: np.random.Generator) -> None:
  """Writes frames whose ground tells the topic and whose moving square tells the look."""
  hue = 2 * np.pi * (topic / synthetic.NUM_TOPICS - np.arange(3) / 3)
  ground, square = 127 + 100 * np.cos(hue), synthetic.LOOKS[look][1]
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('mpeg4', rate=1)
    stream.width = stream.height = SIDE
    stream.pix_fmt = 'yuv420p'
    for _ in range(FRAMES):
      pixels = ground + rng.normal(0, 10, (SIDE, SIDE, 3))
      y, x = rng.integers(SIDE // 2, size=2)
      pixels[y : y + SIDE // 2, x : x + SIDE // 2] = square
      frame = av.VideoFrame.from_ndarray(np.clip(pixels, 0, 255).astype(np.uint8), 'rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_files(folder: pathlib.Path, names: list[str], world: synthetic.World) -> None:
  """Writes the sounds, the videos and the table of triples of all items.

  Args:
    folder: where to write.
    names: original ids of the items, in the order of the world.
    world: the properties of the items.
  """
  rng = np.random.default_rng([SEED, 4])
  for kind in ('audio', 'video'):
    (folder / kind).mkdir(parents=True, exist_ok=True)
  triples = [('head', 'relation', 'tail')]
  properties = zip(names, world.topics, world.styles, world.looks, strict=True)
  for name, topic, style, look in properties:
    write_sound(folder / 'audio' / f'{name}.wav', topic, style, rng)
    write_video(folder / 'video' / f'{name}.mp4', topic, look, rng)
    triples += [
      (name, 'belongs to', vocabulary.TOPICS[topic].genre),
      (name, 'has the style', vocabulary.STYLES[style].genre),
      (name, 'looks like', synthetic.LOOKS[look][0]),
    ]
  with (folder / 'graph.csv').open('w', newline='') as file:
    csv.writer(file).writerows(triples)


def prepare(scratch: pathlib.Path) -> pathlib.Path:
  """Builds the dataset with the features of all modalities, and returns its folder."""
  data, files, mark = scratch / 'data', scratch / 'files', scratch / 'prepared'
  if mark.exists():
    return data
  sizes = (f'--num_users={USERS}', f'--num_items={ITEMS}', f'--seed={SEED}')
  run_module(
    'data_prep.build_dataset', '--source=synthetic', f'--data_dir={data}', '--overwrite', *sizes
  )
  world = synthetic.make_world(USERS, ITEMS, SEED)
  write_files(files, synthetic.item_names(ITEMS), world)
  for name, modality in MODALITIES.items():
    flags = [f'--data_dir={data}', f'--modality={name}', f'--encoder={modality.encoder}']
    if name in ('audio', 'video'):
      flags.append(f'--files={files / name}')
    elif name == 'graph':
      flags.append(f'--files={files / "graph.csv"}')
    if modality.max_tokens:
      flags.append(f'--max_tokens={modality.max_tokens}')
    run_module('data_prep.encode', *flags, '--overwrite')
  mark.touch()
  return data


def command(mix: str) -> str:
  """Returns the command that trains with a mix of modalities."""
  shown = ['python', '-m', 'ur4rec_jax.main', '--config=configs/synthetic.py']
  if modalities := MIXES[mix]:
    shown[-1] += ':multimodal' if len(modalities) > 1 else ':text'
    shown.append(f'--config.modalities={modalities!r}')
  if mix == SHUFFLED:
    shown.append('--config.shuffled_features=True')
  return shlex.join(shown)


def process_ndcg(data: pathlib.Path) -> float:
  """Returns the test NDCG@10 of ranking by the true probabilities.

  Args:
    data: folder of the prepared data.
  """
  world, dataset = synthetic.make_world(USERS, ITEMS, SEED), load_dataset(data)
  # Original ids end with the number in the world, from 1.
  users = [int(name[1:]) - 1 for name in read_interactions(data).user_ids]
  items = np.array([int(item['original_id'][1:]) - 1 for item in read_items(data)])
  gains = []
  queries = make_queries(dataset, 'test', Protocol())
  for user, start, length, target in zip(
    queries.users, queries.starts, queries.lengths, queries.targets, strict=True
  ):
    history = items[dataset.item_ids[start : start + length] - 1]
    chances = synthetic.chances(world, users[user], history[-1])
    chances[history] = -1
    rank = np.count_nonzero(chances >= chances[items[target - 1]])
    gains.append(1 / np.log2(rank + 1) if rank <= 10 else 0)
  return float(np.mean(gains))


def measure(scratch: pathlib.Path, seeds: list[int]) -> dict[str, Any]:
  """Trains with every mix and every seed and returns what the table shows."""
  data = prepare(scratch)
  found: dict[str, Any] = {'seeds': seeds, 'mixes': {}}
  ranks = {}
  for mix in MIXES:
    workdir = scratch / mix.replace(', ', '-')
    runs = [read_run(x) for x in train_seeds(command(mix), str(data), workdir, seeds)]
    ranks[mix] = np.array([of_seed for _, of_seed in runs])
    found['mixes'][mix] = {
      'command': command(mix),
      'valid': [results['valid']['ndcg@10'] for results, _ in runs],
      'test': [results['test']['ndcg@10'] for results, _ in runs],
      'p': ranks_p_value(ranks[mix], ranks[IDS]),
    }
  results, _ = runs[0]
  found['popularity'] = results['baselines']['popularity']['ndcg@10']
  found['process'] = process_ndcg(data)
  return found


def table(found: dict[str, Any]) -> str:
  """Returns the table in Markdown."""
  lines = [
    '| trained with | a file tells | NDCG@10 | against ids | p |',
    '| --- | --- | --- | --- | --- |',
    f'| (popularity) | | {found["popularity"]:.4f} | | |',
  ]
  ids = found['mixes'][IDS]['test']
  for mix, of_mix in found['mixes'].items():
    tells = MODALITIES[mix].tells if mix in MODALITIES else ''
    gain = '' if mix == IDS else f'{relative_gain(of_mix["test"], ids):+.1%}'.replace('%', ' %')
    p = '' if mix == IDS else p_text(of_mix['p'])
    value = mean_and_spread(statistics.mean(of_mix['test']), spread(of_mix['test']))
    lines.append(f'| {mix} | {tells} | {value} | {gain} | {p} |')
  lines.append(f'| (the process itself) | topic, style, look | {found["process"]:.4f} | | |')
  seeds = ', '.join(map(str, found['seeds']))
  lines += [
    '',
    f'{USERS:,} users and {ITEMS:,} items; all items are ranked for the test. Seeds {seeds}, ±'
    ' standard deviation; p by permutation, paired by user.',
  ]
  return '\n'.join(lines)


@exit_on_reported_error
def main() -> None:
  """Trains, stores what was found and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--scratch', type=pathlib.Path, default='runs/modalities', help='folder of data and runs')
  add('--seeds', type=seeds_of, default='0,1,2', help='comma-separated')
  add('--keep', action='store_true', help='store the result, and put it into docs/embeddings.md')
  flags = parser.parse_args()
  found = measure(flags.scratch, flags.seeds)
  if flags.keep:
    write_file(STORED, json.dumps(found, indent=1) + '\n')
    put_between_marks(PAGE, 'modalities', table(found))
  print(table(found))


if __name__ == '__main__':
  main()

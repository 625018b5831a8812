"""A small shop with orders, goods and pictures, built and encoded in the process of the tests."""

import csv
import pathlib

import numpy as np
from PIL import Image

from data_prep import build_dataset, encode

WORDS = ['red', 'green', 'blue', 'warm', 'dark', 'light', 'heavy', 'cheap', 'royal', 'plain']
KINDS = ['lamp', 'chair', 'table', 'shelf', 'carpet', 'mirror', 'sofa', 'clock', 'vase', 'desk']


def write_picture(path: pathlib.Path, seed: int) -> None:
  """Writes a picture of random colours."""
  pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
  Image.fromarray(pixels).resize((64, 64)).save(path)


def write_table(path: pathlib.Path, header: str, rows: list) -> pathlib.Path:
  """Writes a CSV file."""
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([header.split(','), *rows])
  return path


def row_of_item(i: int) -> list[str]:
  """Returns id, title, description and picture of item i."""
  word, kind = WORDS[i % 10], KINDS[i // 2 % 10]
  return [f'g{i:02}', f'The {word} {kind}', f'A {kind} for {word} rooms. It is {word}.', f'{i}.png']


def build_shop(folder: pathlib.Path) -> pathlib.Path:
  """Builds and encodes a shop of 20 goods and 25 customers; `--min_length=4` drops `short`.

  Returns:
    The prepared folder; beside it orders.csv, goods.csv and the pictures.
  """
  rng = np.random.default_rng(0)
  rows = []
  for user in range(25):
    for step, item in enumerate(rng.permutation(20)[:6]):
      rows.append([f'c{user:02}', f'g{item:02}', 1_700_000_000 + 100 * step + user])
  rows += [['short', 'g03', 1_700_000_005], ['short', 'g04', 1_700_000_001]]
  orders = write_table(folder / 'orders.csv', 'customer_id,sku,ordered', rows)
  goods = [row_of_item(i) for i in range(20)]
  for i in range(20):
    write_picture(folder / f'{i}.png', i)
  items = write_table(folder / 'goods.csv', 'sku,title,description,image', goods)
  data = folder / 'data'
  files = [f'--raw_dir={orders}', f'--items={items}', f'--data_dir={data}']
  build_dataset.main(['--source=interactions', *files, '--time_column=ordered', '--min_length=4'])
  encode.main([f'--data_dir={data}', '--modality=text', '--encoder=hashing'])
  encode.main([f'--data_dir={data}', '--modality=image', '--encoder=color', '--workers=0'])
  return data

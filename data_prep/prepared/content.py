"""Tells what the items of a prepared folder have besides their ids: texts, pictures, URLs."""

import itertools
import re
from pathlib import Path

from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import iterate_items
from ur4rec_jax.encoders.text import item_texts

TEXT, IMAGE = 'text', 'image'


def modalities(data_dir: str | Path, most_items: int | None = None) -> list[str]:
  """Returns which of `text` and `image` can be encoded.

  Args:
    data_dir: a prepared folder.
    most_items: number of items that are searched for texts; None searches all.
  """
  found = []
  items = itertools.islice(iterate_items(data_dir), most_items)
  if (Path(data_dir) / 'item_texts').exists() or any(map(item_texts, items)):
    found.append(TEXT)
  records = item_pictures.read_manifest(Path(data_dir))
  if any(record['status'] == item_pictures.FETCHED for record in records):
    found.append(IMAGE)
  return found


def has_urls(data_dir: str | Path, most_items: int) -> bool:
  """Tells whether pictures of the first items are URLs, which can be downloaded."""
  items = itertools.islice(iterate_items(data_dir), most_items)
  return any(re.match('https?://', item['image']) for item in items)

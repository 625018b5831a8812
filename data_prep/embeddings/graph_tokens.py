"""Encodes what a knowledge graph says of items: each neighbour becomes a text with its relation."""

import collections
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from data_prep.embeddings import text_tokens
from data_prep.embeddings.feature_files import Row, Source
from ur4rec_jax.data.dataset import iterate_items, read_info
from ur4rec_jax.data.raw import items as item_tables
from ur4rec_jax.encoders import text
from ur4rec_jax.errors import InputError

_IN_ONE_TEXT = 8  # Neighbours in the text of an item whose neighbours get no tokens of their own.
_COLUMNS = (('head', 'relation', 'tail'), ('subject', 'predicate', 'object'))


def source(
  data_dir: str | Path, path: str | Path, encoder: text.Encoder, max_tokens: int
) -> Source:
  """Describes how to encode the neighbours of the items in a knowledge graph.

  An item is the node whose name is its original id. A triple (item, relation, neighbour) becomes
  the text "relation neighbour", and (neighbour, relation, item) becomes "neighbour relation".
  Neighbours that are items are named by their titles.

  Args:
    data_dir: prepared folder.
    path: table of triples with the columns head, relation, tail, or subject, predicate, object.
    encoder: text encoder.
    max_tokens: most neighbours with a token of their own, see `most_specific`.

  Raises:
    InputError: the table cannot be read, or has no triple of any item.
  """
  path = Path(path)
  count = read_info(data_dir)['counts']['items']
  titles = {item['original_id']: item['title'] for item in iterate_items(data_dir)}
  found = _neighbours(path, titles)
  if not found:
    raise InputError(
      f'--files={path}: none of its triples has the original id of an item, such as'
      f' {next(iter(titles))!r}, as its head or tail'
    )
  texts = most_specific(found, max_tokens)

  def rows() -> Iterator[Row]:
    for name in titles:
      if name in texts:
        parts = text.with_whole(texts[name])
        yield Row(name, parts[: 1 + max_tokens], '\0'.join(parts).encode())
      else:
        yield Row(name, None, reason=f'no triple in {path.name}')

  return Source(
    name=encoder.info['name'],
    info={
      'encoder': encoder.info,
      'is_mock': False,
      'token_meaning': {
        '0': 'all chosen neighbours with their relations',
        '1...': 'a neighbour each, the most specific first',
      },
    },
    total=count,
    tokens=1 + max_tokens,
    width=encoder.width,
    rows=rows,
    encode=text_tokens.encoding(encoder, 1 + max_tokens),
  )


def most_specific(found: dict[str, list[str]], most: int) -> dict[str, list[str]]:
  """Chooses the neighbours of each item that say the most about it.

  Those of the fewest items come first, as they say more than what all items have. Those of this
  item alone come last: they tell nothing about which items are alike.

  Args:
    found: texts of neighbours by item.
    most: most of an item; 0 for as many as make one text.

  Returns:
    The chosen texts by item.
  """
  counts = collections.Counter(part for parts in found.values() for part in parts)
  order = lambda part: (counts[part] == 1, counts[part], part)
  return {name: sorted(parts, key=order)[: most or _IN_ONE_TEXT] for name, parts in found.items()}


def node_words(name: str) -> str:
  """Makes a readable name of that of a node: `<http://x/Ridley_Scott>` becomes `Ridley Scott`."""
  name = name.strip().removeprefix('<').removesuffix('>').strip('"')
  if re.match(r'[a-z][a-z0-9+.-]*://', name):
    name = urllib.parse.unquote(re.split(r'[/#]', name.rstrip('/#'))[-1])
  return ' '.join((name if ' ' in name else name.replace('_', ' ')).split())


def relation_words(name: str) -> str:
  """Makes a readable name of that of a relation: `film.film.directedBy` becomes `directed by`."""
  if ' ' not in name and '://' not in name:
    name = re.split(r'[./:]', name.rstrip('./:'))[-1]
  return re.sub(r'(?<=[a-z])(?=[A-Z][a-z])', ' ', node_words(name)).lower()


def _neighbours(path: Path, titles: dict[str, str]) -> dict[str, list[str]]:
  """Reads the texts of the neighbours of each item that has some, each once."""
  table = item_tables.open_table(path)
  columns = next((names for names in _COLUMNS if {*names} <= {*table.columns}), None)
  if columns is None:
    raise InputError(
      f'{path}: must have the columns {" or ".join(map(", ".join, _COLUMNS))}; it has'
      f' {", ".join(table.columns)}'
    )
  named = lambda node: titles[node] or node if node in titles else node_words(node)
  found: dict[str, dict[str, None]] = {}
  for place, row in table.rows([*columns]):
    head, relation, tail = (item_tables.text(row.get(column)) for column in columns)
    if not (head and relation and tail):
      empty = columns[[head, relation, tail].index('')]
      raise InputError(f'{place}: {empty} is empty; fill it in or remove the row')
    relation = relation_words(relation)
    if head in titles:
      found.setdefault(head, {})[f'{relation} {named(tail)}'] = None
    if tail in titles:
      found.setdefault(tail, {})[f'{named(head)} {relation}'] = None
  return {name: [*parts] for name, parts in found.items()}

"""Writes, imports and exports the texts of a prepared folder."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from data_prep.prepared import tfds_writer
from data_prep.sources import raw_files
from ur4rec_jax import files
from ur4rec_jax.data.dataset import (
  VERSION,
  iterate_items,
  iterate_texts,
  read_info,
  read_interactions,
)
from ur4rec_jax.data.raw import json_lines, tables
from ur4rec_jax.encoders import sentences
from ur4rec_jax.encoders.sentences import known_text
from ur4rec_jax.errors import InputError


def write_texts(
  data_dir: str | Path, kind: str, texts: Mapping[str, str], origin: Mapping[str, Any]
) -> dict[str, int]:
  """Writes `item_texts` or `user_texts` in one step and replaces an earlier folder.

  Items without an entry in `texts` get their description from the dataset, if it has one.

  Args:
    data_dir: a prepared folder.
    kind: `item` or `user`.
    texts: by original id; read one at a time, so they need not be in memory.
    origin: JSON-serialisable: provider (`import` for texts made elsewhere), model, prompt
      version, parameters, time, language, is_mock; for users split_name, split_hash and hold_back
      too.

  Returns:
    Number of texts by source, and the counts `without_text` and `unknown_ids`.

  Raises:
    InputError: the folder is no prepared dataset or cannot be written, or the texts belong to
      another dataset.
  """
  info = read_info(data_dir)
  if kind == 'user':
    _check_split(data_dir, info, origin)
  source = 'import' if origin['provider'] == 'import' else 'mock' if origin['is_mock'] else 'llm'
  counts: Counter[str] = Counter()
  target = Path(os.path.realpath(data_dir)) / f'{kind}_texts'
  with files.disk_errors(target):
    files.clean_up(target)
    with files.new_folder(target) as folder:
      table = tfds_writer.Table(
        target.name,
        f'{kind}s',
        {
          'original_id': tfds.features.Text(),
          'text': tfds.features.Text(),
          'sentences': tfds.features.Sequence(tfds.features.Text()),
          'source': tfds.features.Text(),
        },
        f'{info["name"]}: texts about {kind}s, one example each, in the order of the other data;'
        " source is llm, mock, import, dataset (a description of the dataset's own), or empty where"
        ' there is no text. metadata.json says where they come from.',
        tfds_writer.Origin(**{name: info[name] for name in tfds_writer.Origin._fields}),
      )
      rows = _rows(data_dir, kind, texts, source, counts)
      metadata = {**origin, 'kind': kind, 'counts': counts}
      tfds_writer.write_records(folder / VERSION, table, rows, metadata)
      _check_counts(data_dir, kind, texts, counts)
  return dict(counts)


def read_json(
  path: str | Path, id_field: str = 'id', text_fields: Sequence[str] = ('text',)
) -> dict[str, str]:
  """Reads texts by id: one object `{"<id>": "text"}`, or a .jsonl file with one object per line.

  Args:
    path: the file.
    id_field: field of a line with the id, text or a whole number.
    text_fields: fields of a line whose texts are joined, one per line; they may be missing or null.

  Raises:
    InputError: the file cannot be read, or a value in it is wrong.
  """
  path = Path(path)
  if tables.kind(path) in ('.jsonl', '.ndjson'):
    pairs = []
    for place, row in json_lines.read(path):
      where = f'{place.path}, line {place.number}'
      if id_field not in row:
        raise InputError(
          f'{where}: has no field {id_field!r}, only {", ".join(row)}; say with --id_field which'
          ' holds the id'
        )
      pairs.append((where, row[id_field], [row.get(field) for field in text_fields]))
    for number, field in enumerate(text_fields):
      if pairs and all(parts[number] is None for _, _, parts in pairs):
        raise InputError(
          f'{path}: no line has a {field!r}; say with --text_field where the text is'
        )
  else:
    content = raw_files.read_bytes(path)
    try:
      found = json.loads(content, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
      raise InputError(
        f'{path}: is no JSON ({error}); write {{"<id>": "text", ...}}, or call a file with an'
        ' object a line .jsonl'
      ) from error
    if not isinstance(found, list) or not all(isinstance(pair, tuple) for pair in found):
      raise InputError(f'{path}: must hold one object {{"<id>": "text", ...}}')
    pairs = [(str(path), name, [text]) for name, text in found]
  texts: dict[str, str] = {}
  for where, name, parts in pairs:
    if isinstance(name, bool) or not isinstance(name, str | int):
      raise InputError(f'{where}: the id {name!r} is neither text nor a whole number; correct it')
    for part in parts:
      if not isinstance(part, str | None):
        raise InputError(
          f'{where}: the text of {name!r} is {str(part)[:40]!r}, no text; correct it'
        )
    if str(name) in texts:
      raise InputError(f'{where}: {name!r} is there twice; remove one of the two')
    texts[str(name)] = '\n'.join(filter(None, (known_text(part or '') for part in parts)))
  if not texts:
    raise InputError(f'{path}: no texts in it; export it again')
  return texts


def write_json(data_dir: str | Path, kind: str, path: str | Path) -> int:
  """Exports all texts as `{"<id>": "text"}`, with the dataset's descriptions; returns the number.

  Raises:
    InputError: there are no texts, or the file cannot be written.
  """
  path = Path(path)
  texts = {row['original_id']: row['text'] for row in iterate_texts(data_dir, kind) if row['text']}
  with files.disk_errors(path, '--export'):
    files.write_file(path, json.dumps(texts, indent=2, ensure_ascii=False) + '\n')
  return len(texts)


def _check_split(data_dir: str | Path, info: dict[str, Any], origin: Mapping[str, Any]) -> None:
  name = origin['split_name']
  if name not in info['splits']:
    raise InputError(
      f'data_dir {data_dir}: has no split {name!r}, only {", ".join(info["splits"])}'
    )
  if info['splits'][name]['hash'] != origin['split_hash']:
    raise InputError(
      f'data_dir {data_dir}: the texts are of the split {name} {origin["split_hash"]}, but the'
      f' dataset has {info["splits"][name]["hash"]}; write them from this dataset'
    )


def _rows(
  data_dir: str | Path, kind: str, texts: Mapping[str, str], source: str, counts: Counter
) -> Iterator[dict[str, Any]]:
  """Yields one row per item or user; `counts` is complete after the last one."""
  if kind == 'item':
    own = ((item['original_id'], item['description']) for item in iterate_items(data_dir))
  else:
    own = ((name, '') for name in read_interactions(data_dir).user_ids)
  counts['unknown_ids'] = len(texts)
  for name, description in own:
    given = texts.get(name)
    counts['unknown_ids'] -= given is not None
    text, its_source = known_text(given or ''), source
    if not text:
      text, its_source = known_text(description), 'dataset'
    counts[its_source if text else 'without_text'] += 1
    yield {
      'original_id': name,
      'text': text,
      'sentences': sentences.split(text),
      'source': its_source if text else '',
    }


def _check_counts(
  data_dir: str | Path, kind: str, texts: Mapping[str, str], counts: Counter
) -> None:
  if texts and counts['unknown_ids'] == len(texts):
    raise InputError(
      f'data_dir {data_dir}: has no {kind} {next(iter(texts))!r}, nor any other of the'
      f' {len(texts):,} ids with a text; give texts by the ids of the raw data'
    )
  if set(counts) <= {'without_text', 'unknown_ids'}:
    raise InputError(f'data_dir {data_dir}: there is no text about any {kind}; nothing is written')

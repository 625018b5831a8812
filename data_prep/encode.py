"""Encodes texts, pictures, sounds and others of a prepared dataset into token embeddings.

  python -m data_prep.encode --data_dir=data/shop
  python -m data_prep.encode --data_dir=data/shop --modality=text,image --encoder=hashing,color
  python -m data_prep.encode --data_dir=data/shop --modality=image --encoder=facebook/dinov2-small
  python -m data_prep.encode --data_dir=data/shop --modality=audio --files=sounds/
  python -m data_prep.encode --data_dir=data/shop --modality=video --files=trailers/
  python -m data_prep.encode --data_dir=data/shop --modality=graph --files=triples.csv
  python -m data_prep.encode --data_dir=data/shop --modality=scent --import=scent.npz
  python -m data_prep.encode --data_dir=data/shop --modality=attributes --import=items.csv \\
    --columns=brand,categories

Without --modality the texts and pictures that the items have are encoded. --files is a folder of
sounds or videos, each named by the original id of its item (7.mp3), or a table of the triples of a
knowledge graph (head, relation, tail). The embeddings are written to features/item/MODALITY and
features/user/MODALITY of the dataset. If the command is stopped, the same command continues its
work. See docs/embeddings.md.
"""

import argparse
import copy
import os
import re
import shutil
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import sources
from data_prep.embeddings import (
  attribute_tokens,
  feature_files,
  graph_tokens,
  imported_tokens,
  picture_tokens,
  shard_files,
  sound_tokens,
  text_tokens,
  video_tokens,
)
from data_prep.flags import Parser
from data_prep.prepared import content
from data_prep.prepared.content import IMAGE, TEXT
from ur4rec_jax import files
from ur4rec_jax.data.dataset import iterate_items, read_info, texts_origin
from ur4rec_jax.data.features import load_features, read_features_info
from ur4rec_jax.data.original_ids import read_ids
from ur4rec_jax.encoders import pictures, projection, sounds, text
from ur4rec_jax.errors import InputError, InterruptedBySignal, exit_on_reported_error, say

_KINDS = {'item': ('item',), 'user': ('user',), 'both': ('item', 'user')}
AUDIO, VIDEO, GRAPH = 'audio', 'video', 'graph'
_OF_FILES = (AUDIO, VIDEO, GRAPH)
# Flags that only some modalities use, and what these are.
_USES = {
  'max_tokens': ((TEXT, *_OF_FILES), 'texts, sounds, videos and graphs'),
  'max_seconds': ((AUDIO, VIDEO), 'sounds and videos'),
  'grid': ((IMAGE,), 'pictures'),
  'layer': ((IMAGE, AUDIO, VIDEO), 'pretrained models of pictures, videos and sounds'),
}
_MOST_REASONS = 5
_MOST_COMPARED = 100_000  # Larger catalogues show neighbours only on request.


def encode(data_dir: str | Path, of: str, flags: argparse.Namespace) -> tuple[dict[str, Any], bool]:
  """Encodes the features of one modality.

  Args:
    data_dir: a prepared folder.
    of: `item` or `user`.
    flags: parsed command line.

  Returns:
    The content of info.json, and whether it is new.

  Raises:
    InputError: something cannot be read, encoded or written; existing features stay as they were.
  """
  data_dir = Path(os.path.realpath(data_dir))
  dataset = read_info(data_dir)
  target = data_dir / 'features' / of / flags.modality
  scratch = files.draft_path(target)
  form = feature_files.Form(
    flags.dtype, flags.width, flags.whiten, flags.normalise, flags.rows_per_shard
  )
  with files.disk_errors(target):
    files.clean_up(target)
  try:
    source = _source(data_dir, dataset, of, flags, scratch)
    about = {
      'of': of,
      'modality': flags.modality,
      'ids_sha256': dataset['ids_sha256'][f'{of}s'],
      **source.info,
    }
    fitted = _items_projection(data_dir, flags.modality, form, source) if of == 'user' else None
    return feature_files.write(
      target,
      source._replace(info=about),
      form,
      projection=fitted,
      earlier=feature_files.find_earlier(data_dir, of, flags.modality),
      overwrite=flags.overwrite,
    )
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _source(
  data_dir: Path, dataset: dict[str, Any], of: str, flags: argparse.Namespace, scratch: Path
) -> feature_files.Source:
  if flags.file is not None:
    about: dict[str, Any] = {}
    if of == 'user':
      record = dataset['splits'].get(flags.split)
      if record is None:
        raise InputError(
          f'--split={flags.split}: must name the split whose training part the features of users'
          f' were made from, one of {", ".join(dataset["splits"])}'
        )
      if flags.hold_back is None or not 0 <= flags.hold_back <= 1:
        raise InputError(
          f"--hold_back={flags.hold_back}: must say which share, 0 to 1, of each user's training"
          ' interactions, the latest, the features were not made from'
        )
      about |= {'split_name': flags.split, 'split_hash': record['hash']}
      about['hold_back'] = flags.hold_back
    if flags.columns is None:
      source, unknown = imported_tokens.source(data_dir, of, flags.file, flags.ids, scratch)
    else:
      columns = [name.strip() for name in flags.columns.split(',')]
      source, unknown = attribute_tokens.source(
        data_dir, of, flags.file, columns, flags.item_id_column
      )
    return source._replace(info=source.info | about | {'unknown_ids': unknown})
  if flags.modality == TEXT:
    return text_tokens.source(data_dir, of, _text_encoder(flags), flags.max_tokens)
  if flags.modality == IMAGE:
    return picture_tokens.source(data_dir, _picture_encoder(flags, flags.grid), flags.workers)
  if flags.modality == GRAPH:
    return graph_tokens.source(data_dir, flags.files, _text_encoder(flags), flags.max_tokens)
  read = (flags.max_tokens, flags.max_seconds, flags.workers)
  if flags.modality == VIDEO:
    return video_tokens.source(data_dir, flags.files, _picture_encoder(flags, 0), *read)
  return sound_tokens.source(data_dir, flags.files, _sound_encoder(flags), *read)


def _text_encoder(flags: argparse.Namespace) -> text.Encoder:
  name = flags.encoder or text.DEFAULT
  if name == text.HASHING:
    return text.hashing()
  return text.sentence_transformer(name, flags.device, flags.precision, flags.batch_size)


def _picture_encoder(flags: argparse.Namespace, grid: int) -> pictures.Encoder:
  name = flags.encoder or pictures.DEFAULT
  if name == pictures.COLOR:
    return pictures.color(grid)
  place = (flags.device, flags.precision, flags.batch_size)
  return pictures.vision_model(name, grid, flags.layer, *place)


def _sound_encoder(flags: argparse.Namespace) -> sounds.Encoder:
  name = flags.encoder or sounds.DEFAULT
  if name == sounds.SPECTRUM:
    return sounds.spectrum()
  return sounds.sound_model(name, flags.layer, flags.device, flags.precision)


def _items_projection(
  data_dir: Path, modality: str, form: feature_files.Form, source: feature_files.Source
) -> projection.Projection | None:
  """Loads the projection of the items' features, so that users get into the same space."""
  if not form.projects:
    return None
  folder = data_dir / 'features' / 'item' / modality
  way_out = f'encode the items first: --of=item --modality={modality}, with the same flags'
  info = read_features_info(folder, way_out)
  wanted = {
    'encoder': source.info['encoder'],
    'width': form.width or source.width,
    'is_whitened': form.whiten,
    'is_normalised': form.normalise,
  }
  for name, value in wanted.items():
    if info['projection'] is None or info[name] != value:
      raise InputError(f'{folder}: was made with another {name}; {way_out}')
  return projection.load(folder, info['projection'])


def _mock_texts(data_dir: str | Path, of: str) -> str:
  """Names the texts that are not the dataset's own descriptions."""
  own = texts_origin(data_dir, of)['counts'].get('dataset', 0)
  return f'the texts of all {of}s but {own:,}' if own else 'the texts'


def summary(
  info: dict[str, Any], seconds: float | None, data_dir: str | Path, neighbours: list[str]
) -> str:
  """Formats a summary for the user.

  Args:
    info: the content of info.json.
    seconds: how long it took; None if the features were there already.
    data_dir: the prepared folder.
    neighbours: the lines of `nearest`.
  """
  of, counts, encoder = info['of'], info['counts'], info['encoder']
  place = Path(data_dir) / 'features' / of / info['modality']
  notes = ['built in, for trying things out'] if encoder['is_builtin'] else []
  if info['is_mock']:
    notes.append(f'{_mock_texts(data_dir, of)} are made up by the mock writer')
  shown = ('layer', 'token_0', 'precision')
  details = [f'{name} {encoder[name]}' for name in shown if name in encoder]
  done = 'already in' if seconds is None else 'written to'
  rows = [
    ('features', f'{of} {info["modality"]}, {done} {place}'),
    ('encoder', ', '.join([encoder['name'], *details, *notes])),
    (f'{of}s', f'{info["rows"]:,}: {counts["with"]:,} with, {counts["without"]:,} without'),
  ]
  for reason, record in list(info['masked'].items())[:_MOST_REASONS]:
    rows.append(('- without', f'{record["rows"]:,}: {reason}; first {of} {record["first"]!r}'))
  if counts['without']:
    rows.append(('- all', str(place / feature_files.MASKED)))
  if reused := counts.get('reused'):
    rows.append(('- known', f'{reused:,} rows of the version before are used again'))
  if info.get('unknown_ids'):
    rows.append(('unknown', f'{info["unknown_ids"]:,} ids of the file are not in the dataset'))
  rows.append(
    (
      'tokens',
      f'{info["tokens"]} a row at most, {counts["tokens"] / counts["with"]:.1f} on average;'
      f' {info["width"]} {info["dtype"]} each',
    )
  )
  if info['projection']:
    rows.append(
      (
        'projection',
        f'from {info["encoded_width"]} to {info["width"]}'
        f'{", whitened" if info["is_whitened"] else ""}: keeps'
        f' {info["projection"]["explained_variance"]:.1%} of the variance',
      )
    )
  rows += [
    (
      'storing',
      f'{counts["bytes"] / 1e6:,.1f} MB; relative squared error {info["storage_error"]:.1e}',
    ),
    ('fingerprint', info['fingerprint'][:16]),
    *((('time', f'{seconds:.1f} s, {info["rows"] / seconds:,.1f} {of}s/s'),) if seconds else ()),
    *(('neighbours', line) for line in neighbours),
  ]
  return '\n'.join(f'{name:<14} {value}' for name, value in rows)


def _next_command(data_dir: str | Path, modality: str) -> str:
  """Returns the command that trains with the features of items, of which one kind is the latest."""
  here = {path.name for path in (Path(data_dir) / 'features' / 'item').iterdir()}
  variant = 'multimodal' if {TEXT, IMAGE} <= here else 'text'
  is_alone = TEXT not in here or modality not in (TEXT, IMAGE)
  return sources.training_command(
    read_info(data_dir), data_dir, variant, modality if is_alone else None
  )


def nearest(data_dir: str | Path, modality: str, wanted: str | None) -> list[str]:
  """Lists the five items with the most similar features, by the cosine of token 0.

  Args:
    data_dir: a prepared folder.
    modality: name of the features.
    wanted: original ids, see `read_ids`; None takes the first three items with features.

  Raises:
    InputError: an item is not in the dataset.
  """
  features = load_features(data_dir, 'item', modality)
  if wanted is None and features.shape[0] > _MOST_COMPARED:
    return []
  items = list(iterate_items(data_dir))
  labels = {item['original_id']: at for at, item in enumerate(items)}
  vectors = np.zeros((len(items), features.shape[2]), np.float32)
  for start in range(0, len(items), 4096):
    part = np.arange(start, min(start + 4096, len(items)))
    tokens, mask = features.rows(part)
    vectors[part] = tokens[:, 0] * mask[:, :1]
  vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
  is_there = np.asarray(vectors.any(1))
  if wanted is None:
    ids = [items[at]['original_id'] for at in np.flatnonzero(is_there)[:3]]
  else:
    ids = read_ids(wanted, labels)
  lines = []
  for name in ids:
    if name not in labels:
      raise InputError(f'--neighbours: {name!r} is no item of {data_dir}; give original ids')
    at = labels[name]
    title = lambda i: items[i]['title'] or items[i]['original_id']
    if not is_there[at]:
      lines.append(f'{title(at)}: has no features')
      continue
    scores = np.where(is_there, vectors @ vectors[at], -np.inf)
    scores[at] = -np.inf
    best = [i for i in np.argsort(-scores, kind='stable')[:5] if np.isfinite(scores[i])]
    lines.append(f'{title(at)}: ' + ', '.join(f'{title(i)} {scores[i]:.2f}' for i in best))
  return lines


def _flags() -> Parser:
  parser = Parser(__doc__)
  add = parser.add_argument
  add('--data_dir', required=True, help='folder of the prepared dataset')
  add(
    '--modality',
    help='text, image, or both with a comma between them; audio, video or graph with --files; with'
    ' --import any name; without it the texts and pictures that the items have',
  )
  add(
    '--of',
    choices=_KINDS,
    help='whose features; without it those of items, and of users if there are texts about them',
  )
  add(
    '--encoder',
    help='folder or hub name of a model, or a built-in encoder: hashing (texts and graphs), color'
    f' (pictures and videos), spectrum (sounds); without it {text.DEFAULT}, {pictures.DEFAULT} or'
    f' {sounds.DEFAULT}; one for each modality, with commas between',
  )
  add(
    '--max_tokens',
    type=int,
    default=8,
    help='most sentences of a text, parts of a sound, frames of a video or neighbours in a graph'
    ' that get a token',
  )
  add(
    '--files',
    help='folder of sounds or videos, each named by the original id of its item; for graph a table'
    ' of triples: head, relation, tail',
  )
  add(
    '--max_seconds',
    type=float,
    default=60.0,
    help='seconds at the beginning of a sound or video that are read',
  )
  add('--grid', type=int, default=3, help='parts per side of a picture; 0: only the whole picture')
  add('--layer', help='layer of a model of pictures or sounds: projected, last, or e.g. -2')
  add('--import', dest='file', help='.npz, .npy or .safetensors file with features made elsewhere')
  add(
    '--columns',
    help='columns with names and numbers to encode, if --import is a table (.csv, .tsv, .parquet or'
    ' .jsonl)',
  )
  add(
    '--item_id_column',
    help='column of ids in that table; without it the usual names work',
  )
  add('--ids', help='file with one original id per line, for an --import without ids')
  add(
    '--split',
    help='with --import and --of=user: the split that the features were made for',
  )
  add(
    '--hold_back',
    type=float,
    help="with --split: the share of each user's training interactions, the latest ones, that the"
    ' features were not made from',
  )
  add('--width', type=int, help='project to this many dimensions, by PCA fitted to the items')
  add('--whiten', action='store_true', help='give all directions the same variance')
  add('--normalise', action='store_true', help='scale every token to length 1')
  add('--dtype', choices=shard_files.DTYPES, default='float16', help='type of the stored tokens')
  add('--batch_size', type=int, default=64, help='texts, pictures or frames encoded at once')
  add(
    '--precision',
    choices=('auto', 'float32', 'bfloat16'),
    default='auto',
    help='type of the computation; auto: bfloat16 on GPUs that support it',
  )
  add('--device', help='torch devices, separated by commas; without it all GPUs, or the CPU')
  add(
    '--workers',
    type=int,
    default=min(8, (os.cpu_count() or 1) - 1),
    help='processes that decode files; 0: decode in the main process',
  )
  add('--rows_per_shard', type=int, help='rows per file; a killed program loses at most one file')
  add('--neighbours', help='original ids, separated by commas, whose nearest items are shown')
  add(
    '--overwrite',
    action='store_true',
    help='replace features of other settings or inputs',
  )
  return parser


def _of_each_modality(flags: argparse.Namespace) -> list[argparse.Namespace]:
  """Returns the flags of each modality."""
  if flags.modality is not None:
    names = [name.strip() for name in flags.modality.split(',')]
  elif flags.file is not None:
    raise InputError('--import: needs --modality, a name for the features')
  else:
    names = content.modalities(flags.data_dir)
    if not names:
      raise InputError(
        f'--data_dir={flags.data_dir}: its items have no texts and no pictures; build it with an'
        ' item table, or --import features'
      )
  if flags.encoder is None:
    encoders = [None] * len(names)
  elif len(names) == 1:
    encoders = [flags.encoder]
  else:
    encoders = [name.strip() for name in flags.encoder.split(',')]
  given = (
    ('encoder', True, len(encoders)),
    ('import', flags.file is not None, 1),
    ('files', flags.files is not None, 1),
  )
  for flag, is_given, count in given:
    if is_given and count != len(names):
      raise InputError(
        f'--{flag}: there are {len(names)} modalities ({", ".join(names)}) and {count} for them;'
        ' give one for each, or encode them one after the other'
      )
  found = []
  for name, encoder in zip(names, encoders, strict=True):
    found.append(copy.copy(flags))
    found[-1].modality, found[-1].encoder = name, encoder
  return found


def _check_used(jobs: list[argparse.Namespace], given: Collection[str]) -> None:
  """Raises InputError if the command line has a flag that changes nothing in any of the jobs.

  Flags that only say how to compute, such as --workers, fit everything.

  Args:
    jobs: see `_of_each_modality`.
    given: names of the flags on the command line.
  """
  flags = jobs[0]
  source = 'an --import' if flags.file is not None else ' and '.join(job.modality for job in jobs)
  for name, (modalities, what) in _USES.items():
    encoded = [job for job in jobs if job.file is None and job.modality in modalities]
    if name == 'layer':  # The built-in encoders have none.
      encoded = [job for job in encoded if job.encoder not in (pictures.COLOR, sounds.SPECTRUM)]
    if name in given and not encoded:
      encoder = f' by {flags.encoder}' if flags.encoder and len(jobs) == 1 else ''
      raise InputError(f'--{name}: is for {what}, not for {source}{encoder}; leave it out')
  if flags.of == 'user' and 'neighbours' in given:
    raise InputError('--neighbours: is for items, and --of=user encodes none; leave it out')
  if flags.file is None:
    return
  if flags.columns is None and 'item_id_column' in given:
    raise InputError(
      '--item_id_column: is for a table, of which --columns are encoded; pass --columns, too, or'
      ' leave it out'
    )
  if flags.columns is not None and 'ids' in given:
    raise InputError(
      '--ids: is for an --import without ids, and a table has a column of them'
      ' (--item_id_column); leave it out'
    )
  for name in ('split', 'hold_back'):
    if flags.of != 'user' and name in given:
      raise InputError(
        f'--{name}: is for --of=user, whose features must not tell of what is held out; leave it'
        ' out, or pass --of=user'
      )


def _check(flags: argparse.Namespace) -> None:
  if not re.fullmatch(r'[a-z0-9][a-z0-9_-]*', flags.modality):
    raise InputError(
      f'--modality={flags.modality}: must be a name of lower-case letters, digits, - and _'
    )
  if flags.file is not None and flags.files is not None:
    raise InputError(
      '--files and --import exclude each other: --files are sounds, videos or triples to encode,'
      ' --import is a file of features made elsewhere; leave one out'
    )
  if flags.file is None and flags.modality not in (TEXT, IMAGE, *_OF_FILES):
    raise InputError(
      f'--modality={flags.modality}: only {", ".join((TEXT, IMAGE, *_OF_FILES))} are encoded here;'
      ' for others pass --import=FILE'
    )
  if flags.file is None and (flags.modality in _OF_FILES) != (flags.files is not None):
    raise InputError(
      f'--modality={flags.modality}: needs --files=FOLDER, or with graph --files=TRIPLES.csv; for'
      ' vectors of your own pass --import=FILE'
      if flags.modality in _OF_FILES
      else f'--files: is about {", ".join(_OF_FILES)}; texts and pictures are in the dataset'
    )
  if not 0 < flags.max_seconds < float('inf'):
    raise InputError(f'--max_seconds={flags.max_seconds}: must be above 0')
  if flags.file is not None and flags.encoder is not None:
    raise InputError('--encoder and --import exclude each other; leave one out')
  about_files = ('ids', 'split', 'hold_back', 'columns', 'item_id_column')
  if flags.file is None and any(getattr(flags, name) is not None for name in about_files):
    raise InputError(
      f'--{", --".join(about_files)} are about --import; pass it too, or leave them out'
    )
  if flags.file is None and flags.modality != TEXT and flags.of in ('user', 'both'):
    what = {IMAGE: 'pictures', AUDIO: 'sounds', VIDEO: 'videos', GRAPH: 'triples'}[flags.modality]
    raise InputError(f'--of: users have no {what}; the model looks at those of their items')
  if flags.file is not None and flags.of == 'both':
    raise InputError('--of=both: import the features of items and of users one after the other')
  least = {'max_tokens': 0, 'grid': 0, 'width': 1, 'batch_size': 1, 'workers': 0}
  for name, lowest in (least | {'rows_per_shard': 1}).items():
    value = getattr(flags, name)
    if value is not None and value < lowest:
      raise InputError(f'--{name} must be {lowest} or more, not {value}')
  if flags.layer is not None and not re.fullmatch(r'projected|last|-?\d+', flags.layer):
    raise InputError(f'--layer={flags.layer}: must be projected, last or a number such as -2')


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, encodes and prints the summary."""
  parser = _flags()
  jobs = _of_each_modality(parser.parse(argv))
  for flags in jobs:
    _check(flags)
  _check_used(jobs, parser.given)
  try:
    for number, flags in enumerate(jobs):
      if number:
        say('')
      _encode_modality(flags)
  except KeyboardInterrupt:
    raise InterruptedBySignal(
      'stopped; finished work is kept, and the same command continues', signal.SIGINT
    ) from None
  if jobs[0].of != 'user':
    say(f'{"next":<14} {_next_command(jobs[-1].data_dir, jobs[-1].modality)}')


def _encode_modality(flags: argparse.Namespace) -> None:
  """Encodes one modality of items, users or both, and prints the summaries."""
  of = flags.of or 'item'
  if not flags.of and flags.file is None and flags.modality == TEXT:
    of = 'both' if (Path(flags.data_dir) / 'user_texts').is_dir() else 'item'
  for kind in _KINDS[of]:
    start = time.monotonic()
    info, is_new = encode(flags.data_dir, kind, flags)
    seconds = time.monotonic() - start if is_new else None
    is_item = kind == 'item'
    lines = nearest(flags.data_dir, flags.modality, flags.neighbours or None) if is_item else []
    say(summary(info, seconds, flags.data_dir, lines))


if __name__ == '__main__':
  main()

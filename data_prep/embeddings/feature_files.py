"""Writes features/OF/MODALITY of a prepared folder, shard by shard, so that it can be resumed.

Unfinished work lies in the folder MODALITY.incomplete beside it: `progress.jsonl` holds the
settings and one line per finished shard, `full/` the shards before the projection, and `ready/` the
final shards. `ready/` becomes the features in one step. If a program is killed, the next one with
the same settings and inputs continues its work.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.embeddings.shard_files import ShardFiles
from ur4rec_jax import files
from ur4rec_jax.data.features import (
  FORMAT_VERSION,
  INFO,
  Features,
  open_features,
  read_features_info,
)
from ur4rec_jax.encoders.projection import Moments, Projection
from ur4rec_jax.encoders.projection import load as load_projection
from ur4rec_jax.errors import InputError

MASKED = 'masked.jsonl'
# Folder of the features of the version of the dataset before this one, as `features` is built.
EARLIER = 'earlier_features'
_PROGRESS = 'progress.jsonl'
_SAME = (
  'of',
  'modality',
  'encoder',
  'tokens',
  'encoded_width',
  'width',
  'dtype',
  'is_whitened',
  'is_normalised',
)  # What must be equal for rows of the version before to be used.
# By default about 256 shards of 256 to 16,384 rows.
_MIN_SHARD, _MAX_SHARD, _USUAL_SHARDS = 256, 16384, 256


class Row(NamedTuple):
  """The input of the encoder for one item or user.

  Attributes:
    id: original id.
    content: input of the encoder; None if there is nothing to encode.
    key: bytes that change when the content changes.
    reason: why there is nothing to encode.
  """

  id: str
  content: Any
  key: bytes = b''
  reason: str = ''


Encode = Callable[
  [list[Row], Callable[[float], object]], tuple[np.ndarray, np.ndarray, dict[int, str]]
]


class Earlier(NamedTuple):
  """Features of the version of the dataset before this one, whose rows need not be encoded again.

  Attributes:
    features: the stored rows.
    reasons: why rows without tokens have none, by id.
  """

  features: Features
  reasons: dict[str, str]

  @property
  def projection(self) -> Projection | None:
    """What the rows were projected with."""
    info = self.features.info
    return load_projection(self.features.folder, info['projection']) if info['projection'] else None

  def is_like(self, source: 'Source', form: 'Form') -> bool:
    """Tells whether the same rows would now be encoded and stored in the same way."""
    info = self.features.info
    here = json.loads(json.dumps(_settings(source, form, None)))
    return all(info.get(name) == here[name] for name in _SAME) and form.rows_per_shard in (
      None,
      info['rows_per_shard'],
    )

  def rows(self, number: int, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask of the first rows of a shard, as many as are the same as before."""
    info, folder = self.features.info, self.features.folder
    records, start = info['shards'], number * info['rows_per_shard']
    count = records[number]['rows'] if number < len(records) else 0
    files_of = ShardFiles(folder, len(records), info['dtype'], str(folder))
    if (
      count > len(rows)
      or not count
      or _inputs_hash(rows[:count]) != records[number]['inputs_sha256']
      or not files_of.is_sound(number, records[number])
    ):
      count = 0
    return self.features.rows(np.arange(start, start + count))


def find_earlier(data_dir: Path, of: str, modality: str) -> Earlier | None:
  """Opens the features of the version before; None if there are none that can be read."""
  folder = data_dir / EARLIER / of / modality
  try:
    info = read_features_info(folder, 'delete it')
    features = open_features(folder, info, 'delete it')
    lines = (folder / MASKED).read_text(encoding='utf-8').splitlines()
    reasons = {record['id']: record['reason'] for record in map(json.loads, lines)}
  except (InputError, OSError, ValueError, LookupError):
    return None
  return Earlier(features, reasons)


class Source(NamedTuple):
  """The rows to encode, and the function that encodes them.

  Attributes:
    name: name of encoder or file, for messages.
    info: origin of the tokens, for info.json.
    total: number of rows.
    tokens: most tokens of a row.
    width: width of a token.
    rows: yields all rows in order.
    encode: takes rows; returns tokens `[n, tokens, width]` float32, their mask `[n, tokens]` bool,
      and by position the reason why a row with content got no token. It reports progress by calling
      its second argument with the number of rows finished since the last call.
  """

  name: str
  info: dict[str, Any]
  total: int
  tokens: int
  width: int
  rows: Callable[[], Iterator[Row]]
  encode: Encode


class Form(NamedTuple):
  """How tokens are stored.

  Attributes:
    dtype: one of `shard_files.DTYPES`.
    width: width after the projection; None keeps the width of the encoder.
    whiten: whether the projection gives all directions the same variance.
    normalise: whether tokens are scaled to length 1 before the projection.
    rows_per_shard: None chooses a number.
  """

  dtype: str = 'float16'
  width: int | None = None
  whiten: bool = False
  normalise: bool = False
  rows_per_shard: int | None = None

  @property
  def projects(self) -> bool:
    return self.width is not None or self.whiten


def write(
  target: Path,
  source: Source,
  form: Form = Form(),
  *,
  projection: Projection | None = None,
  earlier: Earlier | None = None,
  overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
  """Encodes and stores all rows, unless the same features exist already.

  Args:
    target: `features/<of>/<modality>` of a prepared folder.
    source: what to encode.
    form: how to store it.
    projection: fitted projection to use; None fits one to these rows if the form needs it.
    earlier: features of the version before, whose rows and projection are used where they can be.
    overwrite: whether other features may be replaced.

  Returns:
    The content of info.json, and whether the features are new.

  Raises:
    InputError: the folder holds other features, another program is writing them, an encoded value
      is not finite, or the disk fails.
  """
  if form.width is not None and form.width > source.width:
    raise InputError(
      f'--width={form.width}: must be at most {source.width}, the width of {source.name}'
    )
  if earlier is not None and not earlier.is_like(source, form):
    earlier = None
  if earlier is not None:  # Rows keep their places in the shards, and their space.
    form = form._replace(rows_per_shard=earlier.features.info['rows_per_shard'])
    projection = projection or earlier.projection
  settings = _settings(source, form, projection)
  with files.disk_errors(target), _workplace(target) as draft:
    if target.exists() and not overwrite:
      old = _same(target, source, settings)
      shutil.rmtree(draft)
      return old, False
    ready = draft / 'ready'
    count = -(-source.total // settings['rows_per_shard'])
    final = ShardFiles(ready, count, form.dtype, source.name)
    full = ShardFiles(draft / 'full', count, 'float32', source.name) if form.projects else final
    records = _encode(draft, full, source, form, settings, earlier)
    about_projection = None
    if form.projects:
      shutil.rmtree(ready, ignore_errors=True)
      ready.mkdir()
      projection = projection or _fit(full, form)
      projection.save(ready)
      about_projection = projection.info
      records = _project(full, final, records, projection, earlier)
    info = _info(settings, records, about_projection)
    lines = (
      json.dumps({'id': name, 'reason': reason}, ensure_ascii=False) + '\n'
      for record in records
      for name, reason in record['masked']
    )
    with (ready / MASKED).open('w', encoding='utf-8') as file:
      file.writelines(lines)
    text = json.dumps(info, indent=2, ensure_ascii=False) + '\n'
    (ready / INFO).write_text(text, encoding='utf-8')
    files.move_in(ready, target)
    shutil.rmtree(draft)
  return info, True


@contextlib.contextmanager
def _workplace(target: Path) -> Iterator[Path]:
  """Gives the folder of unfinished work, to one program at a time."""
  draft = target.with_name(f'{target.name}.incomplete')
  target.parent.mkdir(parents=True, exist_ok=True)
  taken = f'{target}: another program makes these features now; wait until it ends'
  with files.only_process(target.with_name(f'{target.name}.lock'), taken):
    draft.mkdir(exist_ok=True)
    try:
      yield draft
    finally:
      # A folder with unfinished work is not empty and stays.
      with contextlib.suppress(OSError):
        draft.rmdir()


def _settings(source: Source, form: Form, projection: Projection | None) -> dict[str, Any]:
  """Returns everything that decides what is stored, except the inputs."""
  few = -(-source.total // _USUAL_SHARDS)
  return {
    **source.info,
    'rows': source.total,
    'tokens': source.tokens,
    'encoded_width': source.width,
    'width': form.width or source.width,
    'dtype': form.dtype,
    'is_whitened': form.whiten,
    'is_normalised': form.normalise,
    'projected_as': projection.sha256 if projection else None,
    'rows_per_shard': form.rows_per_shard or min(max(few, _MIN_SHARD), _MAX_SHARD),
  }


def _shards(source: Source, settings: dict[str, Any]) -> Iterator[tuple[list[Row], str]]:
  """Yields the rows of each shard and their hash."""
  rows = source.rows()
  while shard := list(itertools.islice(rows, settings['rows_per_shard'])):
    yield shard, _inputs_hash(shard)


def _inputs_hash(rows: list[Row]) -> str:
  digest = hashlib.sha256()
  for row in rows:
    digest.update(f'{row.reason}\0{len(row.key)}\0'.encode())
    digest.update(row.key)
  return digest.hexdigest()


def _same(target: Path, source: Source, settings: dict[str, Any]) -> dict[str, Any]:
  """Returns the info.json of existing features; InputError if they are other features."""
  way_out = 'pass --overwrite to replace it'
  old = read_features_info(target, way_out)
  for name, value in json.loads(json.dumps(settings)).items():
    if old.get(name) != value:
      raise InputError(
        f'{target}: holds other features: {_difference(name, old.get(name), value)}; {way_out}'
      )
  found = [digest for _, digest in _shards(source, settings)]
  if found != [record['inputs_sha256'] for record in old['shards']]:
    raise InputError(f'{target}: holds features of other inputs, which have changed; {way_out}')
  return old


def _difference(name: str, old: Any, new: Any) -> str:
  if isinstance(old, dict) and isinstance(new, dict):
    name, old, new = next(
      (f'{name}.{key}', old.get(key), new.get(key))
      for key in [*new, *old]
      if old.get(key) != new.get(key)
    )
  return f'its {name} is {old}, asked for is {new}'


def _encode(
  draft: Path,
  store: ShardFiles,
  source: Source,
  form: Form,
  settings: dict[str, Any],
  earlier: Earlier | None,
) -> list[dict[str, Any]]:
  """Encodes and writes the shards that are still missing; returns the records of all shards."""
  done = _progress(draft, settings)
  store.folder.mkdir(exist_ok=True)
  records = []
  label = f'{settings["of"]} {settings["modality"]}'
  with (
    (draft / _PROGRESS).open('a', encoding='utf-8') as log,
    tqdm(
      total=source.total,
      desc=label,
      disable=None,
      # Encoders report parts of a row, and nobody wants to read of 157.538 items.
      bar_format='{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]',
    ) as bar,
  ):
    for number, (rows, digest) in enumerate(_shards(source, settings)):
      record = done.get(number)
      if record and record['inputs_sha256'] == digest and store.is_sound(number, record):
        bar.update(len(rows))
        records.append(record)
        continue
      known, is_known, reasons = _known(earlier, number, rows, source, form)
      count = len(known)
      tokens, mask, more = _encode_rows(source, form, rows[count:], bar.update)
      tokens, mask = np.concatenate([known, tokens]), np.concatenate([is_known, mask])
      reasons |= {at + count: reason for at, reason in more.items()}
      masked = _check(source, rows, tokens, mask, reasons)
      record = {
        'shard': number,
        'rows': len(rows),
        'inputs_sha256': digest,
        'masked': masked,
        'reused': count,
        **store.write(number, tokens, mask, [row.id for row in rows]),
      }
      log.write(json.dumps(record) + '\n')
      log.flush()
      records.append(record)
      bar.n = round(sum(record['rows'] for record in records))
  stored = sum(record['rows'] for record in records)
  if stored != source.total:
    raise InputError(f'{source.name}: gives {stored:,} {settings["of"]}s, not {source.total:,}')
  if not any(record['filled'] for record in records):
    reason, record = next(iter(_masked(records).items()))
    raise InputError(
      f'{source.name}: no {settings["of"]} has anything to encode, so nothing is written'
      f' ({record["rows"]:,}: {reason}, first {record["first"]!r})'
    )
  return records


def _encode_rows(
  source: Source, form: Form, rows: list[Row], advance: Callable[[float], object]
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  """Encodes rows, see `Source.encode`, and normalises them if the form says so."""
  if not rows:
    return _no_rows(source)
  tokens, mask, reasons = source.encode(rows, advance)
  if form.normalise:
    lengths = np.linalg.norm(tokens, axis=-1, keepdims=True)
    tokens = np.divide(tokens, lengths, out=np.zeros_like(tokens), where=lengths > 0)
  return tokens, mask, reasons


def _no_rows(source: Source) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  shape = 0, source.tokens, source.width
  return np.zeros(shape, np.float32), np.zeros(shape[:2], bool), {}


def _known(
  earlier: Earlier | None, number: int, rows: list[Row], source: Source, form: Form
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  """Returns what `_encode_rows` would of the rows of a shard that need not be encoded.

  If the stored rows are projected, ones stand for their tokens until `_project` puts them in.
  """
  if earlier is None:
    return _no_rows(source)
  tokens, mask = earlier.rows(number, rows)
  if form.projects:
    tokens = np.broadcast_to(mask[..., None], (*mask.shape, source.width)).astype(np.float32)
  reasons = {at: earlier.reasons.get(row.id, '') for at, row in enumerate(rows[: len(mask)])}
  return tokens, mask, reasons


def _masked(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Counts rows without tokens by reason, the most frequent first, each with its first id."""
  found: dict[str, dict[str, Any]] = {}
  for name, reason in itertools.chain.from_iterable(record['masked'] for record in records):
    found.setdefault(reason, {'rows': 0, 'first': name})['rows'] += 1
  return dict(sorted(found.items(), key=lambda pair: -pair[1]['rows']))


def _progress(draft: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
  """Returns the finished shards of an earlier run; removes them if its settings were different."""
  lines = []
  with contextlib.suppress(FileNotFoundError):
    for line in (draft / _PROGRESS).read_bytes().split(b'\n'):
      with contextlib.suppress(ValueError):  # A killed program may leave half a line.
        lines.append(json.loads(line))
  if lines and lines[0] == {'settings': json.loads(json.dumps(settings))}:
    return {record['shard']: record for record in lines[1:]}
  for path in draft.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  (draft / _PROGRESS).write_text(json.dumps({'settings': settings}) + '\n', encoding='utf-8')
  return {}


def _check(
  source: Source,
  rows: list[Row],
  tokens: np.ndarray,
  mask: np.ndarray,
  reasons: dict[int, str],
) -> list[tuple[str, str]]:
  """Masks zero tokens, in place, and refuses values that are not finite.

  Returns:
    Id and reason of each row without a token.
  """
  bad = mask & ~np.isfinite(tokens).all(-1)
  if bad.any():
    row, token = np.argwhere(bad)[0]
    raise InputError(
      f'{source.name}: {source.info["of"]} {rows[row].id!r}, token {token}: has values that'
      ' are not finite; correct or remove it'
    )
  tokens[~mask] = 0
  was_empty = ~np.asarray(mask.any(-1))
  mask &= tokens.any(-1)
  masked = []
  for at in np.flatnonzero(~mask.any(-1)).tolist():
    reason = rows[at].reason or reasons.get(at, '')
    masked.append((rows[at].id, reason if was_empty[at] else 'all values are zero'))
  return masked


def _fit(store: ShardFiles, form: Form) -> Projection:
  moments = Moments()
  for number in range(store.shards):
    moments.add(*store.read(number))
  return moments.projection(form.width, form.whiten, store.origin)


def _project(
  full: ShardFiles,
  ready: ShardFiles,
  records: list[dict[str, Any]],
  projection: Projection,
  earlier: Earlier | None,
) -> list[dict[str, Any]]:
  """Projects all shards of `full` into `ready`; returns their new records."""
  projected = []
  for number, record in enumerate(records):
    tokens, mask = full.read(number)
    few = np.zeros((*mask.shape, projection.width), np.float32)
    few[mask] = projection.apply(tokens[mask])
    if count := record.get('reused', 0):
      assert earlier is not None  # Work that has used it was begun with its projection.
      start = number * earlier.features.info['rows_per_shard']
      few[:count], _ = earlier.features.rows(np.arange(start, start + count))
    names = [f'row {i} of shard {number}' for i in range(len(mask))]
    projected.append({**record, **ready.write(number, few, mask, names)})
  return projected


def _info(
  settings: dict[str, Any],
  records: list[dict[str, Any]],
  about_projection: dict[str, Any] | None,
) -> dict[str, Any]:
  masked = sum(len(record['masked']) for record in records)
  error, total = map(sum, zip(*(record['squares'] for record in records), strict=True))
  inputs = [record['inputs_sha256'] for record in records]
  reused = sum(record.get('reused', 0) for record in records)
  return {
    'format_version': FORMAT_VERSION,
    **settings,
    'fingerprint': hashlib.sha256(
      json.dumps([settings, about_projection, inputs], sort_keys=True).encode()
    ).hexdigest(),
    'counts': {
      'with': settings['rows'] - masked,
      'without': masked,
      'tokens': sum(record['filled'] for record in records),
      'bytes': sum(record['bytes'] for record in records),
      **({'reused': reused} if reused else {}),
    },
    'masked': _masked(records),
    'projection': about_projection,
    'storage_error': error / total,
    'shards': [
      {name: record[name] for name in ('rows', 'inputs_sha256', 'sha256')} for record in records
    ],
  }

"""Encoded rows -> features/<of>/<modality> in a prepared folder, shard by shard.

Work in progress lies in a sibling called MODALITY.incomplete: `progress.jsonl` with the settings
and a line for each shard that is done, `full/` with the shards before they are projected, and
`ready/`, which becomes the features in one step. A killed program's work is taken up again where
settings and inputs are the same.
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

from ur4rec_jax import files
from ur4rec_jax.data.features import FORMAT_VERSION, INFO, decoded, file_name, read_features_info
from ur4rec_jax.encoders.projection import Moments, Projection
from ur4rec_jax.errors import InputError

DTYPES = ('float16', 'float32', 'int8')
MASKED = 'masked.jsonl'
_PROGRESS = 'progress.jsonl'
_MIN_SHARD, _MAX_SHARD, _USUAL_SHARDS = 256, 16384, 256  # Rows, rows, shards.
_LARGEST_FLOAT16 = 65504


class Row(NamedTuple):
  """What is known of one item or user.

  Attributes:
    id: original id.
    content: what the encoder reads, None where there is nothing.
    key: changes with the content.
    reason: why there is nothing.
  """

  id: str
  content: Any
  key: bytes = b''
  reason: str = ''


class Source(NamedTuple):
  """What is encoded, and how.

  Attributes:
    name: of encoder or file, for messages.
    info: what info.json is to say of where the tokens come from.
    count: how many rows there are.
    tokens: how many tokens a row has at most.
    width: of a token.
    rows: gives all rows in order.
    encode: turns rows into `[n, tokens, width]` float32 and `[n, tokens]` bool, and says, by
      position, why rows with content got no token; calls its second argument with the number of
      rows that are done since it was last called.
  """

  name: str
  info: dict[str, Any]
  count: int
  tokens: int
  width: int
  rows: Callable[[], Iterator[Row]]
  encode: Callable[
    [list[Row], Callable[[float], object]], tuple[np.ndarray, np.ndarray, dict[int, str]]
  ]


class Form(NamedTuple):
  """How tokens are stored.

  Attributes:
    dtype: one of `DTYPES`.
    width: what the tokens are projected to, None to leave them as they are.
    whiten: whether all directions get the same variance.
    normalise: whether tokens get length 1, before they are projected.
    rows_per_shard: None for a usual number.
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
  overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
  """Encodes and stores all rows, unless that has been done.

  Args:
    target: `features/<of>/<modality>` of a prepared folder.
    source: what to encode.
    form: how to store it.
    projection: to use instead of fitting one to these rows.
    overwrite: whether features made otherwise may be replaced.

  Returns:
    The content of info.json, and whether it is new.

  Raises:
    InputError: other features are there, another program makes them now, what is encoded is
      not finite, or the disk fails.
  """
  if form.width is not None and form.width > source.width:
    raise InputError(
      f'--width={form.width}: must be at most {source.width}, the width of {source.name}'
    )
  settings = _settings(source, form, projection)
  with files.disk_errors(target), _workplace(target) as draft:
    if target.exists() and not overwrite:
      old = _same(target, source, settings)
      shutil.rmtree(draft)
      return old, False
    store = draft / ('full' if form.projects else 'ready')
    records = _encode(draft, store, source, form, settings)
    ready = draft / 'ready'
    about_projection = None
    if form.projects:
      shutil.rmtree(ready, ignore_errors=True)
      ready.mkdir()
      projection = projection or _fit(store, records, form, source.name)
      projection.save(ready)
      about_projection = projection.info
      records = _project(store, ready, records, projection, form, source.name)
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
  """Gives the folder of work in progress, to one program at a time."""
  draft = target.with_name(f'{target.name}.incomplete')
  target.parent.mkdir(parents=True, exist_ok=True)
  taken = f'{target}: another program makes these features now; wait until it ends'
  with files.only_process(target.with_name(f'{target.name}.lock'), taken):
    draft.mkdir(exist_ok=True)
    try:
      yield draft
    finally:
      with contextlib.suppress(OSError):  # It stays if there is work in it.
        draft.rmdir()


def _settings(source: Source, form: Form, projection: Projection | None) -> dict[str, Any]:
  """All that decides what is stored, but for the inputs."""
  few = -(-source.count // _USUAL_SHARDS)
  return {
    **source.info,
    'rows': source.count,
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
  """Gives the rows of each shard and a hash of them."""
  rows = source.rows()
  while shard := list(itertools.islice(rows, settings['rows_per_shard'])):
    digest = hashlib.sha256()
    for row in shard:
      digest.update(f'{row.reason}\0{len(row.key)}\0'.encode())
      digest.update(row.key)
    yield shard, digest.hexdigest()


def _same(target: Path, source: Source, settings: dict[str, Any]) -> dict[str, Any]:
  """The info.json that is there, given that it is what would be made."""
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
  draft: Path, store: Path, source: Source, form: Form, settings: dict[str, Any]
) -> list[dict[str, Any]]:
  """Writes the shards that are not there yet; returns what is known of each one."""
  done = _progress(draft, settings)
  store.mkdir(exist_ok=True)
  dtype = 'float32' if form.projects else form.dtype
  count = -(-source.count // settings['rows_per_shard'])
  records = []
  label = f'{settings["of"]} {settings["modality"]}'
  with (
    (draft / _PROGRESS).open('a', encoding='utf-8') as log,
    tqdm(total=source.count, desc=label, unit=f' {settings["of"]}', disable=None) as bar,
  ):
    for number, (rows, digest) in enumerate(_shards(source, settings)):
      record = done.get(number)
      if record and record['inputs_sha256'] == digest and _is_sound(store, record, number, count):
        bar.update(len(rows))
        records.append(record)
        continue
      tokens, mask, reasons = source.encode(rows, bar.update)
      if form.normalise:
        lengths = np.linalg.norm(tokens, axis=-1, keepdims=True)
        tokens = np.divide(tokens, lengths, out=np.zeros_like(tokens), where=lengths > 0)
      masked = _check(source, settings['of'], rows, tokens, mask, reasons)
      record = {
        'shard': number,
        'rows': len(rows),
        'inputs_sha256': digest,
        'masked': masked,
        **_store(store, number, count, tokens, mask, dtype, source.name, [row.id for row in rows]),
      }
      log.write(json.dumps(record) + '\n')
      log.flush()
      records.append(record)
      bar.n = round(sum(record['rows'] for record in records))
  stored = sum(record['rows'] for record in records)
  if stored != source.count:
    raise InputError(f'{source.name}: gives {stored:,} {settings["of"]}s, not {source.count:,}')
  if not any(record['filled'] for record in records):
    reason, record = next(iter(_masked(records).items()))
    raise InputError(
      f'{source.name}: no {settings["of"]} has anything to encode, so nothing is written'
      f' ({record["rows"]:,}: {reason}, first {record["first"]!r})'
    )
  return records


def _masked(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """By reason, the most frequent first: how many rows are without a token, and the first id."""
  found: dict[str, dict[str, Any]] = {}
  for name, reason in itertools.chain.from_iterable(record['masked'] for record in records):
    found.setdefault(reason, {'rows': 0, 'first': name})['rows'] += 1
  return dict(sorted(found.items(), key=lambda pair: -pair[1]['rows']))


def _progress(draft: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
  """What an earlier run with the same settings has done, by shard; else removes it."""
  lines = []
  with contextlib.suppress(FileNotFoundError):
    for line in (draft / _PROGRESS).read_bytes().split(b'\n'):
      with contextlib.suppress(ValueError):  # Half a line of a killed program.
        lines.append(json.loads(line))
  if lines and lines[0] == {'settings': json.loads(json.dumps(settings))}:
    return {record['shard']: record for record in lines[1:]}
  for path in draft.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  (draft / _PROGRESS).write_text(json.dumps({'settings': settings}) + '\n', encoding='utf-8')
  return {}


def _is_sound(store: Path, record: dict[str, Any], number: int, count: int) -> bool:
  try:
    return all(
      _file_sha256(store / file_name(kind, number, count)) == wanted
      for kind, wanted in record['sha256'].items()
    )
  except OSError:
    return False


def _check(
  source: Source,
  of: str,
  rows: list[Row],
  tokens: np.ndarray,
  mask: np.ndarray,
  reasons: dict[int, str],
) -> list[tuple[str, str]]:
  """Refuses what is not finite, masks what is zero; returns ids and reasons of rows without token.

  Changes `tokens` and `mask`.
  """
  bad = mask & ~np.isfinite(tokens).all(-1)
  if bad.any():
    row, token = np.argwhere(bad)[0]
    raise InputError(
      f'{source.name}: {of} {rows[row].id!r}, token {token}: has values that are not finite;'
      ' correct or remove it'
    )
  tokens[~mask] = 0
  was_empty = ~mask.any(-1)
  mask &= tokens.any(-1)
  masked = []
  for at in np.flatnonzero(~mask.any(-1)):
    reason = rows[at].reason or reasons.get(at, '')
    masked.append((rows[at].id, reason if was_empty[at] else 'all values are zero'))
  return masked


def _store(
  folder: Path,
  number: int,
  count: int,
  tokens: np.ndarray,
  mask: np.ndarray,
  dtype: str,
  origin: str,
  names: list[str],
) -> dict[str, Any]:
  """Writes the arrays of a shard; returns hashes, sizes and the error made by the dtype."""
  arrays = {'tokens': tokens, 'mask': mask}
  if dtype == 'int8':
    largest = np.abs(tokens).max(-1, initial=0)
    scale = np.minimum(largest / 127, _LARGEST_FLOAT16).astype(np.float16)
    steps = tokens / np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
    arrays |= {'tokens': np.clip(np.rint(steps), -127, 127).astype(np.int8), 'scale': scale}
    stored = decoded(arrays)
    is_lost = (largest / 127 > _LARGEST_FLOAT16) | (mask & ~stored.any(-1))
  else:
    with np.errstate(over='ignore'):
      arrays['tokens'] = stored = tokens.astype(dtype)
    is_lost = ~np.isfinite(stored).all(-1) | (mask & ~stored.any(-1))
  if is_lost.any():
    row, token = np.argwhere(is_lost)[0]
    raise InputError(
      f'{origin}: {names[row]!r}, token {token}: its values, of'
      f' {np.abs(tokens[row, token]).max():.3g} at most, do not fit into {dtype};'
      ' pass --dtype=float32 or --normalise'
    )
  squares = [
    float(np.einsum('ntd,ntd->', array, array, dtype=np.float64))
    for array in (tokens - stored, tokens)
  ]
  record: dict[str, Any] = {'filled': int(mask.sum()), 'squares': squares, 'sha256': {}, 'bytes': 0}
  for kind, array in arrays.items():
    path = folder / file_name(kind, number, count)
    with (part := path.with_suffix('.part')).open('wb') as file:
      np.save(file, array, allow_pickle=False)
    record['sha256'][kind] = _file_sha256(part)
    record['bytes'] += part.stat().st_size
    part.rename(path)
  return record


def _file_sha256(path: Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _full(store: Path, records: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for number in range(len(records)):
    yield tuple(
      np.load(store / file_name(kind, number, len(records)), mmap_mode=mode)
      for kind, mode in (('tokens', 'r'), ('mask', None))
    )


def _fit(store: Path, records: list[dict[str, Any]], form: Form, name: str) -> Projection:
  moments = Moments()
  for tokens, mask in _full(store, records):
    moments.add(tokens, mask)
  return moments.projection(form.width, form.whiten, name)


def _project(
  store: Path,
  ready: Path,
  records: list[dict[str, Any]],
  projection: Projection,
  form: Form,
  name: str,
) -> list[dict[str, Any]]:
  projected = []
  for number, (tokens, mask) in enumerate(_full(store, records)):
    few = np.zeros((*mask.shape, projection.width), np.float32)
    few[mask] = projection.apply(tokens[mask])
    names = [f'row {i} of shard {number}' for i in range(len(mask))]
    stored = _store(ready, number, len(records), few, mask, form.dtype, name, names)
    projected.append({**records[number], **stored})
  return projected


def _info(
  settings: dict[str, Any],
  records: list[dict[str, Any]],
  about_projection: dict[str, Any] | None,
) -> dict[str, Any]:
  masked = sum(len(record['masked']) for record in records)
  error, total = map(sum, zip(*(record['squares'] for record in records), strict=True))
  inputs = [record['inputs_sha256'] for record in records]
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
    },
    'masked': _masked(records),
    'projection': about_projection,
    'storage_error': error / total,
    'shards': [
      {name: record[name] for name in ('rows', 'inputs_sha256', 'sha256')} for record in records
    ],
  }

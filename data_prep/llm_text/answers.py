"""Stores paid answers in append-only JSON lines that survive a kill at any byte.

A store is a folder beside the prepared one, so that rebuilding the data never touches it:

  answers.jsonl   one line per answer
  failed.jsonl    one line per failed request, with the reason
  batches/        unfinished batches, see llm_batch.py
  lock            exists while a process writes
"""

import collections
import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ur4rec_jax import files
from ur4rec_jax.errors import InputError, StorageError

ANSWERS = 'answers.jsonl'
FAILED = 'failed.jsonl'
_LOCK = 'lock'
_SYNC_SECONDS = 1.0  # Answers are forced to the disk once in this time.


class Failures(NamedTuple):
  """Failed attempts of a request without an answer.

  Attributes:
    attempts: number of failures.
    reason: reason of the last failure.
    is_final: whether only --retry_failed repeats the request, since it would likely fail again.
    time: when the last failure was stored, as `utc` writes it.
  """

  attempts: int
  reason: str
  is_final: bool
  time: str


def make_key(provider: str, model: str, parameters: Mapping[str, Any], prompt: Any) -> str:
  """Returns the key of a request: a hash of everything that shapes the answer.

  Args:
    provider: name of the provider, such as `openai`.
    model: the provider's name of the model.
    parameters: other fields of the request.
    prompt: a `prompts.Prompt`; its id does not change the key.
  """
  request = [provider, model, parameters, prompt.version, prompt.system, prompt.text]
  return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def utc(seconds: float) -> str:
  """Writes unix seconds as records have their time; later times are larger texts."""
  return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(seconds))


class Store:
  """Answers and failures by key; memory holds only their positions in the files.

  Attributes:
    unreadable: number of damaged lines, for example cut off by a kill.
    cost: known cost in dollars of all requests of the store.
    versions: number of answers by (provider, model, prompt version).
  """

  def __init__(self, folder: str | Path, read_only: bool = False):
    """Opens or creates a store.

    Args:
      folder: folder of the store.
      read_only: change nothing; works while another process writes.

    Raises:
      InputError: another process writes to the store, or it is not writable.
    """
    self.folder = Path(folder)
    self.unreadable = 0
    self.cost = 0.0
    self.versions: collections.Counter[tuple[Any, Any, Any]] = collections.Counter()
    self._offsets: dict[bytes, int] = {}
    self._failures: dict[bytes, Failures] = {}
    self._files: dict[str, int] = {}
    self._lock = contextlib.ExitStack()
    self._is_dirty = False
    self._synced = time.monotonic()
    if not read_only:
      self._open()
    for offset, record in self._records(ANSWERS):
      self._count_answer(record, offset)
    for _, record in self._records(FAILED):
      self._count_failure(record)

  def __contains__(self, key: str) -> bool:
    return _digest(key) in self._offsets

  def __len__(self) -> int:
    return len(self._offsets)

  def offset(self, key: str) -> int | None:
    """Returns the position of an answer, for `read`; None if there is no answer."""
    return self._offsets.get(_digest(key))

  def read(self, offset: int) -> dict[str, Any]:
    """Returns the record of an answer."""
    with (self.folder / ANSWERS).open('rb') as file:
      file.seek(offset)
      return json.loads(file.readline())

  def failure(self, key: str) -> Failures | None:
    """Returns the failures of a request without an answer; None if it has not failed."""
    return None if key in self else self._failures.get(_digest(key))

  def has_result(self, key: str, since: float) -> bool:
    """Whether there is an answer, or a final failure a second or more after `since`."""
    failure = self.failure(key)
    return key in self or (failure is not None and failure.is_final and failure.time > utc(since))

  def add(self, record: Mapping[str, Any]) -> None:
    """Appends an answer; StorageError if it cannot be written."""
    if record['key'] not in self:
      self._count_answer(record, self._append(ANSWERS, record))

  def add_failure(self, record: Mapping[str, Any]) -> None:
    """Appends a failure with `key`, `reason` and `is_final`; StorageError as in `add`."""
    self._append(FAILED, record)
    self._count_failure(record)

  def sync(self) -> None:
    """Forces written lines to the disk, so that they survive a power cut.

    `add` calls this about once a second.
    """
    if self._is_dirty:
      self._is_dirty = False
      self._synced = time.monotonic()
      for descriptor in self._files.values():
        os.fsync(descriptor)

  def close(self) -> None:
    """Syncs and releases the lock."""
    self.sync()
    for descriptor in self._files.values():
      os.close(descriptor)
    self._lock.close()

  def _open(self) -> None:
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      taken = (
        f'{self.folder}: another process is writing to this store; wait for it, stop it, or give'
        ' another --store'
      )
      self._lock.enter_context(files.only_process(self.folder / _LOCK, taken))
      flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
      self._files = {name: os.open(self.folder / name, flags, 0o644) for name in (ANSWERS, FAILED)}
      for descriptor in self._files.values():
        size = os.fstat(descriptor).st_size
        # Ends a line that a kill has cut off, so that the next record starts on its own line.
        if size and os.pread(descriptor, 1, size - 1) != b'\n':
          _write(descriptor, b'\n')
    except OSError as error:
      raise InputError(
        f'{self.folder}: the store cannot be written ({error.strerror or error}); make it writable'
        ' or give another --store'
      ) from error

  def _records(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    path = self.folder / name
    if not path.exists():
      return
    offset = 0
    with path.open('rb') as file:
      for line in file:
        try:
          record = json.loads(line)
          _digest(record['key'])
          yield offset, record
        except (ValueError, TypeError, LookupError):
          self.unreadable += bool(line.strip())
        offset += len(line)

  def _append(self, name: str, record: Mapping[str, Any]) -> int:
    # Half of a surrogate pair has no UTF-8 form and is replaced.
    line = (json.dumps(record, ensure_ascii=False) + '\n').encode('utf-8', 'replace')
    descriptor = self._files[name]
    offset = os.fstat(descriptor).st_size
    try:
      _write(descriptor, line)
    except OSError as error:
      # Answers of requests that are still open come next, and must not continue half a line.
      with contextlib.suppress(OSError):
        os.ftruncate(descriptor, offset)
      way_out = 'free some space' if error.errno in files.DISK_FULL else 'check the disk'
      raise StorageError(
        f'{self.folder / name}: an answer cannot be written ({error.strerror}); {way_out} and start'
        ' the same command again: all earlier answers are safe'
      ) from error
    self._is_dirty = True
    if time.monotonic() - self._synced > _SYNC_SECONDS:
      self.sync()
    return offset

  def _count_answer(self, record: Mapping[str, Any], offset: int) -> None:
    self._offsets[_digest(record['key'])] = offset
    self.versions[record.get('provider'), record.get('model'), record.get('prompt')] += 1
    self.cost += _cost(record)

  def _count_failure(self, record: Mapping[str, Any]) -> None:
    digest = _digest(record['key'])
    earlier = self._failures.get(digest)
    self._failures[digest] = Failures(
      1 + (earlier.attempts if earlier else 0),
      str(record.get('reason')),
      bool(record.get('is_final')),
      str(record.get('time') or ''),
    )
    self.cost += _cost(record)


def _digest(key: str) -> bytes:
  # Half of the hash is unique enough and takes half the memory.
  return bytes.fromhex(key)[:16]


def _cost(record: Mapping[str, Any]) -> float:
  """Returns the cost of a record; 0 if it is unknown or the nonsense of an earlier version."""
  cost = record.get('cost')
  return float(cost) if isinstance(cost, (int, float)) and 0 <= cost < math.inf else 0.0


def _write(descriptor: int, content: bytes) -> None:
  # os.write may write only a part, for example when the disk fills up.
  while content:
    content = content[os.write(descriptor, content) :]

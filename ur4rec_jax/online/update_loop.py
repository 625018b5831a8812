"""Updates a service again and again: adds events to the data, trains, gates and promotes.

  OUT/watch.json       the number of finished rounds, and the latest model and data
  OUT/000001/          a round: its log of events, data, run and the output of its commands

Each step is a command of its own, as a user would type it, because nothing in this package may
import `data_prep`. Every step can be repeated. So the loop may be killed at any moment, and the
same command goes on with the round that was not done.
"""

import collections
import csv
import dataclasses
import json
import math
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from ur4rec_jax import files
from ur4rec_jax.data.dataset import iterate_items, read_info
from ur4rec_jax.data.raw.interactions import parse_delimiter
from ur4rec_jax.errors import EXIT_CODES, InputError, StorageError, counted, printable, say
from ur4rec_jax.online import tables
from ur4rec_jax.online.events import Event
from ur4rec_jax.online.feedback_store import FeedbackStore, open_store
from ur4rec_jax.runs import processes

STATE = 'watch.json'
GATE = 'gate.json'  # The update writes its verdict here.
_PROMOTED = 'promoted: '  # Start of the line with which an update reports a promotion.
_ROUND, _LOG, _OUTPUT = 'round.json', 'events.csv', 'output.log'
_NOTHING = 'nothing new; waiting'
_POLL_SECONDS = 1.0
_SECONDS_TO_RETRY = 60.0  # Wait after a failed round.
_SECONDS_TO_RESTART = 5.0  # Wait after a failure that a restart may fix at once.
_KEPT_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Watch:
  """The settings of the loop.

  Attributes:
    events: the store of events.
    workdir: the run whose model serves when the loop starts.
    data_dir: the prepared folder that the events are added to.
    out: folder of the rounds.
    registry: folder of served models.
    every_minutes: a round begins after this many minutes, if there are new events.
    every_events: a round begins after this many new events.
    kinds: kinds of events that count if the data have no kinds of their own.
    items: table of new goods, or None.
    encode: flags of `data_prep.encode` that made the embeddings of the data, or None.
    update: further flags of `ur4rec_jax.update`.
    rounds: number of rounds after which the loop ends.
  """

  events: str
  workdir: str
  data_dir: str
  out: pathlib.Path
  registry: str
  every_minutes: float
  every_events: float
  kinds: tuple[str, ...]
  items: str | None = None
  encode: str | None = None
  update: tuple[str, ...] = ()
  rounds: float = math.inf


class _State(NamedTuple):
  """The state after the finished rounds.

  Attributes:
    started: the folders that the loop was started with.
    round: number of finished rounds.
    written: events that the store had received when the latest round began; None before the first.
    workdir: the run of the latest promoted model.
    data_dir: the latest data.
  """

  started: list[str]
  round: int
  written: int | None
  workdir: str
  data_dir: str


class _Stopped(BaseException):
  """The loop was told to stop."""


class _Failed(Exception):
  """A command has failed.

  Attributes:
    code: its exit code.
    command: the command line that repeats it.
    reason: why, in one line.
  """

  def __init__(self, code: int, command: str, reason: str):
    super().__init__(reason)
    self.code, self.command, self.reason = code, command, reason


def run(watch: Watch) -> None:
  """Makes rounds until SIGTERM or Ctrl-C.

  Raises:
    InputError: a folder, the store or an input of a command is wrong.
    BusyError: another process works in the same folder.
  """
  info = read_info(watch.data_dir)
  columns, form = _columns(info, watch), _form(info['options'])
  store = open_store(watch.events)
  with files.disk_errors(watch.out, '--out'):
    watch.out.mkdir(parents=True, exist_ok=True)
  message = f'another process works in {watch.out}; wait until it ends, or give another --out'
  handlers = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    with files.only_process(watch.out / 'lock', message):
      _Loop(watch, store, columns, form).run()
  except _Stopped:
    say('stopped; the same command goes on')
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    store.close()


def _stop(*_: Any) -> None:
  raise _Stopped


class _Loop:
  """The rounds in one folder."""

  def __init__(
    self, watch: Watch, store: FeedbackStore, columns: dict[str, str], form: dict[str, Any]
  ):
    self._watch, self._store, self._columns, self._form = watch, store, columns, form
    self._state = _read_state(watch)
    self._due = time.monotonic() + 60 * watch.every_minutes

  def run(self) -> None:
    """Makes rounds."""
    say(
      f'watching {self._watch.events.rpartition("@")[2].partition("?")[0]}: a round after'
      f' {self._watch.every_events:,g} new events or {self._watch.every_minutes:g} minutes'
    )
    while self._state.round < self._watch.rounds:
      if not (self._folder() / _ROUND).exists():  # Otherwise a stopped round goes on.
        self._wait()
      try:
        self._round()
      except _Failed as failed:
        say(f'round {self._state.round + 1} failed: {failed.reason}', sys.stderr)
        say(f'  to repeat it: {failed.command}', sys.stderr)
        if failed.code == InputError.exit_code:
          raise InputError(
            f'{self._folder() / _OUTPUT}: has what the command said; correct that, and start again'
          ) from failed
        known = EXIT_CODES.get(failed.code)
        seconds = _SECONDS_TO_RESTART if known and known.restart else _SECONDS_TO_RETRY
        say(f'  it is tried again in {seconds:g} s', sys.stderr)
        time.sleep(seconds)
      except StorageError as error:
        say(f'note: {error}', sys.stderr)
        time.sleep(_SECONDS_TO_RESTART)

  def _folder(self) -> pathlib.Path:
    return self._watch.out / f'{self._state.round + 1:06}'

  def _wait(self) -> None:
    """Waits until there is enough for a round."""
    before = self._state.written or 0
    while True:
      is_late = time.monotonic() >= self._due
      try:
        written = self._store.written()
      except StorageError as error:
        say(f'note: {error}', sys.stderr)
        time.sleep(_SECONDS_TO_RESTART)
        continue
      before = min(before, written)  # Somebody may have deleted the latest events.
      if written - before >= self._watch.every_events or (is_late and written > before):
        return
      if is_late:
        say(_NOTHING)
        self._start_clock()
      time.sleep(_POLL_SECONDS)

  def _start_clock(self) -> None:
    self._due = time.monotonic() + 60 * self._watch.every_minutes

  def _round(self) -> None:
    """Makes a round, or finishes a stopped one."""
    started, folder, state = time.monotonic(), self._folder(), self._state
    self._start_clock()
    with files.disk_errors(folder, '--out'):
      written, count = self._write_log(folder)
    if not count:
      self._finish(state._replace(written=written), _NOTHING)
      return
    data, out = folder / 'data', folder / 'run'
    words = ['--append', '--if_new', '--late', f'--data_dir={state.data_dir}', f'--out={data}']
    words += [f'--raw_dir={folder / _LOG}']
    if self._watch.items:
      words.append(f'--items={self._watch.items}')
    if not data.exists():
      self._command('data_prep.build_dataset', *words)
    if not data.exists():
      self._finish(state._replace(written=written), self._nothing_new(folder))
      return
    if self._watch.encode is not None:
      flags = shlex.split(self._watch.encode)
      self._command('data_prep.encode', f'--data_dir={data}', *flags)
    words = [f'--workdir={state.workdir}', f'--data_dir={data}', f'--out={out}']
    words += [f'--registry={self._watch.registry}', *self._watch.update]
    output = self._command('ur4rec_jax.update', *words)
    line = next((x for x in output.splitlines() if x.startswith(_PROMOTED)), None)
    verdict = json.loads((out / GATE).read_text())
    new = state._replace(written=written, data_dir=str(data))
    if line is not None:
      new = new._replace(workdir=str(out))
    (folder / _LOG).unlink(missing_ok=True)  # The data have it, and a deleted user may be in it.
    result = line or f'refused: {"; ".join(verdict["reasons"])}'
    seconds = time.monotonic() - started
    self._finish(
      new, f'{_change(state.data_dir, data)}; {_gains(verdict)}; {result}; {seconds:.0f} s'
    )
    self._remove_old_rounds()

  def _write_log(self, folder: pathlib.Path) -> tuple[int, int]:
    """Writes the log of a round once; returns the events that the store has received, and rows."""
    folder.mkdir(exist_ok=True)
    if not (folder / _ROUND).exists():
      # Counted first, so that an event of this moment counts for the next round, too.
      written = self._store.written()
      count = 0

      def rows() -> Iterator[list[str]]:
        nonlocal count
        for event in self._store.events():
          if (row := self._row(event)) is not None:
            count += 1
            yield row

      tables.write(folder / _LOG, [*self._columns.values()], rows(), **self._form)
      record = {'written': written, 'count': count}
      files.write_file(folder / _ROUND, json.dumps(record) + '\n')
    record = json.loads((folder / _ROUND).read_text())
    return record['written'], record['count']

  def _row(self, event: Event) -> list[str] | None:
    """Returns an event as a row of the log; None if its kind does not count."""
    if event.kind not in self._watch.kinds:
      return None
    # Without quotes no table of the shop can have such an id.
    if 'quoting' in self._form and self._form['delimiter'] in event.user + event.item:
      return None
    row = [event.user, event.item, f'{event.time:.3f}']
    if 'kind' in self._columns:
      row.append(event.kind)
    if 'value' in self._columns:
      if event.value is None:
        return None
      row.append(tables.number_text(event.value))
    return row

  def _nothing_new(self, folder: pathlib.Path) -> str:
    """Says that nothing in a log could be added, and how much of it is of unknown items."""
    with (folder / _LOG).open(newline='', encoding='utf-8') as file:
      rows = csv.DictReader(file, **self._form)
      counts = collections.Counter(row[self._columns['item']] for row in rows)
    total, known = counts.total(), ''
    for item in iterate_items(self._state.data_dir):
      known = item['original_id']
      counts.pop(known, None)
    if not counts:
      return _NOTHING
    unknown = f'{counts.total():,} of {counted(total, "event")}'
    return (
      f'nothing new: {unknown} are of items that the data lack, such as {next(iter(counts))!r},'
      f' where the data have {known!r}; if these are ids of another kind, send the service those of'
      ' the data; waiting'
    )

  def _command(self, module: str, *flags: str) -> str:
    """Runs a command and returns what it has printed.

    Raises:
      _Failed: it failed.
      _Stopped: this process or the command was told to stop.
    """
    path, words = self._folder() / _OUTPUT, [module, *flags]
    command = printable(f'python -m {shlex.join(words)}')
    with path.open('a', encoding='utf-8') as file:
      file.write(f'$ {command}\n')
      file.flush()
      start = file.tell()
      # A group of its own, so that Ctrl-C in a terminal reaches it once, through this process.
      process = subprocess.Popen(
        [sys.executable, '-m', *words], stdout=file, stderr=subprocess.STDOUT, process_group=0
      )
      try:
        code = processes.wait(process)
      except BaseException:  # Told to stop just before it was waited for.
        process.terminate()
        process.wait()
        raise
    with path.open(encoding='utf-8', errors='replace') as file:
      file.seek(start)
      output = file.read()
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP):
      raise _Stopped
    if code:
      raise _Failed(code, command, _reason(code, output))
    return output

  def _finish(self, state: _State, text: str) -> None:
    """Records that a round is done; one without new events leaves no folder."""
    folder = self._folder()
    if state.data_dir != self._state.data_dir:
      state = state._replace(round=self._state.round + 1)
      text = f'round {state.round}: {text}'
    else:
      # Removed first: a killed loop then looks again, and finds nothing again.
      shutil.rmtree(folder, ignore_errors=True)
    self._state = state
    files.write_file(self._watch.out / STATE, json.dumps(state._asdict(), indent=2) + '\n')
    say(text)

  def _remove_old_rounds(self) -> None:
    """Removes old rounds, except those whose model or data are in use."""
    used = {pathlib.Path(x).parent.name for x in (self._state.workdir, self._state.data_dir)}
    for folder in self._watch.out.iterdir():
      number = int(folder.name) if folder.name.isdecimal() else self._state.round
      if number <= self._state.round - _KEPT_ROUNDS and folder.name not in used:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(code: int, output: str) -> str:
  """Returns the last line of a failed command; the meaning of its exit code if it was killed."""
  lines = output.splitlines()
  if lines and code < 128:  # What a killed command said last is not why it failed.
    return printable(lines[-1])
  known = EXIT_CODES.get(code)
  return f'exit code {code}' + (f', {known.meaning}: {known.faults}' if known else '')


def _read_state(watch: Watch) -> _State:
  path = watch.out / STATE
  started = [str(pathlib.Path(x).resolve()) for x in (watch.workdir, watch.data_dir)]
  try:
    state = _State(**json.loads(path.read_text()))
  except FileNotFoundError:
    return _State(started, 0, None, watch.workdir, watch.data_dir)
  except (OSError, ValueError, TypeError) as error:
    raise InputError(f'{path}: cannot be read ({error}); give another --out') from error
  if state.started != started:
    raise InputError(
      f'--out={watch.out}: goes on from other folders, {" and ".join(state.started)}; give those,'
      ' or another --out'
    )
  return state


def _columns(info: dict[str, Any], watch: Watch) -> dict[str, str]:
  """Returns the names of the log's columns, in their order: those of the table of the build.

  Raises:
    InputError: events cannot be added to the data.
  """
  options, where = info['options'], f'--data_dir={watch.data_dir}'
  if info['source'] != 'interactions':
    raise InputError(
      f'{where}: is of --source={info["source"]}; events can be added to a dataset of'
      ' --source=interactions only'
    )
  if not info['has_timestamps']:
    raise InputError(f'{where}: has no times, so that new events cannot be told from old ones')
  if (pathlib.Path(watch.data_dir) / 'features').is_dir() and watch.encode is None:
    raise InputError(
      f'{where}: has embeddings; give --encode with the flags of data_prep.encode that made them'
    )
  name = lambda of: options.get(f'{of}_column') or of
  found = {of: name(of) for of in ('user', 'item', 'time')}
  if options.get('event_column'):
    found['kind'] = options['event_column']
  elif info['has_ratings']:
    found['value'] = name('rating')
  return found


def _form(options: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters of `csv` with which the build reads a log."""
  form = {'delimiter': parse_delimiter(options.get('delimiter')) or ','}
  if options.get('quoting') == 'none':
    form |= {'quoting': csv.QUOTE_NONE, 'quotechar': None}
  return form


def counted_kinds(data_dir: str) -> tuple[str, ...] | None:
  """Returns the kinds of events that a prepared folder counts; None if it has no kinds."""
  info = read_info(data_dir)
  weights = info['options'].get('event_weights')
  if weights:
    return tuple(part.partition('=')[0].strip() for part in weights.split(','))
  return ('rating',) if info['has_ratings'] and not info['options'].get('event_column') else None


def _change(old: str, new: pathlib.Path) -> str:
  before, after = (read_info(folder)['counts'] for folder in (old, new))
  parts = [
    counted(after[f'{noun}s'] - before[f'{noun}s'], f'new {noun}')
    for noun in ('interaction', 'user', 'item')
  ]
  return ', '.join(parts)


def _gains(verdict: dict[str, Any]) -> str:
  return ', '.join(
    f'{name} NDCG@10 {x["before"]:.4f} to {x["after"]:.4f}' for name, x in verdict['groups'].items()
  )

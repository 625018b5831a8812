"""From a table of orders to a page that recommends, in one command.

  ur4rec quick orders.csv
  ur4rec quick orders.csv goods.csv pictures/ --minutes=5

It guesses what the columns mean, builds, encodes texts and pictures, trains for as long as
--minutes allows, compares with simple baselines, exports the best model and serves it. It prints
each command that it runs, so that you can go on from there. If it is stopped, the same command goes
on.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ur4rec_jax.baselines import ACCURACY, WITHOUT_TRAINING, table
from ur4rec_jax.errors import InputError, ReportedError, exit_on_reported_error, printable, say
from ur4rec_jax.files import expand_home, write_file
from ur4rec_jax.runs import processes

if TYPE_CHECKING:
  from ur4rec_jax.data.dataset import Dataset
  from ur4rec_jax.inference.trained import TrainedRecommender

RECORD = 'quick.json'
# Those that settle what tables of shops often have: the messages of the build ask for them.
_BUILD_FLAGS = (
  *('user_column', 'item_column', 'time_column', 'rating_column'),
  *('item_id_column', 'title_column', 'description_column', 'text_columns', 'image_column'),
  *('where', 'event_column', 'event_weights', 'clean_ids', 'drop_duplicates'),
)
_SHARE_OF_CONTENT = 0.6  # Training time of the model with content; the model on ids gets the rest.
_SECONDS_AFTER_TRAINING = 50  # Time to evaluate, export and start the service.
_SECONDS_TO_START = 20  # Time that a training takes to start; it must have more than this left.
_LEAST_SHARE = 0.25  # Least share of the minutes for the first training.
_REPEATS = 0.2  # If the share of repeated test items is larger, seen items are recommended again.
_UNTRAINED = 0.05  # From this share on, test items that never occur in training are told.
_MOST_ITEMS_OF_SOFTMAX = 50_000
_CONTENT = {'text': 'texts', 'image': 'pictures'}
# Texts and pictures that the pretrained encoders encode per second, on two cores.
_SPEED = {'text': 8.0, 'image': 4.0}
_SHARE_OF_ENCODING = 0.2  # Most of the minutes that a pretrained encoder may take.
HASHING, COLOR = 'hashing', 'color'  # The built-in encoders.
_SUMMARY = ('users', 'items', 'interactions', 'note')
# A short training needs a higher learning rate than a long one, and gains more from counts.
_SHORT = (
  *('--config.optimizer.learning_rate=0.003', '--config.optimizer.warmup_steps=30'),
  '--config.followers.weight=1.0',
)
_LONG = ('--config.followers.weight=0.5',)
_MINUTES_OF_SHORT = 30
_SMALL_BATCH = '--batch=16'  # Fewer programs are compiled before the page is there.
_ONE_STAGE = '--config.stages=("train",)'


class Models(NamedTuple):
  """The outcome of training.

  Attributes:
    best: the workdir of the model with the best validation.
    metrics: test metrics by the name of the model, baselines first.
  """

  best: pathlib.Path
  metrics: dict[str, dict]


class Prepared(NamedTuple):
  """What every model is trained on.

  Attributes:
    folder: the prepared folder.
    modalities: those that are encoded.
    seen_items: value of `config.evaluation.seen_items`.
  """

  folder: pathlib.Path
  modalities: Sequence[str]
  seen_items: str


@dataclasses.dataclass(frozen=True)
class Order:
  """The inputs and settings of one call.

  Attributes:
    orders: table of interactions, or a folder of its parts.
    out: folder for everything that is made.
    goods: item table, or None.
    pictures: folder of the items' pictures, or None.
    minutes: how long all steps together may take.
    given: flags of the build that the user gave.
    encoders: encoders by modality that the user gave.
  """

  orders: pathlib.Path
  out: pathlib.Path
  goods: pathlib.Path | None = None
  pictures: pathlib.Path | None = None
  minutes: float = 5
  given: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
  encoders: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Commands:
  """Runs the separate commands and remembers in a file which of them are done.

  The commands are processes, because nothing in this package may import `data_prep`. So a user can
  type each one, too, and it resumes as it does on its own.
  """

  def __init__(self, order: Order):
    """Reads the record of an earlier call.

    Raises:
      InputError: the folder holds something else, or other inputs.
    """
    self.out, self._path = order.out, order.out / RECORD
    self._started = time.monotonic()
    paths = {'orders': order.orders, 'goods': order.goods, 'pictures': order.pictures}
    inputs = {name: path and str(path.resolve()) for name, path in paths.items()}
    self.record: dict[str, Any] = {'inputs': inputs, 'done': {}}
    if self._path.exists():
      try:
        self.record = json.loads(self._path.read_text())
        before = self.record['inputs']
      except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{self._path}: cannot be read ({error!r}); remove it') from error
      if before != inputs:
        raise InputError(f'--out={self.out}: was made from other files; give another --out')
    elif self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
      raise InputError(f'--out={self.out}: holds other files; give another --out')
    self.out.mkdir(parents=True, exist_ok=True)
    (self.out / 'logs').mkdir(exist_ok=True)
    self._save()

  def seconds(self) -> float:
    """Returns how long this call has been running."""
    return time.monotonic() - self._started

  def remember(self, name: str, value: Any) -> Any:
    """Stores a decision that a later call must not change."""
    self.record[name] = value
    self._save()
    return value

  def run(self, title: str, module: str, *flags: str, repeat: bool = False) -> str:
    """Runs a command unless an earlier call did.

    Args:
      title: one word; the output goes to `logs/TITLE.log`.
      module: the program.
      *flags: its flags.
      repeat: whether to run it even if it is done; it must notice that by itself.

    Returns:
      Its output.

    Raises:
      SystemExit: it failed. It has said why, and its exit code is kept.
    """
    log, words = self.out / 'logs' / f'{title}.log', [module, *flags]
    is_done = self.record['done'].get(title) == words and log.exists()
    line = f'python -m {shlex.join(words)}'
    say(f'\n$ {line}' + ' # done before' * (is_done and not repeat))
    if is_done and not repeat:
      return log.read_text()
    if not repeat:
      self.record['done'].pop(title, None)
      self._save()
    stderr = None if sys.stderr.isatty() else subprocess.PIPE
    told: list[str] = []
    with log.open('w') as file:
      command = [sys.executable, '-m', *words]
      streams = {'stdout': file, 'stderr': stderr, 'text': True}
      code = processes.wait(subprocess.Popen(command, process_group=0, **streams), told)
    if code:
      with log.open('a') as file:
        file.writelines(told)
      way_on = 'Start again to go on'
      if code == InputError.exit_code:
        way_on = 'Correct that, with a flag or in the file, and start again'
      say(f'the command ended with {code}; {log} has its output. {way_on}', sys.stderr)
      sys.exit(code)
    self.record['done'][title] = words
    self._save()
    return log.read_text()

  def _save(self) -> None:
    write_file(self._path, json.dumps(self.record, indent=2) + '\n')


def make_models(order: Order) -> Models:
  """Builds, encodes, trains and compares.

  Raises:
    InputError: the minutes are impossible, a table cannot be read, or its columns cannot be
      guessed.
    SystemExit: a command failed.
  """
  if not 0 < order.minutes <= 10_000:
    raise InputError(f'--minutes={order.minutes:g}: must be above 0, 10000 at most')
  commands = Commands(order)
  data = order.out / 'data'
  _build(commands, order, data)
  modalities = _encode(commands, order, data)
  prepared = Prepared(data, modalities, _look_at_test(data))
  flags = [f'--seen_items={prepared.seen_items}', f'--models={",".join(WITHOUT_TRAINING)}']
  flags.append(f'--out={order.out / "baselines.json"}')
  commands.run('baselines', 'ur4rec_jax.baselines', f'--data_dir={data}', *flags)
  metrics = json.loads((order.out / 'baselines.json').read_text())
  found = {}
  for name in ('content', 'ids') if modalities else ('ids',):
    limit = _minutes_of(commands, order, name, bool(modalities))
    if limit is None:
      say(
        f'\n{_title(name, modalities)}: no time is left; --minutes={2 * order.minutes:g} has more'
      )
      continue
    found[name] = _train(commands, prepared, name, limit)
    metrics[_title(name, modalities)] = found[name]['test']
  best = max(found, key=lambda name: found[name]['valid']['ndcg@10'])
  return Models(order.out / 'runs' / best, metrics)


def _build(commands: Commands, order: Order, data: pathlib.Path) -> None:
  from ur4rec_jax.data.raw.guesses import guess  # It takes a second to import.

  guessed = guess(order.orders, order.goods, order.given, order.pictures is not None)
  say(f'{order.orders}\n' + '\n'.join(f'  {note}' for note in guessed.notes))
  about_goods = ', --title_column, --text_columns' * (order.goods is not None)
  say(f'  If that is wrong: --user_column, --item_column, --time_column{about_goods}, --where.')
  flags = [
    f'--{name}' if value in ('', True) else f'--{name}={value}'
    for name, value in guessed.flags.items()
  ]
  inputs = [f'--raw_dir={order.orders}']
  if order.goods is not None:
    inputs.append(f'--items={order.goods}')
    if order.pictures is not None:
      inputs.append(f'--images={order.pictures}')
  words = ['--source=interactions', *inputs, f'--data_dir={data}', *flags]
  earlier = commands.record['done'].get('build')
  # The build compares the content of files, which may be reached by another path now.
  paths = ('--raw_dir=', '--items=', '--images=', '--data_dir=')
  is_flag = lambda word: not word.startswith(paths)
  if earlier and [*filter(is_flag, earlier[1:])] != [*filter(is_flag, words)]:
    raise InputError(
      f'--out={order.out}: was built with other flags ({shlex.join(earlier[1:])}); give another'
      ' --out'
    )
  try:
    # The build is repeated, because it notices when the files have changed.
    output = commands.run('build', 'data_prep.build_dataset', *words, repeat=True)
  except SystemExit as stop:
    if earlier and stop.code == InputError.exit_code:
      raise InputError(
        f'--out={order.out}: was built already, and not from these tables; give another --out'
      ) from None
    raise
  shown = [line for line in output.splitlines() if line.startswith(_SUMMARY)]
  say('\n'.join(shown))


def _encode(commands: Commands, order: Order, data: pathlib.Path) -> list[str]:
  """Encodes the contents of the items; returns the modalities."""
  from ur4rec_jax.data import item_pictures
  from ur4rec_jax.data.dataset import iterate_items
  from ur4rec_jax.encoders.text import item_texts

  items = list(iterate_items(data))
  counts = {'text': sum(bool(item_texts(item)) for item in items)}
  counts['image'] = sum(path is not None for path in item_pictures.find(data))
  for name, given in order.encoders.items():
    if not counts[name]:
      raise InputError(f'--{name}_encoder={given}: no item has {_CONTENT[name]}; leave it out')
  chosen = commands.record.get('encoders')
  if chosen is None:
    chosen = {name: _encoder(name, count, order) for name, count in counts.items() if count}
    chosen = commands.remember('encoders', {name: x for name, x in chosen.items() if x})
  for name, given in order.encoders.items():
    if (earlier := chosen.get(name)) != given:
      raise InputError(
        f'--{name}_encoder={given}: --out={order.out} was made with {earlier or "none"}; give'
        ' another --out'
      )
  if counts['image'] and 'image' not in chosen:
    say('\nno pretrained encoder of pictures is here and fast enough, so the page alone has them')
  if chosen.get('text') == HASHING != order.encoders.get('text'):
    say('\nno pretrained encoder of texts is here and fast enough: the small built-in one is used')
  if not chosen:
    return []
  flags = [f'--modality={",".join(chosen)}', f'--encoder={",".join(chosen.values())}']
  commands.run('encode', 'data_prep.encode', f'--data_dir={data}', *flags)
  return [*chosen]


def _encoder(modality: str, count: int, order: Order) -> str | None:
  """Chooses the pretrained encoder if it is on this machine and fast enough; None for none."""
  from ur4rec_jax.encoders import pictures, pretrained, text

  if name := order.encoders.get(modality):
    return name
  name = {'text': text.DEFAULT, 'image': pictures.DEFAULT}[modality]
  is_fast = count / _SPEED[modality] <= 60 * order.minutes * _SHARE_OF_ENCODING
  if is_fast and pretrained.is_here(name):
    return name
  # The built-in encoder of pictures sees only colours, which do not justify the time.
  return HASHING if modality == 'text' else None


def _look_at_test(data: pathlib.Path) -> str:
  """Says what is unusual about the test items, and returns the value of `seen_items`.

  Raises:
    InputError: there are none.
  """
  from ur4rec_jax.data.dataset import load_dataset

  dataset = load_dataset(data)
  if not (dataset.split.held_out['test'] >= 0).any():
    raise InputError(f'{data}: no user has three interactions, which a test needs; add more')
  answer = seen_items(dataset)
  if (share := dataset.is_untrained('test').mean()) > _UNTRAINED:
    say(
      f'\n{share:.0%} of the test items never occur in training: only texts and pictures can find'
      ' them'
    )
  return answer


def seen_items(dataset: 'Dataset') -> str:
  """Decides whether items that a user had before are recommended again."""
  is_repeated = dataset.is_repeated('test')
  if is_repeated.mean() <= _REPEATS:
    return 'leave_out'
  say(
    f'\n{is_repeated.mean():.0%} of the users came back to an item that they had before, so such'
    ' items are recommended, too'
  )
  return 'keep'


def _minutes_of(commands: Commands, order: Order, name: str, is_one_of_two: bool) -> float | None:
  """Decides how long a model is trained; a later call decides the same.

  The model with contents comes first. The one on ids gets the time that is left, if there is some.

  Returns:
    Minutes, or None for a model that is left out.
  """
  plan = commands.record.get('plan')
  if not plan or plan['minutes'] != order.minutes:
    plan = {'minutes': order.minutes, 'by_model': {}}
  if name not in plan['by_model']:
    left = 60 * order.minutes - commands.seconds() - _SECONDS_AFTER_TRAINING
    if not plan['by_model']:
      left *= _SHARE_OF_CONTENT if is_one_of_two else 1.0
      left = max(left, _LEAST_SHARE * 60 * order.minutes)
    else:
      left -= _SECONDS_TO_START
    is_worth_it = not plan['by_model'] or left > _SECONDS_TO_START
    plan['by_model'][name] = max(round(left / 60, 3), 0.001) if is_worth_it else None
    commands.remember('plan', plan)
  return plan['by_model'][name]


def _title(name: str, modalities: Sequence[str]) -> str:
  content = ' and '.join(_CONTENT[modality] for modality in modalities)
  return 'SASRec' if name == 'ids' else f'SASRec + {content}'


def _train(commands: Commands, prepared: Prepared, name: str, minutes: float) -> dict[str, Any]:
  """Trains a model; returns the contents of results.json."""
  from ur4rec_jax.data.dataset import read_info

  data, modalities, keeps_seen = prepared
  variant, workdir = 'sasrec', data.parent / 'runs' / name
  flags = [f'--config.data_dir={data}', f'--workdir={workdir}']
  flags += [f'--config.max_minutes={minutes}', f'--config.evaluation.seen_items={keeps_seen}']
  short = commands.record.get('short', {})
  if name not in short:  # With more minutes, the run goes on with the settings that it began with.
    short = commands.remember('short', short | {name: minutes < _MINUTES_OF_SHORT})
  flags += _SHORT if short[name] else _LONG
  if name == 'content':
    variant = 'multimodal' if len(modalities) > 1 else 'text'
    flags.append(_ONE_STAGE)
    if [*modalities] == ['image']:
      flags.append('--config.modalities=image')
  if read_info(data)['counts']['items'] > _MOST_ITEMS_OF_SOFTMAX:
    flags += ['--config.loss.name=sampled_softmax', '--config.loss.num_negatives=1000']
    flags += ['--config.loss.retriever_name=sampled_softmax']
    flags += ['--config.optimizer.item_embeddings=touched']
  say(f'\n{_title(name, modalities)}: {minutes:g} minutes at most')
  words = [f'--config=default:{variant}', *flags]
  results = workdir / 'results.json'
  is_done = commands.record['done'].get(name) == ['ur4rec_jax.main', *words]
  commands.run(name, 'ur4rec_jax.main', *words, repeat=is_done and not results.exists())
  return json.loads(results.read_text())


def train(
  orders: Any,
  items: Any = None,
  minutes: float = 5,
  out: str | pathlib.Path | None = None,
  **columns: str | bool,
) -> 'TrainedRecommender':
  """Trains a recommender on a table of interactions.

  Args:
    orders: a pandas, Polars or Arrow table with one row per interaction, or the path of a file.
    items: a table or file with titles and descriptions of the items, or None.
    minutes: how long it may take.
    out: folder for the data, the runs and their logs; the same folder goes on where it stopped.
      None makes a temporary one, which stays.
    **columns: flags of the build that are not to be guessed, such as `user_column='customer'` or
      `drop_duplicates=True`.

  Returns:
    The best model, with `recommend`, `similar`, `evaluate` and `export`.

  Raises:
    InputError: a table cannot be read, or its columns cannot be guessed.
    ReportedError: a command failed; its message is in the error and in the logs.
  """
  import tempfile

  from ur4rec_jax.inference.trained import load

  folder = pathlib.Path(tempfile.mkdtemp(prefix='ur4rec-') if out is None else out)
  if not isinstance(minutes, int | float):
    raise InputError(f'minutes={minutes!r}: must be a number')
  if folder.exists() and not folder.is_dir():
    raise InputError(f'out={out}: is a file; give a folder')
  paths = [_as_file(table, folder, name) for table, name in ((orders, 'orders'), (items, 'items'))]
  if unknown := sorted(set(columns) - set(_BUILD_FLAGS)):
    raise InputError(f'{unknown[0]} is none of {", ".join(_BUILD_FLAGS)}')
  given = {name: value for name, value in columns.items() if value is not False}
  order = Order(paths[0], folder / 'model', paths[1], minutes=minutes, given=given)
  try:
    models = make_models(order)
  except SystemExit as stop:
    why = _last_error(order.out / 'logs') or f'a command ended with {stop.code}'
    # Without the way that led there, which says nothing to the caller.
    raise ReportedError(f'{why}; see {order.out / "logs"}') from None
  say('\n'.join(_comparison(order, models, 'returned')))
  return load(models.best)


def _last_error(logs: pathlib.Path) -> str | None:
  """Returns the message of the command that wrote the newest log, if it is in there."""
  newest = max(logs.glob('*.log'), key=lambda path: path.stat().st_mtime_ns)
  lines = newest.read_text(errors='replace').splitlines()
  found = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
  return found[-1] if found else None


def _as_file(table: Any, folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """Returns the file of a table, which is written if it is in memory.

  Raises:
    InputError: it is no table, or a column with a usual name cannot be written.
  """
  if table is None:
    return None
  if isinstance(table, str | os.PathLike):
    return pathlib.Path(os.path.expanduser(table))
  import pyarrow as pa
  import pyarrow.parquet as pq

  from ur4rec_jax.data import column_names
  from ur4rec_jax.data.raw.columns import in_memory

  roles = column_names.INTERACTIONS | column_names.ITEMS
  memory, found = in_memory(table, name), {}
  for column in dict.fromkeys(memory.columns):
    try:
      part = memory.select([column])
      pq.write_table(part.slice(0, 1), pa.BufferOutputStream())  # Arrow has types that files lack.
      found[column] = part[column]
    except (InputError, pa.ArrowException) as error:
      reason = ' '.join(str(error).split())
      if any(column_names.find(role, [column]) for role in roles):
        raise InputError(f'{name}: {column} cannot be used ({reason})') from error
      say(f'note: {name}: the column {column!r} is left out ({reason})', sys.stderr)
  folder.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(found), path := folder / f'{name}.parquet')
  return path


def _flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('orders', help='table of interactions: .csv, .tsv, .parquet or .jsonl, or a folder of parts')
  add('more', nargs='*', help='item table, and the folder of the pictures of the items')
  add('--out', help='folder of everything that is made; without it quick-NAME of the orders')
  add('--minutes', type=float, default=5, help='how long all of it may take, serving not counted')
  for name in _BUILD_FLAGS:
    how = {'action': 'store_true', 'default': None} if name == 'drop_duplicates' else {}
    add(f'--{name}', help='instead of a guess; see python -m data_prep.build_dataset --help', **how)
  add('--text_encoder', help=f'a pretrained model, or the built-in {HASHING}')
  add('--image_encoder', help=f'a pretrained model, or the built-in {COLOR}')
  add('--port', type=int, default=8000, help='port of the page')
  add('--no_serve', action='store_true', help='stop after the export')
  return parser


def _order(flags: argparse.Namespace) -> Order:
  orders = pathlib.Path(flags.orders)
  more = [pathlib.Path(path) for path in flags.more]
  for path in (orders, *more):
    if not path.exists():
      raise InputError(f'{path}: no such file or folder')
  folders = [path for path in more if path.is_dir()]
  tables = [path for path in more if not path.is_dir()]
  if len(folders) > 1 or len(tables) > 1:
    raise InputError('give the orders, an item table at most, and a folder of pictures at most')
  if folders and not tables:
    raise InputError(f'{folders[0]}: pictures need an item table, which says which items there are')
  values = vars(flags)
  encoders = {name: found for name in _SPEED if (found := values[f'{name}_encoder'])}
  given = {name: values[name] for name in _BUILD_FLAGS if values[name] is not None}
  out = pathlib.Path(flags.out or f'quick-{orders.name.partition(".")[0]}')
  goods, pictures = (next(iter(found), None) for found in (tables, folders))
  return Order(orders, out, goods, pictures, flags.minutes, given, encoders)


def _export(order: Order, best: pathlib.Path) -> pathlib.Path:
  """Exports the best model unless an earlier call did."""
  commands, folder = Commands(order), order.out / 'export'
  results = (best / 'results.json').read_text()
  if commands.record.get('exported') != [str(best), results] and folder.exists():
    shutil.rmtree(folder)
    commands.record['done'].pop('export', None)
  words = [f'--workdir={best}', f'--out={folder}', '--users']
  if not folder.exists():
    commands.record['done'].pop('export', None)
  commands.run('export', 'ur4rec_jax.export', *words)
  commands.remember('exported', [str(best), results])
  return folder


def _comparison(order: Order, models: Models, role: str) -> Iterator[str]:
  """Yields lines with the metrics of the models; `role` says what becomes of the best one."""
  yield f'\n{table(models.metrics, ACCURACY)}'
  best = json.loads((models.best / 'results.json').read_text())
  values = best['test']
  simple = {name: x for name, x in models.metrics.items() if 'setting' in x or name == 'popularity'}
  rival = max(simple, key=lambda name: simple[name]['ndcg@10'])
  hits = [100 * x['hit@10'] for x in (values, simple['popularity'])]
  yield (
    f'{role}: {models.best}, with the best validation; its first ten have the next item of'
    f' {hits[0]:.0f} of 100 users, those of popularity of {hits[1]:.0f}'
  )
  if values['ndcg@10'] < simple[rival]['ndcg@10']:
    yield f'warning: {rival} is better; train longer: --minutes={4 * order.minutes:g}'
  yield f'report: {models.best}/report.html'


def _ways_on(models: Models, folder: pathlib.Path) -> Iterator[str]:
  """Yields the commands to go on with."""
  yield f'later: python -m ur4rec_jax.serve --export={shlex.quote(str(folder))}'
  yield f'       python -m ur4rec_jax.recommend --workdir={shlex.quote(str(models.best))} --help'


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, makes the models, exports the best one and serves it."""
  parser = _flags()
  flags = parser.parse_args(expand_home(argv))
  if flags.no_serve and flags.port != parser.get_default('port'):
    raise InputError('--port: nothing is served with --no_serve; leave one of them out')
  order = _order(flags)
  can_serve = all(map(importlib.util.find_spec, ('fastapi', 'uvicorn', 'prometheus_client')))
  if not can_serve and not flags.no_serve:
    say("note: it will not serve; pip install 'ur4rec-jax[serve]'", sys.stderr)
  models = make_models(order)
  folder = _export(order, models.best)
  say('\n'.join([*_comparison(order, models, 'served'), *_ways_on(models, folder)]))
  if flags.no_serve or not can_serve:
    return
  words = ['ur4rec_jax.serve', f'--export={folder}', f'--port={flags.port}', _SMALL_BATCH]
  say(f'\n$ python -m {printable(shlex.join(words))}')
  os.execv(sys.executable, [sys.executable, '-m', *words])


if __name__ == '__main__':
  main()

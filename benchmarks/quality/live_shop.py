"""A simulated shop: does a service that learns every day get more clicks than one that does not?

  python -m benchmarks.quality.live_shop --scratch=/tmp/live-shop --days=30 [--keep]

The world is generated. Tastes drift, goods lose their appeal with age, and new goods arrive every
day. A user looks at the positions of a list less and less, and clicks with a known probability.
Three services answer over HTTP, each a process of its own: `static` keeps its first model,
`updated` learns every night (`update --watch`, registry), and `exploring` does so, too, and draws
the order of a tenth of its lists. `oracle` ranks by the true probabilities, `popularity` by the
clicks of the last week. All five have the same users and the same luck. Users also click on what
they find themselves, such as new arrivals, and every service is told.

Writes `benchmarks/results/live_shop/results.json`, and the plot and table in docs/live.md; --table
only the latter. The exit code is 1 if a promise was broken.
"""

import argparse
import contextlib
import dataclasses
import http.client
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.accuracy import put_between_marks
from ur4rec_jax.errors import InputError, exit_on_reported_error, say
from ur4rec_jax.files import write_file
from ur4rec_jax.inference import registry

_ROOT = pathlib.Path(__file__).parents[2]
RESULTS = _ROOT / 'benchmarks' / 'results' / 'live_shop' / 'results.json'
PAGE, PICTURE = _ROOT / 'docs' / 'live.md', _ROOT / 'docs' / 'live_shop.svg'
SERVICES = ('static', 'updated', 'exploring')
POLICIES = ('oracle', *SERVICES, 'popularity')
LENGTH = 10  # Of a list.
START, DAY = 1_700_000_000, 86_400
PAST_DAYS = 15
POPULAR_DAYS = 7
SHELF_DAYS, SHELF_SHARE = 2, 0.5  # New arrivals on a page of their own, and who looks at it.
SEARCH_SHARE = 0.3  # Of the visitors, who look for something by themselves.
RULES = '[exploration]\nshare = 0.1\ntemperature = 0.5\nitems = 20\n'
TARGET = 0.15


@dataclasses.dataclass(frozen=True)
class Size:
  """How large the world is.

  Attributes:
    users: number of users.
    goods: number of goods before the first day.
    new_goods: goods that arrive in a day.
    days: simulated days.
    drift: share of a taste that a day renews.
    nights: nights from one update of `exploring` to the next; `updated` learns every night.
    seed: of all chance.
  """

  users: int = 200
  goods: int = 300
  new_goods: int = 6
  days: int = 30
  drift: float = 0.06
  nights: int = 1
  seed: int = 0


class World:
  """The users and the goods, as nobody but the oracle knows them.

  Attributes:
    arrival: `[goods]` day on which each of the goods arrives.
    names: `[goods]` ids.
    numbers: the number of each of the goods, by id.
    examined: `[LENGTH]` probability that a user looks at a position.
  """

  topics = 8
  trend = 0.25  # Standard deviation of the daily change of what everybody likes.
  age = 25.0  # Days in which the odds of a click fall to a third.

  def __init__(self, size: Size):
    """Draws tastes and goods."""
    self.size, rng = size, np.random.default_rng([size.seed, 1])
    total = size.goods + size.new_goods * size.days
    self.arrival = np.concatenate(
      [
        rng.integers(-30, -PAST_DAYS, size.goods),
        np.repeat(np.arange(size.days), size.new_goods),
      ]
    )
    self.names = np.array([f'g{i:04}' for i in range(total)])
    self.numbers = {name: i for i, name in enumerate(self.names)}
    self.examined = 1 / np.arange(1, LENGTH + 1) ** 0.6
    kind = rng.integers(self.topics, size=total)
    self._goods = np.eye(self.topics)[kind] + 0.3 * rng.normal(size=(total, self.topics))
    self._quality = 0.6 * rng.normal(size=total)
    self._tastes, taste = {}, 1.6 * rng.normal(size=(size.users, self.topics))
    common = np.zeros(self.topics)
    for day in range(-PAST_DAYS, size.days):
      fresh = 1.6 * rng.normal(size=taste.shape)
      taste = np.sqrt(1 - size.drift) * taste + np.sqrt(size.drift) * fresh
      common = 0.95 * common + self.trend * rng.normal(size=self.topics)
      self._tastes[day] = taste + common

  def appeal(self, day: int, tastes_of: int | None = None) -> np.ndarray:
    """Returns `[users, goods]` the probability of a click on what is looked at.

    Args:
      day: the day.
      tastes_of: the day whose tastes count; None for the same.
    """
    odds = (
      self._tastes[day if tastes_of is None else tastes_of] @ self._goods.T + self._quality - 2.2
    )
    odds = odds - np.maximum(day - self.arrival, 0) / self.age
    return np.where(self.arrival <= day, 1 / (1 + np.exp(-odds)), 0.0)

  def luck(self, day: int, what: int) -> np.random.Generator:
    """Returns the chance of a day, which is the same for all policies."""
    return np.random.default_rng([self.size.seed, 2, day + PAST_DAYS, what])

  def visitors(self, day: int) -> np.ndarray:
    """Returns the users who come on a day, in their order."""
    rng = self.luck(day, 0)
    return rng.permutation(self.size.users)[: self.size.users // 2]


class Shop:
  """What happens to the users under one policy.

  Attributes:
    clicks: `[days, users]` clicks on lists.
    lists: `[days]` number of lists.
    first_shown: `[goods]` the day on which each of the goods was in a list for the first time.
    taken: `[users, goods]` what each user has clicked.
  """

  def __init__(self, world: World, taken: np.ndarray):
    """Starts with what users did before."""
    size = world.size
    self.world, self.taken = world, taken.copy()
    self.clicks = np.zeros((size.days, size.users), int)
    self.lists = np.zeros(size.days, int)
    self.first_shown = np.full(len(world.names), -1)
    self.counts = np.zeros((size.days + PAST_DAYS, len(world.names)), int)

  def visit(self, day: int, user: int, shown: Sequence[int]) -> list[int]:
    """Lets a user look at a list, and at other pages; returns what is clicked, the list first."""
    world, appeal = self.world, self._appeal[user]
    shown = np.array(shown, int)
    fresh = shown[self.first_shown[shown] < 0]
    self.first_shown[fresh] = day
    self.lists[day] += 1
    luck = self._luck[user]
    is_clicked = luck[shown] < world.examined[: len(shown)] * appeal[shown]
    is_clicked &= ~self.taken[user, shown]
    self.clicks[day, user] = is_clicked.sum()
    clicked = shown[is_clicked].tolist()
    for item in self._found_alone(day, user, appeal):
      if item not in clicked and not self.taken[user, item]:
        clicked.append(item)
    self.taken[user, clicked] = True
    self.counts[day + PAST_DAYS, clicked] += 1
    return clicked

  def begin(self, day: int) -> None:
    """Prepares the chance of a day."""
    self._appeal = self.world.appeal(day)
    self._luck = self.world.luck(day, 1).random(self._appeal.shape)
    self._alone = self.world.luck(day, 2).random((self.world.size.users, 3))

  def _found_alone(self, day: int, user: int, appeal: np.ndarray) -> Iterator[int]:
    look, search, place = self._alone[user]
    if look < SHELF_SHARE:
      age = day - self.world.arrival
      shelf = np.flatnonzero((age >= 0) & (age < SHELF_DAYS))
      yield from shelf[self._luck[user, shelf] < 0.5 * appeal[shelf]].tolist()
    if search < SEARCH_SHARE:
      weight = (appeal**2 * ~self.taken[user]).cumsum()
      yield int(np.searchsorted(weight, place * weight[-1]))

  def best(self, user: int, values: np.ndarray) -> list[int]:
    """Returns the goods with the largest values that the user has not clicked yet."""
    values = np.where(self.taken[user], -np.inf, values)
    return np.argsort(-values, kind='stable')[:LENGTH].tolist()


def past(world: World) -> tuple[list[tuple[str, str, int, str]], np.ndarray, np.ndarray]:
  """Lets the users choose by themselves before the first day.

  Returns:
    Rows of the log, `[users, goods]` what was taken, and `[days, goods]` how often.
  """
  rows, taken = [], np.zeros((world.size.users, len(world.names)), bool)
  counts = np.zeros((PAST_DAYS, len(world.names)), int)
  for day in range(-PAST_DAYS, 0):
    rng, appeal = world.luck(day, 3), world.appeal(day)
    for place, user in enumerate(world.visitors(day)):
      for turn in range(rng.integers(1, 5)):
        weight = appeal[user] ** 2 * ~taken[user]
        item = int(rng.choice(len(weight), p=weight / weight.sum()))
        taken[user, item] = True
        counts[day + PAST_DAYS, item] += 1
        rows.append((f'u{user:03}', world.names[item], _time(day, place, turn), 'click'))
  return rows, taken, counts


def _time(day: int, place: int, turn: int) -> int:
  return START + DAY * (day + PAST_DAYS) + 60 * place + turn


class Service:
  """A service as a process of its own.

  Attributes:
    seconds: of updates, one a day.
    verdicts: what each update said.
  """

  def __init__(self, name: str, scratch: pathlib.Path):
    """Starts the service."""
    self.name, self.scratch = name, scratch
    self.events, self.models = scratch / f'{name}.db', scratch / f'models-{name}'
    self.seconds: list[float] = []
    self.verdicts: list[str] = []
    flags = [f'--export={scratch}/export']
    if name != 'static':
      registry.promote(self.models, scratch / 'export')
      flags = [f'--registry={self.models}']
    if name == 'exploring':
      (scratch / 'explore.toml').write_text(RULES)
      flags.append(f'--rules={scratch}/explore.toml')
    flags += [f'--events={self.events}', '--batch=1', '--port=0', '--events_per_second=inf']
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'ur4rec_jax.serve', *flags], stdout=subprocess.PIPE, text=True
    )
    line = self.process.stdout.readline()
    if not line.startswith('ready'):
      raise InputError(f'the service {name} did not start')
    self._port = int(line.rpartition(':')[2])
    self._connection = http.client.HTTPConnection('127.0.0.1', self._port, timeout=60)

  def ask(self, path: str, body: Any = None) -> Any:
    """Sends a request and returns the answer."""
    content = None if body is None else json.dumps(body)
    headers = {'Content-Type': 'application/json'}
    for attempt in (1, 2):
      try:
        self._connection.request('GET' if body is None else 'POST', path, content, headers)
        answer = self._connection.getresponse()
        break
      except (http.client.HTTPException, ConnectionError):
        self._connection.close()  # The service has closed it in the night. The next try opens it.
        if attempt == 2:
          raise
    text = answer.read().decode()
    if answer.status != 200:
      raise InputError(f'{self.name}: {path}: {answer.status} {text}')
    return json.loads(text) if path[0:8] != '/metrics' else text

  def learn(self) -> None:
    """Makes the update of a night, and waits until its model serves."""
    started = time.monotonic()
    words = [sys.executable, '-m', 'ur4rec_jax.update', '--watch', f'--events={self.events}']
    words += [f'--workdir={self.scratch}/run', f'--data_dir={self.scratch}/data']
    words += [f'--out={self.scratch}/rounds-{self.name}', f'--registry={self.models}']
    words += ['--users', '--every_events=1', f'--rounds={len(self.seconds) + 1}']
    words.append('--margin=0.1')
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
      raise InputError(f'{self.name}: the update failed: {done.stderr.strip()}')
    # The folder is of no interest to who reads the stored result.
    self.verdicts.append(done.stdout.splitlines()[-1].replace(f' in {self.models}', ''))
    version = registry.current(self.models)
    while f'version="{version}"}} 1.0' not in self.ask('/metrics'):
      time.sleep(0.3)
    self.seconds.append(round(time.monotonic() - started, 1))

  def stop(self) -> None:
    """Ends the process."""
    self.process.terminate()
    self.process.wait()


def prepare(world: World, scratch: pathlib.Path, epochs: int) -> tuple[np.ndarray, np.ndarray]:
  """Builds the data of the past, trains the first model and exports it; see `past`."""
  rows, taken, counts = past(world)
  lines = ['user,item,time,kind', *(','.join(map(str, row)) for row in rows)]
  (scratch / 'past.csv').write_text('\n'.join(lines) + '\n')
  _run(
    'data_prep.build_dataset', '--source=interactions', f'--raw_dir={scratch}/past.csv',
    f'--data_dir={scratch}/data', '--event_column=kind', '--event_weights=click=1',
    '--drop_duplicates',
  )  # fmt: skip
  fields = {'data_dir': scratch / 'data', 'max_length': 40, 'batch_size': 32, 'crop': 'random'}
  fields |= {'sasrec.dim': 32, 'sasrec.num_blocks': 1, 'sasrec.item_scale': 0.02}
  fields |= {'optimizer.learning_rate': 5e-3, 'optimizer.warmup_steps': 20, 'num_epochs': epochs}
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  _run('ur4rec_jax.main', '--config=default:sasrec', f'--workdir={scratch}/run', *flags)
  _run('ur4rec_jax.export', f'--workdir={scratch}/run', f'--out={scratch}/export', '--users')
  return taken, counts


def _run(module: str, *flags: str) -> None:
  done = subprocess.run(
    [sys.executable, '-m', module, *flags], check=False, capture_output=True, text=True
  )
  if done.returncode:
    raise InputError(f'{module}: {done.stderr.strip()}')


def simulate(
  size: Size, scratch: pathlib.Path, minutes: float = math.inf, epochs: int = 20
) -> dict[str, Any]:
  """Plays all days under all policies.

  Args:
    size: of the world.
    scratch: an empty folder.
    minutes: no further day begins after so many minutes.
    epochs: of the first training.
  """
  started = time.monotonic()
  world = World(size)
  taken, counts = prepare(world, scratch, epochs)
  shops = {name: Shop(world, taken) for name in POLICIES}
  for shop in shops.values():
    shop.counts[:PAST_DAYS] = counts
  with contextlib.ExitStack() as stack:
    services = {}
    for name in SERVICES:
      services[name] = Service(name, scratch)
      stack.callback(services[name].stop)
    for day in range(size.days):
      for name, shop in shops.items():
        _play(day, name, shop, services.get(name))
      clicks = ', '.join(f'{name} {shops[name].clicks[day].sum()}' for name in POLICIES)
      say(f'day {day + 1}: {clicks}; {time.monotonic() - started:.0f} s')
      if day + 1 == size.days or time.monotonic() > started + 60 * minutes:
        break
      for name in ('updated', 'exploring') if (day + 1) % size.nights == 0 else ('updated',):
        services[name].learn()
        say(f'  {name}: {services[name].verdicts[-1]}')
  played = dataclasses.replace(size, days=day + 1)
  found = summary(played, shops, services) | {'seconds': round(time.monotonic() - started)}
  rates = dict.fromkeys((0.0, size.drift / 2, size.drift, 2 * size.drift))
  lost = {str(x): standing_still(dataclasses.replace(played, drift=x)) for x in rates}
  return found | {'lost_by_standing_still': lost}


def _play(day: int, name: str, shop: Shop, service: Service | None) -> None:
  """Lets the visitors of a day come to the shop of a policy, and tells its service the clicks."""
  shop.begin(day)
  for place, user in enumerate(shop.world.visitors(day).tolist()):
    request_id = ''
    if name == 'oracle':
      shown = shop.best(user, shop._appeal[user])
    elif name == 'popularity':
      end = day + PAST_DAYS
      shown = shop.best(user, shop.counts[end - POPULAR_DAYS : end].sum(0))
    else:
      answer = service.ask(f'/recommend?user=u{user:03}&k={LENGTH}')
      request_id = answer['request_id']
      shown = [shop.world.numbers[row['item']] for row in answer['recommendations']]
    clicked = shop.visit(day, user, shown)
    if service is not None and clicked:
      events = [
        {
          'user': f'u{user:03}', 'item': str(shop.world.names[item]), 'kind': 'click',
          'id': f'{day}-{item}', 'time': _time(day, place, turn),
          **({'request_id': request_id} if item in shown else {}),
        }
        for turn, item in enumerate(clicked)
      ]  # fmt: skip
      service.ask('/events', events)


def summary(size: Size, shops: dict[str, Shop], services: dict[str, Service]) -> dict[str, Any]:
  """Counts clicks by day, new goods found, and what updates said."""
  world = shops['oracle'].world
  for shop in shops.values():  # There may have been no time for all days.
    shop.clicks, shop.lists = shop.clicks[: size.days], shop.lists[: size.days]
  last = _last(size.days)
  ahead, low, high = _gain(shops['updated'], shops['static'], last)
  new = (world.arrival >= 0) & (world.arrival < size.days - 1)
  found = {}
  for name, shop in shops.items():
    wait = shop.first_shown[new] - world.arrival[new]
    found[name] = float(((wait >= 0) & (wait <= 1)).mean()) if new.any() else None
  return {
    'size': dataclasses.asdict(size),
    'last_days': last,
    'clicks': {name: shop.clicks.sum(1).tolist() for name, shop in shops.items()},
    'lists': shops['oracle'].lists.tolist(),
    'updated_ahead_of_static': {'gain': ahead, 'low': low, 'high': high},
    'found_within_a_day': found,
    'updates': {name: services[name].verdicts for name in ('updated', 'exploring')},
    'update_seconds': {name: services[name].seconds for name in ('updated', 'exploring')},
  }


def _gain(shop: Shop, other: Shop, last: int) -> tuple[float, float, float]:
  """Returns the relative gain in clicks over the last days, with a bootstrap interval by users."""
  two = np.stack([x.clicks[-last:].sum(0) for x in (shop, other)])
  rng = np.random.default_rng(0)
  drawn = rng.integers(two.shape[1], size=(2000, two.shape[1]))
  sums = two[:, drawn].sum(-1)
  low, high = np.quantile(sums[0] / np.maximum(sums[1], 1) - 1, (0.025, 0.975))
  return float(two[0].sum() / max(two[1].sum(), 1) - 1), float(low), float(high)


def standing_still(size: Size) -> dict[str, float]:
  """Returns what is lost, as a share of the oracle's clicks over the last days, by standing still.

  Two oracles stand still in one way each: one knows today's tastes but no new goods, and one knows
  the new goods but the tastes of the day before the first.
  """
  world = World(size)
  _, taken, _ = past(world)
  is_old = world.arrival < 0

  def clicks(values: Callable[[Shop, int], np.ndarray]) -> int:
    shop = Shop(world, taken)
    for day in range(size.days):
      shop.begin(day)
      appeal = values(shop, day)
      for user in world.visitors(day).tolist():
        shop.visit(day, user, shop.best(user, appeal[user]))
    return int(shop.clicks[-_last(size.days) :].sum())

  best = clicks(lambda shop, day: shop._appeal)
  without_goods = clicks(lambda shop, day: np.where(is_old, shop._appeal, 0))
  old_tastes = clicks(lambda shop, day: world.appeal(day, tastes_of=-1))
  return {'new_goods': 1 - without_goods / best, 'tastes': 1 - old_tastes / best}


def _last(days: int) -> int:
  """Returns the number of days at the end over which policies are compared."""
  return max(days // 4, 1)


def broken_promises(found: dict[str, Any]) -> list[str]:
  """Returns the names of the promises that were broken."""
  return [
    name
    for name, is_kept in {
      f'updated is {TARGET:.0%} ahead': found['updated_ahead_of_static']['gain'] >= TARGET,
      'new goods found within a day': (found['found_within_a_day']['updated'] or 0) >= 0.5,
    }.items()
    if not is_kept
  ]


def table(found: dict[str, Any]) -> str:
  """Describes the result for docs/live.md."""
  size, last = found['size'], found['last_days']
  lists = np.array(found['lists'])
  per_list = {name: np.array(x) / lists for name, x in found['clicks'].items()}
  rows = [
    '| policy | clicks a list, first days | last days | all | new goods in a list within a day |'
  ]
  rows.append('| --- | --- | --- | --- | --- |')
  for name in POLICIES:
    share = found['found_within_a_day'][name]
    x = per_list[name]
    rows.append(
      f'| {name} | {x[:last].mean():.2f} | {x[-last:].mean():.2f} | {x.mean():.2f} | {share:.0%} |'
    )
  gain = found['updated_ahead_of_static']
  said = [line for lines in found['updates'].values() for line in lines]
  promoted = sum('promoted' in line for line in said)
  seconds = [x for of_one in found['update_seconds'].values() for x in of_one]
  return '\n'.join(
    [
      '![Clicks a list by day](live_shop.svg)',
      '',
      f'{size["users"]} users of whom half come in a day, {size["goods"]} goods and'
      f' {size["new_goods"]} new ones a day, {size["days"]} days. First and last days are {last}'
      f' each. A day renews {size["drift"]:.0%} of each taste, and what everybody likes changes,'
      ' too.'
      f' The odds of a click fall to a third in {World.age:g} days. {SHELF_SHARE:.0%} of the'
      f' visitors look at the arrivals of the last {SHELF_DAYS} days, {SEARCH_SHARE:.0%} look for'
      f' something by themselves. `exploring` learns {_every(size["nights"])}.',
      '',
      *rows,
      '',
      f'Over the last {last} days, updated had {gain["gain"]:+.0%} clicks against static (95 %'
      f' interval by users {gain["low"]:+.0%} to {gain["high"]:+.0%}). Of {len(said)} updates'
      f' {promoted} passed the gate; one took'
      f' {np.median(seconds):.0f} s, the start of its processes'
      ' and compilation included.',
      '',
      'How much there is to gain depends on the world. Two oracles that stand still show it: one'
      ' knows the tastes of today but no new goods, one knows all goods but the tastes of the day'
      ' before the first.',
      '',
      '| renewed of a taste in a day | clicks lost without new goods | with old tastes |',
      '| --- | --- | --- |',
      *(
        f'| {float(drift):.0%} | {lost["new_goods"]:.0%} | {lost["tastes"]:.0%} |'
        for drift, lost in found['lost_by_standing_still'].items()
      ),
    ]
  )  # fmt: skip


def _every(nights: int) -> str:
  return 'every night' if nights == 1 else f'in one of {nights} nights'


def picture(found: dict[str, Any]) -> str:
  """Draws the clicks a list by day, as a mean over three days."""
  lists = np.array(found['lists'])
  curves = {name: _smooth(np.array(x) / lists) for name, x in found['clicks'].items()}
  days, top = len(lists), max(x.max() for x in curves.values()) * 1.08
  x = lambda day: 44 + 500 * day / max(days - 1, 1)
  y = lambda value: 250 - 215 * value / top
  parts = [
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 300" font-family="sans-serif"'
    ' font-size="13" role="img" aria-label="Clicks a list by day">',
    '<style>text{fill:#1d1c1a}.grid{stroke:#8884}path{fill:none;stroke-width:2.2}'
    '@media(prefers-color-scheme:dark){text{fill:#eceae5}}</style>',
    '<text x="8" y="18">clicks a list</text><text x="500" y="286">day</text>',
  ]
  for value in np.linspace(0, top, 5)[:-1]:
    parts.append(f'<line class="grid" x1="44" x2="544" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
    parts.append(f'<text x="38" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
  for day in np.unique(np.linspace(0, days - 1, 6).round().astype(int)).tolist():
    parts.append(f'<text x="{x(day):.1f}" y="268" text-anchor="middle">{day + 1}</text>')
  colours = ('#8a857c', '#c2643a', '#3d82c4', '#8a62ab', '#93740f')
  ends: list[float] = []
  for name, colour in sorted(
    zip(POLICIES, colours, strict=True), key=lambda pair: -curves[pair[0]][-1]
  ):
    line = ' '.join(f'{x(day):.1f},{y(value):.1f}' for day, value in enumerate(curves[name]))
    parts.append(f'<path d="M{line}" stroke="{colour}"/>')
    at = max(y(curves[name][-1]), ends[-1] + 16 if ends else 0)  # Names do not overlap.
    ends.append(at)
    parts.append(f'<text x="552" y="{at + 4:.1f}" style="fill:{colour}">{name}</text>')
  return '\n'.join([*parts, '</svg>\n'])


def _smooth(values: np.ndarray) -> np.ndarray:
  ends = [(max(i - 1, 0), i + 2) for i in range(len(values))]
  return np.array([values[a:b].mean() for a, b in ends])


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, simulates, and prints the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--scratch', type=pathlib.Path, help='folder for data and models; it is made empty')
  for field in dataclasses.fields(Size):
    add(f'--{field.name}', type=type(field.default), default=field.default)
  add('--minutes', type=float, default=math.inf, help='no day begins after so many minutes')
  add('--keep', action='store_true', help='store the result, and put it into docs/live.md')
  add('--table', action='store_true', help='only put the stored result into docs/live.md')
  flags = parser.parse_args(argv)
  if flags.table:
    found = json.loads(RESULTS.read_text())
  else:
    if flags.scratch is None:
      raise InputError('--scratch is missing: a folder for data and models')
    shutil.rmtree(flags.scratch, ignore_errors=True)
    flags.scratch.mkdir(parents=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(flags.scratch / 'compiled')
    # The models are tiny, so nearly all the time would go into making their programs fast.
    os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
    size = Size(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Size)})
    found = simulate(size, flags.scratch, flags.minutes)
  found['broken'] = broken_promises(found)
  if flags.keep:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_file(RESULTS, json.dumps(found, indent=1) + '\n')
  if flags.keep or flags.table:
    write_file(PICTURE, picture(found))
    put_between_marks(PAGE, 'live_shop', table(found))
  say(table(found))
  print(json.dumps(found))
  sys.exit(1 if found['broken'] else 0)


if __name__ == '__main__':
  main()

"""Generates a catalogue and its users, with structure for every kind of model to learn.

An item has a topic, a style, a look and a popularity; words tell its topic and style, the picture
its topic and look. A user has a taste in each of the three. The next item is, with probability
`FOLLOW`, a successor of the last one; otherwise a topic is drawn (what usually comes after the
last topic, times the user's taste) and then an item of it (popularity times the user's liking of
its style and look). Ids alone show this for popular items only; for rare ones text and pictures do.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from data_prep.sources import vocabulary
from ur4rec_jax.data.raw.records import Item, Raw
from ur4rec_jax.errors import InputError

NUM_TOPICS = len(vocabulary.TOPICS)
NUM_STYLES = len(vocabulary.STYLES)
# A look is a shape and its colour, red-green-blue.
LOOKS = (
  ('disc', (250, 250, 250)),
  ('square', (15, 15, 15)),
  ('triangle', (250, 220, 40)),
  ('ring', (60, 240, 240)),
  ('cross', (240, 60, 200)),
)
HEAD, EXPONENT = 90.0, 2.3  # Popularity is Zipf-Mandelbrot: a flattened head and a long tail.
FOLLOW = 0.08  # Probability that the next item is a successor of the last one.
SUCCESSOR_WEIGHTS = (0.75, 0.25)
TASTE = (
  0.3,
  0.25,
  0.2,
  0.15,
)  # Shares of a user's favourite topics; the other topics share the rest.
LIKED = 10.0  # Weight of a liked style or look relative to another one.
PICTURE_SIZE = 64
MISSING = 0.04  # Share of items without a description, and without a picture.
MIN_ITEMS = 4 * NUM_TOPICS
_FIRST_DAY = 1_577_836_800  # 2020-01-01
_USERS_AT_ONCE = 256


class World(NamedTuple):
  """The hidden parameters that generate the data and that a recommender has to learn.

  `topics`, `styles`, `looks`: `[items]`. `popularity`: `[items]`. `successors`: `[items, 2]`.
  `transition`: `[topics, topics]`, rows sum to 1. `taste`: `[users, topics]`, rows sum to 1.
  `style_liking`: `[users, styles]`. `look_liking`: `[users, looks]`.
  """

  topics: np.ndarray
  styles: np.ndarray
  looks: np.ndarray
  popularity: np.ndarray
  successors: np.ndarray
  transition: np.ndarray
  taste: np.ndarray
  style_liking: np.ndarray
  look_liking: np.ndarray


def generate(num_users: int = 2000, num_items: int = 1500, seed: int = 0) -> Raw:
  """Generates interactions, texts and pictures; the same arguments give the same data."""
  if num_users < 2:
    raise InputError(f'--num_users must be 2 or more, not {num_users}')
  if num_items < MIN_ITEMS:
    raise InputError(f'--num_items must be {MIN_ITEMS} or more, not {num_items}')
  if seed < 0:
    raise InputError(f'--seed must be 0 or more, not {seed}')
  world = make_world(num_users, num_items, seed)
  users, items = simulate(world, seed)
  rng = np.random.default_rng([seed, 3])
  names = np.array(item_names(num_items))
  return Raw(
    path='synthetic',
    users=np.array(_names('u', num_users))[users],
    items=names[items],
    timestamps=_timestamps(users, rng),
    ratings=_ratings(world, users, items, rng),
    lines=np.arange(1, len(users) + 1),
    table=dict(zip(names.tolist(), _catalogue(world, rng), strict=True)),
  )


def item_names(num_items: int) -> list[str]:
  """Returns the original ids of the items, in the order of the world."""
  return _names('i', num_items)


def _names(letter: str, number: int) -> list[str]:
  return [f'{letter}{i + 1:0{len(str(number))}d}' for i in range(number)]


def make_world(num_users: int, num_items: int, seed: int) -> World:
  """Draws the properties of items and the tastes of users."""
  rng = np.random.default_rng([seed, 1])
  shares = rng.dirichlet(np.full(NUM_TOPICS, 8.0))
  # Every topic gets at least four items, so that it has successors to offer.
  topics = np.concatenate(
    [
      np.repeat(np.arange(NUM_TOPICS), MIN_ITEMS // NUM_TOPICS),
      rng.choice(NUM_TOPICS, num_items - MIN_ITEMS, p=shares),
    ]
  )
  rng.shuffle(topics)
  popularity = (HEAD + rng.permutation(num_items)) ** -EXPONENT
  successors = np.empty((num_items, len(SUCCESSOR_WEIGHTS)), np.int64)
  for topic in range(NUM_TOPICS):
    members = np.flatnonzero(topics == topic)
    # Successors are about equally popular; otherwise they would make rare items popular.
    nearly = np.log(popularity[members]) + rng.normal(0, 0.5, len(members))
    circle = members[np.argsort(nearly)]
    for column, distance in enumerate((1, 2)):
      successors[circle, column] = np.roll(circle, -distance)

  transition = np.full((NUM_TOPICS, NUM_TOPICS), 0.1 / NUM_TOPICS)
  circle = rng.permutation(NUM_TOPICS)
  for distance, weight in ((0, 0.2), (1, 0.5), (4, 0.2)):
    transition[circle, np.roll(circle, -distance)] += weight
  taste = np.full((num_users, NUM_TOPICS), 0.1 / NUM_TOPICS)
  for weight, column in zip(TASTE, _distinct(rng, num_users, NUM_TOPICS, 4), strict=True):
    taste[np.arange(num_users), column] += weight
  return World(
    topics=topics,
    styles=rng.integers(NUM_STYLES, size=num_items),
    looks=rng.integers(len(LOOKS), size=num_items),
    popularity=popularity / popularity.sum(),
    successors=successors,
    transition=transition,
    taste=taste,
    style_liking=_liking(rng, num_users, NUM_STYLES),
    look_liking=_liking(rng, num_users, len(LOOKS)),
  )


def simulate(world: World, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws the choices of every user; nobody takes an item twice.

  Returns:
    `[rows]` users and `[rows]` items, user after user, each in time order.
  """
  rng = np.random.default_rng([seed, 2])
  num_users, num_items = len(world.taste), len(world.topics)
  lengths = np.round(rng.lognormal(np.log(26.0), 0.5, num_users)).astype(np.int64)
  lengths = np.clip(lengths, 5, min(120, num_items // 2))
  chosen = [
    _choose(world, users, lengths[users], rng)
    for users in np.split(np.arange(num_users), range(_USERS_AT_ONCE, num_users, _USERS_AT_ONCE))
  ]
  return np.repeat(np.arange(num_users), lengths), np.concatenate(chosen)


def chances(world: World, user: int, last: int) -> np.ndarray:
  """Returns `[items]` probabilities of what a user takes after an item, if nothing were taken."""
  weight = world.popularity * (
    world.style_liking[user, world.styles] * world.look_liking[user, world.looks]
  )
  topic = world.taste[user] * world.transition[world.topics[last]]
  of_topic = np.bincount(world.topics, weight, NUM_TOPICS)
  chance = (1 - FOLLOW) * (topic / topic.sum() / of_topic)[world.topics] * weight
  for item, share in zip(world.successors[last], SUCCESSOR_WEIGHTS, strict=True):
    chance[item] += FOLLOW * share
  return chance


def _choose(
  world: World, users: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """`[sum of lengths]` items of some users, user after user."""
  longest_first = np.argsort(-lengths, kind='stable')
  users, lengths = users[longest_first], lengths[longest_first]
  weight = world.popularity * (
    world.style_liking[users][:, world.styles] * world.look_liking[users][:, world.looks]
  )
  for topic in range(NUM_TOPICS):  # Normalises to the probability of an item given its topic.
    weight[:, world.topics == topic] /= weight[:, world.topics == topic].sum(1, keepdims=True)
  taste = world.taste[users]
  unseen = np.ones(weight.shape, bool)
  history = np.empty((len(users), lengths[0]), np.int64)
  for step in range(lengths[0]):
    active = np.arange(
      np.count_nonzero(lengths > step)
    )  # The histories of the others are complete.
    last = history[active, step - 1]
    topic = taste[active]
    if step > 0:
      topic = topic * world.transition[world.topics[last]]
    chance = (topic / topic.sum(1, keepdims=True))[:, world.topics] * weight[active]
    if step > 0:
      chance *= 1 - FOLLOW
      for column, share in enumerate(SUCCESSOR_WEIGHTS):
        chance[active, world.successors[last, column]] += FOLLOW * share
    total = np.cumsum(chance * unseen[active], axis=1)
    draw = rng.random(len(active)) * total[:, -1]
    history[active, step] = (total <= draw[:, None]).sum(1)
    unseen[active, history[active, step]] = False
  in_order = np.argsort(longest_first)
  return history[in_order][np.arange(lengths[0]) < lengths[in_order][:, None]]


def _distinct(rng: np.random.Generator, rows: int, choices: int, number: int) -> np.ndarray:
  """`[number, rows]`: for each row, different choices."""
  return np.argsort(rng.random((rows, choices)), axis=1)[:, :number].T


def _liking(rng: np.random.Generator, num_users: int, choices: int) -> np.ndarray:
  """`[users, choices]`: `LIKED` for one choice a user, 1 for the others."""
  liking = np.ones((num_users, choices))
  liking[np.arange(num_users), rng.integers(choices, size=num_users)] = LIKED
  return liking


def _timestamps(users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """`[rows]` seconds: each user starts within a year and comes back after hours or days."""
  gaps = 60 + rng.exponential(np.where(rng.random(len(users)) < 0.7, 3600.0, 5 * 86_400.0))
  is_first = np.concatenate([[True], users[1:] != users[:-1]])
  elapsed = np.cumsum(gaps)
  start = rng.uniform(0, 365 * 86_400, is_first.sum())
  return (_FIRST_DAY + elapsed - elapsed[is_first][users] + start[users]).astype(np.int64)


def _ratings(
  world: World, users: np.ndarray, items: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """`[rows]` whole stars from 1 to 5, more for a liked style or look."""
  liked = (world.style_liking[users, world.styles[items]] > 1).astype(np.float64)
  liked += world.look_liking[users, world.looks[items]] > 1
  stars = np.round(2.8 + 0.8 * liked + rng.normal(0, 0.8, len(users)))
  return np.clip(stars, 1, 5).astype(np.float32)


def _catalogue(world: World, rng: np.random.Generator) -> list[Item]:
  has_text, has_picture = rng.random((2, len(world.topics))) >= MISSING
  taken: set[str] = set()
  catalogue = []
  for i, (topic, style) in enumerate(zip(world.topics, world.styles, strict=True)):
    title = vocabulary.title(topic, style, rng, taken)
    description = vocabulary.description(topic, style, rng)
    picture = _png(_picture(topic, world.looks[i], rng))
    catalogue.append(
      Item(
        title=title,
        genres=(vocabulary.TOPICS[topic].genre, vocabulary.STYLES[style].genre),
        description=description if has_text[i] else '',
        image=picture if has_picture[i] else None,
      )
    )
  return catalogue


def _picture(topic: int, look: int, rng: np.random.Generator) -> np.ndarray:
  """`[size, size, 3]` uint8: hue and texture tell the topic, the shape in front the look."""
  y, x = np.mgrid[:PICTURE_SIZE, :PICTURE_SIZE] / PICTURE_SIZE
  frequency, phase = rng.uniform(4, 6), rng.uniform(0, 2 * np.pi)
  along = (x, y, x + y, np.hypot(x - 0.5, y - 0.5) * 2)[topic % 4]
  brightness = 0.65 + 0.2 * np.sin(2 * np.pi * frequency * along + phase)
  hue = (topic + rng.uniform(-0.3, 0.3)) / NUM_TOPICS
  # The three channels are one cosine of the hue, a third of the circle apart.
  colour = 0.5 + 0.5 * np.cos(2 * np.pi * (hue - np.arange(3) / 3))
  picture = 255 * brightness[..., None] * colour
  picture[_shape(LOOKS[look][0], x, y, rng)] = LOOKS[look][1]
  picture += rng.normal(0, 10, picture.shape)
  # Few grey levels keep the noisy files small.
  return (np.clip(picture, 0, 255) // 8 * 8).astype(np.uint8)


def _shape(kind: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """`[size, size]` mask of one shape, somewhere around the middle."""
  radius = rng.uniform(0.2, 0.3)
  dx, dy = x - rng.uniform(0.35, 0.65), y - rng.uniform(0.35, 0.65)
  far = np.maximum(np.abs(dx), np.abs(dy))
  distance = np.hypot(dx, dy)
  if kind == 'disc':
    return distance < radius
  if kind == 'square':
    return far < 0.85 * radius
  if kind == 'triangle':
    return (dy < 0.7 * radius) & (np.abs(dx) < (dy + radius) * 0.6)
  if kind == 'ring':
    return (distance < 1.1 * radius) & (distance > 0.65 * radius)
  return (far < radius) & (np.minimum(np.abs(dx), np.abs(dy)) < 0.3 * radius)


def _png(pixels: np.ndarray) -> bytes:
  """Encodes `[height, width, 3]` uint8 as PNG."""
  height, width, _ = pixels.shape
  lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

  def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + check

  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    + chunk(b'IDAT', zlib.compress(lines.tobytes(), 9))
    + chunk(b'IEND', b'')
  )

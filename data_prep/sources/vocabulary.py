"""Words and sentences of the generated catalogue, by topic and style."""

from typing import NamedTuple

import numpy as np


class Topic(NamedTuple):
  """Words that belong to one topic."""

  genre: str
  nouns: tuple[str, ...]
  people: tuple[str, ...]
  deeds: tuple[str, ...]


class Style(NamedTuple):
  """Words that belong to one style."""

  genre: str
  adjectives: tuple[str, ...]
  verdicts: tuple[str, ...]


def _topic(genre: str, nouns: str, people: str, deeds: str) -> Topic:
  return Topic(genre, *(tuple(words.split(', ')) for words in (nouns, people, deeds)))


def _style(genre: str, adjectives: str, verdicts: str) -> Style:
  return Style(genre, tuple(adjectives.split(', ')), tuple(verdicts.split('; ')))


TOPICS = (
  _topic(
    'Space',
    'orbit, comet, starship, nebula, airlock, moonbase, satellite, asteroid, galaxy, cosmonaut',
    'a young astronaut, the crew of a lost shuttle, two rival astronomers',
    'drift past the last planet, answer a signal from deep space, repair a failing reactor',
  ),
  _topic(
    'Ocean',
    'tide, lighthouse, harbour, coral reef, anchor, whale, lagoon, schooner, pearl, shipwreck',
    'a retired sea captain, a team of divers, the keeper of a lighthouse',
    'follow the whales north, raise a sunken galleon, sail into the storm',
  ),
  _topic(
    'Cooking',
    'kitchen, bakery, recipe, saffron, banquet, noodle, orchard, vineyard, oven, market stall',
    'a stubborn pastry chef, three sisters with one restaurant, a travelling cook',
    'save the family bakery, cook for a royal table, search for a forgotten spice',
  ),
  _topic(
    'Music',
    'melody, violin, jazz club, choir, drummer, ballad, concert hall, gramophone, encore, trumpet',
    'a shy pianist, a band without a singer, the conductor of a village choir',
    'record one last album, play a city to its feet, rewrite an unfinished symphony',
  ),
  _topic(
    'Crime',
    'alibi, detective, heist, witness, ledger, vault, informant, fingerprint, verdict, safehouse',
    'a tired inspector, a forger with a conscience, the only honest cop in town',
    'reopen a cold case, plan one final robbery, follow the money to the mayor',
  ),
  _topic(
    'Mountains',
    'summit, glacier, ridge, avalanche, base camp, valley, cabin, ice axe, eagle, northern wall',
    'two climbers on one rope, a mountain guide, a doctor in a snowed-in cabin',
    'climb the north face in winter, cross the frozen pass, wait for the rescue flight',
  ),
  _topic(
    'Robots',
    'android, circuit, automaton, neural core, factory, machine, prototype, algorithm, drone, lab',
    'a robot with a secret, an engineer and her machine, the last human programmer',
    'teach a machine to dream, stop a runaway experiment, rebuild a broken android',
  ),
  _topic(
    'Medieval',
    'castle, knight, crown, dragon, tournament, siege, abbey, sword, kingdom, banner',
    'an exiled queen, a squire who would be a knight, the monks of a besieged abbey',
    'defend the last fortress, break an ancient curse, win the crown by the sword',
  ),
  _topic(
    'Racing',
    'engine, circuit lap, pit stop, rally, finish line, turbo, grand prix, racetrack, tyre, podium',
    'a mechanic behind the wheel, two brothers in rival teams, a driver after the crash',
    'win the night rally, rebuild a burnt engine, take the last corner flat out',
  ),
  _topic(
    'Gardens',
    'rose, greenhouse, meadow, orchid, hedge maze, seed, willow, beehive, ivy, botanist',
    'a patient gardener, the heirs of an overgrown park, a collector of rare orchids',
    'bring a dead garden to bloom, breed a black tulip, find a path through the maze',
  ),
  _topic(
    'Circus',
    'trapeze, clown, big top, acrobat, caravan, juggler, ringmaster, tightrope, parade, lion tamer',
    'a clown who cannot laugh, a family of acrobats, the new ringmaster',
    'walk the rope without a net, keep the travelling show alive, put on a last parade',
  ),
  _topic(
    'Desert',
    'dune, caravan route, oasis, mirage, scorpion, canyon, sandstorm, nomad, salt flat, well',
    'a nomad and a geologist, the guide of a lost caravan, a pilot down in the sand',
    'cross the sea of sand, look for water under the stars, map a vanished oasis',
  ),
)

STYLES = (
  _style(
    'Gentle',
    'quiet, tender, warm, soft, mellow, kind',
    'Told softly and with great warmth; A tender tale to share; Calm, kind and unhurried',
  ),
  _style(
    'Dark',
    'black, bitter, haunted, grim, shadowed, cold',
    'Bleak and relentless to the end; A grim tale without easy comfort; Cold, cruel and haunting',
  ),
  _style(
    'Comic',
    'merry, clumsy, absurd, jolly, cheeky, ridiculous',
    'Hilarious from the first minute; A silly and cheerful romp; Full of jokes and pratfalls',
  ),
  _style(
    'Epic',
    'mighty, eternal, glorious, vast, heroic, golden',
    'A sweeping tale on a grand scale; Monumental and heroic; Grand, loud and magnificent',
  ),
  _style(
    'Experimental',
    'abstract, fractured, silent, inverted, nameless, minimal',
    'Strange, formal and demanding; A fragmented puzzle in still images; Bold and without a plot',
  ),
  _style(
    'Documentary',
    'true, recorded, forgotten, authentic, measured, plain',
    'Based on interviews and archives; A factual and sober account; Carefully researched and true',
  ),
)

_OPENINGS = ('Here', 'This time', 'In a small town', 'Years later', 'Against all advice', 'At last')
_ASIDES = (
  'Nothing goes as planned.',
  'An old friend returns.',
  'Time is running out.',
  'There is more to it than it seems.',
  'Everybody has a reason to stay.',
  'The evening ends with a surprise.',
)


def title(topic: int, style: int, rng: np.random.Generator, taken: set[str]) -> str:
  """Returns a title that is not yet taken, and marks it as taken."""
  adjective = _pick(STYLES[style].adjectives, rng)
  noun, other = (TOPICS[topic].nouns[i] for i in rng.choice(10, 2, replace=False))
  forms = (
    f'the {adjective} {noun}',
    f'{noun} and {other}',
    f'{adjective} {noun}, {adjective} {other}',
    f'a {noun} without {other}',
    f'beyond the {adjective} {noun}',
    f'the {other} and the {adjective} {noun}',
  )
  name = base = _pick(forms, rng).title()
  part = 1
  while name in taken:
    part += 1
    name = f'{base}, Part {part}'
  taken.add(name)
  return name


def description(topic: int, style: int, rng: np.random.Generator) -> str:
  """Writes two to four sentences in random order."""
  words, tone = TOPICS[topic], STYLES[style]
  person, deed = _pick(words.people, rng), _pick(words.deeds, rng)
  noun, adjective = _pick(words.nouns, rng), _pick(tone.adjectives, rng)
  sentences = [
    f'{_pick(_OPENINGS, rng)}, {person} must {deed}.',
    f'{_pick(tone.verdicts, rng)}.',
    f'At its heart is the {adjective} {noun}.',
    _pick(_ASIDES, rng),
  ]
  order = rng.permutation(4)[: rng.integers(3, 5)]
  return ' '.join(sentences[i] for i in order)


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
  return choices[rng.integers(len(choices))]

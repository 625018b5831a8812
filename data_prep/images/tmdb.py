"""Finds the posters of movies at TMDB, by TMDB or IMDb id or by title and year."""

import json
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.images.web import NoPicture, Web
from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.raw import items as item_tables
from ur4rec_jax.data.raw import tables
from ur4rec_jax.errors import InputError

KEY = 'TMDB_API_KEY'
_API, _IMAGES = 'https://api.themoviedb.org', 'https://image.tmdb.org'
_WIDTHS = (185, 342, 500, 780)  # Sizes of posters at TMDB, by their width, the short side.
_ARTICLES = "The|An?|Les?|La|L'|Il|Lo|Gli|I|El|Los|Las|Der|Die|Das|Un|Une|Det|Den"


class Tmdb:
  """Looks up posters with the API key of the environment variable `TMDB_API_KEY`."""

  def __init__(
    self, ids: Iterable[str], image_size: int, links: str | None, server: str | None = None
  ):
    """Reads the key and the links.

    Args:
      ids: original ids of the dataset's items.
      image_size: short side of the stored pictures in pixels.
      links: path of MovieLens' links.csv; without it movies are searched by title.
      server: server to use instead of TMDB's.

    Raises:
      InputError: the key is missing, or the links are unreadable or of other movies.
    """
    self._key = os.environ.get(KEY, '').strip()
    if not re.fullmatch(r'[!-~]+', self._key):
      raise InputError(
        f'{KEY} is {"no key" if self._key else "not set"}; put the "API Read Access Token" of your'
        ' TMDB account into this environment variable'
      )
    self._links = {} if links is None else _read_links(Path(links))
    if self._links and not self._links.keys() & set(ids):
      raise InputError(f'{links}: none of its movies is an item of the dataset')
    width = next((f'w{width}' for width in _WIDTHS if width >= image_size), 'original')
    self._api, self._posters = f'{server or _API}/3', f'{server or _IMAGES}/t/p/{width}'

  async def locate(self, web: Web, item: dict[str, Any], record: dict[str, Any]) -> str:
    """Returns the URL of a movie's poster and stores the matched movie in `record`."""
    try:
      movie = await self._movie(web, item)
      if movie is None:
        raise NoPicture(item_pictures.MISSING, 'TMDB knows no such movie with a poster')
      record['match'] = f'{movie["title"]} ({_year(movie)}), TMDB {movie["id"]}'
      poster = movie['poster_path']
      if poster is None:
        raise NoPicture(item_pictures.MISSING, 'TMDB has no poster of it')
      if not re.fullmatch(r'/[\w.-]+', poster, re.ASCII):
        raise ValueError(poster)
    except InputError:  # A wrong key, which is a ValueError too.
      raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise NoPicture(item_pictures.REJECTED, 'the answer of TMDB has an unknown form') from error
    return self._posters + poster

  async def _movie(self, web: Web, item: dict[str, Any]) -> dict[str, Any] | None:
    tmdb_id, imdb_id = self._links.get(item['original_id'], ('', ''))
    if tmdb_id:
      return await self._ask(web, f'/movie/{tmdb_id}')
    if imdb_id:
      answer = await self._ask(web, f'/find/tt{imdb_id:0>7}', external_source='imdb_id')
      return next(iter(answer['movie_results']), None)
    title, year = _title_and_year(item['title'])
    # The year of a dataset may differ from TMDB's by one. If the search with the year finds
    # nothing, the search without it accepts only a movie of exactly this title.
    for query in ({'query': title, 'year': year}, {'query': title}):
      if 'year' in query and year is None:
        continue
      results = (await self._ask(web, '/search/movie', **query))['results']
      near = [
        movie
        for movie in results
        if movie.get('poster_path') and (year is None or abs(_year(movie) - year) <= 1)
      ]
      wanted = _plain(title)
      same = [
        movie
        for movie in near
        if wanted in (_plain(movie['title']), _plain(movie.get('original_title') or ''))
      ]
      if found := same or ('year' in query and near):
        return found[0]
    return None

  async def _ask(self, web: Web, path: str, **query: Any) -> dict[str, Any]:
    address = f'{self._api}{path}?{urllib.parse.urlencode(query)}'
    try:
      content = await web.get(address, 'application/json', {'Authorization': f'Bearer {self._key}'})
    except NoPicture as outcome:
      if outcome.code == 401:
        raise InputError(
          f'TMDB refuses the key in {KEY}; it must be the "API Read Access Token" of your account,'
          ' not the shorter "API Key"'
        ) from None
      raise
    return json.loads(content)


def _read_links(path: Path) -> dict[str, tuple[str, str]]:
  """Reads MovieLens' links.csv: the TMDB and IMDb id of each movie, '' where unknown."""
  file = tables.open_file(path)
  columns = ('movieId', 'tmdbId', 'imdbId')
  for column in columns:
    if column not in file.columns:
      raise InputError(f'{path}: no column {column!r}; it must have {", ".join(columns)}')
  links = {}
  for place, row in tables.records(file, list(columns)):
    movie, tmdb, imdb = (item_tables.text(row[column]) for column in columns)
    if not movie or not all(re.fullmatch(r'\d*', other, re.ASCII) for other in (tmdb, imdb)):
      raise InputError(
        f'{path}, {place.unit} {place.number}: ids are whole numbers, not'
        f' {", ".join(map(repr, (movie, tmdb, imdb)))}; correct them'
      )
    links[movie] = tmdb, imdb
  return links


def _title_and_year(title: str) -> tuple[str, int | None]:
  """Turns MovieLens' "Matrix, The (a.k.a. X) (1999)" into "The Matrix" and 1999."""
  years = re.findall(r'\((\d{4})\)', title)
  # Parentheses at the start, as in "(500) Days of Summer", belong to the title.
  name = re.sub(r'\s+\([^()]*\)', '', title).strip()
  if moved := re.fullmatch(rf'(.+), ({_ARTICLES})', name):
    name = moved[2] + ('' if moved[2].endswith("'") else ' ') + moved[1]
  return name or title, int(years[-1]) if years else None


def _year(movie: dict[str, Any]) -> int:
  return int((movie.get('release_date') or '0')[:4])


def _plain(title: str) -> str:
  """Returns the letters and digits of a title without accents, in lower case."""
  parts = unicodedata.normalize('NFKD', title.casefold())
  return ''.join(character for character in parts if character.isalnum())

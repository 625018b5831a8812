"""What the original files of MovieLens say of films."""

from data_prep.sources import movielens


def test_the_mark_of_films_without_genres_is_no_genre(tmp_path):
  """MovieLens 10M has the files of MovieLens 1M, and this mark."""
  ratings, films = tmp_path / 'ratings.dat', tmp_path / 'movies.dat'
  ratings.write_text('1::7::5::978300760\n1::8::4::978300761\n')
  films.write_text('7::A (1995)::(no genres listed)\n8::B (1996)::Drama||War\n')
  table = movielens.read_movielens_1m(ratings, films).table
  assert [item.genres for item in table.values()] == [(), ('Drama', 'War')]

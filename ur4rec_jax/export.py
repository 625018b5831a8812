"""Exports a trained model to one folder, for machines with only jax and NumPy, on CPU and CUDA.

  python -m ur4rec_jax.export --workdir=runs/shop --out=shop-model
  python -m ur4rec_jax.export --workdir=runs/shop --vectors=items.parquet

`ur4rec_jax.exported.load` opens the folder; docs/inference.md describes its files. The second
command writes vectors for vector search, whose inner products are the scores.
"""

import argparse
import pathlib
import shlex
import sys

from ur4rec_jax.errors import InputError, counted, exit_on_reported_error, refuse_idle_flags, say
from ur4rec_jax.files import expand_home
from ur4rec_jax.inference import exported, thumbnails, vectors
from ur4rec_jax.inference.exporting import export
from ur4rec_jax.inference.new_items import ADD_ITEMS, PICTURES
from ur4rec_jax.inference.trained import load


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, exports, and prints what was written."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--workdir', required=True, help='folder of the run')
  add('--out', help='folder to write; it must not exist')
  add('--vectors', help='Parquet file to write the item vectors to')
  add('--user_vectors', help='Parquet file to write the vectors of the users of the data to')
  add('--data_dir', help="folder of the run's prepared data, if it has moved since training")
  add('--add_items', help=ADD_ITEMS)
  add('--pictures', help=PICTURES)
  add('--users', action='store_true', help='add the users of the data and their histories')
  add('--without_pictures', action='store_true', help="leave the items' pictures out")
  add('--approximate', action='store_true', help='search large catalogues approximately')
  flags = parser.parse_args(expand_home(argv))
  refuse_idle_flags(parser, flags, 'add_items', 'pictures')
  if flags.out is flags.vectors is flags.user_vectors is None:
    raise InputError('give --out=FOLDER, or --vectors=FILE.parquet for vectors alone')
  refuse_idle_flags(parser, flags, 'out', 'users', 'without_pictures', 'approximate')
  recommender = load(flags.workdir, flags.data_dir, flags.approximate)
  if flags.add_items:
    before = len(recommender.item_ids)
    recommender, known = recommender.add_items(flags.add_items, flags.pictures)
    added = len(recommender.item_ids) - before
    say(f'added {counted(added, "item")}; already known: {len(known):,}', sys.stderr)
  if flags.vectors:
    width = vectors.write_items(recommender, flags.vectors)
    say(f'{flags.vectors}: {counted(len(recommender.item_ids), "vector")} of {width} numbers')
    if recommender.model.followers is not None:
      say('note: inner products of vectors leave out what followers add to the scores')
  if flags.user_vectors:
    vectors.write_users(recommender, flags.user_vectors)
    say(f'{flags.user_vectors}: {counted(len(recommender.users), "vector")}')
  if flags.out is None:
    return
  manifest = export(recommender, flags.out, flags.users, not flags.without_pictures)
  out = pathlib.Path(flags.out)
  size = sum(path.stat().st_size for path in out.iterdir())
  say(
    f'{flags.out}: {counted(len(recommender.item_ids), "item")}, {size / 1e6:,.1f} MB, for'
    f' {" and ".join(manifest["platforms"])}, jax {manifest["jax"]} or newer'
  )
  if pictures := exported.load_thumbnails(out):
    packed = (out / thumbnails.PACKED).stat().st_size
    say(f'pictures of {counted(len(pictures), "item")} take {packed / 1e6:,.1f} MB of it')
  say(f'next: python -m ur4rec_jax.serve --export={shlex.quote(flags.out)}')


if __name__ == '__main__':
  main()

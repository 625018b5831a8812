"""Recommends items with a trained model: to a user of its data, to a new user, or to all users.

  python -m ur4rec_jax.recommend --workdir=runs/shop --user=u042
  python -m ur4rec_jax.recommend --workdir=runs/shop --history=S0-1,S3-7 --explain
  python -m ur4rec_jax.recommend --workdir=runs/shop --preference="Short, dark science fiction."
  python -m ur4rec_jax.recommend --workdir=runs/shop --all_users --out=top.parquet

docs/inference.md describes all flags and the shares of a score.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ur4rec_jax.data.original_ids import read_ids
from ur4rec_jax.errors import InputError, StorageError, exit_on_reported_error
from ur4rec_jax.inference import frames
from ur4rec_jax.inference.explanations import explain
from ur4rec_jax.inference.query import Query
from ur4rec_jax.inference.trained import TrainedRecommender, load

_CHUNK = 4096  # Users whose recommendations are in memory at once.


def to_one(recommender: TrainedRecommender, flags: argparse.Namespace) -> dict[str, Any]:
  """Recommends items to the user that the flags describe.

  Args:
    recommender: the recommender.
    flags: the flags of the command.

  Returns:
    `user`; `history` with the number of known items and of items that the model reads; `unknown`
    items of the history; and `recommendations`, each with `rank`, `item`, `title`, `score`,
    `shares` and, with `--explain`, the result of `explain`.
  """
  users = None
  if flags.user is not None:
    history, users = recommender.history(flags.user), [recommender.users[flags.user]]
  else:
    history = [] if flags.history is None else read_ids(flags.history, set(recommender.item_ids))
  answer = recommender.ask(_query(recommender, [history], flags), users, flags.preference)
  (unknown,) = answer.unknown
  recommendations = recommender.recommendations(answer)
  if flags.explain and recommendations:
    items = [found['item'] for found in recommendations]
    reasons = explain(recommender, history, items, users, flags.preference)
    for found, reason in zip(recommendations, reasons, strict=True):
      found |= reason
  known = len(history) - len(unknown)
  return {
    'user': flags.user,
    'history': {'items': known, 'read': min(known, recommender.max_length)},
    'unknown': unknown,
    'recommendations': recommendations,
  }


def to_all(recommender: TrainedRecommender, flags: argparse.Namespace) -> int:
  """Writes recommendations for every user of the data to a Parquet file.

  The file appears when it is complete.

  Args:
    recommender: the recommender.
    flags: the flags of the command.

  Returns:
    The number of rows.
  """
  out, names = pathlib.Path(flags.out), list(recommender.users)
  draft = out.with_name(f'{out.name}.incomplete-{os.getpid()}')
  rows, writer = 0, None
  try:
    bar = tqdm(total=len(names), unit='user', disable=not sys.stderr.isatty())
    for start in range(0, len(names), _CHUNK):
      part = names[start : start + _CHUNK]
      query = _query(recommender, [recommender.history(name) for name in part], flags)
      answer = recommender.ask(query, users=range(start, start + len(part)))
      counts = [len(items) for items in answer.items]
      found = frames.columns(answer, recommender.share_names)
      table = pa.table({'user': np.repeat(part, counts), **found})
      writer = writer or pq.ParquetWriter(draft, table.schema)
      writer.write_table(table)
      rows += len(table)
      bar.update(len(part))
    bar.close()
    writer.close()
    os.replace(draft, out)
  except OSError as error:
    raise StorageError(f'--out={out}: cannot be written ({error.strerror or error})') from error
  finally:
    draft.unlink(missing_ok=True)
  return rows


def _query(
  recommender: TrainedRecommender, histories: list[list[str]], flags: argparse.Namespace
) -> Query:
  known = set() if flags.only is flags.without is None else set(recommender.item_ids)
  only = None if flags.only is None else read_ids(flags.only, known)
  without = () if flags.without is None else read_ids(flags.without, known)
  return Query(histories, flags.k, only, without, flags.keep_seen)


def as_text(found: dict[str, Any], share_names: list[str]) -> str:
  """Formats the result of `to_one` as a table.

  Args:
    found: the result.
    share_names: names of the shares.
  """
  recommendations = found['recommendations']
  if not recommendations:
    return 'no item is left to recommend; --keep_seen allows items of the history, too'
  width = max(len(row['item']) for row in recommendations)
  columns = ''.join(f'{name:>{max(len(name) + 2, 10)}}' for name in ('score', *share_names))
  lines = [f'{"":3} {"item":<{width}}{columns}  title']
  for row in recommendations:
    values = {'score': row['score'], **row['shares']}
    cells = ''.join(f'{value:>{max(len(name) + 2, 10)}.4f}' for name, value in values.items())
    lines.append(f'{row["rank"]:>3} {row["item"]:<{width}}{cells}  {row["title"]}')
    for reason in row.get('because', ()):
      lines.append(f'      {reason["influence"]:+.4f} {reason["title"] or reason["item"]}')
    if match := row.get('text'):
      lines.append(f'      "{match["item"]}" ~ "{match["user"]}" ({match["cosine"]:.2f})')
  return '\n'.join(lines)


def _flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--workdir', required=True, help='folder of the run')
  add('--data_dir', help="folder of the run's prepared data, if it has moved since training")
  add('--user', help='original id of a user of the data; the whole history is used')
  add('--history', help='item ids with commas between them, the oldest first, or a file of ids')
  add('--preference', help='what the user likes, in words; alone or with --user or --history')
  add('--all_users', action='store_true', help='recommend to every user of the data')
  add('--out', help='Parquet file to write with --all_users')
  add('--k', type=int, default=10, help='number of items to recommend')
  add('--only', help='recommend only these items: ids with commas between them, or a file of ids')
  add('--without', help='do not recommend these items: ids, or a file of ids')
  add('--keep_seen', action='store_true', help="allow items of the user's own history, too")
  add('--add_items', help='prepared folder or .npz file of new items to append to the catalogue')
  add('--approximate', action='store_true', help='search large catalogues approximately')
  add('--explain', action='store_true', help='show the items and texts that support each item')
  add('--json', action='store_true', help='print one JSON object')
  return parser


def _check(flags: argparse.Namespace) -> None:
  if flags.user is not None and flags.history is not None:
    raise InputError('--user and --history exclude each other; leave one out')
  about_one = [flags.user, flags.history, flags.preference]
  if flags.all_users:
    if any(x is not None for x in about_one) or flags.explain or flags.json:
      raise InputError(
        '--all_users: takes no --user, --history, --preference, --explain or --json; leave them out'
      )
    if flags.out is None:
      raise InputError('--all_users: needs --out=FILE.parquet')
  elif flags.out is not None:
    raise InputError('--out: is for --all_users; for one user there is --json')
  elif all(x is None for x in about_one):
    raise InputError('give one of --user, --history, --preference and --all_users')


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags and prints or writes recommendations."""
  flags = _flags().parse_args(argv)
  _check(flags)
  say = lambda message: print(message, file=sys.stderr, flush=True)
  recommender = load(flags.workdir, flags.data_dir, flags.approximate)
  if flags.add_items:
    before = len(recommender.item_ids)
    recommender, known = recommender.add_items(flags.add_items)
    say(f'added {len(recommender.item_ids) - before} items; {len(known)} were already known')
  if flags.all_users:
    rows = to_all(recommender, flags)
    say(f'{flags.out}: {rows:,} rows, {len(recommender.users):,} users')
    return
  found = to_one(recommender, flags)
  if found['unknown']:
    names = ', '.join(found['unknown'][:5]) + ', ...' * (len(found['unknown']) > 5)
    say(f'ignored {len(found["unknown"])} items that are not in the catalogue: {names}')
  if found['history']['read'] < found['history']['items']:
    say('the model reads the latest {read:,} of {items:,} items'.format(**found['history']))
  print(json.dumps(found) if flags.json else as_text(found, recommender.share_names))


if __name__ == '__main__':
  main()

"""Recommends items with a trained model: to a user of its data, to a new user, or to all users.

  python -m ur4rec_jax.recommend --workdir=runs/shop --user=u042
  python -m ur4rec_jax.recommend --workdir=runs/shop --history=S0-1,S3-7 --explain
  python -m ur4rec_jax.recommend --workdir=runs/shop --preference="Short, dark science fiction."
  python -m ur4rec_jax.recommend --workdir=runs/shop --similar_to=S0-1 --by=content
  python -m ur4rec_jax.recommend --workdir=runs/shop --all_users --out=top.parquet
  python -m ur4rec_jax.recommend --workdir=runs/shop --histories=orders.csv --out=top.parquet

docs/inference.md describes all flags and the shares of a score.
"""

import argparse
import collections
import csv
import dataclasses
import functools
import io
import json
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ur4rec_jax.data.dataset import read_dropped_users
from ur4rec_jax.data.original_ids import read_ids
from ur4rec_jax.errors import (
  InputError,
  StorageError,
  counted,
  exit_on_reported_error,
  refuse_idle_flags,
  say,
)
from ur4rec_jax.files import expand_home, new_file, write_file
from ur4rec_jax.inference import frames, rules
from ur4rec_jax.inference.explanations import explain
from ur4rec_jax.inference.new_items import ADD_ITEMS, PICTURES
from ur4rec_jax.inference.query import Query
from ur4rec_jax.inference.similar import BOTH, KINDS, USERS
from ur4rec_jax.inference.trained import TrainedRecommender, load

_TYPES = {  # Arrow types of the columns.
  'user': 'string',
  'rank': 'int64',
  'item': 'string',
  'title': 'string',
  'rules': 'string',
}
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
  query = dataclasses.replace(_query(recommender, flags), histories=[history])
  answer = recommender.ask(query, users, flags.preference).require_one()
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
    **({'notes': answer.choices[0].notes} if answer.choices else {}),
  }


class Group(NamedTuple):
  """The users whose recommendations go into one file.

  Attributes:
    names: `[users]` original ids.
    history: returns the original ids of the items of user i, the oldest first.
    rows: `[users]` indices in the training data, -1 for users that it lacks.
    notes: notes about users by name, for the file of notes.
  """

  names: Sequence[str]
  history: Callable[[int], list[str]]
  rows: np.ndarray
  notes: Mapping[str, str]


def all_users(recommender: TrainedRecommender) -> Group:
  """Returns the users of the training data."""
  names = list(recommender.users)
  return Group(names, lambda i: recommender.history(names[i]), np.arange(len(names)), {})


def customers_of(path: str, recommender: TrainedRecommender) -> tuple[Group, str]:
  """Returns all customers of a table of interactions, and a sentence that counts them.

  Args:
    path: the table.
    recommender: the recommender.

  Raises:
    InputError: the table cannot be read.
  """
  from ur4rec_jax.inference import tables  # Slow to import, and single users need no table.

  options = recommender.dataset.info['options']
  found = tables.read_customers(path, options)
  dropped, users = read_dropped_users(recommender.config.data_dir), recommender.users
  notes, counts = {}, collections.Counter()
  for name in found.names:
    if name in users:
      counts['of the training data'] += 1
    elif name in dropped:
      notes[name] = f'not in the training data: the build dropped them by {dropped[name]}'
      counts[f'dropped by {dropped[name]}'] += 1
    else:
      notes[name] = 'not in the training data'
      counts['not in the training data'] += 1
  rows = np.array([users.get(name, -1) for name in found.names])
  parts = ', '.join(f'{count:,} {what}' for what, count in counts.items())
  lines = [f'{path}: {counted(len(found.names), "customer")}: {parts}', *found.notes]
  if found.incomplete:
    lines[0] += f'; left out {counted(found.incomplete, "row")} without a customer or an item'
  for flag, count in found.dropped.items():
    lost = len(found.dropped_users.get(flag, ()))
    also = f', and with them {counted(lost, "customer")}' if lost else ''
    lines.append(f'--{flag}={options[flag]} of the build leaves out {counted(count, "row")}{also}')
  summary = '\n'.join(lines)
  return Group(found.names, found.history, rows, notes), summary


def to_file(
  recommender: TrainedRecommender, group: Group, flags: argparse.Namespace
) -> tuple[int, list[tuple[str, str]]]:
  """Writes recommendations for many users to a Parquet file, which appears when it is complete.

  Beside it, NAME.notes.csv lists the users whom the training data lack, who got no recommendations,
  or whose items are not in the catalogue. Without such users there is no such file.

  Args:
    recommender: the recommender.
    group: the users.
    flags: the flags of the command.

  Returns:
    The number of rows, and the users who got no recommendations with the reasons.
  """
  import pyarrow as pa  # Slow to import, and single users need no table.
  import pyarrow.parquet as pq

  out = pathlib.Path(flags.out)
  rows, writer, notes, refused = 0, None, [], []
  query = _query(recommender, flags)
  bar = tqdm(total=len(group.names), unit='user', disable=not sys.stderr.isatty())
  try:
    with bar, new_file(out) as draft:
      for start in range(0, len(group.names), _CHUNK):
        part = group.names[start : start + _CHUNK]
        histories = [group.history(start + i) for i in range(len(part))]
        asked = dataclasses.replace(query, histories=histories)
        answer = recommender.ask(asked, users=group.rows[start : start + len(part)])
        counts = [len(items) for items in answer.items]
        found = {'user': np.repeat(part, counts), **frames.columns(answer, recommender.share_names)}
        # Without these types a part in which nobody is answered would have another schema.
        table = pa.table({name: pa.array(x, _TYPES.get(name)) for name, x in found.items()})
        writer = writer or pq.ParquetWriter(draft, table.schema)
        writer.write_table(table)
        rows += len(table)
        bar.update(len(part))
        for name, count, unknown, problem in zip(
          part, counts, answer.unknown, answer.problems, strict=True
        ):
          if problem:
            refused.append((name, problem))
          ignored = ''
          if unknown and not problem:
            ignored = f'ignored {counted(len(unknown), "item")} not in the catalogue'
          if note := '; '.join(filter(None, (group.notes.get(name), problem, ignored))):
            notes.append((name, count, note))
      writer.close()
      _write_notes(notes_path(out), notes)
  except OSError as error:
    raise StorageError(f'--out={out}: cannot be written ({error.strerror or error})') from error
  return rows, refused


def notes_path(out: pathlib.Path) -> pathlib.Path:
  """Returns the file of notes about users beside a file of recommendations."""
  return out.with_name(f'{out.stem}.notes.csv')


def _write_notes(path: pathlib.Path, notes: list[tuple[str, int, str]]) -> None:
  if not notes:
    path.unlink(missing_ok=True)
    return
  text = io.StringIO()
  csv.writer(text).writerows([('user', 'recommendations', 'note'), *notes])
  write_file(path, text.getvalue())


def _query(recommender: TrainedRecommender, flags: argparse.Namespace) -> Query:
  """Reads the files that the flags name, and returns the query, still without histories."""
  known = set() if flags.only is flags.without is None else set(recommender.item_ids)
  only = None if flags.only is None else read_ids(flags.only, known)
  without = () if flags.without is None else read_ids(flags.without, known)
  found = None if flags.rules is None else rules.load(flags.rules, recommender.item_ids)
  return Query([], flags.k, only, without, flags.keep_seen, rules=found)


def as_text(found: dict[str, Any], share_names: list[str]) -> str:
  """Formats the result of `to_one` as a table.

  Args:
    found: the result.
    share_names: names of the shares.
  """
  recommendations = found['recommendations']
  if not recommendations:
    left = 'no item is left to recommend; --keep_seen allows items of the history, too'
    return '\n'.join(found.get('notes') or [left])
  width = max(len(row['item']) for row in recommendations)
  columns = ''.join(f'{name:>{max(len(name) + 2, 10)}}' for name in ('score', *share_names))
  lines = [f'{"":3} {"item":<{width}}{columns}  title']
  for row in recommendations:
    values = {'score': row['score'], **row['shares']}
    cells = ''.join(_cell(value, max(len(name) + 2, 10)) for name, value in values.items())
    lines.append(f'{row["rank"]:>3} {row["item"]:<{width}}{cells}  {row["title"]}')
    lines += [f'      {reason}' for reason in row.get('rules', ())]
    for reason in row.get('because', ()):
      lines.append(f'      {reason["influence"]:+.4f} {reason["title"] or reason["item"]}')
    if match := row.get('text'):
      lines.append(f'      "{match["item"]}" ~ "{match["user"]}" ({match["cosine"]:.2f})')
  return '\n'.join([*lines, *found.get('notes', ())])


def _cell(value: float | None, width: int) -> str:
  return f'{"-":>{width}}' if value is None else f'{value:>{width}.4f}'


def similar_as_text(rows: list[dict[str, Any]], by: str) -> str:
  """Formats the result of `Recommender.similar` as a table."""
  if not rows and by == USERS:
    return 'no user who has the item has another one'
  if not rows:
    return f'the item has no text or picture to compare; --by={USERS} compares who has it'
  width = max(len(row['item']) for row in rows)
  return '\n'.join(
    f'{i:>3} {row["item"]:<{width}} {row["similarity"]:>9.4f}  {row["title"]}'
    for i, row in enumerate(rows, 1)
  )


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
  add('--similar_to', help='item ids with commas between them: show the items most similar to them')
  add('--by', choices=KINDS, help=f'with --similar_to: what is compared; {BOTH} by default')
  add('--all_users', action='store_true', help='recommend to every user of the data')
  add(
    '--histories',
    help='table of interactions (.csv, .tsv, .parquet, .jsonl), one row each; recommend to every'
    ' customer in it',
  )
  add('--out', help='Parquet file to write with --all_users or --histories')
  add('--k', type=int, default=10, help='number of items to recommend')
  add('--only', help='recommend only these items: ids with commas between them, or a file of ids')
  add('--without', help='do not recommend these items: ids, or a file of ids')
  add('--rules', help='TOML file of filters, caps, diversity, boosts and pins')
  add(
    '--keep_seen',
    action=argparse.BooleanOptionalAction,
    help="allow items of the user's own history, too; by default as the run was evaluated",
  )
  add('--add_items', help=ADD_ITEMS)
  add('--pictures', help=PICTURES)
  add('--approximate', action='store_true', help='search large catalogues approximately')
  add('--explain', action='store_true', help='show the items and texts that support each item')
  add('--json', action='store_true', help='print one JSON object')
  return parser


def _check(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
  refuse_idle_flags(parser, flags, 'add_items', 'pictures')
  if flags.user is not None and flags.history is not None:
    raise InputError('--user and --history exclude each other; leave one out')
  about_one = [flags.user, flags.history, flags.preference]
  if flags.similar_to is not None:
    others = (flags.histories, flags.out, flags.only, flags.without, flags.rules, flags.keep_seen)
    is_given = any(x is not None for x in (*about_one, *others))
    if is_given or flags.all_users or flags.explain or flags.approximate:
      raise InputError('--similar_to: takes --by, --k, --add_items and --json alone')
    return
  refuse_idle_flags(parser, flags, 'similar_to', 'by')
  name = '--all_users' if flags.all_users else '--histories'
  if flags.all_users and flags.histories is not None:
    raise InputError('--all_users and --histories exclude each other; leave one out')
  if flags.all_users or flags.histories is not None:
    if any(x is not None for x in about_one) or flags.explain or flags.json:
      raise InputError(
        f'{name}: takes no --user, --history, --preference, --explain or --json; leave them out'
      )
    if flags.out is None:
      raise InputError(f'{name}: needs --out=FILE.parquet')
  elif flags.out is not None:
    raise InputError('--out: is for --all_users and --histories; for one user there is --json')
  elif all(x is None for x in about_one):
    raise InputError('give one of --user, --history, --preference, --all_users and --histories')


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags and prints or writes recommendations."""
  parser = _flags()
  flags = parser.parse_args(expand_home(argv))
  _check(parser, flags)
  note = functools.partial(say, file=sys.stderr)
  recommender = load(flags.workdir, flags.data_dir, flags.approximate)
  # Notes of the library are lines for the user here.
  warnings.showwarning = lambda message, *_, **__: note(f'note: {message}')
  if flags.add_items:
    before = len(recommender.item_ids)
    recommender, known = recommender.add_items(flags.add_items, flags.pictures)
    note(
      f'added {counted(len(recommender.item_ids) - before, "item")}; already known: {len(known):,}'
    )
  if flags.similar_to is not None:
    items = read_ids(flags.similar_to, set(recommender.item_ids))
    by = flags.by or BOTH
    rows = recommender.similar(items, flags.k, by)
    say(json.dumps(rows) if flags.json else similar_as_text(rows, by))
    return
  if flags.out is not None:
    if flags.all_users:
      group = all_users(recommender)
    else:
      group, summary = customers_of(flags.histories, recommender)
      note(summary)
    rows, refused = to_file(recommender, group, flags)
    note(f'{flags.out}: {counted(rows, "row")}, {counted(len(group.names) - len(refused), "user")}')
    if refused:
      name, problem = refused[0]
      note(f'no recommendations for {counted(len(refused), "user")}; the first, {name}: {problem}')
    if (notes := notes_path(pathlib.Path(flags.out))).exists():
      note(f'{notes}: names the users about whom there is something to say')
    return
  found = to_one(recommender, flags)
  if found['unknown']:
    names = ', '.join(found['unknown'][:5]) + ', ...' * (len(found['unknown']) > 5)
    note(f'ignored {counted(len(found["unknown"]), "item")} not in the catalogue: {names}')
  if found['history']['read'] < found['history']['items']:
    note('the model reads the latest {read:,} of {items:,} items'.format(**found['history']))
  say(json.dumps(found) if flags.json else as_text(found, recommender.share_names))


if __name__ == '__main__':
  main()

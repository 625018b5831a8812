"""Describes what may be wrong with the user's own data, and the flag that decides."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import pyarrow as pa

from ur4rec_jax.data.raw import ids
from ur4rec_jax.data.raw.texts import shown

_DAMAGES = {
  ids.BLANKS: ('have blanks around them', 'keep the blanks', 'removes them'),
  ids.DECIMALS: ('end in .0', 'count as ids of their own', 'reads 7.0 as 7'),
  ids.MISSING: ('say that there is none', 'count like any other id', 'leaves these rows out'),
}


def hints_about_ids(found: Mapping[str, ids.Ids], cleanings: Collection[str]) -> list[str]:
  """Describes ids that look damaged, one hint for each kind of damage.

  Args:
    found: the ids of users and items, by role.
    cleanings: what `--clean_ids` undoes.
  """
  examples = lambda damage: '; '.join(
    f'{role}s: {column.found[damage]}' for role, column in found.items() if damage in column.found
  )
  hints = []
  for cleaning, (fault, meaning, effect) in _DAMAGES.items():
    if shown_ids := examples(cleaning):
      meaning = '' if cleaning in cleanings else f' {meaning};'
      hints.append(f'ids that {fault} ({shown_ids}){meaning} --clean_ids={cleaning} {effect}')
  if shown_ids := examples(ids.ROUNDED):
    hints.append(
      f'ids that look like rounded numbers ({shown_ids}): several ids may have become one; export'
      ' them again as text, and not through a spreadsheet'
    )
  if shown_ids := found['item'].found.get(ids.LISTS):
    hints.append(
      f'items that look like lists ({shown_ids}), each of which counts as one item; if they are'
      ' lists, write a row for each of their entries'
    )
  return hints


def hint_about_spelling(
  unknown: Sequence[str], known: Iterable[str], cleanings: Collection[str]
) -> str | None:
  """Describes items that the item table spells otherwise.

  Args:
    unknown: ids of interactions that the item table lacks.
    known: ids of the item table.
    cleanings: what `--clean_ids` undoes.
  """
  if not unknown:
    return None
  for cleaning in (ids.BLANKS, ids.DECIMALS):
    wanted = {*cleanings, cleaning}
    there = set(ids.clean(pa.array(list(known), pa.string()), wanted).to_pylist())
    cleaned = ids.clean(pa.array(unknown, pa.string()), wanted).to_pylist()
    alike = [old for old, name in zip(unknown, cleaned, strict=True) if name in there]
    if alike:
      return (
        f'{len(alike):,} of {len(unknown):,} items that are not in the item table are spelled'
        f' otherwise there, first {shown(alike[0])}; pass --clean_ids={cleaning}, or'
        ' spell them alike'
      )
  there = {name.lstrip('0'): name for name in known}
  alike = [name for name in unknown if name.lstrip('0') in there]
  if 2 * len(alike) > len(unknown):
    return (
      f'{len(alike):,} of {len(unknown):,} items that are not in the item table differ from its ids'
      f' in leading zeros only, first {shown(alike[0])}, there'
      f' {shown(there[alike[0].lstrip("0")])}: a program took ids for numbers; export them again as'
      ' text'
    )
  return None

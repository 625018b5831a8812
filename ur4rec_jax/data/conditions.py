r"""Reads conditions, such as `quantity > 0 and status == 'paid'`. Needs only the standard library.

A condition is one or more comparisons joined by `and`. A comparison is a column, one of
`== != < <= > >=` (or `=` and `<>`, as in SQL), and a number or a text in quotes. A column whose
name is not a plain word is written in backticks.
"""

import re
from typing import Any, NamedTuple

from ur4rec_jax.errors import InputError

_TOKENS = re.compile(
  r"""
  (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
  | '(?P<single>(?:[^']|'')*)' | "(?P<double>(?:[^"]|"")*)"
  | `(?P<column>[^`]+)` | (?P<operator><>|[<>=!]=|[<>=]) | (?P<word>\w+(?:\.\w+)*)
  """,
  re.VERBOSE,
)
_FORM = "write it like: quantity > 0 and status == 'paid'"


class Comparison(NamedTuple):
  """A comparison of a column with a value; the module's docstring lists the operators."""

  column: str
  operator: str
  value: int | float | str


def parse(text: str | None, flag: str = '--where') -> list[Comparison]:
  """Reads a condition; None gives no comparison.

  Args:
    text: the condition.
    flag: name of the condition in messages.

  Raises:
    InputError: the condition is not of the form that the module describes.
  """
  if text is None:
    return []
  tokens = [*_tokens(text, flag), ('word', 'and')]
  comparisons = []
  for start in range(0, len(tokens), 4):
    part = tokens[start : start + 4]
    kinds, values = [kind for kind, _ in part], [value for _, value in part]
    if not (
      len(part) == 4
      and kinds[0] in ('word', 'column')
      and kinds[1] == 'operator'
      and kinds[2] in ('number', 'text')
      and kinds[3] == 'word'
      and values[3].lower() == 'and'
    ):
      own = values[:-1] if start + 4 >= len(tokens) else values
      shown = ' '.join(map(str, own))
      raise InputError(f'{flag}={text}: {(shown or "nothing")!r} is no comparison; {_FORM}')
    comparisons.append(Comparison(*values[:3]))
  return comparisons


def quoted(name: str) -> str:
  """Writes the name of a column as a condition has it: in backticks unless it is a plain word."""
  return name if re.fullmatch(r'[^\W\d]\w*', name) else f'`{name}`'


def _tokens(text: str, flag: str) -> list[tuple[str, Any]]:
  tokens: list[tuple[str, Any]] = []
  at = 0
  while at < len(text):
    if text[at].isspace():
      at += 1
      continue
    found = _TOKENS.match(text, at)
    if found is None:
      raise InputError(f'{flag}={text}: cannot be read from {text[at:]!r} on; {_FORM}')
    kind = found.lastgroup or ''
    value: Any = found[kind]
    if kind in ('single', 'double'):
      quote = {'single': "'", 'double': '"'}[kind]
      kind, value = 'text', value.replace(2 * quote, quote)
    elif kind == 'number':
      value = int(value) if re.fullmatch(r'[+-]?\d+', value) else float(value)
    tokens.append((kind, value))
    at = found.end()
  return tokens

"""A small experiment with its file and tables, as a service would leave them."""

import pathlib
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv

from benchmarks.quality.experiments import simulated_tables

FILE = """
name = "fusion"
salt = "demo"
window_days = 1
planned_users = 1000

[[arms]]
name = "old"
share = 0.5

[[arms]]
name = "new"
share = 0.5
weights = {sasrec = 0.5, retriever = 0.5}

[[metrics]]
name = "conversion"
kind = "conversion"
event = "buy"

[[metrics]]
name = "click-through"
kind = "rate"
event = "click"

[[metrics]]
name = "revenue"
kind = "sum"
event = "buy"
cuped = true

[guard]
metric = "conversion"
"""


class Files(NamedTuple):
  """The file of an experiment and its two tables."""

  config: pathlib.Path
  exposures: pathlib.Path
  events: pathlib.Path

  def flags(self) -> list[str]:
    return [f'--{name}={path}' for name, path in self._asdict().items()]


def write(folder: pathlib.Path, users: int = 800, seed: int = 0, lift: float = 0.0) -> Files:
  """Writes an experiment whose arm `new` has the given relative gain."""
  files = Files(folder / 'exp.toml', folder / 'shown.csv', folder / 'done.csv')
  files.config.write_text(FILE)
  for table, path in zip(simulated_tables(users, seed, lift), files[1:], strict=True):
    write_table(table, path)
  return files


def write_table(table: pa.Table, path: pathlib.Path) -> None:
  pyarrow.csv.write_csv(table, path)


def table_of(path: pathlib.Path, text: str) -> pathlib.Path:
  """Writes a CSV file from lines with blanks around the fields."""
  rows = [','.join(field.strip() for field in line.split(',')) for line in text.strip().split('\n')]
  path.write_text('\n'.join(rows) + '\n')
  return path

"""Writes the tables of docs/large_data.md from the stored results of three benchmarks.

  python -m benchmarks.speed.large_data

The results are those of `prepare_dataset`, `open_dataset` and `stream_batches`, in
`benchmarks/results/large_data/`.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality.accuracy import put_between_marks
from benchmarks.speed import measure
from benchmarks.speed.prepare_dataset import RESULTS

PAGE = measure.ROOT / 'docs' / 'large_data.md'
# How the table calls the parts of opening that `open_dataset` measures.
_COPY = 'the training part is copied'


def tables() -> dict[str, str]:
  """Returns the table of each pair of marks in the page."""
  return {'prepare': prepare_table(), 'open': open_table(), 'stream': stream_table()}


def prepare_table() -> str:
  """Formats what preparing cost, by the number of rows."""
  found = [_read(path.stem) for path in RESULTS.glob('prepare-*m.json')]
  rows = [
    (
      f'{record["rows"]:,}',
      f'{record["seconds"]:,.0f}',
      f'{record["processor_seconds"]:,.0f}',
      f'{record["peak_mb"]:,}',
    )
    for record in sorted(found, key=lambda record: record['rows'])
  ]
  return _table(('rows', 'seconds', 'CPU seconds', 'peak MB'), rows)


def open_table() -> str:
  """Formats what opening cost with 10 million users."""
  rows = [
    (
      'the training items are copied for the device' if row['after'] == _COPY else row['after'],
      f'{row["seconds"]:.1f}',
      f'{row["rss_mb"]:,.0f}',
    )
    for row in _read('open-10m')['rows']['flat arrays']
  ]
  return _table(('after', 'seconds', 'resident MB'), rows)


def stream_table() -> str:
  """Formats speed and memory of training from memory and from the disk."""
  rows = [
    (
      name,
      f'{row["sequences_per_processor_second"]:,.0f}',
      f'{row["peak_mb"]:,.0f}',
      f'{row["rss_mb"] - row["of_files_mb"]:,.0f}',
    )
    for name, row in _read('stream-8gb')['rows'].items()
  ]
  names = ('interactions', 'sequences per CPU second', 'peak MB', 'MB without files')
  return _table(names, rows)


def _read(name: str) -> dict[str, Any]:
  return json.loads((RESULTS / f'{name}.json').read_text())


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [names, ['---'] * len(names), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main() -> None:
  """Puts the tables between their marks."""
  for name, text in tables().items():
    put_between_marks(PAGE, name, text)


if __name__ == '__main__':
  main()

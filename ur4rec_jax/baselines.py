"""Measures baselines without training on a prepared folder, under the protocol of the models.

  python -m ur4rec_jax.baselines --data_dir=data/shop

The baselines are a random order, popularity, the items that follow, item-kNN, and EASE if there are
5,000 items at most. Their settings are chosen by validation.
"""

import argparse
import json

from ur4rec_jax.errors import InputError, exit_on_reported_error, say
from ur4rec_jax.files import expand_home, write_file

SHOWN = ('hit@10', 'ndcg@10', 'mrr')


def table(rows: dict[str, dict]) -> str:
  """Formats the metrics of some models, one a line."""
  width = max(map(len, rows))
  lines = [' ' * width + ''.join(f'{name:>9}' for name in SHOWN)]
  for name, values in rows.items():
    cells = ''.join(f'{values[metric]:>9.4f}' for metric in SHOWN)
    lines.append(f'{name:<{width}}{cells}')
  return '\n'.join(lines)


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags, measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--data_dir', required=True, help='folder that data_prep.build_dataset wrote')
  add('--split', default='leave_one_out', help='leave_one_out or time')
  add('--seen_items', default='leave_out', choices=('leave_out', 'keep'), help='as in the config')
  add('--out', help='JSON file to write the metrics to')
  flags = parser.parse_args(expand_home(argv))

  # These take seconds to import, and wrong flags are answered at once.
  from ur4rec_jax.data.dataset import load_dataset
  from ur4rec_jax.evaluation.baselines import baseline_metrics
  from ur4rec_jax.evaluation.neighbours import neighbour_metrics
  from ur4rec_jax.evaluation.protocol import Protocol

  dataset = load_dataset(flags.data_dir, flags.split)
  protocol = Protocol(seen_items=flags.seen_items)
  for part in ('valid', 'test'):
    if not protocol.counts_any(dataset, part):
      raise InputError(f'--data_dir={flags.data_dir}: no user has a {part} item that counts')
  found = baseline_metrics(dataset, 'test', protocol)
  found = {name: found[name] for name in ('random', 'popularity')}
  found |= neighbour_metrics(dataset, protocol)
  if flags.out is not None:
    write_file(flags.out, json.dumps(found, indent=2) + '\n')
  protocol_line = ', '.join(f'{k}: {v}' for k, v in protocol.describe(dataset).items())
  say(f'test; {protocol_line}\n{table(found)}')


if __name__ == '__main__':
  main()
